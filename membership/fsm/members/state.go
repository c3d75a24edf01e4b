// Package members is sub-machine 1: who belongs to the cluster, in which
// incarnation and state, under which epoch, and by which token one may join.
// It is pure; raftlog applies it, node/ acts on it.
//
// States and the commands between them (facts/cluster.md §9, SAFETY §3):
//
//	         AddNode            Admit              Leave{Done:false}   Leave{Done:true}
//	(none) ──────────▶ joining ───────▶ member ─────────────▶ leaving ─────────▶ left
//	                      │               │ Evict                │ Evict          │ Admit
//	                      └──────────────▶├◀─────────────────────┘                │
//	                                      ▼                                       │
//	                   member ◀─Admit─ fenced ◀─Fenced (machine 2)─ evicted       │
//	                   member ◀───────────────────────────────────────────────────┘
package members

import (
	"maps"
	"slices"
	"time"
)

// Status is the state of a member.
type Status string

// The states. Only member and leaving hold leases, serve and vote in policy.
const (
	Joining Status = "joining" // added by token, not admitted yet
	Member  Status = "member"
	Leaving Status = "leaving" // drains; still a member
	Left    Status = "left"
	Evicted Status = "evicted" // fence open
	Fenced  Status = "fenced"  // may be admitted or removed
)

// Roles of a node (DESIGN). Voter is a wish: raftlog.PlanVoters decides.
type Roles struct {
	Storage bool `json:"storage,omitempty"`
	Host    bool `json:"host,omitempty"`
	Witness bool `json:"witness,omitempty"`
	Voter   bool `json:"voter,omitempty"`
}

// Addresses of a node, each host:port.
type Addresses struct {
	Raft   string   `json:"raft"`
	API    string   `json:"api,omitempty"`
	Gossip string   `json:"gossip,omitempty"`
	ISCSI  []string `json:"iscsi,omitempty"` // portals, storage nodes only
}

// Record is one member.
type Record struct {
	Name          string    `json:"name"`
	Incarnation   uint64    `json:"incarnation"` // 0 until first admitted; +1 with each Admit; never decreases, also over removal
	BootID        string    `json:"boot_id"`     // of the kernel that was admitted, or that joins
	Status        Status    `json:"status"`
	Roles         Roles     `json:"roles"`
	Addresses     Addresses `json:"addresses"`
	Portals       []string  `json:"portals,omitempty"`        // iSCSI portals beside those of its file: canonical, sorted (since section version 2)
	InitiatorName string    `json:"initiator_name,omitempty"` // unique over members
	Index         int       `json:"index"`                    // node number from 1: TPGT, DLM nodeid; never given twice
	Format        uint32    `json:"format"`                   // highest cluster format its binary knows
	Request       string    `json:"request,omitempty"`        // of the AddNode that made it
	EvictEpoch    uint64    `json:"evict_epoch,omitempty"`    // epoch of the last Evict
	Changed       uint64    `json:"changed"`                  // log index of the last change
}

// Active tells whether the node is a member for leases and views.
func (r *Record) Active() bool { return r.Status == Member || r.Status == Leaving }

// Clone is a deep copy.
func (r *Record) Clone() Record {
	c := *r
	c.Addresses.ISCSI, c.Portals = slices.Clone(r.Addresses.ISCSI), slices.Clone(r.Portals)
	return c
}

// Token allows a node to join. The secret itself is in no record.
type Token struct {
	ID      string    `json:"id"`
	SHA256  string    `json:"sha256"` // hex, of the secret
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Uses    int       `json:"uses"` // left; -1 = unlimited
	Roles   Roles     `json:"roles"`
}

// Tombstone keeps what must outlive a removed member.
type Tombstone struct {
	Incarnation uint64 `json:"incarnation"`
	Index       int    `json:"index"`
	Removed     uint64 `json:"removed"` // log index
}

// State is all of machine 1.
type State struct {
	Name      string                `json:"name"` // of the cluster; "" before Bootstrap
	UUID      string                `json:"uuid"`
	Epoch     uint64                `json:"epoch"` // +1 with each Admit, Evict and finished Leave; never decreases
	View      uint64                `json:"view"`  // +1 with each change of who is a member or of roles and addresses
	LastIndex int                   `json:"last_index"`
	Members   map[string]*Record    `json:"members"`
	Tokens    map[string]*Token     `json:"tokens"`
	Removed   map[string]*Tombstone `json:"removed"`
}

func newState() *State {
	return &State{Members: map[string]*Record{}, Tokens: map[string]*Token{}, Removed: map[string]*Tombstone{}}
}

// Clone is a deep copy.
func (s *State) Clone() *State {
	c := *s
	c.Members = make(map[string]*Record, len(s.Members))
	for k, v := range s.Members {
		r := v.Clone()
		c.Members[k] = &r
	}
	c.Tokens = make(map[string]*Token, len(s.Tokens))
	for k, v := range s.Tokens {
		t := *v
		c.Tokens[k] = &t
	}
	c.Removed = make(map[string]*Tombstone, len(s.Removed))
	for k, v := range s.Removed {
		t := *v
		c.Removed[k] = &t
	}
	return &c
}

// List is the members ordered by node index.
func (s *State) List() []Record {
	out := make([]Record, 0, len(s.Members))
	for _, r := range s.Members {
		out = append(out, r.Clone())
	}
	slices.SortFunc(out, func(a, b Record) int { return a.Index - b.Index })
	return out
}

// ListTokens is the tokens ordered by id.
func (s *State) ListTokens() []Token {
	out := make([]Token, 0, len(s.Tokens))
	for _, k := range slices.Sorted(maps.Keys(s.Tokens)) {
		out = append(out, *s.Tokens[k])
	}
	return out
}
