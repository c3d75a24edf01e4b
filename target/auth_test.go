package target

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// loginWith runs the initiator's login machine of iscsi against the server.
func (c *client) loginWith(cfg iscsi.InitiatorLoginConfig) error {
	c.t.Helper()
	cfg.ITT, cfg.CmdSN, cfg.Rand = 1, c.cmdSN, rand.Reader
	if cfg.InitiatorName == "" {
		cfg.InitiatorName = "iqn.2026-01.net.host:a"
	}
	if cfg.TargetName == "" && !cfg.Discovery {
		cfg.TargetName = testIQN
	}
	if cfg.Want.MaxRecv == 0 {
		cfg.Want = iscsi.DefaultWant()
	}
	m := iscsi.NewInitiatorLogin(cfg)
	req, data := m.Start()
	for {
		c.send(&req, data)
		b, d, err := c.recv()
		if err != nil {
			return err
		}
		var r iscsi.LoginResponse
		if err := r.Decode(b); err != nil {
			return err
		}
		var done bool
		if req, data, done, err = m.Step(&r, d); err != nil {
			return err
		}
		if done {
			c.p, c.expSN = m.Params(), m.ExpStatSN()
			return nil
		}
	}
}

func loginStatus(err error) iscsi.LoginStatus {
	var le *iscsi.LoginError
	if errors.As(err, &le) {
		return le.Status
	}
	return 0xFFFF
}

func TestCHAP(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	b.conf.Targets[0].Auth = Auth{Accounts: []Account{{"alice", Secret("alice's secret 1")}}, Out: Account{"target", Secret("the target's own")}}
	b.conf.Discovery = Auth{Accounts: []Account{{"disco", Secret("discovery secret")}}}
	b.apply()
	good := iscsi.CHAPCredentials{User: "alice", Secret: []byte("alice's secret 1")}
	for _, alg := range iscsi.CHAPAlgorithms {
		for _, mutual := range []bool{false, true} {
			cr := good
			cr.Algorithms = []iscsi.CHAPAlgorithm{alg}
			if mutual {
				cr.PeerUser, cr.PeerSecret = "target", []byte("the target's own")
			}
			c := dial(t, b.addr())
			if err := c.loginWith(iscsi.InitiatorLoginConfig{CHAP: &cr}); err != nil {
				t.Fatalf("%s, mutual %v: %v", alg, mutual, err)
			}
			c.clearUA(0)
			c.do(0, scsi.Read(0, 1), nil, 512).want(t, "read", scsi.StatusGood, 0, 0)
			if ss := b.srv.Sessions(); len(ss) != 1 || ss[0].User != "alice" {
				t.Errorf("%+v", ss)
			}
		}
	}
	bad := good
	bad.Secret = []byte("alice's secret 2")
	nobody := good
	nobody.User = "bob"
	reuse := good // the secret of another account's use
	reuse.User, reuse.Secret = "disco", []byte("discovery secret")
	liar := good // a target that cannot prove itself is the initiator's to refuse
	liar.PeerUser, liar.PeerSecret = "target", []byte("something else!!")
	for name, x := range map[string]struct {
		cfg  iscsi.InitiatorLoginConfig
		want iscsi.LoginStatus
	}{
		"wrong secret":               {iscsi.InitiatorLoginConfig{CHAP: &bad}, iscsi.StatusAuthFailure},
		"unknown name":               {iscsi.InitiatorLoginConfig{CHAP: &nobody}, iscsi.StatusAuthFailure},
		"account of discovery":       {iscsi.InitiatorLoginConfig{CHAP: &reuse}, iscsi.StatusAuthFailure},
		"AuthMethod=None":            {iscsi.InitiatorLoginConfig{}, iscsi.StatusAuthFailure},
		"discovery without":          {iscsi.InitiatorLoginConfig{Discovery: true}, iscsi.StatusAuthFailure},
		"discovery by target's name": {iscsi.InitiatorLoginConfig{Discovery: true, CHAP: &good}, iscsi.StatusAuthFailure},
	} {
		if err := dial(t, b.addr()).loginWith(x.cfg); loginStatus(err) != x.want {
			t.Errorf("%s: %v", name, err)
		}
		b.srv.guard.succeeded(netip.MustParseAddr("127.0.0.1")) // not what this test is about
	}
	l := dial(t, b.addr())
	if err := l.loginWith(iscsi.InitiatorLoginConfig{CHAP: &liar}); err == nil {
		t.Error("a target with another secret was believed")
	}
	_ = l.nc.Close()
	if st := dial(t, b.addr()).tryLogin(loginOpt{}); st != iscsi.StatusAuthFailure {
		t.Errorf("login that begins in the operational stage: %s", st)
	}
	d := dial(t, b.addr())
	if err := d.loginWith(iscsi.InitiatorLoginConfig{Discovery: true, CHAP: &reuse}); err != nil {
		t.Error(err)
	}
	waitFor(t, func() bool { // none stays outstanding
		b.srv.guard.mu.Lock()
		defer b.srv.guard.mu.Unlock()
		return len(b.srv.guard.challenges) == 0
	})

	// The account goes away, and the session with it.
	c := dial(t, b.addr())
	if err := c.loginWith(iscsi.InitiatorLoginConfig{CHAP: &good}); err != nil {
		t.Fatal(err)
	}
	b.conf.Targets[0].Auth.Accounts = []Account{{"carol", Secret("carol's secret 1")}}
	b.apply()
	c.gone()
}

// TestReflection: the challenge of one connection sent back on another as the
// initiator's own (RFC 7143 9.2.1).
func TestReflection(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	b.conf.Targets[0].Auth = Auth{Accounts: []Account{{"alice", Secret("alice's secret 1")}}, Out: Account{"target", Secret("the target's own")}}
	b.apply()
	challenge := func(c *client) map[string]string {
		t.Helper()
		step := func(text string) map[string]string {
			c.send(&iscsi.LoginRequest{CSG: iscsi.StageSecurity, ITT: 1, CmdSN: c.cmdSN}, []byte(text))
			var r iscsi.LoginResponse
			ps, err := iscsi.ParseText(c.must(&r))
			if err != nil || r.Status != 0 {
				t.Fatal(r.Status, err)
			}
			m := map[string]string{}
			for _, p := range ps {
				m[p.Key] = p.Value
			}
			return m
		}
		step("InitiatorName=iqn.2026-01.net.host:a\x00TargetName=" + testIQN + "\x00AuthMethod=CHAP\x00")
		return step("CHAP_A=7\x00")
	}
	one, two := dial(t, b.addr()), dial(t, b.addr())
	first, second := challenge(one), challenge(two)
	if first["CHAP_C"] == second["CHAP_C"] {
		t.Fatal("two connections got the same challenge")
	}
	id, _ := iscsi.ParseNumber(second["CHAP_I"], 0, 255)
	ch, err := iscsi.ParseBinary(second["CHAP_C"])
	if err != nil {
		t.Fatal(err)
	}
	resp := iscsi.CHAPResponse(iscsi.CHAPSHA256, uint8(id), []byte("alice's secret 1"), ch)
	two.send(&iscsi.LoginRequest{CSG: iscsi.StageSecurity, ITT: 1, CmdSN: two.cmdSN}, []byte(fmt.Sprintf(
		"CHAP_N=alice\x00CHAP_R=%s\x00CHAP_I=%s\x00CHAP_C=%s\x00", iscsi.FormatBinary(resp), first["CHAP_I"], first["CHAP_C"])))
	var r iscsi.LoginResponse
	if d := two.must(&r); r.Status != iscsi.StatusAuthFailure || strings.Contains(string(d), "CHAP_R") {
		t.Errorf("%s %q", r.Status, d)
	}
}

// TestLockOut: guessing gets slow, then impossible for a while, per address.
func TestLockOut(t *testing.T) {
	g := newGuard()
	a, other := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	now := time.Unix(1000, 0)
	var last time.Duration
	for i := range authLimit {
		if g.locked(a, now) {
			t.Fatalf("locked after %d failures", i)
		}
		d := g.failed(a, now)
		if d < last || d > authMaxDelay {
			t.Errorf("failure %d: %s after %s", i, d, last)
		}
		last = d
	}
	if !g.locked(a, now) || g.locked(other, now) {
		t.Error("lock-out")
	}
	if g.locked(a, now.Add(authLockedFor)) {
		t.Error("locked for ever")
	}
	g.succeeded(a)
	if g.failed(a, now) != authDelay {
		t.Error("a success does not clear the count")
	}
	for i := range 2 * authMaxAddrs { // bounded, whatever comes
		g.failed(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), now)
	}
	if len(g.addrs) > authMaxAddrs {
		t.Errorf("%d addresses are kept", len(g.addrs))
	}
}

// TestSecretsAreHidden wherever a configuration may be printed.
func TestSecretsAreHidden(t *testing.T) {
	a := Account{"alice", Secret("hush")}
	j, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprint(a), fmt.Sprintf("%+v", a), fmt.Sprintf("%#v", a), a.Secret.String(), fmt.Sprintf("%x", a.Secret), string(j)} {
		if strings.Contains(s, "hush") || strings.Contains(s, "68757368") {
			t.Errorf("the secret shows: %s", s)
		}
	}
}

func TestAuthValidate(t *testing.T) {
	t.Parallel()
	for _, a := range []Auth{
		{Accounts: []Account{{"", Secret("x")}}},
		{Accounts: []Account{{"a", nil}}},
		{Accounts: []Account{{"a", Secret("x")}, {"a", Secret("y")}}},
		{Accounts: []Account{{"a", Secret("x")}}, Out: Account{"o", Secret("x")}},
		{Out: Account{"o", Secret("x")}},
		{Accounts: []Account{{"a", Secret("x")}}, Out: Account{"o", nil}},
	} {
		c := Config{Discovery: a}
		if err := c.Validate(); err == nil {
			t.Errorf("accepted: %v", a)
		} else if strings.Contains(err.Error(), "secret x") {
			t.Error(err)
		}
	}
}
