package lab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/internal/testnet"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/test/lab/internal/agent"
)

// Config describes a guest. Name is required and unique in its lab; it becomes the host name.
type Config struct {
	Name     string
	MemMB    int           // zero is 512
	Links    []Link        // eth0, eth1, ... of the guest
	Modules  []string      // loaded after boot
	Disks    []string      // files of the host that become /dev/ubda, /dev/ubdb, ...; fsync on them is not durable
	Timeout  time.Duration // of one Run; zero is DefaultTimeout
	Lifetime time.Duration // after which the watchdog fires whatever the guest does; zero is DefaultLifetime
}

// Link puts a guest on a segment with the address CIDR.
type Link struct {
	Bridge *testnet.Bridge
	CIDR   string
}

// Limits of the watchdog. They are generous: they end what hangs and judge no speed.
const (
	DefaultTimeout  = 60 * time.Second
	DefaultLifetime = 5 * time.Minute
	bootTimeout     = 60 * time.Second
)

// ErrTimeout is the error of a command that did not end in time.
var ErrTimeout = errors.New("did not end in time")

// ErrGone is the error of commands of a guest that has ended or was killed.
var ErrGone = errors.New("guest is gone")

// Guest is a booted kernel. Its methods may be called from several goroutines, those that fail the test only from the test's
// own.
type Guest struct {
	lab   *Lab
	t     testing.TB
	cfg   Config
	ports []*testnet.Port
	proc  *testproc.Proc
	line  net.Conn // the serial line to the agent
	hello chan struct{}
	done  chan struct{} // the reader has ended: no event comes any more
	timer *time.Timer   // the watchdog over the whole life
	fired sync.Once

	mu struct {
		sync.Mutex
		next       int
		cmds       map[int]*Cmd
		reason     error // why the guest is gone
		transcript *os.File
	}
}

// Cmd is a command that runs in a guest.
type Cmd struct {
	g    *Guest
	id   int
	done chan struct{}

	mu struct {
		sync.Mutex
		out  bytes.Buffer
		code int
		err  error // could not start, or the guest is gone
	}
}

// Boot boots guests side by side and returns when all of them answer, in the order of cfgs.
func (l *Lab) Boot(cfgs ...Config) []*Guest {
	l.t.Helper()
	var gs []*Guest
	for _, c := range cfgs {
		g, err := l.start(c, nil)
		if err != nil {
			l.t.Fatalf("boot %s: %v", c.Name, err)
		}
		gs = append(gs, g)
	}
	for _, g := range gs {
		if err := g.awaitBoot(); err != nil {
			l.t.Fatalf("boot %s: %v", g.cfg.Name, err)
		}
	}
	return gs
}

// Reboot ends the guest as Kill does and boots another kernel in its place: same name, links and disks, another boot id and
// an empty root. The old Guest stays gone; go on with the new one.
func (g *Guest) Reboot() *Guest {
	g.t.Helper()
	if err := g.Kill(); err != nil {
		g.t.Fatalf("reboot %s: %v", g.cfg.Name, err)
	}
	fresh, err := g.lab.start(g.cfg, g.ports)
	if err == nil {
		err = fresh.awaitBoot()
	}
	if err != nil {
		g.t.Fatalf("reboot %s: %v", g.cfg.Name, err)
	}
	return fresh
}

// start powers a guest on. ports are those of an earlier boot, or nil.
func (l *Lab) start(c Config, ports []*testnet.Port) (*Guest, error) {
	if c.MemMB == 0 {
		c.MemMB = 512
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultTimeout
	}
	if c.Lifetime == 0 {
		c.Lifetime = DefaultLifetime
	}
	// Leave time to write the dump before `go test -timeout` ends everything.
	if d, ok := l.t.(interface{ Deadline() (time.Time, bool) }); ok {
		if end, ok := d.Deadline(); ok {
			c.Lifetime = min(c.Lifetime, max(time.Until(end)-20*time.Second, time.Second))
		}
	}
	g := &Guest{lab: l, t: l.t, cfg: c, ports: ports, hello: make(chan struct{}), done: make(chan struct{})}
	g.mu.cmds = make(map[int]*Cmd)
	ours, theirs, err := serialLine()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	g.line = ours
	// Of a crashed kernel of this name.
	if err := os.RemoveAll(filepath.Join(l.umls, c.Name)); err != nil {
		ours.Close()
		return nil, err
	}
	g.mu.transcript, err = os.OpenFile(filepath.Join(l.Artefacts, c.Name+"-commands.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		ours.Close()
		return nil, err
	}
	args := []string{
		"linux.uml", fmt.Sprintf("mem=%dM", c.MemMB), "umid=" + c.Name, "uml_dir=" + l.umls,
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw", "init=" + l.init,
		"lab.share=" + l.Share, "lab.name=" + c.Name,
		"con=null", "con0=fd:0,fd:1", "ssl=null", "ssl0=fd:3,fd:3",
		// The dump of sysrq-t is at level "info" and must reach the console's log whole.
		"ignore_loglevel", "sysrq_always_enabled",
	}
	for i, link := range c.Links {
		if i == len(g.ports) {
			g.ports = append(g.ports, link.Bridge.Tap())
		}
		args = append(args, fmt.Sprintf("eth%d=tuntap,%s,%s", i, g.ports[i].Dev, g.ports[i].MAC))
	}
	for i, d := range c.Disks {
		args = append(args, fmt.Sprintf("ubd%c=%s", 'a'+i, d))
	}
	spec := testproc.Spec{Name: c.Name + "-console", Args: args, ExtraFiles: []*os.File{theirs}, Env: []string{"LANG=C"}}
	if unix.Access("/dev/shm", unix.W_OK) == nil {
		spec.Env = append(spec.Env, "TMPDIR=/dev/shm") // the guest's memory is a file; keep it off the disk
	}
	g.proc = l.Net.Hub().Start(spec)
	g.timer = time.AfterFunc(c.Lifetime, func() {
		g.fire(fmt.Errorf("watchdog of %s: lifetime of %v is over", c.Name, c.Lifetime))
	})
	go g.read()
	l.t.Cleanup(g.close)
	return g, nil
}

// serialLine makes the two ends of a guest's serial port: one for the test, and a blocking descriptor for the kernel.
func serialLine() (net.Conn, *os.File, error) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("serial line: %w", err)
	}
	f := os.NewFile(uintptr(fd[0]), "serial line")
	defer f.Close()
	theirs := os.NewFile(uintptr(fd[1]), "serial line")
	c, err := net.FileConn(f)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("serial line: %w", err)
	}
	return c, theirs, nil
}

func (g *Guest) awaitBoot() error {
	timer := time.NewTimer(bootTimeout)
	defer timer.Stop()
	select {
	case <-g.hello:
	case <-g.done:
		return fmt.Errorf("%w before its agent answered; console: %s", ErrGone, g.proc.LogPath())
	case <-timer.C:
		g.fire(fmt.Errorf("watchdog of %s: no answer %v after power on", g.cfg.Name, bootTimeout))
		return fmt.Errorf("no answer within %v; console: %s", bootTimeout, g.proc.LogPath())
	}
	var s strings.Builder
	for i, l := range g.cfg.Links {
		fmt.Fprintf(&s, "ip addr add %s dev eth%d; ip link set eth%d up\n", l.CIDR, i, i)
	}
	for _, m := range g.cfg.Modules {
		fmt.Fprintf(&s, "modprobe %s\n", m)
	}
	if s.Len() == 0 {
		return nil
	}
	out, err := g.Run(s.String())
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// close is the cleanup. The guest is killed, not shut down: its disks and its root are the test's and go with it.
func (g *Guest) close() {
	g.timer.Stop()
	g.fired.Do(func() {}) // waits for a watchdog that is at work, and keeps it away from now on
	g.end(fmt.Errorf("%s: %w: its test is over", g.cfg.Name, ErrGone))
	g.line.Close()
	<-g.done
	g.mu.transcript.Close()
}

// end records the first reason and kills.
func (g *Guest) end(reason error) {
	g.mu.Lock()
	if g.mu.reason == nil {
		g.mu.reason = reason
	}
	g.mu.Unlock()
	if err := g.proc.Kill(); err != nil {
		g.t.Errorf("kill guest %s: %v", g.cfg.Name, err)
	}
}

// read takes the agent's events until the line ends, which is when every process of the guest is gone.
func (g *Guest) read() {
	defer close(g.done)
	in := bufio.NewScanner(g.line)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var e agent.Event
		if err := json.Unmarshal(in.Bytes(), &e); err != nil {
			g.note("agent sent %q: %v", in.Bytes(), err)
			continue
		}
		g.event(e)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.reason == nil {
		g.mu.reason = fmt.Errorf("%s: %w; console: %s", g.cfg.Name, ErrGone, g.proc.LogPath())
	}
	for id, c := range g.mu.cmds {
		c.finish(-1, g.mu.reason)
		delete(g.mu.cmds, id)
	}
}

func (g *Guest) event(e agent.Event) {
	if e.Kind == agent.Hello {
		close(g.hello)
		return
	}
	g.mu.Lock()
	c := g.mu.cmds[e.ID]
	if e.Kind == agent.Exit || e.Kind == agent.Fail {
		delete(g.mu.cmds, e.ID)
	}
	g.mu.Unlock()
	switch e.Kind {
	case agent.Out:
		g.note("%d| %s", e.ID, bytes.ReplaceAll(bytes.TrimSuffix(e.Data, []byte("\n")), []byte("\n"), fmt.Appendf(nil, "\n%d| ", e.ID)))
		if c != nil {
			c.mu.Lock()
			c.mu.out.Write(e.Data)
			c.mu.Unlock()
		}
	case agent.Exit:
		g.note("%d: exit code %d", e.ID, e.Value)
		if c != nil {
			c.finish(e.Value, nil)
		}
	case agent.Fail:
		g.note("%d: could not start: %s", e.ID, e.Data)
		if c != nil {
			c.finish(-1, fmt.Errorf("start command in %s: %s", g.cfg.Name, e.Data))
		}
	}
}

// note writes a line of the transcript.
func (g *Guest) note(format string, args ...any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fmt.Fprintf(g.mu.transcript, time.Now().Format("15:04:05.000 ")+format+"\n", args...)
}

func (g *Guest) send(rq agent.Request) error {
	line, err := json.Marshal(rq)
	if err != nil {
		return err
	}
	// A frozen guest does not read; the socket takes a request all the same unless hundreds wait.
	if err := g.line.SetWriteDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	_, err = g.line.Write(append(line, '\n'))
	return err
}

// Name is the name of the Config.
func (g *Guest) Name() string { return g.cfg.Name }

// Port is the host's end of the guest's link i, for faults.
func (g *Guest) Port(i int) *testnet.Port { return g.ports[i] }

// Start runs a bash script in the guest and does not wait. The script stops at its first failing command and at unset
// variables (bash -eu -o pipefail). Programs of Lab.Build are in its PATH.
func (g *Guest) Start(script string) *Cmd {
	return g.submit(func(id int) (agent.Request, error) {
		g.note("%d: run\n%s", id, strings.TrimRight(script, "\n"))
		name := filepath.Join("cmd", fmt.Sprintf("%s-%d.sh", g.cfg.Name, id))
		text := "export PATH=" + guestDir + "/bin:$PATH\n" + script + "\n"
		err := os.WriteFile(filepath.Join(g.lab.Share, name), []byte(text), 0o644)
		return agent.Request{ID: id, Op: agent.Run, Script: filepath.Join(guestDir, name)}, err
	})
}

// submit registers a command and sends the request that prepare makes for its id.
func (g *Guest) submit(prepare func(id int) (agent.Request, error)) *Cmd {
	c := &Cmd{g: g, done: make(chan struct{})}
	g.mu.Lock()
	c.id = g.mu.next
	g.mu.next++
	gone := g.mu.reason
	if gone == nil {
		g.mu.cmds[c.id] = c
	}
	g.mu.Unlock()
	if gone != nil {
		c.finish(-1, gone)
		return c
	}
	rq, err := prepare(c.id)
	if err == nil {
		err = g.send(rq)
	}
	if err != nil {
		g.mu.Lock()
		_, mine := g.mu.cmds[c.id] // else the reader has finished it
		delete(g.mu.cmds, c.id)
		g.mu.Unlock()
		if mine {
			c.finish(-1, fmt.Errorf("start command in %s: %w", g.cfg.Name, err))
		}
	}
	return c
}

// Run runs a script as Start does, and waits for it. It returns what the script wrote (stdout and stderr). When the script
// takes longer than the guest's Timeout the watchdog fires: the state of every task is saved and the guest is killed. For
// commands that shall block use Start and Cmd.Wait.
func (g *Guest) Run(script string) (string, error) { return g.RunTimeout(g.cfg.Timeout, script) }

// RunTimeout is Run with another limit.
func (g *Guest) RunTimeout(limit time.Duration, script string) (string, error) {
	c := g.Start(script)
	out, err := c.Wait(limit)
	if errors.Is(err, ErrTimeout) {
		g.fire(fmt.Errorf("watchdog of %s: command %d: %w", g.cfg.Name, c.id, err))
		return c.Output(), fmt.Errorf("%s was killed by its watchdog, tasks are in %s: %w", g.cfg.Name, g.tasksFile(), err)
	}
	return out, err
}

// MustRun is Run that fails the test.
func (g *Guest) MustRun(script string) string {
	g.t.Helper()
	out, err := g.Run(script)
	if err != nil {
		g.t.Fatalf("%s: %v\nscript:\n%s\noutput:\n%s", g.cfg.Name, err, script, out)
	}
	return out
}

// Wait waits until the command ends, at most for limit, and returns its output so far. The error is nil after exit code 0,
// ErrTimeout, ErrGone, or an *ExitError. A time-out changes nothing: the command goes on.
func (c *Cmd) Wait(limit time.Duration) (string, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
		return c.Output(), fmt.Errorf("%w (%v)", ErrTimeout, limit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.mu.err != nil:
		return c.mu.out.String(), c.mu.err
	case c.mu.code != 0:
		return c.mu.out.String(), &ExitError{Code: c.mu.code, Output: c.mu.out.String()}
	}
	return c.mu.out.String(), nil
}

// ExitError is the error of a command that failed in the guest.
type ExitError struct {
	Code   int // 128 + signal when a signal ended it
	Output string
}

func (e *ExitError) Error() string {
	last := strings.TrimSpace(e.Output)
	if i := strings.LastIndexByte(last, '\n'); i >= 0 {
		last = last[i+1:]
	}
	return fmt.Sprintf("exit code %d: %s", e.Code, last)
}

// Done is closed when the command has ended.
func (c *Cmd) Done() <-chan struct{} { return c.done }

// Output returns what the command wrote so far.
func (c *Cmd) Output() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.out.String()
}

// Signal sends a signal to the command's process group in the guest.
func (c *Cmd) Signal(sig syscall.Signal) error {
	return c.g.send(agent.Request{ID: c.id, Op: agent.Signal, Value: int(sig)})
}

func (c *Cmd) finish(code int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.code, c.mu.err = code, err
	close(c.done)
}

// Freeze stops the guest's kernel as a paused virtual machine would be: no timer, no network. Thaw lets it go on.
func (g *Guest) Freeze() error { return g.proc.Freeze() }

// Thaw ends Freeze.
func (g *Guest) Thaw() error { return g.proc.Thaw() }

// Kill ends the guest at once, all its host processes included. Data that the guest handed to a disk file before is on the
// host: this is a crash of the machine, not a loss of the disk's power.
func (g *Guest) Kill() error {
	g.timer.Stop()
	g.note("killed by the test")
	g.mu.Lock()
	if g.mu.reason == nil {
		g.mu.reason = fmt.Errorf("%s: %w: killed by the test", g.cfg.Name, ErrGone)
	}
	g.mu.Unlock()
	err := g.proc.Kill()
	if err == nil {
		<-g.done
	}
	return err
}

// Poweroff syncs the guest's file systems, powers it off and waits for the end.
func (g *Guest) Poweroff() error {
	g.timer.Stop()
	if err := g.send(agent.Request{Op: agent.Poweroff}); err != nil {
		return fmt.Errorf("power off %s: %w", g.cfg.Name, err)
	}
	if err := g.proc.Wait(g.cfg.Timeout); err != nil {
		return fmt.Errorf("power off: %w", err)
	}
	return g.Kill() // helper processes of the block device may be left
}

// Done is closed when the guest has ended.
func (g *Guest) Done() <-chan struct{} { return g.done }

// Console returns what the kernel and init wrote to the console so far.
func (g *Guest) Console() string { return g.proc.Output() }

// WaitConsole waits for a console line that matches re.
func (g *Guest) WaitConsole(re string, limit time.Duration) ([]string, error) {
	return g.proc.WaitFor(re, limit)
}

func (g *Guest) tasksFile() string { return filepath.Join(g.lab.Artefacts, g.cfg.Name+"-tasks.txt") }

// fire is the watchdog: save the state of every task, then kill.
func (g *Guest) fire(reason error) {
	g.fired.Do(func() {
		g.note("%v", reason)
		if g.proc.Frozen() {
			_ = g.Thaw() // a stopped kernel answers nothing
		}
		dump := reason.Error() + "\n"
		tasks, err := g.Tasks()
		dump += tasks
		if err != nil {
			dump += fmt.Sprintf("the dump ends here: %v\nend of the console:\n%s", err, g.proc.Tail(16<<10))
		}
		if err := os.WriteFile(g.tasksFile(), []byte(dump), 0o644); err != nil {
			g.note("save the dump: %v", err)
		}
		g.end(reason)
	})
}
