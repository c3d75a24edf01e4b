// Package storage is the storage worker of a node: the iSCSI target and the
// local copies of volumes. It obeys what control hands it (package link): it
// compares the desired state with what is and acts on the difference, so that a
// lost, repeated or late message changes nothing. Its right to serve is the node
// lease (NodeGate) and its role for each volume (VolumeGate).
//
// Only cmd/clusterd imports it.
package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/sched"
	"github.com/blockhouse-san/blockhouse/internal/seal"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	fsmpr "github.com/blockhouse-san/blockhouse/membership/fsm/pr"
	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/target"
)

// Run is the worker process. It returns when ctx ends or control says so, after
// every command in flight has ended and every store is closed.
func Run(ctx context.Context, cfg config.Config, log *zap.Logger) error {
	if err := sched.Normal(); err != nil {
		log.Warn("cannot return to normal priority", zap.Error(err))
	}
	if err := os.MkdirAll(cfg.VolumeDir(), 0o700); err != nil {
		return fmt.Errorf("storage worker: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	TuneRuntime()
	clock := env.Real{}
	w := &worker{cfg: cfg, log: log.Named("storage"), clock: clock, stop: cancel, gate: NewNodeGate(clock, cfg.Times().TOrphan),
		vols: map[string]*volume{}, erased: map[string]bool{}, kick: make(chan struct{}, 1), incarnation: uuid.NewString(), cuts: map[string]*cutOf{}}
	w.over, w.res.kick = ctx.Done(), make(chan struct{}, 1)
	var err error
	if w.promised, err = loadPromises(cfg.DataDir); err != nil {
		return err
	}
	w.srv, err = target.New(target.Options{Logger: log.Named("target"), NopInterval: cfg.ISCSI.NopInterval.D(), NopTimeout: cfg.ISCSI.NopTimeout.D(),
		StallLimit: stallLimit, OnEvent: w.onEvent})
	if err != nil {
		return err
	}
	return link.Run(ctx, cfg.RunDir, link.Storage, w, w.work, log)
}

// stallLimit: a worker that did not run for longer resets every connection
// before it reads on (SAFETY §2).
const stallLimit = time.Second

// retryPortal is how often a portal that could not be opened is tried again.
const retryPortal = time.Second

// desired is a state as control sent it, decoded.
type desired struct {
	stamp   link.Stamp
	node    string
	index   int
	inc     uint64
	members members.State
	storage fsmstorage.State
	key     seal.Key // opens the accounts' secrets

	rawMembers, rawStorage json.RawMessage // what members and storage were read from
}

// volume is a local copy.
type volume struct {
	uuid string
	dev  block.Device // nil: not open
	gate *VolumeGate
	err  error // why it cannot be served
	// acted is the epoch that this process may act under: it made the store, or
	// its own compare-and-set raised the epoch (SAFETY r6: a worker never acts
	// under an epoch that another process acted under).
	acted uint64
	// cas is the request id of our raise of the epoch, once asked for.
	cas     string
	opening chan opened // an opening under way beside the loop
	retryAt env.Boot    // of the next one
	asking  string      // kind and epoch of the request under way
	serving bool
}

type worker struct {
	cfg   config.Config
	log   *zap.Logger
	clock env.Clock
	gate  *NodeGate
	stop  context.CancelFunc
	kick  chan struct{}
	// incarnation is of this process, for numbers and events: they begin with it.
	incarnation string
	events      eventLog
	link        *link.Server // set before the target serves anything
	srv         *target.Server
	wg          sync.WaitGroup // requests to control

	mu struct {
		sync.Mutex
		want     *desired
		waiting  bool   // a lease came whose minimum we have not reached
		reset    bool   // the node's incarnation changed: every session goes
		applied  uint64 // index of the state that was acted on
		vols     []volumeReport
		portals  []api.Portal
		err      string   // of the target's configuration
		stateErr string   // of control's state
		again    []string // requests that were refused: volume uuids
		scrub    []link.Scrub
		kill     []uint16 // sessions to end, by TSIH
		reapply  bool     // the target holds cuts that the configuration does not name
		forget   []string // volumes whose sessions are to be reset
	}

	// Of the work goroutine alone.
	vols    map[string]*volume // by uuid
	erased  map[string]bool    // removed volumes whose store is gone
	applied string             // the configuration last given to the server
	failed  bool               // it could not be applied
	lastErr error
	told    string // what was last said of it
	retryAt env.Boot

	res             reserved
	rawReservations []byte          // of the last state; of OnState alone
	over            <-chan struct{} // closed when this process is to end

	complained map[string]string // what was logged of accounts, by target
	cuts       map[string]*cutOf // of evicted nodes, by name

	promiseMu sync.Mutex
	promised  map[string]uint64 // cuts that are on disk
}

// OnKill ends a session that an administrator does not want.
func (w *worker) OnKill(k link.Kill) {
	w.mu.Lock()
	w.mu.kill = append(w.mu.kill, k.TSIH)
	w.mu.Unlock()
	w.poke()
}

// volumeReport is what control is told of a local copy.
type volumeReport struct {
	UUID   string        `json:"uuid"`
	State  string        `json:"state"` // serving, standby, missing, error, opening, failed
	Error  string        `json:"error,omitempty"`
	Checks *checksReport `json:"checks,omitempty"` // of its checksums
}

// detail is link.Report.Detail of this worker.
type detail struct {
	Volumes  []volumeReport `json:"volumes"`
	Sessions []api.Session  `json:"sessions"`
	Portals  []api.Portal   `json:"portals"`
	Applied  uint64         `json:"applied"` // index of the state that was acted on
	Error    string         `json:"error,omitempty"`
	Events   uint64         `json:"events"` // number of the newest event; control fetches them when it rises
}

func (w *worker) OnState(s link.State) {
	d := &desired{stamp: s.Stamp, node: s.Node, index: s.Index, inc: s.Incarnation, key: s.SealingKey, rawMembers: s.Members, rawStorage: s.Storage}
	w.mu.Lock()
	prev := w.mu.want
	w.mu.Unlock()
	// What did not change is not read again; nobody writes to it.
	var err error
	if prev != nil && bytes.Equal(prev.rawMembers, s.Members) {
		d.members = prev.members
	} else {
		err = json.Unmarshal(s.Members, &d.members)
	}
	if prev != nil && bytes.Equal(prev.rawStorage, s.Storage) {
		d.storage = prev.storage
	} else {
		err = errors.Join(err, json.Unmarshal(s.Storage, &d.storage))
	}
	var res *fsmpr.State
	if prev == nil || !bytes.Equal(w.rawReservations, s.Reservations) {
		res = new(fsmpr.State)
		err = errors.Join(err, json.Unmarshal(s.Reservations, res))
	}
	if err != nil {
		// Control is of another version; what we serve now stays as it is.
		w.log.Error("cannot read the state from control", zap.Error(err))
		w.mu.Lock()
		w.mu.stateErr = err.Error()
		w.mu.Unlock()
		return
	}
	w.rawReservations = s.Reservations
	// Before the roles: who becomes the primary by this state enforces its reservations.
	w.res.install(res, s.Stamp.Index)
	w.mu.Lock()
	w.mu.want, w.mu.stateErr = d, ""
	w.mu.Unlock()
	if s.Incarnation == 0 {
		w.gate.Shut() // evicted, or no member: nothing of ours may be served
	}
	w.poke()
}

func (w *worker) OnLease(l link.Lease, ready bool) {
	w.mu.Lock()
	want := w.mu.want
	w.mu.waiting = !ready
	w.mu.Unlock()
	if !ready || want == nil || want.inc == 0 || w.behindPromise(want) {
		return
	}
	if w.gate.Extend(l.End, want.inc) {
		w.mu.Lock()
		w.mu.reset = true
		w.mu.Unlock()
	}
	w.poke()
}

func (w *worker) OnShutdown() { w.stop() }

func (w *worker) Report(r *link.Report) {
	w.mu.Lock()
	d := detail{Volumes: slices.Clone(w.mu.vols), Sessions: []api.Session{}, Portals: slices.Clone(w.mu.portals), Applied: w.mu.applied, Events: w.events.seq(), Error: strings.Trim(w.mu.stateErr+"; "+w.mu.err, "; ")}
	waiting, node := w.mu.waiting, ""
	if w.mu.want != nil {
		node = w.mu.want.node
	}
	w.mu.Unlock()
	r.Gate, r.LeaseEnd, r.GateOpens = w.gate.State(), w.gate.LeaseEnd(), uint64(w.gate.Incarnation())
	if r.Gate == "shut" && waiting {
		r.Gate = "waiting"
	}
	for _, s := range w.srv.Sessions() {
		d.Sessions = append(d.Sessions, sessionOf(node, s))
	}
	if b, err := json.Marshal(d); err == nil {
		r.Detail = b
	}
}

func (w *worker) poke() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// work is the worker's loop.
func (w *worker) work(ctx context.Context, l *link.Server) error {
	w.link = l
	defer func() {
		for _, v := range w.vols {
			if v.opening != nil { // it has ended: the wait below came first
				v.dev = (<-v.opening).dev
			}
			w.close(v)
		}
	}()
	defer w.wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.wg.Go(func() { w.enforceLoop(ctx) })
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last string
	for {
		select {
		case <-ctx.Done():
			w.gate.Shut()
			return w.srv.Close()
		case <-timer.C:
		case <-w.kick:
		}
		timer.Reset(w.gate.Next())
		w.mu.Lock()
		reset := w.mu.reset
		w.mu.reset = false
		kill := w.mu.kill
		w.mu.kill = nil
		scrub := w.mu.scrub
		w.mu.scrub = nil
		want := w.mu.want
		w.mu.Unlock()
		if w.gate.Tick() {
			w.log.Warn("the node lease and the orphan time are over: no session goes on")
			reset = true
		}
		if reset {
			w.srv.ResetSessions(func(target.SessionInfo) bool { return true })
		}
		state := w.gate.State()
		if len(kill) > 0 {
			n := w.srv.ResetSessions(func(s target.SessionInfo) bool { return slices.Contains(kill, s.TSIH) })
			w.log.Info("ended sessions as control asked", zap.Uint16s("tsih", kill), zap.Int("sessions", n))
			l.Changed()
		}
		w.scrubs(scrub)
		if want != nil {
			w.reconcile(ctx, want, state)
		}
		if state != last {
			w.log.Info("gate", zap.String("state", state))
			last = state
			l.Changed()
		}
	}
}
