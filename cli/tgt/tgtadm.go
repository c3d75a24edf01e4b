package tgt

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// version is what -V prints: the tgt whose behaviour this is.
const version = "1.0.85"

var tgtadmOptions = []option{
	{"debug", 'd', false}, {"help", 'h', false}, {"version", 'V', false}, {"lld", 'L', true}, {"op", 'o', true}, {"mode", 'm', true},
	{"tid", 't', true}, {"sid", 's', true}, {"cid", 'c', true}, {"lun", 'l', true}, {"name", 'n', true}, {"value", 'v', true},
	{"backing-store", 'b', true}, {"bstype", 'E', true}, {"bsopts", 'S', true}, {"bsoflags", 'f', true}, {"blocksize", 'y', true},
	{"targetname", 'T', true}, {"initiator-address", 'I', true}, {"initiator-name", 'Q', true}, {"user", 'u', true}, {"password", 'p', true},
	{"host", 'H', true}, {"force", 'F', false}, {"outgoing", 'O', false}, {"params", 'P', true}, {"bus", 'B', true}, {"device-type", 'Y', true},
	{"control-port", 'C', true},
}

var modes = map[string]string{"system": "system", "sys": "system", "target": "target", "tgt": "target", "logicalunit": "logicalunit", "lu": "logicalunit",
	"portal": "portal", "pt": "portal", "session": "session", "sess": "session", "connection": "connection", "conn": "connection", "account": "account", "lld": "lld"}

// ops stand in the order of their numbers, which one message shows.
var ops = []string{"new", "delete", "show", "bind", "unbind", "update", "stat", "start", "stop"}

// request is a command line that was understood.
type request struct {
	op, mode, lld string
	given         map[byte]bool // by the letter of the option
	order         []byte        // the letters as they came
	val           map[byte]string
	tid, lun      int // -1: not given
	sid, cid      int64
	block         int
}

func (r *request) has(letter byte) bool { return r.given[letter] }

func (r *request) s(letter byte) string { return r.val[letter] }

// errHelp and errVersion end a run in order.
type done struct{ text string }

func (d done) Error() string { return d.text }

func number(o option, s string, limit int64) (int64, error) {
	n, err := strconv.ParseInt(s, 0, 64)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && n > limit:
		return 0, usage("-%c argument value '%s' out of range", o.short, s)
	case err != nil, n < 0, strings.ContainsAny(s, "_bBoO"): // Go's literals, not C's
		return 0, usage("-%c argument value '%s' invalid", o.short, s)
	}
	return n, nil
}

// parse reads a command line of tgtadm.
func parse(args []string) (*request, error) {
	args = slices.Clone(args)
	for i, a := range args {
		// A tutorial writes -lld for --lld.
		if a == "-lld" {
			args[i] = "--lld"
		}
	}
	ps, err := getopt("tgtadm", tgtadmOptions, args)
	r := &request{given: map[byte]bool{}, val: map[byte]string{}, tid: -1, lun: -1, sid: -1, cid: -1, lld: "iscsi"}
	for _, p := range ps {
		o := p.opt
		if o.long == "" {
			return nil, usage("tgtadm: unrecognized option '%s'", p.arg)
		}
		r.given[o.short], r.val[o.short], r.order = true, p.arg, append(r.order, o.short)
		var n int64
		var perr error
		switch o.short {
		case 'h':
			return nil, done{help}
		case 'V':
			return nil, done{version + "\n"}
		case 'L':
			r.lld = p.arg
		case 'o':
			if !slices.Contains(ops, p.arg) {
				return nil, &failure{"unknown operation: " + p.arg, 1, nil}
			}
			r.op = p.arg
		case 'm':
			if r.mode = modes[p.arg]; r.mode == "" {
				return nil, &failure{"unknown mode: " + p.arg, 1, nil}
			}
		case 't':
			if n, perr = number(o, p.arg, math.MaxInt32); perr == nil && n == 0 {
				return nil, fail("'tid' cannot be 0")
			}
			r.tid = int(n)
		case 'l':
			n, perr = number(o, p.arg, 16383)
			r.lun = int(n)
		case 's':
			r.sid, perr = number(o, p.arg, math.MaxInt64)
		case 'c':
			r.cid, perr = number(o, p.arg, math.MaxInt32)
		case 'H':
			_, perr = number(o, p.arg, math.MaxInt32)
		case 'C':
			_, perr = number(o, p.arg, math.MaxInt16) // the port of a tgtd: one daemon serves all
		}
		if perr != nil {
			return nil, perr
		}
	}
	if err != nil {
		return nil, err
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	if r.has('y') {
		n, err := number(option{short: 'y'}, r.s('y'), math.MaxInt32)
		if err != nil {
			return nil, err
		}
		r.block = int(n)
	}
	return r, nil
}

// syntax of one operation in one mode, as the client checks it.
type syntax struct {
	letters string // of the options that are allowed; "*": any, the daemon judges
	never   bool   // the operation is not one of the mode
	text    string // of a letter that is not allowed; empty: notAllowed
}

const (
	notAllowed   = "%[1]s mode: option '-%[2]c' is not allowed/supported"
	notSupported = "option '-%[2]c' not supported in %[1]s mode"
)

// syntaxes by mode and operation: what is not here is no operation of its mode, and
// session and connection take anything. Captured from the real tool; the test
// beside it walks every mode, operation and option.
var syntaxes = map[string]syntax{
	"system update": {letters: "nv"}, "system delete": {letters: "*"}, "system show": {letters: "*"}, "system stat": {letters: "*"},
	"target new": {letters: "tT"}, "target delete": {letters: "tF"}, "target show": {letters: "t"}, "target stat": {letters: "t"},
	"target bind": {letters: "tIQHB"}, "target unbind": {letters: "tIQHB"}, "target update": {letters: "tnv"},
	"logicalunit new": {letters: "tlbESfyY"}, "logicalunit delete": {letters: "tl"}, "logicalunit stat": {letters: "tl"},
	"logicalunit update": {letters: "tlfyP", text: notSupported},
	"portal new":         {letters: "P"}, "portal delete": {letters: "P"}, "portal show": {text: notSupported},
	"account new": {letters: "fup"}, "account delete": {letters: "u"}, "account show": {}, "account bind": {letters: "tuO"}, "account unbind": {letters: "tuO"},
	"lld show": {}, "lld start": {}, "lld stop": {},
}

func (r *request) syntax() syntax {
	if r.mode == "session" || r.mode == "connection" {
		return syntax{letters: "*"}
	}
	x, ok := syntaxes[r.mode+" "+r.op]
	x.never = !ok
	return x
}

// check is what the real tool refuses before it asks its daemon, in its order.
func (r *request) check() error {
	switch {
	case r.op == "":
		return fail("specify the operation type")
	case r.mode == "":
		return fail("specify the mode")
	case r.tid < 0 && (r.mode == "target" && r.op != "show" || r.mode == "logicalunit"):
		return fail("'tid' option is necessary")
	case r.mode == "logicalunit" && r.lun < 0:
		return fail("'lun' option is necessary")
	}
	x := r.syntax()
	switch {
	case x.never && r.mode == "lld":
		return fail(fmt.Sprintf("option %d not supported in lld mode", slices.Index(ops, r.op)))
	case x.never:
		return fail(fmt.Sprintf("operation %s not supported in %s mode", r.op, r.mode))
	case x.text == "":
		x.text = notAllowed
	}
	for _, l := range r.order {
		if x.letters != "*" && !strings.ContainsRune(x.letters+"CdLmo", rune(l)) {
			return fail(fmt.Sprintf(x.text, r.mode, l))
		}
	}
	switch r.mode + " " + r.op {
	case "target new":
		if !r.has('T') {
			return fail("creating new target requires a name, use --targetname")
		}
	case "target bind", "target unbind":
		if !r.has('I') && !r.has('Q') && !r.has('B') && !r.has('H') {
			return fail(r.op + " operation requires initiator-address, initiator-nameor bus")
		}
	case "target update", "system update":
		if !r.has('n') || !r.has('v') {
			return fail("update operation requires 'name' and 'value' options")
		}
	case "portal new", "portal delete":
		if !r.has('P') {
			return fail("you must specify --param portal=<portal>")
		}
	case "account new":
		if !r.has('u') || !r.has('p') {
			return fail("'user' and 'password' options are required")
		}
	case "account delete", "account bind", "account unbind":
		if !r.has('u') {
			return fail("'user' option is necessary") // the real daemon dies of a delete without
		}
	}
	return nil
}

// Tgtadm runs tgtadm and gives its exit code.
func Tgtadm(ctx context.Context, args []string, o IO) int {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	s := newSession(ctx, "tgtadm", o)
	defer s.cl.Close()
	r, err := parse(args)
	if d, ok := err.(done); ok { //nolint:errorlint // never wrapped
		s.printf("%s", d.text)
		return 0
	}
	if err == nil {
		err = s.do(r)
	}
	return s.report(err)
}

// handlers by mode and operation.
var handlers = map[string]func(*session, *request) error{
	"target new": (*session).targetNew, "target delete": (*session).targetDelete, "target show": (*session).targetShow, "target bind": (*session).targetBind,
	"target unbind": (*session).targetBind, "target update": (*session).targetUpdate, "target stat": (*session).stat,
	"logicalunit new": (*session).lunNew, "logicalunit delete": (*session).lunDelete, "logicalunit update": (*session).lunUpdate, "logicalunit stat": (*session).stat,
	"account new": (*session).accountNew, "account delete": (*session).accountDelete, "account bind": (*session).accountBind, "account unbind": (*session).accountBind,
	"account show": (*session).accountShow, "system show": (*session).systemShow, "system stat": (*session).stat, "system update": (*session).systemUpdate,
	"system delete": (*session).systemDelete, "portal show": (*session).portalShow, "portal new": (*session).portalChange, "portal delete": (*session).portalChange,
	"lld show": (*session).lldShow, "lld start": (*session).lldChange, "lld stop": (*session).lldChange,
	"connection show": (*session).connShow, "connection delete": (*session).connDelete, "connection stat": (*session).connStat,
	"session show": (*session).sessionShow, "session stat": (*session).sessionStat,
}

func (s *session) do(r *request) error {
	if _, err := s.status(); err != nil {
		return err
	}
	if r.lld != "iscsi" {
		return fail("can't find the driver")
	}
	h := handlers[r.mode+" "+r.op]
	if h == nil {
		return invalid("there is no operation %s of a %s", r.op, r.mode)
	}
	return h(s, r)
}

const help = `tgtadm (clusterd), as version ` + version + `

Usage: tgtadm --lld iscsi --mode MODE --op OP [OPTION]...
  target       new --tid N --targetname IQN | delete --tid N [--force] | show [--tid N]
               update --tid N --name KEY --value VALUE
               bind, unbind --tid N --initiator-address ADDR|CIDR|ALL or --initiator-name IQN
  logicalunit  new --tid N --lun N --backing-store FILE|DEVICE|volume:NAME [--blocksize 512|4096]
               delete --tid N --lun N | update --tid N --lun N --params readonly=1,removable=1
  account      new --user U --password P | delete --user U | show
               bind, unbind [--tid N] --user U [--outgoing]     without --tid: discovery
  connection   show --tid N | delete --tid N --sid N --cid N
  portal, system, lld   show
The same with other words: clusteradm target, lun, acl, account, session.
`
