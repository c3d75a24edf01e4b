package target

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// raw reads a PDU without a look at its numbers.
func (c *client) raw() (iscsi.PDU, []byte) {
	c.t.Helper()
	_ = c.nc.SetReadDeadline(time.Now().Add(c.limit))
	b, err := c.r.Next()
	if err != nil {
		c.t.Fatal(err)
	}
	d, err := c.r.AppendData(nil)
	if err != nil {
		c.t.Fatal(err)
	}
	p, err := iscsi.DecodePDU(b)
	if err != nil {
		c.t.Fatal(err)
	}
	return p, d
}

// sendCorrupt sends a PDU with a wrong data digest.
func (c *client) sendCorrupt(p iscsi.PDU, data []byte) {
	c.t.Helper()
	var buf bytes.Buffer
	w := iscsi.NewWriter(&buf, iscsi.MaxDataSegment)
	w.HeaderDigest, w.DataDigest = c.w.HeaderDigest, c.w.DataDigest
	if err := w.Append(p, data); err != nil {
		c.t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		c.t.Fatal(err)
	}
	b := buf.Bytes()
	b[len(b)-1] ^= 0x40
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// rejected reads a Reject and counts its StatSN.
func (c *client) rejected(why iscsi.RejectReason) *iscsi.Reject {
	c.t.Helper()
	p, _ := c.raw()
	r, ok := p.(*iscsi.Reject)
	if !ok || r.Reason != why {
		c.t.Fatalf("%+v, want a Reject with %s", p, why)
	}
	c.expSN = r.StatSN + 1
	return r
}

func TestRecoveryLevel(t *testing.T) {
	t.Parallel()
	w := DefaultWant()
	w.ErrorRecoveryLevel = 0
	for want, o := range []Options{{Want: w}, {}} {
		b := newBench(t, o, lunOf(t, 0))
		for offer := range 3 {
			c := b.login(loginOpt{isid: iscsi.ISID{byte(offer)}, keys: kv(fmt.Sprintf("ErrorRecoveryLevel=%d", offer))})
			if got := fmt.Sprint(c.keys); !bytes.Contains([]byte(got), fmt.Appendf(nil, "ErrorRecoveryLevel=%d", min(want, offer))) {
				t.Errorf("level %d offered to one that does %d: %s", offer, want, got)
			}
		}
	}
}

// What the initiator lost of a read is sent again: data, status, data in shorter
// segments; until it is acknowledged, and no longer.
func TestSNACK(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{keys: kv("ErrorRecoveryLevel=1", "MaxRecvDataSegmentLength=8192", "MaxBurstLength=16384", "FirstBurstLength=8192")})
	data := make([]byte, 64<<10)
	for i := range data {
		data[i] = byte(i >> 9)
	}
	c.do(0, scsi.Write(0, 128, false), data, 0).want(t, "write", scsi.StatusGood, 0, 0)
	cmd := c.command(0, scsi.Read(0, 128), nil, 64<<10)
	c.send(cmd)
	var ttt uint32
	check := func(p iscsi.PDU, d []byte, sn uint32, off, n int) {
		t.Helper()
		x, ok := p.(*iscsi.DataIn)
		if !ok {
			t.Fatalf("%+v, want Data-In %d", p, sn)
		}
		if x.DataSN != sn || int(x.Offset) != off || !bytes.Equal(d, data[off:off+n]) || x.HasStatus || x.ITT != cmd.ITT {
			t.Fatalf("%+v with %d bytes, want DataSN %d, [%d,+%d)", x, len(d), sn, off, n)
		}
		end := off + n
		if x.Final != (end%16384 == 0) || x.Ack != (x.Final && end < len(data)) {
			t.Errorf("%+v: F at the end of a sequence, A where another follows", x)
		}
		if x.Ack {
			if ttt != 0 && x.TTT != ttt || x.TTT == iscsi.ReservedTag || x.LUN != cmd.LUN {
				t.Errorf("%+v: tag or LUN", x)
			}
			ttt = x.TTT
		}
	}
	for i := range 8 {
		p, d := c.raw()
		check(p, d, uint32(i), i*8192, 8192)
	}
	status := func(tag uint32, n uint32) {
		t.Helper()
		p, _ := c.raw()
		r, ok := p.(*iscsi.ScsiResponse)
		if !ok || r.StatSN != c.expSN || r.Status != 0 || r.ExpDataSN != n || r.SNACKTag != tag {
			t.Fatalf("%+v, want status %d after %d PDUs", p, c.expSN, n)
		}
	}
	status(0, 8)
	snack := func(typ iscsi.SNACKType, itt, ttt, beg, run uint32) {
		c.send(&iscsi.SNACK{Type: typ, LUN: cmd.LUN, ITT: itt, TTT: ttt, ExpStatSN: c.expSN, BegRun: beg, RunLength: run})
	}
	data3 := func(beg, end int) {
		t.Helper()
		for i := beg; i < end; i++ {
			p, d := c.raw()
			check(p, d, uint32(i), i*8192, 8192)
		}
	}
	snack(iscsi.SNACKData, cmd.ITT, iscsi.ReservedTag, 2, 3)
	data3(2, 5)
	snack(iscsi.SNACKData, cmd.ITT, iscsi.ReservedTag, 6, 0)
	data3(6, 8)
	snack(iscsi.SNACKStatus, iscsi.ReservedTag, iscsi.ReservedTag, uint32(c.expSN), 1)
	status(0, 8)
	snack(iscsi.SNACKStatus, iscsi.ReservedTag, iscsi.ReservedTag, 0, 0)
	status(0, 8)
	exp := c.expSN
	snack(iscsi.SNACKData, cmd.ITT, iscsi.ReservedTag, 7, 2) // one too many
	if r := c.rejected(iscsi.RejectProtocolError); r.DataSN != 8 {
		t.Errorf("%+v, want DataSN 8", r)
	}
	c.expSN = exp // neither is acknowledged
	snack(iscsi.SNACKDataACK, iscsi.ReservedTag, ttt, 4, 0)
	snack(iscsi.SNACKDataACK, iscsi.ReservedTag, ttt, 9, 0)
	c.rejected(iscsi.RejectInvalidDataACK)
	c.expSN = exp
	snack(iscsi.SNACKData, cmd.ITT, iscsi.ReservedTag, 3, 2) // acknowledged in part
	c.rejected(iscsi.RejectProtocolError)
	c.expSN = exp
	snack(iscsi.SNACKData, cmd.ITT, iscsi.ReservedTag, 0, 0)
	data3(4, 8)
	// Shorter segments: what was cut for longer ones does not come again as it was.
	c.itt++
	c.send(&iscsi.TextRequest{Immediate: true, Final: true, ITT: c.itt, TTT: iscsi.ReservedTag, CmdSN: c.cmdSN, ExpStatSN: c.expSN},
		iscsi.AppendText(nil, kv("MaxRecvDataSegmentLength=4096")))
	if p, _ := c.raw(); p.Opcode() != iscsi.OpTextResp {
		t.Fatalf("%+v", p)
	}
	snack(iscsi.SNACKData, cmd.ITT, iscsi.ReservedTag, 5, 1)
	c.rejected(iscsi.RejectProtocolError)
	c.expSN = exp
	snack(iscsi.SNACKRData, cmd.ITT, 0x77, 0, 0)
	for i := range 8 {
		p, d := c.raw()
		check(p, d, uint32(4+i), 32768+i*4096, 4096)
	}
	status(0x77, 12)
	// Acknowledged: nothing is kept any more.
	kept := func() (n int64) {
		for _, x := range b.srv.list() {
			n += x.kept.Load()
		}
		return n
	}
	if kept() != 64<<10 {
		t.Errorf("%d bytes are kept", kept())
	}
	c.expSN = exp + 6 // status, three Rejects, text, one more Reject
	c.nop(nil)
	if kept() != 0 {
		t.Errorf("%d bytes are kept after their acknowledgement", kept())
	}
	snack(iscsi.SNACKData, cmd.ITT, iscsi.ReservedTag, 0, 1)
	c.rejected(iscsi.RejectProtocolError)
	snack(iscsi.SNACKStatus, iscsi.ReservedTag, iscsi.ReservedTag, uint32(exp), 1)
	c.rejected(iscsi.RejectProtocolError)
	if i := b.srv.Sessions()[0]; i.Retransmits == 0 {
		t.Error("nothing was counted")
	}
}

// An R2T that was lost is sent again.
func TestSNACKOfR2T(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{keys: kv("ErrorRecoveryLevel=1", "ImmediateData=No", "MaxBurstLength=8192", "FirstBurstLength=8192", "MaxOutstandingR2T=2")})
	data := bytes.Repeat([]byte{6}, 32<<10)
	p := c.command(0, scsi.Write(0, 64, false), data, 0)
	c.send(p)
	var r [2]iscsi.R2T
	c.must(&r[0])
	c.must(&r[1])
	snack := func(beg, run uint32) {
		c.send(&iscsi.SNACK{Type: iscsi.SNACKData, LUN: p.LUN, ITT: p.ITT, TTT: iscsi.ReservedTag, ExpStatSN: c.expSN, BegRun: beg, RunLength: run})
	}
	snack(1, 1)
	var x iscsi.R2T
	if c.must(&x); x != r[1] {
		t.Errorf("%+v, want %+v", x, r[1])
	}
	snack(2, 1)
	c.rejected(iscsi.RejectProtocolError)
	for _, x := range r {
		if err := c.burst(p, x.TTT, data, int(x.Offset), int(x.Length)); err != nil {
			t.Fatal(err)
		}
	}
	if res, err := c.finish(p, data); err != nil || res.status != scsi.StatusGood || res.r2ts != 2 {
		t.Errorf("%+v, %v", res, err)
	}
}

// Data with a wrong digest: at level 0 the connection ends, at level 1 the PDU is
// rejected and what it carried is asked for again.
func TestDataDigestRecovery(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	keys := []string{"HeaderDigest=CRC32C", "DataDigest=CRC32C", "InitialR2T=No", "MaxBurstLength=16384", "FirstBurstLength=8192"}
	c := b.ready(loginOpt{keys: kv(keys...)})
	p := c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
	c.sendCorrupt(p, make([]byte, 512))
	c.gone()

	c = b.ready(loginOpt{keys: kv(append(keys, "ErrorRecoveryLevel=1")...)})
	data := make([]byte, 40<<10)
	for i := range data {
		data[i] = byte(i>>9) + 1
	}
	// A command with its immediate data: it never was, and comes again whole.
	p = c.command(0, scsi.Write(0, 80, false), data, 0)
	p.Final = false
	c.sendCorrupt(p, data[:4096])
	c.rejected(iscsi.RejectDataDigest)
	later := c.command(0, scsi.TestUnitReady(), nil, 0)
	c.send(later)
	c.silent(20 * time.Millisecond)
	c.send(p, data[:4096])
	if r, err := c.finish(later, nil); err != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	// Unsolicited data, twice: the first of two PDUs and the last.
	uns := func(sn uint32, off int, final bool) *iscsi.DataOut {
		return &iscsi.DataOut{Final: final, ITT: p.ITT, TTT: iscsi.ReservedTag, DataSN: sn, Offset: uint32(off), ExpStatSN: c.expSN}
	}
	c.sendCorrupt(uns(0, 4096, false), data[4096:6144])
	c.rejected(iscsi.RejectDataDigest)
	c.sendCorrupt(uns(1, 6144, true), data[6144:8192])
	c.rejected(iscsi.RejectDataDigest)
	// Both are asked for, then the rest; of those sequences the last PDU of all is hurt,
	// and the recovery itself, too: until then nothing may be done.
	hurt, again := 0, 0
	for seen := 0; seen < len(data)-4096; {
		var r iscsi.R2T
		c.must(&r)
		off, end := int(r.Offset), int(r.Offset+r.Length)
		if r.Length == 2048 {
			again++
		}
		for sn := uint32(0); off < end; sn++ {
			n := min(2048, end-off)
			d := &iscsi.DataOut{Final: off+n == end, LUN: p.LUN, ITT: p.ITT, TTT: r.TTT, DataSN: sn, Offset: uint32(off), ExpStatSN: c.expSN}
			if hurt == 0 && off == 4096 || hurt > 0 && hurt < 3 && off == len(data)-2048 {
				hurt++
				c.sendCorrupt(d, data[off:off+n])
				c.rejected(iscsi.RejectDataDigest)
			} else {
				c.send(d, data[off:off+n])
				seen += n
			}
			off += n
		}
	}
	if r, err := c.finish(p, data); err != nil || r.status != scsi.StatusGood {
		t.Fatalf("%+v, %v", r, err)
	}
	if hurt != 3 || again < 4 {
		t.Errorf("%d corruptions, %d recoveries", hurt, again)
	}
	// Other PDUs with data.
	c.itt++
	nop := &iscsi.NopOut{ITT: c.itt, TTT: iscsi.ReservedTag, CmdSN: c.cmdSN, ExpStatSN: c.expSN}
	c.sendCorrupt(nop, []byte("hello"))
	c.rejected(iscsi.RejectDataDigest)
	c.send(nop, []byte("hello"))
	c.cmdSN++
	var in iscsi.NopIn
	if d := c.must(&in); string(d) != "hello" {
		t.Errorf("%q", d)
	}
	if r := c.do(0, scsi.Read(0, 80), nil, 40<<10); !bytes.Equal(r.data, data) {
		t.Error("what was written differs")
	}
	if i := b.srv.Sessions(); i[len(i)-1].DigestErrors < 6 {
		t.Errorf("%d digest errors", i[len(i)-1].DigestErrors)
	}
}
