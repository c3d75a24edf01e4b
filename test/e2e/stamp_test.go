package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/internal/testnet"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// ghost is a host's kernel: its initiator writes stamped blocks through a proxy, 16
// at a time, whatever happens to the daemons beside it, and logs in again when it
// can.
type ghost struct {
	name   string
	writer uint64
	life   atomic.Uint64
	acked  atomic.Uint64
	flying atomic.Int32
	proxy  *testnet.Proxy
	stop   context.CancelFunc
	wg     sync.WaitGroup
}

const ghostDepth = 16

func newGhost(t *testing.T, i uint64, portal, iqn string) *ghost {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &ghost{name: fmt.Sprintf("n%d", i), writer: i}
	g.life.Store(1)
	g.proxy = testnet.StartProxy(t, ln, func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", portal)
	})
	ctx, cancel := context.WithCancel(context.Background())
	g.stop = cancel
	g.wg.Go(func() {
		for ctx.Err() == nil {
			g.session(ctx, iqn)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	t.Cleanup(func() { cancel(); g.proxy.SetStall(false); g.wg.Wait() })
	return g
}

// session is one login, until it fails.
func (g *ghost) session(ctx context.Context, iqn string) {
	life := g.life.Load()
	s, err := initiator.Login(ctx, g.proxy.Addr(), iqn, initiator.Config{InitiatorName: "iqn.2026-11.io.blockhouse:node." + g.name, NopInterval: -1})
	if err != nil {
		return
	}
	defer s.Close()
	dev, err := s.OpenLUN(ctx, 1)
	if err != nil {
		return
	}
	var wg sync.WaitGroup
	for w := range uint64(ghostDepth) {
		wg.Go(func() {
			buf := make([]byte, 4096)
			for seq := uint64(1); ctx.Err() == nil; seq++ {
				stamp{g.writer, life, seq}.put(buf)
				g.flying.Add(1)
				err := dev.WriteAt(ctx, buf, int64(g.writer*ghostDepth+w)*4096, 0)
				g.flying.Add(-1)
				if err != nil {
					return
				}
				g.acked.Add(1)
			}
		})
	}
	wg.Wait()
}

// writerEpoch kills nodes whose kernels write on, and counts the writes of a life
// that land behind its Fenced. With lie the operator says at once that the node was
// reset, which it was not.
func writerEpoch(t *testing.T, faults int, env []string) (behind, stalled int, times []time.Duration) {
	c := cluster.New(t, 3, cluster.Profile("fast"), cluster.Config("[iscsi]\nnop_interval = \"20s\"\nnop_timeout = \"20s\"\n"))
	n3 := c.Node("n3")
	n3.Env = env
	c.Up()
	m := newMedium(t, 1<<20)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	a := n3.API()
	tg, err := api.Post[api.Target](ctx, a, api.PathTargets, api.TargetCreate{Name: "disks"})
	if err != nil {
		t.Fatal(err)
	}
	open := true
	if _, err := api.Post[api.Target](ctx, a, api.PathACLs, api.ACLChange{Target: tg.IQN, Open: &open}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Post[api.LUN](ctx, a, api.PathLUNs, api.LUNCreate{Target: tg.IQN, Volume: "v1", LUN: 1, Node: "n3", BlockSize: 512, Store: "nbd+unix:///?socket=" + m.sock}); err != nil {
		t.Fatal(err)
	}
	ghosts := map[string]*ghost{}
	for i := range uint64(2) {
		g := newGhost(t, i+1, n3.IP+":3260", tg.IQN)
		ghosts[g.name] = g
	}
	r := rand.New(rand.NewPCG(uint64(faults), 1))
	for k := range faults {
		victim := c.Node([]string{"n1", "n2"}[r.IntN(2)])
		g := ghosts[victim.Name]
		acked := g.acked.Load()
		c.Wait(victim.Name+" writes", 30*time.Second, func() (bool, string) {
			return g.acked.Load() > acked+ghostDepth && g.flying.Load() >= ghostDepth-2, fmt.Sprint(g.acked.Load(), g.flying.Load())
		})
		life := g.life.Load()
		seen, evicted := len(fenceEvents(t, n3, victim.Name, "fenced")), len(fenceEvents(t, n3, victim.Name, "evict"))
		if k%3 == 0 {
			stalled++
			m.stall()
			c.Wait("writes held in the backend", 10*time.Second, func() (bool, string) {
				_, held, _ := m.landed(g.writer, life)
				return held >= ghostDepth/2, fmt.Sprint(held)
			})
		}
		g.proxy.SetStall(true) // what it sends now arrives behind the fence
		killed := time.Now()
		victim.Kill()
		// The disk comes to itself when a fence that did not wait for it is over.
		c.Wait(victim.Name+" evicted", 60*time.Second, func() (bool, string) {
			n := len(fenceEvents(t, n3, victim.Name, "evict"))
			return n > evicted, fmt.Sprint(n)
		})
		stuck := time.AfterFunc(time.Duration(2000+r.IntN(2000))*time.Millisecond, m.release)
		var e api.FenceEvent
		c.Wait(victim.Name+" fenced", 60*time.Second, func() (bool, string) {
			l := fenceEvents(t, n3, victim.Name, "fenced")
			if len(l) > seen {
				e = l[len(l)-1]
			}
			return len(l) > seen, fmt.Sprint(len(l))
		})
		times = append(times, e.Time.Sub(killed))
		g.proxy.SetStall(false)
		time.Sleep(100 * time.Millisecond) // what was on the way arrives
		stuck.Stop()
		m.release()
		time.Sleep(50 * time.Millisecond)
		if n, _, last := m.landed(g.writer, life); last.After(e.Time) {
			behind++
			t.Logf("fault %d: a write of %s's life %d landed %v behind its Fenced (%s: %s); %d in all", k, victim.Name, life, last.Sub(e.Time), e.Method, e.Evidence, n)
		}
		g.life.Add(1) // its kernel boots anew, its daemons start
		victim.Start()
		c.Wait(victim.Name+" is a member again", 60*time.Second, func() (bool, string) {
			s, err := n3.Status()
			if err != nil {
				return false, err.Error()
			}
			i := slices.IndexFunc(s.Nodes, func(n api.Node) bool { return n.Name == victim.Name })
			return s.Nodes[i].State == api.NodeOnline, string(s.Nodes[i].State)
		})
	}
	return behind, stalled, times
}

// fenceEvents are a node's lines of the fence history, of one kind.
func fenceEvents(t *testing.T, by *cluster.Node, node, event string) (out []api.FenceEvent) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	l, err := api.Get[api.List[api.FenceEvent]](ctx, by.API(), api.PathFenceHistory)
	if err != nil {
		return nil
	}
	for _, e := range l.Items {
		if e.Event == event && e.Node == node {
			out = append(out, e)
		}
	}
	return out
}

// TestWriterEpoch is the end-to-end proof of fencing: no block of a dead node's life
// lands behind its Fenced, whatever was on the wire or in the backend.
func TestWriterEpoch(t *testing.T) {
	n := testproc.Count(t, 3)
	behind, stalled, times := writerEpoch(t, n, nil)
	if behind != 0 {
		t.Errorf("%d of %d faults show writes behind the fence", behind, n)
	}
	slices.Sort(times)
	t.Logf("PROOF %d faults, backend stalled in %d: no write behind its Fenced; killed to Fenced p50 %v max %v", n, stalled, times[len(times)/2].Round(time.Millisecond), times[len(times)-1].Round(time.Millisecond))
}

// TestWriterEpochMutations: the same with the cut switched off, wholly and in part,
// must show it.
func TestWriterEpochMutations(t *testing.T) {
	for _, m := range []string{"cut-drains-first", "targets-cut"} {
		t.Run(m, func(t *testing.T) {
			n := testproc.Count(t, 2)
			behind, _, _ := writerEpoch(t, n, []string{"BLOCKHOUSE_MUTATION=" + m})
			if behind == 0 {
				t.Errorf("%s is off and no write lands behind the fence in %d faults", m, n)
			}
			t.Logf("PROOF without %s: %d of %d faults show writes behind the fence", m, behind, n)
		})
	}
}
