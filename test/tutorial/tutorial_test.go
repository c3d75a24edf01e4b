package tutorial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
	"github.com/blockhouse-san/blockhouse/test/internal/docrun"
)

func TestMain(m *testing.M) {
	code := m.Run()
	cluster.Clean()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

const page = "../../docs/guide/tutorial.md"

// insideEnv is set in the process that has a mount namespace of its own. There
// /dev and /etc/tgt are ours, so that the page's paths need no other spelling.
const insideEnv = "BLOCKHOUSE_TUTORIAL_INSIDE"

// Every command of the page runs and writes what the page says; what the page
// calls not built yet is not built.
func TestPage(t *testing.T) {
	if os.Getenv(insideEnv) != "" {
		inside(t)
		return
	}
	for _, d := range []string{"/etc/tgt"} { // an ordinary user cannot make it
		if _, err := os.Stat(d); err != nil {
			testproc.SkipOrFail(t, fmt.Sprintf("%v (make deps)", err))
		}
	}
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^TestPage$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), insideEnv+"=1", testproc.ArtefactEnv+"="+testproc.ArtefactDir(t))
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	var ee *exec.ExitError
	switch {
	case errors.As(err, &ee):
		t.Errorf("%v\n%s", err, out)
	case err != nil:
		testproc.SkipOrFail(t, fmt.Sprintf("no mount namespace: %v", err))
	default:
		t.Logf("%s", out)
	}
}

func inside(t *testing.T) {
	blocks, err := docrun.Read(page)
	if err != nil {
		t.Fatal(err)
	}
	devices(t, map[string]int64{"sda5": 64 << 20, "sda6": 64 << 20, "vg0/gfslv": 1 << 30})
	must(t, unix.Mount("tmpfs", "/etc/tgt", "tmpfs", 0, ""))

	c := cluster.New(t, 3).Up()
	bin := cluster.Bin(t)
	home := t.TempDir()
	links := filepath.Join(home, "compat") // the page makes them
	env := append(os.Environ(), "HOME="+home, "PATH="+links+":"+bin+":"+os.Getenv("PATH"), "BLOCKHOUSE_SOCKET="+filepath.Join(c.Nodes[0].Run, "clusterd.sock"), "LC_ALL=C")
	ran := 0
	for _, b := range blocks {
		for _, cmd := range b.Commands {
			switch b.Kind {
			case docrun.Run:
				out, code := run(t, env, cmd.Text)
				if err := cmd.Check(out, code); err != nil {
					t.Errorf("docs/guide/tutorial.md: %v", err)
				}
				ran++
			case docrun.Missing:
				p := cmd.Program()
				if m := mountType.FindStringSubmatch(cmd.Text); m != nil {
					p = "mount." + m[1]
				}
				if ours(links, bin, p) {
					t.Errorf("docs/guide/tutorial.md: line %d: %s is called not built yet, and there is such a command", cmd.Line, p)
				}
			case docrun.Host:
				if ours(links, bin, cmd.Program()) {
					t.Errorf("docs/guide/tutorial.md: line %d: %s is ours, and not run", cmd.Line, cmd.Program())
				}
				host(t, c, cmd)
			case docrun.Lab: // test/lab runs it
			}
		}
	}
	if ran == 0 {
		t.Error("nothing ran")
	}
	t.Logf("%d commands of the page ran", ran)
}

// run gives what a command wrote, and its exit status. Questions are answered y.
func run(t *testing.T, env []string, text string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", text)
	cmd.Env = env
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader("y\n")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatalf("%s: %v", text, err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

func ours(links, bin, program string) bool {
	return slices.ContainsFunc([]string{links, bin}, func(d string) bool {
		_, err := os.Stat(filepath.Join(d, program))
		return err == nil
	})
}

// mountType: mount(8) is the host's, its helper for a type would be ours.
var mountType = regexp.MustCompile(`^mount .*-t (\S+)`)

// crash is the one command of the host's that the page needs to have happened.
const crash = "echo c > /proc/sysrq-trigger"

func host(t *testing.T, c *cluster.Cluster, cmd docrun.Command) {
	t.Helper()
	if cmd.Text != crash {
		return
	}
	n3 := c.Nodes[2]
	n3.Kill()
	c.Wait("n3 is lost", 60*time.Second, func() (bool, string) {
		s, err := c.Nodes[0].Status()
		if err != nil {
			return false, err.Error()
		}
		i := slices.IndexFunc(s.Nodes, func(n api.Node) bool { return n.Name == n3.Name })
		return i >= 0 && s.Nodes[i].State == api.NodeLost, fmt.Sprintf("%+v", s.Nodes)
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// devices makes a /dev of this process alone, with what is in the host's and disks
// that are files.
func devices(t *testing.T, disks map[string]int64) {
	t.Helper()
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	old := t.TempDir()
	must(t, unix.Mount("/dev", old, "", unix.MS_BIND|unix.MS_REC, ""))
	must(t, unix.Mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID, "mode=0755"))
	ents, err := os.ReadDir(old)
	must(t, err)
	for _, e := range ents {
		from, to := filepath.Join(old, e.Name()), filepath.Join("/dev", e.Name())
		switch {
		case e.Type()&fs.ModeSymlink != 0:
			l, err := os.Readlink(from)
			must(t, err)
			must(t, os.Symlink(l, to))
			continue
		case e.IsDir():
			must(t, os.Mkdir(to, 0o755))
		default:
			must(t, os.WriteFile(to, nil, 0o600))
		}
		must(t, unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""))
	}
	must(t, unix.Unmount(old, unix.MNT_DETACH))
	store := t.TempDir()
	for name, size := range disks {
		f := filepath.Join(store, filepath.Base(name))
		must(t, os.WriteFile(f, nil, 0o600))
		must(t, os.Truncate(f, size))
		to := filepath.Join("/dev", name)
		must(t, os.MkdirAll(filepath.Dir(to), 0o755))
		must(t, os.WriteFile(to, nil, 0o600))
		must(t, unix.Mount(f, to, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount(to, unix.MNT_DETACH) }) // before the store is removed
	}
}
