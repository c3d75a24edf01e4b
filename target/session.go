package target

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// session is an I_T nexus with up to MaxConnections connections. CmdSN orders
// commands over all of them; a command's R2Ts, data and response go over the one
// that it came on (connection allegiance, RFC 7143 4.2.2.3).
type session struct {
	srv    *Server
	tgt    *node // nil in a discovery session
	tsih   uint16
	seq    uint64 // order of login in this server
	isid   iscsi.ISID
	name   string // normalized initiator name
	alias  string
	user   string
	nexus  pr.Nexus
	params iscsi.Params
	limits limits
	since  time.Time
	in     map[*logicalUnit]Incarnation // of each gate when the session was admitted; guarded by mu
	log    *zap.Logger
	stats  sessionStats   // its map is guarded by mu
	lost   sync.Once      // nexus loss was done
	remote netip.AddrPort // of the first connection
	// loggedOut: its initiator has ended it.
	loggedOut atomic.Bool
	copies    copyResults
	kept      atomic.Int64 // bytes of Data-In kept for a SNACK, of all connections

	// attentions is the number of queued unit attentions, so that the path of
	// every command need not take mu.
	attentions atomic.Int32

	// mu guards what follows, and state, aborted, reading and ends of the
	// session's tasks. Lock order: Server.mu → node.mu → session.mu → rangeQueue.mu.
	mu        sync.Mutex
	conns     []*conn          // in order of login, replaced and never changed in place
	leaving   bool             // the session was logged out: it ends with the connection that says so
	tasks     map[uint32]*task // by initiator task tag
	immediate int              // tasks among them that came with the I bit
	expCmdSN  iscsi.Serial
	maxCmdSN  iscsi.Serial
	early     map[iscsi.Serial]turn // what came before its turn
	// delivering: somebody runs turns in order. Whoever comes in between leaves his
	// with early and goes on reading.
	delivering bool
	held       []heldTurn // task management that waits for commands sent before it
	ua         map[*logicalUnit][]scsi.ASC
	ended      bool
	running    int           // tasks not ended; after ended only falls
	drained    chan struct{} // closed when ended and no task is left
}

// limits are what the target of a session, or the server, says beside what was
// negotiated.
type limits struct {
	depth             int // command window
	maxSend           int // bytes of a data segment, 0 = what the initiator declares
	interval, timeout time.Duration
}

// limits of sessions with t, nil for discovery.
func (o *Options) limits(t *Target) limits {
	l := limits{depth: o.QueueDepth, interval: o.NopInterval, timeout: o.NopTimeout}
	if t == nil {
		return l
	}
	l.maxSend = t.MaxSend
	if t.QueueDepth != 0 {
		l.depth = t.QueueDepth
	}
	if t.NopInterval != 0 {
		l.interval = t.NopInterval
	}
	if t.NopTimeout != 0 {
		l.timeout = t.NopTimeout
	}
	return l
}

// sendLimit is the longest data segment for an initiator that declared n.
func (l *limits) sendLimit(n int) int {
	if l.maxSend != 0 {
		return min(n, l.maxSend)
	}
	return n
}

// maxImmediate bounds immediate commands in progress (Reject 06h above it).
const maxImmediate = 64

// ConnInfo is a snapshot of a connection of a session.
type ConnInfo struct {
	CID                      uint16
	Remote, Local            netip.AddrPort
	Since                    time.Time
	HeaderDigest, DataDigest bool
}

// SessionInfo is a snapshot of a session. Remote and Local are those of the oldest
// connection, the first of Conns.
type SessionInfo struct {
	Target, Initiator, InitiatorAlias string
	ISID                              iscsi.ISID
	TSIH                              uint16
	User                              string // CHAP name
	Discovery                         bool
	Remote, Local                     netip.AddrPort
	Conns                             []ConnInfo // in order of login
	Since                             time.Time
	Params                            iscsi.Params
	Tasks                             int // commands in progress
	Connections                       int

	IOStats
	// DigestErrors, Retransmits (answers to SNACK) and Rejects count PDUs.
	DigestErrors, Retransmits, Rejects uint64
}

func (s *session) info() SessionInfo {
	i := SessionInfo{
		Initiator: s.name, InitiatorAlias: s.alias, ISID: s.isid, TSIH: s.tsih, User: s.user, Discovery: s.tgt == nil,
		Since: s.since, Params: s.params,
		DigestErrors: s.stats.digests.Load(), Retransmits: s.stats.retransmits.Load(), Rejects: s.stats.rejects.Load(),
	}
	if s.tgt != nil {
		i.Target = s.tgt.iqn
	}
	s.mu.Lock()
	i.Tasks = s.running
	i.IOStats = s.stats.sum()
	conns := s.conns
	s.mu.Unlock()
	for _, c := range conns {
		i.Conns = append(i.Conns, ConnInfo{CID: c.cid, Remote: c.remote, Local: c.local, Since: c.since,
			HeaderDigest: c.headerDigest, DataDigest: c.dataDigest})
	}
	i.Connections = len(i.Conns)
	if len(i.Conns) > 0 {
		i.Remote, i.Local = i.Conns[0].Remote, i.Conns[0].Local
	}
	return i
}

// connections are those of the session now.
func (s *session) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns
}

// hungUp tells whether the initiator has closed every connection, which their
// readers may not have noticed yet.
func (s *session) hungUp() bool {
	for _, c := range s.connections() {
		if !c.hungUp() {
			return false
		}
	}
	return true
}

// announce sends a SCSI asynchronous event on one connection.
func (s *session) announce(sense *scsi.Sense) {
	if cs := s.connections(); len(cs) > 0 {
		cs[0].announce(sense)
	}
}

// incarnation is the gate's value when the session first met the logical unit.
func (s *session) incarnation(u *logicalUnit) Incarnation {
	s.mu.Lock()
	defer s.mu.Unlock()
	in, ok := s.in[u]
	if !ok { // the unit was mapped after login
		in = u.gate.Incarnation()
		s.in[u] = in
	}
	return in
}

// window returns ExpCmdSN and MaxCmdSN for a response. MaxCmdSN never goes back
// (§4.2.2.1).
func (s *session) window() (exp, mx iscsi.Serial) {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := s.limits.depth - len(s.tasks) + s.immediate - len(s.early)
	if free < 0 {
		free = 0
	}
	if m := s.expCmdSN.Add(uint32(free)) - 1; s.maxCmdSN.Less(m) {
		s.maxCmdSN = m
	}
	return s.expCmdSN, s.maxCmdSN
}

// turn is what a numbered request does when its CmdSN is due: the delivery of a
// command, or f.
type turn struct {
	c *conn // that it came on
	t *task
	f func()
}

// heldTurn is a turn that waits until every command before sn has arrived.
type heldTurn struct {
	turn
	sn iscsi.Serial
}

// do runs the turn. own says that the caller is the reader of its connection and
// that nothing waits behind it: then a task is returned that should run in place.
func (u *turn) do(own bool) (run *task) {
	if u.t != nil {
		return u.t.deliver(own)
	}
	u.f()
	return nil
}

// order takes a request to the device server when CmdSN sn is due, at once if it is
// now. It tells whether the number was inside the window; outside, the PDU is dropped
// silently. What is due is run by one reader at a time in the order of the numbers,
// whatever connections they came on; a command that should run on the reader is
// returned, so that it holds up nobody's turn.
func (s *session) order(u turn, sn iscsi.Serial, immediate bool) (taken bool, run *task) {
	if immediate {
		return true, u.do(true)
	}
	s.mu.Lock()
	if s.ended || !s.wants(sn) {
		s.mu.Unlock()
		return false, nil
	}
	if sn != s.expCmdSN || s.delivering {
		if s.early == nil {
			s.early = map[iscsi.Serial]turn{}
		}
		s.early[sn] = u
		s.mu.Unlock()
		return true, nil
	}
	s.delivering = true
	// With others behind it a command is better off in the pool, beside them.
	own := len(s.early) == 0
	at := u
	for {
		s.expCmdSN++
		s.mu.Unlock()
		if r := at.do(own); r != nil {
			run = r
		}
		if at.c != u.c {
			at.c.kick()
		}
		own = false
		s.mu.Lock()
		if len(s.held) > 0 {
			s.runHeld()
		}
		var next bool
		if len(s.early) > 0 {
			if at, next = s.early[s.expCmdSN]; next {
				delete(s.early, s.expCmdSN)
			}
		}
		if !next {
			s.delivering = false
			s.mu.Unlock()
			return true, run
		}
	}
}

// settle runs a turn once every command with a number below sn has arrived on
// whatever connection: at once where there is only one (RFC 7143 4.2.3.3 c).
func (s *session) settle(u turn, sn iscsi.Serial) {
	s.mu.Lock()
	if len(s.conns) > 1 && s.expCmdSN.Less(sn) && !s.ended {
		s.held = append(s.held, heldTurn{u, sn})
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	u.do(true)
}

// runHeld runs what was held and is due. It is called and returns with mu held.
func (s *session) runHeld() {
	for i := 0; i < len(s.held); {
		h := s.held[i]
		if s.expCmdSN.Less(h.sn) {
			i++
			continue
		}
		s.held = slices.Delete(s.held, i, i+1)
		s.mu.Unlock()
		h.do(false)
		h.c.kick()
		s.mu.Lock()
		i = 0
	}
}

// wants tells whether a number is in the window and still to come. mu is held.
func (s *session) wants(sn iscsi.Serial) bool {
	if !sn.InWindow(s.expCmdSN, s.maxCmdSN) {
		return false
	}
	if len(s.early) == 0 {
		return true
	}
	_, have := s.early[sn]
	return !have
}

// inWindow tells whether a non-immediate PDU would be taken.
func (s *session) inWindow(sn iscsi.Serial) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended && s.wants(sn)
}

// attend queues a unit attention of a logical unit.
func (s *session) attend(u *logicalUnit, code scsi.ASC) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || slices.Contains(s.ua[u], code) {
		return
	}
	if s.ua == nil {
		s.ua = map[*logicalUnit][]scsi.ASC{}
	}
	// A reset says everything that was queued before it (SAM-5 5.14.2).
	if code>>8 == scsi.ASCPowerOn>>8 {
		s.attentions.Add(-int32(len(s.ua[u])))
		s.ua[u] = nil
	}
	s.ua[u] = append(s.ua[u], code)
	s.attentions.Add(1)
}

// attention takes the oldest unit attention of a logical unit off the queue.
func (s *session) attention(u *logicalUnit) (scsi.ASC, bool) {
	if s.attentions.Load() == 0 {
		return 0, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.ua[u]
	if len(q) == 0 {
		return 0, false
	}
	s.ua[u] = slices.Delete(slices.Clone(q), 0, 1)
	s.attentions.Add(-1)
	return q[0], true
}

// unattend drops one kind of unit attention: REPORT LUNS answers 3F/0E.
func (s *session) unattend(code scsi.ASC) {
	if s.attentions.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for u, q := range s.ua {
		n := slices.DeleteFunc(slices.Clone(q), func(c scsi.ASC) bool { return c == code })
		s.attentions.Add(-int32(len(q) - len(n)))
		s.ua[u] = n
	}
}

// add enters a task; false means that its tag is in use.
func (s *session) add(t *task) (ok, tooMany bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false, false
	}
	if s.tasks[t.itt] != nil {
		return false, false
	}
	if t.immediate {
		if s.immediate >= maxImmediate {
			return false, true
		}
		s.immediate++
	}
	s.tasks[t.itt] = t
	s.running++
	t.begin()
	delete(t.c.tombs, t.itt)
	return true, false
}

// abort ends tasks that match without a response and calls done when the last
// of them has left the backend, at once if there is none.
func (s *session) abort(match func(*task) bool, done func()) {
	g := &group{done: done}
	s.abortInto(g, match)
	g.release()
}

// group counts tasks that have to end before done is called.
type group struct {
	n    atomic.Int32
	done func()
}

func (g *group) hold() { g.n.Add(1) }

func (g *group) release() {
	if g.n.Add(-1) < 0 {
		g.done()
	}
}

func (s *session) abortInto(g *group, match func(*task) bool) (n int) {
	var now []*task
	s.mu.Lock()
	for _, t := range s.tasks {
		if !match(t) {
			continue
		}
		n++
		g.hold()
		t.ends = append(t.ends, g.release)
		if t.aborted {
			continue
		}
		t.aborted = true
		if t.onAbort != nil {
			t.onAbort()
		}
		switch {
		case t.state == stateReceive && !t.reading:
			now = append(now, t)
		case t.state == stateQueue:
			ok, comes := t.lu.order.cancel(t)
			var ready []*task
			if !ok && !comes {
				ok, ready = t.lu.ranges.cancel(&t.lock)
			}
			if ok {
				now = append(now, t)
			}
			if len(ready) > 0 {
				t.lu.pool.submit(ready...)
			}
		}
	}
	s.mu.Unlock()
	for _, t := range now {
		t.end()
	}
	return n
}

// attach adds a connection. With the number of one that the session has it takes that
// one's place (connection reinstatement, RFC 7143 6.3.4), whose tasks are ended: old
// is to be waited for.
func (s *session) attach(c *conn) (old *conn, st iscsi.LoginStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || s.leaving {
		return nil, iscsi.StatusNoSession
	}
	i := slices.IndexFunc(s.conns, func(o *conn) bool { return o.cid == c.cid })
	if i < 0 && len(s.conns) >= s.params.MaxConnections {
		return nil, iscsi.StatusTooManyConnections
	}
	conns := slices.Clone(s.conns)
	if i >= 0 {
		old = conns[i]
		conns = slices.Delete(conns, i, i+1)
		s.unlink(old)
	}
	s.conns = append(conns, c)
	return old, iscsi.StatusSuccess
}

// unlink forgets what came on a connection and was not due yet: the initiator sends
// it again elsewhere (RFC 7143 7.2.1). mu is held.
func (s *session) unlink(c *conn) {
	for sn, u := range s.early {
		if u.c == c {
			delete(s.early, sn)
		}
	}
	s.held = slices.DeleteFunc(s.held, func(h heldTurn) bool { return h.c == c })
}

// detach takes a connection away. Below error recovery level 2 its tasks are ended;
// the others go on, and with the last connection the session ends. done, if not nil,
// is called when the tasks have left the backend.
func (s *session) detach(c *conn, why error, done func()) {
	c.shut(why)
	c.releaseFences()
	if done == nil {
		done = func() {}
	}
	s.mu.Lock()
	i := slices.Index(s.conns, c)
	switch {
	case s.ended || i < 0: // whoever ended the session, or took the connection's place, sees to its tasks
		s.mu.Unlock()
		s.abort(func(t *task) bool { return t.c == c }, done)
		return
	case s.leaving || len(s.conns) == 1:
		s.mu.Unlock()
		s.end(why)
		done()
		return
	}
	s.conns = slices.Delete(slices.Clone(s.conns), i, i+1)
	s.unlink(c)
	left := s.conns[0]
	s.mu.Unlock()
	s.log.Info("connection ended", zap.Uint16("cid", c.cid), zap.Stringer("remote", c.remote), zap.NamedError("cause", why))
	if !errors.Is(why, errPeerGone) && !errors.Is(why, errLoggedOut) {
		left.queue(response{pdu: &iscsi.Async{Event: iscsi.AsyncDropConnection, Param1: c.cid, Param2: uint16(s.params.DefaultTime2Wait)}})
		left.kick()
	}
	s.abort(func(t *task) bool { return t.c == c }, done)
}

// drainInto makes g wait for the tasks that match.
func (s *session) drainInto(g *group, match func(*task) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		if match(t) {
			g.hold()
			t.ends = append(t.ends, g.release)
		}
	}
}

// end closes the session: its tasks are aborted, and when they have ended what
// belongs to the nexus is released.
func (s *session) end(why error) {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return
	}
	s.ended = true
	clear(s.early)
	s.held = nil
	conns := s.conns
	s.mu.Unlock()
	for _, c := range conns {
		c.shut(why)
		c.releaseFences()
	}
	s.abort(func(*task) bool { return true }, func() {
		s.lose()
		s.retireStats()
		s.srv.forget(s) // on the list until then: a new login of the nexus waits for it
		if s.over(why) {
			s.log.Info("session ended", zap.NamedError("cause", why))
		}
		close(s.drained)
	})
}

// fence calls done when every connection but c has told that it got all that was sent
// on it before (RFC 7143 4.2.3.3 d): a response of task management must not overtake
// those of the tasks that it affects.
func (s *session) fence(c *conn, done func()) {
	g := &group{done: done}
	for _, o := range s.connections() {
		if o != c {
			g.hold()
			o.fence(g.release)
		}
	}
	g.release()
}

// lose ends what an I_T nexus loss ends, once: RESERVE, PREVENT. A logout does it
// before its response, so that the initiator's next login finds it done.
func (s *session) lose() {
	s.lost.Do(func() {
		if s.tgt == nil {
			return
		}
		for _, u := range s.tgt.units() {
			u.medium.forget(s.nexus)
			if _, err := u.res.Apply(context.Background(), pr.Request{Kind: pr.KindNexusLoss, Nexus: s.nexus}); err != nil {
				s.log.Warn("release reservation of a lost nexus", zap.String("volume", u.volume), zap.Error(err))
			}
		}
	})
}
