package initiator

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testIQN = "iqn.2026-01.org.example:initiator"

// tgtd is Debian's iSCSI target as a peer: on a port of 127.0.0.1 and with a control
// socket of its own.
type tgtd struct {
	t      *testing.T
	dir    string
	portal string
	ctl    string // control port, a part of the control socket's name
	cmd    *exec.Cmd
}

func startTgtd(t *testing.T) *tgtd {
	t.Helper()
	for _, p := range []string{"tgtd", "tgtadm"} {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", p)
			}
			t.Skipf("skip: %s is not installed (make deps)", p)
		}
	}
	// Unix socket paths are short; t.TempDir's may not be.
	dir, err := os.MkdirTemp("", "tgtd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	var last string
	// Between the choice of a port and its use another process can take it; tgtd then
	// falls back to 0.0.0.0:3260 without a word, so its portals are looked at.
	for range 5 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		_ = l.Close()
		g := &tgtd{t: t, dir: dir, portal: fmt.Sprintf("127.0.0.1:%d", port), ctl: fmt.Sprint(port % 32768)}
		log := &bytes.Buffer{}
		g.cmd = exec.Command("tgtd", "-f", "-C", g.ctl, "--iscsi", "portal="+g.portal)
		g.cmd.Env = append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(dir, "s"))
		g.cmd.Stdout, g.cmd.Stderr = log, log
		if err := g.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for range 100 {
			out, err := g.run("--mode", "portal", "--op", "show")
			if last = out; err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if strings.TrimSpace(last) == "Portal: "+g.portal+",1" {
			t.Cleanup(g.kill)
			return g
		}
		g.kill()
		last += log.String()
	}
	t.Fatalf("tgtd does not come up on a port of its own: %s", last)
	return nil
}

// kill ends tgtd the hard way: it ignores SIGTERM while a target exists.
func (g *tgtd) kill() {
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
}

func (g *tgtd) run(args ...string) (string, error) {
	c := exec.Command("tgtadm", append([]string{"-C", g.ctl, "--lld", "iscsi"}, args...)...)
	c.Env = append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(g.dir, "s"))
	out, err := c.CombinedOutput()
	return string(out), err
}

func (g *tgtd) adm(args ...string) {
	g.t.Helper()
	if out, err := g.run(args...); err != nil {
		g.t.Fatalf("tgtadm %v: %v: %s", args, err, out)
	}
}

// target makes target tid with one thin LUN of size bytes, open to all.
func (g *tgtd) target(tid int, size int64, params ...string) string {
	g.t.Helper()
	iqn := fmt.Sprintf("iqn.2026-01.org.example:t%d", tid)
	id := fmt.Sprint(tid)
	file := filepath.Join(g.dir, "disk"+id)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		g.t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		g.t.Fatal(err)
	}
	g.adm("--mode", "target", "--op", "new", "--tid", id, "-T", iqn)
	for _, p := range params {
		k, v, _ := strings.Cut(p, "=")
		g.adm("--mode", "target", "--op", "update", "--tid", id, "-n", k, "-v", v)
	}
	g.adm("--mode", "logicalunit", "--op", "new", "--tid", id, "--lun", "1", "-b", file)
	g.adm("--mode", "logicalunit", "--op", "update", "--tid", id, "--lun", "1", "--params", "thin_provisioning=1")
	g.adm("--mode", "target", "--op", "bind", "--tid", id, "-I", "ALL")
	return iqn
}

func randomBytes(seed uint64, n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

func wantErr(t *testing.T, what string, err error, targets ...error) {
	t.Helper()
	for _, w := range targets {
		if !errors.Is(err, w) {
			t.Errorf("%s: error is %v, want %v", what, err, w)
		}
	}
}
