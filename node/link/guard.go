package link

import (
	"errors"
	"fmt"

	"github.com/blockhouse-san/blockhouse/internal/fault"
)

// Stamp says from which point of the replicated history something was read. All
// three numbers only ever rise, and they rise together.
type Stamp struct {
	Index uint64 `json:"index"` // applied FSM index
	View  uint64 `json:"view"`  // number of the membership view
	Epoch uint64 `json:"epoch"` // cluster epoch, raised by every Evict
}

// Before tells whether s is older than o in any part.
func (s Stamp) Before(o Stamp) bool { return s.Index < o.Index || s.View < o.View || s.Epoch < o.Epoch }

func (s Stamp) String() string {
	return fmt.Sprintf("index %d, view %d, epoch %d", s.Index, s.View, s.Epoch)
}

// ErrBackwards is a control that knows less than the worker has already obeyed.
var ErrBackwards = errors.New("older than what this worker has obeyed")

// Guard is the memory of a worker: what it has obeyed. Pure; its owner locks.
type Guard struct {
	control uint64 // highest control incarnation
	state   Stamp  // highest state
	lease   Stamp  // highest stamp of a lease; its Index is the minimum the state must have reached
}

// Hello admits a control, or names the one that is obeyed instead.
func (g *Guard) Hello(incarnation uint64) error {
	if incarnation < g.control {
		return fmt.Errorf("control incarnation %d: %w (incarnation %d)", incarnation, ErrBackwards, g.control)
	}
	g.control = incarnation
	return nil
}

// Obeys tells whether frames of a control still count: a later one silences it.
func (g *Guard) Obeys(incarnation uint64) bool { return incarnation == g.control }

// State admits a picture of the FSM.
func (g *Guard) State(s Stamp) error {
	if s.Before(g.state) && !fault.Off(fault.LinkNeverBackwards) {
		return fmt.Errorf("state of %v: %w (%v)", s, ErrBackwards, g.state)
	}
	g.state = s
	return nil
}

// Lease admits a lease.
func (g *Guard) Lease(s Stamp) error {
	if s.Before(g.lease) && !fault.Off(fault.LinkNeverBackwards) {
		return fmt.Errorf("lease of %v: %w (%v)", s, ErrBackwards, g.lease)
	}
	g.lease = s
	return nil
}

// Ready tells whether the state has reached the minimum that the lease names: a
// gate opens only then (SAFETY §3, Cut).
func (g *Guard) Ready() bool { return !g.state.Before(g.lease) }

// Highest is the highest state that was obeyed.
func (g *Guard) Highest() Stamp { return g.state }

// Control is the incarnation of the control that is obeyed.
func (g *Guard) Control() uint64 { return g.control }
