package gfs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/gfs/disk"
)

func need(t testing.TB, progs ...string) {
	t.Helper()
	for _, p := range progs {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed (make deps)", p)
			}
			t.Skipf("skip: %s is not installed (make deps)", p)
		}
	}
}

// result is what a command did.
type result struct {
	rc       int
	out, err string
}

func ours(t testing.TB, stdin, name string, args ...string) result {
	t.Helper()
	var o, e bytes.Buffer
	a := &App{In: strings.NewReader(stdin), Out: &o, Err: &e, Openers: defaultOpeners(), Now: time.Now}
	rc := a.Run(context.Background(), name, args)
	return result{rc, o.String(), e.String()}
}

func theirs(t testing.TB, stdin, name string, args ...string) result {
	t.Helper()
	var o, e bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &o, &e
	err := cmd.Run()
	var x *exec.ExitError
	if err != nil && !errors.As(err, &x) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), o.String(), e.String()}
}

func image(t testing.TB, size int64) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(p, size); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestRefused is facts §2.2: the same text, the same exit status. Ours may add
// lines that say what to type.
func TestRefused(t *testing.T) {
	t.Parallel()
	need(t, "mkfs.gfs2")
	nolock := "-O -p lock_nolock "
	long := strings.Repeat("x", 33)
	for _, c := range []string{
		"-p lock_dlm IMG", "IMG", "-p lock_foo IMG", "-t '' IMG", "-t ab IMG", "-t :b IMG", "-t a: IMG", "-t a:b:c IMG", "-t a.b:c IMG",
		"-t " + long + ":b IMG", "-t a:" + long + " IMG",
		nolock + "-b 1000 IMG", nolock + "-b 65536 IMG", nolock + "-b 256 IMG",
		nolock + "-J 4 IMG", nolock + "-J 1025 IMG", nolock + "-J 0 IMG", nolock + "-j 0 IMG", nolock + "-j -1 IMG", nolock + "-j x IMG",
		nolock + "-r 16 IMG", nolock + "-r 2049 IMG", nolock + "-c 65 IMG", nolock + "-c 0 IMG",
		nolock + "-o sunit=4096 IMG", nolock + "-o swidth=4096 IMG", nolock + "-o sunit=abc,swidth=5 IMG", nolock + "-o sunit= IMG",
		nolock + "-o sunit IMG", nolock + "-o align=2 IMG", nolock + "-o format=1800 IMG", nolock + "-o format=x IMG", nolock + "-o format IMG",
		nolock + "-o sunit=1000,swidth=4000 IMG", nolock + "-o sunit=8192,swidth=12288 IMG", nolock + "-o '' IMG", nolock + "-o foo=1 IMG",
		nolock + "IMG 99999999", nolock + "IMG 3000", "", nolock + "IMG OTHER", nolock + "IMG 5 6", nolock + "-U xx IMG",
		nolock + "/nonexistent/file", nolock + "-Z IMG", nolock + "-J", nolock + "/dev/null",
		nolock + "-j 5 -J 16 IMG", nolock + "-j 2 -J 20 IMG", nolock + "-j 8 IMG",
	} {
		t.Run(c, func(t *testing.T) {
			img := image(t, 64<<20)
			var args []string
			for _, w := range strings.Fields(strings.ReplaceAll(c, "IMG", img)) {
				args = append(args, strings.Trim(w, "'"))
			}
			want := theirs(t, "", "mkfs.gfs2", args...)
			got := ours(t, "", "mkfs.gfs2", args...)
			if want.rc == 0 {
				t.Fatalf("mkfs.gfs2 takes it: %s", want.out)
			}
			wl := strings.Split(strings.TrimRight(want.err, "\n"), "\n")
			gl := strings.Split(strings.TrimRight(got.err, "\n"), "\n")
			if len(gl) > len(wl) && !strings.HasPrefix(gl[len(wl)], "mkfs.gfs2: ") {
				t.Errorf("extra line %q does not say who speaks", gl[len(wl)])
			}
			if d := cmp.Diff(wl, gl[:min(len(wl), len(gl))]); d != "" || got.rc != want.rc {
				t.Errorf("rc %d, want %d; stderr -mkfs.gfs2 +ours:\n%s", got.rc, want.rc, d)
			}
			var st syscall.Stat_t
			if err := syscall.Stat(img, &st); err != nil || st.Blocks != 0 {
				t.Errorf("the device was written: %d sectors, %v", st.Blocks, err)
			}
		})
	}
}

// TestStricter: inputs that mkfs.gfs2 takes and misreads, or that no kernel can
// mount.
func TestStricter(t *testing.T) {
	t.Parallel()
	for args, text := range map[string]string{
		"-p lock_gulm -t a:b":                "Invalid lock protocol: lock_gulm",
		"-p lock_nolock -j 2x":               "Invalid number of journals: 2x",
		"-p lock_nolock -J 32x":              "Bad journal size",
		"-p lock_nolock -J 32MBx":            "Bad journal size",
		"-p lock_nolock -J 1.3M":             "Bad journal size",
		"-p lock_nolock -r 64q":              "Bad resource group size",
		"-p lock_nolock -b 4096x":            "Block size must be a power of two between 512 and 4096",
		"-p lock_nolock -c 1x":               "Bad quota change size",
		"-p lock_nolock -o sunit=0,swidth=0": "Value of 'sunit' is invalid",
	} {
		img := image(t, 256<<20)
		got := ours(t, "", "mkfs-gfs", append(append([]string{"-O"}, strings.Fields(args)...), img)...)
		if got.rc != 255 || !strings.HasPrefix(got.err, text+"\n") {
			t.Errorf("%s: rc %d, %q", args, got.rc, got.err)
		}
	}
	for _, unit := range []string{"32", "32M", "32MB", "32MiB"} {
		got := ours(t, "", "mkfs-gfs", "-O", "-p", "lock_nolock", "-J", unit, image(t, 256<<20))
		if got.rc != 0 || !strings.Contains(got.out, "Journal size:              32MB\n") {
			t.Errorf("-J %s: %+v", unit, got)
		}
	}
}

var uuidRE = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// TestOutput: the same lines as mkfs.gfs2, including the prompt, for each kind
// of answer.
func TestOutput(t *testing.T) {
	t.Parallel()
	need(t, "mkfs.gfs2")
	for _, c := range []struct{ stdin, args string }{
		{"", "-O -p lock_dlm -t cl:fs -j 2 -J 8"},
		{"y\n", "-p lock_nolock"}, {"n\n", "-p lock_nolock"}, {"", "-p lock_nolock"}, {"\nYes\n", "-p lock_nolock"}, {"maybe\n", "-p lock_nolock"},
		{"", "-O -q -p lock_nolock"}, {"", "-o help"}, {"", "-O -p lock_nolock -b 512 -o format=1801,align=0"},
	} {
		img := image(t, 64<<20)
		args := append(strings.Fields(c.args), img)
		// The second run finds what the first has made.
		for run := range 2 {
			want := theirs(t, c.stdin, "mkfs.gfs2", args...)
			if run == 0 {
				if err := errors.Join(os.Truncate(img, 0), os.Truncate(img, 64<<20)); err != nil {
					t.Fatal(err)
				}
			}
			got := ours(t, c.stdin, "mkfs.gfs2", args...)
			mask := func(r result) result { r.out = uuidRE.ReplaceAllString(r.out, "UUID"); return r }
			if d := cmp.Diff(mask(want), mask(got), cmp.AllowUnexported(result{})); d != "" {
				t.Errorf("%s <%q, run %d: -mkfs.gfs2 +ours\n%s", c.args, c.stdin, run, d)
			}
		}
	}
}

// TestGFS1Face: gfs_mkfs as in the tutorial.
func TestGFS1Face(t *testing.T) {
	t.Parallel()
	img := image(t, 1<<30)
	got := ours(t, "y\n", "/sbin/gfs_mkfs", "-p", "lock_dlm", "-t", "gfscluster:gfslv", "-j", "5", "-s", "16", img)
	want := "This will destroy any data on " + img + `
Are you sure you want to proceed? [y/n] Device:                    ` + img + `
Blocksize:                 4096
Filesystem Size:           262143
Journals:                  5
Resource Groups:           9
Locking Protocol:          lock_dlm
Lock Table:                gfscluster:gfslv

Syncing...
All Done
`
	if d := cmp.Diff(want, got.out); d != "" || got.rc != 0 {
		t.Errorf("rc %d\n%s", got.rc, d)
	}
	if !strings.Contains(got.err, "-s (blocks in a journal segment) has no meaning in GFS2") {
		t.Errorf("%q", got.err)
	}
	if ours(t, "", "mkfs.gfs2", "-O", "-s", "16", "-p", "lock_nolock", img).rc != 255 {
		t.Error("-s is GFS1's only")
	}
}

func TestJSON(t *testing.T) {
	t.Parallel()
	got := ours(t, "", "mkfs-gfs", "--json", "-O", "-t", "cl:fs", "-U", "1b4e28ba-2fa1-11d2-883f-b9a761bde3fb", image(t, 1<<30))
	var j mkfsJSON
	if err := json.Unmarshal([]byte(got.out), &j); err != nil || got.rc != 0 || got.err != "" {
		t.Fatalf("%v %+v", err, got)
	}
	if j.UUID != "1b4e28ba-2fa1-11d2-883f-b9a761bde3fb" || j.BlockSize != 4096 || j.JournalSize != 16<<20 || j.LockTable != "cl:fs" || j.WriteCalls > 128 {
		t.Errorf("%+v", j)
	}
}

// head is the start of an image, where mkfs would write first.
func head(t *testing.T, path string) []byte {
	b := make([]byte, 1<<20)
	f, err := os.Open(path)
	if err == nil {
		_, err = f.ReadAt(b, 0)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestProbe: everything in the signature table is named before it is destroyed,
// and where the real program is there it agrees.
func TestProbe(t *testing.T) {
	t.Parallel()
	put := func(off int64, b string) func(t *testing.T, p string) {
		return func(t *testing.T, p string) {
			f, err := os.OpenFile(p, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte(b), off)
			}
			if err == nil {
				err = f.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	run := func(prog string, args ...string) func(t *testing.T, p string) {
		return func(t *testing.T, p string) {
			need(t, prog)
			if out, err := exec.Command(prog, append(args, p)...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	mbr := make([]byte, 512)
	copy(mbr[446:], "\x00\x00\x02\x00\x83\x00\x00\x00\x00\x08\x00\x00\x00\x50\x00\x00")
	copy(mbr[510:], "\x55\xaa")
	for name, c := range map[string]struct {
		make func(t *testing.T, p string)
		want string
	}{
		"ext2":  {run("mkfs.ext2", "-q", "-F"), "filesystem (ext2)"},
		"ext3":  {run("mkfs.ext3", "-q", "-F"), "filesystem (ext3)"},
		"ext4":  {run("mkfs.ext4", "-q", "-F"), "filesystem (ext4)"},
		"swap":  {run("mkswap"), "filesystem (swap)"},
		"gfs2":  {run("mkfs.gfs2", "-q", "-O", "-p", "lock_nolock"), "filesystem (gfs2)"},
		"dos":   {put(0, string(mbr)), "partition table (dos)"},
		"gpt":   {put(512, "EFI PART"), "partition table (gpt)"},
		"lvm":   {put(512+24, "LVM2 001"), "filesystem (LVM2_member)"},
		"luks":  {put(0, "LUKS\xba\xbe\x00\x01"), "filesystem (crypto_LUKS)"},
		"xfs":   {put(0, "XFSB"), "filesystem (xfs)"},
		"btrfs": {put(65536+64, "_BHRfS_M"), "filesystem (btrfs)"},
		"ntfs":  {put(3, "NTFS    "), "filesystem (ntfs)"},
	} {
		t.Run(name, func(t *testing.T) {
			img := image(t, 64<<20)
			c.make(t, img)
			before := head(t, img)
			got := ours(t, "n\n", "mkfs-gfs", "-p", "lock_nolock", img)
			if got.rc != 255 || !strings.Contains(got.out, "It appears to contain a") || !strings.Contains(got.out, c.want) {
				t.Errorf("%+v", got)
			}
			if !bytes.Equal(before, head(t, img)) {
				t.Error("the device was written after a no")
			}
			if name == "dos" || strings.HasPrefix(name, "ext") || name == "swap" {
				need(t, "mkfs.gfs2")
				if want := theirs(t, "n\n", "mkfs.gfs2", "-p", "lock_nolock", img); want.out != got.out {
					t.Errorf("mkfs.gfs2 says %q, ours %q", want.out, got.out)
				}
			}
		})
	}
}

// lun is a block.Device over a file, and counts what a filesystem maker asks of it.
type lun struct {
	f                *os.File
	unmapped, closed bool
	failAt           int64
}

func (l *lun) Info() block.Info {
	st, _ := l.f.Stat()
	return block.Info{Size: st.Size(), BlockSize: 512, PhysBlock: 4096, MaxUnmap: 16 << 20, Caps: block.Caps{Thin: true, UnmapZeroes: true}}
}
func (l *lun) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := l.Info().Check(off, int64(len(p))); err != nil {
		return err
	}
	_, err := l.f.ReadAt(p, off)
	return err
}
func (l *lun) WriteAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	if err := l.Info().Check(off, int64(len(p))); err != nil {
		return err
	}
	if l.failAt > 0 && off <= l.failAt && l.failAt < off+int64(len(p)) {
		return block.ErrMedium
	}
	_, err := l.f.WriteAt(p, off)
	return err
}
func (l *lun) Flush(context.Context) error { return l.f.Sync() }
func (l *lun) Unmap(_ context.Context, off, n int64) error {
	l.unmapped = true
	return l.Info().Check(off, n)
}
func (l *lun) WriteZeroes(context.Context, int64, int64, block.Flags) error { return nil }
func (l *lun) Extents(_ context.Context, off, n int64) ([]block.Extent, error) {
	return []block.Extent{{Off: off, Len: n, Mapped: true}}, nil
}
func (l *lun) Close() error { l.closed = true; return l.f.Close() }

// TestLUN: a filesystem on a block.Device, opened by its URL; a write error is
// reported and leaves no filesystem behind.
func TestLUN(t *testing.T) {
	t.Parallel()
	need(t, "fsck.gfs2")
	for _, failAt := range []int64{0, 9 << 20} {
		img := image(t, 64<<20)
		f, err := os.OpenFile(img, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		l := &lun{f: f, failAt: failAt}
		var o, e bytes.Buffer
		a := &App{In: strings.NewReader(""), Out: &o, Err: &e, Now: time.Now, Openers: map[string]Opener{
			"iscsi": func(ctx context.Context, target string, write bool) (disk.Device, error) {
				if target != "iscsi://h/iqn.x/1" || !write {
					t.Errorf("open %s %v", target, write)
				}
				return disk.FromBlock(ctx, l), nil
			}}}
		rc := a.Run(context.Background(), "mkfs-gfs", []string{"-O", "-p", "lock_nolock", "iscsi://h/iqn.x/1"})
		if !l.closed || !l.unmapped {
			t.Error("not closed or not discarded")
		}
		if failAt != 0 {
			if rc != 1 || !strings.Contains(e.String(), "medium error") || !strings.Contains(e.String(), "holds no filesystem") {
				t.Errorf("rc %d %s", rc, e.String())
			}
			b, err := os.ReadFile(img)
			if err != nil || !bytes.Equal(b[65536:65536+4], make([]byte, 4)) {
				t.Error("a superblock is there after a failed run")
			}
			continue
		}
		if rc != 0 || !strings.Contains(o.String(), "Discarding device contents (may take a while on large devices): Done\nAdding journals: Done\n") {
			t.Errorf("rc %d\n%s%s", rc, o.String(), e.String())
		}
		if out, err := exec.Command("fsck.gfs2", "-n", img).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	if got := ours(t, "", "mkfs-gfs", "-O", "-p", "lock_nolock", "nbd://h/x"); got.rc != 1 || !strings.Contains(got.err, `unknown kind of target "nbd"`) {
		t.Errorf("%+v", got)
	}
}

func TestMisnamed(t *testing.T) {
	if got := ours(t, "", "gfs_frob"); got.rc != 2 || !strings.Contains(got.err, "it answers to mkfs-gfs, ") {
		t.Errorf("%+v", got)
	}
}
