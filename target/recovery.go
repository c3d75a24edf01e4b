package target

import (
	"errors"
	"slices"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
)

// Error recovery level 1 (RFC 7143 section 7): a PDU whose data digest is wrong is
// rejected and asked for again, and what the initiator lost is sent again when it
// asks with a SNACK. A header digest error leaves no way to find the next PDU, so it
// ends the connection at every level.
//
// What may be asked for is kept until ExpStatSN acknowledges its status. At level 0
// nothing is kept.

const (
	// maxKept bounds the Data-In that a session keeps, in bytes. Above it a read's data
	// are not kept, and a SNACK for them gets Reject 03h.
	maxKept = 64 << 20
	// maxKeptResponses bounds the responses that a connection keeps; above it the oldest
	// one is let go.
	maxKeptResponses = 4096
	// maxRecoveries bounds the data of one command that are asked for again.
	maxRecoveries = 256
)

// kept is a response that was sent and is not acknowledged.
type kept struct {
	sn    iscsi.Serial // its StatSN
	o     response
	segs  []segment // its Data-In
	acked int       // segs up to which a DataACK came
	ttt   uint32    // of the Data-In that ask for a DataACK
	tag   uint32    // SNACK tag of the last R-Data SNACK
	data  bool      // o.in was kept
}

// segment is a Data-In PDU, with the index as its DataSN.
type segment struct {
	off, n     int
	final, ack bool
}

// segments cuts [off, size) into Data-In PDUs of at most limit bytes, in sequences
// of at most burst.
func segments(out []segment, off, size, limit, burst int) []segment {
	in := 0
	for off < size {
		n := min(size-off, limit, burst-in)
		in += n
		end := off+n == size
		s := segment{off: off, n: n, final: end || in == burst, ack: !end && in == burst}
		if s.final {
			in = 0
		}
		out = append(out, s)
		off += n
	}
	return out
}

func (k *kept) free(s *session) {
	if k.data {
		s.kept.Add(-int64(len(k.o.in)))
	}
	k.o.buf.Free()
	k.o = response{}
}

// keep takes a response that was just encoded with StatSN sn. Of Data-In it takes the
// buffer over where there is room. flushing is held.
func (c *conn) keep(sn iscsi.Serial, o *response, k kept) {
	k.sn, k.o = sn, *o
	k.o.buf, k.o.in = nil, nil
	if len(o.in) > 0 {
		if c.s.kept.Add(int64(len(o.in))) <= maxKept {
			k.data = true
			k.o.in, k.o.buf = o.in, o.buf
			o.buf = nil // freed with k
		} else {
			c.s.kept.Add(-int64(len(o.in)))
		}
	}
	if len(c.kept) >= maxKeptResponses {
		c.letGo(1)
	}
	c.kept = append(c.kept, k)
}

func (c *conn) letGo(n int) {
	for i := range c.kept[:n] {
		c.kept[i].free(c.s)
	}
	c.kept = slices.Delete(c.kept, 0, n)
}

// trim lets go of what is acknowledged. It is called when nothing is with the codec's
// writer; flushing is held.
func (c *conn) trim() {
	acked := iscsi.Serial(c.acked.Load())
	n := 0
	for n < len(c.kept) && c.kept[n].sn.Less(acked) {
		n++
	}
	if n > 0 {
		c.letGo(n)
	}
}

// encodeKept is encodeSCSI where responses are kept: the status has a PDU of its own,
// so that a lost one is told from lost data.
func (c *conn) encodeKept(o *response, exp, mx iscsi.Serial) error {
	k := kept{segs: segments(nil, 0, len(o.in), c.w.MaxData, c.s.params.MaxBurstLength)}
	if slices.ContainsFunc(k.segs, func(s segment) bool { return s.ack }) {
		k.ttt = c.ttt()
	}
	for i := range k.segs {
		if err := c.encodeSegment(o, &k, i, exp, mx); err != nil {
			return err
		}
	}
	sn := c.stat()
	if err := c.encodeStatus(o, sn, uint32(len(k.segs)), 0, exp, mx); err != nil {
		return err
	}
	c.keep(sn, o, k)
	return nil
}

func (c *conn) encodeSegment(o *response, k *kept, i int, exp, mx iscsi.Serial) error {
	s := k.segs[i]
	d := iscsi.DataIn{ITT: o.itt, TTT: iscsi.ReservedTag, ExpCmdSN: exp, MaxCmdSN: mx, DataSN: uint32(i), Offset: uint32(s.off), Final: s.final}
	if s.ack {
		d.Ack, d.TTT, d.LUN = true, k.ttt, o.lun
	}
	d.Encode(c.w.Begin())
	return c.w.End(nil, o.in[s.off:s.off+s.n])
}

func (c *conn) encodeStatus(o *response, sn iscsi.Serial, dataSN, tag uint32, exp, mx iscsi.Serial) error {
	r := iscsi.ScsiResponse{
		Overflow: o.over, Underflow: o.under, Residual: o.residual, Status: o.status, ITT: o.itt, SNACKTag: tag,
		StatSN: sn, ExpCmdSN: exp, MaxCmdSN: mx, ExpDataSN: dataSN + o.dataSN,
	}
	if o.failed {
		r.Response = iscsi.ResponseTargetFailure
	}
	r.Encode(c.w.Begin())
	return c.w.End(nil, o.data)
}

func (c *conn) onSNACK(b *iscsi.BHS) error {
	if !c.keeps {
		return &iscsi.ProtocolError{Reason: iscsi.RejectSNACK, Opcode: iscsi.OpSNACK, Why: "error recovery level is 0"}
	}
	p := &iscsi.SNACK{}
	if err := p.Decode(b); err != nil {
		return err
	}
	c.log.Debug("SNACK", zap.Uint8("type", uint8(p.Type)), zap.Uint32("itt", p.ITT), zap.Uint32("from", p.BegRun), zap.Uint32("run", p.RunLength))
	if p.Type == iscsi.SNACKData {
		if why, mine := c.snackR2T(p); mine {
			if why != 0 {
				c.reject(b, why)
			}
			return nil
		}
	}
	h := *b
	// What was sent is known to who encodes: it answers in its turn.
	c.queue(response{snack: p, pdu: nil, header: &h})
	return nil
}

// snackR2T sends R2Ts of a command again that are outstanding. mine tells that the
// SNACK is of a command that still waits for its data.
func (c *conn) snackR2T(p *iscsi.SNACK) (why iscsi.RejectReason, mine bool) {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[p.ITT]
	if t == nil || t.c != c || t.aborted {
		return 0, false
	}
	if !t.write || p.BegRun == 0 && p.RunLength == 0 && len(t.r2ts) == 0 {
		// A command at work has sent nothing that could be lost.
		if p.BegRun != 0 || p.RunLength != 0 {
			return iscsi.RejectProtocolError, true
		}
		return 0, true
	}
	last := t.r2tSN
	if p.RunLength != 0 {
		last = p.BegRun + p.RunLength
	}
	if last < p.BegRun || last > t.r2tSN || p.BegRun >= t.r2tSN {
		return iscsi.RejectProtocolError, true // not sent
	}
	for _, r := range t.r2ts {
		if r.sn >= p.BegRun && r.sn < last {
			c.queue(response{pdu: r.pdu(t)})
			s.stats.retransmits.Add(1)
		}
	}
	return 0, true
}

func (r *r2t) pdu(t *task) *iscsi.R2T {
	return &iscsi.R2T{LUN: t.wireLUN, ITT: t.itt, TTT: r.ttt, R2TSN: r.sn, Offset: r.off, Length: r.length}
}

var errSegment = errors.New("the initiator takes shorter segments now")

// resend answers a SNACK out of what is kept. flushing is held.
func (c *conn) resend(o *response, exp, mx iscsi.Serial) error {
	p := o.snack
	why, err := c.resendRun(p, exp, mx)
	if errors.Is(err, errSegment) {
		why, err = iscsi.RejectProtocolError, nil
	}
	if err != nil || why == 0 {
		return err
	}
	c.s.stats.rejects.Add(1)
	r := &iscsi.Reject{Reason: why, StatSN: c.stat(), ExpCmdSN: exp, MaxCmdSN: mx}
	for i := range c.kept {
		if k := &c.kept[i]; k.o.scsi && k.o.itt == p.ITT {
			r.DataSN = uint32(len(k.segs)) // the next one (RFC 7143 11.17.3)
		}
	}
	q := response{pdu: r, data: slices.Clone(o.header[:])}
	r.Encode(c.w.Begin())
	if err := c.w.End(nil, q.data); err != nil {
		return err
	}
	c.keep(r.StatSN, &q, kept{})
	return nil
}

func (c *conn) resendRun(p *iscsi.SNACK, exp, mx iscsi.Serial) (iscsi.RejectReason, error) {
	if p.Type == iscsi.SNACKStatus {
		return c.resendStatus(p, exp, mx)
	}
	i := slices.IndexFunc(c.kept, func(k kept) bool {
		if p.Type == iscsi.SNACKDataACK {
			return k.ttt != 0 && k.ttt == p.TTT
		}
		return k.o.scsi && k.o.itt == p.ITT
	})
	if p.Type == iscsi.SNACKDataACK {
		switch {
		case i < 0 && p.TTT != 0 && p.TTT <= c.nextTTT.Load(): // its status was acknowledged meanwhile
		case i < 0, p.RunLength != 0, int64(p.BegRun) > int64(len(c.kept[i].segs)):
			return iscsi.RejectInvalidDataACK, nil
		default:
			c.kept[i].acked = max(c.kept[i].acked, int(p.BegRun))
		}
		return 0, nil
	}
	if i < 0 {
		return iscsi.RejectProtocolError, nil // acknowledged, or never sent
	}
	k := &c.kept[i]
	if len(k.o.in) == 0 && len(k.segs) > 0 {
		return iscsi.RejectSNACK, nil // there was no room to keep it
	}
	first, last := int(p.BegRun), len(k.segs)
	if p.Type == iscsi.SNACKRData {
		if p.BegRun != 0 || p.RunLength != 0 || p.TTT == 0 || p.TTT == iscsi.ReservedTag {
			return iscsi.RejectProtocolError, nil
		}
		// Cut anew for what the initiator takes now, from what it has acknowledged on.
		first = k.acked
		off := 0
		if first > 0 {
			off = k.segs[first-1].off + k.segs[first-1].n
		}
		k.segs = segments(k.segs[:first:first], off, len(k.o.in), c.w.MaxData, c.s.params.MaxBurstLength)
		k.tag = p.TTT
		last = len(k.segs)
	} else {
		if p.BegRun == 0 && p.RunLength == 0 {
			first = k.acked
		} else if p.RunLength != 0 {
			last = int(min(int64(p.BegRun)+int64(p.RunLength), 1<<30))
		}
		if last > len(k.segs) || first >= last && len(k.segs) > 0 || first < k.acked {
			return iscsi.RejectProtocolError, nil
		}
	}
	for n := first; n < last; n++ {
		if k.segs[n].n > c.w.MaxData {
			return 0, errSegment // it has to ask with R-Data
		}
		if err := c.encodeSegment(&k.o, k, n, exp, mx); err != nil {
			return 0, err
		}
		c.s.stats.retransmits.Add(1)
	}
	if p.Type == iscsi.SNACKRData {
		// Only a response with this tag counts from here on (RFC 7143 11.4.5.3).
		return 0, c.encodeStatus(&k.o, k.sn, uint32(len(k.segs)), k.tag, exp, mx)
	}
	return 0, nil
}

func (c *conn) resendStatus(p *iscsi.SNACK, exp, mx iscsi.Serial) (iscsi.RejectReason, error) {
	acked := iscsi.Serial(c.acked.Load())
	first, end := iscsi.Serial(p.BegRun), c.statSN
	if p.BegRun == 0 && p.RunLength == 0 {
		first = acked
	} else if p.RunLength != 0 {
		if end = first.Add(p.RunLength); c.statSN.Less(end) || p.RunLength > 1<<30 {
			return iscsi.RejectProtocolError, nil
		}
	}
	if first.Less(acked) || c.statSN.Less(first) {
		return iscsi.RejectProtocolError, nil
	}
	if first == end {
		return 0, nil
	}
	if len(c.kept) == 0 || first.Less(c.kept[0].sn) {
		return iscsi.RejectSNACK, nil // was let go
	}
	for i := range c.kept {
		k := &c.kept[i]
		if k.sn.Less(first) || !k.sn.Less(end) {
			continue
		}
		c.s.stats.retransmits.Add(1)
		if k.o.scsi {
			if err := c.encodeStatus(&k.o, k.sn, uint32(len(k.segs)), k.tag, exp, mx); err != nil {
				return 0, err
			}
			continue
		}
		h := c.w.Begin()
		renumber(k.o.pdu, k.sn, exp, mx)
		k.o.pdu.Encode(h)
		if err := c.w.End(nil, k.o.data); err != nil {
			return 0, err
		}
	}
	return 0, nil
}

// renumber gives a PDU of a target its numbers.
func renumber(p iscsi.PDU, stat, exp, mx iscsi.Serial) {
	switch p := p.(type) {
	case *iscsi.R2T:
		p.StatSN, p.ExpCmdSN, p.MaxCmdSN = stat, exp, mx
	case *iscsi.NopIn:
		p.StatSN, p.ExpCmdSN, p.MaxCmdSN = stat, exp, mx
	case *iscsi.TaskMgmtResponse:
		p.StatSN, p.ExpCmdSN, p.MaxCmdSN = stat, exp, mx
	case *iscsi.TextResponse:
		p.StatSN, p.ExpCmdSN, p.MaxCmdSN = stat, exp, mx
	case *iscsi.LogoutResponse:
		p.StatSN, p.ExpCmdSN, p.MaxCmdSN = stat, exp, mx
	case *iscsi.Async:
		p.StatSN, p.ExpCmdSN, p.MaxCmdSN = stat, exp, mx
	case *iscsi.Reject:
		p.StatSN, p.ExpCmdSN, p.MaxCmdSN = stat, exp, mx
	}
}

// dataLost tells whether an error is a data digest error that the level can recover.
func (c *conn) dataLost(err error) bool { return c.keeps && errors.Is(err, iscsi.ErrDataDigest) }

// lose notes data of the command that have to be asked for again. s.mu is held.
func (t *task) lose(off, n int) {
	if off < t.want {
		t.holes = append(t.holes, r2t{off: uint32(off), length: uint32(min(n, t.want-off))})
		t.recoveries++
	}
}
