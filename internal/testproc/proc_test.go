package testproc

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv("TESTPROC_VICTIM") != "" {
		os.Exit(m.Run()) // killed on purpose; see TestChildrenDieWithTheTestBinary
	}
	goleak.VerifyTestMain(m)
}

const long = 30 * time.Second

func sh(t *testing.T, script string) *Proc {
	t.Helper()
	return Start(t, Spec{Name: "sh", Args: []string{"/bin/sh", "-c", script}, Grace: 200 * time.Millisecond})
}

func alive(pid int) bool {
	st, ok := readStat(pid)
	return ok && st.state != 'Z' && st.state != 'X'
}

func awaitGone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(long); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !alive(pid) {
			return
		}
	}
	t.Errorf("pid %d is still alive", pid)
}

func TestOutputAndExitCode(t *testing.T) {
	t.Parallel()
	p := sh(t, "echo one; echo port 4711 >&2; exit 7")
	m := p.MustWaitFor(t, `^port (\d+)$`, long)
	if m[1] != "4711" {
		t.Errorf("match %q", m)
	}
	if err := p.Wait(long); err == nil || !strings.Contains(err.Error(), "exit code 7") {
		t.Errorf("wait: %v", err)
	}
	if p.ExitCode() != 7 || p.Output() != "one\nport 4711\n" || p.Tail(10) != "" && p.Tail(10) != "port 4711\n" {
		t.Errorf("code %d, output %q, tail %q", p.ExitCode(), p.Output(), p.Tail(10))
	}
	if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal after the end: %v", err)
	}
}

func TestWaitForFailsEarlyAtTheEnd(t *testing.T) {
	t.Parallel()
	p := sh(t, "echo nothing of interest")
	if _, err := p.WaitFor("never", time.Hour); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("wait: %v", err)
	}
}

func TestWaitForTimesOut(t *testing.T) {
	t.Parallel()
	p := sh(t, "exec sleep 600")
	if _, err := p.WaitFor("never", 20*time.Millisecond); err == nil || !strings.Contains(err.Error(), "within") {
		t.Errorf("wait for a line: %v", err)
	}
	if err := p.Wait(20 * time.Millisecond); err == nil {
		t.Error("wait for a sleeping process: no error")
	}
	if p.ExitCode() != -1 {
		t.Errorf("exit code of a running process: %d", p.ExitCode())
	}
}

func TestFreezeAndThaw(t *testing.T) {
	t.Parallel()
	p := sh(t, "while :; do echo tick; sleep 0.01; done")
	p.MustWaitFor(t, "tick", long)
	if err := p.Freeze(); err != nil {
		t.Fatal(err)
	}
	if st, _ := readStat(p.PID()); st.state != 'T' {
		t.Errorf("state %c, want T", st.state)
	}
	before := len(p.Output())
	time.Sleep(100 * time.Millisecond)
	if after := len(p.Output()); after != before {
		t.Errorf("frozen process wrote %d bytes", after-before)
	}
	if err := p.Thaw(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(long); len(p.Output()) == before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("thawed process writes nothing")
		}
	}
	if err := p.Freeze(); err != nil { // the end must cope with a frozen process
		t.Fatal(err)
	}
}

func TestKillEndsTheWholeGroup(t *testing.T) {
	t.Parallel()
	p := sh(t, "trap '' TERM; sleep 600 & echo child $!; wait; sleep 600")
	child, err := strconv.Atoi(p.MustWaitFor(t, `^child (\d+)$`, long)[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if alive(p.PID()) || alive(child) {
		t.Errorf("alive after kill: leader %v, child %v", alive(p.PID()), alive(child))
	}
	if p.ExitCode() != 128+int(syscall.SIGKILL) {
		t.Errorf("exit code %d", p.ExitCode())
	}
}

// A leader that ended leaves its children to the test; they end with it.
func TestCleanupEndsOrphansOfTheGroup(t *testing.T) {
	t.Parallel()
	var child int
	t.Run("inner", func(t *testing.T) {
		p := sh(t, "sleep 600 & echo child $!")
		if err := p.Wait(long); err != nil {
			t.Fatal(err)
		}
		child, _ = strconv.Atoi(p.MustWaitFor(t, `^child (\d+)$`, long)[1])
		if !alive(child) {
			t.Fatal("the child ended with its parent: this test proves nothing")
		}
	})
	awaitGone(t, child)
}

func TestStopIsGentle(t *testing.T) {
	t.Parallel()
	p := Start(t, Spec{Name: "gentle", Args: []string{"/bin/sh", "-c", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done"}})
	p.MustWaitFor(t, "^ready$", long)
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if p.ExitCode() != 3 || !strings.Contains(p.Output(), "bye") {
		t.Errorf("code %d, output %q", p.ExitCode(), p.Output())
	}
}

// TestVictim is no test: it is run in a binary of its own, which its parent kills.
func TestVictim(t *testing.T) {
	how := os.Getenv("TESTPROC_VICTIM")
	if how == "" {
		t.Skip("helper of TestChildrenDieWithTheTestBinary")
	}
	p := sh(t, "trap '' TERM; sleep 600 & echo child $!; wait; sleep 600")
	m := p.MustWaitFor(t, `^child (\d+)$`, long)
	fmt.Printf("pids %d %s\n", p.PID(), m[1])
	if how == "panic" {
		panic("on purpose")
	}
	time.Sleep(time.Hour)
}

func TestChildrenDieWithTheTestBinary(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"kill", "panic"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0], "-test.run=^TestVictim$", "-test.v")
			cmd.Env = append(os.Environ(), "TESTPROC_VICTIM="+how, "TMPDIR="+t.TempDir(), ArtefactEnv+"=")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var leader, child int
			for s := bufio.NewScanner(out); s.Scan(); {
				if k, _ := fmt.Sscanf(s.Text(), "pids %d %d", &leader, &child); k == 2 {
					break
				}
			}
			if leader == 0 || child == 0 {
				t.Fatal("the victim named no processes")
			}
			if how == "kill" {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the victim ended well")
			}
			awaitGone(t, leader)
			awaitGone(t, child)
		})
	}
}

// recorder is a test whose failure can be looked at.
type recorder struct {
	testing.TB
	failed   bool
	cleanups []func()
	log      strings.Builder
}

func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Failed() bool              { return r.failed }
func (r *recorder) Logf(f string, a ...any)   { fmt.Fprintf(&r.log, f+"\n", a...) }
func (r *recorder) Errorf(f string, a ...any) { r.failed = true; r.Logf(f, a...) }
func (r *recorder) end() {
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
}

func TestArtefactsStayOnFailureOnly(t *testing.T) {
	root := t.TempDir()
	t.Setenv(ArtefactEnv, root)
	for _, fail := range []bool{false, true} {
		r := &recorder{TB: t}
		p := Start(r, Spec{Name: "talker", Args: []string{"/bin/sh", "-c", "echo last words"}})
		if err := p.Wait(long); err != nil {
			t.Fatal(err)
		}
		r.failed = fail
		r.end()
		left, err := filepath.Glob(filepath.Join(root, "*", "talker-*.log"))
		if err != nil {
			t.Fatal(err)
		}
		if kept := len(left) == 1; kept != fail {
			t.Errorf("failed = %v: artefacts left: %v", fail, left)
		}
		if told := strings.Contains(r.log.String(), "last words"); told != fail {
			t.Errorf("failed = %v: log %q", fail, r.log.String())
		}
	}
}

func TestFindAndFreePort(t *testing.T) {
	t.Parallel()
	if _, err := Find("no-such-program-here"); err == nil || !strings.Contains(err.Error(), "make deps") {
		t.Errorf("find: %v", err)
	}
	if p, err := Find("sh"); err != nil || !filepath.IsAbs(p) {
		t.Errorf("find sh: %q %v", p, err)
	}
	l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(FreePort(t))))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
