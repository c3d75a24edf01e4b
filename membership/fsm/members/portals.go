package members

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

// maxPortals bounds the records of a node: each is a listening socket.
const maxPortals = 64

// PortalAdd gives a storage node one more iSCSI portal. Value: Record.
type PortalAdd struct {
	Node    string `json:"node"`
	Address string `json:"address"` // as CanonicalPortal writes it
}

// PortalRemove takes a portal away that PortalAdd gave; those of the node's file
// are none of ours. Value: Record.
type PortalRemove struct {
	Node    string `json:"node"`
	Address string `json:"address"`
}

// CanonicalPortal gives the one form of a portal's address: a literal and a port,
// IPv6 in brackets. A name is none: where it points may change under a listener.
func CanonicalPortal(s string) (string, error) {
	p, err := netip.ParseAddrPort(s)
	if err != nil {
		return "", fmt.Errorf("portal %q: ADDRESS:PORT with an IPv4 address or an IPv6 address in brackets is needed", s)
	}
	p = netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	switch {
	case p.Port() == 0:
		return "", fmt.Errorf("portal %q: port 0 is none", s)
	case p.Addr().Zone() != "":
		return "", fmt.Errorf("portal %q: an address with a zone means nothing to an initiator", s)
	case p.Addr().IsMulticast() || p.Addr() == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "", fmt.Errorf("portal %q: nobody can listen at a multicast or broadcast address", s)
	}
	return p.String(), nil
}

// Validate implements fsm.Validator.
func (c *PortalAdd) Validate() error {
	p, err := CanonicalPortal(c.Address)
	if err == nil && p != c.Address {
		err = fmt.Errorf("portal %q is not in its one form, %q", c.Address, p)
	}
	return err
}

// covers tells whether two listeners exclude each other: a wildcard takes every
// address of its port, and that of IPv6 takes IPv4 too.
func covers(a, b netip.AddrPort) bool {
	if a.Port() != b.Port() {
		return false
	}
	x, y := a.Addr().Unmap(), b.Addr().Unmap()
	return x == y || x.IsUnspecified() && (x.Is6() || y.Is4()) || y.IsUnspecified() && (y.Is6() || x.Is4())
}

func (m *Machine) portalAdd(c *PortalAdd) (any, error) {
	const op = "add portal"
	r, err := m.get(op, c.Node)
	if err != nil {
		return nil, err
	}
	p, err := netip.ParseAddrPort(c.Address)
	if err != nil {
		return nil, err // validated before
	}
	refuse := func(kind fsm.ErrKind, next, why string, args ...any) (any, error) {
		return nil, &fsm.Error{Kind: kind, Op: op, Object: c.Node + " " + c.Address, Why: fmt.Sprintf(why, args...), Next: next}
	}
	const list = "run clusteradm portal list"
	if !r.Roles.Storage {
		return refuse(fsm.KindRefused, "run clusteradm node list", "node %s has not the storage role", c.Node)
	}
	for _, o := range []struct{ what, addr string }{{"raft", r.Addresses.Raft}, {"API", r.Addresses.API}, {"gossip", r.Addresses.Gossip}} {
		// By the port alone: what is told to others may stand for every address.
		if _, port, err := net.SplitHostPort(o.addr); err == nil && port == fmt.Sprint(p.Port()) {
			return refuse(fsm.KindRefused, "choose another port", "port %s of %s is that of its %s address %s", port, c.Node, o.what, o.addr)
		}
	}
	for i, have := range slices.Concat(r.Portals, r.Addresses.ISCSI) {
		h, err := netip.ParseAddrPort(have)
		if err != nil || !covers(h, p) {
			continue // a name in the node's file: what it holds shows when the portal is opened
		}
		from := "was added before"
		if i >= len(r.Portals) {
			from = "is in the file of the node (listen.iscsi)"
		}
		if h == p {
			return refuse(fsm.KindExists, list, "it %s", from)
		}
		return refuse(fsm.KindConflict, list, "%s, which %s, excludes it", have, from)
	}
	if len(r.Portals) >= maxPortals {
		return refuse(fsm.KindRefused, list, "the node has %d portals beside those of its file, and may have no more", len(r.Portals))
	}
	r.Portals = append(r.Portals, c.Address)
	slices.Sort(r.Portals)
	return r.Clone(), nil
}

func (m *Machine) portalRemove(c *PortalRemove) (any, error) {
	const op = "remove portal"
	r, err := m.get(op, c.Node)
	if err != nil {
		return nil, err
	}
	i := slices.Index(r.Portals, c.Address)
	switch {
	case i >= 0:
	case slices.Contains(r.Addresses.ISCSI, c.Address):
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Node + " " + c.Address, Why: "it is in the file of the node",
			Next: "change listen.iscsi there and restart clusterd"}
	default:
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: c.Node + " " + c.Address, Why: "no such portal", Next: "run clusteradm portal list"}
	}
	if r.Portals = slices.Delete(r.Portals, i, i+1); len(r.Portals) == 0 {
		r.Portals = nil // one form: the snapshot has the same bytes before and after a restore
	}
	return r.Clone(), nil
}
