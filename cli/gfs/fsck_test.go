package gfs

import (
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
	"github.com/blockhouse-san/blockhouse/gfs/tool"
)

// TestFsck: exit statuses and the last line for each way to call it.
func TestFsck(t *testing.T) {
	t.Parallel()
	run := func(stdin string, rc int, want string, args ...string) {
		t.Helper()
		r := ours(t, stdin, "fsck.gfs2", args...)
		if r.rc != rc || !strings.Contains(r.out+r.err, want) {
			t.Errorf("fsck.gfs2 %v: rc %d, wanted %d and %q\n%s%s", args, r.rc, rc, want, r.out, r.err)
		}
	}
	clean := gfstest.Make(t, 64<<20, mkfs.Config{})
	run("", 0, ": no errors.\n", "-n", clean)
	run("", 0, ": no errors.\n", "-y", clean)
	run("", 0, ": clean.\n", "-p", clean)
	run("", 0, ": no errors.\n", "-p", "-f", clean)
	run("", 0, ": no errors.\n", clean)
	run("", 16, "may not be used together", "-n", "-y", clean)
	run("", 16, "may not be used together", "-p", "-y", clean)
	run("", 16, "no device specified")
	run("", 16, "more than one device", clean, clean)
	run("", 16, "invalid option -- 'Z'", "-Z", clean)
	run("", 16, "No such file or directory", "-n", "/nonexistent/file")
	run("", 16, "no GFS2 superblock", "-n", gfstest.Sparse(t, 64<<20))

	dirty := gfstest.Load(t, gfstest.Dirty4096)
	run("", 0, ": 1 journal to replay, no errors.\n", "-n", dirty)
	run("n\n", 4, "1 journal to replay, no errors. Repair? [y/n] ", dirty)
	run("y\n", 1, ": 1 journal to replay, no errors.\n", dirty)
	run("", 0, ": no errors.\n", "-n", dirty)
	gfstest.FsckClean(t, dirty)

	// Preen touches no cluster filesystem that a node may have mounted.
	shared := gfstest.Load(t, gfstest.Dirty4096)
	d := gfstest.Open(t, shared)
	if err := tool.EditSuper(d, func(sb *ondisk.Superblock) error {
		return tool.SetName(&sb.LockProto, "lock_dlm")
	}); err != nil {
		t.Fatal(err)
	}
	run("", 4, "a node may have it mounted", "-a", shared)
	run("", 1, ": 1 journal to replay, no errors.\n", "-y", shared)

	hurt := gfstest.Make(t, 64<<20, mkfs.Config{})
	d = gfstest.Open(t, hurt)
	f, err := fs.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte{0, 0, 0, 9}, int64(f.Super.Root.Addr)<<12+52); err != nil { // di_nlink
		t.Fatal(err)
	}
	run("", 4, "has 2 links, says 9\n", "-n", hurt)
	run("", 4, "has 2 links, says 9\n", "-n", hurt)
	run("", 1, "has 2 links, says 9\n", "-y", hurt)
	run("", 0, ": no errors.\n", "-n", hurt)
	gfstest.FsckClean(t, hurt)

	newer := gfstest.Make(t, 64<<20, mkfs.Config{})
	for v, rc := range map[byte]int{0x0b: 16, 0x01: 4} { // 1803, and garbage
		if _, err := gfstest.Open(t, newer).WriteAt([]byte{0, 0, 0x07, v}, ondisk.SBOffset+24); err != nil {
			t.Fatal(err)
		}
		run("", rc, "format", "-y", newer)
	}
}
