// Package nbd is a store on the export of an NBD server: newstyle handshake,
// structured replies and base:allocation where the server has them, many
// requests in flight on one connection. It is how RBD, qcow2 and SPDK come
// behind a volume, through qemu-storage-daemon, nbdkit and others.
//
// A broken connection is made anew only where that hides nothing: when no
// command that writes was in flight and everything acknowledged had been
// flushed. Otherwise a write may be lost with the server, or still wait in it
// and land after a newer one; the store is then failed for good, reads too
// (SAFETY: a failed flush is never retried). The export has no epochs:
// Caps.Fences is absent.
//
// The protocol: the NBD project's doc/proto.md. TLS is not spoken.
//
// Storage row: it imports block only.
package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/block"
)

// Options of Open.
type Options struct {
	Network   string // "tcp" or "unix"
	Addr      string // HOST:PORT, or the path of the socket
	Export    string
	BlockSize int // logical block, 512 or 4096; 0 = 512
	ReadOnly  bool
	// Reconnect is how long a call waits for a new connection; 0 = a lost
	// connection fails the store.
	Reconnect time.Duration
	Logger    *zap.Logger // nil = none
}

// handshakeTime bounds dialing and handshake.
const handshakeTime = 10 * time.Second

// silence is how long a peer may leave our TCP segments unacknowledged.
const silence = 30 * time.Second

// Client is an open export. It implements block.Device.
type Client struct {
	o    Options
	log  *zap.Logger
	info block.Info
	x    export

	life    sync.RWMutex // read-locked by every call, locked by Close
	closed  bool         // guarded by life
	closing chan struct{}
	once    sync.Once // closes closing
	wg      sync.WaitGroup

	mu struct {
		sync.Mutex
		conn   *conn         // nil: none now
		change chan struct{} // closed when conn or dead changes
		dead   error         // sticky
		shut   bool          // Close has taken the last connection
		// acked counts acknowledged commands that wrote without FUA, flushed is how
		// many of them a flush made durable.
		acked, flushed uint64
	}
}

// conn is one connection.
type conn struct {
	c     net.Conn
	write sync.Mutex // one request at a time
	ids   atomic.Uint64

	mu   sync.Mutex
	pend map[uint64]*call // nil: lost
}

var errLost = errors.New("the connection is lost")

// Open connects to an export. Its size must be a multiple of the block size.
func Open(ctx context.Context, o Options) (*Client, error) {
	c := &Client{o: o, log: o.Logger, closing: make(chan struct{})}
	c.mu.change = make(chan struct{})
	if c.log == nil {
		c.log = zap.NewNop()
	}
	c.log = c.log.With(zap.String("nbd", o.Addr), zap.String("export", o.Export))
	if c.o.BlockSize == 0 {
		c.o.BlockSize = 512
	}
	if bs := c.o.BlockSize; bs != 512 && bs != 4096 {
		return nil, c.opening(fmt.Errorf("block size %d: want 512 or 4096", bs))
	}
	nc, x, err := c.dial(ctx)
	if err != nil {
		return nil, c.opening(err)
	}
	if err := c.judge(&x); err != nil {
		_ = nc.Close()
		return nil, c.opening(err)
	}
	c.x = x
	c.install(nc)
	return c, nil
}

func (c *Client) opening(err error) error {
	return fmt.Errorf("open nbd export %q at %s: %w", c.o.Export, c.o.Addr, err)
}

// judge tells whether an export can be a store, and what it then is.
func (c *Client) judge(x *export) error {
	bs := uint32(c.o.BlockSize)
	switch {
	case x.size == 0 || x.size%int64(bs) != 0:
		return fmt.Errorf("size %d is not a positive multiple of the block size %d", x.size, bs)
	case x.minBlock > bs:
		return fmt.Errorf("the export needs blocks of %d bytes, larger than the block size %d; make the volume with --block-size 4096", x.minBlock, bs)
	case x.maxPayload < bs:
		return fmt.Errorf("the export takes %d bytes at a time, less than a block of %d", x.maxPayload, bs)
	case x.flags&xReadOnly != 0 && !c.o.ReadOnly:
		return fmt.Errorf("the export: %w", block.ErrReadOnly)
	case x.flags&xFlush == 0 && !c.o.ReadOnly:
		return errors.New("the server has no FLUSH: what it acknowledges cannot be made durable; start it with flush support")
	}
	phys := bs
	if p := x.prefBlock; p&(p-1) == 0 && p > phys {
		phys = min(p, 1<<20)
	}
	c.info = block.Info{Size: x.size, BlockSize: int(bs), PhysBlock: int(phys), Caps: block.Caps{
		Thin: x.flags&(xTrim|xWriteZeroes) != 0, UnmapZeroes: x.flags&xWriteZeroes != 0, WriteCache: true, ReadOnly: c.o.ReadOnly}}
	return nil
}

func (c *Client) dial(ctx context.Context) (net.Conn, export, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: silence / 3, Interval: silence / 6, Count: 4},
		Control: func(network, _ string, rc syscall.RawConn) error {
			if network == "unix" {
				return nil
			}
			var err error
			if e := rc.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence/time.Millisecond))
			}); e != nil {
				return e
			}
			return err
		}}
	nc, err := d.DialContext(ctx, c.o.Network, c.o.Addr)
	if err != nil {
		return nil, export{}, fmt.Errorf("%w: %w", block.ErrUnreachable, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	x, err := handshake(nc, c.o.Export)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = nc.Close()
		return nil, x, fmt.Errorf("handshake: %w", err)
	}
	return nc, x, nil
}

// install makes nc the connection.
func (c *Client) install(nc net.Conn) {
	k := &conn{c: nc, pend: map[uint64]*call{}}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.shut {
		_ = nc.Close()
		return
	}
	c.mu.conn = k
	c.changed()
	c.wg.Go(func() { c.reader(k) })
}

// changed is called with mu held.
func (c *Client) changed() {
	close(c.mu.change)
	c.mu.change = make(chan struct{})
}

// reader hands replies out until the connection ends.
func (c *Client) reader(k *conn) {
	d := &decoder{r: bufio.NewReaderSize(k.c, 64<<10), structured: c.x.structured, context: c.x.context, find: func(id uint64) *call {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.pend[id]
	}}
	for {
		id, ended, err := d.next()
		if err != nil {
			c.lost(k, err)
			return
		}
		if ended == nil {
			continue
		}
		// Counted before the call is taken from the pending ones: at no moment is
		// an acknowledged write in neither.
		if ended.err == nil {
			c.mu.Lock()
			switch {
			case ended.changes() && ended.fl&cmdFlagFUA == 0:
				c.mu.acked++
			case ended.cmd == cmdFlush:
				c.mu.flushed = max(c.mu.flushed, ended.mark)
			}
			c.mu.Unlock()
		} else if ended.cmd == cmdFlush || ended.fl&cmdFlagFUA != 0 && ended.changes() && errors.Is(ended.err, block.ErrMedium) {
			// A FUA write that failed is in the same doubt: the server may have taken
			// it and failed to sync.
			ended.err = c.fail(fmt.Errorf("flush: %w", ended.err))
		}
		k.mu.Lock()
		delete(k.pend, id)
		k.mu.Unlock()
		ended.done <- ended.err
	}
}

// fail makes the store failed.
func (c *Client) fail(why error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failLocked(why)
}

func (c *Client) failLocked(why error) error {
	if c.mu.dead == nil {
		c.mu.dead = fmt.Errorf("nbd export %q at %s: %w: %w", c.o.Export, c.o.Addr, block.ErrFlushFailed, why)
		c.log.Error("the store is failed and accepts nothing any more", zap.Error(why))
		c.changed()
	}
	return c.mu.dead
}

// Failed is why the store is lost (block.Failer).
func (c *Client) Failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.dead
}

// lost ends a connection and decides whether there may be another.
func (c *Client) lost(k *conn, why error) {
	_ = k.c.Close()
	k.mu.Lock()
	pend := k.pend
	k.pend = nil
	k.mu.Unlock()
	writes := 0
	for _, x := range pend {
		if x.changes() {
			writes++
		}
	}
	select {
	case <-c.closing:
	default:
		c.log.Warn("the connection to the NBD server is lost", zap.Error(why), zap.Int("in_flight", len(pend)), zap.Int("writes_in_flight", writes))
	}
	c.mu.Lock()
	c.mu.conn = nil
	unflushed := c.mu.acked - c.mu.flushed
	again := false
	switch {
	case c.mu.dead != nil:
	case writes > 0 || unflushed > 0:
		_ = c.failLocked(fmt.Errorf("%w with %d writes in flight and %d acknowledged ones not flushed: %w", errLost, writes, unflushed, why))
	case errors.Is(why, errProtocol):
		_ = c.failLocked(why)
	case c.o.Reconnect == 0:
		_ = c.failLocked(fmt.Errorf("%w: %w", errLost, why))
	default:
		again = true
	}
	c.changed()
	c.mu.Unlock()
	for _, x := range pend {
		x.done <- fmt.Errorf("%w: %w", errLost, why)
	}
	if again {
		c.reconnect()
	}
}

// reconnect dials until there is a connection. It runs on what was the reader of
// the lost one.
func (c *Client) reconnect() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c.wg.Go(func() {
		select {
		case <-c.closing:
			cancel()
		case <-ctx.Done():
		}
	})
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		nc, x, err := c.dial(ctx)
		switch {
		case err == nil && x != c.x:
			_ = nc.Close()
			_ = c.fail(fmt.Errorf("after a reconnect the export is another one: %+v, it was %+v", x, c.x))
			return
		case err == nil:
			c.log.Info("connected to the NBD server again")
			c.install(nc)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// current waits for a connection.
func (c *Client) current(ctx context.Context) (*conn, error) {
	var timeout <-chan time.Time
	for {
		c.mu.Lock()
		k, dead, change := c.mu.conn, c.mu.dead, c.mu.change
		c.mu.Unlock()
		switch {
		case dead != nil:
			return nil, dead
		case k != nil:
			return k, nil
		}
		if timeout == nil {
			t := time.NewTimer(c.o.Reconnect)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-change:
		case <-timeout:
			return nil, fmt.Errorf("nbd export %q at %s: %w for %v", c.o.Export, c.o.Addr, block.ErrUnreachable, c.o.Reconnect)
		case <-c.closing:
			return nil, block.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// do sends a call and waits for its end. What does not write is sent again on
// the next connection.
// A request at which the connection breaks again and again is given up after
// Reconnect: it may be what breaks it.
func (c *Client) do(ctx context.Context, x *call) error {
	var first time.Time // of the losses
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !first.IsZero() && time.Since(first) > c.o.Reconnect && c.Failed() == nil {
			return fmt.Errorf("nbd export %q at %s: %w: each connection broke at this request", c.o.Export, c.o.Addr, block.ErrUnreachable)
		}
		k, err := c.current(ctx)
		if err != nil {
			return err
		}
		x.err, x.covered, x.filled, x.runs, x.done = nil, nil, 0, nil, make(chan error, 1)
		if x.cmd == cmdFlush {
			c.mu.Lock()
			x.mark = c.mu.acked
			c.mu.Unlock()
		}
		if !k.send(x) {
			// The connection went before the request was on it; lost() is about to
			// say what comes next.
			if err := c.after(ctx, k); err != nil {
				return err
			}
			continue
		}
		err = <-x.done
		if !errors.Is(err, errLost) {
			return err
		}
		if first.IsZero() {
			first = time.Now()
		}
		if x.changes() {
			if dead := c.Failed(); dead != nil {
				return dead
			}
			return err
		}
	}
}

// after waits until k is no longer the connection.
func (c *Client) after(ctx context.Context, k *conn) error {
	for {
		c.mu.Lock()
		now, change := c.mu.conn, c.mu.change
		c.mu.Unlock()
		if now != k {
			return nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// send registers x and writes it. It is false if the connection was lost before:
// then not a byte of x was sent. If writing fails the reader ends the connection,
// and x with it.
func (k *conn) send(x *call) bool {
	id := k.ids.Add(1)
	k.mu.Lock()
	if k.pend == nil {
		k.mu.Unlock()
		return false
	}
	k.pend[id] = x
	k.mu.Unlock()
	var h [requestLen]byte
	binary.BigEndian.PutUint32(h[:], magicRequest)
	binary.BigEndian.PutUint16(h[4:], x.fl)
	binary.BigEndian.PutUint16(h[6:], x.cmd)
	binary.BigEndian.PutUint64(h[8:], id)
	binary.BigEndian.PutUint64(h[16:], x.off)
	binary.BigEndian.PutUint32(h[24:], x.n)
	bufs := net.Buffers{h[:]}
	if x.cmd == cmdWrite {
		bufs = append(bufs, x.p)
	}
	k.write.Lock()
	_, err := bufs.WriteTo(k.c)
	k.write.Unlock()
	if err != nil {
		_ = k.c.Close()
	}
	return true
}

// Info tells what the store is.
func (c *Client) Info() block.Info { return c.info }

// enter begins a call; after nil the caller runs c.life.RUnlock.
func (c *Client) enter(ctx context.Context, off, n int64, write bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.life.RLock()
	err := c.info.Check(off, n)
	switch {
	case c.closed:
		err = fmt.Errorf("nbd export %q at %s: %w", c.o.Export, c.o.Addr, block.ErrClosed)
	case write && c.info.Caps.ReadOnly:
		err = fmt.Errorf("nbd export %q at %s: %w", c.o.Export, c.o.Addr, block.ErrReadOnly)
	}
	if err != nil {
		c.life.RUnlock()
	}
	return err
}

func (c *Client) failed(op string, off, n int64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s nbd export %q at %s [%d,+%d): %w", op, c.o.Export, c.o.Addr, off, n, err)
}

// payload is how much one read or write carries: whole blocks.
func (c *Client) payload() int64 {
	return min(int64(c.x.maxPayload), maxPayload) / int64(c.info.BlockSize) * int64(c.info.BlockSize)
}

// ReadAt fills p from off.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := c.enter(ctx, off, n, false); err != nil {
		return err
	}
	defer c.life.RUnlock()
	for at := off; len(p) > 0; {
		k := min(int64(len(p)), c.payload())
		if err := c.do(ctx, &call{cmd: cmdRead, off: uint64(at), n: uint32(k), p: p[:k]}); err != nil {
			return c.failed("read", off, n, err)
		}
		p, at = p[k:], at+k
	}
	return nil
}

// WriteAt writes p at off.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	n := int64(len(p))
	if err := c.enter(ctx, off, n, true); err != nil {
		return err
	}
	defer c.life.RUnlock()
	cf, flush := c.fua(fl)
	for at := off; len(p) > 0; {
		k := min(int64(len(p)), c.payload())
		if err := c.do(ctx, &call{cmd: cmdWrite, fl: cf, off: uint64(at), n: uint32(k), p: p[:k]}); err != nil {
			return c.failed("write", off, n, err)
		}
		p, at = p[k:], at+k
	}
	if flush && n > 0 {
		return c.failed("write", off, n, c.do(ctx, &call{cmd: cmdFlush}))
	}
	return nil
}

// fua is the command flag for FUA, or that a flush must follow.
func (c *Client) fua(fl block.Flags) (flag uint16, flush bool) {
	switch {
	case fl&block.FUA == 0:
		return 0, false
	case c.x.flags&xFUA != 0:
		return cmdFlagFUA, false
	}
	return 0, true
}

// Flush makes every write that returned before durable.
func (c *Client) Flush(ctx context.Context) error {
	if err := c.enter(ctx, 0, 0, false); err != nil {
		return err
	}
	defer c.life.RUnlock()
	if c.info.Caps.ReadOnly {
		return nil
	}
	return c.failed("flush", 0, c.info.Size, c.do(ctx, &call{cmd: cmdFlush}))
}

// zeroPiece is the length of one command without data.
const zeroPiece = 64 << 20

// Unmap deallocates: by WRITE_ZEROES where the server has it, because what a
// trimmed range reads as is open.
func (c *Client) Unmap(ctx context.Context, off, n int64) error {
	if err := c.enter(ctx, off, n, true); err != nil {
		return err
	}
	defer c.life.RUnlock()
	switch {
	case c.x.flags&xWriteZeroes != 0:
		return c.failed("unmap", off, n, c.each(ctx, cmdWriteZeroes, 0, off, n))
	case c.x.flags&xTrim != 0:
		return c.failed("unmap", off, n, c.each(ctx, cmdTrim, 0, off, n))
	}
	return c.Failed()
}

func (c *Client) each(ctx context.Context, cmd, fl uint16, off, n int64) error {
	for n > 0 {
		k := min(n, zeroPiece)
		if err := c.do(ctx, &call{cmd: cmd, fl: fl, off: uint64(off), n: uint32(k)}); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

var zeroes [1 << 20]byte

// WriteZeroes makes the range read as zeroes.
func (c *Client) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	if err := c.enter(ctx, off, n, true); err != nil {
		return err
	}
	defer c.life.RUnlock()
	cf, flush := c.fua(fl)
	var err error
	if c.x.flags&xWriteZeroes != 0 {
		if fl&block.MayUnmap == 0 {
			cf |= cmdFlagNoHole
		}
		err = c.each(ctx, cmdWriteZeroes, cf, off, n)
	} else {
		for at, left := off, n; left > 0 && err == nil; {
			k := min(left, c.payload(), int64(len(zeroes)))
			err = c.do(ctx, &call{cmd: cmdWrite, fl: cf, off: uint64(at), n: uint32(k), p: zeroes[:k]})
			at, left = at+k, left-k
		}
	}
	if err == nil && flush && n > 0 {
		err = c.do(ctx, &call{cmd: cmdFlush})
	}
	return c.failed("write zeroes", off, n, err)
}

// Extents asks BLOCK_STATUS in base:allocation. Unmapped is what is a hole and
// reads as zeroes; a part of a block in another state counts as mapped.
func (c *Client) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	if err := c.enter(ctx, off, n, false); err != nil {
		return nil, err
	}
	defer c.life.RUnlock()
	if n == 0 {
		return nil, c.Failed()
	}
	if !c.x.meta {
		return []block.Extent{{Off: off, Len: n, Mapped: true}}, c.Failed()
	}
	bs := int64(c.info.BlockSize)
	var out []block.Extent
	end, at := off+n, off // up to at everything is in out
	add := func(to int64, mapped bool) {
		if to <= at {
			return
		}
		if k := len(out) - 1; k >= 0 && out[k].Mapped == mapped {
			out[k].Len += to - at
		} else {
			out = append(out, block.Extent{Off: at, Len: to - at, Mapped: mapped})
		}
		at = to
	}
	pos := off // up to pos the server has told; each run moves it on
	for pos < end {
		x := &call{cmd: cmdBlockStatus, off: uint64(pos), n: uint32(min(end-pos, 1<<30))}
		if err := c.do(ctx, x); err != nil {
			return nil, c.failed("extents of", off, n, err)
		}
		limit := pos + int64(x.n)
		for _, r := range x.runs {
			to := min(pos+int64(r.n), limit)
			if r.flags&(stateHole|stateZero) == stateHole|stateZero {
				add(min((pos+bs-1)/bs*bs, to), true)
				add(to/bs*bs, false)
			} else {
				add(min((to+bs-1)/bs*bs, end), true)
			}
			if pos = to; pos == limit {
				break
			}
		}
	}
	add(end, true)
	return out, nil
}

// Close waits for every call in flight, flushes and says goodbye.
func (c *Client) Close() error {
	c.once.Do(func() { close(c.closing) })
	c.life.Lock()
	defer c.life.Unlock()
	if c.closed {
		return fmt.Errorf("close nbd export %q at %s: %w", c.o.Export, c.o.Addr, block.ErrClosed)
	}
	c.closed = true
	c.mu.Lock()
	dirty := c.mu.acked > c.mu.flushed
	c.mu.Unlock()
	err := c.Failed()
	if err == nil && dirty {
		err = c.do(context.Background(), &call{cmd: cmdFlush})
	}
	c.mu.Lock()
	k := c.mu.conn
	c.mu.shut = true
	c.mu.Unlock()
	if k != nil {
		k.write.Lock()
		var h [requestLen]byte
		binary.BigEndian.PutUint32(h[:], magicRequest)
		binary.BigEndian.PutUint16(h[6:], cmdDisc)
		_, _ = k.c.Write(h[:]) // a courtesy: the flush above is what counts
		k.write.Unlock()
		_ = k.c.Close()
	}
	c.wg.Wait()
	return c.failed("close", 0, c.info.Size, err)
}
