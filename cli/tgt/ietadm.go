package tgt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const ietUsage = `Usage: ietadm [OPTION]...
  --op new     --tid=N --params Name=IQN                        make a target (N 0: the next free)
  --op new     --tid=N --lun=N --params Path=FILE[,IOMode=ro]   make a LUN
  --op new     [--tid=N] --user --params IncomingUser=U,Password=P   or OutgoingUser; without --tid: discovery
  --op delete  --tid=N [--lun=N | --user --params IncomingUser=U | --sid=N --cid=N]
  --op show    [--tid=N] [--user]
  --op update  --tid=N --params KEY=VALUE[,KEY=VALUE]
  --import FILE [--pretend]    make what an ietd.conf says
The same with other words: clusteradm target, lun, acl, account, session.
`

var ietOptions = []option{{"op", 'o', true}, {"tid", 't', true}, {"sid", 's', true}, {"cid", 'c', true}, {"lun", 'l', true}, {"params", 'p', true},
	{"user", 'u', false}, {"version", 'v', false}, {"help", 'h', false}, {"import", 0, true}, {"pretend", 0, false}}

// Ietadm runs iscsitarget's ietadm and gives its exit code. Nobody packages that
// tool any more, so it was not compared with the real one.
func Ietadm(ctx context.Context, args []string, o IO) int {
	ctx, cancel := context.WithTimeout(ctx, 10*timeout)
	defer cancel()
	s := newSession(ctx, "ietadm", o)
	defer s.cl.Close()
	s.zero = true // LUN 0 is an ordinary number there
	err := s.ietadm(args)
	var e exit
	if errors.As(err, &e) {
		return int(e)
	}
	return s.report(err)
}

func (s *session) ietadm(args []string) error {
	ps, err := getopt("ietadm", ietOptions, args)
	if err != nil {
		return err
	}
	v := map[string]string{}
	for _, p := range ps {
		switch p.opt.long {
		case "":
			return usage("ietadm: unexpected argument '%s'", p.arg)
		case "help":
			s.printf("%s", ietUsage)
			return nil
		case "version":
			s.printf("ietadm (clusterd)\n")
			return nil
		}
		if p.opt.long == "op" && !slices.Contains([]string{"new", "delete", "show", "update"}, p.arg) {
			return invalid("unknown operation %q: new, delete, show and update are possible", p.arg)
		}
		v[p.opt.long] = p.arg
	}
	if file, ok := v["import"]; ok {
		_, pretend := v["pretend"]
		return s.importIET(file, pretend)
	}
	r := &request{op: v["op"], given: map[byte]bool{}, val: map[byte]string{}, tid: -1, lun: -1, sid: -1, cid: -1, lld: "iscsi"}
	for _, n := range []string{"tid", "lun", "sid", "cid"} {
		text, ok := v[n]
		if !ok {
			continue
		}
		i := slices.IndexFunc(ietOptions, func(o option) bool { return o.long == n })
		x, err := number(ietOptions[i], text, 1<<40)
		if err != nil {
			return err
		}
		switch n {
		case "tid":
			r.tid = int(x)
		case "lun":
			r.lun = int(x)
		case "sid":
			r.sid = x
		case "cid":
			r.cid = x
		}
	}
	_, user := v["user"]
	if _, err := s.status(); err != nil {
		return err
	}
	var kv [][2]string
	if text, ok := v["params"]; ok {
		if kv, err = params(text); err != nil {
			return err
		}
	}
	get := func(k string) string {
		for _, p := range kv {
			if strings.EqualFold(p[0], k) {
				return p[1]
			}
		}
		return ""
	}
	set := func(letter byte, val string) {
		if val != "" {
			r.given[letter], r.val[letter] = true, val
		}
	}
	switch {
	case r.op == "":
		return invalid("--op is missing")
	case user:
		return s.ietUser(r, get, set)
	case r.op == "show" && r.sid >= 0:
		return s.connShow(r)
	case r.op == "show" && r.tid < 0:
		return s.targetShow(r)
	case r.tid < 0:
		return invalid("--tid is missing; the daemon is not ended from here: systemctl stop clusterd")
	case r.op == "show":
		return s.targetShow(r)
	case r.op == "new" && r.lun < 0:
		if get("Name") == "" {
			return invalid("--params Name=IQN is missing")
		}
		set('T', get("Name"))
		return s.targetNew(r) // tid 0 is the next free one, as there
	case r.op == "new":
		l, err := ietLUN(kv)
		if err != nil {
			return invalid("%w", err)
		}
		set('b', l.path)
		set('y', l.block)
		if l.block != "" {
			if r.block, err = strconv.Atoi(l.block); err != nil {
				return invalid("BlockSize=%s: 512 or 4096 is possible", l.block)
			}
		}
		if err := s.mapLUN(r); err != nil {
			return err
		}
		if len(l.params) == 0 {
			return nil
		}
		s.st = nil
		set('P', "readonly=1")
		return s.lunUpdate(r)
	case r.op == "delete" && r.sid >= 0:
		return s.connDelete(r)
	case r.op == "delete" && r.lun >= 0:
		return s.lunDelete(r)
	case r.op == "delete":
		return s.targetDelete(r)
	}
	if len(kv) == 0 {
		return invalid("--params is missing")
	}
	for _, p := range kv {
		name, ok := ietParam(p[0])
		if !ok {
			return invalid("unknown parameter %q", p[0])
		}
		if name == "" {
			continue
		}
		set('n', name)
		set('v', p[1])
		if err := s.targetUpdate(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) ietUser(r *request, get func(string) string, set func(byte, string)) error {
	name := get("IncomingUser")
	if out := get("OutgoingUser"); out != "" {
		if name != "" {
			return invalid("IncomingUser and OutgoingUser in one command")
		}
		name = out
		set('O', "1")
	}
	set('u', name)
	set('p', get("Password"))
	if r.op == "show" {
		if r.tid < 0 {
			return s.accountShow(r)
		}
		t, err := s.target(r.tid)
		if err != nil {
			return err
		}
		for _, n := range t.Incoming {
			s.printf("IncomingUser %s\n", n)
		}
		if t.Outgoing != "" {
			s.printf("OutgoingUser %s\n", t.Outgoing)
		}
		return nil
	}
	if name == "" {
		return invalid("--params IncomingUser=NAME or OutgoingUser=NAME is missing")
	}
	as, err := s.accounts()
	if err != nil {
		return err
	}
	exists, used := false, 0
	for _, a := range as {
		if a.Name == name {
			exists, used = true, len(a.Bindings)
		}
	}
	switch r.op {
	case "new":
		if !exists {
			if get("Password") == "" {
				return invalid("Password is missing: there is no account %s yet", name)
			}
			if err := s.accountNew(r); err != nil {
				return err
			}
		}
		r.op = "bind"
		return s.accountBind(r)
	case "delete":
		r.op = "unbind"
		if err := s.accountBind(r); err != nil {
			return err
		}
		if used > 1 {
			return nil
		}
		return s.accountDelete(r) // it counted nowhere else
	}
	return invalid("operation %s is not possible for users", r.op)
}

// ietParam is a parameter of iscsitarget by our name; an empty one is taken and
// has no meaning here.
func ietParam(k string) (string, bool) {
	switch strings.ToLower(k) {
	case "alias", "wthreads", "type":
		return "", true
	case "queuedcommands":
		return "MaxQueueCmd", true
	case "nopinterval":
		return "nop_interval", true
	case "noptimeout":
		return "nop_count", true
	}
	for _, p := range targetParams {
		if strings.EqualFold(p, k) && p != "state" {
			return p, true
		}
	}
	return "", false
}

// ietLUN reads the parameters of a LUN.
func ietLUN(kv [][2]string) (*confLUN, error) {
	l := &confLUN{number: -1}
	for _, p := range kv {
		switch strings.ToLower(p[0]) {
		case "path":
			l.path = p[1]
		case "type":
			if t := strings.ToLower(p[1]); t != "fileio" && t != "blockio" {
				return nil, fmt.Errorf("type %s: fileio and blockio are possible", p[1])
			}
		case "iomode":
			switch strings.ToLower(p[1]) {
			case "ro":
				l.params = [][2]string{{"readonly", "1"}}
			case "wb":
			default:
				return nil, fmt.Errorf("IOMode %s: ro and wb are possible; durable writes are storage.cache of the node", p[1])
			}
		case "blocksize":
			l.block = p[1]
		case "scsiid", "scsisn":
			return nil, fmt.Errorf("%s=%s: what initiators know a LUN by is frozen when its volume is made, so that it is the same on every node", p[0], p[1])
		default:
			return nil, fmt.Errorf("unknown parameter %q of a LUN", p[0])
		}
	}
	if l.path == "" {
		return nil, errors.New("Path=FILE is missing")
	}
	return l, nil
}

// readIET reads an ietd.conf: lines "Key value", those behind a Target line
// belong to it.
func readIET(fs files, path string) (*conf, error) {
	b, err := fs.read(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	c := &conf{}
	var t *confTarget
	for n, raw := range strings.Split(string(b), "\n") {
		line := strings.TrimSpace(raw)
		if line == "" || line[0] == '#' {
			continue
		}
		e := &entry{file: path, line: n + 1}
		f := strings.Fields(line)
		e.key, e.value = f[0], strings.Join(f[1:], " ")
		if e.value == "" {
			return nil, e.errorf("%s has a missing value", e.key)
		}
		switch strings.ToLower(e.key) {
		case "target":
			if !isName(e.value) {
				return nil, e.errorf("target %q: iqn.YYYY-MM.reversed.domain[:string] is needed", e.value)
			}
			if slices.ContainsFunc(c.targets, func(t *confTarget) bool { return t.iqn == e.value }) {
				return nil, e.errorf("target %s is defined twice", e.value)
			}
			t = &confTarget{at: e, iqn: e.value}
			c.targets = append(c.targets, t)
		case "incominguser", "outgoinguser":
			u, err := userSecret(e)
			if err != nil {
				return nil, err
			}
			in, out := &c.incoming, &c.outgoing
			if t != nil {
				in, out = &t.incoming, &t.outgoing
			}
			if strings.EqualFold(e.key, "incominguser") {
				*in = append(*in, u)
			} else if *out != nil {
				return nil, e.errorf("Multiple '%s' definitions not allowed!", e.key)
			} else {
				*out = &u
			}
		case "lun":
			if t == nil || len(f) != 3 {
				return nil, e.errorf("write Lun NUMBER Path=FILE,Type=fileio under a Target")
			}
			num, err := strconv.ParseUint(f[1], 10, 15)
			if err != nil || num > 16383 {
				return nil, e.errorf("Lun %s: 0 to 16383 is possible", f[1])
			}
			kv, err := params(f[2])
			if err != nil {
				return nil, e.errorf("Lun %s: NAME=VALUE,… is needed", f[1])
			}
			l, err := ietLUN(kv)
			if err != nil {
				return nil, e.errorf("Lun %s: %v", f[1], err)
			}
			if slices.ContainsFunc(t.luns, func(x *confLUN) bool { return x.number == int(num) }) {
				return nil, e.errorf("Lun %d is given twice", num)
			}
			l.at, l.number = e, int(num)
			t.luns = append(t.luns, l)
		case "isnsserver", "isnsaccesscontrol":
			return nil, e.errorf("%s: there is no iSNS client yet", e.key)
		default:
			name, ok := ietParam(e.key)
			switch {
			case !ok:
				return nil, e.errorf("unknown directive %q", e.key)
			case t == nil:
				return nil, e.errorf("%s stands before the first Target", e.key)
			case name != "":
				t.params = append(t.params, [2]string{name, e.value})
			}
		}
	}
	return c, nil
}

func (s *session) importIET(file string, pretend bool) error {
	abs, err := filepath.Abs(file)
	if err != nil {
		return invalid("%w", err)
	}
	c, err := readIET(disk, abs)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return invalid("there is no file %s", file)
		}
		return invalid("%w", err)
	}
	a := &admin{session: s, pretend: pretend, verbose: true}
	p := &plan{}
	if err := a.begin(p, c); err != nil {
		return err
	}
	if err := a.discovery(p, c); err != nil {
		return err
	}
	tid := a.tids(c)
	for _, t := range c.targets {
		if a.byName(t.iqn) != nil {
			p.comment("# Target %s already exists", t.iqn)
			continue
		}
		p.add(t, tid(t))
		p.comment("# who may log in stands in initiators.allow, which is not read: everybody may; clusteradm acl changes that")
	}
	return a.execute(p)
}
