// Package fsm is the cluster's one replicated state machine: it routes log
// entries to registered, pure sub-machines, frames their state into snapshots
// and tells readers what changed. The sub-machines are its sub-packages;
// membership/fsm/machines puts them together.
//
// It decides nothing and does nothing: no side effect happens inside Apply or
// Restore (SAFETY §2 "Level-triggered"). Whoever acts on the state waits on
// Changed, reads with View and compares desired with actual.
//
// A node that meets a log entry it cannot understand stops applying for good
// (Err, Stopped) rather than drift from the others: reads still work and are
// marked by Err, snapshots are refused so that the log keeps the entry for a
// newer binary.
//
// Lock order: FSM.mu is the only lock; sub-machines have none and are called
// with it held.
//
// Cluster row: node, clvm, gfs, service, dlm and fence may import it.
package fsm

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"sync"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
)

// Kind is one row of a sub-machine's command table. Rows are only ever
// appended; a number is never used again.
type Kind struct {
	Number     uint16
	Name       string     // "evict"; in logs and docs
	Since      uint32     // cluster format that introduced it; 1 is the first
	MaxVersion uint32     // highest payload version this binary applies; lower ones down to 1 too
	New        func() any // pointer to a zero command, to decode into
	Touches    []ID       // other machines whose state the command may change
}

// Machine is a pure sub-machine. Calls never overlap; the FSM's lock is held.
// Apply and Restore are deterministic and look at nothing but the state and
// their arguments.
type Machine interface {
	ID() ID
	// Version of the snapshot section that Snapshot writes.
	Version() uint32
	Kinds() []Kind
	// Apply changes the state by cmd, a pointer as made by Kind.New, or
	// refuses with an *Error and changes nothing. Index is the entry's.
	Apply(index uint64, cmd any) (any, error)
	// Snapshot writes the whole state; equal states give equal bytes.
	Snapshot(w io.Writer) error
	// Restore decodes a section and returns the func that puts it in place.
	// Version 0 with a nil reader: the snapshot has no such section, become
	// empty. On error the old state stays.
	Restore(version uint32, r io.Reader) (install func(), err error)
}

// Result is what applying a command gave: raft.ApplyFuture.Response holds one.
type Result struct {
	Index uint64 // of the log entry; readers wait for it
	Value any    // documented at each command
	Err   error  // *Error for a refusal, *StopError when the FSM has stopped
}

// StopError says why a node stopped applying.
type StopError struct {
	Index uint64 // of the entry that could not be applied; 0 for a snapshot
	Cause error
}

func (e *StopError) Error() string {
	return fmt.Sprintf("state machine stopped at index %d: %v; upgrade clusterd on this node, then restart it", e.Index, e.Cause)
}

func (e *StopError) Unwrap() error { return e.Cause }

// FSM implements raft.FSM over the sub-machines.
type FSM struct {
	log      *zap.Logger
	machines []Machine // by ID, ascending
	kinds    map[uint32]kindRow

	mu struct {
		sync.RWMutex
		applied  uint64        // index of the last command applied or restored; never decreases but by Restore
		modified map[ID]uint64 // index of the last change; ≤ applied
		restores uint64        // number of Restores, so that watchers see one even at an equal index
		changed  chan struct{} // closed and replaced on every advance
		stop     *StopError
		stopped  chan struct{}
	}
}

type kindRow struct {
	m Machine
	k Kind
}

func kindKey(m ID, k uint16) uint32 { return uint32(m)<<16 | uint32(k) }

// New makes an FSM of the given machines with empty state.
func New(log *zap.Logger, machines ...Machine) (*FSM, error) {
	f := &FSM{log: log, machines: slices.Clone(machines), kinds: make(map[uint32]kindRow)}
	slices.SortFunc(f.machines, func(a, b Machine) int { return int(a.ID()) - int(b.ID()) })
	f.mu.modified = make(map[ID]uint64)
	f.mu.changed = make(chan struct{})
	f.mu.stopped = make(chan struct{})
	for i, m := range f.machines {
		if m.ID() == 0 || i > 0 && f.machines[i-1].ID() == m.ID() {
			return nil, fmt.Errorf("new fsm: machine %v registered twice or 0", m.ID())
		}
		for _, k := range m.Kinds() {
			key := kindKey(m.ID(), k.Number)
			if _, dup := f.kinds[key]; dup || k.Number == 0 || k.Since == 0 || k.MaxVersion == 0 || k.New == nil {
				return nil, fmt.Errorf("new fsm: bad or double row for kind %v/%d", m.ID(), k.Number)
			}
			f.kinds[key] = kindRow{m, k}
		}
	}
	return f, nil
}

// Kinds lists the command table of every machine, in order.
func (f *FSM) Kinds() map[ID][]Kind {
	out := make(map[ID][]Kind)
	for _, m := range f.machines {
		out[m.ID()] = m.Kinds()
	}
	return out
}

// errUnknownIgnorable is internal: skip the entry.
var errUnknownIgnorable = errors.New("unknown kind, ignorable")

func (f *FSM) decode(b []byte) (kindRow, any, error) {
	e, err := ParseEnvelope(b)
	if err != nil {
		return kindRow{}, nil, err
	}
	row, ok := f.kinds[kindKey(e.Machine, e.Kind)]
	if !ok || e.Version > row.k.MaxVersion {
		if e.Flags&FlagIgnorable != 0 {
			return kindRow{}, nil, errUnknownIgnorable
		}
		if !ok {
			return kindRow{}, nil, fmt.Errorf("unknown command %v/%d", e.Machine, e.Kind)
		}
		return kindRow{}, nil, fmt.Errorf("command %v/%s: version %d, this binary knows up to %d", e.Machine, row.k.Name, e.Version, row.k.MaxVersion)
	}
	if e.Version == 0 {
		return kindRow{}, nil, fmt.Errorf("command %v/%s: version 0", e.Machine, row.k.Name)
	}
	cmd := row.k.New()
	if err := DecodeStrict(e.Payload, cmd); err != nil {
		return kindRow{}, nil, fmt.Errorf("command %v/%s: %w", e.Machine, row.k.Name, err)
	}
	return row, cmd, nil
}

func validate(cmd any) error {
	v, ok := cmd.(Validator)
	if !ok {
		return nil
	}
	err := v.Validate()
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Kind: KindInvalid, Why: err.Error()}
}

// Check is the gate at the proposer, before an entry goes into the log: the
// entry decodes here, its static rules hold, and every voter can apply it.
// active is the cluster's format in force, voters the lowest format that a
// voter reported (machines.State.Formats).
func (f *FSM) Check(entry []byte, active, voters uint32) error {
	row, cmd, err := f.decode(entry)
	switch {
	case errors.Is(err, errUnknownIgnorable):
		return &Error{Kind: KindInvalid, Op: "propose", Why: "this node does not know the command"}
	case err != nil:
		return &Error{Kind: KindInvalid, Op: "propose", Why: err.Error()}
	}
	if since := row.k.Since; since > 1 && (since > active || since > voters) {
		return &Error{
			Kind: KindRefused, Op: "propose", Object: row.k.Name,
			Why:  fmt.Sprintf("needs cluster format %d; in force is %d, the oldest voter knows %d", since, active, voters),
			Next: "upgrade clusterd on every node, then run clusteradm upgrade run",
		}
	}
	return validate(cmd)
}

// Apply implements raft.FSM; it returns a Result.
func (f *FSM) Apply(l *raft.Log) any {
	return f.ApplyEntry(l.Index, l.Data)
}

// ApplyEntry applies one log entry. An index at or below the applied one is a
// bug of the caller and stops the FSM.
func (f *FSM) ApplyEntry(index uint64, entry []byte) (res Result) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.stop != nil {
		return Result{Index: index, Err: f.mu.stop}
	}
	if index <= f.mu.applied {
		return Result{Index: index, Err: f.halt(index, fmt.Errorf("entry is not above the applied index %d", f.mu.applied))}
	}
	row, cmd, err := f.decode(entry)
	switch {
	case errors.Is(err, errUnknownIgnorable):
		f.advance(index)
		return Result{Index: index}
	case err != nil:
		return Result{Index: index, Err: f.halt(index, err)}
	}
	if err := validate(cmd); err != nil {
		f.advance(index)
		return Result{Index: index, Err: err}
	}
	// A panic in a sub-machine would end every node of the cluster, one after
	// the other, for ever. Stopped nodes still answer status.
	defer func() {
		if p := recover(); p != nil {
			res = Result{Index: index, Err: f.halt(index, fmt.Errorf("command %v/%s panicked: %v", row.m.ID(), row.k.Name, p))}
		}
	}()
	v, err := row.m.Apply(index, cmd)
	if err == nil {
		f.mu.modified[row.m.ID()] = index
		for _, t := range row.k.Touches {
			f.mu.modified[t] = index
		}
	}
	f.advance(index)
	return Result{Index: index, Value: v, Err: err}
}

// advance publishes a new applied index; f.mu is held.
func (f *FSM) advance(index uint64) {
	f.mu.applied = index
	close(f.mu.changed)
	f.mu.changed = make(chan struct{})
}

// halt stops applying; f.mu is held.
func (f *FSM) halt(index uint64, cause error) *StopError {
	f.mu.stop = &StopError{Index: index, Cause: cause}
	close(f.mu.stopped)
	close(f.mu.changed)
	f.mu.changed = make(chan struct{})
	f.log.Error("state machine stopped", zap.Uint64("index", index), zap.Error(cause))
	return f.mu.stop
}

// View runs fn while the state stands still, with the applied index. fn must
// not keep references into the state; the sub-machines' readers return copies.
// fn must not call the FSM.
func (f *FSM) View(fn func(applied uint64)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	fn(f.mu.applied)
}

// Index is the applied index: every command up to it is in the state.
func (f *FSM) Index() uint64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.mu.applied
}

// Modified is the index of the last entry that may have changed machine id; 0
// if none did.
func (f *FSM) Modified(id ID) uint64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.mu.modified[id]
}

// Changed returns the applied index, the number of restores, and a channel that
// is closed when either advances or the FSM stops. Level-triggered: read the
// state after the call and wait for the channel only then.
func (f *FSM) Changed() (applied, restores uint64, next <-chan struct{}) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.mu.applied, f.mu.restores, f.mu.changed
}

// Wait returns when every command up to index is applied. Index is one that
// Result.Index or raftlog.Node.ReadIndex gave: entries that are no commands
// never count.
func (f *FSM) Wait(ctx context.Context, index uint64) error {
	for {
		f.mu.RLock()
		applied, next, stop := f.mu.applied, f.mu.changed, f.mu.stop
		f.mu.RUnlock()
		if applied >= index {
			return nil
		}
		if stop != nil {
			return stop
		}
		select {
		case <-next:
		case <-ctx.Done():
			return fmt.Errorf("wait for index %d, applied is %d: %w", index, applied, ctx.Err())
		}
	}
}

// Err is a *StopError when the node has stopped applying, else nil.
func (f *FSM) Err() error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.mu.stop == nil {
		return nil
	}
	return f.mu.stop
}

// Stopped is closed when the node stops applying.
func (f *FSM) Stopped() <-chan struct{} {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.mu.stopped
}

// Hash is SHA-256 over the state of every machine; equal on nodes that have
// applied the same entries.
func (f *FSM) Hash() ([sha256.Size]byte, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	h := sha256.New()
	var sum [sha256.Size]byte
	for _, m := range f.machines {
		s, err := section(m)
		if err != nil {
			return sum, err
		}
		var hdr [13]byte
		hdr[0] = byte(m.ID())
		binary.BigEndian.PutUint32(hdr[1:], m.Version())
		binary.BigEndian.PutUint64(hdr[5:], uint64(len(s)))
		h.Write(hdr[:])
		h.Write(s)
	}
	h.Sum(sum[:0])
	return sum, nil
}

// As returns the value of a result as T. A refusal is its error; another type
// is a bug and said so.
func As[T any](r Result) (T, error) {
	var zero T
	if r.Err != nil {
		return zero, r.Err
	}
	v, ok := r.Value.(T)
	if !ok {
		return zero, fmt.Errorf("result of index %d is %T, not %v", r.Index, r.Value, reflect.TypeFor[T]())
	}
	return v, nil
}
