package gfs

import (
	"os"
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
)

// TestGrowJadd: the two commands on an unmounted filesystem, which the
// originals refuse (facts §4 row 14).
func TestGrowJadd(t *testing.T) {
	t.Parallel()
	img := gfstest.Make(t, 64<<20, mkfs.Config{})
	if r := ours(t, "", "gfs2_grow", img); r.rc != 1 || !strings.Contains(r.err, "no room for another resource group: grow the device by at least 32 MB first") {
		t.Errorf("%+v", r)
	}
	if err := os.Truncate(img, 300<<20); err != nil {
		t.Fatal(err)
	}
	if r := ours(t, "", "gfs2_grow", "-T", img); r.rc != 0 || !strings.HasSuffix(r.out, "(Test mode--File system was not changed)\n") {
		t.Errorf("%+v", r)
	}
	r := ours(t, "", "gfs2_grow", img)
	if want := "FS: Mount point:             (not mounted)\nFS: Device:                  " + img +
		"\nFS: Size:                    16383 (0x3fff)\nDEV: Length:                 76800 (0x12c00)\nThe file system will grow by 235MB.\ngfs2_grow complete.\n"; r.rc != 0 || r.out != want {
		t.Errorf("%+v\nwant %s", r, want)
	}
	gfstest.FsckClean(t, img)
	if r := ours(t, "", "gfs2_jadd", "-j", "2", "-J", "8M", img); r.rc != 0 || r.out != "Filesystem: "+img+"\nOld journals: 1\nNew journals: 3\n" {
		t.Errorf("%+v", r)
	}
	gfstest.FsckClean(t, img)
	if r := ours(t, "", "gfs2_jadd", "-j", "9", img); r.rc != 1 || !strings.Contains(r.err, "Insufficient space on the device to add 9 128MB journals") {
		t.Errorf("%+v", r)
	}
	for _, args := range []string{"-J 4 IMG", "-j 0 IMG", "-c 99 IMG", "", "IMG IMG", "-Z IMG", "/nonexistent"} {
		if r := ours(t, "", "gfs2_jadd", strings.Fields(strings.ReplaceAll(args, "IMG", img))...); r.rc != 1 || r.err == "" {
			t.Errorf("gfs2_jadd %s: %+v", args, r)
		}
	}
	dirty := gfstest.Load(t, gfstest.Dirty4096)
	for _, name := range []string{"gfs2_jadd", "gfs2_grow"} {
		if r := ours(t, "", name, dirty); r.rc != 1 || !strings.Contains(r.err, "journal 0 is dirty") {
			t.Errorf("%s on a dirty filesystem: %+v", name, r)
		}
	}
}
