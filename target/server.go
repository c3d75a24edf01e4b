// Package target is the iSCSI target: portals, sessions and the SCSI device
// server in front of block devices. It is configured level-triggered by Apply
// and asks small interfaces of its own, Gate and Reservations, what a cluster
// would know; it imports nothing of the cluster.
//
// A command's way: conn reads and frames it, session orders it by CmdSN, task
// collects its Data-Out, check runs the checks of SPC-4 in their common order,
// rangeQueue puts it behind what it overlaps, exec runs it between Gate.Enter
// and Gate.Leave, conn writes the response.
//
// Lock order:
//
//	Server.applyMu
//	└─ Server.mu
//	   └─ session.mu
//	      └─ rangeQueue.mu, pool.mu, conn.out
//	conn.text
//	└─ conn.flushing
//	   └─ session.mu, conn.out, conn.acks
package target

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// Server serves targets. All methods may be called at the same time.
type Server struct {
	opt   Options
	log   *zap.Logger
	epoch time.Time // start, for now
	stop  chan struct{}
	wg    sync.WaitGroup

	guard    *guard
	buffered atomic.Int64 // bytes of data phases in memory
	totals   totals
	limit    eventLimit

	applyMu sync.Mutex // one Apply, Cut or Close at a time

	mu        sync.Mutex
	closed    bool
	nodes     map[string]*node // by normalized IQN
	listeners map[netip.AddrPort]*listener
	unopened  map[netip.AddrPort]error // optional portals, why
	sessions  map[uint16]*session
	conns     map[*conn]struct{}
	lus       map[string]*logicalUnit // by volume
	local     map[string]*Local       // reservations kept over a removal, by volume
	stats     map[lunKey]*lunStats
	cut       map[string]uint64
	discovery Auth
	lost      map[pr.Nexus]bool // nexuses whose session was lost, for UA 29/07
	nextTSIH  uint16
	seq       uint64
	logins    int
}

// node is a target.
type node struct {
	iqn  string
	conf atomic.Pointer[Target]
	luns atomic.Pointer[map[scsi.LUN]*entry]
	// removed is the login sequence at which a number lost its volume: older
	// sessions must not see it under another one. Guarded by Server.mu.
	removed map[scsi.LUN]uint64
}

func (n *node) entry(l scsi.LUN) *entry { return (*n.luns.Load())[l] }

// units lists the logical units of the target, each once.
func (n *node) units() (out []*logicalUnit) {
	for _, e := range *n.luns.Load() {
		if !slices.Contains(out, e.lu) {
			out = append(out, e.lu)
		}
	}
	return out
}

func (n *node) has(u *logicalUnit) bool {
	for _, e := range *n.luns.Load() {
		if e.lu == u {
			return true
		}
	}
	return false
}

type listener struct {
	l    net.Listener
	addr netip.AddrPort // as bound, with the real port
	done chan struct{}
}

// New starts a server that serves nothing yet.
func New(o Options) (*Server, error) {
	if err := o.defaults(); err != nil {
		return nil, fmt.Errorf("start target server: %w", err)
	}
	s := &Server{
		opt: o, log: o.Logger, epoch: time.Now(), stop: make(chan struct{}),
		nodes: map[string]*node{}, listeners: map[netip.AddrPort]*listener{}, sessions: map[uint16]*session{}, conns: map[*conn]struct{}{},
		lus: map[string]*logicalUnit{}, local: map[string]*Local{}, stats: map[lunKey]*lunStats{}, cut: map[string]uint64{}, lost: map[pr.Nexus]bool{}, guard: newGuard(),
	}
	s.wg.Add(1)
	go s.watch()
	return s, nil
}

// reserve takes n bytes of the budget for data in memory. A small command always
// passes, so that a few large ones cannot lock everyone out.
func (s *Server) reserve(n int64) bool {
	if s.buffered.Add(n) > s.opt.MaxBuffered && n > 64<<10 {
		s.buffered.Add(-n)
		return false
	}
	return true
}

func (s *Server) unreserve(n int64) { s.buffered.Add(-n) }

// now is a monotonic clock in ns.
func (s *Server) now() int64 { return int64(time.Since(s.epoch)) }

// Apply makes the server serve c. On an error of a portal nothing was changed,
// unless the portal is optional: then everything else was. A portal that is gone
// takes no connection any more; the ones that came through it stay.
// When it returns, entries that are gone, or point elsewhere, have no command in
// the backend any more: their devices may be closed.
func (s *Server) Apply(c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return ErrClosed
	}
	opened, unopened, err := s.listen(&c)
	if err != nil {
		return err
	}
	var drop, fenced, announce []*session
	var drain sync.WaitGroup
	attend := func(sess *session, u *logicalUnit, code scsi.ASC) { sess.attend(u, code) }

	s.mu.Lock()
	want := map[string]*Target{}
	for i := range c.Targets {
		t := c.Targets[i]
		t.LUNs = slices.Clone(t.LUNs) // the caller keeps its own
		want[iscsi.NormalizeName(t.IQN)] = &t
	}
	byNode := map[*node][]*session{}
	for _, sess := range s.sessions {
		if sess.tgt != nil {
			byNode[sess.tgt] = append(byNode[sess.tgt], sess)
		}
	}
	for name, n := range s.nodes {
		if want[name] == nil {
			drop = append(drop, byNode[n]...)
			delete(s.nodes, name)
		}
	}
	// Logical units are made or kept by volume, so that all targets share them.
	lus := map[string]*logicalUnit{}
	for _, t := range want {
		for i := range t.LUNs {
			l := &t.LUNs[i]
			if lus[l.Volume] != nil {
				continue
			}
			if u := s.lus[l.Volume]; u != nil && u.same(l) {
				u.groups.Store(&l.Groups)
				lus[l.Volume] = u
				continue
			}
			if l.Reservations == nil {
				if s.local[l.Volume] == nil {
					s.local[l.Volume] = NewLocal()
				}
				l.Reservations = s.local[l.Volume]
			}
			lus[l.Volume] = newLogicalUnit(l, &s.wg)
		}
	}
	type removal struct {
		sess *session
		u    *logicalUnit
	}
	var removals []removal
	var gone []*logicalUnit
	for name, t := range want {
		n := s.nodes[name]
		if n == nil {
			n = &node{iqn: name, removed: map[scsi.LUN]uint64{}}
			n.luns.Store(&map[scsi.LUN]*entry{})
			s.nodes[name] = n
		}
		old := *n.luns.Load()
		luns := make(map[scsi.LUN]*entry, len(t.LUNs))
		changed, reset := false, false
		for i := range t.LUNs {
			l := &t.LUNs[i]
			e := &entry{num: l.Number, gen: l.Generation, lu: lus[l.Volume], readOnly: l.ReadOnly, stats: s.statsOf(name, l.Number, l.Volume)}
			o := old[l.Number]
			switch {
			case o == nil:
				changed = true
				if at, ok := n.removed[l.Number]; ok {
					for _, sess := range byNode[n] {
						if sess.seq <= at {
							drop = append(drop, sess)
						}
					}
				}
			case o.gen == e.gen && o.lu == e.lu && o.readOnly == e.readOnly:
				e = o
			default:
				reset = true
			}
			luns[l.Number] = e
		}
		for num, o := range old {
			if luns[num] == nil {
				changed = true
				n.removed[num] = s.seq
				for _, sess := range byNode[n] {
					removals = append(removals, removal{sess, o.lu})
				}
			}
		}
		if oc := n.conf.Load(); oc != nil && oc.TPGT != t.TPGT {
			reset = true
		}
		n.conf.Store(t)
		n.luns.Store(&luns)
		if reset {
			drop = append(drop, byNode[n]...)
		} else {
			for _, sess := range byNode[n] {
				if !sess.allowed(&t.ACL) || t.Auth.required() && t.Auth.secret(sess.user) == nil {
					drop = append(drop, sess)
				} else if changed {
					for _, u := range n.units() {
						attend(sess, u, scsi.ASCReportedLunsChanged)
					}
					announce = append(announce, sess)
				}
			}
		}
	}
	for v, u := range s.lus {
		if lus[v] == u {
			continue
		}
		// Everything that runs on the old unit ends before Apply returns.
		gone = append(gone, u)
		for _, sess := range s.sessions {
			removals = append(removals, removal{sess, u})
		}
	}
	s.lus = lus
	s.dropStats()
	for _, u := range lus {
		if size := u.dev.Info().Size; u.size.Swap(size) != size {
			for n, ss := range byNode {
				for _, sess := range ss {
					if n.has(u) {
						attend(sess, u, scsi.ASCCapacityChanged)
					}
				}
			}
		}
	}
	s.discovery, s.unopened = c.Discovery, unopened
	for name, epoch := range c.Cut {
		name = iscsi.NormalizeName(name)
		if s.cut[name] < epoch {
			s.cut[name] = epoch
		}
	}
	for name := range s.cut {
		if !hasName(c.Cut, name) {
			delete(s.cut, name) // admitted again
		}
	}
	for _, sess := range s.sessions {
		if _, ok := s.cut[sess.name]; ok {
			fenced = append(fenced, sess)
		}
	}
	var closing []*listener
	ports := s.wanted(&c)
	for a, l := range s.listeners {
		if !slices.Contains(ports, a) {
			delete(s.listeners, a)
			closing = append(closing, l)
		}
	}
	for a, l := range opened {
		s.listeners[a] = l
		s.wg.Add(1)
		go s.accept(l)
	}
	s.mu.Unlock()

	for _, l := range closing {
		_ = l.l.Close()
		<-l.done
	}
	for _, sess := range announce { // also where no unit is left to carry an attention
		sess.announce(scsi.Check(scsi.UnitAttention, scsi.ASCReportedLunsChanged))
	}
	for _, u := range gone {
		_ = u.stopSanitize(context.Background(), func(string) bool { return true })
	}
	for _, r := range removals {
		drain.Add(1)
		r.sess.abort(func(t *task) bool { return t.lu == r.u }, drain.Done)
	}
	for _, sess := range drop {
		sess.end(errReconfigured)
		drain.Add(1)
		go func() { defer drain.Done(); <-sess.drained }()
	}
	// Whoever was fenced is not waited for: what a stuck disk holds is CutInitiator's
	// to wait for, and the other volumes go on.
	for _, sess := range fenced {
		sess.end(errCut)
	}
	drain.Wait()
	return nil
}

func hasName(m map[string]uint64, name string) bool {
	for k := range m {
		if iscsi.NormalizeName(k) == name {
			return true
		}
	}
	return false
}

var errReconfigured = errors.New("the target's configuration changed")

func (s *Server) wanted(c *Config) (out []netip.AddrPort) {
	for i := range c.Targets {
		for _, p := range c.Targets[i].Portals {
			if !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}

// Unopened is why optional portals of the configuration are not open. The key is
// as in the configuration.
func (s *Server) Unopened() map[netip.AddrPort]error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.unopened)
}

// listen opens the portals that are not open yet, and says which of the optional
// ones it could not.
func (s *Server) listen(c *Config) (map[netip.AddrPort]*listener, map[netip.AddrPort]error, error) {
	opened, unopened := map[netip.AddrPort]*listener{}, map[netip.AddrPort]error{}
	for _, p := range s.wanted(c) {
		s.mu.Lock()
		have := s.listeners[p] != nil
		s.mu.Unlock()
		if have {
			continue
		}
		l, err := net.Listen("tcp", p.String())
		if err != nil {
			if errors.Is(err, syscall.EADDRINUSE) {
				err = fmt.Errorf("open portal %s: %w%s: stop that program or choose another port", p, ErrPortBusy, portHolder(p))
			} else {
				err = fmt.Errorf("open portal %s: %w", p, err)
			}
			if slices.Contains(c.Optional, p) {
				unopened[p] = err
				continue
			}
			for _, o := range opened {
				_ = o.l.Close()
			}
			return nil, nil, err
		}
		opened[p] = &listener{l: l, addr: addrPort(l.Addr()), done: make(chan struct{})}
	}
	return opened, unopened, nil
}

// portHolder names the process that listens where p would, from /proc; empty when
// it is not to be seen, as in another user's process.
func portHolder(p netip.AddrPort) string {
	inodes := map[string]bool{}
	for _, f := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			w := strings.Fields(line)
			if len(w) < 10 || w[3] != "0A" { // LISTEN
				continue
			}
			if a, ok := procAddr(w[1]); ok && a.Port() == p.Port() && overlap(a.Addr(), p.Addr()) {
				inodes["socket:["+w[9]+"]"] = true
			}
		}
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && inodes[to] {
			pid := strings.Split(fd, "/")[2]
			name, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf(" by pid %s (%s)", pid, strings.TrimSpace(string(name)))
		}
	}
	return ""
}

// overlap tells whether two listeners on one port exclude each other.
func overlap(a, b netip.Addr) bool {
	a, b = a.Unmap(), b.Unmap()
	return a == b || a.IsUnspecified() && (a.Is6() || b.Is4()) || b.IsUnspecified() && (b.Is6() || a.Is4())
}

// procAddr reads an address of /proc/net/tcp and tcp6: 32-bit words in host order.
func procAddr(s string) (netip.AddrPort, bool) {
	h, port, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(h)
	n, perr := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || perr != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], binary.NativeEndian.Uint32(b[i:]))
	}
	a, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(n)), ok
}

// Addr is where a portal of the configuration is really bound: it tells the port
// when the configuration says 0.
func (s *Server) Addr(p netip.AddrPort) (netip.AddrPort, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.listeners[p]
	if l == nil {
		return netip.AddrPort{}, false
	}
	return l.addr, true
}

func (s *Server) accept(l *listener) {
	defer s.wg.Done()
	defer close(l.done)
	var wait time.Duration
	for {
		nc, err := l.l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of file descriptors and the like: try again, not in a spin.
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			s.log.Warn("accept failed", zap.Stringer("portal", l.addr), zap.Error(err))
			select {
			case <-time.After(wait):
				continue
			case <-s.stop:
				return
			}
		}
		wait = 0
		s.mu.Lock()
		if s.closed || s.logins >= s.opt.MaxLogins {
			s.mu.Unlock()
			_ = nc.Close()
			continue
		}
		s.logins++
		c := newConn(s, nc)
		s.conns[c] = struct{}{}
		s.wg.Add(1)
		s.mu.Unlock()
		go func() {
			defer s.wg.Done()
			c.serve()
		}()
	}
}

func (s *Server) loginDone() {
	s.mu.Lock()
	s.logins--
	s.mu.Unlock()
}

func (s *Server) dropConn(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
}

// allowed tells whether all connections of a session pass an access list.
func (s *session) allowed(a *ACL) bool {
	for _, c := range s.connections() {
		if !a.Allows(s.name, c.remote.Addr()) {
			return false
		}
	}
	return true
}

// forget takes an ended session off the list.
func (s *Server) forget(sess *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[sess.tsih] == sess {
		delete(s.sessions, sess.tsih)
	}
	if sess.tgt != nil {
		if len(s.lost) > 65536 {
			clear(s.lost)
		}
		s.lost[sess.nexus] = true
	}
}

// admit decides on a login (facts/iscsi.md §2.4).
func (s *Server) admit(c *conn, id *iscsi.LoginIdentity) iscsi.Admission {
	no := func(st iscsi.LoginStatus) iscsi.Admission { return iscsi.Admission{Status: st} }
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return no(iscsi.StatusServiceUnavailable)
	}
	if _, ok := s.cut[id.InitiatorName]; ok {
		return no(iscsi.StatusForbidden)
	}
	if s.guard.locked(c.remote.Addr(), time.Now()) {
		return no(iscsi.StatusServiceUnavailable)
	}
	if id.Discovery {
		if id.TSIH != 0 { // such a session has one connection (RFC 7143 13.2)
			return no(iscsi.StatusNoSession)
		}
		return iscsi.Admission{Auth: c.loginAuth(&s.discovery)}
	}
	n := s.nodes[id.TargetName]
	if n == nil {
		return no(iscsi.StatusNotFound)
	}
	t := n.conf.Load()
	if !s.reachable(t, c) {
		return no(iscsi.StatusNotFound)
	}
	if !t.ACL.Allows(id.InitiatorName, c.remote.Addr()) {
		return no(iscsi.StatusForbidden)
	}
	if t.Offline {
		return no(iscsi.StatusServiceUnavailable)
	}
	if t.Redirect != "" && !t.redirectsTo(c.local) {
		st := iscsi.StatusMovedTemporarily
		if t.RedirectForever {
			st = iscsi.StatusMovedPermanently
		}
		return iscsi.Admission{Status: st, Address: t.Redirect}
	}
	var join *session
	if id.TSIH != 0 {
		x := s.sessions[id.TSIH]
		if x == nil || x.tgt != n || x.name != id.InitiatorName || x.isid != id.ISID {
			return no(iscsi.StatusNoSession)
		}
		join = x
	}
	for _, u := range n.units() {
		if err := u.gate.Enter(u.gate.Incarnation(), OpLogin); err != nil {
			if errors.Is(err, ErrStandby) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrNotReady) {
				continue // such a port takes logins and answers for its state
			}
			return no(iscsi.StatusServiceUnavailable)
		}
		if err := u.gate.Leave(u.gate.Incarnation(), OpLogin); err != nil {
			return no(iscsi.StatusServiceUnavailable)
		}
	}
	a := iscsi.Admission{Alias: t.Alias, TPGT: t.TPGT, Auth: c.loginAuth(&t.Auth)}
	if t.Want.MaxRecv != 0 {
		a.Want = &t.Want
	}
	if join != nil {
		a.Base = join.params
	}
	return a
}

// redirectsTo tells whether a connection is where Redirect sends initiators: to send
// it there again would be a loop.
func (t *Target) redirectsTo(local netip.AddrPort) bool {
	p, err := iscsi.ParsePortal(t.Redirect)
	if err != nil || p.Port != local.Port() {
		return false
	}
	a, err := netip.ParseAddr(p.Host)
	return err == nil && a.Unmap() == local.Addr()
}

// reachable tells whether the connection came through a portal of the target.
func (s *Server) reachable(t *Target, c *conn) bool {
	for _, p := range t.Portals {
		l := s.listeners[p]
		if l != nil && l.addr.Port() == c.local.Port() && (p.Addr().IsUnspecified() || p.Addr().Unmap() == c.local.Addr()) {
			return true
		}
	}
	return false
}

// join adds a connection to the session of a login that succeeded.
func (s *Server) join(c *conn, id *iscsi.LoginIdentity, p *iscsi.Params) (uint16, iscsi.LoginStatus) {
	s.mu.Lock()
	x := s.sessions[id.TSIH]
	if _, cut := s.cut[id.InitiatorName]; s.closed || cut || x == nil || x.tgt == nil || x.tgt.iqn != id.TargetName || x.name != id.InitiatorName || x.isid != id.ISID {
		s.mu.Unlock()
		return 0, iscsi.StatusNoSession
	}
	if x.user != id.User { // a session is one identity's (RFC 7143 12.1)
		s.mu.Unlock()
		c.log.Warn("login to a session of another CHAP name", zap.String("session", x.user), zap.String("login", id.User))
		return 0, iscsi.StatusAuthFailure
	}
	c.begin(x, id, p)
	old, st := x.attach(c)
	if st != iscsi.StatusSuccess {
		c.s = nil
		s.mu.Unlock()
		return 0, st
	}
	s.mu.Unlock()
	if old != nil {
		ended := make(chan struct{})
		old.s.detach(old, errConnReinstated, func() { close(ended) })
		select { // not for a disk that hangs
		case <-ended:
		case <-time.After(reinstateWait):
		}
	}
	c.log.Info("connection added", zap.Uint16("cid", c.cid), zap.Bool("reinstated", old != nil))
	return x.tsih, iscsi.StatusSuccess
}

var errConnReinstated = errors.New("the initiator logged the connection in again")

// begin makes the connection one of a session, but for attach.
func (c *conn) begin(x *session, id *iscsi.LoginIdentity, p *iscsi.Params) {
	c.s, c.cid, c.since = x, id.CID, time.Now()
	c.headerDigest, c.dataDigest = p.HeaderDigest, p.DataDigest
	c.keeps = x.params.ErrorRecoveryLevel > 0
	c.track = c.keeps || x.params.MaxConnections > 1
	c.lastRead.Store(c.srv.now())
	if x.log != nil {
		c.log = x.log.With(zap.Stringer("remote", c.remote))
	}
}

// start makes the session of a login that succeeded, or finds it.
func (s *Server) start(c *conn, id *iscsi.LoginIdentity, p iscsi.Params) (uint16, iscsi.LoginStatus) {
	if id.TSIH != 0 {
		return s.join(c, id, &p)
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return 0, iscsi.StatusServiceUnavailable
	}
	if _, ok := s.cut[id.InitiatorName]; ok {
		s.mu.Unlock()
		return 0, iscsi.StatusForbidden
	}
	x := &session{
		srv: s, isid: id.ISID, name: id.InitiatorName, alias: id.InitiatorAlias, user: id.User, params: p, limits: s.opt.limits(nil),
		since: time.Now(), conns: []*conn{c}, remote: c.remote,
		in: map[*logicalUnit]Incarnation{}, tasks: map[uint32]*task{}, drained: make(chan struct{}),
	}
	var olds []*session
	var units []*logicalUnit
	code := scsi.ASCPowerOn
	if !id.Discovery {
		n := s.nodes[id.TargetName]
		if n == nil {
			s.mu.Unlock()
			return 0, iscsi.StatusNotFound
		}
		x.tgt, x.limits = n, s.opt.limits(n.conf.Load())
		x.nexus = pr.Nexus{ID: scsi.TransportID{Name: id.InitiatorName, ISID: id.ISID, HasISID: true}, Port: n.conf.Load().RelPort}
		again := false
		for _, o := range s.sessions {
			switch {
			case o.tgt != n || o.name != x.name:
			case o.nexus == x.nexus:
				olds, again = append(olds, o), true
			case o.hungUp(): // its nexus is lost before this one begins
				olds = append(olds, o)
			}
		}
		units = n.units()
		for _, u := range units {
			x.in[u] = u.gate.Incarnation()
		}
		if again || s.lost[x.nexus] {
			code = scsi.ASCNexusLoss
		}
		delete(s.lost, x.nexus)
	}
	tsih := s.nextTSIH
	for range 1 << 16 {
		if tsih++; tsih != 0 && s.sessions[tsih] == nil {
			break
		}
	}
	if tsih == 0 || s.sessions[tsih] != nil {
		s.mu.Unlock()
		return 0, iscsi.StatusOutOfResources
	}
	s.nextTSIH, x.tsih = tsih, tsih
	s.seq++
	x.seq = s.seq
	s.sessions[tsih] = x
	c.begin(x, id, &p)
	x.log = c.log.With(zap.String("initiator", x.name), zap.Uint16("tsih", tsih))
	if x.tgt != nil {
		x.log = x.log.With(zap.String("target", x.tgt.iqn))
	}
	c.log = x.log
	s.mu.Unlock()
	for _, old := range olds {
		// Reinstatement (§6.3.5). Writes of the old session that still run keep
		// their place in the range queues in front of the new one's.
		old.end(errReinstated)
		select { // not for a disk that hangs
		case <-old.drained:
		case <-time.After(reinstateWait):
		}
		s.mu.Lock()
		delete(s.lost, x.nexus)
		s.mu.Unlock()
	}
	for _, u := range units {
		x.attend(u, code)
	}
	if s.tell(x.event(EventLogin, nil)) {
		x.log.Info("session started", zap.Stringer("isid", x.isid), zap.Bool("discovery", id.Discovery))
	}
	return tsih, iscsi.StatusSuccess
}

// reinstateWait is how long a login waits for the old session of its nexus to
// release what it held.
const reinstateWait = time.Second

var errReinstated = errors.New("the initiator logged in again")

// sendTargets answers SendTargets (RFC 7143 annex C).
func (s *Server) sendTargets(c *conn, what string) (out []iscsi.Pair) {
	s.mu.Lock()
	defer s.mu.Unlock()
	discovery := c.s.tgt == nil
	var names []string
	switch {
	case what == "All" && discovery:
		for name := range s.nodes {
			names = append(names, name)
		}
		slices.Sort(names)
	case what == "" && !discovery:
		names = []string{c.s.tgt.iqn}
	case what != "" && what != "All":
		names = []string{iscsi.NormalizeName(what)}
	default:
		return []iscsi.Pair{{Key: iscsi.KeySendTargets, Value: iscsi.Rejected}}
	}
	for _, name := range names {
		n := s.nodes[name]
		if n == nil {
			continue
		}
		t := n.conf.Load()
		if !t.ACL.Allows(c.s.name, c.remote.Addr()) {
			continue
		}
		out = append(out, iscsi.Pair{Key: iscsi.KeyTargetName, Value: name})
		for _, p := range t.Portals {
			l := s.listeners[p]
			if l == nil {
				continue
			}
			a := p.Addr()
			if a.IsUnspecified() {
				a = c.local.Addr()
			}
			tp := iscsi.Portal{Host: a.String(), Port: l.addr.Port(), TPGT: t.TPGT, HasTPGT: true}
			out = append(out, iscsi.Pair{Key: iscsi.KeyTargetAddress, Value: tp.String()})
		}
	}
	return out
}

func (s *Server) list() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*session, 0, len(s.sessions))
	for _, x := range s.sessions {
		out = append(out, x)
	}
	slices.SortFunc(out, func(a, b *session) int { return int(a.seq) - int(b.seq) })
	return out
}

func (s *Server) sessionsOf(n *node) (out []*session) {
	for _, x := range s.list() {
		if x.tgt == n {
			out = append(out, x)
		}
	}
	return out
}

// clear aborts every task of some logical units, of every session, tells the
// nexuses with code, and calls done when all tasks have ended. reset ends what a
// reset ends.
func (s *Server) clear(us []*logicalUnit, by *session, code scsi.ASC, reset bool, done func()) {
	g := &group{done: done}
	for _, x := range s.list() {
		if x.tgt == nil {
			continue
		}
		for _, u := range us {
			if !x.tgt.has(u) {
				continue
			}
			x.buryAll(u)
			n := x.abortInto(g, func(t *task) bool { return t.lu == u })
			if reset || x != by && n > 0 { // a reset is told to its sender too (SAM-5 7.6)
				x.attend(u, code)
			}
		}
	}
	if reset {
		for _, u := range us {
			u.medium.reset()
			u.mode.reset()
			g.hold()
			s.wg.Add(1)
			go func() { // a cluster takes its time: the reader does not wait
				defer s.wg.Done()
				defer g.release()
				if _, err := u.res.Apply(context.Background(), pr.Request{Kind: pr.KindReset, Nexus: by.nexus}); err != nil {
					s.log.Warn("release reservation at reset", zap.String("volume", u.volume), zap.Error(err))
				}
			}()
		}
	}
	g.release()
}

// notify queues the attentions of a reservation change.
func (s *Server) notify(u *logicalUnit, as []pr.Attention) {
	if len(as) == 0 {
		return
	}
	for _, x := range s.list() {
		if x.tgt == nil || !x.tgt.has(u) {
			continue
		}
		for _, a := range as {
			if a.For(x.nexus) {
				x.attend(u, a.Code)
			}
		}
	}
}

// Nexus tells whether there is a session of a nexus, also one that is ending.
func (s *Server) Nexus(n pr.Nexus) bool {
	return slices.ContainsFunc(s.list(), func(x *session) bool { return x.tgt != nil && x.nexus == n })
}

// Sessions is a snapshot of all sessions, in order of login.
func (s *Server) Sessions() []SessionInfo {
	var out []SessionInfo
	for _, x := range s.list() {
		out = append(out, x.info())
	}
	return out
}

// ResetSessions drops the sessions that match without a status for what is in
// progress, and returns their number when none of their commands is in the
// backend any more.
func (s *Server) ResetSessions(match func(SessionInfo) bool) int {
	var out []*session
	for _, x := range s.list() {
		if match(x.info()) {
			x.end(errReset)
			out = append(out, x)
		}
	}
	for _, x := range out {
		<-x.drained
	}
	return len(out)
}

// Drain asks the initiators of the sessions that match to log out, on every connection
// (RFC 7143 11.9.1, event 1), and resets after within, or when ctx ends, those that did
// not. It returns their number when none of their commands is in the backend any more,
// and how many had to be reset. New logins are the caller's to refuse: Target.Offline.
func (s *Server) Drain(ctx context.Context, match func(SessionInfo) bool, within time.Duration) (drained, reset int) {
	var asked []*session
	for _, x := range s.list() {
		if !match(x.info()) {
			continue
		}
		asked = append(asked, x)
		for _, c := range x.connections() {
			c.queue(response{pdu: &iscsi.Async{Event: iscsi.AsyncLogoutRequest, Param1: c.cid,
				Param3: uint16(min((within+time.Second-1)/time.Second, 65535))}})
			c.kick()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for _, x := range asked {
		select {
		case <-x.drained:
		case <-ctx.Done():
			select {
			case <-x.drained:
			default:
				reset++
				x.end(errNotDrained)
			}
		}
	}
	for _, x := range asked {
		<-x.drained
	}
	return len(asked), reset
}

var (
	errNotDrained = errors.New("the initiator did not log out when it was asked to")
	errReset      = errors.New("session was reset")
	errCut        = errors.New("the initiator was fenced")
)

// CutInitiator fences initiators: they cannot log in until a later Apply leaves
// them out of Config.Cut; their sessions are dropped, their commands aborted,
// their reservations and registrations ended. It returns nil when none of their
// commands is in the backend any more, which is what a Cut acknowledgement
// promises; with an error of ctx the cut is in force but not yet drained.
func (s *Server) CutInitiator(ctx context.Context, names []string, epoch uint64) error {
	norm := make([]string, len(names))
	for i, n := range names {
		norm[i] = iscsi.NormalizeName(n)
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	for _, n := range norm {
		s.cut[n] = max(s.cut[n], epoch)
	}
	s.mu.Unlock()
	var victims []*session
	for _, x := range s.list() {
		if slices.Contains(norm, x.name) {
			x.end(errCut)
			victims = append(victims, x)
		}
	}
	for _, x := range victims {
		select {
		case <-x.drained:
		case <-ctx.Done():
			return fmt.Errorf("cut initiators %s at epoch %d: their I/O has not ended: %w", strings.Join(norm, ", "), epoch, ctx.Err())
		}
	}
	s.mu.Lock()
	var us []*logicalUnit
	for _, u := range s.lus {
		us = append(us, u)
	}
	s.mu.Unlock()
	for _, u := range us {
		if err := u.stopSanitize(ctx, func(name string) bool { return slices.Contains(norm, name) }); err != nil {
			return fmt.Errorf("cut initiators %s at epoch %d: their SANITIZE of volume %s has not ended: %w", strings.Join(norm, ", "), epoch, u.volume, err)
		}
		r, err := u.res.Apply(ctx, pr.Request{Kind: pr.KindPurge, Names: norm})
		if err != nil {
			return fmt.Errorf("cut initiators %s at epoch %d: end their reservations on volume %s: %w", strings.Join(norm, ", "), epoch, u.volume, err)
		}
		s.notify(u, r.Notify)
	}
	return nil
}

// watch pings silent connections and notices when it did not run itself.
func (s *Server) watch() {
	defer s.wg.Done()
	tick := 250 * time.Millisecond // of targets with an interval of their own, in whole seconds as a rule
	for _, d := range []time.Duration{s.opt.NopInterval, s.opt.StallLimit} {
		if d > 0 {
			tick = min(tick, d/4)
		}
	}
	t := time.NewTicker(tick)
	defer t.Stop()
	last, swept := s.now(), int64(0)
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
		}
		now := s.now()
		if time.Duration(now-swept) > eventWindow/4 {
			swept = now
			s.tellSuppressed()
		}
		if stall := time.Duration(now - last); s.opt.StallLimit > 0 && stall > s.opt.StallLimit {
			s.log.Error("the server stalled: every connection is reset", zap.Duration("stall", stall))
			for _, x := range s.list() {
				x.end(errStalled)
			}
		}
		last = now
		for _, x := range s.list() {
			if x.limits.interval > 0 {
				for _, c := range x.connections() {
					c.probe(now)
				}
			}
		}
	}
}

var (
	errStalled = errors.New("the server stalled")
	errSilent  = errors.New("the initiator does not answer a NOP-In")
)

func (c *conn) probe(now int64) {
	read := c.lastRead.Load()
	sent := c.pinged.Load()
	switch {
	case sent != 0 && read > sent: // whatever it sent, it lives
		c.pinged.Store(0)
	case sent != 0:
		if now-sent > int64(c.s.limits.timeout) {
			c.shut(errSilent)
		}
	case now-read > int64(c.s.limits.interval):
		c.pinged.Store(now)
		c.queue(response{pdu: &iscsi.NopIn{ITT: iscsi.ReservedTag, TTT: pingTTT}})
		c.kick()
	}
}

// announce sends a SCSI asynchronous event (RFC 7143 11.9.1) without waiting for
// a command to carry it.
func (c *conn) announce(s *scsi.Sense) {
	c.queue(response{pdu: &iscsi.Async{Event: iscsi.AsyncSCSI}, data: iscsi.AppendSense(nil, s.Bytes(false), nil)})
	c.kick()
}

// pingTTT is the tag of every ping: a valid one, because initiators answer only
// those (facts/iscsi.md §4, row 23). conn.ttt starts at 1 and skips it in practice.
const pingTTT = 0xFFFFFFFE

// Close refuses new logins, ends all sessions and returns when every command has
// left its backend and every goroutine is gone. Devices are the caller's.
func (s *Server) Close() error {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.closed = true
	ls := s.listeners
	s.listeners = map[netip.AddrPort]*listener{}
	var cs []*conn
	for c := range s.conns {
		cs = append(cs, c)
	}
	s.mu.Unlock()
	close(s.stop)
	for _, l := range ls {
		_ = l.l.Close()
	}
	for _, c := range cs {
		c.shut(ErrClosed)
	}
	for _, x := range s.list() {
		x.end(ErrClosed)
	}
	s.mu.Lock()
	lus := s.lus
	s.mu.Unlock()
	for _, u := range lus {
		_ = u.stopSanitize(context.Background(), func(string) bool { return true })
	}
	s.wg.Wait()
	return nil
}
