package atomic

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/block/mem"
)

func store(tb rapid.TB, size int64) block.Device {
	d, err := mem.New(size, 512)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func open(tb rapid.TB, dev, journal block.Device) *Device {
	d, err := Open(context.Background(), dev, journal, [16]byte{7})
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device { return open(tb, store(tb, 1<<20), store(tb, JournalSize)) }})
}

// keepOpen hides Close: a store outlives the power of what is above it.
type keepOpen struct{ block.Device }

func (keepOpen) Close() error { return nil }

// dying loses its power at the n-th call that changes anything, on either store,
// in the middle of that call: some of its blocks are written.
type dying struct {
	*fault.PowerCut
	left *int
	dead *bool
	keep func(blk int64, n int) int
}

func (d *dying) tick() bool {
	*d.left--
	if *d.left == 0 {
		*d.dead = true
	}
	return *d.dead
}

func (d *dying) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	if *d.dead {
		return block.ErrClosed
	}
	if d.tick() {
		_ = d.PowerCut.WriteAt(ctx, p, off, 0) // torn: Cut decides block by block
		return block.ErrClosed
	}
	return d.PowerCut.WriteAt(ctx, p, off, fl)
}

func (d *dying) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	if *d.dead || d.tick() {
		return block.ErrClosed
	}
	return d.PowerCut.WriteZeroes(ctx, off, n, fl)
}

func (d *dying) Flush(ctx context.Context) error {
	if *d.dead || d.tick() {
		return block.ErrClosed
	}
	return d.PowerCut.Flush(ctx)
}

// TestPowerCut: at whatever call the power goes, and whichever blocks of the
// torn writes the disks kept, the range holds all of the old or all of the new;
// and the new when the write was acknowledged.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	torn := 0
	rapid.Check(t, func(t *rapid.T) {
		ctx := context.Background()
		under, jr := store(t, 1<<20), store(t, JournalSize)
		defer under.Close()
		defer jr.Close()
		const off, n = 8192, 5 * 4096
		old := bytes.Repeat([]byte{0xAA}, n)
		if rapid.Bool().Draw(t, "hole") {
			clear(old[4096:12288])
		}
		if err := under.WriteAt(ctx, old, off, block.FUA); err != nil {
			t.Fatal(err)
		}
		left, dead := rapid.IntRange(1, 6).Draw(t, "calls"), false
		keep := func(int64, int) int { return rapid.IntRange(0, 1).Draw(t, "kept") }
		a := &dying{fault.NewPowerCut(keepOpen{under}), &left, &dead, keep}
		b := &dying{fault.NewPowerCut(keepOpen{jr}), &left, &dead, keep}
		d := open(t, a, b)
		neu := bytes.Repeat([]byte{0x55}, n)
		acked := d.WriteAtomic(ctx, neu, off) == nil
		if err := errors.Join(a.Cut(keep), b.Cut(keep)); err != nil {
			t.Fatal(err)
		}
		d2 := open(t, under, jr)
		got := make([]byte, n)
		if err := d2.ReadAt(ctx, got, off); err != nil {
			t.Fatal(err)
		}
		isOld, isNew := bytes.Equal(got, old), bytes.Equal(got, neu)
		if !isOld && !isNew || acked && !isNew {
			t.Fatalf("after a power cut: old %v, new %v, acknowledged %v", isOld, isNew, acked)
		}
		if isOld && !acked {
			torn++
		}
	})
	if torn == 0 {
		t.Error("no cut fell into a write")
	}
}

// TestUndo: a write that fails half way leaves what was there, also in memory.
func TestUndo(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	f := fault.New(store(t, 1<<20))
	jf := fault.New(store(t, JournalSize))
	d := open(t, f, jf)
	defer d.Close()
	old := bytes.Repeat([]byte{1}, 8192)
	if err := d.WriteAt(ctx, old, 0, 0); err != nil {
		t.Fatal(err)
	}
	neu := bytes.Repeat([]byte{2}, 8192)
	f.Set(fault.Rule{Ops: fault.Write, Err: block.ErrNoSpace, Times: 1})
	if err := d.WriteAtomic(ctx, neu, 0); !errors.Is(err, block.ErrNoSpace) {
		t.Error(err)
	}
	got := make([]byte, 8192)
	if err := d.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, old) {
		t.Error("the range changed", err)
	}
	if err := d.WriteAtomic(ctx, neu, 0); err != nil { // the next one is whole
		t.Error(err)
	}
	// A journal that is full does no harm, and touches nothing.
	jf.Set(fault.Rule{Ops: fault.Write, Err: block.ErrNoSpace, Times: 1})
	f.Set(fault.Rule{Ops: fault.Write | fault.Zeroes | fault.Flush, Err: block.ErrNoSpace})
	if err := d.WriteAtomic(ctx, old, 0); !errors.Is(err, block.ErrNoSpace) {
		t.Error(err)
	}
	f.Set()
	if err := errors.Join(block.Failed(d), d.WriteAt(ctx, neu, 0, 0), d.WriteAtomic(ctx, neu, 0)); err != nil {
		t.Error("after a full journal:", err)
	}
	// What cannot be undone stops the store.
	f.Set(fault.Rule{Ops: fault.Write, Err: block.ErrMedium})
	if err := d.WriteAtomic(ctx, old, 0); !errors.Is(err, block.ErrMedium) {
		t.Error(err)
	}
	f.Set()
	if err := d.WriteAt(ctx, old, 0, 0); !errors.Is(err, block.ErrMedium) {
		t.Error("a write over an unsettled record:", err)
	}
	if err := block.Failed(d); !errors.Is(err, block.ErrMedium) {
		t.Error("the store is said to be good:", err)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := t.TempDir()
	mk := func(name string, size int64) block.Device {
		f, err := file.Create(filepath.Join(dir, name), size, file.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	d := open(t, mk("data", 8<<20), mk("journal", JournalSize))
	longest, unit := d.AtomicLimits()
	for _, x := range []struct {
		off, n int64
		want   error
	}{
		{0, longest, nil}, {unit, unit, nil}, {512, unit, block.ErrMisaligned}, {0, 512, block.ErrMisaligned},
		{0, longest + unit, block.ErrOutOfRange}, {8 << 20, unit, block.ErrOutOfRange}, {0, 0, nil},
	} {
		if err := d.WriteAtomic(ctx, make([]byte, x.n), x.off); !errors.Is(err, x.want) {
			t.Errorf("[%d,+%d): %v, want %v", x.off, x.n, err, x.want)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	// A journal of another store is not obeyed.
	a, j := store(t, 1<<20), store(t, JournalSize)
	f := fault.New(a)
	d = open(t, f, keepOpen{j})
	f.Set(fault.Rule{Ops: fault.Write | fault.Zeroes | fault.Flush, Err: block.ErrMedium})
	_ = d.WriteAtomic(ctx, make([]byte, 4096), 0)
	if _, err := Open(ctx, a, j, [16]byte{8}); !errors.Is(err, ErrForeign) {
		t.Error(err)
	}
	if _, err := Open(ctx, a, a, [16]byte{8}); err == nil {
		t.Error("a journal that is too small was taken")
	}
}

type unlike struct {
	block.Device
	info block.Info
}

func (u unlike) Info() block.Info { return u.info }

// TestNoAtomicWrites: where there are none the limits say so.
func TestNoAtomicWrites(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*block.Info){
		"read-only":             func(i *block.Info) { i.Caps.ReadOnly = true },
		"a long physical block": func(i *block.Info) { i.PhysBlock = 2 * Longest },
	} {
		u := unlike{Device: store(t, 1<<20)}
		u.info = u.Device.Info()
		change(&u.info)
		d := open(t, u, store(t, JournalSize))
		if n, unit := d.AtomicLimits(); n != 0 || unit != 0 {
			t.Errorf("%s: %d bytes in units of %d", name, n, unit)
		}
		if err := d.WriteAtomic(t.Context(), nil, 0); err != nil {
			t.Errorf("%s: nothing to write: %v", name, err)
		}
		if err := d.WriteAtomic(t.Context(), make([]byte, 4096), 0); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("%s: %v", name, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestPassThrough: reads, writes and flushes cost no allocation more than those
// of the store.
func TestPassThrough(t *testing.T) {
	ctx, s := t.Context(), store(t, 1<<20)
	d := open(t, s, store(t, JournalSize))
	defer d.Close()
	p := make([]byte, 4096)
	allocs := func(d block.Device) float64 {
		return testing.AllocsPerRun(100, func() {
			if err := errors.Join(d.WriteAt(ctx, p, 0, 0), d.ReadAt(ctx, p, 0), d.Flush(ctx)); err != nil {
				t.Fatal(err)
			}
		})
	}
	if a, b := allocs(s), allocs(d); b > a {
		t.Errorf("%v allocations, %v of them the store's", b, a)
	}
}

func BenchmarkWrite(b *testing.B) {
	s, err := mem.New(1<<20, 512)
	if err != nil {
		b.Fatal(err)
	}
	j, err := mem.New(JournalSize, 512)
	if err != nil {
		b.Fatal(err)
	}
	d, err := Open(b.Context(), s, j, [16]byte{7})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, 4096)
	for name, dev := range map[string]block.Device{"store": s, "journal": d} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := dev.WriteAt(b.Context(), p, 0, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
