package target

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// taskState is where a task is. It only grows.
type taskState uint8

const (
	stateReceive taskState = iota // its Data-Out is not complete, or it waits for its turn
	stateQueue                    // complete, in the range queue
	stateRun                      // may be in the backend
	stateDone
)

// task is a SCSI command.
type task struct {
	s         *session
	c         *conn
	itt       uint32
	cmdSN     iscsi.Serial
	immediate bool
	final     bool // no unsolicited Data-Out follows
	read      bool
	write     bool
	edtl      uint32
	wireLUN   iscsi.LUN
	attr      iscsi.Attr
	wave      *wave // its place in the task set, nil = none; set once, at its turn
	turn      taskTurn

	ent *entry       // nil: no such LUN
	lu  *logicalUnit // of ent
	cdb scsi.CDB
	bad error // of CDB decoding
	h   *handler

	st    *ioStats // counts it
	since int64    // ns since the server's start, when it was read off the connection

	// Data-Out. buf holds the first want bytes of what the initiator sends; the
	// rest up to edtl is received and dropped.
	buf     *block.Buf
	want    int
	full    bool  // there was no room for its data: TASK SET FULL
	held    int64 // bytes of the server's budget
	arrived int   // bytes of [0, edtl) received in order, lost ones included
	next    int   // where the next unsolicited data belong
	unsolSN uint32
	r2ts    []r2t // outstanding
	holes   []r2t // lost to a digest error and not asked for again yet
	again   int   // R2Ts outstanding that ask again
	r2tSN   uint32
	asked   int  // bytes up to which R2Ts were sent
	due     bool // the command has had its turn (deliver ran)
	missing bool // at its turn there were data to come
	// recoveries counts the losses.
	recoveries int
	verdict    *outcome

	x      exec // of run
	lock   rangeLock
	locked bool
	pooled bool // runs on a worker of the pool

	// Guarded by s.mu, and so are the data phase above from full to verdict: the turn
	// of a command may come on the reader of another connection.
	state   taskState
	aborted bool
	reading bool // the connection's reader copies into buf
	ends    []func()
	onAbort func()
}

type r2t struct {
	ttt, sn     uint32 // target transfer tag, R2TSN
	again       bool   // asks for what was lost
	off, length uint32
	got         uint32
	dataSN      uint32
}

// outcome is how a command ends.
type outcome struct {
	status scsi.Status
	sense  *scsi.Sense
	data   []byte     // data-in
	buf    *block.Buf // that data lies in, or nil
	moved  uint64     // bytes that the CDB asks for, when more than data holds
}

// maxTransfer is the largest data phase of one command in bytes, as VPD page B0
// says it.
const maxTransfer = 32 << 20

// maxTombs bounds the tags that are remembered for stray Data-Out.
const maxTombs = 4096

func (c *conn) onCommand(b *iscsi.BHS) error {
	var p iscsi.ScsiCommand
	if err := p.Decode(b); err != nil {
		return err
	}
	if err := p.DecodeAHS(c.r.AHS()); err != nil {
		return err
	}
	s := c.s
	imm := c.r.DataLen()
	if !p.Immediate && !s.inWindow(p.CmdSN) {
		return c.r.DiscardData() // §4.2.2.1: silently
	}
	perr := func(why string) error {
		return &iscsi.ProtocolError{Reason: iscsi.RejectProtocolError, Opcode: iscsi.OpScsiCommand, Fatal: true, Why: why}
	}
	switch {
	case imm > 0 && !p.Write:
		return perr("data segment in a command that does not write")
	case uint32(imm) > p.EDTL:
		return perr("immediate data exceed the expected data transfer length")
	case imm > 0 && !s.params.ImmediateData:
		return perr("immediate data were negotiated off")
	case imm > s.params.FirstBurstLength:
		return perr("immediate data exceed FirstBurstLength")
	case !p.Final && s.params.InitialR2T:
		return perr("unsolicited data were negotiated off")
	}
	t := c.newTask()
	*t = task{
		s: s, c: c, itt: p.ITT, immediate: p.Immediate, final: p.Final, read: p.Read, write: p.Write, edtl: p.EDTL, wireLUN: p.LUN, attr: p.Attr,
		since: c.lastRead.Load(),
	}
	t.prepare(&p)
	if ok, tooMany := s.add(t); !ok {
		c.srv.unreserve(t.held)
		t.buf.Free()
		if tooMany {
			return &iscsi.ProtocolError{Reason: iscsi.RejectTooManyImmediate, Opcode: iscsi.OpScsiCommand, Why: "too many immediate commands"}
		}
		return &iscsi.ProtocolError{Reason: iscsi.RejectTaskInProgress, Opcode: iscsi.OpScsiCommand, Why: "initiator task tag is in use"}
	}
	// The map may have changed since prepare looked. From here on a change finds the
	// task in its session and aborts it.
	if t.ent != nil && s.tgt.entry(t.ent.num) != t.ent {
		t.ent, t.lu, t.want = nil, nil, 0
	}
	if imm > 0 {
		s.mu.Lock()
		if err := t.receive(0, imm); err != nil {
			// The initiator sends the whole command again (RFC 7143 7.8); what follows
			// this one is of no use.
			if c.dataLost(err) {
				c.bury(t.itt)
			}
			s.mu.Unlock()
			if c.dataLost(err) {
				t.end()
			}
			return err
		}
		t.arrived, t.next = imm, imm
		s.mu.Unlock()
	}
	taken, run := s.order(turn{c: c, t: t}, p.CmdSN, p.Immediate)
	if !taken {
		t.end()
	}
	if run != nil {
		return c.inline(run)
	}
	return nil
}

// newTask returns a zero task. Tasks are allocated by the dozen and left to the
// collector: who may still look at one that has ended (a reader in its data, an abort)
// would make reuse a risk.
func (c *conn) newTask() *task {
	if len(c.tasks) == 0 {
		c.tasks = make([]task, 16)
	}
	t := &c.tasks[0]
	c.tasks = c.tasks[1:]
	return t
}

// prepare finds the logical unit and decodes the CDB: what does not depend on
// the order of commands.
func (t *task) prepare(p *iscsi.ScsiCommand) {
	if n, ok := p.LUN.Number(); ok {
		if t.ent = t.s.tgt.entry(scsi.LUN(n)); t.ent != nil {
			t.lu = t.ent.lu
		}
	}
	t.cdb, t.bad = scsi.Decode(p.CDB[:])
	if t.bad == nil {
		t.h = handlers[t.cdb.Cmd]
	}
	if t.bad != nil || t.h == nil || t.lu == nil || !t.write || t.cdb.Direction() != scsi.DirOut {
		return
	}
	n := min(t.cdb.TransferLength(t.lu.blockSize()), uint64(t.edtl))
	if t.cdb.Cmd.Xfer == scsi.XferFormat {
		n = uint64(t.edtl)
	}
	if n > maxTransfer {
		return // refused by deliver
	}
	if t.full = !t.c.srv.reserve(int64(n)); t.full {
		return
	}
	t.want, t.held = int(n), int64(n)
	if n > 0 {
		t.buf = block.Get(t.want)
	}
}

// receive reads n bytes of the current data segment to offset off, dropping what
// lies behind want. It runs on the connection's reader; s.mu is held at call and
// return and not meanwhile.
func (t *task) receive(off, n int) error {
	keep := 0
	if !t.aborted && t.state == stateReceive {
		keep = min(n, max(0, t.want-off))
		t.reading = true
	}
	t.s.mu.Unlock()
	var err error
	if keep > 0 {
		err = t.c.r.ReadData(t.buf.B[off : off+keep])
	}
	if err == nil {
		err = t.c.r.DiscardData()
	}
	t.s.mu.Lock()
	t.reading = false
	if t.aborted && t.state == stateReceive {
		t.s.mu.Unlock()
		t.end()
		t.s.mu.Lock()
	}
	return err
}

// gone tells whether the task was aborted or has ended.
func (t *task) gone() bool {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	return t.aborted || t.state == stateDone
}

// deliver gives the command to the device server, in order of CmdSN. own says that
// the caller is the reader of its connection and may run it: then it is returned.
func (t *task) deliver(own bool) (run *task) {
	s := t.s
	s.mu.Lock()
	if t.aborted || t.state == stateDone {
		s.mu.Unlock()
		return nil
	}
	t.missing = t.want > t.arrived || len(t.holes) > 0
	s.mu.Unlock()
	o := t.check()
	s.mu.Lock()
	t.due = true
	if t.verdict == nil {
		t.verdict = o
	}
	if t.verdict != nil {
		t.want = 0
	} else if t.lu != nil && !t.aborted && t.state != stateDone {
		t.lu.order.join(t)
	}
	if t.reading { // by the reader, which goes on with it
		s.mu.Unlock()
		return nil
	}
	return t.advance(own)
}

// unsolicitedEnd is the offset at which unsolicited data end.
func (t *task) unsolicitedEnd() int {
	return int(min(uint64(t.edtl), uint64(t.s.params.FirstBurstLength)))
}

// advance does what is next for a task that has had its turn: wait for
// unsolicited data, ask for more, or go on to the range queue. s.mu is held at call
// and not at return.
func (t *task) advance(own bool) (run *task) {
	s := t.s
	switch {
	case !t.due || !t.final || t.aborted || t.state != stateReceive:
		s.mu.Unlock()
	case t.verdict != nil:
		s.mu.Unlock()
		t.respond(*t.verdict)
	case t.arrived < t.want || len(t.holes) > 0 || t.again > 0:
		t.ask()
		s.mu.Unlock()
	default:
		return t.ready(own)
	}
	return nil
}

// ask sends R2Ts as far as allowed.
func (t *task) ask() {
	p := &t.s.params
	t.asked = max(t.asked, t.next)
	send := func(r r2t) {
		r.ttt, r.sn = t.c.ttt(), t.r2tSN
		t.r2tSN++
		t.r2ts = append(t.r2ts, r)
		t.c.queue(response{pdu: r.pdu(t)})
	}
	for len(t.r2ts) < p.MaxOutstandingR2T && len(t.holes) > 0 { // recovery R2Ts (RFC 7143 7.8)
		t.again++
		send(r2t{again: true, off: t.holes[0].off, length: t.holes[0].length})
		t.holes = slices.Delete(t.holes, 0, 1)
	}
	for len(t.r2ts) < p.MaxOutstandingR2T && t.asked < t.want {
		n := min(t.want-t.asked, p.MaxBurstLength)
		send(r2t{off: uint32(t.asked), length: uint32(n)})
		t.asked += n
	}
}

// bury lets stray Data-Out of a task that ended early pass silently. s.mu is held.
func (c *conn) bury(itt uint32) {
	if len(c.tombs) >= maxTombs {
		clear(c.tombs)
	}
	c.tombs[itt] = struct{}{}
}

func (c *conn) onDataOut(b *iscsi.BHS) error {
	var p iscsi.DataOut
	if err := p.Decode(b); err != nil {
		return err
	}
	s := c.s
	n := c.r.DataLen()
	s.mu.Lock()
	t := s.tasks[p.ITT]
	if t == nil || t.aborted || t.c != c {
		_, known := c.tombs[p.ITT]
		s.mu.Unlock()
		if known || t != nil && t.c == c {
			return c.r.DiscardData()
		}
		return &iscsi.ProtocolError{Reason: iscsi.RejectInvalidField, Opcode: iscsi.OpDataOut, Why: "no such task on this connection"}
	}
	if t.state != stateReceive || t.verdict != nil && !t.due {
		// More than it needs, or of a task that is lost: nothing is stored.
		s.mu.Unlock()
		return c.r.DiscardData()
	}
	i, code, why := t.place(&p, n)
	if why != "" {
		// A sequence that is wrong ends the task at once, and what still comes for it
		// is dropped: it must never be GOOD and never hang.
		c.bury(t.itt)
		t.final = true
		t.verdict = &outcome{status: scsi.StatusCheckCondition, sense: scsi.Check(scsi.AbortedCommand, code)}
		c.log.Warn("bad Data-Out", zap.String("why", why), zap.Uint32("itt", p.ITT), zap.Uint32("ttt", p.TTT),
			zap.Uint32("data_sn", p.DataSN), zap.Uint32("offset", p.Offset), zap.Int("length", n))
		t.advance(true) // unlocks; with a verdict there is nothing to run
		return c.r.DiscardData()
	}
	lost := t.receive(int(p.Offset), n)
	if lost != nil && !c.dataLost(lost) {
		s.mu.Unlock()
		return lost
	}
	if lost != nil {
		s.countProtocol(lost)
		c.reject(b, iscsi.RejectDataDigest) // before the R2T that asks again
		t.lose(int(p.Offset), n)
		if t.recoveries > maxRecoveries && t.verdict == nil {
			c.bury(t.itt)
			t.final = true
			t.verdict = &outcome{status: scsi.StatusCheckCondition, sense: scsi.Check(scsi.AbortedCommand, scsi.ASCProtocolCRC)}
		}
	}
	if i < 0 {
		t.arrived += n
		t.next += n
		t.unsolSN++
		t.final = p.Final
	} else {
		r := &t.r2ts[i]
		if !r.again {
			t.arrived += n
		}
		r.got += uint32(n)
		r.dataSN++
		if p.Final {
			if r.again {
				t.again--
			}
			t.r2ts = append(t.r2ts[:i], t.r2ts[i+1:]...)
		}
	}
	if run := t.advance(true); run != nil {
		return c.inline(run)
	}
	return nil
}

// place says where a Data-Out of n bytes belongs: to the R2T with index i, or to the
// unsolicited data where i is -1; or why it is wrong. s.mu is held.
func (t *task) place(p *iscsi.DataOut, n int) (i int, code scsi.ASC, why string) {
	wrong := func(code scsi.ASC, why string) (int, scsi.ASC, string) { return 0, code, why }
	if p.TTT == iscsi.ReservedTag {
		end := t.unsolicitedEnd()
		switch {
		case t.final:
			return wrong(scsi.ASCUnexpectedUnsolicited, "unsolicited data after the final bit")
		case p.DataSN != t.unsolSN:
			return wrong(scsi.ASCDataPhase, "DataSN is out of order")
		case uint64(p.Offset) != uint64(t.next):
			return wrong(scsi.ASCDataOffset, "buffer offset is out of order")
		case uint64(p.Offset)+uint64(n) > uint64(end):
			return wrong(scsi.ASCTooMuchWriteData, "unsolicited data exceed FirstBurstLength or the expected length")
		case p.Final && t.next+n < end && t.next+n < t.want && t.verdict == nil:
			// §11.3.1: with F=0 the initiator sends FirstBurstLength bytes or all.
			return wrong(scsi.ASCNotEnoughUnsolicited, "unsolicited data end early")
		case !p.Final && t.next+n >= end:
			return wrong(scsi.ASCDataPhase, "the final bit is missing at the end of the first burst")
		}
		return -1, 0, ""
	}
	i = slices.IndexFunc(t.r2ts, func(r r2t) bool { return r.ttt == p.TTT })
	if i < 0 {
		return wrong(scsi.ASCInvalidTTT, "target transfer tag is not outstanding")
	}
	r := &t.r2ts[i]
	switch {
	case p.LUN != t.wireLUN:
		return wrong(scsi.ASCDataPhase, "LUN differs from the command's")
	case p.DataSN != r.dataSN:
		return wrong(scsi.ASCDataPhase, "DataSN is out of order")
	case uint64(p.Offset) != uint64(r.off)+uint64(r.got):
		return wrong(scsi.ASCDataOffset, "buffer offset is out of order")
	case uint64(r.got)+uint64(n) > uint64(r.length):
		return wrong(scsi.ASCTooMuchWriteData, "more data than the R2T asked for")
	case p.Final != (r.got+uint32(n) == r.length):
		return wrong(scsi.ASCDataPhase, "the final bit does not stand at the end of the sequence")
	}
	return i, 0, ""
}

// ready queues a complete command behind those it overlaps, or runs it, or returns
// it to be run on the reader. s.mu is held at call and not at return.
func (t *task) ready(own bool) (run *task) {
	t.state = stateQueue
	if t.lu != nil && !t.lu.order.enter(t) {
		t.s.mu.Unlock()
		return nil
	}
	return t.lockRange(own)
}

// lockRange is ready behind the order of tasks.
func (t *task) lockRange(own bool) (run *task) {
	s := t.s
	granted := true
	if lo, hi, excl, need := t.span(); need {
		t.lock = rangeLock{lo: lo, hi: hi, excl: excl, t: t}
		t.locked = true
		granted = t.lu.ranges.add(&t.lock)
	} else {
		t.lock.granted = true
	}
	s.mu.Unlock()
	if !granted {
		return nil
	}
	if t.lu == nil {
		t.run(context.Background())
		return nil
	}
	if t.h.unlocked {
		// It waits for ranges while it runs: on a worker it could wait for a command
		// that waits for the worker.
		t.pooled = true
		t.lu.background(t.run)
		return nil
	}
	// In place when the backend does not wait, or hardly and nothing else waits for
	// this goroutine; else the pool keeps the reader free and the disk busy.
	lat := t.lu.latency.Load()
	if t.h.memory && own { // only its gate can hold it up
		return t
	}
	if !t.h.slow && !t.h.memory && own && (lat < 20_000 || lat < 200_000 && t.c.src.Buffered() < iscsi.BHSLen && !t.lu.pool.busy()) {
		return t
	}
	t.lu.pool.submit(t)
	return nil
}

// span is the range of blocks that the command locks.
func (t *task) span() (lo, hi uint64, excl, need bool) {
	if t.lu == nil || t.h.memory || t.h.unlocked {
		return 0, 0, false, false
	}
	switch t.cdb.Cmd.Effect {
	case scsi.EffectRead:
	case scsi.EffectWrite:
		excl = true
	default:
		return 0, 0, false, false
	}
	if t.h.whole || !t.cdb.Cmd.Has(scsi.FLBA) {
		return 0, wholeUnit, excl, true
	}
	lo = t.cdb.LBA()
	n := t.cdb.Blocks()
	if n == 0 {
		return lo, wholeUnit, excl, true // to the end, where 0 means that
	}
	return lo, lo + n, excl, true
}

var errAborted = errors.New("task was aborted")

// gateOp is the class of a command at the gate.
func gateOp(c *scsi.Command) Op {
	switch {
	case c.Op == scsi.OpReadCapacity10, c.Op == scsi.OpServiceActionIn16 && c.SA == scsi.SAReadCapacity16:
		return OpInquire // answered in every access state (facts/ha.md §4.1)
	}
	switch c.Effect {
	case scsi.EffectRead, scsi.EffectState:
		return OpRead
	case scsi.EffectWrite:
		return OpWrite
	case scsi.EffectFlush:
		return OpFlush
	case scsi.EffectReserve:
		return OpReserve
	case scsi.EffectConfig:
		return OpConfig
	}
	return OpInquire
}

// holdLimit is how long a command is held by a gate without a verdict before it
// is told to come back (facts/ha.md §4.1: hold 500 ms, then in transition).
const holdLimit = 500 * time.Millisecond

// enter asks the gate, holding the command while it is unsure.
func (t *task) enter(in Incarnation, op Op) error { return t.enterUnit(t.lu, in, op) }

func (t *task) enterUnit(u *logicalUnit, in Incarnation, op Op) error {
	err := u.gate.Enter(in, op)
	for end := time.Now().Add(holdLimit); errors.Is(err, ErrUnsure); {
		if t.gone() {
			return errAborted
		}
		if time.Now().After(end) {
			return ErrNotReady
		}
		time.Sleep(5 * time.Millisecond)
		err = u.gate.Enter(in, op)
	}
	return err
}

// run executes the command and answers. It is called once, after the range was
// granted.
func (t *task) run(ctx context.Context) {
	s := t.s
	s.mu.Lock()
	if t.aborted {
		s.mu.Unlock()
		t.end()
		return
	}
	t.state = stateRun
	s.mu.Unlock()
	t.x = exec{task: t, ctx: ctx}
	x := &t.x
	if t.lu == nil {
		t.respond(x.outcome(t.h.run(x)))
		return
	}
	op := gateOp(t.cdb.Cmd)
	in := s.incarnation(t.lu)
	err := t.enter(in, op)
	if err == nil {
		// Again, because a reservation may have changed while the command waited
		// for its data or its range (SAFETY §4).
		if t.lu.res.Conflicts(s.nexus, t.cdb.Conflict()) {
			err = errConflict
		} else if bad := t.mediumReady(t.cdb.Cmd); bad != nil {
			err = bad
		} else {
			begin := t.c.srv.now()
			err = t.h.run(x)
			if t.cdb.Cmd.Effect == scsi.EffectWrite {
				t.lu.wrote(s)
			}
			if !t.h.memory && !t.h.slow {
				t.lu.observe(t.c.srv.now()-begin, max(len(x.data), t.want))
			}
		}
		if e := t.lu.gate.Leave(in, op); e != nil {
			err = unsaid(err, e)
		}
	}
	switch {
	case errors.Is(err, errAborted):
		t.end()
	case errors.Is(err, ErrReset), errors.Is(err, block.ErrFenced):
		x.drop()
		t.end()
		s.end(fmt.Errorf("%s on lun %d: %w", t.cdb.Cmd, t.ent.num, err))
	default:
		o := x.outcome(err)
		if s := o.sense; err != nil && s != nil && (s.Key == scsi.MediumError || s.Key == scsi.HardwareError || s.Code == scsi.ASCSpaceAllocationFailed) {
			t.storeFailed(err)
		}
		t.respond(o)
	}
}

// unsaid is what becomes of a command that ended with err when the gate says with e
// that its status may not be sent. What had no effect keeps its reason, unless the
// session is reset anyway; what may have had one is never "not ready".
func unsaid(err, e error) error {
	switch {
	case errors.Is(err, ErrReset):
		return err
	case !errors.Is(e, ErrUnsure):
		return e
	case errors.Is(err, ErrNotReady), errors.Is(err, ErrStandby), errors.Is(err, ErrUnavailable):
		return err
	}
	return fmt.Errorf("%w: its outcome may not be told: %w", ErrReset, e)
}

// finish takes the task out of its session once; it tells whether a response
// may be sent, and what to call afterwards.
//
// With a nil outcome the task ends without a status.
func (t *task) finish(o *outcome) (first, answer bool, ends []func()) {
	s := t.s
	now := s.srv.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.state == stateDone {
		return false, false, nil
	}
	t.state = stateDone
	if s.tasks[t.itt] == t {
		delete(s.tasks, t.itt)
	}
	if t.immediate {
		s.immediate--
	}
	s.running--
	s.srv.unreserve(t.held)
	answer = o != nil && !t.aborted && !s.ended
	// Before the session can end: what it counted is added up then.
	if answer {
		t.account(o, now)
	} else if t.st != nil {
		t.st.aborted.Add(1)
	}
	return true, answer, t.ends
}

// unlock lets go on what waits for the task's range.
func (t *task) unlock() {
	if t.locked {
		if ready := t.lu.ranges.release(&t.lock); len(ready) > 0 {
			t.lu.pool.submit(ready...)
		}
	}
}

// leave lets go on what waits for the task to end (taskOrder). A task has ended when
// its response is on the way: the initiator must not see a later one first (SAM-5
// 8.6.2).
func (t *task) leave() {
	if t.wave == nil {
		return
	}
	for _, r := range t.lu.order.leave(t.wave) {
		r.resume()
	}
}

// end finishes a task without a response.
func (t *task) end() {
	first, _, ends := t.finish(nil)
	if !first {
		return
	}
	t.unlock()
	t.buf.Free()
	t.buf = nil
	t.leave()
	for _, f := range ends {
		f()
	}
}

// respond finishes a task with a response, unless it was aborted.
func (t *task) respond(o outcome) {
	first, answer, ends := t.finish(&o)
	if !first {
		return
	}
	t.unlock()
	if o.buf != t.buf {
		t.buf.Free()
	}
	t.buf = nil
	if answer {
		t.send(o)
		if o.status == scsi.StatusCheckCondition && t.lu != nil {
			t.queueError()
		}
	} else {
		o.buf.Free()
	}
	t.leave()
	for _, f := range ends {
		f()
	}
}

func (t *task) send(o outcome) {
	r := response{scsi: true, itt: t.itt, lun: t.wireLUN, status: uint8(o.status), dataSN: t.r2tSN}
	if o.sense != nil {
		desc := t.lu != nil && t.lu.mode.descriptorSense()
		r.data = iscsi.AppendSense(nil, o.sense.Bytes(desc), nil)
	}
	// Residual (§11.4.5): what the command would move against what the initiator
	// expects to move in that direction.
	var moved uint64
	switch t.dataDirection() {
	case scsi.DirIn:
		n := min(uint64(len(o.data)), uint64(t.edtl))
		moved = max(uint64(len(o.data)), o.moved)
		if !t.read {
			n = 0
			if t.edtl > 0 { // then it is about the other direction, in which nothing moves
				moved = 0
			}
		}
		r.in, r.buf = o.data[:n], o.buf
		if n == 0 {
			o.buf.Free()
			r.buf = nil
		}
	case scsi.DirOut:
		moved = t.transferLength()
		if o.status != scsi.StatusGood && o.status != scsi.StatusConditionMet {
			moved = min(moved, uint64(t.edtl))
		}
	}
	if o.status == scsi.StatusCheckCondition && t.dataDirection() == scsi.DirIn {
		moved = min(moved, uint64(t.edtl))
	}
	switch {
	case moved > uint64(t.edtl):
		r.over, r.residual = true, uint32(min(moved-uint64(t.edtl), 0xFFFFFFFF))
	case moved < uint64(t.edtl):
		r.under, r.residual = true, t.edtl-uint32(moved)
	}
	t.c.queue(r)
	if t.pooled { // the reader flushes by itself, when its input is drained
		t.c.kick()
	}
}

func (t *task) dataDirection() scsi.Direction {
	if t.bad != nil || t.h == nil {
		return scsi.DirNone
	}
	return t.cdb.Direction()
}

func (t *task) transferLength() uint64 {
	if t.lu == nil {
		return 0
	}
	if t.cdb.Cmd.Xfer == scsi.XferFormat {
		return uint64(t.want)
	}
	return t.cdb.TransferLength(t.lu.blockSize())
}

func (c *conn) onTaskMgmt(b *iscsi.BHS) error {
	var p iscsi.TaskMgmtRequest
	if err := p.Decode(b); err != nil {
		return err
	}
	u := turn{c: c, f: func() { c.taskMgmt(&p) }}
	if p.Immediate && p.Function != iscsi.FuncAbortTask {
		c.s.settle(u, p.CmdSN)
		return nil
	}
	c.s.order(u, p.CmdSN, p.Immediate)
	return nil
}

func (c *conn) taskMgmt(p *iscsi.TaskMgmtRequest) {
	s := c.s
	answer := func(r iscsi.TaskResp) {
		c.queue(response{pdu: &iscsi.TaskMgmtResponse{Response: r, ITT: p.ITT}})
		c.kick()
	}
	complete := func() { s.fence(c, func() { answer(iscsi.TaskComplete) }) }
	c.log.Info("task management", zap.Stringer("function", p.Function), zap.Stringer("lun", p.LUN), zap.Uint32("ref", p.RefTag))
	var ent *entry
	switch p.Function {
	case iscsi.FuncAbortTask, iscsi.FuncAbortTaskSet, iscsi.FuncClearTaskSet, iscsi.FuncLUReset, iscsi.FuncClearACA:
		if n, ok := p.LUN.Number(); ok {
			ent = s.tgt.entry(scsi.LUN(n))
		}
		if ent == nil {
			answer(iscsi.TaskNoLUN)
			return
		}
	}
	switch p.Function {
	case iscsi.FuncAbortTask:
		s.mu.Lock()
		t := s.tasks[p.RefTag]
		exp := s.expCmdSN
		_, early := s.early[p.RefCmdSN]
		if t != nil && t.wireLUN == p.LUN {
			t.c.bury(p.RefTag)
		}
		s.mu.Unlock()
		switch {
		case t != nil && t.wireLUN == p.LUN:
			// A command that waited for its turn on a connection that was lost a moment
			// ago has left a gap.
			if !t.immediate && t.cmdSN == p.RefCmdSN && !early && exp.LessEq(p.RefCmdSN) && s.inWindow(p.RefCmdSN) {
				s.order(turn{c: c, f: func() {}}, p.RefCmdSN, false)
			}
			s.abort(func(x *task) bool { return x == t }, complete)
		case t != nil:
			answer(iscsi.TaskNotFound)
		case !early && exp.LessEq(p.RefCmdSN) && s.inWindow(p.RefCmdSN):
			// Not received yet: it counts as received and aborted (§11.5.1).
			s.order(turn{c: c, f: func() {}}, p.RefCmdSN, false)
			answer(iscsi.TaskComplete)
		default:
			answer(iscsi.TaskNotFound)
		}
	case iscsi.FuncAbortTaskSet:
		s.buryAll(ent.lu)
		s.abort(func(x *task) bool { return x.lu == ent.lu }, complete)
	case iscsi.FuncClearTaskSet:
		c.srv.clear([]*logicalUnit{ent.lu}, s, scsi.ASCCommandsCleared, false, complete)
	case iscsi.FuncLUReset:
		c.srv.clear([]*logicalUnit{ent.lu}, s, scsi.ASCDeviceReset, true, complete)
	case iscsi.FuncTargetWarmReset:
		c.srv.clear(s.tgt.units(), s, scsi.ASCBusReset, true, complete)
	case iscsi.FuncTargetColdReset:
		// Every session of the target ends, this one last (§11.5.1).
		tgt := s.tgt
		c.srv.clear(tgt.units(), s, scsi.ASCPowerOnOccurred, true, func() {
			answer(iscsi.TaskComplete)
			for _, x := range c.srv.sessionsOf(tgt) {
				if x != s {
					x.end(errColdReset)
				}
			}
		})
	case iscsi.FuncClearACA:
		answer(iscsi.TaskFunctionNotSupported) // NormACA is 0: there is never an ACA
	case iscsi.FuncTaskReassign:
		answer(iscsi.TaskReassignNotSupported)
	default:
		answer(iscsi.TaskRejected)
	}
}

var errColdReset = errors.New("target cold reset")

// buryAll remembers the tags of a logical unit's tasks, each on its connection.
func (s *session) buryAll(u *logicalUnit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for itt, t := range s.tasks {
		if t.lu == u {
			t.c.bury(itt)
		}
	}
}
