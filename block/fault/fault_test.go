package fault

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/block/mem"
)

func newMem(tb rapid.TB) block.Device {
	d, err := mem.New(1<<20, 512)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	t.Run("no rule", func(t *testing.T) {
		blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device { return New(newMem(tb)) }})
	})
	t.Run("power cut", func(t *testing.T) {
		blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device { return NewPowerCut(newMem(tb)) }})
	})
}

func TestRules(t *testing.T) {
	ctx := context.Background()
	boom := errors.New("boom")
	d := New(newMem(t), Rule{Ops: Write, Off: 1024, Len: 512, Skip: 1, Times: 1, Err: boom})
	defer d.Close()
	p := make([]byte, 512)
	for i, want := range []error{nil, boom, nil} {
		if err := d.WriteAt(ctx, p, 1024, 0); !errors.Is(err, want) {
			t.Errorf("write %d: %v, want %v", i, err, want)
		}
	}
	if err := d.WriteAt(ctx, p, 0, 0); err != nil {
		t.Error(err)
	}
	if d.Hits() != 1 {
		t.Errorf("%d hits", d.Hits())
	}
	d.Set(Rule{Ops: Read, Corrupt: true})
	if err := d.ReadAt(ctx, p, 0); err != nil || p[0] != 1 {
		t.Error("read data are right", err)
	}
	d.Set(Rule{Ops: Write, Corrupt: true})
	clear(p)
	_ = d.WriteAt(ctx, p, 0, 0)
	if p[0] != 0 {
		t.Error("the caller's buffer was changed")
	}
	d.Set()
	if err := d.ReadAt(ctx, p, 0); err != nil || p[0] != 1 {
		t.Error("written data are right", err)
	}
	hold := make(chan struct{})
	d.Set(Rule{Ops: Flush, Hold: hold})
	done := make(chan error, 1)
	go func() { done <- d.Flush(ctx) }()
	select {
	case err := <-done:
		t.Errorf("flush was not held: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(hold)
	if err := <-done; err != nil {
		t.Error(err)
	}
	d.Set(Rule{Ops: Unmap | Zeroes | Extents | Flush, Err: boom})
	_, xe := d.Extents(ctx, 0, 512)
	for _, err := range []error{d.Flush(ctx), d.Unmap(ctx, 0, 512), d.WriteZeroes(ctx, 0, 512, 0), xe} {
		if !errors.Is(err, boom) {
			t.Error(err)
		}
	}
}

// TestPowerCut: what was flushed or FUA survives, the rest as the cut says.
func TestPowerCut(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		ctx := context.Background()
		inner := newMem(r)
		defer inner.Close()
		d := NewPowerCut(inner)
		const blocks = 8
		may := [blocks]map[byte]bool{}
		for i := range may {
			may[i] = map[byte]bool{0: true}
		}
		var v byte
		for range rapid.IntRange(1, 30).Draw(r, "ops") {
			k := rapid.IntRange(0, blocks-1).Draw(r, "block")
			switch rapid.IntRange(0, 3).Draw(r, "op") {
			case 0:
				if err := d.Flush(ctx); err != nil {
					r.Fatal(err)
				}
				p := make([]byte, 512)
				for i := range blocks {
					_ = d.ReadAt(ctx, p, int64(i)*512)
					may[i] = map[byte]bool{p[0]: true}
				}
			case 1:
				v++
				if err := d.WriteAt(ctx, bytes.Repeat([]byte{v}, 512), int64(k)*512, block.FUA); err != nil {
					r.Fatal(err)
				}
				may[k] = map[byte]bool{v: true}
			default:
				v++
				if err := d.WriteAt(ctx, bytes.Repeat([]byte{v}, 512), int64(k)*512, 0); err != nil {
					r.Fatal(err)
				}
				may[k][v] = true
			}
		}
		if err := d.Cut(func(_ int64, n int) int { return rapid.IntRange(0, n).Draw(r, "kept") }); err != nil {
			r.Fatal(err)
		}
		p := make([]byte, 512)
		if err := d.ReadAt(ctx, p, 0); !errors.Is(err, block.ErrClosed) {
			r.Fatal("the device works without power")
		}
		for i := range blocks {
			if err := inner.ReadAt(ctx, p, int64(i)*512); err != nil {
				r.Fatal(err)
			}
			if !may[i][p[0]] || !bytes.Equal(p, bytes.Repeat(p[:1], 512)) {
				r.Fatalf("block %d holds %d, want one of %v", i, p[0], may[i])
			}
		}
	})
}

// TestLossIsReal: without a flush the cut can lose an acknowledged write; a
// wrapper that never loses anything proves nothing.
func TestLossIsReal(t *testing.T) {
	ctx := context.Background()
	inner := newMem(t)
	defer inner.Close()
	d := NewPowerCut(inner)
	p := bytes.Repeat([]byte{9}, 512)
	if err := d.WriteAt(ctx, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Cut(func(int64, int) int { return 0 }); err != nil {
		t.Fatal(err)
	}
	if err := inner.ReadAt(ctx, p, 0); err != nil || p[0] != 0 {
		t.Error("an unflushed write survived", err)
	}
}
