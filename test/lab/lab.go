// Package lab runs scenarios against real Linux kernels. A guest is Debian's user-mode-linux, a kernel that runs as an
// ordinary process: no virtualisation is needed and it boots in a few seconds. Its root is the host's own, read through
// hostfs, with a tmpfs above it, so a guest has every program that the host has and changes nothing there.
//
// A scenario is a Go test:
//
//	l := lab.New(t)
//	br := l.Bridge("10.99.0.1/24")
//	g := l.Boot(lab.Config{Name: "n1", Links: []lab.Link{{Bridge: br, CIDR: "10.99.0.11/24"}}})[0]
//	out := g.MustRun("modprobe iscsi_tcp; iscsiadm -m discovery -t sendtargets -p " + br.IP())
//
// README.md says more. Everything a lab starts ends with its test; logs, transcripts and sysrq dumps stay on failure.
//
// Only tests import it, and only the tests in test/. It may import anything of the product.
package lab

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/internal/testnet"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

//go:embed init.sh
var initScript []byte

const (
	modules  = "/usr/lib/uml/modules"
	guestDir = "/lab" // where a guest sees Lab.Share
	// PcapEnv set to 1 captures every bridge into the artefacts.
	PcapEnv = "BLOCKHOUSE_PCAP"
)

// Lab is a network and the guests on it. Methods without an error result fail the test.
type Lab struct {
	// Net is the network of the lab. Its hub runs targets and taps; it can have further nodes.
	Net *testnet.Net
	// Share is a folder of the host that every guest sees, live and writable, as /lab.
	Share string
	// Artefacts is a folder that stays when the test fails.
	Artefacts string

	t    testing.TB
	umls string // kernels keep their management sockets here; short, because socket paths are
	init string
}

// New makes an empty lab. It skips the test with one line where user-mode-linux is missing and fails it where CI=true.
func New(t testing.TB, opts ...testnet.Option) *Lab {
	t.Helper()
	if _, err := testproc.Find("linux.uml"); err != nil {
		testproc.SkipOrFail(t, "user-mode-linux is not installed (make deps)")
	}
	if _, err := os.Stat(modules); err != nil {
		testproc.SkipOrFail(t, "the modules of user-mode-linux are not installed (make deps)")
	}
	testproc.Need(t, "busybox", "bash", "go")
	l := &Lab{t: t, Share: t.TempDir(), Artefacts: testproc.ArtefactDir(t)}
	var err error
	tmp := os.TempDir()
	if len(tmp) > 40 {
		tmp = "/tmp" // a socket's path has 107 bytes
	}
	if l.umls, err = os.MkdirTemp(tmp, "uml"); err != nil {
		t.Fatalf("lab: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(l.umls) })
	l.Net = testnet.New(t, opts...)
	for _, d := range []string{"bin", "cmd"} {
		if err := os.Mkdir(filepath.Join(l.Share, d), 0o755); err != nil {
			t.Fatalf("lab: %v", err)
		}
	}
	l.init = filepath.Join(l.Share, "init.sh")
	if err := os.WriteFile(l.init, initScript, 0o755); err != nil {
		t.Fatalf("lab: %v", err)
	}
	l.Build("./test/lab/cmd/labagent")
	return l
}

// Bridge makes a network segment on which the hub has the address cidr.
func (l *Lab) Bridge(cidr string) *testnet.Bridge {
	l.t.Helper()
	br := l.Net.Bridge(cidr)
	if os.Getenv(PcapEnv) == "1" {
		br.Capture(filepath.Join(l.Artefacts, br.IP()+".pcapng"))
	}
	return br
}

// Build compiles a main package of this repository, given as a path from its root such as ./cmd/mkfs-gfs, without cgo, so
// that it runs on the host and in a guest. It returns the path on the host; in a guest the program is in $PATH.
func (l *Lab) Build(pkg string) string {
	l.t.Helper()
	root, err := moduleRoot()
	if err != nil {
		l.t.Fatalf("build %s: %v", pkg, err)
	}
	out := filepath.Join(l.Share, "bin", filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		l.t.Fatalf("build %s: %v\n%s", pkg, err, msg)
	}
	return out
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("no go.mod above the working directory")
		}
		dir = up
	}
}

// InGuest turns a path below Share into the path that a guest uses.
func (l *Lab) InGuest(path string) string {
	l.t.Helper()
	rel, err := filepath.Rel(l.Share, path)
	if err != nil || strings.HasPrefix(rel, "..") {
		l.t.Fatalf("in guest: %s is not below %s", path, l.Share)
	}
	return filepath.Join(guestDir, rel)
}

// Start runs a program in the hub, for instance a target. Its output is an artefact.
func (l *Lab) Start(s testproc.Spec) *testproc.Proc {
	l.t.Helper()
	return l.Net.Hub().Start(s)
}
