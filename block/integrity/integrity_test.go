package integrity

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/block/mem"
)

func TestMain(m *testing.M) {
	if err := flag.Set("rapid.checks", "60"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

var (
	id = uuid.MustParse("8d3e7b2a-0c1f-4d55-9a57-0f6a3a1c9b11")
	bg = context.Background()
)

func newMem(tb rapid.TB, size int64) *mem.Mem {
	d, err := mem.New(size, 512)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func open(tb rapid.TB, data, side block.Device, tick time.Duration) *Device {
	d, err := Open(bg, data, side, Options{UUID: id, Tick: tick})
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// pair is data and checksums that outlive the device on them.
type pair struct{ data, side *mem.Mem }

func newPair(tb rapid.TB, size int64) pair {
	p := pair{newMem(tb, size), newMem(tb, SideSize(size))}
	if err := Format(bg, p.side, size, id, false); err != nil {
		tb.Fatal(err)
	}
	return p
}

// kept is a device whose Close leaves it usable: what is on a disk stays.
type kept struct{ block.Device }

func (k kept) Close() error { return k.Flush(bg) }

func (p pair) open(tb rapid.TB) *Device { return open(tb, kept{p.data}, kept{p.side}, -1) }

func TestConformance(t *testing.T) {
	t.Parallel()
	blocktest.Run(t, blocktest.Store{
		New: func(tb rapid.TB) block.Device {
			p := newPair(tb, 6<<20+512) // two regions, a short last unit
			return open(tb, p.data, p.side, time.Millisecond)
		},
	})
	t.Run("files", func(t *testing.T) {
		t.Parallel()
		dir, n := t.TempDir(), 0
		var data, side string
		try := func(tb rapid.TB, make bool) block.Device {
			o := file.Options{Cache: file.Buffered}
			f, g := file.Open, file.Open
			if make {
				n++
				data = filepath.Join(dir, "data"+string(rune('a'+n%26))+strings.Repeat("x", n/26))
				side = data + ".crc"
				f = func(p string, o file.Options) (*file.File, error) { return file.Create(p, 1<<20, o) }
				g = func(p string, o file.Options) (*file.File, error) { return file.Create(p, SideSize(1<<20), o) }
			}
			d, err := f(data, o)
			if err != nil {
				tb.Fatal(err)
			}
			s, err := g(side, o)
			if err == nil && make {
				err = Format(bg, s, 1<<20, id, false)
			}
			if err != nil {
				tb.Fatal(err)
			}
			return open(tb, d, s, 0)
		}
		blocktest.Run(t, blocktest.Store{
			New:    func(tb rapid.TB) block.Device { return try(tb, true) },
			Reopen: func(tb rapid.TB, _ block.Device) block.Device { return try(tb, false) },
		})
	})
}

// TestPowerCut: whatever a cut keeps of data and checksums, sector by sector and
// of any age,
//   - everything can be read,
//   - each sector is what it was at the last flush or one of the later writes,
//   - and a bit that flips outside of what was being written is found.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		const size, secs = 3 * region, 3 * region / 512
		p := newPair(r, size)
		// Two places in each region where writes meet; a sector's possible contents.
		may := map[int64]map[byte]bool{}
		at := func(k int64) map[byte]bool {
			if may[k] == nil {
				may[k] = map[byte]bool{0: true}
			}
			return may[k]
		}
		var v byte
		for range rapid.IntRange(1, 3).Draw(r, "lives") {
			cd, cs := fault.NewPowerCut(kept{p.data}), fault.NewPowerCut(kept{p.side})
			d := open(r, cd, cs, -1)
			now := map[int64]byte{} // written since the last flush
			touched := map[int64]bool{}
			if rapid.Bool().Draw(r, "settle") {
				d.settle(bg)
			}
			span := func() (int64, int64) {
				k := rapid.Int64Range(0, 2).Draw(r, "region")*(region/512) + rapid.Int64Range(0, 20).Draw(r, "sector")
				return k, rapid.Int64Range(1, 20).Draw(r, "sectors")
			}
			put := func(k, n int64, b byte, fua bool) {
				for ; n > 0; k, n = k+1, n-1 {
					touched[k*512/region] = true
					if fua {
						may[k] = map[byte]bool{b: true}
						delete(now, k)
					} else {
						at(k)[b] = true
						now[k] = b
					}
				}
			}
			for range rapid.IntRange(1, 12).Draw(r, "ops") {
				switch rapid.IntRange(0, 6).Draw(r, "op") {
				case 0:
					if err := d.Flush(bg); err != nil {
						r.Fatal(err)
					}
					for k, b := range now {
						may[k] = map[byte]bool{b: true}
					}
					clear(now)
				case 1:
					if err := d.cool(func(*hot) bool { return true }, 0); err != nil {
						r.Fatal(err)
					}
				case 2:
					k, n := span()
					if err := d.Unmap(bg, k*512, n*512); err != nil {
						r.Fatal(err)
					}
					put(k, n, 0, false)
				case 3:
					k, n := span()
					if v++; v == 0 {
						v++
					}
					if err := d.WriteAt(bg, bytes.Repeat([]byte{v}, int(n*512)), k*512, block.FUA); err != nil {
						r.Fatal(err)
					}
					put(k, n, v, true)
				default:
					k, n := span()
					if v++; v == 0 {
						v++
					}
					if err := d.WriteAt(bg, bytes.Repeat([]byte{v}, int(n*512)), k*512, 0); err != nil {
						r.Fatal(err)
					}
					put(k, n, v, false)
				}
			}
			keep := func(_ int64, n int) int { return rapid.IntRange(0, n).Draw(r, "kept") }
			if err := errors.Join(cd.Cut(keep), cs.Cut(keep)); err != nil {
				r.Fatal(err)
			}
			_ = d.Close() // there is no power: only the goroutines end

			d = p.open(r)
			const window = 48 // sectors; nothing was written beyond
			got := make([]byte, window*512)
			for q := range int64(3) {
				if err := d.ReadAt(bg, got, q*region); err != nil {
					r.Fatalf("after the cut: %v", err)
				}
				for j := range int64(window) {
					k, b := q*(region/512)+j, got[j*512]
					if !at(k)[b] || !bytes.Equal(got[j*512+1:(j+1)*512], got[j*512:(j+1)*512-1]) {
						r.Fatalf("sector %d holds %d, want one of %v", k, b, may[k])
					}
					may[k] = map[byte]bool{b: true} // decided, and the same for ever
				}
			}
			for q := range int64(3) {
				if _, doubt := d.st.doubt[q]; doubt && !touched[q] && !d.st.bits[0].get(q) {
					r.Fatalf("region %d is in doubt and nobody wrote to it", q)
				}
			}
			d.settle(bg)
			if s := d.Stats(); s.Doubt != 0 || s.Mismatches != 0 {
				r.Fatalf("after settling: %+v", s)
			}
			// Damage is found wherever nothing is in doubt any more.
			k := rapid.Int64Range(0, secs-1).Draw(r, "rot")
			flip(r, p.data, k)
			if err := d.ReadAt(bg, got[:512], k*512); !errors.Is(err, block.ErrChecksum) {
				r.Fatalf("sector %d is rotten and reads: %v", k, err)
			}
			flip(r, p.data, k)
			if rapid.Bool().Draw(r, "clean") {
				if err := d.Close(); err != nil {
					r.Fatal(err)
				}
				e := p.open(r)
				if n := len(e.st.doubt); n != 0 {
					r.Fatalf("%d regions in doubt after a clean end", n)
				}
				d = e
			}
			if err := d.Close(); err != nil {
				r.Fatal(err)
			}
		}
	})
}

func flip(tb rapid.TB, d block.Device, sec int64) {
	b := make([]byte, 512)
	if err := d.ReadAt(bg, b, sec*512); err != nil {
		tb.Fatal(err)
	}
	b[100] ^= 4
	if err := d.WriteAt(bg, b, sec*512, 0); err != nil {
		tb.Fatal(err)
	}
}

// TestRotAndCrash: damage in a region that nobody was writing to is found
// after a crash too; in one that was hot it is taken, and counted.
func TestRotAndCrash(t *testing.T) {
	t.Parallel()
	p := newPair(t, 3*region)
	d := p.open(t)
	w := bytes.Repeat([]byte{9}, 8192)
	for r := range int64(3) {
		if err := d.WriteAt(bg, w, r*region, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(d.Flush(bg), d.cool(func(*hot) bool { return true }, 0), d.WriteAt(bg, w, 2*region+4096, 0)); err != nil {
		t.Fatal(err)
	}
	d.stop() // and never closed: the process died
	flip(t, p.data, region/512)
	flip(t, p.data, 2*region/512)
	e := p.open(t)
	defer e.Close()
	b := make([]byte, 4096)
	if err := e.ReadAt(bg, b, region); !errors.Is(err, block.ErrChecksum) || !errors.Is(err, block.ErrMedium) {
		t.Errorf("rot in a cold region: %v", err)
	}
	if err := e.ReadAt(bg, b, 2*region); err != nil {
		t.Errorf("a unit in doubt: %v", err)
	}
	if s := e.Stats(); s.Adopted != 1 || s.Mismatches != 1 || s.Doubt != 1 || s.BadUnits != 1 || s.Bad[0] != region {
		t.Errorf("%+v", s)
	}
	// A write of the whole unit heals, a write of a part of it is refused: it would
	// give the damage a good checksum.
	if err := e.WriteAt(bg, b[:512], region+1024, 0); !errors.Is(err, block.ErrChecksum) {
		t.Errorf("a write into a damaged unit: %v", err)
	}
	if err := e.WriteZeroes(bg, region+512, 512, 0); !errors.Is(err, block.ErrChecksum) {
		t.Errorf("zeroes into a damaged unit: %v", err)
	}
	if err := errors.Join(e.WriteAt(bg, b, region, 0), e.ReadAt(bg, b, region)); err != nil {
		t.Error(err)
	}
	if s := e.Stats(); s.BadUnits != 0 {
		t.Errorf("%+v", s)
	}
}

// TestFlips: every byte of data and of entries is covered.
func TestFlips(t *testing.T) {
	t.Parallel()
	p := newPair(t, 1<<20)
	d := p.open(t)
	w := make([]byte, 64<<10)
	for k := range w {
		w[k] = byte(k * 31 >> 3)
	}
	if err := errors.Join(d.WriteAt(bg, w, 0, 0), d.Close()); err != nil {
		t.Fatal(err)
	}
	d = p.open(t)
	defer d.Close()
	b := make([]byte, 1<<20)
	g := geometryOf(1 << 20)
	for _, x := range []struct {
		dev  block.Device
		from int64
	}{{p.data, 0}, {p.side, g.entries / 512}} {
		for sec := x.from; sec < x.from+1; sec++ {
			flip(t, x.dev, sec)
			if err := d.ReadAt(bg, b, 0); !errors.Is(err, block.ErrChecksum) {
				t.Errorf("a flipped bit in sector %d of %T: %v", sec, x.dev, err)
			}
			flip(t, x.dev, sec)
		}
	}
	// A hole in place of data, and data in place of a hole.
	if err := p.data.Unmap(bg, 8192, 512); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadAt(bg, b[:4096], 8192); !errors.Is(err, block.ErrChecksum) {
		t.Errorf("lost data read as zeroes: %v", err)
	}
	flip(t, p.data, 1<<20/512-1)
	if err := d.ReadAt(bg, b[:512], 1<<20-512); !errors.Is(err, block.ErrChecksum) {
		t.Errorf("data where nothing was written: %v", err)
	}
	if err := d.ReadAt(bg, b, 0); err == nil {
		t.Error("the whole range")
	}
}

// TestAdopt: a store that has data gets its checksums, and is protected then.
func TestAdopt(t *testing.T) {
	t.Parallel()
	data, side := newMem(t, 2*region), newMem(t, SideSize(2*region))
	w := bytes.Repeat([]byte{5}, 10000/512*512)
	if err := errors.Join(data.WriteAt(bg, w, 512, 0), Format(bg, side, 2*region, id, true)); err != nil {
		t.Fatal(err)
	}
	d := open(t, kept{data}, kept{side}, time.Millisecond)
	for began := time.Now(); d.Stats().Doubt > 0; time.Sleep(time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			t.Fatalf("never settled: %+v", d.Stats())
		}
	}
	if s := d.Stats(); s.Adopted != 3 {
		t.Errorf("%+v", s)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	flip(t, data, 3)
	d = open(t, data, side, -1)
	defer d.Close()
	if err := d.ReadAt(bg, w, 0); !errors.Is(err, block.ErrChecksum) {
		t.Errorf("%v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	p := newPair(t, region)
	try := func(o Options) error { _, err := Open(bg, p.data, p.side, o); return err }
	if err := try(Options{UUID: uuid.New(), Tick: -1}); err == nil || !strings.Contains(err.Error(), "it is of volume "+id.String()) {
		t.Errorf("another volume's: %v", err)
	}
	if err := p.data.Resize(region - 4096); err != nil {
		t.Fatal(err)
	}
	if err := try(Options{UUID: id, Tick: -1}); err == nil {
		t.Error("another size was accepted")
	}
	if err := p.data.Resize(region); err != nil {
		t.Fatal(err)
	}
	flip(t, p.side, 0) // the copy is there
	d, err := Open(bg, p.data, p.side, Options{UUID: id, Tick: -1})
	if err != nil {
		t.Fatal(err)
	}
	d.stop()
	flip(t, p.side, intentsAt/512)
	d = p.open(t)
	if s := d.Stats(); !s.Damaged || s.Doubt != 1 {
		t.Errorf("damaged intents: %+v", s)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	flip(t, p.side, 1)
	if err := try(Options{UUID: id, Tick: -1}); err == nil || !strings.Contains(err.Error(), "the header is damaged") {
		t.Errorf("both headers damaged: %v", err)
	}
}

// TestFailures: checksums that cannot be made durable fail the store; an intent
// that cannot be written refuses the write; a write that failed leaves old or
// new, never an unreadable unit.
func TestFailures(t *testing.T) {
	t.Parallel()
	p := newPair(t, 3*region)
	fd, fs := fault.New(kept{p.data}), fault.New(kept{p.side})
	d := open(t, fd, fs, -1)
	w := bytes.Repeat([]byte{3}, 4096)
	boom := errors.New("boom")
	fs.Set(fault.Rule{Ops: fault.Write, Len: 8192, Err: boom})
	if err := d.WriteAt(bg, w, 0, 0); !errors.Is(err, boom) {
		t.Fatalf("without its intent: %v", err)
	}
	b := make([]byte, 4096)
	if err := p.data.ReadAt(bg, b, 0); err != nil || b[0] != 0 {
		t.Error("data were written before their intent", err)
	}
	fs.Set()
	if err := d.WriteAt(bg, w, 0, 0); err != nil {
		t.Fatal(err)
	}
	fd.Set(fault.Rule{Ops: fault.Write, Times: 1, Err: block.ErrNoSpace})
	if err := d.WriteAt(bg, w, 4096, 0); !errors.Is(err, block.ErrNoSpace) {
		t.Error(err)
	}
	fs.Set(fault.Rule{Ops: fault.Write, Off: geometryOf(3 * region).entries, Len: 1 << 20, Times: 1, Err: boom})
	if err := d.WriteAt(bg, w, 8192, 0); !errors.Is(err, boom) {
		t.Error(err)
	}
	all := make([]byte, 3*4096)
	if err := d.ReadAt(bg, all, 0); err != nil || all[8192] != 3 {
		t.Errorf("after failed writes: %v", err)
	}
	d.settle(bg)
	if s := d.Stats(); s.Doubt != 0 || s.Adopted != 1 {
		t.Errorf("%+v", s)
	}
	if err := d.Failed(); err != nil {
		t.Error(err)
	}
	fs.Set(fault.Rule{Ops: fault.Flush, Err: boom, Times: 1})
	if err := d.Flush(bg); !errors.Is(err, block.ErrFlushFailed) || !errors.Is(err, boom) {
		t.Errorf("flush: %v", err)
	}
	for op, err := range map[string]error{"flush": d.Flush(bg), "write": d.WriteAt(bg, w, 0, 0), "unmap": d.Unmap(bg, 0, 4096), "state": d.Failed(), "outer": block.Failed(fault.New(d))} {
		if !errors.Is(err, block.ErrFlushFailed) {
			t.Errorf("%s afterwards: %v", op, err)
		}
	}
	if err := d.Close(); !errors.Is(err, block.ErrFlushFailed) {
		t.Errorf("close: %v", err)
	}
	e := p.open(t)
	if e.Stats().Doubt != 1 {
		t.Errorf("a store that failed is in doubt: %+v", e.Stats())
	}
	_ = e.Close()
}

// TestIdle: regions lose their bits, by themselves and when there are too many.
func TestIdle(t *testing.T) {
	t.Parallel()
	p := newPair(t, 3*region)
	d := open(t, kept{p.data}, kept{p.side}, time.Millisecond)
	defer d.Close()
	if err := d.WriteAt(bg, make([]byte, 4096), region, 0); err != nil {
		t.Fatal(err)
	}
	on := func() bool {
		b := make([]byte, 512)
		if err := p.side.ReadAt(bg, b, intentsAt); err != nil {
			t.Fatal(err)
		}
		return (*intents)(b).get(1)
	}
	for began := time.Now(); on(); time.Sleep(time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			t.Fatal("an idle region keeps its bit")
		}
	}
	if err := d.WriteAt(bg, make([]byte, 512), region+512, 0); err != nil {
		t.Fatal(err)
	}
}

func TestScrub(t *testing.T) {
	t.Parallel()
	p := newPair(t, 3*region+512)
	d := p.open(t)
	if err := errors.Join(d.WriteAt(bg, bytes.Repeat([]byte{1}, 2<<20), 0, 0), d.Flush(bg)); err != nil {
		t.Fatal(err)
	}
	flip(t, p.data, 10)
	flip(t, p.data, 100)
	flip(t, p.data, (3*region)/512)                       // the short unit at the end
	if err := p.data.Unmap(bg, 1<<20, 4096); err != nil { // lost
		t.Fatal(err)
	}
	run := func(rate int64) Scrub {
		c := make(chan Scrub, 1)
		if err := d.StartScrub(rate, func(s Scrub) { c <- s }); err != nil {
			t.Fatal(err)
		}
		return <-c
	}
	if s := run(0); s.State != "done" || s.Bad != 4 || s.Done != 3*region+512 {
		t.Errorf("%+v", s)
	}
	if s := d.Stats(); s.BadUnits != 4 || len(s.Bad) != 4 || s.Bad[0] != 4096 {
		t.Errorf("%+v", s)
	}
	if err := d.WriteAt(bg, make([]byte, 2<<20), 0, 0); err != nil {
		t.Fatal(err)
	}
	if s := run(0); s.Bad != 1 {
		t.Errorf("after healing: %+v", s)
	}
	// The rate holds, a second one is refused, and it can be stopped.
	began := time.Now()
	if s := run(60 << 20); s.State != "done" || time.Since(began) < 150*time.Millisecond {
		t.Errorf("12 MiB at 60 MiB/s took %v: %+v", time.Since(began), s)
	}
	c := make(chan Scrub, 1)
	if err := d.StartScrub(1<<20, func(s Scrub) { c <- s }); err != nil {
		t.Fatal(err)
	}
	if err := d.StartScrub(0, nil); !errors.Is(err, ErrScrubbing) {
		t.Errorf("two at once: %v", err)
	}
	if !d.StopScrub() {
		t.Error("nothing to stop")
	}
	if s := <-c; s.State != "stopped" {
		t.Errorf("%+v", s)
	}
	if d.StopScrub() {
		t.Error("stopped twice")
	}
	if err := d.StartScrub(1, nil); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil { // ends it
		t.Error(err)
	}
}
