// Package blocktest is the conformance suite of block.Device. Every store runs
// it: the contract is written once, in block/device.go, and checked once, here.
package blocktest

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
)

// Store is what a package gives to the suite.
type Store struct {
	// New opens a fresh store that reads as zeroes, at least 256 KiB large. The
	// suite closes it.
	New func(tb rapid.TB) block.Device
	// Reopen, if not nil, opens again what d was before it was closed.
	Reopen func(tb rapid.TB, d block.Device) block.Device
}

// Run runs the suite.
func Run(t *testing.T, s Store) {
	t.Run("info", s.info)
	t.Run("model", s.model)
	t.Run("range", s.ranges)
	t.Run("close", s.closes)
	t.Run("context", s.context)
	t.Run("concurrent", s.concurrent)
	t.Run("unaligned memory", s.memory)
	if s.Reopen != nil {
		t.Run("reopen", s.reopens)
	}
}

func (s Store) info(t *testing.T) {
	d := s.New(t)
	defer d.Close()
	i := d.Info()
	if i.BlockSize != 512 && i.BlockSize != 4096 {
		t.Errorf("block size %d", i.BlockSize)
	}
	if i.Size < 256<<10 || i.Size%int64(i.BlockSize) != 0 {
		t.Errorf("size %d", i.Size)
	}
	if i.PhysBlock < i.BlockSize || i.PhysBlock%i.BlockSize != 0 {
		t.Errorf("physical block %d", i.PhysBlock)
	}
	if i.Caps.ReadOnly {
		t.Fatal("the suite needs a writable store")
	}
}

// model compares random operations with an array of bytes.
func (s Store) model(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(r *rapid.T) {
		d := s.New(r)
		defer func() {
			if err := d.Close(); err != nil {
				r.Fatalf("close: %v", err)
			}
		}()
		i := d.Info()
		bs := int64(i.BlockSize)
		// A window of 96 blocks keeps the operations on top of each other.
		const window = 96
		base := rapid.SampledFrom([]int64{0, 64<<10 - 16*bs, i.Size - window*bs}).Draw(r, "base")
		base = base / bs * bs
		want := make([]byte, window*bs)
		known := make([]bool, window) // false: unmapped on a store that does not promise zeroes
		for k := range known {
			known[k] = true
		}
		span := func() (int64, int64) {
			o := rapid.Int64Range(0, window-1).Draw(r, "block")
			return o, rapid.Int64Range(0, window-o).Draw(r, "blocks")
		}
		set := func(o, n int64, b byte, ok bool) {
			for k := o * bs; k < (o+n)*bs; k++ {
				want[k] = b
			}
			for k := o; k < o+n; k++ {
				known[k] = ok
			}
		}
		fua := func() block.Flags { return rapid.SampledFrom([]block.Flags{0, block.FUA}).Draw(r, "fua") }
		r.Repeat(map[string]func(*rapid.T){
			"write": func(r *rapid.T) {
				o, n := span()
				p := bytes.Repeat([]byte{rapid.Byte().Draw(r, "byte")}, int(n*bs))
				if n > 0 {
					p[0], p[len(p)-1] = byte(o), byte(n)
				}
				if err := d.WriteAt(ctx, p, base+o*bs, fua()); err != nil {
					r.Fatalf("write: %v", err)
				}
				set(o, n, 0, true)
				copy(want[o*bs:], p)
			},
			"read": func(r *rapid.T) {
				o, n := span()
				p := bytes.Repeat([]byte{0xA5}, int(n*bs))
				if err := d.ReadAt(ctx, p, base+o*bs); err != nil {
					r.Fatalf("read: %v", err)
				}
				for k := int64(0); k < n; k++ {
					if known[o+k] && !bytes.Equal(p[k*bs:(k+1)*bs], want[(o+k)*bs:(o+k+1)*bs]) {
						r.Fatalf("block %d: read % x..., want % x...", o+k, p[k*bs:k*bs+8], want[(o+k)*bs:(o+k)*bs+8])
					}
				}
			},
			"flush": func(r *rapid.T) {
				if err := d.Flush(ctx); err != nil {
					r.Fatalf("flush: %v", err)
				}
			},
			"unmap": func(r *rapid.T) {
				o, n := span()
				if err := d.Unmap(ctx, base+o*bs, n*bs); err != nil {
					r.Fatalf("unmap: %v", err)
				}
				set(o, n, 0, i.Caps.UnmapZeroes)
			},
			"zeroes": func(r *rapid.T) {
				o, n := span()
				fl := fua() | rapid.SampledFrom([]block.Flags{0, block.MayUnmap}).Draw(r, "may unmap")
				if err := d.WriteZeroes(ctx, base+o*bs, n*bs, fl); err != nil {
					r.Fatalf("write zeroes: %v", err)
				}
				set(o, n, 0, true)
			},
			"extents": func(r *rapid.T) {
				o, n := span()
				es, err := d.Extents(ctx, base+o*bs, n*bs)
				if err != nil {
					r.Fatalf("extents: %v", err)
				}
				at := base + o*bs
				for _, e := range es {
					if e.Off != at || e.Len <= 0 || e.Len%bs != 0 {
						r.Fatalf("extent %+v does not begin at %d", e, at)
					}
					for b := e.Off; !e.Mapped && i.Caps.UnmapZeroes && b < e.Off+e.Len; b += bs {
						if w := want[b-base : b-base+bs]; !bytes.Equal(w, make([]byte, bs)) {
							r.Fatalf("extent %+v is unmapped and holds data", e)
						}
					}
					at += e.Len
				}
				if at != base+(o+n)*bs {
					r.Fatalf("extents end at %d of %d", at, base+(o+n)*bs)
				}
			},
		})
	})
}

func (s Store) ranges(t *testing.T) {
	ctx := context.Background()
	d := s.New(t)
	defer d.Close()
	i := d.Info()
	bs := int64(i.BlockSize)
	for _, x := range []struct {
		off, n int64
		want   error
	}{
		{1, bs, block.ErrMisaligned},
		{0, bs - 1, block.ErrMisaligned},
		{bs / 2, bs, block.ErrMisaligned},
		{i.Size, bs, block.ErrOutOfRange},
		{i.Size - bs, 2 * bs, block.ErrOutOfRange},
		{-bs, bs, block.ErrOutOfRange},
		{1<<62 - bs, bs, block.ErrOutOfRange},
	} {
		p := bytes.Repeat([]byte{7}, int(x.n))
		check := func(op string, err error) {
			t.Helper()
			if !errors.Is(err, x.want) {
				t.Errorf("%s [%d,+%d): %v, want %v", op, x.off, x.n, err, x.want)
			}
		}
		check("read", d.ReadAt(ctx, p, x.off))
		check("write", d.WriteAt(ctx, p, x.off, 0))
		check("unmap", d.Unmap(ctx, x.off, x.n))
		check("write zeroes", d.WriteZeroes(ctx, x.off, x.n, 0))
		_, err := d.Extents(ctx, x.off, x.n)
		check("extents", err)
	}
	last := make([]byte, bs)
	if err := d.ReadAt(ctx, last, i.Size-bs); err != nil || !bytes.Equal(last, make([]byte, bs)) {
		t.Errorf("a refused write changed the last block: %v", err)
	}
	for _, off := range []int64{0, i.Size} { // an empty range is no error, also at the end
		if err := errors.Join(d.ReadAt(ctx, nil, off), d.WriteAt(ctx, nil, off, block.FUA), d.Unmap(ctx, off, 0), d.WriteZeroes(ctx, off, 0, 0)); err != nil {
			t.Errorf("empty range at %d: %v", off, err)
		}
	}
	if es, err := d.Extents(ctx, 0, i.Size); err != nil || len(es) == 0 {
		t.Errorf("extents of the whole device: %v %v", es, err)
	}
}

func (s Store) closes(t *testing.T) {
	ctx := context.Background()
	d := s.New(t)
	bs := d.Info().BlockSize
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, bs)
	_, xe := d.Extents(ctx, 0, int64(bs))
	for op, err := range map[string]error{
		"read": d.ReadAt(ctx, p, 0), "write": d.WriteAt(ctx, p, 0, 0), "flush": d.Flush(ctx),
		"unmap": d.Unmap(ctx, 0, int64(bs)), "zeroes": d.WriteZeroes(ctx, 0, int64(bs), 0), "extents": xe,
	} {
		if !errors.Is(err, block.ErrClosed) {
			t.Errorf("%s after close: %v", op, err)
		}
	}

	// Close with calls in flight: each either worked or is ErrClosed.
	d = s.New(t)
	var wg sync.WaitGroup
	started := make(chan struct{}, 8)
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := make([]byte, bs)
			for first := true; ; first = false {
				err := d.WriteAt(ctx, p, 0, 0)
				if first {
					started <- struct{}{}
				}
				if errors.Is(err, block.ErrClosed) {
					return
				}
				if err != nil {
					t.Errorf("write while closing: %v", err)
					return
				}
			}
		}()
	}
	for range 8 {
		<-started
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

func (s Store) context(t *testing.T) {
	d := s.New(t)
	defer d.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p := make([]byte, d.Info().BlockSize)
	for op, err := range map[string]error{"read": d.ReadAt(ctx, p, 0), "write": d.WriteAt(ctx, p, 0, 0), "flush": d.Flush(ctx)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s with an ended context: %v", op, err)
		}
	}
}

// concurrent: writers on disjoint ranges, readers everywhere; a block is never
// seen half written by its own writer.
func (s Store) concurrent(t *testing.T) {
	ctx := context.Background()
	d := s.New(t)
	defer d.Close()
	bs := int64(d.Info().BlockSize)
	const workers, rounds, span = 8, 30, 4
	var wg sync.WaitGroup
	for w := range int64(workers) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			off := w * span * bs
			got := make([]byte, span*bs)
			for k := range rounds {
				p := bytes.Repeat([]byte{byte(k) ^ byte(w<<4)}, int(span*bs))
				var err error
				switch k % 5 {
				case 3:
					clear(p)
					err = d.WriteZeroes(ctx, off, span*bs, block.MayUnmap)
				case 4:
					err = errors.Join(d.WriteAt(ctx, p, off, 0), d.Flush(ctx))
				default:
					err = d.WriteAt(ctx, p, off, 0)
				}
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
					return
				}
				if err := d.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, p) {
					t.Errorf("worker %d round %d: read % x..., want % x..., %v", w, k, got[:4], p[:4], err)
					return
				}
				if _, err := d.Extents(ctx, 0, workers*span*bs); err != nil {
					t.Errorf("extents: %v", err)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// memory: a caller's buffer may begin at any address.
func (s Store) memory(t *testing.T) {
	ctx := context.Background()
	d := s.New(t)
	defer d.Close()
	n := 24 * d.Info().BlockSize
	for _, shift := range []int{0, 1, 3, 512} {
		p := block.Alloc(n + shift)[shift:]
		for k := range p {
			p[k] = byte(k*7 + shift)
		}
		if err := d.WriteAt(ctx, p, 0, 0); err != nil {
			t.Fatalf("shift %d: %v", shift, err)
		}
		got := block.Alloc(n + 1)[1:]
		if err := d.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, p) {
			t.Errorf("shift %d: data differ, %v", shift, err)
		}
	}
}

func (s Store) reopens(t *testing.T) {
	ctx := context.Background()
	d := s.New(t)
	i := d.Info()
	p := bytes.Repeat([]byte{0x5A}, 2*i.BlockSize)
	if err := d.WriteAt(ctx, p, int64(i.BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = s.Reopen(t, d)
	defer d.Close()
	if got := d.Info(); got.Size != i.Size || got.BlockSize != i.BlockSize {
		t.Errorf("reopened as %+v, was %+v", got, i)
	}
	got := make([]byte, len(p))
	if err := d.ReadAt(ctx, got, int64(i.BlockSize)); err != nil || !bytes.Equal(got, p) {
		t.Errorf("data are gone after close and open: %v", err)
	}
}
