package control

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/seal"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/membership/pki"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// Paths between nodes; not for users.
const (
	pathSealingKey = "/v1/cluster/sealing-key"
	pathStoreProbe = "/v1/cluster/store-probe"
	pathKill       = "/v1/cluster/kill"
	pathScrub      = "/v1/cluster/scrub"
)

// accountRoutes are the handlers of accounts, target parameters and sessions.
func (m *member) accountRoutes(mux *http.ServeMux) {
	mux.Handle("GET "+api.PathAccounts, m.onLeader(true, handler(m.getAccounts)))
	for pattern, h := range map[string]handler{
		"POST " + api.PathAccounts:                      m.accountCreate,
		"DELETE " + api.PathAccounts + "/{name}":        m.accountDelete,
		"POST " + api.PathBindings:                      m.accountBind,
		"POST " + api.PathTargets + "/{iqn}":            m.targetSet,
		"POST " + api.PathLUNs + "/{iqn}/{n}":           m.lunSet,
		"DELETE " + api.PathSessions + "/{node}/{tsih}": m.sessionKill,
		"POST " + api.PathVolumes + "/{name}/scrub":     m.volumeScrub,
	} {
		mux.Handle(pattern, m.onLeader(false, h))
	}
	// Of this very node, whoever leads.
	mux.Handle("POST "+pathSealingKey, handler(m.sealingKeyHandler))
	mux.Handle("POST "+pathStoreProbe, handler(m.storeProbeHandler))
	mux.Handle("POST "+pathKill, handler(m.killHandler))
	mux.Handle("POST "+pathScrub, handler(m.scrubHandler))
}

func accountsOf(s *storage.State) []api.Account {
	out := []api.Account{}
	targets := s.ListTargets()
	for _, a := range s.ListAccounts() {
		x := api.Account{Name: a.Name, Created: a.Created, Bindings: []api.Binding{}}
		add := func(where string, auth storage.Auth) {
			if slices.Contains(auth.Incoming, a.Name) {
				x.Bindings = append(x.Bindings, api.Binding{Target: where, Direction: "incoming"})
			}
			if auth.Outgoing == a.Name {
				x.Bindings = append(x.Bindings, api.Binding{Target: where, Direction: "outgoing"})
			}
		}
		for _, t := range targets {
			add(t.IQN, t.Auth)
		}
		add("discovery", s.Discovery)
		out = append(out, x)
	}
	return out
}

func (m *member) getAccounts(r *http.Request) (any, error) {
	p := m.picture(r.Context())
	return api.List[api.Account]{APIVersion: api.Version, Kind: "AccountList", Stale: p.Stale, Index: p.Index, Items: accountsOf(p.Storage)}, nil
}

func (m *member) findAccount(name, warning string) (any, error) {
	var out *api.Account
	m.cluster.Read(func(v machines.View) {
		for _, a := range accountsOf(v.Storage.State()) {
			if a.Name == name {
				out = &a
			}
		}
	})
	if out == nil {
		return nil, api.Errorf(api.CodeNotFound, "clusteradm account list", "no account is called %s", name)
	}
	out.Warning = warning
	return *out, nil
}

// Secrets of less are accepted because tutorials have them.
const recommendedSecret = 12

func (m *member) accountCreate(r *http.Request) (any, error) {
	q, err := decode[api.AccountCreate](r)
	if err != nil {
		return nil, err
	}
	if n := len(q.Secret); n < 1 || n > 255 {
		return nil, api.Errorf(api.CodeUsage, "", "create account %s: a secret has 1 to 255 bytes, 12 to 16 are recommended; this one has %d", q.Name, n)
	}
	if q.RequestID == "" {
		q.RequestID = uuid.NewString()
	}
	key, err := m.clusterKey(r.Context())
	if err != nil {
		return nil, err
	}
	sealed, err := key.Seal(q.Name, []byte(q.Secret), rand.Reader)
	if err != nil {
		return nil, err
	}
	res, err := m.apply(r.Context(), storage.AccountCreate{Request: q.RequestID, Name: q.Name, Sealed: sealed, Key: key.ID()})
	if err != nil {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	warning := ""
	if len(q.Secret) < recommendedSecret {
		warning = fmt.Sprintf("the secret of %s has %d bytes: 12 to 16 are recommended, because a short one can be guessed from one captured login (RFC 7143 9.2.1)", q.Name, len(q.Secret))
	}
	return m.findAccount(q.Name, warning)
}

func (m *member) accountDelete(r *http.Request) (any, error) {
	name := r.PathValue("name")
	res, err := m.apply(r.Context(), storage.AccountDelete{Name: name, Force: r.URL.Query().Get("force") == "1"})
	if err != nil {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	return done(res, err, "account "+name+" is deleted")
}

func (m *member) accountBind(r *http.Request) (any, error) {
	q, err := decode[api.AccountBind](r)
	if err != nil {
		return nil, err
	}
	iqn := ""
	if q.Target == "" {
		return nil, api.Errorf(api.CodeUsage, "", "bind account %s: name a target, or discovery", q.Account)
	}
	if q.Target != "discovery" {
		if iqn, err = m.targetIQN(q.Target); err != nil {
			return nil, err
		}
	}
	var c fsm.Command = storage.AccountBind{Target: iqn, Name: q.Account, Outgoing: q.Outgoing}
	if q.Remove {
		c = storage.AccountUnbind{Target: iqn, Name: q.Account, Outgoing: q.Outgoing}
	}
	res, err := m.apply(r.Context(), c)
	if err != nil {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	return m.findAccount(q.Account, m.authWarning(iqn))
}

// authWarning says what is wrong with the accounts of a target that no single
// command could refuse.
func (m *member) authWarning(iqn string) string {
	var auth storage.Auth
	accounts := map[string]storage.Account{}
	m.cluster.Read(func(v machines.View) {
		s := v.Storage.State()
		if auth = s.Discovery; iqn != "" {
			if t := s.Targets[iqn]; t != nil {
				auth = t.Auth
			}
		}
		for _, a := range s.ListAccounts() {
			accounts[a.Name] = a
		}
	})
	if auth.Outgoing == "" {
		return ""
	}
	key := m.identity().ClusterKey
	open := func(name string) string {
		a := accounts[name]
		b, err := key.Open(name, a.Sealed)
		if err != nil {
			return "" // told where it matters: the target refuses logins
		}
		return string(b)
	}
	out := open(auth.Outgoing)
	for _, in := range auth.Incoming {
		if out != "" && open(in) == out {
			return fmt.Sprintf("%s and %s have one secret: with it a challenge can be reflected (RFC 7143 9.2.1), so mutual CHAP is refused until one of them changes", in, auth.Outgoing)
		}
	}
	return ""
}

func (m *member) targetSet(r *http.Request) (any, error) {
	q, err := decode[api.TargetSet](r)
	if err != nil {
		return nil, err
	}
	iqn, err := m.targetIQN(r.PathValue("iqn"))
	if err != nil {
		return nil, err
	}
	for k, v := range q.Params {
		if err := api.CheckTargetParam(k, v); err != nil {
			return nil, api.Errorf(api.CodeUsage, "", "change target %s: %v", iqn, err)
		}
	}
	res, err := m.apply(r.Context(), storage.TargetSet{Target: iqn, Params: q.Params, Offline: q.Offline})
	if err != nil {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	return findTarget(m.status(r.Context()), iqn)
}

func (m *member) lunSet(r *http.Request) (any, error) {
	q, err := decode[api.LUNSet](r)
	if err != nil {
		return nil, err
	}
	iqn, err := m.targetIQN(r.PathValue("iqn"))
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(r.PathValue("n"))
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "", "%q is no LUN number", r.PathValue("n"))
	}
	res, err := m.apply(r.Context(), storage.LunSet{Target: iqn, Number: n, ReadOnly: q.ReadOnly, Removable: q.Removable, NoCache: q.NoCache})
	if err != nil {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	t, err := findTarget(m.status(r.Context()), iqn)
	if err != nil {
		return nil, err
	}
	for _, l := range t.LUNs {
		if l.LUN == n {
			return l, nil
		}
	}
	return nil, api.Errorf(api.CodeNotFound, "clusteradm lun list", "LUN %d was removed meanwhile", n)
}

// killRequest ends sessions of one node.
type killRequest struct {
	TSIH uint16 `json:"tsih"`
}

func (m *member) sessionKill(r *http.Request) (any, error) {
	node := r.PathValue("node")
	n, err := strconv.ParseUint(r.PathValue("tsih"), 10, 16)
	if err != nil || n == 0 {
		return nil, api.Errorf(api.CodeUsage, "clusteradm session list -o wide", "%q is no TSIH: 1 to 65535", r.PathValue("tsih"))
	}
	var who api.Session
	find := func() bool {
		for _, s := range m.table.leases()[node].Sessions {
			if uint64(s.TSIH) == n && (who.Since.IsZero() || s.Since.Equal(who.Since)) {
				who = s
				return true
			}
		}
		return false
	}
	if !find() {
		return nil, api.Errorf(api.CodeNotFound, "clusteradm session list -o wide", "node %s has no session with TSIH %d", node, n)
	}
	q := killRequest{TSIH: uint16(n)}
	if node == m.identity().Node {
		err = m.kill(q)
	} else {
		var p peer
		if p, err = m.peer(node); err == nil {
			_, err = api.Post[api.Done](r.Context(), m.client(p), pathKill, q)
		}
	}
	if err != nil {
		return nil, err
	}
	for find() {
		if m.d.clock.Sleep(r.Context(), 20*time.Millisecond) != nil {
			return nil, api.Errorf(api.CodeTimeout, "clusteradm session list", "the session of %s on %s was told to end and has not yet", who.Initiator, node)
		}
	}
	m.d.event("session.killed", fmt.Sprintf("the session of %s with %s on %s was ended", who.Initiator, who.Target, node),
		map[string]any{"node": node, "initiator": who.Initiator, "target": who.Target, "tsih": n})
	return api.Done{APIVersion: api.Version, Index: m.cluster.Index(),
		Message: fmt.Sprintf("the session of %s on %s is ended; to keep it out: clusteradm acl remove %s %s", who.Initiator, node, who.Target, who.Initiator)}, nil
}

func (m *member) peer(node string) (peer, error) {
	for _, p := range m.peers() {
		if p.Name == node {
			return p, nil
		}
	}
	return peer{}, api.Errorf(api.CodeNotFound, "clusteradm node list", "no node is called %s", node)
}

func (m *member) killHandler(r *http.Request) (any, error) {
	if err := fromNode(r); err != nil {
		return nil, err
	}
	q, err := decode[killRequest](r)
	if err != nil {
		return nil, err
	}
	return api.Done{APIVersion: api.Version}, m.kill(q)
}

func (m *member) kill(q killRequest) error {
	c := m.workers.conn(link.Storage)
	if c == nil {
		return api.Errorf(api.CodeUnreachable, "clusteradm status", "the storage worker of %s is down", m.identity().Node)
	}
	return c.Kill(link.Kill{TSIH: q.TSIH})
}

// conn is the connection to a worker, nil without one.
func (w *workers) conn(k link.Kind) *link.Control {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.conns[k]
}

// fromNode lets only the cluster's own nodes in.
func fromNode(r *http.Request) error {
	if c := callerOf(r); c.local || c.id.Role != pki.Node {
		return api.Errorf(api.CodeDenied, "", "this is for nodes of the cluster, not for %v", c)
	}
	return nil
}

// The sealing key.

type sealingKeyRequest struct {
	ID string `json:"id"`
}

type sealingKeyReply struct {
	Key seal.Key `json:"key"`
}

func (m *member) sealingKeyHandler(r *http.Request) (any, error) {
	if err := fromNode(r); err != nil {
		return nil, err
	}
	q, err := decode[sealingKeyRequest](r)
	if err != nil {
		return nil, err
	}
	k := m.identity().ClusterKey
	if q.ID == "" || k.ID() != q.ID {
		return nil, api.Errorf(api.CodeNotFound, "", "%s has no sealing key %s", m.identity().Node, q.ID)
	}
	return sealingKeyReply{k}, nil
}

// sealingKey is the key with the id want, asked of the other nodes if we have
// another or none. An empty want is a cluster without accounts: our own key, or a
// new one, which the others ask for when they see the first account.
func (m *member) sealingKey(ctx context.Context, want string) (seal.Key, error) {
	have := m.identity().ClusterKey
	if len(have) > 0 && (want == "" || have.ID() == want) {
		return have, nil
	}
	if want == "" {
		k, err := seal.New(rand.Reader)
		if err != nil {
			return nil, err
		}
		return k, m.setSealingKey(k)
	}
	var errs []error
	for _, p := range m.peers() {
		if p.API == "" {
			continue
		}
		rep, err := api.Post[sealingKeyReply](ctx, m.client(p), pathSealingKey, sealingKeyRequest{want})
		if err == nil && rep.Key.ID() != want {
			err = errors.New("it sent another key")
		}
		if err == nil {
			return rep.Key, m.setSealingKey(rep.Key)
		}
		errs = append(errs, fmt.Errorf("%s: %w", p.Name, err))
	}
	return nil, api.Errorf(api.CodeUnreachable, "start clusterd on the other nodes", "no node can give the key %s that opens the accounts: %v", want, errors.Join(errs...))
}

// setSealingKey writes the key down before it is used.
func (m *member) setSealingKey(k seal.Key) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := m.mu.id
	id.ClusterKey = k
	if err := id.save(m.d.cfg.DataDir); err != nil {
		return err
	}
	m.mu.id = id
	select {
	case m.keyGot <- struct{}{}:
	default:
	}
	return nil
}

// keepKey fetches the sealing key whenever the accounts need one that this node
// does not have, and hands it to the worker.
func (m *member) keepKey(ctx context.Context) {
	for {
		_, _, next := m.cluster.Changed()
		var want string
		m.cluster.Read(func(v machines.View) { want = wantedKey(v) })
		if want != "" && m.identity().ClusterKey.ID() != want {
			fctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			_, err := m.sealingKey(fctx, want)
			cancel()
			if err == nil {
				m.log.Info("got the sealing key", zap.String("id", want))
				continue
			}
			if ctx.Err() == nil {
				m.log.Warn("the accounts cannot be opened yet", zap.Error(err))
			}
			if m.d.clock.Sleep(ctx, time.Second) != nil {
				return
			}
			continue
		}
		select {
		case <-next:
		case <-ctx.Done():
			return
		}
	}
}
