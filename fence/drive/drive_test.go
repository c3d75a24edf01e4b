package drive

import (
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/fence/plan"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

var t0 = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func powerPlan(t testing.TB) plan.Plan {
	t.Helper()
	p, err := plan.New("n2", []plan.Method{
		{Name: "ipmi", Kind: fencing.Agent, Uses: []plan.Use{{Device: "bmc"}}},
		{Name: "pdu", Kind: fencing.Agent, Uses: []plan.Use{{Device: "pdu", Plug: "4"}}},
	}, []plan.Device{
		{Name: "bmc", Agent: "fence_ipmilan", Actions: []agent.Action{agent.Off, agent.On, agent.Reboot}, Timeout: 20 * time.Second},
		{Name: "pdu", Agent: "fence_apc", Actions: []agent.Action{agent.Off, agent.On, agent.Reboot}, Timeout: 20 * time.Second},
	}, plan.Reboot)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// world carries acts out as the log would.
type world struct {
	in Input
	id uint64
}

func newWorld(p plan.Plan, volumes ...Volume) *world {
	w := &world{}
	w.in = Input{Open: fencing.Open{Node: "n2", Incarnation: 3, Epoch: 7}, Plan: p, Volumes: volumes, Silence: 11 * time.Second,
		Members: []plan.Candidate{{Node: "n1", Leader: true}, {Node: "n3"}}, Wall: t0}
	return w
}

func (w *world) pass(d time.Duration) { w.in.Wall, w.in.Now = w.in.Wall.Add(d), w.in.Now.Add(d) }

// do carries an act out and tells whether the fence is closed.
func (w *world) do(a Act) bool {
	switch {
	case a.Start != nil:
		w.id++
		s := a.Start
		w.in.Running = append(w.in.Running, fencing.Attempt{ID: w.id, Node: s.Node, Epoch: s.Epoch, Method: s.Method, Device: s.Device, Executor: s.Executor, Deadline: s.Deadline, Request: s.Request})
	case a.End != nil:
		w.end(a.End.Attempt, a.End.Outcome)
	case a.Close != nil:
		return true
	}
	return false
}

func (w *world) end(id uint64, o fencing.Outcome) {
	i := slices.IndexFunc(w.in.Running, func(a fencing.Attempt) bool { return a.ID == id })
	a := w.in.Running[i]
	w.in.Running = slices.Delete(w.in.Running, i, i+1)
	w.in.History = append(w.in.History, fencing.Record{Event: fencing.EventEnd, Node: a.Node, Epoch: a.Epoch, Attempt: id, Method: a.Method, Outcome: o, Text: "said"})
}

// TestCutClosesByItself: all acks close the fence at once, and no agent is asked
// before the targets had their time.
func TestCutClosesByItself(t *testing.T) {
	t.Parallel()
	w := newWorld(powerPlan(t), Volume{UUID: "u1", Name: "v1", Primary: "n1"}, Volume{UUID: "u2", Name: "v2", Primary: "n3"})
	var d Driver
	if a := d.Next(&w.in); a.Start != nil || a.Close != nil || !strings.Contains(a.Why, "n1 (v1); n3 (v2)") {
		t.Fatalf("%+v", a)
	}
	w.in.Open.Cuts = map[string]string{"u1": "n1"}
	w.pass(time.Second)
	if a := d.Next(&w.in); a.Start != nil || a.Close != nil || !strings.HasSuffix(a.Why, "yet: n3 (v2)") {
		t.Fatalf("%+v", a)
	}
	w.in.Open.Cuts["u2"] = "n3"
	a := d.Next(&w.in)
	if a.Close == nil || a.Close.Evidence.Method != fencing.Target || !slices.Equal(a.Close.Evidence.Acks, []string{"n1", "n3"}) || len(a.Close.Evidence.Pending) != 0 {
		t.Fatalf("%+v", a)
	}
	if err := a.Close.Validate(); err != nil {
		t.Fatal(err)
	}
}

// TestSilentTargets: time speaks for a target whose lease is over only where the
// machine cannot have been paused, and never before T_orphan and the margin.
func TestSilentTargets(t *testing.T) {
	t.Parallel()
	for _, pauses := range []bool{false, true} {
		w := newWorld(plan.Plan{Victim: "n2"}, Volume{UUID: "u1", Name: "v1", Primary: "n1"}, Volume{UUID: "u2", Name: "v2", Primary: "n2", Silent: true, Pauses: pauses})
		w.in.Open.Cuts = map[string]string{"u1": "n1"}
		var d Driver
		for range 11 {
			if a := d.Next(&w.in); a.Close != nil {
				t.Fatalf("closed after %v: %+v", time.Duration(w.in.Now), a.Close)
			}
			w.pass(time.Second)
		}
		a := d.Next(&w.in)
		if a.Close == nil {
			t.Fatalf("pauses %v: not closed: %s", pauses, a.Why)
		}
		e := a.Close.Evidence
		if !slices.Contains(e.Pending, "u2") || slices.Contains(e.Silent, "u2") == pauses {
			t.Errorf("pauses %v: %+v", pauses, e)
		}
	}
}

// TestNothingToSpeakForIt: without volumes and methods only an operator closes it.
func TestNothingToSpeakForIt(t *testing.T) {
	t.Parallel()
	for _, w := range []*world{newWorld(plan.Plan{Victim: "n2"}), newWorld(plan.Plan{Victim: "n2"}, Volume{UUID: "u", Name: "v", Primary: "n2", Silent: true, Pauses: true})} {
		var d Driver
		for range 100 {
			if a := d.Next(&w.in); w.do(a) || a.Start != nil {
				t.Fatalf("%+v", a)
			}
			w.pass(time.Second)
		}
		if a := d.Next(&w.in); !strings.Contains(a.Why, "clusteradm fence_manual n2") {
			t.Error(a.Why)
		}
	}
}

// TestOrder: second node, next method, then again with pauses.
func TestOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(powerPlan(t))
	var d Driver
	var tries []string
	var at []time.Duration
	for len(tries) < 9 {
		a := d.Next(&w.in)
		if a.Start != nil {
			if err := a.Start.Validate(); err != nil {
				t.Fatal(err)
			}
			tries = append(tries, a.Start.Device+" by "+a.Start.Executor)
			at = append(at, time.Duration(w.in.Now))
		}
		w.do(a)
		if len(w.in.Running) > 0 {
			w.end(w.id, fencing.Failed)
			continue
		}
		w.pass(100 * time.Millisecond)
	}
	want := []string{"ipmi by n1", "ipmi by n3", "pdu by n1", "pdu by n3", "ipmi by n1", "ipmi by n3", "pdu by n1", "pdu by n3", "ipmi by n1"}
	if !slices.Equal(tries, want) {
		t.Errorf("got  %v\nwant %v", tries, want)
	}
	if p := at[4] - at[3]; p < plan.FirstPause {
		t.Errorf("second round after %v", p)
	}
	if p := at[8] - at[7]; p < 2*plan.FirstPause {
		t.Errorf("third round after %v", p)
	}
	// A new leader knows the position from the log, and begins with the pause.
	w.in.History = w.in.History[:8]
	var d2 Driver
	if a := d2.Next(&w.in); a.Start != nil {
		t.Errorf("a new leader tries at once: %+v", a.Start)
	}
}

// TestExecutorIsGone: nothing else is begun until its deadline.
func TestExecutorIsGone(t *testing.T) {
	t.Parallel()
	w := newWorld(powerPlan(t))
	var d Driver
	a := d.Next(&w.in)
	w.do(a)
	deadline := a.Start.Deadline
	w.in.Members = []plan.Candidate{{Node: "n3", Leader: true}}
	for w.in.Wall.Before(deadline) {
		if a := d.Next(&w.in); a.Start != nil || a.End != nil || a.Close != nil {
			t.Fatalf("before the deadline: %+v", a)
		}
		w.pass(time.Second)
	}
	a = d.Next(&w.in)
	if a.End == nil || a.End.Outcome != fencing.Abandoned {
		t.Fatalf("%+v", a)
	}
	w.do(a)
	if a = d.Next(&w.in); a.Start == nil || a.Start.Executor != "n3" {
		t.Fatalf("%+v", a)
	}
}

// TestAgentProof: an agent's success closes the fence, and names the volumes that
// have no word of their target.
func TestAgentProof(t *testing.T) {
	t.Parallel()
	w := newWorld(powerPlan(t), Volume{UUID: "u1", Name: "v1", Primary: "n1"})
	var d Driver
	d.Next(&w.in)
	w.pass(CutPatience)
	a := d.Next(&w.in)
	if a.Start == nil {
		t.Fatalf("%+v", a)
	}
	w.do(a)
	w.end(w.id, fencing.OK)
	if a = d.Next(&w.in); a.Close == nil || a.Close.Evidence.Method != fencing.Agent || !slices.Equal(a.Close.Evidence.Pending, []string{"u1"}) {
		t.Fatalf("%+v", a)
	}
}

// TestDriver: whatever happens, one attempt at a time, never by the victim, and a
// close only with proof.
func TestDriver(t *testing.T) {
	t.Parallel()
	p := powerPlan(t)
	rapid.Check(t, func(r *rapid.T) {
		w := newWorld(p, Volume{UUID: "u1", Name: "v1", Primary: "n1"}, Volume{UUID: "u2", Name: "v2", Primary: "n3"}, Volume{UUID: "u3", Name: "v3", Primary: "n2", Silent: true, Pauses: rapid.Bool().Draw(r, "pauses")})
		d := &Driver{}
		for range rapid.IntRange(1, 200).Draw(r, "steps") {
			switch rapid.IntRange(0, 6).Draw(r, "event") {
			case 0:
				w.pass(time.Duration(rapid.IntRange(1, 30).Draw(r, "s")) * time.Second)
			case 1:
				if len(w.in.Running) > 0 {
					w.end(w.in.Running[0].ID, rapid.SampledFrom([]fencing.Outcome{fencing.OK, fencing.Failed, fencing.TimedOut}).Draw(r, "outcome"))
				}
			case 2:
				v := rapid.SampledFrom(w.in.Volumes[:2]).Draw(r, "acked")
				if w.in.Open.Cuts == nil {
					w.in.Open.Cuts = map[string]string{}
				}
				w.in.Open.Cuts[v.UUID] = v.Primary
			case 3:
				d = &Driver{} // another leader
			case 4:
				v := &w.in.Volumes[rapid.IntRange(0, 1).Draw(r, "silent")]
				if v.Silent = !v.Silent; v.Silent {
					v.Since = w.in.Now
				}
			default:
				a := d.Next(&w.in)
				if a.Start != nil {
					if len(w.in.Running) > 0 || a.Start.Executor == "n2" {
						r.Fatalf("start beside %v: %+v", w.in.Running, a.Start)
					}
					if err := a.Start.Validate(); err != nil {
						r.Fatal(err)
					}
				}
				if a.End != nil && w.in.Wall.Before(w.in.Running[0].Deadline) {
					r.Fatal("given up before its deadline")
				}
				if a.Close == nil && a.Start == nil && a.End == nil && a.Why == "" {
					r.Fatal("nothing is done and nothing is said")
				}
				if !w.do(a) {
					continue
				}
				if err := a.Close.Validate(); err != nil {
					r.Fatal(err)
				}
				e := a.Close.Evidence
				if e.Method == fencing.Agent {
					if !slices.ContainsFunc(w.in.History, func(h fencing.Record) bool { return h.Attempt == e.Attempt && h.Outcome == fencing.OK }) {
						r.Fatalf("no success: %+v", e)
					}
				} else {
					for _, v := range w.in.Volumes {
						over := v.Silent && w.in.Now.Sub(v.Since) >= w.in.Silence
						switch {
						case w.in.Open.Cuts[v.UUID] != "":
						case over && !v.Pauses && slices.Contains(e.Silent, v.UUID):
						case over && v.Pauses && slices.Contains(e.Pending, v.UUID):
						default:
							r.Fatalf("nobody speaks for %s: %+v", v.Name, e)
						}
					}
				}
				return
			}
		}
	})
}
