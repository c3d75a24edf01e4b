package grow_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest/powercut"
	"github.com/blockhouse-san/blockhouse/gfs/grow"
	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

func open(t testing.TB, d fs.Reader) *fs.FS {
	t.Helper()
	f, err := fs.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// larger enlarges the file under an image.
func larger(t testing.TB, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

func growAll(d journal.Device, f *fs.FS) error {
	p, err := grow.Plan(f, mkfs.Align{})
	if err != nil {
		return err
	}
	return grow.Grow(d, f, p)
}

// statfs compares the statfs file with the resource groups and returns the
// total.
func statfs(t testing.TB, f *fs.FS) uint64 {
	t.Helper()
	rgs, err := f.RGs()
	if err != nil {
		t.Fatal(err)
	}
	var want ondisk.StatfsChange
	for i, r := range rgs {
		b, err := f.Block(r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		var h ondisk.Rgrp
		if err := h.Decode(b); err != nil || !ondisk.RgrpCRCOK(b) {
			t.Fatalf("resource group %d: %v", i, err)
		}
		if i+1 < len(rgs) && uint64(h.Skip) != rgs[i+1].Addr-r.Addr {
			t.Errorf("resource group %d skips %d", i, h.Skip)
		}
		want.Total += uint64(r.Data)
		want.Free += uint64(h.Free)
		want.Dinodes += uint64(h.Dinodes)
	}
	if got, err := f.Statfs(); err != nil || got != want {
		t.Errorf("statfs %+v, resource groups %+v, %v", got, want, err)
	}
	return want.Total
}

// TestGrow: sizes and block sizes; fsck.gfs2 finds nothing, several times in a
// row, also from few resource groups (facts §4 rows 9 and 10).
func TestGrow(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		bs    int
		sizes []int64 // MiB
	}{
		{4096, []int64{40, 80, 200, 5000}}, {512, []int64{100, 140, 600}}, {1024, []int64{300, 340, 3000}}, {4096, []int64{1280, 1320, 40000}},
	} {
		t.Run(fmt.Sprint(c.bs, c.sizes), func(t *testing.T) {
			t.Parallel()
			path := gfstest.Make(t, c.sizes[0]<<20, mkfs.Config{BlockSize: c.bs, RGMB: 32, JournalMB: 8})
			for _, s := range c.sizes[1:] {
				larger(t, path, s<<20)
				d, err := disk.Open(path, true)
				if err != nil {
					t.Fatal(err)
				}
				f := open(t, d)
				before := statfs(t, f)
				if err := growAll(d, f); err != nil {
					t.Fatal(err)
				}
				if after := statfs(t, f); after <= before {
					t.Errorf("total %d, was %d", after, before)
				}
				if err := growAll(d, f); !errors.Is(err, grow.ErrNoRoom) {
					t.Errorf("second time: %v", err)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				gfstest.FsckClean(t, path)
			}
		})
	}
}

// TestGrowFull: a filesystem without one free block grows.
func TestGrowFull(t *testing.T) {
	t.Parallel()
	// 40 resource groups fill the stuffed rindex to its last entry.
	for _, c := range []struct {
		size int64
		bs   int
	}{{48 << 20, 4096}, {1280 << 20, 4096}, {100 << 20, 512}} {
		path := gfstest.Make(t, c.size, mkfs.Config{RGMB: 32, BlockSize: c.bs, JournalMB: 8})
		d := gfstest.Open(t, path)
		f := open(t, d)
		fill(t, d, f)
		larger(t, path, c.size+9<<30)
		d2 := gfstest.Open(t, path)
		f = open(t, d2)
		if err := growAll(d2, f); err != nil {
			t.Fatalf("%d: %v", c.size, err)
		}
		statfs(t, f)
		gfstest.FsckClean(t, path)
	}
}

// fill puts every free block into one file.
func fill(t testing.TB, d journal.Device, f *fs.FS) {
	t.Helper()
	for {
		tx, err := f.Begin()
		if err != nil {
			t.Fatal(err)
		}
		a, err := tx.Alloc(true)
		if errors.Is(err, fs.ErrNoSpace) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		n, err := tx.NextInum(1)
		if err != nil {
			t.Fatal(err)
		}
		ip, err := fs.NewInode(tx, ondisk.Inum{Formal: n, Addr: a}, ondisk.ModeRegular|0o644, 0, ondisk.Inum{}, 1)
		if err != nil {
			t.Fatal(err)
		}
		root, err := fs.ReadInode(tx, f.Super.Root.Addr)
		if err != nil {
			t.Fatal(err)
		}
		if err := root.AddEntry(fmt.Sprint("fill", n), ip.Num, ondisk.DTRegular); err != nil && !errors.Is(err, fs.ErrNoSpace) {
			t.Fatal(err)
		}
		unit := uint64(f.Geometry().BlockSize)
		var k uint64
		for ; k < 60000; k++ {
			if _, err = ip.MapNew(k); err != nil {
				break
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNoSpace) {
			t.Fatal(err)
		}
		ip.Size = k * unit
		if ip.Height == 0 {
			ip.Size = 0
		}
		if err := ip.Put(); err != nil {
			t.Fatal(err)
		}
		if err := tx.AddStatfs(); err != nil {
			t.Fatal(err)
		}
		if err := journal.Commit(d, tx, 0); err != nil {
			t.Fatal(err)
		}
		f.Drop()
	}
}

// TestGrowHalfEntry: an rindex that gfs2_grow left with part of an entry
// (facts §4 row 11).
func TestGrowHalfEntry(t *testing.T) {
	t.Parallel()
	path := gfstest.Make(t, 64<<20, mkfs.Config{})
	d := gfstest.Open(t, path)
	f := open(t, d)
	ri, err := f.System("rindex")
	if err != nil {
		t.Fatal(err)
	}
	ri.Size += 40
	b, err := f.Block(ri.Num.Addr)
	if err != nil {
		t.Fatal(err)
	}
	b = append([]byte(nil), b...)
	if err := ri.Encode(b); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(b, int64(ri.Num.Addr)<<12); err != nil {
		t.Fatal(err)
	}
	larger(t, path, 200<<20)
	d2 := gfstest.Open(t, path)
	f = open(t, d2)
	if err := growAll(d2, f); err != nil {
		t.Fatal(err)
	}
	if ri, err = f.System("rindex"); err != nil || ri.Size%ondisk.RindexSize != 0 {
		t.Error(ri.Size, err)
	}
	gfstest.FsckClean(t, path)
}

// judge writes a crash state to a file, and lets fsck.gfs2 look.
func judge(t *testing.T, what string, d *disk.Overlay) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := out.Truncate(d.Size()); err != nil {
		t.Fatal(err)
	}
	buf, zero := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < d.Size(); off += int64(len(buf)) {
		if _, err := d.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
		if string(buf) == string(zero) {
			continue
		}
		if _, err := out.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	gfstest.FsckClean(t, path)
	if t.Failed() {
		t.Fatal(what)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// cut runs a change on an image, cuts the power everywhere, recovers and checks
// that ok is true of the result; fsck.gfs2 judges every nth state.
func cut(t *testing.T, path string, limit int, change func(d journal.Device, f *fs.FS) error, ok func(f *fs.FS) bool) {
	base := gfstest.Open(t, path)
	rec := powercut.New(base)
	if err := change(rec, open(t, rec)); err != nil {
		t.Fatal(err)
	}
	n := 0
	err := rec.Each(3, limit, func(what string, d *disk.Overlay) {
		f := open(t, d)
		if _, err := journal.RecoverAll(d, f); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		statfs(t, f)
		if !ok(f) {
			t.Errorf("%s: neither old nor new", what)
		}
		if n++; n%7 == 0 {
			judge(t, what, d)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < 30 {
		t.Errorf("%d states", n)
	}
	d := disk.NewOverlay(rec)
	judge(t, "end", d)
}

func TestGrowPowerCut(t *testing.T) {
	t.Parallel()
	gfstest.Need(t, "fsck.gfs2")
	path := gfstest.Make(t, 40<<20, mkfs.Config{})
	larger(t, path, 120<<20)
	seen := map[int]bool{}
	cut(t, path, gfstest.Prove(6), growAll, func(f *fs.FS) bool {
		rgs, err := f.RGs()
		seen[len(rgs)] = true
		return err == nil && (len(rgs) == 2 || len(rgs) == 3)
	})
	if !seen[2] || !seen[3] {
		t.Error(seen)
	}
}

func addJournals(n, mb int) func(d journal.Device, f *fs.FS) error {
	return func(d journal.Device, f *fs.FS) error {
		p, err := grow.PlanJournals(f, n, mb, 1)
		if err != nil {
			return err
		}
		return grow.AddJournals(d, f, p, 1700000000, nil)
	}
}

// TestAddJournals: the new journals are clean and whole, and can carry a
// transaction; fsck.gfs2 finds nothing.
func TestAddJournals(t *testing.T) {
	t.Parallel()
	for _, bs := range []int{512, 1024, 4096} {
		t.Run(fmt.Sprint(bs), func(t *testing.T) {
			t.Parallel()
			path := gfstest.Make(t, 300<<20, mkfs.Config{BlockSize: bs, JournalMB: 8})
			d := gfstest.Open(t, path)
			f := open(t, d)
			for i, c := range [][2]int{{1, 8}, {4, 16}, {1, 32}} {
				if err := addJournals(c[0], c[1])(d, f); err != nil {
					t.Fatal(err)
				}
				n, err := f.Journals()
				if want := []int{2, 6, 7}[i]; err != nil || n != want {
					t.Fatalf("%d journals, want %d, %v", n, want, err)
				}
				statfs(t, f)
			}
			for i := range 7 {
				j, err := journal.Open(f, i)
				if err != nil {
					t.Fatal(err)
				}
				if h, err := j.Head(); err != nil || !h.Clean() {
					t.Errorf("journal %d: %+v %v", i, h, err)
				}
			}
			tx, err := f.Begin()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.NextInum(5); err != nil {
				t.Fatal(err)
			}
			if err := journal.Commit(d, tx, 6); err != nil {
				t.Error(err)
			}
			gfstest.FsckClean(t, path)
		})
	}
}

func TestAddJournalsPowerCut(t *testing.T) {
	t.Parallel()
	gfstest.Need(t, "fsck.gfs2")
	path := gfstest.Make(t, 64<<20, mkfs.Config{})
	seen := map[int]bool{}
	cut(t, path, gfstest.Prove(5), addJournals(2, 8), func(f *fs.FS) bool {
		n, err := f.Journals()
		seen[n] = true
		return err == nil && (n == 1 || n == 3)
	})
	if !seen[1] || !seen[3] {
		t.Error(seen)
	}
}

// TestAddJournalsNoSpace: too little space is known before anything is written
// (facts §4 row 12), and an aged filesystem gets its journals in pieces.
func TestAddJournalsNoSpace(t *testing.T) {
	t.Parallel()
	path := gfstest.Make(t, 64<<20, mkfs.Config{})
	d := gfstest.Open(t, path)
	f := open(t, d)
	if p, err := grow.PlanJournals(f, 5, 32, 1); !errors.Is(err, grow.ErrSpace) || p.Need <= p.Free {
		t.Errorf("%+v %v", p, err)
	}
	// Every third block in use: no run of three.
	tx, err := f.Begin()
	if err != nil {
		t.Fatal(err)
	}
	rgs, err := f.RGs()
	if err != nil {
		t.Fatal(err)
	}
	last := rgs[len(rgs)-1]
	for a := last.Data0 + 1000; a < last.Data0+uint64(last.Data); a += 3 {
		if err := tx.SetState(a, ondisk.Used); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.AddStatfs(); err != nil {
		t.Fatal(err)
	}
	if err := journal.Commit(d, tx, 0); err != nil {
		t.Fatal(err)
	}
	if err := addJournals(1, 8)(d, f); err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(f, 1)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := j.Head(); err != nil || !h.Clean() || h.Blkno != 2047 {
		t.Errorf("%+v %v", h, err)
	}
	statfs(t, f)
}
