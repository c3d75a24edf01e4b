package initiator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

const peerIQN = "iqn.2026-01.org.example:peer"

var (
	readCDB  = func() []byte { c := scsi.Read(0, 1); return c.Bytes() }()
	writeCDB = func() []byte { c := scsi.Write(0, 1, false); return c.Bytes() }()
)

func mustLogin(t *testing.T, portal string, cfg Config) *Session {
	t.Helper()
	s, err := Login(t.Context(), portal, peerIQN, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// One misdeed of a target per row: the command in flight, the session and a later
// command all get the reason, and no byte of it is taken for data.
func TestTargetMisdeeds(t *testing.T) {
	t.Parallel()
	crc := iscsi.DefaultWant()
	crc.HeaderDigests, crc.DataDigests = []string{"CRC32C"}, []string{"CRC32C"}
	flip := func(p *peer, at int, q iscsi.PDU, data []byte) {
		a, b := net.Pipe()
		go func() {
			w := iscsi.NewWriter(a, 1<<20)
			w.HeaderDigest, w.DataDigest = true, true
			_ = w.Append(q, data)
			_ = w.Flush()
			_ = a.Close()
		}()
		buf := make([]byte, 4096)
		n := 0
		for {
			k, err := b.Read(buf[n:])
			n += k
			if err != nil {
				break
			}
		}
		buf[at] ^= 0x10
		_, _ = p.conn.Write(buf[:n])
	}
	for _, c := range []struct {
		name  string
		write bool
		want  error
		crc   bool
		do    func(p *peer, c iscsi.ScsiCommand)
	}{
		{"wrong DataSN", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT, DataSN: 1}, make([]byte, 512))
		}},
		{"repeated DataSN", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.DataIn{ITT: c.ITT}, make([]byte, 256))
			p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT, Offset: 256}, make([]byte, 256))
		}},
		{"gap in the data", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT, Offset: 4}, make([]byte, 508))
		}},
		{"more than the buffer", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT}, make([]byte, 513))
		}},
		{"offset of 4 GiB", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.DataIn{Final: true, ITT: c.ITT, Offset: 0xffffff00}, make([]byte, 512))
		}},
		{"GOOD without the data", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) { p.send(&iscsi.ScsiResponse{ITT: c.ITT}) }},
		{"GOOD with half the data", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT}, make([]byte, 256))
		}},
		{"Data-In for a write", true, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT}, make([]byte, 512))
		}},
		{"segment over our MaxRecvDataSegmentLength", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.w.MaxData = 1 << 24
			p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT}, make([]byte, 256<<10+1))
		}},
		{"StatSN gap", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.stat++
			p.good(c)
		}},
		{"R2T for a read", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) { p.send(&iscsi.R2T{ITT: c.ITT, TTT: 1, Length: 512}) }},
		{"R2T beyond the data", true, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.R2T{ITT: c.ITT, TTT: 1, Offset: 256, Length: 512})
		}},
		{"R2T of nothing", true, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) { p.send(&iscsi.R2T{ITT: c.ITT, TTT: 1}) }},
		{"wrong R2TSN", true, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.R2T{ITT: c.ITT, TTT: 1, R2TSN: 3, Length: 512})
		}},
		{"R2T over MaxBurstLength", true, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.R2T{ITT: c.ITT, TTT: 1, Length: 1<<20 + 1})
		}},
		{"more R2Ts than agreed", true, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			var all []byte
			for i := range uint32(1000) { // faster than the writer can serve them
				var b iscsi.BHS
				(&iscsi.R2T{ITT: c.ITT, TTT: 1, R2TSN: i, Length: 1 << 20, StatSN: p.stat, ExpCmdSN: p.exp, MaxCmdSN: p.max}).Encode(&b)
				all = append(all, b[:]...)
			}
			_, _ = p.conn.Write(all)
		}},
		{"residual beyond the data", true, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.ScsiResponse{ITT: c.ITT, Underflow: true, Residual: 513})
		}},
		{"sense length that lies", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) {
			p.send(&iscsi.ScsiResponse{ITT: c.ITT, Status: 2}, []byte{0, 40, 1})
		}},
		{"an initiator's opcode", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) { p.send(&iscsi.NopOut{Immediate: true, ITT: 1}) }},
		{"second login response", false, ErrProtocol, false, func(p *peer, c iscsi.ScsiCommand) { p.send(&iscsi.LoginResponse{}) }},
		{"connection cut", false, ErrDropped, false, func(p *peer, c iscsi.ScsiCommand) { _ = p.conn.Close() }},
		{"connection cut in a header", false, ErrDropped, false, func(p *peer, c iscsi.ScsiCommand) {
			_, _ = p.conn.Write(make([]byte, 20))
			_ = p.conn.Close()
		}},
		{"connection cut in the data", false, ErrDropped, false, func(p *peer, c iscsi.ScsiCommand) {
			var b iscsi.BHS
			(&iscsi.DataIn{ITT: c.ITT}).Encode(&b)
			b.SetDataLen(512)
			_, _ = p.conn.Write(append(b[:], 1, 2, 3))
			_ = p.conn.Close()
		}},
		{"asynchronous drop", false, ErrDropped, false, func(p *peer, c iscsi.ScsiCommand) { p.send(&iscsi.Async{Event: iscsi.AsyncDropConnection}) }},
		{"bad header digest", false, ErrProtocol, true, func(p *peer, c iscsi.ScsiCommand) {
			flip(p, 20, &iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT, StatSN: p.stat}, make([]byte, 512))
		}},
		{"bad data digest", false, ErrProtocol, true, func(p *peer, c iscsi.ScsiCommand) {
			flip(p, 60, &iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT, StatSN: p.stat}, make([]byte, 512))
		}},
		{"Data-Out rejected", true, ErrRejected, false, func(p *peer, c iscsi.ScsiCommand) {
			var b iscsi.BHS
			(&iscsi.DataOut{ITT: c.ITT}).Encode(&b)
			p.send(&iscsi.Reject{Reason: iscsi.RejectProtocolError}, b[:])
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cfg := testConfig()
			o := peerOptions{}
			if c.crc {
				cfg.Want, o.want = &crc, &crc
			}
			portal := servePeer(t, o, func(p *peer) {
				if cmd, ok := p.command(); ok {
					c.do(p, cmd)
					for p.next() { // until the initiator hangs up
					}
				}
			})
			s := mustLogin(t, portal, cfg)
			var err error
			if c.write {
				n := 512
				if strings.Contains(c.name, "Burst") || strings.Contains(c.name, "agreed") {
					n = 2 << 20
				}
				_, err = s.Exec(t.Context(), 0, writeCDB, scsi.DirOut, make([]byte, n), nil)
			} else {
				_, err = s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
			}
			wantErr(t, "command", err, c.want)
			<-s.Done()
			wantErr(t, "session", s.Err(), c.want)
			_, err = s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
			wantErr(t, "later command", err, c.want)
		})
	}
}

// The data phases of a write, for any parameters that login can agree on: the bytes
// arrive once, in order, in PDUs and bursts within the limits (§4.2.4, §11.7, §13).
func TestWritePhases(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		want := iscsi.DefaultWant()
		want.MaxRecv = rapid.IntRange(512, 9000).Draw(rt, "MaxRecv")
		want.MaxBurstLength = rapid.IntRange(512, 20000).Draw(rt, "MaxBurst")
		want.FirstBurstLength = rapid.IntRange(512, want.MaxBurstLength).Draw(rt, "FirstBurst")
		want.InitialR2T = rapid.Bool().Draw(rt, "InitialR2T")
		want.ImmediateData = rapid.Bool().Draw(rt, "ImmediateData")
		want.MaxOutstandingR2T = rapid.IntRange(1, 3).Draw(rt, "R2Ts")
		n := rapid.IntRange(0, 60000).Draw(rt, "length")
		data := randomBytes(uint64(n), n)
		ok := make(chan error, 1)
		portal := servePeer(t, peerOptions{want: &want}, func(p *peer) {
			ok <- receiveWrite(p, data)
			p.rest()
		})
		s, err := Login(t.Context(), portal, peerIQN, testConfig())
		if err != nil {
			rt.Fatal(err)
		}
		r, err := s.Exec(t.Context(), 3, writeCDB, scsi.DirOut, data, nil)
		if err != nil || r.Err() != nil || r.N != n {
			rt.Errorf("%+v, %v", r, err)
		}
		if err := <-ok; err != nil {
			rt.Error(err)
		}
		if err := s.Close(); err != nil {
			rt.Error(err)
		}
	})
}

func receiveWrite(p *peer, want []byte) error {
	c, ok := p.command()
	if !ok {
		return errors.New("no command")
	}
	n := len(want)
	if int(c.EDTL) != n || c.LUN != iscsi.LUNOf(3) || !c.Write || c.Read {
		return fmt.Errorf("command %+v", c)
	}
	got := append([]byte(nil), p.data...)
	wantImm := 0
	if p.p.ImmediateData {
		wantImm = min(n, p.p.FirstBurstLength, p.p.MaxRecv)
	}
	if len(got) != wantImm {
		return fmt.Errorf("%d bytes of immediate data, want %d", len(got), wantImm)
	}
	burst := func(ttt uint32, end int) error {
		for sn := uint32(0); ; sn++ {
			if !p.next() {
				return errors.New("no Data-Out")
			}
			var d iscsi.DataOut
			if err := d.Decode(&p.h); err != nil {
				return err
			}
			got = append(got, p.data...)
			if d.ITT != c.ITT || d.TTT != ttt || d.DataSN != sn || int(d.Offset) != len(got)-len(p.data) || len(p.data) == 0 {
				return fmt.Errorf("%+v with %d bytes after %d", d, len(p.data), len(got)-len(p.data))
			}
			if d.Final != (len(got) == end) || len(got) > end {
				return fmt.Errorf("final %v at %d, burst ends at %d", d.Final, len(got), end)
			}
			if d.Final {
				return nil
			}
		}
	}
	first := len(got)
	if !p.p.InitialR2T {
		first = min(n, p.p.FirstBurstLength)
	}
	if c.Final != (first == len(got)) {
		return fmt.Errorf("command has F=%v with %d of %d unsolicited bytes", c.Final, len(got), first)
	}
	if !c.Final {
		if err := burst(iscsi.ReservedTag, first); err != nil {
			return fmt.Errorf("unsolicited: %w", err)
		}
	}
	// As many R2Ts at once as are agreed on, answered in order.
	sn := uint32(0)
	for at := len(got); at < n; {
		type r2t struct {
			ttt uint32
			end int
		}
		var out []r2t
		for len(out) < p.p.MaxOutstandingR2T && at < n {
			m := min(n-at, p.p.MaxBurstLength)
			p.send(&iscsi.R2T{LUN: c.LUN, ITT: c.ITT, TTT: 100 + sn, R2TSN: sn, Offset: uint32(at), Length: uint32(m)})
			at += m
			out = append(out, r2t{100 + sn, at})
			sn++
		}
		for _, o := range out {
			if err := burst(o.ttt, o.end); err != nil {
				return fmt.Errorf("solicited: %w", err)
			}
		}
	}
	if !bytes.Equal(got, want) {
		return errors.New("other bytes arrived than were sent")
	}
	p.send(&iscsi.ScsiResponse{ITT: c.ITT, ExpDataSN: sn})
	return nil
}

// Commands wait for the window and are sent in order when it opens (§4.2.2.1); those
// whose context ends meanwhile are never sent.
func TestCommandWindow(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	portal := servePeer(t, peerOptions{window: 2}, func(p *peer) {
		var held []iscsi.ScsiCommand
		for range 2 {
			c, ok := p.command()
			if !ok {
				return
			}
			held = append(held, c)
		}
		<-release // the others are queued by now, or never will be
		for _, c := range held {
			p.good(c)
		}
		p.max = p.exp // one more, and so on: next() fails the test on CmdSN > MaxCmdSN
		p.send(&iscsi.NopIn{ITT: iscsi.ReservedTag, TTT: iscsi.ReservedTag})
		for p.next() {
			p.max = p.exp
			p.answer()
		}
	})
	s := mustLogin(t, portal, testConfig())
	var wg sync.WaitGroup
	run := func() {
		buf := make([]byte, 512)
		if _, err := s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, buf); err != nil || buf[511] != 0x5a {
			t.Error(err)
		}
	}
	wg.Go(run)
	wg.Go(run)
	sent := func() int { s.mu.Lock(); defer s.mu.Unlock(); return s.mu.inFlight - s.queuedLocked() }
	for sent() < 2 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(t.Context())
	canceled := make(chan error, 1)
	go func() {
		_, err := s.Exec(ctx, 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
		canceled <- err
	}()
	for {
		s.mu.Lock()
		n := s.queuedLocked()
		s.mu.Unlock()
		if n == 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	err := <-canceled
	wantErr(t, "command in the queue", err, context.Canceled)
	if errors.Is(err, ErrAborted) {
		t.Error("a command that was not sent was aborted at the target")
	}
	for range 6 {
		wg.Go(run)
	}
	close(release)
	wg.Wait()
}

// A context that ends aborts the task at the target and waits for the confirmation;
// Data-In that comes later is not written anywhere (§11.5, §11.6).
func TestAbort(t *testing.T) {
	t.Parallel()
	late := make(chan struct{})
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		c, ok := p.command()
		if !ok || !p.next() {
			return
		}
		var m iscsi.TaskMgmtRequest
		if err := m.Decode(&p.h); err != nil || m.Function != iscsi.FuncAbortTask || m.RefTag != c.ITT || m.RefCmdSN != c.CmdSN || m.LUN != c.LUN || !m.Immediate {
			t.Errorf("abort %+v of %+v: %v", m, c, err)
		}
		p.send(&iscsi.TaskMgmtResponse{ITT: m.ITT})
		<-late
		p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT}, bytes.Repeat([]byte{0xbb}, 512))
		p.rest()
	})
	s := mustLogin(t, portal, testConfig())
	ctx, cancel := context.WithCancel(t.Context())
	buf := make([]byte, 512)
	out := make(chan error, 1)
	go func() {
		_, err := s.Exec(ctx, 5, readCDB, scsi.DirIn, nil, buf)
		out <- err
	}()
	for sent := false; !sent; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		sent = s.mu.inFlight == 1 && s.queuedLocked() == 0
		s.mu.Unlock()
	}
	cancel()
	wantErr(t, "aborted command", <-out, ErrAborted, context.Canceled)
	close(late)
	if _, err := s.Exec(t.Context(), 5, readCDB, scsi.DirIn, nil, make([]byte, 512)); err != nil {
		t.Errorf("the session after an abort: %v", err)
	}
	if !bytes.Equal(buf, make([]byte, 512)) {
		t.Error("late data were written into the buffer of an aborted read")
	}
}

// Task management that is refused or not answered, and abort that is not confirmed.
func TestTaskManagement(t *testing.T) {
	t.Parallel()
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		if _, ok := p.command(); !ok || !p.next() { // LU RESET
			return
		}
		p.send(&iscsi.TaskMgmtResponse{ITT: p.h.ITT()})
		if !p.next() { // CLEAR TASK SET
			return
		}
		p.send(&iscsi.TaskMgmtResponse{ITT: p.h.ITT(), Response: iscsi.TaskFunctionNotSupported})
		_, _ = p.command()
		for p.next() { // ABORT TASK: silence
		}
	})
	cfg := testConfig()
	cfg.AbortTimeout = 200 * time.Millisecond
	s := mustLogin(t, portal, cfg)
	out := make(chan error, 1)
	exec := func(ctx context.Context) {
		_, err := s.Exec(ctx, 1, readCDB, scsi.DirIn, nil, make([]byte, 512))
		out <- err
	}
	inFlight := func() {
		for sent := false; !sent; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			sent = s.mu.inFlight == 1 && s.queuedLocked() == 0
			s.mu.Unlock()
		}
	}
	go exec(t.Context())
	inFlight()
	if err := s.LUReset(t.Context(), 1); err != nil {
		t.Error(err)
	}
	wantErr(t, "command under a reset", <-out, ErrAborted)
	wantErr(t, "refused function", s.TaskManagement(t.Context(), iscsi.FuncClearTaskSet, 1), ErrTaskManagement)
	ctx, cancel := context.WithCancel(t.Context())
	go exec(ctx)
	inFlight()
	cancel()
	wantErr(t, "abort without an answer", <-out, ErrNoAnswer)
	wantErr(t, "session", s.Err(), ErrNoAnswer)
}

// A command that the target rejects ends, the session lives.
func TestReject(t *testing.T) {
	t.Parallel()
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		if _, ok := p.command(); ok {
			p.send(&iscsi.Reject{Reason: iscsi.RejectUnsupported}, p.h[:])
			p.rest()
		}
	})
	s := mustLogin(t, portal, testConfig())
	_, err := s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
	wantErr(t, "command", err, ErrRejected)
	if _, err := s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512)); err != nil {
		t.Error(err)
	}
}

// Pings both ways (§11.18, §11.19), and a target that falls silent.
func TestNop(t *testing.T) {
	t.Parallel()
	var pings atomic.Int32
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		p.send(&iscsi.NopIn{LUN: iscsi.LUNOf(9), ITT: iscsi.ReservedTag, TTT: 0x77})
		answered := false
		for p.next() {
			var no iscsi.NopOut
			if p.h.Opcode() == iscsi.OpNopOut {
				if err := no.Decode(&p.h); err != nil {
					t.Error(err)
				}
				if no.ITT == iscsi.ReservedTag {
					if no.TTT != 0x77 || no.LUN != iscsi.LUNOf(9) || !no.Immediate {
						t.Errorf("answer %+v", no)
					}
					answered = true
					continue
				}
				if pings.Add(1) == 3 { // and then silence
					if !answered {
						t.Error("our NOP-In was not answered")
					}
					for p.next() {
					}
					return
				}
			}
			p.answer()
		}
	})
	cfg := testConfig()
	cfg.NopInterval, cfg.NopTimeout = 60*time.Millisecond, 300*time.Millisecond
	s := mustLogin(t, portal, cfg)
	if err := s.Ping(t.Context(), randomBytes(1, 1001)); err != nil {
		t.Error(err)
	}
	<-s.Done()
	wantErr(t, "session", s.Err(), ErrNoAnswer)
	if pings.Load() < 3 {
		t.Errorf("given up after %d pings", pings.Load())
	}
}

// The target asks for logout (§11.9): what is in flight ends, nothing new begins.
func TestAsyncLogout(t *testing.T) {
	t.Parallel()
	asked := make(chan iscsi.Async, 1)
	goOn := make(chan struct{})
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		c, ok := p.command()
		if !ok {
			return
		}
		p.send(&iscsi.Async{Event: iscsi.AsyncLogoutRequest, Param3: 60})
		<-goOn
		p.good(c)
		if !p.next() || p.h.Opcode() != iscsi.OpLogoutReq {
			t.Errorf("after the last command comes %s, want logout", p.h.Opcode())
		}
		p.answer()
	})
	cfg := testConfig()
	cfg.OnAsync = func(a iscsi.Async, _ []byte) { asked <- a }
	s := mustLogin(t, portal, cfg)
	out := make(chan error, 1)
	go func() {
		_, err := s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
		out <- err
	}()
	if a := <-asked; a.Param3 != 60 {
		t.Errorf("%+v", a)
	}
	for {
		_, err := s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
		if errors.Is(err, ErrClosed) {
			break
		}
		t.Errorf("new command after a logout request: %v", err)
	}
	close(goOn)
	if err := <-out; err != nil {
		t.Errorf("command in flight: %v", err)
	}
	<-s.Done()
	wantErr(t, "session", s.Err(), ErrClosed)
}

// Messages that change something while the session goes on: SendTargets of one's own
// target in parts, a SCSI event, and a request to negotiate (§11.9, §13.3, §13.12).
func TestTextInFullFeaturePhase(t *testing.T) {
	t.Parallel()
	list := "TargetName=" + peerIQN + "\x00TargetAddress=10.0.0.1:3260,1\x00TargetAddress=[fe80::1]:3260,2\x00"
	const smaller = 1024
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		for i := 0; i < len(list); i += 40 {
			if !p.next() {
				return
			}
			if want := map[bool]string{true: "SendTargets=\x00"}[i == 0]; p.h.Opcode() != iscsi.OpTextReq || string(p.data) != want {
				t.Errorf("%s %q", p.h.Opcode(), p.data)
			}
			n := min(len(list), i+40)
			r := &iscsi.TextResponse{ITT: p.h.ITT(), TTT: 7}
			if n == len(list) {
				r.Final, r.TTT = true, iscsi.ReservedTag
			}
			p.send(r, []byte(list[i:n]))
		}
		p.send(&iscsi.Async{Event: iscsi.AsyncSCSI}, iscsi.AppendSense(nil, scsi.Check(scsi.UnitAttention, scsi.ASCReportedLunsChanged).Fixed(), nil))
		p.send(&iscsi.Async{Event: iscsi.AsyncRenegotiate, Param3: 10})
		if !p.next() {
			return
		}
		if got := string(p.data); p.h.Opcode() != iscsi.OpTextReq || got != "MaxRecvDataSegmentLength=262144\x00" {
			t.Errorf("%s %q in answer to a request to negotiate", p.h.Opcode(), got)
		}
		p.send(&iscsi.TextResponse{Final: true, ITT: p.h.ITT(), TTT: iscsi.ReservedTag}, []byte(fmt.Sprintf("MaxRecvDataSegmentLength=%d\x00", smaller)))
		c, ok := p.command()
		if !ok {
			return
		}
		if len(p.data) > smaller {
			t.Errorf("%d bytes of immediate data, we take %d now", len(p.data), smaller)
		}
		got := len(p.data)
		for !c.Final && p.next() {
			if got += len(p.data); len(p.data) > smaller {
				t.Errorf("Data-Out of %d bytes, we take %d now", len(p.data), smaller)
			}
			if p.h.Final() {
				break
			}
		}
		if got != 9000 {
			t.Errorf("%d bytes came", got)
		}
		p.send(&iscsi.ScsiResponse{ITT: c.ITT})
		p.rest()
	})
	events := make(chan iscsi.AsyncEvent, 2)
	cfg := testConfig()
	cfg.OnAsync = func(a iscsi.Async, sense []byte) {
		if x, err := scsi.ParseSense(sense); a.Event == iscsi.AsyncSCSI && (err != nil || x.Code != scsi.ASCReportedLunsChanged) {
			t.Errorf("event with sense %x", sense)
		}
		events <- a.Event
	}
	s := mustLogin(t, portal, cfg)
	ts, err := s.SendTargets(t.Context())
	if err != nil || len(ts) != 1 || fmt.Sprint(ts[0]) != "{"+peerIQN+" [10.0.0.1:3260,1 [fe80::1]:3260,2]}" {
		t.Errorf("%v, %v", ts, err)
	}
	if e := [2]iscsi.AsyncEvent{<-events, <-events}; e != [2]iscsi.AsyncEvent{iscsi.AsyncSCSI, iscsi.AsyncRenegotiate} {
		t.Errorf("events %v", e)
	}
	for s.first().maxSend.Load() != smaller {
		time.Sleep(time.Millisecond)
	}
	if r, err := s.Exec(t.Context(), 0, writeCDB, scsi.DirOut, make([]byte, 9000), nil); err != nil || r.Err() != nil {
		t.Errorf("%+v, %v", r, err)
	}
}

// A changed capacity is seen with the unit attention that tells of it.
func TestCapacityChanged(t *testing.T) {
	t.Parallel()
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		told := false
		for p.next() {
			var c iscsi.ScsiCommand
			if p.h.Opcode() != iscsi.OpScsiCommand || c.Decode(&p.h) != nil {
				p.answer()
				continue
			}
			switch {
			case !told:
				told = true
				p.send(&iscsi.ScsiResponse{ITT: c.ITT, Status: uint8(scsi.StatusCheckCondition), Underflow: true, Residual: c.EDTL},
					iscsi.AppendSense(nil, scsi.Check(scsi.UnitAttention, scsi.ASCCapacityChanged).Fixed(), nil))
			case c.CDB[0] == byte(scsi.OpServiceActionIn16):
				p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT}, (&scsi.Capacity{LastLBA: 8191, BlockSize: 512}).Bytes16())
			default:
				p.good(c)
			}
		}
	})
	d := &Device{s: mustLogin(t, portal, testConfig()), lim: limits{transfer: 8}}
	d.info.Store(&block.Info{Size: 1 << 20, BlockSize: 512, PhysBlock: 512})
	if err := d.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if got := d.Info().Size; got != 4<<20 {
		t.Errorf("size %d after the capacity changed, want %d", got, 4<<20)
	}
	if err := d.ReadAt(t.Context(), make([]byte, 512), 4<<20-512); err != nil {
		t.Errorf("the new end: %v", err)
	}
}

// Whatever bytes a target sends after login: no panic, no hang, and the session ends.
func FuzzSession(f *testing.F) {
	var b iscsi.BHS
	for _, p := range []iscsi.PDU{&iscsi.DataIn{Final: true, HasStatus: true, ITT: 1 << 16, TTT: iscsi.ReservedTag, StatSN: 0xfffffff2}, &iscsi.R2T{ITT: 1 << 16, TTT: 1, Length: 512},
		&iscsi.NopIn{ITT: iscsi.ReservedTag, TTT: 5}, &iscsi.Reject{}, &iscsi.Async{}} {
		p.Encode(&b)
		b.SetDataLen(512)
		f.Add(append(bytes.Clone(b[:]), make([]byte, 512)...))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		portal := servePeer(t, peerOptions{}, func(p *peer) {
			_, _ = p.conn.Write(in)
		})
		cfg := testConfig()
		cfg.LogoutTimeout = time.Second
		dog := time.AfterFunc(8*time.Second, func() {
			debug.SetTraceback("all")
			panic(fmt.Sprintf("hang with %x", in))
		})
		defer dog.Stop()
		s, err := Login(t.Context(), portal, peerIQN, cfg)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
		_, _ = s.Exec(t.Context(), 0, writeCDB, scsi.DirOut, make([]byte, 2048), nil)
		<-s.Done()
	})
}

// Logout waits for what is in flight.
func TestLogoutDrains(t *testing.T) {
	t.Parallel()
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		c, ok := p.command()
		if !ok {
			return
		}
		time.Sleep(30 * time.Millisecond)
		p.good(c)
		p.rest()
	})
	s := mustLogin(t, portal, testConfig())
	out := make(chan error, 1)
	go func() {
		_, err := s.Exec(t.Context(), 0, readCDB, scsi.DirIn, nil, make([]byte, 512))
		out <- err
	}()
	for sent := false; !sent; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		sent = s.mu.inFlight == 1
		s.mu.Unlock()
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-out; err != nil {
		t.Error(err)
	}
}

// Redirection in login, 1/1 and 1/2, also where CHAP is asked for only at the end,
// and a circle of it (§11.13.5).
func TestRedirect(t *testing.T) {
	t.Parallel()
	for _, st := range []iscsi.LoginStatus{iscsi.StatusMovedTemporarily, iscsi.StatusMovedPermanently} {
		last := servePeer(t, peerOptions{admit: func(*iscsi.LoginIdentity) iscsi.Admission {
			return iscsi.Admission{TPGT: 5, Auth: iscsi.LoginAuth{Required: true, Secret: func(string) []byte { return []byte("secret-12byte") }}}
		}}, (*peer).rest)
		first := servePeer(t, peerOptions{admit: func(*iscsi.LoginIdentity) iscsi.Admission {
			return iscsi.Admission{Status: st, Address: last + ",5"}
		}}, (*peer).rest)
		cfg := testConfig()
		cfg.CHAP = &iscsi.CHAPCredentials{User: "joe", Secret: []byte("secret-12byte")}
		s := mustLogin(t, first, cfg)
		if s.Portal().HostPort() != last || s.TPGT() != 5 {
			t.Errorf("at %s, tag %d, want %s", s.Portal(), s.TPGT(), last)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	var self atomic.Pointer[string] // known only when the peer listens
	var hops atomic.Int32
	circle := servePeer(t, peerOptions{admit: func(*iscsi.LoginIdentity) iscsi.Admission {
		hops.Add(1)
		return iscsi.Admission{Status: iscsi.StatusMovedTemporarily, Address: *self.Load()}
	}}, (*peer).rest)
	self.Store(&circle)
	_, err := Login(t.Context(), circle, peerIQN, testConfig())
	var le *iscsi.LoginError
	if !errors.As(err, &le) || le.Status != iscsi.StatusMovedTemporarily || hops.Load() != 5 {
		t.Errorf("circle: %v after %d logins", err, hops.Load())
	}
}

// A portal that accepts and says nothing, and one that is not there.
func TestLoginTimeout(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg := testConfig()
	cfg.LoginTimeout = 50 * time.Millisecond
	_, err = Login(t.Context(), l.Addr().String(), peerIQN, cfg)
	wantErr(t, "silent portal", err, context.DeadlineExceeded)
	_, err = Discover(t.Context(), l.Addr().String(), cfg)
	wantErr(t, "silent portal", err, context.DeadlineExceeded)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	time.AfterFunc(20*time.Millisecond, func() { cancel(why) })
	_, err = Login(ctx, l.Addr().String(), peerIQN, testConfig())
	wantErr(t, "cancelled login", err, why)
	gone := l.Addr().String()
	_ = l.Close()
	if _, err := Login(t.Context(), gone, peerIQN, testConfig()); err == nil {
		t.Error("login where nobody listens")
	}
}

// SendTargets in parts: names and pairs cut anywhere, several text responses.
func TestDiscoverInParts(t *testing.T) {
	t.Parallel()
	var text []byte
	want := []TargetInfo{}
	for i := range 300 {
		name := fmt.Sprintf("iqn.2026-01.org.example:t%d", i)
		text = iscsi.AppendPair(text, iscsi.KeyTargetName, name)
		x := TargetInfo{Name: name}
		for k := range i % 3 {
			a := fmt.Sprintf("[fe80::%d]:3260,%d", k+1, i)
			text = iscsi.AppendPair(text, iscsi.KeyTargetAddress, a)
			p, err := iscsi.ParsePortal(a)
			if err != nil {
				t.Fatal(err)
			}
			x.Portals = append(x.Portals, p)
		}
		want = append(want, x)
	}
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		for ttt := uint32(1); p.next(); ttt++ {
			if p.h.Opcode() != iscsi.OpTextReq {
				p.answer()
				continue
			}
			var q iscsi.TextRequest
			if err := q.Decode(&p.h); err != nil {
				t.Error(err)
			}
			if wantTTT := ttt - 1; ttt == 1 && (q.TTT != iscsi.ReservedTag || string(p.data) != "SendTargets=All\x00") || ttt > 1 && (q.TTT != wantTTT || len(p.data) != 0) {
				t.Errorf("request %+v %q", q, p.data)
			}
			n := min(len(text), 777)
			r := &iscsi.TextResponse{ITT: q.ITT, TTT: ttt, Continue: true}
			if n == len(text) {
				r.TTT, r.Continue, r.Final = iscsi.ReservedTag, false, true
			}
			p.send(&iscsi.NopIn{ITT: iscsi.ReservedTag, TTT: 0x1234}) // in the way
			if !p.next() || p.h.Opcode() != iscsi.OpNopOut {
				t.Error("NOP-In during discovery was not answered")
			}
			p.send(r, text[:n])
			text = text[n:]
		}
	})
	got, err := Discover(t.Context(), portal, testConfig())
	if err != nil {
		t.Fatal(err)
	}
	at, _ := iscsi.ParsePortal(portal)
	for i := range want {
		if want[i].Portals == nil {
			want[i].Portals = []iscsi.Portal{at}
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// What a device does with statuses: some are repeated, some become block's errors.
func TestDeviceStatus(t *testing.T) {
	t.Parallel()
	sense := func(k scsi.Key, a scsi.ASC) []byte { return scsi.Check(k, a).Fixed() }
	for _, c := range []struct {
		name   string
		status scsi.Status
		sense  []byte
		times  int // how often it is answered before GOOD
		tries  int // commands that the target sees
		want   error
	}{
		{"unit attentions", scsi.StatusCheckCondition, sense(scsi.UnitAttention, scsi.ASCPowerOn), 5, 6, nil},
		{"unit attentions without end", scsi.StatusCheckCondition, sense(scsi.UnitAttention, scsi.ASCPowerOn), 99, 17, &StatusError{}},
		{"busy", scsi.StatusBusy, nil, 3, 4, nil},
		{"task set full", scsi.StatusTaskSetFull, nil, 3, 4, nil},
		{"transition", scsi.StatusCheckCondition, sense(scsi.NotReady, scsi.ASCTransition), 3, 4, nil},
		{"standby", scsi.StatusCheckCondition, sense(scsi.NotReady, scsi.ASCStandby), 1, 1, &StatusError{}},
		{"aborted command", scsi.StatusCheckCondition, sense(scsi.AbortedCommand, scsi.ASCNone), 3, 4, nil},
		{"aborted command again and again", scsi.StatusCheckCondition, sense(scsi.AbortedCommand, scsi.ASCNone), 9, 4, &StatusError{}},
		{"task aborted", scsi.StatusTaskAborted, nil, 1, 2, nil},
		{"reservation conflict", scsi.StatusReservationConflict, nil, 9, 1, ErrReservation},
		{"medium error", scsi.StatusCheckCondition, sense(scsi.MediumError, scsi.ASCReadError), 9, 1, block.ErrMedium},
		{"no space", scsi.StatusCheckCondition, sense(scsi.DataProtect, scsi.ASCSpaceAllocationFailed), 9, 1, block.ErrNoSpace},
		{"write protected", scsi.StatusCheckCondition, sense(scsi.DataProtect, scsi.ASCWriteProtected), 9, 1, block.ErrReadOnly},
		{"out of range", scsi.StatusCheckCondition, sense(scsi.IllegalRequest, scsi.ASCLBAOutOfRange), 9, 1, block.ErrOutOfRange},
		{"check condition without sense", scsi.StatusCheckCondition, nil, 9, 1, &StatusError{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var tries atomic.Int32
			portal := servePeer(t, peerOptions{}, func(p *peer) {
				for p.next() {
					if p.h.Opcode() != iscsi.OpScsiCommand || int(tries.Add(1)) > c.times {
						p.answer()
						continue
					}
					p.send(&iscsi.ScsiResponse{ITT: p.h.ITT(), Status: uint8(c.status)}, iscsi.AppendSense(nil, c.sense, nil))
				}
			})
			d := &Device{s: mustLogin(t, portal, testConfig()), lim: limits{transfer: 8}}
			d.info.Store(&block.Info{Size: 1 << 20, BlockSize: 512, PhysBlock: 512})
			err := d.WriteAt(t.Context(), make([]byte, 512), 0, 0)
			var se *StatusError
			switch {
			case c.want == nil:
				if err != nil {
					t.Error(err)
				}
			case errors.As(c.want, &se):
				if !errors.As(err, &se) || se.Status != c.status {
					t.Errorf("%v", err)
				}
			default:
				wantErr(t, "write", err, c.want)
			}
			if int(tries.Load()) != c.tries {
				t.Errorf("%d commands, want %d", tries.Load(), c.tries)
			}
		})
	}
}

// A flush that failed fails for ever, though the target's second answer is GOOD.
func TestStickyFlush(t *testing.T) {
	t.Parallel()
	portal := servePeer(t, peerOptions{}, func(p *peer) {
		if c, ok := p.command(); ok {
			p.send(&iscsi.ScsiResponse{ITT: c.ITT, Status: uint8(scsi.StatusCheckCondition)},
				iscsi.AppendSense(nil, scsi.Check(scsi.MediumError, scsi.ASCWriteError).Fixed(), nil))
			p.rest()
		}
	})
	d := &Device{s: mustLogin(t, portal, testConfig()), lim: limits{transfer: 8}}
	d.info.Store(&block.Info{Size: 1 << 20, BlockSize: 512, PhysBlock: 512, Caps: block.Caps{WriteCache: true}})
	for range 2 {
		wantErr(t, "flush", d.Flush(t.Context()), block.ErrFlushFailed)
	}
	wantErr(t, "forced unit access by flush", d.WriteAt(t.Context(), make([]byte, 512), 0, block.FUA), block.ErrFlushFailed)
}

func TestURL(t *testing.T) {
	t.Parallel()
	u, err := ParseURL("iscsi://joe%p@ss@[::1]:3261/iqn.2026-01.org.example:t/12?target_user=tgt&target_password=out&header_digest=crc32c-none")
	if err != nil {
		t.Fatal(err)
	}
	want := &URL{Portal: iscsi.Portal{Host: "::1", Port: 3261}, Target: "iqn.2026-01.org.example:t", LUN: 12,
		CHAP:          &iscsi.CHAPCredentials{User: "joe", Secret: []byte("p@ss"), PeerUser: "tgt", PeerSecret: []byte("out")},
		HeaderDigests: []string{"CRC32C", "None"}}
	if d := cmp.Diff(want, u); d != "" {
		t.Error(d)
	}
	if u, err = ParseURL("iscsi://san/iqn.2026-01.org.example:t/0"); err != nil || u.Portal.HostPort() != "san:3260" || u.CHAP != nil {
		t.Errorf("%+v, %v", u, err)
	}
	for _, s := range []string{"", "iscsi:/x", "iscsi://h", "iscsi://h/iqn.2026-01.org.example:t", "iscsi://h/iqn.2026-01.org.example:t/x", "iscsi://h/foo/1",
		"iscsi://h/iqn.2026-01.org.example:t/16384", "iscsi://joe@h/iqn.2026-01.org.example:t/1", "iscsi://%hunter2@h/iqn.2026-01.org.example:t/1",
		"iscsi:///iqn.2026-01.org.example:t/1", "iscsi://h/iqn.2026-01.org.example:t/1?foo=1", "iscsi://h/iqn.2026-01.org.example:t/1?header_digest=md5",
		"iscsi://joe%hunter2@h:0/iqn.2026-01.org.example:t/1", "iscsi://h/iqn.2026-01.org.example:t/1?target_password=hunter2"} {
		if u, err := ParseURL(s); err == nil {
			t.Errorf("ParseURL(%q) = %+v", s, u)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("password in the error: %v", err)
		}
	}
}

func TestISID(t *testing.T) {
	t.Parallel()
	a := FixedISID("host", "iqn.2026-01.org.example:t", 0)
	if a != FixedISID("host", "IQN.2026-01.org.example:T", 0) || a[0] != 0x80 {
		t.Errorf("%s is not fixed, or not of the random format", a)
	}
	for _, b := range []iscsi.ISID{FixedISID("host2", "iqn.2026-01.org.example:t", 0), FixedISID("host", "iqn.2026-01.org.example:u", 0), FixedISID("host", "iqn.2026-01.org.example:t", 1)} {
		if a == b {
			t.Error("same ISID for another host, target or path")
		}
	}
	for _, c := range []Config{{}, {InitiatorName: "foo"}, {InitiatorName: testIQN, QueueDepth: 5000}, {InitiatorName: testIQN, CHAP: &iscsi.CHAPCredentials{User: "x"}},
		{InitiatorName: testIQN, Want: &iscsi.Want{}}} {
		if _, err := c.withDefaults(); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}

// In steady state a command costs no allocation: the task, its tags, the queues and
// the codec's memory are used again.
func TestExecAllocs(t *testing.T) {
	portal := servePeer(t, peerOptions{}, (*peer).rest)
	s := mustLogin(t, portal, testConfig())
	buf := make([]byte, 512)
	ctx := context.Background()
	n := testing.AllocsPerRun(200, func() {
		if _, err := s.Exec(ctx, 0, readCDB, scsi.DirIn, nil, buf); err != nil {
			t.Fatal(err)
		}
	})
	// The scripted peer runs in this process and makes a data slice and a PDU for each
	// command; the initiator makes nothing.
	if n > 2 {
		t.Errorf("%v allocations a command, 2 of them the peer's", n)
	}
}

// queuedLocked is the number of commands that wait for the window.
func (s *Session) queuedLocked() (n int) {
	for _, l := range s.mu.links {
		n += l.mu.cmds.len()
	}
	return n
}

func (s *Session) first() *link {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.links[0]
}
