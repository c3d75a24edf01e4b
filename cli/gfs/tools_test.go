package gfs

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
	"github.com/blockhouse-san/blockhouse/gfs/tool"
)

// TestTunegfs2: the same script on the same filesystem gives the same answers
// and the same superblock as the real tool.
func TestTunegfs2(t *testing.T) {
	t.Parallel()
	need(t, "tunegfs2", "fsck.gfs2")
	img := [2]string{}
	for i := range img {
		img[i] = gfstest.Make(t, 64<<20, mkfs.Config{Format: 1801, UUID: [16]byte{7, 7}})
	}
	for _, c := range []string{
		"-l IMG", "-L newc:newfs IMG", "-l IMG", "-o lockproto=lock_dlm,locktable=a:b IMG", "-l IMG",
		"-U 1b4e28ba-2fa1-11d2-883f-b9a761bde3fb IMG", "-r 1802 IMG", "-l IMG", "-r 1801 IMG", "-r 1803 IMG", "-r x IMG",
		"-L abc IMG", "-L a:b:c IMG", "-o lockproto=foo IMG", "", "IMG", "-l /nonexistent/x", "-l IMG IMG",
		"-L x:" + strings.Repeat("a", 70) + " IMG", "-o lockproto=lock_nolock IMG", "-L x IMG", "-l IMG", "-h",
	} {
		var r [2]result
		for i := range img {
			args := strings.Fields(strings.ReplaceAll(c, "IMG", img[i]))
			if i == 0 {
				r[i] = theirs(t, "", "tunegfs2", args...)
			} else {
				r[i] = ours(t, "", "tunegfs2", args...)
			}
		}
		if d := cmp.Diff(r[0], r[1], cmp.AllowUnexported(result{})); d != "" {
			t.Errorf("tunegfs2 %s: -real +ours\n%s", c, d)
		}
	}
	var sb [2]ondisk.Superblock
	for i := range img {
		s, err := tool.ReadSuper(gfstest.Open(t, img[i]))
		if err != nil {
			t.Fatal(err)
		}
		// The real one leaves the rest of a longer name behind the new one.
		if err := tool.SetName(&s.LockTable, ondisk.CString(s.LockTable[:])); err != nil {
			t.Fatal(err)
		}
		sb[i] = s
	}
	if d := cmp.Diff(sb[0], sb[1]); d != "" {
		t.Error(d)
	}
	gfstest.FsckClean(t, img[1])
	// Where the real one says nothing and does nothing.
	for args, want := range map[string]string{"-U zz": "Invalid UUID 'zz'", "-o foo=1": "Invalid option 'foo'"} {
		if r := ours(t, "", "tunegfs2", append(strings.Fields(args), img[1])...); r.rc != 65 || !strings.HasPrefix(r.err, want) {
			t.Errorf("%s: %+v", args, r)
		}
	}
}

// TestGfsTool: gfs_tool on a device; the layout of df is GFS1's.
func TestGfsTool(t *testing.T) {
	t.Parallel()
	img := gfstest.Make(t, 64<<20, mkfs.Config{LockTable: "gfscluster:gfslv", Journals: 2})
	r := ours(t, "", "gfs_tool", "df", img)
	want := img + `:
  SB lock proto = "lock_dlm"
  SB lock table = "gfscluster:gfslv"
  SB ondisk format = 1802
  SB multihost format = 1900
  Block size = 4096
  Journals = 2
  Resource Groups = 3
  Mounted lock proto = ""
  Mounted lock table = ""
  Mounted host data = ""
  Journal number = 
  Lock module flags = 0x00000000
  Local flocks = FALSE
  Local caching = FALSE
  Oopses OK = TRUE

  Type           Total          Used           Free           use%           
  ------------------------------------------------------------------------
  inodes         11742          16             11726          0%             
  metadata       11726          0              11726          0%             
  data           16344          4618           11726          28%            
`
	if d := cmp.Diff(want, r.out); d != "" || r.rc != 0 {
		t.Errorf("%+v\n%s", r.err, d)
	}
	for _, c := range []struct {
		in, args, out string
		rc            int
	}{
		{"", "sb IMG proto", "current lock protocol name = \"lock_dlm\"\n", 0},
		{"y\n", "sb IMG table other:name", "new lock table name = \"other:name\"\nDone\n", 0},
		{"n\n", "sb IMG table third:name", "You shouldn't change any of these values if the filesystem is mounted.\n", 1},
		{"y\n", "sb IMG table bad", "current lock table name = \"other:name\"\n", 1},
		{"", "sb IMG all", "  sb_locktable = other:name\n", 0},
		{"", "getsb IMG", "  sb_bsize = 4096\n", 0},
		{"", "jindex IMG", "Journal 1:\n  no_formal_ino = 2\n  no_addr = 2075\n  di_size = 8388608\n", 0},
		{"", "journals IMG", "journal1 - 8MB\n2 journal(s) found.\n", 0},
		{"", "rindex IMG", "RG 2:\n  ri_addr = 4131\n", 0},
		{"", "quota IMG", " user         0:  limit: 0          warn: 0          value: 1", 0},
		{"", "layout IMG /", "dinode ", 0},
		{"", "stat IMG /", "  di_nlink = 2\n", 0},
		{"", "freeze IMG", "", 1},
		{"", "gettune IMG", "", 1},
		{"", "version", "gfs_tool ", 0},
		{"", "frob", "", 1},
		{"", "sb IMG", "", 1},
		{"", "help", "  df [MOUNTPOINT|DEVICE]...", 0},
	} {
		r := ours(t, c.in, "gfs_tool", strings.Fields(strings.ReplaceAll(c.args, "IMG", img))...)
		if r.rc != c.rc || !strings.Contains(r.out, c.out) || (r.rc != 0) != (r.err != "") {
			t.Errorf("gfs_tool %s: %+v", c.args, r)
		}
	}
	if _, err := exec.LookPath("fsck.gfs2"); err == nil {
		gfstest.FsckClean(t, img)
	}
	k := gfstest.Load(t, gfstest.Clean4096)
	if r := ours(t, "", "gfs_tool", "layout", k, "/f1048576"); r.rc != 0 || !strings.Contains(r.out, "  data     4691-4946 (256)\n") {
		t.Errorf("%+v", r)
	}
}
