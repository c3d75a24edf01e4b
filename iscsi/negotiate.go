package iscsi

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Kind is how the value of a key comes about (§6.2).
type Kind uint8

// Kinds of keys.
const (
	KindDeclare    Kind = iota // text said by one side, not answered
	KindDeclareNum             // number said by each side for itself, not answered
	KindList                   // responder takes the first value that it accepts
	KindMin                    // smaller of two numbers
	KindMax                    // larger of two numbers
	KindOr                     // Yes if either says Yes
	KindAnd                    // Yes if both say Yes
	KindObsolete               // RFC 3720 only: answered with No, or Irrelevant
)

// When a key may be sent (§13, "Use").
type When uint8

// Uses of keys.
const (
	WhenLeading When = iota // LO: login of the leading connection
	WhenInit                // IO: login of any connection
	WhenAll                 // login and full feature phase
	WhenFull                // FFPO: full feature phase
)

// KeyInfo is one row of the table of keys.
type KeyInfo struct {
	Name    string
	Kind    Kind
	Default string
	When    When
	Session bool // scope: session, otherwise connection
	// Sender is Initiator, Target, or 0 for both.
	Sender   Role
	Min, Max uint64
	// Normal: irrelevant in discovery sessions.
	Normal bool
	// Security: belongs to the security stage.
	Security bool
	Binary   bool // value may be as long as MaxBinary allows

	list func(*Want) []string
	set  func(*Params, string)
	num  func(*Params) *int
	flag func(*Params) *bool
}

// Key names.
const (
	KeyHeaderDigest             = "HeaderDigest"
	KeyDataDigest               = "DataDigest"
	KeyMaxConnections           = "MaxConnections"
	KeyInitialR2T               = "InitialR2T"
	KeyImmediateData            = "ImmediateData"
	KeyMaxRecvDataSegmentLength = "MaxRecvDataSegmentLength"
	KeyMaxBurstLength           = "MaxBurstLength"
	KeyFirstBurstLength         = "FirstBurstLength"
	KeyMaxOutstandingR2T        = "MaxOutstandingR2T"
	KeyDataPDUInOrder           = "DataPDUInOrder"
	KeyDataSequenceInOrder      = "DataSequenceInOrder"
	KeyDefaultTime2Wait         = "DefaultTime2Wait"
	KeyDefaultTime2Retain       = "DefaultTime2Retain"
	KeyErrorRecoveryLevel       = "ErrorRecoveryLevel"
	KeyTaskReporting            = "TaskReporting"
	KeyProtocolLevel            = "iSCSIProtocolLevel"
	KeySessionType              = "SessionType"
	KeyInitiatorName            = "InitiatorName"
	KeyInitiatorAlias           = "InitiatorAlias"
	KeyTargetName               = "TargetName"
	KeyTargetAlias              = "TargetAlias"
	KeyTargetAddress            = "TargetAddress"
	KeyTargetPortalGroupTag     = "TargetPortalGroupTag"
	KeySendTargets              = "SendTargets"
	KeyAuthMethod               = "AuthMethod"
	KeyCHAPA                    = "CHAP_A"
	KeyCHAPI                    = "CHAP_I"
	KeyCHAPC                    = "CHAP_C"
	KeyCHAPN                    = "CHAP_N"
	KeyCHAPR                    = "CHAP_R"
)

// DefaultMaxRecv is the MaxRecvDataSegmentLength that holds until one is declared,
// and throughout login (§13.12).
const DefaultMaxRecv = 8192

const maxSegNum = MaxDataSegment

// keys is §13 as a table.
var keys = []KeyInfo{
	{Name: KeyHeaderDigest, Kind: KindList, Default: "None", When: WhenInit,
		list: func(w *Want) []string { return w.HeaderDigests }, set: func(p *Params, v string) { p.HeaderDigest = v == "CRC32C" }},
	{Name: KeyDataDigest, Kind: KindList, Default: "None", When: WhenInit,
		list: func(w *Want) []string { return w.DataDigests }, set: func(p *Params, v string) { p.DataDigest = v == "CRC32C" }},
	{Name: KeyMaxConnections, Kind: KindMin, Default: "1", When: WhenLeading, Session: true, Min: 1, Max: 65535, Normal: true,
		num: func(p *Params) *int { return &p.MaxConnections }},
	{Name: KeyInitialR2T, Kind: KindOr, Default: "Yes", When: WhenLeading, Session: true, Normal: true,
		flag: func(p *Params) *bool { return &p.InitialR2T }},
	{Name: KeyImmediateData, Kind: KindAnd, Default: "Yes", When: WhenLeading, Session: true, Normal: true,
		flag: func(p *Params) *bool { return &p.ImmediateData }},
	{Name: KeyMaxRecvDataSegmentLength, Kind: KindDeclareNum, Default: "8192", When: WhenAll, Min: 512, Max: maxSegNum},
	{Name: KeyMaxBurstLength, Kind: KindMin, Default: "262144", When: WhenLeading, Session: true, Min: 512, Max: maxSegNum, Normal: true,
		num: func(p *Params) *int { return &p.MaxBurstLength }},
	{Name: KeyFirstBurstLength, Kind: KindMin, Default: "65536", When: WhenLeading, Session: true, Min: 512, Max: maxSegNum, Normal: true,
		num: func(p *Params) *int { return &p.FirstBurstLength }},
	{Name: KeyMaxOutstandingR2T, Kind: KindMin, Default: "1", When: WhenLeading, Session: true, Min: 1, Max: 65535, Normal: true,
		num: func(p *Params) *int { return &p.MaxOutstandingR2T }},
	{Name: KeyDataPDUInOrder, Kind: KindOr, Default: "Yes", When: WhenLeading, Session: true, Normal: true,
		flag: func(p *Params) *bool { return &p.DataPDUInOrder }},
	{Name: KeyDataSequenceInOrder, Kind: KindOr, Default: "Yes", When: WhenLeading, Session: true, Normal: true,
		flag: func(p *Params) *bool { return &p.DataSequenceInOrder }},
	{Name: KeyDefaultTime2Wait, Kind: KindMax, Default: "2", When: WhenLeading, Session: true, Max: 3600,
		num: func(p *Params) *int { return &p.DefaultTime2Wait }},
	{Name: KeyDefaultTime2Retain, Kind: KindMin, Default: "20", When: WhenLeading, Session: true, Max: 3600,
		num: func(p *Params) *int { return &p.DefaultTime2Retain }},
	{Name: KeyErrorRecoveryLevel, Kind: KindMin, Default: "0", When: WhenLeading, Session: true, Max: 2,
		num: func(p *Params) *int { return &p.ErrorRecoveryLevel }},
	{Name: KeyTaskReporting, Kind: KindList, Default: "RFC3720", When: WhenLeading, Session: true, Normal: true,
		list: func(w *Want) []string { return w.TaskReportings }, set: func(p *Params, v string) { p.TaskReporting = v }},
	{Name: KeyProtocolLevel, Kind: KindMin, Default: "1", When: WhenLeading, Session: true, Max: 31, Normal: true,
		num: func(p *Params) *int { return &p.ProtocolLevel }},

	{Name: KeySessionType, Kind: KindDeclare, Default: "Normal", When: WhenLeading, Session: true, Sender: Initiator},
	{Name: KeyInitiatorName, Kind: KindDeclare, When: WhenInit, Session: true, Sender: Initiator},
	{Name: KeyInitiatorAlias, Kind: KindDeclare, When: WhenAll, Session: true, Sender: Initiator},
	{Name: KeyTargetName, Kind: KindDeclare, When: WhenInit, Session: true},
	{Name: KeyTargetAlias, Kind: KindDeclare, When: WhenAll, Session: true, Sender: Target},
	{Name: KeyTargetAddress, Kind: KindDeclare, When: WhenAll, Session: true, Sender: Target},
	{Name: KeyTargetPortalGroupTag, Kind: KindDeclare, When: WhenInit, Session: true, Sender: Target, Max: 65535},
	{Name: KeySendTargets, Kind: KindDeclare, When: WhenFull, Session: true, Sender: Initiator},

	{Name: KeyAuthMethod, Kind: KindDeclare, Default: "None", When: WhenInit, Security: true},
	{Name: KeyCHAPA, Kind: KindDeclare, When: WhenInit, Security: true},
	{Name: KeyCHAPI, Kind: KindDeclare, When: WhenInit, Security: true, Max: 255},
	{Name: KeyCHAPC, Kind: KindDeclare, When: WhenInit, Security: true, Binary: true},
	{Name: KeyCHAPN, Kind: KindDeclare, When: WhenInit, Security: true},
	{Name: KeyCHAPR, Kind: KindDeclare, When: WhenInit, Security: true, Binary: true},

	// Markers of RFC 3720, obsolete since RFC 7143 §13.25: "responders SHOULD answer No".
	{Name: "IFMarker", Kind: KindObsolete, Default: "No", When: WhenInit},
	{Name: "OFMarker", Kind: KindObsolete, Default: "No", When: WhenInit},
	{Name: "IFMarkInt", Kind: KindObsolete, Default: Irrelevant, When: WhenInit},
	{Name: "OFMarkInt", Kind: KindObsolete, Default: Irrelevant, When: WhenInit},
}

var keyIndex = func() map[string]int {
	m := make(map[string]int, len(keys))
	for i := range keys {
		m[keys[i].Name] = i
	}
	return m
}()

// LookupKey returns the row of a key.
func LookupKey(name string) (*KeyInfo, bool) {
	i, ok := keyIndex[name]
	if !ok {
		return nil, false
	}
	return &keys[i], true
}

// Params are the values in force. The zero value is not useful, see DefaultParams.
// Lengths are in bytes, times in seconds.
type Params struct {
	HeaderDigest, DataDigest bool // CRC32C
	MaxConnections           int
	InitialR2T               bool // no unsolicited Data-Out
	ImmediateData            bool
	MaxRecv                  int // MaxRecvDataSegmentLength that we declared
	MaxSend                  int // MaxRecvDataSegmentLength that the peer declared
	MaxBurstLength           int
	FirstBurstLength         int // at most MaxBurstLength
	MaxOutstandingR2T        int
	DataPDUInOrder           bool
	DataSequenceInOrder      bool
	DefaultTime2Wait         int
	DefaultTime2Retain       int
	ErrorRecoveryLevel       int
	TaskReporting            string
	ProtocolLevel            int
}

// DefaultParams are the values that hold when nothing is negotiated (§13).
func DefaultParams() Params {
	return Params{MaxConnections: 1, InitialR2T: true, ImmediateData: true, MaxRecv: DefaultMaxRecv, MaxSend: DefaultMaxRecv,
		MaxBurstLength: 262144, FirstBurstLength: 65536, MaxOutstandingR2T: 1, DataPDUInOrder: true, DataSequenceInOrder: true,
		DefaultTime2Wait: 2, DefaultTime2Retain: 20, TaskReporting: "RFC3720", ProtocolLevel: 1}
}

// Want is what one side wants of a negotiation: offers of an initiator, limits of
// a target. In Params, MaxRecv is what we declare; MaxSend and the fields that have
// a list here are not used.
type Want struct {
	Params
	// What we take of HeaderDigest, DataDigest and TaskReporting, best first.
	HeaderDigests, DataDigests []string
	TaskReportings             []string
}

// DefaultWant suits both sides on a local network: 256 KiB segments and first
// burst, 1 MiB bursts, immediate and unsolicited data, either digest setting with
// none preferred.
func DefaultWant() Want {
	w := Want{Params: DefaultParams(), HeaderDigests: []string{"None", "CRC32C"}, DataDigests: []string{"None", "CRC32C"},
		TaskReportings: []string{"RFC3720"}}
	w.InitialR2T = false
	w.MaxRecv = 256 << 10
	w.MaxBurstLength = 1 << 20
	w.FirstBurstLength = 256 << 10
	w.MaxOutstandingR2T = 8
	return w
}

// Validate returns an error that names the first value out of its legal range.
func (w *Want) Validate() error {
	for i := range keys {
		k := &keys[i]
		switch {
		case k.num != nil:
			if v := *k.num(&w.Params); v < 0 || uint64(v) < k.Min || uint64(v) > k.Max {
				return fmt.Errorf("%s %d is not in %d-%d", k.Name, v, k.Min, k.Max)
			}
		case k.list != nil:
			if len(k.list(w)) == 0 {
				return fmt.Errorf("%s accepts no value, want at least %s", k.Name, k.Default)
			}
		}
	}
	if w.MaxRecv < 512 || w.MaxRecv > maxSegNum {
		return fmt.Errorf("%s %d is not in 512-%d", KeyMaxRecvDataSegmentLength, w.MaxRecv, maxSegNum)
	}
	if w.FirstBurstLength > w.MaxBurstLength {
		return fmt.Errorf("%s %d exceeds %s %d", KeyFirstBurstLength, w.FirstBurstLength, KeyMaxBurstLength, w.MaxBurstLength)
	}
	return nil
}

// Negotiator is the state of one side of an operational negotiation (§6.2), pure.
// Keys of KindDeclare are the login machines' business, not its.
type Negotiator struct {
	role      Role
	leading   bool
	discovery bool
	full      bool // full feature phase
	want      Want
	p         Params
	offered   map[string]string // by us, not answered yet
	seen      map[string]bool   // negotiated or declared by the peer
	declared  bool              // our MaxRecvDataSegmentLength was sent
}

// NewNegotiator returns the negotiator of a side. leading says that the connection
// is the session's first; others negotiate connection-scope keys only. base is what
// is in force before: DefaultParams, or for a further connection the session's.
func NewNegotiator(role Role, leading bool, base Params, want Want) *Negotiator {
	base.HeaderDigest, base.DataDigest, base.MaxRecv, base.MaxSend = false, false, DefaultMaxRecv, DefaultMaxRecv
	return &Negotiator{role: role, leading: leading, want: want, p: base, offered: map[string]string{}, seen: map[string]bool{}}
}

// SetDiscovery says that the session is for discovery.
func (n *Negotiator) SetDiscovery(on bool) { n.discovery = on }

// EnterFull says that the connection is in full feature phase: from here only keys
// with use ALL are negotiated, in text exchanges, and may come up again.
func (n *Negotiator) EnterFull() { n.full, n.seen = true, map[string]bool{} }

// Offers returns what we say without being asked: an initiator all its offers, a
// target its MaxRecvDataSegmentLength. A second call returns what is still unsaid.
func (n *Negotiator) Offers() []Pair {
	var out []Pair
	if n.role == Initiator && !n.full {
		for i := range keys {
			k := &keys[i]
			if k.list == nil && k.num == nil && k.flag == nil || k.Normal && n.discovery || k.When == WhenLeading && !n.leading {
				continue
			}
			if _, dup := n.offered[k.Name]; dup || n.seen[k.Name] {
				continue
			}
			v := n.ours(k)
			if v == k.Default && k.Name == KeyProtocolLevel || v == k.Default && k.Name == KeyTaskReporting {
				continue // unknown to older targets; nothing to gain
			}
			n.offered[k.Name] = v
			out = append(out, Pair{k.Name, v})
		}
	}
	if !n.declared {
		n.declared = true
		n.p.MaxRecv = n.want.MaxRecv
		out = append(out, Pair{KeyMaxRecvDataSegmentLength, strconv.Itoa(n.want.MaxRecv)})
	}
	return out
}

// ours is our own value of a key as it goes on the wire.
func (n *Negotiator) ours(k *KeyInfo) string {
	switch {
	case k.list != nil:
		return strings.Join(k.list(&n.want), ",")
	case k.num != nil:
		return strconv.Itoa(*k.num(&n.want.Params))
	case k.flag != nil:
		return FormatBool(*k.flag(&n.want.Params))
	}
	return k.Default
}

// negError is a negotiation that has to end: the login fails with 2/0, a text
// exchange with Reject.
func negError(format string, a ...any) error {
	return &LoginError{Status: StatusInitiatorError, Why: fmt.Sprintf(format, a...)}
}

// Receive takes pairs of the peer, answers to our offers and offers of its own, and
// returns our answers in order. Values out of the legal range are answered with
// Reject and change nothing; keys not in the table with NotUnderstood. An error is a
// *LoginError: a key twice, a reserved word as an offer, an answer that does not
// fit its offer.
func (n *Negotiator) Receive(pairs []Pair) ([]Pair, error) {
	out := make([]Pair, 0, len(pairs))
	// FirstBurstLength depends on MaxBurstLength, in whatever order they come.
	for _, p := range pairs {
		if p.Key != KeyFirstBurstLength {
			continue
		}
		pairs = slices.Clone(pairs)
		slices.SortStableFunc(pairs, func(a, b Pair) int {
			return b2i(a.Key == KeyFirstBurstLength) - b2i(b.Key == KeyFirstBurstLength)
		})
		break
	}
	for _, p := range pairs {
		ans, ok, err := n.receive(p)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, Pair{p.Key, ans})
		}
	}
	return out, nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func reservedWord(v string) bool { return v == NotUnderstood || v == Irrelevant || v == Rejected }

func (n *Negotiator) receive(p Pair) (answer string, ok bool, err error) {
	if mine, pending := n.offered[p.Key]; pending {
		delete(n.offered, p.Key)
		n.seen[p.Key] = true
		return "", false, n.answered(p, mine)
	}
	if n.seen[p.Key] {
		return "", false, negError("key %s came twice", p.Key)
	}
	n.seen[p.Key] = true
	k, known := LookupKey(p.Key)
	if !known {
		if reservedWord(p.Value) {
			return "", false, nil // an answer to nothing we said; no answer to an answer
		}
		return NotUnderstood, true, nil
	}
	if reservedWord(p.Value) {
		if k.Kind == KindDeclareNum && p.Value != Irrelevant {
			return "", false, negError("peer answered our declaration with %s", p)
		}
		return "", false, negError("%s: reserved word is no offer", p)
	}
	switch {
	case k.Kind == KindDeclare, k.Sender != 0 && k.Sender == n.role:
		return Rejected, true, nil
	case n.full && k.When != WhenAll && k.When != WhenFull, !n.full && k.When == WhenFull:
		return Rejected, true, nil
	case k.When == WhenLeading && !n.leading:
		return Irrelevant, true, nil
	case k.Normal && n.discovery:
		return Irrelevant, true, nil
	}
	switch k.Kind {
	case KindObsolete:
		return k.Default, true, nil
	case KindDeclareNum:
		v, err := ParseNumber(p.Value, k.Min, k.Max)
		if err != nil {
			return Rejected, true, nil
		}
		n.p.MaxSend = int(v)
		return "", false, nil
	case KindList:
		mine := k.list(&n.want)
		for v := range strings.SplitSeq(p.Value, ",") {
			if slices.Contains(mine, v) {
				k.set(&n.p, v)
				return v, true, nil
			}
		}
		return Rejected, true, nil
	case KindMin, KindMax:
		v, err := ParseNumber(p.Value, k.Min, k.Max)
		if err != nil {
			return Rejected, true, nil
		}
		r := int(v)
		mine := *k.num(&n.want.Params)
		if k.Kind == KindMin {
			r = min(r, mine)
		} else {
			r = max(r, mine)
		}
		if k.Name == KeyFirstBurstLength {
			r = min(r, n.p.MaxBurstLength)
		}
		*k.num(&n.p) = r
		return strconv.Itoa(r), true, nil
	default: // KindOr, KindAnd
		v, err := ParseBool(p.Value)
		if err != nil {
			return Rejected, true, nil
		}
		mine := *k.flag(&n.want.Params)
		r := v || mine
		if k.Kind == KindAnd {
			r = v && mine
		}
		*k.flag(&n.p) = r
		return FormatBool(r), true, nil
	}
}

// answered takes the answer to our offer mine.
func (n *Negotiator) answered(p Pair, mine string) error {
	k, _ := LookupKey(p.Key)
	if reservedWord(p.Value) {
		// The default stays in force. Where that is a value we did not offer, there
		// is no agreement.
		if k.Kind == KindList && !slices.Contains(k.list(&n.want), k.Default) {
			return negError("peer answered our offer %s=%s with %s", p.Key, mine, p.Value)
		}
		return nil
	}
	bad := func() error { return negError("answer %s does not fit our offer %s", p, mine) }
	switch k.Kind {
	case KindList:
		if !slices.Contains(k.list(&n.want), p.Value) {
			return bad()
		}
		k.set(&n.p, p.Value)
	case KindMin, KindMax:
		v, err := ParseNumber(p.Value, k.Min, k.Max)
		if err != nil {
			return bad()
		}
		own := uint64(*k.num(&n.want.Params))
		if k.Kind == KindMin && v > own || k.Kind == KindMax && v < own {
			return bad()
		}
		*k.num(&n.p) = int(v)
	case KindOr, KindAnd:
		v, err := ParseBool(p.Value)
		own := *k.flag(&n.want.Params)
		if err != nil || k.Kind == KindOr && own && !v || k.Kind == KindAnd && !own && v {
			return bad()
		}
		*k.flag(&n.p) = v
	}
	return nil
}

// Finish ends the negotiation and returns what is in force. Boolean offers whose
// answer may be left out (§6.2.2: No for AND, Yes for OR) are settled; any other
// offer without an answer is a *LoginError.
func (n *Negotiator) Finish() (Params, error) {
	for name, mine := range n.offered {
		k, _ := LookupKey(name)
		switch {
		case k.Kind == KindOr && mine == "Yes":
			*k.flag(&n.p) = true
		case k.Kind == KindAnd && mine == "No":
			*k.flag(&n.p) = false
		default:
			return Params{}, negError("peer did not answer our offer %s=%s", name, mine)
		}
	}
	clear(n.offered)
	n.p.FirstBurstLength = min(n.p.FirstBurstLength, n.p.MaxBurstLength)
	return n.p, nil
}

// Params is what is in force now.
func (n *Negotiator) Params() Params { return n.p }
