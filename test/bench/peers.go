package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

const (
	iqnDefault   = "iqn.2026-01.org.blockhouse:tgtd-default"
	iqnTuned     = "iqn.2026-01.org.blockhouse:tgtd-tuned"
	iqnPlain     = "iqn.2026-01.org.blockhouse:ours"
	iqnIntegrity = "iqn.2026-01.org.blockhouse:ours-integrity"
)

// tuned is the tgtd that somebody set up with care (facts/iscsi.md §6.3).
var tuned = []string{"MaxRecvDataSegmentLength=262144", "MaxXmitDataSegmentLength=262144", "FirstBurstLength=262144", "MaxBurstLength=1048576",
	"MaxOutstandingR2T=8", "InitialR2T=No"}

// proc is a target's process.
type proc struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	portal string
	log    strings.Builder
}

func (p *proc) pid() int { return p.cmd.Process.Pid }

// stop ends the process, by its pid.
func (p *proc) stop() error {
	if p.stdin != nil { // ours ends by itself
		_ = p.stdin.Close()
		done := make(chan error, 1)
		go func() { done <- p.cmd.Wait() }()
		select {
		case err := <-done:
			return err
		case <-time.After(10 * time.Second):
			_ = p.cmd.Process.Kill()
			return errors.Join(errors.New("our target does not end"), <-done)
		}
	}
	_ = p.cmd.Process.Kill() // tgtd ignores SIGTERM while a target exists
	_ = p.cmd.Wait()
	return nil
}

// startOurs starts this program as the target's process.
func startOurs(self []string, args ...string) (*proc, error) {
	p := &proc{}
	p.cmd = exec.Command(self[0], append(append(self[1:len(self):len(self)], "serve"), args...)...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.Stderr = &p.log
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start our target: %w", err)
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	var s served
	if err == nil {
		err = json.Unmarshal(line, &s)
	}
	if err != nil {
		err = errors.Join(fmt.Errorf("start our target: %w", err), p.stop())
		return nil, fmt.Errorf("%w: %s", err, p.log.String())
	}
	p.portal = s.Portal
	return p, nil
}

// tgtd is Debian's target with a control socket of its own.
type tgtd struct {
	proc
	dir, ctl string
}

func startTgtd(dir string) (*tgtd, error) {
	prog, err := testproc.Find("tgtd")
	if err != nil {
		return nil, err
	}
	var last string
	// Between the choice of a port and its use another process can take it; tgtd then
	// falls back to port 3260 without a word, so its portals are looked at.
	for range 5 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		port := l.Addr().(*net.TCPAddr).Port
		_ = l.Close()
		g := &tgtd{dir: dir, ctl: fmt.Sprint(port % 32768)}
		g.portal = fmt.Sprintf("127.0.0.1:%d", port)
		g.cmd = exec.Command(prog, "-f", "-C", g.ctl, "--iscsi", "portal="+g.portal)
		g.cmd.Env = append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(dir, "s"))
		g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		g.cmd.Stdout, g.cmd.Stderr = &g.log, &g.log
		if err := g.cmd.Start(); err != nil {
			return nil, fmt.Errorf("start tgtd: %w", err)
		}
		for range 150 {
			if last, err = g.adm("--mode", "portal", "--op", "show"); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if strings.TrimSpace(last) == "Portal: "+g.portal+",1" {
			return g, nil
		}
		_ = g.stop()
		last += g.log.String()
	}
	return nil, fmt.Errorf("tgtd does not come up on a port of its own: %s", last)
}

func (g *tgtd) adm(args ...string) (string, error) {
	prog, err := testproc.Find("tgtadm")
	if err != nil {
		return "", err
	}
	c := exec.Command(prog, append([]string{"-C", g.ctl, "--lld", "iscsi"}, args...)...)
	c.Env = append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(g.dir, "s"))
	out, err := c.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("tgtadm %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// target makes a target with one LUN on path, open to all.
func (g *tgtd) target(tid int, iqn, path string, params []string) error {
	id := strconv.Itoa(tid)
	steps := [][]string{{"--mode", "target", "--op", "new", "--tid", id, "-T", iqn}}
	// tgtd offers no digest unless told to; whether one is used is the client's choice.
	for _, p := range append([]string{"HeaderDigest=CRC32C,None", "DataDigest=CRC32C,None"}, params...) {
		k, v, _ := strings.Cut(p, "=")
		steps = append(steps, []string{"--mode", "target", "--op", "update", "--tid", id, "-n", k, "-v", v})
	}
	steps = append(steps, []string{"--mode", "logicalunit", "--op", "new", "--tid", id, "--lun", "1", "-b", path},
		[]string{"--mode", "target", "--op", "bind", "--tid", id, "-I", "ALL"})
	for _, s := range steps {
		if _, err := g.adm(s...); err != nil {
			return err
		}
	}
	return nil
}

// cpuTime is utime and stime of a process, all threads (proc(5)).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("cpu time: %w", err)
	}
	// The second field is the name in parentheses, in which anything may stand.
	f := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("cpu time of pid %d: %d fields", pid, len(f))
	}
	var ticks int64
	for _, s := range f[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("cpu time of pid %d: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100), nil // USER_HZ is 100 on every Linux that Go runs on
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	return strings.Join(strings.Fields(string(b))[:1], " ")
}
