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
	dataSN uint32 // next DataSN of Data-In
	r2tSN  uint32 // next R2TSN

	mu struct {
		gen     uint16 // counts uses of the slot: the upper half of the task tag
		state   taskState
		writing bool // the writer holds pieces of out
		r2ts    int  // R2Ts not yet served
		cmdSN   iscsi.Serial
		res     Result
		err     error
	}
}

// control is a request of our own other than a command: NOP-Out, task management,
// logout, text.
type control struct {
	done  chan struct{}
	err   error
	resp  iscsi.TaskResp // of task management
	text  iscsi.TextResponse
	data  []byte
	apply func() // run by the reader, with mu held, when the target has done it
}

// work is something to send that does not wait for the command window.
type work struct {
	pdu  iscsi.PDU // nil: data for an R2T
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

// Session is a normal session with one connection. All methods may be called
// concurrently.
type Session struct {
	cfg    Config
	target string
	portal iscsi.Portal
	conn   net.Conn
	r      *iscsi.Reader
	w      *iscsi.Writer
	p      iscsi.Params
	tsih   uint16
	tpgt   uint16
	isid   iscsi.ISID

	slots []*task
	free  chan *task
	wake  chan struct{} // there is something to send
	dead  chan struct{} // closed by fail
	over  chan struct{} // closed when the reader and the writer are gone and all tasks failed

	expStatSN atomic.Uint32
	maxSend   atomic.Int32 // the target's MaxRecvDataSegmentLength now
	lastRecv  atomic.Int64 // time.Since(start) in ns
	start     time.Time
	side      sync.WaitGroup // goroutines that act on asynchronous messages

	mu struct {
		sync.Mutex
		err      error // why the session ended
		closing  error // new commands are refused with it
		cmds     fifo[*task]
		urgent   fifo[work]
		ctl      map[uint32]*control
		ctlSeq   uint16
		inFlight int // tasks not free
		drained  chan struct{}
		cmdSN    iscsi.Serial
		expCmdSN iscsi.Serial
		maxCmdSN iscsi.Serial
		ping     bool
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
	return newSession(w, p, iqn, cfg), nil
}

func newSession(w *wire, portal iscsi.Portal, target string, cfg Config) *Session {
	s := &Session{cfg: cfg, target: target, portal: portal, conn: w.conn, r: w.r, w: w.w, p: w.p, tsih: w.login.TSIH(), tpgt: w.login.TPGT(),
		isid: cfg.isid(target), free: make(chan *task, cfg.QueueDepth), wake: make(chan struct{}, 1), dead: make(chan struct{}),
		over: make(chan struct{}), start: time.Now()}
	for i := range cfg.QueueDepth {
		t := &task{slot: uint16(i), done: make(chan struct{}, 1)}
		s.slots = append(s.slots, t)
		s.free <- t
	}
	s.mu.ctl = map[uint32]*control{}
	s.mu.cmdSN = w.cmdSN
	s.mu.expCmdSN, s.mu.maxCmdSN = w.login.Window()
	s.expStatSN.Store(uint32(w.login.ExpStatSN()))
	s.maxSend.Store(int32(w.p.MaxSend))
	go s.supervise()
	return s
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
	_ = s.conn.Close() // the reader and the writer come back from their calls
}

func (s *Session) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// supervise starts reader and writer, watches the peer, and when both are gone fails
// every task: not earlier, since they use the tasks' buffers.
func (s *Session) supervise() {
	var g sync.WaitGroup
	g.Go(func() { s.fail(s.read()) })
	g.Go(func() { s.fail(s.write()) })
	s.watch()
	g.Wait()

	s.mu.Lock()
	err := s.mu.err
	if !errors.Is(err, ErrClosed) {
		s.cfg.Logger.Warn("session ended", zap.String("iqn", s.target), zap.Stringer("portal", s.portal), zap.Error(err))
	}
	for _, t := range s.slots {
		t.mu.writing = false
		switch t.mu.state {
		case taskQueued, taskSent:
			t.mu.err = err
			s.finishLocked(t)
		case taskDone:
			// Answered, but its data were with the writer: the token is still due.
			s.tokenLocked(t)
		}
	}
	s.mu.cmds = fifo[*task]{}
	for itt, c := range s.mu.ctl {
		c.err = err
		close(c.done)
		delete(s.mu.ctl, itt)
	}
	s.mu.Unlock()
	s.side.Wait()
	close(s.over)
}

// watch pings a silent peer until the session is dead.
func (s *Session) watch() {
	if s.cfg.NopInterval < 0 {
		<-s.dead
		return
	}
	tick := time.NewTicker(max(min(s.cfg.NopInterval, s.cfg.NopTimeout)/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-s.dead:
			return
		case <-tick.C:
		}
		silent := time.Since(s.start) - time.Duration(s.lastRecv.Load())
		switch {
		case silent >= s.cfg.NopInterval+s.cfg.NopTimeout:
			s.fail(fmt.Errorf("%w: silent for %v", ErrNoAnswer, silent.Round(time.Millisecond)))
		case silent >= s.cfg.NopInterval:
			s.mu.Lock()
			if !s.mu.ping && s.mu.err == nil {
				s.mu.ping = true
				s.controlLocked(&iscsi.NopOut{Immediate: true, TTT: iscsi.ReservedTag}, nil, &control{apply: func() { s.mu.ping = false }})
			}
			s.mu.Unlock()
		}
	}
}

// controlLocked queues a request of our own; c.done is closed when it is answered.
func (s *Session) controlLocked(p iscsi.PDU, data []byte, c *control) (itt uint32) {
	c.done = make(chan struct{})
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
	s.mu.urgent.push(work{pdu: p, data: data})
	s.kick()
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
	s.mu.cmds.push(t)
	s.mu.Unlock()
	s.kick()

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
	t.got, t.dataSN, t.r2tSN = 0, 0, 0
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
	if !t.mu.writing {
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
		s.mu.cmds.drop(func(q *task) bool { return q == t })
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
		// never arrived; on one connection the reader knows of the former.
		if c.resp == iscsi.TaskComplete || c.resp == iscsi.TaskNotFound {
			end()
		}
	}
	req := &iscsi.TaskMgmtRequest{Immediate: true, Function: iscsi.FuncAbortTask, LUN: t.lun, RefTag: t.cmd.ITT, RefCmdSN: cmdSN}
	err := s.control(context.Background(), req, nil, c, s.cfg.AbortTimeout)
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
	var drained chan struct{}
	if s.mu.inFlight > 0 {
		if s.mu.drained == nil {
			s.mu.drained = make(chan struct{})
		}
		drained = s.mu.drained
	}
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
	c := &control{}
	// On the answer the session is over, for the reader as well: what follows on the
	// connection is nothing.
	c.apply = func() { s.failLocked(ErrClosed) }
	err := s.control(ctx, &iscsi.LogoutRequest{Immediate: true, Reason: iscsi.LogoutSession}, nil, c, s.cfg.LogoutTimeout)
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

// write is the writer: control requests and solicited data first, then commands as
// the window allows. What is ready goes out with one writev.
func (s *Session) write() error {
	var batch []*task // tasks whose data the codec's writer holds
	flush := func() error {
		err := s.w.Flush()
		if len(batch) > 0 {
			s.mu.Lock()
			for _, t := range batch {
				t.mu.writing = false
				if t.mu.state == taskDone {
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
		if s.mu.err != nil {
			s.mu.Unlock()
			return s.mu.err
		}
		var err error
		var t *task
		var it work
		var cmd iscsi.ScsiCommand
		switch {
		case s.mu.urgent.len() > 0:
			it = s.mu.urgent.pop()
			if it.pdu != nil {
				stamp(it.pdu, s.mu.cmdSN, iscsi.Serial(s.expStatSN.Load()))
				break
			}
			t = it.t
			if t.mu.gen != it.gen || t.mu.state != taskSent {
				s.mu.Unlock()
				continue // answered before its data were asked for to the end
			}
			t.mu.r2ts--
		case s.mu.cmds.len() > 0 && s.mu.cmdSN.LessEq(s.mu.maxCmdSN):
			t = s.mu.cmds.pop()
			t.mu.state = taskSent
			t.mu.cmdSN = s.mu.cmdSN
			s.mu.cmdSN++
			cmd = t.cmd
			cmd.CmdSN, cmd.ExpStatSN = t.mu.cmdSN, iscsi.Serial(s.expStatSN.Load())
		default:
			s.mu.Unlock()
			if s.w.Pending() > 0 {
				if err := flush(); err != nil {
					return err
				}
				continue
			}
			select {
			case <-s.wake:
			case <-s.dead:
			}
			continue
		}
		if t != nil && !t.mu.writing {
			t.mu.writing = true
			batch = append(batch, t)
		}
		s.mu.Unlock()
		s.w.MaxData = int(s.maxSend.Load())
		switch {
		case it.pdu != nil:
			err = s.w.Append(it.pdu, it.data)
		case it.t != nil:
			err = s.sendData(t, it.lun, it.ttt, it.off, it.n, 0)
		default:
			err = s.sendCommand(t, &cmd)
		}
		if err == nil && s.w.Pending() >= flushAt {
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
	}
}

// sendCommand sends a command with its immediate data and, if the target takes it,
// the rest of the first burst behind it (§4.2.4.2).
func (s *Session) sendCommand(t *task, cmd *iscsi.ScsiCommand) error {
	imm, first := 0, 0
	if s.p.ImmediateData {
		imm = min(len(t.out), s.w.MaxData, s.p.FirstBurstLength)
		first = imm
	}
	if !s.p.InitialR2T {
		first = min(len(t.out), s.p.FirstBurstLength)
	}
	cmd.Final = first == imm
	cmd.Encode(s.w.Begin())
	if err := s.w.End(t.ahs, t.out[:imm]); err != nil {
		return err
	}
	if first > imm {
		return s.sendData(t, 0, iscsi.ReservedTag, imm, first-imm, 0)
	}
	return nil
}

// sendData sends a sequence of Data-Out PDUs: out[off:off+n].
func (s *Session) sendData(t *task, lun iscsi.LUN, ttt uint32, off, n int, dataSN uint32) error {
	if ttt == iscsi.ReservedTag {
		lun = t.lun
	}
	for n > 0 {
		m := min(n, s.w.MaxData)
		do := iscsi.DataOut{Final: m == n, LUN: lun, ITT: t.cmd.ITT, TTT: ttt, ExpStatSN: iscsi.Serial(s.expStatSN.Load()), DataSN: dataSN, Offset: uint32(off)}
		do.Encode(s.w.Begin())
		if err := s.w.End(nil, t.out[off:off+m]); err != nil {
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
func (s *Session) read() error {
	for {
		h, err := s.r.Next()
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
		s.lastRecv.Store(int64(time.Since(s.start)))
		if err := s.pdu(h); err != nil {
			switch {
			case errors.Is(err, iscsi.ErrDataDigest):
				return broke("%w", err) // error recovery level 0 knows no other way (§7.7)
			case errors.Is(err, ErrProtocol), errors.Is(err, ErrRejected), errors.Is(err, ErrDropped):
				return err
			}
			return fmt.Errorf("%w: %w", ErrDropped, err) // the stream ended in a data segment
		}
	}
}

// numbers takes StatSN, which has to be the next one, and the window. advance says
// that the PDU used a StatSN up.
func (s *Session) numbers(op iscsi.Opcode, stat, exp, mx iscsi.Serial, advance bool) error {
	if want := iscsi.Serial(s.expStatSN.Load()); advance {
		if stat != want {
			return broke("%s has StatSN %d, want %d", op, stat, want)
		}
		s.expStatSN.Store(uint32(want.Add(1)))
	}
	s.windowLocking(exp, mx)
	return nil
}

// windowLocking moves the window (§4.2.2.1): a pair with MaxCmdSN below ExpCmdSN-1
// is ignored, and neither goes back.
func (s *Session) windowLocking(exp, mx iscsi.Serial) {
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
	waiting := opened && s.mu.cmds.len() > 0
	s.mu.Unlock()
	if waiting {
		s.kick()
	}
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
func (s *Session) stray(op iscsi.Opcode, itt uint32) {
	s.cfg.Logger.Debug("pdu for no task", zap.String("iqn", s.target), zap.Stringer("pdu", op), zap.Uint32("itt", itt))
}

func (s *Session) pdu(h *iscsi.BHS) error {
	switch op := h.Opcode(); op {
	case iscsi.OpDataIn:
		return s.dataIn(h)
	case iscsi.OpScsiResponse:
		return s.response(h)
	case iscsi.OpR2T:
		return s.r2t(h)
	case iscsi.OpNopIn:
		return s.nopIn(h)
	case iscsi.OpTaskMgmtResp:
		var p iscsi.TaskMgmtResponse
		if err := p.Decode(h); err != nil {
			return broke("%w", err)
		}
		if err := s.numbers(op, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil {
			return err
		}
		s.answered(op, p.ITT, func(c *control) { c.resp = p.Response })
		return nil
	case iscsi.OpLogoutResp:
		var p iscsi.LogoutResponse
		if err := p.Decode(h); err != nil {
			return broke("%w", err)
		}
		if err := s.numbers(op, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil {
			return err
		}
		s.answered(op, p.ITT, func(c *control) {
			if p.Response != iscsi.LogoutClosed {
				c.err = fmt.Errorf("%w: logout: %s", ErrRejected, p.Response)
			}
		})
		return nil
	case iscsi.OpTextResp:
		var p iscsi.TextResponse
		if err := p.Decode(h); err != nil {
			return broke("%w", err)
		}
		data, err := s.r.AppendData(nil)
		if err != nil {
			return err
		}
		if err := s.numbers(op, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil {
			return err
		}
		s.answered(op, p.ITT, func(c *control) { c.text, c.data = p, data })
		return nil
	case iscsi.OpAsync:
		return s.async(h)
	case iscsi.OpReject:
		return s.reject(h)
	default:
		return broke("%s from a target in full feature phase", op)
	}
}

// answered hands an answer to the control request that waits for it.
func (s *Session) answered(op iscsi.Opcode, itt uint32, set func(*control)) {
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
		s.stray(op, itt)
	}
}

func (s *Session) dataIn(h *iscsi.BHS) error {
	var p iscsi.DataIn
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	t := s.find(p.ITT)
	if t == nil {
		s.stray(iscsi.OpDataIn, p.ITT)
		if err := s.r.DiscardData(); err != nil {
			return err
		}
		return s.numbers(iscsi.OpDataIn, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, p.HasStatus)
	}
	n := s.r.DataLen()
	switch {
	case !t.cmd.Read:
		return broke("Data-In for a command that reads nothing")
	case p.DataSN != t.dataSN:
		return broke("Data-In has DataSN %d, want %d", p.DataSN, t.dataSN)
	case int64(p.Offset) != int64(t.got):
		return broke("Data-In is for offset %d, want %d", p.Offset, t.got)
	case n > len(t.in)-t.got:
		return broke("Data-In of %d bytes at offset %d of %d", n, p.Offset, len(t.in))
	}
	if err := s.r.ReadData(t.in[t.got : t.got+n]); err != nil {
		return err
	}
	t.got += n
	t.dataSN++
	if err := s.numbers(iscsi.OpDataIn, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, p.HasStatus); err != nil {
		return err
	}
	if !p.HasStatus {
		return nil
	}
	return s.complete(t, Result{Status: scsi.Status(p.Status), Residual: residual(p.Overflow, p.Underflow, p.Residual)})
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

func (s *Session) response(h *iscsi.BHS) error {
	var p iscsi.ScsiResponse
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	var sense []byte
	if s.r.DataLen() > 0 {
		d, err := s.r.AppendData(nil)
		if err != nil {
			return err
		}
		if sense, _, err = iscsi.ParseSense(d); err != nil {
			return broke("%w", err)
		}
	}
	if err := s.numbers(iscsi.OpScsiResponse, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil {
		return err
	}
	t := s.find(p.ITT)
	if t == nil {
		s.stray(iscsi.OpScsiResponse, p.ITT)
		return nil
	}
	if p.Response != iscsi.ResponseCompleted {
		s.mu.Lock()
		t.mu.err = fmt.Errorf("target failure: iSCSI response %#02x", uint8(p.Response))
		s.finishLocked(t)
		s.mu.Unlock()
		return nil
	}
	return s.complete(t, Result{Status: scsi.Status(p.Status), Sense: sense, Residual: residual(p.Overflow, p.Underflow, p.Residual)})
}

// complete ends a task with a status, after a look at whether the data moved agree
// with the residual: a read that is shorter than it says would be stale memory taken
// for data.
func (s *Session) complete(t *task, r Result) error {
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

func (s *Session) r2t(h *iscsi.BHS) error {
	var p iscsi.R2T
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	if err := s.numbers(iscsi.OpR2T, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, false); err != nil {
		return err
	}
	t := s.find(p.ITT)
	if t == nil {
		s.stray(iscsi.OpR2T, p.ITT)
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
	s.mu.urgent.push(work{t: t, gen: t.mu.gen, lun: p.LUN, ttt: p.TTT, off: int(p.Offset), n: int(p.Length)})
	s.kick()
	return nil
}

func (s *Session) nopIn(h *iscsi.BHS) error {
	var p iscsi.NopIn
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	data, err := s.r.AppendData(nil)
	if err != nil {
		return err
	}
	if err := s.numbers(iscsi.OpNopIn, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, p.ITT != iscsi.ReservedTag); err != nil {
		return err
	}
	if p.ITT != iscsi.ReservedTag {
		s.answered(iscsi.OpNopIn, p.ITT, func(c *control) { c.data = data })
		return nil
	}
	if p.TTT == iscsi.ReservedTag {
		return nil // numbers only
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A target has no right to many unanswered pings, and no memory of ours.
	if s.mu.urgent.len() > 4*len(s.slots)+1024 {
		return broke("flood of NOP-Ins")
	}
	s.mu.urgent.push(work{pdu: &iscsi.NopOut{Immediate: true, LUN: p.LUN, ITT: iscsi.ReservedTag, TTT: p.TTT}})
	s.kick()
	return nil
}

func (s *Session) async(h *iscsi.BHS) error {
	var p iscsi.Async
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	data, err := s.r.AppendData(nil)
	if err != nil {
		return err
	}
	if err := s.numbers(iscsi.OpAsync, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil {
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
	case iscsi.AsyncDropConnection, iscsi.AsyncDropSession:
		return fmt.Errorf("%w: %s, reconnect after %d s", ErrDropped, p.Event, p.Param2)
	case iscsi.AsyncRenegotiate:
		s.mu.Lock()
		s.controlLocked(&iscsi.TextRequest{Immediate: true, Final: true, TTT: iscsi.ReservedTag},
			iscsi.AppendPair(nil, iscsi.KeyMaxRecvDataSegmentLength, fmt.Sprint(s.p.MaxRecv)), s.renegotiation())
		s.mu.Unlock()
	}
	return nil
}

// renegotiation takes the answer to a text request that declares our
// MaxRecvDataSegmentLength: the target may declare its own anew (§13.12).
func (s *Session) renegotiation() *control {
	c := &control{}
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
				s.maxSend.Store(int32(n))
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
	var drained chan struct{}
	if s.mu.inFlight > 0 {
		if s.mu.drained == nil {
			s.mu.drained = make(chan struct{})
		}
		drained = s.mu.drained
	}
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
func (s *Session) reject(h *iscsi.BHS) error {
	var p iscsi.Reject
	if err := p.Decode(h); err != nil {
		return broke("%w", err)
	}
	data, err := s.r.AppendData(nil)
	if err != nil {
		return err
	}
	if err := s.numbers(iscsi.OpReject, p.StatSN, p.ExpCmdSN, p.MaxCmdSN, true); err != nil {
		return err
	}
	if len(data) < iscsi.BHSLen {
		return fmt.Errorf("%w: %s, of an unknown PDU", ErrRejected, p.Reason)
	}
	bad := (*iscsi.BHS)(data)
	why := fmt.Errorf("%w: %s: %s", ErrRejected, bad.Opcode(), p.Reason)
	s.cfg.Logger.Warn("target rejected a pdu", zap.String("iqn", s.target), zap.Stringer("pdu", bad.Opcode()), zap.Stringer("reason", p.Reason))
	switch bad.Opcode() {
	case iscsi.OpScsiCommand:
		t := s.find(bad.ITT())
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
