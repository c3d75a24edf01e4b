package control

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/block/integrity"
	"github.com/blockhouse-san/blockhouse/block/store"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// storeProbe asks a node to open a store, as its worker will.
type storeProbe struct {
	Store     string `json:"store"`
	BlockSize int    `json:"block_size"`
}

type storeProbed struct {
	Size int64 `json:"size"`
}

// probe opens the store to see that it can be opened and how large it is. What
// wraps it is left out: that is for the worker.
func (m *member) probe(r *http.Request, q storeProbe) (storeProbed, error) {
	u, err := storeurl.Parse(q.Store)
	if err != nil {
		return storeProbed{}, api.Errorf(api.CodeUsage, "", "%v", err)
	}
	d, err := store.Open(r.Context(), u.Base(), store.Options{BlockSize: q.BlockSize, Cache: file.Buffered})
	if err != nil {
		code, next := api.CodeUsage, ""
		switch {
		case errors.Is(err, file.ErrInUse):
			code = api.CodeConflict
			if v := m.sameFile(u.Base().Path); v != "" {
				return storeProbed{}, api.Errorf(code, "clusteradm volume show "+v, "%s is the store of volume %s, under another name", q.Store, v)
			}
		case errors.Is(err, block.ErrUnreachable):
			code, next = api.CodeUnreachable, "start the server, then repeat this"
		}
		return storeProbed{}, api.Errorf(code, next, "%v", err)
	}
	size := d.Info().Size
	if err := d.Close(); err != nil {
		return storeProbed{}, api.Errorf(api.CodeUsage, "", "%v", err)
	}
	return storeProbed{size}, nil
}

// sameFile is the volume of this node whose store is the same file or device as
// path, by whatever name.
func (m *member) sameFile(path string) (name string) {
	st, err := os.Stat(path)
	if err != nil {
		return ""
	}
	node := m.identity().Node
	m.cluster.Read(func(v machines.View) {
		s := v.Storage.State()
		for _, x := range s.ListVolumes() {
			u, err := storeurl.Parse(x.Store)
			if err != nil || x.Config.Primary != node || u.Base().Path == "" {
				continue
			}
			if o, err := os.Stat(u.Base().Path); err == nil && os.SameFile(st, o) {
				name = x.Name
			}
		}
	})
	return name
}

func (m *member) storeProbeHandler(r *http.Request) (any, error) {
	if err := fromNode(r); err != nil {
		return nil, err
	}
	q, err := decode[storeProbe](r)
	if err != nil {
		return nil, err
	}
	return m.probe(r, q)
}

// newStore is the part of a request that says where a new volume lies.
type newStore struct {
	volume    string
	store     *string
	node      *string
	size      *int64
	blockSize int
	integrity *bool
}

// probeStore completes a request for a volume on a store: the URL in its one
// form, the node that the user asked, and the size of the store.
func (m *member) probeStore(r *http.Request, q newStore) error {
	if *q.store == "" {
		return nil
	}
	u, err := storeurl.Parse(*q.store)
	if err != nil {
		return api.Errorf(api.CodeUsage, "", "%v", err)
	}
	switch u.WantsIntegrity() {
	case "on":
		*q.integrity = true
	case "off":
		if *q.integrity {
			return api.Errorf(api.CodeUsage, "", "the store says integrity=off, the request asks for it")
		}
	}
	*q.store = u.String()
	if !u.OwnSize() {
		switch {
		case *q.size == 0:
			return api.Errorf(api.CodeUsage, "", "%s has no size of its own: give one", *q.store)
		case *q.integrity:
			return api.Errorf(api.CodeUsage, "", "checksums of a store in memory protect nothing")
		}
		return nil
	}
	if *q.node == "" {
		if *q.node = r.Header.Get(hdrForwarded); *q.node == "" {
			*q.node = m.identity().Node
		}
	}
	// A store that serves is not opened a second time.
	var other *storage.Volume
	m.cluster.Read(func(v machines.View) {
		s := v.Storage.State()
		other = s.VolumeOn(*q.store, *q.node)
	})
	if other != nil {
		if other.Name != q.volume {
			return api.Errorf(api.CodeConflict, "clusteradm volume show "+other.Name, "%s on %s is the store of volume %s", *q.store, other.Config.Primary, other.Name)
		}
		*q.size = other.Config.Size // a repeated request: the FSM knows it
		return nil
	}
	p := storeProbe{*q.store, q.blockSize}
	var got storeProbed
	if *q.node == m.identity().Node {
		got, err = m.probe(r, p)
	} else {
		var n peer
		if n, err = m.peer(*q.node); err == nil {
			got, err = api.Post[storeProbed](r.Context(), m.client(n), pathStoreProbe, p)
		}
	}
	if err != nil {
		return err
	}
	if *q.size != 0 && *q.size != got.Size {
		return api.Errorf(api.CodeUsage, "leave the size out: it is the store's", "%s has %d bytes, not %d", *q.store, got.Size, *q.size)
	}
	*q.size = got.Size
	return nil
}

// storeFailed says why the node of a new volume cannot serve it; empty while that
// may still come.
func (m *member) storeFailed(v *storage.Volume) string {
	if v.Store == "" && !v.Integrity {
		return ""
	}
	for _, r := range m.table.leases()[v.Config.Primary].Volumes {
		if r.UUID == v.Config.UUID && (r.State == "error" || r.State == "failed") {
			return strings.TrimPrefix(r.Error, "open store ")
		}
	}
	return ""
}

// checksReport is what a worker says of the checksums of a copy
// (storage.checksReport).
type checksReport struct{ integrity.Stats }

func (c *checksReport) api() *api.Checksums {
	if c == nil {
		return nil
	}
	a := &api.Checksums{Mismatches: c.Mismatches, Adopted: c.Adopted, Doubt: c.Doubt, Damaged: c.BadUnits, Offsets: c.Bad}
	if s := c.Scrub; s.State != "" {
		a.Scrub = &api.Scrub{State: s.State, Began: s.Began, Ended: s.Ended, Done: s.Done, Size: s.Size, Damaged: s.Bad, Rate: s.Rate, Error: s.Error}
	}
	return a
}

// volumeScrub starts or stops the verification of a volume where it is served.
func (m *member) volumeScrub(r *http.Request) (any, error) {
	q, err := decode[api.VolumeScrub](r)
	if err != nil {
		return nil, err
	}
	v, err := findVolume(m.status(r.Context()), r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	show := "clusteradm volume show " + v.Name
	running := func() *api.Scrub {
		for _, x := range m.table.leases()[v.Primary].Volumes {
			if x.UUID == v.UUID {
				if c := x.Checks.api(); c != nil && c.Scrub != nil {
					return c.Scrub
				}
			}
		}
		return &api.Scrub{}
	}
	was := running()
	switch {
	case !v.Integrity:
		return nil, api.Errorf(api.CodeConflict, show, "volume %s keeps no checksums: there is nothing to verify; they are chosen when a volume is made (--integrity)", v.Name)
	case q.Rate < 0:
		return nil, api.Errorf(api.CodeUsage, "", "rate %d: bytes a second, 0 for no limit", q.Rate)
	case q.Stop && was.State != "running":
		return nil, api.Errorf(api.CodeConflict, show, "no scrub of volume %s is running", v.Name)
	case !q.Stop && was.State == "running":
		return nil, api.Errorf(api.CodeConflict, show, "a scrub of volume %s is running", v.Name)
	}
	s := link.Scrub{UUID: v.UUID, Rate: q.Rate, Stop: q.Stop}
	if v.Primary == m.identity().Node {
		err = m.scrub(s)
	} else {
		var p peer
		if p, err = m.peer(v.Primary); err == nil {
			_, err = api.Post[api.Done](r.Context(), m.client(p), pathScrub, s)
		}
	}
	if err != nil {
		return nil, err
	}
	for {
		now := running()
		if q.Stop && now.State != "running" || !q.Stop && !now.Began.Equal(was.Began) {
			break
		}
		if m.d.clock.Sleep(r.Context(), 20*time.Millisecond) != nil {
			return nil, api.Errorf(api.CodeTimeout, show, "%s was told, and has not answered", v.Primary)
		}
	}
	text := fmt.Sprintf("the scrub of volume %s has begun; its progress: %s", v.Name, show)
	if q.Stop {
		text = fmt.Sprintf("the scrub of volume %s is stopped", v.Name)
	}
	return api.Done{APIVersion: api.Version, Index: m.cluster.Index(), Message: text}, nil
}

func (m *member) scrubHandler(r *http.Request) (any, error) {
	if err := fromNode(r); err != nil {
		return nil, err
	}
	q, err := decode[link.Scrub](r)
	if err != nil {
		return nil, err
	}
	return api.Done{APIVersion: api.Version}, m.scrub(q)
}

func (m *member) scrub(q link.Scrub) error {
	c := m.workers.conn(link.Storage)
	if c == nil {
		return api.Errorf(api.CodeUnreachable, "clusteradm status", "the storage worker of %s is down", m.identity().Node)
	}
	return c.Scrub(q)
}

// tellChecks makes events of what a node's reports say that they did not say
// before.
func (m *member) tellChecks(node string, before, now []volumeReport) {
	old := map[string]*checksReport{}
	for _, r := range before {
		old[r.UUID] = r.Checks
	}
	for _, r := range now {
		if r.Checks == nil {
			continue
		}
		was := old[r.UUID]
		if was == nil {
			was = &checksReport{}
		}
		c := r.Checks
		scrubbed := c.Scrub.State != "running" && c.Scrub.State != "" && was.Scrub.State == "running"
		if c.BadUnits <= was.BadUnits && c.Adopted <= was.Adopted && !scrubbed {
			continue
		}
		name := r.UUID
		m.cluster.Read(func(v machines.View) {
			if x, ok := v.Storage.Volume(r.UUID); ok {
				name = x.Name
			}
		})
		data := map[string]any{"volume": name, "node": node}
		if c.BadUnits > was.BadUnits {
			m.d.event("volume.damaged", fmt.Sprintf("volume %s on %s: %d blocks of 4 KiB do not match their checksums, at %v", name, node, c.BadUnits, c.Bad), data)
		}
		if c.Adopted > was.Adopted {
			m.d.event("volume.doubt", fmt.Sprintf("volume %s on %s: %d blocks of 4 KiB that were being written at a crash were taken as they are", name, node, c.Adopted), data)
		}
		if s := c.Scrub; scrubbed {
			m.d.event("volume.scrubbed", fmt.Sprintf("the scrub of volume %s on %s is %s after %d of %d bytes: %d damaged blocks", name, node, s.State, s.Done, s.Size, s.Bad), data)
		}
	}
}
