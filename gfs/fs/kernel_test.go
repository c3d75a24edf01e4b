package fs_test

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// tree gives the md5 of every regular file, and the inodes by path.
func tree(t testing.TB, s fs.Store, root uint64) (map[string]string, map[string]*fs.Inode) {
	sums, inodes := map[string]string{}, map[string]*fs.Inode{}
	var walk func(path string, addr uint64)
	walk = func(path string, addr uint64) {
		ip, err := fs.ReadInode(s, addr)
		if err != nil {
			t.Fatal(err)
		}
		inodes[path] = ip
		n := uint32(0)
		if !ip.IsDir() {
			if ip.Mode&ondisk.ModeMask == ondisk.ModeRegular {
				b, err := ip.ReadAll(1 << 30)
				if err != nil {
					t.Fatalf("%s: %v", path, err)
				}
				h := md5.Sum(b)
				sums[path] = hex.EncodeToString(h[:])
			}
			return
		}
		err = ip.EachEntry(func(e fs.Entry) error {
			n++
			found, err := ip.Lookup(e.Name)
			if err != nil || found != e {
				t.Errorf("look up %s/%s: %+v %v", path, e.Name, found, err)
			}
			if e.Name != "." && e.Name != ".." {
				walk(strings.TrimPrefix(path+"/"+e.Name, "/"), e.Inum.Addr)
			}
			return nil
		})
		if err != nil || n != ip.Entries {
			t.Errorf("directory %s: %d entries of %d, %v", path, n, ip.Entries, err)
		}
	}
	walk("", root)
	return sums, inodes
}

// TestKernelTree: what the kernel wrote, we read: every file's content, the
// hashed directory, attributes inline, in data blocks and indirect.
func TestKernelTree(t *testing.T) {
	t.Parallel()
	f, err := fs.Open(gfstest.Open(t, gfstest.Load(t, gfstest.Clean4096)))
	if err != nil {
		t.Fatal(err)
	}
	got, inodes := tree(t, f, f.Super.Root.Addr)
	if d := cmp.Diff(gfstest.Sums(t, gfstest.Clean4096), got); d != "" {
		t.Error(d)
	}
	if !inodes["big"].Exhash() {
		t.Error("big is no hashed directory: the image proves nothing")
	}
	if b, err := inodes["longsym"].ReadAll(4096); err != nil || string(b) != strings.Repeat("x", 2000) {
		t.Error("longsym", err)
	}
	if inodes["sparse"].Size != 50<<20+3 || inodes["f100"].Nlink != 2 || inodes["null"].Major != 1 || inodes["null"].Minor != 3 {
		t.Error("sparse, f100 or null")
	}
	eas := func(path string) map[string]string {
		m := map[string]string{}
		if err := inodes[path].EachEA(func(name string, v []byte) error {
			m[name] = string(v)
			return nil
		}); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		return m
	}
	many := map[string]string{}
	for i := range 40 {
		many[fmt.Sprintf("user.attr%03d", i)] = strings.Repeat(fmt.Sprintf("%d-", i), 60)
	}
	for path, want := range map[string]map[string]string{
		"f100":  {"user.small": "v1", "user.big": strings.Repeat("B", 3000)},
		"f1":    {"trusted.t": "tr", "user.huge": strings.Repeat("H", 20000)},
		"d1":    {"user.dir": "dd"},
		"f3000": many,
		"f0":    {},
	} {
		if d := cmp.Diff(want, eas(path)); d != "" {
			t.Errorf("%s: %s", path, d)
		}
	}
	if inodes["f3000"].Flags&ondisk.DIEAIndirect == 0 {
		t.Error("f3000 has no indirect EA block: the image proves nothing")
	}

	// Blocks of inodes, the bitmaps and the counters agree.
	used := map[uint64]ondisk.BlockState{}
	count := func(ip *fs.Inode) {
		used[ip.Num.Addr] = ondisk.DinodeSt
		n := uint64(1)
		add := func(a uint64) error { used[a] = ondisk.Used; n++; return nil }
		if err := ip.EachBlock(func(a uint64, _ int, _ bool) error { return add(a) }); err != nil {
			t.Error(err)
		}
		if err := ip.EABlocks(func(a uint64, _ ondisk.MetaType) error { return add(a) }); err != nil {
			t.Error(err)
		}
		if ip.Exhash() {
			if err := ip.EachLeaf(func(a uint64, _ []byte, _ *ondisk.Leaf) error { return add(a) }); err != nil {
				t.Error(err)
			}
		}
		if n != ip.Blocks {
			t.Errorf("inode %d has %d blocks, says %d", ip.Num.Addr, n, ip.Blocks)
		}
	}
	_, system := tree(t, f, f.Super.Master.Addr)
	for _, m := range []map[string]*fs.Inode{inodes, system} {
		for _, ip := range m {
			count(ip)
		}
	}
	rgs, err := f.RGs()
	if err != nil {
		t.Fatal(err)
	}
	var sum ondisk.StatfsChange
	for _, r := range rgs {
		sum.Total += uint64(r.Data)
		for a := r.Data0; a < r.Data0+uint64(r.Data); a++ {
			st, err := f.State(a)
			if err != nil || st != used[a] {
				t.Fatalf("block %d: bitmap says %v, the trees %v, %v", a, st, used[a], err)
			}
			switch st {
			case ondisk.Free:
				sum.Free++
			case ondisk.DinodeSt:
				sum.Dinodes++
			}
		}
	}
	if sc, err := f.Statfs(); err != nil || sc != sum {
		t.Errorf("statfs %+v, counted %+v, %v", sc, sum, err)
	}
	if n, err := f.Journals(); err != nil || n != 2 {
		t.Error(n, err)
	}
}

// TestReadOnly: an FS refuses every change.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	f, err := fs.Open(gfstest.Open(t, gfstest.Make(t, 64<<20, mkfs.Config{})))
	if err != nil {
		t.Fatal(err)
	}
	root, err := f.Root()
	if err != nil {
		t.Fatal(err)
	}
	if err := root.AddEntry("x", ondisk.Inum{Formal: 1, Addr: 1}, 8); !errors.Is(err, fs.ErrReadOnly) {
		t.Error(err)
	}
	if _, err := f.Block(1 << 40); !errors.Is(err, fs.ErrRange) {
		t.Error(err)
	}
	if _, err := f.Lookup("nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestTxDirectory: a directory grows through all its forms and shrinks again,
// in a Tx, against a map; the allocation counters stay right.
func TestTxDirectory(t *testing.T) {
	t.Parallel()
	f, err := fs.Open(gfstest.Open(t, gfstest.Make(t, 64<<20, mkfs.Config{BlockSize: 512})))
	if err != nil {
		t.Fatal(err)
	}
	tx, err := f.Begin()
	if err != nil {
		t.Fatal(err)
	}
	before, err := tx.FreeBlocks()
	if err != nil {
		t.Fatal(err)
	}
	root, err := fs.ReadInode(tx, f.Super.Root.Addr)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]ondisk.Inum{".": root.Num, "..": root.Num}
	const n = 3000
	for i := range n {
		name := fmt.Sprintf("entry-%d", i*i)
		ino := ondisk.Inum{Formal: uint64(i + 1), Addr: uint64(i + 100)}
		if err := root.AddEntry(name, ino, 8); err != nil {
			t.Fatal(err)
		}
		want[name] = ino
	}
	for i := 0; i < n; i += 3 {
		name := fmt.Sprintf("entry-%d", i*i)
		if err := root.RemoveEntry(name); err != nil {
			t.Fatal(err)
		}
		delete(want, name)
	}
	got := map[string]ondisk.Inum{}
	if err := root.EachEntry(func(e fs.Entry) error { got[e.Name] = e.Inum; return nil }); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" || int(root.Entries) != len(want) {
		t.Error(root.Entries, d)
	}
	if root.Depth < 8 {
		t.Errorf("depth %d: the table never doubled much", root.Depth)
	}
	after, err := tx.FreeBlocks()
	if err != nil || int64(after)-int64(before) != tx.FreeDelta || before-after != root.Blocks-1 {
		t.Errorf("free %d then %d, delta %d, directory of %d blocks, %v", before, after, tx.FreeDelta, root.Blocks, err)
	}
	if len(tx.Fresh()) == 0 || len(tx.Changed()) == 0 {
		t.Error("no changes")
	}
	for _, c := range tx.Fresh() {
		if bytes.Equal(c.Data, make([]byte, 512)) {
			t.Errorf("block %d is allocated and empty", c.Addr)
		}
	}
}
