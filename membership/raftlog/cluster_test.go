package raftlog

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/fsm/settings"
	"github.com/blockhouse-san/blockhouse/membership/pki"
)

const (
	uuidA = "3f0e9c3a-7a51-4c1e-9a53-0c5d9b8e2f10"
	uuidB = "b1b1b1b1-7a51-4c1e-9a53-0c5d9b8e2f10"
)

// patience bounds waits for things that happen in well under a second on an
// idle machine.
const patience = 20 * time.Second

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func newCA(t *testing.T, cluster string) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(cluster, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t *testing.T, ca *pki.CA, role pki.Role, name string, at time.Time) *pki.Files {
	t.Helper()
	cert, key, err := ca.Issue(role, name, at)
	if err != nil {
		t.Fatal(err)
	}
	caPEM, _, err := ca.Encode()
	if err != nil {
		t.Fatal(err)
	}
	f, err := pki.NewFiles(cert, key, caPEM)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// testNode is one node that can be stopped and started on its folder and port.
type testNode struct {
	t     *testing.T
	name  string
	dir   string
	addr  string // fixed after the first start
	files *pki.Files
	tune  func(*Config)

	*Node
	mux     *Mux
	cluster *machines.Cluster
	logs    *observer.ObservedLogs
}

func (n *testNode) start() {
	n.t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	n.logs = logs
	log := zap.New(core).With(zap.String("self", n.name))
	var err error
	if n.cluster, err = machines.New(log); err != nil {
		n.t.Fatal(err)
	}
	if n.mux, err = NewMux(MuxConfig{Files: n.files, Cluster: n.cluster, BootID: "boot-" + n.name, Log: log}); err != nil {
		n.t.Fatal(err)
	}
	addr := n.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	if err := n.mux.Listen(addr); err != nil {
		n.t.Fatal(err)
	}
	n.addr = n.mux.Addr().String()
	cfg := Config{Dir: n.dir, Name: n.name, Address: n.addr, Profile: Fast, Mux: n.mux, Cluster: n.cluster, Log: log}
	if n.tune != nil {
		n.tune(&cfg)
	}
	if n.Node, err = Open(cfg); err != nil {
		n.t.Fatal(err)
	}
}

// stop ends a node without a goodbye, as a crash would for the others.
func (n *testNode) stop() {
	n.t.Helper()
	if n.Node == nil {
		return
	}
	if err := errors.Join(n.Node.Close(), n.mux.Close()); err != nil {
		n.t.Errorf("stop %s: %v", n.name, err)
	}
	n.Node = nil
}

type testCluster struct {
	t     *testing.T
	ca    *pki.CA
	nodes []*testNode
}

func (c *testCluster) add(name string, tune func(*Config)) *testNode {
	c.t.Helper()
	n := &testNode{t: c.t, name: name, dir: filepath.Join(c.t.TempDir(), name), files: issue(c.t, c.ca, pki.Node, name, time.Now()), tune: tune}
	n.start()
	c.nodes = append(c.nodes, n)
	return n
}

func newNode(n *testNode) members.NewNode {
	return members.NewNode{
		Name: n.name, BootID: "boot-" + n.name, Format: machines.Format,
		Roles: members.Roles{Storage: true, Voter: true}, Addresses: members.Addresses{Raft: n.addr},
	}
}

// start makes a cluster of n nodes: the first by Bootstrap, the others by token
// as nonvoters and then voters, the way clusteradm join does.
func start(t *testing.T, n int, tune func(*Config)) *testCluster {
	t.Helper()
	c := &testCluster{t: t, ca: newCA(t, uuidA)}
	t.Cleanup(func() {
		var wg sync.WaitGroup
		for _, n := range c.nodes {
			wg.Go(n.stop)
		}
		wg.Wait()
	})
	first := c.add("n1", tune)
	if fresh, err := first.Fresh(); err != nil || !fresh {
		t.Fatalf("fresh %v, %v", fresh, err)
	}
	if err := first.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	c.apply(members.Bootstrap{Cluster: "c1", UUID: uuidA, Node: newNode(first)})
	for i := 2; i <= n; i++ {
		c.join(c.add(fmt.Sprintf("n%d", i), tune))
	}
	return c
}

func (c *testCluster) join(n *testNode) {
	c.t.Helper()
	now := time.Now()
	sum := fmt.Sprintf("%064x", len(n.name))
	c.apply(members.TokenCreate{Now: now, ID: "t-" + n.name, SHA256: sum, Expires: now.Add(time.Hour), Uses: 1, Roles: members.Roles{Storage: true, Voter: true}})
	c.apply(members.AddNode{Request: "add-" + n.name, Now: now, Token: "t-" + n.name, Proof: sum, Node: newNode(n)})
	c.onLeader(func(l *testNode) error { return l.AddNonvoter(within(c.t), n.name, n.addr) })
	c.apply(members.Admit{Now: now, Node: n.name, From: 0, BootID: "boot-" + n.name})
	idx := c.readIndex()
	if err := n.WaitApplied(within(c.t), idx); err != nil {
		c.t.Fatalf("%s as nonvoter: %v", n.name, err)
	}
	c.onLeader(func(l *testNode) error { return l.AddVoter(within(c.t), n.name, n.addr) })
}

func (c *testCluster) leader() *testNode {
	c.t.Helper()
	var got *testNode
	eventually(c.t, "a leader", func() bool {
		for _, n := range c.nodes {
			if n.Node != nil && n.IsLeader() && n.VerifyLeader(within(c.t)) == nil {
				got = n
				return true
			}
		}
		return false
	})
	return got
}

// onLeader runs fn on the leader until it works; leadership may move under
// load, and the commands of these tests can be repeated.
func (c *testCluster) onLeader(fn func(*testNode) error) {
	c.t.Helper()
	var err error
	end := time.Now().Add(patience)
	for {
		if err = fn(c.leader()); err == nil {
			return
		}
		var nl *NotLeaderError
		if !errors.As(err, &nl) && !errors.Is(err, ErrInDoubt) && !errors.Is(err, ErrClosed) || time.Now().After(end) {
			c.t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (c *testCluster) apply(cmd fsm.Command) (r fsm.Result) {
	c.t.Helper()
	c.onLeader(func(l *testNode) (err error) {
		r, err = l.Apply(within(c.t), cmd)
		return err
	})
	return r
}

func (c *testCluster) readIndex() (idx uint64) {
	c.t.Helper()
	c.onLeader(func(l *testNode) (err error) {
		idx, err = l.ReadIndex(within(c.t))
		return err
	})
	return idx
}

func value(n *testNode, key string) string {
	var v settings.Value
	n.cluster.Read(func(view machines.View) { v, _ = view.Settings.Get(key) })
	return v.Value
}

func (c *testCluster) set(key, val string) fsm.Result {
	c.t.Helper()
	return c.apply(settings.Set{Key: key, Value: val})
}

// sameState checks that every running node has the same state at the leader's
// read index.
func (c *testCluster) sameState() {
	c.t.Helper()
	idx := c.readIndex()
	var want [32]byte
	for i, n := range c.nodes {
		if n.Node == nil {
			continue
		}
		if err := n.WaitApplied(within(c.t), idx); err != nil {
			c.t.Fatalf("%s: %v", n.name, err)
		}
		h, err := n.cluster.Hash()
		if err != nil {
			c.t.Fatal(err)
		}
		if i > 0 && want != [32]byte{} && h != want {
			c.t.Fatalf("%s differs from the others at index %d", n.name, idx)
		}
		want = h
	}
}
