package journal

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// run writes n records and returns the file and the notes.
func run(t *testing.T, n, slots uint64) (*os.File, []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	var notes bytes.Buffer
	w := &Writer{To: f, Slots: slots, Run: 7, Notes: &notes, Buf: make([]byte, Size)}
	var k uint64
	if got, err := w.Write(func() bool { k++; return k > n }); err != nil || got != n {
		t.Fatalf("wrote %d, %v", got, err)
	}
	return f, notes.Bytes()
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		n     uint64
		spoil func(t *testing.T, f *os.File, notes []byte) []byte
		want  error // nil: found in order
		ahead int
	}{
		{"none", 0, nil, nil, 0},
		{"some", 3, nil, nil, 0},
		{"wrapped", 21, nil, nil, 0},
		{"half a note", 3, func(_ *testing.T, _ *os.File, n []byte) []byte { return n[:20] }, nil, 0},
		{"the answer to the last one was lost", 21, func(_ *testing.T, _ *os.File, n []byte) []byte { return n[:len(n)-8] }, nil, 1},
		{"last record gone", 21, func(t *testing.T, f *os.File, n []byte) []byte { old(t, f, 4, 13); return n }, ErrLost, 0},
		{"one bit", 21, func(t *testing.T, f *os.File, n []byte) []byte {
			if _, err := f.WriteAt([]byte{0}, 2*Size+2000); err != nil {
				t.Fatal(err)
			}
			return n
		}, ErrLost, 0},
		{"never written", 5, func(t *testing.T, f *os.File, n []byte) []byte {
			if _, err := f.WriteAt(make([]byte, Size), 3*Size); err != nil {
				t.Fatal(err)
			}
			return n
		}, ErrLost, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, notes := run(t, c.n, 8)
			if c.spoil != nil {
				notes = c.spoil(t, f, notes)
			}
			r, err := Check(f, 8, 7, notes)
			if !errors.Is(err, c.want) || c.want == nil && (err != nil || r.Acked != uint64(len(notes)/8)) {
				t.Errorf("%+v, %v; want %v", r, err, c.want)
			}
			if c.want == nil && r.Ahead != c.ahead {
				t.Errorf("ahead: %d, want %d", r.Ahead, c.ahead)
			}
		})
	}
	f, notes := run(t, 3, 8)
	if _, err := Check(f, 8, 8, notes); !errors.Is(err, ErrLost) {
		t.Errorf("another run's records: %v", err)
	}
}

// old puts record n into a slot, as if a later write had not happened.
func old(t *testing.T, f *os.File, slot int64, n uint64) {
	t.Helper()
	b := make([]byte, Size)
	fill(b, 7, n)
	if _, err := f.WriteAt(b, slot*Size); err != nil {
		t.Fatal(err)
	}
}
