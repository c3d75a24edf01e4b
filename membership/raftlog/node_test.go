package raftlog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/settings"
)

// Three nodes with real TLS, sockets and boltdb: what was acknowledged is there
// after the leader's crash, on the new leader and on the old one when it is
// back from its disk.
func TestLeaderCrash(t *testing.T) {
	t.Parallel()
	c := start(t, 3, nil)
	r := c.set("k1", "v1")
	if r.Index == 0 {
		t.Fatal("no index")
	}
	c.sameState()
	old := c.leader()
	lead, changed := old.Leadership()
	if !lead.Self || lead.ID != old.name || lead.Addr != old.addr {
		eventually(t, "leadership of itself", func() bool { lead, changed = old.Leadership(); return lead.Self })
	}
	old.stop()
	select {
	case <-changed:
	case <-time.After(patience):
		t.Fatal("no word of the end of leadership")
	}
	next := c.leader()
	if next == old {
		t.Fatal("the dead node leads")
	}
	c.set("k2", "v2")
	if err := next.WaitApplied(within(t), c.readIndex()); err != nil {
		t.Fatal(err)
	}
	if value(next, "k1") != "v1" || value(next, "k2") != "v2" {
		t.Fatalf("k1=%q k2=%q", value(next, "k1"), value(next, "k2"))
	}
	old.start()
	if fresh, err := old.Fresh(); err != nil || fresh {
		t.Fatalf("fresh %v, %v", fresh, err)
	}
	c.sameState()
	if value(old, "k2") != "v2" {
		t.Fatal("the returned node lacks k2")
	}
	if err := old.Bootstrap(); !errors.Is(err, fsm.ErrExists) {
		t.Fatalf("bootstrap on a used folder: %v", err)
	}
}

// A follower refuses and names the leader; a leader without majority says no
// quorum and leaves the outcome open.
func TestNotLeaderAndNoQuorum(t *testing.T) {
	t.Parallel()
	c := start(t, 2, nil)
	leader := c.leader()
	var follower *testNode
	for _, n := range c.nodes {
		if n != leader {
			follower = n
		}
	}
	eventually(t, "the follower knows the leader", func() bool { id, _ := follower.Leader(); return id == leader.name })
	_, err := follower.Apply(within(t), settings.Set{Key: "x", Value: "1"})
	var nl *NotLeaderError
	if !errors.As(err, &nl) || nl.ID != leader.name || nl.Addr != leader.addr || errors.Is(err, fsm.ErrNoQuorum) {
		t.Fatalf("got %v", err)
	}
	if _, err := follower.ReadIndex(within(t)); !errors.As(err, &nl) {
		t.Fatalf("read index on a follower: %v", err)
	}
	if r, err := leader.Apply(within(t), settings.Set{Key: "x", Value: "1", Version: 7}); !errors.Is(err, fsm.ErrConflict) || r.Index == 0 {
		t.Fatalf("a refusal: %+v, %v", r, err)
	}
	if _, err := leader.Apply(within(t), settings.Set{Key: ""}); !errors.Is(err, fsm.ErrInvalid) {
		t.Fatalf("a malformed command: %v", err)
	}
	follower.stop()
	if _, err := leader.Apply(within(t), settings.Set{Key: "y", Value: "1"}); !errors.Is(err, ErrInDoubt) && !errors.Is(err, fsm.ErrNoQuorum) {
		t.Fatalf("apply without a majority: %v", err)
	}
	eventually(t, "the lonely leader steps down", func() bool { return !leader.IsLeader() })
	_, err = leader.Apply(within(t), settings.Set{Key: "y", Value: "1"})
	if !errors.Is(err, fsm.ErrNoQuorum) || fsm.ExitCode(err) != 5 {
		t.Fatalf("apply without a leader: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := leader.Apply(ctx, settings.Set{Key: "y", Value: "1"}); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
}

// A node that lags behind the leader's log gets a snapshot, one that restarts
// begins with its own.
func TestSnapshotAndRestore(t *testing.T) {
	t.Parallel()
	c := start(t, 3, func(cfg *Config) { cfg.TrailingLogs = 1 })
	leader := c.leader()
	var late *testNode
	for _, n := range c.nodes {
		if n != leader {
			late = n
		}
	}
	late.stop()
	for i := range 30 {
		c.set(fmt.Sprintf("k%d", i), "v")
	}
	for _, n := range c.nodes {
		if n.Node != nil {
			if err := n.Snapshot(within(t)); err != nil {
				t.Fatal(err)
			}
			if n.Stats().Snapshot == 0 {
				t.Fatalf("%s has no snapshot", n.name)
			}
		}
	}
	c.set("after", "v")
	late.start()
	c.sameState()
	if _, restores, _ := late.cluster.Changed(); restores == 0 {
		t.Fatal("the late node got no snapshot")
	}
	again := c.leader()
	again.stop()
	again.start()
	if again.cluster.Index() == 0 || value(again, "k29") != "v" {
		t.Fatalf("restart from its snapshot: index %d", again.cluster.Index())
	}
	c.sameState()
}

// AddNonvoter, AddVoter, Demote, Remove, and leadership handed over on purpose.
func TestConfigurationChanges(t *testing.T) {
	t.Parallel()
	c := start(t, 3, nil)
	if v := c.leader().Configuration().Voters(); len(v) != 3 {
		t.Fatalf("voters %v", v)
	}
	from := c.leader()
	var to *testNode
	for _, n := range c.nodes {
		if n != from {
			to = n
		}
	}
	c.onLeader(func(l *testNode) error {
		if l == to {
			return nil
		}
		return l.LeadershipTransfer(within(t), to.name)
	})
	eventually(t, "leadership moves", func() bool { id, _ := from.Leader(); return id == to.name })
	if err := to.LeadershipTransfer(within(t), "n99"); !errors.Is(err, fsm.ErrNotFound) {
		t.Fatalf("transfer to a stranger: %v", err)
	}
	gone := c.nodes[0]
	if c.leader() == gone {
		gone = c.nodes[1]
	}
	c.onLeader(func(l *testNode) error { return l.Demote(within(t), gone.name) })
	if s, ok := c.leader().Configuration().Find(gone.name); !ok || s.Voter {
		t.Fatalf("after demotion: %+v %v", s, ok)
	}
	c.set("k", "nonvoters get the log")
	c.sameState()
	c.onLeader(func(l *testNode) error { return l.Remove(within(t), gone.name) })
	if _, ok := c.leader().Configuration().Find(gone.name); ok {
		t.Fatal("still there after removal")
	}
	// A removed node stays up, and its elections move nobody's term (raft#524).
	term := c.leader().Stats().Term
	time.Sleep(1500 * time.Millisecond)
	c.set("k2", "v")
	if now := c.leader().Stats().Term; now > term+2 {
		t.Fatalf("terms run from %d to %d with a removed node up", term, now)
	}
}

// ReadIndex is never behind an acknowledged write, and never ahead of what the
// state machine can reach, also right after an election, when the log ends with
// entries of raft's own.
func TestReadIndex(t *testing.T) {
	t.Parallel()
	c := start(t, 3, nil)
	for i := range 3 {
		r := c.set(fmt.Sprintf("a%d", i), "v")
		if idx := c.readIndex(); idx < r.Index {
			t.Fatalf("read index %d is behind the write at %d", idx, r.Index)
		}
		c.onLeader(func(l *testNode) error { return l.LeadershipTransfer(within(t), "") })
		idx := c.readIndex()
		if idx < r.Index {
			t.Fatalf("read index %d of the new leader is behind the write at %d", idx, r.Index)
		}
		for _, n := range c.nodes {
			if err := n.WaitApplied(within(t), idx); err != nil {
				t.Fatalf("%s: %v", n.name, err)
			}
			if value(n, fmt.Sprintf("a%d", i)) != "v" {
				t.Fatalf("%s at read index %d lacks the write", n.name, idx)
			}
		}
		c.onLeader(func(l *testNode) error { return l.Barrier(within(t)) })
	}
	var wg sync.WaitGroup
	leader := c.leader()
	for i := range 8 {
		wg.Go(func() {
			for j := range 5 {
				r, err := leader.Apply(within(t), settings.Set{Key: fmt.Sprintf("p%d-%d", i, j), Value: "v"})
				if err != nil {
					continue // leadership may move under load
				}
				idx, err := leader.ReadIndex(within(t))
				if err == nil && idx < r.Index {
					t.Errorf("read index %d after a write at %d", idx, r.Index)
				}
			}
		})
	}
	wg.Wait()
}

// A leader whose state machine has stopped hands leadership on, says so in its
// stats, and takes no snapshot that would drop the entry.
func TestStoppedLeader(t *testing.T) {
	t.Parallel()
	c := start(t, 3, nil)
	leader := c.leader()
	// What a newer binary would write; past the gate, which an older leader
	// does not have either.
	bad := fsm.Envelope{Machine: fsm.Config, Kind: 99, Version: 1, Payload: []byte("{}")}.Append(nil)
	f := leader.raft.Apply(bad, patience)
	if err := f.Error(); err != nil {
		t.Fatal(err)
	}
	res, ok := f.Response().(fsm.Result)
	var stop *fsm.StopError
	if !ok || !errors.As(res.Err, &stop) {
		t.Fatalf("%+v", res)
	}
	eventually(t, "leadership is handed on", func() bool {
		return leader.logs.FilterMessage("leader cannot apply, leadership is handed on").Len() == 1
	})
	if s := leader.Stats(); !strings.Contains(s.Stopped, "unknown command config/99") {
		t.Fatalf("%+v", s)
	}
	if err := leader.Snapshot(within(t)); err == nil {
		t.Fatal("snapshot of a stopped state machine")
	}
	idx := leader.cluster.Index()
	leader.stop()
	leader.start()
	eventually(t, "the entry is met again after a restart", func() bool { return leader.cluster.Err() != nil })
	if leader.cluster.Index() != idx {
		t.Fatalf("index %d, was %d", leader.cluster.Index(), idx)
	}
}

func TestOpenRefusals(t *testing.T) {
	t.Parallel()
	c := start(t, 1, nil)
	n := c.nodes[0]
	cfg := n.cfg
	cfg.Profile = "slow"
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "normal, fast or wan") {
		t.Fatalf("profile: %v", err)
	}
	// A second control on the same folder: bolt's lock, not two writers.
	cfg = n.cfg
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "raft.db") {
		t.Fatalf("second open: %v", err)
	}
	if r := c.set("still", "works"); r.Index == 0 {
		t.Fatal("the first one suffered")
	}
	node := n.Node
	n.stop()
	if _, err := node.Apply(within(t), settings.Set{Key: "k"}); err == nil {
		t.Fatal("apply on a closed node")
	}
	if err := node.Close(); err != nil {
		t.Fatal("second close:", err)
	}
}

func TestProfiles(t *testing.T) {
	t.Parallel()
	for p, want := range map[Profile]time.Duration{Normal: 500 * time.Millisecond, Fast: 200 * time.Millisecond, WAN: 2 * time.Second, "x": 0} {
		if got := p.Heartbeat(); got != want {
			t.Errorf("%s: %v", p, got)
		}
	}
}

func TestHCLog(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zapcore.DebugLevel)
	l := HCLog(zap.New(core), "raft")
	sub := l.Named("transport").With("peer", "n2")
	sub.Warn("slow", "term", 7, "error", errors.New("boom"), "odd")
	l.Trace("not shown")
	l.Log(hclog.Error, "direct")
	l.StandardLogger(nil).Print("line\n")
	got := logs.All()
	if len(got) != 3 {
		t.Fatalf("%d lines: %v", len(got), got)
	}
	f := got[0].ContextMap()
	if got[0].Level != zapcore.WarnLevel || got[0].LoggerName != "raft.transport" || f["peer"] != "n2" || fmt.Sprint(f["term"]) != "7" || f["error"] != "boom" || f["extra"] != "odd" {
		t.Fatalf("%+v %v", got[0], f)
	}
	if got[1].Level != zapcore.ErrorLevel || got[2].Message != "line" {
		t.Fatalf("%+v", got)
	}
	if l.IsTrace() || !l.IsDebug() || l.GetLevel() != hclog.Debug {
		t.Fatal("levels")
	}
}

// Both go-metrics reach one registry.
func TestRegisterMetrics(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	metricsOnce.Lock()
	metricsOnce.done = false // -count=N runs in one process
	metricsOnce.Unlock()
	if err := RegisterMetrics(reg); err != nil {
		t.Fatal(err)
	}
	if err := RegisterMetrics(reg); err == nil {
		t.Fatal("twice")
	}
	c := start(t, 1, nil)
	c.set("k", "v")
	eventually(t, "metrics of raft and of boltdb", func() bool {
		fams, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var raft, bolt bool
		for _, f := range fams {
			raft = raft || strings.HasPrefix(f.GetName(), "raft_fsm_apply")
			bolt = bolt || strings.HasPrefix(f.GetName(), "raft_boltdb_")
		}
		return raft && bolt
	})
}
