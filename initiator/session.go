package initiator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// Result is what became of a command that the target answered.
type Result struct {
	Status scsi.Status
	Sense  []byte // as received, empty unless the target sent some
	// Residual is the difference between what the command wanted to move and the
	// buffer given (§11.4.5): positive, bytes of the buffer that were not used
	// (underflow); negative, bytes for which there was no room (overflow). For a
	// bidirectional command it is the write's.
	Residual int64
	N        int // bytes moved: read into dataIn, or else taken of dataOut
}

// Err returns nil for GOOD and CONDITION MET, else a *StatusError.
func (r *Result) Err() error {
	if r.Status == scsi.StatusGood || r.Status == scsi.StatusConditionMet {
		return nil
	}
	e := &StatusError{Status: r.Status}
	if len(r.Sense) > 0 {
		e.Sense, _ = scsi.ParseSense(r.Sense)
	}
	return e
}

// StatusError is a SCSI status other than GOOD.
type StatusError struct {
	Status scsi.Status
	Sense  *scsi.Sense // nil if there was none, or none that could be read
}

func (e *StatusError) Error() string {
	if e.Sense != nil {
		return e.Status.String() + ": " + e.Sense.Error()
	}
	return e.Status.String()
}

// Unwrap makes the sense data, and ErrReservation, visible to errors.As and Is.
func (e *StatusError) Unwrap() error {
	switch {
	case e.Status == scsi.StatusReservationConflict:
		return ErrReservation
	case e.Sense != nil:
		return e.Sense
	}
	return nil
}

type taskState uint8

const (
	taskFree taskState = iota
	taskQueued
	taskSent
	taskDone
)

// task is a command in flight. The fields below mu are guarded by Session.mu; the
// others are written by Exec before the task is queued, or by the reader alone while
// it is sent.
type task struct {
	slot    uint16
	done    chan struct{} // one token when the task is done and its buffers are free
	lun     iscsi.LUN
	cmd     iscsi.ScsiCommand // without CmdSN and ExpStatSN
	out, in []byte
	ahs     []byte

	// reader
	got    int    // bytes of Data-In so far
	next   int    // where the next Data-In belongs
	dataSN uint32 // next DataSN of Data-In
	r2tSN  uint32 // next R2TSN
	recovery

	mu struct {
		link    *link  // the connection that the command is on
		gen     uint16 // counts uses of the slot: the upper half of the task tag
		state   taskState
		writing bool // the writer holds pieces of out
		reading bool // the reader fills in
		r2ts    int  // R2Ts not yet served
		cmdSN   iscsi.Serial
		res     Result
		err     error
	}
}

// control is a request of our own other than a command: NOP-Out, task management,
// logout, text.
type control struct {
	done   chan struct{}
	link   *link
	pdu    iscsi.PDU
	out    []byte
	err    error
	resp   iscsi.TaskResp // of task management
	logout iscsi.LogoutResult
	text   iscsi.TextResponse
	data   []byte
	apply  func() // run by the reader, with mu held, when the target has done it
}

// work is something to send that does not wait for the command window.
type work struct {
	pdu  iscsi.PDU // nil: data for an R2T, or a whole command again
	cmd  bool
	data []byte
	t    *task
	gen  uint16
	lun  iscsi.LUN
	ttt  uint32
	off  int
	n    int
}

const (
	controlSlot = 0xfffe // lower half of the tags of control requests
	flushAt     = 1 << 20
)

// fifo is a queue that keeps its memory.
type fifo[T any] struct {
	q    []T
	head int
}

func (f *fifo[T]) len() int { return len(f.q) - f.head }

func (f *fifo[T]) push(v T) {
	if f.head > 0 && len(f.q) == cap(f.q) {
		n := copy(f.q, f.q[f.head:])
		clear(f.q[n:])
		f.q, f.head = f.q[:n], 0
	}
	f.q = append(f.q, v)
}

func (f *fifo[T]) pop() T {
	var zero T
	v := f.q[f.head]
	f.q[f.head] = zero
	if f.head++; f.head == len(f.q) {
		f.q, f.head = f.q[:0], 0
	}
	return v
}

// drop takes the first element out that match likes.
func (f *fifo[T]) drop(match func(T) bool) {
	for i := f.head; i < len(f.q); i++ {
		if match(f.q[i]) {
			f.q = slices.Delete(f.q, i, i+1)
			return
		}
	}
}

// Session is a normal session with one connection or several: commands go round
// robin over those that live. All methods may be called concurrently.
type Session struct {
	cfg    Config
	target string
	portal iscsi.Portal
	p      iscsi.Params
	tsih   uint16
	tpgt   uint16
	isid   iscsi.ISID

	slots []*task
	free  chan *task
	dead  chan struct{} // closed by fail
	over  chan struct{} // closed when all readers and writers are gone and all tasks failed

	start time.Time
	legs  sync.WaitGroup // connections
	side  sync.WaitGroup // goroutines that act on messages and on the loss of a connection

	mu struct {
		sync.Mutex
		err      error                    // why the session ended
		closing  error                    // new commands are refused with it
		links    []*link                  // those that live
		turn     int                      // of them
		adding   map[uint16]int           // connections that are logging in: their old ones need no logout
		buried   map[uint16]chan struct{} // connections that are being logged out by another, until they are
		ctl      map[uint32]*control
		ctlSeq   uint16
		inFlight int // tasks not free
		drained  chan struct{}
		cmdSN    iscsi.Serial
		expCmdSN iscsi.Serial
		maxCmdSN iscsi.Serial
	}
}

// Login opens a normal session with the target iqn at portal, ADDRESS[:PORT][,TAG].
// Redirections are followed. A login that the target refuses gives an error that
// wraps *iscsi.LoginError. Close the session.
func Login(ctx context.Context, portal, iqn string, cfg Config) (*Session, error) {
	p, err := iscsi.ParsePortal(portal)
	if err != nil {
		return nil, err
	}
	if err := iscsi.CheckName(iqn); err != nil {
		return nil, err
	}
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	w, p, err := dial(ctx, p, iqn, &cfg)
	if err != nil {
		return nil, err
	}
	s := newSession(w, p, iqn, cfg)
	for cid := 1; cid < min(cfg.Connections, s.p.MaxConnections); cid++ {
		if err := s.AddConnection(ctx, uint16(cid)); err != nil {
			_ = s.Close()
			return nil, err
		}
	}
	return s, nil
}

func newSession(w *wire, portal iscsi.Portal, target string, cfg Config) *Session {
	s := &Session{cfg: cfg, target: target, portal: portal, p: w.p, tsih: w.login.TSIH(), tpgt: w.login.TPGT(),
		isid: cfg.isid(target), free: make(chan *task, cfg.QueueDepth), dead: make(chan struct{}),
		over: make(chan struct{}), start: time.Now()}
	for i := range cfg.QueueDepth {
		t := &task{slot: uint16(i), done: make(chan struct{}, 1)}
		s.slots = append(s.slots, t)
		s.free <- t
	}
	s.mu.ctl = map[uint32]*control{}
	s.mu.adding = map[uint16]int{}
	s.mu.buried = map[uint16]chan struct{}{}
	s.mu.cmdSN = w.cmdSN
	s.mu.expCmdSN, s.mu.maxCmdSN = w.login.Window()
	s.attach(newLink(s, w, 0))
	go s.supervise()
	return s
}

// attach makes a connection one of the session and starts it.
func (s *Session) attach(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.err != nil {
		l.failLocked(s.mu.err)
	}
	s.mu.links = append(s.mu.links, l)
	s.legs.Go(l.run)
}

// AddConnection logs connection cid in to the session (RFC 7143 6.3): at the portal of
// the first one. The session must have been told to have several, by
// Config.Connections, and the target must allow them. A cid that is in use is
// reinstated: the commands on its old connection end with ErrDropped.
func (s *Session) AddConnection(ctx context.Context, cid uint16) error {
	s.mu.Lock()
	for s.mu.buried[cid] != nil && s.refusedLocked() == nil {
		wait := s.mu.buried[cid]
		s.mu.Unlock()
		select { // or the old one's logout would hit the new one
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		s.mu.Lock()
	}
	if err := s.refusedLocked(); err != nil {
		s.mu.Unlock()
		return err
	}
	cmdSN := s.mu.cmdSN
	s.mu.adding[cid]++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.mu.adding[cid]--
		s.mu.Unlock()
	}()
	w, err := dialJoin(ctx, s, cid, cmdSN)
	if err != nil {
		return fmt.Errorf("add connection %d to the session with %s: %w", cid, s.target, err)
	}
	s.mu.Lock()
	for _, o := range s.mu.links {
		if o.cid == cid {
			o.mu.replaced = true
			o.failLocked(fmt.Errorf("%w: connection %d was reinstated", ErrDropped, cid))
		}
	}
	s.mu.Unlock()
	s.attach(newLink(s, w, cid))
	return nil
}

// Connections are the CIDs of the connections that live.
func (s *Session) Connections() (cids []uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.mu.links {
		if l.mu.err == nil {
			cids = append(cids, l.cid)
		}
	}
	return cids
}

// pickLocked is the connection whose turn it is, or nil when none lives.
func (s *Session) pickLocked() *link {
	for range s.mu.links {
		s.mu.turn++
		if l := s.mu.links[s.mu.turn%len(s.mu.links)]; l.mu.err == nil {
			return l
		}
	}
	return nil
}

// Target is the target's name.
func (s *Session) Target() string { return s.target }

// Portal is where the session is connected to, after redirections.
func (s *Session) Portal() iscsi.Portal { return s.portal }

// Params is what was negotiated.
func (s *Session) Params() iscsi.Params { return s.p }

// ISID and TSIH name the session.
func (s *Session) ISID() iscsi.ISID { return s.isid }

// TSIH is the target's handle of the session.
func (s *Session) TSIH() uint16 { return s.tsih }

// TPGT is the target portal group tag.
func (s *Session) TPGT() uint16 { return s.tpgt }

// Done is closed when the session is over; Err says why.
func (s *Session) Done() <-chan struct{} { return s.over }

// Err is nil while the session lives, then why it ended: ErrClosed after a logout.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.err
}

// fail ends the session; the first error counts.
func (s *Session) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failLocked(err)
}

func (s *Session) failLocked(err error) {
	if s.mu.err != nil {
		return
	}
	s.mu.err = err
	close(s.dead)
	for _, l := range s.mu.links {
		l.failLocked(err)
	}
}

// supervise waits for the last connection.
func (s *Session) supervise() {
	s.legs.Wait()
	s.side.Wait()
	close(s.over)
}

// controlLocked queues a request of our own, on c.link or any connection; c.done is
// closed when it is answered.
func (s *Session) controlLocked(p iscsi.PDU, data []byte, c *control) (itt uint32) {
	c.done = make(chan struct{})
	c.pdu, c.out = p, data
	if c.link == nil {
		c.link = s.pickLocked()
	}
	if c.link == nil || c.link.mu.err != nil {
		c.err = errLinkLost
		close(c.done)
		return 0
	}
	for {
		s.mu.ctlSeq++
		itt = uint32(s.mu.ctlSeq)<<16 | controlSlot
		if s.mu.ctl[itt] == nil {
			break
		}
	}
	switch p := p.(type) {
	case *iscsi.NopOut:
		p.ITT = itt
	case *iscsi.TaskMgmtRequest:
		p.ITT = itt
	case *iscsi.LogoutRequest:
		p.ITT = itt
	case *iscsi.TextRequest:
		p.ITT = itt
	}
	s.mu.ctl[itt] = c
	c.link.mu.urgent.push(work{pdu: p, data: data})
	c.link.kick()
	return itt
}

// control sends a request and waits for the answer. If it does not come within limit
// the session is given up; if ctx ends first the request goes on without us.
func (s *Session) control(ctx context.Context, p iscsi.PDU, data []byte, c *control, limit time.Duration) error {
	s.mu.Lock()
	if s.mu.err != nil {
		defer s.mu.Unlock()
		return s.mu.err
	}
	s.controlLocked(p, data, c)
	s.mu.Unlock()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-c.done:
		return c.err
	case <-timer.C:
		s.fail(fmt.Errorf("%w: %s, after %v", ErrNoAnswer, p.Opcode(), limit))
	case <-ctx.Done():
		return context.Cause(ctx) // the answer is still taken, by apply
	}
	<-c.done
	return c.err
}

// Exec runs one command and returns when the target has answered it. dataOut is sent
// and dataIn filled, according to dir; their lengths are the expected data transfer
// lengths. Both belong to the session until Exec returns. A status such as CHECK
// CONDITION is no error: see Result.Err. An error means that the command has no
// status: the session ended, or ctx did, in which case the command was aborted and
// may or may not have been done.
func (s *Session) Exec(ctx context.Context, lun scsi.LUN, cdb []byte, dir scsi.Direction, dataOut, dataIn []byte) (Result, error) {
	if err := ctx.Err(); err != nil {
		return Result{}, context.Cause(ctx)
	}
	if lun > scsi.MaxLUN {
		return Result{}, fmt.Errorf("LUN %d is not in 0-%d", lun, scsi.MaxLUN)
	}
	if int64(len(dataOut)) > 1<<32-1 || int64(len(dataIn)) > 1<<32-1 {
		return Result{}, errors.New("transfer of 4 GiB or more in one command")
	}
	var t *task
	select {
	case t = <-s.free:
	default:
		select {
		case t = <-s.free:
		case <-ctx.Done():
			return Result{}, context.Cause(ctx)
		case <-s.over:
			return Result{}, s.Err()
		}
	}
	if err := t.prepare(lun, cdb, dir, dataOut, dataIn); err != nil {
		s.free <- t
		return Result{}, err
	}
	s.mu.Lock()
	if err := s.refusedLocked(); err != nil {
		s.mu.Unlock()
		s.free <- t
		return Result{}, err
	}
	t.mu.gen++
	t.cmd.ITT = uint32(t.mu.gen)<<16 | uint32(t.slot)
	t.mu.state = taskQueued
	s.mu.inFlight++
	l := s.pickLocked()
	if l == nil { // the last one is about to end the session, and the task with it
		l = s.mu.links[0]
	}
	t.mu.link = l
	l.mu.cmds.push(t)
	s.mu.Unlock()
	l.kick()

	select {
	case <-t.done:
	case <-ctx.Done():
		s.abort(t, context.Cause(ctx))
		<-t.done
	}
	res, err := t.mu.res, t.mu.err // nobody else looks at a task that is done
	s.release(t)
	return res, err
}

func (s *Session) refusedLocked() error {
	if s.mu.err != nil {
		return s.mu.err
	}
	return s.mu.closing
}

func (t *task) prepare(lun scsi.LUN, cdb []byte, dir scsi.Direction, out, in []byte) error {
	t.out, t.in, t.ahs = nil, nil, t.ahs[:0]
	t.got, t.next, t.dataSN, t.r2tSN, t.recovery = 0, 0, 0, 0, recovery{}
	t.mu.res, t.mu.err, t.mu.r2ts = Result{}, nil, 0
	t.lun = iscsi.LUNOf(uint16(lun))
	t.cmd = iscsi.ScsiCommand{Attr: iscsi.AttrSimple, LUN: t.lun}
	if err := t.cmd.SetCDB(cdb); err != nil {
		return err
	}
	switch dir {
	case scsi.DirNone:
	case scsi.DirIn:
		t.in, t.cmd.Read, t.cmd.EDTL = in, true, uint32(len(in))
	case scsi.DirOut:
		t.out, t.cmd.Write, t.cmd.EDTL = out, true, uint32(len(out))
	case scsi.DirBidi:
		t.out, t.in, t.cmd.Read, t.cmd.Write, t.cmd.EDTL = out, in, true, true, uint32(len(out))
		t.cmd.Bidi, t.cmd.BidiEDTL = true, uint32(len(in))
	default:
		return fmt.Errorf("direction %d", dir)
	}
	t.ahs = t.cmd.AppendAHS(t.ahs)
	t.cmd.ExtCDB = nil // the caller's bytes are in ahs now
	return nil
}

func (s *Session) release(t *task) {
	t.out, t.in = nil, nil
	s.mu.Lock()
	t.mu.state = taskFree
	s.mu.inFlight--
	if s.mu.inFlight == 0 && s.mu.drained != nil {
		close(s.mu.drained)
		s.mu.drained = nil
	}
	s.mu.Unlock()
	s.free <- t
}

// finishLocked ends a task. Its owner hears of it when the writer has let go of the
// data, too.
func (s *Session) finishLocked(t *task) {
	t.mu.state = taskDone
	if !t.mu.writing && !t.mu.reading {
		s.tokenLocked(t)
	}
}

func (s *Session) tokenLocked(t *task) {
	select {
	case t.done <- struct{}{}:
	default: // given already
	}
}

// abort ends a task whose context ended: by taking it out of the queue, or with
// ABORT TASK. An abort that the target does not confirm ends the session, since the
// task could use its buffers later.
func (s *Session) abort(t *task, cause error) {
	s.mu.Lock()
	switch t.mu.state {
	case taskQueued:
		t.mu.link.mu.cmds.drop(func(q *task) bool { return q == t })
		t.mu.err = cause
		s.finishLocked(t)
		s.mu.Unlock()
		return
	case taskSent:
	default:
		s.mu.Unlock()
		return
	}
	gen, cmdSN := t.mu.gen, t.mu.cmdSN
	s.mu.Unlock()
	c := &control{}
	end := func() {
		if t.mu.gen == gen && t.mu.state == taskSent {
			t.mu.err = fmt.Errorf("%w: %w", ErrAborted, cause)
			s.finishLocked(t)
		}
	}
	c.apply = func() {
		// "Task does not exist" says that the answer came before, or that the command
		// never arrived; on its connection the reader knows of the former.
		if c.resp == iscsi.TaskComplete || c.resp == iscsi.TaskNotFound {
			end()
		}
	}
	req := &iscsi.TaskMgmtRequest{Immediate: true, Function: iscsi.FuncAbortTask, LUN: t.lun, RefTag: t.cmd.ITT, RefCmdSN: cmdSN}
	s.mu.Lock()
	c.link = t.mu.link // where the command is (RFC 7143 11.5)
	s.mu.Unlock()
	err := s.control(context.Background(), req, nil, c, s.cfg.AbortTimeout)
	if errors.Is(err, errLinkLost) {
		return // the loss of its connection ends the task
	}
	if err == nil && c.resp != iscsi.TaskComplete && c.resp != iscsi.TaskNotFound {
		s.mu.Lock()
		if t.mu.gen == gen && t.mu.state == taskSent {
			s.failLocked(fmt.Errorf("%w: ABORT TASK: %s", ErrTaskManagement, c.resp))
		}
		s.mu.Unlock()
	}
}

// TaskManagement sends a task management function other than ABORT TASK and TASK
// REASSIGN and waits for the answer, at most Config.AbortTimeout; the session is
// given up when none comes. On success every command that the function covers and
// that was sent before it, and not answered, ends with ErrAborted. A refusal is an
// error that wraps ErrTaskManagement.
func (s *Session) TaskManagement(ctx context.Context, fn iscsi.TaskFunc, lun scsi.LUN) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	req := &iscsi.TaskMgmtRequest{Immediate: true, Function: fn, RefTag: iscsi.ReservedTag}
	all := false
	switch fn {
	case iscsi.FuncAbortTaskSet, iscsi.FuncClearTaskSet, iscsi.FuncLUReset, iscsi.FuncClearACA:
		req.LUN = iscsi.LUNOf(uint16(lun))
	case iscsi.FuncTargetWarmReset, iscsi.FuncTargetColdReset:
		all = true
	default:
		return fmt.Errorf("%w: %s is not for callers", ErrTaskManagement, fn)
	}
	c := &control{}
	c.apply = func() {
		if c.resp != iscsi.TaskComplete || fn == iscsi.FuncClearACA {
			return
		}
		for _, t := range s.slots {
			if t.mu.state == taskSent && t.mu.cmdSN.Less(req.CmdSN) && (all || t.lun == req.LUN) {
				t.mu.err = fmt.Errorf("%w: %s", ErrAborted, fn)
				s.finishLocked(t)
			}
		}
	}
	if err := s.control(ctx, req, nil, c, s.cfg.AbortTimeout); err != nil {
		return fmt.Errorf("%s: %w", fn, err)
	}
	if c.resp != iscsi.TaskComplete {
		return fmt.Errorf("%w: %s: %s", ErrTaskManagement, fn, c.resp)
	}
	return nil
}

// LUReset resets a logical unit.
func (s *Session) LUReset(ctx context.Context, lun scsi.LUN) error {
	return s.TaskManagement(ctx, iscsi.FuncLUReset, lun)
}

// Ping sends a NOP-Out with data and waits for the echo, which is compared.
func (s *Session) Ping(ctx context.Context, data []byte) error {
	c := &control{}
	if err := s.control(ctx, &iscsi.NopOut{Immediate: true, TTT: iscsi.ReservedTag}, data, c, s.cfg.NopTimeout); err != nil {
		return fmt.Errorf("ping: %w", err)
	}
	n := min(len(data), s.p.MaxRecv) // the target cuts the echo to what we take (§11.19)
	if len(c.data) < n || string(c.data[:n]) != string(data[:n]) {
		return fmt.Errorf("ping: %w: echo of %d bytes differs from the %d sent", ErrProtocol, len(c.data), len(data))
	}
	return nil
}

// SendTargets asks the target about itself (§13.3): its portals, in a normal session.
func (s *Session) SendTargets(ctx context.Context) ([]TargetInfo, error) {
	list := targetList{at: s.portal}
	req := &iscsi.TextRequest{Immediate: true, Final: true, TTT: iscsi.ReservedTag}
	data := iscsi.AppendPair(nil, iscsi.KeySendTargets, "")
	for n := 0; ; n++ {
		c := &control{}
		if err := s.control(ctx, req, data, c, s.cfg.LoginTimeout); err != nil {
			return nil, fmt.Errorf("send targets: %w", err)
		}
		if err := list.add(c.data); err != nil {
			return nil, fmt.Errorf("send targets: %w", err)
		}
		if c.text.Final {
			return list.done()
		}
		if c.text.TTT == iscsi.ReservedTag || n == maxDiscovery {
			return nil, fmt.Errorf("send targets: %w: text without an end", ErrProtocol)
		}
		// The same tag is kept during an exchange (§11.10.3); it is free again.
		req = &iscsi.TextRequest{Immediate: true, Final: true, TTT: c.text.TTT, LUN: c.text.LUN}
		data = nil
	}
}

// Logout refuses new commands, waits for those in flight, logs out and ends the
// session. When ctx ends first the connection is cut, and the error says so. On a
// session that is over it returns nil.
func (s *Session) Logout(ctx context.Context) error {
	s.mu.Lock()
	if s.mu.err != nil {
		s.mu.Unlock()
		<-s.over
		return nil
	}
	if s.mu.closing == nil {
		s.mu.closing = ErrClosed
	}
	drained := s.drainedLocked()
	s.mu.Unlock()
	if drained != nil {
		select {
		case <-drained:
		case <-s.dead:
		case <-ctx.Done():
			s.fail(fmt.Errorf("%w: commands were in flight: %w", ErrClosed, context.Cause(ctx)))
			<-s.over
			return fmt.Errorf("log out of %s: %w", s.target, context.Cause(ctx))
		}
	}
	err := s.logout(ctx)
	s.fail(ErrClosed)
	<-s.over
	return err
}

func (s *Session) logout(ctx context.Context) error {
	var err error
	for {
		c := &control{}
		// On the answer the session is over, for the reader as well: what follows on the
		// connection is nothing.
		c.apply = func() { s.failLocked(ErrClosed) }
		err = s.control(ctx, &iscsi.LogoutRequest{Immediate: true, Reason: iscsi.LogoutSession}, nil, c, s.cfg.LogoutTimeout)
		if !errors.Is(err, errLinkLost) || s.Err() != nil || len(s.Connections()) == 0 {
			break
		}
	}
	if err != nil && !errors.Is(err, ErrClosed) {
		return fmt.Errorf("log out of %s: %w", s.target, err)
	}
	return nil
}

// Close logs out, within Config.LogoutTimeout, and returns when all goroutines of
// the session are gone.
func (s *Session) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.LogoutTimeout)
	defer cancel()
	return s.Logout(ctx)
}

// drainedLocked gives a channel that is closed when no command is in flight any
// more, nil when none is now.
func (s *Session) drainedLocked() chan struct{} {
	if s.mu.inFlight == 0 {
		return nil
	}
	if s.mu.drained == nil {
		s.mu.drained = make(chan struct{})
	}
	return s.mu.drained
}
