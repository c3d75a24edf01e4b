package gossip

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

var key = bytes.Repeat([]byte{7}, 32)

// fast shortens memberlist's timing so that a death is seen in a second or so.
func fast(c *memberlist.Config) {
	c.ProbeInterval, c.ProbeTimeout = 100*time.Millisecond, 50*time.Millisecond
	c.GossipInterval, c.SuspicionMult = 20*time.Millisecond, 2
	c.TCPTimeout = time.Second
}

func run(t *testing.T, name, cluster string, keys ...[]byte) *Gossip {
	t.Helper()
	g, err := Start(Config{
		Name: name, Cluster: cluster, Bind: "127.0.0.1:0", Keys: keys, Tune: fast, Log: zap.NewNop(),
		Meta: Meta{Incarnation: 1, Raft: name + ":7000", ISCSI: []string{name + ":3260"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close(0) })
	return g
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func names(g *Gossip) string {
	var out []string
	for _, p := range g.Alive() {
		out = append(out, p.Node)
	}
	return strings.Join(out, " ")
}

// next waits for an event of a kind about a node.
func next(t *testing.T, g *Gossip, kind EventKind, node string) Event {
	t.Helper()
	end := time.After(patience)
	for {
		select {
		case e := <-g.Events():
			if e.Kind == kind && e.Node == node {
				return e
			}
		case <-end:
			t.Fatalf("no %s of %s", kind, node)
		}
	}
}

func TestHints(t *testing.T) {
	t.Parallel()
	a, b, c := run(t, "n1", "u1", key), run(t, "n2", "u1", key), run(t, "n3", "u1", key)
	for _, g := range []*Gossip{b, c} {
		if n, err := g.Join(a.Addr()); err != nil || n != 1 {
			t.Fatalf("%d, %v", n, err)
		}
	}
	for _, g := range []*Gossip{a, b, c} {
		eventually(t, "three see each other", func() bool { return names(g) == "n1 n2 n3" })
	}
	e := next(t, a, Joined, "n3")
	if e.Meta.Raft != "n3:7000" || e.Meta.Incarnation != 1 || e.Addr != c.Addr() {
		t.Fatalf("%+v", e)
	}
	if err := c.SetMeta(Meta{Incarnation: 2, Raft: "n3:7001"}, time.Second); err != nil {
		t.Fatal(err)
	}
	if e := next(t, a, Updated, "n3"); e.Meta.Incarnation != 2 {
		t.Fatalf("%+v", e)
	}
	if err := b.Close(time.Second); err != nil { // says goodbye
		t.Fatal(err)
	}
	next(t, a, Left, "n2")
	if err := c.Close(0); err != nil { // dies
		t.Fatal(err)
	}
	next(t, a, Failed, "n3")
	eventually(t, "alone", func() bool { return names(a) == "n1" })
}

// Neither another key nor another cluster's label gets in.
func TestKeysAndLabel(t *testing.T) {
	t.Parallel()
	key2 := bytes.Repeat([]byte{9}, 32)
	a := run(t, "n1", "u1", key)
	for _, g := range []*Gossip{run(t, "n8", "u1", key2), run(t, "n9", "u2", key)} {
		if n, err := g.Join(a.Addr()); err == nil || n != 0 {
			t.Fatalf("a stranger joined: %d", n)
		}
	}
	if names(a) != "n1" {
		t.Fatal(names(a))
	}
	// Rotation: both keys, then the new one first, then alone.
	b := run(t, "n2", "u1", key)
	if _, err := b.Join(a.Addr()); err != nil {
		t.Fatal(err)
	}
	for _, keys := range [][][]byte{{key, key2}, {key2, key}, {key2}} {
		for _, g := range []*Gossip{a, b} {
			if err := g.SetKeys(keys); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.Join(a.Addr()); err != nil {
			t.Fatalf("with %d keys: %v", len(keys), err)
		}
	}
	if got := a.ring.GetKeys(); len(got) != 1 || !slices.Equal(got[0], key2) {
		t.Fatalf("keys left: %d", len(got))
	}
	if _, err := run(t, "n3", "u1", key).Join(a.Addr()); err == nil {
		t.Fatal("the old key still opens")
	}
}

func TestStartRefusals(t *testing.T) {
	t.Parallel()
	good := Config{Name: "n", Cluster: "u", Bind: "127.0.0.1:0", Keys: [][]byte{key}, Log: zap.NewNop()}
	for name, change := range map[string]func(*Config){
		"no keys":   func(c *Config) { c.Keys = nil },
		"short key": func(c *Config) { c.Keys = [][]byte{{1}} },
		"bad bind":  func(c *Config) { c.Bind = "nonsense" },
		"bad port":  func(c *Config) { c.Bind = "127.0.0.1:99999" },
		"big meta": func(c *Config) {
			for i := range 60 {
				c.Meta.ISCSI = append(c.Meta.ISCSI, fmt.Sprintf("10.0.0.%d:3260", i))
			}
		},
	} {
		c := good
		change(&c)
		if g, err := Start(c); err == nil {
			_ = g.Close(0)
			t.Errorf("%s: started", name)
		}
	}
}

func TestLogLines(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zapcore.DebugLevel)
	w := logLines{zap.New(core)}
	for _, s := range []string{"[ERR] memberlist: bad\n", "[WARN] memberlist: odd\n", "[DEBUG] memberlist: fine\n", "plain\n"} {
		if n, err := w.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatal(n, err)
		}
	}
	var got []string
	for _, e := range logs.All() {
		got = append(got, e.Level.String()+" "+e.Message)
	}
	if s := strings.Join(got, "|"); s != "error bad|warn odd|debug fine|info plain" {
		t.Fatal(s)
	}
}
