package storage

import (
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/target"
)

// added is a portal of this node's record in the cluster.
type added struct{ netip.AddrPort }

func (w *worker) added(want *desired) []added {
	var out []added
	if r := want.members.Members[want.node]; r != nil {
		for _, s := range r.Portals {
			if p, err := netip.ParseAddrPort(s); err == nil { // validated when it was recorded
				out = append(out, added{p})
			}
		}
	}
	return out
}

// covered tells whether a portal of the file serves that address already: the
// record was made when the cluster could not know, or before the file was changed.
func (p added) covered(file []netip.AddrPort) bool {
	_, ok := p.by(file)
	return ok
}

func (p added) by(file []netip.AddrPort) (netip.AddrPort, bool) {
	i := slices.IndexFunc(file, func(f netip.AddrPort) bool {
		a, b := f.Addr().Unmap(), p.Addr()
		return f.Port() == p.Port() && (a == b || a.IsUnspecified() && (a.Is6() || b.Is4()))
	})
	if i < 0 {
		return netip.AddrPort{}, false
	}
	return file[i], true
}

// unopened is why portals of the record are not open, nil if all are.
func unopened(s *target.Server) error {
	bad := s.Unopened()
	var all error
	for _, p := range slices.SortedFunc(maps.Keys(bad), netip.AddrPort.Compare) {
		all = errors.Join(all, bad[p])
	}
	return all
}

// portalReports is how the portals are: those of the file in its order, then those
// of the record. failure is of the target's whole configuration.
func (w *worker) portalReports(want *desired, failure error) []api.Portal {
	bad := w.srv.Unopened()
	state := func(p netip.AddrPort) (string, string) {
		if _, ok := w.srv.Addr(p); ok {
			return "open", ""
		}
		switch {
		case bad[p] != nil:
			return "failed", bad[p].Error()
		case failure != nil:
			return "failed", failure.Error()
		}
		return "closed", ""
	}
	var out []api.Portal
	file, err := portals(w.cfg.Listen.ISCSI)
	for i, s := range w.cfg.Listen.ISCSI {
		x := api.Portal{Node: want.node, Address: s, From: "file", State: "failed"}
		if err != nil {
			x.Error = err.Error()
		} else {
			x.State, x.Error = state(file[i])
		}
		out = append(out, x)
	}
	for _, p := range w.added(want) {
		at := p.AddrPort
		if f, ok := p.by(file); ok {
			at = f
		}
		x := api.Portal{Node: want.node, Address: p.String(), From: "cluster"}
		x.State, x.Error = state(at)
		out = append(out, x)
	}
	return out
}
