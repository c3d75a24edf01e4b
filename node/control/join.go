package control

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/seal"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/pki"
)

// clusterRE is what may stand before the colon of a lock table (mkfs.gfs2 3.5.0)
// and is also a node name's alphabet, since names stand in certificates.
var clusterRE = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)

// init founds a cluster on this node.
func (d *Daemon) init(r *http.Request) (any, error) {
	q, err := decode[api.Init](r)
	if err != nil {
		return nil, err
	}
	if !clusterRE.MatchString(q.Cluster) {
		return nil, api.Errorf(api.CodeUsage, "", "cluster name %q: 1 to 32 of a-z, 0-9, '-', '_', as it stands in lock tables", q.Cluster)
	}
	if d.cfg.Roles.Witness {
		return nil, api.Errorf(api.CodeUsage, "clusteradm join TOKEN@HOST:PORT", "a witness founds no cluster: it joins one")
	}
	if err := d.clearLeftovers(); err != nil {
		return nil, err
	}
	id := identity{Cluster: q.Cluster, UUID: uuid.NewString(), Node: d.cfg.Name, Incarnation: 1, Founding: true, GossipKey: make([]byte, 32)}
	if _, err := rand.Read(id.GossipKey); err != nil {
		return nil, fmt.Errorf("make the gossip key: %w", err)
	}
	key, err := seal.New(rand.Reader)
	if err != nil {
		return nil, err
	}
	id.ClusterKey = key
	ca, err := pki.NewCA(id.UUID, d.clock.Wall())
	if err != nil {
		return nil, err
	}
	cert, certKey, err := ca.Issue(pki.Node, d.cfg.Name, d.clock.Wall())
	if err != nil {
		return nil, err
	}
	caPEM, _, err := ca.Encode()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(ca.Save(pkiDir(d.cfg)), pki.SaveFiles(pkiDir(d.cfg), cert, certKey, caPEM)); err != nil {
		return nil, err
	}
	// The identity is last: without it the next start finds an unfinished
	// founding and begins anew.
	if err := id.save(d.cfg.DataDir); err != nil {
		return nil, err
	}
	if err := d.open(id); err != nil {
		return nil, err
	}
	m := d.member()
	if err := m.raft.Bootstrap(); err != nil {
		return nil, err
	}
	return d.firstLease(r.Context(), m, "cluster "+q.Cluster+" is founded; this node is its first member")
}

// firstLease waits until this node holds a lease: then it is a member for good.
func (d *Daemon) firstLease(ctx context.Context, m *member, msg string) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	for {
		m.mu.Lock()
		ok := m.mu.caughtUp && m.mu.lease > d.clock.Now()
		m.mu.Unlock()
		if ok {
			return api.Done{APIVersion: api.Version, Index: m.cluster.Index(), Message: msg}, nil
		}
		if d.clock.Sleep(ctx, 20*time.Millisecond) != nil {
			return nil, api.Errorf(api.CodeTimeout, "clusteradm status", "this node is set up, but holds no lease yet")
		}
	}
}

// clearLeftovers removes what a founding or a joining left that did not finish:
// without an identity nothing of it was ever used.
func (d *Daemon) clearLeftovers() error {
	if _, known, err := loadIdentity(d.cfg.DataDir); err != nil || known {
		return errors.Join(err, api.Errorf(api.CodeExists, "clusteradm status", "this node already belongs to a cluster"))
	}
	for _, n := range []string{"raft", "pki"} {
		if err := os.RemoveAll(filepath.Join(d.cfg.DataDir, n)); err != nil {
			return fmt.Errorf("clear an unfinished set-up: %w", err)
		}
	}
	return nil
}

// joinRequest is what a new node sends to any member's API, without a
// certificate of its own: the token admits it.
type joinRequest struct {
	Request string          `json:"request"`
	Token   string          `json:"token"` // id
	Proof   string          `json:"proof"` // SHA-256 of the secret
	CSR     string          `json:"csr"`
	Node    members.NewNode `json:"node"`
}

// joinReply makes the node a member. It goes over TLS to who proved the token.
type joinReply struct {
	Cluster     string `json:"cluster"`
	UUID        string `json:"uuid"`
	Incarnation uint64 `json:"incarnation"`
	Cert        string `json:"cert"`
	CA          string `json:"ca"`
	CAKey       string `json:"ca_key,omitempty"` // for nodes that may come to lead
	GossipKey   []byte `json:"gossip_key"`
	Peers       []peer `json:"peers"`
	// ClusterKey is empty if the cluster has no account and is older than them.
	ClusterKey seal.Key `json:"cluster_key,omitempty"`
}

// join makes this node a member of an existing cluster.
func (d *Daemon) join(r *http.Request) (any, error) {
	q, err := decode[api.Join](r)
	if err != nil {
		return nil, err
	}
	tok, err := pki.ParseToken(q.Token)
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "clusteradm token create, on a member", "%v", err)
	}
	if err := d.clearLeftovers(); err != nil {
		return nil, err
	}
	csr, key, err := pki.NewCSR(d.cfg.Name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	var ca *x509.Certificate
	req := joinRequest{Request: uuid.NewString(), Token: tok.ID, Proof: tok.SecretSHA256(), CSR: string(csr), Node: d.newNode()}
	c := api.DialTLS(q.Address, tok.JoinTLS(d.clock.Wall, func(c *x509.Certificate) { ca = c }))
	defer c.Close()
	rep, err := api.Post[joinReply](ctx, c, pathClusterJoin, req)
	for err != nil && retryable(err) && d.clock.Sleep(ctx, 300*time.Millisecond) == nil {
		rep, err = api.Post[joinReply](ctx, c, pathClusterJoin, req) // the same request id: it is one join
	}
	if err != nil {
		return nil, err
	}
	caPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})
	if rep.CAKey != "" {
		full, err := pki.ParseCA(caPEM, []byte(rep.CAKey))
		if err != nil {
			return nil, fmt.Errorf("join: the CA that was handed over: %w", err)
		}
		if err := full.Save(pkiDir(d.cfg)); err != nil {
			return nil, err
		}
	}
	if err := pki.SaveFiles(pkiDir(d.cfg), []byte(rep.Cert), key, caPEM); err != nil {
		return nil, err
	}
	id := identity{Cluster: rep.Cluster, UUID: rep.UUID, Node: d.cfg.Name, Incarnation: rep.Incarnation, GossipKey: rep.GossipKey, ClusterKey: rep.ClusterKey, Peers: rep.Peers}
	if err := id.save(d.cfg.DataDir); err != nil {
		return nil, err
	}
	if err := d.open(id); err != nil {
		return nil, err
	}
	return d.firstLease(ctx, d.member(), "this node is a member of cluster "+rep.Cluster)
}

func retryable(err error) bool {
	c := api.AsError(err).Code
	return c == api.CodeNoQuorum || c == api.CodeTimeout
}

// clusterJoin is the leader's answer to a new node.
func (m *member) clusterJoin(r *http.Request) (any, error) {
	q, err := decode[joinRequest](r)
	if err != nil {
		return nil, err
	}
	ca, err := pki.LoadCA(pkiDir(m.d.cfg))
	if errors.Is(err, os.ErrNotExist) {
		return nil, api.Errorf(api.CodeInternal, "", "the leader %s has no CA key and cannot sign", m.identity().Node)
	}
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	m.admitMu.Lock()
	defer m.admitMu.Unlock()
	res, err := m.apply(ctx, members.AddNode{Request: q.Request, Now: m.d.clock.Wall(), Token: q.Token, Proof: q.Proof, Node: q.Node})
	rec, err := fsmValue[members.Record](res, err)
	if err != nil {
		m.log.Warn("refused a join", zap.String("peer", q.Node.Name), zap.String("from", r.RemoteAddr), zap.Error(err))
		return nil, err
	}
	cert, err := ca.SignCSR([]byte(q.CSR), pki.Identity{Cluster: m.identity().UUID, Role: pki.Node, Name: rec.Name}, m.d.clock.Wall())
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "", "%v", err)
	}
	// In the log first, as a listener; the vote comes when it has kept up.
	if _, ok := m.raft.Configuration().Find(rec.Name); !ok {
		if err := m.raft.AddNonvoter(ctx, rec.Name, rec.Addresses.Raft); err != nil {
			return nil, err
		}
	}
	if rec.Status == members.Joining {
		res, err := m.apply(ctx, members.Admit{Now: m.d.clock.Wall(), Node: rec.Name, From: rec.Incarnation, BootID: q.Node.BootID, Format: q.Node.Format})
		if rec, err = fsmValue[members.Record](res, err); err != nil {
			return nil, err
		}
		m.d.event("node.joined", "node "+rec.Name+" joined", map[string]any{"node": rec.Name})
		m.log.Info("node joined", zap.String("peer", rec.Name), zap.Int("index", rec.Index))
	}
	caPEM, caKey, err := ca.Encode()
	if err != nil {
		return nil, err
	}
	id := m.identity()
	rep := joinReply{Cluster: id.Cluster, UUID: id.UUID, Incarnation: rec.Incarnation, Cert: string(cert), CA: string(caPEM), GossipKey: id.GossipKey, ClusterKey: id.ClusterKey}
	if rec.Roles.Voter || rec.Roles.Witness {
		rep.CAKey = string(caKey)
	}
	m.cluster.Read(func(v machines.View) {
		for _, r := range v.Members.State().List() {
			if r.Name != rec.Name {
				rep.Peers = append(rep.Peers, peer{Name: r.Name, API: r.Addresses.API, Raft: r.Addresses.Raft})
			}
		}
	})
	return rep, nil
}

// askAdmission asks the leader to make this node a member again.
func (m *member) askAdmission() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	stop := context.AfterFunc(m.ctx, cancel)
	defer stop()
	iqns := map[string]bool{}
	m.cluster.Read(func(v machines.View) {
		for iqn := range v.Storage.State().Targets {
			iqns[iqn] = true
		}
	})
	q := admission{Node: m.identity().Node, BootID: m.d.bootID, Format: machines.Format}
	p, err := proveClean("/", iqns)
	if err != nil {
		q.ProofError = err.Error()
	}
	q.Proof = p
	var errs []error
	who, us := m.leaderPeer()
	if us {
		return errors.New("this node leads and is no member: another must lead first")
	}
	for _, w := range append([]peer{who}, m.peers()...) {
		if w.API == "" {
			continue
		}
		a, err := api.Post[admitted](ctx, m.client(w), pathAdmit, q)
		if err == nil {
			if err := m.setIncarnation(a.Incarnation); err != nil {
				return err
			}
			m.log.Info("admitted", zap.Uint64("incarnation", a.Incarnation))
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", w.Name, err))
	}
	return errors.Join(errs...)
}

// leaveRequest is what the leader is asked for on a planned way out.
type leaveRequest struct {
	Node  string `json:"node"`
	Force bool   `json:"force"`
}

// leave takes this node out of its cluster.
func (m *member) leave(r *http.Request) (any, error) {
	q, err := decode[api.Leave](r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	node := m.identity().Node
	var users []string
	var others int
	m.cluster.Read(func(v machines.View) {
		users = v.Storage.NodeUsers(node)
		for _, r := range v.Members.State().List() {
			if r.Active() && r.Name != node {
				others++
			}
		}
	})
	if len(users) > 0 {
		return nil, api.Errorf(api.CodeRefused, "clusteradm volume delete "+users[0],
			"%s holds the only copy of %d volumes (%v): leaving would lose them", node, len(users), users)
	}
	if others == 0 && !q.Force {
		return nil, api.Errorf(api.CodeRefused, "clusteradm leave --force", "%s is the last member: leaving ends the cluster", node)
	}
	if others == 0 {
		m.goneBecause("the last member has left: the cluster is ended")
		return api.Done{APIVersion: api.Version, Message: "the cluster is ended; its state lies aside in the data folder"}, nil
	}
	// The leader's part is asked of somebody else: leadership goes first.
	if _, us := m.leaderPeer(); us {
		if err := m.raft.LeadershipTransfer(ctx, m.successor()); err != nil {
			return nil, api.Errorf(api.CodeNoQuorum, "clusteradm quorum show", "hand over leadership before leaving: %v", err)
		}
	}
	for {
		p, us := m.leaderPeer()
		if p.API != "" && !us {
			d, err := api.Post[api.Done](ctx, m.client(p), pathLeaving, leaveRequest{node, q.Force})
			if err == nil {
				m.goneBecause("this node has left the cluster")
				return d, nil
			}
			if !retryable(err) && api.AsError(err).Code != api.CodeUnreachable {
				return nil, err
			}
		}
		if m.d.clock.Sleep(ctx, 100*time.Millisecond) != nil {
			return nil, api.Errorf(api.CodeTimeout, "clusteradm status", "no leader took the leave in time")
		}
	}
}

// successor is a voter that holds its lease, or "" for Raft to choose.
func (m *member) successor() string {
	l := m.table.leases()
	for _, v := range m.raft.Configuration().Voters() {
		if v != m.identity().Node && l[v].Left > 0 {
			return v
		}
	}
	return ""
}

// leaving is the leader's part: drained, out of the log, left.
func (m *member) leaving(r *http.Request) (any, error) {
	q, err := decode[leaveRequest](r)
	if err != nil {
		return nil, err
	}
	if c := callerOf(r); !c.local && c.id.Name != q.Node {
		return nil, api.Errorf(api.CodeDenied, "", "%v takes %s out", c, q.Node)
	}
	ctx := r.Context()
	rec, _, known := m.record(q.Node)
	if !known {
		return nil, api.Errorf(api.CodeNotFound, "", "%s is no member", q.Node)
	}
	for _, fin := range []bool{false, true} {
		if _, err := m.apply(ctx, members.Leave{Node: q.Node, Incarnation: rec.Incarnation, Done: fin}); err != nil {
			return nil, err
		}
	}
	if _, ok := m.raft.Configuration().Find(q.Node); ok {
		if err := m.raft.Remove(ctx, q.Node); err != nil {
			return nil, err
		}
	}
	res, err := m.apply(ctx, members.Remove{Node: q.Node})
	m.d.event("node.left", "node "+q.Node+" has left", map[string]any{"node": q.Node})
	return done(res, err, "node "+q.Node+" has left")
}
