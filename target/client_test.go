package target

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

const testIQN = "iqn.2026-01.net.blockhouse:t1"

var anyPort = netip.MustParseAddrPort("127.0.0.1:0")

// bench is a server with what it serves.
type bench struct {
	t    testing.TB
	srv  *Server
	conf Config
}

func newBench(t testing.TB, o Options, luns ...LUN) *bench {
	t.Helper()
	if o.NopInterval == 0 {
		o.NopInterval = -1 // a test that wants pings says so
	}
	srv, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, srv: srv, conf: Config{Targets: []Target{{
		IQN: testIQN, Alias: "bench", TPGT: 1, RelPort: 1, Portals: []netip.AddrPort{anyPort}, ACL: ACL{Open: true}, LUNs: luns,
	}}}}
	b.apply()
	t.Cleanup(func() {
		if err := srv.Close(); err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
	return b
}

func (b *bench) apply() {
	b.t.Helper()
	if err := b.srv.Apply(b.conf); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) addr() string {
	a, ok := b.srv.Addr(anyPort)
	if !ok {
		b.t.Fatal("the portal is not open")
	}
	return a.String()
}

// lunOf makes a map entry on a fresh memory store of 1 MiB.
func lunOf(t testing.TB, n scsi.LUN) LUN {
	d, err := mem.New(1<<20, 512)
	if err != nil {
		t.Fatal(err)
	}
	return lunOn(n, d)
}

func lunOn(n scsi.LUN, d block.Device) LUN {
	return LUN{Number: n, Volume: fmt.Sprintf("vol-%d", n), Generation: 1, Device: d,
		Identity: Identity{Product: fmt.Sprintf("vol%05d test", n), Serial: fmt.Sprintf("serial%d", n), UUID: [16]byte{byte(n), 1}}}
}

// client is an initiator of bare PDUs.
type client struct {
	t      testing.TB
	nc     net.Conn
	r      *iscsi.Reader
	w      *iscsi.Writer
	p      iscsi.Params
	cmdSN  iscsi.Serial
	itt    uint32
	expSN  iscsi.Serial
	keys   []iscsi.Pair // last text
	tsih   uint16
	limit  time.Duration
	async  [][]byte // data of asynchronous messages
	maxCmd iscsi.Serial
}

// loginOpt are what a login says.
type loginOpt struct {
	name, target string
	isid         iscsi.ISID
	discovery    bool
	keys         []iscsi.Pair
	tsih, cid    uint16
}

func dial(t testing.TB, addr string) *client {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, nc: nc, itt: 0x10, cmdSN: 7, limit: 10 * time.Second, p: iscsi.DefaultParams()}
	c.r = iscsi.NewReader(bufio.NewReaderSize(nc, 64<<10), iscsi.MaxDataSegment)
	c.w = iscsi.NewWriter(nc, iscsi.MaxDataSegment)
	t.Cleanup(func() { _ = nc.Close() })
	return c
}

// tryLogin logs in by one request and returns the status.
func (c *client) tryLogin(o loginOpt) iscsi.LoginStatus {
	c.t.Helper()
	if o.name == "" {
		o.name = "iqn.2026-01.net.host:a"
	}
	keys := []iscsi.Pair{{Key: iscsi.KeyInitiatorName, Value: o.name}}
	if o.discovery {
		keys = append(keys, iscsi.Pair{Key: iscsi.KeySessionType, Value: "Discovery"})
	} else {
		if o.target == "" {
			o.target = testIQN
		}
		keys = append(keys, iscsi.Pair{Key: iscsi.KeyTargetName, Value: o.target})
	}
	keys = append(keys, o.keys...)
	c.send(&iscsi.LoginRequest{Transit: true, CSG: iscsi.StageOperational, NSG: iscsi.StageFull, ISID: o.isid, TSIH: o.tsih, CID: o.cid, ITT: 1, CmdSN: c.cmdSN}, iscsi.AppendText(nil, keys))
	b, data, err := c.recv()
	if err != nil {
		c.t.Fatalf("login: %v", err)
	}
	var r iscsi.LoginResponse
	if err := r.Decode(b); err != nil {
		c.t.Fatal(err)
	}
	c.expSN, c.tsih, c.maxCmd = r.StatSN+1, r.TSIH, r.MaxCmdSN
	c.keys, _ = iscsi.ParseText(data)
	if r.Status != iscsi.StatusSuccess {
		return r.Status
	}
	if !r.Transit || r.NSG != iscsi.StageFull {
		c.t.Fatalf("login did not end: %+v", r)
	}
	offered := map[string]string{}
	for _, k := range o.keys {
		offered[k.Key] = k.Value
	}
	for _, k := range c.keys {
		n, _ := iscsi.ParseNumber(k.Value, 0, 1<<32)
		switch k.Key {
		case iscsi.KeyHeaderDigest:
			c.p.HeaderDigest = k.Value == "CRC32C"
		case iscsi.KeyDataDigest:
			c.p.DataDigest = k.Value == "CRC32C"
		case iscsi.KeyInitialR2T:
			c.p.InitialR2T = k.Value == "Yes"
		case iscsi.KeyImmediateData:
			c.p.ImmediateData = k.Value == "Yes"
		case iscsi.KeyMaxBurstLength:
			c.p.MaxBurstLength = int(n)
		case iscsi.KeyFirstBurstLength:
			c.p.FirstBurstLength = int(n)
		case iscsi.KeyMaxRecvDataSegmentLength:
			c.p.MaxSend = int(n)
		}
	}
	c.r.HeaderDigest, c.r.DataDigest = c.p.HeaderDigest, c.p.DataDigest
	c.w.HeaderDigest, c.w.DataDigest = c.p.HeaderDigest, c.p.DataDigest
	return r.Status
}

func (b *bench) login(o loginOpt) *client {
	b.t.Helper()
	c := dial(b.t, b.addr())
	if st := c.tryLogin(o); st != iscsi.StatusSuccess {
		b.t.Fatalf("login: %s", st)
	}
	return c
}

// ready logs in and takes the power-on attention of the LUNs.
func (b *bench) ready(o loginOpt) *client {
	b.t.Helper()
	c := b.login(o)
	for _, l := range b.conf.Targets[0].LUNs {
		c.clearUA(l.Number)
	}
	return c
}

func (c *client) clearUA(l scsi.LUN) {
	c.t.Helper()
	for range 10 {
		r := c.do(l, scsi.TestUnitReady(), nil, 0)
		if r.status == scsi.StatusGood {
			return
		}
		if r.sense == nil || r.sense.Key != scsi.UnitAttention {
			c.t.Fatalf("lun %d: %s %v", l, r.status, r.sense)
		}
	}
	c.t.Fatal("unit attentions do not end")
}

func (c *client) send(p iscsi.PDU, data ...[]byte) {
	c.t.Helper()
	if err := c.trySend(p, data...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) trySend(p iscsi.PDU, data ...[]byte) error {
	if err := c.w.Append(p, data...); err != nil {
		return err
	}
	return c.w.Flush()
}

// recv returns the next PDU with its data, within the limit.
func (c *client) recv() (*iscsi.BHS, []byte, error) {
	_ = c.nc.SetReadDeadline(time.Now().Add(c.limit))
	b, err := c.r.Next()
	if err != nil {
		return nil, nil, err
	}
	d, err := c.r.AppendData(nil)
	if b.Opcode() != iscsi.OpLoginResp && b.Opcode() != iscsi.OpR2T && err == nil {
		// StatSN must count without a gap in what carries one.
		carries := b.Opcode() != iscsi.OpDataIn || b[1]&1 != 0
		if b.Opcode() == iscsi.OpNopIn && b.ITT() == iscsi.ReservedTag {
			carries = false
		}
		if carries {
			if b.CmdSN() != c.expSN {
				return nil, nil, fmt.Errorf("%s: StatSN %d, want %d", b.Opcode(), b.CmdSN(), c.expSN)
			}
			c.expSN++
		}
		c.maxCmd = iscsi.Serial(uint32(b[32])<<24 | uint32(b[33])<<16 | uint32(b[34])<<8 | uint32(b[35]))
	}
	return b, d, err
}

// must is recv of one kind.
func (c *client) must(p iscsi.PDU) []byte {
	c.t.Helper()
	b, d, err := c.recv()
	if err != nil {
		c.t.Fatalf("want %s: %v", p.Opcode(), err)
	}
	if err := p.Decode(b); err != nil {
		c.t.Fatalf("%v (% x)", err, b[:])
	}
	return d
}

// gone tells that the target closed the connection.
func (c *client) gone() {
	c.t.Helper()
	for {
		_, _, err := c.recv()
		if err == nil {
			continue
		}
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			c.t.Fatal("the connection is still open")
		}
		return
	}
}

// result of a command.
type result struct {
	status      scsi.Status
	sense       *scsi.Sense
	data        []byte
	over, under bool
	residual    uint32
	r2ts        int
	failed      bool
}

// command makes the PDU of a CDB.
func (c *client) command(l scsi.LUN, cdb scsi.CDB, out []byte, in uint32) *iscsi.ScsiCommand {
	c.itt++
	p := &iscsi.ScsiCommand{Final: true, Read: in > 0, Write: len(out) > 0, Attr: iscsi.AttrSimple, LUN: iscsi.LUNOf(uint16(l)), ITT: c.itt, EDTL: in, CmdSN: c.cmdSN, ExpStatSN: c.expSN}
	if len(out) > 0 {
		p.EDTL = uint32(len(out))
	}
	copy(p.CDB[:], cdb.Bytes())
	c.cmdSN++
	return p
}

// do runs a command as the negotiated parameters allow: immediate data, then
// unsolicited, then what R2Ts ask for.
func (c *client) do(l scsi.LUN, cdb scsi.CDB, out []byte, in uint32) result {
	c.t.Helper()
	r, err := c.tryDo(c.command(l, cdb, out, in), out)
	if err != nil {
		c.t.Fatalf("%s: %v", cdb.Cmd, err)
	}
	return r
}

func (c *client) tryDo(p *iscsi.ScsiCommand, out []byte) (result, error) {
	first := min(len(out), c.p.FirstBurstLength)
	imm := 0
	if c.p.ImmediateData {
		imm = min(first, c.p.MaxSend)
	}
	unsol := 0
	if !c.p.InitialR2T {
		unsol = first - imm
	}
	p.Final = unsol == 0
	if err := c.trySend(p, out[:imm]); err != nil {
		return result{}, err
	}
	if err := c.burst(p, iscsi.ReservedTag, out, imm, unsol); err != nil {
		return result{}, err
	}
	return c.finish(p, out)
}

func (c *client) burst(p *iscsi.ScsiCommand, ttt uint32, out []byte, off, n int) error {
	for sn := uint32(0); n > 0; sn++ {
		k := min(n, c.p.MaxSend)
		d := &iscsi.DataOut{Final: k == n, ITT: p.ITT, TTT: ttt, DataSN: sn, Offset: uint32(off), ExpStatSN: c.expSN}
		if ttt != iscsi.ReservedTag {
			d.LUN = p.LUN
		}
		if err := c.trySend(d, out[off:off+k]); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// finish answers R2Ts and collects Data-In until the response of p.
func (c *client) finish(p *iscsi.ScsiCommand, out []byte) (res result, err error) {
	var dataSN uint32
	burst := 0
	for {
		b, d, err := c.recv()
		if err != nil {
			return res, err
		}
		switch b.Opcode() {
		case iscsi.OpR2T:
			var r iscsi.R2T
			if err := r.Decode(b); err != nil {
				return res, err
			}
			if int(r.Length) > c.p.MaxBurstLength || int(r.Offset+r.Length) > len(out) {
				return res, fmt.Errorf("R2T for [%d,+%d) of %d, MaxBurstLength %d", r.Offset, r.Length, len(out), c.p.MaxBurstLength)
			}
			res.r2ts++
			if err := c.burst(p, r.TTT, out, int(r.Offset), int(r.Length)); err != nil {
				return res, err
			}
		case iscsi.OpDataIn:
			var r iscsi.DataIn
			if err := r.Decode(b); err != nil {
				return res, err
			}
			if r.ITT != p.ITT || r.DataSN != dataSN || int(r.Offset) != len(res.data) {
				return res, fmt.Errorf("Data-In %+v, want DataSN %d offset %d", r, dataSN, len(res.data))
			}
			burst += len(d)
			if burst > c.p.MaxBurstLength || burst == c.p.MaxBurstLength && !r.Final {
				return res, fmt.Errorf("a Data-In sequence of %d bytes, MaxBurstLength %d", burst, c.p.MaxBurstLength)
			}
			if r.Final {
				burst = 0
			}
			dataSN++
			res.data = append(res.data, d...)
			if r.HasStatus {
				res.status, res.over, res.under, res.residual = scsi.Status(r.Status), r.Overflow, r.Underflow, r.Residual
				return res, nil
			}
		case iscsi.OpScsiResponse:
			var r iscsi.ScsiResponse
			if err := r.Decode(b); err != nil {
				return res, err
			}
			if r.ITT != p.ITT {
				return res, fmt.Errorf("response for task %d, want %d", r.ITT, p.ITT)
			}
			res.status, res.over, res.under, res.residual = scsi.Status(r.Status), r.Overflow, r.Underflow, r.Residual
			res.failed = r.Response != iscsi.ResponseCompleted
			sense, _, err := iscsi.ParseSense(d)
			if err != nil {
				return res, err
			}
			if len(sense) > 0 {
				if res.sense, err = scsi.ParseSense(sense); err != nil {
					return res, err
				}
			}
			return res, nil
		case iscsi.OpNopIn:
			continue
		case iscsi.OpAsync:
			c.async = append(c.async, d)
			continue
		case iscsi.OpReject:
			var r iscsi.Reject
			_ = r.Decode(b)
			return res, fmt.Errorf("rejected: %s", r.Reason)
		default:
			return res, fmt.Errorf("unexpected %s", b.Opcode())
		}
	}
}

// want checks a command's outcome; code 0 with CHECK CONDITION means any.
func (r result) want(t testing.TB, what string, st scsi.Status, key scsi.Key, code scsi.ASC) {
	t.Helper()
	if r.status != st {
		t.Errorf("%s: %s (%v), want %s", what, r.status, r.sense, st)
		return
	}
	if st == scsi.StatusCheckCondition && (r.sense == nil || r.sense.Key != key || r.sense.Code != code) {
		t.Errorf("%s: %v, want %02x/%04x", what, r.sense, uint8(key), uint16(code))
	}
}

func (c *client) tmf(f iscsi.TaskFunc, l scsi.LUN, ref uint32, refSN iscsi.Serial) {
	c.itt++
	c.send(&iscsi.TaskMgmtRequest{Immediate: true, Function: f, LUN: iscsi.LUNOf(uint16(l)), ITT: c.itt, RefTag: ref, CmdSN: c.cmdSN, ExpStatSN: c.expSN, RefCmdSN: refSN})
}

func (c *client) nop(data []byte) []byte {
	c.t.Helper()
	c.itt++
	c.send(&iscsi.NopOut{Immediate: true, ITT: c.itt, TTT: iscsi.ReservedTag, CmdSN: c.cmdSN, ExpStatSN: c.expSN}, data)
	var r iscsi.NopIn
	return c.must(&r)
}
