package target

import (
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// TestStats counts by hand what two sessions do to one LUN.
func TestStats(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 3)
	hold := make(chan struct{})
	f := fault.New(l.Device)
	var hits int
	l.Device = f
	b := newBench(t, Options{}, l)
	a := b.ready(loginOpt{name: "iqn.2026-01.net.host:a"})
	c := b.ready(loginOpt{name: "iqn.2026-01.net.host:c"})
	a.clearUA(3)
	c.clearUA(3)
	zero := b.srv.Stats().LUNs[0].IOStats
	a.do(3, scsi.Write(0, 8, false), make([]byte, 4096), 0).want(t, "write", scsi.StatusGood, 0, 0)
	a.do(3, scsi.Read(0, 2), nil, 1024)
	c.do(3, scsi.Read(0, 4), nil, 2048)
	un := scsi.UnmapList([]scsi.UnmapRange{{LBA: 0, Blocks: 1}})
	c.do(3, scsi.UnmapCDB(uint16(len(un))), un, 0).want(t, "unmap", scsi.StatusGood, 0, 0)
	c.do(3, scsi.Read(1<<20, 1), nil, 512).want(t, "beyond the end", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCLBAOutOfRange)
	f.Set(fault.Rule{Ops: fault.Read, Err: block.ErrMedium})
	c.do(3, scsi.Read(0, 1), nil, 512).want(t, "bad disk", scsi.StatusCheckCondition, scsi.MediumError, scsi.ASCReadError)
	a.do(3, build(t, scsi.OpReserve6), nil, 0).want(t, "reserve", scsi.StatusGood, 0, 0)
	c.do(3, scsi.Write(0, 1, false), make([]byte, 512), 0).want(t, "reserved", scsi.StatusReservationConflict, 0, 0)
	c.do(9, scsi.TestUnitReady(), nil, 0).want(t, "no such LUN", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCLUNotSupported)

	s := b.srv.Stats()
	if len(s.LUNs) != 1 || s.LUNs[0].Target != testIQN || s.LUNs[0].Number != 3 || s.LUNs[0].Volume != "vol-3" || s.LUNs[0].Sessions != 2 {
		t.Fatalf("%+v", s.LUNs)
	}
	g := s.LUNs[0].IOStats
	errs := func(i IOStats, k errKind) uint64 { return i.Errors[k] - zero.Errors[k] }
	if n := g.Commands - zero.Commands; n != 8 || g.ReadBytes != 1024+2048 || g.WriteBytes != 4096 || g.Unmaps != 1 || g.InProgress != 0 || g.Aborted != 0 {
		t.Errorf("%d commands, %+v", n, g)
	}
	if g.Reads() != 4 || g.Writes() != 2 || g.Latency[IOOther].Count()-zero.Latency[IOOther].Count() != 2 {
		t.Errorf("%d reads, %d writes, %d others", g.Reads(), g.Writes(), g.Latency[IOOther].Count()-zero.Latency[IOOther].Count())
	}
	if errs(g, errIllegalRequest) != 1 || errs(g, errMedium) != 1 || errs(g, errReservationConflict) != 1 || g.Failed()-zero.Failed() != 3 {
		t.Errorf("errors %v before %v", g.Errors, zero.Errors)
	}
	if s.Sessions[0].ReadBytes != 1024 || s.Sessions[0].WriteBytes != 4096 || s.Sessions[1].ReadBytes != 2048 || s.Sessions[1].Errors[errIllegalRequest] < 2 {
		t.Errorf("%+v", s.Sessions)
	}
	if s.Logins != 2 {
		t.Errorf("%d logins", s.Logins)
	}

	// What is in progress is the queue depth, and its time counts when it ends.
	f.Set(fault.Rule{Ops: fault.Write, Hold: hold})
	hits = f.Hits()
	run := a.command(3, scsi.Write(0, 1, false), make([]byte, 512), 0)
	a.send(run, make([]byte, 512))
	waitFor(t, func() bool { return f.Hits() == hits+1 })
	held := time.Now()
	if g := b.srv.Stats().LUNs[0]; g.InProgress != 1 || b.srv.Sessions()[0].InProgress != 1 {
		t.Errorf("in progress: %d", g.InProgress)
	}
	time.Sleep(20 * time.Millisecond)
	close(hold)
	if r, err := a.finish(run, nil); err != nil || r.status != scsi.StatusGood {
		t.Fatal(r, err)
	}
	limit := time.Since(held)
	// Sub compares by count: the long one is the largest.
	if w := b.srv.Stats().LUNs[0].Latency[IOWrite]; w.Quantile(1) < 15*time.Millisecond || w.Quantile(1) > 2*limit+time.Second {
		t.Errorf("the held write took %v", w.Quantile(1))
	}

	// A command without a status is aborted, and what a session did stays when the
	// session is gone.
	hold = make(chan struct{})
	f.Set(fault.Rule{Ops: fault.Write, Hold: hold})
	hits = f.Hits()
	run = a.command(3, scsi.Write(0, 1, false), make([]byte, 512), 0)
	a.send(run, make([]byte, 512))
	waitFor(t, func() bool { return f.Hits() == hits+1 })
	_ = a.nc.Close()
	x := b.srv.list()[0]
	waitFor(t, func() bool { x.mu.Lock(); defer x.mu.Unlock(); return x.ended })
	close(hold)
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 1 })
	e := b.srv.Stats().LUNs[0]
	if e.Sessions != 1 || e.Aborted != 1 || e.InProgress != 0 || e.WriteBytes != 4096+512 || e.ReadBytes != g.ReadBytes || e.Commands != g.Commands+2 {
		t.Errorf("after the session: %+v", e)
	}
	// Asking twice gives the same: nothing is added to what is kept.
	if again := b.srv.Stats().LUNs[0]; again.Reads() != e.Reads() || again.Commands != e.Commands {
		t.Errorf("asked again: %+v, before %+v", again, e)
	}
	b.conf.Targets[0].LUNs = nil
	b.apply()
	if s := b.srv.Stats(); len(s.LUNs) != 0 || len(b.srv.stats) != 0 {
		t.Errorf("the LUN is gone and %+v is left", s.LUNs)
	}
}

// A digest error is counted for its session, and for the server for ever.
func TestStatsDigest(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{keys: kv("HeaderDigest=CRC32C")})
	p := c.command(0, scsi.TestUnitReady(), nil, 0)
	h := make([]byte, iscsi.BHSLen+4) // four bytes of digest, all wrong
	p.Encode((*iscsi.BHS)(h))
	if _, err := c.nc.Write(h); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return b.srv.Stats().DigestErrors == 1 })
	c.gone()
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 0 })
	if s := b.srv.Stats(); s.DigestErrors != 1 {
		t.Errorf("%d", s.DigestErrors)
	}
}

func build(t testing.TB, op scsi.Opcode) scsi.CDB {
	t.Helper()
	c, err := scsi.Build(op, scsi.NoSA)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
