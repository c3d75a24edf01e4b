// Package fencing is sub-machine 2: which evicted incarnations are not proved
// harmless yet, which attempts run, and the history of all of it. A fence is
// opened by members.Evict, in the same log entry, and closed by Fenced with
// evidence; nothing is recovered before (facts/cluster.md §8 I1).
// It is pure; package fence and node/ act on it.
package fencing

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

// Method of a fence or of its proof.
type Method string

// The methods. Agent names are "agent:NAME" with the configured device.
const (
	Manual Method = "manual" // an operator typed the word
	Target Method = "target" // every target cut the node off
	Agent  Method = "agent"  // a fence agent returned success
	Rejoin Method = "rejoin" // the node is back with another kernel boot id
	Clean  Method = "clean"  // the node is back with the same kernel, and proved that nothing of its storage is left there (SAFETY §3)
)

// Open is an open fence: one evicted incarnation without Fenced.
type Open struct {
	Node        string    `json:"node"`
	Incarnation uint64    `json:"incarnation"`
	BootID      string    `json:"boot_id"`
	Epoch       uint64    `json:"epoch"` // of the eviction
	Since       time.Time `json:"since"`
	Reason      string    `json:"reason"`
	By          string    `json:"by,omitempty"`
	Attempts    int       `json:"attempts"` // begun so far
	Index       uint64    `json:"index"`    // log index of the eviction
	// Cuts are the acks of targets so far: volume uuid to the node that acked.
	Cuts map[string]string `json:"cuts,omitempty"`
}

func (o *Open) clone() Open {
	c := *o
	c.Cuts = maps.Clone(o.Cuts)
	return c
}

// Attempt is one run of one method that has not ended.
type Attempt struct {
	ID          uint64    `json:"id"`
	Node        string    `json:"node"`
	Incarnation uint64    `json:"incarnation"`
	Epoch       uint64    `json:"epoch"`
	Method      Method    `json:"method"`
	Device      string    `json:"device,omitempty"`
	Executor    string    `json:"executor"`
	Started     time.Time `json:"started"`
	Deadline    time.Time `json:"deadline"`
	Request     string    `json:"request"`
}

// Event is the kind of a history record.
type Event string

// The events.
const (
	EventEvicted Event = "evicted"
	EventStart   Event = "fence-start"
	EventEnd     Event = "fence-end"
	EventFenced  Event = "fenced"
	EventAdmit   Event = "admitted"
)

// Outcome of an attempt.
type Outcome string

// The outcomes. A timeout is a failure, never a success.
const (
	OK        Outcome = "ok"
	Failed    Outcome = "failed"
	TimedOut  Outcome = "timeout"
	Abandoned Outcome = "abandoned" // the executor is gone and the deadline is over
)

// Evidence is why a node counts as harmless.
type Evidence struct {
	Method   Method   `json:"method"`
	Operator string   `json:"operator,omitempty"` // manual: who
	Reason   string   `json:"reason,omitempty"`   // manual: how they made sure
	Attempt  uint64   `json:"attempt,omitempty"`  // agent: which
	BootID   string   `json:"boot_id,omitempty"`  // rejoin: the new kernel's
	Acks     []string `json:"acks,omitempty"`     // target: nodes that acked Cut(epoch)
	Silent   []string `json:"silent,omitempty"`   // target: volumes whose target had to stop by then, on a machine that is not paused (SAFETY §3, c)
	Pending  []string `json:"pending,omitempty"`  // volumes still "cut pending" (SAFETY §3)
	Output   string   `json:"output,omitempty"`   // tail
}

// Record is one line of the history, which only grows.
type Record struct {
	Seq         uint64    `json:"seq"` // from 1, without gaps
	Index       uint64    `json:"index"`
	At          time.Time `json:"at"`
	Event       Event     `json:"event"`
	Node        string    `json:"node"`
	Incarnation uint64    `json:"incarnation"`
	Epoch       uint64    `json:"epoch,omitempty"`
	Attempt     uint64    `json:"attempt,omitempty"`
	Method      Method    `json:"method,omitempty"`
	Executor    string    `json:"executor,omitempty"`
	Outcome     Outcome   `json:"outcome,omitempty"`
	ExitCode    int       `json:"exit_code,omitempty"`
	Text        string    `json:"text,omitempty"` // reason or output tail
	Evidence    *Evidence `json:"evidence,omitempty"`
}

// State is all of machine 2.
type State struct {
	Open     map[string]*Open    `json:"open"`     // by node; an incarnation is admitted only after its predecessor's fence closed
	Attempts map[uint64]*Attempt `json:"attempts"` // running, by id; may outlive their fence
	LastID   uint64              `json:"last_id"`
	History  []Record            `json:"history"`
	Devices  map[string]*Device  `json:"devices,omitempty"` // by name
	Ways     map[string]*Ways    `json:"ways,omitempty"`    // by node
	// Pending are the cuts that closed fences left open, oldest first: what a dead
	// node had in flight on the volume may still land, so nobody recovers on it before
	// its primary acks (SAFETY §3).
	Pending []PendingCut `json:"pending,omitempty"`
}

// PendingCut is a volume on which an evicted node is not cut off yet, although its
// fence is closed.
type PendingCut struct {
	Node   string `json:"node"`
	Epoch  uint64 `json:"epoch"`
	Volume string `json:"volume"` // uuid
}

func newState() *State {
	return &State{Open: map[string]*Open{}, Attempts: map[uint64]*Attempt{}, Devices: map[string]*Device{}, Ways: map[string]*Ways{}}
}

// Kind numbers of machine 2. Append only.
const (
	kindStart uint16 = iota + 1
	kindEnd
	kindFenced
	kindDeviceSet
	kindDeviceDelete
	kindWaysSet
	kindCutAck
)

// FenceStart records that an executor is about to act, before it acts (I8).
// Without an open fence of that node and epoch: fsm.ErrNoOpenFence. Repeating
// it with the same Request gives the same attempt. Value: Attempt.
type FenceStart struct {
	Request  string    `json:"request"`
	Now      time.Time `json:"now"`
	Node     string    `json:"node"`
	Epoch    uint64    `json:"epoch"`
	Method   Method    `json:"method"`
	Device   string    `json:"device,omitempty"`
	Executor string    `json:"executor"` // node name, never the victim
	Deadline time.Time `json:"deadline"`
}

// FenceEnd ends an attempt. Outcome Abandoned is the leader's, for an executor
// that is gone, and only past the deadline. An attempt that has ended already
// is no change. Value: nil.
type FenceEnd struct {
	Now      time.Time `json:"now"`
	Attempt  uint64    `json:"attempt"`
	Outcome  Outcome   `json:"outcome"`
	ExitCode int       `json:"exit_code"`
	Output   string    `json:"output"` // tail, at most MaxOutput bytes
}

// MaxOutput bounds the output tail that goes into the log.
const MaxOutput = 4096

// Fenced closes the open fence of that node and epoch with evidence; the member
// becomes fenced. Without an open fence: fsm.ErrNoOpenFence, but repeating a
// Fenced of the same node and epoch is no change. Value: Record.
type Fenced struct {
	Now      time.Time `json:"now"`
	Node     string    `json:"node"`
	Epoch    uint64    `json:"epoch"`
	Evidence Evidence  `json:"evidence"`
}

// FSMKind implements fsm.Command.
func (FenceStart) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Fence, kindStart, 1 }
func (FenceEnd) FSMKind() (fsm.ID, uint16, uint32)   { return fsm.Fence, kindEnd, 1 }
func (Fenced) FSMKind() (fsm.ID, uint16, uint32)     { return fsm.Fence, kindFenced, 1 }

// Validate implements fsm.Validator.
func (c *FenceStart) Validate() error {
	switch {
	case c.Request == "" || c.Method == "" || c.Executor == "":
		return fmt.Errorf("start fence of %s: request, method and executor are needed", c.Node)
	case c.Executor == c.Node:
		return fmt.Errorf("start fence of %s: the victim cannot be the executor", c.Node)
	case c.Now.IsZero() || !c.Deadline.After(c.Now):
		return fmt.Errorf("start fence of %s: the deadline is not after the start", c.Node)
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *FenceEnd) Validate() error {
	switch c.Outcome {
	case OK, Failed, TimedOut, Abandoned:
	default:
		return fmt.Errorf("end fence attempt %d: outcome %q", c.Attempt, c.Outcome)
	}
	if c.Now.IsZero() {
		return fmt.Errorf("end fence attempt %d: time is missing", c.Attempt)
	}
	if len(c.Output) > MaxOutput {
		return fmt.Errorf("end fence attempt %d: output of %d bytes, limit %d", c.Attempt, len(c.Output), MaxOutput)
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *Fenced) Validate() error {
	e := &c.Evidence
	if c.Now.IsZero() || c.Epoch == 0 {
		return fmt.Errorf("fenced %s: time and epoch are needed", c.Node)
	}
	if len(e.Output) > MaxOutput {
		return fmt.Errorf("fenced %s: output of %d bytes, limit %d", c.Node, len(e.Output), MaxOutput)
	}
	switch e.Method {
	case Manual:
		if e.Operator == "" || e.Reason == "" {
			return fmt.Errorf("fenced %s: manual evidence needs operator and reason", c.Node)
		}
	case Target:
		if len(e.Acks) == 0 && len(e.Silent) == 0 {
			return fmt.Errorf("fenced %s: target evidence needs acks, or volumes that are not served any more", c.Node)
		}
	case Agent:
		if e.Attempt == 0 {
			return fmt.Errorf("fenced %s: agent evidence needs its attempt", c.Node)
		}
	case Rejoin:
		if e.BootID == "" {
			return fmt.Errorf("fenced %s: rejoin evidence needs the new boot id", c.Node)
		}
	case Clean:
		if e.BootID == "" || e.Output == "" {
			return fmt.Errorf("fenced %s: clean evidence needs the boot id and what was looked at", c.Node)
		}
	default:
		return fmt.Errorf("fenced %s: method %q", c.Node, e.Method)
	}
	return nil
}

// Members is what this machine needs of machine 1, inside the same Apply.
type Members interface {
	MarkFenced(index uint64, node string, incarnation uint64)
}

// Machine is sub-machine 2. It has no lock of its own: fsm.FSM holds one.
type Machine struct {
	s       *State
	members Members
}

// New makes the machine with empty state; Bind comes before the first Apply.
func New() *Machine { return &Machine{s: newState()} }

// Bind gives the machine its neighbour: the two know each other.
func (m *Machine) Bind(n Members) { m.members = n }

// ID implements fsm.Machine.
func (*Machine) ID() fsm.ID { return fsm.Fence }

// Version implements fsm.Machine.
func (*Machine) Version() uint32 { return 2 }

// Kinds implements fsm.Machine.
func (*Machine) Kinds() []fsm.Kind {
	return []fsm.Kind{
		{Number: kindStart, Name: "fence-start", Since: 1, MaxVersion: 1, New: func() any { return new(FenceStart) }},
		{Number: kindEnd, Name: "fence-end", Since: 1, MaxVersion: 1, New: func() any { return new(FenceEnd) }},
		{Number: kindFenced, Name: "fenced", Since: 1, MaxVersion: 1, New: func() any { return new(Fenced) }, Touches: []fsm.ID{fsm.Members, fsm.PR}},
		{Number: kindDeviceSet, Name: "fence-device-set", Since: 1, MaxVersion: 1, New: func() any { return new(DeviceSet) }},
		{Number: kindDeviceDelete, Name: "fence-device-delete", Since: 1, MaxVersion: 1, New: func() any { return new(DeviceDelete) }},
		{Number: kindWaysSet, Name: "fence-ways-set", Since: 1, MaxVersion: 1, New: func() any { return new(WaysSet) }},
		{Number: kindCutAck, Name: "cut-ack", Since: 1, MaxVersion: 1, New: func() any { return new(CutAck) }},
	}
}

// Snapshot implements fsm.Machine.
func (m *Machine) Snapshot(w io.Writer) error { return fsm.WriteJSON(w, m.s) }

// Restore implements fsm.Machine.
func (m *Machine) Restore(version uint32, r io.Reader) (func(), error) {
	n := newState()
	if version > 0 {
		s, err := fsm.ReadJSON[State](r)
		if err != nil {
			return nil, err
		}
		if s.Open == nil {
			s.Open = n.Open
		}
		if s.Attempts == nil {
			s.Attempts = n.Attempts
		}
		if s.Devices == nil {
			s.Devices = n.Devices
		}
		if s.Ways == nil {
			s.Ways = n.Ways
		}
		n = s
	}
	return func() { m.s = n }, nil
}

// OpenFences is the open fences by node name; call it inside fsm.FSM.View.
func (m *Machine) OpenFences() []Open {
	out := make([]Open, 0, len(m.s.Open))
	for _, k := range slices.Sorted(maps.Keys(m.s.Open)) {
		out = append(out, m.s.Open[k].clone())
	}
	return out
}

// PendingCuts lists what closed fences left open; call it inside fsm.FSM.View.
func (m *Machine) PendingCuts() []PendingCut { return slices.Clone(m.s.Pending) }

// Running is the attempts that have not ended, by id; call it inside
// fsm.FSM.View.
func (m *Machine) Running() []Attempt {
	out := make([]Attempt, 0, len(m.s.Attempts))
	for _, k := range slices.Sorted(maps.Keys(m.s.Attempts)) {
		out = append(out, *m.s.Attempts[k])
	}
	return out
}

// History is up to n records with Seq > after, oldest first, all of them for
// n ≤ 0, and whether more follow. Call it inside fsm.FSM.View.
func (m *Machine) History(after uint64, n int) (page []Record, more bool) {
	total := uint64(len(m.s.History))
	if after >= total {
		return nil, false
	}
	end := total
	if n > 0 && uint64(n) < total-after {
		end = after + uint64(n)
	}
	for _, r := range m.s.History[after:end] {
		page = append(page, r.clone())
	}
	return page, end < total
}

func (r Record) clone() Record {
	if r.Evidence != nil {
		e := *r.Evidence
		e.Acks, e.Silent, e.Pending = slices.Clone(e.Acks), slices.Clone(e.Silent), slices.Clone(e.Pending)
		r.Evidence = &e
	}
	return r
}

// Pending tells members.Machine what keeps node out.
func (m *Machine) Pending(node string) (open bool, attempts int) {
	for _, a := range m.s.Attempts {
		if a.Node == node {
			attempts++
		}
	}
	return m.s.Open[node] != nil, attempts
}

// Open opens a fence; members.Machine calls it while it applies Evict.
func (m *Machine) Open(index uint64, v members.Victim) {
	m.s.Open[v.Node] = &Open{
		Node: v.Node, Incarnation: v.Incarnation, BootID: v.BootID, Epoch: v.Epoch,
		Since: v.At, Reason: v.Reason, By: v.By, Index: index,
	}
	m.add(Record{Index: index, At: v.At, Event: EventEvicted, Node: v.Node, Incarnation: v.Incarnation, Epoch: v.Epoch, Executor: v.By, Text: v.Reason})
}

// Admitted writes the history line of an Admit.
func (m *Machine) Admitted(index uint64, node string, inc uint64, at time.Time, why string) {
	m.add(Record{Index: index, At: at, Event: EventAdmit, Node: node, Incarnation: inc, Text: why})
}

func (m *Machine) add(r Record) Record {
	r.Seq = uint64(len(m.s.History)) + 1
	m.s.History = append(m.s.History, r)
	return r.clone()
}

func noOpenFence(op, node string) error {
	return &fsm.Error{
		Kind: fsm.KindNoOpenFence, Op: op, Object: node, Why: "no fence of this node is open",
		Next: "run clusteradm fence list to see open fences, or clusteradm status",
	}
}

// Apply implements fsm.Machine.
func (m *Machine) Apply(index uint64, cmd any) (any, error) {
	switch c := cmd.(type) {
	case *FenceStart:
		return m.start(index, c)
	case *FenceEnd:
		return m.end(index, c)
	case *Fenced:
		return m.fenced(index, c)
	case *DeviceSet:
		return m.deviceSet(index, c)
	case *DeviceDelete:
		return m.deviceDelete(c)
	case *WaysSet:
		return m.waysSet(index, c)
	case *CutAck:
		return m.cutAck(c)
	}
	return nil, fmt.Errorf("fencing: command %T has no handler", cmd)
}

func (m *Machine) start(index uint64, c *FenceStart) (any, error) {
	for _, a := range m.Running() {
		if a.Request == c.Request && a.Node == c.Node {
			return a, nil
		}
	}
	o := m.s.Open[c.Node]
	if o == nil {
		return nil, noOpenFence("start fence", c.Node)
	}
	if o.Epoch != c.Epoch {
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: "start fence", Object: c.Node, Why: fmt.Sprintf("the open fence is of epoch %d, not %d", o.Epoch, c.Epoch)}
	}
	m.s.LastID++
	o.Attempts++
	a := &Attempt{
		ID: m.s.LastID, Node: c.Node, Incarnation: o.Incarnation, Epoch: c.Epoch, Method: c.Method, Device: c.Device,
		Executor: c.Executor, Started: c.Now.UTC(), Deadline: c.Deadline.UTC(), Request: c.Request,
	}
	m.s.Attempts[a.ID] = a
	m.add(Record{Index: index, At: a.Started, Event: EventStart, Node: a.Node, Incarnation: a.Incarnation, Epoch: a.Epoch, Attempt: a.ID, Method: a.Method, Executor: a.Executor, Text: a.Device})
	return *a, nil
}

func (m *Machine) end(index uint64, c *FenceEnd) (any, error) {
	a := m.s.Attempts[c.Attempt]
	if a == nil {
		if c.Attempt > 0 && c.Attempt <= m.s.LastID {
			return nil, nil // ended already
		}
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: "end fence attempt", Object: fmt.Sprint(c.Attempt), Why: "no such attempt"}
	}
	if c.Outcome == Abandoned && c.Now.Before(a.Deadline) {
		return nil, &fsm.Error{
			Kind: fsm.KindRefused, Op: "abandon fence attempt", Object: fmt.Sprint(a.ID),
			Why: fmt.Sprintf("it may still act on %s until %s", a.Node, a.Deadline.Format(time.RFC3339Nano)),
		}
	}
	delete(m.s.Attempts, a.ID)
	m.add(Record{
		Index: index, At: c.Now.UTC(), Event: EventEnd, Node: a.Node, Incarnation: a.Incarnation, Epoch: a.Epoch, Attempt: a.ID,
		Method: a.Method, Executor: a.Executor, Outcome: c.Outcome, ExitCode: c.ExitCode, Text: c.Output,
	})
	return nil, nil
}

func (m *Machine) fenced(index uint64, c *Fenced) (any, error) {
	o := m.s.Open[c.Node]
	if o == nil || o.Epoch != c.Epoch {
		for _, r := range slices.Backward(m.s.History) {
			if r.Event == EventFenced && r.Node == c.Node && r.Epoch == c.Epoch {
				return r.clone(), nil // repeated
			}
		}
	}
	if o == nil {
		return nil, noOpenFence("record fence", c.Node)
	}
	if o.Epoch != c.Epoch {
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: "record fence", Object: c.Node, Why: fmt.Sprintf("the open fence is of epoch %d, not %d", o.Epoch, c.Epoch)}
	}
	switch e := &c.Evidence; e.Method {
	case Rejoin:
		if e.BootID == o.BootID {
			return nil, &fsm.Error{Kind: fsm.KindRefused, Op: "record fence", Object: c.Node, Why: "it is back with the kernel that was evicted (boot id " + o.BootID + ")", Next: "reboot it, or run clusteradm fence_manual " + c.Node + " after you have reset it"}
		}
	case Clean:
		if e.BootID != o.BootID {
			return nil, &fsm.Error{Kind: fsm.KindConflict, Op: "record fence", Object: c.Node, Why: "the proof is of kernel boot " + e.BootID + ", evicted was " + o.BootID}
		}
	case Agent:
		if !m.succeeded(c.Node, c.Epoch, e.Attempt) {
			return nil, &fsm.Error{Kind: fsm.KindRefused, Op: "record fence", Object: c.Node, Why: fmt.Sprintf("attempt %d did not end with success", e.Attempt)}
		}
	}
	delete(m.s.Open, c.Node)
	for _, v := range c.Evidence.Pending {
		m.s.Pending = append(m.s.Pending, PendingCut{Node: c.Node, Epoch: c.Epoch, Volume: v})
	}
	m.members.MarkFenced(index, c.Node, o.Incarnation)
	ev := c.Evidence
	ev.Acks, ev.Silent, ev.Pending = slices.Clone(ev.Acks), slices.Clone(ev.Silent), slices.Clone(ev.Pending)
	return m.add(Record{
		Index: index, At: c.Now.UTC(), Event: EventFenced, Node: c.Node, Incarnation: o.Incarnation, Epoch: c.Epoch,
		Method: ev.Method, Attempt: ev.Attempt, Text: ev.Reason, Evidence: &ev,
	}), nil
}

func (m *Machine) succeeded(node string, epoch, attempt uint64) bool {
	for _, r := range slices.Backward(m.s.History) {
		if r.Event == EventEnd && r.Attempt == attempt {
			return r.Node == node && r.Epoch == epoch && r.Outcome == OK
		}
	}
	return false
}
