package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/internal/version"
	"github.com/blockhouse-san/blockhouse/membership/detect"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/pki"
	"github.com/blockhouse-san/blockhouse/membership/raftlog"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// member is a node that belongs to a cluster: everything that stands on its
// identity. It is opened once, and closed before the node leaves or ends.
type member struct {
	d         *Daemon
	log       *zap.Logger
	files     *pki.Files
	cluster   *machines.Cluster
	mux       *raftlog.Mux
	raft      *raftlog.Node
	workers   *workers
	granter   *granter
	agents    *agent.Runner
	table     *leaderTable
	apiSrv    *http.Server
	handler   http.Handler // of /v1, for both ports
	refused   *prometheus.CounterVec
	eventKick chan struct{} // a worker has reported something new

	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	gone    chan struct{} // closed when the cluster says that we are no member any more
	admitMu sync.Mutex
	keyGot  chan struct{} // the sealing key came; the workers do not have it

	mu struct {
		sync.Mutex
		id       identity
		lease    env.Boot          // end of our node lease
		caughtUp bool              // we have seen a leader's read index since this start
		fenceWhy map[string]string // as the leader: what each open fence waits for, by node
		goneWhy  string
		asking   bool // an admission is under way
		clients  map[string]*api.Client
	}
}

func raftDir(cfg config.Config) string { return filepath.Join(cfg.DataDir, "raft") }
func pkiDir(cfg config.Config) string  { return filepath.Join(cfg.DataDir, "pki") }

// openMember starts what a member is made of, in the order in which each stands
// on the one before; close is the mirror image.
func openMember(d *Daemon, id identity) (_ *member, err error) {
	m := &member{d: d, log: d.log.With(zap.String("node", id.Node)), gone: make(chan struct{}), keyGot: make(chan struct{}, 1), eventKick: make(chan struct{}, 1)}
	m.mu.id = id
	m.mu.clients = map[string]*api.Client{}
	var undo []func()
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
	}()
	if m.files, err = pki.LoadFiles(pkiDir(d.cfg)); err != nil {
		return nil, fmt.Errorf("load keys: %w", err)
	}
	if m.cluster, err = machines.New(m.log); err != nil {
		return nil, err
	}
	m.refused = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "blockhouse_refused_total",
		Help: "API requests refused, by port and reason."}, []string{"port", "reason"})
	if err := d.reg.Register(m.refused); err != nil {
		return nil, err
	}
	undo = append(undo, func() { d.reg.Unregister(m.refused) })
	m.mux, err = raftlog.NewMux(raftlog.MuxConfig{Files: m.files, Cluster: m.cluster, BootID: d.bootID,
		Incarnation: m.incarnation, Log: m.log.Named("stream"), Registerer: d.reg})
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() { _ = m.mux.Close() })
	m.raft, err = raftlog.Open(raftlog.Config{Dir: raftDir(d.cfg), Name: id.Node, Address: m.advertised().Raft,
		Profile: raftlog.Profile(d.cfg.Profile), Mux: m.mux, Cluster: m.cluster, Log: m.log.Named("raft")})
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() { _ = m.raft.Close() })

	m.agents = agent.New(agent.Config{Node: id.Node, Dirs: d.cfg.Fence.AgentDirs, Clock: d.clock})
	times := d.cfg.Times()
	m.table = newLeaderTable(detect.Default(times.TTL), d.clock)
	m.granter = &granter{ttl: times.TTL, clock: d.clock, log: m.log, verify: m.raft.VerifyLeader, leader: m.leaderPeer,
		member: m.record, heard: func(r renew) { m.tellChecks(r.Node, m.table.heard(r), r.Volumes) }, queue: make(chan waiting, 256)}
	m.workers = newWorkers(link.ControlHello{Incarnation: d.incarnation, Node: id.Node, Cluster: id.UUID, PID: os.Getpid()},
		d.cfg.RunDir, d.clock, m.log)
	m.workers.command = d.workerCommand
	m.workers.request = m.workerRequest
	renew := &renewer{interval: times.Renew, ttl: times.TTL, clock: d.clock, log: m.log, leader: func() (peer, bool) {
		p, _ := m.leaderPeer()
		return p, p.Raft != ""
	}, peers: m.peers, dial: m.dialLease, fill: m.renewal, granted: m.onGrant, denied: m.onDeny, kick: make(chan struct{}, 1)}
	m.workers.changed = func() {
		select {
		case renew.kick <- struct{}{}:
		default:
		}
		select {
		case m.eventKick <- struct{}{}:
		default:
		}
	}

	ctx, cancel := context.WithCancel(context.Background())
	m.ctx, m.cancel = ctx, cancel
	m.mux.Handle(raftlog.ALPNLease, func(hctx context.Context, p raftlog.Peer, c net.Conn) {
		if err := m.granter.serve(hctx, p.Node, c); err != nil && hctx.Err() == nil {
			m.log.Debug("lease stream of a member ended", zap.String("peer", p.Node), zap.Error(err))
		}
	})
	if err := m.mux.Listen(d.cfg.Listen.Raft); err != nil {
		cancel()
		return nil, err
	}
	m.handler = m.routes()
	if err := m.listenAPI(); err != nil {
		cancel()
		return nil, err
	}
	m.wg.Go(func() { m.granter.run(ctx) })
	m.wg.Go(func() { m.catchUp(ctx) })
	m.wg.Go(func() { renew.run(ctx) })
	m.wg.Go(func() { m.workers.run(ctx, d.workerKinds()) })
	m.wg.Go(func() { m.lead(ctx) })
	m.wg.Go(func() { m.follow(ctx) })
	m.wg.Go(func() { m.execute(ctx) })
	m.wg.Go(func() { m.gossip(ctx) })
	m.wg.Go(func() { m.keepKey(ctx) })
	m.wg.Go(func() { m.fetchEvents(ctx) })
	return m, nil
}

// close ends everything of a member but its workers.
func (m *member) close() error {
	m.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := m.apiSrv.Shutdown(ctx)
	if err != nil {
		err = m.apiSrv.Close()
	}
	m.wg.Wait()
	err = errors.Join(err, m.raft.Close(), m.mux.Close())
	m.d.reg.Unregister(m.refused)
	for _, c := range m.mu.clients {
		c.Close()
	}
	return err
}

func (m *member) identity() identity {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.id
}

// incarnation is what we say of ourselves to peers.
func (m *member) incarnation() uint64 { return m.identity().Incarnation }

// advertised is where others reach this node.
func (m *member) advertised() members.Addresses { return m.d.advertised() }

// record reads a member for the granter. The stamp's index is that of the last
// change of members or fences: a gate opens only behind it.
func (m *member) record(node string) (rec members.Record, stamp link.Stamp, known bool) {
	idx := max(m.cluster.Modified(fsm.Members), m.cluster.Modified(fsm.Fence))
	m.cluster.Read(func(v machines.View) {
		rec, known = v.Members.Get(node)
		_, _, epoch, view := v.Members.Cluster()
		stamp = link.Stamp{Index: idx, View: view, Epoch: epoch}
	})
	return rec, stamp, known
}

// incarnationOf is the admitted incarnation of a member.
func (m *member) incarnationOf(node string) (uint64, bool) {
	rec, _, known := m.record(node)
	if !known {
		var uuid string
		m.cluster.Read(func(v machines.View) { _, uuid, _, _ = v.Members.Cluster() })
		return 0, uuid == "" // nothing is known here yet
	}
	return rec.Incarnation, known
}

// leaderPeer is who leads as Raft knows it, with addresses from the FSM, and
// whether it is us.
func (m *member) leaderPeer() (peer, bool) {
	l, _ := m.raft.Leadership()
	if l.ID == "" {
		return peer{}, false
	}
	p := peer{Name: l.ID, Raft: l.Addr}
	m.cluster.Read(func(v machines.View) {
		if r, ok := v.Members.Get(l.ID); ok {
			p.API = r.Addresses.API
		}
	})
	if p.API == "" {
		for _, k := range m.identity().Peers {
			if k.Name == l.ID {
				p.API = k.API
			}
		}
	}
	return p, l.Self && l.ID == m.identity().Node
}

// peers are the other members, as the FSM knows them or as we last wrote down.
func (m *member) peers() []peer {
	id := m.identity()
	var out []peer
	m.cluster.Read(func(v machines.View) {
		for _, r := range v.Members.State().List() {
			if r.Name != id.Node {
				out = append(out, peer{Name: r.Name, API: r.Addresses.API, Raft: r.Addresses.Raft})
			}
		}
	})
	if len(out) == 0 {
		out = id.Peers
	}
	return out
}

func (m *member) dialLease(ctx context.Context, p peer) (net.Conn, error) {
	_, c, err := m.mux.Dial(ctx, p.Raft, raftlog.ALPNLease, p.Name)
	var re *raftlog.RefusedError
	if errors.As(err, &re) && re.Remote && re.Reason == raftlog.OldIncarnation {
		m.onDeny(deny{Code: denyAdmit, Why: re.Text})
	}
	return c, err
}

// client talks to another node's API. Clients are kept, with their connections.
func (m *member) client(p peer) *api.Client {
	inc := m.incarnation()
	key := fmt.Sprintf("%s %s %d", p.Name, p.API, inc)
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.mu.clients[key]; c != nil {
		return c
	}
	c := api.DialTLS(p.API, m.files.ClientTLS(m.d.clock.Wall, pki.Want{Role: pki.Node, Name: p.Name}))
	c.SetHeader(hdrIncarnation, fmt.Sprint(inc))
	c.SetHeader(hdrForwarded, m.mu.id.Node)
	m.mu.clients[key] = c
	return c
}

// forward hands a request to the leader and its answer back. It returns false
// when nothing was sent, or when the other end does not lead: then another try
// does no harm.
func (m *member) forward(w http.ResponseWriter, r *http.Request, p peer) bool {
	body, ok := r.Context().Value(keyBody).([]byte)
	if !ok {
		return false
	}
	var in any
	if len(body) > 0 {
		in = json.RawMessage(body)
	}
	path := r.URL.EscapedPath()
	if r.URL.RawQuery != "" {
		path += "?" + r.URL.RawQuery
	}
	var out json.RawMessage
	err := m.client(p).Do(r.Context(), r.Method, path, in, &out)
	if err == nil {
		writeJSON(w, http.StatusOK, out)
		return true
	}
	if e := api.AsError(err); e.Code == api.CodeUnreachable || e.Code == api.CodeNoQuorum {
		return false
	}
	writeError(w, err)
	return true
}

// apply replicates a command. On a follower it fails; handlers run on the leader.
func (m *member) apply(ctx context.Context, c fsm.Command) (fsm.Result, error) {
	res, err := m.raft.Apply(ctx, c)
	var nl *raftlog.NotLeaderError
	if errors.As(err, &nl) {
		return res, api.Errorf(api.CodeNoQuorum, "clusteradm quorum show", "%v", nl)
	}
	return res, err
}

// catchUp asks for a read index until the state here has reached one. Only then
// are workers told anything: what Raft restored at start may be old (SAFETY §2).
func (m *member) catchUp(ctx context.Context) {
	if fault.Off(fault.ControlCatchesUp) {
		m.wg.Go(func() { m.publish(ctx) })
	}
	for ctx.Err() == nil {
		rctx, cancel := context.WithTimeout(ctx, m.d.cfg.Times().TTL)
		idx, err := m.readIndex(rctx)
		if err == nil {
			err = m.raft.WaitApplied(rctx, idx)
		}
		cancel()
		if err == nil {
			break
		}
		m.log.Debug("not caught up yet", zap.Error(err))
		_ = m.d.clock.Sleep(ctx, 50*time.Millisecond)
	}
	if ctx.Err() != nil {
		return
	}
	m.mu.Lock()
	m.mu.caughtUp = true
	m.mu.Unlock()
	m.log.Info("caught up with the leader", zap.Uint64("index", m.cluster.Index()))
	if !fault.Off(fault.ControlCatchesUp) {
		m.publish(ctx)
	}
}

type readIndexReply struct {
	Index uint64 `json:"index"`
}

// readIndex gives an index for a linearizable read, from the leader.
func (m *member) readIndex(ctx context.Context) (uint64, error) {
	p, us := m.leaderPeer()
	if us {
		return m.raft.ReadIndex(ctx)
	}
	if p.API == "" {
		return 0, errors.New("no leader is known")
	}
	r, err := api.Get[readIndexReply](ctx, m.client(p), pathReadIndex)
	return r.Index, err
}

func (m *member) readIndexHandler(r *http.Request) (any, error) {
	i, err := m.raft.ReadIndex(r.Context())
	return readIndexReply{i}, err
}

// publish hands the workers a new picture whenever what they need of the FSM has
// changed, until ctx ends.
func (m *member) publish(ctx context.Context) {
	var last pictureAt
	var sent link.State
	for {
		_, restores, next := m.cluster.Changed()
		mod := m.pictureAt(restores)
		if mod != last {
			// What has not changed since the last picture is taken from there: a PERSISTENT
			// RESERVE OUT waits for this.
			var keepStorage, keepReserved *link.State
			if len(sent.Storage) > 0 && mod.restores == last.restores && last.storage == mod.storage {
				keepStorage = &sent
			}
			if len(sent.Reservations) > 0 && mod.restores == last.restores && last.reserved == mod.reserved {
				keepReserved = &sent
			}
			s, err := m.workerState(keepStorage, keepReserved)
			if _, again, _ := m.cluster.Changed(); err == nil && m.pictureAt(again) != mod {
				s, err = m.workerState(nil, nil) // it changed meanwhile
			}
			if err != nil {
				m.log.Error("cannot make the workers' state", zap.Error(err))
				return
			}
			if s.Incarnation != 0 {
				m.workers.state.set(s)
				last, sent = mod, s
			}
		}
		select {
		case <-next:
		case <-m.keyGot:
			last = pictureAt{}
		case <-ctx.Done():
			return
		}
	}
}

// pictureAt says from which changes a picture for the workers was made.
type pictureAt struct{ members, storage, reserved, restores uint64 }

func (m *member) pictureAt(restores uint64) pictureAt {
	return pictureAt{max(m.cluster.Modified(fsm.Members), m.cluster.Modified(fsm.Fence)), m.cluster.Modified(fsm.Storage), m.cluster.Modified(fsm.PR), restores}
}

// workerState reads the picture for the workers at one index. A machine that is
// known to stand as in an earlier picture is taken from there.
func (m *member) workerState(storage, reserved *link.State) (s link.State, err error) {
	id := m.identity()
	m.cluster.Read(func(v machines.View) {
		ms := v.Members.State()
		s = link.State{Stamp: link.Stamp{Index: v.Index, View: ms.View, Epoch: ms.Epoch}, Node: id.Node,
			Cluster: ms.Name, UUID: ms.UUID, SealingKey: id.ClusterKey}
		if r := ms.Members[id.Node]; r != nil {
			s.Index, s.Incarnation = r.Index, r.Incarnation
			if !r.Active() {
				s.Incarnation = 0
			}
		}
		// The workers enforce; tokens are none of their business.
		ms.Tokens = nil
		var e1, e2, e3 error
		s.Members, e1 = json.Marshal(ms)
		if storage != nil {
			s.Storage = storage.Storage
		} else {
			s.Storage, e2 = json.Marshal(v.Storage.State())
		}
		if reserved != nil {
			s.Reservations = reserved.Reservations
		} else {
			s.Reservations, e3 = json.Marshal(v.PR.State())
		}
		err = errors.Join(e1, e2, e3)
	})
	return s, err
}

// onGrant takes a lease, once the state here has what the leader asks for.
func (m *member) onGrant(end env.Boot, g grant) {
	if m.cluster.Index() < g.Stamp.Index {
		return // the next renewal finds it applied
	}
	m.mu.Lock()
	ok := m.mu.caughtUp
	if end > m.mu.lease {
		m.mu.lease = end
	}
	m.mu.Unlock()
	if ok {
		m.workers.lease.set(link.Lease{Stamp: g.Stamp, End: end})
	}
}

// onDeny asks for admission, in the background and once at a time.
func (m *member) onDeny(d deny) {
	m.mu.Lock()
	busy := m.mu.asking
	m.mu.asking = true
	m.mu.Unlock()
	if busy {
		return
	}
	m.log.Warn("the leader renews no lease for this node", zap.String("code", string(d.Code)), zap.String("why", d.Why))
	m.wg.Go(func() {
		defer func() {
			m.mu.Lock()
			m.mu.asking = false
			m.mu.Unlock()
		}()
		if err := m.askAdmission(); err != nil {
			m.log.Warn("not admitted", zap.Error(err))
			time.Sleep(200 * time.Millisecond)
		}
	})
}

// setIncarnation notes an admission, on disk first: a node must never speak in
// an incarnation that it may forget.
func (m *member) setIncarnation(inc uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if inc <= m.mu.id.Incarnation {
		return nil
	}
	id := m.mu.id
	id.Incarnation = inc
	if err := id.save(m.d.cfg.DataDir); err != nil {
		return err
	}
	m.mu.id = id
	return nil
}

// follow keeps the identity on disk in step with the FSM, and notices that we
// are no member any more.
func (m *member) follow(ctx context.Context) {
	for {
		_, _, next := m.cluster.Changed()
		id := m.identity()
		var rec members.Record
		var known, empty bool
		var peers []peer
		m.cluster.Read(func(v machines.View) {
			ms := v.Members.State()
			empty = ms.UUID == ""
			if r := ms.Members[id.Node]; r != nil {
				rec, known = r.Clone(), true
			}
			for _, r := range ms.List() {
				if r.Name != id.Node && r.Status != members.Left {
					peers = append(peers, peer{Name: r.Name, API: r.Addresses.API, Raft: r.Addresses.Raft})
				}
			}
		})
		if known {
			if err := m.setIncarnation(rec.Incarnation); err != nil {
				m.log.Error("cannot write the identity", zap.Error(err))
			}
			if len(peers) > 0 && !slices.Equal(peers, id.Peers) {
				m.mu.Lock()
				m.mu.id.Peers = peers
				err := m.mu.id.save(m.d.cfg.DataDir)
				m.mu.Unlock()
				if err != nil {
					m.log.Error("cannot write the identity", zap.Error(err))
				}
			}
		}
		if caught := m.isCaughtUp(); caught && !empty && (!known || rec.Status == members.Left) {
			why := "this node was removed from the cluster"
			if known {
				why = "this node has left the cluster"
			}
			m.goneBecause(why)
			return
		}
		select {
		case <-next:
		case <-ctx.Done():
			return
		}
	}
}

// goneBecause tells the daemon, once, that we are no member any more.
func (m *member) goneBecause(why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.goneWhy == "" {
		m.mu.goneWhy = why
		close(m.gone)
	}
}

// gossipPeers are the gossip addresses of the other members.
func (m *member) gossipPeers() []string {
	var out []string
	m.cluster.Read(func(v machines.View) {
		for _, r := range v.Members.State().List() {
			if r.Name != m.files.ID.Name && r.Active() && r.Addresses.Gossip != "" {
				out = append(out, r.Addresses.Gossip)
			}
		}
	})
	return out
}

func (m *member) isCaughtUp() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.caughtUp
}

// renewal is what we say with every renewal.
func (m *member) renewal() renew {
	id := m.identity()
	r := renew{Node: id.Node, Incarnation: id.Incarnation, BootID: m.d.bootID, Applied: m.cluster.Index(),
		Format: machines.Format, Workers: map[string]api.Worker{}}
	for _, k := range m.d.workerKinds() {
		w := m.workerStatus(k)
		r.Workers[string(k)] = w
		if rep, ok := m.workers.report(k); ok && rep.connected && k == link.Storage && len(rep.Detail) > 0 {
			var d storageDetail
			if err := json.Unmarshal(rep.Detail, &d); err == nil {
				r.Volumes, r.Sessions = d.Volumes, d.Sessions
			}
		}
	}
	return r
}

// storageDetail is link.Report.Detail of the storage worker.
type storageDetail struct {
	Volumes  []volumeReport `json:"volumes"`
	Sessions []api.Session  `json:"sessions"`
	Portals  []api.Portal   `json:"portals"`
	Applied  uint64         `json:"applied"` // index of the state that the worker has acted on
	Error    string         `json:"error,omitempty"`
	Events   uint64         `json:"events"` // number of the worker's newest event
}

func (m *member) workerStatus(k link.Kind) api.Worker {
	w := api.Worker{Kind: string(k), State: "down"}
	rep, ok := m.workers.report(k)
	if !ok || !rep.connected {
		return w
	}
	w.PID, w.Incarnation, w.Index, w.State = rep.PID, rep.Incarnation, rep.Highest.Index, rep.Gate
	if w.State == "" {
		w.State = "starting"
	}
	if k == link.Storage {
		var d storageDetail
		if json.Unmarshal(rep.Detail, &d) == nil {
			w.Index, w.Error, w.Portals = d.Applied, d.Error, d.Portals
		}
	}
	w.Started = m.d.startedAt(rep.Start)
	return w
}

// status is the document of /v1/status.
func (m *member) status(ctx context.Context) api.Status { return statusOf(m.picture(ctx)) }

// picture reads everything for status. It is stale unless we lead and can prove
// it now.
func (m *member) picture(ctx context.Context) picture {
	p := picture{Node: m.identity().Node, Version: version.String(), Profile: m.d.cfg.Profile, Stale: true}
	if _, us := m.leaderPeer(); us {
		vctx, cancel := context.WithTimeout(ctx, m.d.cfg.Times().TTL)
		p.Stale = m.raft.VerifyLeader(vctx) != nil
		cancel()
	}
	st := m.raft.Stats()
	cfg := m.raft.Configuration()
	p.Raft = raftPicture{Leader: st.Leader, Voters: cfg.Voters(), Term: st.Term, Commit: st.Commit}
	for _, s := range cfg.Servers {
		if !s.Voter {
			p.Raft.NonVoters = append(p.Raft.NonVoters, s.ID)
		}
	}
	if !p.Stale {
		m.mu.Lock()
		p.FenceWhy = maps.Clone(m.mu.fenceWhy)
		m.mu.Unlock()
		p.Leases = m.table.leases()
	} else {
		p.Raft.Leader = ""
	}
	m.cluster.Read(func(v machines.View) {
		p.Index = v.Index
		p.Members, p.Storage, p.Reserved = v.Members.State(), v.Storage.State(), v.PR.State()
		p.Fences = v.Fencing.OpenFences()
		p.History, _ = v.Fencing.History(0, 0)
	})
	if !p.Stale {
		for _, r := range p.Members.List() {
			l := p.Leases[r.Name]
			dm := detect.Member{Node: r.Name, Incarnation: r.Incarnation, BootID: r.BootID}
			l.Left, l.Renewed = m.table.left(dm)
			p.Leases[r.Name] = l
		}
	}
	return p
}

// onLeader runs h on the leader. A follower hands the request over; a read that
// no leader can answer is answered from here, marked stale.
func (m *member) onLeader(read bool, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), timeoutOf(r))
		defer cancel()
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			writeError(w, api.Errorf(api.CodeUsage, "", "read the request: %v", err))
			return
		}
		ctx = context.WithValue(ctx, keyBody, body)
		r = r.WithContext(ctx)
		r.Body = io.NopCloser(bytes.NewReader(body))
		const pause = 20 * time.Millisecond
		for waited := time.Duration(0); ; waited += pause {
			p, us := m.leaderPeer()
			if us || read && r.Header.Get(hdrForwarded) != "" {
				h.ServeHTTP(w, r)
				return
			}
			if p.API != "" && p.Name != m.identity().Node && r.Header.Get(hdrForwarded) == "" {
				if m.forward(w, r, p) {
					return
				}
			}
			if read && waited >= 200*time.Millisecond {
				h.ServeHTTP(w, r)
				return
			}
			// An election takes a second or two; the user need not repeat.
			if !read && waited > 6*m.d.cfg.Times().Heartbeat {
				writeError(w, api.Errorf(api.CodeNoQuorum, "clusteradm quorum show",
					"there is no quorum: nothing may be changed; %d voters are needed", len(m.raft.Configuration().Voters())/2+1))
				return
			}
			if m.d.clock.Sleep(ctx, pause) != nil {
				writeError(w, api.Errorf(api.CodeTimeout, "clusteradm quorum show", "no leader answered in time"))
				return
			}
		}
	})
}

// workerRequest answers a worker's wish to change the FSM.
func (m *member) workerRequest(ctx context.Context, k link.Kind, r link.Request) link.Reply {
	rep := link.Reply{Seq: r.Seq}
	if k != link.Storage {
		rep.Error = "unknown request " + r.Kind
		return rep
	}
	for ctx.Err() == nil {
		idx, err := m.storageChange(ctx, r)
		if err == nil {
			rep.Index = idx
			return rep
		}
		e := apiError(err)
		switch e.Code {
		case api.CodeNoQuorum, api.CodeTimeout, api.CodeUnreachable, api.CodeInternal:
			_ = m.d.clock.Sleep(ctx, 100*time.Millisecond) // it is idempotent: repeat
		default:
			rep.Error, rep.Code = e.Message, string(e.Code)
			return rep
		}
	}
	rep.Error = "control is ending"
	return rep
}

// storageChange takes a worker's request to the leader.
func (m *member) storageChange(ctx context.Context, r link.Request) (uint64, error) {
	p, us := m.leaderPeer()
	if us {
		return m.applyStorageRequest(ctx, m.identity().Node, r)
	}
	if p.API == "" {
		return 0, api.Errorf(api.CodeNoQuorum, "", "no leader is known")
	}
	d, err := api.Post[api.Done](ctx, m.client(p), pathStorage, r)
	return d.Index, err
}

// workerCommand is how a worker is started; its output goes where ours does.
func (d *Daemon) workerCommand(k link.Kind) *exec.Cmd {
	cmd := exec.Command(d.exe, "worker", string(k), "--config", d.cfgPath)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	// systemd's channel is control's: a worker that outlives it must not speak there.
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "NOTIFY_SOCKET=") && !strings.HasPrefix(kv, "WATCHDOG_") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	return cmd
}
