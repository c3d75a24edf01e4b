package plan

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

var (
	powerActions  = []agent.Action{agent.On, agent.Off, agent.Reboot, agent.Status, agent.Monitor}
	fabricActions = []agent.Action{agent.On, agent.Off, agent.Status}
	devices       = []Device{
		{Name: "pdu1", Agent: "fence_apc", Actions: powerActions, Params: map[string]string{"ip": "192.0.2.1", "login": "a"}, Timeout: 5 * time.Second},
		{Name: "pdu2", Agent: "fence_apc", Actions: powerActions},
		{Name: "ipmi", Agent: "fence_ipmilan", Actions: powerActions, Executors: []string{"n1", "n2"}},
		{Name: "san", Agent: "fence_scsi", Actions: fabricActions},
		{Name: "dump", Agent: "fence_kdump", Actions: []agent.Action{agent.Off}},
		{Name: "blind", Agent: "fence_odd", Actions: []agent.Action{agent.Status}},
	}
)

func ag(name string, uses ...Use) Method { return Method{name, fencing.Agent, uses} }
func use(dev, plug string, a ...agent.Action) Use {
	u := Use{Device: dev, Plug: plug}
	if len(a) > 0 {
		u.Action = a[0]
	}
	return u
}

func show(p Plan) string {
	var b strings.Builder
	for _, m := range p.Methods {
		fmt.Fprintf(&b, "%s %s\n", m.Name, m.Kind)
		for _, s := range m.Steps {
			fmt.Fprintf(&b, "  %s\n", s)
		}
	}
	return b.String()
}

func TestExpand(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		want    Want
		methods []Method
		text    string // the plan, or after "error: " a part of the error
	}{
		{"one power device", Reboot, []Method{ag("power", use("ipmi", ""))}, "power agent\n  reboot ipmi\n"},
		{"one power device, off", Off, []Method{ag("power", use("ipmi", ""))}, "power agent\n  off ipmi\n"},
		{"two supplies", Reboot, []Method{ag("power", use("pdu1", "3"), use("pdu2", "4"))},
			"power agent\n  off pdu1:3\n  off pdu2:4\n  on pdu1:3 (if possible)\n  on pdu2:4 (if possible)\n"},
		{"two outlets of one device", Reboot, []Method{ag("power", use("pdu1", "3"), use("pdu1", "4"))},
			"power agent\n  off pdu1:3\n  off pdu1:4\n  on pdu1:3 (if possible)\n  on pdu1:4 (if possible)\n"},
		{"two supplies, off", Off, []Method{ag("power", use("pdu1", "3"), use("pdu2", "4"))}, "power agent\n  off pdu1:3\n  off pdu2:4\n"},
		{"fabric knows no reboot", Reboot, []Method{ag("san", use("san", ""))}, "san agent\n  off san\n"},
		{"fabric and power: all of", Reboot, []Method{ag("both", use("san", ""), use("ipmi", ""))}, "both agent\n  off san\n  reboot ipmi\n"},
		{"fabric and two supplies", Reboot, []Method{ag("all", use("pdu1", "1"), use("san", ""), use("pdu2", "2"))},
			"all agent\n  off pdu1:1\n  off san\n  off pdu2:2\n  on pdu1:1 (if possible)\n  on pdu2:2 (if possible)\n"},
		{"written out", Reboot, []Method{ag("old", use("pdu1", "3", agent.Off), use("pdu2", "4", agent.Off), use("pdu1", "3", agent.On), use("pdu2", "4", agent.On))},
			"old agent\n  off pdu1:3\n  off pdu2:4\n  on pdu1:3 (if possible)\n  on pdu2:4 (if possible)\n"},
		{"on first is needed", Reboot, []Method{ag("odd", use("pdu1", "3", agent.On), use("ipmi", ""))}, "odd agent\n  on pdu1:3\n  reboot ipmi\n"},
		{"methods in order, built-in ones between", Reboot, []Method{{"", fencing.Target, nil}, ag("", use("dump", "")), ag("power", use("ipmi", "")), {"last", fencing.Manual, nil}},
			"1 target\n2 agent\n  off dump\npower agent\n  reboot ipmi\nlast manual\n"},
		{"no method", Reboot, nil, ""},

		{"no device", Reboot, []Method{ag("x")}, "error: it has no device"},
		{"unknown device", Reboot, []Method{ag("x", use("nope", ""))}, "error: no device is called nope"},
		{"twice", Reboot, []Method{ag("x", use("ipmi", ""), use("ipmi", ""))}, "error: twice"},
		{"only on", Reboot, []Method{ag("x", use("pdu1", "1", agent.On))}, "error: no step switches the node off"},
		{"status does not fence", Reboot, []Method{ag("x", use("pdu1", "1", agent.Status))}, "error: does not fence"},
		{"reboot of a fabric agent", Reboot, []Method{ag("x", use("san", "", agent.Reboot))}, "error: has no action reboot"},
		{"agent without off", Reboot, []Method{ag("x", use("blind", ""))}, "error: has no action off"},
		{"built-in with devices", Reboot, []Method{{"x", fencing.Manual, []Use{use("ipmi", "")}}}, "error: takes no devices"},
	} {
		p, err := New("n3", c.methods, devices, c.want)
		got := show(p)
		if err != nil {
			if want, ok := strings.CutPrefix(c.text, "error: "); !ok || !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if diff := cmp.Diff(c.text, got); diff != "" {
			t.Errorf("%s:\n%s", c.name, diff)
		}
	}
	if _, err := New("n3", nil, append(slices.Clone(devices), devices[0]), Reboot); !errors.Is(err, ErrConfig) {
		t.Errorf("a device twice: %v", err)
	}
}

// What a step hands to the agent.
func TestRequest(t *testing.T) {
	t.Parallel()
	p, err := New("n3", []Method{ag("power", Use{Device: "pdu1", Plug: "3", Params: map[string]string{"login": "b"}, Delay: time.Second}, use("pdu2", "4"))}, devices, Reboot)
	if err != nil {
		t.Fatal(err)
	}
	want := agent.Request{Agent: "fence_apc", Action: agent.Off, Target: "n3", Plug: "3", Params: map[string]string{"ip": "192.0.2.1", "login": "b"}, Delay: time.Second, Timeout: 5 * time.Second}
	if diff := cmp.Diff(want, p.Methods[0].Steps[0].Request("n3")); diff != "" {
		t.Error(diff)
	}
	on := p.Methods[0].Steps[2].Request("n3")
	want.Action, want.Delay = agent.On, 0
	if diff := cmp.Diff(want, on); diff != "" {
		t.Error(diff)
	}
	on.Params["login"] = "x"
	if devices[0].Params["login"] != "a" || p.Methods[0].Steps[2].Params["login"] != "b" {
		t.Error("a request shares its options with the configuration")
	}
}

// All-of inside a method; the off part is the proof.
func TestOutcome(t *testing.T) {
	t.Parallel()
	p, err := New("n3", []Method{ag("power", use("pdu1", "3"), use("pdu2", "4"))}, devices, Reboot)
	if err != nil {
		t.Fatal(err)
	}
	m := p.Methods[0]
	for _, c := range []struct {
		ok              []bool
		done, succeeded bool
	}{
		{nil, false, false}, {[]bool{true}, false, false}, {[]bool{false}, true, false}, {[]bool{true, false}, true, false},
		{[]bool{true, true}, true, true}, {[]bool{true, true, false, false}, true, true}, {[]bool{false, true, true, true}, true, false},
	} {
		if d, s := m.Outcome(c.ok); d != c.done || s != c.succeeded || m.Fenced(c.ok) != c.succeeded {
			t.Errorf("%v: done %v, succeeded %v", c.ok, d, s)
		}
	}
	if (Planned{Kind: fencing.Target}).Fenced(nil) {
		t.Error("a built-in method is proved by no steps")
	}
}

// Methods in order, each on a second node too, then anew with growing pauses,
// never the manual one.
func TestCycle(t *testing.T) {
	t.Parallel()
	p, err := New("n3", []Method{{"hand", fencing.Manual, nil}, {"cut", fencing.Target, nil}, ag("power", use("ipmi", "")), ag("san", use("san", ""))}, devices, Reboot)
	if err != nil {
		t.Fatal(err)
	}
	members := []Candidate{{"n3", true}, {"n5", false}, {"n2", false}, {"n1", false}, {"n4", true}}
	pos, ok := p.Start()
	if !ok || !p.Automatic() {
		t.Fatal("nothing to start with")
	}
	var got []string
	for range 14 {
		ex, err := p.Executor(pos, members)
		if err != nil {
			t.Fatal(err)
		}
		n := len(p.Methods[pos.Method].Executors("n3", members))
		next, pause := p.Failed(pos, n)
		got = append(got, fmt.Sprintf("%s: %s; pause %v", ex, p.Describe(pos), pause))
		pos = next
	}
	want := []string{
		"n4: method cut (2 of 4); pause 0s",
		"n1: method power (3 of 4); pause 0s",
		"n2: method power (3 of 4), on another node; pause 0s",
		"n4: method san (4 of 4); pause 0s",
		"n1: method san (4 of 4), on another node; pause 3s",
		"n2: method cut (2 of 4), round 2; pause 0s",
		"n1: method power (3 of 4), round 2; pause 0s",
		"n2: method power (3 of 4), on another node, round 2; pause 0s",
		"n2: method san (4 of 4), round 2; pause 0s",
		"n5: method san (4 of 4), on another node, round 2; pause 6s",
		"n4: method cut (2 of 4), round 3; pause 0s",
		"n1: method power (3 of 4), round 3; pause 0s",
		"n2: method power (3 of 4), on another node, round 3; pause 0s",
		"n4: method san (4 of 4), round 3; pause 0s",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	hand, err := New("n3", []Method{{"hand", fencing.Manual, nil}}, nil, Reboot)
	if err != nil {
		t.Fatal(err)
	}
	if pos, ok := hand.Start(); ok || hand.Automatic() || !strings.Contains(hand.Describe(pos), "operator") {
		t.Errorf("%+v", pos)
	}
}

// Whatever is configured and fails: the victim runs nothing, every automatic
// method and every node that can run it get their turn, and pauses stay bounded.
func TestCycleProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var methods []Method
		for i := range rapid.IntRange(1, 5).Draw(t, "methods") {
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0:
				methods = append(methods, Method{fmt.Sprint(i), fencing.Manual, nil})
			case 1:
				methods = append(methods, Method{fmt.Sprint(i), fencing.Target, nil})
			default:
				methods = append(methods, ag(fmt.Sprint(i), use("san", "")))
			}
		}
		p, err := New("n1", methods, devices, Reboot)
		if err != nil {
			t.Fatal(err)
		}
		var members []Candidate
		n := rapid.IntRange(2, 7).Draw(t, "members")
		for i := 1; i <= n; i++ {
			members = append(members, Candidate{Node: fmt.Sprintf("n%d", i), Leader: i == 2})
		}
		pos, ok := p.Start()
		if ok != p.Automatic() {
			t.Fatal("start and automatic differ")
		}
		if !ok {
			return
		}
		tried := map[string]bool{}
		rounds := 0
		for pos.Round < 2*n+8 {
			ex, err := p.Executor(pos, members)
			if err != nil || ex == "n1" || p.Methods[pos.Method].Kind == fencing.Manual {
				t.Fatalf("%+v: %s, %v", pos, ex, err)
			}
			if len(p.Methods[pos.Method].Steps) > 0 {
				tried[fmt.Sprint(pos.Method, ex)] = true
			}
			next, pause := p.Failed(pos, n-1)
			if next.Round > pos.Round {
				rounds++
				if pause < FirstPause || pause > LastPause {
					t.Fatalf("pause %v", pause)
				}
			} else if pause != 0 {
				t.Fatalf("a pause of %v inside a round", pause)
			}
			pos = next
		}
		for i, m := range p.Methods {
			if len(m.Steps) == 0 {
				continue
			}
			for j := 2; j <= n; j++ {
				if !tried[fmt.Sprint(i, fmt.Sprintf("n%d", j))] {
					t.Fatalf("method %d was never tried on n%d of %d in %d rounds", i, j, n, rounds)
				}
			}
		}
	})
}

func TestExecutors(t *testing.T) {
	t.Parallel()
	p, err := New("n1", []Method{ag("both", use("ipmi", ""), use("san", ""))}, devices, Reboot)
	if err != nil {
		t.Fatal(err)
	}
	// ipmi is reached from n1 and n2 only, and n1 is the victim.
	if got := p.Methods[0].Executors("n1", []Candidate{{"n1", true}, {"n2", false}, {"n3", false}}); len(got) != 1 || got[0] != "n2" {
		t.Errorf("%v", got)
	}
	if _, err := p.Executor(Position{}, []Candidate{{"n1", true}, {"n3", false}}); !errors.Is(err, ErrNoExecutor) {
		t.Errorf("%v", err)
	}
}
