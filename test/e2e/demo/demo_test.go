// Package demo runs clusteradm demo as a user does: real programs, three nodes,
// no root.
package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
)

var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "bhdemo")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // another user runs the programs
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	bin = filepath.Join(dir, "bin")
	out, err := exec.Command("go", "build", "-o", bin+"/", "../../../cmd/clusteradm", "../../../cmd/clusterd", "../../../cmd/mkfs-gfs").CombinedOutput()
	if err != nil {
		fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// user is an account that may do nothing; the tests themselves often run as
// root, and then prove nothing about "no root".
const nobody = 65534

type demo struct {
	t   *testing.T
	dir string
}

func newDemo(t *testing.T) *demo {
	t.Helper()
	home, err := os.MkdirTemp("", "bh") // short, for the sockets' names
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(home, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	d := &demo{t, filepath.Join(home, "demo")}
	t.Cleanup(func() {
		d.tidy()
		if err := os.RemoveAll(home); err != nil {
			t.Error(err)
		}
	})
	return d
}

// tidy leaves nothing behind, shows the logs of a failed test, and wants that a
// test that passed has left nothing.
func (d *demo) tidy() {
	d.t.Helper()
	pids := d.processes()
	if !d.t.Failed() {
		for _, pid := range pids {
			d.t.Errorf("process %d of the demo is left: %s", pid, cmdline(pid))
		}
	} else {
		logs, _ := filepath.Glob(filepath.Join(d.dir, "n?", "clusterd.log"))
		for _, l := range logs {
			b, _ := os.ReadFile(l)
			d.t.Logf("%s:\n%s", l, b[max(0, len(b)-8000):])
		}
	}
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

type result struct {
	code     int
	out, err string
}

// run runs a program of ours as an ordinary user.
func (d *demo) run(prog string, args ...string) result {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 3*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, filepath.Join(bin, prog), args...)
	c.Env = []string{"PATH=" + bin + ":/usr/bin:/bin", "XDG_DATA_HOME=/nonexistent", "HOME=/nonexistent"}
	c.Dir = "/"
	if os.Geteuid() == 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		d.t.Fatal(err)
	}
	r := result{c.ProcessState.ExitCode(), out.String(), errs.String()}
	d.t.Logf("%s %s: exit %d\n%s%s", prog, strings.Join(args, " "), r.code, r.out, r.err)
	return r
}

func (d *demo) adm(args ...string) result {
	d.t.Helper()
	return d.run("clusteradm", append([]string{"demo", "--dir", d.dir}, args...)...)
}

// must wants exit status 0.
func (d *demo) must(args ...string) result {
	d.t.Helper()
	r := d.adm(args...)
	if r.code != 0 {
		d.t.Fatalf("demo %s: exit %d", strings.Join(args, " "), r.code)
	}
	return r
}

// until asks for the status until ok likes it.
func (d *demo) until(what string, ok func(api.Status) bool) api.Status {
	d.t.Helper()
	var st api.Status
	for begin := time.Now(); time.Since(begin) < time.Minute; time.Sleep(200 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(d.t.Context(), 20*time.Second)
		c := exec.CommandContext(ctx, filepath.Join(bin, "clusteradm"), "demo", "--dir", d.dir, "status", "-o", "json")
		if os.Geteuid() == 0 {
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		}
		out, err := c.Output()
		cancel()
		st = api.Status{}
		if err == nil && json.Unmarshal(out, &st) == nil && ok(st) {
			return st
		}
	}
	b, _ := json.MarshalIndent(st, "", " ")
	d.t.Fatalf("never: %s; last status %s", what, b)
	return st
}

// processes finds what carries the demo's mark in its environment or arguments.
func (d *demo) processes() []int {
	var pids []int
	ents, _ := os.ReadDir("/proc")
	for _, e := range ents {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		env, _ := os.ReadFile("/proc/" + e.Name() + "/environ")
		if strings.Contains(string(env), d.dir+"/n") || strings.Contains(cmdline(pid), d.dir+"/") {
			if st, _ := os.ReadFile("/proc/" + e.Name() + "/stat"); strings.Contains(string(st), ") Z ") {
				continue
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

func cmdline(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	return strings.ReplaceAll(string(b), "\x00", " ")
}

func online(st api.Status) (n int) {
	for _, x := range st.Nodes {
		if x.State == api.NodeOnline {
			n++
		}
	}
	return n
}

func problem(st api.Status, re string) *api.Problem {
	for _, p := range st.Problems {
		if regexp.MustCompile(re).MatchString(p.What + "\n" + p.Cause) {
			return &p
		}
	}
	return nil
}

// The demo from up to down, as README tells it.
func TestDemo(t *testing.T) {
	d := newDemo(t)
	up := d.must("up")
	for _, want := range []string{
		`(?m)^\$ clusterd --config \S+/n1/clusterd.toml$`,
		`(?m)^\$ clusteradm --socket \S+/n1/run/clusterd.sock init demo$`,
		`(?m)^\$ clusteradm --socket \S+/n1/run/clusterd.sock token create `,
		`(?m)^\$ clusteradm --socket \S+/n2/run/clusterd.sock join bh1-\S+@127\.\S+:\d+$`,
		`(?m)^\$ clusteradm --socket \S+/n3/run/clusterd.sock join bh1-\S+@127\.\S+:\d+$`,
		`(?m)^\$ clusteradm --socket \S+ target create `,
		`(?m)^\$ clusteradm --socket \S+ lun create .* --node n3`,
		`(?m)^\$ clusteradm --socket \S+ acl open iqn\.`,
		`(?m)^\$ mkfs-gfs -p lock_dlm -t demo:fs -j 3 -O iscsi://127\.\S+/iqn\.\S+/\d+$`,
		`What to try next`, `demo kill n1`, `demo down`, `(?i)not redundant: one copy`,
	} {
		if !regexp.MustCompile(want).MatchString(up.err) {
			t.Errorf("up did not say %s", want)
		}
	}
	if !strings.Contains(up.out, "cluster: demo") || !strings.Contains(up.out, "not redundant: one copy") {
		t.Error("up did not end with the status")
	}
	if n := len(d.processes()); n < 9 {
		t.Errorf("%d processes, want three nodes of three", n)
	}
	st := d.until("three nodes quorate, the LUN served", func(s api.Status) bool {
		return s.Quorum.Quorate && online(s) == 3 && len(s.LUNs) == 1 && s.LUNs[0].State != api.HealthFaulted
	})
	if len(st.Volumes) != 1 || st.Volumes[0].Primary != "n3" || !strings.Contains(st.Volumes[0].Cause, "not redundant") {
		t.Errorf("volumes %+v", st.Volumes)
	}
	d.filesystem(up.err)

	// Twice is safe.
	if r := d.must("up"); !strings.Contains(r.err, "already up") || strings.Contains(r.err, "started again") {
		t.Error("a second up did more than to say that it is up")
	}

	// A node dies: quorate with two, the target cut it off, and status says what to do.
	d.must("kill", "n1")
	st = d.until("n1 fenced by the target, quorate with two", func(s api.Status) bool {
		return s.Quorum.Quorate && len(s.Quorum.Online) == 2 && len(s.Fences) == 0 && problem(s, `n1 is fenced`) != nil
	})
	if p := problem(st, `n1 is fenced`); !strings.Contains(p.Cause, "target: cut off by n3") || p.Action == "" || p.Command == "" {
		t.Errorf("status does not say why or what to do: %+v", p)
	}
	if r := d.adm("status"); r.code != 0 || !strings.Contains(r.out, "action: ") || !strings.Contains(r.err, "not running: n1") {
		t.Error("the text does not say it either")
	}

	// What was killed starts again.
	if r := d.must("up"); !strings.Contains(r.err, "started again: n1") {
		t.Error("up did not start n1")
	}
	d.until("three votes again", func(s api.Status) bool { return online(s) == 3 && len(s.Quorum.Online) == 3 })

	// The only copy goes: the LUN is down, and status says why.
	d.must("kill", "n3")
	st = d.until("the LUN down, with its cause", func(s api.Status) bool {
		return s.Quorum.Quorate && len(s.Volumes) == 1 && s.Volumes[0].Health == api.HealthFaulted
	})
	if p := problem(st, `n3`); p == nil || st.Volumes[0].Cause == "" {
		t.Errorf("status does not say why: %+v, %+v", st.Problems, st.Volumes[0])
	}

	d.down()
	if r := d.must("down"); !strings.Contains(r.err, "there is no demo") {
		t.Error("a second down")
	}
}

// down ends the demo and looks what is left.
func (d *demo) down() {
	d.t.Helper()
	d.must("down")
	if pids := d.processes(); len(pids) != 0 {
		d.t.Errorf("processes left: %v", pids)
	}
	if _, err := os.Lstat(d.dir); !errors.Is(err, fs.ErrNotExist) {
		d.t.Errorf("%s is left: %v", d.dir, err)
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil || strings.Contains(string(mounts), d.dir) {
		d.t.Errorf("a mount is left (%v)", err)
	}
}

// filesystem reads the superblock back through another initiator than ours.
func (d *demo) filesystem(said string) {
	d.t.Helper()
	url := regexp.MustCompile(`iscsi://\S+`).FindString(said)
	tool, err := exec.LookPath("iscsi-readcapacity16")
	if err != nil {
		d.t.Log("skip: libiscsi-bin is not installed (make deps)")
		return
	}
	out, err := exec.Command(tool, url).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "268435456") {
		d.t.Errorf("%s %s: %v\n%s", tool, url, err, out)
	}
}

// Two demos stand beside each other: the second finds other addresses.
func TestTwoDemos(t *testing.T) {
	if testing.Short() {
		t.Skip("skip: -short")
	}
	a, b := newDemo(t), newDemo(t)
	a.must("up")
	b.must("up")
	b.must("kill", "n2")
	a.until("the other demo untouched", func(s api.Status) bool { return online(s) == 3 })
	a.down()
	b.until("still quorate", func(s api.Status) bool { return s.Quorum.Quorate })
	b.down()
}

// ^C in the middle of up leaves nothing.
func TestUpInterrupted(t *testing.T) {
	d := newDemo(t)
	c := exec.Command(filepath.Join(bin, "clusteradm"), "demo", "--dir", d.dir, "up")
	if os.Geteuid() == 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); len(d.processes()) < 4 && time.Since(begin) < 30*time.Second; {
		time.Sleep(10 * time.Millisecond)
	}
	if err := c.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	if code := c.ProcessState.ExitCode(); code != 130 || !strings.Contains(errs.String(), "everything is undone") {
		t.Errorf("exit %d: %s", code, errs.String())
	}
	if pids := d.processes(); len(pids) != 0 {
		t.Errorf("processes left: %v", pids)
	}
	if _, err := os.Lstat(d.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", d.dir, err)
	}
}
