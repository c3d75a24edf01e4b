package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

// script installs a fake agent: metadata from testdata-like text, then body.
func script(t *testing.T, name, params, actions, body string) *Runner {
	t.Helper()
	dir := t.TempDir()
	text := "#!/bin/sh\nin=$(cat)\ncase \"$in\" in\n*action=metadata*) cat <<'X'\n" +
		`<resource-agent name="` + name + `"><parameters>` + params + "</parameters><actions>" + actions + "</actions></resource-agent>\nX\nexit 0;;\nesac\n" + body + "\n"
	// Written under another name first: an open for writing in a forked child of a
	// parallel test would make exec fail with "text file busy".
	p := filepath.Join(dir, name)
	if err := os.WriteFile(p+".new", []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(p+".new", p); err != nil {
		t.Fatal(err)
	}
	return New(Config{Node: "n1", Dirs: []string{dir}})
}

const (
	plainActions = `<action name="on"/><action name="off"/><action name="reboot"/><action name="status"/><action name="monitor"/><action name="list"/><action name="list-status"/>`
	plainParams  = `<parameter name="plug" required="1" obsoletes="port"><content type="string"/></parameter><parameter name="port" deprecated="1"><content type="string"/></parameter>` +
		`<parameter name="username" obsoletes="login"/><parameter name="login" deprecated="1"/><parameter name="password" obsoletes="passwd"/><parameter name="passwd" deprecated="1"/>` +
		`<parameter name="ip" obsoletes="ipaddr"/><parameter name="delay"/>`
)

func run(t *testing.T, r *Runner, q Request) Result {
	t.Helper()
	res, err := r.Run(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// The input that an agent gets: action first, every option in its newest
// spelling, the target as nodename and as plug (facts §2.1).
func TestInput(t *testing.T) {
	t.Parallel()
	r := script(t, "fence_fake", plainParams, plainActions, `echo "$in"; echo "argc=$#"`)
	res := run(t, r, Request{Agent: "fence_fake", Action: Off, Target: "n2",
		Params: map[string]string{"ipaddr": "192.0.2.1", "login": "admin", "passwd": "s3cret", "weird": "a=b c", "option": "off"}})
	want := "action=off\nip=192.0.2.1\nnodename=n2\npassword=***\nplug=n2\nusername=admin\nweird=a=b c\nargc=0\n"
	if diff := cmp.Diff(want, res.Output); diff != "" || !res.OK() {
		t.Errorf("%+v\n%s", res, diff)
	}
	if !strings.Contains(strings.Join(res.Notes, "\n"), "option weird is unknown to fence_fake") {
		t.Errorf("notes: %q", res.Notes)
	}
	// A configured plug stays, the request's own wins.
	res = run(t, r, Request{Agent: "fence_fake", Action: Off, Target: "n2", Params: map[string]string{"port": "7"}})
	if !strings.Contains(res.Output, "plug=7\n") {
		t.Errorf("%q", res.Output)
	}
	res = run(t, r, Request{Agent: "fence_fake", Action: Off, Target: "n2", Plug: "8", Params: map[string]string{"port": "7"}})
	if !strings.Contains(res.Output, "plug=8\n") {
		t.Errorf("%q", res.Output)
	}
	// An agent older than "plug" gets port, one without either gets neither.
	old := script(t, "fence_old", `<parameter name="port"/><parameter name="login"/>`, plainActions, `echo "$in"`)
	res = run(t, old, Request{Agent: "fence_old", Action: Off, Target: "n2", Params: map[string]string{"username": "u"}})
	if res.Output != "action=off\nlogin=u\nnodename=n2\nport=n2\n" {
		t.Errorf("%q", res.Output)
	}
	none := script(t, "fence_none", ``, plainActions, `echo "$in"`)
	if res = run(t, none, Request{Agent: "fence_none", Action: Off, Target: "n2"}); res.Output != "action=off\nnodename=n2\n" {
		t.Errorf("%q", res.Output)
	}
}

// Whatever the options are, either nothing is built, or the input names the
// action exactly once, in its first line, in the reading of every agent.
func TestNoInputWithoutAction(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		a := Action(rapid.OneOf(rapid.SampledFrom([]string{"", "off", "on", "reboot", "status", "\n", "off\noption=reboot", "=", "#"}), rapid.String()).Draw(t, "action"))
		name := rapid.OneOf(rapid.SampledFrom([]string{"action", "option", "ACTION", "Option", "plug", " action", "action ", "#", "", "a\naction"}), rapid.String())
		value := rapid.OneOf(rapid.SampledFrom([]string{"\naction=reboot", "\raction=reboot", "x\n#", "", "=", "\x00", " x"}), rapid.String())
		params := rapid.MapOf(name, value).Draw(t, "params")
		b, err := encode(a, params)
		if err != nil {
			if b != nil {
				t.Fatalf("an error and an input: %q", b)
			}
			return
		}
		got := map[string][]string{}
		var first string
		sc := bufio.NewScanner(strings.NewReader(string(b)))
		for n := 0; sc.Scan(); n++ {
			line := strings.TrimSpace(sc.Text())
			k, v, _ := strings.Cut(line, "=")
			if n == 0 {
				first = line
			}
			if strings.HasPrefix(line, "#") || k == "" {
				t.Fatalf("a line that agents skip: %q", line)
			}
			got[strings.ToLower(k)] = append(got[strings.ToLower(k)], v)
		}
		if first != "action="+string(a) || len(got["action"]) != 1 || got["option"] != nil {
			t.Fatalf("input %q", b)
		}
		for k, v := range params {
			if !strings.Contains(string(b), k+"="+v+"\n") {
				t.Fatalf("%s is lost in %q", k, b)
			}
		}
	})
}

// Nothing is started for a request that must not be.
func TestRefusals(t *testing.T) {
	t.Parallel()
	mark := filepath.Join(t.TempDir(), "ran")
	r := script(t, "fence_fake", plainParams, `<action name="off"/><action name="on" on_target="1" automatic="1"/>`, "touch "+mark)
	for _, c := range []struct {
		q    Request
		want error
		exit int
	}{
		{Request{Agent: "fence_fake", Target: "n2"}, ErrNoAction, 2},
		{Request{Agent: "fence_fake", Action: Reboot, Target: "n2"}, ErrNotAdvertised, 2},
		{Request{Agent: "fence_fake", Action: "list", Target: "n2"}, ErrNotAdvertised, 2},
		{Request{Agent: "fence_fake", Action: Off}, ErrParam, 2},
		{Request{Agent: "fence_fake", Action: Off, Target: "n1"}, ErrSelf, 9},
		{Request{Agent: "fence_fake", Action: On, Target: "n2"}, ErrOnTarget, 2},
		{Request{Agent: "fence_none", Action: Off, Target: "n2"}, ErrNotFound, 3},
		{Request{Agent: "../fence_fake", Action: Off, Target: "n2"}, ErrNotFound, 3},
		{Request{Agent: "sh", Action: Off, Target: "n2"}, ErrNotFound, 3},
		{Request{Agent: "fence_fake", Action: Off, Target: "n2", Params: map[string]string{"option": "status"}}, ErrParam, 2},
		{Request{Agent: "fence_fake", Action: Off, Target: "n2", Params: map[string]string{"action": "on"}}, ErrParam, 2},
		{Request{Agent: "fence_fake", Action: Off, Target: "n2", Params: map[string]string{"login": "a", "username": "b"}}, ErrParam, 2},
		{Request{Agent: "fence_fake", Action: Off, Target: "n2\naction=on"}, ErrParam, 2},
		{Request{Agent: "fence_fake", Action: Off, Target: "n2", Params: map[string]string{"x": "1\naction=on"}}, ErrParam, 2},
		{Request{Agent: "fence_fake", Action: Off, Target: "n2", Params: map[string]string{"delay": "soon"}}, ErrParam, 2},
	} {
		_, err := r.Run(t.Context(), c.q)
		if !errors.Is(err, c.want) || fsm.ExitCode(err) != c.exit {
			t.Errorf("%+v: %v (exit %d)", c.q, err, fsm.ExitCode(err))
		}
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("the agent was started")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Run(ctx, Request{Agent: "fence_fake", Action: Off, Target: "n2"}); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
}

// Exit statuses (facts §2.1): status 2 is "answers, and is off"; 2 from anything
// else is a failure.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	r := script(t, "fence_fake", plainParams+`<parameter name="rc"/>`, plainActions,
		`rc=$(echo "$in" | sed -n 's/^rc=//p'); [ "$rc" = kill ] && kill -9 $$; echo "says $rc"; exit $rc`)
	for _, c := range []struct {
		a     Action
		rc    string
		want  fencing.Outcome
		exit  int
		power Power
	}{
		{Status, "0", fencing.OK, 0, PowerOn}, {Status, "2", fencing.OK, 2, PowerOff}, {Status, "1", fencing.Failed, 1, PowerUnknown}, {Status, "8", fencing.Failed, 8, PowerUnknown},
		{Monitor, "0", fencing.OK, 0, PowerUnknown}, {Monitor, "2", fencing.OK, 2, PowerOff}, {Monitor, "1", fencing.Failed, 1, PowerUnknown},
		{Off, "0", fencing.OK, 0, PowerUnknown}, {Off, "2", fencing.Failed, 2, PowerUnknown}, {Off, "1", fencing.Failed, 1, PowerUnknown}, {Reboot, "2", fencing.Failed, 2, PowerUnknown},
		{Off, "kill", fencing.Failed, -1, PowerUnknown},
	} {
		res := run(t, r, Request{Agent: "fence_fake", Action: c.a, Target: "n2", Params: map[string]string{"rc": c.rc}})
		if res.Outcome != c.want || res.ExitCode != c.exit || res.Power != c.power || res.OK() != (res.Why == "") {
			t.Errorf("%s exit %s: %+v", c.a, c.rc, res)
		}
		end := res.End(7, time.Unix(1, 0))
		if err := end.Validate(); err != nil || end.Attempt != 7 || end.Outcome != c.want {
			t.Errorf("%+v: %v", end, err)
		}
	}
}

func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		// A killed orphan may stay a zombie until its new parent reaps it.
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(unix.Kill(pid, 0), unix.ESRCH) || err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d still runs", pid)
		}
	}
}

func readPID(t *testing.T, path string) int {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		b, _ := os.ReadFile(path)
		if s := strings.TrimSpace(string(b)); strings.HasSuffix(string(b), "\n") && s != "" {
			n, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		if time.Now().After(end) {
			t.Fatalf("%s was not written", path)
		}
	}
}

// At the limit, at the end of the context, and when the agent ends before its
// children: nothing of the group is left, and only a real end is a success.
func TestTheWholeGroupIsKilled(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"timeout", "cancel", "exit"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			body := `trap '' TERM HUP; (trap '' TERM HUP; sh -c 'echo $$ >` + dir + `/p.new; mv ` + dir + `/p.new ` + dir + `/pid; exec sleep 1000') & `
			if how == "exit" {
				body += `while [ ! -e ` + dir + `/pid ]; do sleep 0.05; done; exit 0`
			} else {
				body += `wait; sleep 1000`
			}
			r := script(t, "fence_fake", plainParams, plainActions, body)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			q := Request{Agent: "fence_fake", Action: Off, Target: "n2", Timeout: patience}
			if how == "timeout" {
				q.Timeout = 2 * time.Second
			}
			type out struct {
				res Result
				err error
			}
			ch := make(chan out, 1)
			go func() { res, err := r.Run(ctx, q); ch <- out{res, err} }()
			pid := readPID(t, dir+"/pid")
			if how == "cancel" {
				cancel(errors.New("the node lease ended"))
			}
			o := <-ch
			if o.err != nil {
				t.Fatal(o.err)
			}
			switch how {
			case "timeout":
				if o.res.Outcome != fencing.TimedOut || o.res.Cancelled || o.res.ExitCode != -1 {
					t.Errorf("%+v", o.res)
				}
			case "cancel":
				if o.res.Outcome != fencing.Failed || !o.res.Cancelled || !strings.Contains(o.res.Why, "node lease ended") {
					t.Errorf("%+v", o.res)
				}
			case "exit":
				if !o.res.OK() {
					t.Errorf("%+v", o.res)
				}
			}
			gone(t, pid)
		})
	}
}

// A child that left the group and holds the output open delays nothing for long.
func TestStrangerHoldsTheOutput(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := script(t, "fence_fake", plainParams, plainActions, `setsid sh -c 'echo $$ >`+dir+`/p.new; mv `+dir+`/p.new `+dir+`/pid; exec sleep 60' & while [ ! -e `+dir+`/pid ]; do sleep 0.05; done; exit 0`)
	start := time.Now()
	res := run(t, r, Request{Agent: "fence_fake", Action: Off, Target: "n2", Timeout: patience})
	if pid := readPID(t, dir+"/pid"); pid > 1 {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if !res.OK() || time.Since(start) > patience {
		t.Errorf("%+v after %v", res, time.Since(start))
	}
}

// The delay is the agent's where it has one, and ours where not; it does not eat
// the time limit.
func TestDelay(t *testing.T) {
	t.Parallel()
	r := script(t, "fence_fake", plainParams, plainActions, `echo "$in"`)
	if res := run(t, r, Request{Agent: "fence_fake", Action: Off, Target: "n2", Delay: 1200 * time.Millisecond}); !strings.Contains(res.Output, "delay=2\n") {
		t.Errorf("%q", res.Output)
	}
	none := script(t, "fence_none", "", plainActions, `echo "$in"`)
	start := time.Now()
	res := run(t, none, Request{Agent: "fence_none", Action: Off, Target: "n2", Delay: 300 * time.Millisecond})
	if strings.Contains(res.Output, "delay") || time.Since(start) < 300*time.Millisecond || !res.OK() {
		t.Errorf("%+v after %v", res, time.Since(start))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := none.Metadata(t.Context(), "fence_none"); err != nil {
		t.Fatal(err)
	}
	res, err := none.Run(ctx, Request{Agent: "fence_none", Action: Off, Target: "n2", Delay: time.Hour})
	if err != nil || !res.Cancelled || res.OK() {
		t.Errorf("%+v, %v", res, err)
	}
}

// The end of long output is kept, masked, whatever is cut where.
func TestOutputTail(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		secrets := rapid.SliceOfN(rapid.StringMatching(`[A-Z]{1,9}`), 0, 3).Draw(t, "secrets")
		ring := newTail(secrets)
		var all strings.Builder
		for range rapid.IntRange(0, 60).Draw(t, "writes") {
			s := rapid.OneOf(rapid.StringMatching(`[a-zé\n]{0,400}`), rapid.SampledFrom(append([]string{"é"}, secrets...))).Draw(t, "s")
			all.WriteString(s)
			if n, err := ring.Write([]byte(s)); n != len(s) || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
		}
		got := ring.String()
		if len(got) > MaxOutput {
			t.Fatalf("%d bytes", len(got))
		}
		// Capital letters occur only in secrets, so none, not even a part, may be left.
		if i := strings.IndexFunc(got, func(r rune) bool { return r >= 'A' && r <= 'Z' }); i >= 0 {
			t.Fatalf("%q of %q with secrets %q", got, all.String(), secrets)
		}
		clean := hide(all.String(), 0, secrets)
		if all.Len() < MaxOutput && got != clean && len(clean) <= MaxOutput {
			t.Fatalf("%q, want %q", got, clean)
		}
		if !strings.HasSuffix(clean, got) && !strings.HasPrefix(got, mask) {
			t.Fatalf("%q is no end of %q", got, clean)
		}
	})
	r := script(t, "fence_fake", plainParams, plainActions, `i=0; while [ $i -lt 3000 ]; do echo "line $i"; i=$((i+1)); done; echo the end >&2; exit 1`)
	res := run(t, r, Request{Agent: "fence_fake", Action: Off, Target: "n2"})
	if len(res.Output) > MaxOutput || !strings.HasSuffix(res.Output, "line 2999\nthe end\n") {
		t.Errorf("%d bytes: %q", len(res.Output), res.Output)
	}
}

func TestSecret(t *testing.T) {
	t.Parallel()
	for _, n := range []string{"passwd", "password", "snmp_priv_passwd", "PASSWORD", "community", "hexadecimal_kg", "token", "client_secret"} {
		if !Secret(n) {
			t.Errorf("%s is shown", n)
		}
	}
	for _, n := range []string{"ip", "login", "plug", "passwd_script", "password_script", "identity_file", "key"} {
		if Secret(n) {
			t.Errorf("%s is hidden", n)
		}
	}
}

// Metadata is asked for once a program, and again when the program changes.
func TestMetadataCache(t *testing.T) {
	t.Parallel()
	count := filepath.Join(t.TempDir(), "count")
	dir := t.TempDir()
	p := filepath.Join(dir, "fence_fake")
	write := func(actions string) {
		text := "#!/bin/sh\ncat >/dev/null; echo x >>" + count + "\necho '<resource-agent name=\"fence_fake\"><actions>" + actions + "</actions></resource-agent>'\n"
		if err := os.WriteFile(p+".new", []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(p+".new", p); err != nil {
			t.Fatal(err)
		}
	}
	write(`<action name="off"/>`)
	r := New(Config{Node: "n1", Dirs: []string{dir}})
	for range 3 {
		m, err := r.Metadata(t.Context(), "fence_fake")
		if err != nil || !m.Advertises(Off) || m.Advertises(On) {
			t.Fatalf("%+v, %v", m, err)
		}
	}
	if b, _ := os.ReadFile(count); string(b) != "x\n" {
		t.Errorf("asked %q", b)
	}
	write(`<action name="off"/><action name="on"/>`)
	if m, err := r.Metadata(t.Context(), "fence_fake"); err != nil || !m.Advertises(On) {
		t.Errorf("%+v, %v", m, err)
	}
	if l, err := r.Installed(); err != nil || len(l) != 1 || l[0] != "fence_fake" {
		t.Errorf("%v, %v", l, err)
	}
}

func TestBadMetadata(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "<", "<x/>", `<resource-agent/>`, `<resource-agent><actions/></resource-agent>`, strings.Repeat("x", maxMetadata+1)} {
		if _, err := ParseMetadata([]byte(s)); !errors.Is(err, ErrMetadata) {
			t.Errorf("%.40q: %v", s, err)
		}
	}
}

func FuzzParseMetadata(f *testing.F) {
	f.Add([]byte(`<resource-agent name="x"><parameters><parameter name="plug" obsoletes="port"/><parameter name="port" obsoletes="plug"/></parameters><actions><action name="off"/></actions></resource-agent>`))
	f.Add([]byte(`text <?xml version="1.0" encoding="latin1"?><resource-agent/>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMetadata(b)
		if err != nil {
			return
		}
		for _, p := range m.Params {
			if n := m.Spelling(p.Name); n != "action" && !m.Knows(n) {
				t.Fatalf("%q is spelled %q, which is unknown", p.Name, n)
			}
		}
	})
}

func TestParseList(t *testing.T) {
	t.Parallel()
	got := parseList("1,web\n2,a,b\n\n3\n", ",", false)
	want := []Plug{{"1", "web", PowerUnknown}, {"2", "a,b", PowerUnknown}, {"3", "", PowerUnknown}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	got = parseList("1,web,on\n2,a,b,OFF\n3,x,?\n", ",", true)
	want = []Plug{{"1", "web", PowerOn}, {"2", "a,b", PowerOff}, {"3", "x", PowerUnknown}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Unfencing: on the node itself, only with agents that ask for it, and the first
// failure ends it.
func TestUnfence(t *testing.T) {
	t.Parallel()
	r := script(t, "fence_san", plainParams, `<action name="on" on_target="1" automatic="1"/><action name="off"/>`, `echo "$in"; case "$in" in *ip=bad*) exit 1;; esac`)
	power := script(t, "fence_power", plainParams, plainActions, `exit 1`)
	r.cfg.Dirs = append(r.cfg.Dirs, power.cfg.Dirs...)
	res, err := r.Unfence(t.Context(), []Request{{Agent: "fence_power"}, {Agent: "fence_san", Params: map[string]string{"ip": "a"}}})
	if err != nil || len(res) != 1 || !strings.HasPrefix(res[0].Output, "action=on\nip=a\nnodename=n1\nplug=n1\n") {
		t.Errorf("%+v, %v", res, err)
	}
	res, err = r.Unfence(t.Context(), []Request{{Agent: "fence_san", Params: map[string]string{"ip": "bad"}}, {Agent: "fence_san"}})
	if err == nil || len(res) != 1 || res[0].OK() {
		t.Errorf("%+v, %v", res, err)
	}
}
