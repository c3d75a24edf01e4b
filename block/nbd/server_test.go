package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// server is an NBD server that does what a test wants: it hangs up, fails and
// forgets on command. nbdkit and qemu-nbd are the peers that judge the protocol.
type server struct {
	t    *testing.T
	sock string
	wg   sync.WaitGroup

	mu    sync.Mutex
	l     net.Listener // nil: down
	conns map[net.Conn]bool
	data  []byte
	flags uint16
	noGo  bool
	// on is asked before a command is done: an errno, or hang up instead of
	// answering (the command is then not done), or hang up after it was done.
	on func(cmd uint16, off uint64) (errno uint32, hangUp bool)
	n  map[uint16]int // commands seen
}

func newServer(t *testing.T, size int) *server {
	s := &server{t: t, sock: filepath.Join(t.TempDir(), "s"), data: make([]byte, size), conns: map[net.Conn]bool{}, n: map[uint16]int{},
		flags: xHasFlags | xFlush | xFUA | xTrim | xWriteZeroes}
	s.up()
	t.Cleanup(func() { s.down(); s.wg.Wait() })
	return s
}

func (s *server) up() {
	l, err := net.Listen("unix", s.sock)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	s.l = l
	s.mu.Unlock()
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			if s.l != l {
				_ = c.Close()
			}
			s.conns[c] = true
			s.mu.Unlock()
			s.wg.Go(func() {
				_ = s.serve(c)
				_ = c.Close()
				s.mu.Lock()
				delete(s.conns, c)
				s.mu.Unlock()
			})
		}
	})
}

// down stops listening and hangs up.
func (s *server) down() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.l != nil {
		_ = s.l.Close()
		s.l = nil
	}
	for c := range s.conns {
		_ = c.Close()
	}
}

func (s *server) count(cmd uint16) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n[cmd]
}

func (s *server) set(on func(cmd uint16, off uint64) (uint32, bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on = on
}

var be = binary.BigEndian

func (s *server) serve(c net.Conn) error {
	hello := be.AppendUint64(be.AppendUint64(nil, magicServer), magicOption)
	if _, err := c.Write(be.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)); err != nil {
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
		s.mu.Lock()
		size, flags, noGo := uint64(len(s.data)), s.flags, s.noGo
		s.mu.Unlock()
		reply := func(typ uint32, p []byte) error {
			r := be.AppendUint32(be.AppendUint64(nil, magicOptReply), opt)
			r = be.AppendUint32(be.AppendUint32(r, typ), uint32(len(p)))
			_, err := c.Write(append(r, p...))
			return err
		}
		switch {
		case opt == optExportName:
			if _, err := c.Write(be.AppendUint16(be.AppendUint64(nil, size), flags)); err != nil {
				return err
			}
			return s.transmission(c)
		case opt == optGo && !noGo:
			info := be.AppendUint16(be.AppendUint64(be.AppendUint16(nil, infoExport), size), flags)
			if err := errors.Join(reply(repInfo, info), reply(repAck, nil)); err != nil {
				return err
			}
			return s.transmission(c)
		}
		if err := reply(repErrUnsup, nil); err != nil {
			return err
		}
	}
}

func (s *server) transmission(c net.Conn) error {
	var b [requestLen]byte
	for {
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return err
		}
		cmd, off, n := be.Uint16(b[6:]), be.Uint64(b[16:]), be.Uint32(b[24:])
		var p []byte
		if cmd == cmdWrite {
			p = make([]byte, n)
			if _, err := io.ReadFull(c, p); err != nil {
				return err
			}
		}
		s.mu.Lock()
		s.n[cmd]++
		on := s.on
		s.mu.Unlock()
		var errno uint32
		if on != nil {
			var hangUp bool
			if errno, hangUp = on(cmd, off); hangUp {
				return nil
			}
		}
		r := be.AppendUint32(be.AppendUint32(nil, magicSimple), errno)
		r = append(r, b[8:16]...)
		if errno == 0 {
			s.mu.Lock()
			switch cmd {
			case cmdRead:
				r = append(r, s.data[off:][:n]...)
			case cmdWrite:
				copy(s.data[off:], p)
			case cmdWriteZeroes:
				copy(s.data[off:], bytes.Repeat([]byte{0}, int(n)))
			}
			s.mu.Unlock()
		}
		if cmd == cmdDisc {
			return nil
		}
		if _, err := c.Write(r); err != nil {
			return err
		}
	}
}
