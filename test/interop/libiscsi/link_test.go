package libiscsi

import (
	"encoding/binary"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// link carries iSCSI between the program and a target and knows how often, since
// the last reset of the target, TEST UNIT READY was answered "sanitize in
// progress". After the test has seen that twice (its library asks once while it
// connects) the store is let go, and the link holds further questions until the
// SANITIZE has ended.
type link struct {
	url     string
	to      string
	hold    chan struct{}
	flushed chan struct{}

	wg    sync.WaitGroup
	mu    sync.Mutex
	conns []net.Conn
	reset bool            // a cold reset was seen
	turs  map[uint32]bool // tags of TEST UNIT READY in progress
	seen  int
	freed bool
}

// seenByTest is how often "in progress" is told before the last question.
const seenByTest = 2

func newLink(t *testing.T, r *Runner, hold, flushed chan struct{}) *link {
	t.Helper()
	rest := strings.TrimPrefix(r.URL, "iscsi://")
	addr, path, _ := strings.Cut(rest, "/")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link{url: "iscsi://" + ln.Addr().String() + "/" + path, to: addr, hold: hold, flushed: flushed, turs: map[uint32]bool{}}
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", l.to)
			if err != nil {
				_ = c.Close()
				continue
			}
			l.mu.Lock()
			l.conns = append(l.conns, c, s)
			l.mu.Unlock()
			l.wg.Add(2)
			go l.carry(s, c, l.request)
			go l.carry(c, s, l.response)
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		l.release()
		l.mu.Lock()
		for _, c := range l.conns {
			_ = c.Close()
		}
		l.mu.Unlock()
		l.wg.Wait()
	})
	return l
}

// carry copies PDUs, each shown to see before it goes on.
func (l *link) carry(dst, src net.Conn, see func(b *iscsi.BHS, data []byte)) {
	defer l.wg.Done()
	defer dst.Close()
	defer src.Close()
	for {
		var b iscsi.BHS
		if _, err := io.ReadFull(src, b[:]); err != nil {
			return
		}
		n := int(b[4])*4 + int(b[5])<<16 + int(binary.BigEndian.Uint16(b[6:]))
		rest := make([]byte, (n+3)&^3)
		if _, err := io.ReadFull(src, rest); err != nil {
			return
		}
		see(&b, rest)
		if _, err := dst.Write(append(b[:], rest...)); err != nil {
			return
		}
	}
}

func (l *link) request(b *iscsi.BHS, _ []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch b.Opcode() {
	case iscsi.OpTaskMgmtReq:
		var p iscsi.TaskMgmtRequest
		l.reset = l.reset || p.Decode(b) == nil && p.Function == iscsi.FuncTargetColdReset
	case iscsi.OpScsiCommand:
		var p iscsi.ScsiCommand
		if p.Decode(b) == nil && scsi.Opcode(p.CDB[0]) == scsi.OpTestUnitReady {
			l.turs[p.ITT] = true
		}
	}
}

func (l *link) response(b *iscsi.BHS, data []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var p iscsi.ScsiResponse
	if b.Opcode() != iscsi.OpScsiResponse || p.Decode(b) != nil || !l.turs[p.ITT] {
		return
	}
	delete(l.turs, p.ITT)
	raw, _, err := iscsi.ParseSense(data)
	if err != nil || !l.reset {
		return
	}
	if s, err := scsi.ParseSense(raw); err != nil || s.Code != scsi.ASCSanitizeInProgress {
		return
	}
	if l.seen++; l.seen == seenByTest {
		l.free()
		<-l.flushed
		time.Sleep(time.Second) // from the last flush to the end, on a busy machine too
	}
}

// free lets the store go; mu is held.
func (l *link) free() {
	if !l.freed {
		l.freed = true
		close(l.hold)
	}
}

func (l *link) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.free()
}
