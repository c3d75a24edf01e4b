package target

import (
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// statuses reads n SCSI responses (a Data-In with status is one) and returns the
// tags in their order.
func (c *client) statuses(n int) (itts []uint32) {
	c.t.Helper()
	for len(itts) < n {
		b, _, err := c.recv()
		if err != nil {
			c.t.Fatal(err)
		}
		switch b.Opcode() {
		case iscsi.OpScsiResponse:
			var r iscsi.ScsiResponse
			if err := r.Decode(b); err != nil {
				c.t.Fatal(err)
			}
			itts = append(itts, r.ITT)
		case iscsi.OpDataIn:
			var r iscsi.DataIn
			if err := r.Decode(b); err != nil {
				c.t.Fatal(err)
			}
			if r.HasStatus {
				itts = append(itts, r.ITT)
			}
		}
	}
	return itts
}

// TestTaskAttributes: an ORDERED task waits for all earlier ones though it
// overlaps none, later ones wait for it, HEAD OF QUEUE waits for nobody, and the
// task set is one for all nexuses (SAM-5 8.6).
func TestTaskAttributes(t *testing.T) {
	t.Parallel()
	hold := make(chan struct{})
	l := lunOf(t, 0)
	f := fault.New(l.Device)
	l.Device = f
	b := newBench(t, Options{}, l)
	c, d := b.ready(loginOpt{name: "iqn.2026-01.net.host:c"}), b.ready(loginOpt{name: "iqn.2026-01.net.host:d"})
	f.Set(fault.Rule{Ops: fault.Write, Off: 0, Len: 512, Hold: hold})
	f0 := b.srv.list()
	read := func(x *client, lba uint64, attr iscsi.Attr) uint32 {
		p := x.command(0, scsi.Read(lba, 1), nil, 512)
		p.Attr = attr
		x.send(p)
		return p.ITT
	}
	w := c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
	c.send(w, make([]byte, 512)) // stands in the store
	simple := read(c, 100, iscsi.AttrSimple)
	if got := c.statuses(1); got[0] != simple {
		t.Fatal("a SIMPLE task waited for another")
	}
	ordered := read(c, 200, iscsi.AttrOrdered)
	c.nop(nil) // the target has read it
	late, head := read(d, 300, iscsi.AttrSimple), read(d, 400, iscsi.AttrHead)
	tur := d.command(0, scsi.TestUnitReady(), nil, 0)
	d.send(tur)
	if got := d.statuses(1); got[0] != head {
		t.Errorf("task %d ended first, want the one at the head of the queue, %d", got[0], head)
	}
	// INQUIRY is answered at all times.
	d.do(0, scsi.InquiryCDB(96), nil, 96).want(t, "inquiry", scsi.StatusGood, 0, 0)
	running := func() (n int) {
		for _, s := range f0 {
			n += s.info().Tasks
		}
		return n
	}
	time.Sleep(20 * time.Millisecond)
	if n := running(); n != 4 { // the write, the ORDERED one, and two behind it
		t.Errorf("%d tasks in progress, want 4", n)
	}
	close(hold)
	if got := c.statuses(2); got[0] != w.ITT || got[1] != ordered {
		t.Errorf("order %v, want %d, %d", got, w.ITT, ordered)
	}
	got := d.statuses(2)
	if got[0]+got[1] != late+tur.ITT {
		t.Errorf("tasks %v, want %d and %d", got, late, tur.ITT)
	}
	// An aborted task lets the others go, and so does one whose session ends.
	for _, how := range []string{"abort", "logout"} {
		hold := make(chan struct{})
		f.Set(fault.Rule{Ops: fault.Write, Off: 0, Len: 512, Hold: hold})
		x := b.ready(loginOpt{name: "iqn.2026-01.net.host:x"})
		w := c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
		c.send(w, make([]byte, 512))
		c.nop(nil)
		itt := read(x, 1, iscsi.AttrOrdered)
		x.nop(nil)
		late := read(d, 300, iscsi.AttrSimple)
		d.nop(nil)
		if how == "abort" {
			x.tmf(iscsi.FuncAbortTask, 0, itt, x.cmdSN-1)
			var r iscsi.TaskMgmtResponse
			x.must(&r)
		} else {
			_ = x.nc.Close()
		}
		if got := d.statuses(1); got[0] != late {
			t.Errorf("%s: task %d, want %d", how, got[0], late)
		}
		close(hold)
		c.statuses(1)
	}
	// ACA and reserved attributes.
	for _, a := range []iscsi.Attr{iscsi.AttrACA, 5, 7} {
		p := c.command(0, scsi.TestUnitReady(), nil, 0)
		p.Attr = a
		r, err := c.tryDo(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.want(t, "attribute", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCInvalidMessage)
	}
}

// TestOrderedWaitsForData: a write that came earlier and still waits for its
// Data-Out is earlier.
func TestOrderedWaitsForData(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{})
	out := make([]byte, 512)
	out[0] = 0xAB
	w := c.command(0, scsi.Write(9, 1, false), out, 0)
	c.send(w) // no data: an R2T comes
	var r2t iscsi.R2T
	c.must(&r2t)
	p := c.command(0, scsi.Read(9, 1), nil, 512)
	p.Attr = iscsi.AttrOrdered
	c.send(p)
	c.nop(nil)
	if err := c.burst(w, r2t.TTT, out, 0, 512); err != nil {
		t.Fatal(err)
	}
	if got := c.statuses(1); got[0] != w.ITT {
		t.Fatalf("task %d ended first", got[0])
	}
	r, err := c.finish(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.data) != 512 || r.data[0] != 0xAB {
		t.Error("an ORDERED read came before an earlier write")
	}
}

// TestQErr: a CHECK CONDITION aborts what QERR says (SPC-4 7.5.8).
func TestQErr(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		qerr      byte
		own, both bool // of the tasks of its own and of another nexus: aborted
	}{{0, false, false}, {1, true, true}, {3, true, false}} {
		hold := make(chan struct{})
		l := lunOf(t, 0)
		f := fault.New(l.Device, fault.Rule{Ops: fault.Read, Hold: hold})
		l.Device = f
		b := newBench(t, Options{}, l)
		c, d := b.ready(loginOpt{name: "iqn.2026-01.net.host:c"}), b.ready(loginOpt{name: "iqn.2026-01.net.host:d"})
		r := c.do(0, scsi.ModeSense10(scsi.ModeControl, 0, 256), nil, 256)
		m, _, err := scsi.ParseMode(r.data, true)
		if err != nil {
			t.Fatal(err)
		}
		m.HasBlock, m.WriteProtect, m.DPOFUA = false, false, false
		m.Pages[0].Body[1] = m.Pages[0].Body[1]&^controlQErr | x.qerr<<1
		list := m.Bytes10()
		list[0], list[1] = 0, 0
		sel, err := scsi.Build(scsi.OpModeSelect10, scsi.NoSA, scsi.Arg{ID: scsi.FPF, Value: 1}, scsi.Arg{ID: scsi.FParamLen, Value: uint64(len(list))})
		if err != nil {
			t.Fatal(err)
		}
		c.do(0, sel, list, 0).want(t, "mode select", scsi.StatusGood, 0, 0)
		if x.qerr != 0 {
			d.do(0, scsi.TestUnitReady(), nil, 0).want(t, "other nexus", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCModeChanged)
		}
		own := c.command(0, scsi.Read(1, 1), nil, 512)
		c.send(own)
		c.nop(nil)
		other := d.command(0, scsi.Read(2, 1), nil, 512)
		d.send(other)
		d.nop(nil)
		c.do(0, scsi.Read(1<<40, 1), nil, 512).want(t, "past the end", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCLBAOutOfRange)
		close(hold)
		f.Set()
		// What was not aborted answers before what comes now.
		ends := func(c *client, itt uint32) bool {
			p := c.command(0, scsi.InquiryCDB(96), nil, 96)
			p.Attr = iscsi.AttrSimple
			time.Sleep(20 * time.Millisecond)
			c.send(p)
			got := c.statuses(1)
			if got[0] == itt {
				c.statuses(1)
				return true
			}
			return false
		}
		if ends(c, own.ITT) == x.own {
			t.Errorf("QERR %d: own task aborted: %v, want %v", x.qerr, !x.own, x.own)
		}
		if ends(d, other.ITT) == x.both {
			t.Errorf("QERR %d: other nexus's task aborted: %v, want %v", x.qerr, !x.both, x.both)
		}
		if x.both {
			d.do(0, scsi.TestUnitReady(), nil, 0).want(t, "cleared", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCCommandsCleared)
		}
	}
}
