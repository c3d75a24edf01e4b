package target

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// pout runs PERSISTENT RESERVE OUT.
func (c *client) pout(sa int, t scsi.PRType, key, newKey uint64) result {
	c.t.Helper()
	cdb, _ := scsi.PersistentReserveOut(sa, t, 24)
	return c.do(0, cdb, (&scsi.PROut{Key: key, NewKey: newKey}).Bytes(sa), 0)
}

// start runs a command with a parameter list and gives its result later.
func (c *client) start(cdb scsi.CDB, list []byte) chan result {
	c.t.Helper()
	cmd := c.command(0, cdb, list, 0)
	c.send(cmd, list)
	got := make(chan result, 1)
	go func() {
		r, err := c.finish(cmd, list)
		if err != nil {
			c.t.Error(err)
		}
		got <- r
	}()
	return got
}

func fill(b byte, blocks int) []byte { return bytes.Repeat([]byte{b}, blocks*512) }

// trespass has two initiators, a registered, and a write of c that is held in the
// backend, with a second one that overlaps it queued behind.
func trespass(t *testing.T) (b *bench, a, c *client, free func(), first, second uint32) {
	t.Helper()
	l := lunOf(t, 0)
	f := fault.New(l.Device)
	l.Device = f
	b = newBench(t, Options{}, l)
	a = b.ready(loginOpt{name: "iqn.2026-01.net.host:a"})
	c = b.ready(loginOpt{name: "iqn.2026-01.net.host:c"})
	a.pout(scsi.SARegister, 0, 0, 1).want(t, "register", scsi.StatusGood, 0, 0)
	hold := make(chan struct{})
	var once sync.Once
	free = func() { once.Do(func() { f.Set(); close(hold) }) }
	t.Cleanup(free)
	f.Set(fault.Rule{Ops: fault.Write, Hold: hold})
	w1 := c.command(0, scsi.Write(0, 1, false), fill('1', 1), 0)
	c.send(w1, fill('1', 1))
	waitFor(t, func() bool { return f.Hits() == 1 })
	w2 := c.command(0, scsi.Write(0, 2, false), fill('2', 2), 0)
	c.send(w2, fill('2', 2))
	waitFor(t, func() bool { return b.srv.Sessions()[1].Tasks == 2 })
	return b, a, c, free, w1.ITT, w2.ITT
}

// SAFETY §4: GOOD is sent only when the I/O of those who lost the right has left
// the backend, and what waits in the range queue is judged again when it leaves it.
func TestReservationWaitsForTrespassers(t *testing.T) {
	t.Parallel()
	_, a, c, free, first, second := trespass(t)
	cdb, _ := scsi.PersistentReserveOut(scsi.SAReserve, scsi.PRWriteExclusive, 24)
	list := (&scsi.PROut{Key: 1}).Bytes(scsi.SAReserve)
	got := a.start(cdb, list)
	select {
	case r := <-got:
		t.Fatalf("answered %v with a trespasser's write in the backend", r.status)
	case <-time.After(200 * time.Millisecond):
	}
	free()
	(<-got).want(t, "reserve", scsi.StatusGood, 0, 0)
	st := map[uint32]scsi.Status{}
	for range 2 {
		var r iscsi.ScsiResponse
		c.must(&r)
		st[r.ITT] = scsi.Status(r.Status)
	}
	if st[first] != scsi.StatusGood || st[second] != scsi.StatusReservationConflict {
		t.Errorf("the write in the backend ended with %v, the one behind it with %v", st[first], st[second])
	}
	if r := a.do(0, scsi.Read(0, 2), nil, 1024); r.data[0] != '1' || bytes.Contains(r.data, []byte{'2'}) {
		t.Errorf("the medium has %c and %c", r.data[0], r.data[512])
	}
}

// PREEMPT AND ABORT answers when the victim's commands are out of the backend; what
// waited behind them never runs, and neither is answered.
func TestPreemptAndAbortDrains(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	f := fault.New(l.Device)
	l.Device = f
	b := newBench(t, Options{}, l)
	a := b.ready(loginOpt{name: "iqn.2026-01.net.host:a"})
	c := b.ready(loginOpt{name: "iqn.2026-01.net.host:c"})
	a.pout(scsi.SARegister, 0, 0, 1).want(t, "register", scsi.StatusGood, 0, 0)
	c.pout(scsi.SARegister, 0, 0, 2).want(t, "register", scsi.StatusGood, 0, 0)
	c.pout(scsi.SAReserve, scsi.PRWriteExclusiveRegOnly, 2, 0).want(t, "reserve", scsi.StatusGood, 0, 0)
	hold := make(chan struct{})
	var once sync.Once
	free := func() { once.Do(func() { f.Set(); close(hold) }) }
	t.Cleanup(free)
	f.Set(fault.Rule{Ops: fault.Write, Hold: hold})
	for _, n := range []byte{1, 2} {
		c.send(c.command(0, scsi.Write(0, 1, false), fill(n, 1), 0), fill(n, 1))
	}
	waitFor(t, func() bool { return f.Hits() == 1 && b.srv.Sessions()[1].Tasks == 2 })
	cdb, _ := scsi.PersistentReserveOut(scsi.SAPreemptAndAbort, scsi.PRWriteExclusive, 24)
	list := (&scsi.PROut{Key: 1, NewKey: 2}).Bytes(scsi.SAPreemptAndAbort)
	got := a.start(cdb, list)
	select {
	case r := <-got:
		t.Fatalf("answered %v with a victim's write in the backend", r.status)
	case <-time.After(200 * time.Millisecond):
	}
	free()
	(<-got).want(t, "preempt and abort", scsi.StatusGood, 0, 0)
	if n := f.Hits(); n > 1 {
		t.Errorf("%d writes of the victim reached the backend", n)
	}
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "told", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCRegistrationsPreempted)
	c.do(0, scsi.Write(0, 1, false), fill(3, 1), 0).want(t, "preempted", scsi.StatusReservationConflict, 0, 0)
}

// Enforce says with ctx that trespassers have not ended.
func TestEnforce(t *testing.T) {
	t.Parallel()
	b, a, c, free, _, _ := trespass(t)
	srv, vol := b.srv, b.conf.Targets[0].LUNs[0].Volume
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	victim := pr.Nexus{ID: scsi.TransportID{Name: "iqn.2026-01.net.host:c", HasISID: true}, Port: 1}
	if !srv.Nexus(victim) || srv.Nexus(pr.Nexus{ID: victim.ID, Port: 2}) {
		t.Error("Nexus does not find what is there")
	}
	res := pr.Result{Abort: []pr.Victim{{Nexus: victim}}, Notify: []pr.Attention{{Nexus: victim, Code: scsi.ASCRegistrationsPreempted}}}
	if err := srv.Enforce(ctx, vol, res); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("with a victim's write in the backend: %v", err)
	}
	free()
	if err := srv.Enforce(t.Context(), vol, pr.Result{}); err != nil {
		t.Fatal(err)
	}
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "told", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCRegistrationsPreempted)
	if r := a.do(0, scsi.Read(0, 2), nil, 1024); bytes.Contains(r.data, []byte{'2'}) {
		t.Error("an aborted write reached the medium")
	}
}

// What had an effect and may not be told any more resets the session; it is never
// "not ready". What had none says why.
func TestUnsaid(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ err, e, want error }{
		{nil, ErrUnsure, ErrReset},
		{errConflict, ErrUnsure, ErrReset},
		{ErrReset, ErrUnsure, ErrReset},
		{ErrNotReady, ErrUnsure, ErrNotReady},
		{ErrNotReady, ErrReset, ErrReset},
		{nil, ErrReset, ErrReset},
		{nil, ErrStandby, ErrStandby},
	} {
		if got := unsaid(c.err, c.e); !errors.Is(got, c.want) || errors.Is(got, ErrReset) && !errors.Is(c.want, ErrReset) {
			t.Errorf("%v, gate %v: %v, want %v", c.err, c.e, got, c.want)
		}
	}
	var g countGate
	l := lunOf(t, 0)
	l.Gate = &g
	b := newBench(t, Options{}, l)
	a := b.ready(loginOpt{})
	g.set(nil, ErrUnsure)
	cdb, _ := scsi.PersistentReserveOut(scsi.SARegister, 0, 24)
	list := (&scsi.PROut{NewKey: 1}).Bytes(scsi.SARegister)
	cmd := a.command(0, cdb, list, 0)
	if r, err := a.tryDo(cmd, list); err == nil {
		t.Errorf("answered %v", r.status)
	}
}
