package initiator

import (
	"errors"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
)

// Error recovery level 1 (RFC 7143 section 7): what came with a wrong data digest is
// asked for again with a SNACK, and what the target got with one is sent again. A
// header digest error ends the connection at every level.

// maxSNACKs bounds how often data of one command, or statuses of one connection
// without one that comes whole, are asked for.
const maxSNACKs = 256

// recovery is what the reader knows of a command whose Data-In are not all there.
type recovery struct {
	missing []uint32 // DataSN that were asked for again
	snacks  int
	held    bool // res is its status, with StatSN stat, and waits for them
	res     Result
	stat    iscsi.Serial
	wantAck bool // the target asked for a DataACK
	ackTTT  uint32
	ackLUN  iscsi.LUN
}

// statuses are the StatSN of a connection. What is in lost or held, or comes after it,
// is not acknowledged: the target could not send it again.
type statuses struct {
	next   iscsi.Serial // after the highest that was seen
	lost   map[iscsi.Serial]bool
	held   map[iscsi.Serial]heldStatus
	snacks int
}

type heldStatus struct {
	t   *task
	gen uint16
}

func (l *link) recovers() bool { return l.s.p.ErrorRecoveryLevel > 0 }

// lost tells whether an error is a loss that is recovered.
func (l *link) lost(err error) bool { return l.recovers() && errors.Is(err, iscsi.ErrDataDigest) }

func (l *link) push(w work) {
	l.s.mu.Lock()
	l.mu.urgent.push(w)
	l.s.mu.Unlock()
	l.kick()
}

// numbers takes StatSN and the window. advance says that the PDU used a StatSN up,
// which has to be the next one; where losses are recovered those in between are asked
// for, and fresh is false for one that came before.
func (l *link) numbers(op iscsi.Opcode, stat, exp, mx iscsi.Serial, advance bool) (fresh bool, err error) {
	fresh = true
	if advance {
		st := &l.statuses
		switch {
		case stat == st.next:
			st.next++
			st.snacks = 0
		case !l.recovers():
			return false, broke("%s has StatSN %d, want %d", op, stat, st.next)
		case st.next.Less(stat):
			if err := l.lose(st.next, stat); err != nil {
				return false, err
			}
			st.next = stat.Add(1)
		case st.lost[stat]:
			delete(st.lost, stat)
		default:
			fresh = false
		}
		l.acknowledge()
	}
	l.windowLocking(exp, mx)
	return fresh, nil
}

// lose notes [from, to) as lost and asks for it.
func (l *link) lose(from, to iscsi.Serial) error {
	st := &l.statuses
	n := to.Diff(from)
	if st.snacks++; st.snacks > maxSNACKs || n < 1 || n > 4096 {
		return broke("StatSN %d to %d are missing, asked for something %d times", from, to, st.snacks)
	}
	if st.lost == nil {
		st.lost = map[iscsi.Serial]bool{}
	}
	for sn := from; sn != to; sn++ {
		st.lost[sn] = true
	}
	l.s.cfg.Logger.Debug("status is asked for again", zap.Uint32("stat_sn", uint32(from)), zap.Int32("n", n))
	l.push(work{pdu: &iscsi.SNACK{Type: iscsi.SNACKStatus, ITT: iscsi.ReservedTag, TTT: iscsi.ReservedTag, BegRun: uint32(from), RunLength: uint32(n)}})
	return nil
}

// lostPDU is a PDU other than Data-In whose data segment was wrong: its header is
// right, and if it has a StatSN it is asked for again.
func (l *link) lostPDU(h *iscsi.BHS) error {
	if h.Opcode() == iscsi.OpNopIn && h.ITT() == iscsi.ReservedTag {
		return nil
	}
	stat := h.CmdSN() // StatSN stands where requests have CmdSN
	st := &l.statuses
	switch {
	case stat == st.next:
		st.next++
	case st.next.Less(stat):
		if err := l.lose(st.next, stat); err != nil {
			return err
		}
		st.next = stat.Add(1)
	case !st.lost[stat]:
		return nil
	}
	return l.lose(stat, stat.Add(1))
}

// acknowledge moves ExpStatSN as far as nothing is missing.
func (l *link) acknowledge() {
	st := &l.statuses
	ack := st.next
	for sn := range st.lost {
		if sn.Less(ack) {
			ack = sn
		}
	}
	if len(st.held) > 0 {
		l.s.mu.Lock()
		for sn, h := range st.held {
			if h.t.mu.gen != h.gen || h.t.mu.state != taskSent { // it was aborted
				delete(st.held, sn)
			} else if sn.Less(ack) {
				ack = sn
			}
		}
		l.s.mu.Unlock()
	}
	l.expStatSN.Store(uint32(ack))
}

// hold keeps the status of a command whose data are not complete from being
// acknowledged.
func (l *link) hold(t *task, stat iscsi.Serial) {
	st := &l.statuses
	if st.held == nil {
		st.held = map[iscsi.Serial]heldStatus{}
	}
	st.held[stat] = heldStatus{t, t.mu.gen}
	t.stat = stat
}

// askData asks for the Data-In from the next one expected up to end.
func (l *link) askData(t *task, end uint32) error {
	from := t.dataSN
	if end-from > 1<<16 {
		return broke("Data-In %d to %d are missing", from, end)
	}
	for sn := from; sn < end; sn++ {
		t.missing = append(t.missing, sn)
	}
	return l.snackData(t, from, end-from)
}

func (l *link) snackData(t *task, from, n uint32) error {
	if t.snacks++; t.snacks > maxSNACKs {
		return broke("data of one command were asked for %d times", t.snacks)
	}
	l.s.cfg.Logger.Debug("data are asked for again", zap.Uint32("itt", t.cmd.ITT), zap.Uint32("data_sn", from), zap.Uint32("n", n))
	l.push(work{pdu: &iscsi.SNACK{Type: iscsi.SNACKData, LUN: t.lun, ITT: t.cmd.ITT, TTT: iscsi.ReservedTag, BegRun: from, RunLength: n}})
	return nil
}

// status ends a command, or keeps its status until its data are there.
func (l *link) status(t *task, r Result) error {
	if len(t.missing) == 0 {
		return l.complete(t, r)
	}
	t.held, t.res = true, r
	return nil
}

// settle ends a command whose status came before its data.
func (l *link) settle(t *task) error {
	if !t.held || len(t.missing) > 0 {
		return nil
	}
	t.held = false
	delete(l.statuses.held, t.stat)
	l.acknowledge()
	return l.complete(t, t.res)
}

// take is find of a task whose buffer the reader fills: it stays the session's until
// put.
func (l *link) take(itt uint32) *task {
	s := l.s
	slot := int(itt & 0xffff)
	if slot >= len(s.slots) {
		return nil
	}
	t := s.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.mu.state != taskSent || t.mu.gen != uint16(itt>>16) || t.mu.link != l {
		return nil
	}
	t.mu.reading = true
	return t
}

func (l *link) put(t *task) {
	l.s.mu.Lock()
	t.mu.reading = false
	if t.mu.state == taskDone && !t.mu.writing {
		l.s.tokenLocked(t)
	}
	l.s.mu.Unlock()
}

// sendAgain sends what the target got with a wrong data digest: a command whole, with
// its CmdSN. Data-Out it asks for by itself.
func (l *link) sendAgain(bad *iscsi.BHS) error {
	s := l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	switch bad.Opcode() {
	case iscsi.OpScsiCommand:
		if slot := int(bad.ITT() & 0xffff); slot < len(s.slots) {
			t := s.slots[slot]
			if t.mu.state == taskSent && t.mu.gen == uint16(bad.ITT()>>16) && t.mu.link == l {
				l.mu.urgent.push(work{t: t, gen: t.mu.gen, cmd: true})
			}
		}
	case iscsi.OpDataOut:
	default:
		if c := s.mu.ctl[bad.ITT()]; c != nil {
			l.mu.urgent.push(work{pdu: c.pdu, data: c.out})
		}
	}
	l.kick()
	return nil
}
