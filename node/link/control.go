package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// Control is control's end of the link to one worker.
type Control struct {
	conn  *Conn
	sent  State // last
	Hello WorkerHello
}

// helloTimeout bounds the first exchange; a worker answers from memory.
const helloTimeout = 3 * time.Second

// ErrRefused tells that the worker obeys somebody else, or knows more than we do.
var ErrRefused = errors.New("refused by the worker")

// Connect dials a worker and says hello.
func Connect(ctx context.Context, path string, h ControlHello) (*Control, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to worker: %w", err)
	}
	conn := NewConn(c)
	ctl := &Control{conn: conn}
	if err := ctl.hello(h); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("connect to worker %s: %w", path, err)
	}
	return ctl, nil
}

func (c *Control) hello(h ControlHello) error {
	if err := c.conn.Send(THello, h); err != nil {
		return err
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	for {
		t, body, err := c.conn.Recv()
		if err != nil {
			return err
		}
		switch t {
		case THello:
			if err := body(&c.Hello); err != nil {
				return err
			}
			return c.conn.SetReadDeadline(time.Time{})
		case TRefused:
			var r Refused
			if err := body(&r); err != nil {
				return err
			}
			return fmt.Errorf("%w: %s", ErrRefused, r.Reason)
		case TReport: // may cross
		default:
			return fmt.Errorf("worker answered hello with %q", t)
		}
	}
}

// State hands over a picture of the FSM. One call at a time.
func (c *Control) State(s State) error {
	if err := c.conn.Send(TState, s.without(&c.sent)); err != nil {
		return err
	}
	c.sent = s
	return nil
}

// Lease hands over a lease.
func (c *Control) Lease(l Lease) error { return c.conn.Send(TLease, l) }

// Reply answers a request.
func (c *Control) Reply(r Reply) error { return c.conn.Send(TReply, r) }

// Shutdown asks the worker to drain and to end.
func (c *Control) Shutdown() error { return c.conn.Send(TShutdown, struct{}{}) }

// Kill asks the storage worker to end a session.
func (c *Control) Kill(k Kill) error { return c.conn.Send(TKill, k) }

// Scrub asks the storage worker to verify a volume.
func (c *Control) Scrub(s Scrub) error { return c.conn.Send(TScrub, s) }

// Close ends the connection; the worker goes on.
func (c *Control) Close() error { return c.conn.Close() }

// Run reads what the worker says until the connection ends. Both functions are
// called from this goroutine.
func (c *Control) Run(report func(Report), request func(Request)) error {
	for {
		t, body, err := c.conn.Recv()
		if err != nil {
			return err
		}
		switch t {
		case TReport:
			var r Report
			if err := body(&r); err != nil {
				return err
			}
			report(r)
		case TRequest:
			var r Request
			if err := body(&r); err != nil {
				return err
			}
			request(r)
		case TRefused:
			var r Refused
			if err := body(&r); err != nil {
				return err
			}
			return fmt.Errorf("%w: %s", ErrRefused, r.Reason)
		default:
			return fmt.Errorf("unknown frame %q from the worker", t)
		}
	}
}

// Status asks a worker for one report without becoming its control.
func Status(ctx context.Context, path string) (Report, error) {
	var r Report
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return r, fmt.Errorf("ask worker: %w", err)
	}
	conn := NewConn(c)
	defer conn.Close()
	if d, ok := ctx.Deadline(); ok {
		if err := conn.SetReadDeadline(d); err != nil {
			return r, err
		}
	}
	if err := conn.Send(TStatus, struct{}{}); err != nil {
		return r, err
	}
	t, body, err := conn.Recv()
	if err != nil {
		return r, fmt.Errorf("ask worker %s: %w", path, err)
	}
	if t != TReport {
		return r, fmt.Errorf("ask worker %s: answered %q", path, t)
	}
	return r, body(&r)
}

// Ask asks a worker for numbers or events (TStats, TEvents) over a connection of
// its own, without becoming its control. A worker that is older than the question
// closes the connection.
func Ask(ctx context.Context, path string, t Type, in, out any) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("ask worker: %w", err)
	}
	conn := NewConn(c)
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := conn.Send(t, in); err != nil {
		return fmt.Errorf("ask worker %s: %w", path, err)
	}
	got, body, err := conn.Recv()
	if err == nil && got != t {
		err = fmt.Errorf("answered %q", got)
	}
	if err == nil {
		err = body(out)
	}
	if err != nil {
		return fmt.Errorf("ask worker %s for %s: %w", path, t, errors.Join(ctx.Err(), err))
	}
	return nil
}
