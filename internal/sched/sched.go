// Package sched sets the scheduling of a whole process: control above everything
// else, workers where they belong.
//
// It imports nothing of ours; everyone may import it.
package sched

import "golang.org/x/sys/unix"

// RR gives every thread real-time priority 10, round robin. Measured, a loaded
// two-core machine with Raft at normal priority had no leader in 6 % of the
// samples, and in none with it (facts/cluster.md §4.2). Threads that the runtime
// makes later inherit it, and so do children: they call Normal.
func RR() error {
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 10}
	return eachThread(func(tid int) error { return unix.SchedSetAttr(tid, &attr, 0) })
}

// Nice sets the nice value of every thread.
func Nice(n int) error {
	return eachThread(func(tid int) error { return unix.Setpriority(unix.PRIO_PROCESS, tid, n) })
}

// Normal undoes what a child of a raised process inherited.
func Normal() error {
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
	return eachThread(func(tid int) error { return unix.SchedSetAttr(tid, &attr, 0) })
}
