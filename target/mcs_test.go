package target

import (
	"bytes"
	"context"
	"slices"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// multi is an initiator with several connections of one session. CmdSN is theirs
// together, and so are task tags.
type multi struct {
	t     testing.TB
	b     *bench
	o     loginOpt
	c     []*client
	cmdSN iscsi.Serial
	itt   uint32
}

// multi logs n connections in, with CIDs from 1.
func (b *bench) multi(n int, o loginOpt) *multi {
	b.t.Helper()
	o.cid = 1
	o.keys = append(kv("MaxConnections=4"), o.keys...)
	m := &multi{t: b.t, b: b, o: o, itt: 0x1000}
	m.c = []*client{b.ready(o)}
	m.cmdSN = m.c[0].cmdSN
	m.o.tsih = m.c[0].tsih
	for range n - 1 {
		c, st := m.join(uint16(len(m.c) + 1))
		if st != iscsi.StatusSuccess {
			b.t.Fatal(st)
		}
		m.c = append(m.c, c)
	}
	return m
}

// join tries to log another connection in.
func (m *multi) join(cid uint16) (*client, iscsi.LoginStatus) {
	m.t.Helper()
	o := m.o
	o.cid = cid
	o.keys = slices.DeleteFunc(slices.Clone(o.keys), func(p iscsi.Pair) bool { // what is negotiated once for all
		k, _ := iscsi.LookupKey(p.Key)
		return k.When == iscsi.WhenLeading
	})
	c := dial(m.t, m.b.addr())
	c.cmdSN = m.cmdSN
	st := c.tryLogin(o)
	c.p.MaxBurstLength, c.p.FirstBurstLength, c.p.InitialR2T = m.c[0].p.MaxBurstLength, m.c[0].p.FirstBurstLength, m.c[0].p.InitialR2T
	return c, st
}

// command makes the next command, to be sent on connection i.
func (m *multi) command(i int, cdb scsi.CDB, out []byte, in uint32) *iscsi.ScsiCommand {
	c := m.c[i]
	c.cmdSN, c.itt = m.cmdSN, m.itt
	p := c.command(0, cdb, out, in)
	m.cmdSN, m.itt = c.cmdSN, c.itt
	return p
}

func (m *multi) do(i int, cdb scsi.CDB, out []byte, in uint32) result {
	m.t.Helper()
	r, err := m.c[i].tryDo(m.command(i, cdb, out, in), out)
	if err != nil {
		m.t.Fatalf("%s on connection %d: %v", cdb.Cmd, i+1, err)
	}
	return r
}

// tmf sends a task management function on connection i and returns its tag.
func (m *multi) tmf(i int, f iscsi.TaskFunc, ref uint32, refSN iscsi.Serial) {
	c := m.c[i]
	c.cmdSN, c.itt = m.cmdSN, m.itt
	c.tmf(f, 0, ref, refSN)
	m.itt = c.itt
}

// silent tells that nothing comes on a connection.
func (c *client) silent(d time.Duration) {
	c.t.Helper()
	old := c.limit
	c.limit = d
	defer func() { c.limit = old }()
	if b, _, err := c.recv(); err == nil {
		c.t.Errorf("%s came early", b.Opcode())
	}
}

// Login to a session: who may join, and how many.
func TestConnections(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	m := b.multi(4, loginOpt{})
	if i := b.srv.Sessions(); len(i) != 1 || len(i[0].Conns) != 4 || i[0].Conns[2].CID != 3 || i[0].Remote != i[0].Conns[0].Remote {
		t.Errorf("%+v", i)
	}
	if _, st := m.join(5); st != iscsi.StatusTooManyConnections {
		t.Errorf("a fifth connection of four: %s", st)
	}
	for what, f := range map[string]func(o *loginOpt){
		"another ISID":      func(o *loginOpt) { o.isid = iscsi.ISID{9} },
		"another initiator": func(o *loginOpt) { o.name = "iqn.2026-01.net.host:b" },
		"no such TSIH":      func(o *loginOpt) { o.tsih += 7 },
		"a discovery":       func(o *loginOpt) { o.discovery = true },
	} {
		x := *m
		f(&x.o)
		if _, st := x.join(2); st != iscsi.StatusNoSession {
			t.Errorf("%s: %s", what, st)
		}
	}
	// A session that asked for one connection has one.
	one := b.login(loginOpt{isid: iscsi.ISID{1}})
	x := &multi{t: t, b: b, c: []*client{one}, o: loginOpt{isid: iscsi.ISID{1}, tsih: one.tsih}}
	if _, st := x.join(1); st != iscsi.StatusTooManyConnections {
		t.Error(st)
	}
	// Everybody still works, each on its own.
	p := bytes.Repeat([]byte{7}, 2048)
	for i := range m.c {
		m.do(i, scsi.Write(uint64(4*i), 4, false), p, 0).want(t, "write", scsi.StatusGood, 0, 0)
		if r := m.do(3-i, scsi.Read(uint64(4*i), 4), nil, 2048); !bytes.Equal(r.data, p) {
			t.Error("read differs")
		}
	}
}

// CmdSN is one order over all connections, and the answer comes where the command
// came.
func TestOrderOverConnections(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	m := b.multi(3, loginOpt{})
	old, mid, last := bytes.Repeat([]byte{1}, 512), bytes.Repeat([]byte{2}, 512), bytes.Repeat([]byte{3}, 512)
	first := m.command(0, scsi.Write(0, 1, false), old, 0)
	second := m.command(1, scsi.Write(0, 1, false), mid, 0)
	third := m.command(2, scsi.Write(0, 1, false), last, 0)
	m.c[2].send(third, last)
	m.c[1].send(second, mid)
	m.c[2].silent(50 * time.Millisecond)
	m.c[1].silent(time.Millisecond)
	m.c[0].send(first, old)
	for i, p := range []*iscsi.ScsiCommand{first, second, third} {
		r, err := m.c[i].finish(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.want(t, "write", scsi.StatusGood, 0, 0)
	}
	if r := m.do(1, scsi.Read(0, 1), nil, 512); !bytes.Equal(r.data, last) {
		t.Errorf("the last write was not last: %d", r.data[0])
	}
	// A write whose turn comes on another connection's reader: R2T and response keep
	// to its own.
	big := bytes.Repeat([]byte{4}, 64<<10)
	w := m.command(0, scsi.TestUnitReady(), nil, 0)
	p := m.command(1, scsi.Write(8, 128, false), big, 0)
	m.c[1].send(p)
	m.c[1].silent(20 * time.Millisecond)
	m.c[0].send(w)
	if r, err := m.c[1].finish(p, big); err != nil || r.status != scsi.StatusGood || r.r2ts == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := m.c[0].finish(w, nil); err != nil {
		t.Error(err)
	}
	// Data-Out on another connection than the command's is nobody's.
	p = m.command(1, scsi.Write(8, 128, false), big, 0)
	m.c[1].send(p)
	var r iscsi.R2T
	m.c[1].must(&r)
	m.c[2].send(&iscsi.DataOut{Final: true, LUN: p.LUN, ITT: p.ITT, TTT: r.TTT}, big[:r.Length])
	var rj iscsi.Reject
	if m.c[2].must(&rj); rj.Reason != iscsi.RejectInvalidField {
		t.Error(rj.Reason)
	}
	if err := m.c[1].burst(p, r.TTT, big, 0, int(r.Length)); err != nil {
		t.Fatal(err)
	}
	if x, err := m.c[1].finish(p, big); err != nil || x.status != scsi.StatusGood {
		t.Errorf("%+v, %v", x, err)
	}
}

// When a connection is lost its tasks end, the others go on, and the initiator fills
// the gap in CmdSN. The session ends with the last.
func TestConnectionLoss(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	m := b.multi(3, loginOpt{})
	big := bytes.Repeat([]byte{5}, 8192)
	p := m.command(1, scsi.Write(0, 16, false), big, 0) // waits for data
	m.c[1].send(p)
	var r2t iscsi.R2T
	m.c[1].must(&r2t)
	lost := m.command(1, scsi.TestUnitReady(), nil, 0)  // never arrives
	ahead := m.command(1, scsi.TestUnitReady(), nil, 0) // arrives, not due
	m.c[1].send(ahead)
	other := m.command(2, scsi.TestUnitReady(), nil, 0) // not due either
	m.c[2].send(other)
	waitFor(t, func() bool { return b.srv.Sessions()[0].Tasks == 3 })
	_ = m.c[1].nc.Close()
	waitFor(t, func() bool { i := b.srv.Sessions(); return len(i) == 1 && len(i[0].Conns) == 2 && i[0].Tasks == 1 })
	m.c[2].silent(20 * time.Millisecond)
	for _, x := range []*iscsi.ScsiCommand{lost, ahead} {
		m.tmf(0, iscsi.FuncAbortTask, x.ITT, x.CmdSN)
		var r iscsi.TaskMgmtResponse
		if m.c[0].must(&r); r.Response != iscsi.TaskComplete {
			t.Errorf("abort of what was lost: %s", r.Response)
		}
	}
	if r, err := m.c[2].finish(other, nil); err != nil || r.status != scsi.StatusGood {
		t.Errorf("%+v, %v", r, err)
	}
	m.do(0, scsi.TestUnitReady(), nil, 0).want(t, "command", scsi.StatusGood, 0, 0)
	// The number may be used again, by a new connection of the session.
	c, st := m.join(2)
	if st != iscsi.StatusSuccess {
		t.Fatal(st)
	}
	m.c[1] = c
	m.do(1, scsi.Read(0, 1), nil, 512).want(t, "read", scsi.StatusGood, 0, 0)
	for _, c := range m.c {
		_ = c.nc.Close()
	}
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 0 })
	if c, st := m.join(1); st != iscsi.StatusNoSession {
		t.Errorf("the session outlived its connections: %s, %v", st, c)
	}
}

// Logout of a connection, from itself and from another; of one for recovery, which
// takes error recovery level 2; of the session.
func TestLogoutConnection(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	m := b.multi(4, loginOpt{})
	logout := func(i int, why iscsi.LogoutReason, cid uint16) iscsi.LogoutResult {
		t.Helper()
		c := m.c[i]
		m.itt++
		c.send(&iscsi.LogoutRequest{Immediate: true, Reason: why, ITT: m.itt, CID: cid, CmdSN: m.cmdSN, ExpStatSN: c.expSN})
		var r iscsi.LogoutResponse
		c.must(&r)
		return r.Response
	}
	if r := logout(0, iscsi.LogoutRecovery, 2); r != iscsi.LogoutNoRecovery {
		t.Error(r)
	}
	if r := logout(0, iscsi.LogoutConnection, 77); r != iscsi.LogoutCIDNotFound {
		t.Error(r)
	}
	big := bytes.Repeat([]byte{5}, 8192)
	p := m.command(1, scsi.Write(0, 16, false), big, 0)
	m.c[1].send(p)
	var r2t iscsi.R2T
	m.c[1].must(&r2t)
	if r := logout(0, iscsi.LogoutConnection, 2); r != iscsi.LogoutClosed {
		t.Error(r)
	}
	m.c[1].gone()
	if i := b.srv.Sessions(); len(i) != 1 || len(i[0].Conns) != 3 || i[0].Tasks != 0 {
		t.Errorf("%+v", i)
	}
	if r := logout(2, iscsi.LogoutConnection, 3); r != iscsi.LogoutClosed {
		t.Error(r)
	}
	m.c[2].gone()
	m.do(3, scsi.TestUnitReady(), nil, 0).want(t, "command", scsi.StatusGood, 0, 0)
	if r := logout(3, iscsi.LogoutSession, 0); r != iscsi.LogoutClosed {
		t.Error(r)
	}
	m.c[3].gone()
	m.c[0].gone()
	waitFor(t, func() bool { return len(b.srv.Sessions()) == 0 })
}

// A login with the number of a connection takes its place.
func TestConnectionReinstatement(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	m := b.multi(1, loginOpt{})
	big := bytes.Repeat([]byte{5}, 8192)
	p := m.command(0, scsi.Write(0, 16, false), big, 0)
	m.c[0].send(p)
	var r2t iscsi.R2T
	m.c[0].must(&r2t)
	c, st := m.join(1)
	if st != iscsi.StatusSuccess {
		t.Fatal(st)
	}
	m.c[0].gone()
	m.c[0] = c
	if i := b.srv.Sessions(); len(i) != 1 || len(i[0].Conns) != 1 || i[0].Tasks != 0 || i[0].TSIH != m.o.tsih {
		t.Errorf("%+v", i)
	}
	// No nexus was lost: no unit attention.
	m.do(0, scsi.TestUnitReady(), nil, 0).want(t, "command", scsi.StatusGood, 0, 0)
	if r := m.do(0, scsi.Read(0, 16), nil, 8192); !bytes.Equal(r.data, make([]byte, 8192)) {
		t.Error("a write without its data was done")
	}
}

// Task management over connections: it waits for commands sent before it, ends those
// of all connections, and its answer does not overtake theirs.
func TestTaskManagementOverConnections(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	m := b.multi(3, loginOpt{})
	big := bytes.Repeat([]byte{5}, 8192)
	p := m.command(1, scsi.Write(0, 16, false), big, 0)
	m.c[1].send(p)
	var r2t iscsi.R2T
	m.c[1].must(&r2t)
	m.do(1, scsi.TestUnitReady(), nil, 0)                  // an answer that is not acknowledged
	late := m.command(2, scsi.Write(0, 16, false), big, 0) // sent after the reset, numbered before it
	m.tmf(0, iscsi.FuncLUReset, iscsi.ReservedTag, 0)
	m.c[0].silent(30 * time.Millisecond)
	m.c[2].send(late)
	// The others have to say that they got everything before: connection 2 has not.
	m.c[0].silent(30 * time.Millisecond)
	for _, c := range m.c[1:] {
		for {
			bh, _, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			if bh.Opcode() == iscsi.OpNopIn {
				var n iscsi.NopIn
				_ = n.Decode(bh)
				c.send(&iscsi.NopOut{Immediate: true, ITT: iscsi.ReservedTag, TTT: n.TTT, CmdSN: m.cmdSN, ExpStatSN: c.expSN})
				break
			}
			if bh.Opcode() != iscsi.OpR2T {
				t.Errorf("%s on a connection whose task was reset", bh.Opcode())
			}
		}
	}
	var r iscsi.TaskMgmtResponse
	if m.c[0].must(&r); r.Response != iscsi.TaskComplete {
		t.Error(r.Response)
	}
	if i := b.srv.Sessions(); i[0].Tasks != 0 {
		t.Errorf("%d tasks outlived the reset", i[0].Tasks)
	}
	m.do(1, scsi.TestUnitReady(), nil, 0).want(t, "after a reset", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCDeviceReset)
	// ABORT TASK of a task on a connection that is gone by now.
	p = m.command(1, scsi.Write(0, 16, false), big, 0)
	m.c[1].send(p)
	m.c[1].must(&r2t)
	_ = m.c[1].nc.Close()
	waitFor(t, func() bool { return len(b.srv.Sessions()[0].Conns) == 2 })
	m.tmf(0, iscsi.FuncAbortTask, p.ITT, p.CmdSN)
	if bh, _, err := m.c[0].recv(); err != nil || bh.Opcode() != iscsi.OpTaskMgmtResp || r.Decode(bh) != nil || r.Response != iscsi.TaskNotFound {
		t.Errorf("%v %v %v", bh, err, r.Response)
	}
}

// A connection that does not answer pings is dropped, and the session hears of it on
// another one. A cut closes them all.
func TestSilentConnection(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{NopInterval: 100 * time.Millisecond, NopTimeout: 300 * time.Millisecond}, lunOf(t, 0))
	m := b.multi(2, loginOpt{})
	for seen := false; !seen; {
		bh, _, err := m.c[0].recv()
		if err != nil {
			t.Fatal(err)
		}
		switch bh.Opcode() {
		case iscsi.OpNopIn:
			var n iscsi.NopIn
			_ = n.Decode(bh)
			m.c[0].send(&iscsi.NopOut{Immediate: true, ITT: iscsi.ReservedTag, TTT: n.TTT, CmdSN: m.cmdSN, ExpStatSN: m.c[0].expSN})
		case iscsi.OpAsync:
			var a iscsi.Async
			if err := a.Decode(bh); err != nil || a.Event != iscsi.AsyncDropConnection || a.Param1 != 2 {
				t.Errorf("%+v, %v", a, err)
			}
			seen = true
		}
	}
	m.c[1].gone()
	m.do(0, scsi.TestUnitReady(), nil, 0).want(t, "command", scsi.StatusGood, 0, 0)
	c, st := m.join(2)
	if st != iscsi.StatusSuccess {
		t.Fatal(st)
	}
	if err := b.srv.CutInitiator(context.Background(), []string{"iqn.2026-01.net.host:a"}, 3); err != nil {
		t.Fatal(err)
	}
	c.gone()
	m.c[0].gone()
	if len(b.srv.Sessions()) != 0 {
		t.Error("the session outlived the cut")
	}
}

// Only the CHAP name that opened a session may join it.
func TestJoinAsAnother(t *testing.T) {
	t.Parallel()
	d, err := mem.New(1<<20, 512)
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, Options{}, lunOn(0, d))
	b.conf.Targets[0].Auth = Auth{Accounts: []Account{{"alice", Secret("secret of twelve")}, {"bob", Secret("twelve of secret")}}}
	b.apply()
	w := iscsi.DefaultWant()
	w.MaxConnections = 4
	login := func(user, secret string, cid, tsih uint16) (*client, error) {
		c := dial(t, b.addr())
		err := c.loginWith(iscsi.InitiatorLoginConfig{InitiatorName: "iqn.2026-01.net.host:a", TargetName: testIQN, CID: cid, TSIH: tsih, Want: w,
			CHAP: &iscsi.CHAPCredentials{User: user, Secret: []byte(secret)}})
		return c, err
	}
	if _, err := login("alice", "secret of twelve", 1, 0); err != nil {
		t.Fatal(err)
	}
	tsih := b.srv.Sessions()[0].TSIH
	if _, err := login("bob", "twelve of secret", 2, tsih); loginStatus(err) != iscsi.StatusAuthFailure {
		t.Errorf("bob joined alice's session: %v", err)
	}
	if _, err := login("alice", "secret of twelve", 2, tsih); err != nil {
		t.Error(err)
	}
	if i := b.srv.Sessions(); len(i) != 1 || len(i[0].Conns) != 2 {
		t.Errorf("%+v", i)
	}
}

// Initiators that are asked to log out are told on every connection; who does not in
// time is reset.
func TestDrain(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	m := b.multi(2, loginOpt{})
	deaf := b.ready(loginOpt{name: "iqn.2026-01.net.host:deaf"})
	other := b.ready(loginOpt{name: "iqn.2026-01.net.host:other"})
	type result struct{ drained, reset int }
	done := make(chan result, 1)
	go func() {
		n, k := b.srv.Drain(context.Background(), func(i SessionInfo) bool { return i.Initiator != "iqn.2026-01.net.host:other" }, 500*time.Millisecond)
		done <- result{n, k}
	}()
	for i, c := range m.c {
		var a iscsi.Async
		if c.must(&a); a.Event != iscsi.AsyncLogoutRequest || a.Param1 != uint16(i+1) || a.Param3 != 1 {
			t.Errorf("%+v", a)
		}
	}
	m.c[1].send(&iscsi.LogoutRequest{Immediate: true, Reason: iscsi.LogoutSession, ITT: 0x9999, CmdSN: m.cmdSN, ExpStatSN: m.c[1].expSN})
	var r iscsi.LogoutResponse
	m.c[1].must(&r)
	m.c[0].gone()
	if got := <-done; got != (result{2, 1}) {
		t.Errorf("%+v", got)
	}
	deaf.gone()
	other.do(0, scsi.TestUnitReady(), nil, 0).want(t, "another session", scsi.StatusGood, 0, 0)
	if n := len(b.srv.Sessions()); n != 1 {
		t.Errorf("%d sessions", n)
	}
}
