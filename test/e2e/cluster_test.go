// Package e2e tests the whole product with real processes on this machine.
package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

func TestMain(m *testing.M) {
	code := m.Run()
	cluster.Clean()
	os.Exit(code)
}

// local gets a path of the local socket, which is not part of /v1.
func local(t *testing.T, n *cluster.Node, path string) (int, string) {
	t.Helper()
	h := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(n.Run, "clusterd.sock"))
	}}}
	defer h.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://clusterd"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := h.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// TestThreeNodesAndALUN walks through what an administrator does first, on a
// node that need not be the leader.
func TestThreeNodesAndALUN(t *testing.T) {
	c := cluster.New(t, 3)
	n1 := c.Nodes[0]
	n1.Start()
	if code, body := local(t, n1, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "uninitialised") {
		t.Errorf("readyz of a node without a cluster: %d %s", code, body)
	}
	if s, err := n1.Status(); err != nil || s.Health != api.HealthUninit || len(s.Problems) != 1 {
		t.Errorf("status of a node without a cluster: %s, %v", cluster.JSON(s), err)
	}
	if err := n1.Proc().Stop(); err != nil {
		t.Fatal(err)
	}
	c.Up()

	l := lun(t, c, "n3", 64<<20)
	if l.LUN != 1 || len(l.URLs) != 1 || l.State != api.HealthDegraded || !strings.HasPrefix(l.WWID, "36") {
		t.Errorf("lun create answered %s", cluster.JSON(l))
	}
	for _, n := range c.Nodes {
		s, err := n.Status()
		if err != nil {
			t.Fatal(err)
		}
		if s.Stale || !s.Quorum.Quorate || len(s.Quorum.Voters) != 3 || s.Quorum.Survives != 1 || s.Health != api.HealthDegraded {
			t.Errorf("status of %s: %s", n.Name, cluster.JSON(s))
		}
		if len(s.Problems) != 1 || s.Problems[0].Cause != "not redundant: one copy" {
			t.Errorf("problems on %s: %s", n.Name, cluster.JSON(s.Problems))
		}
		if code, body := local(t, n, "/readyz"); code != http.StatusOK {
			t.Errorf("readyz of %s: %d %s", n.Name, code, body)
		}
		_, m := local(t, n, "/metrics")
		// One of raft's (hashicorp/go-metrics), one of raft-boltdb's (armon/go-metrics),
		// one of ours.
		for _, want := range []string{"raft_commitTime", "raft_boltdb_storeLogs", "blockhouse_fsm_applied_index", "blockhouse_stream_accepted_total"} {
			if n == c.Leader() && !strings.Contains(m, want) {
				t.Errorf("/metrics of the leader lacks %s", want)
			}
		}
	}
}

// TestLeave: a node with data does not leave; one without does, and may join
// again; a witness votes and nothing else.
func TestLeave(t *testing.T) {
	c := cluster.New(t, 3).Up()
	lun(t, c, "n3", 1<<20)
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	leave := func(n *cluster.Node) error {
		_, err := api.Post[api.Done](ctx, n.API(), api.PathLeave, api.Leave{})
		return err
	}
	if err := leave(c.Node("n3")); err == nil || api.AsError(err).Code != api.CodeRefused || !strings.Contains(err.Error(), "v1") {
		t.Errorf("n3 holds the only copy of v1, and its leave gave: %v", err)
	}
	// The leader may leave too: it hands its leadership over first.
	lead := c.Leader()
	if lead.Name == "n3" {
		lead = c.Node("n1")
	}
	if err := leave(lead); err != nil {
		t.Fatalf("leave of %s: %v", lead.Name, err)
	}
	c.Wait("the node has no cluster any more", 30*time.Second, func() (bool, string) {
		s, err := lead.Status()
		return err == nil && s.Health == api.HealthUninit, string(s.Health)
	})
	rest := c.Node("n2")
	if lead == rest {
		rest = c.Node("n1")
	}
	s, err := rest.Status()
	if err != nil || len(s.Nodes) != 2 || slices.Contains(s.Quorum.Voters, lead.Name) || len(s.Fences) != 0 {
		t.Errorf("after the leave: %s, %v", cluster.JSON(s), err)
	}
	for _, k := range []string{"storage.pid", "locks.pid"} {
		if b, err := os.ReadFile(filepath.Join(lead.Run, k)); err == nil && workerRuns(lead, k) {
			t.Errorf("a worker of the node that left still runs: %s", b)
		}
	}
	lead.Join(rest)
	w := c.Add("w1")
	w.WriteConfig("[roles]\nwitness = true\nstorage = false\nhost = false")
	w.Start()
	w.Join(rest)
	c.Wait("four members, three of them voting", 60*time.Second, func() (bool, string) {
		s, err := rest.Status()
		if err != nil {
			return false, err.Error()
		}
		return len(s.Nodes) == 4 && len(s.Quorum.Voters) == 3 && len(s.Quorum.Online) == 3, cluster.JSON(s.Quorum)
	})
	s, err = rest.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Nodes {
		switch n.Name {
		case "w1":
			if !slices.Contains(n.Roles, "witness") || len(n.Workers) != 0 || len(n.Portals) != 0 {
				t.Errorf("the witness is %s", cluster.JSON(n))
			}
		case lead.Name:
			if n.Incarnation <= 1 { // never one that it had before
				t.Errorf("%s came back in incarnation %d", n.Name, n.Incarnation)
			}
		}
	}
}
