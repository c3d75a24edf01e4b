package control

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/membership/gossip"
)

// gossip runs memberlist for its hints. What it says is logged and shown as an
// event; leases decide (facts/cluster.md §0: a busy process produced 188 false
// deaths). It is tried again for ever, since nothing waits for it.
func (m *member) gossip(ctx context.Context) {
	id, a := m.identity(), m.advertised()
	var g *gossip.Gossip
	for {
		var err error
		g, err = gossip.Start(gossip.Config{Name: id.Node, Cluster: id.UUID, Bind: bindAddr(m.d.cfg.Listen.Gossip), Advertise: a.Gossip,
			Keys: [][]byte{id.GossipKey}, Log: m.log.Named("gossip"),
			Meta: gossip.Meta{Incarnation: id.Incarnation, Raft: a.Raft, API: a.API, ISCSI: a.ISCSI}})
		if err == nil {
			break
		}
		m.log.Warn("gossip does not start; only hints are missing", zap.Error(err))
		if m.d.clock.Sleep(ctx, 5*time.Second) != nil {
			return
		}
	}
	defer func() {
		if err := g.Close(100 * time.Millisecond); err != nil {
			m.log.Debug("close gossip", zap.Error(err))
		}
	}()
	join := time.NewTicker(10 * time.Second)
	defer join.Stop()
	meet := func() {
		addrs := m.gossipPeers()
		if len(addrs) > 0 && len(g.Alive()) < len(addrs)+1 {
			if _, err := g.Join(addrs...); err != nil {
				m.log.Debug("gossip join", zap.Error(err))
			}
		}
	}
	meet()
	for {
		select {
		case ev := <-g.Events():
			if ev.Node != id.Node {
				m.log.Info("gossip hint", zap.String("kind", string(ev.Kind)), zap.String("peer", ev.Node))
				m.d.event("hint", fmt.Sprintf("gossip: %s %s", ev.Node, ev.Kind), map[string]any{"node": ev.Node, "hint": string(ev.Kind)})
			}
		case <-join.C:
			meet()
		case <-ctx.Done():
			return
		}
	}
}
