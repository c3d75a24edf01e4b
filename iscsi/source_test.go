package iscsi

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// chunky gives at most n bytes at a time and remembers the reads that it saw.
type chunky struct {
	r     io.Reader
	n     int
	asked []int
}

func (c *chunky) Read(p []byte) (int, error) {
	c.asked = append(c.asked, len(p))
	return c.r.Read(p[:min(len(p), c.n)])
}

// Whatever is read and dropped in whatever pieces, the stream is the source's.
func TestBufferStream(t *testing.T) {
	t.Parallel()
	want := make([]byte, 2<<20)
	for i := range want {
		want[i] = byte(i*7 + i>>8)
	}
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 1))
		src := io.Reader(&chunky{r: bytes.NewReader(want), n: 1 + r.IntN(100<<10)})
		if seed%2 == 1 {
			src = iotest.DataErrReader(src) // the last bytes come with the error
		}
		b := NewBuffer(src)
		at := 0
		for at < len(want) {
			n := min(1+r.IntN(1<<(1+r.IntN(18))), len(want)-at)
			if r.IntN(3) == 0 {
				if k, err := b.Discard(n); k != n || err != nil {
					t.Fatalf("seed %d: Discard(%d) at %d: %d, %v", seed, n, at, k, err)
				}
			} else {
				p := make([]byte, n)
				if _, err := io.ReadFull(b, p); err != nil || !bytes.Equal(p, want[at:at+n]) {
					t.Fatalf("seed %d: %d bytes at %d: %v", seed, n, at, err)
				}
			}
			at += n
		}
		if n, err := b.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Fatalf("seed %d: at the end: %d, %v", seed, n, err)
		}
		if n, err := b.Discard(1); n != 0 || !errors.Is(err, io.EOF) {
			t.Fatalf("seed %d: drop at the end: %d, %v", seed, n, err)
		}
	}
}

// Long data are read into the caller's slice; then little is read ahead, and after
// short PDUs much again.
func TestBufferReadsPastItself(t *testing.T) {
	t.Parallel()
	src := &chunky{r: bytes.NewReader(make([]byte, 1<<20)), n: 1 << 20}
	b := NewBuffer(src)
	read := func(n int) {
		t.Helper()
		if _, err := io.ReadFull(b, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	read(48)       // 64 KiB ahead
	read(64 << 10) // the rest of them and 48 bytes more
	read(100 << 10)
	read(48)             // 1 KiB ahead
	read(shortFill - 48) // all of it
	read(48)
	want := []int{bufferSize, bufferSize, 100<<10 - (bufferSize - 48), shortFill, bufferSize}
	for i, n := range want {
		if i >= len(src.asked) || src.asked[i] != n {
			t.Fatalf("reads %v, want %v", src.asked, want)
		}
	}
	bad := errors.New("bad")
	if _, err := NewBuffer(iotest.ErrReader(bad)).Read(make([]byte, 1<<20)); !errors.Is(err, bad) {
		t.Errorf("error of the source: %v", err)
	}
}
