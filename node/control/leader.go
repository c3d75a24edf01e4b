package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/fence/drive"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/membership/detect"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/membership/raftlog"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// leaderTable is what the leader remembers of the members' renewals, with a lock
// around the pure table.
type leaderTable struct {
	clock env.Clock
	mu    sync.Mutex
	t     *detect.Table
	last  map[string]renew
}

func newLeaderTable(cfg detect.Config, clock env.Clock) *leaderTable {
	return &leaderTable{clock: clock, t: detect.New(cfg), last: map[string]renew{}}
}

// heard notes a renewal that is being granted. It returns what was said of the
// copies of volumes before.
func (t *leaderTable) heard(r renew) (before []volumeReport) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.t.Heard(r.Node, r.Incarnation, t.clock.Now())
	before = t.last[r.Node].Volumes
	t.last[r.Node] = r
	return before
}

func (t *leaderTable) lead() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.t.Lead(t.clock.Now())
	clear(t.last)
}

func (t *leaderTable) tick() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.t.Tick(t.clock.Now())
}

func (t *leaderTable) lost(ms []detect.Member) []detect.Lost {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.t.Lost(ms, t.clock.Now())
}

func (t *leaderTable) left(m detect.Member) (time.Duration, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.t.Left(m, t.clock.Now()), t.t.Renewed(m)
}

// applied is the FSM index that a member said it has, and whether it renews.
func (t *leaderTable) applied(m detect.Member) (uint64, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.last[m.Node]
	return r.Applied, ok && t.t.Renewed(m) && t.t.Left(m, t.clock.Now()) > 0
}

// leases gives what each node last said of itself. Left and Renewed are the
// caller's to fill in, but Left is set for who renewed within its lease.
func (t *leaderTable) leases() map[string]leasePicture {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := map[string]leasePicture{}
	now := t.clock.Now()
	for n, r := range t.last {
		out[n] = leasePicture{Workers: maps.Clone(r.Workers), Volumes: slices.Clone(r.Volumes), Sessions: slices.Clone(r.Sessions),
			Left: t.t.Left(detect.Member{Node: n, Incarnation: r.Incarnation}, now), Renewed: true}
	}
	return out
}

// lead does the leader's work whenever this node leads.
func (m *member) lead(ctx context.Context) {
	for {
		l, next := m.raft.Leadership()
		if l.Self {
			lctx, cancel := context.WithCancel(ctx)
			done := make(chan struct{})
			go func() { defer close(done); m.reign(lctx) }()
			select {
			case <-next:
			case <-ctx.Done():
			}
			cancel()
			<-done
		} else {
			select {
			case <-next:
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// reign is one leadership.
func (m *member) reign(ctx context.Context) {
	// Until the barrier the state here may lag behind what was acknowledged.
	for m.raft.Barrier(ctx) != nil {
		if m.d.clock.Sleep(ctx, 20*time.Millisecond) != nil {
			return
		}
	}
	m.table.lead()
	m.log.Info("this node leads", zap.Uint64("term", m.raft.Stats().Term))
	m.d.event("leader", "node "+m.identity().Node+" leads", nil)
	if err := m.found(ctx); err != nil {
		m.log.Error("cannot record the founding of the cluster", zap.Error(err))
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var plan voterPlan
	var open drive.Leader
	for n := 0; ; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if late := m.table.tick(); late > 0 {
			m.log.Warn("this leader was not scheduled in time and accuses nobody for a while", zap.Duration("late", late))
		}
		m.evictLost(ctx)
		m.pursue(ctx, &open)
		if n%10 == 0 {
			m.voters(ctx, &plan)
		}
	}
}

// active lists the members that must hold leases.
func (m *member) active() []detect.Member {
	var out []detect.Member
	m.cluster.Read(func(v machines.View) {
		for _, r := range v.Members.State().List() {
			if r.Active() {
				out = append(out, detect.Member{Node: r.Name, Incarnation: r.Incarnation, BootID: r.BootID})
			}
		}
	})
	return out
}

// evictLost ends the membership of whose lease is over. Leadership is proven
// before: a deposed leader evicts nobody.
func (m *member) evictLost(ctx context.Context) {
	for _, l := range m.table.lost(m.active()) {
		if l.Node == m.identity().Node {
			continue // our own renewals go through the same stream; if they fail, others will see
		}
		vctx, cancel := context.WithTimeout(ctx, m.d.cfg.Times().TTL)
		err := m.raft.VerifyLeader(vctx)
		if err == nil {
			_, err = m.evict(vctx, l.Member, l.Reason)
		}
		cancel()
		if err != nil && ctx.Err() == nil {
			m.log.Warn("cannot evict", zap.String("victim", l.Node), zap.Error(err))
		}
	}
}

func (m *member) evict(ctx context.Context, v detect.Member, reason string) (fsm.Result, error) {
	res, err := m.apply(ctx, members.Evict{Now: m.d.clock.Wall(), Node: v.Node, Incarnation: v.Incarnation, BootID: v.BootID,
		Reason: reason, By: m.identity().Node})
	if err == nil {
		m.log.Warn("evicted", zap.String("victim", v.Node), zap.Uint64("incarnation", v.Incarnation), zap.String("reason", reason), zap.Uint64("index", res.Index))
		m.d.event("node.lost", fmt.Sprintf("node %s is lost: %s", v.Node, reason), map[string]any{"node": v.Node, "incarnation": v.Incarnation, "index": res.Index})
	}
	return res, err
}

// voterPlan keeps since when each node has held its lease without a break.
type voterPlan struct {
	since map[string]env.Boot
}

// voters moves the Raft configuration one step towards what the members are.
func (m *member) voters(ctx context.Context, plan *voterPlan) {
	if plan.since == nil {
		plan.since = map[string]env.Boot{}
	}
	now := m.d.clock.Now()
	in := raftlog.VoterInput{Config: m.raft.Configuration(), Health: map[string]raftlog.Health{},
		Leader: m.identity().Node, Index: m.cluster.Index(),
		// A node that has held its lease for one more lease is not flapping.
		Policy: raftlog.VoterPolicy{Stabilise: m.d.cfg.Times().TTL}}
	m.cluster.Read(func(v machines.View) { in.Members = v.Members.State().List() })
	for _, r := range in.Members {
		applied, alive := m.table.applied(detect.Member{Node: r.Name, Incarnation: r.Incarnation, BootID: r.BootID})
		if !alive {
			delete(plan.since, r.Name)
			continue
		}
		if _, ok := plan.since[r.Name]; !ok {
			plan.since[r.Name] = now
		}
		in.Health[r.Name] = raftlog.Health{Alive: true, Stable: now.Sub(plan.since[r.Name]), Applied: applied}
	}
	steps := raftlog.PlanVoters(in)
	if len(steps) == 0 {
		return
	}
	c := steps[0] // one at a time; the next round sees what came of it
	cctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := m.change(cctx, c); err != nil {
		if ctx.Err() == nil {
			m.log.Warn("cannot change who votes", zap.String("op", string(c.Op)), zap.String("peer", c.ID), zap.Error(err))
		}
		return
	}
	m.log.Info("changed who votes", zap.String("op", string(c.Op)), zap.String("peer", c.ID), zap.String("why", c.Why))
	m.d.event("voters", fmt.Sprintf("%s %s: %s", c.Op, c.ID, c.Why), map[string]any{"node": c.ID})
}

func (m *member) change(ctx context.Context, c raftlog.Change) error {
	switch c.Op {
	case raftlog.OpAddNonvoter:
		return m.raft.AddNonvoter(ctx, c.ID, c.Address)
	case raftlog.OpAddVoter:
		return m.raft.AddVoter(ctx, c.ID, c.Address)
	case raftlog.OpDemote:
		return m.raft.Demote(ctx, c.ID)
	case raftlog.OpRemove:
		return m.raft.Remove(ctx, c.ID)
	case raftlog.OpTransfer:
		return m.raft.LeadershipTransfer(ctx, c.ID)
	}
	return fmt.Errorf("unknown step %q", c.Op)
}

// admission is a node's request to be a member again, or for the first time.
type admission struct {
	Node   string `json:"node"`
	BootID string `json:"boot_id"`
	Format uint32 `json:"format"`
	Proof  proof  `json:"proof"`
	// ProofError says why there is none.
	ProofError string `json:"proof_error,omitempty"`
}

type admitted struct {
	Incarnation uint64 `json:"incarnation"`
	Index       uint64 `json:"index"`
}

// admit is the leader's answer. A node whose kernel was booted anew, or that
// proved to be clean, is proof of its own fence: what was evicted is gone.
func (m *member) admit(r *http.Request) (any, error) {
	q, err := decode[admission](r)
	if err != nil {
		return nil, err
	}
	if c := callerOf(r); !c.local && c.id.Name != q.Node && r.Header.Get(hdrForwarded) == "" {
		return nil, api.Errorf(api.CodeDenied, "", "%v asks for %s", c, q.Node)
	}
	m.admitMu.Lock() // two requests of one node must not interleave their steps
	defer m.admitMu.Unlock()
	ctx := r.Context()
	rec, _, known := m.record(q.Node)
	if !known {
		return nil, api.Errorf(api.CodeNotFound, "clusteradm join TOKEN@HOST:PORT", "%s is no member: it was removed, or never joined", q.Node)
	}
	clean := ""
	if q.ProofError == "" && len(q.Proof.Found) == 0 && len(q.Proof.Checked) > 0 {
		clean = "proved clean: no " + strings.Join(q.Proof.Checked, ", no ")
	}
	dm := detect.Member{Node: rec.Name, Incarnation: rec.Incarnation, BootID: rec.BootID}
	if rec.Active() {
		if rec.BootID == q.BootID {
			return admitted{rec.Incarnation, m.cluster.Index()}, nil // it has only forgotten its number
		}
		if _, err := m.evict(ctx, dm, "its kernel was booted anew: boot id "+q.BootID); err != nil {
			return nil, err
		}
		if rec, _, known = m.record(q.Node); !known {
			return nil, api.Errorf(api.CodeNotFound, "", "%s was removed meanwhile", q.Node)
		}
	}
	if left := m.heldOut(q.Node); left > 0 {
		return nil, api.Errorf(api.CodeRefused, "clusteradm fence history",
			"%s was evicted too often and is held out for %v more: a node that flaps costs everybody a recovery each time", q.Node, left.Round(time.Second))
	}
	if rec.Status == members.Evicted {
		ev := fencing.Evidence{Method: fencing.Rejoin, BootID: q.BootID, Output: "kernel boot " + rec.BootID + " is gone, the node runs " + q.BootID}
		if rec.BootID == q.BootID {
			if clean == "" {
				return nil, api.Errorf(api.CodeRefused, "mend that on "+q.Node+", or reboot it",
					"%s was evicted and its kernel still holds: %s", q.Node, strings.Join(append(q.Proof.Found, q.ProofError), "; "))
			}
			ev.Method, ev.Output = fencing.Clean, clean
		}
		if err := m.fenced(ctx, q.Node, ev); err != nil {
			return nil, err
		}
	}
	res, err := m.apply(ctx, members.Admit{Now: m.d.clock.Wall(), Node: q.Node, From: rec.Incarnation, BootID: q.BootID, Format: q.Format, Clean: clean})
	nr, err := fsmValue[members.Record](res, err)
	if err != nil {
		return nil, err
	}
	m.log.Info("admitted", zap.String("peer", q.Node), zap.Uint64("incarnation", nr.Incarnation))
	m.d.event("node.admitted", fmt.Sprintf("node %s is a member in incarnation %d", q.Node, nr.Incarnation), map[string]any{"node": q.Node, "incarnation": nr.Incarnation})
	return admitted{nr.Incarnation, res.Index}, nil
}

func (m *member) fenced(ctx context.Context, node string, ev fencing.Evidence) error {
	var epoch uint64
	m.cluster.Read(func(v machines.View) {
		for _, o := range v.Fencing.OpenFences() {
			if o.Node == node {
				epoch = o.Epoch
			}
		}
		ev.Pending = drive.Pending(v, node)
	})
	if epoch == 0 {
		return nil
	}
	_, err := m.apply(ctx, fencing.Fenced{Now: m.d.clock.Wall(), Node: node, Epoch: epoch, Evidence: ev})
	if err == nil {
		m.d.event("node.fenced", "node "+node+" is fenced: "+ev.Output, map[string]any{"node": node, "epoch": epoch})
	}
	return err
}

// heldOut is how long a flapping node still has to wait (SAFETY §3 "Order").
func (m *member) heldOut(node string) time.Duration {
	var h []fencing.Record
	m.cluster.Read(func(v machines.View) { h, _ = v.Fencing.History(0, 0) })
	return holdOut(h, node, m.d.clock.Wall())
}

// A node may be evicted flapFree times in flapWindow and comes back at once; after
// each further eviction it waits, 10 s and then twice as long each time.
const (
	flapFree   = 2
	flapWindow = 10 * time.Minute
	flapWait   = 10 * time.Second
	flapMax    = 10 * time.Minute
)

// holdOut computes the wait from the history. Pure. Wall time decides only when
// a node is let in, never whether one is dead.
func holdOut(history []fencing.Record, node string, now time.Time) time.Duration {
	var n int
	var last time.Time
	for _, r := range history {
		if r.Node == node && r.Event == fencing.EventEvicted && now.Sub(r.At) < flapWindow {
			n++
			last = r.At
		}
	}
	if n <= flapFree {
		return 0
	}
	wait := flapMax
	if shift := n - flapFree - 1; shift < 6 {
		wait = flapWait << shift
	}
	return max(0, last.Add(wait).Sub(now))
}

// storageRequest is a storage worker's change, handed over by its control.
func (m *member) storageRequest(r *http.Request) (any, error) {
	q, err := decode[link.Request](r)
	if err != nil {
		return nil, err
	}
	c := callerOf(r)
	if c.local || c.id.Role != "node" {
		return nil, api.Errorf(api.CodeDenied, "", "only nodes report on stores")
	}
	idx, err := m.applyStorageRequest(r.Context(), c.id.Name, q)
	if err != nil {
		return nil, err
	}
	return api.Done{APIVersion: api.Version, Index: idx}, nil
}

// volumeAt names a volume at an epoch.
type volumeAt struct {
	UUID    string `json:"uuid"`
	Epoch   uint64 `json:"epoch"`
	Request string `json:"request,omitempty"` // of a raise: whose it is (SAFETY r3/r8)
}

func (m *member) applyStorageRequest(ctx context.Context, from string, q link.Request) (uint64, error) {
	if q.Kind == "cut.ack" {
		return m.applyCutAck(ctx, from, q.Body)
	}
	if q.Kind == "pr.change" || q.Kind == "pr.barrier" {
		return m.applyReserve(ctx, from, q)
	}
	var at volumeAt
	if err := json.Unmarshal(q.Body, &at); err != nil {
		return 0, api.Errorf(api.CodeUsage, "", "read %s: %v", q.Kind, err)
	}
	var v storage.Volume
	var ok bool
	m.cluster.Read(func(w machines.View) { v, ok = w.Storage.Volume(at.UUID) })
	if ok && v.Config.Primary != from {
		return 0, api.Errorf(api.CodeConflict, "", "%s speaks for volume %s, whose primary is %s", from, v.Name, v.Config.Primary)
	}
	var res fsm.Result
	var err error
	switch q.Kind {
	case "volume.ready":
		res, err = m.apply(ctx, storage.VolumeReady{UUID: at.UUID, Epoch: at.Epoch})
	case "volume.raise":
		// Another process than the one that acted under Epoch is the primary's
		// worker now: same members, next epoch (SAFETY r6).
		if !ok {
			return 0, api.Errorf(api.CodeNotFound, "", "no volume %s", at.UUID)
		}
		cfg := v.Config
		cfg.Epoch = at.Epoch + 1
		res, err = m.apply(ctx, storage.VolumeCAS{Request: at.Request, Epoch: at.Epoch, Config: cfg})
	case "volume.removed":
		res, err = m.apply(ctx, storage.VolumeRemoved{UUID: at.UUID, Epoch: at.Epoch})
	default:
		return 0, api.Errorf(api.CodeUsage, "", "unknown request %q of a worker", q.Kind)
	}
	return res.Index, err
}

// found records the first member, once, also when the founder died between
// making the log and this.
func (m *member) found(ctx context.Context) error {
	id := m.identity()
	if !id.Founding {
		return nil
	}
	_, err := m.apply(ctx, members.Bootstrap{Cluster: id.Cluster, UUID: id.UUID, Node: m.d.newNode()})
	if err != nil && !errors.Is(err, fsm.ErrExists) {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.mu.id
	next.Founding = false
	if err := next.save(m.d.cfg.DataDir); err != nil {
		return err
	}
	m.mu.id = next
	return nil
}
