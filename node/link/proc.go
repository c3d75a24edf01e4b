package link

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Proc names one process: a pid may be given to another later, pid and start
// time may not.
type Proc struct {
	PID         int    `json:"pid"`
	Start       uint64 `json:"start"`       // field 22 of /proc/PID/stat, clock ticks after boot
	Incarnation string `json:"incarnation"` // of a worker, or the number of a control
}

// Socket is where a worker of a kind listens below runDir.
func Socket(runDir string, k Kind) string {
	return filepath.Join(runDir, "clusterd-"+string(k)+".sock")
}

// PIDFile is where a process of a node writes its Proc; name is "clusterd",
// "storage" or "locks".
func PIDFile(runDir, name string) string { return filepath.Join(runDir, name+".pid") }

// Self describes this process.
func Self(incarnation string) (Proc, error) {
	st, err := StartTime(os.Getpid())
	return Proc{os.Getpid(), st, incarnation}, err
}

// Alive tells whether p still runs.
func (p Proc) Alive() bool {
	st, err := StartTime(p.PID)
	return err == nil && st == p.Start
}

// StartTime reads field 22 of /proc/PID/stat. A process that is dead but not yet
// waited for is an error.
func StartTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("start time of %d: %w", pid, err)
	}
	// comm may hold blanks and brackets: count from the last ')'.
	i := strings.LastIndexByte(string(b), ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, fmt.Errorf("start time of %d: /proc/%d/stat is too short", pid, pid)
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, fmt.Errorf("start time of %d: %w", pid, os.ErrProcessDone)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// ReadPID reads a pid file.
func ReadPID(path string) (Proc, error) {
	var p Proc
	b, err := os.ReadFile(path)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return p, fmt.Errorf("read %s: %w", path, err)
	}
	return p, nil
}

// Hold takes the lock that only one process of this name on this node may have,
// and writes the pid file beside it. The lock lives until the returned file is
// closed. When it is taken, the error names the holder.
func Hold(runDir, name, incarnation string) (*os.File, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, fmt.Errorf("hold %s: %w", name, err)
	}
	path := filepath.Join(runDir, name+".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("hold %s: %w", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			p, _ := ReadPID(PIDFile(runDir, name))
			return nil, fmt.Errorf("hold %s: %w: %s is locked by pid %d", name, os.ErrExist, path, p.PID)
		}
		return nil, fmt.Errorf("hold %s: lock %s: %w", name, path, err)
	}
	p, err := Self(incarnation)
	if err == nil {
		var b []byte
		if b, err = json.Marshal(p); err == nil {
			err = replaceFile(PIDFile(runDir, name), b)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("hold %s: %w", name, err)
	}
	return f, nil
}

// replaceFile is for run-time files, which need no fsync: they mean nothing
// after a power cut.
func replaceFile(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
