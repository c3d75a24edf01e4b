package raftlog

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// stream is raft.StreamLayer over the mux.
type stream struct {
	mux    *Mux
	addr   net.Addr                        // advertised
	expect func(raft.ServerAddress) string // node that must answer at an address, "" unknown
	in     chan net.Conn
	ctx    context.Context
	cancel context.CancelFunc

	mu struct {
		sync.Mutex
		open   map[*streamConn]struct{}
		closed bool
	}
}

// streamConn tells when raft has closed it: the mux's handler waits for that.
type streamConn struct {
	net.Conn
	s    *stream
	once sync.Once
	done chan struct{}
}

func (c *streamConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.s.mu.Lock()
		delete(c.s.mu.open, c)
		c.s.mu.Unlock()
		close(c.done)
	})
	return err
}

type advertised string

func (advertised) Network() string  { return "tcp" }
func (a advertised) String() string { return string(a) }

func newStream(m *Mux, addr string, expect func(raft.ServerAddress) string) *stream {
	s := &stream{mux: m, addr: advertised(addr), expect: expect, in: make(chan net.Conn)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.mu.open = make(map[*streamConn]struct{})
	return s
}

// wrap registers a connection; false when the layer is closed.
func (s *stream) wrap(c net.Conn) (*streamConn, bool) {
	sc := &streamConn{Conn: c, s: s, done: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return nil, false
	}
	s.mu.open[sc] = struct{}{}
	return sc, true
}

func (s *stream) handle(ctx context.Context, _ Peer, c net.Conn) {
	sc, ok := s.wrap(c)
	if !ok {
		return
	}
	defer func() { _ = sc.Close() }()
	select {
	case s.in <- sc:
	case <-ctx.Done():
		return
	case <-s.ctx.Done():
		return
	}
	select {
	case <-sc.done:
	case <-ctx.Done():
	case <-s.ctx.Done():
	}
}

// Dial implements raft.StreamLayer.
func (s *stream) Dial(a raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := s.ctx, context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, cancel = context.WithTimeout(s.ctx, timeout)
	}
	defer cancel()
	_, c, err := s.mux.Dial(ctx, string(a), ALPNRaft, s.expect(a))
	if err != nil {
		return nil, err
	}
	sc, ok := s.wrap(c)
	if !ok {
		_ = c.Close()
		return nil, net.ErrClosed
	}
	return sc, nil
}

// Accept implements net.Listener.
func (s *stream) Accept() (net.Conn, error) {
	select {
	case c := <-s.in:
		return c, nil
	case <-s.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener: what peers dial.
func (s *stream) Addr() net.Addr { return s.addr }

// Close implements net.Listener. Raft's transport leaves its streams open and
// its readers blocked in them; both end here.
func (s *stream) Close() error {
	s.cancel()
	s.mu.Lock()
	s.mu.closed = true
	open := make([]*streamConn, 0, len(s.mu.open))
	for c := range s.mu.open {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		_ = c.Close()
	}
	return nil
}
