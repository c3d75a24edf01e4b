package target

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/iscsi"
)

// conn is a connection. One goroutine at a time is its reader: it takes PDUs
// apart, runs short commands to completion and flushes the responses when the
// input is drained. What can block is handed off to the logical unit's pool; a
// command that was run in place and turns out to block hands the role of the
// reader on (see inline). One writer goroutine flushes what the pool queues.
type conn struct {
	srv           *Server
	nc            net.Conn
	remote, local netip.AddrPort
	src           *iscsi.Buffer
	r             *iscsi.Reader
	s             *session // set at login, before full feature phase
	log           *zap.Logger

	closed chan struct{} // closed by shut
	once   sync.Once
	cause  error // set before closed is closed
	wake   chan struct{}

	cid                      uint16    // set at login, with what follows
	since                    time.Time // end of login
	headerDigest, dataDigest bool
	track                    bool // acked is kept: there may be other connections, or keeps
	keeps                    bool // error recovery level 1

	lastRead atomic.Int64 // ns since the server's start
	pinged   atomic.Int64 // when an unanswered NOP-In was sent, 0 = none

	challenges [][]byte // CHAP challenges sent during login

	tombs   map[uint32]struct{} // tags whose stray Data-Out is dropped silently; guarded by s.mu
	nextTTT atomic.Uint32

	// text guards a text negotiation: its turn may come on another reader.
	text struct {
		sync.Mutex
		in  iscsi.TextBuffer
		out iscsi.TextQueue
		ttt uint32
		neg *iscsi.Negotiator
	}

	// acks are who waits for ExpStatSN; acked is the last one received.
	acks struct {
		sync.Mutex
		list   []*fence
		closed bool
	}
	waiting atomic.Int32 // len(acks.list)
	acked   atomic.Uint32

	// tasks are what is left of the last piece of memory for tasks; of the reader.
	tasks []task

	// role passes the reader's role on, see inline.
	role struct {
		sync.Mutex
		inline bool // a command runs on the reader
		timer  *time.Timer
	}

	// out guards the queue of responses.
	out struct {
		sync.Mutex
		q       []response
		pending int // bytes queued and being written
		room    chan struct{}
	}
	flushing sync.Mutex // held by who encodes and writes; guards what follows
	w        *iscsi.Writer
	spare    []response
	statSN   iscsi.Serial
	kept     []kept // in order of StatSN
	deadline time.Time
	failed   bool
}

// maxPending bounds what is queued for a peer that does not read; above it the
// reader waits.
const maxPending = 16 << 20

func newConn(srv *Server, nc net.Conn) *conn {
	c := &conn{
		srv: srv, nc: nc, closed: make(chan struct{}), wake: make(chan struct{}, 1),
		src: iscsi.NewBuffer(nc), tombs: map[uint32]struct{}{},
	}
	c.text.ttt = iscsi.ReservedTag
	c.remote, c.local = addrPort(nc.RemoteAddr()), addrPort(nc.LocalAddr())
	c.r = iscsi.NewReader(c.src, iscsi.DefaultMaxRecv)
	c.w = iscsi.NewWriter(nc, iscsi.DefaultMaxRecv)
	c.log = srv.log.With(zap.Stringer("remote", c.remote))
	c.out.room = make(chan struct{}, 1)
	return c
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// shut closes the socket; everything else follows from that.
func (c *conn) shut(why error) {
	c.once.Do(func() {
		c.cause = why
		close(c.closed)
		_ = c.nc.Close()
	})
}

// hungUp tells whether the initiator has closed the connection, which the reader
// may not have noticed yet.
func (c *conn) hungUp() bool {
	tc, ok := c.nc.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		const closeWait, closed = 8, 7 // states of TCP as the kernel numbers them
		ti, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		gone = err == nil && (ti.State == closeWait || ti.State == closed)
	})
	return gone || err != nil
}

var (
	errLoggedOut = errors.New("logged out")
	errPeerGone  = errors.New("connection closed by the initiator")
)

// serve runs the connection from its first byte.
func (c *conn) serve() {
	id, err := c.login()
	c.srv.guard.done(c.challenges)
	c.srv.loginDone()
	if err != nil {
		closing := false // by us
		select {
		case <-c.closed:
			closing = true
		default:
		}
		c.shut(err)
		switch {
		case c.s != nil:
			c.s.detach(c, err, nil)
		case closing, errors.Is(err, io.EOF) && id.InitiatorName == "":
		case c.loginFailed(err, &id):
			c.log.Warn("login failed", zap.String("initiator", id.InitiatorName), zap.String("target", id.TargetName), zap.Error(err))
		}
		c.srv.dropConn(c)
		return
	}
	c.srv.wg.Add(1)
	go c.writer()
	c.read()
}

// login runs the login phase in lock step. It returns what the initiator has said
// of itself also when it fails.
func (c *conn) login() (iscsi.LoginIdentity, error) {
	if err := c.nc.SetDeadline(time.Now().Add(c.srv.opt.LoginTimeout)); err != nil {
		return iscsi.LoginIdentity{}, err
	}
	m := iscsi.NewTargetLogin(iscsi.TargetLoginConfig{
		Want: c.srv.opt.Want, Rand: rand.Reader, Window: uint32(c.srv.opt.QueueDepth),
		Admit: func(id *iscsi.LoginIdentity) iscsi.Admission { return c.srv.admit(c, id) },
		Start: func(id *iscsi.LoginIdentity, p iscsi.Params) (uint16, iscsi.LoginStatus) {
			return c.srv.start(c, id, p)
		},
	})
	var data []byte
	for {
		b, err := c.r.Next()
		if err != nil {
			return m.Identity(), err
		}
		var req iscsi.LoginRequest
		if err := req.Decode(b); err != nil {
			return m.Identity(), err // not a login request: close without an answer
		}
		if data, err = c.r.AppendData(data[:0]); err != nil {
			return m.Identity(), err
		}
		st := m.Step(&req, data)
		if st.Done || st.Err != nil {
			c.authOutcome(st.Err, m.Identity().User)
		}
		if st.Done {
			c.text.neg, c.statSN = m.Negotiator(), m.StatSN()
			if req.TSIH == 0 {
				// The session exists: CmdSN of the login request is the next expected
				// (login requests are immediate).
				c.s.mu.Lock()
				c.s.expCmdSN = req.CmdSN
				c.s.maxCmdSN = req.CmdSN.Add(uint32(c.s.limits.depth)) - 1
				c.s.mu.Unlock()
			}
			st.Resp.ExpCmdSN, st.Resp.MaxCmdSN = c.s.window()
		}
		if err := c.w.Append(&st.Resp, st.Data); err != nil {
			return m.Identity(), err
		}
		if err := c.w.Flush(); err != nil {
			return m.Identity(), err
		}
		if st.Err != nil {
			return m.Identity(), st.Err
		}
		if st.Done {
			p := m.Params()
			c.r.MaxData, c.r.HeaderDigest, c.r.DataDigest = p.MaxRecv, p.HeaderDigest, p.DataDigest
			c.w.MaxData, c.w.HeaderDigest, c.w.DataDigest = c.s.limits.sendLimit(p.MaxSend), p.HeaderDigest, p.DataDigest
			return m.Identity(), c.nc.SetDeadline(time.Time{})
		}
	}
}

// read is the loop of the reader. It ends with the connection, or when a command
// that it ran in place blocked and the role went to another goroutine.
func (c *conn) read() {
	for {
		err := c.step()
		if errors.Is(err, errRoleGone) {
			return
		}
		if err == nil {
			continue
		}
		select {
		case <-c.closed:
			err = c.cause
		default:
			if errors.Is(err, io.EOF) {
				err = errPeerGone
			}
		}
		c.flush()
		c.s.detach(c, err, nil)
		c.srv.dropConn(c)
		return
	}
}

var errRoleGone = errors.New("another goroutine reads on")

// step handles one PDU.
func (c *conn) step() error {
	if c.src.Buffered() < iscsi.BHSLen {
		c.flush()
	}
	if err := c.waitRoom(); err != nil {
		return err
	}
	b, err := c.r.Next()
	c.lastRead.Store(c.srv.now())
	if err != nil {
		return c.judge(b, err)
	}
	if c.track {
		c.acknowledge(b.ExpStatSN())
	}
	return c.judge(b, c.dispatch(b))
}

// judge turns a protocol error into a Reject where the stream can be followed,
// and leaves every other error as the end of the connection.
func (c *conn) judge(b *iscsi.BHS, err error) error {
	if err == nil {
		return nil
	}
	var pe *iscsi.ProtocolError // on the heap
	c.s.countProtocol(err)
	if c.dataLost(err) && b != nil { // it was read to its end, and its CmdSN is not used up
		c.reject(b, iscsi.RejectDataDigest)
		return nil
	}
	if !errors.As(err, &pe) || pe.Fatal || b == nil {
		return err
	}
	h := *b // reading on overwrites it
	if err := c.r.DiscardData(); c.dataLost(err) {
		c.s.countProtocol(err)
	} else if err != nil {
		return err
	}
	c.reject(&h, pe.Reason)
	c.consume(&h, pe.Reason)
	return nil
}

// consume takes the CmdSN of a rejected PDU that may not be sent again (the table
// of §11.17.1), or what comes after it would wait for its turn for ever.
func (c *conn) consume(h *iscsi.BHS, why iscsi.RejectReason) {
	switch why {
	case iscsi.RejectProtocolError, iscsi.RejectUnsupported, iscsi.RejectInvalidField:
	default:
		return
	}
	switch h.Opcode() {
	case iscsi.OpNopOut, iscsi.OpScsiCommand, iscsi.OpTaskMgmtReq, iscsi.OpTextReq, iscsi.OpLogoutReq:
		if !h.Immediate() {
			c.s.order(turn{c: c, f: func() {}}, h.CmdSN(), false)
		}
	}
}

func (c *conn) reject(b *iscsi.BHS, why iscsi.RejectReason) { c.rejectPDU(b, c.r.AHS(), why) }

// rejectPDU is reject of a PDU that the reader has left behind.
func (c *conn) rejectPDU(b *iscsi.BHS, ahs []byte, why iscsi.RejectReason) {
	c.s.stats.rejects.Add(1)
	h := make([]byte, iscsi.BHSLen, iscsi.BHSLen+iscsi.MaxAHS)
	copy(h, b[:])
	h = append(h, ahs...)
	c.log.Debug("PDU rejected", zap.Stringer("opcode", b.Opcode()), zap.Stringer("reason", why))
	c.queue(response{pdu: &iscsi.Reject{Reason: why}, data: h})
}

// waitRoom waits while the peer takes nothing of what it asked for.
func (c *conn) waitRoom() error {
	for {
		c.out.Lock()
		over := c.out.pending > maxPending
		c.out.Unlock()
		if !over {
			return nil
		}
		c.flush()
		c.out.Lock()
		over = c.out.pending > maxPending
		c.out.Unlock()
		if !over {
			return nil
		}
		select {
		case <-c.out.room:
		case <-c.closed:
			return c.cause
		}
	}
}

func (c *conn) dispatch(b *iscsi.BHS) error {
	if c.s.tgt == nil { // discovery
		switch b.Opcode() {
		case iscsi.OpTextReq, iscsi.OpNopOut, iscsi.OpLogoutReq:
		default:
			return &iscsi.ProtocolError{Reason: iscsi.RejectProtocolError, Opcode: b.Opcode(), Why: "not in a discovery session"}
		}
	}
	switch b.Opcode() {
	case iscsi.OpScsiCommand:
		return c.onCommand(b)
	case iscsi.OpDataOut:
		return c.onDataOut(b)
	case iscsi.OpNopOut:
		return c.onNop(b)
	case iscsi.OpTaskMgmtReq:
		return c.onTaskMgmt(b)
	case iscsi.OpTextReq:
		return c.onText(b)
	case iscsi.OpLogoutReq:
		return c.onLogout(b)
	case iscsi.OpSNACK:
		return c.onSNACK(b)
	case iscsi.OpLoginReq:
		return &iscsi.ProtocolError{Reason: iscsi.RejectProtocolError, Opcode: b.Opcode(), Why: "login in full feature phase"}
	}
	if b.Opcode().Known() {
		return &iscsi.ProtocolError{Reason: iscsi.RejectProtocolError, Opcode: b.Opcode(), Why: "sent by the wrong side"}
	}
	return &iscsi.ProtocolError{Reason: iscsi.RejectUnsupported, Opcode: b.Opcode(), Why: "not defined"}
}

func (c *conn) onNop(b *iscsi.BHS) error {
	var p iscsi.NopOut
	if err := p.Decode(b); err != nil {
		return err
	}
	if p.TTT != iscsi.ReservedTag { // the answer to our ping; any LUN is fine
		c.pinged.Store(0)
	}
	if p.ITT == iscsi.ReservedTag {
		return c.r.DiscardData()
	}
	if !p.Immediate && !c.s.inWindow(p.CmdSN) {
		return c.r.DiscardData()
	}
	data, err := c.r.AppendData(nil)
	if err != nil {
		return err
	}
	data = data[:min(len(data), c.w.MaxData)]
	c.s.order(turn{c: c, f: func() {
		c.queue(response{pdu: &iscsi.NopIn{LUN: 0, ITT: p.ITT, TTT: iscsi.ReservedTag}, data: data})
	}}, p.CmdSN, p.Immediate)
	return nil
}

func (c *conn) onLogout(b *iscsi.BHS) error {
	var p iscsi.LogoutRequest
	if err := p.Decode(b); err != nil {
		return err
	}
	c.s.order(turn{c: c, f: func() { c.logout(&p) }}, p.CmdSN, p.Immediate)
	return nil
}

// logout closes the session or one of its connections. What is in progress there ends
// before the response (RFC 7143 11.14).
func (c *conn) logout(p *iscsi.LogoutRequest) {
	s := c.s
	resp := &iscsi.LogoutResponse{ITT: p.ITT, Time2Wait: uint16(s.params.DefaultTime2Wait)}
	answer := func(r iscsi.LogoutResult) {
		resp.Response = r
		c.queue(response{pdu: resp})
		c.kick()
	}
	if p.Reason == iscsi.LogoutRecovery { // it takes error recovery level 2
		answer(iscsi.LogoutNoRecovery)
		return
	}
	s.mu.Lock()
	all := p.Reason == iscsi.LogoutSession
	var x *conn
	if !all {
		if i := slices.IndexFunc(s.conns, func(o *conn) bool { return o.cid == p.CID }); i >= 0 {
			x = s.conns[i]
			all = len(s.conns) == 1
		}
	}
	s.leaving = s.leaving || all
	s.mu.Unlock()
	switch {
	case all:
		s.abort(func(*task) bool { return true }, func() {
			s.lose()
			s.loggedOut.Store(true)
			c.queue(response{pdu: resp, last: true})
			c.kick()
		})
	case x == nil:
		answer(iscsi.LogoutCIDNotFound)
	case x == c:
		s.abort(func(t *task) bool { return t.c == c }, func() {
			c.queue(response{pdu: resp, last: true})
			c.kick()
		})
	default:
		s.detach(x, errLoggedOut, func() { answer(iscsi.LogoutClosed) })
	}
}

// onText answers SendTargets and renegotiates MaxRecvDataSegmentLength.
func (c *conn) onText(b *iscsi.BHS) error {
	var p iscsi.TextRequest
	if err := p.Decode(b); err != nil {
		return err
	}
	if !p.Immediate && !c.s.inWindow(p.CmdSN) {
		return c.r.DiscardData()
	}
	data, err := c.r.AppendData(nil)
	if err != nil {
		return err
	}
	h := *b
	c.s.order(turn{c: c, f: func() {
		if why := c.textStep(&p, data); why != 0 {
			c.rejectPDU(&h, nil, why)
		}
	}}, p.CmdSN, p.Immediate)
	return nil
}

// textStep answers a text request, or says why it is to be rejected.
func (c *conn) textStep(p *iscsi.TextRequest, data []byte) iscsi.RejectReason {
	c.text.Lock()
	defer c.text.Unlock()
	x := &c.text
	reset := func() { x.in, x.out, x.ttt = iscsi.TextBuffer{}, iscsi.TextQueue{}, iscsi.ReservedTag }
	bad := func(why iscsi.RejectReason, s string) iscsi.RejectReason {
		reset()
		c.log.Debug("bad text request", zap.String("why", s))
		return why
	}
	if p.TTT != iscsi.ReservedTag && p.TTT != x.ttt {
		return bad(iscsi.RejectInvalidField, "target transfer tag is not one of ours")
	}
	if p.TTT == iscsi.ReservedTag { // a new exchange resets what was open (§11.10.4)
		reset()
	}
	if x.out.Empty() {
		pairs, err := x.in.Add(data, p.Continue)
		if err != nil {
			return bad(iscsi.RejectProtocolError, err.Error())
		}
		if p.Continue {
			x.ttt = c.ttt()
			c.queue(response{pdu: &iscsi.TextResponse{ITT: p.ITT, TTT: x.ttt}})
			return 0
		}
		var rest []iscsi.Pair
		for _, kv := range pairs {
			if kv.Key == iscsi.KeySendTargets {
				x.out.Put(c.srv.sendTargets(c, kv.Value)...)
			} else {
				rest = append(rest, kv)
			}
		}
		reply, err := x.neg.Receive(rest)
		if err != nil {
			return bad(iscsi.RejectProtocolError, err.Error())
		}
		x.out.Put(reply...)
		np := x.neg.Params()
		c.flushing.Lock()
		c.w.MaxData = c.s.limits.sendLimit(np.MaxSend)
		c.flushing.Unlock()
	} else if len(data) > 0 {
		return bad(iscsi.RejectProtocolError, "text in a request that has to fetch the rest of a response")
	}
	c.flushing.Lock()
	limit := c.w.MaxData
	c.flushing.Unlock()
	seg, more := x.out.Next(limit)
	resp := &iscsi.TextResponse{Final: !more && p.Final, Continue: more, ITT: p.ITT, TTT: iscsi.ReservedTag}
	x.ttt = iscsi.ReservedTag
	if !resp.Final {
		x.ttt = c.ttt()
		resp.TTT = x.ttt
	}
	c.queue(response{pdu: resp, data: seg})
	return 0
}

// ttt makes a target transfer tag.
func (c *conn) ttt() uint32 {
	n := c.nextTTT.Add(1)
	if n >= pingTTT {
		c.nextTTT.Store(1)
		n = 1
	}
	return n
}

// response is something to send. Numbers are given when it is encoded.
type response struct {
	pdu   iscsi.PDU // anything but the kinds below
	data  []byte    // its data segment, owned by the response
	last  bool      // close after it
	fence *fence    // armed when this is sent

	// A SNACK that is answered out of what is kept, with its header.
	snack  *iscsi.SNACK
	header *iscsi.BHS

	// SCSI response with Data-In in front.
	scsi        bool
	itt         uint32
	lun         iscsi.LUN
	status      uint8
	failed      bool // service response: target failure
	in          []byte
	buf         *block.Buf // of in; freed after the write
	over, under bool
	residual    uint32
	dataSN      uint32 // R2Ts sent, for ExpDataSN
}

func (o *response) size() int { return iscsi.BHSLen + len(o.data) + len(o.in) }

// queue appends a response. The reader flushes by itself; anyone else calls kick.
func (c *conn) queue(o response) {
	c.out.Lock()
	c.out.q = append(c.out.q, o)
	c.out.pending += o.size()
	c.out.Unlock()
}

// kick wakes the writer.
func (c *conn) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *conn) writer() {
	defer c.srv.wg.Done()
	for {
		select {
		case <-c.wake:
			// It waits where the reader would not: a writer that came back to try again
			// would spin for as long as the other one writes.
			c.flushing.Lock()
			c.flushLocked()
			c.flushing.Unlock()
		case <-c.closed:
			c.flushing.Lock()
			c.flushLocked() // returns the buffers
			c.failed = true
			c.letGo(len(c.kept))
			c.flushing.Unlock()
			return
		}
	}
}

// flush writes everything queued, unless someone is at it: then that one, or the
// writer, does.
func (c *conn) flush() {
	if !c.flushing.TryLock() {
		c.kick()
		return
	}
	c.flushLocked()
	c.flushing.Unlock()
}

// flushLocked writes everything queued; the caller holds flushing.
func (c *conn) flushLocked() {
	if len(c.kept) > 0 {
		c.trim()
	}
	for {
		c.out.Lock()
		q := c.out.q
		c.out.q = c.spare[:0]
		c.out.Unlock()
		if len(q) == 0 {
			c.spare = q
			return
		}
		done := 0
		for i := range q {
			o := &q[i]
			if !c.failed {
				if err := c.encode(o); err != nil {
					c.fail(err)
				}
			}
			last := o.last
			if c.w.Pending() >= 1<<20 || last || i == len(q)-1 {
				c.send()
				c.release(q[done : i+1]) // clears them
				done = i + 1
			}
			if last {
				c.fail(errLoggedOut)
			}
		}
		c.spare = q
	}
}

func (c *conn) fail(err error) {
	if !c.failed {
		c.failed = true
		c.shut(err)
	}
}

func (c *conn) send() {
	if c.failed {
		return
	}
	if now := time.Now(); c.deadline.Sub(now) < c.srv.opt.SendTimeout/2 {
		c.deadline = now.Add(c.srv.opt.SendTimeout)
		if err := c.nc.SetWriteDeadline(c.deadline); err != nil {
			c.fail(err)
			return
		}
	}
	if err := c.w.Flush(); err != nil {
		c.fail(err)
	}
}

// release frees what was written.
func (c *conn) release(q []response) {
	n := 0
	for i := range q {
		n += q[i].size()
		q[i].buf.Free()
		q[i] = response{}
	}
	c.out.Lock()
	c.out.pending -= n
	c.out.Unlock()
	select {
	case c.out.room <- struct{}{}:
	default:
	}
}

// encode gives a response its numbers and queues its PDUs.
func (c *conn) encode(o *response) error {
	exp, mx := c.s.window()
	switch {
	case o.snack != nil:
		return c.resend(o, exp, mx)
	case o.scsi && c.keeps:
		return c.encodeKept(o, exp, mx)
	case o.scsi:
		return c.encodeSCSI(o, exp, mx)
	}
	sn := c.statSN
	numbered := true
	switch p := o.pdu.(type) {
	case *iscsi.R2T:
		numbered = false
	case *iscsi.NopIn:
		numbered = p.ITT != iscsi.ReservedTag
	}
	if numbered {
		c.statSN++
	}
	h := c.w.Begin()
	renumber(o.pdu, sn, exp, mx)
	o.pdu.Encode(h)
	if o.fence != nil {
		c.arm(o.fence, c.statSN)
	}
	if err := c.w.End(nil, o.data); err != nil {
		return err
	}
	if numbered && c.keeps {
		c.keep(sn, o, kept{})
	}
	return nil
}

func (c *conn) stat() iscsi.Serial {
	n := c.statSN
	c.statSN++
	return n
}

// encodeSCSI makes the Data-In sequences and the response, with the status in
// the last Data-In where it is GOOD (§11.7.3).
func (c *conn) encodeSCSI(o *response, exp, mx iscsi.Serial) error {
	p := &c.s.params
	var sn uint32
	off, burst := 0, 0
	collapse := o.status == 0 && !o.failed && len(o.data) == 0
	for off < len(o.in) {
		n := min(len(o.in)-off, c.w.MaxData, p.MaxBurstLength-burst)
		d := iscsi.DataIn{ITT: o.itt, TTT: iscsi.ReservedTag, ExpCmdSN: exp, MaxCmdSN: mx, DataSN: sn, Offset: uint32(off)}
		burst += n
		end := off+n == len(o.in)
		if end || burst == p.MaxBurstLength {
			d.Final, burst = true, 0
		}
		if end && collapse {
			d.HasStatus, d.Status, d.StatSN = true, o.status, c.stat()
			d.Overflow, d.Underflow, d.Residual = o.over, o.under, o.residual
		}
		d.Encode(c.w.Begin())
		if err := c.w.End(nil, o.in[off:off+n]); err != nil {
			return err
		}
		off += n
		sn++
	}
	if off > 0 && collapse {
		return nil
	}
	return c.encodeStatus(o, c.stat(), sn, 0, exp, mx)
}

// fence is f that waits for the acknowledgement of what was sent before StatSN sn.
type fence struct {
	sn    iscsi.Serial
	armed bool // sn is known
	f     func()
}

// fence calls f when the initiator has acknowledged all responses that are queued
// now, or the connection is closed. A ping asks for it.
func (c *conn) fence(f func()) {
	x := &fence{f: f}
	c.acks.Lock()
	closed := c.acks.closed
	if !closed {
		c.acks.list = append(c.acks.list, x)
		c.waiting.Add(1)
	}
	c.acks.Unlock()
	if closed {
		f()
		return
	}
	c.queue(response{pdu: &iscsi.NopIn{ITT: iscsi.ReservedTag, TTT: pingTTT}, fence: x})
	c.kick()
}

func (c *conn) arm(x *fence, sn iscsi.Serial) {
	c.acks.Lock()
	x.sn, x.armed = sn, true
	c.acks.Unlock()
	c.pass(false)
}

// acknowledge takes the ExpStatSN of a PDU. It runs on the reader.
func (c *conn) acknowledge(sn iscsi.Serial) {
	if !iscsi.Serial(c.acked.Load()).Less(sn) {
		return
	}
	c.acks.Lock()
	c.acked.Store(uint32(sn))
	c.acks.Unlock()
	if c.waiting.Load() > 0 {
		c.pass(false)
	}
}

// releaseFences lets everyone go who waits for a connection that is gone.
func (c *conn) releaseFences() {
	c.acks.Lock()
	c.acks.closed = true
	c.acks.Unlock()
	c.pass(true)
}

// pass calls who has waited long enough.
func (c *conn) pass(all bool) {
	var run []func()
	c.acks.Lock()
	sn := iscsi.Serial(c.acked.Load())
	c.acks.list = slices.DeleteFunc(c.acks.list, func(f *fence) bool {
		if all || f.armed && f.sn.LessEq(sn) {
			run = append(run, f.f)
			c.waiting.Add(-1)
			return true
		}
		return false
	})
	c.acks.Unlock()
	for _, f := range run {
		f()
	}
}

// inlineLimit is how long a command that runs on the reader may take before the
// reading goes on elsewhere.
const inlineLimit = 2 * time.Millisecond

// inline runs a task on the reader. If it takes long, another goroutine takes the
// reader's role over, so that a stalled disk never delays a NOP answer; this one
// finishes its command and ends.
func (c *conn) inline(t *task) error {
	r := &c.role
	r.Lock()
	r.inline = true
	if r.timer == nil {
		r.timer = time.AfterFunc(inlineLimit, c.takeOver)
	} else {
		r.timer.Reset(inlineLimit)
	}
	r.Unlock()
	t.run(context.Background())
	r.Lock()
	mine := r.inline
	r.inline = false
	r.Unlock()
	if mine {
		r.timer.Stop() // should it fire now, it finds nothing to take, or the next command early
		return nil
	}
	c.kick()
	return errRoleGone
}

// takeOver reads on in place of a reader that is held up in a command. The count
// of goroutines is raised while that one still holds its own.
func (c *conn) takeOver() {
	c.role.Lock()
	take := c.role.inline
	if take {
		c.role.inline = false
		c.srv.wg.Add(1)
	}
	c.role.Unlock()
	if take {
		defer c.srv.wg.Done()
		c.read()
	}
}
