package iscsi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// LoginIdentity is who logs in to what.
type LoginIdentity struct {
	ISID           ISID
	TSIH           uint16 // 0: a new session, else add the connection to that one
	CID            uint16
	InitiatorName  string // normalized
	InitiatorAlias string
	TargetName     string // normalized; empty in a discovery session without one
	Discovery      bool
	User           string // authenticated CHAP name, empty without CHAP
}

// Admission is a target's decision on an identity, before authentication.
type Admission struct {
	// Status other than success ends the login. The two redirections also need
	// Address.
	Status  LoginStatus
	Address string // TargetAddress: host[:port][,tag]
	Alias   string // TargetAlias, optional
	TPGT    uint16 // TargetPortalGroupTag of a normal session
	Auth    LoginAuth
	// Base is the session's Params when TSIH is not 0, else zero.
	Base Params
	// Want are the limits for this login in place of TargetLoginConfig.Want; nil =
	// those.
	Want *Want
}

// LoginAuth says how an initiator proves itself. The zero value takes everyone.
type LoginAuth struct {
	// Required: only CHAP is accepted. Without it CHAP is accepted if the initiator
	// prefers it and Secret is set, and None otherwise.
	Required bool
	// Algorithms that are accepted; nil means CHAPAlgorithms.
	Algorithms []CHAPAlgorithm
	// Secret returns the secret of a CHAP name; nil or empty means that there is no
	// such account. It is called once a login, also for unknown names.
	Secret func(user string) []byte
	// OutName and OutSecret answer an initiator that wants the target to prove
	// itself; an empty secret refuses that.
	OutName   string
	OutSecret []byte
	// Outstanding tells whether a challenge is one that this target has outstanding
	// on another connection, to refuse its reflection. May be nil.
	Outstanding func(challenge []byte) bool
	// Issued is told each challenge that the login sends. May be nil.
	Issued func(challenge []byte)
}

// TargetLoginConfig is what a TargetLogin needs of its target. The functions are
// called by Step, on its goroutine.
type TargetLoginConfig struct {
	Want Want
	// Rand gives challenges and identifiers: crypto/rand.Reader but in tests.
	Rand io.Reader
	// Admit decides on an identity; called once.
	Admit func(*LoginIdentity) Admission
	// Start is called when the login has succeeded, before the last response is
	// sent: it makes or finds the session and returns its TSIH, not 0. Any status but
	// success ends the login. Not called for what was refused before.
	Start func(*LoginIdentity, Params) (tsih uint16, status LoginStatus)
	// StatSN is the first StatSN of the connection, Window the number of commands in
	// MaxCmdSN - ExpCmdSN + 1 that login responses announce (at least 1).
	StatSN Serial
	Window uint32
}

// TargetLogin is the target's side of a login (§6.3), pure: a request in, a response
// out. Not safe for concurrent use.
type TargetLogin struct {
	cfg    TargetLoginConfig
	id     LoginIdentity
	adm    Admission
	neg    *Negotiator
	in     TextBuffer
	out    TextQueue
	ready  bool // we agree to leave the stage
	first  LoginRequest
	stage  Stage
	begun  bool
	named  bool // the identity is known and admitted
	ended  bool
	pdus   int
	bytes  int
	pairs  int
	seen   map[string]bool
	auth   authState
	method string // AuthMethod that was agreed on
	chap   struct {
		alg       CHAPAlgorithm
		id        uint8
		challenge []byte
	}
	stat Serial
	p    Params
}

type authState uint8

const (
	authNone   authState = iota // nothing said
	authMethod                  // CHAP agreed, CHAP_A expected
	authAnswer                  // challenge sent, CHAP_N and CHAP_R expected
	authDone
)

// NewTargetLogin returns the machine for one connection.
func NewTargetLogin(cfg TargetLoginConfig) *TargetLogin {
	return &TargetLogin{cfg: cfg, seen: map[string]bool{}, stat: cfg.StatSN}
}

// LoginStep is what a target has to send. The response carries StatSN, ExpCmdSN and
// MaxCmdSN; ExpCmdSN is the request's CmdSN, which is right for the first connection
// of a session and to be replaced for others.
type LoginStep struct {
	Resp LoginResponse
	Data []byte
	Done bool // full feature phase has begun
	// Err is why the login failed, for logs; the connection is closed after Resp was
	// sent.
	Err *LoginError
}

// Identity is what is known of the initiator so far.
func (t *TargetLogin) Identity() LoginIdentity { return t.id }

// Params is what was negotiated; valid when Done.
func (t *TargetLogin) Params() Params { return t.p }

// Negotiator goes on in full feature phase (EnterFull was called); valid when Done.
func (t *TargetLogin) Negotiator() *Negotiator { return t.neg }

// StatSN is the next StatSN of the connection.
func (t *TargetLogin) StatSN() Serial { return t.stat }

// AuthMethod is the method agreed on: CHAP, None, or empty when nothing was said.
func (t *TargetLogin) AuthMethod() string { return t.method }

// Step takes a login request with its data segment and returns the response. After
// Done or Err there must be no further Step.
func (t *TargetLogin) Step(req *LoginRequest, data []byte) LoginStep {
	resp := LoginResponse{CSG: req.CSG, ISID: req.ISID, TSIH: req.TSIH, ITT: req.ITT, ExpCmdSN: req.CmdSN}
	seg, err := t.step(req, data, &resp)
	st := LoginStep{}
	if err != nil {
		le := &LoginError{}
		if !errors.As(err, &le) {
			le = &LoginError{Status: StatusInitiatorError, Why: err.Error()}
		}
		t.ended = true
		resp.Transit, resp.Continue, resp.NSG = false, false, 0
		resp.Status = le.Status
		seg = nil
		if le.Status.Class() == 1 {
			seg = AppendPair(nil, KeyTargetAddress, le.Address)
		}
		if le.reply != nil {
			seg = AppendText(seg, le.reply)
		}
		st.Err = le
	}
	resp.StatSN = t.stat
	t.stat++
	resp.MaxCmdSN = resp.ExpCmdSN.Add(max(t.cfg.Window, 1) - 1)
	st.Resp, st.Data = resp, seg
	st.Done = err == nil && resp.Transit && resp.NSG == StageFull
	return st
}

func fail(s LoginStatus, format string, a ...any) error {
	return &LoginError{Status: s, Why: fmt.Sprintf(format, a...)}
}

func (t *TargetLogin) step(req *LoginRequest, data []byte, resp *LoginResponse) ([]byte, error) {
	if t.ended {
		return nil, fail(StatusInvalidDuringLogin, "login is over")
	}
	if err := t.header(req); err != nil {
		return nil, err
	}
	t.pdus++
	t.bytes += len(data)
	if t.pdus > MaxLoginPDUs || t.bytes > MaxLoginText {
		return nil, fail(StatusInitiatorError, "login of more than %d requests or %d bytes", MaxLoginPDUs, MaxLoginText)
	}
	if !t.out.Empty() {
		// Our last response had the C bit: the request fetches the rest (§6.2).
		if len(data) > 0 || req.Continue {
			return nil, fail(StatusInitiatorError, "text in a request that has to fetch the rest of a response")
		}
		return t.send(req, resp)
	}
	pairs, err := t.in.Add(data, req.Continue)
	if err != nil {
		return nil, err
	}
	if req.Continue {
		return nil, nil // empty response asks for the rest
	}
	t.pairs += len(pairs)
	if t.pairs > MaxPairs {
		return nil, fail(StatusInitiatorError, "more than %d keys", MaxPairs)
	}
	var reply []Pair
	if !t.named {
		if reply, err = t.name(req, pairs); err != nil {
			return nil, err
		}
	}
	ready, more, err := t.negotiate(req, pairs)
	if err != nil {
		return nil, err
	}
	t.ready = ready
	t.out.Put(append(reply, more...)...)
	return t.send(req, resp)
}

// send takes the next part of our text. Only the last part can carry the T bit, and
// only in answer to a request that has it (§11.13.1).
func (t *TargetLogin) send(req *LoginRequest, resp *LoginResponse) ([]byte, error) {
	seg, more := t.out.Next(DefaultMaxRecv)
	resp.Continue = more
	if more || !req.Transit || !t.ready {
		return seg, nil
	}
	if req.NSG == StageFull {
		if err := t.finish(); err != nil {
			return nil, err
		}
		t.ended = true
		t.neg.EnterFull()
		resp.TSIH = t.id.TSIH // §11.13.3: the handle comes with the last response
	}
	resp.Transit, resp.NSG = true, req.NSG
	t.stage, t.ready = req.NSG, false
	return seg, nil
}

// header checks what must hold for every request.
func (t *TargetLogin) header(req *LoginRequest) error {
	if !t.begun {
		t.begun = true
		t.first = *req
		t.stage = req.CSG
		t.id.ISID, t.id.TSIH, t.id.CID = req.ISID, req.TSIH, req.CID
		if req.VersionMin > 0 {
			return fail(StatusUnsupportedVersion, "initiator wants version %d to %d, we have 0", req.VersionMin, req.VersionMax)
		}
		if req.CSG != StageSecurity && req.CSG != StageOperational {
			return fail(StatusInitiatorError, "login begins in %s", req.CSG)
		}
	}
	f := &t.first
	switch {
	case req.ISID != f.ISID, req.TSIH != f.TSIH, req.CID != f.CID, req.ITT != f.ITT, req.CmdSN != f.CmdSN:
		return fail(StatusInitiatorError, "ISID, TSIH, CID, task tag or CmdSN changed during login")
	case req.Transit && req.Continue:
		return fail(StatusInitiatorError, "T and C bits are both set")
	case req.CSG != t.stage:
		return fail(StatusInitiatorError, "request is in %s, login is in %s", req.CSG, t.stage)
	case req.Transit && (req.NSG <= req.CSG || req.NSG != StageOperational && req.NSG != StageFull):
		return fail(StatusInitiatorError, "transition from %s to %s", req.CSG, req.NSG)
	}
	return nil
}

// name reads who the initiator is and asks for admission.
func (t *TargetLogin) name(req *LoginRequest, pairs []Pair) ([]Pair, error) {
	t.named = true
	get := func(key string) (string, bool) {
		for _, p := range pairs {
			if p.Key == key {
				return p.Value, true
			}
		}
		return "", false
	}
	ini, ok := get(KeyInitiatorName)
	if !ok {
		return nil, fail(StatusMissingParameter, "no InitiatorName")
	}
	if err := CheckName(ini); err != nil {
		return nil, fail(StatusInitiatorError, "InitiatorName: %v", err)
	}
	t.id.InitiatorName = NormalizeName(ini)
	t.id.InitiatorAlias, _ = get(KeyInitiatorAlias)
	switch typ, ok := get(KeySessionType); {
	case !ok, typ == "Normal":
	case typ == "Discovery":
		t.id.Discovery = true
	default:
		return nil, fail(StatusSessionType, "SessionType %.20q", typ)
	}
	tgt, ok := get(KeyTargetName)
	switch {
	case ok:
		if err := CheckName(tgt); err != nil {
			return nil, fail(StatusNotFound, "TargetName: %v", err)
		}
		t.id.TargetName = NormalizeName(tgt)
	case !t.id.Discovery:
		return nil, fail(StatusMissingParameter, "no TargetName")
	}
	t.adm = t.cfg.Admit(&t.id)
	if t.adm.Status != StatusSuccess {
		return nil, &LoginError{Status: t.adm.Status, Address: t.adm.Address}
	}
	leading := req.TSIH == 0
	base := t.adm.Base
	if base == (Params{}) {
		base = DefaultParams()
	}
	want := &t.cfg.Want
	if t.adm.Want != nil {
		want = t.adm.Want
	}
	t.neg = NewNegotiator(Target, leading, base, *want)
	t.neg.SetDiscovery(t.id.Discovery)
	var reply []Pair
	if !t.id.Discovery {
		if t.adm.Alias != "" {
			reply = append(reply, Pair{KeyTargetAlias, t.adm.Alias})
		}
		if leading {
			reply = append(reply, Pair{KeyTargetPortalGroupTag, strconv.Itoa(int(t.adm.TPGT))})
		}
	}
	return reply, nil
}

// negotiate handles the pairs of a complete text. ready says that we agree to leave
// the stage.
func (t *TargetLogin) negotiate(req *LoginRequest, pairs []Pair) (ready bool, reply []Pair, err error) {
	sec := map[string]string{}
	var oper []Pair
	for _, p := range pairs {
		k, known := LookupKey(p.Key)
		if !known || k.Kind != KindDeclare {
			oper = append(oper, p)
			continue
		}
		if t.seen[p.Key] {
			return false, nil, fail(StatusInitiatorError, "key %s came twice", p.Key)
		}
		t.seen[p.Key] = true
		switch {
		case k.Security:
			sec[p.Key] = p.Value
		case k.Sender == Target, k.When == WhenFull:
			reply = append(reply, Pair{p.Key, Rejected})
		}
	}
	if t.stage == StageSecurity {
		more, err := t.security(sec, req)
		if err != nil {
			return false, nil, err
		}
		reply = append(reply, more...)
	} else {
		if len(sec) > 0 {
			return false, nil, fail(StatusInitiatorError, "security key in %s", t.stage)
		}
		if t.auth != authDone && t.adm.Auth.Required {
			return false, nil, fail(StatusAuthFailure, "login without the security stage, but CHAP is required")
		}
	}
	more, err := t.neg.Receive(oper)
	if err != nil {
		return false, nil, err
	}
	reply = append(reply, more...)
	if t.stage == StageOperational {
		reply = append(reply, t.neg.Offers()...)
		return true, reply, nil
	}
	if t.auth == authNone && !t.adm.Auth.Required {
		return true, reply, nil
	}
	return t.auth == authDone, reply, nil
}

// security runs AuthMethod and CHAP (§12).
func (t *TargetLogin) security(in map[string]string, req *LoginRequest) ([]Pair, error) {
	a := &t.adm.Auth
	if m, ok := in[KeyAuthMethod]; ok {
		if t.auth != authNone {
			return nil, fail(StatusInitiatorError, "AuthMethod after authentication has begun")
		}
		for v := range strings.SplitSeq(m, ",") {
			switch {
			case v == "CHAP" && (a.Required || a.Secret != nil):
				t.auth, t.method = authMethod, v
			case v == "None" && !a.Required:
				t.auth, t.method = authDone, v
			default:
				continue
			}
			break
		}
		if t.auth == authNone {
			return nil, &LoginError{Status: StatusAuthFailure, Why: fmt.Sprintf("AuthMethod=%.60s: none is acceptable", m),
				reply: []Pair{{KeyAuthMethod, Rejected}}}
		}
		if t.auth == authDone || in[KeyCHAPA] == "" {
			for k := range in {
				if k != KeyAuthMethod {
					return nil, fail(StatusInitiatorError, "%s together with AuthMethod", k)
				}
			}
			return []Pair{{KeyAuthMethod, t.method}}, nil
		}
		// CHAP_A in the same request as AuthMethod: not in the standard's examples, but
		// nothing forbids a sure initiator.
		reply, err := t.security(map[string]string{KeyCHAPA: in[KeyCHAPA]}, req)
		if err == nil && len(in) > 2 {
			err = fail(StatusInitiatorError, "CHAP keys before the challenge")
		}
		return append([]Pair{{KeyAuthMethod, t.method}}, reply...), err
	}
	switch t.auth {
	case authMethod:
		return t.challenge(in)
	case authAnswer:
		return t.answer(in)
	}
	if len(in) > 0 {
		return nil, fail(StatusInitiatorError, "CHAP key without AuthMethod=CHAP")
	}
	if t.auth == authNone && a.Required && req.Transit {
		return nil, fail(StatusAuthFailure, "initiator leaves the security stage without AuthMethod, but CHAP is required")
	}
	return nil, nil
}

// challenge answers CHAP_A.
func (t *TargetLogin) challenge(in map[string]string) ([]Pair, error) {
	offer, ok := in[KeyCHAPA]
	if !ok || len(in) != 1 {
		return nil, fail(StatusAuthFailure, "expected CHAP_A and nothing else")
	}
	allowed := t.adm.Auth.Algorithms
	if allowed == nil {
		allowed = CHAPAlgorithms
	}
	alg, ok, err := PickCHAPAlgorithm(offer, allowed)
	if err != nil {
		return nil, fail(StatusInitiatorError, "CHAP_A: %v", err)
	}
	if !ok {
		return nil, &LoginError{Status: StatusAuthFailure, Why: fmt.Sprintf("CHAP_A=%.60s: none is acceptable", offer),
			reply: []Pair{{KeyCHAPA, Rejected}}}
	}
	buf := make([]byte, 1+max(CHAPMinChallenge, alg.Size()))
	if _, err := io.ReadFull(t.cfg.Rand, buf); err != nil {
		return nil, fail(StatusTargetError, "no random numbers: %v", err)
	}
	c := &t.chap
	c.alg, c.id, c.challenge = alg, buf[0], buf[1:]
	if t.adm.Auth.Issued != nil {
		t.adm.Auth.Issued(c.challenge)
	}
	t.auth = authAnswer
	return []Pair{{KeyCHAPA, strconv.Itoa(int(alg))}, {KeyCHAPI, strconv.Itoa(int(c.id))}, {KeyCHAPC, FormatBinary(c.challenge)}}, nil
}

// answer verifies CHAP_N and CHAP_R and, for mutual CHAP, answers the initiator's
// challenge. Reasons are for our log: the initiator sees 2/1 for all of them.
func (t *TargetLogin) answer(in map[string]string) ([]Pair, error) {
	a, c := &t.adm.Auth, &t.chap
	user, okN := in[KeyCHAPN]
	resp, okR := in[KeyCHAPR]
	idText, okI := in[KeyCHAPI]
	chText, okC := in[KeyCHAPC]
	if !okN || !okR || okI != okC || len(in) != 2+2*b2i(okI) {
		return nil, fail(StatusAuthFailure, "expected CHAP_N, CHAP_R and, for mutual authentication, CHAP_I and CHAP_C")
	}
	r, err := ParseBinary(resp)
	if err != nil {
		return nil, fail(StatusInitiatorError, "CHAP_R: %v", err)
	}
	var secret []byte
	if a.Secret != nil {
		secret = a.Secret(user)
	}
	known := len(secret) > 0
	if !known {
		secret = c.challenge // the same work for unknown names
	}
	if good := CHAPVerify(c.alg, c.id, secret, c.challenge, r); !good || !known {
		why := "wrong secret"
		if !known {
			why = "no such account"
		}
		return nil, fail(StatusAuthFailure, "CHAP name %.64q: %s", user, why)
	}
	var reply []Pair
	if okI {
		id, err := ParseNumber(idText, 0, 255)
		if err != nil {
			return nil, fail(StatusInitiatorError, "CHAP_I: %v", err)
		}
		ch, err := ParseBinary(chText)
		if err != nil {
			return nil, fail(StatusInitiatorError, "CHAP_C: %v", err)
		}
		switch {
		case len(ch) < CHAPMinChallenge:
			return nil, fail(StatusAuthFailure, "challenge of %d bytes, want at least %d", len(ch), CHAPMinChallenge)
		case bytes.Equal(ch, c.challenge), a.Outstanding != nil && a.Outstanding(ch):
			return nil, fail(StatusAuthFailure, "initiator reflects our own challenge (§9.2.1)")
		case len(a.OutSecret) == 0:
			return nil, fail(StatusAuthFailure, "initiator wants mutual CHAP, no outgoing account is bound")
		case bytes.Equal(a.OutSecret, secret):
			return nil, fail(StatusAuthFailure, "the secrets of both directions are the same (§9.2.1)")
		}
		reply = []Pair{{KeyCHAPN, a.OutName}, {KeyCHAPR, FormatBinary(CHAPResponse(c.alg, uint8(id), a.OutSecret, ch))}}
	}
	t.id.User = user
	t.auth = authDone
	return reply, nil
}

// finish starts the session; the last response carries its handle.
func (t *TargetLogin) finish() error {
	if t.auth != authDone && t.adm.Auth.Required {
		return fail(StatusAuthFailure, "CHAP is required")
	}
	p, err := t.neg.Finish()
	if err != nil {
		return err
	}
	id := t.id
	tsih, status := t.cfg.Start(&id, p)
	if status != StatusSuccess {
		return &LoginError{Status: status, Why: "session was refused"}
	}
	if tsih == 0 {
		return fail(StatusTargetError, "session without a handle")
	}
	t.p, t.id.TSIH = p, tsih
	return nil
}
