package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// fenced waits until a node's fence is closed and gives its record.
func fenced(t *testing.T, c *cluster.Cluster, by *cluster.Node, node string, limit time.Duration) api.FenceEvent {
	t.Helper()
	var out api.FenceEvent
	c.Wait(node+" fenced", limit, func() (bool, string) {
		if l := fenceEvents(t, by, node, "fenced"); len(l) > 0 {
			out = l[0]
			return true, ""
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		f, err := api.Get[api.List[api.Fence]](ctx, by.API(), api.PathFence)
		if err != nil {
			return false, err.Error()
		}
		return false, cluster.JSON(f.Items)
	})
	return out
}

// TestFenceByTarget: a node dies while its kernel, so to say, writes on: what has
// its initiator's name is cut off at the target before the fence is committed, and
// no write of it is acknowledged afterwards.
func TestFenceByTarget(t *testing.T) {
	c := cluster.New(t, 3, cluster.Profile("fast")).Up()
	n1, n2, n3 := c.Node("n1"), c.Node("n2"), c.Node("n3")
	l := lun(t, c, "n3", 16<<20)
	const name = "iqn.2026-11.io.blockhouse:node.n2"
	sess, err := initiator.Login(t.Context(), n3.IP+":3260", l.Target, initiator.Config{InitiatorName: name, NopInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close()
	dev, err := sess.OpenLUN(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	bystander := startStream(t, n3.IP+":3260", l.Target, 1)
	var acked atomic.Uint64
	var last atomic.Int64 // wall time of the last acknowledged write
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer wg.Wait()
	defer cancel()
	for w := range 16 {
		wg.Go(func() {
			buf := make([]byte, 4096)
			for seq := uint64(1); ctx.Err() == nil; seq++ {
				binary.BigEndian.PutUint64(buf, seq)
				if dev.WriteAt(ctx, buf, 8<<20+int64(w)*4096, 0) != nil {
					return
				}
				acked.Add(1)
				last.Store(time.Now().UnixNano())
			}
		})
	}
	c.Wait("writes", 10*time.Second, func() (bool, string) { return acked.Load() > 100, fmt.Sprint(acked.Load()) })
	// A leader that dies takes the grants' timing with it: n2 must not lead for the
	// figure to be one of a member.
	leads := c.Leader().Name
	killed := time.Now()
	n2.Kill()
	e := fenced(t, c, n1, "n2", 30*time.Second)
	if e.Method != "target" || !strings.Contains(e.Evidence, "cut off by n3") {
		t.Errorf("fenced by %s: %s", e.Method, e.Evidence)
	}
	if at := time.Unix(0, last.Load()); at.After(e.Time) {
		t.Errorf("a write of the dead node was acknowledged %v after the fence", at.Sub(e.Time))
	}
	if at := last.Load(); acked.Load() == 0 || at == 0 {
		t.Error("nothing was written")
	}
	if s, err := initiator.Login(t.Context(), n3.IP+":3260", l.Target, initiator.Config{InitiatorName: name}); err == nil {
		_ = s.Close()
		t.Error("the dead node's initiator may log in again")
	}
	if err := bystander.failure(); err != nil {
		t.Errorf("another initiator noticed: %v", err)
	}
	t.Logf("PROOF killed (leader: %s) to Fenced: %v, %d writes of the victim acknowledged before", leads, e.Time.Sub(killed).Round(time.Millisecond), acked.Load())

	// It is back: another incarnation, and its initiator is welcome again.
	n2.Start()
	c.Wait("n2 is a member again", 30*time.Second, func() (bool, string) {
		s, err := n1.Status()
		if err != nil {
			return false, err.Error()
		}
		for _, n := range s.Nodes {
			if n.Name == "n2" {
				return n.State == api.NodeOnline, string(n.State)
			}
		}
		return false, ""
	})
	c.Wait("its initiator logs in", 10*time.Second, func() (bool, string) {
		s, err := initiator.Login(t.Context(), n3.IP+":3260", l.Target, initiator.Config{InitiatorName: name})
		if err != nil {
			return false, err.Error()
		}
		return s.Close() == nil, ""
	})
}

// TestFenceByAgent: where no target can speak for a volume, the configured agents
// are tried in order, and a failing one is followed by the next.
func TestFenceByAgent(t *testing.T) {
	testproc.Need(t, "fence_dummy")
	dir := t.TempDir()
	c := cluster.New(t, 3, cluster.Config(fmt.Sprintf("[fence]\nagent_dirs = [%q, \"/usr/sbin\"]\n", dir))).Up()
	n1 := c.Node("n1")
	lun(t, c, "n3", 1<<20)
	// An agent that always fails, in the contract.
	broken := `#!/bin/sh
action=; while read -r l; do case $l in action=*) action=${l#action=};; esac; done
if [ "$action" = metadata ]; then cat <<'X'
<?xml version="1.0" ?><resource-agent name="fence_broken" shortdesc="always fails"><parameters>
<parameter name="action" required="1"><content type="string" default="off"/></parameter>
<parameter name="plug" required="0"><content type="string"/></parameter>
<parameter name="password" required="0"><content type="string"/></parameter>
</parameters><actions><action name="off"/><action name="on"/><action name="reboot"/><action name="status"/><action name="metadata"/></actions></resource-agent>
X
exit 0; fi
echo "the device does not answer" >&2
exit 1
`
	if err := os.WriteFile(filepath.Join(dir, "fence_broken"), []byte(broken), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	a := n1.API()
	state := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(state, []byte("on"), 0o600); err != nil {
		t.Fatal(err)
	}
	const secret = "hunter2-hunter2"
	for _, d := range []api.FenceDeviceSet{
		{Name: "broken", Agent: "fence_broken", Params: map[string]string{"password": secret}, TimeoutNS: 5 * time.Second},
		{Name: "dummy", Agent: "fence_dummy", Params: map[string]string{"status_file": state}, TimeoutNS: 10 * time.Second},
	} {
		got, err := api.Post[api.FenceDevice](ctx, a, api.PathFenceDevices, d)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(cluster.JSON(got), secret) || got.HasSecrets != (d.Name == "broken") {
			t.Errorf("device: %s", cluster.JSON(got))
		}
	}
	if _, err := api.Post[api.FenceMethods](ctx, a, api.PathFenceMethods, api.FenceMethods{Node: "n3", Off: true, Methods: []api.FenceMethod{
		{Name: "first", Uses: []api.FenceUse{{Device: "broken", Plug: "3"}}}, {Name: "second", Uses: []api.FenceUse{{Device: "dummy", Plug: "3"}}}}}); err != nil {
		t.Fatal(err)
	}
	test, err := api.Post[api.FenceTested](ctx, a, api.PathFenceTest, api.FenceTest{Node: "n3"})
	if err != nil || test.OK || len(test.Results) != 3 || !test.Results[0].OK || test.Results[1].OK || !test.Results[2].OK {
		t.Errorf("test: %s, %v", cluster.JSON(test), err)
	}
	c.Node("n3").Kill()
	e := fenced(t, c, n1, "n3", 60*time.Second)
	if e.Method != "agent" {
		t.Errorf("fenced by %s: %s", e.Method, e.Evidence)
	}
	h, err := api.Get[api.List[api.FenceEvent]](ctx, a, api.PathFenceHistory)
	if err != nil {
		t.Fatal(err)
	}
	var tries []string
	for _, x := range h.Items {
		if x.Event == "end" {
			tries = append(tries, x.Reason)
		}
	}
	if len(tries) < 3 || !strings.Contains(tries[0], "does not answer") || !strings.Contains(tries[1], "does not answer") || !strings.Contains(tries[len(tries)-1], "off dummy:3: ok") {
		t.Errorf("attempts: %q", tries)
	}
	if b, err := os.ReadFile(state); err != nil || !strings.Contains(string(b), "off") {
		t.Errorf("the dummy's state: %q, %v", b, err)
	}
	for _, n := range c.Nodes {
		if strings.Contains(n.Logs(), secret) {
			t.Errorf("the device's password is in the log of %s", n.Name)
		}
	}
	// An operator wants a live node gone.
	if _, err := api.Post[api.Done](ctx, a, api.PathFenceRun, api.FenceRun{Node: "n2", Confirm: "n1"}); err == nil {
		t.Error("the wrong name confirms a fence")
	}
}
