package tgt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/blockhouse-san/blockhouse/api"
)

const defaultConf = "/etc/tgt/targets.conf"

var adminOptions = []option{
	{"execute", 'e', false}, {"delete", 0, true}, {"offline", 0, true}, {"ready", 0, true}, {"update", 0, true}, {"show", 's', false}, {"conf", 'c', true},
	{"ignore-errors", 0, false}, {"force", 'f', false}, {"pretend", 'p', false}, {"dump", 0, false}, {"verbose", 'v', false}, {"help", 'h', false},
	{"control-port", 'C', true},
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
	show string // the line as the real tool prints it, without secrets
	args []string
	warn bool // a comment that is no secret of --verbose
}

// plan is what tgt-admin does.
type plan struct {
	port  string          // of the real tool's daemon; it is printed and handed on
	known map[string]bool // accounts that exist
	steps []step
}

func (p *plan) comment(format string, a ...any) {
	p.steps = append(p.steps, step{show: fmt.Sprintf(format, a...)})
}

func (p *plan) run(args ...string) { p.runAs(strings.Join(args, " "), args...) }

// runAs is run with another spelling of the line: the real tool's is a shell's.
func (p *plan) runAs(show string, args ...string) {
	if p.port == "" {
		p.port = "0"
	}
	p.steps = append(p.steps, step{show: "tgtadm -C " + p.port + " " + show, args: append([]string{"-C", p.port}, args...)})
}

// account plans that an account exists. lld is what stands before the command.
func (p *plan) account(u [2]string, lld ...string) {
	if p.known == nil {
		p.known = map[string]bool{}
	}
	if p.known[u[0]] {
		return
	}
	args := append(lld, "--mode", "account", "--op", "new", "--user="+u[0])
	p.runAs(strings.Join(args, " ")+" --password=(hidden)", append(args, "--password="+u[1])...)
	p.known[u[0]] = true
}

// cacheOff is what the real tool sends for "write-cache off".
const cacheOff = "mode_page=8:0:18:0x10:0:0xff:0xff:0:0:0xff:0xff:0xff:0xff:0x80:0x14:0:0:0:0:0:0"

// add plans a target, in the real tool's order: by the names of the directives, so
// that accounts are bound before anybody may log in.
func (p *plan) add(t *confTarget, tid int) {
	n := fmt.Sprint(tid)
	target := func(op string, args ...string) {
		p.run(append([]string{"--lld", "iscsi", "--op", op, "--mode", "target", "--tid", n}, args...)...)
	}
	param := func(kv [2]string) {
		p.run("--lld", "iscsi", "--mode", "target", "--op", "update", "--tid", n, "--name", kv[0], "--value", kv[1])
	}
	p.comment("# Adding target: %s", t.iqn)
	target("new", "-T", t.iqn)
	params := slices.Clone(t.params)
	slices.SortStableFunc(params, func(a, b [2]string) int { return strings.Compare(a[0], b[0]) })
	for _, kv := range params {
		if kv[0] != "state" {
			param(kv)
		}
	}
	for _, l := range t.luns {
		p.lun(l, n)
	}
	for _, u := range t.incoming {
		p.account(u, "--lld", "iscsi")
		p.run("--lld", "iscsi", "--mode", "account", "--op", "bind", "--tid="+n, "--user="+u[0])
	}
	for _, a := range t.addresses {
		target("bind", "-I", a)
	}
	for _, a := range t.names {
		target("bind", "-Q", a)
	}
	if t.outgoing != nil {
		p.account(*t.outgoing, "--lld", "iscsi")
		p.run("--lld", "iscsi", "--mode", "account", "--op", "bind", "--tid="+n, "--user="+t.outgoing[0], "--outgoing")
	}
	for _, kv := range params {
		if kv[0] == "state" {
			param(kv)
		}
	}
	// The real tool adds ALL also beside names, which then restrict nothing.
	if len(t.addresses)+len(t.names) == 0 {
		target("bind", "-I", "ALL")
	}
}

// lun plans a LUN of target n. A store that is not there is left out: the other
// disks of a host are served all the same.
func (p *plan) lun(l *confLUN, n string) {
	if filepath.IsAbs(l.path) {
		if _, err := os.Stat(l.path); errors.Is(err, fs.ErrNotExist) {
			p.steps = append(p.steps, step{show: "# Skipping device: " + l.path, warn: true})
			p.comment("# %s does not exist - please check the configuration file", l.path)
			return
		}
	}
	num := fmt.Sprint(l.number)
	args := []string{"--lld", "iscsi", "--op", "new", "--mode", "logicalunit", "--tid", n, "--lun", num, "-b"}
	show := strings.Join(args, " ") + ` "` + l.path + `"`
	args = append(args, l.path)
	for _, o := range [][2]string{{"--device-type", l.device}, {"--bstype", l.bstype}, {"--bsopts", l.bsopts}, {"--bsoflags", l.flags}, {"--blocksize", l.block}} {
		show += " "
		if o[1] != "" {
			args = append(args, o[0], o[1])
			show += o[0] + " " + o[1]
		}
	}
	p.runAs(show, args...)
	update := []string{"--lld", "iscsi", "--op", "update", "--mode", "logicalunit", "--tid", n, "--lun=" + num, "--params"}
	set := func(show, kv string) {
		p.runAs(strings.Join(update, " ")+" "+show, append(slices.Clone(update), kv)...)
	}
	if l.cache != nil && !*l.cache {
		set(cacheOff, cacheOff)
	}
	for _, kv := range l.params {
		if kv[0] == "mode_page" {
			set("mode_page="+`"`+kv[1]+`"`, "mode_page="+kv[1])
		}
	}
	for _, kv := range l.params {
		if kv[0] != "mode_page" {
			set(kv[0]+`="`+kv[1]+`"`, kv[0]+"="+kv[1])
		}
	}
	for _, v := range l.more {
		set(`"`+v+`"`, v)
	}
	if l.cache == nil || *l.cache {
		p.comment("# Write cache is enabled (default) for lun %d.", l.number)
	}
}

// admin is one run of tgt-admin.
type admin struct {
	*session
	confFile                string
	confGiven               bool
	force, pretend, verbose bool
	ignore                  bool
}

// exit ends a run whose output is complete.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// execute prints and runs the steps.
func (a *admin) execute(p *plan) error {
	for _, s := range p.steps {
		switch {
		case a.pretend || a.verbose:
			a.printf("%s\n", s.show)
		case s.warn:
			fmt.Fprintf(a.Err, "%s\n", s.show)
		}
		if s.args == nil || a.pretend {
			continue
		}
		if code := Tgtadm(a.ctx, s.args, IO{Out: io.Discard, Err: a.Err, Socket: a.Socket, zero: a.zero}); code != 0 && !a.ignore {
			a.printf("Command:\n\t%s\nexited with code: %d.\n", s.show, code)
			return exit(code)
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
	if len(args) == 0 {
		a.printf("%s", adminUsage)
		return nil
	}
	ps, err := perlopt(adminOptions, args)
	if err != nil {
		fmt.Fprintf(a.Err, "%v\n", err)
		return exit(1) // the real tool goes on without the option
	}
	acts := map[string]string{}
	port := ""
	for _, p := range ps {
		switch p.opt.long {
		case "":
			// The real tool does not look at it: who names a file here means --conf.
			return usage("tgt-admin: unexpected argument '%s'", p.arg)
		case "help":
			a.printf("%s", adminUsage)
			return nil
		case "conf":
			a.confFile, a.confGiven = p.arg, true
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
		default:
			acts[p.opt.long] = p.arg
		}
	}
	p := &plan{port: port}
	if _, ok := acts["show"]; ok {
		return exit(Tgtadm(a.ctx, []string{"--op", "show", "--mode", "target"}, a.IO))
	}
	for _, act := range []string{"execute", "delete", "update", "dump", "offline", "ready"} {
		v, ok := acts[act]
		if !ok {
			continue
		}
		switch act {
		case "execute":
			return a.add(p)
		case "delete":
			return a.delete(p, v)
		case "update":
			return a.update(p, v)
		case "dump":
			return a.dump()
		}
		if _, also := acts["ready"]; also && act == "offline" {
			a.printf("Invalid value (you can't use both ready and offline)!\n")
			return exit(1)
		}
		return a.state(p, act, v)
	}
	a.printf("No action specified.\n")
	return nil
}

func (a *admin) load() (*conf, error) {
	es, err := readConf(disk, a.confFile)
	if errors.Is(err, fs.ErrNotExist) && es == nil {
		if _, serr := os.Stat(a.confFile); errors.Is(serr, fs.ErrNotExist) {
			fmt.Fprintf(a.Err, "Config file %s not found. Exiting...\n", a.confFile)
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
	return c, nil
}

// begin reads the cluster and what accounts there are.
func (a *admin) begin(p *plan, c *conf) error {
	if p.port == "" {
		p.port = c.controlPort
	}
	if a.confGiven {
		p.comment("# Using %s as configuration file\n", a.confFile)
	}
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

// tids gives out numbers: one more than the largest, but those that the
// configuration names are kept for their targets.
func (a *admin) tids(c *conf) func(t *confTarget) int {
	kept := map[int]bool{}
	for _, t := range c.targets {
		kept[t.tid] = true
	}
	last := 0
	for _, t := range a.st.Targets {
		last = max(last, t.TID)
	}
	return func(t *confTarget) int {
		n := t.tid
		if n == 0 {
			for n = last + 1; kept[n]; {
				n++
			}
		}
		last = max(last, n)
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
			p.runAs("--mode account --op bind --user="+u[0]+" ", "--mode", "account", "--op", "bind", "--user="+u[0])
		}
	}
	if u := c.outgoing; u != nil {
		if p.account(*u); !bound["outgoing "+u[0]] {
			p.runAs("--mode account --op bind --user="+u[0]+"  --outgoing", "--mode", "account", "--op", "bind", "--user="+u[0], "--outgoing")
		}
	}
	if !c.driver {
		p.comment("# default-driver not defined, defaulting to iscsi.\n")
	}
	return nil
}

func (a *admin) add(p *plan) error {
	c, err := a.load()
	if err != nil {
		return err
	}
	if err := a.begin(p, c); err != nil {
		return err
	}
	if err := a.discovery(p, c); err != nil {
		return err
	}
	tid := a.tids(c)
	for _, t := range c.targets {
		if a.byName(t.iqn) != nil {
			p.comment("# Target %s already exists!", t.iqn)
			continue
		}
		p.add(t, tid(t))
	}
	if len(c.targets) > 0 {
		p.comment("")
		a.others(p, c)
	}
	return a.execute(p)
}

// others names the targets that are not in the configuration. The real tool removes
// them; here other nodes, and other people, made them.
func (a *admin) others(p *plan, c *conf) {
	for i := range a.st.Targets {
		if !c.has(a.st.Targets[i].IQN) {
			p.comment("# Target %s is not in the configuration file; --delete removes it", a.st.Targets[i].IQN)
		}
	}
}

func (c *conf) has(iqn string) bool {
	return slices.ContainsFunc(c.targets, func(t *confTarget) bool { return strings.EqualFold(t.iqn, iqn) })
}

// byTID finds the target of a value "tid=N".
func (a *admin) byTID(v string) *api.Target {
	for i := range a.st.Targets {
		if v == fmt.Sprintf("tid=%d", a.st.Targets[i].TID) {
			return &a.st.Targets[i]
		}
	}
	return nil
}

const (
	helpHead = "      --%[1]s <value>\t\t%[1]s all or selected targets\n"
	helpUse  = "\t\t\t\tThe target will be %[2]s only if it's not used\n\t\t\t\t(no initiator is connected to it).\n" +
		"\t\t\t\tIf you want to %[1]s targets which are in use,\n\t\t\t\tyou have to add \"--force\" flag.\n"
	helpTail = "\nExample usage:\n      --%[1]s help\t      - display this help\n      --%[1]s ALL\t      - %[1]s all targets\n" +
		"      --%[1]s tid=4\t      - %[1]s target 4 (target with tid 4)\n      --%[1]s iqn.2008-08.com.example:some.target - %[1]s this target\n\n"
)

func (a *admin) help(act string) error {
	text := helpHead + helpTail
	if act == "delete" || act == "update" {
		text = helpHead + helpUse + helpTail
	}
	a.printf("%s", fmt.Sprintf(text, act, act+"d")) // delete and update both take a d
	return nil
}

func (a *admin) update(p *plan, v string) error {
	if v == "help" {
		return a.help("update")
	}
	c, err := a.load()
	if err != nil {
		return err
	}
	if err := a.begin(p, c); err != nil {
		return err
	}
	if strings.HasPrefix(v, "tid=") {
		t := a.byTID(v)
		if t == nil {
			a.printf("There is no target with tid %s, can't continue!\n", v[len("tid="):])
			return exit(1)
		}
		v = t.IQN
	}
	if v != "ALL" && a.byName(v) == nil && !c.has(v) {
		a.printf("Target %s is currently not configured\nand does not exist in the config file - can't continue!\n", v)
		return exit(1)
	}
	if err := a.discovery(p, c); err != nil {
		return err
	}
	tid := a.tids(c)
	for _, t := range c.targets {
		if v != "ALL" && !strings.EqualFold(v, t.iqn) {
			continue
		}
		have := a.byName(t.iqn)
		if have != nil {
			if a.remove(p, have, "updated", t.allowInUse) {
				p.comment("")
				continue
			}
			if t.tid == 0 {
				t.tid = have.TID // scripts know the number
			}
		}
		p.add(t, tid(t))
		p.comment("")
	}
	if v == "ALL" || !c.has(v) {
		a.others(p, c)
	}
	return a.execute(p)
}

// remove plans the end of a target, unless it is in use: then it says so.
func (a *admin) remove(p *plan, t *api.Target, what string, allow bool) (inUse bool) {
	if t.Sessions > 0 && !a.force && !allow {
		p.comment("# Target with tid %d (%s) is in use, it won't be %s.", t.TID, t.IQN, what)
		return true
	}
	p.comment("# Removing target: %s", t.IQN)
	args := []string{"--mode", "target", "--op", "delete", fmt.Sprintf("--tid=%d", t.TID)}
	if t.Sessions > 0 {
		args = append(args, "--force")
	}
	p.run(args...)
	p.comment("")
	return false
}

func (a *admin) delete(p *plan, v string) error {
	if v == "help" {
		return a.help("delete")
	}
	if _, err := a.status(); err != nil {
		return err
	}
	switch t := a.byName(v); {
	case v == "ALL":
		for i := range a.st.Targets {
			a.remove(p, &a.st.Targets[i], "deleted", false)
		}
	case strings.HasPrefix(v, "tid="):
		if t = a.byTID(v); t == nil {
			p.comment("# Target with tid %s does not exist!", v[len("tid="):])
			break
		}
		a.remove(p, t, "deleted", false)
	case t == nil:
		p.comment("# Target with name %s does not exist!", v)
	default:
		a.remove(p, t, "deleted", false)
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
	set := func(tid string, more ...string) {
		args := append([]string{"--op", "update", "--mode", "target", "--tid=" + tid}, more...)
		p.run(append(args, "-n", "state", "-v", act)...)
	}
	switch tid, ok := strings.CutPrefix(v, "tid="); {
	case v == "ALL":
		for i := range a.st.Targets {
			set(fmt.Sprint(a.st.Targets[i].TID))
		}
	case ok:
		set(tid)
	default:
		t := a.byName(v)
		if t == nil {
			a.printf("There is no target with name \"%s\", can't %s it!\n", v, act)
			return exit(1)
		}
		tid := fmt.Sprintf("--tid=%d", t.TID)
		p.runAs("--op update --mode target "+tid+` --name="`+v+`" -n state -v `+act, "--op", "update", "--mode", "target", tid, "-n", "state", "-v", act)
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
	if err != nil {
		return err
	}
	const secret = "PLEASE_CORRECT_THE_PASSWORD"
	discovery := ""
	for _, x := range as {
		for _, b := range x.Bindings {
			if b.Target == "discovery" {
				discovery += fmt.Sprintf("%sdiscoveryuser %s %s\n", b.Direction, x.Name, secret)
			}
		}
	}
	if len(st.Targets) > 0 || discovery != "" {
		a.printf("default-driver iscsi\n\n%s", discovery)
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
			plain := l.LUN == i+1 && !l.ReadOnly && !l.Removable && !l.NoCache && blockSize(a.volume(l.Volume)) == 512
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
			if l.NoCache {
				a.printf("\t\twrite-cache off\n")
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
