package testproc

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
)

// The reaper is one shell a test binary, in its own session, that reads "+ GROUP" and "- GROUP" lines. Its input ends when
// the test binary is gone, however it went; then it ends the groups that are still on its list. It is not waited for: it
// outlives the binary by design, holds no descriptor of it, and has nothing to do when all children were closed.
const reaperScript = `trap '' INT TERM HUP QUIT
set --
while read -r op group; do
	case $op in
	+) set -- "$@" "$group" ;;
	-) keep=
		for g in "$@"; do [ "$g" = "$group" ] || keep="$keep $g"; done
		set -- $keep ;;
	esac
done
for g in "$@"; do kill -s KILL -- "-$g"; done
`

var reaper struct {
	mu   sync.Mutex
	pipe *os.File
	pid  int
}

func reaperStart() error {
	reaper.mu.Lock()
	defer reaper.mu.Unlock()
	if reaper.pipe != nil {
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start reaper: %w", err)
	}
	defer r.Close()
	cmd := exec.Command("/bin/sh", "-c", reaperScript)
	cmd.Stdin = r
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		w.Close()
		return fmt.Errorf("start reaper: %w", err)
	}
	reaper.pid = cmd.Process.Pid
	_ = cmd.Process.Release()
	reaper.pipe = w
	return nil
}

func reaperAdd(pgid int) error {
	reaper.mu.Lock()
	defer reaper.mu.Unlock()
	if _, err := fmt.Fprintf(reaper.pipe, "+ %d\n", pgid); err != nil {
		return fmt.Errorf("tell the reaper of group %d: %w", pgid, err)
	}
	return nil
}

func reaperDel(pgid int) {
	reaper.mu.Lock()
	defer reaper.mu.Unlock()
	// A reaper that is gone has nothing to forget.
	_, _ = fmt.Fprintf(reaper.pipe, "- %d\n", pgid)
}
