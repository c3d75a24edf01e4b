package testproc

import (
	"errors"
	"os"
	"syscall"
	"testing"
)

// Own makes the test the owner of a process group that a child of its left
// behind on purpose, as a daemon's workers: the group is ended when the test
// ends, or when its binary dies. alive tells whether pgid still is the process
// that is meant, and not a later one with its number.
func Own(t testing.TB, pgid int, alive func() bool) {
	t.Helper()
	if err := reaperStart(); err != nil {
		t.Fatalf("own process group %d: %v", pgid, err)
	}
	if err := reaperAdd(pgid); err != nil {
		t.Fatalf("own process group %d: %v", pgid, err)
	}
	t.Cleanup(func() {
		defer reaperDel(pgid)
		if !alive() {
			return
		}
		if err := syscall.Kill(-pgid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Errorf("end process group %d: %v", pgid, os.NewSyscallError("kill", err))
		}
	})
}
