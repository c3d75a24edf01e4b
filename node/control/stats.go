package control

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// Numbers and events of the storage worker. They are asked for over connections
// of their own (link.Ask): a worker that is slow to answer, or an administrator
// who asks often, holds up no lease and no state.

// pathNodeStats answers with this node's numbers alone.
const pathNodeStats = "/v1/cluster/stats"

// statsTimeout bounds the question to a worker or a node: a list that is short of
// one node is worth more than one that comes late.
const statsTimeout = 2 * time.Second

// statsRoutes are the handlers of numbers. Any node answers, with or without a
// quorum: nothing is decided by them.
func (m *member) statsRoutes(mux *http.ServeMux) {
	mux.Handle("GET "+api.PathStats, handler(m.getStats))
	mux.Handle("GET "+pathNodeStats, handler(func(r *http.Request) (any, error) {
		if err := fromNode(r); err != nil {
			return nil, err
		}
		return m.ownStats(r.Context())
	}))
}

// ownStats asks this node's worker.
func (m *member) ownStats(ctx context.Context) (api.NodeStats, error) {
	var s api.NodeStats
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	err := link.Ask(ctx, link.Socket(m.d.cfg.RunDir, link.Storage), link.TStats, struct{}{}, &s)
	if err != nil {
		return s, api.Errorf(api.CodeUnreachable, "clusteradm status", "the storage worker of %s: %v", m.identity().Node, err)
	}
	s.Node = m.identity().Node // the worker may not have been told yet
	return s, nil
}

// allStats asks every active storage node, or the named one. Who does not answer
// is in the list with the error.
func (m *member) allStats(ctx context.Context, only string) []api.NodeStats {
	type node struct {
		p    peer
		self bool
	}
	var nodes []node
	m.cluster.Read(func(v machines.View) {
		for _, r := range v.Members.State().List() {
			if r.Active() && r.Roles.Storage && (only == "" || r.Name == only) {
				nodes = append(nodes, node{peer{Name: r.Name, API: r.Addresses.API, Raft: r.Addresses.Raft}, r.Name == m.identity().Node})
			}
		}
	})
	out := make([]api.NodeStats, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, statsTimeout+time.Second/2)
			defer cancel()
			var err error
			if n.self {
				out[i], err = m.ownStats(ctx)
			} else {
				out[i], err = api.Get[api.NodeStats](ctx, m.client(n.p), pathNodeStats)
			}
			if err != nil {
				out[i] = api.NodeStats{Error: err.Error(), Time: m.d.clock.Wall(), LUNs: []api.LUNStats{}, Sessions: []api.Session{}}
			}
			out[i].Node = n.p.Name
		})
	}
	wg.Wait()
	slices.SortFunc(out, func(a, b api.NodeStats) int { return strings.Compare(a.Node, b.Node) })
	return out
}

func (m *member) getStats(r *http.Request) (any, error) {
	only := r.URL.Query().Get("node")
	ns := m.allStats(r.Context(), only)
	if only != "" && len(ns) == 0 {
		return nil, api.Errorf(api.CodeNotFound, "clusteradm node list", "no storage node is called %s", only)
	}
	return api.Stats{APIVersion: api.Version, Nodes: ns}, nil
}

// detailed fills in what only the nodes themselves know of their sessions. A
// session that is not in both lists began or ended meanwhile, and stays as it is.
func detailed(ss []api.Session, ns []api.NodeStats) []api.Session {
	type key struct {
		node string
		tsih uint16
		isid string
	}
	by := map[key]api.Session{}
	for _, n := range ns {
		for _, s := range n.Sessions {
			by[key{n.Node, s.TSIH, s.ISID}] = s
		}
	}
	for i, s := range ss {
		if full, ok := by[key{s.Node, s.TSIH, s.ISID}]; ok && full.Since.Equal(s.Since) {
			full.Node = s.Node
			ss[i] = full
		}
	}
	return ss
}

// fetchEvents brings the worker's events into ours, whenever its report says that
// there are new ones.
func (m *member) fetchEvents(ctx context.Context) {
	var have link.Events // of the worker process that we last heard
	var of string        // its incarnation in reports
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.eventKick:
		case <-tick.C:
		}
		rep, ok := m.workers.report(link.Storage)
		if !ok || !rep.connected {
			continue
		}
		var d storageDetail
		if json.Unmarshal(rep.Detail, &d) != nil || d.Events == 0 || d.Events == have.Last && rep.Incarnation == of {
			continue
		}
		var got link.Events
		actx, cancel := context.WithTimeout(ctx, statsTimeout)
		err := link.Ask(actx, link.Socket(m.d.cfg.RunDir, link.Storage), link.TEvents, link.EventsAfter{Worker: have.Worker, After: have.Last}, &got)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				m.log.Debug("cannot fetch the storage worker's events", zap.Error(err))
			}
			continue
		}
		of = rep.Incarnation
		for _, e := range got.Events {
			e.Index = m.cluster.Index()
			m.d.events.add(e)
		}
		got.Events = nil
		have = got
	}
}
