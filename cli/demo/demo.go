package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/config"
)

// Demo is a demo in one folder.
type Demo struct {
	Dir        string // absolute
	Clusteradm string // programs, absolute paths
	Clusterd   string
	Mkfs       string
	Out, Err   io.Writer // data; progress
}

// DefaultDir is where the demo lies if the user does not say.
func DefaultDir(env func(string) string) (string, error) {
	if d := env("XDG_DATA_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "blockhouse-demo"), nil
	}
	home := env("HOME")
	if home == "" {
		return "", api.Errorf(api.CodeUsage, "clusteradm demo up --dir DIR", "demo: neither XDG_DATA_HOME nor HOME says where the demo may lie")
	}
	return filepath.Join(home, ".local", "share", "blockhouse-demo"), nil
}

// maxSocket is sizeof(sun_path) less the final zero (unix(7)).
const maxSocket = 107

// check refuses folders in which no demo can live.
func (d *Demo) check() error {
	// The longest socket is a worker's: run/clusterd-storage.sock.
	if n := len(filepath.Join(d.Dir, "n1", "run", "clusterd-storage.sock")); n > maxSocket {
		return api.Errorf(api.CodeUsage, "clusteradm demo up --dir /tmp/blockhouse-demo", "demo: the folder %s is %d characters too long for unix sockets", d.Dir, n-maxSocket)
	}
	return nil
}

// Up brings the demo up: from nothing, or what was killed again. If it fails
// from nothing, everything is undone.
func (d *Demo) Up(ctx context.Context) error {
	if err := d.check(); err != nil {
		return err
	}
	for name, path := range map[string]string{"clusterd": d.Clusterd, "mkfs-gfs": d.Mkfs} {
		if path == "" {
			return api.Errorf(api.CodeNotFound, "make build", "demo up: the program %s lies neither beside clusteradm nor in PATH", name)
		}
	}
	if err := d.mayUse(); err != nil {
		return err
	}
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		return fmt.Errorf("demo up: %w", err)
	}
	release, err := d.lock(ctx)
	for errors.Is(err, errGone) { // a down was faster
		if err := os.MkdirAll(d.Dir, 0o700); err != nil {
			return fmt.Errorf("demo up: %w", err)
		}
		release, err = d.lock(ctx)
	}
	if err != nil {
		return err
	}
	defer release()

	st, err := d.load()
	if err != nil {
		return err
	}
	if st != nil && st.Phase == up {
		return d.again(ctx, st)
	}
	if st != nil {
		d.say("an earlier \"demo up\" did not end; its rest is removed first")
		if err := d.killAll(); err != nil {
			return err
		}
		for _, n := range nodeNames {
			if err := os.RemoveAll(d.node(n)); err != nil {
				return fmt.Errorf("demo up: %w", err)
			}
		}
	}
	st = &state{Phase: starting, Created: time.Now()}
	if err := d.save(st); err != nil {
		return err
	}
	if err := d.build(ctx, st); err != nil {
		return d.undo(err)
	}
	st.Phase = up
	if err := d.save(st); err != nil {
		return d.undo(err)
	}
	if err := d.show(ctx); err != nil {
		return err
	}
	d.next(st)
	return nil
}

// mayUse refuses a folder with files of somebody else.
func (d *Demo) mayUse() error {
	ents, err := os.ReadDir(d.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	for _, e := range ents {
		if e.Name() == stateFile {
			return nil
		}
	}
	for _, e := range ents {
		if e.Name() != lockFile {
			return api.Errorf(api.CodeConflict, "clusteradm demo up --dir OTHER", "demo: %s is not a demo's folder: it holds %s", d.Dir, e.Name())
		}
	}
	return nil
}

// build makes everything from nothing.
func (d *Demo) build(ctx context.Context, st *state) error {
	var err error
	if st.Place, err = choose(); err != nil {
		return fmt.Errorf("demo up: %w", err)
	}
	if err := d.save(st); err != nil {
		return err
	}
	d.say("three nodes on %s, %s and %s; their data lies in %s", st.Place.addr(0), st.Place.addr(1), st.Place.addr(2), d.Dir)
	for i, n := range nodeNames {
		if err := d.configure(st.Place, i); err != nil {
			return err
		}
		if err := d.start(n); err != nil {
			return err
		}
	}
	for _, n := range nodeNames {
		if err := d.waitStatus(ctx, n, "clusterd to answer", func(api.Status) bool { return true }); err != nil {
			return err
		}
	}

	adm := func(node string, args ...string) (string, error) {
		return d.run(ctx, d.Clusteradm, append([]string{"--socket", d.socket(node)}, args...)...)
	}
	if _, err := adm("n1", "init", cluster); err != nil {
		return err
	}
	tok, err := adm("n1", "token", "create", "--uses", "2", "--quiet")
	if err != nil {
		return err
	}
	member := tok + "@" + st.Place.addr(0) + ":" + strconv.Itoa(st.Place.Ports.API)
	for _, n := range nodeNames[1:] {
		if _, err := adm(n, "join", member); err != nil {
			return err
		}
	}
	if err := d.waitStatus(ctx, "n1", "three votes", func(s api.Status) bool { return s.Quorum.Quorate && len(s.Quorum.Online) == 3 }); err != nil {
		return err
	}
	iqn, err := adm("n1", "target", "create", "disks", "-o", "name")
	if err != nil {
		return err
	}
	// The access list before the LUN: n3 obeys the records in their order, so when
	// it serves the LUN it also knows who may use it.
	if _, err := adm("n1", "acl", "open", iqn); err != nil {
		return err
	}
	// The copy lies on n3: the demo shows what its loss means.
	lun, err := adm("n1", "lun", "create", "disk1", "--target", iqn, "--size", "256M", "--node", "n3", "-o", "name")
	if err != nil {
		return err
	}
	st.URL = fmt.Sprintf("iscsi://%s:%d/%s", st.Place.addr(2), st.Place.Ports.ISCSI, lun)
	if err := d.waitStatus(ctx, "n3", "the LUN to be served", func(s api.Status) bool { return served(s, lun) }); err != nil {
		return err
	}
	_, err = d.run(ctx, d.Mkfs, "-p", "lock_dlm", "-t", cluster+":fs", "-j", "3", "-O", st.URL)
	return err
}

// served tells whether the LUN IQN/N is up.
func served(s api.Status, lun string) bool {
	luns := s.LUNs
	for _, t := range s.Targets {
		luns = append(luns, t.LUNs...)
	}
	return slices.ContainsFunc(luns, func(l api.LUN) bool {
		return l.Target+"/"+strconv.Itoa(l.LUN) == lun && l.State != api.HealthFaulted
	})
}

// admitTimeout is how long up waits for restarted nodes before it shows the
// status as it is.
const admitTimeout = 15 * time.Second

func online(s api.Status) (n int) {
	for _, x := range s.Nodes {
		if x.State == api.NodeOnline {
			n++
		}
	}
	return n
}

// again restarts what was killed.
func (d *Demo) again(ctx context.Context, st *state) error {
	var restarted []string
	for _, n := range nodeNames {
		ps, err := procs(d.node(n))
		if err != nil {
			return err
		}
		if len(ps) > 0 && ps[0].control {
			continue
		}
		if err := d.start(n); err != nil {
			return err
		}
		restarted = append(restarted, n)
	}
	if len(restarted) == 0 {
		d.say("the demo is already up")
	} else {
		d.say("the demo is already up; started again: %s", strings.Join(restarted, ", "))
	}
	for _, n := range restarted {
		if err := d.waitStatus(ctx, n, "clusterd to answer", func(api.Status) bool { return true }); err != nil {
			return d.withLogs(err)
		}
	}
	if err := d.waitStatus(ctx, "n1", "a quorum", func(s api.Status) bool { return s.Quorum.Quorate }); err != nil {
		return d.withLogs(err)
	}
	// A node that was evicted is admitted anew, which may take a moment or need a
	// word of the operator: status tells which.
	if len(restarted) > 0 {
		octx, cancel := context.WithTimeout(ctx, admitTimeout)
		err := d.waitStatus(octx, "n1", "the nodes to be admitted", func(s api.Status) bool { return online(s) == len(nodeNames) })
		cancel()
		if err != nil && ctx.Err() != nil {
			return err
		}
	}
	if err := d.show(ctx); err != nil {
		return err
	}
	d.next(st)
	return nil
}

// fileConfig is the part of config.Config that the demo sets.
type fileConfig struct {
	Name    string     `toml:"name"`
	DataDir string     `toml:"data_dir"`
	RunDir  string     `toml:"run_dir"`
	Listen  fileListen `toml:"listen"`
}

type fileListen struct {
	API    string   `toml:"api"`
	Raft   string   `toml:"raft"`
	Gossip string   `toml:"gossip"`
	ISCSI  []string `toml:"iscsi"`
}

// configure writes the configuration of node i.
func (d *Demo) configure(p place, i int) error {
	n := nodeNames[i]
	dir := d.node(n)
	at := func(port int) string { return p.addr(i) + ":" + strconv.Itoa(port) }
	c := fileConfig{
		Name: n, DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"),
		Listen: fileListen{API: at(p.Ports.API), Raft: at(p.Ports.Raft), Gossip: at(p.Ports.Gossip), ISCSI: []string{at(p.Ports.ISCSI)}},
	}
	for _, m := range []string{dir, c.DataDir, c.RunDir} {
		if err := os.MkdirAll(m, 0o700); err != nil {
			return fmt.Errorf("configure %s: %w", n, err)
		}
	}
	var b bytes.Buffer
	b.WriteString("# Made by \"clusteradm demo up\"; \"clusteradm demo down\" removes it.\n")
	e := toml.NewEncoder(&b)
	e.Indent = ""
	if err := e.Encode(c); err != nil {
		return fmt.Errorf("configure %s: %w", n, err)
	}
	path := filepath.Join(dir, configFile)
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		return fmt.Errorf("configure %s: %w", n, err)
	}
	if _, err := config.Load(path); err != nil {
		return fmt.Errorf("configure %s: %w", n, err)
	}
	return nil
}

// start runs clusterd of a node in a session of its own: it outlives this
// command and the terminal.
func (d *Demo) start(n string) error {
	dir := d.node(n)
	log, err := os.OpenFile(d.logFile(n), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start %s: %w", n, err)
	}
	defer log.Close()
	args := []string{"--config", filepath.Join(dir, configFile)}
	cmd := exec.Command(d.Clusterd, args...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = log, log
	// What systemd said to this shell is not for the demo's daemons.
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool {
		k, _, _ := strings.Cut(s, "=")
		return k == envNode || k == "NOTIFY_SOCKET" || strings.HasPrefix(k, "WATCHDOG_") || strings.HasPrefix(k, "LISTEN_")
	}), envNode+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	d.print(d.Clusterd, args...)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n, err)
	}
	pid := cmd.Process.Pid
	if err := cmd.Process.Release(); err != nil {
		return fmt.Errorf("start %s: release pid %d: %w", n, pid, err)
	}
	return nil
}

// waitStatus asks a node until ok likes its answer.
func (d *Demo) waitStatus(ctx context.Context, n, what string, ok func(api.Status) bool) error {
	c := api.Dial(d.socket(n))
	defer c.Close()
	began := time.Now()
	for {
		rctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		st, err := api.Get[api.Status](rctx, c, api.PathStatus)
		cancel()
		if err == nil && ok(st) {
			return nil
		}
		ps, perr := procs(d.node(n))
		if perr != nil {
			return perr
		}
		// A moment of grace: between fork and exec the process does not yet
		// look like clusterd.
		if time.Since(began) > time.Second && (len(ps) == 0 || !ps[0].control) {
			return api.Errorf(api.CodeInternal, "", "%s: clusterd ended while the demo waited for %s", n, what)
		}
		select {
		case <-ctx.Done():
			why := "its answers did not change"
			if err != nil {
				why = err.Error()
			}
			return api.Errorf(api.CodeTimeout, "", "wait for %s on %s: %s (%v)", what, n, why, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// run prints a command and runs it. Its standard output is returned without the
// last newline.
func (d *Demo) run(ctx context.Context, prog string, args ...string) (string, error) {
	d.print(prog, args...)
	cmd := exec.CommandContext(ctx, prog, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	for _, b := range []*bytes.Buffer{&out, &errs} {
		for l := range strings.Lines(b.String()) {
			fmt.Fprint(d.Err, "    "+strings.TrimRight(l, "\n")+"\n")
		}
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(append([]string{filepath.Base(prog)}, args...), " "), err)
	}
	return strings.TrimSpace(out.String()), nil
}

func (d *Demo) say(format string, a ...any) { fmt.Fprintf(d.Err, format+"\n", a...) }

// print shows a command as the user would type it.
func (d *Demo) print(prog string, args ...string) {
	s := typed(prog)
	for _, a := range args {
		s += " " + quote(a)
	}
	fmt.Fprintln(d.Err, "$ "+s)
}

// typed is the shortest way to call a program from here.
func typed(prog string) string {
	name := filepath.Base(prog)
	if p, err := exec.LookPath(name); err == nil && sameFile(p, prog) {
		return name
	}
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, prog); err == nil && !strings.HasPrefix(rel, "..") {
			if !strings.Contains(rel, "/") {
				rel = "./" + rel
			}
			return quote(rel)
		}
	}
	return quote(prog)
}

func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// quote writes a word for a shell.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@=,+") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// undo removes what a failed up made and returns its error, after the ends of
// the logs, which say why.
func (d *Demo) undo(cause error) error {
	cause = d.withLogs(cause)
	d.say("the demo did not come up; everything is undone")
	if err := d.killAll(); err != nil {
		return errors.Join(cause, err)
	}
	if err := d.remove(); err != nil {
		return errors.Join(cause, err)
	}
	return cause
}

// withLogs shows the end of each node's log.
func (d *Demo) withLogs(cause error) error {
	for _, n := range nodeNames {
		b, err := os.ReadFile(d.logFile(n))
		if err != nil || len(b) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
		d.say("--- the end of %s", d.logFile(n))
		for _, l := range lines[max(0, len(lines)-15):] {
			d.say("    %s", l)
		}
	}
	return cause
}

func (d *Demo) killAll() error {
	var errs []error
	for _, n := range nodeNames {
		if _, err := killNode(d.node(n)); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// open loads the state of a demo that must be there.
func (d *Demo) open() (*state, error) {
	st, err := d.load()
	if err != nil {
		return nil, err
	}
	if st == nil {
		return nil, api.Errorf(api.CodeNotFound, "clusteradm demo up", "demo: there is none in %s", d.Dir)
	}
	return st, nil
}

// Living gives the socket of a node that answers, one with a quorum if there is
// one, and the names of the nodes that do not run.
func (d *Demo) Living(ctx context.Context) (socket string, dead []string, err error) {
	if _, err := d.open(); err != nil {
		return "", nil, err
	}
	for _, n := range nodeNames {
		ps, err := procs(d.node(n))
		if err != nil {
			return "", nil, err
		}
		if len(ps) == 0 || !ps[0].control {
			dead = append(dead, n)
			continue
		}
		c := api.Dial(d.socket(n))
		rctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		st, err := api.Get[api.Status](rctx, c, api.PathStatus)
		cancel()
		c.Close()
		if err != nil {
			continue
		}
		if st.Quorum.Quorate {
			socket = d.socket(n)
			return socket, d.rest(dead, n), nil
		}
		if socket == "" {
			socket = d.socket(n)
		}
	}
	if socket == "" {
		return "", dead, api.Errorf(api.CodeUnreachable, "clusteradm demo up", "demo: no node answers (not running: %s)", strings.Join(dead, ", "))
	}
	return socket, dead, nil
}

// rest adds the nodes behind n that do not run.
func (d *Demo) rest(dead []string, n string) []string {
	for _, m := range nodeNames[slices.Index(nodeNames, n)+1:] {
		if ps, err := procs(d.node(m)); err == nil && (len(ps) == 0 || !ps[0].control) {
			dead = append(dead, m)
		}
	}
	return dead
}

// show runs status on a living node.
func (d *Demo) show(ctx context.Context) error {
	socket, _, err := d.Living(ctx)
	if err != nil {
		return err
	}
	d.say("")
	d.print(d.Clusteradm, "--socket", socket, "status")
	cmd := exec.CommandContext(ctx, d.Clusteradm, "--socket", socket, "status")
	cmd.Stdout, cmd.Stderr = d.Out, d.Err
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("show the demo's status: %w", err)
	}
	return nil
}

func (d *Demo) next(st *state) {
	adm := typed(d.Clusteradm)
	at := ""
	if dir, err := DefaultDir(os.Getenv); err != nil || dir != d.Dir {
		at = " --dir " + quote(d.Dir)
	}
	d.say("\nThe filesystem demo:fs lies on %s\nNot redundant: one copy, on n3.\n\nWhat to try next:", st.URL)
	for _, l := range [][2]string{
		{"demo kill n1", "lose a node: two votes are enough"},
		{"demo status", "what is wrong and what to do"},
		{"demo kill n3", "lose the only copy: the LUN is down"},
		{"demo up", "start again what was killed"},
		{"demo down", "end everything and remove it"},
	} {
		d.say("  %-*s  # %s", len(adm)+len(at)+13, adm+" "+l[0]+at, l[1])
	}
}

// Kill ends every process of a node with SIGKILL, as a power cut would.
func (d *Demo) Kill(ctx context.Context, n string) error {
	if _, err := d.open(); err != nil {
		return err
	}
	if !slices.Contains(nodeNames, n) {
		return api.Errorf(api.CodeNotFound, "clusteradm demo status", "demo kill: no node %q: the nodes are %s", n, strings.Join(nodeNames, ", "))
	}
	release, err := d.lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	killed, err := killNode(d.node(n))
	for _, p := range killed {
		d.say("killed %s of %s (pid %d)", p.what, n, p.pid)
	}
	if err != nil {
		return fmt.Errorf("demo kill %s: %w", n, err)
	}
	if len(killed) == 0 {
		d.say("nothing of %s runs", n)
	}
	return nil
}

// Down ends the demo and removes it, whatever is left of it.
func (d *Demo) Down(ctx context.Context) error {
	if _, err := os.Stat(d.Dir); errors.Is(err, fs.ErrNotExist) {
		d.say("there is no demo in %s", d.Dir)
		return nil
	}
	if err := d.mayUse(); err != nil {
		return err
	}
	release, err := d.lock(ctx)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer release()
	if err := d.killAll(); err != nil {
		return fmt.Errorf("demo down: %w", err)
	}
	if err := d.remove(); err != nil {
		return err
	}
	d.say("the demo is down; %s is removed", d.Dir)
	return nil
}
