package iscsi

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
)

// CHAPCredentials is what an initiator authenticates with.
type CHAPCredentials struct {
	User   string
	Secret []byte
	// PeerUser and PeerSecret: the target has to prove itself, too (mutual CHAP). An
	// empty PeerUser takes any name that the target gives.
	PeerUser   string
	PeerSecret []byte
	// Algorithms that are offered, best first; nil means CHAPAlgorithms.
	Algorithms []CHAPAlgorithm
}

// String and GoString leave the secrets out, so that no log shows them by accident.
func (c CHAPCredentials) String() string {
	return fmt.Sprintf("CHAP user %q, mutual %v", c.User, c.Mutual())
}

// GoString is String.
func (c CHAPCredentials) GoString() string { return c.String() }

// Mutual tells whether the target has to prove itself.
func (c *CHAPCredentials) Mutual() bool { return len(c.PeerSecret) > 0 }

// InitiatorLoginConfig is what an InitiatorLogin logs in with.
type InitiatorLoginConfig struct {
	InitiatorName  string
	InitiatorAlias string
	TargetName     string // empty in a discovery session
	Discovery      bool
	ISID           ISID
	TSIH           uint16 // 0: a new session
	CID            uint16
	ITT            uint32
	CmdSN          Serial
	CHAP           *CHAPCredentials // nil: AuthMethod=None
	Want           Want
	Base           Params // of the session when TSIH is not 0
	Rand           io.Reader
}

// InitiatorLogin is the initiator's side of a login (§6.3), pure.
//
//	req, data := l.Start()
//	for { send; receive; req, data, done, err = l.Step(resp, data); ... }
type InitiatorLogin struct {
	cfg   InitiatorLoginConfig
	neg   *Negotiator
	stage Stage
	sent  LoginRequest // last request
	in    TextBuffer
	out   TextQueue
	auth  authState
	chap  struct {
		id        uint8
		alg       CHAPAlgorithm
		challenge []byte // ours, for mutual CHAP
	}
	rounds  int
	begun   bool // a response came
	transit bool // we want to leave the stage, once the text is through
	tsih    uint16
	tpgt    uint16
	stat    Serial
	alias   string
	p       Params
	exp     Serial
	max     Serial
}

// NewInitiatorLogin returns the machine for one connection.
func NewInitiatorLogin(cfg InitiatorLoginConfig) *InitiatorLogin {
	base := cfg.Base
	if cfg.TSIH == 0 || base == (Params{}) {
		base = DefaultParams()
	}
	n := NewNegotiator(Initiator, cfg.TSIH == 0, base, cfg.Want)
	n.SetDiscovery(cfg.Discovery)
	return &InitiatorLogin{cfg: cfg, neg: n}
}

// Params is what was negotiated; valid after done.
func (l *InitiatorLogin) Params() Params { return l.p }

// Negotiator goes on in full feature phase; valid after done.
func (l *InitiatorLogin) Negotiator() *Negotiator { return l.neg }

// TSIH is the session's handle; valid after done.
func (l *InitiatorLogin) TSIH() uint16 { return l.tsih }

// TPGT is the portal group tag that the target declared.
func (l *InitiatorLogin) TPGT() uint16 { return l.tpgt }

// TargetAlias is what the target declared, or empty.
func (l *InitiatorLogin) TargetAlias() string { return l.alias }

// ExpStatSN is the StatSN that the next response has to carry.
func (l *InitiatorLogin) ExpStatSN() Serial { return l.stat }

// Window is the command window of the last response.
func (l *InitiatorLogin) Window() (exp, max Serial) { return l.exp, l.max }

// Start returns the first request.
func (l *InitiatorLogin) Start() (LoginRequest, []byte) {
	l.stage = StageSecurity
	l.out.Put(Pair{KeyInitiatorName, l.cfg.InitiatorName})
	if l.cfg.InitiatorAlias != "" {
		l.out.Put(Pair{KeyInitiatorAlias, l.cfg.InitiatorAlias})
	}
	if l.cfg.TSIH == 0 {
		typ := "Normal"
		if l.cfg.Discovery {
			typ = "Discovery"
		}
		l.out.Put(Pair{KeySessionType, typ})
	}
	if l.cfg.TargetName != "" {
		l.out.Put(Pair{KeyTargetName, l.cfg.TargetName})
	}
	if l.cfg.CHAP == nil {
		l.out.Put(Pair{KeyAuthMethod, "None"})
		return l.request(true)
	}
	l.out.Put(Pair{KeyAuthMethod, "CHAP"})
	return l.request(false)
}

// request builds the next request of the current stage; transit asks to leave it.
func (l *InitiatorLogin) request(transit bool) (LoginRequest, []byte) {
	l.transit = transit
	seg, more := l.out.Next(DefaultMaxRecv)
	r := LoginRequest{Transit: transit && !more, Continue: more, CSG: l.stage, ISID: l.cfg.ISID, TSIH: l.cfg.TSIH,
		ITT: l.cfg.ITT, CID: l.cfg.CID, CmdSN: l.cfg.CmdSN, ExpStatSN: l.stat}
	if r.Transit {
		r.NSG = StageOperational
		if l.stage == StageOperational {
			r.NSG = StageFull
		}
	}
	l.sent = r
	return r, seg
}

// Step takes a response and returns the next request, or done. An error is a
// *LoginError (its Status is the target's, or 2/0 or 2/1 for what we refused) or a
// *TextError; the connection is of no use then.
func (l *InitiatorLogin) Step(resp *LoginResponse, data []byte) (req LoginRequest, out []byte, done bool, err error) {
	fail := func(e error) (LoginRequest, []byte, bool, error) { return LoginRequest{}, nil, false, e }
	if l.rounds++; l.rounds > MaxLoginPDUs {
		return fail(negError("target keeps the login going for %d responses", l.rounds))
	}
	if resp.Status != StatusSuccess {
		e := &LoginError{Status: resp.Status}
		if pairs, err := ParseText(data); err == nil {
			for _, p := range pairs {
				if p.Key == KeyTargetAddress {
					e.Address = p.Value
				}
			}
		}
		return fail(e)
	}
	switch {
	case resp.ITT != l.cfg.ITT:
		return fail(negError("response has task tag %#x, want %#x", resp.ITT, l.cfg.ITT))
	case resp.ISID != l.cfg.ISID:
		return fail(negError("response has ISID %s, want %s", resp.ISID, l.cfg.ISID))
	case resp.VersionActive != 0:
		return fail(negError("target chose version %d, we have 0", resp.VersionActive))
	case resp.CSG != l.stage:
		return fail(negError("response is in %s, login is in %s", resp.CSG, l.stage))
	case l.begun && resp.StatSN != l.stat:
		return fail(negError("response has StatSN %d, want %d", resp.StatSN, l.stat))
	case resp.Transit && (!l.sent.Transit || resp.NSG != l.sent.NSG):
		return fail(negError("target moves to %s, which we did not ask for", resp.NSG))
	case resp.Transit && resp.Continue:
		return fail(negError("T and C bits are both set"))
	case l.sent.Continue && (len(data) > 0 || resp.Transit || resp.Continue):
		return fail(negError("text in a response that has to fetch the rest of a request"))
	}
	l.begun = true
	l.stat = resp.StatSN.Add(1)
	l.exp, l.max = resp.ExpCmdSN, resp.MaxCmdSN
	if l.sent.Continue {
		r, seg := l.request(l.transit)
		return r, seg, false, nil
	}
	pairs, err := l.in.Add(data, resp.Continue)
	if err != nil {
		return fail(err)
	}
	if resp.Continue {
		r, seg := l.request(l.transit)
		return r, seg, false, nil
	}
	sec := map[string]string{}
	var oper []Pair
	for _, p := range pairs {
		k, known := LookupKey(p.Key)
		switch {
		case known && k.Security:
			if _, dup := sec[p.Key]; dup {
				return fail(negError("key %s came twice", p.Key))
			}
			sec[p.Key] = p.Value
		case p.Key == KeyTargetAlias:
			l.alias = p.Value
		case p.Key == KeyTargetPortalGroupTag:
			n, err := ParseNumber(p.Value, 0, 65535)
			if err != nil {
				return fail(err)
			}
			l.tpgt = uint16(n)
		case known && k.Kind == KindDeclare:
			// TargetAddress without a redirection, an echoed name: nothing to do.
		default:
			oper = append(oper, p)
		}
	}
	answers, err := l.neg.Receive(oper)
	if err != nil {
		return fail(err)
	}
	l.out.Put(answers...)
	if l.stage == StageSecurity {
		return l.security(resp, sec)
	}
	if len(sec) > 0 {
		return fail(negError("security key in %s", l.stage))
	}
	if !resp.Transit {
		r, seg := l.request(true)
		return r, seg, false, nil
	}
	if len(answers) > 0 {
		return fail(negError("target ends the login with an offer"))
	}
	if resp.TSIH == 0 {
		return fail(negError("target gave no session handle"))
	}
	if l.p, err = l.neg.Finish(); err != nil {
		return fail(err)
	}
	l.tsih = resp.TSIH
	l.neg.EnterFull()
	return LoginRequest{}, nil, true, nil
}

func (l *InitiatorLogin) security(resp *LoginResponse, in map[string]string) (LoginRequest, []byte, bool, error) {
	fail := func(s LoginStatus, f string, a ...any) (LoginRequest, []byte, bool, error) {
		return LoginRequest{}, nil, false, &LoginError{Status: s, Why: fmt.Sprintf(f, a...)}
	}
	c := l.cfg.CHAP
	switch m, said := in[KeyAuthMethod]; {
	case said && l.auth != authNone:
		return fail(StatusAuthFailure, "target names an AuthMethod twice")
	case c == nil && said && m != "None":
		return fail(StatusAuthFailure, "target wants AuthMethod %.20q, we have no credentials", m)
	case c == nil:
		l.auth = authDone
	case said && m != "CHAP":
		return fail(StatusAuthFailure, "target answered AuthMethod=%.20q, we want CHAP", m)
	case said:
		algs := c.Algorithms
		if algs == nil {
			algs = CHAPAlgorithms
		}
		l.auth = authMethod
		l.out.Put(Pair{KeyCHAPA, FormatCHAPAlgorithms(algs)})
		r, seg := l.request(false)
		return r, seg, false, nil
	}
	switch l.auth {
	case authNone:
		return fail(StatusAuthFailure, "target did not answer AuthMethod=CHAP")
	case authMethod:
		if err := l.respond(in); err != nil {
			return LoginRequest{}, nil, false, err
		}
		l.auth = authAnswer
		r, seg := l.request(true)
		return r, seg, false, nil
	case authAnswer:
		if err := l.verify(in); err != nil {
			return LoginRequest{}, nil, false, err
		}
		l.auth = authDone
	}
	if !resp.Transit {
		r, seg := l.request(true)
		return r, seg, false, nil
	}
	l.stage = StageOperational
	l.out.Put(l.neg.Offers()...)
	r, seg := l.request(true)
	return r, seg, false, nil
}

// respond answers the target's challenge and, for mutual CHAP, sends ours.
func (l *InitiatorLogin) respond(in map[string]string) error {
	c := l.cfg.CHAP
	bad := func(f string, a ...any) error {
		return &LoginError{Status: StatusAuthFailure, Why: fmt.Sprintf(f, a...)}
	}
	allowed := c.Algorithms
	if allowed == nil {
		allowed = CHAPAlgorithms
	}
	n, err := ParseNumber(in[KeyCHAPA], 0, 255)
	if err != nil {
		return bad("CHAP_A: %v", err)
	}
	alg, ok, _ := PickCHAPAlgorithm(strconv.Itoa(int(n)), allowed)
	if !ok {
		return bad("target chose CHAP algorithm %d, which we did not offer", n)
	}
	id, err := ParseNumber(in[KeyCHAPI], 0, 255)
	if err != nil {
		return bad("CHAP_I: %v", err)
	}
	ch, err := ParseBinary(in[KeyCHAPC])
	if err != nil {
		return bad("CHAP_C: %v", err)
	}
	l.chap.alg = alg
	l.out.Put(Pair{KeyCHAPN, c.User}, Pair{KeyCHAPR, FormatBinary(CHAPResponse(alg, uint8(id), c.Secret, ch))})
	if !c.Mutual() {
		return nil
	}
	if bytes.Equal(c.Secret, c.PeerSecret) {
		return bad("the secrets of both directions are the same (§9.2.1)")
	}
	buf := make([]byte, 1+max(CHAPMinChallenge, alg.Size()))
	if _, err := io.ReadFull(l.cfg.Rand, buf); err != nil {
		return fmt.Errorf("login: no random numbers: %w", err)
	}
	l.chap.id, l.chap.challenge = buf[0], buf[1:]
	if bytes.Equal(l.chap.challenge, ch) {
		return bad("target reflects our challenge")
	}
	l.out.Put(Pair{KeyCHAPI, strconv.Itoa(int(l.chap.id))}, Pair{KeyCHAPC, FormatBinary(l.chap.challenge)})
	return nil
}

// verify checks the target's answer to our challenge.
func (l *InitiatorLogin) verify(in map[string]string) error {
	c := l.cfg.CHAP
	if !c.Mutual() {
		return nil
	}
	r, err := ParseBinary(in[KeyCHAPR])
	if err != nil {
		return &LoginError{Status: StatusAuthFailure, Why: "target does not prove itself: CHAP_R: " + err.Error()}
	}
	if c.PeerUser != "" && in[KeyCHAPN] != c.PeerUser {
		return &LoginError{Status: StatusAuthFailure, Why: fmt.Sprintf("target's CHAP name is %.64q, want %q", in[KeyCHAPN], c.PeerUser)}
	}
	if !CHAPVerify(l.chap.alg, l.chap.id, c.PeerSecret, l.chap.challenge, r) {
		return &LoginError{Status: StatusAuthFailure, Why: "target's CHAP response is wrong"}
	}
	return nil
}
