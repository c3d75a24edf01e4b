package iscsi

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// swap returns p as the peer sees it.
func (p Params) swap() Params {
	p.MaxRecv, p.MaxSend = p.MaxSend, p.MaxRecv
	return p
}

func drawWant(t *rapid.T, who string) Want {
	num := func(k string, lo, hi int) int { return rapid.IntRange(lo, hi).Draw(t, who+k) }
	flag := func(k string) bool { return rapid.Bool().Draw(t, who+k) }
	list := func(k string, vs ...string) []string {
		p := rapid.Permutation(vs).Draw(t, who+k)
		return p[:rapid.IntRange(1, len(p)).Draw(t, who+k+" n")]
	}
	w := Want{HeaderDigests: list("hd", "None", "CRC32C"), DataDigests: list("dd", "None", "CRC32C"),
		TaskReportings: append(list("tr", "ResponseFence", "FastAbort"), "RFC3720")}
	w.MaxConnections = num("mc", 1, 65535)
	w.InitialR2T, w.ImmediateData, w.DataPDUInOrder, w.DataSequenceInOrder = flag("ir"), flag("im"), flag("pi"), flag("si")
	w.MaxRecv, w.MaxBurstLength = num("mr", 512, MaxDataSegment), num("mb", 512, MaxDataSegment)
	w.FirstBurstLength = num("fb", 512, w.MaxBurstLength)
	w.MaxOutstandingR2T, w.DefaultTime2Wait, w.DefaultTime2Retain = num("or", 1, 65535), num("tw", 0, 3600), num("tt", 0, 3600)
	w.ErrorRecoveryLevel, w.ProtocolLevel = num("er", 0, 2), num("pl", 1, 31)
	return w
}

// Both sides end with the same values, whatever they want, and each value is what
// §13 says of the two wants.
func TestNegotiationAgrees(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		iw, tw := drawWant(t, "i"), drawWant(t, "t")
		for _, w := range []*Want{&iw, &tw} {
			if err := w.Validate(); err != nil {
				t.Fatal(err)
			}
		}
		in, tn := NewNegotiator(Initiator, true, DefaultParams(), iw), NewNegotiator(Target, true, DefaultParams(), tw)
		offers := rapid.Permutation(in.Offers()).Draw(t, "offers")
		answers, err := tn.Receive(offers)
		if err != nil {
			t.Fatal(err)
		}
		back, err := in.Receive(append(answers, tn.Offers()...))
		common := iw.HeaderDigests[0] == "None" || len(iw.HeaderDigests) == 2 || len(tw.HeaderDigests) == 2 || tw.HeaderDigests[0] == iw.HeaderDigests[0]
		common = common && (iw.DataDigests[0] == "None" || len(iw.DataDigests) == 2 || len(tw.DataDigests) == 2 || tw.DataDigests[0] == iw.DataDigests[0])
		if !common {
			if err == nil {
				t.Fatal("no common digest, but agreement")
			}
			return
		}
		if err != nil || len(back) != 0 {
			t.Fatalf("answers %v: %v, %v", answers, back, err)
		}
		ip, err := in.Finish()
		if err != nil {
			t.Fatal(err)
		}
		tp, err := tn.Finish()
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(ip, tp.swap()); d != "" {
			t.Fatalf("sides differ: %s", d)
		}
		checkParams(t, ip)
		mb := min(iw.MaxBurstLength, tw.MaxBurstLength)
		if ip.MaxBurstLength != mb || ip.FirstBurstLength != min(iw.FirstBurstLength, tw.FirstBurstLength, mb) ||
			ip.InitialR2T != (iw.InitialR2T || tw.InitialR2T) || ip.ImmediateData != (iw.ImmediateData && tw.ImmediateData) ||
			ip.DefaultTime2Wait != max(iw.DefaultTime2Wait, tw.DefaultTime2Wait) || ip.MaxRecv != iw.MaxRecv || ip.MaxSend != tw.MaxRecv {
			t.Fatalf("%+v of %+v and %+v", ip, iw, tw)
		}
	})
}

// One row for each way in which a target's answer is fixed by §6.2 and §13.
func TestTargetAnswers(t *testing.T) {
	for _, c := range []struct{ in, want string }{ // want: answers, or "fail"
		{"HeaderDigest=CRC32C,None", "HeaderDigest=CRC32C"},
		{"HeaderDigest=X-foo,None", "HeaderDigest=None"},
		{"HeaderDigest=X-foo", "HeaderDigest=Reject"},
		{"MaxBurstLength=512", "MaxBurstLength=512"},
		{"MaxBurstLength=0x200", "MaxBurstLength=512"},
		{"MaxBurstLength=16777215", "MaxBurstLength=1048576"},
		{"MaxBurstLength=511", "MaxBurstLength=Reject"},
		{"MaxBurstLength=-1", "MaxBurstLength=Reject"},
		{"FirstBurstLength=0xffffffffff", "FirstBurstLength=Reject"},
		{"FirstBurstLength=262144 MaxBurstLength=65536", "MaxBurstLength=65536 FirstBurstLength=65536"},
		{"MaxRecvDataSegmentLength=0", "MaxRecvDataSegmentLength=Reject"},
		{"MaxRecvDataSegmentLength=65536", ""},
		{"InitialR2T=No", "InitialR2T=No"},
		{"InitialR2T=Yes", "InitialR2T=Yes"},
		{"InitialR2T=yes", "InitialR2T=Reject"},
		{"ImmediateData=No", "ImmediateData=No"},
		{"ErrorRecoveryLevel=2", "ErrorRecoveryLevel=0"},
		{"ErrorRecoveryLevel=3", "ErrorRecoveryLevel=Reject"},
		{"DefaultTime2Wait=0", "DefaultTime2Wait=2"},
		{"DefaultTime2Retain=0", "DefaultTime2Retain=0"},
		{"MaxConnections=65535", "MaxConnections=1"},
		{"IFMarker=Yes OFMarkInt=1~2", "IFMarker=No OFMarkInt=Irrelevant"},
		{"X-org.example.key=1 RDMAExtensions=Yes", "X-org.example.key=NotUnderstood RDMAExtensions=NotUnderstood"},
		{"X-org.example.key=NotUnderstood", ""},
		{"TaskReporting=FastAbort,RFC3720", "TaskReporting=RFC3720"},
		{"iSCSIProtocolLevel=2", "iSCSIProtocolLevel=1"},
		{"MaxBurstLength=1000 MaxBurstLength=1000", "fail"},
		{"MaxRecvDataSegmentLength=1000 MaxRecvDataSegmentLength=1000", "fail"},
		{"X-a=1 X-a=1", "fail"},
		{"HeaderDigest=NotUnderstood", "fail"},
	} {
		n := NewNegotiator(Target, true, DefaultParams(), DefaultWant())
		got, err := n.Receive(pairsOf(c.in))
		text := ""
		for _, p := range got {
			text += " " + p.String()
		}
		if err != nil {
			text = " fail"
			var le *LoginError
			if !errors.As(err, &le) || le.Status != StatusInitiatorError {
				t.Errorf("%s: %v", c.in, err)
			}
		}
		if strings.TrimSpace(text) != c.want {
			t.Errorf("%s: answered%s, want %s (%v)", c.in, text, c.want, err)
		}
	}
	n := NewNegotiator(Target, true, DefaultParams(), DefaultWant())
	n.SetDiscovery(true)
	if got, err := n.Receive(pairsOf("MaxConnections=4 HeaderDigest=None")); err != nil || fmt.Sprint(got) != "[MaxConnections=Irrelevant HeaderDigest=None]" {
		t.Errorf("discovery: %v, %v", got, err)
	}
	n = NewNegotiator(Target, false, DefaultParams(), DefaultWant())
	if got, err := n.Receive(pairsOf("MaxBurstLength=4096 HeaderDigest=CRC32C")); err != nil || fmt.Sprint(got) != "[MaxBurstLength=Irrelevant HeaderDigest=CRC32C]" {
		t.Errorf("further connection: %v, %v", got, err)
	}
	n.EnterFull()
	if got, err := n.Receive(pairsOf("MaxRecvDataSegmentLength=4096 HeaderDigest=None")); err != nil || fmt.Sprint(got) != "[HeaderDigest=Reject]" || n.Params().MaxSend != 4096 {
		t.Errorf("full feature phase: %v, %v", got, err)
	}
}

func pairsOf(s string) (out []Pair) {
	for _, f := range strings.Fields(s) {
		k, v, _ := strings.Cut(f, "=")
		out = append(out, Pair{k, v})
	}
	return out
}

// An initiator refuses answers that do not fit its offers.
func TestInitiatorChecksAnswers(t *testing.T) {
	base := "InitialR2T=No MaxConnections=1 ImmediateData=Yes MaxBurstLength=65536 FirstBurstLength=65536 MaxOutstandingR2T=1 DataPDUInOrder=Yes " +
		"DataSequenceInOrder=Yes DefaultTime2Wait=2 DefaultTime2Retain=20 ErrorRecoveryLevel=0 HeaderDigest=None DataDigest=None"
	for _, c := range []struct {
		replace string
		ok      bool
	}{
		{"", true}, {"DataPDUInOrder", true}, {"InitialR2T", false}, {"HeaderDigest", false}, // left out
		{"MaxBurstLength=2097152", false}, {"MaxBurstLength=100", false}, {"MaxBurstLength=x", false}, {"MaxBurstLength=Reject", true},
		{"HeaderDigest=SHA1", false}, {"HeaderDigest=NotUnderstood", true}, {"DefaultTime2Wait=1", false}, {"DefaultTime2Wait=3600", true},
		{"DataPDUInOrder=No", false}, {"InitialR2T=Yes", true}, {"InitialR2T=Maybe", false},
	} {
		n := NewNegotiator(Initiator, true, DefaultParams(), DefaultWant())
		n.Offers()
		var in []Pair
		key, val, has := strings.Cut(c.replace, "=")
		for _, p := range pairsOf(base) {
			if p.Key == key {
				if !has {
					continue
				}
				p.Value = val
			}
			in = append(in, p)
		}
		_, err := n.Receive(in)
		if err == nil {
			_, err = n.Finish()
		}
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.replace, err)
		}
	}
}

const (
	testIni = "iqn.2026-01.org.example:ini"
	testTgt = "iqn.2026-01.org.example:tgt"
)

func targetCfg() TargetLoginConfig {
	return TargetLoginConfig{Want: DefaultWant(), Rand: rand.Reader, StatSN: 0xfffffffe, Window: 32,
		Admit: func(*LoginIdentity) Admission { return Admission{TPGT: 7, Alias: "disk one"} },
		Start: func(*LoginIdentity, Params) (uint16, LoginStatus) { return 0x1234, StatusSuccess }}
}

func initiatorCfg() InitiatorLoginConfig {
	return InitiatorLoginConfig{InitiatorName: testIni, TargetName: testTgt, ISID: RandomISID(0x112233, 1), CID: 1, ITT: 9, CmdSN: 100,
		Want: DefaultWant(), Rand: rand.Reader}
}

// run plays both machines against each other over encoded PDUs.
func run(t failer, ic InitiatorLoginConfig, tc TargetLoginConfig) (*InitiatorLogin, *TargetLogin, error) {
	il, tl := NewInitiatorLogin(ic), NewTargetLogin(tc)
	req, data := il.Start()
	for range 2 * MaxLoginPDUs {
		var b BHS
		req.Encode(&b)
		var rq LoginRequest
		if err := rq.Decode(&b); err != nil {
			t.Fatalf("request %+v: %v", req, err)
		}
		if len(data) > DefaultMaxRecv {
			t.Fatalf("request of %d bytes", len(data))
		}
		st := tl.Step(&rq, data)
		if len(st.Data) > DefaultMaxRecv {
			t.Fatalf("response of %d bytes", len(st.Data))
		}
		st.Resp.Encode(&b)
		var rs LoginResponse
		if err := rs.Decode(&b); err != nil {
			t.Fatalf("response %+v: %v", st.Resp, err)
		}
		var done bool
		var err error
		req, data, done, err = il.Step(&rs, st.Data)
		if err != nil {
			if st.Err == nil && st.Done {
				return il, tl, fmt.Errorf("only the initiator: %w", err)
			}
			return il, tl, err
		}
		if done != st.Done {
			t.Fatalf("initiator done %v, target done %v", done, st.Done)
		}
		if done {
			return il, tl, nil
		}
	}
	t.Fatalf("login does not end")
	return nil, nil, nil
}

func TestLoginMachines(t *testing.T) {
	secret, out := []byte("in-secret-12"), []byte("out-secret-12")
	chap := func(alg ...CHAPAlgorithm) func(*InitiatorLoginConfig) {
		return func(c *InitiatorLoginConfig) {
			c.CHAP = &CHAPCredentials{User: "joe", Secret: secret, Algorithms: alg}
		}
	}
	mutual := func(c *InitiatorLoginConfig) {
		chap()(c)
		c.CHAP.PeerUser, c.CHAP.PeerSecret = "tgt", out
	}
	auth := func(a LoginAuth) func(*TargetLoginConfig) {
		a.Required = true
		if a.Secret == nil {
			a.Secret = func(u string) []byte {
				if u == "joe" {
					return secret
				}
				return nil
			}
		}
		return func(c *TargetLoginConfig) { c.Admit = func(*LoginIdentity) Admission { return Admission{Auth: a} } }
	}
	admit := func(a Admission) func(*TargetLoginConfig) {
		return func(c *TargetLoginConfig) { c.Admit = func(*LoginIdentity) Admission { return a } }
	}
	for _, c := range []struct {
		name string
		ini  func(*InitiatorLoginConfig)
		tgt  func(*TargetLoginConfig)
		want LoginStatus
	}{
		{"no authentication", nil, nil, StatusSuccess},
		{"discovery", func(c *InitiatorLoginConfig) { c.Discovery, c.TargetName = true, "" }, nil, StatusSuccess},
		{"CHAP MD5", chap(CHAPMD5), auth(LoginAuth{}), StatusSuccess},
		{"CHAP SHA1", chap(CHAPSHA1), auth(LoginAuth{}), StatusSuccess},
		{"CHAP SHA-256", chap(CHAPSHA256), auth(LoginAuth{}), StatusSuccess},
		{"CHAP SHA3-256", chap(CHAPSHA3256), auth(LoginAuth{}), StatusSuccess},
		{"CHAP, target has MD5 only", chap(), auth(LoginAuth{Algorithms: []CHAPAlgorithm{CHAPMD5}}), StatusSuccess},
		{"CHAP, nothing in common", chap(CHAPSHA1), auth(LoginAuth{Algorithms: []CHAPAlgorithm{CHAPMD5}}), StatusAuthFailure},
		{"CHAP, wrong secret", func(c *InitiatorLoginConfig) { chap()(c); c.CHAP.Secret = []byte("wrong") }, auth(LoginAuth{}), StatusAuthFailure},
		{"CHAP, unknown user", func(c *InitiatorLoginConfig) { chap()(c); c.CHAP.User = "jim" }, auth(LoginAuth{}), StatusAuthFailure},
		{"CHAP, empty secret of an account", func(c *InitiatorLoginConfig) { chap()(c); c.CHAP.Secret = nil },
			auth(LoginAuth{Secret: func(string) []byte { return nil }}), StatusAuthFailure},
		{"CHAP required, None offered", nil, auth(LoginAuth{}), StatusAuthFailure},
		{"CHAP offered, no accounts", chap(), nil, StatusAuthFailure},
		{"mutual", mutual, auth(LoginAuth{OutName: "tgt", OutSecret: out}), StatusSuccess},
		{"mutual, other name", mutual, auth(LoginAuth{OutName: "tgt2", OutSecret: out}), StatusAuthFailure},
		{"mutual, wrong secret of the target", mutual, auth(LoginAuth{OutName: "tgt", OutSecret: []byte("wrong")}), StatusAuthFailure},
		{"mutual, no outgoing account", mutual, auth(LoginAuth{}), StatusAuthFailure},
		{"mutual, same secrets", func(c *InitiatorLoginConfig) { mutual(c); c.CHAP.PeerSecret = secret }, auth(LoginAuth{OutName: "tgt", OutSecret: secret}), StatusAuthFailure},
		{"moved temporarily", nil, admit(Admission{Status: StatusMovedTemporarily, Address: "10.0.0.2:3260,2"}), StatusMovedTemporarily},
		{"moved permanently", chap(), admit(Admission{Status: StatusMovedPermanently, Address: "10.0.0.2:3260,2"}), StatusMovedPermanently},
		{"not found", nil, admit(Admission{Status: StatusNotFound}), StatusNotFound},
		{"starting", nil, admit(Admission{Status: StatusServiceUnavailable}), StatusServiceUnavailable},
		{"no room", nil, func(c *TargetLoginConfig) {
			c.Start = func(*LoginIdentity, Params) (uint16, LoginStatus) { return 0, StatusOutOfResources }
		}, StatusOutOfResources},
	} {
		t.Run(c.name, func(t *testing.T) {
			ic, tc := initiatorCfg(), targetCfg()
			if c.ini != nil {
				c.ini(&ic)
			}
			if c.tgt != nil {
				c.tgt(&tc)
			}
			il, tl, err := run(t, ic, tc)
			if c.want != StatusSuccess {
				var le *LoginError
				if !errors.As(err, &le) || le.Status != c.want {
					t.Fatalf("%v, want %v", err, c.want)
				}
				if le.Status.Class() == 1 && le.Address != "10.0.0.2:3260,2" {
					t.Fatalf("redirected to %q", le.Address)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(il.Params(), tl.Params().swap()); d != "" {
				t.Errorf("params differ: %s", d)
			}
			id := tl.Identity()
			if il.TSIH() != 0x1234 || id.InitiatorName != testIni || id.TargetName != ic.TargetName || id.Discovery != ic.Discovery {
				t.Errorf("TSIH %x, identity %+v", il.TSIH(), id)
			}
			if il.ExpStatSN() != tl.StatSN() {
				t.Errorf("ExpStatSN %d, next StatSN %d", il.ExpStatSN(), tl.StatSN())
			}
			if exp, mx := il.Window(); exp != 100 || mx != 131 {
				t.Errorf("window %d-%d", exp, mx)
			}
			if ic.CHAP != nil && (id.User != "joe" || tl.AuthMethod() != "CHAP") || ic.CHAP == nil && (id.User != "" || tl.AuthMethod() != "None") {
				t.Errorf("user %q, method %q", id.User, tl.AuthMethod())
			}
			if c.tgt == nil && !ic.Discovery && (il.TPGT() != 7 || il.TargetAlias() != "disk one") {
				t.Errorf("TPGT %d, alias %q", il.TPGT(), il.TargetAlias())
			}
		})
	}
}

// Raw requests of an adversary or of an odd initiator (facts/iscsi.md §5): the
// answer of the last of them.
func TestTargetLoginRaw(t *testing.T) {
	names := "InitiatorName=" + testIni + "\x00TargetName=" + testTgt + "\x00"
	sec := LoginRequest{Transit: true, CSG: StageSecurity, NSG: StageOperational, ITT: 1, CID: 1}
	op := LoginRequest{Transit: true, CSG: StageOperational, NSG: StageFull, ITT: 1, CID: 1}
	with := func(r LoginRequest, f func(*LoginRequest)) LoginRequest { f(&r); return r }
	cont := with(op, func(r *LoginRequest) { r.Transit, r.Continue, r.NSG = false, true, 0 })
	stay := with(sec, func(r *LoginRequest) { r.Transit, r.NSG = false, 0 })
	required := func(c *TargetLoginConfig) {
		c.Admit = func(*LoginIdentity) Admission {
			return Admission{Auth: LoginAuth{Required: true, Secret: func(string) []byte { return []byte("secret") }}}
		}
	}
	type msg struct {
		req  LoginRequest
		text string
	}
	many := ""
	for i := range 120 {
		many += fmt.Sprintf("X-%s.%d=%s\x00", strings.Repeat("k", 56), i, "v")
	}
	for _, c := range []struct {
		name string
		in   []msg
		cfg  func(*TargetLoginConfig)
		want LoginStatus
		has  string // in the last response
		done bool
	}{
		{"operational stage at once", []msg{{op, names}}, nil, StatusSuccess, "TargetPortalGroupTag=7", true},
		{"both stages, nothing said", []msg{{sec, names}, {op, ""}}, nil, StatusSuccess, "", true},
		{"security stage straight to full feature phase", []msg{{with(sec, func(r *LoginRequest) { r.NSG = StageFull }), names + "AuthMethod=None\x00"}}, nil, StatusSuccess, "AuthMethod=None", true},
		{"no NUL", []msg{{op, strings.TrimSuffix(names, "\x00")}}, nil, StatusInitiatorError, "", false},
		{"no equals", []msg{{op, names + "nonsense\x00"}}, nil, StatusInitiatorError, "", false},
		{"7000-byte key", []msg{{op, names + strings.Repeat("k", 7000) + "=1\x00"}}, nil, StatusInitiatorError, "", false},
		{"duplicate InitiatorName", []msg{{op, names + "InitiatorName=" + testIni + "\x00"}}, nil, StatusInitiatorError, "", false},
		{"duplicate over two requests", []msg{{sec, names}, {op, "TargetName=" + testTgt + "\x00"}}, nil, StatusInitiatorError, "", false},
		{"no InitiatorName", []msg{{op, "TargetName=" + testTgt + "\x00"}}, nil, StatusMissingParameter, "", false},
		{"no TargetName", []msg{{op, "InitiatorName=" + testIni + "\x00"}}, nil, StatusMissingParameter, "", false},
		{"malformed InitiatorName", []msg{{op, "InitiatorName=foo\x00TargetName=" + testTgt + "\x00"}}, nil, StatusInitiatorError, "", false},
		{"session type", []msg{{op, names + "SessionType=Foo\x00"}}, nil, StatusSessionType, "", false},
		{"version 5", []msg{{with(op, func(r *LoginRequest) { r.VersionMin, r.VersionMax = 5, 6 }), names}}, nil, StatusUnsupportedVersion, "", false},
		{"CSG 3", []msg{{with(op, func(r *LoginRequest) { r.CSG = 3 }), names}}, nil, StatusInitiatorError, "", false},
		{"CSG 2", []msg{{with(op, func(r *LoginRequest) { r.CSG = 2 }), names}}, nil, StatusInitiatorError, "", false},
		{"NSG below CSG", []msg{{with(op, func(r *LoginRequest) { r.NSG = 0 }), names}}, nil, StatusInitiatorError, "", false},
		{"NSG 2", []msg{{with(op, func(r *LoginRequest) { r.NSG = 2 }), names}}, nil, StatusInitiatorError, "", false},
		{"stage goes back", []msg{{sec, names}, {sec, ""}}, nil, StatusInitiatorError, "", false},
		{"T and C", []msg{{with(op, func(r *LoginRequest) { r.Continue = true }), names}}, nil, StatusInitiatorError, "", false},
		{"ISID changes", []msg{{sec, names}, {with(op, func(r *LoginRequest) { r.ISID[5] = 1 }), ""}}, nil, StatusInitiatorError, "", false},
		{"key cut by the C bit", []msg{{cont, names[:20]}, {op, names[20:]}}, nil, StatusSuccess, "TargetPortalGroupTag=7", true},
		{"MaxRecvDataSegmentLength 0", []msg{{op, names + "MaxRecvDataSegmentLength=0\x00"}}, nil, StatusSuccess, "MaxRecvDataSegmentLength=Reject", true},
		{"unknown keys are answered in parts", []msg{{op, names + many}, {op, ""}}, nil, StatusSuccess, "NotUnderstood", true},
		{"text instead of fetching the rest", []msg{{op, names + many}, {op, "X-z=1\x00"}}, nil, StatusInitiatorError, "", false},
		{"target's own key", []msg{{op, names + "TargetPortalGroupTag=1\x00"}}, nil, StatusSuccess, "TargetPortalGroupTag=Reject", true},
		{"CHAP required, operational stage at once", []msg{{op, names}}, required, StatusAuthFailure, "", false},
		{"CHAP required, None", []msg{{sec, names + "AuthMethod=None\x00"}}, required, StatusAuthFailure, "AuthMethod=Reject", false},
		{"CHAP required, no method", []msg{{sec, names}}, required, StatusAuthFailure, "", false},
		{"CHAP required, no method, no T", []msg{{stay, names}, {with(sec, func(r *LoginRequest) { r.NSG = StageFull }), ""}}, required, StatusAuthFailure, "", false},
		{"CHAP and T at once does not transit", []msg{{sec, names + "AuthMethod=CHAP\x00"}}, required, StatusSuccess, "AuthMethod=CHAP", false},
		{"CHAP keys without a method", []msg{{stay, names + "CHAP_A=5\x00"}}, nil, StatusInitiatorError, "", false},
		{"second AuthMethod", []msg{{stay, names + "AuthMethod=CHAP\x00"}, {stay, "AuthMethod=None\x00"}}, required, StatusInitiatorError, "", false},
		{"answer before the challenge", []msg{{stay, names + "AuthMethod=CHAP\x00"}, {stay, "CHAP_N=a\x00CHAP_R=0x00\x00"}}, required, StatusAuthFailure, "", false},
		{"algorithm 4", []msg{{stay, names + "AuthMethod=CHAP\x00"}, {stay, "CHAP_A=4\x00"}}, required, StatusAuthFailure, "CHAP_A=Reject", false},
		{"short response", []msg{{stay, names + "AuthMethod=CHAP\x00"}, {stay, "CHAP_A=5\x00"}, {stay, "CHAP_N=a\x00CHAP_R=0x00\x00"}}, required, StatusAuthFailure, "", false},
		{"response of 4000 digits", []msg{{stay, names + "AuthMethod=CHAP\x00"}, {stay, "CHAP_A=5\x00"}, {stay, "CHAP_N=a\x00CHAP_R=0x" + strings.Repeat("0", 4000) + "\x00"}}, required, StatusInitiatorError, "", false},
		{"security key in the operational stage", []msg{{op, names + "AuthMethod=None\x00"}}, nil, StatusInitiatorError, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			tc := targetCfg()
			if c.cfg != nil {
				c.cfg(&tc)
			}
			l := NewTargetLogin(tc)
			var st LoginStep
			for i, m := range c.in {
				st = l.Step(&m.req, []byte(m.text))
				if i < len(c.in)-1 && (st.Err != nil || st.Done) {
					t.Fatalf("request %d: %+v %v", i, st.Resp, st.Err)
				}
			}
			if st.Resp.Status != c.want || st.Done != c.done || (st.Err != nil) != (c.want != 0) {
				t.Fatalf("%v %v, want %v", st.Resp.Status, st.Err, c.want)
			}
			if !bytes.Contains(st.Data, []byte(c.has)) {
				t.Errorf("response %q lacks %q", st.Data, c.has)
			}
			if st.Done != (st.Resp.TSIH != 0) {
				t.Errorf("TSIH %d, done %v", st.Resp.TSIH, st.Done)
			}
		})
	}

	l := NewTargetLogin(targetCfg())
	for i := range MaxLoginPDUs + 1 {
		if st := l.Step(&cont, []byte("x")); st.Err != nil {
			if i < 8 {
				t.Fatalf("request %d: %v", i, st.Err)
			}
			return
		}
	}
	t.Error("C bit for ever")
}

// A reflected challenge proves nothing (§9.2.1): neither our own nor one outstanding
// on another connection is answered.
func TestReflection(t *testing.T) {
	secret := []byte("secret")
	stay := LoginRequest{CSG: StageSecurity, ITT: 1}
	var issued [][]byte
	for _, outstanding := range []bool{false, true} {
		tc := targetCfg()
		other := bytes.Repeat([]byte{9}, 20)
		tc.Admit = func(*LoginIdentity) Admission {
			return Admission{Auth: LoginAuth{Required: true, Secret: func(string) []byte { return secret }, OutName: "t", OutSecret: []byte("other"),
				Issued: func(c []byte) { issued = append(issued, c) }, Outstanding: func(c []byte) bool { return bytes.Equal(c, other) }}}
		}
		l := NewTargetLogin(tc)
		l.Step(&stay, []byte("InitiatorName="+testIni+"\x00TargetName="+testTgt+"\x00AuthMethod=CHAP\x00"))
		st := l.Step(&stay, []byte("CHAP_A=7\x00"))
		got := map[string]string{}
		p, _ := ParseText(st.Data)
		for _, p := range p {
			got[p.Key] = p.Value
		}
		ch, err := ParseBinary(got[KeyCHAPC])
		if err != nil || got[KeyCHAPA] != "7" || len(issued) == 0 || !bytes.Equal(ch, issued[len(issued)-1]) {
			t.Fatalf("challenge %v: %v", got, err)
		}
		id, _ := ParseNumber(got[KeyCHAPI], 0, 255)
		reflect := ch
		if outstanding {
			reflect = other
		}
		st = l.Step(&stay, AppendText(nil, []Pair{{KeyCHAPN, "a"}, {KeyCHAPR, FormatBinary(CHAPResponse(CHAPSHA256, uint8(id), secret, ch))},
			{KeyCHAPI, "1"}, {KeyCHAPC, FormatBinary(reflect)}}))
		if st.Resp.Status != StatusAuthFailure || !strings.Contains(st.Err.Why, "reflects") || len(st.Data) != 0 {
			t.Fatalf("%v %v %q", st.Resp.Status, st.Err, st.Data)
		}
	}
	if bytes.Equal(issued[0], issued[1]) {
		t.Error("two logins got the same challenge")
	}
}

func FuzzLogin(f *testing.F) {
	names := []byte("InitiatorName=" + testIni + "\x00TargetName=" + testTgt + "\x00")
	f.Add(append(names, "AuthMethod=CHAP\x00"...), []byte("CHAP_A=5\x00"), []byte("CHAP_N=a\x00CHAP_R=0x00\x00"), byte(0x00), byte(0x00), byte(0x81), true)
	f.Add(names, []byte("HeaderDigest=CRC32C\x00"), []byte{}, byte(0x81), byte(0x87), byte(0x87), false)
	f.Fuzz(func(t *testing.T, a, b, c []byte, fa, fb, fc byte, auth bool) {
		tc := targetCfg()
		tc.Admit = func(*LoginIdentity) Admission {
			return Admission{Auth: LoginAuth{Required: auth, Secret: func(string) []byte { return []byte("a secret that nobody knows") }}}
		}
		l := NewTargetLogin(tc)
		il := NewInitiatorLogin(initiatorCfg())
		il.Start()
		idead := false
		for i, m := range []struct {
			d []byte
			f byte
		}{{a, fa}, {b, fb}, {c, fc}} {
			var h BHS
			h[0], h[1] = 0x43, m.f
			var rq LoginRequest
			if err := rq.Decode(&h); err != nil {
				t.Fatal(err)
			}
			st := l.Step(&rq, m.d)
			if st.Done {
				if auth {
					t.Fatalf("in without the secret after %d requests", i+1)
				}
				checkParams(t, l.Params())
			}
			if len(st.Data) > DefaultMaxRecv || st.Err != nil && st.Resp.Status == StatusSuccess || st.Err == nil && st.Resp.Status != StatusSuccess {
				t.Fatalf("%+v", st)
			}
			if !idead {
				// The same bytes as responses to an initiator.
				_, _, done, err := il.Step(&LoginResponse{Transit: rq.Transit, Continue: rq.Continue, CSG: rq.CSG, NSG: rq.NSG, ISID: initiatorCfg().ISID, ITT: 9,
					StatSN: Serial(i), TSIH: 1}, m.d)
				if done {
					checkParams(t, il.Params())
				}
				idead = done || err != nil
			}
			if st.Err != nil || st.Done {
				return
			}
		}
	})
}

func TestSecretsAreNotPrinted(t *testing.T) {
	c := InitiatorLoginConfig{CHAP: &CHAPCredentials{User: "joe", Secret: []byte("hunter2"), PeerSecret: []byte("hunter3")}}
	hex1, dec := "68756e74657232", "104 117 110"
	for _, f := range []string{"%v", "%+v", "%#v", "%s"} {
		for _, v := range []any{c, *c.CHAP, c.CHAP} {
			if s := fmt.Sprintf(f, v); strings.Contains(s, "hunter") || strings.Contains(s, hex1) || strings.Contains(s, dec) {
				t.Errorf("%s of %T shows the secret: %s", f, v, s)
			}
		}
	}
}

// An account that does not exist is verified against something, to take the same
// time; knowing what must not let anyone in.
func TestUnknownAccountWithGuess(t *testing.T) {
	tc := targetCfg()
	tc.Admit = func(*LoginIdentity) Admission {
		return Admission{Auth: LoginAuth{Required: true, Secret: func(string) []byte { return nil }}}
	}
	l := NewTargetLogin(tc)
	stay := LoginRequest{CSG: StageSecurity, ITT: 1}
	l.Step(&stay, []byte("InitiatorName="+testIni+"\x00TargetName="+testTgt+"\x00AuthMethod=CHAP\x00"))
	st := l.Step(&stay, []byte("CHAP_A=5\x00"))
	pairs, err := ParseText(st.Data)
	if err != nil || len(pairs) != 3 {
		t.Fatalf("%v, %v", pairs, err)
	}
	id, _ := ParseNumber(pairs[1].Value, 0, 255)
	ch, _ := ParseBinary(pairs[2].Value)
	st = l.Step(&stay, AppendText(nil, []Pair{{KeyCHAPN, "ghost"}, {KeyCHAPR, FormatBinary(CHAPResponse(CHAPMD5, uint8(id), ch, ch))}}))
	if st.Resp.Status != StatusAuthFailure {
		t.Fatalf("%v", st.Resp.Status)
	}
}
