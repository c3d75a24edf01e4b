package initiator

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/blockhouse-san/blockhouse/iscsi"
)

// proxy stands between initiator and target, follows their PDUs and hurts them. Both
// digests have to be negotiated.
type proxy struct {
	t      testing.TB
	l      net.Listener
	target string
	// hurt says what becomes of a PDU of full feature phase, on its way to the target
	// or from it.
	hurt func(conn int, toTarget bool, h *iscsi.BHS) harm
	// tap sees every byte, nil = nobody.
	tap func(conn int, toTarget bool, b []byte)

	wg sync.WaitGroup
	mu struct {
		sync.Mutex
		conns []net.Conn
		n     int
	}
}

type harm int

const (
	pass    harm = iota
	badData      // a byte of the data segment is another; without one nothing happens
	badHead      // a byte of the header
	cutOff       // the connection ends in the middle of the PDU
)

func newProxy(t testing.TB, target string, hurt func(int, bool, *iscsi.BHS) harm, tap ...func(int, bool, []byte)) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, l: l, target: target, hurt: hurt}
	if len(tap) > 0 {
		p.tap = tap[0]
	}
	p.wg.Go(p.accept)
	return p
}

func (p *proxy) addr() string { return p.l.Addr().String() }

func (p *proxy) close() {
	_ = p.l.Close()
	p.mu.Lock()
	for _, c := range p.mu.conns {
		_ = c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *proxy) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		o, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = c.Close()
			continue
		}
		p.mu.Lock()
		p.mu.conns = append(p.mu.conns, c, o)
		n := p.mu.n
		p.mu.n++
		p.mu.Unlock()
		end := func() { _ = c.Close(); _ = o.Close() }
		p.wg.Go(func() { defer end(); p.pump(n, true, o, c) })
		p.wg.Go(func() { defer end(); p.pump(n, false, c, o) })
	}
}

// pump carries PDUs one way.
func (p *proxy) pump(n int, toTarget bool, dst io.Writer, src io.Reader) {
	r := bufio.NewReaderSize(src, 64<<10)
	digests := false
	for {
		b := make([]byte, iscsi.BHSLen)
		if _, err := io.ReadFull(r, b); err != nil {
			return
		}
		h := (*iscsi.BHS)(b)
		hdr := *h
		if toTarget && !digests {
			digests = hdr.Opcode() != iscsi.OpLoginReq
		}
		more := hdr.AHSLen()
		if digests {
			more += iscsi.DigestLen
		}
		size := hdr.DataLen()
		if size > 0 {
			more += size + -size&3
			if digests {
				more += iscsi.DigestLen
			}
		}
		b = append(b, make([]byte, more)...)
		if _, err := io.ReadFull(r, b[iscsi.BHSLen:]); err != nil {
			return
		}
		what := pass
		if digests {
			what = p.hurt(n, toTarget, &hdr)
		}
		at := iscsi.BHSLen + hdr.AHSLen() + iscsi.DigestLen
		switch what {
		case badData:
			if size > 0 {
				b[at+size/2] ^= 0x10
			}
		case badHead:
			b[21] ^= 0x10
		case cutOff:
			b = b[:len(b)/2]
		}
		if p.tap != nil {
			p.tap(n, toTarget, b)
		}
		if _, err := dst.Write(b); err != nil || what == cutOff {
			return
		}
		if !toTarget && !digests && hdr.Opcode() == iscsi.OpLoginResp && b[1]&0x83 == 0x83 && binary.BigEndian.Uint16(b[36:]) == 0 {
			digests = true
		}
	}
}
