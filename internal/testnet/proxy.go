package testnet

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Proxy forwards TCP connections and makes them slow. The delay is one way and is added in both directions; bytes under way
// do not wait for each other, so it is latency and not a limit of bandwidth, up to 8 MiB under way in each direction.
type Proxy struct {
	ln     net.Listener
	dial   func(context.Context) (net.Conn, error)
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu struct {
		sync.Mutex
		delay time.Duration
		open  chan struct{} // closed while bytes may pass; SetStall replaces it
		conns map[net.Conn]struct{}
	}
}

// StartProxy serves ln, which it owns from now on, and connects each client to what dial returns. It ends with the test.
func StartProxy(t testing.TB, ln net.Listener, dial func(context.Context) (net.Conn, error)) *Proxy {
	p := &Proxy{ln: ln, dial: dial}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.mu.conns = make(map[net.Conn]struct{})
	p.mu.open = make(chan struct{})
	close(p.mu.open)
	p.wg.Add(1)
	go p.accept()
	t.Cleanup(p.Close)
	return p
}

// Addr is where clients connect.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// SetDelay changes the one-way delay of bytes that arrive from now on.
func (p *Proxy) SetDelay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.delay = d
}

// SetStall holds back every byte, without loss, until it is called with false: a peer that is there and silent.
func (p *Proxy) SetStall(stall bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.mu.open:
		if stall {
			p.mu.open = make(chan struct{})
		}
	default:
		if !stall {
			close(p.mu.open)
		}
	}
}

// Reset breaks every connection with a TCP reset. New ones are still accepted.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.mu.conns {
		if tc, ok := c.(*net.TCPConn); ok {
			_ = tc.SetLinger(0)
		}
		_ = c.Close()
	}
}

// Close breaks every connection, stops listening and waits until all goroutines are gone.
func (p *Proxy) Close() {
	p.cancel()
	_ = p.ln.Close()
	p.Reset()
	p.wg.Wait()
}

// track refuses connections once Close began, so that Close misses none.
func (p *Proxy) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		_ = c.Close()
		return false
	}
	p.mu.conns[c] = struct{}{}
	return true
}

func (p *Proxy) drop(c net.Conn) {
	_ = c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.mu.conns, c)
}

func (p *Proxy) accept() {
	defer p.wg.Done()
	for {
		c, err := p.ln.Accept()
		if err != nil {
			if p.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				time.Sleep(10 * time.Millisecond) // out of descriptors: try again rather than die unseen
				continue
			}
			return
		}
		if !p.track(c) {
			return
		}
		p.wg.Add(1)
		go p.serve(c)
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer p.wg.Done()
	defer p.drop(client)
	server, err := p.dial(p.ctx)
	if err != nil {
		return // the client sees the connection close, as with a peer that is down
	}
	if !p.track(server) {
		return
	}
	defer p.drop(server)
	var pair sync.WaitGroup
	pair.Go(func() { p.copy(server, client) })
	pair.Go(func() { p.copy(client, server) })
	pair.Wait()
}

type chunk struct {
	data []byte
	due  time.Time
}

func (p *Proxy) copy(dst, src net.Conn) {
	queue := make(chan chunk, 256)
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.deliver(dst, src, queue)
	}()
	buf := make([]byte, 32<<10)
	for {
		k, err := src.Read(buf)
		if k > 0 {
			p.mu.Lock()
			due := time.Now().Add(p.mu.delay)
			p.mu.Unlock()
			c := chunk{append([]byte(nil), buf[:k]...), due}
			select {
			case queue <- c:
			case <-done:
				err = net.ErrClosed
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_ = dst.Close() // a broken connection is broken at once on both sides
			}
			break
		}
	}
	close(queue)
	<-done
}

func (p *Proxy) deliver(dst, src net.Conn, queue <-chan chunk) {
	for c := range queue {
		timer := time.NewTimer(time.Until(c.due))
		select {
		case <-timer.C:
		case <-p.ctx.Done():
			timer.Stop()
			return
		}
		p.mu.Lock()
		open := p.mu.open
		p.mu.Unlock()
		select {
		case <-open:
		case <-p.ctx.Done():
			return
		}
		if _, err := dst.Write(c.data); err != nil {
			_ = dst.Close()
			_ = src.Close()
			return
		}
	}
	// The source ended: hand on the half close, in order with its bytes.
	if tc, ok := dst.(interface{ CloseWrite() error }); ok {
		_ = tc.CloseWrite()
	} else {
		_ = dst.Close()
	}
}
