// Package env is the seam between decisions and the machine: clocks, and later
// the network and the disk of the simulators. Code that decides about leases
// takes a Clock and never asks the time package, so that a simulator can be the
// world (SAFETY §7).
//
// It imports nothing of ours; everyone may import it.
package env

import (
	"context"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Boot is a point on CLOCK_BOOTTIME, in nanoseconds since the kernel booted. It
// goes on while the machine sleeps, which Go's monotonic clock does not, and it
// is the same for every process of one kernel: a lease's end may be handed from
// one process to another.
type Boot int64

// Add moves a point in time.
func (b Boot) Add(d time.Duration) Boot { return b + Boot(d) }

// Sub is the time from o to b.
func (b Boot) Sub(o Boot) time.Duration { return time.Duration(b - o) }

// Clock gives the time and waits.
type Clock interface {
	// Now reads CLOCK_BOOTTIME.
	Now() Boot
	// Wall is for people: history, certificates. Nothing is decided by it.
	Wall() time.Time
	// Sleep returns after d, or ctx's error before.
	Sleep(ctx context.Context, d time.Duration) error
}

// Real is the machine's clock.
type Real struct{}

// Now reads CLOCK_BOOTTIME.
func (Real) Now() Boot {
	var ts unix.Timespec
	// Raw, because it never waits and a target's gate asks twice a command: the
	// scheduler need not know.
	if _, _, e := unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_BOOTTIME, uintptr(unsafe.Pointer(&ts)), 0); e != 0 {
		panic("clock_gettime(CLOCK_BOOTTIME): " + e.Error()) // in every kernel since 2.6.39
	}
	return Boot(ts.Nano())
}

// Wall reads the wall clock, in UTC.
func (Real) Wall() time.Time { return time.Now().UTC() }

// Sleep waits for d.
func (Real) Sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Manual is a clock that a test moves.
type Manual struct {
	mu struct {
		sync.Mutex
		now  Boot
		wake chan struct{} // closed and renewed at every step
	}
}

// NewManual gives a clock that stands at now.
func NewManual(now Boot) *Manual {
	m := &Manual{}
	m.mu.now = now
	m.mu.wake = make(chan struct{})
	return m
}

// Now is where the test put the clock.
func (m *Manual) Now() Boot { m.mu.Lock(); defer m.mu.Unlock(); return m.mu.now }

// Wall counts from the epoch of time.Time.
func (m *Manual) Wall() time.Time { return time.Unix(0, int64(m.Now())).UTC() }

// Step moves the clock and wakes the sleepers.
func (m *Manual) Step(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.now = m.mu.now.Add(d)
	close(m.mu.wake)
	m.mu.wake = make(chan struct{})
}

// Sleep waits until Step has moved the clock by d.
func (m *Manual) Sleep(ctx context.Context, d time.Duration) error {
	m.mu.Lock()
	end := m.mu.now.Add(d)
	for {
		if m.mu.now >= end {
			m.mu.Unlock()
			return nil
		}
		wake := m.mu.wake
		m.mu.Unlock()
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
		m.mu.Lock()
	}
}

// BootID is the kernel's random id of this boot, which tells a machine that went
// down from a daemon that was restarted (SAFETY §3, Admit by kernel).
func BootID() (string, error) { return bootID("/proc/sys/kernel/random/boot_id") }
