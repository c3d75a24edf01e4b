package gfs

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestISCSI: mkfs on a LUN of tgtd through our initiator; fsck.gfs2 reads the
// backing file.
func TestISCSI(t *testing.T) {
	t.Parallel()
	need(t, "tgtd", "tgtadm", "fsck.gfs2")
	dir, err := os.MkdirTemp("", "gfs") // Unix socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	portal := l.Addr().String()
	ctl := fmt.Sprint(l.Addr().(*net.TCPAddr).Port % 32768)
	_ = l.Close()
	env := append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(dir, "s"))
	tgtd := exec.Command("tgtd", "-f", "-C", ctl, "--iscsi", "portal="+portal)
	tgtd.Env = env
	if err := tgtd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tgtd.Process.Kill(); _ = tgtd.Wait() })
	adm := func(args ...string) (string, error) {
		c := exec.Command("tgtadm", append([]string{"-C", ctl, "--lld", "iscsi"}, args...)...)
		c.Env = env
		out, err := c.CombinedOutput()
		return string(out), err
	}
	up := ""
	for range 200 {
		if up, err = adm("--mode", "portal", "--op", "show"); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if strings.TrimSpace(up) != "Portal: "+portal+",1" {
		t.Skipf("skip: tgtd did not get its port: %s", up) // another process took it: tgtd falls back to 3260
	}
	img := filepath.Join(dir, "lun")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 100<<20); err != nil {
		t.Fatal(err)
	}
	iqn := "iqn.2026-01.org.example:gfs"
	for _, a := range []string{
		"--op new --mode target --tid 1 -T " + iqn,
		"--op new --mode logicalunit --tid 1 --lun 1 -b " + img,
		"--op bind --mode target --tid 1 -I ALL",
	} {
		if out, err := adm(strings.Fields(a)...); err != nil {
			t.Fatalf("%s: %v %s", a, err, out)
		}
	}
	url := "iscsi://" + portal + "/" + iqn + "/1"
	got := ours(t, "", "mkfs-gfs", "-O", "-p", "lock_dlm", "-t", "cluster:fs", "-j", "2", url)
	if got.rc != 0 || !strings.Contains(got.out, "Device:                    "+url+"\n") {
		t.Errorf("%+v", got)
	}
	if out, err := exec.Command("fsck.gfs2", "-n", img).CombinedOutput(); err != nil {
		t.Errorf("fsck.gfs2: %v %s", err, out)
	}
	if got := ours(t, "n\n", "mkfs-gfs", "-p", "lock_nolock", url); got.rc != 255 || !strings.Contains(got.out, "existing filesystem (gfs2)") {
		t.Errorf("%+v", got)
	}
	if got := ours(t, "", "mkfs-gfs", "-O", "-p", "lock_nolock", url+"7"); got.rc != 1 || got.err == "" {
		t.Errorf("a LUN that is not there: %+v", got)
	}
}
