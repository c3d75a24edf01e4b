// Package plan says what is to be done to fence a node: which steps a configured
// method expands to, in which order methods are tried, on which node a step runs
// and how long to wait before everything is tried again. It is pure: no clock, no
// chance, no process. node/ commits each attempt and runs the steps with
// fence/agent.
//
// The rules (facts/cluster.md §3):
//
//   - Methods are tried in order; one that succeeds is enough (any-of).
//   - Inside a method every device must succeed (all-of).
//   - Two or more power devices in one method feed one node: all go off before the
//     first goes on, or the node would never lose power.
//   - The off part is the proof. That power did not come back is reported and
//     fails nothing.
//   - A failed method is tried again on another node, then the next method, and
//     after the last one all begins anew, for ever, with growing pauses.
//   - The victim never runs a step against itself.
//
// Cluster row: node and cli may import it; it imports fence/agent for its types.
package plan

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

// Device is a fence device as configured.
type Device struct {
	Name   string
	Agent  string // fence_ipmilan
	Params map[string]string
	// Actions are what the agent's metadata advertises (agent.Metadata.Actions).
	Actions []agent.Action
	// Executors are the only nodes that reach the device; empty: all.
	Executors []string
	Timeout   time.Duration // of one action; 0: agent.DefaultTimeout
}

func (d *Device) has(a agent.Action) bool { return slices.Contains(d.Actions, a) }

// power tells whether the device switches power: fabric agents have no reboot.
func (d *Device) power() bool { return d.has(agent.Off) && d.has(agent.On) && d.has(agent.Reboot) }

// Use is a device in a method of a node.
type Use struct {
	Device string
	Plug   string            // how the device calls the node; empty: by its name
	Params map[string]string // added to the device's, and stronger
	// Action, where it was configured, is run as it stands: whoever writes off,
	// off, on, on means that.
	Action agent.Action
	Delay  time.Duration
}

// Method is a way to fence a node. Kind Agent has uses; the built-in kinds
// (fencing.Target and others) have none.
type Method struct {
	Name string
	Kind fencing.Method
	Uses []Use
}

// Want is what is to become of the node.
type Want string

// Reboot brings the node back by itself; Off leaves it to an operator.
const (
	Reboot Want = "reboot"
	Off    Want = "off"
)

// Step is one action to be run.
type Step struct {
	Device  string
	Agent   string
	Action  agent.Action
	Plug    string
	Params  map[string]string
	Delay   time.Duration
	Timeout time.Duration
	// Required: without its success the method has failed. Steps that only bring
	// power back are not.
	Required  bool
	Executors []string // the device's
}

// Request is the step as the agent runner takes it.
func (s Step) Request(victim string) agent.Request {
	return agent.Request{Agent: s.Agent, Action: s.Action, Target: victim, Plug: s.Plug, Params: maps.Clone(s.Params), Delay: s.Delay, Timeout: s.Timeout}
}

// String is one line: "off pdu1:3".
func (s Step) String() string {
	t := string(s.Action) + " " + s.Device
	if s.Plug != "" {
		t += ":" + s.Plug
	}
	if !s.Required {
		t += " (if possible)"
	}
	return t
}

// Plan is everything that may be tried to fence one node.
type Plan struct {
	Victim  string
	Methods []Planned
}

// Planned is a method with its steps. Steps is empty for built-in kinds.
type Planned struct {
	Name  string
	Kind  fencing.Method
	Steps []Step
}

// ErrConfig is a method that cannot fence.
var ErrConfig = errors.New("bad fence method")

// New expands the methods of a node. Every method must be able to prove
// something: one that never switches the node off is an error here, and not in the
// night in which it is needed.
func New(victim string, methods []Method, devices []Device, want Want) (Plan, error) {
	byName := map[string]*Device{}
	for i := range devices {
		d := &devices[i]
		if byName[d.Name] != nil {
			return Plan{}, fmt.Errorf("%w: device %s is there twice", ErrConfig, d.Name)
		}
		byName[d.Name] = d
	}
	p := Plan{Victim: victim}
	for i, m := range methods {
		name := m.Name
		if name == "" {
			name = fmt.Sprint(i + 1)
		}
		if m.Kind != fencing.Agent {
			if len(m.Uses) > 0 {
				return Plan{}, fmt.Errorf("%w %s of %s: %s takes no devices", ErrConfig, name, victim, m.Kind)
			}
			p.Methods = append(p.Methods, Planned{Name: name, Kind: m.Kind})
			continue
		}
		steps, err := expand(m.Uses, byName, want)
		if err != nil {
			return Plan{}, fmt.Errorf("%w %s of %s: %w", ErrConfig, name, victim, err)
		}
		p.Methods = append(p.Methods, Planned{Name: name, Kind: m.Kind, Steps: steps})
	}
	return p, nil
}

// expand turns the devices of one method into steps.
func expand(uses []Use, devices map[string]*Device, want Want) ([]Step, error) {
	if len(uses) == 0 {
		return nil, errors.New("it has no device")
	}
	supplies, seen := 0, map[string]bool{}
	for _, u := range uses {
		d := devices[u.Device]
		if d == nil {
			return nil, fmt.Errorf("no device is called %s", u.Device)
		}
		id := u.Device + "\x00" + u.Plug + "\x00" + string(u.Action)
		if seen[id] {
			return nil, fmt.Errorf("device %s is there twice with the same plug and action", u.Device)
		}
		seen[id] = true
		if u.Action != "" && u.Action != agent.Off && u.Action != agent.On && u.Action != agent.Reboot {
			return nil, fmt.Errorf("action %s of device %s does not fence", u.Action, u.Device)
		}
		if u.Action != "" && !d.has(u.Action) {
			return nil, fmt.Errorf("%s, the agent of device %s, has no action %s", d.Agent, u.Device, u.Action)
		}
		if u.Action == "" && d.power() {
			supplies++
		}
	}
	var first, last []Step
	stops := false
	for _, u := range uses {
		d := devices[u.Device]
		s := Step{Device: d.Name, Agent: d.Agent, Plug: u.Plug, Params: map[string]string{}, Delay: u.Delay, Timeout: d.Timeout, Required: true, Executors: slices.Clone(d.Executors)}
		maps.Copy(s.Params, d.Params)
		maps.Copy(s.Params, u.Params)
		switch {
		case u.Action != "":
			s.Action = u.Action
			// "on" after the node was stopped only brings it back.
			s.Required = u.Action != agent.On || !stops
		case want == Reboot && d.power() && supplies > 1:
			s.Action = agent.Off
			on := s
			on.Action, on.Required, on.Delay, on.Params = agent.On, false, 0, maps.Clone(s.Params)
			last = append(last, on)
		case want == Reboot && d.has(agent.Reboot):
			s.Action = agent.Reboot
		case d.has(agent.Off):
			s.Action = agent.Off
		default:
			return nil, fmt.Errorf("%s, the agent of device %s, has no action off", d.Agent, d.Name)
		}
		stops = stops || s.Action != agent.On
		first = append(first, s)
	}
	if !stops {
		return nil, errors.New("no step switches the node off")
	}
	return append(first, last...), nil
}

// Outcome of the steps of a method, in order; steps that were not run are absent.
// The method has succeeded when every required step has, and has failed for good
// when one of them failed.
func (m Planned) Outcome(ok []bool) (done, succeeded bool) {
	for i, s := range m.Steps {
		if !s.Required {
			continue
		}
		if i >= len(ok) {
			return false, false
		}
		if !ok[i] {
			return true, false
		}
	}
	return true, true
}

// Fenced tells whether the steps run so far prove that the node is stopped,
// although steps that bring power back may follow.
func (m Planned) Fenced(ok []bool) bool { _, s := m.Outcome(ok); return s && len(m.Steps) > 0 }

// Position is how far the fencing of a node has come. The zero value is the
// beginning.
type Position struct {
	Round  int // times that all methods failed
	Method int // index
	Try    int // of this method in this round
}

// Pauses between rounds: short, because the device may only have been busy, and
// longer from then on, because whatever is broken is mended by people.
const (
	FirstPause = 3 * time.Second
	LastPause  = 60 * time.Second
)

// automatic tells whether a method is run by us. Only an operator ends a manual one.
func (m Planned) automatic() bool { return m.Kind != fencing.Manual }

// Automatic tells whether there is anything to try without an operator.
func (p Plan) Automatic() bool { return slices.ContainsFunc(p.Methods, Planned.automatic) }

// Start is the first position. Without an automatic method ok is false: the fence
// waits for an operator.
func (p Plan) Start() (pos Position, ok bool) {
	for pos.Method < len(p.Methods) && !p.Methods[pos.Method].automatic() {
		pos.Method++
	}
	return pos, pos.Method < len(p.Methods)
}

// Failed is the position after a failed try, and the pause before it. Executors
// is how many nodes could run the method: with more than one it is tried on a
// second node before the next method.
func (p Plan) Failed(pos Position, executors int) (Position, time.Duration) {
	if pos.Try == 0 && executors > 1 && len(p.Methods[pos.Method].Steps) > 0 {
		pos.Try++
		return pos, 0
	}
	pos.Try = 0
	for pos.Method++; pos.Method < len(p.Methods); pos.Method++ {
		if p.Methods[pos.Method].automatic() {
			return pos, 0
		}
	}
	round := pos.Round + 1
	pos, _ = p.Start()
	pos.Round = round
	pause := LastPause
	if round <= 5 {
		pause = min(FirstPause<<(round-1), LastPause)
	}
	return pos, pause
}

// Describe is a line for status: "method power (2 of 3), on another node, round 4".
func (p Plan) Describe(pos Position) string {
	if pos.Method >= len(p.Methods) {
		return "no automatic method: waits for an operator"
	}
	s := fmt.Sprintf("method %s (%d of %d)", p.Methods[pos.Method].Name, pos.Method+1, len(p.Methods))
	if pos.Try > 0 {
		s += ", on another node"
	}
	if pos.Round > 0 {
		s += fmt.Sprintf(", round %d", pos.Round+1)
	}
	return s
}

// Candidate is a node that may run steps.
type Candidate struct {
	Node   string
	Leader bool
}

// ErrNoExecutor is that no node may run a method.
var ErrNoExecutor = errors.New("no node can run the fence method")

// Executors lists the nodes that may run all steps of a method, the best first:
// never the victim; only those from which all its devices are reached; the leader
// first, because it needs no message, and then by name.
func (m Planned) Executors(victim string, members []Candidate) []string {
	var l []Candidate
	for _, c := range members {
		if c.Node == victim || c.Node == "" {
			continue
		}
		reaches := true
		for _, s := range m.Steps {
			reaches = reaches && (len(s.Executors) == 0 || slices.Contains(s.Executors, c.Node))
		}
		if reaches {
			l = append(l, c)
		}
	}
	slices.SortFunc(l, func(a, b Candidate) int {
		if a.Leader != b.Leader {
			if a.Leader {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Node, b.Node)
	})
	out := make([]string, 0, len(l))
	for _, c := range l {
		out = append(out, c.Node)
	}
	return out
}

// Executor chooses the node for a try: each failure moves on to the next node,
// also from round to round, so that a node that cannot reach the device does not
// try for ever.
func (p Plan) Executor(pos Position, members []Candidate) (string, error) {
	l := p.Methods[pos.Method].Executors(p.Victim, members)
	if len(l) == 0 {
		return "", fmt.Errorf("fence %s: %s: %w", p.Victim, p.Describe(pos), ErrNoExecutor)
	}
	// Without the remainder of a second try each round begins two nodes further.
	return l[(2*pos.Round+pos.Try)%len(l)], nil
}
