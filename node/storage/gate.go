package storage

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/target"
)

// NodeGate is the node's right to serve at all. It is open while the node lease
// runs, and for T_orphan after it for commands of sessions that exist (SAFETY
// §2, two leases). When that ends it shuts: its incarnation rises, and whoever
// calls Tick resets every session, because no command read under one lease may
// run under a later one.
//
//	shut --Extend--> serving --lease end--> orphaned --T_orphan--> shut
//	                    ^------Extend-----------'
type NodeGate struct {
	clock  env.Clock
	orphan time.Duration

	// Read by every command without the lock; written under it.
	inc  atomic.Uint64 // rises at every opening and at every shutting; odd = open
	end  atomic.Int64  // node lease end, env.Boot
	over atomic.Int64  // end + T_orphan

	mu struct {
		sync.Mutex
		node uint64 // incarnation of the node under which the gate opened
	}
}

// NewNodeGate makes a gate that is shut.
func NewNodeGate(c env.Clock, orphan time.Duration) *NodeGate {
	return &NodeGate{clock: c, orphan: orphan}
}

// Extend takes a lease. A lease end never moves back. It returns true when the
// node's incarnation changed under an open gate: the caller resets sessions.
func (g *NodeGate) Extend(end env.Boot, node uint64) (reset bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	open := g.inc.Load()&1 == 1
	if open && node != g.mu.node {
		g.inc.Add(1)
		open, reset = false, true
	}
	if int64(end) > g.end.Load() {
		g.over.Store(int64(end.Add(g.orphan)))
		g.end.Store(int64(end))
	}
	if !open && g.clock.Now() < env.Boot(g.end.Load()) {
		g.mu.node = node
		g.inc.Add(1)
	}
	return reset
}

// Tick shuts the gate when its time is over and tells so once.
func (g *NodeGate) Tick() (shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inc.Load()&1 == 1 && g.spent(g.clock.Now()) {
		g.inc.Add(1)
		return true
	}
	return false
}

// Shut closes the gate now, whatever the lease says.
func (g *NodeGate) Shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inc.Load()&1 == 1 {
		g.inc.Add(1)
	}
}

func (g *NodeGate) spent(now env.Boot) bool {
	return now >= env.Boot(g.over.Load()) && !fault.Off(fault.GateShutsAtLeaseEnd)
}

// State names the state for reports: serving, orphaned or shut.
func (g *NodeGate) State() string {
	now := g.clock.Now()
	switch {
	case g.inc.Load()&1 == 0 || g.spent(now):
		return "shut"
	case now >= env.Boot(g.end.Load()):
		return "orphaned"
	}
	return "serving"
}

// Next is how long from now until the gate's state changes by itself; at most a
// second.
func (g *NodeGate) Next() time.Duration {
	d := time.Second
	now := g.clock.Now()
	for _, at := range []int64{g.end.Load(), g.over.Load()} {
		if left := env.Boot(at).Sub(now); left > 0 && left < d {
			d = left
		}
	}
	return d
}

// LeaseEnd is the end of the node lease.
func (g *NodeGate) LeaseEnd() env.Boot { return env.Boot(g.end.Load()) }

// Incarnation is what a session takes when it is admitted.
func (g *NodeGate) Incarnation() target.Incarnation { return target.Incarnation(g.inc.Load()) }

// Enter asks for a command of a session admitted under in.
func (g *NodeGate) Enter(in target.Incarnation, op target.Op) error {
	return g.check(in, op, true)
}

// Leave asks whether the status of a command may be sent.
func (g *NodeGate) Leave(in target.Incarnation, op target.Op) error {
	return g.check(in, op, true)
}

// check: alone tells that no other copy has to confirm that this one may go on
// without a node lease.
func (g *NodeGate) check(in target.Incarnation, op target.Op, alone bool) error {
	inc := g.inc.Load()
	now := g.clock.Now()
	if inc&1 == 0 || target.Incarnation(inc) != in || g.spent(now) {
		return target.ErrReset
	}
	if now < env.Boot(g.end.Load()) {
		return nil
	}
	// Orphaned: what is under way goes on, nothing new begins.
	switch op {
	case target.OpLogin, target.OpReserve, target.OpConfig:
		return target.ErrUnsure
	case target.OpInquire:
		return nil
	}
	if !alone {
		return target.ErrReset
	}
	return nil
}

// VolumeGate is the right to serve one volume: the node's gate, and the role
// that the FSM gives this node for it.
type VolumeGate struct {
	node *NodeGate
	own  atomic.Uint64 // rises when role or epoch change

	role atomic.Pointer[role]
	in   atomic.Int64 // commands between Enter and Leave
	// suspended: an evicted node may still have something in flight here, although its
	// fence is closed.
	suspended atomic.Bool

	drained chan struct{} // a token when in fell to zero
}

type role struct {
	primary bool
	alone   bool  // the in-sync set is this node
	down    error // the store cannot be used
	epoch   uint64
}

// NewVolumeGate makes a gate that lets nothing through until SetRole.
func NewVolumeGate(n *NodeGate) *VolumeGate {
	g := &VolumeGate{node: n, drained: make(chan struct{}, 1)}
	g.role.Store(&role{})
	return g
}

// SetRole installs what the FSM says. It returns true when sessions opened under
// the former role must be reset.
func (g *VolumeGate) SetRole(primary, alone bool, epoch uint64, down error) (reset bool) {
	old := g.role.Load()
	if old.primary == primary && old.epoch == epoch && old.alone == alone && (old.down == nil) == (down == nil) {
		return false
	}
	g.role.Store(&role{primary, alone, down, epoch})
	if old.epoch == 0 {
		return false // nobody has seen it yet
	}
	if old.primary && (!primary || old.epoch != epoch) {
		g.own.Add(1)
		return true
	}
	return false
}

// Incarnation joins the node's and the volume's.
func (g *VolumeGate) Incarnation() target.Incarnation {
	return g.node.Incarnation()<<32 | target.Incarnation(uint32(g.own.Load()))
}

// Enter asks for a command.
func (g *VolumeGate) Enter(in target.Incarnation, op target.Op) error {
	g.in.Add(1)
	err := g.check(in, op)
	if err == nil && op != target.OpInquire && g.suspended.Load() {
		err = target.ErrUnsure
	}
	if err != nil {
		g.leave()
	}
	return err
}

// Suspend holds every command back, or lets them go on. Those that have entered end
// as they would have.
func (g *VolumeGate) Suspend(on bool) { g.suspended.Store(on) }

// Leave ends a command and asks whether its status may be sent.
func (g *VolumeGate) Leave(in target.Incarnation, op target.Op) error {
	err := g.check(in, op)
	g.leave()
	return err
}

func (g *VolumeGate) leave() {
	if g.in.Add(-1) == 0 {
		select {
		case g.drained <- struct{}{}:
		default:
		}
	}
}

func (g *VolumeGate) check(in target.Incarnation, op target.Op) error {
	if uint32(in) != uint32(g.own.Load()) {
		return target.ErrReset
	}
	r := g.role.Load()
	if err := g.node.check(in>>32, op, r.alone); err != nil {
		return err
	}
	switch {
	case op == target.OpInquire:
		return nil
	case r.down != nil:
		return target.ErrUnavailable
	case !r.primary:
		return target.ErrStandby
	}
	return nil
}
