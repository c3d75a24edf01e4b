package target

import (
	"bytes"
	"testing"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func naaOf(l LUN) scsi.CSCD {
	n := scsi.NAA6(l.Identity.UUID)
	return scsi.CSCD{Type: scsi.CSCDIdentification, ID: scsi.DesignatorNAAValue(n[:]), BlockSize: 512}
}

func (c *client) xcopy(l scsi.LUN, list *scsi.CopyList) result {
	c.t.Helper()
	b := list.Bytes()
	cdb, err := scsi.Build(scsi.OpExtendedCopy, scsi.SAExtendedCopyLID1, scsi.Arg{ID: scsi.FParamLen, Value: uint64(len(b))})
	if err != nil {
		c.t.Fatal(err)
	}
	return c.do(l, cdb, b, 0)
}

// TestExtendedCopy: between units, within one also where the ranges overlap, and
// never to what the initiator's target does not map (CVE-2020-28374).
func TestExtendedCopy(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0), lunOf(t, 1))
	hidden := lunOf(t, 9)
	other := b.conf.Targets[0]
	other.IQN, other.LUNs = testIQN+"-other", []LUN{hidden}
	b.conf.Targets = append(b.conf.Targets, other)
	b.apply()
	c := b.ready(loginOpt{})
	luns := b.conf.Targets[0].LUNs
	src := make([]byte, 64<<10)
	for i := range src {
		src[i] = byte(i/512 + 1)
	}
	c.do(0, scsi.Write(0, 128, false), src, 0).want(t, "write", scsi.StatusGood, 0, 0)
	seg := func(s, d uint16, n uint16, from, to uint64) scsi.CopySegment {
		return scsi.CopySegment{Type: scsi.SegmentBlockBlock, Source: s, Dest: d, Blocks: n, SrcLBA: from, DestLBA: to}
	}
	two := []scsi.CSCD{naaOf(luns[0]), naaOf(luns[1])}
	c.xcopy(0, &scsi.CopyList{ID: 4, CSCDs: two, Segments: []scsi.CopySegment{seg(0, 1, 128, 0, 256), seg(0, 1, 1, 5, 0)}}).want(t, "copy", scsi.StatusGood, 0, 0)
	if d := c.do(1, scsi.Read(256, 128), nil, 64<<10).data; !bytes.Equal(d, src) {
		t.Error("the copy differs")
	}
	if d := c.do(1, scsi.Read(0, 1), nil, 512).data; d[0] != 6 {
		t.Error("second segment", d[0])
	}
	st, _ := scsi.Build(scsi.OpReceiveCopyResults, scsi.SACopyStatusLID1, scsi.Arg{ID: scsi.FListID, Value: 4}, scsi.Arg{ID: scsi.FAlloc, Value: 64})
	if s, err := scsi.ParseCopyStatus(c.do(0, st, nil, 64).data); err != nil || s.State != scsi.CopyDone || s.Segments != 2 || s.Bytes != 129*512 {
		t.Error(s, err)
	}
	// Overlapping, both ways.
	c.xcopy(0, &scsi.CopyList{CSCDs: two[:1], Segments: []scsi.CopySegment{seg(0, 0, 100, 0, 3)}}).want(t, "forward", scsi.StatusGood, 0, 0)
	if d := c.do(0, scsi.Read(3, 100), nil, 100*512).data; !bytes.Equal(d, src[:100*512]) {
		t.Error("an overlapping copy to higher blocks differs")
	}
	c.xcopy(0, &scsi.CopyList{CSCDs: two[:1], Segments: []scsi.CopySegment{seg(0, 0, 100, 3, 0)}}).want(t, "back", scsi.StatusGood, 0, 0)
	if d := c.do(0, scsi.Read(0, 100), nil, 100*512).data; !bytes.Equal(d, src[:100*512]) {
		t.Error("an overlapping copy to lower blocks differs")
	}
	// Not in this initiator's map.
	for _, x := range []scsi.CopyList{
		{CSCDs: []scsi.CSCD{two[0], naaOf(hidden)}, Segments: []scsi.CopySegment{seg(0, 1, 8, 0, 0)}},
		{CSCDs: []scsi.CSCD{two[0], naaOf(hidden)}, Segments: []scsi.CopySegment{seg(1, 0, 8, 0, 0)}},
	} {
		r := c.xcopy(0, &x)
		if r.status != scsi.StatusCheckCondition || r.sense.Key != scsi.CopyAborted {
			t.Errorf("%s %v", r.status, r.sense)
		}
	}
	p := make([]byte, 1<<20)
	if err := hidden.Device.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, make([]byte, 1<<20)) {
		t.Error("a unit outside the map was written", err)
	}
	// A reservation on the destination fences the copy that is sent to the source.
	o := b.ready(loginOpt{name: "iqn.2026-01.net.host:o"})
	cdb, _ := scsi.PersistentReserveOut(scsi.SARegister, 0, 24)
	o.do(1, cdb, (&scsi.PROut{NewKey: 1}).Bytes(scsi.SARegister), 0).want(t, "register", scsi.StatusGood, 0, 0)
	cdb, _ = scsi.PersistentReserveOut(scsi.SAReserve, scsi.PRWriteExclusive, 24)
	o.do(1, cdb, (&scsi.PROut{Key: 1}).Bytes(scsi.SAReserve), 0).want(t, "reserve", scsi.StatusGood, 0, 0)
	c.xcopy(0, &scsi.CopyList{CSCDs: two, Segments: []scsi.CopySegment{seg(0, 1, 8, 0, 0)}}).want(t, "fenced", scsi.StatusReservationConflict, 0, 0)
}

// TestCopiesDoNotDeadlock: many copies across two units, each sent to the other.
func TestCopiesDoNotDeadlock(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0), lunOf(t, 1))
	c := b.ready(loginOpt{})
	luns := b.conf.Targets[0].LUNs
	const n = 100
	for i := range n {
		l := &scsi.CopyList{IDUsage: 3, CSCDs: []scsi.CSCD{naaOf(luns[i%2]), naaOf(luns[1-i%2])},
			Segments: []scsi.CopySegment{{Type: scsi.SegmentBlockBlock, Source: 0, Dest: 1, Blocks: 64, SrcLBA: 0, DestLBA: 0}}}
		d := l.Bytes()
		cdb, _ := scsi.Build(scsi.OpExtendedCopy, scsi.SAExtendedCopyLID1, scsi.Arg{ID: scsi.FParamLen, Value: uint64(len(d))})
		c.send(c.command(scsi.LUN(i%2), cdb, d, 0), d)
	}
	for range n {
		var r iscsi.ScsiResponse
		c.must(&r)
		if r.Status != 0 {
			t.Fatal(r)
		}
	}
}
