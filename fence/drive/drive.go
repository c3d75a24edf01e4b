// Package drive decides what is next in fencing an evicted node. It is pure: the
// leader gives it what the log says and what it sees, and carries out the one
// thing that comes back. Everything that counts is in the log, so a new leader
// goes on where the old one stopped, and an old one that does not know yet that it
// is deposed can commit nothing.
//
// The order of things (facts/cluster.md §3, SAFETY §3):
//
//   - The cut at the targets runs from the eviction on, by itself: targets see the
//     open fence in their records. It is method 1 of every node.
//   - Meanwhile the methods of the plan are tried, one attempt at a time, each
//     committed before it acts. Whichever proof comes first closes the fence.
//   - An attempt whose executor is gone is given up only when its deadline is over,
//     because until then it may still act.
//
// Cluster row: node and the simulator import it; it imports fence/plan and the
// types of membership/fsm/fencing.
package drive

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/fence/plan"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

// Volume is a volume that the victim could reach.
type Volume struct {
	UUID, Name string
	Primary    string // node whose target serves it
	// Silent: its target's node lease is over (the node is evicted, or has not
	// renewed), since Since on the leader's clock.
	Silent bool
	Since  env.Boot
	// Pauses: the primary's machine may have been stopped without noticing (a
	// virtual machine), so that time proves nothing about it.
	Pauses bool
}

// Input is everything a decision is made of.
type Input struct {
	Open    fencing.Open
	Running []fencing.Attempt // of the victim, of any of its fences
	History []fencing.Record  // of this fence, oldest first
	Plan    plan.Plan
	Members []plan.Candidate // that may execute: active, with a lease
	Volumes []Volume
	// Silence is how long after the end of its node lease a target can still serve:
	// T_orphan and the margin for clock rates.
	Silence time.Duration
	Wall    time.Time // for the log
	Now     env.Boot  // for waiting
}

// Act is what is to be done next. At most one field but Why is set; none means to
// look again later.
type Act struct {
	Start *fencing.FenceStart
	End   *fencing.FenceEnd
	Close *fencing.Fenced
	Why   string // one line for status: what is being waited for
}

// CutPatience is how long the fence waits for the targets alone before it tries
// the first configured method beside them. With nothing else to try it waits on.
const CutPatience = 3 * time.Second

// grace is added to an attempt's steps: the executor needs time to read it in the
// log and to write its end.
const grace = 5 * time.Second

// Driver drives one fence. It holds only what may be lost: when to try again.
type Driver struct {
	began env.Boot // when this leader saw the fence first
	tried int      // ends of attempts seen
	due   env.Boot // no try before
	begun bool
}

// Next decides. It never returns the same Start twice for a position: the attempt
// is running by then, or has ended.
func (d *Driver) Next(in *Input) Act {
	if !d.begun {
		d.begun, d.began = true, in.Now
	}
	o := &in.Open
	cut := in.cut()
	if len(cut.waiting) == 0 && len(cut.acks)+len(cut.silent) > 0 {
		return Act{Close: &fencing.Fenced{Now: in.Wall, Node: o.Node, Epoch: o.Epoch, Evidence: fencing.Evidence{
			Method: fencing.Target, Acks: cut.acks, Silent: cut.silent, Pending: slices.Concat(cut.pending, cut.silent), Output: cut.text()}}, Why: "cut off at every target"}
	}
	ended := in.ended()
	for _, r := range ended {
		if r.Outcome == fencing.OK && r.Method == fencing.Agent {
			return Act{Close: &fencing.Fenced{Now: in.Wall, Node: o.Node, Epoch: o.Epoch, Evidence: fencing.Evidence{
				Method: fencing.Agent, Attempt: r.Attempt, Pending: slices.Concat(cut.pending, cut.silent, cut.names()), Output: tail(r.Text)}},
				Why: "attempt " + fmt.Sprint(r.Attempt) + " succeeded"}
		}
	}
	for _, a := range in.Running {
		if a.Epoch != o.Epoch {
			continue // of an older fence: Admit waits for it, we need not
		}
		if in.Wall.Before(a.Deadline) {
			return Act{Why: fmt.Sprintf("attempt %d: %s on %s, until %s", a.ID, a.Device, a.Executor, a.Deadline.UTC().Format(time.TimeOnly))}
		}
		return Act{End: &fencing.FenceEnd{Now: in.Wall, Attempt: a.ID, Outcome: fencing.Abandoned, ExitCode: -1,
			Output: fmt.Sprintf("%s did not report by the deadline", a.Executor)}, Why: "the executor is gone"}
	}
	pos, ok := in.Plan.Start()
	if !ok {
		return Act{Why: cmp.Or(cut.why(), "an operator who has reset it: clusteradm fence_manual "+o.Node)}
	}
	var pause time.Duration
	for range ended {
		pos, pause = in.Plan.Failed(pos, len(in.Plan.Methods[pos.Method].Executors(o.Node, in.Members)))
	}
	if d.tried != len(ended) {
		d.tried, d.due = len(ended), in.Now.Add(pause)
	}
	if wait := d.began.Add(CutPatience).Sub(in.Now); wait > 0 && len(cut.waiting) > 0 {
		return Act{Why: cut.why()}
	}
	if in.Now < d.due {
		return Act{Why: fmt.Sprintf("%s in %v", in.Plan.Describe(pos), d.due.Sub(in.Now).Round(time.Second))}
	}
	who, err := in.Plan.Executor(pos, in.Members)
	if err != nil {
		return Act{Why: err.Error()}
	}
	m := in.Plan.Methods[pos.Method]
	return Act{Start: &fencing.FenceStart{
		Request: fmt.Sprintf("%s/%d/%d", o.Node, o.Epoch, len(ended)+1), Now: in.Wall, Node: o.Node, Epoch: o.Epoch,
		Method: m.Kind, Device: m.Name, Executor: who, Deadline: in.Wall.Add(Budget(m)),
	}, Why: in.Plan.Describe(pos)}
}

// Budget is how long an attempt of a method may take, its steps one after another.
func Budget(m plan.Planned) time.Duration {
	b := grace
	for _, s := range m.Steps {
		b += s.Delay + cmp.Or(s.Timeout, agent.DefaultTimeout)
	}
	return b
}

// ended lists the ends of attempts of this fence, oldest first.
func (in *Input) ended() []fencing.Record {
	var out []fencing.Record
	for _, r := range in.History {
		if r.Event == fencing.EventEnd && r.Node == in.Open.Node && r.Epoch == in.Open.Epoch {
			out = append(out, r)
		}
	}
	return out
}

// cutState sorts the volumes by what is known of the cut.
type cutState struct {
	acks []string // nodes that acked
	// silent are uuids of volumes whose target's time is over: it takes nothing any
	// more. What it had given to its disk may land late, so they stay pending until
	// their primary is back and says so; nobody else has them.
	silent  []string
	pending []string // uuids of those that nobody can speak for: suspended until their primary acks
	waiting []Volume // volumes whose target lives and has not acked
}

func (in *Input) cut() (c cutState) {
	for _, v := range in.Volumes {
		by, acked := in.Open.Cuts[v.UUID]
		switch {
		case acked:
			if !slices.Contains(c.acks, by) {
				c.acks = append(c.acks, by)
			}
		case v.Silent && !v.Pauses && in.Now.Sub(v.Since) >= in.Silence:
			c.silent = append(c.silent, v.UUID)
		case v.Silent && v.Pauses && in.Now.Sub(v.Since) >= in.Silence:
			c.pending = append(c.pending, v.UUID)
		default:
			c.waiting = append(c.waiting, v)
		}
	}
	slices.Sort(c.acks)
	return c
}

// names are the uuids of the volumes that have no ack.
func (c *cutState) names() (out []string) {
	for _, v := range c.waiting {
		out = append(out, v.UUID)
	}
	return out
}

func (c *cutState) why() string {
	if len(c.waiting) == 0 {
		return ""
	}
	by := map[string][]string{}
	var nodes []string
	for _, v := range c.waiting {
		if by[v.Primary] == nil {
			nodes = append(nodes, v.Primary)
		}
		by[v.Primary] = append(by[v.Primary], v.Name)
	}
	slices.Sort(nodes)
	for i, n := range nodes {
		nodes[i] = n + " (" + strings.Join(by[n], ", ") + ")"
	}
	return "the targets have not cut it off yet: " + strings.Join(nodes, "; ")
}

func (c *cutState) text() string {
	var s []string
	if len(c.acks) > 0 {
		s = append(s, "cut off by "+strings.Join(c.acks, ", "))
	}
	if len(c.silent) > 0 {
		s = append(s, fmt.Sprintf("%d volumes are not served any more", len(c.silent)))
	}
	if len(c.pending) > 0 {
		s = append(s, fmt.Sprintf("cut pending on %d volumes, which stay suspended", len(c.pending)))
	}
	return strings.Join(s, "; ")
}

func tail(s string) string {
	if len(s) > fencing.MaxOutput {
		s = s[len(s)-fencing.MaxOutput:]
	}
	return strings.ToValidUTF8(s, "?")
}
