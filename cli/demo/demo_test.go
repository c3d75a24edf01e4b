package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blockhouse-san/blockhouse/api"
)

// TestMain lets this very binary play other programs: under the name clusterd it
// is a daemon that does nothing but live, with a worker in its own session that
// outlives it, as the real one does. The real one is tested in test/e2e/demo.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "clusterd" || os.Getenv("DEMO_PLAY") == "stranger" {
		os.Exit(play())
	}
	goleak.VerifyTestMain(m)
}

func play() int {
	signal.Ignore(syscall.SIGTERM, syscall.SIGHUP)
	if os.Getenv("DEMO_PLAY") == "fail" {
		fmt.Fprintln(os.Stderr, "listen: address already in use")
		return 1
	}
	if len(os.Args) > 2 && os.Args[1] == "--config" {
		c := exec.Command(os.Args[0], "worker", "storage", "--other")
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := c.Start(); err != nil {
			return 1
		}
		fmt.Fprintln(os.Stderr, "started worker", c.Process.Pid)
	}
	time.Sleep(time.Minute) // no test needs so long, and none is left for ever
	return 0
}

// binary makes a copy of this test program under another name.
func binary(t *testing.T, name string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.Link(self, path); err == nil {
		return path
	}
	in, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func newDemo(t *testing.T) (*Demo, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	bin := binary(t, "clusterd")
	dir, err := os.MkdirTemp("", "demo") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	d := &Demo{Dir: filepath.Join(dir, "d"), Clusteradm: "/bin/false", Clusterd: bin, Mkfs: "/bin/false", Out: &out, Err: &out}
	t.Cleanup(func() {
		if err := d.killAll(); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return d, &out
}

// running starts the three daemons as up does and waits for their workers.
func running(t *testing.T, d *Demo) {
	t.Helper()
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	st := &state{Phase: up, Place: place{Prefix: "127.0.0", Ports: defaultPorts}}
	if err := d.save(st); err != nil {
		t.Fatal(err)
	}
	for i, n := range nodeNames {
		if err := d.configure(st.Place, i); err != nil {
			t.Fatal(err)
		}
		if err := d.start(n); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodeNames {
		waitFor(t, n+" to have two processes", func() bool { return len(nodeProcs(t, d, n)) == 2 })
	}
}

func nodeProcs(t *testing.T, d *Demo, n string) []proc {
	t.Helper()
	ps, err := procs(d.node(n))
	if err != nil {
		t.Fatal(err)
	}
	return ps
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited 10 s for %s", what)
}

func code(err error) api.Code {
	if err == nil {
		return ""
	}
	return api.AsError(err).Code
}

func TestKillTakesTheNodeAndNothingElse(t *testing.T) {
	t.Parallel()
	d, out := newDemo(t)
	running(t, d)
	if ps := nodeProcs(t, d, "n1"); !ps[0].control || ps[1].control || ps[1].what != "worker storage" {
		t.Fatalf("control does not come first: %+v", ps)
	}
	if err := d.Kill(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	if strings.Count(out.String(), "killed ") != 2 || len(nodeProcs(t, d, "n1")) != 0 {
		t.Errorf("left: %+v; said %s", nodeProcs(t, d, "n1"), out)
	}
	for _, n := range []string{"n2", "n3"} {
		if ps := nodeProcs(t, d, n); len(ps) != 2 {
			t.Errorf("%s has %+v", n, ps)
		}
	}
	out.Reset()
	if err := d.Kill(t.Context(), "n1"); err != nil || !strings.Contains(out.String(), "nothing of n1 runs") {
		t.Errorf("a second kill: %v: %s", err, out)
	}
	if err := d.Kill(t.Context(), "n9"); code(err) != api.CodeNotFound {
		t.Errorf("a node that is none: %v", err)
	}
}

// A worker whose control is dead, and whose arguments do not name the node, is
// found by its environment.
func TestOrphanedWorkerIsFound(t *testing.T) {
	t.Parallel()
	d, _ := newDemo(t)
	running(t, d)
	ps := nodeProcs(t, d, "n2")
	if err := ps[0].kill(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "control to die", func() bool { return !ps[0].alive() })
	if left := nodeProcs(t, d, "n2"); len(left) != 1 || left[0] != ps[1] {
		t.Fatalf("%+v", left)
	}
	if err := d.Kill(t.Context(), "n2"); err != nil || ps[1].alive() {
		t.Errorf("%v, worker alive: %v", err, ps[1].alive())
	}
}

// Strangers that look like the node's processes in one respect are left alone:
// an editor of its configuration, another clusterd, and a process that now has
// the pid of a pid file.
func TestStrangersAreLeftAlone(t *testing.T) {
	t.Parallel()
	d, _ := newDemo(t)
	running(t, d)
	config := filepath.Join(d.node("n1"), configFile)
	start := func(bin string, env []string, args ...string) *exec.Cmd {
		c := exec.Command(bin, args...)
		c.Env = append(os.Environ(), env...)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		return c
	}
	editor := start(binary(t, "editor"), []string{"DEMO_PLAY=stranger", envNode + "=" + d.node("n1")}, config)
	other := start(d.Clusterd, nil, "worker", "storage")
	longer := start(d.Clusterd, []string{envNode + "=" + d.node("n1") + "0"}, "worker", "storage", config+".bak")
	write := func(name string, pid int, start uint64) {
		b, _ := json.Marshal(map[string]any{"pid": pid, "start": start, "incarnation": "x"})
		if err := os.WriteFile(filepath.Join(d.node("n1"), "run", name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	st, err := startTime(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	write("storage.pid", other.Process.Pid, st-1) // the pid was given anew
	write("locks.pid", os.Getpid(), 0)
	if err := d.Kill(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*exec.Cmd{editor, other, longer} {
		if _, err := startTime(c.Process.Pid); err != nil {
			t.Errorf("%q was killed", c.Args)
		}
	}
	// With the right start time it is the node's.
	write("storage.pid", other.Process.Pid, st)
	if err := d.Kill(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	if _, err := startTime(other.Process.Pid); err == nil {
		t.Error("the process of the pid file lives")
	}
}

// A pid that was given to another process between looking and killing is spared.
func TestKillComparesTheStartTime(t *testing.T) {
	t.Parallel()
	c := exec.Command("sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	st, err := startTime(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := (proc{pid: c.Process.Pid, start: st + 1}).kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	if _, err := startTime(c.Process.Pid); err != nil {
		t.Error("it was killed")
	}
}

func TestDownWhateverIsLeft(t *testing.T) {
	t.Parallel()
	for name, hurt := range map[string]func(t *testing.T, d *Demo){
		"whole":     func(*testing.T, *Demo) {},
		"half dead": func(t *testing.T, d *Demo) { _ = d.Kill(t.Context(), "n1"); _ = nodeProcs(t, d, "n2")[0].kill() },
		"all dead":  func(t *testing.T, d *Demo) { _ = d.killAll() },
		"state torn": func(t *testing.T, d *Demo) {
			_ = os.WriteFile(filepath.Join(d.Dir, stateFile), []byte("{\"ver"), 0o600)
		},
		"node removed":   func(t *testing.T, d *Demo) { _ = os.RemoveAll(d.node("n3")) },
		"no pid files":   func(t *testing.T, d *Demo) { _ = os.RemoveAll(filepath.Join(d.node("n1"), "run")) },
		"binary gone":    func(t *testing.T, d *Demo) { _ = os.Remove(d.Clusterd) },
		"up interrupted": func(t *testing.T, d *Demo) { _ = d.save(&state{Phase: starting}) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, out := newDemo(t)
			running(t, d)
			var all []proc
			for _, n := range nodeNames {
				all = append(all, nodeProcs(t, d, n)...)
			}
			hurt(t, d)
			if err := d.Down(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, p := range all {
				if p.alive() {
					t.Errorf("%+v lives", p)
				}
			}
			if _, err := os.Stat(d.Dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v", d.Dir, err)
			}
			out.Reset()
			if err := d.Down(t.Context()); err != nil || !strings.Contains(out.String(), "there is no demo") {
				t.Errorf("down again: %v: %s", err, out)
			}
		})
	}
}

// Files that the demo did not make are never removed.
func TestDownKeepsForeignFiles(t *testing.T) {
	t.Parallel()
	d, _ := newDemo(t)
	running(t, d)
	mine := filepath.Join(d.Dir, "thesis.tex")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Down(t.Context()); code(err) != api.CodeConflict {
		t.Errorf("down: %v", err)
	}
	if _, err := os.Stat(mine); err != nil {
		t.Error(err)
	}
	// The folder is nobody's demo now: neither command touches it.
	if err := d.Down(t.Context()); code(err) != api.CodeConflict {
		t.Errorf("down of a foreign folder: %v", err)
	}
	if err := d.Up(t.Context()); code(err) != api.CodeConflict {
		t.Errorf("up in a foreign folder: %v", err)
	}
}

// If up fails, nothing stays, and the end of the log says why.
func TestUpUndoesItself(t *testing.T) {
	t.Setenv("DEMO_PLAY", "fail")
	d, out := newDemo(t)
	err := d.Up(t.Context())
	if err == nil || !strings.Contains(err.Error(), "clusterd ended") || !strings.Contains(out.String(), "address already in use") {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := os.Stat(d.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", d.Dir, err)
	}
}

// ^C in the middle of up undoes it too. The daemons here never answer.
func TestUpInterrupted(t *testing.T) {
	t.Parallel()
	d, out := newDemo(t)
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if err := d.Up(ctx); code(err) != api.CodeTimeout {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := os.Stat(d.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", d.Dir, err)
	}
	for _, n := range nodeNames {
		if ps := nodeProcs(t, d, n); len(ps) != 0 {
			t.Errorf("%s: %+v", n, ps)
		}
	}
}

func TestUpWithoutPrograms(t *testing.T) {
	t.Parallel()
	d, _ := newDemo(t)
	d.Clusterd = ""
	if err := d.Up(t.Context()); code(err) != api.CodeNotFound {
		t.Error(err)
	}
	if _, err := os.Stat(d.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", d.Dir, err)
	}
}

func TestFolderTooLong(t *testing.T) {
	t.Parallel()
	d := &Demo{Dir: "/" + strings.Repeat("x", 90), Clusterd: "x", Mkfs: "x", Err: io.Discard}
	if err := d.Up(t.Context()); code(err) != api.CodeUsage {
		t.Error(err)
	}
}

func TestNoDemo(t *testing.T) {
	t.Parallel()
	d, _ := newDemo(t)
	if _, _, err := d.Living(t.Context()); code(err) != api.CodeNotFound {
		t.Error(err)
	}
	if err := d.Kill(t.Context(), "n1"); code(err) != api.CodeNotFound {
		t.Error(err)
	}
}

func TestNobodyAnswers(t *testing.T) {
	t.Parallel()
	d, _ := newDemo(t)
	running(t, d)
	if err := d.killAll(); err != nil {
		t.Fatal(err)
	}
	_, dead, err := d.Living(t.Context())
	if code(err) != api.CodeUnreachable || len(dead) != 3 {
		t.Errorf("%v, %v", dead, err)
	}
}

// Two commands at once take turns.
func TestLock(t *testing.T) {
	t.Parallel()
	d, _ := newDemo(t)
	running(t, d)
	release, err := d.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := d.Down(ctx); code(err) != api.CodeTimeout {
		t.Errorf("down under a lock: %v", err)
	}
	release()
	if err := d.Down(t.Context()); err != nil {
		t.Error(err)
	}
}

// Another place is chosen when somebody listens on the documented one.
func TestChoose(t *testing.T) {
	t.Parallel()
	used := place{Prefix: "127.0.77", Ports: ports{API: freePort(t), Raft: freePort(t), Gossip: freePort(t), ISCSI: freePort(t)}}
	if err := used.free(); err != nil {
		t.Fatalf("a free place is not free: %v", err)
	}
	l, err := net.Listen("tcp4", used.addr(1)+":"+strconv.Itoa(used.Ports.ISCSI))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := used.free(); err == nil {
		t.Error("a place with a listener is free")
	}
	u, err := net.ListenPacket("udp4", "127.0.78.13:"+strconv.Itoa(used.Ports.Gossip))
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	used.Prefix = "127.0.78"
	if err := used.free(); err == nil {
		t.Error("a place whose gossip port is taken is free")
	}
	if _, err := choose(); err != nil {
		t.Error(err)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.77.11:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func TestDefaultDir(t *testing.T) {
	t.Parallel()
	env := func(m map[string]string) func(string) string { return func(k string) string { return m[k] } }
	for want, m := range map[string]map[string]string{
		"/x/blockhouse-demo":              {"XDG_DATA_HOME": "/x", "HOME": "/h"},
		"/h/.local/share/blockhouse-demo": {"HOME": "/h"},
		"/i/.local/share/blockhouse-demo": {"HOME": "/i", "XDG_DATA_HOME": "relative"}, // to be ignored, says the XDG specification
	} {
		if got, err := DefaultDir(env(m)); err != nil || got != want {
			t.Errorf("%v: %q, %v", m, got, err)
		}
	}
	if _, err := DefaultDir(env(nil)); code(err) != api.CodeUsage {
		t.Error(err)
	}
}

func TestQuote(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{"a-b_c.d/e:f@g=h": "a-b_c.d/e:f@g=h", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$x": "'$x'"} {
		if got := quote(in); got != want {
			t.Errorf("quote(%q) = %s, want %s", in, got, want)
		}
		out, err := exec.Command("sh", "-c", "printf %s "+quote(in)).Output()
		if err != nil || string(out) != in {
			t.Errorf("the shell reads %s as %q", quote(in), out)
		}
	}
}
