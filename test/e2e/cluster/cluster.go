// Package cluster runs real clusterd processes for end-to-end tests: one folder,
// one loopback address and three processes a node. Every process ends with the
// test that started it.
//
// Only tests import it.
package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/testnet"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/node/link"
)

var build struct {
	sync.Once
	dir string
	err error
}

// Bin builds the binaries once for the test process and returns their folder.
// They have the build tag mutations, so that BLOCKHOUSE_MUTATION can switch a
// rule off; without the variable every rule is on.
func Bin(t testing.TB) string {
	t.Helper()
	build.Do(func() {
		build.dir, build.err = os.MkdirTemp("", "blockhouse-bin-")
		if build.err != nil {
			return
		}
		cmd := exec.Command("go", "build", "-tags", "mutations,invariants", "-o", build.dir+"/", "./cmd/clusterd", "./cmd/clusteradm", "./cmd/mkfs-gfs")
		cmd.Dir = root()
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("build binaries: %w\n%s", err, out)
		}
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.dir
}

// Clean removes what Bin made. TestMain calls it at the end.
func Clean() {
	if build.dir != "" {
		_ = os.RemoveAll(build.dir)
	}
}

// root is the folder of go.mod.
func root() string {
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, e := os.Stat(filepath.Join(dir, "go.mod")); e == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "."
}

// Cluster is a set of nodes that may form one.
type Cluster struct {
	t       testing.TB
	Name    string
	Dir     string
	ips     []string // of the nodes; of 127.a.b unless Within says others
	profile string
	extra   string // more lines of every node's file
	start   func(testproc.Spec) *testproc.Proc
	Nodes   []*Node
}

// Option of New.
type Option func(*Cluster)

// Profile sets the profile of every node.
func Profile(p string) Option { return func(c *Cluster) { c.profile = p } }

// Config adds lines to the end of every node's file.
func Config(lines string) Option { return func(c *Cluster) { c.extra = lines } }

// Within runs the nodes in a network namespace of the test's own, at addresses
// that it has, for instance that of a bridge.
func Within(nd *testnet.Node, ips ...string) Option {
	return func(c *Cluster) { c.start, c.ips = nd.Start, ips }
}

// New prepares n nodes n1… without starting them.
func New(t testing.TB, n int, opts ...Option) *Cluster {
	t.Helper()
	dir, err := os.MkdirTemp(testproc.ArtefactDir(t), "cluster-")
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{t: t, Name: "demo", Dir: dir, profile: "normal"}
	c.start = func(s testproc.Spec) *testproc.Proc { return testproc.Start(t, s) }
	for _, o := range opts {
		o(c)
	}
	if c.ips == nil {
		block := freeBlock(t)
		for i := range 254 {
			c.ips = append(c.ips, fmt.Sprintf("%s.%d", block, 1+i))
		}
	}
	for i := 1; i <= n; i++ {
		c.Add(fmt.Sprintf("n%d", i))
	}
	return c
}

// freeBlock finds a loopback network of which no address serves our ports:
// packages are tested side by side.
func freeBlock(t testing.TB) string {
	for range 100 {
		b := fmt.Sprintf("127.%d.%d", 64+rand.IntN(128), 1+rand.IntN(250))
		l, err := net.Listen("tcp", b+".1:7420")
		if err == nil {
			_ = l.Close()
			return b
		}
	}
	t.Fatal("no free loopback network")
	return ""
}

// Add prepares one more node.
func (c *Cluster) Add(name string) *Node {
	c.t.Helper()
	ip := c.ips[len(c.Nodes)]
	n := &Node{c: c, Name: name, IP: ip, Dir: filepath.Join(c.Dir, name), Index: len(c.Nodes) + 1}
	// Unix socket paths are short: the artefact folder's may not be.
	run, err := os.MkdirTemp("", "bh-")
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = os.RemoveAll(run) })
	n.Run = run
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	n.WriteConfig("")
	c.Nodes = append(c.Nodes, n)
	return n
}

// Up starts every node, makes the first one found the cluster and the others
// join, and waits until all hold a lease and vote.
func (c *Cluster) Up() *Cluster {
	c.t.Helper()
	for _, n := range c.Nodes {
		n.Start()
	}
	c.Nodes[0].Init()
	for _, n := range c.Nodes[1:] {
		n.Join(c.Nodes[0])
	}
	c.Wait("every node online and voting", 60*time.Second, func() (bool, string) {
		s, err := c.Nodes[0].Status()
		if err != nil {
			return false, err.Error()
		}
		on := 0
		for _, n := range s.Nodes {
			if n.State == api.NodeOnline && (n.Vote == "voter" || n.Vote == "leader") {
				on++
			}
		}
		return on == len(c.Nodes), fmt.Sprintf("%d of %d", on, len(c.Nodes))
	})
	return c
}

// Wait polls until ok or the time is over, and then says what it last saw.
func (c *Cluster) Wait(what string, limit time.Duration, ok func() (bool, string)) {
	c.t.Helper()
	end := time.Now().Add(limit)
	last := ""
	for time.Now().Before(end) {
		done, saw := ok()
		if done {
			return
		}
		last = saw
		time.Sleep(20 * time.Millisecond)
	}
	c.t.Fatalf("not within %v: %s; last: %s", limit, what, last)
}

// Leader is the node that leads, waited for.
func (c *Cluster) Leader() *Node {
	c.t.Helper()
	var lead *Node
	c.Wait("a leader", 30*time.Second, func() (bool, string) {
		for _, n := range c.Nodes {
			if n.proc == nil {
				continue
			}
			s, err := n.Status()
			if err == nil && s.Quorum.Quorate && !s.Stale {
				lead = c.Node(s.Quorum.Leader)
				return lead != nil, s.Quorum.Leader
			}
		}
		return false, "nobody is quorate"
	})
	return lead
}

// Node finds a node by name, nil if there is none.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// Node is one node: a folder, an address and its processes.
type Node struct {
	c          *Cluster
	Name       string
	IP         string
	Dir        string // data
	Run        string // sockets
	Index      int
	ConfigPath string
	Env        []string // of the next Start
	proc       *testproc.Proc
	client     *api.Client
	owned      map[int]func() error // how to end each worker that was seen
}

// WriteConfig writes the node's file; extra lines go to its end.
func (n *Node) WriteConfig(extra string) {
	n.c.t.Helper()
	n.ConfigPath = filepath.Join(n.Dir, "clusterd.toml")
	text := fmt.Sprintf(`name = %q
data_dir = %q
run_dir = %q
profile = %q
[listen]
api = "%s:7420"
raft = "%s:7421"
gossip = "%s:7422"
iscsi = ["%s:3260"]
[log]
level = "debug"
%s
%s
`, n.Name, filepath.Join(n.Dir, "data"), n.Run, n.c.profile, n.IP, n.IP, n.IP, n.IP, n.c.extra, extra)
	if err := os.WriteFile(n.ConfigPath, []byte(text), 0o600); err != nil {
		n.c.t.Fatal(err)
	}
}

// Start runs control and waits for its socket.
func (n *Node) Start() {
	n.c.t.Helper()
	n.proc = n.c.start(testproc.Spec{Name: "clusterd-" + n.Name, LogDir: n.Dir, Env: n.Env, Grace: time.Millisecond,
		Args: []string{filepath.Join(Bin(n.c.t), "clusterd"), "--config", n.ConfigPath}})
	n.client = api.Dial(filepath.Join(n.Run, "clusterd.sock"))
	n.c.Wait(n.Name+" answers", 30*time.Second, func() (bool, string) {
		_, err := n.Status()
		select {
		case <-n.proc.Done():
			n.c.t.Fatalf("clusterd of %s ended: %s", n.Name, n.proc.Tail(2000))
		default:
		}
		return err == nil, fmt.Sprint(err)
	})
}

// own registers the workers, so that they end with the test.
func (n *Node) own() {
	if n.owned == nil {
		n.owned = map[int]func() error{}
		// Control first, or it would start its workers again.
		n.c.t.Cleanup(func() {
			if n.proc != nil {
				if err := n.proc.Kill(); err != nil {
					n.c.t.Error(err)
				}
			}
			n.own()
			for _, end := range n.owned {
				if err := end(); err != nil {
					n.c.t.Error(err)
				}
			}
		})
	}
	for _, k := range []link.Kind{link.Storage, link.Locks} {
		if p, err := n.Worker(k); err == nil && p.Alive() && n.owned[p.PID] == nil {
			n.owned[p.PID] = testproc.Own(n.c.t, p.PID, p.Alive)
		}
	}
}

// Proc is the running control process.
func (n *Node) Proc() *testproc.Proc { return n.proc }

// API talks to the node's daemon.
func (n *Node) API() *api.Client { return n.client }

// Status asks the node, with a short deadline.
func (n *Node) Status() (api.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	n.own()
	return api.Get[api.Status](ctx, n.client, api.PathStatus)
}

// Init founds the cluster.
func (n *Node) Init() {
	n.c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if _, err := api.Post[api.Done](ctx, n.client, api.PathInit, api.Init{Cluster: n.c.Name}); err != nil {
		n.c.t.Fatalf("init on %s: %v", n.Name, err)
	}
	n.own()
}

// Join makes the node a member of the other's cluster.
func (n *Node) Join(via *Node) {
	n.c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	tok, err := api.Post[api.Token](ctx, via.client, api.PathTokens, api.TokenCreate{})
	if err != nil {
		n.c.t.Fatalf("token from %s: %v", via.Name, err)
	}
	if _, err := api.Post[api.Done](ctx, n.client, api.PathJoin, api.Join{Token: tok.Secret, Address: via.IP + ":7420"}); err != nil {
		n.c.t.Fatalf("join of %s: %v", n.Name, err)
	}
	n.own()
}

// Worker reads who the worker is.
func (n *Node) Worker(k link.Kind) (link.Proc, error) {
	return link.ReadPID(link.PIDFile(n.Run, string(k)))
}

// Report asks a worker without its control.
func (n *Node) Report(k link.Kind) (link.Report, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return link.Status(ctx, link.Socket(n.Run, k))
}

// KillControl is kill -9 of control alone.
func (n *Node) KillControl() {
	n.c.t.Helper()
	n.own()
	if err := n.proc.Signal(syscall.SIGKILL); err != nil {
		n.c.t.Fatalf("kill control of %s: %v", n.Name, err)
	}
	<-n.proc.Done()
	n.proc = nil
}

// Kill is kill -9 of all of the node's processes.
func (n *Node) Kill() {
	n.c.t.Helper()
	n.KillControl()
	for _, k := range []link.Kind{link.Storage, link.Locks} {
		if p, err := n.Worker(k); err == nil && p.Alive() {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
			n.c.Wait("the worker is gone", 10*time.Second, func() (bool, string) { return !p.Alive(), "alive" })
		}
	}
}

// Stop is a planned stop: SIGTERM, and everything of the node ends.
func (n *Node) Stop() {
	n.c.t.Helper()
	if err := n.proc.Signal(syscall.SIGTERM); err != nil {
		n.c.t.Fatalf("stop %s: %v", n.Name, err)
	}
	select {
	case <-n.proc.Done():
	case <-time.After(60 * time.Second):
		n.c.t.Fatalf("%s does not stop: %s", n.Name, n.proc.Tail(2000))
	}
	n.proc = nil
}

// Running tells whether control runs.
func (n *Node) Running() bool { return n.proc != nil }

// Logs is what control and the workers wrote so far, over all starts.
func (n *Node) Logs() string {
	var b strings.Builder
	fs, _ := filepath.Glob(filepath.Join(n.Dir, "*.log"))
	for _, f := range fs {
		t, _ := os.ReadFile(f)
		b.Write(t)
	}
	return b.String()
}

// JSON formats a document for a failure message.
func JSON(v any) string {
	b, _ := json.MarshalIndent(v, "", " ")
	return string(b)
}

// Quorum asks the node who leads.
func (n *Node) Quorum() (api.Quorum, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	return api.Get[api.Quorum](ctx, n.client, api.PathQuorum)
}

// UseData puts another data folder in place of the node's, as a restored backup
// would be.
func (n *Node) UseData(from string) {
	n.c.t.Helper()
	data := filepath.Join(n.Dir, "data")
	if err := os.Rename(data, data+".aside"); err != nil {
		n.c.t.Fatal(err)
	}
	if err := os.Rename(from, data); err != nil {
		n.c.t.Fatal(err)
	}
	// The copies of volumes are not part of what control restores.
	if err := os.RemoveAll(filepath.Join(data, "volumes")); err != nil {
		n.c.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(data+".aside", "volumes"), filepath.Join(data, "volumes")); err != nil {
		n.c.t.Fatal(err)
	}
}
