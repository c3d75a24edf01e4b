package journal_test

import (
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest/powercut"
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

// sums gives the md5 of every regular file.
func sums(f *fs.FS) (map[string]string, error) {
	out := map[string]string{}
	var walk func(path string, addr uint64) error
	walk = func(path string, addr uint64) error {
		ip, err := fs.ReadInode(f, addr)
		switch {
		case err != nil:
			return err
		case ip.IsDir():
			return ip.EachEntry(func(e fs.Entry) error {
				if e.Name == "." || e.Name == ".." {
					return nil
				}
				return walk(strings.TrimPrefix(path+"/"+e.Name, "/"), e.Inum.Addr)
			})
		case ip.Mode&ondisk.ModeMask == ondisk.ModeRegular:
			b, err := ip.ReadAll(1 << 30)
			if err != nil {
				return err
			}
			h := md5.Sum(b)
			out[path] = hex.EncodeToString(h[:])
		}
		return nil
	}
	return out, walk("", f.Super.Root.Addr)
}

// afterKill is what the tree of a dirty image must hold once its journal is
// replayed: see gfs/gfstest/data/make/README.md.
func afterKill(t testing.TB, name string) map[string]string {
	want := maps.Clone(gfstest.Sums(t, name))
	for i := 1; i <= 60; i++ {
		text := fmt.Sprintf("data%d\n", i)
		if i == 1 {
			text = "synced"
		}
		h := md5.Sum([]byte(text))
		want[fmt.Sprintf("after/%d/f", i)] = hex.EncodeToString(h[:])
		delete(want, fmt.Sprintf("big/file-number-0%d", 1000+i))
	}
	return want
}

// TestKernelJournal: what a killed kernel left, replayed by us: fsck.gfs2 finds
// nothing, every file that was synced is there, and statfs is right, which
// fsck.gfs2's own replay gets wrong (facts §4 row 2).
func TestKernelJournal(t *testing.T) {
	t.Parallel()
	for _, name := range []string{gfstest.Dirty4096, gfstest.Dirty1024} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := gfstest.Load(t, name)
			d := gfstest.Open(t, path)
			f := open(t, d)
			st, dirty, err := journal.Recover(d, f, 0)
			if err != nil || !dirty || st.Replayed < 10 || st.Found < st.Replayed {
				t.Fatalf("%+v %v %v", st, dirty, err)
			}
			if _, dirty, err := journal.Recover(d, f, 0); err != nil || dirty {
				t.Fatalf("second time: %v %v", dirty, err)
			}
			if _, dirty, err := journal.Recover(d, f, 1); err != nil || dirty {
				t.Fatalf("journal 1: %v %v", dirty, err)
			}
			got, err := sums(f)
			if err != nil {
				t.Fatal(err)
			}
			// Only fsync promised anything after the sync; the log may hold less
			// of the last rounds' data, never of the metadata.
			want := afterKill(t, name)
			for p := range want {
				if strings.HasPrefix(p, "after/") && p != "after/1/f" {
					if _, ok := got[p]; !ok {
						t.Errorf("%s is missing", p)
					}
					got[p] = want[p]
				}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
			checkStatfs(t, f)
			gfstest.FsckClean(t, path)
		})
	}
}

// checkStatfs compares the statfs file with the resource groups.
func checkStatfs(t testing.TB, f *fs.FS) {
	t.Helper()
	rgs, err := f.RGs()
	if err != nil {
		t.Fatal(err)
	}
	var want ondisk.StatfsChange
	for _, r := range rgs {
		b, err := f.Block(r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		var h ondisk.Rgrp
		if err := h.Decode(b); err != nil {
			t.Fatal(err)
		}
		want.Total += uint64(r.Data)
		want.Free += uint64(h.Free)
		want.Dinodes += uint64(h.Dinodes)
	}
	if got, err := f.Statfs(); err != nil || got != want {
		t.Errorf("statfs %+v, resource groups %+v, %v", got, want, err)
	}
}

// TestReplayPowerCut: recovery cut at any write, then done again, ends in the
// same filesystem.
func TestReplayPowerCut(t *testing.T) {
	t.Parallel()
	base := gfstest.Open(t, gfstest.Load(t, gfstest.Dirty4096))
	rec := powercut.New(base)
	if _, err := journal.RecoverAll(rec, open(t, rec)); err != nil {
		t.Fatal(err)
	}
	want, err := sums(open(t, rec))
	if err != nil {
		t.Fatal(err)
	}
	states := 0
	if err := rec.Each(1, gfstest.Prove(8), func(what string, d *disk.Overlay) {
		states++
		f := open(t, d)
		if _, err := journal.RecoverAll(d, f); err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		got, err := sums(f)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", what, d)
		}
		checkStatfs(t, f)
	}); err != nil {
		t.Fatal(err)
	}
	if states < 20 {
		t.Errorf("%d states only", states)
	}
}

// TestCommitPowerCut: a transaction cut at any write is there whole or not at
// all.
func TestCommitPowerCut(t *testing.T) {
	t.Parallel()
	base := gfstest.Open(t, gfstest.Make(t, 64<<20, mkfs.Config{Journals: 2}))
	rec := powercut.New(base)
	f := open(t, rec)
	tx, err := f.Begin()
	if err != nil {
		t.Fatal(err)
	}
	first, err := tx.NextInum(200)
	if err != nil {
		t.Fatal(err)
	}
	root, err := fs.ReadInode(tx, f.Super.Root.Addr)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 { // enough for a hashed directory: many blocks
		a, err := tx.Alloc(true)
		if err != nil {
			t.Fatal(err)
		}
		ino := ondisk.Inum{Formal: first + uint64(i), Addr: a}
		ip, err := fs.NewInode(tx, ino, ondisk.ModeRegular|0o644, 0, ondisk.Inum{}, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ip.WriteAt([]byte("content"), 0); err != nil {
			t.Fatal(err)
		}
		if err := ip.Put(); err != nil {
			t.Fatal(err)
		}
		if err := root.AddEntry(fmt.Sprintf("a-file-with-a-name-%d", i), ino, ondisk.DTRegular); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.AddStatfs(); err != nil {
		t.Fatal(err)
	}
	if err := journal.Commit(rec, tx, 1); err != nil {
		t.Fatal(err)
	}
	seen := map[int]int{}
	if err := rec.Each(2, gfstest.Prove(10), func(what string, d *disk.Overlay) {
		f := open(t, d)
		if _, err := journal.RecoverAll(d, f); err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		got, err := sums(f)
		if err != nil || len(got) != 0 && len(got) != 200 {
			t.Errorf("%s: %d files, %v", what, len(got), err)
		}
		seen[len(got)]++
		checkStatfs(t, f)
	}); err != nil {
		t.Fatal(err)
	}
	if seen[0] == 0 || seen[200] == 0 {
		t.Errorf("states seen: %v", seen)
	}
	// The end state, judged by the real tool.
	path := gfstest.Make(t, 64<<20, mkfs.Config{Journals: 2})
	d := gfstest.Open(t, path)
	buf := make([]byte, 1<<20)
	for off := int64(0); off < rec.Size(); off += int64(len(buf)) {
		if _, err := rec.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	gfstest.FsckClean(t, path)
}

// TestTooBig: a transaction that the log cannot hold is refused and changes
// nothing that counts.
func TestTooBig(t *testing.T) {
	t.Parallel()
	d := gfstest.Open(t, gfstest.Make(t, 64<<20, mkfs.Config{}))
	f := open(t, d)
	tx, err := f.Begin()
	if err != nil {
		t.Fatal(err)
	}
	for a := uint64(3000); a < 3000+2048; a++ {
		if _, err := tx.Dirty(a); err != nil {
			t.Fatal(err)
		}
	}
	if err := journal.Commit(d, tx, 0); !errors.Is(err, journal.ErrTooBig) {
		t.Error(err)
	}
	j, err := journal.Open(f, 0)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := j.Head(); err != nil || !h.Clean() {
		t.Error(h, err)
	}
}

// TestDamagedJournal: no damage to a dirty journal makes recovery panic, hang
// or write outside the filesystem; it replays or says why not.
func TestDamagedJournal(t *testing.T) {
	t.Parallel()
	base := gfstest.Open(t, gfstest.Load(t, gfstest.Dirty4096))
	bf := open(t, base)
	j, err := journal.Open(bf, 0)
	if err != nil {
		t.Fatal(err)
	}
	h, err := j.Head()
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		d := disk.NewOverlay(base)
		for range rapid.IntRange(1, 4).Draw(rt, "wounds") {
			b := (h.Tail + uint32(rapid.IntRange(0, 40).Draw(rt, "block"))) % j.Blocks()
			off := rapid.IntRange(0, 127).Draw(rt, "offset")
			if _, err := d.WriteAt([]byte{rapid.Byte().Draw(rt, "byte")}, int64(j.Addr(b))<<12+int64(off)); err != nil {
				rt.Fatal(err)
			}
		}
		f, err := fs.Open(d)
		if err != nil {
			rt.Fatal(err)
		}
		_, _, err = journal.Recover(d, f, 0)
		if err != nil && !errors.Is(err, journal.ErrBroken) && !errors.Is(err, journal.ErrNoHead) && !errors.Is(err, fs.ErrCorrupt) {
			rt.Fatal(err)
		}
	})
}
