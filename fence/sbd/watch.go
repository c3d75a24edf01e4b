package sbd

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/env"
)

// Verdict is what a node does at a tick.
type Verdict struct {
	// Pet: reset the watchdog's countdown. Without it the watchdog ends the node.
	Pet bool
	// Do, if not Clear, is what this node was told: Reset, Off, CrashDump or Exit.
	// It is final.
	Do   Message
	From string
	// Tests are the senders of test messages seen since the last tick.
	Tests []string
	Why   string // why the watchdog is not petted
}

// Watcher decides for one node that watches its mailbox on 1 to 3 devices. It is
// pure: readings and ticks in, verdicts out.
//
// A device is good while its last successful reading is not older than 3/5 of the
// watchdog timeout. So the watchdog fires at the latest 8/5 of its timeout after a
// message that could not be read, which is before msgwait. With one or two devices
// one good one is enough, with three two are (sbd(8)); Fence reaches so many that
// one good device has the message. A node that lost them still pets while it is
// vouched for, that is while its node lease holds: nobody is evicted, and so
// fenced by us, before that lease is over. (An operator's own "sbd message" to a
// node that sees no device waits for the lease too.)
//
// Mailboxes are not cleared after a test, as sbd does: between the reading and the
// clearing somebody may have written the message that ends this node, and would
// take its silence for its death.
type Watcher struct {
	t     Timeouts
	dev   []device
	do    Message
	from  string
	tests []string
}

type device struct {
	good env.Boot // when the last successful reading was begun
	test string   // sender of the test message that lies there
}

// NewWatcher makes a watcher for n devices, all of which count as good now.
func NewWatcher(t Timeouts, n int, now env.Boot) *Watcher {
	w := &Watcher{t: t, dev: make([]device, n)}
	for i := range w.dev {
		w.dev[i].good = now
	}
	return w
}

// Read takes a successful reading of device i that was begun at the given time. (A
// failed or unfinished one is no reading.) Messages that sbd does not define are
// ignored.
func (w *Watcher) Read(i int, begun env.Boot, m Message, from string) {
	d := &w.dev[i]
	d.good = max(d.good, begun)
	switch {
	case m == Test && d.test != from:
		d.test = from
		w.tests = append(w.tests, from)
	case m == Clear:
		d.test = ""
	case m.Kills() && !w.do.Kills(), m == Exit && w.do == Clear:
		w.do, w.from = m, from
	}
}

// Tick gives the verdict. vouched: this node holds its node lease.
func (w *Watcher) Tick(now env.Boot, vouched bool) Verdict {
	v := Verdict{Do: w.do, From: w.from, Tests: w.tests}
	w.tests = nil
	if w.do.Kills() {
		v.Why = "told to " + w.do.String() + " by " + w.from
		return v
	}
	good := 0
	for _, d := range w.dev {
		if now.Sub(d.good) <= w.t.Watchdog*3/5 {
			good++
		}
	}
	need := 1
	if len(w.dev) > 2 {
		need = len(w.dev)/2 + 1
	}
	v.Pet = good >= need || vouched
	if !v.Pet {
		v.Why = fmt.Sprintf("%d of %d devices answer, and the node lease is over", good, len(w.dev))
	}
	return v
}

// Hooks are the hands of Watch. They are called from one goroutine, and all are
// needed.
type Hooks struct {
	Pet     func()                         // the watchdog
	Do      func(m Message, from string)   // reset, power off or crash this machine; Exit: stop watching
	Test    func(from string)              // somebody tests the way
	Vouched func() bool                    // the node lease holds
	Failed  func(device string, err error) // a reading failed
	Silent  func(why string)               // the watchdog is not petted
}

// Watch watches the node's mailboxes until it is told to stop, by Exit or by ctx,
// or to end. slots are the node's slot numbers on the disks (Join). It returns nil
// after Exit or a deadly message was handed to Do, else ctx's error. It returns
// when its readers have, and those hang as long as their device does.
func Watch(ctx context.Context, clock env.Clock, t Timeouts, disks []*Disk, slots []int, h Hooks) error {
	if len(disks) < 1 || len(disks) > 3 || len(slots) != len(disks) {
		return fmt.Errorf("watch sbd: %w: %d devices, %d slots", ErrParam, len(disks), len(slots))
	}
	if err := t.Validate(); err != nil {
		return fmt.Errorf("watch sbd: %w", err)
	}
	type reading struct {
		i     int
		begun env.Boot
		m     Message
		from  string
		err   error
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	loop := max(t.Loop, 100*time.Millisecond)
	ch := make(chan reading)
	for i, d := range disks {
		wg.Go(func() {
			for {
				r := reading{i: i, begun: clock.Now()}
				r.m, r.from, r.err = d.Mailbox(slots[i])
				select {
				case ch <- r:
				case <-ctx.Done():
					return
				}
				if clock.Sleep(ctx, loop) != nil {
					return
				}
			}
		})
	}
	// A device that hangs sends nothing; the verdict must come all the same.
	ticks := make(chan struct{})
	wg.Go(func() {
		for clock.Sleep(ctx, min(loop, t.Watchdog/5)) == nil {
			select {
			case ticks <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	})
	w := NewWatcher(t, len(disks), clock.Now())
	for {
		select {
		case r := <-ch:
			if r.err != nil {
				h.Failed(disks[r.i].path, r.err)
				continue
			}
			w.Read(r.i, r.begun, r.m, r.from)
		case <-ticks:
		case <-ctx.Done():
			return ctx.Err()
		}
		v := w.Tick(clock.Now(), h.Vouched())
		for _, from := range v.Tests {
			h.Test(from)
		}
		if v.Do != Clear {
			h.Do(v.Do, v.From)
			return nil
		}
		if v.Pet {
			h.Pet()
		} else {
			h.Silent(v.Why)
		}
	}
}
