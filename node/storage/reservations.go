package storage

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	fsmpr "github.com/blockhouse-san/blockhouse/membership/fsm/pr"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// reservations are those of one volume (target.Reservations): enforced from a copy
// of the cluster's record, changed through the log (SAFETY §4).
//
// A request goes to control, and is answered when the copy here shows it decided
// and what it asks for is done: attentions queued, victims aborted, everybody who
// lost the right out of the backend. The same is done for changes that come from
// elsewhere or that were skipped over: what is to do follows from the record and
// from the Seq up to which this process has acted.
type reservations struct {
	volume string
	gate   *VolumeGate
	clock  env.Clock
	log    *zap.Logger
	ask    func(ctx context.Context, kind string, body any) (link.Reply, error) // link.Server.Request
	worker func() string                                                        // our incarnation
	act    func(ctx context.Context, volume string, r pr.Result) error          // target.Server.Enforce
	// forget has the sessions of the volume reset; it does not wait.
	forget func()
	wake   func() // the enforcer has work
	over   <-chan struct{}

	cur  atomic.Pointer[fsmpr.Volume] // never nil, never changed
	turn chan struct{}                // a token: one request is under way

	mu struct {
		sync.Mutex
		index   uint64 // of the state that cur is from
		acted   uint64 // Volume.Seq up to which everything was done
		busy    bool   // somebody enforces
		doubt   bool   // a request was given up that may still be decided
		settles bool   // somebody ends the doubt, or a lost nexus' RESERVE
		changed chan struct{}
	}
}

// changeBody is the body of the requests pr.change and pr.barrier.
type changeBody struct {
	Volume    string      `json:"volume"`
	Epoch     uint64      `json:"epoch"`
	Request   *pr.Request `json:"request,omitempty"`
	LegacySeq uint64      `json:"legacy_seq,omitempty"`
}

var noReservations = &fsmpr.Volume{}

// Conflicts implements target.Reservations: a look at the copy.
func (r *reservations) Conflicts(n pr.Nexus, c scsi.Conflict) bool {
	return r.cur.Load().Conflicts(n, c)
}

// Snapshot implements target.Reservations.
func (r *reservations) Snapshot() *pr.State { return &r.cur.Load().State }

// Persistent tells that registrations survive a loss of power, asked for or not.
func (r *reservations) Persistent() bool { return true }

// start begins with a record, with nothing to tell: nobody has seen the volume here.
func (r *reservations) start(v *fsmpr.Volume, index uint64) {
	if v == nil {
		v = noReservations
	}
	r.turn = make(chan struct{}, 1)
	r.turn <- struct{}{}
	r.cur.Store(v)
	r.mu.acted, r.mu.index, r.mu.changed = v.Seq, index, make(chan struct{})
}

// set installs the record of a newer state.
func (r *reservations) set(v *fsmpr.Volume, index uint64) {
	if v == nil {
		v = noReservations
	}
	r.cur.Store(v)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.index = index
	if r.mu.acted != v.Seq {
		r.wake()
	}
	r.broadcast()
}

// broadcast wakes who waits for a change of what mu guards; mu is held.
func (r *reservations) broadcast() {
	close(r.mu.changed)
	r.mu.changed = make(chan struct{})
}

// enforce brings this process up to the record, until it is.
func (r *reservations) enforce(ctx context.Context) {
	for {
		v := r.cur.Load()
		r.mu.Lock()
		from := r.mu.acted
		if from == v.Seq {
			r.mu.busy = false
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		res, lost := v.Since(from)
		if from > v.Seq { // the record was begun anew
			res, lost = pr.Result{}, true
		}
		if lost {
			// Whom to tell is not known any more: who logs in again is told that all may
			// have changed.
			r.log.Warn("more reservation changes were skipped than the record keeps: sessions are reset", zap.String("volume", r.volume))
			r.forget()
		}
		for {
			dctx, cancel := context.WithTimeout(ctx, cutRetry)
			err := r.act(dctx, r.volume, res)
			cancel()
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				r.mu.Lock()
				r.mu.busy = false
				r.mu.Unlock()
				return
			}
			r.log.Error("a reservation is not in force yet", zap.String("volume", r.volume), zap.Error(err))
			res.Notify = nil // they are told
		}
		r.mu.Lock()
		r.mu.acted = v.Seq
		r.broadcast()
		r.mu.Unlock()
	}
}

// due takes the enforcer's place, if there is something to enforce.
func (r *reservations) due() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.busy || r.mu.acted == r.cur.Load().Seq {
		return false
	}
	r.mu.busy = true
	return true
}

// lossWait bounds how long the end of a session waits for its RESERVE to be
// released; what is not done then is done by tidy.
const lossWait = 2 * time.Second

// Apply implements target.Reservations.
func (r *reservations) Apply(ctx context.Context, q pr.Request) (pr.Result, error) {
	v := r.cur.Load()
	body := changeBody{Request: &q}
	switch q.Kind {
	case pr.KindNexusLoss:
		if v.Legacy == nil || *v.Legacy != q.Nexus {
			return pr.Result{}, nil // and if one of its requests is under way yet: tidy
		}
		body.LegacySeq = v.LegacySeq
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, lossWait)
		defer cancel()
	case pr.KindReset:
		if v.Legacy == nil {
			return pr.Result{}, nil
		}
	case pr.KindPurge:
		// The log does that for every volume when it records Fenced. A cut must not wait
		// for a quorum, and nobody else may use what the victim reserved before that.
		return pr.Result{}, nil
	}
	return r.change(ctx, "pr.change", body)
}

var (
	errNotLeased  = errors.New("the node lease ended")
	errSuperseded = errors.New("this copy is not the primary any more")
)

// change has one request decided and its consequences done.
func (r *reservations) change(ctx context.Context, kind string, body changeBody) (pr.Result, error) {
	select {
	case <-r.turn:
	case <-ctx.Done():
		return pr.Result{}, fmt.Errorf("%w: %w", target.ErrNotReady, ctx.Err())
	case <-r.over:
		return pr.Result{}, fmt.Errorf("%w: the worker is ending", target.ErrNotReady)
	}
	defer func() { r.turn <- struct{}{} }()
	role := r.gate.role.Load()
	if !role.primary {
		return pr.Result{}, target.ErrStandby
	}
	body.Volume, body.Epoch = r.volume, role.epoch

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() { r.watch(ctx, cancel) })
	reply, err := r.ask(ctx, kind, body)
	var refused *link.RefusedError
	switch {
	case err == nil:
	case errors.As(err, &refused):
		// Decided by nobody: the volume's epoch or primary is another, or this control
		// does not know the request.
		r.log.Warn("control refused", zap.String("request", kind), zap.String("volume", r.volume), zap.Error(err))
		return pr.Result{}, fmt.Errorf("%w: %w", target.ErrNotReady, err)
	case errors.Is(err, link.ErrNotSent):
		return pr.Result{}, fmt.Errorf("%w: %w", target.ErrNotReady, err)
	default:
		r.mu.Lock()
		r.mu.doubt = true
		r.mu.Unlock()
		return pr.Result{}, errors.Join(err, context.Cause(ctx))
	}
	if fault.Off(fault.ReserveAppliedFirst) {
		return pr.Result{}, nil
	}
	for {
		v := r.cur.Load()
		r.mu.Lock()
		index, acted, next := r.mu.index, r.mu.acted, r.mu.changed
		r.mu.Unlock()
		decided := v.Last.Worker == r.worker() && v.Last.Seq == reply.Seq
		switch {
		case decided && acted >= v.Last.At:
			r.mu.Lock()
			r.mu.doubt = false // what was given up before is void now
			r.mu.Unlock()
			// In force; but who may not serve any more says nothing (SAFETY r1).
			if r.gate.node.State() != "serving" && !fault.Off(fault.ReserveLeased) {
				return pr.Result{}, errNotLeased
			}
			return v.Last.Outcome.Result(), nil
		case !decided && index >= reply.Index && r.cur.Load() == v:
			return pr.Result{}, fmt.Errorf("volume %s: the log at %d does not show request %d that it decided at %d", r.volume, index, reply.Seq, reply.Index)
		}
		select {
		case <-next:
		case <-ctx.Done():
			return pr.Result{}, errors.Join(ctx.Err(), context.Cause(ctx))
		}
	}
}

// watch gives a request up when it may not be answered any more: the node lease
// ended, the role changed, or this process ends.
func (r *reservations) watch(ctx context.Context, giveUp context.CancelCauseFunc) {
	epoch := r.gate.role.Load().epoch
	for {
		left := r.gate.node.LeaseEnd().Sub(r.clock.Now())
		switch role := r.gate.role.Load(); {
		case left <= 0 && !fault.Off(fault.ReserveLeased), r.gate.node.State() == "shut":
			giveUp(errNotLeased)
			return
		case !role.primary || role.epoch != epoch:
			giveUp(errSuperseded)
			return
		}
		t := time.NewTimer(min(max(left, time.Millisecond), 100*time.Millisecond))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		case <-r.over:
			t.Stop()
			giveUp(errors.New("the worker is ending"))
			return
		}
	}
}

// tidy does what nobody waits for: it makes a request void that was given up, and
// ends the RESERVE of a nexus without a session. alive tells whether a nexus may
// still have one. It runs in the worker's loop and does not wait.
func (r *reservations) tidy(ctx context.Context, wg *sync.WaitGroup, alive func(pr.Nexus) bool) {
	v := r.cur.Load()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.settles || !r.gate.role.Load().primary || r.gate.node.State() != "serving" {
		return
	}
	var kind string
	var body changeBody
	switch {
	case r.mu.doubt:
		kind = "pr.barrier"
	case v.Legacy != nil && !alive(*v.Legacy):
		kind = "pr.change"
		body = changeBody{Request: &pr.Request{Kind: pr.KindNexusLoss, Nexus: *v.Legacy}, LegacySeq: v.LegacySeq}
	default:
		return
	}
	r.mu.settles = true
	wg.Go(func() {
		_, err := r.change(ctx, kind, body)
		r.mu.Lock()
		r.mu.settles = false
		r.mu.Unlock()
		if err != nil && ctx.Err() == nil {
			r.log.Warn("reservations are not tidy yet", zap.String("volume", r.volume), zap.String("request", kind), zap.Error(err))
		}
	})
}

// reserved are the reservations of all volumes that this node has a copy of.
type reserved struct {
	sync.Mutex
	list  map[string]*reservations // by volume
	state fsmpr.State              // the last one from control
	index uint64
	kick  chan struct{}
}

// install takes a newer state in. It does not wait: commands are judged by it from
// here on; the rest is the enforcer's.
func (s *reserved) install(state *fsmpr.State, index uint64) {
	s.Lock()
	defer s.Unlock()
	if state != nil {
		s.state = *state
	}
	s.index = index
	for id, r := range s.list {
		r.set(s.state.Volumes[id], index)
	}
}

// reservationsOf gives those of a volume; they start from the newest state, with
// nothing to tell: nobody has seen the volume here yet.
func (w *worker) reservationsOf(id string, gate *VolumeGate) *reservations {
	w.res.Lock()
	defer w.res.Unlock()
	if r := w.res.list[id]; r != nil {
		return r
	}
	r := &reservations{volume: id, gate: gate, clock: w.clock, log: w.log, act: w.srv.Enforce, ask: w.link.Request, worker: w.link.Incarnation, over: w.over}
	r.forget = func() { w.resetVolume(id) }
	r.wake = func() {
		select {
		case w.res.kick <- struct{}{}:
		default:
		}
	}
	r.start(w.res.state.Volumes[id], w.res.index)
	if w.res.list == nil {
		w.res.list = map[string]*reservations{}
	}
	w.res.list[id] = r
	return r
}

func (w *worker) forgetReservations(id string) {
	w.res.Lock()
	defer w.res.Unlock()
	delete(w.res.list, id)
}

// resetVolume has the worker's loop reset the sessions of the targets that show a
// volume. The enforcer must not wait for them: their commands may wait for it.
func (w *worker) resetVolume(id string) {
	w.mu.Lock()
	w.mu.forget = append(w.mu.forget, id)
	w.mu.Unlock()
	w.poke()
}

// enforceLoop does what reservation changes ask for, until ctx ends: each volume by
// itself, so that a stuck disk holds up no other.
func (w *worker) enforceLoop(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-w.res.kick:
		case <-ctx.Done():
			return
		}
		w.res.Lock()
		for _, r := range w.res.list {
			if r.due() {
				wg.Go(func() { r.enforce(ctx) })
			}
		}
		w.res.Unlock()
	}
}

// tidyReservations runs in the worker's loop.
func (w *worker) tidyReservations(ctx context.Context, want *desired) {
	w.res.Lock()
	rs := make([]*reservations, 0, len(w.res.list))
	for _, r := range w.res.list {
		rs = append(rs, r)
	}
	w.res.Unlock()
	for _, r := range rs {
		r.tidy(ctx, &w.wg, func(n pr.Nexus) bool { return w.nexusLives(want, n) })
	}
}

// nexusLives tells whether a nexus may have a session: through our own ports we
// know; through another node's as long as that node is a member.
func (w *worker) nexusLives(want *desired, n pr.Nexus) bool {
	if int(n.Port) == want.index {
		return w.srv.Nexus(n)
	}
	for _, m := range want.members.Members {
		if m.Index == int(n.Port) {
			return m.Active()
		}
	}
	return false
}
