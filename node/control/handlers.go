package control

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block/replica"
	"github.com/blockhouse-san/blockhouse/fence/drive"
	"github.com/blockhouse-san/blockhouse/fence/manual"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/membership/pki"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// routes are the handlers of /v1 on a member. A read is answered by the leader
// where there is one, so that two nodes never say two things; a change only by
// the leader.
func (m *member) routes() http.Handler {
	mux := http.NewServeMux()
	read := func(pattern string, h func(r *http.Request) (any, error)) {
		mux.Handle("GET "+pattern, m.onLeader(true, handler(h)))
	}
	change := func(pattern string, h func(r *http.Request) (any, error)) {
		mux.Handle(pattern, m.onLeader(false, handler(h)))
	}
	read(api.PathStatus, func(r *http.Request) (any, error) { return m.status(r.Context()), nil })
	read(api.PathNodes, func(r *http.Request) (any, error) {
		s := m.status(r.Context())
		return list("NodeList", s, s.Nodes), nil
	})
	read(api.PathNodes+"/{name}", m.getNode)
	read(api.PathQuorum, func(r *http.Request) (any, error) { return m.status(r.Context()).Quorum, nil })
	read(api.PathVolumes, func(r *http.Request) (any, error) {
		s := m.status(r.Context())
		return list("VolumeList", s, s.Volumes), nil
	})
	read(api.PathVolumes+"/{name}", m.getVolume)
	read(api.PathTargets, func(r *http.Request) (any, error) {
		s := m.status(r.Context())
		return list("TargetList", s, s.Targets), nil
	})
	read(api.PathTargets+"/{iqn}", func(r *http.Request) (any, error) {
		return findTarget(m.status(r.Context()), r.PathValue("iqn"))
	})
	read(api.PathLUNs, func(r *http.Request) (any, error) {
		s := m.status(r.Context())
		return list("LUNList", s, s.LUNs), nil
	})
	read(api.PathSessions, m.getSessions)
	read(api.PathReservations, func(r *http.Request) (any, error) {
		p := m.picture(r.Context())
		return list("ReservationList", api.Status{Stale: p.Stale, Index: p.Index}, reservationsOf(p)), nil
	})
	read(api.PathFence, func(r *http.Request) (any, error) {
		s := m.status(r.Context())
		return list("FenceList", s, s.Fences), nil
	})
	read(api.PathFenceHistory, m.getHistory)
	read(api.PathTokens, m.getTokens)

	change("POST "+api.PathTokens, m.tokenCreate)
	change("DELETE "+api.PathTokens+"/{id}", m.tokenRevoke)
	change("DELETE "+api.PathNodes+"/{name}", m.nodeRemove)
	change("POST "+api.PathVolumes, m.volumeCreate)
	change("DELETE "+api.PathVolumes+"/{name}", m.volumeDelete)
	change("POST "+api.PathTargets, m.targetCreate)
	change("DELETE "+api.PathTargets+"/{iqn}", m.targetDelete)
	change("POST "+api.PathLUNs, m.lunCreate)
	change("DELETE "+api.PathLUNs+"/{iqn}/{n}", m.lunDelete)
	change("POST "+api.PathACLs, m.aclChange)
	change("POST "+api.PathFenceAck, m.fenceAck)

	m.accountRoutes(mux)
	m.portalRoutes(mux)
	m.statsRoutes(mux)
	m.fenceRoutes(mux)

	mux.HandleFunc("GET "+api.PathEvents, m.d.events.serve)
	mux.Handle("POST "+api.PathLeave, handler(m.leave))
	mux.Handle("POST "+api.PathInit, handler(m.alreadyMember))
	mux.Handle("POST "+api.PathJoin, handler(m.alreadyMember))

	// Between nodes.
	change("POST "+pathClusterJoin, m.clusterJoin)
	change("POST "+pathAdmit, m.admit)
	change("POST "+pathLeaving, m.leaving)
	change("GET "+pathReadIndex, m.readIndexHandler)
	change("POST "+pathStorage, m.storageRequest)
	return mux
}

// Paths between nodes; not for users.
const (
	pathClusterJoin = "/v1/cluster/join"
	pathAdmit       = "/v1/cluster/admit"
	pathLeaving     = "/v1/cluster/leaving"
	pathReadIndex   = "/v1/cluster/read-index"
	pathStorage     = "/v1/cluster/storage-request"
)

func list[T any](kind string, s api.Status, items []T) api.List[T] {
	if items == nil {
		items = []T{}
	}
	return api.List[T]{APIVersion: api.Version, Kind: kind, Stale: s.Stale, Index: s.Index, Items: items}
}

func (m *member) alreadyMember(*http.Request) (any, error) {
	return nil, api.Errorf(api.CodeExists, "clusteradm status", "this node is already a member of cluster %s", m.identity().Cluster)
}

func (m *member) getNode(r *http.Request) (any, error) {
	name := r.PathValue("name")
	for _, n := range m.status(r.Context()).Nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return nil, api.Errorf(api.CodeNotFound, "clusteradm node list", "no node is called %s", name)
}

func (m *member) getVolume(r *http.Request) (any, error) {
	return findVolume(m.status(r.Context()), r.PathValue("name"))
}

func findVolume(s api.Status, name string) (api.Volume, error) {
	for _, v := range s.Volumes {
		if v.Name == name || v.UUID == name {
			return v, nil
		}
	}
	return api.Volume{}, api.Errorf(api.CodeNotFound, "clusteradm volume list", "no volume is called %s", name)
}

func findTarget(s api.Status, iqn string) (api.Target, error) {
	for _, t := range s.Targets {
		if t.IQN == iqn || strings.HasSuffix(t.IQN, ":"+iqn) || strings.HasSuffix(t.IQN, "."+iqn) {
			return t, nil
		}
	}
	return api.Target{}, api.Errorf(api.CodeNotFound, "clusteradm target list", "no target is called %s", iqn)
}

func (m *member) getSessions(r *http.Request) (any, error) {
	p := m.picture(r.Context())
	out := []api.Session{}
	for _, l := range p.Leases {
		out = append(out, l.Sessions...)
	}
	out = detailed(out, m.allStats(r.Context(), ""))
	slices.SortFunc(out, func(a, b api.Session) int {
		return strings.Compare(a.Node+a.Target+a.Initiator+a.ISID, b.Node+b.Target+b.Initiator+b.ISID)
	})
	return api.List[api.Session]{APIVersion: api.Version, Kind: "SessionList", Stale: p.Stale, Index: p.Index, Items: out}, nil
}

func (m *member) getHistory(r *http.Request) (any, error) {
	out := []api.FenceEvent{}
	p := m.picture(r.Context())
	for _, h := range p.History {
		out = append(out, fenceEventOf(h))
	}
	return api.List[api.FenceEvent]{APIVersion: api.Version, Kind: "FenceEventList", Stale: p.Stale, Index: p.Index, Items: out}, nil
}

func (m *member) getTokens(r *http.Request) (any, error) {
	p := m.picture(r.Context())
	out := []api.Token{}
	for _, t := range p.Members.ListTokens() {
		out = append(out, api.Token{ID: t.ID, Expires: t.Expires, Uses: t.Uses})
	}
	return api.List[api.Token]{APIVersion: api.Version, Kind: "TokenList", Stale: p.Stale, Index: p.Index, Items: out}, nil
}

func (m *member) tokenCreate(r *http.Request) (any, error) {
	q, err := decode[api.TokenCreate](r)
	if err != nil {
		return nil, err
	}
	if q.TTL == 0 {
		q.TTL = time.Hour
	}
	if q.Uses == 0 {
		q.Uses = 1
	}
	if q.TTL < time.Second || q.TTL > 30*24*time.Hour {
		return nil, api.Errorf(api.CodeUsage, "", "a token may live from 1s to 720h, not %v", q.TTL)
	}
	t, err := pki.NewToken(pki.Hash(m.files.CA), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := m.d.clock.Wall()
	c := members.TokenCreate{Now: now, ID: t.ID, SHA256: t.SecretSHA256(), Expires: now.Add(q.TTL), Uses: q.Uses,
		Roles: members.Roles{Storage: true, Host: true, Voter: true, Witness: true}}
	if _, err := m.apply(r.Context(), c); err != nil {
		return nil, err
	}
	addr := m.advertised().API
	return api.Token{ID: t.ID, Secret: t.Text(), Expires: c.Expires, Uses: q.Uses,
		Join: "clusteradm join " + t.Text() + "@" + addr}, nil
}

func (m *member) tokenRevoke(r *http.Request) (any, error) {
	res, err := m.apply(r.Context(), members.TokenRevoke{ID: r.PathValue("id")})
	return done(res, err, "")
}

func (m *member) nodeRemove(r *http.Request) (any, error) {
	name := r.PathValue("name")
	res, err := m.apply(r.Context(), members.Remove{Node: name})
	return done(res, err, "node "+name+" is removed; its certificate admits nobody any more")
}

// settle waits until the storage workers that hold a lease have acted on index,
// or said that they cannot, so that who was told "done" finds it done; at most two seconds, since a worker
// that lags will come to it all the same.
func (m *member) settle(ctx context.Context, index uint64) {
	for end := m.d.clock.Now().Add(2 * time.Second); m.d.clock.Now() < end; {
		behind := false
		for _, l := range m.table.leases() {
			if w, ok := l.Workers[string(link.Storage)]; ok && l.Left > 0 && w.State == "serving" && w.Error == "" && w.Index < index {
				behind = true
			}
		}
		if !behind || m.d.clock.Sleep(ctx, 10*time.Millisecond) != nil {
			return
		}
	}
}

func done(res fsm.Result, err error, msg string) (any, error) {
	if err != nil {
		return nil, err
	}
	return api.Done{APIVersion: api.Version, Index: res.Index, Message: msg}, nil
}

// newVolume makes the record of a volume to be created.
func (m *member) newVolume(name string, size int64, blockSize, replicas int, node string) (storage.NewVolume, error) {
	var nv storage.NewVolume
	if blockSize == 0 {
		blockSize = 512
	}
	if blockSize != 512 && blockSize != 4096 {
		return nv, api.Errorf(api.CodeUsage, "", "block size %d: must be 512 or 4096", blockSize)
	}
	const maxSize = 1 << 53 // 8 PiB, 44-bit block numbers of 512 bytes
	if size <= 0 || size > maxSize {
		return nv, api.Errorf(api.CodeUsage, "", "size %d: must be 1 byte to 8 PiB", size)
	}
	if r := size % int64(blockSize); r != 0 {
		size += int64(blockSize) - r
	}
	if replicas > 1 {
		return nv, api.Errorf(api.CodeRefused, "create it with --replicas 1",
			"%d copies are not possible: this version keeps one copy of a volume", replicas)
	}
	node, err := m.place(node)
	if err != nil {
		return nv, err
	}
	id := uuid.New()
	ident, err := storage.NewIdentity(id, rand.Reader)
	if err != nil {
		return nv, err
	}
	return storage.NewVolume{Name: name, Identity: ident, Config: replica.Config{UUID: id.String(), Size: size, BlockSize: blockSize,
		Epoch: 1, Primary: node, ISR: []string{node}, Lineage: uuid.NewString()}}, nil
}

// place chooses the node of a copy: the one asked for, or the storage node that
// holds a lease and has the fewest bytes.
func (m *member) place(node string) (string, error) {
	st, vols := m.table.leases(), map[string]int64{}
	var best string
	var err error
	m.cluster.Read(func(v machines.View) {
		ms := v.Members.State()
		if node != "" {
			if r := ms.Members[node]; r == nil || !r.Active() || !r.Roles.Storage {
				err = api.Errorf(api.CodeNotFound, "clusteradm node list", "%s is no member with the storage role", node)
			}
			best = node
			return
		}
		for _, vol := range v.Storage.State().Volumes {
			for _, n := range vol.Config.Members() {
				vols[n] += vol.Config.Size
			}
		}
		for _, r := range ms.List() {
			if !r.Active() || !r.Roles.Storage || st[r.Name].Left <= 0 {
				continue
			}
			if best == "" || vols[r.Name] < vols[best] {
				best = r.Name
			}
		}
	})
	if err == nil && best == "" {
		err = api.Errorf(api.CodeNotFound, "clusteradm node list", "no storage node is online")
	}
	return best, err
}

func (m *member) volumeCreate(r *http.Request) (any, error) {
	q, err := decode[api.VolumeCreate](r)
	if err != nil {
		return nil, err
	}
	if err := m.probeStore(r, newStore{q.Name, &q.Store, &q.Node, &q.Size, q.BlockSize, &q.Integrity}); err != nil {
		return nil, err
	}
	nv, err := m.newVolume(q.Name, q.Size, q.BlockSize, q.Replicas, q.Node)
	if err != nil {
		return nil, err
	}
	nv.Store, nv.Integrity = q.Store, q.Integrity
	if q.RequestID == "" {
		q.RequestID = uuid.NewString()
	}
	res, err := m.apply(r.Context(), storage.VolumeCreate{Request: q.RequestID, Volume: nv})
	if q.IfNotExists && errors.Is(err, fsm.ErrExists) {
		return m.existingVolume(r.Context(), q.Name, nv)
	}
	v, err := fsmValue[storage.Volume](res, err)
	if err != nil {
		return nil, err
	}
	if err := m.waitVolume(r.Context(), v.Config.UUID); err != nil {
		return nil, err
	}
	return findVolume(m.status(r.Context()), v.Config.UUID)
}

// existingVolume answers --if-not-exists: the volume there is, if it is what was
// asked for.
func (m *member) existingVolume(ctx context.Context, name string, nv storage.NewVolume) (api.Volume, error) {
	v, err := findVolume(m.status(ctx), name)
	if err == nil && (v.Integrity != nv.Integrity || v.Store != nv.Store) {
		return v, api.Errorf(api.CodeConflict, "clusteradm volume show "+name,
			"volume %s exists, on another store or with another choice of checksums", name)
	}
	if err == nil && (v.Size != nv.Config.Size || v.BlockSize != nv.Config.BlockSize) {
		return v, api.Errorf(api.CodeConflict, "clusteradm volume show "+name,
			"volume %s exists with %d bytes in blocks of %d", name, v.Size, v.BlockSize)
	}
	return v, err
}

func fsmValue[T any](res fsm.Result, err error) (T, error) {
	if err != nil {
		var zero T
		return zero, err
	}
	return fsm.As[T](res)
}

// served tells whether the primary has reported that it serves the volume.
func (m *member) served(id, primary string) bool {
	for _, r := range m.table.leases()[primary].Volumes {
		if r.UUID == id {
			return r.State == "serving"
		}
	}
	return false
}

// waitVolume returns when every copy of a new volume is made and it is served.
func (m *member) waitVolume(ctx context.Context, id string) error {
	for {
		_, _, next := m.cluster.Changed()
		var v storage.Volume
		var ok bool
		m.cluster.Read(func(w machines.View) { v, ok = w.Storage.Volume(id) })
		switch {
		case !ok:
			return api.Errorf(api.CodeNotFound, "clusteradm volume list", "the volume was removed meanwhile")
		case v.State == storage.Ready && m.served(v.Config.UUID, v.Config.Primary):
			return nil
		}
		if why := m.storeFailed(&v); why != "" {
			return api.Errorf(api.CodeConflict, "clusteradm volume delete "+v.Name, "%s cannot serve volume %s: %s", v.Config.Primary, v.Name, why)
		}
		select {
		case <-next:
		case <-time.After(20 * time.Millisecond): // reports come with renewals, not with the log
		case <-ctx.Done():
			return api.Errorf(api.CodeTimeout, "clusteradm volume show "+v.Name,
				"volume %s is recorded, but %s has not made its store yet", v.Name, v.Config.Primary)
		}
	}
}

func (m *member) volumeID(name string) (string, error) {
	var id string
	m.cluster.Read(func(v machines.View) {
		if x := v.Storage.State().VolumeByName(name); x != nil {
			id = x.Config.UUID
		} else if _, ok := v.Storage.Volume(name); ok {
			id = name
		}
	})
	if id == "" {
		return "", api.Errorf(api.CodeNotFound, "clusteradm volume list", "no volume is called %s", name)
	}
	return id, nil
}

func (m *member) volumeDelete(r *http.Request) (any, error) {
	id, err := m.volumeID(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	res, err := m.apply(r.Context(), storage.VolumeRemove{UUID: id})
	v, err := fsmValue[storage.Volume](res, err)
	if err != nil {
		return nil, err
	}
	// The primary drains and says so; then the record goes and replicas erase.
	for {
		_, _, next := m.cluster.Changed()
		var there bool
		m.cluster.Read(func(w machines.View) { _, there = w.Storage.Volume(id) })
		if !there {
			return api.Done{APIVersion: api.Version, Index: m.cluster.Index(), Message: "volume " + v.Name + " is removed"}, nil
		}
		select {
		case <-next:
		case <-r.Context().Done():
			return nil, api.Errorf(api.CodeTimeout, "clusteradm volume show "+v.Name,
				"volume %s is marked for removal; %s has not drained it yet", v.Name, v.Config.Primary)
		}
	}
}

// targetName completes a short name to an IQN.
func (m *member) targetName(name string) (string, error) {
	if name == "" {
		return "", api.Errorf(api.CodeUsage, "clusteradm target create NAME", "a target needs a name")
	}
	if !strings.Contains(name, ":") && !strings.HasPrefix(name, "iqn.") && !strings.HasPrefix(name, "eui.") && !strings.HasPrefix(name, "naa.") {
		name = m.d.cfg.ISCSI.IQNPrefix + ":" + m.identity().Cluster + "." + name
	}
	c, err := storage.CanonicalName(name)
	if err != nil {
		return "", api.Errorf(api.CodeUsage, "", "%v", err)
	}
	return c, nil
}

// targetIQN finds the target that a user means: its IQN or what follows its last
// dot or colon.
func (m *member) targetIQN(name string) (string, error) {
	var hits []string
	m.cluster.Read(func(v machines.View) {
		for iqn := range v.Storage.State().Targets {
			if strings.EqualFold(iqn, name) {
				hits = []string{iqn}
				return
			}
			if strings.HasSuffix(iqn, ":"+name) || strings.HasSuffix(iqn, "."+name) {
				hits = append(hits, iqn)
			}
		}
	})
	switch len(hits) {
	case 1:
		return hits[0], nil
	case 0:
		return "", api.Errorf(api.CodeNotFound, "clusteradm target list", "no target is called %s", name)
	}
	slices.Sort(hits)
	return "", api.Errorf(api.CodeConflict, "", "%s may be %s: write the whole name", name, strings.Join(hits, " or "))
}

func (m *member) targetCreate(r *http.Request) (any, error) {
	q, err := decode[api.TargetCreate](r)
	if err != nil {
		return nil, err
	}
	iqn, err := m.targetName(q.Name)
	if err != nil {
		return nil, err
	}
	res, err := m.apply(r.Context(), storage.TargetCreate{Request: uuid.NewString(), IQN: iqn, TID: q.TID, Alias: q.Alias})
	if err != nil && (!q.IfNotExists || !errors.Is(err, fsm.ErrExists)) {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	return findTarget(m.status(r.Context()), iqn)
}

func (m *member) targetDelete(r *http.Request) (any, error) {
	iqn, err := m.targetIQN(r.PathValue("iqn"))
	if err != nil {
		return nil, err
	}
	res, err := m.apply(r.Context(), storage.TargetDelete{IQN: iqn, Force: r.URL.Query().Get("force") == "1"})
	m.settle(r.Context(), res.Index)
	return done(res, err, "target "+iqn+" is deleted; its volumes stay")
}

func (m *member) lunCreate(r *http.Request) (any, error) {
	q, err := decode[api.LUNCreate](r)
	if err != nil {
		return nil, err
	}
	iqn, err := m.targetIQN(q.Target)
	if err != nil {
		return nil, err
	}
	if q.RequestID == "" {
		q.RequestID = uuid.NewString()
	}
	find := func(n int) (any, error) {
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
	if err := m.probeStore(r, newStore{q.Volume, &q.Store, &q.Node, &q.Size, q.BlockSize, &q.Integrity}); err != nil {
		return nil, err
	}
	if q.Size > 0 {
		nv, err := m.newVolume(q.Volume, q.Size, q.BlockSize, q.Replicas, q.Node)
		if err != nil {
			return nil, err
		}
		nv.Store, nv.Integrity = q.Store, q.Integrity
		res, err := m.apply(r.Context(), storage.LunCreateVolume{Request: q.RequestID, Volume: nv, Target: iqn, Number: q.LUN, ReadOnly: q.ReadOnly})
		if q.IfNotExists && errors.Is(err, fsm.ErrExists) {
			v, err := m.existingVolume(r.Context(), q.Volume, nv)
			if err != nil {
				return nil, err
			}
			for _, l := range v.LUNs {
				if n, ok := strings.CutPrefix(l, iqn+"/"); ok {
					num, err := strconv.Atoi(n)
					if err != nil {
						return nil, err
					}
					return find(num)
				}
			}
			return nil, api.Errorf(api.CodeConflict, "clusteradm lun create "+q.Volume+" --target "+iqn, "volume %s exists, without a LUN under %s", q.Volume, iqn)
		}
		mp, err := fsmValue[storage.Mapped](res, err)
		if err != nil {
			return nil, err
		}
		if err := m.waitVolume(r.Context(), mp.Volume.Config.UUID); err != nil {
			return nil, err
		}
		return find(mp.LUN.Number)
	}
	id, err := m.volumeID(q.Volume)
	if err != nil {
		return nil, err
	}
	res, err := m.apply(r.Context(), storage.LunCreate{Request: q.RequestID, Target: iqn, Number: q.LUN, Volume: id, ReadOnly: q.ReadOnly})
	l, err := fsmValue[storage.LUN](res, err)
	if err != nil {
		return nil, err
	}
	m.settle(r.Context(), res.Index)
	return find(l.Number)
}

func (m *member) lunDelete(r *http.Request) (any, error) {
	iqn, err := m.targetIQN(r.PathValue("iqn"))
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(r.PathValue("n"))
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "", "%q is no LUN number", r.PathValue("n"))
	}
	res, err := m.apply(r.Context(), storage.LunDelete{Target: iqn, Number: n})
	m.settle(r.Context(), res.Index)
	return done(res, err, fmt.Sprintf("LUN %d of %s is deleted; its volume stays", n, iqn))
}

func (m *member) aclChange(r *http.Request) (any, error) {
	q, err := decode[api.ACLChange](r)
	if err != nil {
		return nil, err
	}
	iqn, err := m.targetIQN(q.Target)
	if err != nil {
		return nil, err
	}
	canon := func(a api.ACL) (storage.ACL, error) {
		c, err := storage.CanonicalACL(storage.ACL{Initiators: a.Initiators, CIDRs: a.Addresses})
		if err != nil {
			return c, api.Errorf(api.CodeUsage, "", "%v", err)
		}
		return c, nil
	}
	add, err := canon(q.Add)
	if err != nil {
		return nil, err
	}
	rem, err := canon(q.Remove)
	if err != nil {
		return nil, err
	}
	if q.Open != nil {
		add.Open, rem.Open = *q.Open, !*q.Open
	}
	var last fsm.Result
	if rem.Open || len(rem.Initiators)+len(rem.CIDRs) > 0 {
		if last, err = m.apply(r.Context(), storage.ACLRemove{Target: iqn, ACL: rem}); err != nil {
			return nil, err
		}
	}
	if add.Open || len(add.Initiators)+len(add.CIDRs) > 0 {
		if last, err = m.apply(r.Context(), storage.ACLAdd{Target: iqn, ACL: add}); err != nil {
			return nil, err
		}
	}
	m.settle(r.Context(), last.Index)
	return findTarget(m.status(r.Context()), iqn)
}

func (m *member) fenceAck(r *http.Request) (any, error) {
	q, err := decode[api.FenceAck](r)
	if err != nil {
		return nil, err
	}
	if q.Confirm != "absolutely" && q.Confirm != q.Node {
		return nil, api.Errorf(api.CodeRefused, "clusteradm fence_manual "+q.Node,
			"the word absolutely, or the node's name, must be given: a node that still runs destroys what the others recover")
	}
	if q.Operator == "" {
		return nil, api.Errorf(api.CodeUsage, "", "who says so must be recorded: operator is missing")
	}
	if q.Reason == "" {
		q.Reason = "reset by hand"
	}
	var opens []fencing.Open
	m.cluster.Read(func(v machines.View) { opens = v.Fencing.OpenFences() })
	open, err := manual.Find(opens, q.Node)
	if err != nil {
		return nil, err
	}
	rec, err := manual.Record(open, q.Operator, q.Reason, m.d.clock.Wall())
	if err != nil {
		return nil, err
	}
	m.cluster.Read(func(v machines.View) { rec.Evidence.Pending = drive.Pending(v, open.Node) })
	res, err := m.apply(r.Context(), rec)
	if err == nil {
		m.d.event("node.fenced", fmt.Sprintf("node %s is fenced: %s says so: %s", q.Node, q.Operator, q.Reason), map[string]any{"node": q.Node, "epoch": open.Epoch})
	}
	return done(res, err, fmt.Sprintf("node %s (incarnation %d, epoch %d) counts as fenced: %s says so", q.Node, open.Incarnation, open.Epoch, q.Operator))
}
