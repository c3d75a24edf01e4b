package target

import (
	"context"
	"sync"

	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// Reservations of one logical unit. The stand-alone implementation is Local; the
// cluster's writes to its FSM and reads a copy of it.
//
// Conflicts is on the path of every command and must not block. Apply answers
// only when the change is in force for every command that is checked afterwards
// (SAFETY §4); the caller then does what the result says: queue attentions,
// abort and drain tasks, and only after that send status. An implementation whose
// state also changes by others does that itself, by Server.Enforce, and gives
// results that ask for nothing.
type Reservations interface {
	// Conflicts tells whether a command of class c from n has to be answered with
	// RESERVATION CONFLICT.
	Conflicts(n pr.Nexus, c scsi.Conflict) bool
	// Snapshot is the state that PERSISTENT RESERVE IN reports. It is not changed
	// afterwards by anyone.
	Snapshot() *pr.State
	// Apply runs a request. ErrNotReady, ErrStandby and ErrUnavailable say that it
	// did not and will not take effect; the command ends with their sense. Any other
	// error means that it is not known, or may not be said, whether it took effect:
	// the command gets no status and the session is reset.
	Apply(ctx context.Context, q pr.Request) (pr.Result, error)
}

// Local keeps the reservations of a logical unit in memory.
type Local struct {
	mu    sync.RWMutex
	state pr.State
}

// NewLocal returns the reservations of a logical unit that has none.
func NewLocal() *Local { return &Local{} }

// Conflicts implements Reservations.
func (l *Local) Conflicts(n pr.Nexus, c scsi.Conflict) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.state.Conflicts(n, c)
}

// Snapshot implements Reservations.
func (l *Local) Snapshot() *pr.State {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.state.Clone()
}

// Apply implements Reservations.
func (l *Local) Apply(_ context.Context, q pr.Request) (pr.Result, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.Apply(q), nil
}
