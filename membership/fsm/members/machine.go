package members

import (
	"crypto/subtle"
	"fmt"
	"io"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

// Victim is what an eviction hands to the fence machine.
type Victim struct {
	Node        string
	Incarnation uint64
	BootID      string
	Epoch       uint64 // of the eviction
	Reason, By  string
	At          time.Time
}

// Fences is what this machine needs of machine 2, inside the same Apply.
type Fences interface {
	Open(index uint64, v Victim)                                              // a fence for v; never fails
	Pending(node string) (open bool, attempts int)                            // what keeps node out
	Admitted(index uint64, node string, inc uint64, at time.Time, why string) // history only
}

// Users is what this machine needs of machine 3: who still uses a node.
type Users interface {
	NodeUsers(node string) []string // volumes with a copy there, by name
}

// Machine is sub-machine 1. It has no lock of its own: fsm.FSM holds one.
type Machine struct {
	s        *State
	fences   Fences
	users    Users
	config   Settings
	reserved Reservations
}

// Reservations is what this machine needs of machine 4.
type Reservations interface {
	Purge(index uint64, initiators []string) // the initiators of a fenced node hold nothing any more
}

// Settings is what this machine needs of machine 8.
type Settings interface {
	Format() uint32 // cluster format in force
}

// New makes the machine with empty state; Bind comes before the first Apply.
func New(f Fences) *Machine { return &Machine{s: newState(), fences: f} }

// Bind gives the machine the neighbours that need it in turn.
func (m *Machine) Bind(u Users, c Settings, r Reservations) { m.users, m.config, m.reserved = u, c, r }

// State is a deep copy; call it inside fsm.FSM.View.
func (m *Machine) State() *State { return m.s.Clone() }

// Get is a copy of one member; call it inside fsm.FSM.View.
func (m *Machine) Get(node string) (Record, bool) {
	r := m.s.Members[node]
	if r == nil {
		return Record{}, false
	}
	return r.Clone(), true
}

// Tombstone is a copy of what is left of a removed member; call it inside
// fsm.FSM.View.
func (m *Machine) Tombstone(node string) (Tombstone, bool) {
	t := m.s.Removed[node]
	if t == nil {
		return Tombstone{}, false
	}
	return *t, true
}

// Cluster is name, uuid, epoch and view; call it inside fsm.FSM.View.
func (m *Machine) Cluster() (name, uuid string, epoch, view uint64) {
	return m.s.Name, m.s.UUID, m.s.Epoch, m.s.View
}

// Formats is the lowest format that one of nodes reported; 1 if none is known.
func (m *Machine) Formats(nodes []string) uint32 {
	low := uint32(0)
	for _, n := range nodes {
		f := uint32(1)
		if r := m.s.Members[n]; r != nil {
			f = r.Format
		}
		if low == 0 || f < low {
			low = f
		}
	}
	return max(low, 1)
}

// LowestFormat is the lowest format over every member record.
func (m *Machine) LowestFormat() (node string, format uint32) {
	for _, r := range m.s.List() {
		if format == 0 || r.Format < format {
			node, format = r.Name, r.Format
		}
	}
	return node, max(format, 1)
}

// MarkFenced is called by machine 2 when it records Fenced.
func (m *Machine) MarkFenced(index uint64, node string, inc uint64) {
	if r := m.s.Members[node]; r != nil && r.Status == Evicted && r.Incarnation == inc {
		r.Status = Fenced
		r.Changed = index
		if r.InitiatorName != "" {
			m.reserved.Purge(index, []string{iscsi.NormalizeName(r.InitiatorName)}) // as targets compare names
		}
	}
}

// IsStorage tells whether node is an active member with the storage role.
func (m *Machine) IsStorage(node string) bool {
	r := m.s.Members[node]
	return r != nil && r.Active() && r.Roles.Storage
}

// ID implements fsm.Machine.
func (*Machine) ID() fsm.ID { return fsm.Members }

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
		if s.Members != nil {
			n.Members = s.Members
		}
		if s.Tokens != nil {
			n.Tokens = s.Tokens
		}
		if s.Removed != nil {
			n.Removed = s.Removed
		}
		s.Members, s.Tokens, s.Removed = n.Members, n.Tokens, n.Removed
		n = s
	}
	return func() { m.s = n }, nil
}

// Apply implements fsm.Machine.
func (m *Machine) Apply(index uint64, cmd any) (any, error) {
	if _, boot := cmd.(*Bootstrap); !boot && m.s.UUID == "" {
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: "apply", Why: "there is no cluster yet", Next: "run clusteradm init"}
	}
	switch c := cmd.(type) {
	case *Bootstrap:
		return m.bootstrap(index, c)
	case *TokenCreate:
		return m.tokenCreate(c)
	case *TokenRevoke:
		return m.tokenRevoke(c)
	case *AddNode:
		return m.addNode(index, c)
	case *Admit:
		return m.admit(index, c)
	case *Evict:
		return m.evict(index, c)
	case *Leave:
		return m.leave(index, c)
	case *Remove:
		return m.remove(index, c)
	case *SetRoles:
		return m.change("set roles", index, c.Node, func(r *Record) error {
			r.Roles = c.Roles
			return nil
		})
	case *SetAddresses:
		return m.change("set addresses", index, c.Node, func(r *Record) error {
			if err := m.uniqueInitiator("set addresses", c.Node, c.InitiatorName); err != nil {
				return err
			}
			r.Addresses, r.InitiatorName = c.Addresses, c.InitiatorName
			return nil
		})
	case *ReportFormat:
		r, err := m.get("report format", c.Node)
		if err != nil {
			return nil, err
		}
		if r.Format != c.Format {
			r.Format, r.Changed = c.Format, index
		}
		return nil, nil
	case *PortalAdd:
		return m.portalAdd(c)
	case *PortalRemove:
		return m.portalRemove(c)
	}
	return nil, fmt.Errorf("members: command %T has no handler", cmd)
}

func (m *Machine) get(op, node string) (*Record, error) {
	if r := m.s.Members[node]; r != nil {
		return r, nil
	}
	return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: node, Why: "no such node", Next: "run clusteradm node list"}
}

func (m *Machine) change(op string, index uint64, node string, fn func(*Record) error) (any, error) {
	r, err := m.get(op, node)
	if err != nil {
		return nil, err
	}
	if err := fn(r); err != nil {
		return nil, err
	}
	r.Changed = index
	m.s.View++
	return r.Clone(), nil
}

func (m *Machine) uniqueInitiator(op, node, iqn string) error {
	if iqn == "" {
		return nil
	}
	for _, r := range m.s.List() {
		if r.Name != node && r.InitiatorName == iqn {
			return &fsm.Error{
				Kind: fsm.KindExists, Op: op, Object: node,
				Why:  fmt.Sprintf("initiator name %s belongs to node %s: a fence of one would cut the other", iqn, r.Name),
				Next: "give this node its own name in /etc/iscsi/initiatorname.iscsi (iscsi-iname makes one)",
			}
		}
	}
	return nil
}

func (m *Machine) newRecord(index uint64, n NewNode) *Record {
	m.s.LastIndex++
	r := &Record{
		Name: n.Name, BootID: n.BootID, Roles: n.Roles, Addresses: n.Addresses,
		InitiatorName: n.InitiatorName, Format: n.Format, Index: m.s.LastIndex, Changed: index,
	}
	m.s.Members[n.Name] = r
	m.s.View++
	return r
}

func (m *Machine) bootstrap(index uint64, c *Bootstrap) (any, error) {
	if m.s.UUID != "" {
		if m.s.UUID == c.UUID {
			if r := m.s.Members[c.Node.Name]; r != nil {
				return r.Clone(), nil
			}
		}
		return nil, &fsm.Error{
			Kind: fsm.KindExists, Op: "bootstrap", Object: c.Cluster,
			Why: fmt.Sprintf("this is already cluster %s (%s)", m.s.Name, m.s.UUID),
		}
	}
	m.s.Name, m.s.UUID = c.Cluster, c.UUID
	r := m.newRecord(index, c.Node)
	r.Incarnation, r.Status = 1, Member
	m.s.Epoch = 1
	return r.Clone(), nil
}

func (m *Machine) tokenCreate(c *TokenCreate) (any, error) {
	if m.s.Tokens[c.ID] != nil {
		return nil, &fsm.Error{Kind: fsm.KindExists, Op: "create token", Object: c.ID, Why: "exists"}
	}
	for id, t := range m.s.Tokens {
		if !t.Expires.After(c.Now) {
			delete(m.s.Tokens, id)
		}
	}
	t := &Token{ID: c.ID, SHA256: c.SHA256, Created: c.Now.UTC(), Expires: c.Expires.UTC(), Uses: c.Uses, Roles: c.Roles}
	m.s.Tokens[c.ID] = t
	return *t, nil
}

func (m *Machine) tokenRevoke(c *TokenRevoke) (any, error) {
	if m.s.Tokens[c.ID] == nil {
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: "revoke token", Object: c.ID, Why: "no such token", Next: "run clusteradm token list"}
	}
	delete(m.s.Tokens, c.ID)
	return nil, nil
}

func (m *Machine) addNode(index uint64, c *AddNode) (any, error) {
	const op = "join"
	if r := m.s.Members[c.Node.Name]; r != nil {
		if r.Request == c.Request && r.BootID == c.Node.BootID {
			return r.Clone(), nil
		}
		return nil, &fsm.Error{
			Kind: fsm.KindExists, Op: op, Object: c.Node.Name,
			Why:  fmt.Sprintf("a node of this name is %s", r.Status),
			Next: "join under another name, or run clusteradm node remove " + c.Node.Name + " on a member first",
		}
	}
	const again = "run clusteradm token create on a member and join with the new token"
	t := m.s.Tokens[c.Token]
	switch {
	case t == nil:
		return nil, &fsm.Error{Kind: fsm.KindDenied, Op: op, Object: c.Node.Name, Why: "token " + c.Token + " is unknown, used up or revoked", Next: again}
	case !c.Now.Before(t.Expires):
		return nil, &fsm.Error{Kind: fsm.KindDenied, Op: op, Object: c.Node.Name, Why: "token " + c.Token + " expired at " + t.Expires.Format(time.RFC3339), Next: again}
	case subtle.ConstantTimeCompare([]byte(t.SHA256), []byte(c.Proof)) != 1:
		return nil, &fsm.Error{Kind: fsm.KindDenied, Op: op, Object: c.Node.Name, Why: "the secret of token " + c.Token + " is wrong", Next: again}
	}
	if extra := c.Node.Roles.without(t.Roles); extra != "" {
		return nil, &fsm.Error{Kind: fsm.KindDenied, Op: op, Object: c.Node.Name, Why: fmt.Sprintf("token %s does not give the role %s", c.Token, extra), Next: again}
	}
	if f := m.config.Format(); c.Node.Format < f {
		return nil, &fsm.Error{
			Kind: fsm.KindRefused, Op: op, Object: c.Node.Name,
			Why:  fmt.Sprintf("its clusterd knows cluster formats up to %d, the cluster runs %d", c.Node.Format, f),
			Next: "upgrade clusterd on it first",
		}
	}
	if err := m.uniqueInitiator(op, c.Node.Name, c.Node.InitiatorName); err != nil {
		return nil, err
	}
	if t.Uses > 0 {
		if t.Uses--; t.Uses == 0 {
			delete(m.s.Tokens, c.Token)
		}
	}
	r := m.newRecord(index, c.Node)
	r.Status, r.Request = Joining, c.Request
	if old := m.s.Removed[c.Node.Name]; old != nil {
		r.Incarnation = old.Incarnation + 1 // so that what the removed one still sends is old
		delete(m.s.Removed, c.Node.Name)
	}
	return r.Clone(), nil
}

// without names the first role of a that b lacks.
func (a Roles) without(b Roles) string {
	switch {
	case a.Storage && !b.Storage:
		return "storage"
	case a.Host && !b.Host:
		return "host"
	case a.Witness && !b.Witness:
		return "witness"
	case a.Voter && !b.Voter:
		return "voter"
	}
	return ""
}

func (m *Machine) admit(index uint64, c *Admit) (any, error) {
	const op = "admit"
	r, err := m.get(op, c.Node)
	if err != nil {
		return nil, err
	}
	if r.Status == Member && r.Incarnation == c.From+1 && r.BootID == c.BootID {
		return r.Clone(), nil // repeated
	}
	if r.Incarnation != c.From {
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Node, Why: fmt.Sprintf("incarnation is %d, not %d", r.Incarnation, c.From)}
	}
	switch r.Status {
	case Joining, Left, Fenced:
	case Evicted:
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Node, Why: "its eviction is not fenced yet", Next: "run clusteradm fence list"}
	default:
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Node, Why: "it is " + string(r.Status) + " in incarnation " + fmt.Sprint(r.Incarnation)}
	}
	if open, attempts := m.fences.Pending(c.Node); open || attempts > 0 && !fault.Off(fault.AdmitWaitsForAttempts) {
		return nil, &fsm.Error{
			Kind: fsm.KindRefused, Op: op, Object: c.Node,
			Why:  fmt.Sprintf("fence open: %v, attempts still running: %d; a late one would hit the new incarnation", open, attempts),
			Next: "run clusteradm fence list",
		}
	}
	if r.Status == Fenced && r.BootID == c.BootID && c.Clean == "" {
		return nil, &fsm.Error{
			Kind: fsm.KindRefused, Op: op, Object: c.Node,
			Why:  "it still runs the kernel that was evicted (boot id " + c.BootID + ")",
			Next: "reboot it, or unmount its filesystems, stop its lockspaces and log out of all targets",
		}
	}
	r.Incarnation++
	r.BootID, r.Status, r.Changed = c.BootID, Member, index
	if c.Format != 0 {
		r.Format = c.Format
	}
	m.s.Epoch++
	m.s.View++
	m.fences.Admitted(index, c.Node, r.Incarnation, c.Now.UTC(), c.Clean)
	return r.Clone(), nil
}

func (m *Machine) evict(index uint64, c *Evict) (any, error) {
	const op = "evict"
	r, err := m.get(op, c.Node)
	if err != nil {
		return nil, err
	}
	if r.Incarnation != c.Incarnation || r.BootID != c.BootID {
		return nil, &fsm.Error{
			Kind: fsm.KindConflict, Op: op, Object: c.Node,
			Why: fmt.Sprintf("incarnation %d of boot %s is meant, the member is incarnation %d of boot %s", c.Incarnation, c.BootID, r.Incarnation, r.BootID),
		}
	}
	switch r.Status {
	case Evicted, Fenced:
		return Eviction{Epoch: r.EvictEpoch, Already: true}, nil
	case Left:
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Node, Why: "it has left"}
	case Joining, Member, Leaving:
	}
	m.s.Epoch++
	m.s.View++
	r.Status, r.EvictEpoch, r.Changed = Evicted, m.s.Epoch, index
	m.fences.Open(index, Victim{
		Node: c.Node, Incarnation: c.Incarnation, BootID: c.BootID, Epoch: m.s.Epoch,
		Reason: c.Reason, By: c.By, At: c.Now.UTC(),
	})
	return Eviction{Epoch: m.s.Epoch}, nil
}

func (m *Machine) leave(index uint64, c *Leave) (any, error) {
	const op = "leave"
	r, err := m.get(op, c.Node)
	if err != nil {
		return nil, err
	}
	if r.Incarnation != c.Incarnation {
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Node, Why: fmt.Sprintf("incarnation is %d, not %d", r.Incarnation, c.Incarnation)}
	}
	want := Leaving
	if c.Done {
		want = Left
	}
	switch {
	case r.Status == want:
		return r.Clone(), nil
	case !r.Active():
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Node, Why: "it is " + string(r.Status)}
	case c.Done && r.Status != Leaving:
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Node, Why: "it has not begun to leave"}
	}
	if c.Done {
		m.s.Epoch++
	}
	m.s.View++
	r.Status, r.Changed = want, index
	return r.Clone(), nil
}

func (m *Machine) remove(index uint64, c *Remove) (any, error) {
	const op = "remove node"
	r := m.s.Members[c.Node]
	if r == nil {
		if m.s.Removed[c.Node] != nil {
			return nil, nil // repeated
		}
		_, err := m.get(op, c.Node)
		return nil, err
	}
	switch r.Status {
	case Joining, Left, Fenced:
	case Evicted:
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Node, Why: "its fence is open", Next: "run clusteradm fence_manual " + c.Node + " after you have reset it"}
	default:
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Node, Why: "it is " + string(r.Status), Next: "run clusteradm leave on it"}
	}
	if _, attempts := m.fences.Pending(c.Node); attempts > 0 {
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Node, Why: fmt.Sprintf("%d fence attempts still run", attempts), Next: "run clusteradm fence list"}
	}
	if vols := m.users.NodeUsers(c.Node); len(vols) > 0 {
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Node, Why: fmt.Sprintf("it holds copies of the volumes %v", vols), Next: "remove or move them first"}
	}
	m.s.Removed[c.Node] = &Tombstone{Incarnation: r.Incarnation, Index: r.Index, Removed: index}
	delete(m.s.Members, c.Node)
	m.s.View++
	return nil, nil
}
