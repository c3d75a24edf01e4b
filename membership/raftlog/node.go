// Package raftlog runs the cluster's replicated log: hashicorp/raft with its
// log in boltdb, its snapshots in files and its transport on the cluster port,
// and the policy of who votes. What the log means is package fsm's.
//
// It starts no election of policy: node/ applies what PlanVoters proposes,
// transfers leadership before a planned leave, and reads with ReadIndex and
// WaitApplied.
//
// Cluster row: node/ imports it.
package raftlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
)

// Profile names a set of timings.
type Profile string

// The profiles, by heartbeat and election timeout (facts/cluster.md §4.2: 200 ms
// needs raised priority in a process of its own).
const (
	Normal Profile = "normal" // 500 ms
	Fast   Profile = "fast"   // 200 ms
	WAN    Profile = "wan"    // 2 s
)

// Heartbeat is the heartbeat and election timeout; 0 for an unknown profile.
func (p Profile) Heartbeat() time.Duration {
	switch p {
	case Normal:
		return 500 * time.Millisecond
	case Fast:
		return 200 * time.Millisecond
	case WAN:
		return 2 * time.Second
	}
	return 0
}

// Config is what a Node is opened with.
type Config struct {
	Dir     string            // log, votes and snapshots; made if missing
	Name    string            // of this node: its raft id
	Address string            // host:port that peers dial; the mux's port
	Profile Profile           // "" = Normal
	Mux     *Mux              // cluster port; Open registers ALPNRaft, Close takes it away
	Cluster *machines.Cluster // state machine; one Node uses it at a time
	Log     *zap.Logger

	// Snapshots; zero values are raft's 8192 entries, 120 s and 10240 entries
	// kept behind a snapshot.
	SnapshotThreshold uint64
	SnapshotInterval  time.Duration
	TrailingLogs      uint64
}

// Leadership is who leads, as this node sees it.
type Leadership struct {
	ID, Addr string // "" = no leader known
	Self     bool   // this node leads and its leader loop runs
	Term     uint64
}

// NotLeaderError is a call that only the leader can serve. With no leader known
// it is fsm.ErrNoQuorum.
type NotLeaderError struct {
	ID, Addr string // who leads; "" unknown
}

func (e *NotLeaderError) Error() string {
	if e.ID == "" {
		return "no leader is known: the cluster has no quorum or is electing; run clusteradm quorum show"
	}
	return fmt.Sprintf("this node does not lead, node %s at %s does", e.ID, e.Addr)
}

func (e *NotLeaderError) Unwrap() error {
	if e.ID == "" {
		return fsm.ErrNoQuorum
	}
	return nil
}

// ErrInDoubt is joined to the error of an Apply whose entry may or may not
// commit: leadership or patience ended first. Repeat with the same request id.
var ErrInDoubt = errors.New("outcome unknown")

// ErrClosed is a call on a closed node.
var ErrClosed = errors.New("raft node is closed")

// Node is this node's part in the replicated log.
type Node struct {
	cfg    Config
	log    *zap.Logger
	raft   *raft.Raft
	ready  atomic.Pointer[raft.Raft] // set once raft runs; the stream layer may dial before
	trans  *raft.NetworkTransport
	layer  *stream
	store  *raftboltdb.BoltStore
	cache  *raft.LogCache
	snaps  raft.SnapshotStore
	stop   chan struct{}
	wg     sync.WaitGroup
	notify chan bool
	// settled is the term in which this leader has committed an entry of its
	// own: before that, its commit index may lag behind what was acknowledged
	// (Raft dissertation §6.4).
	settled atomic.Uint64

	closeOnce sync.Once
	closeErr  error

	mu struct {
		sync.Mutex
		lead    Leadership
		changed chan struct{} // closed and replaced when lead changes
	}
}

// Open starts the node on what Dir holds. A fresh node stays quiet until
// Bootstrap or until a leader adds it.
func Open(cfg Config) (_ *Node, err error) {
	if cfg.Profile == "" {
		cfg.Profile = Normal
	}
	hb := cfg.Profile.Heartbeat()
	switch {
	case hb == 0:
		return nil, fmt.Errorf("open raft: profile %q; normal, fast or wan", cfg.Profile)
	case cfg.Name == "" || cfg.Address == "" || cfg.Dir == "" || cfg.Mux == nil || cfg.Cluster == nil || cfg.Log == nil:
		return nil, errors.New("open raft: dir, name, address, mux, cluster and log are needed")
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open raft: %w", err)
	}
	n := &Node{cfg: cfg, log: cfg.Log, stop: make(chan struct{}), notify: make(chan bool, 16)}
	n.mu.changed = make(chan struct{})
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()

	n.store, err = raftboltdb.New(raftboltdb.Options{
		Path: filepath.Join(cfg.Dir, "raft.db"),
		BoltOptions: &bbolt.Options{
			// One process holds the file; a second control must not wait long.
			Timeout: time.Second,
			// The freelist in the file would be rewritten with every append
			// (facts/cluster.md §6 row 26); it is rebuilt at open instead.
			NoFreelistSync: true,
			FreelistType:   bbolt.FreelistMapType,
		},
		MsgpackUseNewTimeFormat: true,
	})
	if err != nil {
		return nil, fmt.Errorf("open raft log %s: %w", filepath.Join(cfg.Dir, "raft.db"), err)
	}
	undo = append(undo, n.store.Close)
	if n.cache, err = raft.NewLogCache(512, n.store); err != nil {
		return nil, fmt.Errorf("open raft: %w", err)
	}
	hl := HCLog(cfg.Log, "raft")
	if n.snaps, err = raft.NewFileSnapshotStoreWithLogger(cfg.Dir, 2, hl.Named("snapshot")); err != nil {
		return nil, fmt.Errorf("open raft snapshots: %w", err)
	}
	n.layer = newStream(cfg.Mux, cfg.Address, n.expect)
	n.trans = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: n.layer, MaxPool: 3, Timeout: max(4*hb, 2*time.Second), Logger: hl.Named("transport"),
		MsgpackUseNewTimeFormat: true,
	})
	undo = append(undo, n.closeTransport)

	rc := raft.DefaultConfig()
	rc.LocalID = raft.ServerID(cfg.Name)
	rc.HeartbeatTimeout, rc.ElectionTimeout, rc.LeaderLeaseTimeout = hb, hb, hb
	rc.CommitTimeout = min(rc.CommitTimeout, hb/10)
	// A removed node stays up to say so; node/ handles it.
	rc.ShutdownOnRemove = false
	rc.NotifyCh = n.notify
	rc.Logger = hl
	rc.NoLegacyTelemetry = true
	if cfg.SnapshotThreshold > 0 {
		rc.SnapshotThreshold = cfg.SnapshotThreshold
	}
	if cfg.SnapshotInterval > 0 {
		rc.SnapshotInterval = cfg.SnapshotInterval
	}
	if cfg.TrailingLogs > 0 {
		rc.TrailingLogs = cfg.TrailingLogs
	}
	n.raft, err = raft.NewRaft(rc, cfg.Cluster, n.cache, n.store, n.snaps, n.trans)
	if err != nil {
		return nil, fmt.Errorf("open raft: %w", err)
	}
	n.ready.Store(n.raft)
	obs := make(chan raft.Observation, 16)
	n.wg.Go(func() { n.watch(obs) })
	n.wg.Go(n.guard)
	cfg.Mux.Handle(ALPNRaft, n.layer.handle)
	return n, nil
}

// expect names the node that the configuration has at an address.
func (n *Node) expect(a raft.ServerAddress) string {
	r := n.ready.Load()
	if r == nil {
		return ""
	}
	name := ""
	for _, s := range r.GetConfiguration().Configuration().Servers {
		if s.Address == a {
			if name != "" {
				return "" // an address given twice names nobody
			}
			name = string(s.ID)
		}
	}
	return name
}

// watch keeps Leadership.
func (n *Node) watch(obs chan raft.Observation) {
	o := raft.NewObserver(obs, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	n.raft.RegisterObserver(o)
	defer n.raft.DeregisterObserver(o)
	self := false
	for {
		addr, id := n.raft.LeaderWithID()
		n.setLeadership(Leadership{ID: string(id), Addr: string(addr), Self: self, Term: n.raft.CurrentTerm()})
		select {
		case self = <-n.notify:
		case <-obs:
		case <-n.stop:
			return
		}
	}
}

// guard hands leadership on while the state machine has stopped here: a leader
// that cannot apply answers nobody. At most every ten seconds, because the
// others may have stopped at the same entry.
func (n *Node) guard() {
	const pause = 10 * time.Second
	for {
		select {
		case <-n.cfg.Cluster.Stopped():
		case <-n.stop:
			return
		}
		if n.IsLeader() {
			n.log.Error("leader cannot apply, leadership is handed on", zap.Error(n.cfg.Cluster.Err()))
			if err := n.raft.LeadershipTransfer().Error(); err != nil {
				n.log.Warn("leadership not handed on", zap.Error(err))
			}
		}
		select {
		case <-time.After(pause):
		case <-n.stop:
			return
		}
	}
}

func (n *Node) setLeadership(l Leadership) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if l == n.mu.lead {
		return
	}
	n.mu.lead = l
	close(n.mu.changed)
	n.mu.changed = make(chan struct{})
}

// Leadership is who leads and a channel that is closed when that changes.
// Level-triggered: several changes may be seen as one.
func (n *Node) Leadership() (Leadership, <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mu.lead, n.mu.changed
}

// Leader is who leads; "" and "" if nobody is known to.
func (n *Node) Leader() (id, addr string) {
	a, i := n.raft.LeaderWithID()
	return string(i), string(a)
}

// IsLeader tells whether this node thinks it leads; VerifyLeader makes sure.
func (n *Node) IsLeader() bool { return n.raft.State() == raft.Leader }

// Bootstrap makes this node the only voter of a new log. It is called once in
// the life of a cluster, on an empty Dir.
func (n *Node) Bootstrap() error {
	err := n.raft.BootstrapCluster(raft.Configuration{Servers: []raft.Server{{
		ID: raft.ServerID(n.cfg.Name), Address: raft.ServerAddress(n.cfg.Address), Suffrage: raft.Voter,
	}}}).Error()
	if errors.Is(err, raft.ErrCantBootstrap) {
		return &fsm.Error{Kind: fsm.KindExists, Op: "bootstrap", Object: n.cfg.Dir, Why: "the folder holds the log of a cluster already", Next: "use an empty folder, or start clusterd on this one"}
	}
	if err != nil {
		return fmt.Errorf("bootstrap raft: %w", err)
	}
	return nil
}

// await waits for a future as long as ctx allows. The future itself ends with
// raft at the latest, so Close waits for what was left behind.
func (n *Node) await(ctx context.Context, f raft.Future) error {
	done := make(chan error, 1)
	n.wg.Go(func() { done <- f.Error() })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enqueueTimeout is how long a call may wait for raft's main loop to take it.
func enqueueTimeout(ctx context.Context) time.Duration {
	d := 10 * time.Second
	if t, ok := ctx.Deadline(); ok {
		d = min(d, time.Until(t))
	}
	return max(d, time.Millisecond)
}

func (n *Node) notLeader() error {
	a, id := n.raft.LeaderWithID()
	if string(id) == n.cfg.Name { // stepping down or up just now
		a, id = "", ""
	}
	return &NotLeaderError{ID: string(id), Addr: string(a)}
}

// explain turns raft's errors into ours.
func (n *Node) explain(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return fmt.Errorf("%s: %w", op, n.notLeader())
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrAbortedByRestore):
		return fmt.Errorf("%s: %w: %w", op, err, errors.Join(ErrInDoubt, fsm.ErrTimeout))
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %w: %w", op, err, errors.Join(ErrInDoubt, fsm.ErrTimeout))
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("%s: raft is too busy to take it: %w", op, fsm.ErrTimeout)
	case errors.Is(err, raft.ErrRaftShutdown):
		return fmt.Errorf("%s: %w", op, ErrClosed)
	}
	return fmt.Errorf("%s: %w", op, err)
}

// Apply replicates a command and gives what applying it here gave. On any node
// but the leader it is a *NotLeaderError. The error of a refusal is
// Result.Err, an *fsm.Error, and then Result.Index is set: the refusal is
// committed. An error that is ErrInDoubt leaves the outcome unknown.
func (n *Node) Apply(ctx context.Context, c fsm.Command) (fsm.Result, error) {
	entry, err := fsm.Encode(c)
	if err != nil {
		return fsm.Result{}, err
	}
	return n.ApplyEntry(ctx, entry)
}

// ApplyEntry is Apply of an encoded command (fsm.Encode), as followers hand
// them over.
func (n *Node) ApplyEntry(ctx context.Context, entry []byte) (fsm.Result, error) {
	const op = "apply"
	if err := ctx.Err(); err != nil {
		return fsm.Result{}, fmt.Errorf("%s: %w", op, err)
	}
	if !n.IsLeader() {
		return fsm.Result{}, fmt.Errorf("%s: %w", op, n.notLeader())
	}
	active, lowest := n.cfg.Cluster.Formats(n.Configuration().Voters())
	if err := n.cfg.Cluster.Check(entry, active, lowest); err != nil {
		return fsm.Result{}, err
	}
	f := n.raft.Apply(entry, enqueueTimeout(ctx))
	if err := n.await(ctx, f); err != nil {
		return fsm.Result{}, n.explain(op, err)
	}
	res, ok := f.Response().(fsm.Result)
	if !ok {
		return fsm.Result{}, fmt.Errorf("%s: state machine answered %T", op, f.Response())
	}
	return res, res.Err
}

// Barrier returns when every entry before it is applied here; leader only. A
// new leader calls it before it acts on the state.
func (n *Node) Barrier(ctx context.Context) error {
	term := n.raft.CurrentTerm()
	if err := n.await(ctx, n.raft.Barrier(enqueueTimeout(ctx))); err != nil {
		return n.explain("barrier", err)
	}
	n.settled.Store(term)
	return nil
}

// VerifyLeader returns nil if a majority confirmed, after the call began, that
// this node leads. Called before each Evict.
func (n *Node) VerifyLeader(ctx context.Context) error {
	return n.explain("verify leader", n.await(ctx, n.raft.VerifyLeader()))
}

// ReadIndex gives an index for a linearizable read: a reader that has
// WaitApplied for it, on any node, sees every command that was acknowledged
// before ReadIndex was called. Leader only; followers ask the leader.
func (n *Node) ReadIndex(ctx context.Context) (uint64, error) {
	for {
		term := n.raft.CurrentTerm()
		if n.settled.Load() != term {
			if err := n.Barrier(ctx); err != nil {
				return 0, fmt.Errorf("read index: %w", err)
			}
		}
		commit := n.raft.CommitIndex()
		if err := n.VerifyLeader(ctx); err != nil {
			return 0, fmt.Errorf("read index: %w", err)
		}
		// Deposed and elected again in between: the commit index may be of
		// the time when the new term had not settled.
		if n.raft.CurrentTerm() != term || n.settled.Load() != term {
			continue
		}
		return n.lastCommand(commit)
	}
}

// lastCommand is the index of the last command at or below index: the state
// machine never sees raft's own entries, so waiting for one of those would not
// end.
func (n *Node) lastCommand(index uint64) (uint64, error) {
	for i := index; ; i-- {
		applied := n.cfg.Cluster.Index()
		if i <= applied {
			return min(index, applied), nil
		}
		var l raft.Log
		if err := n.cache.GetLog(i, &l); err != nil {
			// Compacted while we looked: then it was applied.
			if errors.Is(err, raft.ErrLogNotFound) {
				return n.cfg.Cluster.Index(), nil
			}
			return 0, fmt.Errorf("read raft log at %d: %w", i, err)
		}
		if l.Type == raft.LogCommand {
			return i, nil
		}
	}
}

// WaitApplied returns when the state here has every command up to index, one
// that Apply or ReadIndex gave.
func (n *Node) WaitApplied(ctx context.Context, index uint64) error {
	return n.cfg.Cluster.Wait(ctx, index)
}

// Snapshot takes a snapshot now. Nothing new to snapshot is no error.
func (n *Node) Snapshot(ctx context.Context) error {
	err := n.await(ctx, n.raft.Snapshot())
	if errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return nil
	}
	return n.explain("snapshot", err)
}

// LeadershipTransfer hands leadership to id, or to the most advanced voter for
// "". It waits until the other end has it or the transfer failed.
func (n *Node) LeadershipTransfer(ctx context.Context, id string) error {
	const op = "transfer leadership"
	if id == "" {
		return n.explain(op, n.await(ctx, n.raft.LeadershipTransfer()))
	}
	for _, s := range n.Configuration().Servers {
		if s.ID == id {
			return n.explain(op, n.await(ctx, n.raft.LeadershipTransferToServer(raft.ServerID(id), raft.ServerAddress(s.Address))))
		}
	}
	return &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: id, Why: "it is not in the raft configuration"}
}

// Server is one row of the raft configuration.
type Server struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	Voter   bool   `json:"voter"`
}

// Configuration is who takes part in the log; Index is its log index, 0 before
// there is one.
type Configuration struct {
	Index   uint64   `json:"index"`
	Servers []Server `json:"servers"`
}

// Voters is the ids of the voters, in order.
func (c Configuration) Voters() []string {
	var out []string
	for _, s := range c.Servers {
		if s.Voter {
			out = append(out, s.ID)
		}
	}
	return out
}

// Find gives the row of id.
func (c Configuration) Find(id string) (Server, bool) {
	for _, s := range c.Servers {
		if s.ID == id {
			return s, true
		}
	}
	return Server{}, false
}

// Configuration is the latest configuration here, committed or not.
func (n *Node) Configuration() Configuration {
	f := n.raft.GetConfiguration()
	c := Configuration{Index: f.Index()}
	for _, s := range f.Configuration().Servers {
		c.Servers = append(c.Servers, Server{ID: string(s.ID), Address: string(s.Address), Voter: s.Suffrage == raft.Voter})
	}
	return c
}

// AddNonvoter adds a node that gets the log and has no vote, or changes the
// address of one. Leader only; so are the next three.
func (n *Node) AddNonvoter(ctx context.Context, id, addr string) error {
	return n.explain("add nonvoter "+id, n.await(ctx, n.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(addr), 0, enqueueTimeout(ctx))))
}

// AddVoter gives a node a vote.
func (n *Node) AddVoter(ctx context.Context, id, addr string) error {
	return n.explain("add voter "+id, n.await(ctx, n.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(addr), 0, enqueueTimeout(ctx))))
}

// Demote takes a node's vote.
func (n *Node) Demote(ctx context.Context, id string) error {
	return n.explain("demote "+id, n.await(ctx, n.raft.DemoteVoter(raft.ServerID(id), 0, enqueueTimeout(ctx))))
}

// Remove takes a node out of the log.
func (n *Node) Remove(ctx context.Context, id string) error {
	return n.explain("remove "+id, n.await(ctx, n.raft.RemoveServer(raft.ServerID(id), 0, enqueueTimeout(ctx))))
}

// Stats is what status pages show.
type Stats struct {
	State       string        `json:"state"` // Follower, Candidate, Leader, Shutdown
	Term        uint64        `json:"term"`
	Last        uint64        `json:"last_index"`
	Commit      uint64        `json:"commit_index"`
	Applied     uint64        `json:"applied_index"` // by the state machine, commands only
	LastContact time.Duration `json:"last_contact"`  // with the leader, ns; 0 on the leader, -1 never
	Snapshot    uint64        `json:"snapshot_index"`
	Leader      string        `json:"leader"`
	Stopped     string        `json:"stopped,omitempty"` // why the state machine applies no more (fsm.StopError)
}

// Stats gives a momentary picture.
func (n *Node) Stats() Stats {
	id, _ := n.Leader()
	s := Stats{
		State: n.raft.State().String(), Term: n.raft.CurrentTerm(), Last: n.raft.LastIndex(),
		Commit: n.raft.CommitIndex(), Applied: n.cfg.Cluster.Index(), Leader: id,
	}
	if err := n.cfg.Cluster.Err(); err != nil {
		s.Stopped = err.Error()
	}
	switch t := n.raft.LastContact(); {
	case n.IsLeader():
	case t.IsZero():
		s.LastContact = -1
	default:
		s.LastContact = time.Since(t)
	}
	if l, err := n.snaps.List(); err == nil && len(l) > 0 {
		s.Snapshot = l[0].Index
	}
	return s
}

// Fresh tells whether Dir held no log, vote or snapshot: the node was never
// part of a cluster.
func (n *Node) Fresh() (bool, error) {
	has, err := raft.HasExistingState(n.cache, n.store, n.snaps)
	if err != nil {
		return false, fmt.Errorf("look for a raft log in %s: %w", n.cfg.Dir, err)
	}
	return !has, nil
}

func (n *Node) closeTransport() error {
	err := n.trans.Close() // closes the layer and with it every stream
	n.trans.CloseStreams()
	return err
}

// Close leaves the log without a word: a leader transfers leadership before. It
// returns when all is on disk and every goroutine is gone.
func (n *Node) Close() error {
	n.closeOnce.Do(func() {
		n.cfg.Mux.Handle(ALPNRaft, nil)
		err := n.raft.Shutdown().Error()
		close(n.stop)
		n.wg.Wait()
		n.closeErr = errors.Join(err, n.closeTransport(), n.store.Close())
	})
	return n.closeErr
}
