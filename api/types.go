package api

import "time"

// Health is the one-word answer of status. "ok" needs no action.
type Health string

// The states, from best to worst.
const (
	HealthOK       Health = "ok"
	HealthDegraded Health = "degraded" // works, but the next fault may not be survived
	HealthFaulted  Health = "faulted"  // something is down
	HealthNoQuorum Health = "no-quorum"
	HealthUninit   Health = "uninitialised"
)

// Problem is one thing that is wrong: state, cause, and what to do.
type Problem struct {
	Severity Health `json:"severity" yaml:"severity"`
	What     string `json:"what" yaml:"what"`                           // "volume v1 is down"
	Cause    string `json:"cause" yaml:"cause"`                         // "its only copy is on n3, which is lost"
	Action   string `json:"action" yaml:"action"`                       // what to do, in words
	Command  string `json:"command,omitempty" yaml:"command,omitempty"` // the command to type
}

// Status is the whole cluster on one screen. A node without quorum answers from
// its own copy and sets Stale.
type Status struct {
	APIVersion string    `json:"apiVersion" yaml:"apiVersion"`
	Health     Health    `json:"health" yaml:"health"`
	Stale      bool      `json:"stale" yaml:"stale"` // read without a quorum, as of Index
	Problems   []Problem `json:"problems" yaml:"problems"`
	Cluster    string    `json:"cluster" yaml:"cluster"`
	UUID       string    `json:"uuid" yaml:"uuid"`
	Node       string    `json:"node" yaml:"node"` // who answers
	Version    string    `json:"version" yaml:"version"`
	Epoch      uint64    `json:"epoch" yaml:"epoch"`
	View       uint64    `json:"view" yaml:"view"`
	Index      uint64    `json:"index" yaml:"index"` // applied FSM index that this document shows
	Quorum     Quorum    `json:"quorum" yaml:"quorum"`
	Nodes      []Node    `json:"nodes" yaml:"nodes"`
	Volumes    []Volume  `json:"volumes" yaml:"volumes"`
	Fences     []Fence   `json:"fences" yaml:"fences"` // open ones
	LUNs       []LUN     `json:"luns" yaml:"luns"`
	Targets    []Target  `json:"targets" yaml:"targets"`
}

// Quorum is the state of the vote.
type Quorum struct {
	Quorate  bool     `json:"quorate" yaml:"quorate"`
	Leader   string   `json:"leader" yaml:"leader"`
	Voters   []string `json:"voters" yaml:"voters"`
	Online   []string `json:"online" yaml:"online"` // voters that hold a node lease
	Needed   int      `json:"needed" yaml:"needed"` // votes of a majority
	Term     uint64   `json:"term" yaml:"term"`
	Commit   uint64   `json:"commit" yaml:"commit"`
	Survives int      `json:"survives" yaml:"survives"` // voters that may still fail
	Profile  string   `json:"profile" yaml:"profile"`   // fast, normal, wan
}

// NodeState is the state of a member as the cluster sees it.
type NodeState string

// States of a node. Lost: evicted, its fence is not yet proven.
const (
	NodeOnline  NodeState = "online"
	NodeSuspect NodeState = "suspect"
	NodeLost    NodeState = "lost"
	NodeFenced  NodeState = "fenced"
	NodeLeaving NodeState = "leaving"
	NodeLeft    NodeState = "left"
	NodeJoining NodeState = "joining"
	NodeUnknown NodeState = "unknown" // no quorum: nobody may say
)

// Node is a member.
type Node struct {
	Name        string            `json:"name" yaml:"name"`
	State       NodeState         `json:"state" yaml:"state"`
	Index       int               `json:"index" yaml:"index"` // 1.., also the target port group tag
	Incarnation uint64            `json:"incarnation" yaml:"incarnation"`
	BootID      string            `json:"boot_id" yaml:"boot_id"`
	Roles       []string          `json:"roles" yaml:"roles"` // voter storage host witness
	Vote        string            `json:"vote" yaml:"vote"`   // leader, voter, nonvoter, none
	Raft        string            `json:"raft" yaml:"raft"`   // address
	API         string            `json:"api" yaml:"api"`
	Gossip      string            `json:"gossip" yaml:"gossip"`
	Portals     []string          `json:"portals" yaml:"portals"` // iSCSI addresses
	Initiator   string            `json:"initiator" yaml:"initiator"`
	LeaseLeft   time.Duration     `json:"lease_left_ns" yaml:"lease_left_ns"`
	Control     string            `json:"control" yaml:"control"` // "up", "down", "unknown"
	Workers     map[string]Worker `json:"workers,omitempty" yaml:"workers,omitempty"`
	Since       time.Time         `json:"since" yaml:"since"`
	Reason      string            `json:"reason,omitempty" yaml:"reason,omitempty"` // why lost or fenced
	Format      uint32            `json:"format" yaml:"format"`                     // newest cluster format it knows
}

// Worker is a worker process of a node.
type Worker struct {
	Kind        string    `json:"kind" yaml:"kind"` // storage, locks
	PID         int       `json:"pid" yaml:"pid"`
	Started     time.Time `json:"started" yaml:"started"`
	Incarnation string    `json:"incarnation" yaml:"incarnation"` // of this process
	State       string    `json:"state" yaml:"state"`             // serving, orphaned, shut, down
	Index       uint64    `json:"index" yaml:"index"`             // highest FSM index it obeys
	// Error is what keeps it from doing what the cluster wants, such as a portal that
	// another program holds.
	Error string `json:"error,omitempty" yaml:"error,omitempty"`
	// Portals of a storage worker, as it has them.
	Portals []Portal `json:"portals,omitempty" yaml:"portals,omitempty"`
}

// Portal is an address at which a node takes iSCSI logins.
type Portal struct {
	Node    string `json:"node" yaml:"node"`
	Address string `json:"address" yaml:"address"` // ADDRESS:PORT, IPv6 in brackets
	// From is "file" (listen.iscsi of the node) or "cluster" (PortalAdd).
	From string `json:"from" yaml:"from"`
	// State is open; closed, while no target is there to be served; failed; opening,
	// until the node has acted on the record; or unknown, while the node says nothing.
	State string `json:"state" yaml:"state"`
	Error string `json:"error,omitempty" yaml:"error,omitempty"` // why it failed
}

// PortalAdd gives a node one more portal.
type PortalAdd struct {
	Node    string `json:"node,omitempty"` // empty: the one that is asked
	Address string `json:"address"`        // ADDRESS[:PORT]; 3260 without PORT
}

// Volume is bytes: a size and its copies.
type Volume struct {
	Name      string   `json:"name" yaml:"name"`
	UUID      string   `json:"uuid" yaml:"uuid"`
	Size      int64    `json:"size" yaml:"size"`
	BlockSize int      `json:"block_size" yaml:"block_size"`
	State     string   `json:"state" yaml:"state"`                     // creating ready removing
	Health    Health   `json:"health" yaml:"health"`                   // ok, degraded (not redundant), faulted (down)
	Cause     string   `json:"cause,omitempty" yaml:"cause,omitempty"` // "not redundant: one copy"
	Epoch     uint64   `json:"epoch" yaml:"epoch"`
	Primary   string   `json:"primary" yaml:"primary"`
	ISR       []string `json:"isr" yaml:"isr"`
	Replicas  []string `json:"replicas" yaml:"replicas"`
	LUNs      []string `json:"luns" yaml:"luns"` // "iqn…/3"
	// Store of the only copy, if it does not lie in its node's folder: a URL
	// (docs/stores.md). It stays when the volume is deleted.
	Store string `json:"store,omitempty" yaml:"store,omitempty"`
	// Integrity: a checksum of every 4 KiB is kept, and verified on read.
	Integrity bool       `json:"integrity,omitempty" yaml:"integrity,omitempty"`
	Checksums *Checksums `json:"checksums,omitempty" yaml:"checksums,omitempty"` // what they told, while the volume is open
}

// Checksums is what the checksums of the served copy told since it was opened.
type Checksums struct {
	Mismatches uint64  `json:"mismatches" yaml:"mismatches"`               // reads of a block that did not match
	Damaged    int     `json:"damaged" yaml:"damaged"`                     // blocks of 4 KiB that do not match now
	Offsets    []int64 `json:"offsets,omitempty" yaml:"offsets,omitempty"` // of the first of them, bytes
	Adopted    uint64  `json:"adopted" yaml:"adopted"`                     // blocks in doubt after a crash that were taken as they are
	Doubt      int     `json:"doubt" yaml:"doubt"`                         // regions of 4 MiB in doubt now
	Scrub      *Scrub  `json:"scrub,omitempty" yaml:"scrub,omitempty"`     // the last one
}

// Scrub is a pass over a volume that verifies all of it.
type Scrub struct {
	State   string    `json:"state" yaml:"state"` // running done stopped failed
	Began   time.Time `json:"began" yaml:"began"`
	Ended   time.Time `json:"ended,omitzero" yaml:"ended,omitempty"`
	Done    int64     `json:"done" yaml:"done"` // bytes
	Size    int64     `json:"size" yaml:"size"`
	Damaged uint64    `json:"damaged" yaml:"damaged"` // blocks of 4 KiB
	Rate    int64     `json:"rate" yaml:"rate"`       // bytes a second at most, 0 = no limit
	Error   string    `json:"error,omitempty" yaml:"error,omitempty"`
}

// VolumeScrub starts a scrub, or with Stop ends it.
type VolumeScrub struct {
	Rate int64 `json:"rate"` // bytes a second at most, 0 = no limit
	Stop bool  `json:"stop,omitempty"`
}

// VolumeCreate asks for a volume. RequestID makes a repeated request harmless.
type VolumeCreate struct {
	Name        string `json:"name"`
	Size        int64  `json:"size"`       // bytes, rounded up to the block size
	BlockSize   int    `json:"block_size"` // 512 (default) or 4096
	Replicas    int    `json:"replicas"`   // 1 today
	Node        string `json:"node"`       // where the (first) copy lies; empty = chosen
	RequestID   string `json:"request_id"`
	IfNotExists bool   `json:"if_not_exists"`
	// Store is a URL (docs/stores.md): an existing file, device or export, whose
	// size is taken; with it an empty Node is the one that is asked.
	Store     string `json:"store,omitempty"`
	Integrity bool   `json:"integrity,omitempty"` // keep checksums
}

// Target is an iSCSI target.
type Target struct {
	IQN      string   `json:"iqn" yaml:"iqn"`
	TID      int      `json:"tid" yaml:"tid"` // tgtadm's number, cluster-wide
	Alias    string   `json:"alias,omitempty" yaml:"alias,omitempty"`
	LUNs     []LUN    `json:"luns" yaml:"luns"`
	ACL      ACL      `json:"acl" yaml:"acl"`
	Portals  []string `json:"portals" yaml:"portals"` // address,portal-group-tag
	Sessions int      `json:"sessions" yaml:"sessions"`
	// Incoming accounts may log in; with any, CHAP is required. Outgoing is the
	// target's own (mutual CHAP).
	Incoming []string          `json:"incoming,omitempty" yaml:"incoming,omitempty"`
	Outgoing string            `json:"outgoing,omitempty" yaml:"outgoing,omitempty"`
	Params   map[string]string `json:"params,omitempty" yaml:"params,omitempty"`   // what is not its default
	Offline  bool              `json:"offline,omitempty" yaml:"offline,omitempty"` // takes no login
}

// TargetSet changes a target. Params are recorded and not obeyed yet: the target
// has one set of limits for all. An empty value takes a parameter back to its
// default. The names are those of RFC 7143 section 13 and tgtadm's nop_interval,
// nop_count and MaxQueueCmd.
type TargetSet struct {
	Params  map[string]string `json:"params,omitempty"`
	Offline *bool             `json:"offline,omitempty"`
}

// TargetCreate asks for a target. An empty IQN is made from the cluster's and
// the target's name.
type TargetCreate struct {
	Name        string `json:"name"` // an IQN, or a short name
	Alias       string `json:"alias"`
	TID         int    `json:"tid"` // 0 = next free
	IfNotExists bool   `json:"if_not_exists"`
}

// LUN is a number under a target that points to a volume.
type LUN struct {
	Target     string   `json:"target" yaml:"target"`
	LUN        int      `json:"lun" yaml:"lun"`
	Volume     string   `json:"volume" yaml:"volume"` // name
	Generation uint64   `json:"generation" yaml:"generation"`
	ReadOnly   bool     `json:"read_only" yaml:"read_only"`
	Removable  bool     `json:"removable,omitempty" yaml:"removable,omitempty"`
	NoCache    bool     `json:"no_cache,omitempty" yaml:"no_cache,omitempty"` // every write is durable before its status (WCE 0)
	State      Health   `json:"state" yaml:"state"`
	WWID       string   `json:"wwid" yaml:"wwid"`                     // as in multipath: 3 + NAA in hex
	URLs       []string `json:"urls,omitempty" yaml:"urls,omitempty"` // iscsi://… of the portals that serve it
}

// Reservation is what initiators hold on a volume: persistent reservations (SPC-4
// 5.13) and RESERVE. A volume on which nobody is registered has none.
type Reservation struct {
	Volume        string         `json:"volume" yaml:"volume"` // name
	UUID          string         `json:"uuid" yaml:"uuid"`
	Type          string         `json:"type,omitempty" yaml:"type,omitempty"`               // "write exclusive" …; empty = only registrations
	Holder        string         `json:"holder,omitempty" yaml:"holder,omitempty"`           // initiator port, or "all registrants"
	ReservedBy    string         `json:"reserved_by,omitempty" yaml:"reserved_by,omitempty"` // initiator port with a RESERVE (6) or (10)
	Generation    uint32         `json:"generation" yaml:"generation"`                       // PRGENERATION
	APTPL         bool           `json:"aptpl" yaml:"aptpl"`                                 // as asked for; all of it survives a restart all the same
	Registrations []Registration `json:"registrations" yaml:"registrations"`
}

// Registration is a registered initiator port.
type Registration struct {
	Initiator  string `json:"initiator" yaml:"initiator"`     // iSCSI name
	Port       string `json:"port" yaml:"port"`               // "NAME,i,0xISID" (RFC 7143 4.2.7)
	TargetPort int    `json:"target_port" yaml:"target_port"` // relative target port identifier: the node's index
	AllPorts   bool   `json:"all_ports,omitempty" yaml:"all_ports,omitempty"`
	Key        string `json:"key" yaml:"key"` // hex; no secret: every initiator may read it
	Holder     bool   `json:"holder" yaml:"holder"`
}

// LUNCreate maps a volume; with Size it first makes the volume (one command).
type LUNCreate struct {
	Target      string `json:"target"`
	Volume      string `json:"volume"` // an existing volume, or the new one's name
	Size        int64  `json:"size"`   // > 0: create the volume too
	BlockSize   int    `json:"block_size"`
	Replicas    int    `json:"replicas"`
	Node        string `json:"node"`
	LUN         int    `json:"lun"` // -1 = next free
	ReadOnly    bool   `json:"read_only"`
	RequestID   string `json:"request_id"`
	IfNotExists bool   `json:"if_not_exists"`
	// Store is where a new volume lies (VolumeCreate.Store): create it on that, with
	// its size.
	Store     string `json:"store,omitempty"`
	Integrity bool   `json:"integrity,omitempty"` // of a new volume
}

// LUNSet changes a LUN; nil leaves as it is.
type LUNSet struct {
	ReadOnly  *bool `json:"read_only,omitempty"`
	Removable *bool `json:"removable,omitempty"`
	NoCache   *bool `json:"no_cache,omitempty"`
}

// Account is a CHAP name. Its secret is never told.
type Account struct {
	Name     string    `json:"name" yaml:"name"`
	Created  uint64    `json:"created" yaml:"created"` // log index
	Bindings []Binding `json:"bindings" yaml:"bindings"`
	Warning  string    `json:"warning,omitempty" yaml:"warning,omitempty"` // of the change that this answers
}

// Binding is where an account counts.
type Binding struct {
	Target    string `json:"target" yaml:"target"`       // iqn, or "discovery"
	Direction string `json:"direction" yaml:"direction"` // incoming, outgoing
}

// AccountCreate makes an account. A secret has 1 to 255 bytes; 12 to 16 are
// recommended (RFC 7143 9.2.1).
type AccountCreate struct {
	Name      string `json:"name"`
	Secret    string `json:"secret"`
	RequestID string `json:"request_id"`
}

// AccountBind binds an account to a target, or with Remove takes it away. Target
// "discovery" is the discovery sessions of every target.
type AccountBind struct {
	Account  string `json:"account"`
	Target   string `json:"target"`
	Outgoing bool   `json:"outgoing,omitempty"`
	Remove   bool   `json:"remove,omitempty"`
}

// ACL says who may see a target. Every kind that is set must match; with
// nothing set nobody may, unless Open.
type ACL struct {
	Open       bool     `json:"open" yaml:"open"`
	Initiators []string `json:"initiators" yaml:"initiators"` // names
	Addresses  []string `json:"addresses" yaml:"addresses"`   // CIDR
}

// ACLChange adds and removes entries of a target's ACL.
type ACLChange struct {
	Target string `json:"target"`
	Open   *bool  `json:"open,omitempty"`
	Add    ACL    `json:"add"`
	Remove ACL    `json:"remove"`
}

// Session is an initiator's session on one node.
type Session struct {
	Node       string    `json:"node" yaml:"node"`
	Target     string    `json:"target" yaml:"target"`
	Initiator  string    `json:"initiator" yaml:"initiator"`
	Address    string    `json:"address" yaml:"address"`
	ISID       string    `json:"isid" yaml:"isid"`
	TSIH       uint16    `json:"tsih" yaml:"tsih"`
	Since      time.Time `json:"since" yaml:"since"`
	Commands   uint64    `json:"commands" yaml:"commands"`
	ReadBytes  uint64    `json:"read_bytes" yaml:"read_bytes"`
	WriteBytes uint64    `json:"write_bytes" yaml:"write_bytes"`

	// What follows is there when the session's node could be asked.
	Local       string            `json:"local,omitempty" yaml:"local,omitempty"` // the portal's address
	Alias       string            `json:"alias,omitempty" yaml:"alias,omitempty"` // the initiator's
	User        string            `json:"user,omitempty" yaml:"user,omitempty"`   // CHAP name
	Discovery   bool              `json:"discovery,omitempty" yaml:"discovery,omitempty"`
	Connections int               `json:"connections,omitempty" yaml:"connections,omitempty"`
	Params      map[string]string `json:"params,omitempty" yaml:"params,omitempty"` // as negotiated, by their name in RFC 7143
	IO          *IOStats          `json:"io,omitempty" yaml:"io,omitempty"`
	// PDUs with a wrong digest, sent again after SNACK, rejected.
	DigestErrors uint64 `json:"digest_errors,omitempty" yaml:"digest_errors,omitempty"`
	Retransmits  uint64 `json:"retransmits,omitempty" yaml:"retransmits,omitempty"`
	Rejects      uint64 `json:"rejects,omitempty" yaml:"rejects,omitempty"`
}

// Init founds a cluster on this node.
type Init struct {
	Cluster string `json:"cluster"` // 1..32 of [A-Za-z0-9_-], the cluster part of a lock table
}

// Join makes this node a member. Token is what token create printed, Address is
// HOST:PORT of any member's API.
type Join struct {
	Token   string `json:"token"`
	Address string `json:"address"`
}

// TokenCreate asks for a join token.
type TokenCreate struct {
	TTL  time.Duration `json:"ttl_ns"` // default 1 h
	Uses int           `json:"uses"`   // default 1
}

// Token is a join token. Secret is only in the answer to its creation.
type Token struct {
	ID      string    `json:"id" yaml:"id"`
	Secret  string    `json:"secret,omitempty" yaml:"secret,omitempty"` // the whole text to paste: bh1-…
	Expires time.Time `json:"expires" yaml:"expires"`
	Uses    int       `json:"uses" yaml:"uses"`                     // left
	Join    string    `json:"join,omitempty" yaml:"join,omitempty"` // the command to type on the new node
}

// Fence is an open fence: a node whose death is not yet proven.
type Fence struct {
	Node        string    `json:"node" yaml:"node"`
	Incarnation uint64    `json:"incarnation" yaml:"incarnation"`
	Epoch       uint64    `json:"epoch" yaml:"epoch"`
	Since       time.Time `json:"since" yaml:"since"`
	Reason      string    `json:"reason" yaml:"reason"`   // of the eviction
	Waiting     string    `json:"waiting" yaml:"waiting"` // "an operator: clusteradm fence_manual n2"
	Attempts    int       `json:"attempts" yaml:"attempts"`
}

// FenceEvent is a row of the history, which is append-only.
type FenceEvent struct {
	Index       uint64    `json:"index" yaml:"index"` // FSM index of the record
	Time        time.Time `json:"time" yaml:"time"`
	Node        string    `json:"node" yaml:"node"`
	Incarnation uint64    `json:"incarnation" yaml:"incarnation"`
	Epoch       uint64    `json:"epoch" yaml:"epoch"`
	Event       string    `json:"event" yaml:"event"`   // evict, start, end, fenced, admit
	Method      string    `json:"method" yaml:"method"` // manual, rejoin
	Operator    string    `json:"operator,omitempty" yaml:"operator,omitempty"`
	Reason      string    `json:"reason,omitempty" yaml:"reason,omitempty"`
	Evidence    string    `json:"evidence,omitempty" yaml:"evidence,omitempty"`
}

// FenceAck is the operator's word that a node has been reset. Confirm is the
// typed word "absolutely", or the node's name from --yes-i-reset-it.
type FenceAck struct {
	Node     string `json:"node"`
	Operator string `json:"operator"`
	Reason   string `json:"reason"`
	Confirm  string `json:"confirm"`
}

// Leave takes the answering node out of the cluster.
type Leave struct {
	Force bool `json:"force"` // although volumes or votes would be lost
}

// Event is an important change, also sent over /v1/events (server-sent events).
type Event struct {
	Time  time.Time      `json:"time" yaml:"time"`
	Index uint64         `json:"index" yaml:"index"`
	Kind  string         `json:"kind" yaml:"kind"` // node.lost, volume.ready, …
	Text  string         `json:"text" yaml:"text"`
	Data  map[string]any `json:"data,omitempty" yaml:"data,omitempty"`
}

// List wraps a list in a document.
type List[T any] struct {
	APIVersion string `json:"apiVersion" yaml:"apiVersion"`
	Kind       string `json:"kind" yaml:"kind"`
	Stale      bool   `json:"stale" yaml:"stale"`
	Index      uint64 `json:"index" yaml:"index"`
	Items      []T    `json:"items" yaml:"items"`
}

// Done answers a change: at Index it is committed, and applied on the node that
// answered.
type Done struct {
	APIVersion string `json:"apiVersion" yaml:"apiVersion"`
	Index      uint64 `json:"index" yaml:"index"`
	Message    string `json:"message,omitempty" yaml:"message,omitempty"`
}

// FenceDevice is a fence device as it is shown. Secret options are never shown.
type FenceDevice struct {
	APIVersion string            `json:"apiVersion" yaml:"apiVersion"`
	Name       string            `json:"name" yaml:"name"`
	Agent      string            `json:"agent" yaml:"agent"` // fence_ipmilan
	Params     map[string]string `json:"params" yaml:"params"`
	HasSecrets bool              `json:"has_secrets" yaml:"has_secrets"`
	Actions    []string          `json:"actions" yaml:"actions"`                         // that the agent advertises
	Executors  []string          `json:"executors,omitempty" yaml:"executors,omitempty"` // the only nodes that reach it
	TimeoutNS  time.Duration     `json:"timeout_ns,omitempty" yaml:"timeout_ns,omitempty"`
	Version    uint64            `json:"version" yaml:"version"`
}

// FenceDeviceSet makes a fence device, or with Replace changes one. Params are the
// agent's options, in any spelling; those that are secrets are sealed.
type FenceDeviceSet struct {
	Name      string            `json:"name"`
	Agent     string            `json:"agent"`
	Params    map[string]string `json:"params"`
	Executors []string          `json:"executors,omitempty"`
	TimeoutNS time.Duration     `json:"timeout_ns,omitempty"`
	Replace   bool              `json:"replace,omitempty"`
}

// FenceUse is a device in a method of a node.
type FenceUse struct {
	Device  string            `json:"device" yaml:"device"`
	Plug    string            `json:"plug,omitempty" yaml:"plug,omitempty"` // how the device calls the node; empty: by its name
	Params  map[string]string `json:"params,omitempty" yaml:"params,omitempty"`
	Action  string            `json:"action,omitempty" yaml:"action,omitempty"`
	DelayNS time.Duration     `json:"delay_ns,omitempty" yaml:"delay_ns,omitempty"`
}

// FenceMethod is one way to fence a node: all its devices must succeed.
type FenceMethod struct {
	Name string     `json:"name" yaml:"name"`
	Uses []FenceUse `json:"uses" yaml:"uses"`
}

// FenceMethods are the ways to fence a node, tried in order, after the targets
// have been told to cut it off. Setting replaces all of them.
type FenceMethods struct {
	APIVersion string        `json:"apiVersion,omitempty" yaml:"apiVersion"`
	Node       string        `json:"node" yaml:"node"`
	Methods    []FenceMethod `json:"methods" yaml:"methods"`
	Off        bool          `json:"off,omitempty" yaml:"off,omitempty"` // leave it off
	Version    uint64        `json:"version,omitempty" yaml:"version,omitempty"`
}

// FenceRun fences a node that is a member. Confirm is its name again.
type FenceRun struct {
	Node    string `json:"node"`
	Reason  string `json:"reason"`
	Confirm string `json:"confirm"`
}

// FenceTest asks the devices of a node how they are.
type FenceTest struct {
	Node string `json:"node"`
}

// FenceTested is what they said.
type FenceTested struct {
	APIVersion string            `json:"apiVersion" yaml:"apiVersion"`
	Node       string            `json:"node" yaml:"node"`
	By         string            `json:"by" yaml:"by"` // the node that asked
	OK         bool              `json:"ok" yaml:"ok"`
	Results    []FenceTestResult `json:"results" yaml:"results"`
}

// FenceTestResult is one device's answer.
type FenceTestResult struct {
	Method string        `json:"method" yaml:"method"`
	Device string        `json:"device,omitempty" yaml:"device,omitempty"`
	OK     bool          `json:"ok" yaml:"ok"`
	Text   string        `json:"text" yaml:"text"`
	TookNS time.Duration `json:"took_ns,omitempty" yaml:"took_ns,omitempty"`
}
