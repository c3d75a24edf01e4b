package control

import (
	"net/http"
	"slices"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

// portalRoutes are the handlers of portals.
func (m *member) portalRoutes(mux *http.ServeMux) {
	mux.Handle("GET "+api.PathPortals, m.onLeader(true, handler(func(r *http.Request) (any, error) {
		p := m.picture(r.Context())
		return list("PortalList", api.Status{Stale: p.Stale, Index: p.Index}, portalsOf(p)), nil
	})))
	mux.Handle("POST "+api.PathPortals, m.onLeader(false, handler(m.portalAdd)))
	mux.Handle("DELETE "+api.PathPortals+"/{node}/{address}", m.onLeader(false, handler(m.portalRemove)))
}

// addressesOf is where a node takes iSCSI logins.
func addressesOf(r *members.Record) []string {
	return slices.Concat([]string{}, r.Addresses.ISCSI, r.Portals)
}

// portalsOf joins the records with what the nodes say of them. Pure.
func portalsOf(p picture) []api.Portal {
	out := []api.Portal{}
	for _, r := range p.Members.List() {
		if !r.Roles.Storage {
			continue
		}
		w, ok := p.Leases[r.Name].Workers["storage"]
		says := ok && w.State != "down" && !p.Stale
		var file []api.Portal
		cluster := map[string]api.Portal{}
		for _, x := range w.Portals {
			if x.From == "file" {
				file = append(file, x)
			} else {
				cluster[x.Address] = x
			}
		}
		for i, a := range r.Addresses.ISCSI {
			x := api.Portal{Node: r.Name, Address: a, From: "file", State: "unknown"}
			// The address is the one that others reach; the node says the file's.
			if says && len(file) == len(r.Addresses.ISCSI) {
				x.State, x.Error = file[i].State, file[i].Error
			}
			out = append(out, x)
		}
		for _, a := range r.Portals {
			x := api.Portal{Node: r.Name, Address: a, From: "cluster", State: "unknown"}
			if said, ok := cluster[a]; says && ok {
				x.State, x.Error = said.State, said.Error
			} else if says {
				x.State = "opening"
			}
			out = append(out, x)
		}
	}
	return out
}

// asked is the node that a request came to.
func (m *member) asked(r *http.Request) string {
	if n := r.Header.Get(hdrForwarded); n != "" {
		return n
	}
	return m.identity().Node
}

func portalAddress(s string) (string, error) {
	a, err := members.CanonicalPortal(api.PortalAddress(s))
	if err != nil {
		return "", api.Errorf(api.CodeUsage, "clusteradm portal add --help", "%v", err)
	}
	return a, nil
}

func (m *member) portalAdd(r *http.Request) (any, error) {
	q, err := decode[api.PortalAdd](r)
	if err != nil {
		return nil, err
	}
	if q.Node == "" {
		q.Node = m.asked(r)
	}
	if q.Address, err = portalAddress(q.Address); err != nil {
		return nil, err
	}
	res, err := m.apply(r.Context(), members.PortalAdd{Node: q.Node, Address: q.Address})
	if err != nil {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	for _, x := range portalsOf(m.picture(r.Context())) {
		if x.Node == q.Node && x.Address == q.Address {
			return x, nil
		}
	}
	return nil, api.Errorf(api.CodeConflict, "clusteradm portal list", "portal %s of %s was taken away again", q.Address, q.Node)
}

func (m *member) portalRemove(r *http.Request) (any, error) {
	node := r.PathValue("node")
	if node == "-" {
		node = m.asked(r)
	}
	a, err := portalAddress(r.PathValue("address"))
	if err != nil {
		return nil, err
	}
	res, err := m.apply(r.Context(), members.PortalRemove{Node: node, Address: a})
	if err == nil {
		m.settle(r.Context(), res.Index)
	}
	return done(res, err, "portal "+a+" of "+node+" is removed; sessions that came through it stay")
}
