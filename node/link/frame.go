package link

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// MaxFrame bounds a frame: the state of thousands of volumes is a few MiB.
const MaxFrame = 64 << 20

// Type of a frame. Types are only ever appended.
type Type string

// The frames.
const (
	THello    Type = "hello"
	TRefused  Type = "refused"
	TState    Type = "state"
	TLease    Type = "lease"
	TReport   Type = "report"
	TRequest  Type = "request"
	TReply    Type = "reply"
	TShutdown Type = "shutdown"
	TKill     Type = "kill"
	TScrub    Type = "scrub"
	TStatus   Type = "status" // asks for one report, without a hello: for status commands and tests
	TStats    Type = "stats"  // asks for numbers, without a hello; answered with the same type
	TEvents   Type = "events" // asks for events, without a hello; answered with the same type
)

type frame struct {
	T Type            `json:"t"`
	B json.RawMessage `json:"b,omitempty"`
}

// Conn sends and receives frames. Send may be called by many goroutines, Recv by
// one. A frame is sent whole or the connection is closed.
type Conn struct {
	c net.Conn
	w sync.Mutex
}

// NewConn wraps a connection.
func NewConn(c net.Conn) *Conn { return &Conn{c: c} }

// sendTimeout bounds a send to a peer that does not read.
const sendTimeout = 5 * time.Second

// Send writes one frame.
func (c *Conn) Send(t Type, body any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encode %s: %w", t, err)
	}
	j, err := json.Marshal(frame{t, b})
	if err != nil {
		return fmt.Errorf("encode %s: %w", t, err)
	}
	if len(j) > MaxFrame {
		return fmt.Errorf("send %s: %d bytes, more than %d", t, len(j), MaxFrame)
	}
	buf := binary.BigEndian.AppendUint32(make([]byte, 0, len(j)+4), uint32(len(j)))
	buf = append(buf, j...)
	c.w.Lock()
	defer c.w.Unlock()
	if err := c.c.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return fmt.Errorf("send %s: %w", t, err)
	}
	if _, err := c.c.Write(buf); err != nil {
		_ = c.c.Close() // half a frame may be on the wire
		return fmt.Errorf("send %s: %w", t, err)
	}
	return nil
}

// Recv reads one frame and returns its type and a function that decodes its body.
func (c *Conn) Recv() (Type, func(any) error, error) {
	var h [4]byte
	if _, err := io.ReadFull(c.c, h[:]); err != nil {
		return "", nil, err
	}
	n := binary.BigEndian.Uint32(h[:])
	if n == 0 || n > MaxFrame {
		return "", nil, fmt.Errorf("frame of %d bytes, at most %d are allowed", n, MaxFrame)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.c, b); err != nil {
		return "", nil, fmt.Errorf("read frame: %w", err)
	}
	var f frame
	if err := json.Unmarshal(b, &f); err != nil {
		return "", nil, fmt.Errorf("decode frame: %w", err)
	}
	return f.T, func(v any) error {
		if err := json.Unmarshal(f.B, v); err != nil {
			return fmt.Errorf("decode %s: %w", f.T, err)
		}
		return nil
	}, nil
}

// SetReadDeadline bounds the next Recv.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.c.SetReadDeadline(t) }

// Close ends the connection.
func (c *Conn) Close() error {
	if err := c.c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
