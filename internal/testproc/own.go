package testproc

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
)

// Own makes the test binary the owner of a process group that a child of its
// left behind on purpose, as a daemon's workers: if the binary dies the group is
// ended. The caller has made sure that pgid leads the group, and calls end when
// it wants it gone: before that it must have ended whoever would start it again.
// alive tells whether pgid still is the process that is meant, and not a later
// one with its number.
func Own(t testing.TB, pgid int, alive func() bool) (end func() error) {
	t.Helper()
	if err := reaperStart(); err != nil {
		t.Fatalf("own process group %d: %v", pgid, err)
	}
	if err := reaperAdd(pgid); err != nil {
		t.Fatalf("own process group %d: %v", pgid, err)
	}
	return func() error {
		defer reaperDel(pgid)
		if !alive() {
			return nil
		}
		if err := syscall.Kill(-pgid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end process group %d: %w", pgid, err)
		}
		return nil
	}
}
