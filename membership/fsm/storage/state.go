// Package storage is sub-machine 3: volumes with their replica configuration
// and frozen identity, targets, the LUN map and access lists. It is pure; the
// storage workers enforce from a copy (DESIGN "Words").
package storage

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/blockhouse-san/blockhouse/block/replica"
)

// VolumeState of a volume.
type VolumeState string

// The states.
const (
	Creating VolumeState = "creating" // replicas make their stores
	Ready    VolumeState = "ready"
	Removing VolumeState = "removing" // primaries drain, then VolumeRemoved
)

// Identity is what initiators know a volume by; frozen at creation (DESIGN).
type Identity struct {
	Product string `json:"product"` // 8 characters, unique: first half of the INQUIRY product id, the name is the second
	NAA     string `json:"naa"`     // 32 hex digits, NAA type 6 with a locally administered OUI
	Serial  string `json:"serial"`  // VPD 80h
}

// Volume is a volume.
type Volume struct {
	Name     string         `json:"name"`
	State    VolumeState    `json:"state"`
	Identity Identity       `json:"identity"`
	Config   replica.Config `json:"config"`
	Created  uint64         `json:"created"`         // log index
	Changed  uint64         `json:"changed"`         // log index of the last change
	Request  string         `json:"request"`         // of its creation
	LastCAS  string         `json:"last_cas"`        // request id of the last change of Config
	Store    string         `json:"store,omitempty"` // of the only copy (NewVolume.Store); never erased by us
	// Integrity: its copies keep checksums (NewVolume.Integrity).
	Integrity bool `json:"integrity,omitempty"`
}

// Clone is a deep copy.
func (v *Volume) Clone() Volume {
	c := *v
	c.Config = cloneConfig(v.Config)
	return c
}

func cloneConfig(c replica.Config) replica.Config {
	c.ISR = slices.Clone(c.ISR)
	c.Others = slices.Clone(c.Others)
	return c
}

// Gone is what is left of a removed volume: replicas erase by {uuid, epoch}
// (SAFETY §4 "Remove"), never because they cannot find a record.
type Gone struct {
	Name    string   `json:"name"`
	Epoch   uint64   `json:"epoch"`
	Members []string `json:"members"` // nodes with a copy
	Index   uint64   `json:"index"`
}

// Target is an iSCSI target of the whole cluster.
type Target struct {
	IQN   string `json:"iqn"` // canonical (CanonicalName)
	TID   int    `json:"tid"` // number for tgtadm, from 1
	Alias string `json:"alias,omitempty"`
	ACL   ACL    `json:"acl"`
	Auth  Auth   `json:"auth,omitzero"`
	// Params are negotiation limits by their name in RFC 7143, and tgtadm's own
	// (nop_interval …); what is not here has its default.
	Params map[string]string `json:"params,omitempty"`
	// Offline takes no login, for drains.
	Offline bool `json:"offline,omitempty"`
	// LUNs by number.
	LUNs map[int]*LUN `json:"luns"`
	// Generation rises with each change of ACL or LUN map.
	Generation uint64 `json:"generation"`
	Created    uint64 `json:"created"` // log index
	Request    string `json:"request,omitempty"`
}

// Clone is a deep copy.
func (t *Target) Clone() Target {
	c := *t
	c.ACL, c.Auth, c.Params = t.ACL.Clone(), t.Auth.Clone(), maps.Clone(t.Params)
	c.LUNs = make(map[int]*LUN, len(t.LUNs))
	for n, l := range t.LUNs {
		x := *l
		c.LUNs[n] = &x
	}
	return c
}

// Numbers is the LUN numbers in use, sorted.
func (t *Target) Numbers() []int { return slices.Sorted(maps.Keys(t.LUNs)) }

// LUN is one entry of a LUN map.
type LUN struct {
	Target     string `json:"target"`
	Number     int    `json:"number"`
	Volume     string `json:"volume"`     // uuid
	Generation uint64 `json:"generation"` // never given twice; the gate compares it with the session's (SAFETY §4)
	ReadOnly   bool   `json:"read_only,omitempty"`
	Removable  bool   `json:"removable,omitempty"`
	NoCache    bool   `json:"no_cache,omitempty"` // every write is durable before its status (WCE 0)
	Request    string `json:"request,omitempty"`
}

// ACL says who may log in to a target. The zero ACL lets nobody in.
type ACL struct {
	Open       bool     `json:"open,omitempty"`       // everybody
	Initiators []string `json:"initiators,omitempty"` // canonical names, sorted
	CIDRs      []string `json:"cidrs,omitempty"`      // canonical prefixes, sorted
}

// Clone is a deep copy.
func (a ACL) Clone() ACL {
	a.Initiators, a.CIDRs = slices.Clone(a.Initiators), slices.Clone(a.CIDRs)
	return a
}

// Allows tells whether an initiator at an address may log in: always if open,
// else it must be in every list that is not empty, and one list must not be.
func (a ACL) Allows(initiator string, addr netip.Addr) bool {
	if a.Open {
		return true
	}
	if len(a.Initiators) == 0 && len(a.CIDRs) == 0 {
		return false
	}
	if len(a.Initiators) > 0 {
		name, err := CanonicalName(initiator)
		if err != nil || !slices.Contains(a.Initiators, name) {
			return false
		}
	}
	if len(a.CIDRs) == 0 {
		return true
	}
	addr = addr.Unmap()
	for _, c := range a.CIDRs {
		if p, err := netip.ParsePrefix(c); err == nil && p.Contains(addr) {
			return true
		}
	}
	return false
}

// State is all of machine 3.
type State struct {
	Volumes    map[string]*Volume `json:"volumes"` // by uuid
	Targets    map[string]*Target `json:"targets"` // by iqn
	Gone       map[string]*Gone   `json:"gone"`    // by uuid
	Generation uint64             `json:"generation"`
	// Since section version 2.
	Accounts  map[string]*Account `json:"accounts,omitempty"` // by name
	Discovery Auth                `json:"discovery,omitzero"`
}

func newState() *State {
	return &State{Volumes: map[string]*Volume{}, Targets: map[string]*Target{}, Gone: map[string]*Gone{}}
}

// Clone is a deep copy.
func (s *State) Clone() *State {
	c := newState()
	c.Generation = s.Generation
	c.Discovery = s.Discovery.Clone()
	if s.Accounts != nil {
		c.Accounts = make(map[string]*Account, len(s.Accounts))
	}
	for k, a := range s.Accounts {
		x := a.Clone()
		c.Accounts[k] = &x
	}
	for k, v := range s.Volumes {
		x := v.Clone()
		c.Volumes[k] = &x
	}
	for k, t := range s.Targets {
		x := t.Clone()
		c.Targets[k] = &x
	}
	for k, g := range s.Gone {
		x := *g
		x.Members = slices.Clone(g.Members)
		c.Gone[k] = &x
	}
	return c
}

// VolumeByName finds a volume, nil if there is none. It is part of s.
func (s *State) VolumeByName(name string) *Volume {
	for _, v := range s.Volumes {
		if v.Name == name {
			return v
		}
	}
	return nil
}

// ListVolumes is the volumes ordered by name.
func (s *State) ListVolumes() []Volume {
	out := make([]Volume, 0, len(s.Volumes))
	for _, v := range s.Volumes {
		out = append(out, v.Clone())
	}
	slices.SortFunc(out, func(a, b Volume) int { return cmpString(a.Name, b.Name) })
	return out
}

// ListTargets is the targets ordered by tid.
func (s *State) ListTargets() []Target {
	out := make([]Target, 0, len(s.Targets))
	for _, t := range s.Targets {
		out = append(out, t.Clone())
	}
	slices.SortFunc(out, func(a, b Target) int { return a.TID - b.TID })
	return out
}

// LUNsOf is the LUN map entries that point to a volume, by target and number.
func (s *State) LUNsOf(volume string) []LUN {
	var out []LUN
	for _, iqn := range slices.Sorted(maps.Keys(s.Targets)) {
		t := s.Targets[iqn]
		for _, n := range t.Numbers() {
			if l := t.LUNs[n]; l.Volume == volume {
				out = append(out, *l)
			}
		}
	}
	return out
}

func cmpString(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
