// Package settings is sub-machine 8: cluster-wide settings by key, each with a
// version for compare-and-set, and the cluster format in force. It is pure.
package settings

import (
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

// BaseFormat is the first cluster format; a new cluster runs it until Activate.
const BaseFormat uint32 = 1

// Value is one setting.
type Value struct {
	Value   string `json:"value"`
	Version uint64 `json:"version"` // State.Version at the change, so no version comes twice, also after a delete
	Prev    uint64 `json:"prev"`    // the version that the change replaced
	Changed uint64 `json:"changed"` // log index
}

// State is all of machine 8.
type State struct {
	Format  uint32            `json:"format"`  // in force; never decreases
	Version uint64            `json:"version"` // +1 with each change of anything here
	Values  map[string]*Value `json:"values"`
}

// Kind numbers of machine 8. Append only.
const (
	kindSet uint16 = iota + 1
	kindDelete
	kindActivate
)

// Set stores Value under Key if the key's version is Version (0: there is no
// such key). A repetition of the last change is no change. Value: Value.
type Set struct {
	Key     string `json:"key"`
	Value   string `json:"value"`
	Version uint64 `json:"version"`
}

// Delete removes a key at that version. Value: nil.
type Delete struct {
	Key     string `json:"key"`
	Version uint64 `json:"version"`
}

// Activate raises the cluster format in force. It is refused while a member
// reports a lower one. Value: uint32, the format in force.
type Activate struct {
	Format uint32 `json:"format"`
}

// FSMKind implements fsm.Command.
func (Set) FSMKind() (fsm.ID, uint16, uint32)      { return fsm.Config, kindSet, 1 }
func (Delete) FSMKind() (fsm.ID, uint16, uint32)   { return fsm.Config, kindDelete, 1 }
func (Activate) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Config, kindActivate, 1 }

// Validate implements fsm.Validator.
func (c *Set) Validate() error {
	if c.Key == "" || len(c.Key) > 255 {
		return fmt.Errorf("set: key %q: 1 to 255 bytes are needed", c.Key)
	}
	return nil
}

// Members is what this machine needs of machine 1.
type Members interface {
	LowestFormat() (node string, format uint32)
}

// Machine is sub-machine 8. It has no lock of its own: fsm.FSM holds one.
type Machine struct {
	s       *State
	members Members
}

func newState() *State { return &State{Format: BaseFormat, Values: map[string]*Value{}} }

// New makes the machine with empty state.
func New(m Members) *Machine { return &Machine{s: newState(), members: m} }

// ID implements fsm.Machine.
func (*Machine) ID() fsm.ID { return fsm.Config }

// Version implements fsm.Machine.
func (*Machine) Version() uint32 { return 1 }

// Kinds implements fsm.Machine.
func (*Machine) Kinds() []fsm.Kind {
	return []fsm.Kind{
		{Number: kindSet, Name: "set", Since: 1, MaxVersion: 1, New: func() any { return new(Set) }},
		{Number: kindDelete, Name: "delete", Since: 1, MaxVersion: 1, New: func() any { return new(Delete) }},
		{Number: kindActivate, Name: "activate", Since: 1, MaxVersion: 1, New: func() any { return new(Activate) }},
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
		if s.Values == nil {
			s.Values = n.Values
		}
		n = s
	}
	return func() { m.s = n }, nil
}

// Format is the cluster format in force; call it inside fsm.FSM.View.
func (m *Machine) Format() uint32 { return m.s.Format }

// Get is one setting; call it inside fsm.FSM.View.
func (m *Machine) Get(key string) (Value, bool) {
	v := m.s.Values[key]
	if v == nil {
		return Value{}, false
	}
	return *v, true
}

// State is a deep copy; call it inside fsm.FSM.View.
func (m *Machine) State() *State {
	c := *m.s
	c.Values = make(map[string]*Value, len(m.s.Values))
	for k, v := range m.s.Values {
		x := *v
		c.Values[k] = &x
	}
	return &c
}

// Keys is every key, sorted.
func (s *State) Keys() []string { return slices.Sorted(maps.Keys(s.Values)) }

// Apply implements fsm.Machine.
func (m *Machine) Apply(index uint64, cmd any) (any, error) {
	switch c := cmd.(type) {
	case *Set:
		v := m.s.Values[c.Key]
		have := uint64(0)
		if v != nil {
			have = v.Version
			if v.Prev == c.Version && v.Value == c.Value {
				return *v, nil
			}
		}
		if have != c.Version {
			return nil, conflict("set", c.Key, have, c.Version)
		}
		m.s.Version++
		n := &Value{Value: c.Value, Version: m.s.Version, Prev: have, Changed: index}
		m.s.Values[c.Key] = n
		return *n, nil
	case *Delete:
		v := m.s.Values[c.Key]
		if v == nil {
			return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: "delete setting", Object: c.Key, Why: "no such setting"}
		}
		if v.Version != c.Version {
			return nil, conflict("delete", c.Key, v.Version, c.Version)
		}
		delete(m.s.Values, c.Key)
		m.s.Version++
		return nil, nil
	case *Activate:
		if c.Format <= m.s.Format {
			return m.s.Format, nil
		}
		if node, low := m.members.LowestFormat(); low < c.Format {
			return nil, &fsm.Error{
				Kind: fsm.KindRefused, Op: "activate format", Object: fmt.Sprint(c.Format),
				Why:  fmt.Sprintf("node %s knows formats up to %d", node, low),
				Next: "upgrade clusterd on it first",
			}
		}
		m.s.Format = c.Format
		m.s.Version++
		return c.Format, nil
	}
	return nil, fmt.Errorf("settings: command %T has no handler", cmd)
}

func conflict(op, key string, have, want uint64) error {
	return &fsm.Error{
		Kind: fsm.KindConflict, Op: op + " setting", Object: key,
		Why:  fmt.Sprintf("version is %d, not %d: somebody else changed it", have, want),
		Next: "read it again with clusteradm config get " + key,
	}
}
