package target

import (
	"context"
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

// session is an I_T nexus with one connection.
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
	conn   *conn
	in     map[*logicalUnit]Incarnation // of each gate when the session was admitted; guarded by mu
	log    *zap.Logger
	stats  sessionStats // its map is guarded by mu
	lost   sync.Once    // nexus loss was done
	copies copyResults

	// attentions is the number of queued unit attentions, so that the path of
	// every command need not take mu.
	attentions atomic.Int32

	// mu guards what follows, and state, aborted, reading and ends of the
	// session's tasks. Lock order: Server.mu → node.mu → session.mu → rangeQueue.mu.
	mu        sync.Mutex
	tasks     map[uint32]*task // by initiator task tag
	immediate int              // tasks among them that came with the I bit
	expCmdSN  iscsi.Serial
	maxCmdSN  iscsi.Serial
	early     map[iscsi.Serial]func() // commands that came before their turn
	ua        map[*logicalUnit][]scsi.ASC
	ended     bool
	running   int           // tasks not ended; after ended only falls
	drained   chan struct{} // closed when ended and no task is left
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

// SessionInfo is a snapshot of a session.
type SessionInfo struct {
	Target, Initiator, InitiatorAlias string
	ISID                              iscsi.ISID
	TSIH                              uint16
	User                              string // CHAP name
	Discovery                         bool
	Remote, Local                     netip.AddrPort
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
		Remote: s.conn.remote, Local: s.conn.local, Since: s.since, Params: s.params,
		Connections: 1, DigestErrors: s.stats.digests.Load(), Retransmits: s.stats.retransmits.Load(), Rejects: s.stats.rejects.Load(),
	}
	if s.tgt != nil {
		i.Target = s.tgt.iqn
	}
	s.mu.Lock()
	i.Tasks = s.running
	i.IOStats = s.stats.sum()
	s.mu.Unlock()
	return i
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

// order runs f when it is the turn of CmdSN sn, at once if it is now. It tells
// whether the number was inside the window; outside, the PDU is dropped silently.
// Runs on the connection's reader.
func (s *session) order(sn iscsi.Serial, immediate bool, f func()) bool {
	if immediate {
		f()
		return true
	}
	s.mu.Lock()
	if s.ended || !sn.InWindow(s.expCmdSN, s.maxCmdSN) || s.early[sn] != nil {
		s.mu.Unlock()
		return false
	}
	if sn != s.expCmdSN {
		if s.early == nil {
			s.early = map[iscsi.Serial]func(){}
		}
		s.early[sn] = f
		s.mu.Unlock()
		return true
	}
	// A command that runs on the reader may cost it its role. With others behind it
	// here that must not happen: they would run beside the new reader.
	s.conn.noInline = len(s.early) > 0
	for f != nil {
		s.expCmdSN++
		next := s.early[s.expCmdSN]
		delete(s.early, s.expCmdSN)
		s.mu.Unlock()
		more := next != nil || s.conn.noInline
		f()
		if !more {
			return true // and nothing of the connection may be touched any more
		}
		f = next
		s.mu.Lock()
	}
	s.conn.noInline = false
	s.mu.Unlock()
	return true
}

// inWindow tells whether a non-immediate PDU would be taken.
func (s *session) inWindow(sn iscsi.Serial) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended && sn.InWindow(s.expCmdSN, s.maxCmdSN) && s.early[sn] == nil
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
			ok, ready := t.lu.ranges.cancel(&t.lock)
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
	s.mu.Unlock()
	s.conn.shut(why)
	s.abort(func(*task) bool { return true }, func() {
		s.lose()
		s.retireStats()
		s.srv.forget(s) // on the list until then: a new login of the nexus waits for it
		s.log.Info("session ended", zap.NamedError("cause", why))
		close(s.drained)
	})
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
