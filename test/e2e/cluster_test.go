package e2e

import (
	"context"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

func TestMain(m *testing.M) {
	defer cluster.Clean()
	m.Run()
}

func TestThreeNodesAndALUN(t *testing.T) {
	c := cluster.New(t, 3).Up()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	n2 := c.Nodes[1].API() // not necessarily the leader: it forwards
	tg, err := api.Post[api.Target](ctx, n2, api.PathTargets, api.TargetCreate{Name: "disks"})
	if err != nil {
		t.Fatal(err)
	}
	open := true
	if _, err := api.Post[api.Target](ctx, n2, api.PathACLs, api.ACLChange{Target: tg.IQN, Open: &open}); err != nil {
		t.Fatal(err)
	}
	l, err := api.Post[api.LUN](ctx, n2, api.PathLUNs, api.LUNCreate{Target: tg.IQN, Volume: "v1", Size: 64 << 20, LUN: -1, Node: "n3"})
	if err != nil {
		t.Fatal(err)
	}
	if l.LUN != 1 || len(l.URLs) != 1 {
		t.Fatalf("%+v", l)
	}
	s, err := c.Nodes[2].Status()
	if err != nil {
		t.Fatal(err)
	}
	t.Log(cluster.JSON(s))
}
