package e2e

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// creator makes volumes without end and notes the acknowledged ones. A request
// that got no answer is repeated with its request id.
type creator struct {
	c      *cluster.Cluster
	prefix string

	mu    sync.Mutex
	acked map[string]string // name → uuid
}

func (k *creator) run(ctx context.Context) {
	for i := 0; ctx.Err() == nil; i++ {
		q := api.VolumeCreate{Name: fmt.Sprintf("%s-%d", k.prefix, i), Size: 1 << 20, Replicas: 1, RequestID: uuid.NewString()}
		for n := 0; ctx.Err() == nil; n++ {
			node := k.c.Nodes[(i+n)%len(k.c.Nodes)]
			rctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			v, err := api.Post[api.Volume](rctx, api.Dial(node.Run+"/clusterd.sock"), api.PathVolumes, q)
			cancel()
			if err == nil {
				k.mu.Lock()
				k.acked[v.Name] = v.UUID
				k.mu.Unlock()
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// TestLeaderKilledUnderLoad kills the control process of the leader again and
// again while volumes are created, and looks for every acknowledged one after
// each.
func TestLeaderKilledUnderLoad(t *testing.T) {
	for _, profile := range []string{"normal", "fast"} {
		t.Run(profile, func(t *testing.T) {
			c := cluster.New(t, 3, cluster.Profile(profile)).Up()
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			var loads []*creator
			for i := range 2 {
				k := &creator{c: c, prefix: fmt.Sprintf("v%d", i), acked: map[string]string{}}
				loads = append(loads, k)
				wg.Go(func() { k.run(ctx) })
			}
			defer wg.Wait()
			defer cancel()
			var times []time.Duration
			kills := testproc.Count(t, 3)
			for i := range kills {
				lead := c.Leader()
				time.Sleep(300 * time.Millisecond) // some load under this leader
				lead.KillControl()
				killed := time.Now()
				var other, young *cluster.Node
				for _, n := range c.Nodes {
					if n != lead {
						other = n
						break
					}
				}
				c.Wait("a new leader", 60*time.Second, func() (bool, string) {
					s, err := other.Quorum()
					if err != nil {
						return false, err.Error()
					}
					young = c.Node(s.Leader)
					return s.Quorate && young != nil && young != lead, fmt.Sprintf("%+v", s)
				})
				times = append(times, ledAt(t, c, young, killed).Sub(killed))
				lead.Start()
				missing(t, c, loads, i)
			}
			cancel()
			wg.Wait()
			total := missing(t, c, loads, kills)
			if total < kills {
				t.Errorf("only %d volumes were acknowledged over %d kills: there was no load", total, kills)
			}
			slices.Sort(times)
			t.Logf("PROOF leader killed %d times, profile %s: %d acknowledged volumes, all present; new leader after p50 %v max %v",
				kills, profile, total, times[len(times)/2].Round(time.Millisecond), times[len(times)-1].Round(time.Millisecond))
			// facts/cluster.md §4.2: 1.06 s and 0.35 s; the bound is five times the goal.
			limit := map[string]time.Duration{"normal": 6 * time.Second, "fast": 2500 * time.Millisecond}[profile]
			if p50 := times[len(times)/2]; p50 > limit {
				t.Errorf("p50 of the time to a new leader is %v, more than %v", p50, limit)
			}
		})
	}
}

// ledAt is when the node began to lead after the kill: its barrier was committed,
// so that it could act. The clock is the one of this machine.
func ledAt(t *testing.T, c *cluster.Cluster, n *cluster.Node, killed time.Time) time.Time {
	t.Helper()
	var at time.Time
	c.Wait("the new leader says since when", 30*time.Second, func() (bool, string) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err := n.API().RecentEvents(ctx, func(e api.Event) error {
			if e.Kind == "leader" && e.Time.After(killed) {
				at = e.Time
			}
			return nil
		})
		return !at.IsZero(), fmt.Sprint(err)
	})
	return at
}

// missing fails the test for every acknowledged volume that is not there. It
// returns how many were acknowledged.
func missing(t *testing.T, c *cluster.Cluster, loads []*creator, round int) int {
	t.Helper()
	want := map[string]string{}
	for _, k := range loads {
		k.mu.Lock()
		for n, id := range k.acked {
			want[n] = id
		}
		k.mu.Unlock()
	}
	c.Wait("every acknowledged volume is there", 60*time.Second, func() (bool, string) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		l, err := api.Get[api.List[api.Volume]](ctx, c.Leader().API(), api.PathVolumes)
		if err != nil || l.Stale {
			return false, fmt.Sprintf("stale %v, %v", l.Stale, err)
		}
		have := map[string]string{}
		for _, v := range l.Items {
			have[v.Name] = v.UUID
		}
		for n, id := range want {
			if have[n] != id {
				t.Fatalf("round %d: volume %s (%s) was acknowledged and is %q now", round, n, id, have[n])
			}
		}
		return true, ""
	})
	return len(want)
}
