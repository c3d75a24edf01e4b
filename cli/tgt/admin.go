package tgt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/blockhouse-san/blockhouse/api"
)

const defaultConf = "/etc/tgt/targets.conf"

var adminOptions = []option{
	{"execute", 'e', false}, {"delete", 0, true}, {"offline", 0, true}, {"ready", 0, true}, {"update", 0, true}, {"show", 's', false}, {"conf", 'c', true},
	{"ignore-errors", 0, false}, {"force", 'f', false}, {"pretend", 'p', false}, {"dump", 0, false}, {"verbose", 'v', false}, {"help", 'h', false},
	{"control-port", 'C', true}, {"system", 0, false},
}

const adminUsage = `Usage: tgt-admin [OPTION]...
  -e, --execute             read the configuration and make what it says
      --update <value>      make targets anew from the configuration
      --delete <value>      delete targets
      --offline <value>     take no login
      --ready <value>       take logins again
                            <value>: help, ALL, tid=N or an IQN
  -s, --show                show the targets
      --dump                print the configuration, without secrets
  -c, --conf <file>         configuration (` + defaultConf + `)
      --ignore-errors       go on after an error
  -f, --force               also targets that are in use
  -p, --pretend             only print the commands
  -v, --verbose             print the commands too
  -C, --control-port <n>    taken and not needed: one daemon serves all
  -h, --help                this text
`

// step is a command of tgtadm, or without args a comment.
type step struct {
	comment string
	args    []string
}

// plan is what tgt-admin does.
type plan struct {
	port  string
	known map[string]bool // accounts that exist
	steps []step
}

func (p *plan) comment(format string, a ...any) {
	p.steps = append(p.steps, step{comment: fmt.Sprintf(format, a...)})
}

func (p *plan) run(args ...string) { p.steps = append(p.steps, step{args: args}) }

func (p *plan) account(u [2]string) {
	if p.known == nil {
		p.known = map[string]bool{}
	}
	if !p.known[u[0]] {
		p.run("--lld", "iscsi", "--mode", "account", "--op", "new", "--user="+u[0], "--password="+u[1])
		p.known[u[0]] = true
	}
}

// add plans a target. The access list comes last: nobody may log in before all
// of it is there.
func (p *plan) add(t *confTarget, tid int) {
	n := fmt.Sprint(tid)
	p.comment("# Adding target: %s", t.iqn)
	p.run("--lld", "iscsi", "--op", "new", "--mode", "target", "--tid", n, "-T", t.iqn)
	for _, kv := range t.params {
		if kv[0] != "state" {
			p.run("--lld", "iscsi", "--mode", "target", "--op", "update", "--tid", n, "--name", kv[0], "--value", kv[1])
		}
	}
	for _, l := range t.luns {
		args := []string{"--lld", "iscsi", "--op", "new", "--mode", "logicalunit", "--tid", n, "--lun", fmt.Sprint(l.number), "-b", l.path}
		for _, o := range [][2]string{{"--bstype", l.bstype}, {"--bsopts", l.bsopts}, {"--bsoflags", l.flags}, {"--device-type", l.device}, {"--blocksize", l.block}} {
			if o[1] != "" {
				args = append(args, o[0], o[1])
			}
		}
		p.run(args...)
		switch {
		case l.cache == nil:
			p.comment("# Write cache is enabled (default) for lun %d.", l.number)
		case *l.cache:
			p.comment("# Write cache is enabled for lun %d.", l.number)
		default:
			p.run("--lld", "iscsi", "--op", "update", "--mode", "logicalunit", "--tid", n, "--lun", fmt.Sprint(l.number), "--params", "mode_page=8:0:18:0x10:0:0xff")
		}
		for _, kv := range l.params {
			p.run("--lld", "iscsi", "--op", "update", "--mode", "logicalunit", "--tid", n, "--lun", fmt.Sprint(l.number), "--params", kv[0]+"="+kv[1])
		}
	}
	for _, u := range t.incoming {
		p.account(u)
		p.run("--lld", "iscsi", "--mode", "account", "--op", "bind", "--tid="+n, "--user="+u[0])
	}
	if t.outgoing != nil {
		p.account(*t.outgoing)
		p.run("--lld", "iscsi", "--mode", "account", "--op", "bind", "--tid="+n, "--user="+t.outgoing[0], "--outgoing")
	}
	for _, kv := range t.params {
		if kv[0] == "state" {
			p.run("--lld", "iscsi", "--mode", "target", "--op", "update", "--tid", n, "--name", kv[0], "--value", kv[1])
		}
	}
	for _, a := range t.addresses {
		p.run("--lld", "iscsi", "--op", "bind", "--mode", "target", "--tid", n, "-I", a)
	}
	for _, a := range t.names {
		p.run("--lld", "iscsi", "--op", "bind", "--mode", "target", "--tid", n, "-Q", a)
	}
	// The real tool adds ALL also beside names, which then restrict nothing.
	if len(t.addresses)+len(t.names) == 0 {
		p.run("--lld", "iscsi", "--op", "bind", "--mode", "target", "--tid", n, "-I", "ALL")
	}
}

// hide is a command line that may be shown.
func hide(args []string) string {
	out := []string{"tgtadm"}
	for i, a := range args {
		switch {
		case strings.HasPrefix(a, "--password="):
			a = "--password=(hidden)"
		case i > 0 && args[i-1] == "-b":
			a = `"` + a + `"`
		}
		out = append(out, a)
	}
	return strings.Join(out, " ")
}

// admin is one run of tgt-admin.
type admin struct {
	*session
	confFile                string
	force, pretend, verbose bool
	ignore                  bool
}

// exit ends a run whose output is complete.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// execute prints and runs the steps.
func (a *admin) execute(p *plan) error {
	for _, s := range p.steps {
		args := s.args
		if p.port != "" && args != nil {
			args = append([]string{"-C", p.port}, args...)
		}
		if a.pretend || a.verbose {
			if args == nil {
				a.printf("%s\n", s.comment)
			} else {
				a.printf("%s\n", hide(args))
			}
		}
		if args == nil || a.pretend {
			continue
		}
		var out bytes.Buffer
		if code := Tgtadm(a.ctx, args, IO{Out: &out, Err: a.Err, Socket: a.Socket, zero: a.zero}); code != 0 {
			fmt.Fprintf(a.Err, "Command:\n\t%s\nexited with code: %d.\n", hide(args), code)
			if !a.ignore {
				return exit(code)
			}
		}
	}
	return nil
}

// Admin runs tgt-admin and gives its exit code.
func Admin(ctx context.Context, args []string, o IO) int {
	ctx, cancel := context.WithTimeout(ctx, 10*timeout)
	defer cancel()
	a := &admin{session: newSession(ctx, "tgt-admin", o), confFile: defaultConf}
	defer a.cl.Close()
	err := a.run(args)
	var e exit
	if errors.As(err, &e) {
		return int(e)
	}
	return a.report(err)
}

func (a *admin) run(args []string) error {
	ps, err := getopt("tgt-admin", adminOptions, args)
	if err != nil {
		return err
	}
	acts := map[string]string{}
	port := ""
	for _, p := range ps {
		switch p.opt.long {
		case "":
			return usage("tgt-admin: unexpected argument '%s'", p.arg)
		case "help":
			a.printf("%s", adminUsage)
			return nil
		case "conf":
			a.confFile = p.arg
		case "force":
			a.force = true
		case "pretend":
			a.pretend = true
		case "verbose":
			a.verbose = true
		case "ignore-errors":
			a.ignore = true
		case "control-port":
			port = p.arg
		case "system": // shows nothing more
		default:
			acts[p.opt.long] = p.arg
		}
	}
	if _, both := acts["offline"]; both {
		if _, also := acts["ready"]; also {
			a.printf("Invalid value (you can't use both ready and offline)!\n")
			return exit(1)
		}
	}
	p := &plan{port: port}
	for _, act := range []string{"execute", "update", "delete", "offline", "ready", "dump", "show"} {
		v, ok := acts[act]
		if !ok {
			continue
		}
		switch act {
		case "execute":
			return a.add(p)
		case "update":
			return a.update(p, v)
		case "delete":
			return a.delete(p, v)
		case "dump":
			return a.dump()
		case "show":
			return exit(Tgtadm(a.ctx, []string{"--op", "show", "--mode", "target"}, a.IO))
		default:
			return a.state(p, act, v)
		}
	}
	a.printf("No action specified.\n")
	return exit(1)
}

func (a *admin) load() (*conf, error) {
	es, err := readConf(disk, a.confFile)
	if errors.Is(err, fs.ErrNotExist) && es == nil {
		if _, serr := os.Stat(a.confFile); errors.Is(serr, fs.ErrNotExist) {
			a.printf("Config file %s not found. Exiting...\n", a.confFile)
			return nil, exit(2)
		}
	}
	var c *conf
	if err == nil {
		c, err = understand(es)
	}
	if err != nil {
		fmt.Fprintf(a.Err, "tgt-admin: %v\n", err)
		return nil, exit(1)
	}
	a.ignore = a.ignore || c.ignoreErrors
	if a.pretend || a.verbose {
		a.printf("# Using %s as configuration file\n\n", a.confFile)
	}
	return c, nil
}

// begin reads the cluster and what accounts there are.
func (a *admin) begin(p *plan) error {
	if _, err := a.status(); err != nil {
		return err
	}
	as, err := a.accounts()
	if err != nil {
		return err
	}
	p.known = map[string]bool{}
	for _, x := range as {
		p.known[x.Name] = true
	}
	return nil
}

func (a *admin) byName(iqn string) *api.Target {
	for i := range a.st.Targets {
		if strings.EqualFold(a.st.Targets[i].IQN, iqn) {
			return &a.st.Targets[i]
		}
	}
	return nil
}

// tids gives out numbers: those that the configuration names are kept for their
// targets.
func (a *admin) tids(c *conf) func(t *confTarget) int {
	used := map[int]bool{}
	for _, t := range a.st.Targets {
		used[t.TID] = true
	}
	for _, t := range c.targets {
		used[t.tid] = true
	}
	return func(t *confTarget) int {
		if t.tid != 0 {
			return t.tid
		}
		n := 1
		for used[n] {
			n++
		}
		used[n] = true
		return n
	}
}

// discovery plans the accounts of discovery that are not bound yet.
func (a *admin) discovery(p *plan, c *conf) error {
	as, err := a.accounts()
	if err != nil {
		return err
	}
	bound := map[string]bool{}
	for _, x := range as {
		for _, b := range x.Bindings {
			if b.Target == "discovery" {
				bound[b.Direction+" "+x.Name] = true
			}
		}
	}
	for _, u := range c.incoming {
		if p.account(u); !bound["incoming "+u[0]] {
			p.run("--lld", "iscsi", "--mode", "account", "--op", "bind", "--user="+u[0])
		}
	}
	if u := c.outgoing; u != nil {
		if p.account(*u); !bound["outgoing "+u[0]] {
			p.run("--lld", "iscsi", "--mode", "account", "--op", "bind", "--user="+u[0], "--outgoing")
		}
	}
	return nil
}

func (a *admin) add(p *plan) error {
	c, err := a.load()
	if err != nil {
		return err
	}
	if err := a.begin(p); err != nil {
		return err
	}
	if p.port == "" {
		p.port = c.controlPort
	}
	if err := a.discovery(p, c); err != nil {
		return err
	}
	tid := a.tids(c)
	for _, t := range c.targets {
		if a.byName(t.iqn) != nil {
			p.comment("# Target %s already exists; --update makes it anew", t.iqn)
			continue
		}
		p.add(t, tid(t))
	}
	return a.execute(p)
}

// pick finds the targets that a value names.
func (a *admin) pick(what, v string) ([]*api.Target, error) {
	if v == "ALL" {
		var out []*api.Target
		for i := range a.st.Targets {
			out = append(out, &a.st.Targets[i])
		}
		return out, nil
	}
	for i := range a.st.Targets {
		t := &a.st.Targets[i]
		if v == fmt.Sprintf("tid=%d", t.TID) || strings.EqualFold(v, t.IQN) {
			return []*api.Target{t}, nil
		}
	}
	a.printf("There is no target with name \"%s\", can't %s it!\n", v, what)
	return nil, exit(1)
}

func (a *admin) help(act string) error {
	a.printf("      --%s <value>\t\t%s all or selected targets\n\nExample usage:\n      --%s help\t      - display this help\n      --%s ALL\t      - %s all targets\n"+
		"      --%s tid=4\t      - %s target 4 (target with tid 4)\n      --%s iqn.2008-08.com.example:some.target - %s this target\n\n", act, act, act, act, act, act, act, act, act)
	return nil
}

// inUse plans the end of the sessions of a target, or says that it is skipped.
func (a *admin) remove(p *plan, t *api.Target, allow bool) bool {
	if t.Sessions > 0 && !a.force && !allow {
		p.comment("# Target %s is in use, it is not changed. You can override it with --force or 'allow-in-use yes'.", t.IQN)
		return false
	}
	p.comment("# Removing target: %s", t.IQN)
	args := []string{"--mode", "target", "--op", "delete", fmt.Sprintf("--tid=%d", t.TID)}
	if t.Sessions > 0 {
		args = append(args, "--force")
	}
	p.run(args...)
	p.comment("")
	return true
}

func (a *admin) update(p *plan, v string) error {
	if v == "help" {
		return a.help("update")
	}
	c, err := a.load()
	if err != nil {
		return err
	}
	if err := a.begin(p); err != nil {
		return err
	}
	if p.port == "" {
		p.port = c.controlPort
	}
	tid := a.tids(c)
	found := false
	in := map[string]bool{}
	for _, t := range c.targets {
		have := a.byName(t.iqn)
		in[strings.ToLower(t.iqn)] = true
		if v != "ALL" && !strings.EqualFold(v, t.iqn) && (have == nil || v != fmt.Sprintf("tid=%d", have.TID)) {
			continue
		}
		found = true
		if have == nil {
			p.add(t, tid(t))
			continue
		}
		if !a.remove(p, have, t.allowInUse) {
			continue
		}
		if t.tid == 0 {
			t.tid = have.TID // a number that initiators' scripts know stays
		}
		p.add(t, t.tid)
		p.comment("")
	}
	for i := range a.st.Targets {
		t := &a.st.Targets[i]
		if !in[t.IQN] && (v == "ALL" || strings.EqualFold(v, t.IQN) || v == fmt.Sprintf("tid=%d", t.TID)) {
			found = true
			p.comment("# Target %s is not in the configuration; --delete takes it away", t.IQN)
		}
	}
	if !found && v != "ALL" {
		a.printf("There is no target with name \"%s\", can't update it!\n", v)
		return exit(1)
	}
	return a.execute(p)
}

func (a *admin) delete(p *plan, v string) error {
	if v == "help" {
		return a.help("delete")
	}
	if _, err := a.status(); err != nil {
		return err
	}
	ts, err := a.pick("delete", v)
	if err != nil {
		return err
	}
	for _, t := range ts {
		a.remove(p, t, false)
	}
	return a.execute(p)
}

func (a *admin) state(p *plan, act, v string) error {
	if v == "help" {
		return a.help(act)
	}
	if _, err := a.status(); err != nil {
		return err
	}
	ts, err := a.pick(act, v)
	if err != nil {
		return err
	}
	for _, t := range ts {
		p.run("--op", "update", "--mode", "target", fmt.Sprintf("--tid=%d", t.TID), "-n", "state", "-v", act)
	}
	return a.execute(p)
}

// dump prints a targets.conf that makes the same again, but for the secrets.
func (a *admin) dump() error {
	st, err := a.status()
	if err != nil {
		return err
	}
	as, err := a.accounts()
	if err != nil || len(st.Targets)+len(as) == 0 {
		return err
	}
	const secret = "PLEASE_CORRECT_THE_PASSWORD"
	a.printf("default-driver iscsi\n\n")
	for _, x := range as {
		for _, b := range x.Bindings {
			if b.Target == "discovery" {
				a.printf("%sdiscoveryuser %s %s\n", b.Direction, x.Name, secret)
			}
		}
	}
	ts := slices.Clone(st.Targets)
	slices.SortFunc(ts, func(x, y api.Target) int { return x.TID - y.TID })
	for _, t := range ts {
		a.printf("<target %s>\n", t.IQN)
		for i, l := range t.LUNs {
			b := backing(a.volume(l.Volume), l.Volume)
			if strings.ContainsAny(b, "# \t\\") {
				b = `"` + b + `"`
			}
			plain := l.LUN == i+1 && !l.ReadOnly && !l.Removable && blockSize(a.volume(l.Volume)) == 512
			if plain {
				a.printf("\tbacking-store %s\n", b)
				continue
			}
			a.printf("\t<backing-store %s>\n\t\tlun %d\n", b, l.LUN)
			if n := blockSize(a.volume(l.Volume)); n != 512 {
				a.printf("\t\tblock-size %d\n", n)
			}
			if l.ReadOnly {
				a.printf("\t\treadonly 1\n")
			}
			if l.Removable {
				a.printf("\t\tremovable 1\n")
			}
			a.printf("\t</backing-store>\n")
		}
		for _, n := range t.Incoming {
			a.printf("\tincominguser %s %s\n", n, secret)
		}
		if t.Outgoing != "" {
			a.printf("\toutgoinguser %s %s\n", t.Outgoing, secret)
		}
		for _, p := range api.TargetParams {
			if v, ok := t.Params[p.Name]; ok {
				a.printf("\t%s %s\n", p.Name, v)
			}
		}
		if t.Offline {
			a.printf("\tstate offline\n")
		}
		addrs, names := split(&t.ACL)
		if len(addrs)+len(names) == 0 && !t.Offline {
			// Without a rule --execute lets everybody in (the real tool's rule).
			a.printf("\t# nobody may log in; give a rule and take the next line away\n\tstate offline\n")
		}
		for _, x := range addrs {
			a.printf("\tinitiator-address %s\n", x)
		}
		for _, x := range names {
			a.printf("\tinitiator-name %s\n", x)
		}
		a.printf("</target>\n\n")
	}
	return nil
}

func blockSize(v *api.Volume) int {
	if v == nil {
		return 512
	}
	return v.BlockSize
}
