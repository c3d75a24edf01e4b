package initiator

import (
	"bufio"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/iscsi"
)

// peer is the target's end of one connection, played by a script.
type peer struct {
	t    *testing.T
	conn net.Conn
	r    *iscsi.Reader
	w    *iscsi.Writer
	p    iscsi.Params

	stat iscsi.Serial // next StatSN
	exp  iscsi.Serial // ExpCmdSN
	max  iscsi.Serial // MaxCmdSN that is announced
	open uint32       // max moves with exp, this far ahead; 0: the script moves it
	h    iscsi.BHS
	data []byte
}

type peerOptions struct {
	want   *iscsi.Want
	admit  func(*iscsi.LoginIdentity) iscsi.Admission
	window uint32
}

// servePeer listens on 127.0.0.1 and plays script on each connection that logs in. It
// returns the portal; the test waits for all scripts.
func servePeer(t *testing.T, o peerOptions, script func(*peer)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p := &peer{t: t, conn: c, r: iscsi.NewReader(bufio.NewReader(c), iscsi.DefaultMaxRecv), w: iscsi.NewWriter(c, iscsi.DefaultMaxRecv)}
			// A script that waits for what never comes fails instead of hanging.
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			if p.login(o) {
				script(p)
			}
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

func (p *peer) login(o peerOptions) bool {
	want := iscsi.DefaultWant()
	if o.want != nil {
		want = *o.want
	}
	if o.admit == nil {
		o.admit = func(*iscsi.LoginIdentity) iscsi.Admission { return iscsi.Admission{TPGT: 1} }
	}
	if o.window == 0 {
		o.window, p.open = 64, 64
	}
	l := iscsi.NewTargetLogin(iscsi.TargetLoginConfig{Want: want, Rand: rand.Reader, StatSN: 0xfffffff0, Window: o.window, Admit: o.admit,
		Start: func(*iscsi.LoginIdentity, iscsi.Params) (uint16, iscsi.LoginStatus) { return 1, iscsi.StatusSuccess }})
	for {
		h, err := p.r.Next()
		if err != nil {
			return false
		}
		var req iscsi.LoginRequest
		if err := req.Decode(h); err != nil {
			p.t.Errorf("peer: login: %v", err)
			return false
		}
		data, err := p.r.AppendData(nil)
		if err != nil {
			return false
		}
		st := l.Step(&req, data)
		if p.w.Append(&st.Resp, st.Data) != nil || p.w.Flush() != nil || st.Err != nil {
			return false
		}
		if st.Done {
			p.p = l.Params()
			p.r.MaxData, p.w.MaxData = p.p.MaxRecv, p.p.MaxSend
			p.r.HeaderDigest, p.w.HeaderDigest = p.p.HeaderDigest, p.p.HeaderDigest
			p.r.DataDigest, p.w.DataDigest = p.p.DataDigest, p.p.DataDigest
			p.stat, p.exp, p.max = l.StatSN(), st.Resp.ExpCmdSN, st.Resp.MaxCmdSN
			return true
		}
	}
}

// next reads a PDU with its data; false when the connection is gone. Numbers of
// commands are checked: no gap, none beyond the window.
func (p *peer) next() bool {
	h, err := p.r.Next()
	if err != nil {
		if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				p.t.Error("peer: nothing comes")
			}
		}
		return false
	}
	p.h = *h
	if p.data, err = p.r.AppendData(p.data[:0]); err != nil {
		p.t.Errorf("peer: %v", err)
		return false
	}
	if op := p.h.Opcode(); !p.h.Immediate() && op != iscsi.OpDataOut {
		if sn := p.h.CmdSN(); sn != p.exp || !sn.LessEq(p.max) {
			p.t.Errorf("peer: %s has CmdSN %d, window %d-%d", op, sn, p.exp, p.max)
		}
		p.exp++
		if p.open > 0 {
			p.max = p.exp.Add(p.open - 1)
		}
	} else if op != iscsi.OpDataOut && p.h.CmdSN() != p.exp {
		p.t.Errorf("peer: immediate %s has CmdSN %d, want %d", op, p.h.CmdSN(), p.exp)
	}
	return true
}

// command waits for a SCSI command.
func (p *peer) command() (iscsi.ScsiCommand, bool) {
	var c iscsi.ScsiCommand
	if !p.next() {
		return c, false
	}
	if err := c.Decode(&p.h); err != nil {
		p.t.Errorf("peer: want a command: %v", err)
		return c, false
	}
	return c, true
}

// send sends a PDU with the numbers filled in; StatSN moves for those that use one.
func (p *peer) send(q iscsi.PDU, data ...[]byte) {
	switch q := q.(type) {
	case *iscsi.ScsiResponse:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
		p.stat++
	case *iscsi.DataIn:
		q.ExpCmdSN, q.MaxCmdSN = p.exp, p.max
		if q.TTT == 0 {
			q.TTT = iscsi.ReservedTag
		}
		if q.HasStatus {
			q.StatSN = p.stat
			p.stat++
		}
	case *iscsi.R2T:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
	case *iscsi.NopIn:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
		if q.ITT != iscsi.ReservedTag {
			p.stat++
		}
	case *iscsi.TaskMgmtResponse:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
		p.stat++
	case *iscsi.LogoutResponse:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
		p.stat++
	case *iscsi.TextResponse:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
		p.stat++
	case *iscsi.Async:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
		p.stat++
	case *iscsi.Reject:
		q.StatSN, q.ExpCmdSN, q.MaxCmdSN = p.stat, p.exp, p.max
		p.stat++
	}
	p.raw(q, data...)
}

// raw sends a PDU as it is.
func (p *peer) raw(q iscsi.PDU, data ...[]byte) {
	err := p.w.Append(q, data...)
	if err == nil {
		err = p.w.Flush()
	}
	if err != nil && !p.t.Failed() {
		p.t.Logf("peer: send %s: %v", q.Opcode(), err)
	}
}

// rest plays on until the connection is gone: commands end with GOOD, pings,
// aborts and logouts are answered.
func (p *peer) rest() {
	for p.next() {
		p.answer()
	}
}

// answer plays the obvious answer to the PDU that was read.
func (p *peer) answer() {
	switch p.h.Opcode() {
	case iscsi.OpScsiCommand:
		var c iscsi.ScsiCommand
		if c.Decode(&p.h) == nil {
			p.good(c)
		}
	case iscsi.OpNopOut:
		if p.h.ITT() != iscsi.ReservedTag {
			p.send(&iscsi.NopIn{ITT: p.h.ITT(), TTT: iscsi.ReservedTag}, p.data)
		}
	case iscsi.OpTaskMgmtReq:
		p.send(&iscsi.TaskMgmtResponse{ITT: p.h.ITT()})
	case iscsi.OpLogoutReq:
		p.send(&iscsi.LogoutResponse{ITT: p.h.ITT()})
		_ = p.conn.Close()
	}
}

// good ends c with GOOD: a read with bytes 5Ah, a write that was sent whole.
func (p *peer) good(c iscsi.ScsiCommand) {
	if c.Read {
		d := make([]byte, c.EDTL)
		for i := range d {
			d[i] = 0x5a
		}
		p.send(&iscsi.DataIn{Final: true, HasStatus: true, ITT: c.ITT}, d)
		return
	}
	p.send(&iscsi.ScsiResponse{ITT: c.ITT})
}
