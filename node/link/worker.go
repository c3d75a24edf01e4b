package link

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Handler is what a worker does with what it is told. OnState and OnLease are
// called one at a time, already admitted by the guard, and must not block on
// I/O: they note the wish and wake the worker's own loop.
type Handler interface {
	OnState(State)
	OnLease(l Lease, ready bool) // ready: the state has reached the lease's minimum
	OnShutdown()
	// Report fills in Gate, LeaseEnd, GateOpens and Detail.
	Report(*Report)
}

// Killer is a Handler that has sessions to end. OnKill must not block.
type Killer interface{ OnKill(Kill) }

// Answerer is a Handler that is asked for what nothing is decided by: numbers and
// events. Answer is called by many goroutines at a time, of connections of their
// own, so that it holds up neither states nor leases.
type Answerer interface {
	Answer(t Type, body func(any) error) (any, error)
}

// Scrubber is a Handler that has volumes to verify. OnScrub must not block.
type Scrubber interface{ OnScrub(Scrub) }

// Server is the worker's end. It outlives every control.
type Server struct {
	hello WorkerHello
	h     Handler
	log   *zap.Logger
	ln    *net.UnixListener
	wg    sync.WaitGroup
	kick  chan struct{} // a report is due

	mu struct {
		sync.Mutex
		guard    Guard
		refusals uint64
		conns    map[*Conn]uint64 // control incarnation, 0 before hello
		pending  map[uint64]*pending
		seq      uint64
		closed   bool
	}
}

type pending struct {
	req  Request
	sent bool // to a control; guarded by Server.mu
	done chan Reply
}

// ErrNotSent is a request that was given up before any control got it: it has no
// effect.
var ErrNotSent = errors.New("no control took the request")

// RefusedError is a request that control, or the cluster, refused: it has no effect.
type RefusedError struct {
	Kind string // of the request
	Code string // as of package api
	Text string
}

func (e *RefusedError) Error() string { return "request " + e.Kind + ": " + e.Text }

// Listen opens the worker's socket. A stale socket of a dead worker is replaced;
// the caller holds the worker's lock file, so nobody else serves it.
func Listen(path string, hello WorkerHello, h Handler, log *zap.Logger) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: remove the old socket: %w", path, err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	s := &Server{hello: hello, h: h, log: log, ln: ln, kick: make(chan struct{}, 1)}
	s.mu.conns = map[*Conn]uint64{}
	s.mu.pending = map[uint64]*pending{}
	return s, nil
}

// Serve answers controls until ctx ends, then closes every connection and
// returns when all of its goroutines have.
func (s *Server) Serve(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = s.ln.Close() })
	defer stop()
	s.wg.Go(func() { s.reports(ctx) })
	for {
		c, err := s.ln.Accept()
		if err != nil {
			break
		}
		conn := NewConn(c)
		s.mu.Lock()
		s.mu.conns[conn] = 0
		s.mu.Unlock()
		s.wg.Go(func() {
			defer func() {
				_ = conn.Close()
				s.mu.Lock()
				delete(s.mu.conns, conn)
				s.mu.Unlock()
			}()
			if err := s.serve(conn); ctx.Err() == nil {
				s.log.Info("control connection ended", zap.Error(err))
			}
		})
	}
	s.mu.Lock()
	s.mu.closed = true
	for c := range s.mu.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// serve answers one connection; it returns why it ended, never nil.
func (s *Server) serve(c *Conn) error {
	var me uint64
	var last State // on this connection
	for {
		t, body, err := c.Recv()
		if err != nil {
			return err
		}
		switch t {
		case TStatus:
			if err := c.Send(TReport, s.report()); err != nil {
				return err
			}
			continue
		case TStats, TEvents:
			a, ok := s.h.(Answerer)
			if !ok {
				return fmt.Errorf("%s: this worker has none", t)
			}
			v, err := a.Answer(t, body)
			if err != nil {
				return err
			}
			if err := c.Send(t, v); err != nil {
				return err
			}
			continue
		case THello:
			var h ControlHello
			if err := body(&h); err != nil {
				return err
			}
			s.mu.Lock()
			err := s.mu.guard.Hello(h.Incarnation)
			if err == nil {
				me = h.Incarnation
				s.mu.conns[c] = me
				for o, inc := range s.mu.conns {
					if o != c && inc != 0 && inc <= me {
						_ = o.Close() // an older control, or our own earlier connection
					}
				}
			} else {
				s.mu.refusals++
			}
			hello := s.hello
			hello.Highest, hello.Control = s.mu.guard.Highest(), s.mu.guard.Control()
			var resend []Request
			if err == nil {
				for _, p := range s.mu.pending {
					p.sent = true
					resend = append(resend, p.req)
				}
			}
			s.mu.Unlock()
			if err != nil {
				s.log.Warn("refused a control", zap.Error(err), zap.Int("pid", h.PID))
				_ = c.Send(TRefused, Refused{err.Error()})
				return err
			}
			s.log.Info("obeying control", zap.Uint64("control", me), zap.Int("pid", h.PID))
			if err := c.Send(THello, hello); err != nil {
				return err
			}
			for _, r := range resend {
				if err := c.Send(TRequest, r); err != nil {
					return err
				}
			}
			continue
		}
		if me == 0 {
			return fmt.Errorf("%s before hello", t)
		}
		if err := s.obey(me, t, body, &last); err != nil {
			s.log.Warn("refused a frame", zap.String("type", string(t)), zap.Error(err))
			_ = c.Send(TRefused, Refused{err.Error()})
			return err
		}
	}
}

func (s *Server) obey(me uint64, t Type, body func(any) error, last *State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.guard.Obeys(me) {
		s.mu.refusals++
		return fmt.Errorf("control %d: %w (control %d)", me, ErrBackwards, s.mu.guard.Control())
	}
	switch t {
	case TState:
		var st State
		if err := body(&st); err != nil {
			return err
		}
		if err := s.mu.guard.State(st.Stamp); err != nil {
			s.mu.refusals++
			return err
		}
		st.with(last)
		*last = st
		s.h.OnState(st)
	case TLease:
		var l Lease
		if err := body(&l); err != nil {
			return err
		}
		if err := s.mu.guard.Lease(l.Stamp); err != nil {
			s.mu.refusals++
			return err
		}
		s.h.OnLease(l, s.mu.guard.Ready())
	case TReply:
		var r Reply
		if err := body(&r); err != nil {
			return err
		}
		if p := s.mu.pending[r.Seq]; p != nil {
			delete(s.mu.pending, r.Seq)
			p.done <- r
		}
	case TShutdown:
		s.h.OnShutdown()
	case TKill:
		var k Kill
		if err := body(&k); err != nil {
			return err
		}
		if h, ok := s.h.(Killer); ok {
			h.OnKill(k)
		}
	case TScrub:
		var k Scrub
		if err := body(&k); err != nil {
			return err
		}
		if h, ok := s.h.(Scrubber); ok {
			h.OnScrub(k)
		}
	default:
		return fmt.Errorf("unknown frame %q: control is newer than this worker", t)
	}
	return nil
}

// Request asks control for a change and waits for the answer, across restarts of
// control. The error of a refused change is a *RefusedError with the FSM's text;
// with ErrNotSent it did not leave this process before ctx ended; any other error
// leaves it open whether the change is made.
func (s *Server) Request(ctx context.Context, kind string, body any) (Reply, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return Reply{}, fmt.Errorf("request %s: %w", kind, err)
	}
	s.mu.Lock()
	s.mu.seq++
	p := &pending{req: Request{s.hello.Incarnation, s.mu.seq, kind, b}, done: make(chan Reply, 1)}
	s.mu.pending[p.req.Seq] = p
	var to []*Conn
	for c, inc := range s.mu.conns {
		if inc != 0 && s.mu.guard.Obeys(inc) {
			to = append(to, c)
			p.sent = true
		}
	}
	s.mu.Unlock()
	for _, c := range to {
		_ = c.Send(TRequest, p.req) // a failed send closes the connection; the next hello repeats it
	}
	select {
	case r := <-p.done:
		if r.Error != "" {
			return r, &RefusedError{kind, r.Code, r.Error}
		}
		return r, nil
	case <-ctx.Done():
		s.mu.Lock()
		delete(s.mu.pending, p.req.Seq)
		sent := p.sent
		s.mu.Unlock()
		if !sent {
			return Reply{}, fmt.Errorf("request %s: %w: %w", kind, ErrNotSent, ctx.Err())
		}
		return Reply{Seq: p.req.Seq}, fmt.Errorf("request %s: %w", kind, ctx.Err())
	}
}

// Changed makes the next report go out at once.
func (s *Server) Changed() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *Server) report() Report {
	s.mu.Lock()
	r := Report{WorkerHello: s.hello, Refusals: s.mu.refusals}
	r.Highest, r.Control = s.mu.guard.Highest(), s.mu.guard.Control()
	s.mu.Unlock()
	s.h.Report(&r)
	return r
}

func (s *Server) reports(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-s.kick:
		}
		r := s.report()
		s.mu.Lock()
		var to []*Conn
		for c, inc := range s.mu.conns {
			if inc != 0 {
				to = append(to, c)
			}
		}
		s.mu.Unlock()
		for _, c := range to {
			_ = c.Send(TReport, r)
		}
	}
}

// Incarnation names this worker process.
func (s *Server) Incarnation() string { return s.hello.Incarnation }
