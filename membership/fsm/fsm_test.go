package fsm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
)

// counter is a machine with one number.
type counter struct {
	id   ID
	n    int
	sect uint32
}

type inc struct {
	By int `json:"by"`
}

func (inc) FSMKind() (ID, uint16, uint32) { return 9, 1, 1 }
func (c *inc) Validate() error {
	if c.By == 99 {
		return errors.New("99 is malformed")
	}
	return nil
}

func (c *counter) ID() ID          { return c.id }
func (c *counter) Version() uint32 { return c.sect }
func (c *counter) Kinds() []Kind {
	return []Kind{
		{Number: 1, Name: "inc", Since: 1, MaxVersion: 1, New: func() any { return new(inc) }},
		{Number: 2, Name: "new", Since: 3, MaxVersion: 1, New: func() any { return new(inc) }},
	}
}

func (c *counter) Apply(_ uint64, cmd any) (any, error) {
	by := cmd.(*inc).By
	switch by {
	case 0:
		return nil, &Error{Kind: KindRefused, Op: "inc", Why: "zero"}
	case 13:
		panic("unlucky")
	}
	c.n += by
	return c.n, nil
}
func (c *counter) Snapshot(w io.Writer) error { return WriteJSON(w, c.n) }
func (c *counter) Restore(v uint32, r io.Reader) (func(), error) {
	n := new(int)
	if v > 0 {
		var err error
		if n, err = ReadJSON[int](r); err != nil {
			return nil, err
		}
	}
	return func() { c.n = *n }, nil
}

func newCounter(t *testing.T) (*FSM, *counter) {
	t.Helper()
	c := &counter{id: 9, sect: 1}
	f, err := New(zap.NewNop(), c)
	if err != nil {
		t.Fatal(err)
	}
	return f, c
}

func entry(m ID, flags uint8, kind uint16, version uint32, payload string) []byte {
	return Envelope{Machine: m, Flags: flags, Kind: kind, Version: version, Payload: []byte(payload)}.Append(nil)
}

// docs/formats/fsm.md: what a node does with entries that it does not
// understand.
func TestUnknownEntries(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		entry []byte
		stop  string // "" = goes on
	}{
		{"known", entry(9, 0, 1, 1, `{"by":2}`), ""},
		{"known, ignorable", entry(9, FlagIgnorable, 1, 1, `{"by":2}`), ""},
		{"unknown kind", entry(9, 0, 77, 1, `{}`), "unknown command machine-9/77"},
		{"unknown kind, ignorable", entry(9, FlagIgnorable, 77, 1, `{}`), ""},
		{"unknown machine", entry(4, 0, 1, 1, `{}`), "unknown command pr/1"},
		{"unknown machine, ignorable", entry(4, FlagIgnorable, 1, 1, `{}`), ""},
		{"newer version", entry(9, 0, 1, 2, `{"by":2}`), "version 2, this binary knows up to 1"},
		{"newer version, ignorable", entry(9, FlagIgnorable, 1, 2, `{"by":2}`), ""},
		{"version 0", entry(9, 0, 1, 0, `{"by":2}`), "version 0"},
		{"unknown field", entry(9, 0, 1, 1, `{"by":2,"more":1}`), "unknown field"},
		{"trailing data", entry(9, 0, 1, 1, `{"by":2}{}`), "trailing data"},
		{"empty payload", entry(9, 0, 1, 1, ``), "EOF"},
		{"unknown flag", entry(9, 2, 1, 1, `{"by":2}`), "unknown flags 0x02"},
		{"machine 0", entry(0, 0, 1, 1, `{}`), "machine 0"},
		{"short", []byte{9, 0, 0}, "header alone"},
		{"panic", entry(9, 0, 1, 1, `{"by":13}`), "panicked: unlucky"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f, c := newCounter(t)
			f.ApplyEntry(1, entry(9, 0, 1, 1, `{"by":5}`))
			res, ok := f.Apply(&raft.Log{Index: 2, Data: tc.entry}).(Result)
			if !ok {
				t.Fatal("no Result")
			}
			var stop *StopError
			if tc.stop == "" {
				if res.Err != nil || f.Err() != nil || f.Index() != 2 {
					t.Fatalf("err %v, stop %v, index %d", res.Err, f.Err(), f.Index())
				}
				return
			}
			if !errors.As(res.Err, &stop) || !strings.Contains(res.Err.Error(), tc.stop) || stop.Index != 2 {
				t.Fatalf("got %v, want a stop at 2 with %q", res.Err, tc.stop)
			}
			select {
			case <-f.Stopped():
			default:
				t.Fatal("Stopped is not closed")
			}
			// Stopped for good: nothing more is applied, nothing is
			// snapshotted, waiters hear of it.
			if r := f.ApplyEntry(3, entry(9, 0, 1, 1, `{"by":1}`)); r.Err == nil || c.n != 5 || f.Index() != 1 {
				t.Fatalf("went on: %v, n %d, index %d", r.Err, c.n, f.Index())
			}
			if _, err := f.Snapshot(); err == nil {
				t.Fatal("snapshot of a stopped machine")
			}
			if err := f.Wait(context.Background(), 3); !errors.As(err, &stop) {
				t.Fatalf("wait: %v", err)
			}
		})
	}
}

func TestCheckGate(t *testing.T) {
	t.Parallel()
	f, _ := newCounter(t)
	for _, tc := range []struct {
		entry          []byte
		active, voters uint32
		want           error
	}{
		{entry(9, 0, 1, 1, `{"by":1}`), 1, 1, nil},
		{entry(9, 0, 2, 1, `{"by":1}`), 3, 3, nil},
		{entry(9, 0, 2, 1, `{"by":1}`), 3, 2, ErrRefused},
		{entry(9, 0, 2, 1, `{"by":1}`), 2, 3, ErrRefused},
		{entry(9, 0, 1, 1, `{"by":99}`), 1, 1, ErrInvalid},
		{entry(9, 0, 1, 1, `{"by":"x"}`), 1, 1, ErrInvalid},
		{entry(9, FlagIgnorable, 5, 1, `{}`), 1, 1, ErrInvalid},
	} {
		err := f.Check(tc.entry, tc.active, tc.voters)
		if tc.want == nil && err != nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s at %d/%d: %v, want %v", tc.entry, tc.active, tc.voters, err, tc.want)
		}
	}
	// The rules of a command hold when it is applied too.
	if r := f.ApplyEntry(1, entry(9, 0, 1, 1, `{"by":99}`)); !errors.Is(r.Err, ErrInvalid) || f.Err() != nil {
		t.Fatalf("got %v, stop %v", r.Err, f.Err())
	}
}

func snap(t *testing.T, f *FSM) []byte {
	t.Helper()
	b, err := f.encodeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A snapshot with any one byte changed, or cut anywhere, is refused and leaves
// the old state.
func TestSnapshotDamage(t *testing.T) {
	t.Parallel()
	f, _ := newCounter(t)
	f.ApplyEntry(7, entry(9, 0, 1, 1, `{"by":41}`))
	good := snap(t, f)
	to, c := newCounter(t)
	to.ApplyEntry(1, entry(9, 0, 1, 1, `{"by":1}`))
	for i := range good {
		for _, b := range [][]byte{flip(good, i), good[:i]} {
			if err := to.Restore(io.NopCloser(bytes.NewReader(b))); err == nil {
				t.Fatalf("damage at byte %d was accepted", i)
			}
			if c.n != 1 || to.Index() != 1 {
				t.Fatalf("damage at byte %d changed the state", i)
			}
		}
	}
	if err := to.Restore(io.NopCloser(bytes.NewReader(good))); err != nil {
		t.Fatal(err)
	}
	if c.n != 41 || to.Index() != 7 || to.Modified(9) != 7 {
		t.Fatalf("n %d, index %d", c.n, to.Index())
	}
}

func flip(b []byte, i int) []byte {
	c := bytes.Clone(b)
	c[i] ^= 0x10
	return c
}

func TestSnapshotOfOtherBinaries(t *testing.T) {
	t.Parallel()
	two, err := New(zap.NewNop(), &counter{id: 9, sect: 1}, &counter{id: 10, sect: 1})
	if err != nil {
		t.Fatal(err)
	}
	f, _ := newCounter(t)
	if err := f.Restore(io.NopCloser(bytes.NewReader(snap(t, two)))); err == nil || !strings.Contains(err.Error(), "machine-10 is unknown") {
		t.Fatalf("unknown section: %v", err)
	}
	newer, err := New(zap.NewNop(), &counter{id: 9, sect: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Restore(io.NopCloser(bytes.NewReader(snap(t, newer)))); err == nil || !strings.Contains(err.Error(), "section version 2") {
		t.Fatalf("newer section: %v", err)
	}
	// A snapshot without a section: that machine becomes empty.
	two.ApplyEntry(1, entry(10, 0, 1, 1, `{"by":3}`))
	if err := two.Restore(io.NopCloser(bytes.NewReader(snap(t, f)))); err != nil {
		t.Fatal(err)
	}
	if n := two.machines[1].(*counter).n; n != 0 {
		t.Fatalf("machine 10 kept %d", n)
	}
}

// A stopped node that gets a snapshot from past the entry goes on.
func TestRestoreEndsStop(t *testing.T) {
	t.Parallel()
	ahead, _ := newCounter(t)
	ahead.ApplyEntry(9, entry(9, 0, 1, 1, `{"by":4}`))
	f, c := newCounter(t)
	f.ApplyEntry(1, entry(9, 0, 77, 1, `{}`))
	if f.Err() == nil {
		t.Fatal("not stopped")
	}
	_, restores, next := f.Changed()
	if err := f.Restore(io.NopCloser(bytes.NewReader(snap(t, ahead)))); err != nil {
		t.Fatal(err)
	}
	<-next
	if _, r, _ := f.Changed(); r != restores+1 {
		t.Fatalf("restores %d, had %d", r, restores)
	}
	if r := f.ApplyEntry(10, entry(9, 0, 1, 1, `{"by":1}`)); r.Err != nil || c.n != 5 || f.Err() != nil {
		t.Fatalf("%v, n %d", r.Err, c.n)
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	f, _ := newCounter(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := f.Wait(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- f.Wait(context.Background(), 3) }()
	for i := range uint64(3) {
		f.ApplyEntry(i+1, entry(9, 0, 1, 1, `{"by":0}`)) // refused counts as applied
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	e := &Error{Kind: KindNoOpenFence, Op: "record fence", Object: "n1", Why: "no fence of this node is open", Next: "run x"}
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	var back *Error
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	wrapped := fmt.Errorf("outer: %w", back)
	if !errors.Is(wrapped, ErrNoOpenFence) || !errors.Is(wrapped, ErrRefused) || errors.Is(wrapped, ErrNotFound) || ExitCode(wrapped) != 9 {
		t.Fatalf("%v is of the wrong kind", wrapped)
	}
	if got := e.Error(); got != "record fence n1: no fence of this node is open; run x" {
		t.Fatal(got)
	}
	for kind, code := range map[ErrKind]int{KindOther: 1, KindInvalid: 2, KindNotFound: 3, KindExists: 4, KindConflict: 4, KindNoQuorum: 5, KindTimeout: 6, KindDenied: 7, KindUnreachable: 8, KindRefused: 9} {
		if got := ExitCode(&Error{Kind: kind}); got != code {
			t.Errorf("kind %d: exit %d, want %d", kind, got, code)
		}
	}
	if errors.Is(&Error{Kind: KindExists}, ErrConflict) != true || errors.Is(&Error{Kind: KindConflict}, ErrExists) {
		t.Error("exists is a conflict, not the other way round")
	}
}

func FuzzApplyAndRestore(f *testing.F) {
	c := &counter{id: 9, sect: 1}
	m, err := New(zap.NewNop(), c)
	if err != nil {
		f.Fatal(err)
	}
	b, err := m.encodeSnapshot()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(entry(9, 0, 1, 1, `{"by":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := New(zap.NewNop(), &counter{id: 9, sect: 1})
		if err != nil {
			t.Fatal(err)
		}
		_ = m.Restore(io.NopCloser(bytes.NewReader(b)))
		m.ApplyEntry(m.Index()+1, b)
		if e, err := ParseEnvelope(b); err == nil && !bytes.Equal(e.Append(nil), b) {
			t.Fatalf("envelope %x does not round-trip", b)
		}
	})
}
