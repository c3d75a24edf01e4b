package fsck_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/fsck"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// check runs our fsck and returns its lines too.
func check(t testing.TB, d journal.Device, repair bool) (fsck.Result, string) {
	t.Helper()
	var lines []string
	res, err := fsck.Check(context.Background(), d, fsck.Config{Repair: repair, Now: 1700000000, Report: func(s string) { lines = append(lines, s) }})
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(lines, "\n"))
	}
	return res, strings.Join(lines, "\n")
}

// TestClean: nothing is wrong with what mkfs and the kernel leave.
func TestClean(t *testing.T) {
	t.Parallel()
	for _, c := range []mkfs.Config{{}, {BlockSize: 512, Journals: 5}, {BlockSize: 1024, Journals: 3, RGMB: 32}, {SUnit: 65536, SWidth: 262144}, {Format: 1801}} {
		res, lines := check(t, gfstest.Open(t, gfstest.Make(t, 300<<20, c)), false)
		if res.Problems != 0 || res.Inodes == 0 || res.Free == 0 {
			t.Errorf("%+v: %+v\n%s", c, res, lines)
		}
	}
	res, lines := check(t, gfstest.Open(t, gfstest.Load(t, gfstest.Clean4096)), false)
	if res.Problems != 0 || res.Inodes < 1500 {
		t.Errorf("%+v\n%s", res, lines)
	}
}

// TestDirty: a dirty journal is replayed in memory, and nothing is wrong then;
// fsck.gfs2 -n reports errors on the same image (facts §4 row 1).
func TestDirty(t *testing.T) {
	t.Parallel()
	gfstest.Need(t, "fsck.gfs2")
	for _, name := range []string{gfstest.Dirty4096, gfstest.Dirty1024} {
		path := gfstest.Load(t, name)
		if err := exec.Command("fsck.gfs2", "-n", path).Run(); err == nil {
			t.Errorf("%s: fsck.gfs2 -n finds nothing: the image proves nothing", name)
		}
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		d := gfstest.Open(t, path)
		if res, lines := check(t, d, false); res.Problems != 0 || res.Replayed != 1 {
			t.Errorf("%s: %+v\n%s", name, res, lines)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: a check wrote to the device", name)
		}
		if res, lines := check(t, d, true); res.Problems != 0 || res.Replayed != 1 {
			t.Errorf("%s: %+v\n%s", name, res, lines)
		}
		gfstest.FsckClean(t, path)
	}
}

// wound is a kind of damage: it changes an image and says what must be reported.
type wound struct {
	name string
	want string
	do   func(t *testing.T, d journal.Device, f *fs.FS)
	// Some damage costs files: then only the filesystem is judged.
}

func edit(t testing.TB, d journal.Device, f *fs.FS, addr uint64, change func(b []byte)) {
	t.Helper()
	g := f.Geometry()
	b := make([]byte, g.BlockSize)
	if _, err := d.ReadAt(b, int64(addr<<g.Shift)); err != nil {
		t.Fatal(err)
	}
	change(b)
	if _, err := d.WriteAt(b, int64(addr<<g.Shift)); err != nil {
		t.Fatal(err)
	}
	f.Drop()
}

func put64(b []byte, off int, v uint64) {
	for k := range 8 {
		b[off+k] = byte(v >> (56 - 8*k))
	}
}

func field(t testing.TB, typ ondisk.MetaType, name string, v uint64) func(b []byte) {
	t.Helper()
	for _, f := range ondisk.Fields(typ) {
		if f.Name == name {
			return func(b []byte) {
				if err := f.PutUint(b, v); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Fatalf("no field %s", name)
	return nil
}

func lookup(t testing.TB, f *fs.FS, path ...string) *fs.Inode {
	t.Helper()
	ip, err := f.Lookup(path...)
	if err != nil {
		t.Fatal(err)
	}
	return ip
}

func sysfile(t testing.TB, f *fs.FS, path ...string) *fs.Inode {
	t.Helper()
	ip, err := f.System(path...)
	if err != nil {
		t.Fatal(err)
	}
	return ip
}

// setState changes a bitmap and leaves the counters.
func setState(t testing.TB, d journal.Device, f *fs.FS, addr uint64, s ondisk.BlockState) {
	t.Helper()
	rgs, err := f.RGs()
	if err != nil {
		t.Fatal(err)
	}
	i, data := fs.FindRG(rgs, addr)
	if i < 0 || !data {
		t.Fatal(addr)
	}
	blk, off, sh := f.Geometry().BitmapOffset(addr - rgs[i].Data0)
	edit(t, d, f, rgs[i].Addr+uint64(blk), func(b []byte) { b[off] = b[off]&^(3<<sh) | byte(s)<<sh })
}

func diField(path, name string, v uint64) func(t *testing.T, d journal.Device, f *fs.FS) {
	return func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, strings.Split(path, "/")...).Num.Addr, field(t, ondisk.TypeDI, name, v))
	}
}

func removeEntry(t testing.TB, d journal.Device, f *fs.FS, dir *fs.Inode, name string, counts bool) {
	t.Helper()
	tx, err := f.Begin()
	if err != nil {
		t.Fatal(err)
	}
	ip, err := fs.ReadInode(tx, dir.Num.Addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := ip.RemoveEntry(name); err != nil {
		t.Fatal(err)
	}
	for _, c := range append(tx.Fresh(), tx.Changed()...) {
		if !counts && c.Addr == dir.Num.Addr && dir.Exhash() {
			continue
		}
		edit(t, d, f, c.Addr, func(b []byte) { copy(b, c.Data) })
	}
}

func addEntry(t testing.TB, d journal.Device, f *fs.FS, dir *fs.Inode, name string, num ondisk.Inum, typ uint16) {
	t.Helper()
	tx, err := f.Begin()
	if err != nil {
		t.Fatal(err)
	}
	ip, err := fs.ReadInode(tx, dir.Num.Addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := ip.AddEntry(name, num, typ); err != nil {
		t.Fatal(err)
	}
	if err := journal.Commit(d, tx, 0); err != nil {
		t.Fatal(err)
	}
}

func firstLeaf(t testing.TB, ip *fs.Inode) uint64 {
	t.Helper()
	table, err := ip.HashTable()
	if err != nil {
		t.Fatal(err)
	}
	return table[0]
}

var wounds = []wound{
	{"link count", "links, says", diField("f100", "di_nlink", 9)},
	{"blocks", "blocks and says", diField("f100000", "di_blocks", 3)},
	{"stuffed size", "bytes, says", diField("f100", "di_size", 1<<40)},
	{"height", "levels high", diField("f100000", "di_height", 200)},
	{"mode", "impossible mode", diField("f1", "di_mode", 0)},
	{"goal", "allocation goal", diField("f100", "di_goal_meta", 1<<50)},
	{"num addr", "says that it is inode", diField("f100", "no_addr", 77)},
	{"dinode magic", "is none", diField("f100", "mh_magic", 0)},
	{"eattr", "extended attributes", diField("f100", "di_eattr", 5)},
	{"eattr elsewhere", "extended attributes", diField("f1", "di_eattr", 4655)},
	{"dir entries", "entries, says", diField("d1", "di_entries", 99)},
	{"dir size", "size", diField("d1", "di_size", 99)},
	{"exhash entries", "entries, says", diField("big", "di_entries", 3)},
	{"exhash depth", "rebuilt", diField("big", "di_depth", 5)},
	{"exhash size", "rebuilt", diField("big", "di_size", 16)},
	{"leaf magic", "no leaf", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, firstLeaf(t, lookup(t, f, "big")), field(t, ondisk.TypeLF, "mh_magic", 1))
	}},
	{"leaf depth", "rebuilt", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, firstLeaf(t, lookup(t, f, "big")), field(t, ondisk.TypeLF, "lf_depth", 1))
	}},
	{"leaf entries", "entries, says", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, firstLeaf(t, lookup(t, f, "big")), field(t, ondisk.TypeLF, "lf_entries", 1000))
	}},
	{"leaf loop", "comes twice", func(t *testing.T, d journal.Device, f *fs.FS) {
		a := firstLeaf(t, lookup(t, f, "big"))
		edit(t, d, f, a, field(t, ondisk.TypeLF, "lf_next", a))
	}},
	{"leaf record", "rebuilt", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, firstLeaf(t, lookup(t, f, "big")), func(b []byte) { b[ondisk.LeafSize+21] = 3 })
	}},
	{"hash table pointer", "rebuilt", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "big").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+8*9, 1<<45) })
	}},
	{"entry hash", "has hash", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "d1").Num.Addr, func(b []byte) { b[ondisk.DinodeSize+16] ^= 0x40 })
	}},
	{"entry type", "has type", func(t *testing.T, d journal.Device, f *fs.FS) {
		root := lookup(t, f)
		removeEntry(t, d, f, root, "f3000", true)
		addEntry(t, d, f, root, "f3000", lookup(t, f, "f4096").Num, ondisk.DTDir)
	}},
	{"entry to nothing", "which is no inode", func(t *testing.T, d journal.Device, f *fs.FS) {
		addEntry(t, d, f, lookup(t, f), "ghost", ondisk.Inum{Formal: 5, Addr: 15000}, ondisk.DTRegular)
	}},
	{"entry for another generation", "there is", func(t *testing.T, d journal.Device, f *fs.FS) {
		n := lookup(t, f, "f100").Num
		n.Formal += 1000
		addEntry(t, d, f, lookup(t, f), "stale", n, ondisk.DTRegular)
	}},
	{"second link to a directory", "second link", func(t *testing.T, d journal.Device, f *fs.FS) {
		addEntry(t, d, f, lookup(t, f), "zwei", lookup(t, f, "d1").Num, ondisk.DTDir)
	}},
	{"dot", "\".\" points", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "d1").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+8, 4660) })
	}},
	{"dotdot", "\"..\" points", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "d1").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+48+8, 4660) })
	}},
	{"lost file", "lost+found/lost_file_", func(t *testing.T, d journal.Device, f *fs.FS) {
		removeEntry(t, d, f, lookup(t, f), "f3000", true)
	}},
	{"lost directory", "lost+found/lost_dir_", func(t *testing.T, d journal.Device, f *fs.FS) {
		removeEntry(t, d, f, lookup(t, f), "d1", true)
	}},
	{"lost directory of 1500", "lost+found/lost_dir_", func(t *testing.T, d journal.Device, f *fs.FS) {
		removeEntry(t, d, f, lookup(t, f), "big", true)
	}},
	{"block marked free", "is marked free", func(t *testing.T, d journal.Device, f *fs.FS) {
		setState(t, d, f, 4691, ondisk.Free)
	}},
	{"block marked used", "is marked in use", func(t *testing.T, d journal.Device, f *fs.FS) {
		setState(t, d, f, 16000, ondisk.Used)
	}},
	{"dinode marked free", "not marked as one", func(t *testing.T, d journal.Device, f *fs.FS) {
		setState(t, d, f, lookup(t, f, "f100").Num.Addr, ondisk.Free)
	}},
	{"dinode marked used", "not marked as one", func(t *testing.T, d journal.Device, f *fs.FS) {
		setState(t, d, f, lookup(t, f, "big").Num.Addr, ondisk.Used)
	}},
	{"root marked free", "is marked free", func(t *testing.T, d journal.Device, f *fs.FS) {
		setState(t, d, f, f.Super.Root.Addr, ondisk.Free)
	}},
	{"file marked unlinked", "marked as unlinked", func(t *testing.T, d journal.Device, f *fs.FS) {
		setState(t, d, f, lookup(t, f, "f100").Num.Addr, ondisk.Unlinked)
	}},
	{"bitmap of a group wiped", "more blocks", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, 4131, func(b []byte) { clear(b[ondisk.RgrpSize:]) })
	}},
	{"rgrp counters", "counted, the header says", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, 4131, func(b []byte) { field(t, ondisk.TypeRG, "rg_free", 7)(b); ondisk.SealRgrp(b) })
	}},
	{"rgrp header", "is damaged", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, 2074, func(b []byte) { clear(b[:ondisk.RgrpSize]) })
	}},
	{"rgrp crc", "is damaged", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, 2074, field(t, ondisk.TypeRG, "rg_crc", 1))
	}},
	{"bitmap block header", "is damaged", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, 4132, field(t, ondisk.TypeRB, "mh_type", 1))
	}},
	{"rindex entry", "impossible", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, sysfile(t, f, "rindex").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+96, 99) })
	}},
	{"rindex entry wiped", "impossible", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, sysfile(t, f, "rindex").Num.Addr, func(b []byte) { clear(b[ondisk.DinodeSize+192 : ondisk.DinodeSize+288]) })
	}},
	{"rindex wiped", "no entries", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, sysfile(t, f, "rindex").Num.Addr, func(b []byte) { field(t, ondisk.TypeDI, "di_size", 0)(b); clear(b[ondisk.DinodeSize:]) })
	}},
	{"statfs", "statfs file is wrong", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, sysfile(t, f, "statfs").Num.Addr, func(b []byte) { b[ondisk.DinodeSize+15]++ })
	}},
	{"inum", "inum file has", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, sysfile(t, f, "inum").Num.Addr, field(t, ondisk.TypeDI, "di_size", 3))
	}},
	{"indirect pointer outside", "outside the filesystem", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "f1048576").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+8*5, 1<<60) })
	}},
	{"indirect block", "is no", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, 5431, func(b []byte) { clear(b) }) // of f3145728
	}},
	{"data shared by two files", "gets a copy", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "f100000").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+8, 4693) })
	}},
	{"data twice in one file", "gets a copy", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "f1048576").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+8*7, 4691) })
	}},
	{"data is a dinode", "loses it", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, lookup(t, f, "f1048576").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+8*7, 4660) })
	}},
	{"data is a leaf", "", func(t *testing.T, d journal.Device, f *fs.FS) {
		a := firstLeaf(t, lookup(t, f, "big"))
		edit(t, d, f, lookup(t, f, "f1048576").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize+8*7, a) })
	}},
	{"journal head", "cannot be replayed", func(t *testing.T, d journal.Device, f *fs.FS) {
		j, err := journal.Open(f, 1)
		if err != nil {
			t.Fatal(err)
		}
		for i := range j.Blocks() {
			edit(t, d, f, j.Addr(i), func(b []byte) { clear(b) })
		}
	}},
	{"journals missing", "missing or damaged", func(t *testing.T, d journal.Device, f *fs.FS) {
		ji := sysfile(t, f, "jindex")
		for _, n := range []string{"journal0", "journal1"} {
			removeEntry(t, d, f, ji, n, true)
			f.Drop()
		}
	}},
	{"journal inode", "missing or damaged", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, sysfile(t, f, "jindex", "journal1").Num.Addr, func(b []byte) { clear(b) })
	}},
	{"journal with a hole", "missing or damaged", func(t *testing.T, d journal.Device, f *fs.FS) {
		edit(t, d, f, sysfile(t, f, "jindex", "journal1").Num.Addr, func(b []byte) { put64(b, ondisk.DinodeSize, 0) })
	}},
	{"per_node file missing", "is missing", func(t *testing.T, d journal.Device, f *fs.FS) {
		removeEntry(t, d, f, sysfile(t, f, "per_node"), "statfs_change1", true)
	}},
}

// TestWounds: each damage is reported, repaired so that neither we nor fsck.gfs2
// find anything left, and most files survive.
func TestWounds(t *testing.T) {
	t.Parallel()
	gfstest.Need(t, "fsck.gfs2")
	base := gfstest.Load(t, gfstest.Clean4096)
	for _, w := range wounds {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			path := copyOf(t, base)
			d := gfstest.Open(t, path)
			f, err := fs.Open(d)
			if err != nil {
				t.Fatal(err)
			}
			w.do(t, d, f)
			res, lines := check(t, d, true)
			if res.Problems == 0 || res.Left != 0 || !strings.Contains(lines, w.want) {
				t.Fatalf("%+v, wanted %q\n%s", res, w.want, lines)
			}
			if res, lines2 := check(t, d, false); res.Problems != 0 {
				t.Fatalf("after repair: %+v\n%s\nrepaired was\n%s", res, lines2, lines)
			}
			gfstest.FsckClean(t, path)
			if t.Failed() {
				t.Log(lines)
			}
		})
	}
}

func copyOf(t testing.TB, path string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "copy")
	if b, err := exec.Command("cp", "--sparse=always", path, out).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return out
}

// TestRefuses: formats that we do not know are left alone (facts §4 row 23).
func TestRefuses(t *testing.T) {
	t.Parallel()
	for format, want := range map[uint32]error{1803: ondisk.ErrNewFormat, 4242: ondisk.ErrSB, 1309: ondisk.ErrGFS1} {
		d := disk.NewOverlay(gfstest.Open(t, gfstest.Make(t, 64<<20, mkfs.Config{})))
		if _, err := d.WriteAt([]byte{byte(format >> 24), byte(format >> 16), byte(format >> 8), byte(format)}, ondisk.SBOffset+24); err != nil {
			t.Fatal(err)
		}
		if _, err := fsck.Check(context.Background(), d, fsck.Config{Repair: true}); !errors.Is(err, want) {
			t.Errorf("%d: %v", format, err)
		}
	}
	d := disk.NewOverlay(gfstest.Open(t, gfstest.Sparse(t, 64<<20)))
	if _, err := fsck.Check(context.Background(), d, fsck.Config{}); !errors.Is(err, fsck.ErrNoFS) {
		t.Error(err)
	}
	_ = fmt.Sprint
}
