package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/sched"
	"github.com/blockhouse-san/blockhouse/internal/version"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/raftlog"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// Daemon is the control process. It answers on its local socket from the first
// moment, also before the node is a member, and owns the member once it is one.
type Daemon struct {
	cfg         config.Config
	cfgPath     string
	exe         string
	log         *zap.Logger
	clock       env.Clock
	bootID      string
	bootTime    time.Time
	incarnation uint64
	reg         *prometheus.Registry
	events      *events

	mu      sync.Mutex // guards member; held over opening and closing it
	m       *member
	changed chan struct{} // the member was opened or closed
}

// Tell is how the service manager learns of us. Both may be nil.
type Tell struct {
	Ready func() // the local API answers
	// Alive is called every second while the daemon's loop turns and the state
	// machine can be read: a process that only breathes is not alive.
	Alive func()
}

// Run is the control process: it returns when ctx ends (a planned stop, which
// takes the workers down), or with an error that the process cannot live with.
func Run(ctx context.Context, cfg config.Config, cfgPath string, log *zap.Logger, tell Tell) error {
	// 1. Of two controls of one node the second must not get far.
	for _, dir := range []string{cfg.DataDir, cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	inc, err := peekIncarnation(cfg.DataDir)
	if err != nil {
		return err
	}
	lock, err := link.Hold(cfg.RunDir, "clusterd", fmt.Sprint(inc+1))
	if err != nil {
		return fmt.Errorf("clusterd already runs on this node: %w", err)
	}
	defer lock.Close()
	d := &Daemon{cfg: cfg, cfgPath: cfgPath, log: log, clock: env.Real{}, events: newEvents(),
		reg: prometheus.NewRegistry(), changed: make(chan struct{}, 1)}
	if d.incarnation, err = nextIncarnation(cfg.DataDir); err != nil {
		return err
	}
	// 2. Before anything is timed: run when all else is busy.
	raise(cfg.Priority, log)
	if d.bootID, err = env.BootID(); err != nil {
		return err
	}
	d.bootTime = d.clock.Wall().Add(-time.Duration(d.clock.Now()))
	if d.exe, err = os.Executable(); err != nil {
		return fmt.Errorf("find our own program: %w", err)
	}
	if err := d.metrics(); err != nil {
		return err
	}
	// 3. People and scripts can ask from here on.
	stopLocal, err := d.serveLocal()
	if err != nil {
		return err
	}
	defer stopLocal()
	// 4. A member opens what it has; the founder and the joiner come through the API.
	id, known, err := loadIdentity(cfg.DataDir)
	if err != nil {
		return err
	}
	if known {
		if err := d.open(id); err != nil {
			return err
		}
	} else {
		log.Info("this node belongs to no cluster", zap.String("next", "clusteradm init NAME, or clusteradm join TOKEN@HOST:PORT"))
	}
	log.Info("clusterd is up", zap.String("version", version.String()), zap.Uint64("control", d.incarnation), zap.String("socket", cfg.Socket()))
	if tell.Ready != nil {
		tell.Ready()
	}
	err = d.watch(ctx, tell.Alive)
	// Shutdown mirrors start: leadership away, workers drained, member closed.
	return errors.Join(err, d.shutdown())
}

func raise(c config.Priority, log *zap.Logger) {
	if c.RR {
		err := sched.RR()
		if err == nil {
			log.Info("control runs with real-time priority")
			return
		}
		log.Warn("SCHED_RR is not allowed; trying nice", zap.Error(err))
	}
	if c.Nice == 0 {
		return
	}
	if err := sched.Nice(c.Nice); err != nil {
		log.Warn("cannot raise the priority of control: under load leases may be renewed late", zap.Int("nice", c.Nice), zap.Error(err))
		return
	}
	log.Info("control runs with raised priority", zap.Int("nice", c.Nice))
}

func (d *Daemon) metrics() error {
	d.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if err := raftlog.RegisterMetrics(d.reg); err != nil {
		return err
	}
	if err := d.reg.Register(&storageMetrics{log: d.log, ask: func(ctx context.Context) (api.NodeStats, bool, error) {
		m := d.member()
		if m == nil || !d.cfg.Roles.Storage {
			return api.NodeStats{}, false, nil
		}
		s, err := m.ownStats(ctx)
		return s, true, err
	}}); err != nil {
		return fmt.Errorf("register metrics of the storage worker: %w", err)
	}
	for _, g := range []struct {
		name, help string
		fn         func(*member) float64
	}{
		{"blockhouse_fsm_applied_index", "Applied index of the replicated state machine.", func(m *member) float64 { return float64(m.cluster.Index()) }},
		{"blockhouse_node_lease_seconds", "Time left of this node's lease; negative: over.", func(m *member) float64 {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.mu.lease.Sub(d.clock.Now()).Seconds()
		}},
		{"blockhouse_leader", "1 on the node that leads.", func(m *member) float64 {
			if _, us := m.leaderPeer(); us {
				return 1
			}
			return 0
		}},
		{"blockhouse_open_fences", "Nodes that are evicted and not proven dead.", func(m *member) (n float64) {
			m.cluster.Read(func(v machines.View) { n = float64(len(v.Fencing.OpenFences())) })
			return n
		}},
	} {
		d.reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: g.name, Help: g.help}, func() float64 {
			if m := d.member(); m != nil {
				return g.fn(m)
			}
			return 0
		}))
	}
	return nil
}

func (d *Daemon) member() *member {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.m
}

func (d *Daemon) open(id identity) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := openMember(d, id)
	if err != nil {
		return err
	}
	d.m = m
	d.poke()
	return nil
}

func (d *Daemon) poke() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// watch waits for the end, and takes a member down that the cluster has let go.
func (d *Daemon) watch(ctx context.Context, alive func()) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var reported bool
	for {
		var gone, stopped <-chan struct{}
		m := d.member()
		if m != nil {
			gone = m.gone
			if !reported { // once is enough; the channel stays closed
				stopped = m.cluster.Stopped()
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-d.changed:
		case <-tick.C:
			if alive != nil {
				if m != nil {
					m.cluster.Index() // takes the lock of the state machine
				}
				alive()
			}
		case <-stopped:
			reported = true
			d.log.Error("the state machine has stopped; this node answers status only", zap.Error(m.cluster.Err()))
		case <-gone:
			m.mu.Lock()
			why := m.mu.goneWhy
			m.mu.Unlock()
			d.log.Warn(why)
			if err := d.forget(); err != nil {
				return err
			}
		}
	}
}

// forget closes a member that is none any more, and puts its state aside: it may
// be looked at, but it must never speak again.
func (d *Daemon) forget() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := d.m
	if m == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err := m.workers.shutdown(ctx, d.workerKinds())
	d.m = nil
	err = errors.Join(err, m.close())
	id := m.identity()
	aside := filepath.Join(d.cfg.DataDir, fmt.Sprintf("left-%s-%d", id.UUID, id.Incarnation))
	if e := os.MkdirAll(aside, 0o700); e != nil {
		return errors.Join(err, e)
	}
	for _, n := range []string{"node.json", "raft", "pki"} {
		if e := os.Rename(filepath.Join(d.cfg.DataDir, n), filepath.Join(aside, n)); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// shutdown is a planned stop. The leadership goes to another first, so that no
// election is needed; workers drain and end.
func (d *Daemon) shutdown() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.m == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, us := d.m.leaderPeer(); us && len(d.m.raft.Configuration().Voters()) > 1 {
		tctx, tcancel := context.WithTimeout(ctx, 5*time.Second)
		if err := d.m.raft.LeadershipTransfer(tctx, ""); err != nil {
			d.log.Warn("leadership could not be handed over", zap.Error(err))
		}
		tcancel()
	}
	err := d.m.workers.shutdown(ctx, d.workerKinds())
	// Raft restores the last snapshot at start and applies the rest only when a
	// leader says so: with a fresh one a node without quorum still shows what it
	// knew (RH bz 143487).
	if serr := d.m.raft.Snapshot(ctx); serr != nil {
		d.log.Warn("no snapshot at the end", zap.Error(serr))
	}
	m := d.m
	d.m = nil
	return errors.Join(err, m.close())
}

// workerKinds are the workers that this node's roles need.
func (d *Daemon) workerKinds() []link.Kind {
	var k []link.Kind
	if d.cfg.Roles.Storage {
		k = append(k, link.Storage)
	}
	if d.cfg.Roles.Host {
		k = append(k, link.Locks)
	}
	return k
}

func (d *Daemon) startedAt(ticks uint64) time.Time {
	const hz = 100 // USER_HZ, fixed in the kernel's ABI on every architecture that Go runs on but alpha
	return d.bootTime.Add(time.Duration(ticks) * time.Second / hz)
}

func (d *Daemon) event(kind, text string, data map[string]any) {
	var idx uint64
	if m := d.m; m != nil { // called from the member's own goroutines, which live only while it does
		idx = m.cluster.Index()
	}
	d.events.add(api.Event{Time: d.clock.Wall(), Index: idx, Kind: kind, Text: text, Data: data})
}

// advertised is where others reach this node.
func (d *Daemon) advertised() members.Addresses {
	host := d.cfg.Listen.Advertise
	if host == "" {
		host = hostOf(d.cfg.Listen.API)
	}
	if host == "" || net.ParseIP(host).IsUnspecified() {
		host = firstGlobal()
	}
	at := func(addr string) string {
		h, p, err := net.SplitHostPort(addr)
		if err != nil {
			return addr
		}
		if h == "" || net.ParseIP(h).IsUnspecified() {
			h = host
		}
		return net.JoinHostPort(h, p)
	}
	a := members.Addresses{Raft: at(d.cfg.Listen.Raft), API: at(d.cfg.Listen.API), Gossip: at(d.cfg.Listen.Gossip)}
	if d.cfg.Roles.Storage {
		for _, p := range d.cfg.Listen.ISCSI {
			a.ISCSI = append(a.ISCSI, at(p))
		}
	}
	return a
}

// firstGlobal is the first address of this host that others may reach.
func firstGlobal() string {
	as, err := net.InterfaceAddrs()
	if err != nil {
		return "127.0.0.1"
	}
	for _, a := range as {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	return "127.0.0.1"
}

// bindAddr gives memberlist an explicit address where the file has none.
func bindAddr(a string) string {
	if strings.HasPrefix(a, ":") {
		return "0.0.0.0" + a
	}
	return a
}

func (d *Daemon) newNode() members.NewNode {
	r := d.cfg.Roles
	n := members.NewNode{Name: d.cfg.Name, BootID: d.bootID, Addresses: d.advertised(), Format: machines.Format,
		Roles:         members.Roles{Storage: r.Storage, Host: r.Host, Witness: r.Witness, Voter: r.Voter},
		InitiatorName: d.cfg.ISCSI.InitiatorName}
	if n.InitiatorName == "" && r.Host {
		n.InitiatorName = d.cfg.ISCSI.IQNPrefix + ":node." + d.cfg.Name
	}
	return n
}

// serveLocal opens the socket. Without a member only what makes one is served.
func (d *Daemon) serveLocal() (func(), error) {
	path := d.cfg.Socket()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("local socket %s: %w", path, err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("local socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("local socket: %w", err), ln.Close())
	}
	srv := &http.Server{Handler: d.asLocal(http.HandlerFunc(d.local)), ConnContext: localConn, ReadHeaderTimeout: 10 * time.Second,
		ErrorLog: zap.NewStdLog(d.log.Named("api"))}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			d.log.Error("local API ended", zap.Error(err))
		}
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			_ = srv.Close() // streams do not end by themselves
		}
		<-done
	}, nil
}

func (d *Daemon) local(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/metrics":
		promhttp.HandlerFor(d.reg, promhttp.HandlerOpts{}).ServeHTTP(w, r)
		return
	case "/healthz":
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
		return
	case "/readyz":
		d.readyz(w)
		return
	}
	if m := d.member(); m != nil {
		m.handler.ServeHTTP(w, r)
		return
	}
	mux := http.NewServeMux()
	mux.Handle("POST "+api.PathInit, handler(d.init))
	mux.Handle("POST "+api.PathJoin, handler(d.join))
	mux.HandleFunc("GET "+api.PathEvents, d.events.serve)
	mux.Handle("GET "+api.PathStatus, handler(func(*http.Request) (any, error) {
		return api.Status{APIVersion: api.Version, Health: api.HealthUninit, Node: d.cfg.Name, Version: version.String(),
			Problems: []api.Problem{{Severity: api.HealthUninit, What: "this node belongs to no cluster", Cause: "it was neither initialised nor joined",
				Action: "make a cluster, or join one with a token of its members", Command: "clusteradm init NAME"}},
			Nodes: []api.Node{}, Volumes: []api.Volume{}, Fences: []api.Fence{}, LUNs: []api.LUN{}, Targets: []api.Target{}}, nil
	}))
	mux.Handle("/v1/", handler(func(*http.Request) (any, error) {
		return nil, api.Errorf(api.CodeNoQuorum, "clusteradm init NAME, or clusteradm join TOKEN@HOST:PORT", "this node belongs to no cluster")
	}))
	mux.ServeHTTP(w, r)
}

// readyz: ready is who has caught up and holds a lease.
func (d *Daemon) readyz(w http.ResponseWriter) {
	m := d.member()
	if m == nil {
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"status": "uninitialised"})
		return
	}
	m.mu.Lock()
	ok, lease := m.mu.caughtUp, m.mu.lease
	m.mu.Unlock()
	switch {
	case !ok:
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"status": "catching up"})
	case lease < d.clock.Now():
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"status": "no node lease"})
	default:
		writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
	}
}

// listenAPI opens the port that other nodes and administrators use.
func (m *member) listenAPI() error {
	ln, err := net.Listen("tcp", m.d.cfg.Listen.API)
	if err != nil {
		return fmt.Errorf("listen for the API: %w", err)
	}
	open := http.NewServeMux()
	open.Handle("POST "+pathClusterJoin, m.onLeader(false, handler(m.clusterJoin)))
	open.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	})
	all := http.NewServeMux()
	all.Handle("/v1/", m.handler)
	all.Handle("GET /metrics", promhttp.HandlerFor(m.d.reg, promhttp.HandlerOpts{}))
	all.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { m.d.readyz(w) })
	m.apiSrv = &http.Server{Handler: m.d.asRemote(m, open, all), ReadHeaderTimeout: 10 * time.Second,
		// Whoever comes is asked for a certificate; asRemote judges it, so that the
		// refusal can say why.
		TLSConfig: m.files.ServerTLS("h2", "http/1.1"), ErrorLog: zap.NewStdLog(m.log.Named("api"))}
	m.wg.Go(func() {
		if err := m.apiSrv.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) {
			m.log.Error("API ended", zap.Error(err))
		}
	})
	return nil
}
