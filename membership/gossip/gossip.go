// Package gossip spreads hints about who can be reached (memberlist, LAN
// timing). A hint starts a probe and never evicts: membership is decided by
// leases and the replicated log (DESIGN "What is decided by whom").
//
// Packets are encrypted with the cluster's keyring and labelled with its uuid,
// so that two clusters on one network do not mix.
//
// Cluster row: node/ imports it.
package gossip

import (
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"go.uber.org/zap"
)

// Meta is what a node tells of itself with every alive message; at most 512
// bytes of JSON.
type Meta struct {
	Incarnation uint64   `json:"inc"` // the cluster's, not memberlist's
	Raft        string   `json:"raft"`
	API         string   `json:"api,omitempty"`
	ISCSI       []string `json:"iscsi,omitempty"`
	// Leaving is set by Close before it says goodbye: memberlist's own event
	// does not tell a leave from a death.
	Leaving bool `json:"leaving,omitempty"`
}

// EventKind is what a hint is about.
type EventKind string

// The kinds. Failed means no answer to direct and indirect probes for the
// suspicion time; Left means it said so.
const (
	Joined  EventKind = "joined"
	Updated EventKind = "updated"
	Left    EventKind = "left"
	Failed  EventKind = "failed"
)

// Event is a hint.
type Event struct {
	Kind EventKind
	Node string
	Addr string // host:port of its gossip
	Meta Meta
}

// Peer is a node that gossip thinks is alive.
type Peer struct {
	Node string
	Addr string
	Meta Meta
}

// Config is what a Gossip is started with.
type Config struct {
	Name    string
	Cluster string // uuid, the label
	Bind    string // host:port; port 0 = any
	// Advertise is host:port for others, "" = Bind.
	Advertise string
	// Keys: the first encrypts, all decrypt; 16, 24 or 32 bytes each (AES).
	Keys [][]byte
	Meta Meta
	Log  *zap.Logger
	// Tune changes timing, for tests and the wan profile; nil = DefaultLAN.
	Tune func(*memberlist.Config)
}

// Gossip is this node's gossip.
type Gossip struct {
	list   *memberlist.Memberlist
	ring   *memberlist.Keyring
	log    *zap.Logger
	events chan Event

	self string
	once sync.Once
	err  error

	mu struct {
		sync.Mutex
		meta  Meta
		alive map[string]Peer
	}
}

// maxMeta is memberlist's limit (memberlist.MetaMaxSize).
const maxMeta = memberlist.MetaMaxSize

// Start binds UDP and TCP and begins to gossip with nobody; Join finds others.
func Start(cfg Config) (*Gossip, error) {
	if cfg.Name == "" || cfg.Cluster == "" || len(cfg.Keys) == 0 || cfg.Log == nil {
		return nil, errors.New("start gossip: name, cluster, keys and log are needed")
	}
	if err := checkMeta(cfg.Meta); err != nil {
		return nil, fmt.Errorf("start gossip: %w", err)
	}
	ring, err := memberlist.NewKeyring(cfg.Keys, cfg.Keys[0])
	if err != nil {
		return nil, fmt.Errorf("start gossip: keyring: %w", err)
	}
	g := &Gossip{ring: ring, log: cfg.Log, events: make(chan Event, 256)}
	g.mu.meta = cfg.Meta
	g.mu.alive = make(map[string]Peer)
	mc := memberlist.DefaultLANConfig()
	mc.Name, mc.Label = cfg.Name, cfg.Cluster
	if mc.BindAddr, mc.BindPort, err = split(cfg.Bind); err != nil {
		return nil, fmt.Errorf("start gossip: bind: %w", err)
	}
	mc.AdvertisePort = mc.BindPort
	if cfg.Advertise != "" {
		if mc.AdvertiseAddr, mc.AdvertisePort, err = split(cfg.Advertise); err != nil {
			return nil, fmt.Errorf("start gossip: advertise: %w", err)
		}
	}
	mc.Keyring = ring
	mc.GossipVerifyIncoming, mc.GossipVerifyOutgoing = true, true
	mc.Delegate, mc.Events = (*delegate)(g), (*events)(g)
	mc.Logger = log.New(logLines{cfg.Log}, "", 0)
	mc.LogOutput = nil
	if cfg.Tune != nil {
		cfg.Tune(mc)
	}
	if g.list, err = memberlist.Create(mc); err != nil {
		return nil, fmt.Errorf("start gossip on %s: %w", cfg.Bind, err)
	}
	n := g.list.LocalNode()
	g.self = net.JoinHostPort(n.Addr.String(), strconv.Itoa(int(n.Port)))
	return g, nil
}

func split(hp string) (string, int, error) {
	h, p, err := net.SplitHostPort(hp)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("port of %q: %w", hp, err)
	}
	return h, int(n), nil
}

func checkMeta(m Meta) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMeta {
		return fmt.Errorf("node metadata of %d bytes, gossip carries %d: advertise fewer portals", len(b), maxMeta)
	}
	return nil
}

// Addr is host:port that others join by.
func (g *Gossip) Addr() string { return g.self }

// Join contacts nodes by host:port and gives how many answered; the error
// joins those of the others.
func (g *Gossip) Join(addrs ...string) (int, error) {
	n, err := g.list.Join(addrs)
	if err != nil {
		return n, fmt.Errorf("join gossip: %w", err)
	}
	return n, nil
}

// Events gives the hints, those about this node too. When nobody reads, the newest are dropped: Alive has
// the whole picture.
func (g *Gossip) Events() <-chan Event { return g.events }

// Alive is the nodes that gossip thinks are alive, this one too, by name.
//
// It is kept from the events: the nodes that memberlist hands out change while
// they are read.
func (g *Gossip) Alive() []Peer {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]Peer, 0, len(g.mu.alive))
	for _, p := range g.mu.alive {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Peer) int { return strings.Compare(a.Node, b.Node) })
	return out
}

// SetMeta replaces this node's metadata and spreads it.
func (g *Gossip) SetMeta(m Meta, timeout time.Duration) error {
	if err := checkMeta(m); err != nil {
		return fmt.Errorf("set gossip metadata: %w", err)
	}
	g.mu.Lock()
	g.mu.meta = m
	g.mu.Unlock()
	if err := g.list.UpdateNode(timeout); err != nil {
		return fmt.Errorf("set gossip metadata: %w", err)
	}
	return nil
}

// SetKeys replaces the keyring: the first key encrypts, all decrypt. A rotation
// is two calls on every node: {old, new}, then {new, old}, then {new}.
func (g *Gossip) SetKeys(keys [][]byte) error {
	if len(keys) == 0 {
		return errors.New("set gossip keys: none given")
	}
	for _, k := range keys {
		if err := g.ring.AddKey(k); err != nil {
			return fmt.Errorf("set gossip keys: %w", err)
		}
	}
	if err := g.ring.UseKey(keys[0]); err != nil {
		return fmt.Errorf("set gossip keys: %w", err)
	}
	for _, k := range g.ring.GetKeys() {
		if slices.ContainsFunc(keys, func(x []byte) bool { return string(x) == string(k) }) {
			continue
		}
		if err := g.ring.RemoveKey(k); err != nil {
			return fmt.Errorf("set gossip keys: %w", err)
		}
	}
	return nil
}

// Close stops. With patience it says goodbye first and waits so long that
// others hear it; with 0 they see a death.
func (g *Gossip) Close(patience time.Duration) error {
	g.once.Do(func() {
		if patience > 0 {
			g.mu.Lock()
			g.mu.meta.Leaving = true
			g.mu.Unlock()
			// Nobody may be there to hear it, which is no reason to stay.
			if err := errors.Join(g.list.UpdateNode(patience/2), g.list.Leave(patience/2)); err != nil {
				g.log.Info("gossip goodbye not heard", zap.Error(err))
			}
		}
		g.err = g.list.Shutdown()
	})
	return g.err
}

func (g *Gossip) meta(n *memberlist.Node) Meta {
	var m Meta
	if err := json.Unmarshal(n.Meta, &m); err != nil && len(n.Meta) > 0 {
		g.log.Warn("gossip metadata unreadable", zap.String("node", n.Name), zap.Error(err))
	}
	return m
}

type delegate Gossip

func (d *delegate) NodeMeta(limit int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	b, err := json.Marshal(d.mu.meta)
	if err != nil || len(b) > limit { // checkMeta was before
		return nil
	}
	return b
}
func (*delegate) NotifyMsg([]byte)                {}
func (*delegate) GetBroadcasts(_, _ int) [][]byte { return nil }
func (*delegate) LocalState(bool) []byte          { return nil }
func (*delegate) MergeRemoteState([]byte, bool)   {}

type events Gossip

// send runs under memberlist's lock: it never blocks.
func (e *events) send(k EventKind, n *memberlist.Node) {
	g := (*Gossip)(e)
	p := Peer{Node: n.Name, Addr: n.Address(), Meta: g.meta(n)}
	if k == Failed && p.Meta.Leaving {
		k = Left
	}
	g.mu.Lock()
	if k == Left || k == Failed {
		delete(g.mu.alive, p.Node)
	} else {
		g.mu.alive[p.Node] = p
	}
	g.mu.Unlock()
	select {
	case g.events <- Event{Kind: k, Node: p.Node, Addr: p.Addr, Meta: p.Meta}:
	default:
	}
}

func (e *events) NotifyJoin(n *memberlist.Node)   { e.send(Joined, n) }
func (e *events) NotifyUpdate(n *memberlist.Node) { e.send(Updated, n) }
func (e *events) NotifyLeave(n *memberlist.Node)  { e.send(Failed, n) }

// logLines turns memberlist's "[LEVEL] memberlist: text" lines into zap's.
type logLines struct{ z *zap.Logger }

func (w logLines) Write(p []byte) (int, error) {
	s := strings.TrimRight(string(p), "\n")
	level := ""
	if i := strings.IndexByte(s, '['); i >= 0 {
		if j := strings.IndexByte(s[i:], ']'); j > 0 {
			level, s = s[i+1:i+j], strings.TrimPrefix(strings.TrimSpace(s[i+j+1:]), "memberlist: ")
		}
	}
	switch level {
	case "DEBUG", "TRACE":
		w.z.Debug(s)
	case "WARN":
		w.z.Warn(s)
	case "ERR", "ERROR":
		w.z.Error(s)
	default:
		w.z.Info(s)
	}
	return len(p), nil
}
