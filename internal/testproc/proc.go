// Package testproc runs real child processes under a test.
//
// A child belongs to the test that started it: it has its own session and process group, its output goes to a file in the
// test's artefact folder, and it is gone when the test ends, whether the test passed, failed, panicked or its binary was
// killed. A process is only ever addressed by the pid or process group that Start received, never by its name.
//
// Two mechanisms end a child when the test binary dies without running its cleanups: the parent-death signal, and a reaper
// (see reaper.go) that ends whole groups. The signal alone is not enough, because it reaches only the direct child and the
// kernel clears it when a child changes credentials, as nsenter and unshare do.
//
// Only tests import it. It knows nothing of the product.
package testproc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Spec says what to start. Name and Args are required.
type Spec struct {
	Name       string        // used for the log file and in messages; need not be unique
	Args       []string      // program and arguments; a program without a slash is searched with Find
	Env        []string      // added to the environment of the test
	Dir        string        // working directory; empty is that of the test
	Stdin      *os.File      // nil is /dev/null
	ExtraFiles []*os.File    // become descriptors 3, 4, ... of the child; Start leaves them open
	LogDir     string        // folder of the log file; empty is ArtefactDir
	Grace      time.Duration // from SIGTERM to SIGKILL at the end; zero is 3 s
}

// Proc is a running or ended child. Its methods may be called from any goroutine.
type Proc struct {
	name   string
	log    string
	grace  time.Duration
	cmd    *exec.Cmd
	pid    int
	exited chan struct{} // closed when the leader is dead; it stays a zombie until Close, so that its group id is not reused
	status exitStatus    // valid once exited is closed
	frozen atomic.Bool
	once   sync.Once
	endErr error // result of the one Close

	endMu  sync.Mutex // one end at a time
	reaped bool       // guarded by endMu: the group id may belong to a stranger now
}

type exitStatus struct {
	signalled bool
	value     int // exit code, or signal number
	err       error
}

func (s exitStatus) error() error {
	switch {
	case s.err != nil:
		return s.err
	case s.signalled:
		return fmt.Errorf("ended by signal %d (%s)", s.value, syscall.Signal(s.value))
	case s.value != 0:
		return fmt.Errorf("exit code %d", s.value)
	}
	return nil
}

var serial atomic.Uint64 // keeps log file names of one test binary apart

// Start starts the child and registers its end with t. It fails the test when the program is missing or cannot start.
// On failure of the test the tail of the output is logged.
func Start(t testing.TB, s Spec) *Proc {
	t.Helper()
	p, err := start(t, s)
	if err != nil {
		t.Fatalf("start %s: %v", s.Name, err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("end %s: %v", p.name, err)
		}
		if t.Failed() {
			t.Logf("%s (pid %d, %s): last output:\n%s", p.name, p.pid, p.log, p.Tail(4096))
		}
	})
	return p
}

func start(t testing.TB, s Spec) (*Proc, error) {
	if len(s.Args) == 0 || s.Name == "" {
		return nil, errors.New("spec has no name or no arguments; set Name and Args")
	}
	prog, err := Find(s.Args[0])
	if err != nil {
		return nil, err
	}
	dir := s.LogDir
	if dir == "" {
		dir = ArtefactDir(t)
	}
	if s.Grace == 0 {
		s.Grace = 3 * time.Second
	}
	base := strings.Map(fileRune, s.Name)
	logName := filepath.Join(dir, fmt.Sprintf("%s-%d.log", base, serial.Add(1)))
	logFile, err := os.OpenFile(logName, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	defer logFile.Close() // the child has its own descriptor
	if err := reaperStart(); err != nil {
		return nil, err
	}
	cmd := exec.Command(prog, s.Args[1:]...)
	cmd.Args[0] = s.Args[0]
	cmd.Env = append(os.Environ(), s.Env...)
	cmd.Dir = s.Dir
	if s.Stdin != nil {
		cmd.Stdin = s.Stdin
	}
	// Files, not pipes: no copying goroutine, and a grandchild that keeps the descriptor does not block the end.
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = s.ExtraFiles
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	p := &Proc{name: s.Name, log: logName, grace: s.Grace, cmd: cmd, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig fires at the end of the thread that forked, so that thread lives as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
			err = reaperAdd(p.pid)
		}
		started <- err
		if p.pid != 0 {
			p.status = waitNoReap(p.pid)
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		if p.pid != 0 {
			err = errors.Join(err, p.Close())
		}
		return nil, err
	}
	return p, nil
}

func fileRune(r rune) rune {
	if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.' {
		return r
	}
	return '_'
}

// waitNoReap waits until pid is dead and leaves it a zombie, which keeps the number from being given to a stranger.
func waitNoReap(pid int) exitStatus {
	for {
		var si unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &si, unix.WEXITED|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return exitStatus{err: fmt.Errorf("wait for pid %d: %w", pid, err)}
		}
		// si_status lies behind si_pid and si_uid; x/sys does not name it.
		value := *(*int32)(unsafe.Add(unsafe.Pointer(&si), 24))
		return exitStatus{signalled: si.Code != cldExited, value: int(value)}
	}
}

const cldExited = 1 // CLD_EXITED of sigaction(2)

// PID returns the process id, which is also the process group and the session.
func (p *Proc) PID() int { return p.pid }

// LogPath returns the file that holds stdout and stderr.
func (p *Proc) LogPath() string { return p.log }

// Done is closed when the process has ended.
func (p *Proc) Done() <-chan struct{} { return p.exited }

// Output returns everything that the process wrote so far.
func (p *Proc) Output() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return fmt.Sprintf("(output of %s is not readable: %v)", p.name, err)
	}
	return string(b)
}

// Tail returns at most the last n bytes of the output, from a line's start where it can.
func (p *Proc) Tail(n int) string {
	s := p.Output()
	if len(s) <= n {
		return s
	}
	s = s[len(s)-n:]
	if i := strings.IndexByte(s, '\n'); i >= 0 {
		s = s[i+1:]
	}
	return s
}

// WaitFor waits until a line of the output matches re and returns the match and its groups. It fails early when the
// process ends without such a line.
func (p *Proc) WaitFor(re string, timeout time.Duration) ([]string, error) {
	rx, err := regexp.Compile("(?m)" + re)
	if err != nil {
		return nil, fmt.Errorf("wait for output of %s: %w", p.name, err)
	}
	deadline := time.Now().Add(timeout)
	for {
		dead := p.ended() // before reading, so that the last lines are seen
		if m := rx.FindStringSubmatch(p.Output()); m != nil {
			return m, nil
		}
		switch {
		case dead:
			return nil, fmt.Errorf("%s ended with code %d without a line matching %q; output: %s", p.name, p.ExitCode(), re, p.log)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("%s wrote no line matching %q within %v; output: %s", p.name, re, timeout, p.log)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// MustWaitFor is WaitFor that fails the test.
func (p *Proc) MustWaitFor(t testing.TB, re string, timeout time.Duration) []string {
	t.Helper()
	m, err := p.WaitFor(re, timeout)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// Wait waits for the end of the process. It returns nil after exit code 0, else an error that says how it ended, or that
// it did not end in time.
func (p *Proc) Wait(timeout time.Duration) error {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-p.exited:
	case <-timer.C:
		return fmt.Errorf("%s (pid %d) did not end within %v", p.name, p.pid, timeout)
	}
	if err := p.status.error(); err != nil {
		return fmt.Errorf("%s: %w; output: %s", p.name, err, p.log)
	}
	return nil
}

// ExitCode returns the exit code, 128 + signal after a signal, and -1 while the process runs.
func (p *Proc) ExitCode() int {
	switch {
	case !p.ended():
		return -1
	case p.status.signalled:
		return 128 + p.status.value
	}
	return p.status.value
}

func (p *Proc) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// Signal sends sig to the process alone, not to its children. An ended process gives os.ErrProcessDone.
func (p *Proc) Signal(sig syscall.Signal) error {
	if p.ended() {
		return fmt.Errorf("signal %s: %w", p.name, os.ErrProcessDone)
	}
	if err := unix.Kill(p.pid, sig); err != nil {
		return fmt.Errorf("signal %s (pid %d): %w", p.name, p.pid, err)
	}
	return nil
}

// Freeze stops the process (SIGSTOP) and returns when the kernel shows it as stopped.
func (p *Proc) Freeze() error {
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	p.frozen.Store(true)
	for range 500 {
		if st, ok := readStat(p.pid); !ok || st.state == 'T' || st.state == 't' || st.state == 'Z' {
			return nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return fmt.Errorf("freeze %s (pid %d): not stopped after 1 s", p.name, p.pid)
}

// Thaw lets a frozen process go on.
func (p *Proc) Thaw() error {
	p.frozen.Store(false)
	return p.Signal(syscall.SIGCONT)
}

// Frozen says whether Freeze was called after the last Thaw.
func (p *Proc) Frozen() bool { return p.frozen.Load() }

// Kill ends the whole process group with SIGKILL and waits for it. It is no error if it has ended already.
func (p *Proc) Kill() error { return p.end(0) }

// Stop asks the process group to end with SIGTERM, and after the grace of the Spec ends it with SIGKILL.
func (p *Proc) Stop() error { return p.end(p.grace) }

// Close is what the cleanup of Start does: Stop, then the zombie is reaped. Later calls return the same result.
func (p *Proc) Close() error {
	p.once.Do(func() {
		p.endErr = p.end(p.grace)
		reaperDel(p.pid)
		p.endMu.Lock()
		defer p.endMu.Unlock()
		if p.ended() {
			_ = p.cmd.Wait() // only reaps; how it ended is in p.status
			p.reaped = true
		}
	})
	return p.endErr
}

func (p *Proc) end(grace time.Duration) error {
	p.endMu.Lock()
	defer p.endMu.Unlock()
	if p.reaped {
		return nil
	}
	if grace > 0 && !p.ended() {
		_ = unix.Kill(-p.pid, unix.SIGTERM)
		_ = unix.Kill(-p.pid, unix.SIGCONT)
		timer := time.NewTimer(grace)
		select {
		case <-p.exited:
		case <-timer.C:
		}
		timer.Stop()
	}
	var left []int
	for i := range 500 {
		_ = unix.Kill(-p.pid, unix.SIGKILL)
		if left = liveGroup(p.pid); len(left) == 0 && p.ended() {
			return nil
		}
		time.Sleep(time.Duration(min(i, 10)) * time.Millisecond)
	}
	return fmt.Errorf("process group %d (%s) still has live processes %v after SIGKILL; look at /proc/PID/stack", p.pid, p.name, left)
}

type procStat struct {
	state byte
	pgrp  int
}

func readStat(pid int) (procStat, bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, false
	}
	// The command name is in parentheses and may hold spaces: go on behind the last one.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return procStat{}, false
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 3 {
		return procStat{}, false
	}
	pgrp, err := strconv.Atoi(f[2])
	return procStat{state: f[0][0], pgrp: pgrp}, err == nil
}

// liveGroup lists the members of a process group that are not zombies.
func liveGroup(pgid int) []int {
	if err := unix.Kill(-pgid, 0); err == unix.ESRCH {
		return nil
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var live []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if st, ok := readStat(pid); ok && st.pgrp == pgid && st.state != 'Z' && st.state != 'X' {
			live = append(live, pid)
		}
	}
	return live
}
