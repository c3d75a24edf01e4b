package storage

import (
	"fmt"
	"io"
	"slices"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

// Members is what this machine needs of machine 1.
type Members interface {
	IsStorage(node string) bool // active member with the storage role
}

// Reservations is what this machine needs of machine 4.
type Reservations interface {
	VolumeGone(uuid string) // the volume was removed: what was reserved on it goes too
}

// Machine is sub-machine 3. It has no lock of its own: fsm.FSM holds one.
type Machine struct {
	s        *State
	members  Members
	reserved Reservations
}

// New makes the machine with empty state; Bind comes before the first Apply.
func New(m Members) *Machine { return &Machine{s: newState(), members: m} }

// Bind gives the machine the neighbour that needs it in turn.
func (m *Machine) Bind(r Reservations) { m.reserved = r }

// Serving is the primary of a volume and its epoch (pr.Volumes).
func (m *Machine) Serving(uuid string) (primary string, epoch uint64, ok bool) {
	v := m.s.Volumes[uuid]
	if v == nil {
		return "", 0, false
	}
	return v.Config.Primary, v.Config.Epoch, true
}

// State is a deep copy; call it inside fsm.FSM.View.
func (m *Machine) State() *State { return m.s.Clone() }

// Volume is a copy of one volume by uuid; call it inside fsm.FSM.View.
func (m *Machine) Volume(uuid string) (Volume, bool) {
	v := m.s.Volumes[uuid]
	if v == nil {
		return Volume{}, false
	}
	return v.Clone(), true
}

// NodeUsers names the volumes with a copy on node (members.Users).
func (m *Machine) NodeUsers(node string) []string {
	var out []string
	for _, v := range m.s.Volumes {
		if slices.Contains(v.Config.Members(), node) {
			out = append(out, v.Name)
		}
	}
	slices.Sort(out)
	return out
}

// ID implements fsm.Machine.
func (*Machine) ID() fsm.ID { return fsm.Storage }

// Version implements fsm.Machine.
func (*Machine) Version() uint32 { return 2 }

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
		if s.Volumes == nil || s.Targets == nil || s.Gone == nil {
			return nil, fmt.Errorf("volumes, targets or gone is missing")
		}
		n = s
	}
	return func() { m.s = n }, nil
}

// Apply implements fsm.Machine.
func (m *Machine) Apply(index uint64, cmd any) (any, error) {
	switch c := cmd.(type) {
	case *VolumeCreate:
		return m.volumeCreate(index, c)
	case *VolumeReady:
		return m.volumeReady(index, c)
	case *VolumeCAS:
		return m.volumeCAS(index, c)
	case *VolumeRemove:
		return m.volumeRemove(index, c)
	case *VolumeRemoved:
		return m.volumeRemoved(index, c)
	case *TargetCreate:
		return m.targetCreate(index, c)
	case *TargetDelete:
		return m.targetDelete(c)
	case *LunCreate:
		return m.lunCreate(c)
	case *LunDelete:
		return m.lunDelete(c)
	case *LunCreateVolume:
		return m.lunCreateVolume(index, c)
	case *ACLSet:
		return m.acl(c.Target, func(*ACL) (ACL, error) { return c.ACL, nil })
	case *ACLAdd:
		return m.acl(c.Target, func(a *ACL) (ACL, error) {
			return CanonicalACL(ACL{
				Open:       a.Open || c.ACL.Open,
				Initiators: slices.Concat(a.Initiators, c.ACL.Initiators),
				CIDRs:      slices.Concat(a.CIDRs, c.ACL.CIDRs),
			})
		})
	case *ACLRemove:
		return m.acl(c.Target, func(a *ACL) (ACL, error) { return aclWithout(c.Target, *a, c.ACL) })
	case *AccountCreate:
		return m.accountCreate(index, c)
	case *AccountDelete:
		return m.accountDelete(c)
	case *AccountBind:
		return m.accountBind(c)
	case *AccountUnbind:
		return m.accountUnbind(c)
	case *TargetSet:
		return m.targetSet(c)
	case *LunSet:
		return m.lunSet(c)
	}
	return nil, fmt.Errorf("storage: command %T has no handler", cmd)
}

func (m *Machine) volume(op, uuid string) (*Volume, error) {
	if v := m.s.Volumes[uuid]; v != nil {
		return v, nil
	}
	return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: uuid, Why: "no such volume", Next: "run clusteradm volume list"}
}

func (m *Machine) target(op, iqn string) (*Target, error) {
	if t := m.s.Targets[iqn]; t != nil {
		return t, nil
	}
	return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: iqn, Why: "no such target", Next: "run clusteradm target list"}
}

// checkNew tells whether n can be made.
func (m *Machine) checkNew(n *NewVolume) error {
	const op = "create volume"
	if old := m.s.VolumeByName(n.Name); old != nil {
		return &fsm.Error{Kind: fsm.KindExists, Op: op, Object: n.Name, Why: "a volume of this name is " + string(old.State), Next: "run clusteradm volume show " + n.Name}
	}
	if m.s.Volumes[n.Config.UUID] != nil || m.s.Gone[n.Config.UUID] != nil {
		return &fsm.Error{Kind: fsm.KindExists, Op: op, Object: n.Name, Why: "uuid " + n.Config.UUID + " is or was in use"}
	}
	for _, v := range m.s.Volumes {
		if v.Identity.Product == n.Identity.Product || v.Identity.NAA == n.Identity.NAA || v.Identity.Serial == n.Identity.Serial {
			return &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: n.Name, Why: "its identity is taken", Next: "try again"}
		}
	}
	if v := m.s.VolumeOn(n.Store, n.Config.Primary); v != nil {
		return &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: n.Name, Why: n.Store + " on " + v.Config.Primary + " is the store of volume " + v.Name,
			Next: "run clusteradm volume show " + v.Name}
	}
	for _, node := range n.Config.ISR {
		if !m.members.IsStorage(node) {
			return &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: n.Name, Why: "node " + node + " is no member with the storage role", Next: "run clusteradm node list"}
		}
	}
	return nil
}

func (m *Machine) put(index uint64, request string, n *NewVolume) *Volume {
	v := &Volume{
		Name: n.Name, State: Creating, Identity: n.Identity, Config: cloneConfig(n.Config),
		Created: index, Changed: index, Request: request, Store: n.Store, Integrity: n.Integrity,
	}
	m.s.Volumes[v.Config.UUID] = v
	return v
}

// made finds the volume that request made, nil if none. A request id makes one
// volume at most, and meeting it again for another is refused: the search must
// not depend on the order of a map.
func (m *Machine) made(op, request, name string) (*Volume, error) {
	for _, v := range m.s.Volumes {
		if v.Request != request {
			continue
		}
		if v.Name != name {
			return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: name, Why: "request id " + request + " made volume " + v.Name}
		}
		return v, nil
	}
	return nil, nil
}

func (m *Machine) volumeCreate(index uint64, c *VolumeCreate) (any, error) {
	v, err := m.made("create volume", c.Request, c.Volume.Name)
	if err != nil {
		return nil, err
	}
	if v != nil {
		return v.Clone(), nil
	}
	if err := m.checkNew(&c.Volume); err != nil {
		return nil, err
	}
	return m.put(index, c.Request, &c.Volume).Clone(), nil
}

func (m *Machine) volumeReady(index uint64, c *VolumeReady) (any, error) {
	const op = "make volume ready"
	v, err := m.volume(op, c.UUID)
	if err != nil {
		return nil, err
	}
	switch {
	case v.Config.Epoch != c.Epoch:
		return nil, epochConflict(op, v, c.Epoch)
	case v.State == Ready:
		return v.Clone(), nil
	case v.State != Creating:
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: v.Name, Why: "it is " + string(v.State)}
	}
	v.State, v.Changed = Ready, index
	return v.Clone(), nil
}

func epochConflict(op string, v *Volume, want uint64) error {
	return &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: v.Name, Why: fmt.Sprintf("its epoch is %d, not %d", v.Config.Epoch, want)}
}

func (m *Machine) volumeCAS(index uint64, c *VolumeCAS) (any, error) {
	const op = "change volume"
	v, err := m.volume(op, c.Config.UUID)
	if err != nil {
		return nil, err
	}
	if v.LastCAS == c.Request {
		return v.Clone(), nil
	}
	if v.Config.Epoch != c.Epoch {
		return nil, epochConflict(op, v, c.Epoch)
	}
	if v.Config.Size != c.Config.Size || v.Config.BlockSize != c.Config.BlockSize || v.Config.Lineage != c.Config.Lineage {
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: v.Name, Why: "size, block size and lineage have commands of their own"}
	}
	v.Config, v.Changed, v.LastCAS = cloneConfig(c.Config), index, c.Request
	return v.Clone(), nil
}

func (m *Machine) volumeRemove(index uint64, c *VolumeRemove) (any, error) {
	const op = "remove volume"
	v, err := m.volume(op, c.UUID)
	if err != nil {
		return nil, err
	}
	if luns := m.s.LUNsOf(c.UUID); len(luns) > 0 {
		return nil, &fsm.Error{
			Kind: fsm.KindRefused, Op: op, Object: v.Name, Why: fmt.Sprintf("LUN %d of %s points to it", luns[0].Number, luns[0].Target),
			Next: fmt.Sprintf("run clusteradm lun delete %s %d", luns[0].Target, luns[0].Number),
		}
	}
	if v.State != Removing {
		v.State, v.Changed = Removing, index
	}
	return v.Clone(), nil
}

func (m *Machine) volumeRemoved(index uint64, c *VolumeRemoved) (any, error) {
	const op = "finish removal of volume"
	if g := m.s.Gone[c.UUID]; g != nil {
		return cloneGone(g), nil
	}
	v, err := m.volume(op, c.UUID)
	if err != nil {
		return nil, err
	}
	switch {
	case v.Config.Epoch != c.Epoch:
		return nil, epochConflict(op, v, c.Epoch)
	case v.State != Removing:
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: v.Name, Why: "it is " + string(v.State)}
	}
	g := &Gone{Name: v.Name, Epoch: v.Config.Epoch, Members: v.Config.Members(), Index: index}
	m.s.Gone[c.UUID] = g
	delete(m.s.Volumes, c.UUID)
	m.reserved.VolumeGone(c.UUID)
	return cloneGone(g), nil
}

func cloneGone(g *Gone) Gone {
	c := *g
	c.Members = slices.Clone(g.Members)
	return c
}

func (m *Machine) targetCreate(index uint64, c *TargetCreate) (any, error) {
	const op = "create target"
	if t := m.s.Targets[c.IQN]; t != nil {
		if t.Request == c.Request {
			return t.Clone(), nil
		}
		return nil, &fsm.Error{Kind: fsm.KindExists, Op: op, Object: c.IQN, Why: "this target already exists"}
	}
	used := map[int]bool{}
	for _, t := range m.s.Targets {
		used[t.TID] = true
	}
	tid := c.TID
	if tid != 0 && used[tid] {
		return nil, &fsm.Error{Kind: fsm.KindExists, Op: op, Object: c.IQN, Why: fmt.Sprintf("tid %d is in use", tid)}
	}
	if tid == 0 {
		for tid = 1; used[tid]; tid++ {
		}
	}
	t := &Target{IQN: c.IQN, TID: tid, Alias: c.Alias, ACL: c.ACL.Clone(), LUNs: map[int]*LUN{}, Generation: m.next(), Created: index, Request: c.Request}
	m.s.Targets[c.IQN] = t
	return t.Clone(), nil
}

// next gives a generation; none is given twice, also not to a successor of a
// removed LUN or target.
func (m *Machine) next() uint64 {
	m.s.Generation++
	return m.s.Generation
}

func (m *Machine) targetDelete(c *TargetDelete) (any, error) {
	const op = "delete target"
	t, err := m.target(op, c.IQN)
	if err != nil {
		return nil, err
	}
	if len(t.LUNs) > 0 && !c.Force {
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.IQN, Why: fmt.Sprintf("it has %d LUNs", len(t.LUNs)), Next: "delete them first, or add --force (volumes stay)"}
	}
	delete(m.s.Targets, c.IQN)
	m.next()
	return nil, nil
}

// number picks or checks a LUN number.
func (t *Target) number(op string, want int) (int, error) {
	if want == NextFree {
		for n := 1; n <= MaxLUN; n++ {
			if t.LUNs[n] == nil {
				return n, nil
			}
		}
		return 0, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: t.IQN, Why: "every LUN number is in use"}
	}
	if t.LUNs[want] != nil {
		return 0, &fsm.Error{Kind: fsm.KindExists, Op: op, Object: t.IQN, Why: fmt.Sprintf("LUN %d already exists", want)}
	}
	return want, nil
}

func (t *Target) made(request string) *LUN {
	for _, l := range t.LUNs {
		if l.Request == request {
			return l
		}
	}
	return nil
}

func (m *Machine) bind(t *Target, l LUN) LUN {
	l.Target, l.Generation = t.IQN, m.next()
	t.LUNs[l.Number] = &l
	t.Generation = l.Generation
	return l
}

func (m *Machine) lunCreate(c *LunCreate) (any, error) {
	const op = "create lun"
	t, err := m.target(op, c.Target)
	if err != nil {
		return nil, err
	}
	if l := t.made(c.Request); l != nil {
		return *l, nil
	}
	v, err := m.volume(op, c.Volume)
	if err != nil {
		return nil, err
	}
	if v.State == Removing {
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: v.Name, Why: "the volume is being removed"}
	}
	n, err := t.number(op, c.Number)
	if err != nil {
		return nil, err
	}
	return m.bind(t, LUN{Number: n, Volume: c.Volume, ReadOnly: c.ReadOnly, Request: c.Request}), nil
}

func (m *Machine) lunDelete(c *LunDelete) (any, error) {
	const op = "delete lun"
	t, err := m.target(op, c.Target)
	if err != nil {
		return nil, err
	}
	l := t.LUNs[c.Number]
	if l == nil {
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: c.Target, Why: fmt.Sprintf("no LUN %d", c.Number), Next: "run clusteradm lun list"}
	}
	if c.Generation != 0 && l.Generation != c.Generation {
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Target, Why: fmt.Sprintf("LUN %d has generation %d, not %d", c.Number, l.Generation, c.Generation)}
	}
	delete(t.LUNs, c.Number)
	t.Generation = m.next()
	return *l, nil
}

func (m *Machine) lunCreateVolume(index uint64, c *LunCreateVolume) (any, error) {
	const op = "create lun"
	t, err := m.target(op, c.Target)
	if err != nil {
		return nil, err
	}
	old, err := m.made(op, c.Request, c.Volume.Name)
	if err != nil {
		return nil, err
	}
	l := t.made(c.Request)
	switch {
	case l != nil && old != nil && l.Volume == old.Config.UUID:
		return Mapped{Volume: old.Clone(), LUN: *l}, nil
	case l != nil || old != nil:
		// Half of it is there: the LUN was deleted since, or the id was used
		// for something else.
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Volume.Name, Why: "request id " + c.Request + " was used before"}
	}
	n, err := t.number(op, c.Number)
	if err != nil {
		return nil, err
	}
	if err := m.checkNew(&c.Volume); err != nil {
		return nil, err
	}
	v := m.put(index, c.Request, &c.Volume)
	return Mapped{Volume: v.Clone(), LUN: m.bind(t, LUN{Number: n, Volume: v.Config.UUID, ReadOnly: c.ReadOnly, Request: c.Request})}, nil
}

func (m *Machine) acl(iqn string, fn func(*ACL) (ACL, error)) (any, error) {
	t, err := m.target("change access list", iqn)
	if err != nil {
		return nil, err
	}
	a, err := fn(&t.ACL)
	if err != nil {
		return nil, err
	}
	t.ACL, t.Generation = a.Clone(), m.next()
	return t.Clone(), nil
}

func aclWithout(iqn string, a, b ACL) (ACL, error) {
	missing := func(s string) error {
		return &fsm.Error{Kind: fsm.KindNotFound, Op: "change access list", Object: iqn, Why: s + " is not in the list", Next: "run clusteradm acl list " + iqn}
	}
	out := a.Clone()
	if b.Open {
		out.Open = false
	}
	for _, s := range b.Initiators {
		i := slices.Index(out.Initiators, s)
		if i < 0 {
			return ACL{}, missing(s)
		}
		out.Initiators = slices.Delete(out.Initiators, i, i+1)
	}
	for _, s := range b.CIDRs {
		i := slices.Index(out.CIDRs, s)
		if i < 0 {
			return ACL{}, missing(s)
		}
		out.CIDRs = slices.Delete(out.CIDRs, i, i+1)
	}
	return out, nil
}
