package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

var paramName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

// encode is the agent's input. action= stands first and nothing else can spell
// it, so that there is no input, whole or cut, without the action.
func encode(a Action, params map[string]string) ([]byte, error) {
	if a == "" || !paramName.MatchString(string(a)) {
		return nil, fmt.Errorf("%w: action %q", ErrNoAction, string(a))
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "action=%s\n", a)
	for _, k := range slices.Sorted(maps.Keys(params)) {
		v := params[k]
		switch {
		case !paramName.MatchString(k):
			return nil, fmt.Errorf("%w: %q is no name of an option", ErrParam, k)
		case strings.EqualFold(k, "action") || strings.EqualFold(k, "option"):
			return nil, fmt.Errorf("%w: %s is not an option", ErrParam, k)
		case strings.ContainsAny(v, "\n\r\x00") || !utf8.ValidString(v):
			return nil, fmt.Errorf("%w: the value of %s has a line break, a zero byte or no UTF-8: a line of the agent's input cannot carry it", ErrParam, k)
		case strings.TrimSpace(v) != v:
			return nil, fmt.Errorf("%w: the value of %s begins or ends with white space, which agents strip", ErrParam, k)
		}
		fmt.Fprintf(&b, "%s=%s\n", k, v)
	}
	return b.Bytes(), nil
}

// input is encode in a file that exists only in memory. The agent finds it
// complete however late this process is scheduled, and no secret meets a disk.
func input(a Action, params map[string]string) (*os.File, error) {
	b, err := encode(a, params)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("fence-agent-input", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make the agent's input: %w", err)
	}
	f := os.NewFile(uintptr(fd), "fence-agent-input")
	if _, err := f.Write(b); err != nil {
		return nil, errors.Join(fmt.Errorf("write the agent's input: %w", err), f.Close())
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(fmt.Errorf("rewind the agent's input: %w", err), f.Close())
	}
	return f, nil
}

// ended is how a process ended.
type ended struct {
	outcome   fencing.Outcome
	exit      int
	why       string
	cancelled bool
}

// lag is how long the readers of the output may go on after the group is dead: a
// process that left the group may hold the other end open.
const lag = time.Second

// execute runs path with in as its input, which it closes, and waits until the
// whole process group is gone. out, where not nil, gets standard output; t gets
// both streams. An error means that nothing was started.
func execute(ctx context.Context, clock env.Clock, path string, in *os.File, timeout time.Duration, out *whole, t *tail) (ended, error) {
	defer in.Close()
	if err := ctx.Err(); err != nil {
		return ended{}, fmt.Errorf("start %s: %w", path, context.Cause(ctx))
	}
	cmd := exec.Command(path)
	cmd.Stdin = in
	cmd.Stdout, cmd.Stderr = io.Writer(t), io.Writer(t)
	if out != nil {
		cmd.Stdout = io.MultiWriter(out, t)
	}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C", "LC_ALL=C", "HOME=/"}
	cmd.WaitDelay = lag
	// Pdeathsig: an agent does not outlive the process that records what it does.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	p := &process{cmd: cmd, started: make(chan error, 1), done: make(chan struct{})}
	go p.main()
	if err := <-p.started; err != nil {
		<-p.done
		return ended{}, fmt.Errorf("start %s: %w", path, err)
	}
	// The limit is measured on the clock that goes on while the machine sleeps.
	tctx, cancel := context.WithCancel(ctx)
	alarm := make(chan struct{})
	go func() {
		defer close(alarm)
		_ = clock.Sleep(tctx, timeout)
	}()
	var e ended
	select {
	case <-p.done:
		cancel()
	case <-alarm:
		p.kill()
		<-p.done
		cancel()
		if ctx.Err() != nil {
			e = ended{outcome: fencing.Failed, why: "ended: " + context.Cause(ctx).Error(), cancelled: true}
		} else {
			e = ended{outcome: fencing.TimedOut, why: fmt.Sprintf("no end after %v; it was killed", timeout)}
		}
	}
	<-alarm
	st := p.cmd.ProcessState
	if e.outcome != "" {
		e.exit = -1
		return e, nil
	}
	e.exit = st.ExitCode() // -1 for a signal
	switch {
	case e.exit == 0:
		e.outcome = fencing.OK
	default:
		e.outcome, e.why = fencing.Failed, st.String()
	}
	return e, nil
}

// process owns a child from start to reaping.
type process struct {
	cmd     *exec.Cmd
	started chan error
	done    chan struct{}

	mu     sync.Mutex
	reaped bool
}

// main starts the child, waits for its end, kills what is left of its group and
// reaps it. The thread is locked because Pdeathsig fires at the end of the
// thread that forked.
func (p *process) main() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(p.done)
	if err := p.cmd.Start(); err != nil {
		p.started <- err
		return
	}
	p.started <- nil
	for {
		// WNOWAIT leaves a zombie, which keeps the number of the group from being
		// given to others until the group is dead.
		err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.kill()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
	_ = p.cmd.Wait() // its error is in ProcessState, or says that a stranger holds the pipe
}

// kill ends the whole group, as long as the leader is not reaped.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	}
}
