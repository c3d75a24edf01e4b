package e2e

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// stamp is what a write says of itself: who wrote it, in which of its lives.
type stamp struct {
	writer, life, seq uint64
}

const stampMagic = 0x424c4f434b535441

func (s stamp) put(b []byte) {
	for i, v := range []uint64{stampMagic, s.writer, s.life, s.seq} {
		binary.BigEndian.PutUint64(b[8*i:], v)
	}
}

func readStamp(b []byte) (s stamp, ok bool) {
	if len(b) < 32 || binary.BigEndian.Uint64(b) != stampMagic {
		return s, false
	}
	return stamp{binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:]), binary.BigEndian.Uint64(b[24:])}, true
}

// medium is the disk of a volume, served to its storage worker over NBD: it sees
// every write at the moment it lands, and can be made to hold writes back.
type medium struct {
	t    *testing.T
	sock string
	wg   sync.WaitGroup

	mu    sync.Mutex
	data  []byte
	hold  chan struct{} // writes wait for it; nil: none does
	held  int
	last  map[[2]uint64]time.Time // by writer and life: when its last write landed
	count map[[2]uint64]int
}

func newMedium(t *testing.T, size int) *medium {
	dir, err := os.MkdirTemp("", "bh-nbd-") // unix socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	m := &medium{t: t, sock: filepath.Join(dir, "s"), data: make([]byte, size), last: map[[2]uint64]time.Time{}, count: map[[2]uint64]int{}}
	l, err := net.Listen("unix", m.sock)
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.Map
	m.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Store(c, true)
			m.wg.Go(func() { defer c.Close(); _ = m.serve(c) })
		}
	})
	t.Cleanup(func() {
		m.release()
		_ = l.Close()
		conns.Range(func(c, _ any) bool { _ = c.(net.Conn).Close(); return true })
		m.wg.Wait()
		_ = os.RemoveAll(dir)
	})
	return m
}

// stall holds writes of stamped blocks back until release.
func (m *medium) stall() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hold, m.held = make(chan struct{}), 0
}

func (m *medium) release() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.hold != nil {
		close(m.hold)
		m.hold = nil
	}
}

// landed is how many writes of a life landed, and when the last did.
func (m *medium) landed(writer, life uint64) (n, held int, last time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.count[[2]uint64{writer, life}], m.held, m.last[[2]uint64{writer, life}]
}

// serve speaks the NBD protocol as far as a store needs it
// (NetworkBlockDevice/nbd doc/proto.md): fixed newstyle, EXPORT_NAME, simple
// replies. Each write has its own goroutine: one that is held holds no other.
func (m *medium) serve(c net.Conn) error {
	be := binary.BigEndian
	hello := be.AppendUint64(be.AppendUint64(nil, 0x4e42444d41474943), 0x49484156454f5054)
	if _, err := c.Write(be.AppendUint16(hello, 3)); err != nil {
		return err
	}
	var b [32]byte
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return err
	}
	for {
		if _, err := io.ReadFull(c, b[:16]); err != nil {
			return err
		}
		opt, n := be.Uint32(b[8:]), be.Uint32(b[12:])
		if _, err := io.CopyN(io.Discard, c, int64(n)); err != nil {
			return err
		}
		if opt == 1 {
			break
		}
		r := be.AppendUint32(be.AppendUint64(nil, 0x3e889045565a9), opt)
		if _, err := c.Write(be.AppendUint32(be.AppendUint32(r, 1<<31|1), 0)); err != nil {
			return err
		}
	}
	// Flags: present, FLUSH, FUA, TRIM, WRITE ZEROES.
	if _, err := c.Write(be.AppendUint16(be.AppendUint64(nil, uint64(len(m.data))), 1|1<<2|1<<3|1<<5|1<<6)); err != nil {
		return err
	}
	var out sync.Mutex
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		var h [28]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return err
		}
		cmd, off, n := be.Uint16(h[6:]), be.Uint64(h[16:]), int(be.Uint32(h[24:]))
		var p []byte
		if cmd == 1 {
			p = make([]byte, n)
			if _, err := io.ReadFull(c, p); err != nil {
				return err
			}
		}
		if cmd == 2 {
			return nil
		}
		wg.Go(func() {
			r := append(be.AppendUint32(be.AppendUint32(nil, 0x67446698), 0), h[8:16]...)
			r = append(r, m.do(cmd, off, n, p)...)
			out.Lock()
			defer out.Unlock()
			if _, err := c.Write(r); err != nil && !errors.Is(err, net.ErrClosed) {
				_ = c.Close()
			}
		})
	}
}

func (m *medium) do(cmd uint16, off uint64, n int, p []byte) []byte {
	s, stamped := readStamp(p)
	m.mu.Lock()
	hold := m.hold
	if cmd == 1 && stamped && hold != nil {
		m.held++
	} else {
		hold = nil
	}
	m.mu.Unlock()
	if hold != nil {
		<-hold
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch cmd {
	case 0:
		return append([]byte(nil), m.data[off:][:n]...)
	case 1:
		copy(m.data[off:], p)
		if stamped {
			k := [2]uint64{s.writer, s.life}
			m.last[k] = time.Now()
			m.count[k]++
		}
	case 4, 6:
		clear(m.data[off:][:n])
	}
	return nil
}
