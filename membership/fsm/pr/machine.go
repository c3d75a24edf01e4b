package pr

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// Kind numbers of machine 4. Append only.
const (
	kindChange uint16 = iota + 1
	kindBarrier
)

// Change runs a request on a volume's reservations: PERSISTENT RESERVE OUT,
// RESERVE, RELEASE, the loss of a nexus, a reset, the purge of a fenced initiator.
// What SCSI refuses is no refusal of the command: it is the Outcome in its value.
//
// It counts only from the volume's primary in the volume's epoch; else
// fsm.ErrConflict, and nothing was changed by it. Repeating it with the same
// (Worker, Seq) gives the same value, also in a later epoch; a Seq below the last
// decided one of the worker is fsm.ErrConflict: it was given up. Value: Done.
type Change struct {
	Node    string     `json:"node"`
	Worker  string     `json:"worker"`
	Seq     uint64     `json:"seq"`
	Volume  string     `json:"volume"` // uuid
	Epoch   uint64     `json:"epoch"`
	Request pr.Request `json:"request"`
	// LegacySeq of a nexus loss is the Volume.LegacySeq that it ends; with another
	// one there it is no change.
	LegacySeq uint64 `json:"legacy_seq,omitempty"`
}

// Barrier changes nothing, but makes every earlier request of the worker for this
// volume void that was not decided yet. Value: Done.
type Barrier struct {
	Node   string `json:"node"`
	Worker string `json:"worker"`
	Seq    uint64 `json:"seq"`
	Volume string `json:"volume"`
	Epoch  uint64 `json:"epoch"`
}

// FSMKind implements fsm.Command.
func (Change) FSMKind() (fsm.ID, uint16, uint32)  { return fsm.PR, kindChange, 1 }
func (Barrier) FSMKind() (fsm.ID, uint16, uint32) { return fsm.PR, kindBarrier, 1 }

// Validate implements fsm.Validator.
func (c *Change) Validate() error {
	if err := (&Barrier{c.Node, c.Worker, c.Seq, c.Volume, c.Epoch}).Validate(); err != nil {
		return err
	}
	return c.Request.Validate()
}

// Validate implements fsm.Validator.
func (c *Barrier) Validate() error {
	if c.Node == "" || c.Worker == "" || c.Volume == "" || c.Seq == 0 || c.Epoch == 0 {
		return errors.New("change reservations: node, worker, seq, volume and epoch are needed")
	}
	return nil
}

// Volumes is what this machine needs of machine 3, inside the same Apply.
type Volumes interface {
	// Serving is the node and the epoch that may change a volume's reservations.
	Serving(uuid string) (primary string, epoch uint64, ok bool)
}

// Machine is sub-machine 4. It has no lock of its own: fsm.FSM holds one.
type Machine struct {
	s       *State
	volumes Volumes
}

// New makes the machine with empty state; Bind comes before the first Apply.
func New() *Machine { return &Machine{s: newState()} }

// Bind gives the machine its neighbour: the two know each other.
func (m *Machine) Bind(v Volumes) { m.volumes = v }

// State is a deep copy; call it inside fsm.FSM.View.
func (m *Machine) State() *State { return m.s.Clone() }

// Volume is a copy of one volume's record; call it inside fsm.FSM.View.
func (m *Machine) Volume(uuid string) (Volume, bool) {
	v := m.s.Volumes[uuid]
	if v == nil {
		return Volume{}, false
	}
	return *v.Clone(), true
}

// ID implements fsm.Machine.
func (*Machine) ID() fsm.ID { return fsm.PR }

// Version implements fsm.Machine.
func (*Machine) Version() uint32 { return 1 }

// Kinds implements fsm.Machine.
func (*Machine) Kinds() []fsm.Kind {
	return []fsm.Kind{
		{Number: kindChange, Name: "pr-change", Since: 1, MaxVersion: 1, New: func() any { return new(Change) }},
		{Number: kindBarrier, Name: "pr-barrier", Since: 1, MaxVersion: 1, New: func() any { return new(Barrier) }},
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
		if s.Volumes == nil {
			return nil, errors.New("volumes is missing")
		}
		for id, v := range s.Volumes {
			if v == nil {
				return nil, fmt.Errorf("reservations of volume %s are null", id)
			}
		}
		n = s
	}
	return func() { m.s = n }, nil
}

// Apply implements fsm.Machine.
func (m *Machine) Apply(index uint64, cmd any) (any, error) {
	switch c := cmd.(type) {
	case *Change:
		return m.decide(index, &Barrier{c.Node, c.Worker, c.Seq, c.Volume, c.Epoch}, c)
	case *Barrier:
		return m.decide(index, c, nil)
	}
	return nil, fmt.Errorf("pr: command %T has no handler", cmd)
}

func (m *Machine) decide(index uint64, b *Barrier, c *Change) (any, error) {
	const op = "change reservations of volume"
	conflict := func(why string) error {
		return &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: b.Volume, Why: why}
	}
	v := m.s.Volumes[b.Volume]
	if v != nil && v.Last.Worker == b.Worker && b.Seq <= v.Last.Seq {
		if b.Seq == v.Last.Seq {
			return v.Last.clone(), nil
		}
		return nil, conflict(fmt.Sprintf("request %d of worker %s comes after its request %d", b.Seq, b.Worker, v.Last.Seq))
	}
	primary, epoch, ok := m.volumes.Serving(b.Volume)
	switch {
	case !ok:
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: b.Volume, Why: "no such volume", Next: "run clusteradm volume list"}
	case primary != b.Node:
		return nil, conflict("its primary is " + primary + ", not " + b.Node)
	case epoch != b.Epoch:
		return nil, conflict(fmt.Sprintf("its epoch is %d, not %d", epoch, b.Epoch))
	}
	if v == nil {
		v = &Volume{}
		m.s.Volumes[b.Volume] = v
	}
	var res pr.Result
	changed := false
	switch {
	case c == nil:
	case c.Request.Kind == pr.KindNexusLoss && c.LegacySeq != v.LegacySeq: // what it is about has ended
	default:
		res, changed = v.run(index, &c.Request)
	}
	v.Last = Done{Worker: b.Worker, Seq: b.Seq, Index: index, At: v.Seq, Changed: changed, Outcome: outcomeOf(&res)}
	return v.Last.clone(), nil
}

// run applies a request and keeps what it asks for.
func (v *Volume) run(index uint64, q *pr.Request) (pr.Result, bool) {
	before := v.State.Clone()
	res := v.State.Apply(*q)
	if len(v.Registrations) == 0 {
		v.Registrations = nil // one form of nothing, also after a snapshot
	}
	if v.Legacy == nil {
		v.LegacySeq = 0
	}
	reserved := q.Kind == pr.KindReserve && res.Status == scsi.StatusGood
	if v.State.Equal(before) && !reserved && len(res.Notify)+len(res.Abort) == 0 {
		return res, false
	}
	v.Seq++
	v.Changed = index
	if reserved {
		v.LegacySeq = v.Seq
	}
	for _, a := range res.Notify {
		v.note(Notice{Nexus: a.Nexus, AllPorts: a.AllPorts, Code: a.Code, At: v.Seq})
	}
	for _, a := range res.Abort {
		v.note(Notice{Nexus: a.Nexus, AllPorts: a.AllPorts, Abort: true, At: v.Seq})
	}
	return res, true
}

func (v *Volume) note(n Notice) {
	v.Notices = slices.DeleteFunc(v.Notices, func(o Notice) bool { return o.same(&n) })
	v.Notices = append(v.Notices, n)
	if over := len(v.Notices) - maxNotices; over > 0 {
		v.Horizon = max(v.Horizon, v.Notices[over-1].At)
		v.Notices = slices.Delete(v.Notices, 0, over)
	}
}

// Purge ends what the initiators of a fenced node hold anywhere; members.Machine
// calls it while Fenced is applied. It tells whether anything was changed.
func (m *Machine) Purge(index uint64, names []string) {
	for _, id := range m.s.IDs() {
		m.s.Volumes[id].run(index, &pr.Request{Kind: pr.KindPurge, Names: names})
	}
}

// VolumeGone forgets a volume; storage.Machine calls it while it removes one.
func (m *Machine) VolumeGone(uuid string) { delete(m.s.Volumes, uuid) }
