package target

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	osexec "os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// attack is one connection that misbehaves.
type attack struct {
	name  string
	login []iscsi.Pair
	full  bool // it logs in first
	send  func(*client)
	want  func(*client)
}

// attacks are those of facts/iscsi.md §5, with what RFC 7143 has as the answer.
func attacks() []attack {
	// What a case may expect.
	closed := func(c *client) { c.t.Helper(); c.gone() }
	status := func(want iscsi.LoginStatus) func(*client) {
		return func(c *client) {
			c.t.Helper()
			var r iscsi.LoginResponse
			c.must(&r)
			if r.Status != want {
				c.t.Errorf("%s, want %s", r.Status, want)
			}
			c.gone()
		}
	}
	rejected := func(want iscsi.RejectReason) func(*client) {
		return func(c *client) {
			c.t.Helper()
			var r iscsi.Reject
			d := c.must(&r)
			if r.Reason != want || len(d) < iscsi.BHSLen {
				c.t.Errorf("%s with %d bytes, want %s", r.Reason, len(d), want)
			}
			c.do(0, scsi.TestUnitReady(), nil, 0).want(c.t, "afterwards", scsi.StatusGood, 0, 0)
		}
	}
	check := func(key scsi.Key, code scsi.ASC) func(*client) {
		return func(c *client) {
			c.t.Helper()
			r, err := c.finish(&iscsi.ScsiCommand{ITT: c.itt}, nil)
			if err != nil {
				c.t.Error(err)
				return
			}
			r.want(c.t, "answer", scsi.StatusCheckCondition, key, code)
			if len(r.data) > 0 {
				c.t.Errorf("%d bytes came with it", len(r.data))
			}
		}
	}
	// refusedKey: the login fails, or goes on with the key answered by Reject.
	refusedKey := func(key string) func(*client) {
		return func(c *client) {
			c.t.Helper()
			var r iscsi.LoginResponse
			d := c.must(&r)
			if r.Status != iscsi.StatusInitiatorError && !bytes.Contains(d, []byte(key+"=Reject\x00")) {
				c.t.Errorf("%s, %q", r.Status, d)
			}
		}
	}
	raw := func(c *client, h iscsi.BHS, data []byte) {
		p := append([]byte(nil), h[:]...)
		p = append(p, data...)
		for len(p)%4 != 0 {
			p = append(p, 0)
		}
		_, _ = c.nc.Write(p)
	}
	hdr := func(p iscsi.PDU, dataLen int) (h iscsi.BHS) {
		p.Encode(&h)
		h.SetDataLen(dataLen)
		return h
	}
	login := func(f func(*iscsi.LoginRequest), text string) func(*client) {
		return func(c *client) {
			p := &iscsi.LoginRequest{Transit: true, CSG: iscsi.StageOperational, NSG: iscsi.StageFull, ITT: 1}
			if f != nil {
				f(p)
			}
			_ = c.trySend(p, []byte(text))
		}
	}
	const me = "InitiatorName=iqn.2026-01.net.host:x\x00"
	const who = me + "TargetName=" + testIQN + "\x00"
	write := func(c *client, blocks int, edtl uint32, final bool) *iscsi.ScsiCommand {
		p := c.command(0, scsi.Write(0, uint32(blocks), false), nil, 0)
		p.Write, p.EDTL, p.Final = true, edtl, final
		return p
	}
	evil := bytes.Repeat([]byte{0xEE}, 64<<10)
	solicited := kv("InitialR2T=Yes", "ImmediateData=No")
	// ask sends a write and returns the R2T.
	ask := func(c *client, blocks int) (p *iscsi.ScsiCommand, r iscsi.R2T) {
		p = write(c, blocks, uint32(blocks*512), true)
		c.send(p)
		c.must(&r)
		return p, r
	}

	return []attack{
		{name: "garbage first", send: func(c *client) { _, _ = c.nc.Write(bytes.Repeat([]byte{0x5A, 0xC3, 0x11}, 1400)) }, want: closed},
		{name: "command before login", send: func(c *client) { _ = c.trySend(c.command(0, scsi.TestUnitReady(), nil, 0)) }, want: closed},
		{name: "login of 16 MB", send: func(c *client) { raw(c, hdr(&iscsi.LoginRequest{ITT: 1, CSG: 1}, 1<<24-1), evil) }, want: closed},
		{name: "half header, then close", send: func(c *client) { _, _ = c.nc.Write(make([]byte, 20)); _ = c.nc.(*net.TCPConn).CloseWrite() }, want: closed},
		{name: "one byte, then silence", send: func(c *client) { _, _ = c.nc.Write([]byte{0x43}) }, want: closed},
		{name: "text without NUL", send: login(nil, strings.TrimSuffix(who, "\x00")), want: status(iscsi.StatusInitiatorError)},
		{name: "text without =", send: login(nil, who+"Nonsense\x00"), want: status(iscsi.StatusInitiatorError)},
		{name: "key of 7000 bytes", send: login(nil, who+strings.Repeat("K", 7000)+"=1\x00"), want: status(iscsi.StatusInitiatorError)},
		{name: "800 unknown keys", send: login(nil, who+strings.Repeat("X-q=1\x00", 800)), want: status(iscsi.StatusInitiatorError)},
		{name: "C bit for ever", send: func(c *client) {
			for i := range 300 {
				p := &iscsi.LoginRequest{Continue: true, CSG: iscsi.StageOperational, ITT: 1}
				if c.trySend(p, []byte("a")) != nil {
					return
				}
				if b, _, err := c.recv(); err != nil || b[36] != 0 {
					if err != nil {
						c.t.Errorf("request %d: %v", i, err)
					}
					return
				}
			}
			c.t.Error("300 requests were taken")
		}, want: closed},
		{name: "name twice", send: login(nil, who+me), want: status(iscsi.StatusInitiatorError)},
		{name: "no InitiatorName", send: login(nil, "TargetName="+testIQN+"\x00"), want: status(iscsi.StatusMissingParameter)},
		{name: "no TargetName", send: login(nil, me), want: status(iscsi.StatusMissingParameter)},
		{name: "version 5", send: login(func(p *iscsi.LoginRequest) { p.VersionMin, p.VersionMax = 5, 5 }, who), want: status(iscsi.StatusUnsupportedVersion)},
		{name: "CSG 3", send: login(func(p *iscsi.LoginRequest) { p.CSG = 3 }, who), want: status(iscsi.StatusInitiatorError)},
		{name: "NSG < CSG", send: login(func(p *iscsi.LoginRequest) { p.NSG = 0 }, who), want: status(iscsi.StatusInitiatorError)},
		{name: "T and C", send: login(func(p *iscsi.LoginRequest) { p.Continue = true }, who), want: status(iscsi.StatusInitiatorError)},
		{name: "TSIH 7777h", send: login(func(p *iscsi.LoginRequest) { p.TSIH = 0x7777 }, who), want: status(iscsi.StatusNoSession)},

		{name: "unknown opcode", full: true, send: func(c *client) {
			var h iscsi.BHS
			h[0], h[1] = 0x1E|0x40, 0x80
			raw(c, h, nil)
		}, want: rejected(iscsi.RejectUnsupported)},
		{name: "a target's opcode", full: true, send: func(c *client) { raw(c, hdr(&iscsi.DataIn{ITT: 5}, 0), nil) }, want: rejected(iscsi.RejectProtocolError)},
		{name: "unknown AHS of 1020 bytes", full: true, send: func(c *client) {
			p := c.command(0, scsi.TestUnitReady(), nil, 0)
			h := hdr(p, 0)
			h.SetAHSLen(1020)
			a := make([]byte, 1020)
			binary.BigEndian.PutUint16(a, 1017)
			a[2] = 0x3F
			raw(c, h, a)
		}, want: func(c *client) {
			r, err := c.finish(&iscsi.ScsiCommand{ITT: c.itt}, nil)
			if err != nil || r.status != scsi.StatusGood {
				c.t.Error(r, err)
			}
		}},
		{name: "AHS that lies", full: true, send: func(c *client) {
			p := c.command(0, scsi.TestUnitReady(), nil, 0)
			h := hdr(p, 0) // may not be sent again, so its CmdSN is taken
			h.SetAHSLen(8)
			raw(c, h, []byte{0xFF, 0xFF, 1, 0, 0, 0, 0, 0})
		}, want: rejected(iscsi.RejectInvalidField)},
		{name: "16 MB announced", full: true, send: func(c *client) { raw(c, hdr(write(c, 1, 1<<30, true), 1<<24-1), evil) }, want: closed},
		{name: "immediate data > EDTL", full: true, send: func(c *client) { raw(c, hdr(write(c, 2, 512, true), 1024), evil[:1024]) }, want: closed},
		{name: "data with a read", full: true, send: func(c *client) { raw(c, hdr(c.command(0, scsi.Read(0, 1), nil, 512), 512), evil[:512]) }, want: closed},
		{name: "immediate data negotiated off", full: true, login: solicited, send: func(c *client) { raw(c, hdr(write(c, 1, 512, true), 512), evil[:512]) }, want: closed},
		{name: "F and W both 0", full: true, send: func(c *client) {
			p := c.command(0, scsi.TestUnitReady(), nil, 0)
			p.Final = false
			c.send(p)
		}, want: rejected(iscsi.RejectInvalidField)},
		{name: "Data-Out of nothing", full: true, send: func(c *client) { c.send(&iscsi.DataOut{Final: true, ITT: 0x9999, TTT: 0x1234}, evil[:512]) }, want: rejected(iscsi.RejectInvalidField)},
		{name: "Data-Out beyond EDTL", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 2)
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT, Offset: 0x7FFFFE00}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataOffset)},
		{name: "Data-Out longer than the R2T", full: true, login: solicited, send: func(c *client) { // tgtd dies of it
			p, r := ask(c, 2)
			c.send(&iscsi.DataOut{ITT: p.ITT, TTT: r.TTT}, evil[:1024])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataPhase)},
		{name: "Data-Out of 64 KiB for an R2T of 512", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 1)
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT}, evil)
		}, want: check(scsi.AbortedCommand, scsi.ASCTooMuchWriteData)},
		{name: "another TTT", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 1)
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT + 77}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCInvalidTTT)},
		{name: "another LUN in Data-Out", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 1)
			c.send(&iscsi.DataOut{Final: true, LUN: iscsi.LUNOf(9), ITT: p.ITT, TTT: r.TTT}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataPhase)},
		{name: "DataSN gap", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 2)
			c.send(&iscsi.DataOut{ITT: p.ITT, TTT: r.TTT, DataSN: 0}, evil[:512])
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT, DataSN: 2, Offset: 512}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataPhase)},
		{name: "DataSN repeated", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 2)
			c.send(&iscsi.DataOut{ITT: p.ITT, TTT: r.TTT, DataSN: 0}, evil[:512])
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT, DataSN: 0, Offset: 512}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataPhase)},
		{name: "final bit too early", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 2)
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataPhase)},
		{name: "unsolicited data with InitialR2T", full: true, login: solicited, send: func(c *client) {
			p, _ := ask(c, 1)
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: iscsi.ReservedTag}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCUnexpectedUnsolicited)},
		{name: "unsolicited data beyond FirstBurstLength", full: true, login: kv("InitialR2T=No", "ImmediateData=No", "FirstBurstLength=512"), send: func(c *client) {
			c.send(write(c, 4, 2048, false))
			c.send(&iscsi.DataOut{Final: true, ITT: c.itt, TTT: iscsi.ReservedTag}, evil[:1024])
		}, want: check(scsi.AbortedCommand, scsi.ASCTooMuchWriteData)},
		{name: "final bit missing at FirstBurstLength", full: true, login: kv("InitialR2T=No", "ImmediateData=No", "FirstBurstLength=512"), send: func(c *client) {
			c.send(write(c, 4, 2048, false))
			c.send(&iscsi.DataOut{ITT: c.itt, TTT: iscsi.ReservedTag}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataPhase)},
		{name: "task tag in use", full: true, login: solicited, send: func(c *client) {
			p, _ := ask(c, 1)
			q := write(c, 1, 512, true)
			c.cmdSN-- // it was not taken
			q.ITT = p.ITT
			c.send(q)
		}, want: rejected(iscsi.RejectTaskInProgress)},
		{name: "close in the middle of Data-Out", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 2)
			raw(c, hdr(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT}, 1024), evil[:600])
			_ = c.nc.(*net.TCPConn).CloseWrite()
		}, want: closed},
		{name: "TTT again after the end", full: true, login: solicited, send: func(c *client) {
			p := write(c, 1, 512, true)
			p.CDB = [16]byte{}
			x := scsi.Write(2047, 1, false)
			copy(p.CDB[:], x.Bytes())
			c.send(p)
			var r iscsi.R2T
			c.must(&r)
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT}, make([]byte, 512))
			var s iscsi.ScsiResponse
			c.must(&s)
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT}, evil[:512])
		}, want: rejected(iscsi.RejectInvalidField)},

		{name: "EDTL of 4 GiB reading", full: true, send: func(c *client) { c.send(c.command(0, scsi.Read(0, 1), nil, 0xFFFFFFFF)) }, want: func(c *client) {
			r, err := c.finish(&iscsi.ScsiCommand{ITT: c.itt}, nil)
			if err != nil || r.status != scsi.StatusGood || len(r.data) != 512 || !r.under || r.residual != 0xFFFFFFFF-512 {
				c.t.Errorf("%v %d bytes, residual %d, %v", r.status, len(r.data), r.residual, err)
			}
		}},
		{name: "EDTL of 4 GiB writing", full: true, login: solicited, send: func(c *client) {
			p := write(c, 1, 0xFFFFFFFF, true)
			c.send(p)
			var r iscsi.R2T
			c.must(&r)
			if r.Length != 512 {
				c.t.Errorf("R2T of %d bytes", r.Length)
			}
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT, Offset: 1 << 31}, evil[:512])
		}, want: check(scsi.AbortedCommand, scsi.ASCDataOffset)},
		{name: "2^32-1 blocks", full: true, send: func(c *client) { c.send(c.command(0, scsi.Read(0, 0xFFFFFFFF), nil, 512)) }, want: check(scsi.IllegalRequest, scsi.ASCLBAOutOfRange)},
		{name: "LBA that wraps", full: true, send: func(c *client) { c.send(c.command(0, scsi.Read(1<<64-2, 4), nil, 2048)) }, want: check(scsi.IllegalRequest, scsi.ASCLBAOutOfRange)},
		{name: "XDWRITEREAD", full: true, login: solicited, send: func(c *client) {
			p := write(c, 1, 512, true)
			p.Read = true
			p.CDB = [16]byte{byte(scsi.OpXDWriteRead10), 7: 0, 8: 1}
			c.send(p)
		}, want: check(scsi.IllegalRequest, scsi.ASCInvalidOpcode)},
		{name: "WRITE flagged as a read", full: true, send: func(c *client) {
			p := c.command(0, scsi.Write(0, 1, false), nil, 512)
			c.send(p)
		}, want: check(scsi.IllegalRequest, scsi.ASCInvalidFieldCDB)},
		{name: "LUN 16383", full: true, send: func(c *client) { c.send(c.command(16383, scsi.Read(0, 1), nil, 512)) }, want: check(scsi.IllegalRequest, scsi.ASCLUNotSupported)},
		{name: "LUN of two levels", full: true, send: func(c *client) {
			p := c.command(0, scsi.Read(0, 1), nil, 512)
			p.LUN = 0x0000_0001_0000_0000
			c.send(p)
		}, want: check(scsi.IllegalRequest, scsi.ASCLUNotSupported)},
		{name: "UNMAP list that lies", full: true, send: func(c *client) {
			d := []byte{0xFF, 0xFE, 0xFF, 0xF0, 0, 0, 0, 0}
			c.send(c.command(0, scsi.UnmapCDB(8), d, 0), d)
		}, want: check(scsi.IllegalRequest, scsi.ASCParamListLength)},
		{name: "PR OUT with a short list", full: true, send: func(c *client) {
			x, _ := scsi.PersistentReserveOut(scsi.SARegister, 0, 8)
			d := make([]byte, 8)
			c.send(c.command(0, x, d, 0), d)
		}, want: check(scsi.IllegalRequest, scsi.ASCParamListLength)},
		{name: "PR OUT longer than its data", full: true, send: func(c *client) {
			x, _ := scsi.PersistentReserveOut(scsi.SARegister, 0, 4096)
			d := make([]byte, 24)
			c.send(c.command(0, x, d, 0), d)
		}, want: check(scsi.IllegalRequest, scsi.ASCParamListLength)},
		{name: "MODE SELECT with a bad block descriptor length", full: true, send: func(c *client) {
			d := []byte{0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0}
			x, _ := scsi.Build(scsi.OpModeSelect6, scsi.NoSA, scsi.Arg{ID: scsi.FPF, Value: 1}, scsi.Arg{ID: scsi.FParamLen, Value: uint64(len(d))})
			c.send(c.command(0, x, d, 0), d)
		}, want: check(scsi.IllegalRequest, scsi.ASCInvalidFieldParam)},
		{name: "SNACK at level 0", full: true, send: func(c *client) { c.send(&iscsi.SNACK{ITT: 5, RunLength: 1}) }, want: rejected(iscsi.RejectSNACK)},
		{name: "text with a TTT of nobody", full: true, send: func(c *client) {
			c.send(&iscsi.TextRequest{Final: true, ITT: 9, TTT: 0x4242, CmdSN: c.cmdSN}, []byte("SendTargets=\x00"))
			c.cmdSN++
		}, want: rejected(iscsi.RejectInvalidField)},
		{name: "second login", full: true, send: func(c *client) {
			c.send(&iscsi.LoginRequest{Transit: true, CSG: 1, NSG: 3, ITT: 3, CmdSN: c.cmdSN}, []byte(who))
		}, want: rejected(iscsi.RejectProtocolError)},
		{name: "logout for no reason", full: true, send: func(c *client) { c.send(&iscsi.LogoutRequest{Immediate: true, Reason: 0x55, ITT: 9, CmdSN: c.cmdSN}) }, want: rejected(iscsi.RejectInvalidField)},
		{name: "ping of 8191 bytes", full: true, send: func(c *client) {}, want: func(c *client) {
			if d := c.nop(evil[:8191]); !bytes.Equal(d, evil[:8191]) {
				c.t.Errorf("%d bytes came back", len(d))
			}
		}},
		{name: "ping larger than the initiator takes", full: true, login: kv("MaxRecvDataSegmentLength=512"), want: func(c *client) {
			if d := c.nop(evil[:4096]); !bytes.Equal(d, evil[:512]) {
				c.t.Errorf("%d bytes came back", len(d))
			}
		}},
		{name: "immediate commands without end", full: true, login: solicited, send: func(c *client) {
			for range maxImmediate + 1 {
				p := write(c, 1, 512, true)
				c.cmdSN--
				p.CmdSN, p.Immediate = c.cmdSN, true
				c.send(p)
			}
			for range maxImmediate {
				var r iscsi.R2T
				c.must(&r)
			}
		}, want: rejected(iscsi.RejectTooManyImmediate)},

		{name: "data after ABORT TASK", full: true, login: solicited, send: func(c *client) {
			p, r := ask(c, 2)
			c.tmf(iscsi.FuncAbortTask, 0, p.ITT, p.CmdSN)
			var m iscsi.TaskMgmtResponse
			c.must(&m)
			if m.Response != iscsi.TaskComplete {
				c.t.Errorf("abort: %s", m.Response)
			}
			c.send(&iscsi.DataOut{Final: true, ITT: p.ITT, TTT: r.TTT}, evil[:1024])
		}, want: func(c *client) {
			c.do(0, scsi.TestUnitReady(), nil, 0).want(c.t, "afterwards", scsi.StatusGood, 0, 0)
		}},
		{name: "extended CDB of length 0", full: true, send: func(c *client) {
			h := hdr(c.command(0, scsi.TestUnitReady(), nil, 0), 0)
			h.SetAHSLen(4)
			raw(c, h, []byte{0, 0, 1, 0})
		}, want: rejected(iscsi.RejectInvalidField)},
		{name: "extended CDB of length 65535", full: true, send: func(c *client) {
			h := hdr(c.command(0, scsi.TestUnitReady(), nil, 0), 0)
			h.SetAHSLen(1020)
			a := make([]byte, 1020)
			a[0], a[1], a[2] = 0xFF, 0xFF, 1
			raw(c, h, a)
		}, want: rejected(iscsi.RejectInvalidField)},
		{name: "INQUIRY with an EDTL of 0", full: true, send: func(c *client) { c.send(c.command(0, scsi.InquiryCDB(36), nil, 0)) }, want: func(c *client) {
			r, err := c.finish(&iscsi.ScsiCommand{ITT: c.itt}, nil)
			if err != nil || r.status != scsi.StatusGood || len(r.data) != 0 || !r.over || r.residual != 36 {
				c.t.Errorf("%v %d bytes, over %v, residual %d, %v", r.status, len(r.data), r.over, r.residual, err)
			}
		}},
		{name: "MaxRecvDataSegmentLength=0", send: login(nil, who+"MaxRecvDataSegmentLength=0\x00"), want: refusedKey("MaxRecvDataSegmentLength")},
		{name: "MaxBurstLength=-1", send: login(nil, who+"MaxBurstLength=-1\x00"), want: refusedKey("MaxBurstLength")},
		{name: "FirstBurstLength of 40 bits", send: login(nil, who+"FirstBurstLength=0xffffffffff\x00"), want: refusedKey("FirstBurstLength")},
		{name: "login text in PDUs of one byte", want: func(c *client) {
			for i := range len(who) {
				c.send(&iscsi.LoginRequest{Continue: true, CSG: iscsi.StageOperational, ITT: 1}, []byte(who[i:i+1]))
				var r iscsi.LoginResponse
				if c.must(&r); r.Status != iscsi.StatusSuccess {
					c.gone()
					return
				}
			}
			c.t.Errorf("%d PDUs were taken", len(who))
		}},
		{name: "whole LUN written and unmapped under aborts", full: true, send: func(c *client) {
			var list []scsi.UnmapRange
			for i := range uint64(4096) {
				list = append(list, scsi.UnmapRange{LBA: i % 64, Blocks: 64})
			}
			u := scsi.UnmapList(list)
			for i := range 64 {
				p := c.command(0, scsi.WriteSame(0, 0, i%2 == 0, false), make([]byte, 512), 0)
				_ = c.trySend(p, make([]byte, 512))
				c.tmf(iscsi.FuncAbortTask, 0, p.ITT, p.CmdSN)
				q := c.command(0, scsi.UnmapCDB(0xFFFF), u[:min(len(u), 4096)], 0)
				_ = c.trySend(q, u[:min(len(u), 4096)])
				c.tmf(iscsi.FuncAbortTaskSet, 0, iscsi.ReservedTag, 0)
				for n := 0; n < 2; { // the answers to the two requests; those of commands that were quicker are between
					bh, _, err := c.recv()
					if err != nil {
						c.t.Fatal(err)
					}
					if bh.Opcode() == iscsi.OpTaskMgmtResp {
						n++
					}
				}
			}
		}, want: func(c *client) {
			c.do(0, scsi.TestUnitReady(), nil, 0).want(c.t, "afterwards", scsi.StatusGood, 0, 0)
		}},
	}
}

// run makes the attack on a portal.
func (x *attack) run(t *testing.T, addr string) {
	c := dial(t, addr)
	c.limit = 5 * time.Second
	if x.full {
		if st := c.tryLogin(loginOpt{name: "iqn.2026-01.net.host:x", keys: x.login}); st != iscsi.StatusSuccess {
			t.Fatal(st)
		}
		c.clearUA(0)
	}
	if x.send != nil {
		x.send(c)
	}
	x.want(c)
	_ = c.nc.Close()
}

// untouched is the health check behind an attack: another session has answers,
// and no byte of an attack reached the medium.
func untouched(t *testing.T, health *client) {
	t.Helper()
	health.do(0, scsi.TestUnitReady(), nil, 0).want(t, "health", scsi.StatusGood, 0, 0)
	if r := health.do(0, scsi.Read(0, 2048), nil, 1<<20); len(r.data) != 1<<20 || bytes.IndexByte(r.data, 0xEE) >= 0 {
		t.Fatal("data of the attack reached the medium")
	}
}

// TestAdversary: each attack gets the right answer and harms nobody. Goroutines
// and accounted memory are back afterwards.
func TestAdversary(t *testing.T) {
	b := newBench(t, Options{LoginTimeout: 500 * time.Millisecond}, lunOf(t, 0))
	health := b.ready(loginOpt{name: "iqn.2026-01.net.host:health"})
	runtime.GC()
	goroutines := runtime.NumGoroutine()
	for _, x := range attacks() {
		t.Run(x.name, func(t *testing.T) {
			x.run(t, b.addr())
			untouched(t, health)
		})
	}
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 1 && runtime.NumGoroutine() <= goroutines })
	if n := b.srv.buffered.Load(); n != 0 {
		t.Errorf("%d bytes of data phases are still accounted for", n)
	}
}

// TestAdversaryServer is the victim of TestAdversaryLeaksNothing in a process of
// its own: at each line of its input it says what it holds.
func TestAdversaryServer(t *testing.T) {
	if os.Getenv("BLOCKHOUSE_VICTIM") == "" {
		t.Skip("helper of TestAdversaryLeaksNothing")
	}
	l := lunOf(t, 0)
	b := newBench(t, Options{LoginTimeout: 500 * time.Millisecond}, l)
	fmt.Println("portal", b.addr())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		waitFor(t, func() bool { return len(b.srv.Sessions()) == 0 })
		time.Sleep(100 * time.Millisecond) // goroutines that have said their last word
		// The medium lies in this process's memory: an aborted UNMAP must not count.
		if err := l.Device.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 1<<20), 0, 0); err != nil {
			t.Fatal(err)
		}
		debug.FreeOSMemory()
		st, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rss, _ := strings.Cut(string(st), "VmRSS:")
		fmt.Println("held", runtime.NumGoroutine(), strings.Fields(rss)[0])
	}
}

// TestAdversaryLeaksNothing: rounds of all attacks on a server in a process of its
// own, built without the race detector: its resident memory does not grow by 1 MiB
// and its goroutines are those of before.
func TestAdversaryLeaksNothing(t *testing.T) {
	t.Parallel()
	bin := filepath.Join(t.TempDir(), "victim")
	if out, err := osexec.Command("go", "test", "-c", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	p := testproc.Start(t, testproc.Spec{Name: "victim", Args: []string{bin, "-test.run=^TestAdversaryServer$"}, Env: []string{"BLOCKHOUSE_VICTIM=1"}, Stdin: r})
	_ = r.Close()
	addr := p.MustWaitFor(t, `portal (\S+)`, 20*time.Second)[1]
	held := func() (goroutines, kib int) {
		t.Helper()
		seen := strings.Count(p.Output(), "held ")
		if _, err := fmt.Fprintln(w); err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() bool { return strings.Count(p.Output(), "held ") > seen })
		out := p.Output()
		if _, err := fmt.Sscanf(out[strings.LastIndex(out, "held "):], "held %d %d", &goroutines, &kib); err != nil {
			t.Fatal(err)
		}
		return goroutines, kib
	}
	round := func() {
		for _, x := range attacks() {
			x.run(t, addr)
		}
	}
	round() // pools and free lists have their size
	round()
	g0, kib0 := held()
	// A leak is there at every look; what a busy machine adds is not.
	g, kib := g0, kib0+1<<30
	for range 3 {
		for range testproc.Count(t, 2) {
			round()
		}
		g1, kib1 := held()
		if g, kib = g1, min(kib, kib1); kib-kib0 < 1024 && g <= g0 {
			break
		}
	}
	t.Logf("PROOF %d attacks a round: resident memory %d KiB, then %d KiB; goroutines %d, then %d", len(attacks()), kib0, kib, g0, g)
	if kib-kib0 >= 1024 || g > g0 {
		t.Errorf("resident memory went from %d to %d KiB, goroutines from %d to %d", kib0, kib, g0, g)
	}
}

// TestSlowLoris: one byte now and then neither holds a login nor a session.
func TestSlowLoris(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{LoginTimeout: 300 * time.Millisecond, NopInterval: 100 * time.Millisecond, NopTimeout: 300 * time.Millisecond}, lunOf(t, 0))
	drip := func(c *client, pdu []byte) {
		for i := 0; ; i++ {
			if _, err := c.nc.Write(pdu[i%len(pdu) : i%len(pdu)+1]); err != nil {
				return
			}
			if i > 200 {
				t.Error("10 s of single bytes were listened to")
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	var h iscsi.BHS
	(&iscsi.LoginRequest{Transit: true, CSG: iscsi.StageOperational, NSG: iscsi.StageFull, ITT: 1}).Encode(&h)
	h.SetDataLen(8192)
	drip(dial(t, b.addr()), append(h[:], make([]byte, 8192)...))
	c := b.ready(loginOpt{})
	(&iscsi.NopOut{Immediate: true, ITT: 5, TTT: iscsi.ReservedTag, CmdSN: c.cmdSN, ExpStatSN: c.expSN}).Encode(&h)
	h.SetDataLen(8192)
	drip(c, append(h[:], make([]byte, 8192)...))
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 0 })
}

// TestKeySplit: a key=value pair may be cut anywhere by the C bit (RFC 7143 §6.1).
func TestKeySplit(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	text := []byte("InitiatorName=iqn.2026-01.net.host:x\x00TargetName=" + testIQN + "\x00MaxBurstLength=4096\x00")
	for at := 1; at < len(text); at++ {
		c := dial(t, b.addr())
		c.send(&iscsi.LoginRequest{Continue: true, CSG: iscsi.StageOperational, ITT: 1}, text[:at])
		var r iscsi.LoginResponse
		if d := c.must(&r); r.Status != iscsi.StatusSuccess || r.Transit || len(d) != 0 {
			t.Fatalf("cut at %d: %s, T %v, %q", at, r.Status, r.Transit, d)
		}
		c.send(&iscsi.LoginRequest{Transit: true, CSG: iscsi.StageOperational, NSG: iscsi.StageFull, ITT: 1}, text[at:])
		if d := c.must(&r); r.Status != iscsi.StatusSuccess || !r.Transit || !bytes.Contains(d, []byte("MaxBurstLength=4096\x00")) {
			t.Fatalf("cut at %d: %s, T %v, %q", at, r.Status, r.Transit, d)
		}
		_ = c.nc.Close()
	}
}

// TestNexusCollision: an ISID belongs to the initiator that says it, and many
// logins of one nexus leave one session.
func TestNexusCollision(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	isid := iscsi.ISID{0x80, 1, 2, 3, 4, 5}
	other := b.ready(loginOpt{name: "iqn.2026-01.net.host:other", isid: isid})
	goroutines := runtime.NumGoroutine()
	var last *client
	for range testproc.Count(t, 200) {
		last = b.login(loginOpt{isid: isid})
	}
	last.clearUA(0)
	other.do(0, scsi.TestUnitReady(), nil, 0).want(t, "the other initiator", scsi.StatusGood, 0, 0)
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 2 })
	_ = last.nc.Close()
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 1 && runtime.NumGoroutine() <= goroutines })
}

// TestHalfOpen: connections that never log in are bounded and do not keep a good
// one out for long.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{LoginTimeout: 200 * time.Millisecond, MaxLogins: 16}, lunOf(t, 0))
	for range testproc.Count(t, 64) {
		nc, err := net.Dial("tcp", b.addr())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
	}
	waitFor(t, func() bool {
		nc, err := net.Dial("tcp", b.addr())
		if err != nil {
			return false
		}
		_ = nc.Close()
		b.srv.mu.Lock()
		defer b.srv.mu.Unlock()
		return b.srv.logins == 0
	})
	b.ready(loginOpt{})
}

// TestPeerThatNeverReads: what it asks for stays bounded, and it is dropped.
func TestPeerThatNeverReads(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	b := newBench(t, Options{SendTimeout: time.Second}, l)
	c := b.ready(loginOpt{})
	for range 64 { // 64 MiB asked for
		if c.trySend(c.command(0, scsi.Read(0, 2048), nil, 1<<20)) != nil {
			break
		}
	}
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 0 })
}

// FuzzConn feeds a connection with bytes, before login and after: nothing may
// crash or hang, and the server stays of use.
func FuzzConn(f *testing.F) {
	var cmd, out iscsi.BHS
	(&iscsi.ScsiCommand{Final: true, Write: true, ITT: 9, EDTL: 512, CmdSN: 7, CDB: [16]byte{0x2A, 8: 1}}).Encode(&cmd)
	cmd.SetDataLen(4)
	(&iscsi.DataOut{Final: true, ITT: 9, TTT: 1}).Encode(&out)
	f.Add(true, append(append(cmd[:], 1, 2, 3, 4), out[:]...))
	var lg iscsi.BHS
	(&iscsi.LoginRequest{Transit: true, CSG: 1, NSG: 3, ITT: 1}).Encode(&lg)
	lg.SetDataLen(16)
	f.Add(false, append(lg[:], "InitiatorName=x\x00"...))
	b := newBench(f, Options{}, lunOf(f, 0))
	f.Fuzz(func(t *testing.T, full bool, data []byte) {
		c := dial(t, b.addr())
		if full {
			if st := c.tryLogin(loginOpt{}); st != iscsi.StatusSuccess {
				t.Fatal(st)
			}
		}
		_, _ = c.nc.Write(data)
		_ = c.nc.(*net.TCPConn).CloseWrite()
		c.gone()
	})
}
