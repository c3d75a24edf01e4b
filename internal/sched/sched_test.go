package sched

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRaiseAndUndo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skip: raising priority needs root")
	}
	if err := Nice(-5); err != nil {
		t.Fatal(err)
	}
	// getpriority(2) as a system call gives 20 - nice.
	if p, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err != nil || p != 25 {
		t.Fatalf("nice -5 reads as %d, %v", p, err)
	}
	if err := Normal(); err != nil {
		t.Fatal(err)
	}
	if p, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err != nil || p != 20 {
		t.Fatalf("normal reads as %d, %v", p, err)
	}
}
