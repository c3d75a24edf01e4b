package initiator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// link is a connection of a session, with a reader and a writer. What is below mu is
// guarded by Session.mu.
type link struct {
	s    *Session
	cid  uint16
	conn net.Conn
	r    *iscsi.Reader
	w    *iscsi.Writer
	p    iscsi.Params  // of the connection: digests, segment lengths
	wake chan struct{} // there is something to send
	dead chan struct{} // closed by failLocked

	expStatSN atomic.Uint32 // what we acknowledge
	maxSend   atomic.Int32  // the target's MaxRecvDataSegmentLength now
	lastRecv  atomic.Int64  // time.Since(start) in ns
	statuses                // of the reader

	mu struct {
		err    error // why the connection ended
		cmds   fifo[*task]
		urgent fifo[work]
		ping   bool
		// replaced: a connection with its number has taken its place at the target.
		replaced bool
	}
}

// errLinkLost: a request went down with its connection; the session lives.
var errLinkLost = fmt.Errorf("%w: the connection was lost", ErrDropped)

func newLink(s *Session, w *wire, cid uint16) *link {
	l := &link{s: s, cid: cid, conn: w.conn, r: w.r, w: w.w, p: w.p, wake: make(chan struct{}, 1), dead: make(chan struct{})}
	l.statuses.next = w.login.ExpStatSN()
	l.expStatSN.Store(uint32(w.login.ExpStatSN()))
	l.maxSend.Store(int32(w.p.MaxSend))
	l.lastRecv.Store(int64(time.Since(s.start)))
	return l
}

// fail ends the connection; the first error counts.
func (l *link) fail(err error) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.failLocked(err)
}

func (l *link) failLocked(err error) {
	if l.mu.err != nil {
		return
	}
	l.mu.err = err
	close(l.dead)
	_ = l.conn.Close() // the reader and the writer come back from their calls
}

func (l *link) kick() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run runs the connection. When reader and writer are gone, and not earlier, since
// they use the tasks' buffers, it sees to what was on it.
func (l *link) run() {
	var g sync.WaitGroup
	g.Go(func() { l.fail(l.read()) })
	g.Go(func() { l.fail(l.write()) })
	l.watch()
	g.Wait()
	l.gone()
}

// gone takes a connection that ended out of the session. With the last one the session
// ends. Else what was not sent goes over another one, and what was sent ends: the
// target ended it, too (below error recovery level 2 a connection's tasks end with it).
func (l *link) gone() {
	s := l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	err := l.mu.err
	i := slices.Index(s.mu.links, l)
	alive := s.mu.err == nil && slices.ContainsFunc(s.mu.links, func(o *link) bool { return o != l && o.mu.err == nil })
	if !alive {
		s.failLocked(err)
	}
	fields := []zap.Field{zap.String("iqn", s.target), zap.Stringer("portal", s.portal), zap.Uint16("cid", l.cid), zap.Error(err)}
	switch {
	case alive:
		s.cfg.Logger.Warn("connection ended, the session goes on", fields...)
		s.mu.links = slices.Delete(slices.Clone(s.mu.links), i, i+1)
	case len(s.mu.links) == 1 || slices.Index(s.mu.links, l) == 0:
		if !errors.Is(s.mu.err, ErrClosed) {
			s.cfg.Logger.Warn("session ended", fields...)
		}
	}
	var lost []*task
	for _, t := range s.slots {
		if t.mu.link != l || t.mu.state == taskFree {
			continue
		}
		busy := t.mu.writing || t.mu.reading
		t.mu.writing, t.mu.reading = false, false
		switch {
		case t.mu.state == taskDone:
			// Answered; if its data were with the writer the token is still due, and
			// else it was given and must not be again.
			if busy {
				s.tokenLocked(t)
			}
		case !alive:
			t.mu.err = s.mu.err
			s.finishLocked(t)
		case t.mu.state == taskQueued:
			o := s.pickLocked()
			t.mu.link = o
			o.mu.cmds.push(t)
			o.kick()
		default:
			lost = append(lost, t)
		}
	}
	l.mu.cmds = fifo[*task]{}
	for itt, c := range s.mu.ctl {
		if c.link == l {
			if c.err = errLinkLost; !alive {
				c.err = s.mu.err
			}
			close(c.done)
			delete(s.mu.ctl, itt)
		}
	}
	if alive {
		gens := make([]uint16, len(lost))
		for k, t := range lost {
			gens[k] = t.mu.gen
		}
		done := make(chan struct{})
		replaced := l.mu.replaced || s.mu.adding[l.cid] > 0
		if !replaced {
			s.mu.buried[l.cid] = done
		}
		s.side.Go(func() {
			s.bury(l, replaced, lost, gens)
			s.mu.Lock()
			if !replaced {
				delete(s.mu.buried, l.cid)
			}
			s.mu.Unlock()
			close(done)
		})
	}
}

// bury ends the commands of a connection that was lost: the target is told to close
// it, and of each command that it may never have received, to take it as received and
// aborted, so that no gap in CmdSN stays (RFC 7143 11.5.1).
func (s *Session) bury(l *link, replaced bool, lost []*task, gens []uint16) {
	giveUp := func(err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for i, t := range lost {
			if t.mu.gen == gens[i] && t.mu.state == taskSent {
				t.mu.err = fmt.Errorf("%w: connection %d: %w", ErrDropped, l.cid, l.mu.err)
				s.finishLocked(t)
			}
		}
		if err != nil {
			s.failLocked(err)
		}
	}
	ask := func(p func() iscsi.PDU, c func() *control) (*control, error) {
		for {
			x := c()
			err := s.control(context.Background(), p(), nil, x, s.cfg.AbortTimeout)
			if !errors.Is(err, errLinkLost) || s.Err() != nil {
				return x, err
			}
			s.mu.Lock()
			none := s.pickLocked() == nil
			s.mu.Unlock()
			if none {
				return x, err
			}
		}
	}
	var answer iscsi.LogoutResult
	if !replaced {
		_, err := ask(func() iscsi.PDU {
			return &iscsi.LogoutRequest{Immediate: true, Reason: iscsi.LogoutConnection, CID: l.cid}
		}, func() *control {
			c := &control{}
			c.apply = func() { answer, c.err = c.logout, nil }
			return c
		})
		if err == nil && answer != iscsi.LogoutClosed && answer != iscsi.LogoutCIDNotFound {
			err = fmt.Errorf("%w: logout of connection %d: %s", ErrRejected, l.cid, answer)
		}
		if err != nil {
			giveUp(err)
			return
		}
	}
	for i, t := range lost {
		s.mu.Lock()
		mine := t.mu.gen == gens[i] && t.mu.state == taskSent
		sn, received := t.mu.cmdSN, t.mu.cmdSN.Less(s.mu.expCmdSN)
		lun, itt := t.lun, t.cmd.ITT
		s.mu.Unlock()
		if !mine || received {
			continue
		}
		c, err := ask(func() iscsi.PDU {
			return &iscsi.TaskMgmtRequest{Immediate: true, Function: iscsi.FuncAbortTask, LUN: lun, RefTag: itt, RefCmdSN: sn}
		}, func() *control { return &control{} })
		if err == nil && c.resp != iscsi.TaskComplete && c.resp != iscsi.TaskNotFound {
			err = fmt.Errorf("%w: ABORT TASK: %s", ErrTaskManagement, c.resp)
		}
		if err != nil {
			giveUp(err)
			return
		}
	}
	giveUp(nil)
}

// watch pings a silent peer until the connection is dead.
func (l *link) watch() {
	s := l.s
	if s.cfg.NopInterval < 0 {
		<-l.dead
		return
	}
	tick := time.NewTicker(max(min(s.cfg.NopInterval, s.cfg.NopTimeout)/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-l.dead:
			return
		case <-tick.C:
		}
		silent := time.Since(s.start) - time.Duration(l.lastRecv.Load())
		switch {
		case silent >= s.cfg.NopInterval+s.cfg.NopTimeout:
			l.fail(fmt.Errorf("%w: silent for %v", ErrNoAnswer, silent.Round(time.Millisecond)))
		case silent >= s.cfg.NopInterval:
			s.mu.Lock()
			if !l.mu.ping && l.mu.err == nil {
				l.mu.ping = true
				s.controlLocked(&iscsi.NopOut{Immediate: true, TTT: iscsi.ReservedTag}, nil, &control{link: l, apply: func() { l.mu.ping = false }})
			}
			s.mu.Unlock()
		}
	}
}

// write is the writer: control requests and solicited data first, then commands as
// the window allows. What is ready goes out with one writev.
func (l *link) write() error {
	s := l.s
	var batch []*task // tasks whose data the codec's writer holds
	flush := func() error {
		err := l.w.Flush()
		if len(batch) > 0 {
			s.mu.Lock()
			for _, t := range batch {
				t.mu.writing = false
				if t.mu.state == taskDone && !t.mu.reading {
					s.tokenLocked(t)
				}
			}
			s.mu.Unlock()
			batch = batch[:0]
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDropped, err)
		}
		return nil
	}
	for {
		s.mu.Lock()
		if l.mu.err != nil {
			s.mu.Unlock()
			return l.mu.err
		}
		var err error
		var t *task
		var it work
		var cmd iscsi.ScsiCommand
		switch {
		case l.mu.urgent.len() > 0:
			it = l.mu.urgent.pop()
			if it.pdu != nil {
				stamp(it.pdu, s.mu.cmdSN, iscsi.Serial(l.expStatSN.Load()))
				break
			}
			t = it.t
			if t.mu.gen != it.gen || t.mu.state != taskSent {
				s.mu.Unlock()
				continue // answered before its data were asked for to the end
			}
			if it.cmd {
				cmd = t.cmd
				cmd.CmdSN, cmd.ExpStatSN = t.mu.cmdSN, iscsi.Serial(l.expStatSN.Load())
			} else {
				t.mu.r2ts--
			}
		case l.mu.cmds.len() > 0 && s.mu.cmdSN.LessEq(s.mu.maxCmdSN):
			t = l.mu.cmds.pop()
			t.mu.state = taskSent
			t.mu.cmdSN = s.mu.cmdSN
			s.mu.cmdSN++
			cmd = t.cmd
			cmd.CmdSN, cmd.ExpStatSN = t.mu.cmdSN, iscsi.Serial(l.expStatSN.Load())
		default:
			s.mu.Unlock()
			if l.w.Pending() > 0 {
				if err := flush(); err != nil {
					return err
				}
				continue
			}
			select {
			case <-l.wake:
			case <-l.dead:
			}
			continue
		}
		if t != nil && !t.mu.writing {
			t.mu.writing = true
			batch = append(batch, t)
		}
		s.mu.Unlock()
		l.w.MaxData = int(l.maxSend.Load())
		switch {
		case it.pdu != nil:
			err = l.w.Append(it.pdu, it.data)
		case it.t != nil && !it.cmd:
			err = l.sendData(t, it.lun, it.ttt, it.off, it.n, 0)
		default:
			err = l.sendCommand(t, &cmd)
		}
		if err == nil && l.w.Pending() >= flushAt {
			err = flush()
		}
		if err != nil {
			return err
		}
	}
}

// stamp sets the numbers that a request carries when it is sent.
func stamp(p iscsi.PDU, cmdSN, expStatSN iscsi.Serial) {
	switch p := p.(type) {
	case *iscsi.NopOut:
		p.CmdSN, p.ExpStatSN = cmdSN, expStatSN
	case *iscsi.TaskMgmtRequest:
		p.CmdSN, p.ExpStatSN = cmdSN, expStatSN
	case *iscsi.LogoutRequest:
		p.CmdSN, p.ExpStatSN = cmdSN, expStatSN
	case *iscsi.TextRequest:
		p.CmdSN, p.ExpStatSN = cmdSN, expStatSN
	case *iscsi.SNACK:
		p.ExpStatSN = expStatSN
	}
}

// sendCommand sends a command with its immediate data and, if the target takes it,
// the rest of the first burst behind it (§4.2.4.2).
func (l *link) sendCommand(t *task, cmd *iscsi.ScsiCommand) error {
	imm, first := 0, 0
	if l.s.p.ImmediateData {
		imm = min(len(t.out), l.w.MaxData, l.s.p.FirstBurstLength)
		first = imm
	}
	if !l.s.p.InitialR2T {
		first = min(len(t.out), l.s.p.FirstBurstLength)
	}
	cmd.Final = first == imm
	cmd.Encode(l.w.Begin())
	if err := l.w.End(t.ahs, t.out[:imm]); err != nil {
		return err
	}
	if first > imm {
		return l.sendData(t, 0, iscsi.ReservedTag, imm, first-imm, 0)
	}
	return nil
}

// sendData sends a sequence of Data-Out PDUs: out[off:off+n].
func (l *link) sendData(t *task, lun iscsi.LUN, ttt uint32, off, n int, dataSN uint32) error {
	if ttt == iscsi.ReservedTag {
		lun = t.lun
	}
	for n > 0 {
		m := min(n, l.w.MaxData)
		do := iscsi.DataOut{Final: m == n, LUN: lun, ITT: t.cmd.ITT, TTT: ttt, ExpStatSN: iscsi.Serial(l.expStatSN.Load()), DataSN: dataSN, Offset: uint32(off)}
		do.Encode(l.w.Begin())
		if err := l.w.End(nil, t.out[off:off+m]); err != nil {
			return err
		}
		off, n, dataSN = off+m, n-m, dataSN+1
	}
	return nil
}

func broke(format string, a ...any) error {
	return fmt.Errorf("%w: %w", ErrProtocol, fmt.Errorf(format, a...))
}

// read is the reader.
func (l *link) read() error {
	s := l.s
	for {
		h, err := l.r.Next()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("%w: end of stream", ErrDropped)
			}
			var pe *iscsi.ProtocolError
			if errors.As(err, &pe) || errors.Is(err, iscsi.ErrHeaderDigest) {
				return broke("%w", err)
			}
			return fmt.Errorf("%w: %w", ErrDropped, err)
		}
		l.lastRecv.Store(int64(time.Since(s.start)))
		if err := l.pdu(h); err != nil {
			switch {
			case errors.Is(err, iscsi.ErrDataDigest) && l.recovers():
				if err = l.lostPDU(h); err == nil {
					continue
				}
				return err
			case errors.Is(err, iscsi.ErrDataDigest):
				return broke("%w", err) // error recovery level 0 knows no other way (§7.7)
			case errors.Is(err, ErrProtocol), errors.Is(err, ErrRejected), errors.Is(err, ErrDropped):
				return err
			}
			return fmt.Errorf("%w: %w", ErrDropped, err) // the stream ended in a data segment
		}
	}
}

// windowLocking moves the window (§4.2.2.1): a pair with MaxCmdSN below ExpCmdSN-1
// is ignored, and neither goes back.
func (l *link) windowLocking(exp, mx iscsi.Serial) {
	s := l.s
	if mx.Less(exp - 1) {
		return
	}
	s.mu.Lock()
	if s.mu.expCmdSN.Less(exp) {
		s.mu.expCmdSN = exp
	}
	opened := s.mu.maxCmdSN.Less(mx)
	if opened {
		s.mu.maxCmdSN = mx
	}
	if opened {
		for _, o := range s.mu.links {
			if o.mu.cmds.len() > 0 {
				o.kick()
			}
		}
	}
	s.mu.Unlock()
}

// find returns the task of a tag that is with the target.
func (s *Session) find(itt uint32) *task {
	slot := int(itt & 0xffff)
	if slot >= len(s.slots) {
		return nil
	}
	t := s.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.mu.state != taskSent || t.mu.gen != uint16(itt>>16) {
		return nil
	}
	return t
}

// stray notes a PDU for a task that is not in flight: an aborted one, as a rule.
func (l *link) stray(op iscsi.Opcode, itt uint32) {
	s := l.s
	s.cfg.Logger.Debug("pdu for no task", zap.String("iqn", s.target), zap.Stringer("pdu", op), zap.Uint32("itt", itt))
}

func (l *link) pdu(h *iscsi.BHS) error {
	switch op := h.Opcode(); op {
	case iscsi.OpDataIn:
		return l.dataIn(h)
	case iscsi.OpScsiResponse:
		return l.response(h)
	case iscsi.OpR2T:
		return l.r2t(h)
	case iscsi.OpNopIn:
		return l.nopIn(h)
	case iscsi.OpTaskMgmtResp:
		var p iscsi.TaskMgmtResponse
		if err := p.Decode(h); err != nil {
			return broke("%w", err)
		}
		if fresh, err := l.numbers(op, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil || !fresh {
			return err
		}
		l.answered(op, p.ITT, func(c *control) { c.resp = p.Response })
		return nil
	case iscsi.OpLogoutResp:
		var p iscsi.LogoutResponse
		if err := p.Decode(h); err != nil {
			return broke("%w", err)
		}
		if fresh, err := l.numbers(op, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil || !fresh {
			return err
		}
		l.answered(op, p.ITT, func(c *control) {
			if c.logout = p.Response; p.Response != iscsi.LogoutClosed {
				c.err = fmt.Errorf("%w: logout: %s", ErrRejected, p.Response)
			}
		})
		return nil
	case iscsi.OpTextResp:
		var p iscsi.TextResponse
		if err := p.Decode(h); err != nil {
			return broke("%w", err)
		}
		data, err := l.r.AppendData(nil)
		if err != nil {
			return err
		}
		if fresh, err := l.numbers(op, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil || !fresh {
			return err
		}
		l.answered(op, p.ITT, func(c *control) { c.text, c.data = p, data })
		return nil
	case iscsi.OpAsync:
		return l.async(h)
	case iscsi.OpReject:
		return l.reject(h)
	default:
		return broke("%s from a target in full feature phase", op)
	}
}

// answered hands an answer to the control request that waits for it.
func (l *link) answered(op iscsi.Opcode, itt uint32, set func(*control)) {
	s := l.s
	s.mu.Lock()
	c := s.mu.ctl[itt]
	delete(s.mu.ctl, itt)
	if c != nil {
		set(c)
		if c.apply != nil {
			c.apply()
		}
		close(c.done)
	}
	s.mu.Unlock()
	if c == nil {
		l.stray(op, itt)
	}
}

func (l *link) dataIn(h *iscsi.BHS) error {
	var p iscsi.DataIn
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	t := l.take(p.ITT)
	if t == nil {
		l.stray(iscsi.OpDataIn, p.ITT)
		if err := l.r.DiscardData(); err != nil && !l.lost(err) {
			return err
		}
		_, err := l.numbers(iscsi.OpDataIn, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, p.HasStatus)
		return err
	}
	defer l.put(t)
	n := l.r.DataLen()
	again, dup := false, false
	switch {
	case !t.cmd.Read:
		return broke("Data-In for a command that reads nothing")
	case p.DataSN == t.dataSN:
		if int64(p.Offset) != int64(t.next) {
			return broke("Data-In is for offset %d, want %d", p.Offset, t.next)
		}
	case !l.recovers():
		return broke("Data-In has DataSN %d, want %d", p.DataSN, t.dataSN)
	case t.dataSN < p.DataSN:
		if err := l.askData(t, p.DataSN); err != nil {
			return err
		}
	default:
		again = slices.Contains(t.missing, p.DataSN)
		dup = !again
	}
	if int64(p.Offset)+int64(n) > int64(len(t.in)) {
		return broke("Data-In of %d bytes at offset %d of %d", n, p.Offset, len(t.in))
	}
	if dup {
		return l.r.DiscardData()
	}
	off := int(p.Offset)
	err := l.r.ReadData(t.in[off : off+n])
	switch {
	case l.lost(err):
		if !again {
			t.missing = append(t.missing, p.DataSN)
		}
		if err := l.snackData(t, p.DataSN, 1); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		t.got += n
		if again {
			t.missing = slices.DeleteFunc(t.missing, func(sn uint32) bool { return sn == p.DataSN })
		}
	}
	if !again {
		t.dataSN, t.next = p.DataSN+1, off+n
	}
	if p.Ack {
		t.wantAck, t.ackTTT, t.ackLUN = true, p.TTT, p.LUN
	}
	if p.HasStatus && len(t.missing) > 0 {
		l.hold(t, p.StatSN)
	}
	fresh, err := l.numbers(iscsi.OpDataIn, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, p.HasStatus)
	if err != nil {
		return err
	}
	if len(t.missing) == 0 && t.wantAck {
		t.wantAck = false
		l.push(work{pdu: &iscsi.SNACK{Type: iscsi.SNACKDataACK, LUN: t.ackLUN, ITT: iscsi.ReservedTag, TTT: t.ackTTT, BegRun: t.dataSN}})
	}
	if p.HasStatus && fresh {
		return l.status(t, Result{Status: scsi.Status(p.Status), Residual: residual(p.Overflow, p.Underflow, p.Residual)})
	}
	return l.settle(t)
}

func residual(over, under bool, n uint32) int64 {
	switch {
	case over:
		return -int64(n)
	case under:
		return int64(n)
	}
	return 0
}

func (l *link) response(h *iscsi.BHS) error {
	s := l.s
	var p iscsi.ScsiResponse
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	var sense []byte
	if l.r.DataLen() > 0 {
		d, err := l.r.AppendData(nil)
		if err != nil {
			return err
		}
		if sense, _, err = iscsi.ParseSense(d); err != nil {
			return broke("%w", err)
		}
	}
	t := s.find(p.ITT)
	if t != nil && t.cmd.Read && l.recovers() && t.dataSN < p.ExpDataSN { // the last Data-In were lost
		if err := l.askData(t, p.ExpDataSN); err != nil {
			return err
		}
		t.dataSN = p.ExpDataSN
	}
	if t != nil && len(t.missing) > 0 {
		l.hold(t, p.StatSN)
	}
	if fresh, err := l.numbers(iscsi.OpScsiResponse, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil || !fresh {
		return err
	}
	if t == nil {
		l.stray(iscsi.OpScsiResponse, p.ITT)
		return nil
	}
	if p.Response != iscsi.ResponseCompleted {
		s.mu.Lock()
		t.mu.err = fmt.Errorf("target failure: iSCSI response %#02x", uint8(p.Response))
		s.finishLocked(t)
		s.mu.Unlock()
		return nil
	}
	return l.status(t, Result{Status: scsi.Status(p.Status), Sense: sense, Residual: residual(p.Overflow, p.Underflow, p.Residual)})
}

// complete ends a task with a status, after a look at whether the data moved agree
// with the residual: a read that is shorter than it says would be stale memory taken
// for data.
func (l *link) complete(t *task, r Result) error {
	s := l.s
	switch {
	case t.cmd.Read:
		r.N = t.got
		want := int64(len(t.in))
		if !t.cmd.Bidi && r.Residual > 0 {
			want -= r.Residual
		}
		if r.Status == scsi.StatusGood && int64(t.got) != want && !t.cmd.Bidi {
			return broke("command ended GOOD with %d of %d bytes read, residual %d", t.got, len(t.in), r.Residual)
		}
	case t.cmd.Write:
		if r.Residual > int64(len(t.out)) {
			return broke("residual %d of %d bytes", r.Residual, len(t.out))
		}
		r.N = len(t.out) - int(max(r.Residual, 0))
	}
	s.mu.Lock()
	t.mu.res = r
	s.finishLocked(t)
	s.mu.Unlock()
	return nil
}

func (l *link) r2t(h *iscsi.BHS) error {
	s := l.s
	var p iscsi.R2T
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	if fresh, err := l.numbers(iscsi.OpR2T, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, false); err != nil || !fresh {
		return err
	}
	t := s.find(p.ITT)
	if t == nil {
		l.stray(iscsi.OpR2T, p.ITT)
		return nil
	}
	switch {
	case !t.cmd.Write:
		return broke("R2T for a command that writes nothing")
	case p.R2TSN != t.r2tSN:
		return broke("R2T has R2TSN %d, want %d", p.R2TSN, t.r2tSN)
	case int64(p.Offset)+int64(p.Length) > int64(len(t.out)):
		return broke("R2T for [%d,+%d) of %d bytes", p.Offset, p.Length, len(t.out))
	case int64(p.Length) > int64(s.p.MaxBurstLength):
		return broke("R2T for %d bytes, MaxBurstLength is %d", p.Length, s.p.MaxBurstLength)
	}
	t.r2tSN++
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.mu.r2ts++; t.mu.r2ts > s.p.MaxOutstandingR2T {
		return broke("%d R2Ts outstanding, MaxOutstandingR2T is %d", t.mu.r2ts, s.p.MaxOutstandingR2T)
	}
	l.mu.urgent.push(work{t: t, gen: t.mu.gen, lun: p.LUN, ttt: p.TTT, off: int(p.Offset), n: int(p.Length)})
	l.kick()
	return nil
}

func (l *link) nopIn(h *iscsi.BHS) error {
	s := l.s
	var p iscsi.NopIn
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	data, err := l.r.AppendData(nil)
	if err != nil {
		return err
	}
	if fresh, err := l.numbers(iscsi.OpNopIn, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, p.ITT != iscsi.ReservedTag); err != nil || !fresh {
		return err
	}
	if p.ITT != iscsi.ReservedTag {
		l.answered(iscsi.OpNopIn, p.ITT, func(c *control) { c.data = data })
		return nil
	}
	if p.TTT == iscsi.ReservedTag {
		return nil // numbers only
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A target has no right to many unanswered pings, and no memory of ours.
	if l.mu.urgent.len() > 4*len(s.slots)+1024 {
		return broke("flood of NOP-Ins")
	}
	l.mu.urgent.push(work{pdu: &iscsi.NopOut{Immediate: true, LUN: p.LUN, ITT: iscsi.ReservedTag, TTT: p.TTT}})
	l.kick()
	return nil
}

func (l *link) async(h *iscsi.BHS) error {
	s := l.s
	var p iscsi.Async
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	data, err := l.r.AppendData(nil)
	if err != nil {
		return err
	}
	if fresh, err := l.numbers(iscsi.OpAsync, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil || !fresh {
		return err
	}
	s.cfg.Logger.Info("asynchronous message", zap.String("iqn", s.target), zap.Stringer("event", p.Event), zap.Uint16("p1", p.Param1),
		zap.Uint16("p2", p.Param2), zap.Uint16("p3", p.Param3))
	var sense []byte
	if p.Event == iscsi.AsyncSCSI {
		if sense, _, err = iscsi.ParseSense(data); err != nil {
			return broke("%w", err)
		}
	}
	if s.cfg.OnAsync != nil {
		s.cfg.OnAsync(p, sense)
	}
	switch p.Event {
	case iscsi.AsyncLogoutRequest:
		s.mu.Lock()
		first := s.mu.closing == nil
		if first {
			s.mu.closing = fmt.Errorf("%w: target asked for logout", ErrClosed)
		}
		s.mu.Unlock()
		if first {
			s.side.Go(func() { s.leave(time.Duration(p.Param3) * time.Second) })
		}
	case iscsi.AsyncDropConnection:
		err := fmt.Errorf("%w: %s, reconnect after %d s", ErrDropped, p.Event, p.Param2)
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, o := range s.mu.links {
			if o.cid == p.Param1 {
				o.failLocked(err)
			}
		}
	case iscsi.AsyncDropSession:
		s.fail(fmt.Errorf("%w: %s, reconnect after %d s", ErrDropped, p.Event, p.Param2))
		return fmt.Errorf("%w: %s, reconnect after %d s", ErrDropped, p.Event, p.Param2)
	case iscsi.AsyncRenegotiate:
		s.mu.Lock()
		s.controlLocked(&iscsi.TextRequest{Immediate: true, Final: true, TTT: iscsi.ReservedTag},
			iscsi.AppendPair(nil, iscsi.KeyMaxRecvDataSegmentLength, fmt.Sprint(l.p.MaxRecv)), l.renegotiation())
		s.mu.Unlock()
	}
	return nil
}

// renegotiation takes the answer to a text request that declares our
// MaxRecvDataSegmentLength: the target may declare its own anew (§13.12).
func (l *link) renegotiation() *control {
	c := &control{link: l}
	c.apply = func() {
		pairs, err := iscsi.ParseText(c.data)
		if err != nil {
			return
		}
		for _, p := range pairs {
			if p.Key != iscsi.KeyMaxRecvDataSegmentLength {
				continue
			}
			if n, err := iscsi.ParseNumber(p.Value, 512, iscsi.MaxDataSegment); err == nil {
				l.maxSend.Store(int32(n))
			}
		}
	}
	return c
}

// leave logs out as the target asked, when the commands in flight are done or, at the
// latest, when its time is up.
func (s *Session) leave(limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	s.mu.Lock()
	drained := s.drainedLocked()
	s.mu.Unlock()
	if drained != nil {
		select {
		case <-drained:
		case <-s.dead:
			return
		case <-ctx.Done():
		}
	}
	// A fresh limit: the answer may take its time, the request is in time.
	out, done := context.WithTimeout(context.Background(), s.cfg.LogoutTimeout)
	defer done()
	_ = s.logout(out)
	s.fail(fmt.Errorf("%w: target asked for logout", ErrClosed))
}

// reject handles a Reject: the header of what was refused is in the data segment.
func (l *link) reject(h *iscsi.BHS) error {
	s := l.s
	var p iscsi.Reject
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	data, err := l.r.AppendData(nil)
	if err != nil {
		return err
	}
	if fresh, err := l.numbers(iscsi.OpReject, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil || !fresh {
		return err
	}
	if len(data) < iscsi.BHSLen {
		return fmt.Errorf("%w: %s, of an unknown PDU", ErrRejected, p.Reason)
	}
	bad := (*iscsi.BHS)(data)
	why := fmt.Errorf("%w: %s: %s", ErrRejected, bad.Opcode(), p.Reason)
	s.cfg.Logger.Warn("target rejected a pdu", zap.String("iqn", s.target), zap.Stringer("pdu", bad.Opcode()), zap.Stringer("reason", p.Reason))
	if p.Reason == iscsi.RejectDataDigest && l.recovers() {
		return l.sendAgain(bad)
	}
	switch bad.Opcode() {
	case iscsi.OpScsiCommand, iscsi.OpSNACK:
		t := s.find(bad.ITT())
		if t == nil && bad.Opcode() == iscsi.OpSNACK {
			break // of status
		}
		if t == nil {
			return nil
		}
		s.mu.Lock()
		t.mu.err = why
		s.finishLocked(t)
		s.mu.Unlock()
		return nil
	case iscsi.OpNopOut, iscsi.OpTaskMgmtReq, iscsi.OpTextReq, iscsi.OpLogoutReq:
		s.mu.Lock()
		c := s.mu.ctl[bad.ITT()]
		delete(s.mu.ctl, bad.ITT())
		if c != nil {
			c.err = why
			close(c.done)
		}
		s.mu.Unlock()
		return nil
	}
	return why // a Data-Out: its command cannot end any more
}
