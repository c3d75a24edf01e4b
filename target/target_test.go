package target

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func kv(s ...string) (out []iscsi.Pair) {
	for _, x := range s {
		k, v, _ := strings.Cut(x, "=")
		out = append(out, iscsi.Pair{Key: k, Value: v})
	}
	return out
}

// TestDataPhases writes and reads under every way to move the data.
func TestDataPhases(t *testing.T) {
	t.Parallel()
	for _, keys := range [][]iscsi.Pair{
		nil,
		kv("InitialR2T=Yes", "ImmediateData=No"),
		kv("InitialR2T=Yes", "ImmediateData=Yes", "FirstBurstLength=512"),
		kv("InitialR2T=No", "ImmediateData=No", "FirstBurstLength=4096", "MaxBurstLength=8192"),
		kv("InitialR2T=No", "ImmediateData=Yes", "FirstBurstLength=1024", "MaxBurstLength=1536", "MaxRecvDataSegmentLength=512"),
		kv("HeaderDigest=CRC32C", "DataDigest=CRC32C", "InitialR2T=No", "ImmediateData=Yes", "FirstBurstLength=65536", "MaxBurstLength=262144", "MaxOutstandingR2T=4"),
	} {
		t.Run(fmt.Sprint(keys), func(t *testing.T) {
			t.Parallel()
			b := newBench(t, Options{}, lunOf(t, 0))
			c := b.ready(loginOpt{keys: keys})
			rng := rand.New(rand.NewPCG(1, 2))
			model := make([]byte, 1<<20)
			for range 60 {
				lba := rng.IntN(2048)
				n := 1 + rng.IntN(min(2048-lba, 300))
				if rng.IntN(2) == 0 {
					p := make([]byte, n*512)
					for i := range p {
						p[i] = byte(rng.Uint32())
					}
					r := c.do(0, scsi.Write(uint64(lba), uint32(n), rng.IntN(2) == 0), p, 0)
					r.want(t, "write", scsi.StatusGood, 0, 0)
					if r.over || r.under {
						t.Fatalf("residual %+v", r)
					}
					copy(model[lba*512:], p)
				} else {
					r := c.do(0, scsi.Read(uint64(lba), uint32(n)), nil, uint32(n*512))
					if r.status != scsi.StatusGood || !bytes.Equal(r.data, model[lba*512:(lba+n)*512]) || r.over || r.under {
						t.Fatalf("read %d+%d: %s, %d bytes, residual %v %v", lba, n, r.status, len(r.data), r.over, r.under)
					}
				}
			}
		})
	}
}

func TestLoginStatus(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	b.conf.Targets[0].ACL = ACL{Names: []string{"iqn.2026-01.net.host:a"}, Nets: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
	off := b.conf.Targets[0]
	off.IQN, off.Offline = testIQN+"-off", true
	closed := b.conf.Targets[0]
	closed.IQN, closed.ACL = testIQN+"-closed", ACL{}
	net10 := b.conf.Targets[0]
	net10.IQN, net10.ACL = testIQN+"-net10", ACL{Names: []string{"iqn.2026-01.net.host:a"}, Nets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	b.conf.Targets = append(b.conf.Targets, off, closed, net10)
	b.apply()
	for _, x := range []struct {
		o    loginOpt
		want iscsi.LoginStatus
	}{
		{loginOpt{}, iscsi.StatusSuccess},
		{loginOpt{name: "iqn.2026-01.net.HOST:A"}, iscsi.StatusSuccess}, // names compare without case
		{loginOpt{name: "iqn.2026-01.net.host:b"}, iscsi.StatusForbidden},
		{loginOpt{target: testIQN + "-none"}, iscsi.StatusNotFound},
		{loginOpt{target: off.IQN}, iscsi.StatusServiceUnavailable},
		{loginOpt{target: closed.IQN}, iscsi.StatusForbidden},
		{loginOpt{target: net10.IQN}, iscsi.StatusForbidden}, // every kind of rule must match
		{loginOpt{tsih: 0x7777}, iscsi.StatusNoSession},
	} {
		if got := dial(t, b.addr()).tryLogin(x.o); got != x.want {
			t.Errorf("%+v: %s, want %s", x.o, got, x.want)
		}
	}
}

func (c *client) sendTargets(what string) string {
	c.t.Helper()
	c.itt++
	c.send(&iscsi.TextRequest{Final: true, ITT: c.itt, TTT: iscsi.ReservedTag, CmdSN: c.cmdSN, ExpStatSN: c.expSN}, iscsi.AppendPair(nil, "SendTargets", what))
	c.cmdSN++
	var all []byte
	for {
		var r iscsi.TextResponse
		d := c.must(&r)
		all = append(all, d...)
		if r.Final {
			break
		}
		c.send(&iscsi.TextRequest{Final: true, ITT: c.itt, TTT: r.TTT, CmdSN: c.cmdSN, ExpStatSN: c.expSN})
		c.cmdSN++
	}
	return strings.TrimSuffix(strings.ReplaceAll(string(all), "\x00", "\n"), "\n")
}

func TestSendTargets(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	hidden := b.conf.Targets[0]
	hidden.IQN, hidden.ACL, hidden.TPGT = testIQN+"-hidden", ACL{Names: []string{"iqn.2026-01.net.host:z"}}, 65535
	b.conf.Targets = append(b.conf.Targets, hidden)
	b.apply()
	one := "TargetName=" + testIQN + "\nTargetAddress=" + b.addr() + ",1"
	d := b.login(loginOpt{discovery: true})
	if got := d.sendTargets("All"); got != one {
		t.Errorf("All: %s", got)
	}
	if got := d.sendTargets(testIQN); got != one {
		t.Errorf("by name: %s", got)
	}
	if got := d.sendTargets(hidden.IQN); got != "" {
		t.Errorf("what the ACL hides: %s", got)
	}
	if got := d.sendTargets(""); got != "SendTargets=Reject" {
		t.Errorf("empty in a discovery session: %s", got)
	}
	z := b.login(loginOpt{discovery: true, name: "iqn.2026-01.net.host:z"})
	if got := z.sendTargets("All"); !strings.HasSuffix(got, b.addr()+",65535") {
		t.Errorf("tag: %s", got)
	}
	n := b.ready(loginOpt{})
	if got := n.sendTargets(""); got != one {
		t.Errorf("empty in a normal session: %s", got)
	}
	if got := n.sendTargets("All"); got != "SendTargets=Reject" {
		t.Errorf("All in a normal session: %s", got)
	}
	n.do(0, scsi.TestUnitReady(), nil, 0).want(t, "after text", scsi.StatusGood, 0, 0)
	d.itt++
	d.send(&iscsi.LogoutRequest{Reason: iscsi.LogoutSession, ITT: d.itt, CmdSN: d.cmdSN, ExpStatSN: d.expSN})
	var r iscsi.LogoutResponse
	d.must(&r)
	d.gone()
}

// TestSendTargetsLong: 300 targets to an initiator that takes 512 bytes a PDU.
func TestSendTargetsLong(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{})
	base := b.conf.Targets[0]
	for i := range 299 {
		n := base
		n.IQN = fmt.Sprintf("%s-%03d", testIQN, i)
		b.conf.Targets = append(b.conf.Targets, n)
	}
	b.apply()
	d := b.login(loginOpt{discovery: true, keys: kv("MaxRecvDataSegmentLength=512")})
	if got := strings.Count(d.sendTargets("All"), "TargetName="); got != 300 {
		t.Errorf("%d targets", got)
	}
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0), lunOf(t, 300))
	c := b.ready(loginOpt{})
	q, err := scsi.ParseInquiry(c.do(0, scsi.InquiryCDB(255), nil, 255).data)
	if err != nil || q.Vendor != Vendor || q.Product != "vol00000 test" || q.TPGS != 1 || !q.CmdQue {
		t.Error(q, err)
	}
	ds, err := scsi.ParseDeviceID(c.do(300, scsi.InquiryVPD(scsi.VPDDeviceID, 1024), nil, 1024).data)
	if err != nil {
		t.Fatal(err)
	}
	naa := scsi.NAA6([16]byte{44, 1})
	kinds := map[uint8]scsi.Designator{}
	for _, d := range ds {
		kinds[d.Type] = d
	}
	if !bytes.Equal(kinds[scsi.DesignatorNAA].Value, naa[:]) || kinds[scsi.DesignatorTPG].Value[3] != 1 || kinds[scsi.DesignatorPort].Value[3] != 1 {
		t.Errorf("%+v", ds)
	}
	luns, _, err := scsi.ParseReportLuns(c.do(0, scsi.ReportLunsCDB(0, 4096), nil, 4096).data)
	if err != nil || len(luns) != 2 || luns[1] != 300 {
		t.Error(luns, err)
	}
	// No such LUN: INQUIRY says so, everything else is refused.
	q, err = scsi.ParseInquiry(c.do(5, scsi.InquiryCDB(255), nil, 255).data)
	if err != nil || q.Qualifier != scsi.QualifierNone || q.DeviceType != scsi.TypeUnknown {
		t.Error(q, err)
	}
	c.do(5, scsi.TestUnitReady(), nil, 0).want(t, "absent", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCLUNotSupported)
	c.do(5, scsi.Write(0, 1, false), make([]byte, 512), 0).want(t, "absent", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCLUNotSupported)
}

// TestUnitAttentions: order, once, and which commands report them.
func TestUnitAttentions(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.login(loginOpt{})
	c.do(0, scsi.InquiryCDB(36), nil, 36).want(t, "INQUIRY", scsi.StatusGood, 0, 0)
	c.do(0, scsi.Read(0, 1), nil, 512).want(t, "first", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCPowerOn)
	c.do(0, scsi.Read(0, 1), nil, 512).want(t, "second", scsi.StatusGood, 0, 0)
	// The same nexus again: the first session is reinstated.
	d := b.login(loginOpt{})
	d.do(0, scsi.TestUnitReady(), nil, 0).want(t, "reinstated", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCNexusLoss)
	c.gone()
	if n := len(b.srv.Sessions()); n != 1 {
		t.Errorf("%d sessions", n)
	}
	// REQUEST SENSE takes one off.
	e := b.login(loginOpt{name: "iqn.2026-01.net.host:e"})
	s, err := scsi.ParseSense(e.do(0, scsi.RequestSenseCDB(252), nil, 252).data)
	if err != nil || s.Key != scsi.UnitAttention || s.Code != scsi.ASCPowerOn {
		t.Error(s, err)
	}
	e.do(0, scsi.TestUnitReady(), nil, 0).want(t, "after REQUEST SENSE", scsi.StatusGood, 0, 0)
}

// TestApply: what a change of the configuration does to sessions that are there.
func TestApply(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0), lunOf(t, 1))
	c := b.ready(loginOpt{})
	tgt := &b.conf.Targets[0]

	b.apply() // nothing changed, nothing happens
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "same", scsi.StatusGood, 0, 0)

	tgt.LUNs = append(tgt.LUNs, lunOf(t, 2)) // added
	b.apply()
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "added", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCReportedLunsChanged)
	if len(c.async) != 1 {
		t.Fatalf("%d asynchronous messages", len(c.async))
	}
	if raw, _, err := iscsi.ParseSense(c.async[0]); err != nil {
		t.Error(err)
	} else if s, err := scsi.ParseSense(raw); err != nil || s.Code != scsi.ASCReportedLunsChanged {
		t.Error(s, err)
	}
	c.do(2, scsi.TestUnitReady(), nil, 0).want(t, "added", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCReportedLunsChanged)
	c.do(2, scsi.TestUnitReady(), nil, 0).want(t, "added", scsi.StatusGood, 0, 0)
	// REPORT LUNS is the answer to it.
	c.do(0, scsi.ReportLunsCDB(0, 256), nil, 256)
	c.do(1, scsi.TestUnitReady(), nil, 0).want(t, "after REPORT LUNS", scsi.StatusGood, 0, 0)

	if err := tgt.LUNs[0].Device.(*mem.Mem).Resize(2 << 20); err != nil { // grown
		t.Fatal(err)
	}
	b.apply()
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "grown", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCCapacityChanged)
	if k, _ := scsi.ParseCapacity16(c.do(0, scsi.ReadCapacity16CDB(32), nil, 32).data); k.LastLBA != 4095 {
		t.Error(k)
	}

	gone := tgt.LUNs[1]
	tgt.LUNs = append(tgt.LUNs[:1:1], tgt.LUNs[2]) // removed
	b.apply()
	c.do(1, scsi.TestUnitReady(), nil, 0).want(t, "removed", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCLUNotSupported)
	c.clearUA(0)

	other := lunOf(t, 1) // the number comes back with other bytes: the old session must not see them
	other.Volume = "other"
	tgt.LUNs = append(tgt.LUNs, other)
	b.apply()
	c.gone()
	_ = gone

	c = b.ready(loginOpt{})
	tgt.LUNs[0].Generation++
	b.apply()
	c.gone()

	c = b.ready(loginOpt{})
	tgt.ACL = ACL{Names: []string{"iqn.2026-01.net.host:q"}} // no longer allowed
	b.apply()
	c.gone()
	tgt.ACL = ACL{Open: true}
	b.apply()

	c = b.ready(loginOpt{})
	keep := b.conf.Targets
	b.conf.Targets = nil // removed whole, its portal too
	b.apply()
	c.gone()
	if n := len(b.srv.Sessions()); n != 0 {
		t.Errorf("%d sessions", n)
	}
	if _, ok := b.srv.Addr(anyPort); ok {
		t.Error("the portal is still open")
	}
	b.conf.Targets = keep
	b.apply()
	b.ready(loginOpt{})
}

// TestApplyDrains: an entry is gone only when its commands have left the backend.
func TestApplyDrains(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	hold := make(chan struct{})
	f := fault.New(l.Device, fault.Rule{Ops: fault.Write, Hold: hold})
	l.Device = f
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	c.send(c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0), make([]byte, 512))
	waitFor(t, func() bool { return f.Hits() == 1 })
	b.conf.Targets[0].LUNs = nil
	done := make(chan struct{})
	go func() { b.apply(); close(done) }()
	select {
	case <-done:
		t.Fatal("Apply returned with a command in the backend")
	case <-time.After(50 * time.Millisecond):
	}
	close(hold)
	<-done
}

func waitFor(t testing.TB, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come about")
		}
	}
}

func TestBusyPort(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{})
	b.conf.Targets[0].Portals = []netip.AddrPort{addrPort(l.Addr())}
	err = b.srv.Apply(b.conf)
	if !errors.Is(err, ErrPortBusy) || !strings.Contains(err.Error(), "target.test") {
		t.Errorf("%v", err)
	}
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "a failed Apply changes nothing", scsi.StatusGood, 0, 0)
}

// An optional portal that is held keeps nothing else from being served; it opens
// when it is free, and closing one leaves its sessions.
func TestOptionalPortal(t *testing.T) {
	t.Parallel()
	held, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{}) // through the portal that is there now
	first, p := b.conf.Targets[0].Portals[0], addrPort(held.Addr())
	b.conf.Targets[0].Portals = []netip.AddrPort{first, p}
	b.conf.Targets[0].Alias = "changed"
	b.conf.Optional = []netip.AddrPort{p}
	if err := b.srv.Apply(b.conf); err != nil {
		t.Fatal(err)
	}
	if err := b.srv.Unopened()[p]; !errors.Is(err, ErrPortBusy) || !strings.Contains(err.Error(), "target.test") || len(b.srv.Unopened()) != 1 {
		t.Errorf("%v", b.srv.Unopened())
	}
	if _, ok := b.srv.Addr(first); !ok {
		t.Error("the other portal is closed")
	}
	if _, ok := b.srv.Addr(p); ok {
		t.Error("it is open all the same")
	}
	_ = held.Close()
	if err := b.srv.Apply(b.conf); err != nil || len(b.srv.Unopened()) != 0 {
		t.Fatalf("%v, %v", err, b.srv.Unopened())
	}
	if nc, err := net.Dial("tcp", p.String()); err != nil {
		t.Error(err)
	} else {
		_ = nc.Close()
	}
	b.conf.Targets[0].Portals, b.conf.Optional = []netip.AddrPort{p}, nil
	if err := b.srv.Apply(b.conf); err != nil {
		t.Fatal(err)
	}
	if _, ok := b.srv.Addr(first); ok {
		t.Error("a portal that is gone is open")
	}
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "its session stays", scsi.StatusGood, 0, 0)
}

// countGate is a gate that a test steers.
type countGate struct {
	inside, entered atomic.Int64
	in              atomic.Int64
	enter, leave    atomic.Pointer[error]
	inquire         atomic.Bool // OpInquire passes
}

func (g *countGate) Incarnation() Incarnation { return Incarnation(g.in.Load()) }

func (g *countGate) set(enter, leave error) {
	g.enter.Store(&enter)
	g.leave.Store(&leave)
}

func (g *countGate) Enter(in Incarnation, op Op) error {
	if e := g.enter.Load(); e != nil && *e != nil && op != OpLogin && (op != OpInquire || !g.inquire.Load()) {
		return *e
	}
	if in != g.Incarnation() {
		return ErrReset
	}
	g.entered.Add(1)
	g.inside.Add(1)
	return nil
}

func (g *countGate) Leave(in Incarnation, op Op) error {
	g.inside.Add(-1)
	if e := g.leave.Load(); e != nil && *e != nil && op != OpLogin {
		return *e
	}
	return nil
}

func TestGate(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	g := &countGate{}
	l.Gate = g
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{keys: kv("InitialR2T=Yes", "ImmediateData=No")})
	before := g.entered.Load()
	c.do(0, scsi.Write(0, 4, false), make([]byte, 2048), 0).want(t, "write", scsi.StatusGood, 0, 0)
	if g.entered.Load() == before || g.inside.Load() != 0 {
		t.Errorf("entered %d times, %d inside", g.entered.Load()-before, g.inside.Load())
	}
	for err, code := range map[error]scsi.ASC{ErrStandby: scsi.ASCStandby, ErrUnavailable: scsi.ASCUnavailable, ErrNotReady: scsi.ASCTransition, ErrUnsure: scsi.ASCTransition} {
		g.set(err, nil)
		r := c.do(0, scsi.Read(0, 1), nil, 512)
		r.want(t, err.Error(), scsi.StatusCheckCondition, scsi.NotReady, code)
		if !errors.Is(err, ErrUnsure) {
			r = c.do(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
			r.want(t, err.Error(), scsi.StatusCheckCondition, scsi.NotReady, code)
			if r.r2ts > 0 {
				t.Errorf("%v: data were asked for", err)
			}
		}
	}
	// Unsure, then sure: the command is held and runs.
	g.set(ErrUnsure, nil)
	c.send(c.command(0, scsi.Read(0, 1), nil, 512))
	time.Sleep(20 * time.Millisecond)
	g.set(nil, nil)
	var in iscsi.DataIn
	if d := c.must(&in); len(d) != 512 || !in.HasStatus {
		t.Error("held command", in)
	}
	// Nobody waits for a gate that is unsure but who asked it.
	g.set(ErrUnsure, nil)
	c.send(c.command(0, scsi.TestUnitReady(), nil, 0))
	begin := time.Now()
	c.nop(nil)
	if d := time.Since(begin); d > holdLimit*4/5 {
		t.Errorf("NOP was held up for %s", d)
	}
	g.set(nil, nil)
	var sr iscsi.ScsiResponse
	c.must(&sr)
	// READ CAPACITY is answered in every state.
	g.set(ErrStandby, nil)
	g.inquire.Store(true)
	c.do(0, scsi.ReadCapacity16CDB(32), nil, 32).want(t, "capacity in standby", scsi.StatusGood, 0, 0)
	g.inquire.Store(false)
	// The lease ended while it ran: no status, ever.
	for name, f := range map[string]func(){
		"enter":       func() { g.set(ErrReset, nil) },
		"leave":       func() { g.set(nil, ErrReset) },
		"incarnation": func() { g.in.Add(1) },
	} {
		g.set(nil, nil)
		c = b.ready(loginOpt{})
		f()
		p := c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
		c.send(p, make([]byte, 512))
		if bh, _, err := c.recv(); err == nil {
			t.Errorf("%s: answered with %s", name, bh.Opcode())
		}
	}
	waitFor(t, func() bool { return g.inside.Load() == 0 && len(b.srv.Sessions()) == 0 })
}

// TestStalledDisk: the disk hangs, NOP is answered and the reader reads on,
// whether the command ran on the reader or on a worker.
func TestStalledDisk(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	hold := make(chan struct{})
	f := fault.New(l.Device)
	l.Device = f
	b := newBench(t, Options{}, l, lunOf(t, 1))
	c := b.ready(loginOpt{})
	for range 50 { // makes the unit look fast, so that the next runs on the reader
		c.do(0, scsi.Read(0, 1), nil, 512)
	}
	f.Set(fault.Rule{Ops: fault.Read | fault.Flush, Hold: hold})
	for i := range 4 {
		c.send(c.command(0, scsi.Read(uint64(i), 1), nil, 512))
	}
	c.send(c.command(0, scsi.SynchronizeCache(0, 0), nil, 0))
	begin := time.Now()
	if got := c.nop([]byte("ping")); string(got) != "ping" {
		t.Errorf("%q", got)
	}
	if d := time.Since(begin); d > time.Second {
		t.Errorf("NOP took %s", d)
	}
	r, err := c.tryDo(c.command(1, scsi.Read(0, 1), nil, 512), nil)
	if err != nil || r.status != scsi.StatusGood {
		t.Errorf("another unit is held up: %v %v", r, err)
	}
	close(hold)
	got := map[iscsi.Opcode]int{}
	for range 5 {
		bh, _, err := c.recv()
		if err != nil {
			t.Fatal(err)
		}
		got[bh.Opcode()]++
	}
	if got[iscsi.OpDataIn] != 4 || got[iscsi.OpScsiResponse] != 1 {
		t.Error(got)
	}
	c.do(0, scsi.Read(0, 1), nil, 512).want(t, "afterwards", scsi.StatusGood, 0, 0)
}

// TestTaskManagement: an aborted task gets no response, and the function is
// answered only when the backend is done with it.
func TestTaskManagement(t *testing.T) {
	t.Parallel()
	for _, fn := range []iscsi.TaskFunc{iscsi.FuncAbortTask, iscsi.FuncAbortTaskSet, iscsi.FuncClearTaskSet, iscsi.FuncLUReset, iscsi.FuncTargetWarmReset} {
		t.Run(fn.String(), func(t *testing.T) {
			t.Parallel()
			l := lunOf(t, 0)
			hold := make(chan struct{})
			f := fault.New(l.Device)
			l.Device = f
			b := newBench(t, Options{}, l)
			c := b.ready(loginOpt{})
			other := b.ready(loginOpt{name: "iqn.2026-01.net.host:o"})
			f.Set(fault.Rule{Ops: fault.Write, Hold: hold})
			run := c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
			c.send(run, make([]byte, 512))
			waitFor(t, func() bool { return f.Hits() == 1 })
			c.tmf(fn, 0, run.ITT, run.CmdSN)
			c.limit = 50 * time.Millisecond
			if bh, _, err := c.recv(); err == nil {
				t.Fatalf("%s before the write has left the backend", bh.Opcode())
			}
			close(hold)
			c.limit = 10 * time.Second
			var r iscsi.TaskMgmtResponse
			c.must(&r)
			if r.Response != iscsi.TaskComplete {
				t.Error(r.Response)
			}
			f.Set()
			c.clearUA(0)
			u := other.do(0, scsi.TestUnitReady(), nil, 0)
			switch fn {
			case iscsi.FuncLUReset:
				u.want(t, "other nexus", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCDeviceReset)
			case iscsi.FuncTargetWarmReset:
				u.want(t, "other nexus", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCBusReset)
			default:
				u.want(t, "other nexus", scsi.StatusGood, 0, 0)
			}
		})
	}
}

func TestTaskManagementAnswers(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{keys: kv("InitialR2T=Yes", "ImmediateData=No")})
	ask := func(fn iscsi.TaskFunc, l scsi.LUN, ref uint32, sn iscsi.Serial, want iscsi.TaskResp) {
		t.Helper()
		c.tmf(fn, l, ref, sn)
		var r iscsi.TaskMgmtResponse
		c.must(&r)
		if r.Response != want {
			t.Errorf("%s: %s, want %s", fn, r.Response, want)
		}
	}
	ask(iscsi.FuncAbortTask, 0, 0x999, c.cmdSN-1, iscsi.TaskNotFound)
	ask(iscsi.FuncAbortTask, 7, 0x999, c.cmdSN-1, iscsi.TaskNoLUN)
	ask(iscsi.FuncClearACA, 0, iscsi.ReservedTag, 0, iscsi.TaskFunctionNotSupported)
	ask(iscsi.FuncTaskReassign, 0, 0x999, 0, iscsi.TaskReassignNotSupported)
	ask(iscsi.TaskFunc(55), 0, iscsi.ReservedTag, 0, iscsi.TaskRejected)
	// A task that waits for its data.
	p := c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
	c.send(p)
	var r2t iscsi.R2T
	c.must(&r2t)
	ask(iscsi.FuncAbortTask, 0, p.ITT, p.CmdSN, iscsi.TaskComplete)
	// Its Data-Out comes too late and is dropped without a word.
	c.send(&iscsi.DataOut{Final: true, LUN: p.LUN, ITT: p.ITT, TTT: r2t.TTT}, bytes.Repeat([]byte{0xEE}, 512))
	if r := c.do(0, scsi.Read(0, 1), nil, 512); r.status != scsi.StatusGood || r.data[0] != 0 {
		t.Error("an aborted write was done", r.status)
	}
	// A command that was not received yet counts as received.
	missing := c.cmdSN
	c.cmdSN++
	next := c.command(0, scsi.TestUnitReady(), nil, 0)
	c.send(next) // waits for the missing one
	c.tmf(iscsi.FuncAbortTask, 0, 0x777, missing)
	for range 2 { // in either order
		bh, _, err := c.recv()
		switch {
		case err != nil:
			t.Fatal(err)
		case bh.Opcode() == iscsi.OpScsiResponse && bh.ITT() == next.ITT: // now it is its turn
		case bh.Opcode() == iscsi.OpTaskMgmtResp && bh[2] == byte(iscsi.TaskComplete):
		default:
			t.Errorf("%s for task %d", bh.Opcode(), bh.ITT())
		}
	}
}

// TestCmdSN: out of order inside the window waits, outside is dropped. Simple
// tasks may be answered in any order; that they were delivered in theirs shows on
// the blocks that they overlap in.
func TestCmdSN(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{QueueDepth: 8}, lunOf(t, 0))
	c := b.ready(loginOpt{})
	block := func(fill byte, n int) []byte { return bytes.Repeat([]byte{fill}, n*512) }
	first := c.command(0, scsi.Write(0, 3, false), block('1', 3), 0)
	second := c.command(0, scsi.Write(1, 2, false), block('2', 2), 0)
	third := c.command(0, scsi.Write(2, 1, false), block('3', 1), 0)
	far := *c.command(0, scsi.Write(0, 3, false), block('f', 3), 0)
	far.CmdSN, far.ITT, c.cmdSN = c.maxCmd+1, 0x5000, c.cmdSN-1
	old := far
	old.CmdSN, old.ITT = first.CmdSN-1, 0x5001
	c.send(&far, block('f', 3))
	c.send(&old, block('o', 3))
	c.send(third, block('3', 1))
	c.send(second, block('2', 2))
	c.send(first, block('1', 3))
	left := map[uint32]bool{first.ITT: true, second.ITT: true, third.ITT: true}
	for range 3 {
		var r iscsi.ScsiResponse
		c.must(&r)
		if !left[r.ITT] || r.Status != uint8(scsi.StatusGood) {
			t.Errorf("task %#x answered with status %#x", r.ITT, r.Status)
		}
		delete(left, r.ITT)
	}
	c.nop(nil)
	if d := c.maxCmd.Diff(c.cmdSN); d != 7 {
		t.Errorf("window of %d", d+1)
	}
	if r := c.do(0, scsi.Read(0, 3), nil, 3*512); !bytes.Equal(r.data, slices.Concat(block('1', 1), block('2', 1), block('3', 1))) {
		t.Errorf("the writes were done in the order %c %c %c", r.data[0], r.data[512], r.data[1024])
	}
}

func TestPing(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{NopInterval: 100 * time.Millisecond, NopTimeout: 300 * time.Millisecond}, lunOf(t, 0))
	c := b.ready(loginOpt{})
	for range 3 {
		var p iscsi.NopIn
		c.must(&p)
		if p.ITT != iscsi.ReservedTag || p.TTT == iscsi.ReservedTag {
			t.Fatalf("%+v", p)
		}
		c.send(&iscsi.NopOut{Immediate: true, LUN: p.LUN, ITT: iscsi.ReservedTag, TTT: p.TTT, CmdSN: c.cmdSN, ExpStatSN: c.expSN})
	}
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "alive", scsi.StatusGood, 0, 0)
	c.gone() // and silent from here
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 0 })
}

// TestCut: CutInitiator returns when the victim's write has left the backend,
// and not before; the initiator stays out; its reservation is gone.
func TestCut(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	hold := make(chan struct{})
	f := fault.New(l.Device)
	l.Device = f
	b := newBench(t, Options{}, l)
	victim := b.ready(loginOpt{name: "iqn.2026-01.net.host:v"})
	other := b.ready(loginOpt{name: "iqn.2026-01.net.host:o"})
	reg := func(c *client, key uint64) {
		cdb, _ := scsi.PersistentReserveOut(scsi.SARegister, 0, 24)
		c.do(0, cdb, (&scsi.PROut{NewKey: key}).Bytes(scsi.SARegister), 0).want(t, "register", scsi.StatusGood, 0, 0)
	}
	reg(victim, 1)
	reg(other, 2)
	cdb, _ := scsi.PersistentReserveOut(scsi.SAReserve, scsi.PRWriteExclusiveRegOnly, 24)
	victim.do(0, cdb, (&scsi.PROut{Key: 1}).Bytes(scsi.SAReserve), 0).want(t, "reserve", scsi.StatusGood, 0, 0)

	f.Set(fault.Rule{Ops: fault.Write, Hold: hold})
	victim.send(victim.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0), make([]byte, 512))
	waitFor(t, func() bool { return f.Hits() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.srv.CutInitiator(ctx, []string{"iqn.2026-01.net.host:V"}, 5); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("acknowledged with a write in the backend: %v", err)
	}
	victim.gone()
	if st := dial(t, b.addr()).tryLogin(loginOpt{name: "iqn.2026-01.net.host:v"}); st != iscsi.StatusForbidden {
		t.Error(st)
	}
	// The configuration that names the cut does not wait for the stuck write.
	b.conf.Cut = map[string]uint64{"iqn.2026-01.net.host:v": 5}
	applied := make(chan error, 1)
	go func() { applied <- b.srv.Apply(b.conf) }()
	select {
	case err := <-applied:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a stuck disk holds the configuration up")
	}
	close(hold)
	f.Set()
	if err := b.srv.CutInitiator(t.Context(), []string{"iqn.2026-01.net.host:v"}, 5); err != nil {
		t.Fatal(err)
	}
	other.do(0, scsi.TestUnitReady(), nil, 0).want(t, "told", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCReservationsReleased)
	in, _ := scsi.PersistentReserveIn(scsi.SAReadKeys, 256)
	if _, keys, err := scsi.ParseReadKeys(other.do(0, in, nil, 256).data); err != nil || len(keys) != 1 || keys[0] != 2 {
		t.Error(keys, err)
	}
	b.conf.Cut = map[string]uint64{"iqn.2026-01.net.host:v": 5} // level-triggered: still out
	b.apply()
	if st := dial(t, b.addr()).tryLogin(loginOpt{name: "iqn.2026-01.net.host:v"}); st != iscsi.StatusForbidden {
		t.Error(st)
	}
	b.conf.Cut = nil // admitted again
	b.apply()
	b.login(loginOpt{name: "iqn.2026-01.net.host:v"})
}

func TestResetSessions(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	a := b.ready(loginOpt{name: "iqn.2026-01.net.host:a"})
	c := b.ready(loginOpt{name: "iqn.2026-01.net.host:c"})
	c.do(0, scsi.Read(0, 2), nil, 1024)
	ss := b.srv.Sessions()
	if len(ss) != 2 || ss[1].Initiator != "iqn.2026-01.net.host:c" || ss[1].ReadBytes != 1024 || ss[1].Reads() != 1 || ss[1].Target != testIQN {
		t.Errorf("%+v", ss)
	}
	if n := b.srv.ResetSessions(func(i SessionInfo) bool { return i.Initiator == "iqn.2026-01.net.host:a" }); n != 1 {
		t.Error(n)
	}
	a.gone()
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "the other", scsi.StatusGood, 0, 0)
}

// TestReadOnly: every writing opcode is 07/27/00.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	l := lunOn(0, able(t, 1<<20))
	l.ReadOnly = true
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	for _, cmd := range scsi.Commands {
		if handlers[cmd] == nil || cmd.Effect != scsi.EffectWrite {
			continue
		}
		var args []scsi.Arg
		if cmd.Op == scsi.OpWriteAtomic16 {
			args = append(args, scsi.Arg{ID: scsi.FCount, Value: 8})
		} else if cmd.Has(scsi.FCount) {
			args = append(args, scsi.Arg{ID: scsi.FCount, Value: 1})
		}
		if cmd.Has(scsi.FParamLen) && (cmd.Op != scsi.OpSanitize || cmd.SA == scsi.SASanitizeOverwrite) {
			args = append(args, scsi.Arg{ID: scsi.FParamLen, Value: 24})
		}
		x, err := scsi.Build(cmd.Op, cmd.SA, args...)
		if err != nil {
			t.Fatal(err)
		}
		c.do(0, x, make([]byte, x.TransferLength(512)), 0).want(t, cmd.Name, scsi.StatusCheckCondition, scsi.DataProtect, scsi.ASCWriteProtected)
	}
	d := c.do(0, scsi.ModeSense10(scsi.ModeCaching, 0, 256), nil, 256)
	if m, _, err := scsi.ParseMode(d.data, true); err != nil || !m.WriteProtect {
		t.Error(m, err)
	}
}

// TestDeviceErrors: what a store reports becomes the sense of block/device.go.
func TestDeviceErrors(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	f := fault.New(l.Device)
	l.Device = f
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	for _, x := range []struct {
		err  error
		ops  fault.Op
		key  scsi.Key
		code scsi.ASC
	}{
		{block.ErrMedium, fault.Read, scsi.MediumError, scsi.ASCReadError},
		{block.ErrChecksum, fault.Read, scsi.MediumError, scsi.ASCReadError},
		{block.ErrMedium, fault.Write, scsi.MediumError, scsi.ASCWriteError},
		{block.ErrNoSpace, fault.Write, scsi.DataProtect, scsi.ASCSpaceAllocationFailed},
		{block.ErrReadOnly, fault.Write, scsi.DataProtect, scsi.ASCWriteProtected},
		{block.ErrFlushFailed, fault.Flush, scsi.MediumError, scsi.ASCWriteError},
		{block.ErrClosed, fault.Read, scsi.NotReady, scsi.ASCUnavailable},
		{errors.New("anything"), fault.Read, scsi.HardwareError, scsi.ASCInternalFailure},
	} {
		f.Set(fault.Rule{Ops: x.ops, Err: fmt.Errorf("store: %w", x.err)})
		var r result
		switch x.ops {
		case fault.Read:
			r = c.do(0, scsi.Read(0, 1), nil, 512)
			if len(r.data) > 0 {
				t.Errorf("%v: %d bytes came", x.err, len(r.data))
			}
		case fault.Write:
			r = c.do(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
		case fault.Flush:
			r = c.do(0, scsi.SynchronizeCache(0, 0), nil, 0)
		}
		r.want(t, x.err.Error(), scsi.StatusCheckCondition, x.key, x.code)
	}
	// Fenced: no status at all.
	f.Set(fault.Rule{Ops: fault.Write, Err: block.ErrFenced})
	c.send(c.command(0, scsi.Write(0, 1, false), make([]byte, 512), 0), make([]byte, 512))
	if bh, _, err := c.recv(); err == nil {
		t.Errorf("a fenced write was answered with %s", bh.Opcode())
	}
}

// TestFUA: what was acknowledged with FUA, or after a flush, survives a power
// cut; with the write cache switched off everything does.
func TestFUA(t *testing.T) {
	t.Parallel()
	m, err := mem.New(1<<20, 512)
	if err != nil {
		t.Fatal(err)
	}
	pc := fault.NewPowerCut(m)
	b := newBench(t, Options{}, lunOn(0, pc))
	c := b.ready(loginOpt{})
	w := func(lba uint64, fua bool) {
		c.do(0, scsi.Write(lba, 1, fua), bytes.Repeat([]byte{byte(lba)}, 512), 0).want(t, "write", scsi.StatusGood, 0, 0)
	}
	w(1, false)
	c.do(0, scsi.SynchronizeCache(0, 0), nil, 0).want(t, "flush", scsi.StatusGood, 0, 0)
	w(2, true)
	w(3, false)
	// MODE SELECT with WCE = 0.
	d := c.do(0, scsi.ModeSense10(scsi.ModeCaching, 0, 256), nil, 256)
	ms, _, err := scsi.ParseMode(d.data, true)
	if err != nil {
		t.Fatal(err)
	}
	if ms.Pages[0].Body[0]&cachingWCE == 0 {
		t.Fatal("WCE is not set")
	}
	ms.Pages[0].Body[0] &^= cachingWCE
	list := ms.Bytes10()
	sel, _ := scsi.Build(scsi.OpModeSelect10, scsi.NoSA, scsi.Arg{ID: scsi.FPF, Value: 1}, scsi.Arg{ID: scsi.FParamLen, Value: uint64(len(list))})
	c.do(0, sel, list, 0).want(t, "mode select", scsi.StatusGood, 0, 0)
	w(4, false)
	if err := pc.Cut(func(int64, int) int { return 0 }); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	for lba := range byte(5) {
		if err := m.ReadAt(t.Context(), p, int64(lba)*512); err != nil || p[0] != lba {
			t.Errorf("block %d is lost: %d %v", lba, p[0], err)
		}
	}
}

// TestNoCache: a LUN without a write cache begins with WCE 0, and no write needs FUA.
func TestNoCache(t *testing.T) {
	t.Parallel()
	m, err := mem.New(1<<20, 512)
	if err != nil {
		t.Fatal(err)
	}
	pc := fault.NewPowerCut(m)
	l := lunOn(0, pc)
	l.NoCache = true
	c := newBench(t, Options{}, l).ready(loginOpt{})
	ms, _, err := scsi.ParseMode(c.do(0, scsi.ModeSense10(scsi.ModeCaching, 0, 256), nil, 256).data, true)
	if err != nil || ms.Pages[0].Body[0]&cachingWCE != 0 {
		t.Errorf("%+v, %v", ms, err)
	}
	c.do(0, scsi.Write(3, 1, false), bytes.Repeat([]byte{3}, 512), 0).want(t, "write", scsi.StatusGood, 0, 0)
	if err := pc.Cut(func(int64, int) int { return 0 }); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	if err := m.ReadAt(t.Context(), p, 3*512); err != nil || p[0] != 3 {
		t.Errorf("an acknowledged write is lost: %d %v", p[0], err)
	}
}

// TestResiduals of commands whose expected length is not the CDB's.
func TestResiduals(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{})
	r := c.do(0, scsi.Read(0, 2), nil, 512)
	if !r.over || r.residual != 512 || len(r.data) != 512 {
		t.Errorf("%+v", r)
	}
	r = c.do(0, scsi.Read(0, 1), nil, 10000)
	if !r.under || r.residual != 9488 || len(r.data) != 512 {
		t.Errorf("%+v", r)
	}
	r = c.do(0, scsi.InquiryCDB(96), nil, 0)
	if r.status != scsi.StatusGood || !r.over || r.residual != 96 {
		t.Errorf("%+v", r)
	}
	r = c.do(0, scsi.Write(0, 1, false), bytes.Repeat([]byte{1}, 1024), 0)
	if r.status != scsi.StatusGood || !r.under || r.residual != 512 {
		t.Errorf("%+v", r)
	}
	if d := c.do(0, scsi.Read(0, 2), nil, 1024).data; d[0] != 1 || d[512] != 0 {
		t.Error("more than the CDB's block was written")
	}
	r = c.do(0, scsi.Write(4, 2, false), bytes.Repeat([]byte{2}, 512), 0)
	if !r.over || r.residual != 512 {
		t.Errorf("%+v", r)
	}
	if d := c.do(0, scsi.Read(4, 2), nil, 1024).data; d[0] != 2 || d[512] != 0 {
		t.Error("the second block was written without data")
	}
}

// TestRangeQueue: against a model, no two overlapping locks are held at once,
// and overlapping ones are granted in order.
func TestRangeQueue(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		var q rangeQueue
		var order []*rangeLock
		held := map[*rangeLock]bool{}
		grant := func(l *rangeLock) {
			for h := range held {
				if h.overlaps(l) {
					r.Fatalf("[%d,%d) granted beside [%d,%d)", l.lo, l.hi, h.lo, h.hi)
				}
			}
			for _, e := range order {
				if e == l {
					break
				}
				if !e.gone && e.overlaps(l) {
					r.Fatalf("[%d,%d) overtook [%d,%d)", l.lo, l.hi, e.lo, e.hi)
				}
			}
			held[l] = true
		}
		for range rapid.IntRange(1, 60).Draw(r, "n") {
			switch rapid.IntRange(0, 3).Draw(r, "op") {
			case 0, 1:
				lo := rapid.Uint64Range(0, 10).Draw(r, "lo")
				l := &rangeLock{lo: lo, hi: lo + rapid.Uint64Range(1, 5).Draw(r, "len"), excl: rapid.Bool().Draw(r, "excl")}
				l.t = &task{}
				locks[l.t] = l
				if q.add(l) {
					grant(l)
				}
				order = append(order, l)
			default:
				if len(order) == 0 {
					continue
				}
				l := order[rapid.IntRange(0, len(order)-1).Draw(r, "which")]
				if l.gone {
					continue
				}
				var ready []*task
				if held[l] {
					delete(held, l)
					ready = q.release(l)
				} else {
					var ok bool
					if ok, ready = q.cancel(l); !ok {
						r.Fatal("a waiting lock cannot be cancelled")
					}
				}
				for _, x := range ready {
					grant(locks[x])
				}
			}
		}
		// Everything ends: no lock waits for nothing.
		for len(held) > 0 {
			for l := range held {
				delete(held, l)
				for _, x := range q.release(l) {
					grant(locks[x])
				}
				break
			}
		}
		for _, l := range order {
			if !l.gone {
				r.Fatalf("[%d,%d) was never granted", l.lo, l.hi)
			}
		}
	})
}

var locks = map[*task]*rangeLock{}

// TestOverlappingWrites: commands on the same block from one session take effect
// in the order of their arrival.
func TestOverlappingWrites(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	f := fault.New(l.Device, fault.Rule{Ops: fault.Write, Delay: time.Millisecond})
	l.Device = f
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	const n = 40
	for i := range n {
		p := bytes.Repeat([]byte{byte(i + 1)}, 512)
		c.send(c.command(0, scsi.Write(uint64(i%2), 1, false), p, 0), p)
	}
	for range n {
		var r iscsi.ScsiResponse
		c.must(&r)
		if r.Status != 0 {
			t.Fatal(r)
		}
	}
	d := c.do(0, scsi.Read(0, 2), nil, 1024).data
	if d[0] != n-1 || d[512] != n {
		t.Errorf("the last writes were %d and %d", d[0], d[512])
	}
}

// TestManySessions under the race detector.
func TestManySessions(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0), lunOf(t, 1))
	var wg sync.WaitGroup
	for i := range 64 {
		c := b.ready(loginOpt{name: fmt.Sprintf("iqn.2026-01.net.host:%d", i),
			keys: kv("MaxBurstLength=4096", "FirstBurstLength=1024", "InitialR2T=No", fmt.Sprintf("ErrorRecoveryLevel=%d", i%2))})
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := bytes.Repeat([]byte{byte(i + 1)}, 8192)
			for k := range 10 {
				lba := uint64(i * 16)
				l := scsi.LUN(k % 2)
				r, err := c.tryDo(c.command(l, scsi.Write(lba, 16, k%5 == 0), p, 0), p)
				if err != nil || r.status != scsi.StatusGood {
					t.Errorf("session %d: %v %v", i, r, err)
					return
				}
				r, err = c.tryDo(c.command(l, scsi.Read(lba, 16), nil, 8192), nil)
				if err != nil || !bytes.Equal(r.data, p) {
					t.Errorf("session %d: read differs %v", i, err)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// TestReaderRole: commands on the reader that now and then take longer than
// inlineLimit pass the reading on, again and again, and nothing is read twice or
// lost.
func TestReaderRole(t *testing.T) {
	t.Parallel()
	m := lunOf(t, 0).Device
	sometimes := &hiccup{Device: m}
	b := newBench(t, Options{}, lunOn(0, sometimes))
	c := b.ready(loginOpt{})
	p := make([]byte, 512)
	for lba := range uint64(64) {
		p[0] = byte(lba)
		c.do(0, scsi.Write(lba, 1, false), p, 0).want(t, "write", scsi.StatusGood, 0, 0)
	}
	sometimes.on.Store(true)
	want := map[uint32]byte{}
	const n = 3000
	got := 0
	recvOne := func() {
		bh, d, err := c.recv()
		if err != nil {
			t.Fatal(err)
		}
		if bh.Opcode() != iscsi.OpDataIn || len(d) != 512 || d[0] != want[bh.ITT()] {
			t.Fatalf("%s for task %d: %d bytes", bh.Opcode(), bh.ITT(), len(d))
		}
		delete(want, bh.ITT())
		got++
	}
	for i := range n {
		q := c.command(0, scsi.Read(uint64(i%64), 1), nil, 512)
		want[q.ITT] = byte(i % 64)
		c.send(q)
		if i%3 == 2 { // a few in flight
			for len(want) > 0 {
				recvOne()
			}
		}
	}
	for len(want) > 0 {
		recvOne()
	}
	if got != n || sometimes.slow.Load() < 10 {
		t.Errorf("%d answers, %d slow", got, sometimes.slow.Load())
	}
}

// hiccup is a fast store that takes 5 ms for every 97th read.
type hiccup struct {
	block.Device
	on      atomic.Bool
	n, slow atomic.Int64
}

func (h *hiccup) ReadAt(ctx context.Context, p []byte, off int64) error {
	if h.on.Load() && h.n.Add(1)%97 == 0 {
		h.slow.Add(1)
		time.Sleep(5 * time.Millisecond)
	}
	return h.Device.ReadAt(ctx, p, off)
}

func TestRedirect(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	b.conf.Targets[0].Redirect = "192.0.2.7:3260,3"
	b.conf.Targets[0].Auth = Auth{Accounts: []Account{{"a", Secret("secret of twelve")}}} // asked before
	b.apply()
	c := dial(t, b.addr())
	if st := c.tryLogin(loginOpt{}); st != iscsi.StatusMovedTemporarily {
		t.Error(st)
	}
	if len(c.keys) != 1 || c.keys[0].Value != "192.0.2.7:3260,3" {
		t.Error(c.keys)
	}
	b.conf.Targets[0].RedirectForever = true
	b.apply()
	if st := dial(t, b.addr()).tryLogin(loginOpt{}); st != iscsi.StatusMovedPermanently {
		t.Error(st)
	}
	b.conf.Targets[0].Redirect = "nowhere:0"
	if err := b.srv.Apply(b.conf); err == nil {
		t.Error("a portal without a port was taken")
	}
}

// TestEarlyCommandsKeepTheRole: commands that waited for their turn behind a gap
// do not run on the reader, whatever PDU closes the gap.
func TestEarlyCommandsKeepTheRole(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	h := &hiccup{Device: l.Device}
	l.Device = h
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	h.on.Store(true)
	for range 150 {
		// A ping with a number of its own comes last and lets three reads through.
		gap := c.cmdSN
		c.cmdSN++
		want := map[uint32]bool{}
		for i := range 3 {
			p := c.command(0, scsi.Read(uint64(i), 1), nil, 512)
			want[p.ITT] = true
			c.send(p)
		}
		c.itt++
		want[c.itt] = true
		c.send(&iscsi.NopOut{ITT: c.itt, TTT: iscsi.ReservedTag, CmdSN: gap, ExpStatSN: c.expSN})
		for len(want) > 0 {
			bh, _, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			if !want[bh.ITT()] {
				t.Fatalf("%s for task %d", bh.Opcode(), bh.ITT())
			}
			delete(want, bh.ITT())
		}
	}
}
