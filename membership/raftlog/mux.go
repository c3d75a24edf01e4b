package raftlog

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/pki"
)

// The protocols of the cluster port. node/ registers the lease's handler.
const (
	ALPNRaft  = "blockhouse-raft/1"
	ALPNLease = "blockhouse-lease/1"
)

// handshakeTimeout bounds TLS and hello of one stream, so that a silent peer
// holds no goroutine for long.
const handshakeTimeout = 5 * time.Second

// MuxConfig is what a Mux is made of.
type MuxConfig struct {
	Files   *pki.Files        // certificate of this node
	Cluster *machines.Cluster // whom the state knows; may be empty on a node that just joined
	BootID  string            // /proc/sys/kernel/random/boot_id
	// Incarnation of this node; nil takes the one of its record in Cluster.
	Incarnation func() uint64
	// Now is the clock that certificates are judged by; nil is time.Now.
	Now func() time.Time
	Log *zap.Logger
	// Registerer gets the counters; nil for none.
	Registerer prometheus.Registerer
}

// Peer is who is at the other end of a stream, verified.
type Peer struct {
	Hello
	Addr net.Addr
	ALPN string
}

// Handler serves one stream. It owns conn until it returns; the mux then closes
// it. ctx ends when the mux closes, and conn is closed then too.
type Handler func(ctx context.Context, peer Peer, conn net.Conn)

// Mux is the cluster port: one TCP listener, mutual TLS, the protocol chosen by
// ALPN, and a handshake by which both ends learn cluster, node, incarnation and
// boot id. Whom it refuses it tells why, logs and counts.
type Mux struct {
	cfg     MuxConfig
	log     *zap.Logger
	refused *prometheus.CounterVec
	accepts *prometheus.CounterVec
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu struct {
		sync.Mutex
		handlers map[string]Handler
		ln       net.Listener
		conns    map[net.Conn]struct{} // accepted, open
		closed   bool
	}
}

// NewMux makes a mux that does not listen yet; Dial works at once.
func NewMux(cfg MuxConfig) (*Mux, error) {
	if cfg.Files == nil || cfg.Cluster == nil || cfg.Log == nil || cfg.BootID == "" {
		return nil, errors.New("new mux: files, cluster, boot id and log are needed")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Incarnation == nil {
		cfg.Incarnation = func() (inc uint64) {
			cfg.Cluster.Read(func(v machines.View) {
				if r, ok := v.Members.Get(cfg.Files.ID.Name); ok {
					inc = r.Incarnation
				}
			})
			return inc
		}
	}
	m := &Mux{
		cfg: cfg,
		log: cfg.Log,
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "blockhouse_stream_refused_total", Help: "Cluster streams refused, by protocol, reason and which end refused.",
		}, []string{"protocol", "reason", "by"}),
		accepts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "blockhouse_stream_accepted_total", Help: "Cluster streams accepted, by protocol.",
		}, []string{"protocol"}),
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.mu.handlers = make(map[string]Handler)
	m.mu.conns = make(map[net.Conn]struct{})
	if cfg.Registerer != nil {
		for _, c := range []prometheus.Collector{m.refused, m.accepts} {
			if err := cfg.Registerer.Register(c); err != nil {
				m.cancel()
				return nil, fmt.Errorf("new mux: %w", err)
			}
		}
	}
	return m, nil
}

// Handle sets the handler of a protocol. A nil handler takes it away.
func (m *Mux) Handle(alpn string, h Handler) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h == nil {
		delete(m.mu.handlers, alpn)
		return
	}
	m.mu.handlers[alpn] = h
}

func (m *Mux) handler(alpn string) Handler {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.handlers[alpn]
}

// Hello is what this node says of itself now.
func (m *Mux) Hello() Hello {
	return Hello{
		Cluster: m.cfg.Files.ID.Cluster, Node: m.cfg.Files.ID.Name, BootID: m.cfg.BootID,
		Incarnation: m.cfg.Incarnation(), Index: m.cfg.Cluster.Index(),
	}
}

// Listen opens the port and accepts until Close. addr is host:port; port 0 is
// any.
func (m *Mux) Listen(addr string) error {
	ln, err := (&net.ListenConfig{}).Listen(m.ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for the cluster on %s: %w", addr, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.closed || m.mu.ln != nil {
		return errors.Join(errors.New("listen for the cluster: mux is closed or listens already"), ln.Close())
	}
	m.mu.ln = ln
	m.wg.Go(func() { m.accept(ln) })
	return nil
}

// Addr is the listener's address; nil before Listen.
func (m *Mux) Addr() net.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.ln == nil {
		return nil
	}
	return m.mu.ln.Addr()
}

func (m *Mux) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			if m.ctx.Err() != nil {
				return
			}
			// Out of file descriptors and the like: stay, but do not spin.
			m.log.Warn("accept cluster stream", zap.Error(err))
			select {
			case <-time.After(100 * time.Millisecond):
				continue
			case <-m.ctx.Done():
				return
			}
		}
		if !m.track(c) {
			_ = c.Close()
			return
		}
		m.wg.Go(func() {
			defer m.untrack(c)
			m.serve(c)
		})
	}
}

func (m *Mux) track(c net.Conn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.closed {
		return false
	}
	m.mu.conns[c] = struct{}{}
	return true
}

func (m *Mux) untrack(c net.Conn) {
	_ = c.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mu.conns, c)
}

func (m *Mux) protocols() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := maps.Clone(m.mu.handlers)
	// These two are answered with a reason also while nobody serves them.
	p[ALPNRaft], p[ALPNLease] = nil, nil
	return slices.Sorted(maps.Keys(p))
}

func (m *Mux) serve(raw net.Conn) {
	_ = raw.SetDeadline(time.Now().Add(handshakeTimeout))
	c := tls.Server(raw, m.cfg.Files.ServerTLS(m.protocols()...))
	if err := c.HandshakeContext(m.ctx); err != nil {
		if m.ctx.Err() == nil {
			m.refused.WithLabelValues("", string(BadFrame), "here").Inc()
			m.log.Warn("cluster stream refused", zap.String("reason", "tls"), zap.Stringer("remote", raw.RemoteAddr()), zap.Error(err))
		}
		return
	}
	cs := c.ConnectionState()
	// The hello is read before the certificate is judged, so that the close
	// after a refusal is no reset that takes the answer with it.
	hello, rerr := readHello(c)
	peer := Peer{Hello: hello, Addr: raw.RemoteAddr(), ALPN: cs.NegotiatedProtocol}
	if err := m.judge(cs, peer, rerr); err != nil {
		m.refused.WithLabelValues(peer.ALPN, string(err.Reason), "here").Inc()
		m.log.Warn("cluster stream refused",
			zap.String("reason", string(err.Reason)), zap.String("why", err.Text), zap.String("protocol", peer.ALPN),
			zap.Stringer("remote", raw.RemoteAddr()), zap.String("node", hello.Node), zap.String("cluster", hello.Cluster),
			zap.Uint64("incarnation", hello.Incarnation), zap.String("boot_id", hello.BootID))
		_, _ = c.Write(encodeAnswer(err.Reason, err.Text, Hello{}))
		_ = c.Close()
		return
	}
	m.accepts.WithLabelValues(peer.ALPN).Inc()
	if _, err := c.Write(encodeAnswer("", "", m.Hello())); err != nil {
		m.log.Info("cluster stream lost in handshake", zap.String("node", hello.Node), zap.Error(err))
		return
	}
	_ = raw.SetDeadline(time.Time{})
	m.log.Debug("cluster stream accepted", zap.String("protocol", peer.ALPN), zap.String("node", hello.Node), zap.Uint64("incarnation", hello.Incarnation))
	if h := m.handler(peer.ALPN); h != nil {
		h(m.ctx, peer, c)
	}
	_ = c.Close()
}

// judge decides on an accepted stream. A certificate is judged before what the
// peer says.
func (m *Mux) judge(cs tls.ConnectionState, p Peer, frame *RefusedError) *RefusedError {
	id, err := m.cfg.Files.Verify(cs.PeerCertificates, m.cfg.Now(), pki.Want{Role: pki.Node})
	if err != nil {
		return certRefused(err)
	}
	if frame != nil {
		return frame
	}
	if err := m.matches(p.Hello, id); err != nil {
		return err
	}
	if err := Admission(m.cfg.Cluster, p.Hello); err != nil {
		return err
	}
	if m.handler(p.ALPN) == nil {
		return &RefusedError{Reason: NotServed, Text: fmt.Sprintf("protocol %q is not served here (yet)", p.ALPN)}
	}
	return nil
}

func certRefused(err error) *RefusedError {
	var r *pki.RefusedError
	if errors.As(err, &r) {
		return &RefusedError{Reason: Reason(r.Reason), Text: r.Error()}
	}
	return &RefusedError{Reason: Reason(pki.Untrusted), Text: err.Error()}
}

// matches checks what a peer says against its certificate.
func (m *Mux) matches(h Hello, id pki.Identity) *RefusedError {
	if h.Cluster != m.cfg.Files.ID.Cluster {
		return &RefusedError{
			Reason: Reason(pki.OtherCluster),
			Text:   fmt.Sprintf("node %s says it is of cluster %s, this is cluster %s", h.Node, h.Cluster, m.cfg.Files.ID.Cluster),
		}
	}
	if h.Node != id.Name {
		return &RefusedError{Reason: Reason(pki.WrongName), Text: fmt.Sprintf("it says it is node %s, its certificate says %s", h.Node, id.Name)}
	}
	return nil
}

// Admission tells whether the state lets a node speak; nil means yes.
//
// A stream of an incarnation below the known one is refused. A node that the
// state does not know is refused only if it knows no more than we do: a node
// that was down while others joined must hear them to learn of them, and then
// the other's applied index is the higher one. A removed node knows less, and
// what a removed incarnation says is refused in any case.
func Admission(c *machines.Cluster, h Hello) *RefusedError {
	var (
		rec   members.Record
		tomb  members.Tombstone
		known bool
		gone  bool
		uuid  string
		index uint64
	)
	c.Read(func(v machines.View) {
		rec, known = v.Members.Get(h.Node)
		tomb, gone = v.Members.Tombstone(h.Node)
		_, uuid, _, _ = v.Members.Cluster()
		index = v.Index
	})
	switch {
	case uuid == "":
		return nil // nothing is known here: a node that just joined
	case uuid != h.Cluster:
		return &RefusedError{Reason: Reason(pki.OtherCluster), Text: fmt.Sprintf("node %s says it is of cluster %s, this is cluster %s", h.Node, h.Cluster, uuid)}
	case gone && h.Incarnation <= tomb.Incarnation:
		return &RefusedError{Reason: RemovedNode, Text: fmt.Sprintf("node %s was removed from the cluster in incarnation %d; join it anew with a token", h.Node, tomb.Incarnation)}
	case known && h.Incarnation < rec.Incarnation:
		return &RefusedError{Reason: OldIncarnation, Text: fmt.Sprintf("node %s comes in incarnation %d, %d was admitted", h.Node, h.Incarnation, rec.Incarnation)}
	case !known && h.Index <= index:
		return &RefusedError{Reason: UnknownNode, Text: fmt.Sprintf("node %s is no member of this cluster; join it with a token", h.Node)}
	}
	return nil
}

// Dial opens a stream to a node for a protocol. node is who must answer; ""
// accepts every node of the cluster. A refusal, by either end, is a
// *RefusedError. The caller owns the stream.
//
// The dialler does not refuse an answering node for an old incarnation: the
// leader must reach a node that has not yet heard of its own admission. Peer
// carries it, for protocols that mind.
func (m *Mux) Dial(ctx context.Context, addr, alpn, node string) (Peer, net.Conn, error) {
	p, c, err := m.dial(ctx, addr, alpn, node)
	if err == nil {
		return p, c, nil
	}
	var r *RefusedError
	var pr *pki.RefusedError
	switch {
	case errors.As(err, &r):
	case errors.As(err, &pr):
		r = certRefused(pr)
		err = r
	}
	if r != nil {
		by := "here"
		if r.Remote {
			by = "there"
		}
		m.refused.WithLabelValues(alpn, string(r.Reason), by).Inc()
		m.log.Warn("cluster stream refused", zap.String("reason", string(r.Reason)), zap.String("why", r.Text), zap.String("by", by),
			zap.String("protocol", alpn), zap.String("address", addr), zap.String("node", node))
	}
	return Peer{}, nil, fmt.Errorf("dial node %s at %s for %s: %w", node, addr, alpn, err)
}

func (m *Mux) dial(ctx context.Context, addr, alpn, node string) (_ Peer, _ net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return Peer{}, nil, err
	}
	// Close ends every blocking call below.
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	stopMux := context.AfterFunc(m.ctx, func() { _ = raw.Close() })
	defer stopMux()
	c := tls.Client(raw, m.cfg.Files.ClientTLS(m.cfg.Now, pki.Want{Role: pki.Node, Name: node}, alpn))
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			_ = raw.Close()
			if ctx.Err() != nil {
				err = fmt.Errorf("%w (%w)", ctx.Err(), err)
			}
		}
	}()
	if err := c.HandshakeContext(ctx); err != nil {
		return Peer{}, nil, err
	}
	h := m.Hello()
	if err := h.check(); err != nil {
		return Peer{}, nil, err
	}
	if _, err := c.Write(encodeHello(h)); err != nil {
		return Peer{}, nil, err
	}
	got, rerr := readAnswer(c)
	if rerr != nil {
		return Peer{}, nil, rerr
	}
	id, err := pki.IdentityOf(c.ConnectionState().PeerCertificates[0])
	if err != nil {
		return Peer{}, nil, err
	}
	if rerr := m.matches(got, id); rerr != nil {
		return Peer{}, nil, rerr
	}
	return Peer{Hello: got, Addr: raw.RemoteAddr(), ALPN: alpn}, c, nil
}

// Close stops listening, closes every accepted stream and returns when all
// handlers have.
func (m *Mux) Close() error {
	m.mu.Lock()
	if m.mu.closed {
		m.mu.Unlock()
		m.wg.Wait()
		return nil
	}
	m.mu.closed = true
	m.cancel()
	var err error
	if m.mu.ln != nil {
		err = m.mu.ln.Close()
	}
	for c := range m.mu.conns {
		_ = c.Close()
	}
	m.mu.Unlock()
	m.wg.Wait()
	if m.cfg.Registerer != nil {
		m.cfg.Registerer.Unregister(m.refused)
		m.cfg.Registerer.Unregister(m.accepts)
	}
	return err
}
