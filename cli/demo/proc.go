package demo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// envNode marks every process of a node: children inherit it, whatever their
// arguments are.
const envNode = "BLOCKHOUSE_DEMO_NODE"

// proc is one running process. pid and start together are unique until the next
// boot; a pid alone is not.
type proc struct {
	pid     int
	start   uint64 // field 22 of /proc/PID/stat
	control bool
	what    string // "clusterd", "worker storage", …
}

// procs finds the processes of the node whose folder is dir: by the mark in
// their environment, by the configuration in their arguments, and by the node's
// pid files, in each case only if they are this user's clusterd now. The control
// process comes first, because it starts workers anew.
func procs(dir string) ([]proc, error) {
	ents, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for processes: %w", err)
	}
	hint := pidFiles(filepath.Join(dir, "run"))
	var found []proc
	for _, e := range ents {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if p, ok := inspect(pid, dir, hint[pid]); ok {
			found = append(found, p)
		}
	}
	slices.SortFunc(found, func(a, b proc) int {
		if a.control != b.control {
			if a.control {
				return -1
			}
			return 1
		}
		return a.pid - b.pid
	})
	return found, nil
}

// inspect tells whether pid is now a process of the node in dir. hint is the
// start time that a pid file of the node gives for pid, or 0.
func inspect(pid int, dir string, hint uint64) (proc, bool) {
	base := "/proc/" + strconv.Itoa(pid)
	var st unix.Stat_t
	if unix.Stat(base, &st) != nil || int(st.Uid) != os.Geteuid() {
		return proc{}, false
	}
	// Read before the rest: if the pid is given to another process in
	// between, kill sees another start time and leaves it alone.
	start, err := startTime(pid)
	if err != nil {
		return proc{}, false
	}
	exe, err := os.Readlink(base + "/exe")
	if err != nil || filepath.Base(strings.TrimSuffix(exe, " (deleted)")) != "clusterd" {
		return proc{}, false
	}
	cmdline, err := os.ReadFile(base + "/cmdline")
	if err != nil {
		return proc{}, false
	}
	args := strings.Split(string(bytes.TrimRight(cmdline, "\x00")), "\x00")
	environ, _ := os.ReadFile(base + "/environ")
	config := filepath.Join(dir, configFile)
	ours := slices.Contains(strings.Split(string(environ), "\x00"), envNode+"="+dir) ||
		slices.Contains(args, config) || slices.Contains(args, "--config="+config) || slices.Contains(args, "-config="+config) ||
		hint != 0 && hint == start
	if !ours {
		return proc{}, false
	}
	p := proc{pid: pid, start: start, control: true, what: "clusterd"}
	if i := slices.Index(args, "worker"); i > 0 && i+1 < len(args) {
		p.control, p.what = false, "worker "+args[i+1]
	}
	return p, true
}

// pidFiles reads pid → start time from the pid files that clusterd keeps.
func pidFiles(run string) map[int]uint64 {
	m := map[int]uint64{}
	files, _ := filepath.Glob(filepath.Join(run, "*.pid"))
	for _, f := range files {
		var p struct {
			PID   int    `json:"pid"`
			Start uint64 `json:"start"`
		}
		if b, err := os.ReadFile(f); err == nil && json.Unmarshal(b, &p) == nil && p.PID > 0 {
			m[p.PID] = p.Start
		}
	}
	return m
}

// startTime reads field 22 of /proc/PID/stat; a zombie is gone.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(b, ')') // comm may hold blanks and brackets
	f := bytes.Fields(b[i+1:])
	if i < 0 || len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	if f[0][0] == 'Z' || f[0][0] == 'X' {
		return 0, os.ErrProcessDone
	}
	return strconv.ParseUint(string(f[19]), 10, 64)
}

func (p proc) alive() bool {
	reap(p.pid)
	st, err := startTime(p.pid)
	return err == nil && st == p.start
}

// reap takes the exit status of a child of ours, so that it is not left a
// zombie. For any other process it does nothing.
func reap(pid int) (unix.WaitStatus, bool) {
	var ws unix.WaitStatus
	n, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil)
	return ws, err == nil && n == pid
}

// kill sends SIGKILL to p and to nobody else: the pidfd pins the process, and
// only then its start time is compared.
func (p proc) kill() error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err == nil {
		defer func() { _ = unix.Close(fd) }()
	}
	if !p.alive() {
		return nil
	}
	if err != nil { // a kernel without pidfd: the check above is the best there is
		err = unix.Kill(p.pid, unix.SIGKILL)
	} else {
		err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %s, pid %d: %w", p.what, p.pid, err)
	}
	return nil
}

// killNode kills every process of the node in dir and waits until they are
// gone. It looks again until it finds none, because a control process may have
// been starting a worker. It returns what it killed.
func killNode(dir string) ([]proc, error) {
	var killed []proc
	deadline := time.Now().Add(20 * time.Second)
	for {
		ps, err := procs(dir)
		if err != nil {
			return killed, err
		}
		if len(ps) == 0 {
			return killed, nil
		}
		for _, p := range ps {
			if err := p.kill(); err != nil {
				return killed, err
			}
			if !slices.Contains(killed, p) {
				killed = append(killed, p)
			}
		}
		for _, p := range ps {
			for p.alive() {
				if time.Now().After(deadline) {
					return killed, fmt.Errorf("%s, pid %d, does not die: it waits for the kernel (see /proc/%d/stack)", p.what, p.pid, p.pid)
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
	}
}
