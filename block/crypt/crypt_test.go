package crypt

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/block/mem"
)

// fixed is a key that a test knows.
type fixed struct {
	key  []byte
	fail error
}

func (f *fixed) Load() ([]byte, error) { return f.key, nil }
func (f *fixed) Replace(k []byte) error {
	if f.fail == nil {
		f.key = bytes.Clone(k)
	}
	return f.fail
}

func keyFile(t *testing.T) *Files {
	k := KeyFile(filepath.Join(t.TempDir(), "key"))
	if err := k.Create(); err != nil {
		t.Fatal(err)
	}
	return k
}

func store(tb rapid.TB) block.Device {
	d, err := mem.New(1<<20, 512)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	k := keyFile(t)
	blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device {
		d, err := Open(store(tb), k)
		if err != nil {
			tb.Fatal(err)
		}
		return d
	}})
}

// TestVector is vector 4 of IEEE 1619-2007 cut to our use: the layout of key and
// tweak must never change, or volumes become noise.
func TestVector(t *testing.T) {
	t.Parallel()
	// IEEE 1619-2007, annex B, vector 10 (XTS-AES-256, 512 bytes, data unit ff).
	key, _ := hex.DecodeString("2718281828459045235360287471352662497757247093699959574966967627" +
		"3141592653589793238462643383279502884197169399375105820974944592")
	want, _ := hex.DecodeString("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b")
	plain := make([]byte, 512)
	for i := range plain {
		plain[i] = byte(i)
	}
	m := store(t)
	d, err := Open(m, &fixed{key: key})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.WriteAt(t.Context(), plain, 0xff*512, 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 512)
	if err := m.ReadAt(t.Context(), got, 0xff*512); err != nil || !bytes.Equal(got[:32], want) {
		t.Errorf("%x, want %x", got[:32], want)
	}
}

// TestErase: after it nothing of the old data can be read with what is left, and
// holes still read as zeroes.
func TestErase(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "key")
	k := KeyFile(path)
	if err := k.Create(); err != nil {
		t.Fatal(err)
	}
	if err := k.Create(); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	m := store(t)
	d, err := Open(m, k)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	old, err := k.Load()
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("secret! "), 512)
	if err := d.WriteAt(ctx, data, 0, block.FUA); err != nil {
		t.Fatal(err)
	}
	for range 3 { // through both slots
		if err := d.CryptoErase(ctx); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(raw, old[:32]) || bytes.Contains(raw, old[32:]) {
			t.Error("the former key is still in its file")
		}
		if now, err := k.Load(); err != nil || bytes.Equal(now, old) || !bytes.Contains(raw, now) {
			t.Error("no new key", err)
		} else {
			old = now
		}
	}
	got := make([]byte, len(data))
	if err := d.ReadAt(ctx, got, 0); err != nil {
		t.Fatal(err)
	}
	for o := 0; o < len(got); o += 16 {
		if bytes.Equal(got[o:o+16], data[o:o+16]) {
			t.Fatalf("byte %d is readable", o)
		}
	}
	if err := d.ReadAt(ctx, got, 64<<10); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
		t.Error("a hole is not zeroes", err)
	}
	if err := d.WriteAt(ctx, data, 0, 0); err != nil {
		t.Fatal(err)
	}
	again, err := Open(m, k) // what the new key wrote is there after a restart
	if err != nil {
		t.Fatal(err)
	}
	if err := again.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, data) {
		t.Error("new data are lost", err)
	}
}

// TestCutShort: wherever an erase stops, the next start has a key, and the older
// of two is destroyed.
func TestCutShort(t *testing.T) {
	t.Parallel()
	k := keyFile(t)
	first, err := k.Load()
	if err != nil {
		t.Fatal(err)
	}
	h, err := os.OpenFile(k.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	second := bytes.Repeat([]byte{9}, KeySize)
	if err := put(h, 1, 2, second); err != nil { // and the power goes
		t.Fatal(err)
	}
	if got, err := k.Load(); err != nil || !bytes.Equal(got, second) {
		t.Error("the newer key is not taken", err)
	}
	if raw, err := os.ReadFile(k.path); err != nil || bytes.Contains(raw, first[:16]) {
		t.Error("the older key stayed", err)
	}
	if _, err := h.WriteAt([]byte{1, 2, 3}, 100); err != nil { // a torn new key
		t.Fatal(err)
	}
	if got, err := k.Load(); err != nil || !bytes.Equal(got, second) {
		t.Error(err)
	}
	if _, err := h.WriteAt([]byte{1}, slotSize+20); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Load(); !errors.Is(err, ErrNoKey) {
		t.Error("a damaged key was taken:", err)
	}
	if _, err := KeyFile(k.path + ".none").Load(); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	// An erase that cannot replace the key leaves the data.
	f := &fixed{key: second}
	d, err := Open(store(t), f)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	data := bytes.Repeat([]byte{7}, 512)
	if err := d.WriteAt(t.Context(), data, 0, 0); err != nil {
		t.Fatal(err)
	}
	f.fail = errors.New("boom")
	if err := d.CryptoErase(t.Context()); !errors.Is(err, f.fail) {
		t.Error(err)
	}
	got := make([]byte, 512)
	if err := d.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, data) {
		t.Error("the key changed although it could not be kept", err)
	}
}
