package api

import (
	"time"

	"github.com/blockhouse-san/blockhouse/internal/latency"
)

// IOStats is what was done to a LUN, or by a session. All numbers but InProgress
// only rise, until the storage worker is started again.
type IOStats struct {
	Commands   uint64 `json:"commands" yaml:"commands"`       // received
	InProgress uint64 `json:"in_progress" yaml:"in_progress"` // received and not ended: the queue depth
	Reads      uint64 `json:"reads" yaml:"reads"`             // that ended with a status; likewise Writes
	Writes     uint64 `json:"writes" yaml:"writes"`
	Unmaps     uint64 `json:"unmaps" yaml:"unmaps"`
	ReadBytes  uint64 `json:"read_bytes" yaml:"read_bytes"`
	WriteBytes uint64 `json:"write_bytes" yaml:"write_bytes"`
	Aborted    uint64 `json:"aborted" yaml:"aborted"` // ended without a status
	// Errors by kind: a sense key (medium_error, …), reservation_conflict,
	// task_set_full or other. Kinds that did not occur are left out.
	Errors map[string]uint64 `json:"errors,omitempty" yaml:"errors,omitempty"`
	// Latency per class of command: read, write, other. See internal/latency for
	// the bounds of the buckets.
	Latency map[string]latency.Histogram `json:"latency,omitempty" yaml:"latency,omitempty"`
}

// Failed is the number of commands that ended with another status than GOOD.
func (i *IOStats) Failed() (n uint64) {
	for _, e := range i.Errors {
		n += e
	}
	return n
}

// LUNStats are the numbers of a LUN on one node.
type LUNStats struct {
	Node     string `json:"node" yaml:"node"`
	Target   string `json:"target" yaml:"target"`
	LUN      int    `json:"lun" yaml:"lun"`
	Volume   string `json:"volume" yaml:"volume"` // name
	UUID     string `json:"uuid" yaml:"uuid"`
	Sessions int    `json:"sessions" yaml:"sessions"` // that exist and have used it
	IOStats
}

// NodeStats are the numbers of one node's storage worker. With Error there are
// none.
type NodeStats struct {
	Node     string     `json:"node" yaml:"node"`
	Time     time.Time  `json:"time" yaml:"time"`     // when they were read
	Worker   string     `json:"worker" yaml:"worker"` // incarnation; with another one all numbers began at 0
	Error    string     `json:"error,omitempty" yaml:"error,omitempty"`
	LUNs     []LUNStats `json:"luns" yaml:"luns"`
	Sessions []Session  `json:"sessions" yaml:"sessions"`

	Logins       uint64 `json:"logins" yaml:"logins"`               // of normal sessions
	Discoveries  uint64 `json:"discoveries" yaml:"discoveries"`     // logins of discovery sessions
	Logouts      uint64 `json:"logouts" yaml:"logouts"`             // sessions that their initiator ended
	Drops        uint64 `json:"drops" yaml:"drops"`                 // sessions that ended otherwise
	Refused      uint64 `json:"refused" yaml:"refused"`             // logins that failed, AuthFailures among them
	AuthFailures uint64 `json:"auth_failures" yaml:"auth_failures"` // of CHAP
	DigestErrors uint64 `json:"digest_errors" yaml:"digest_errors"`
	Retransmits  uint64 `json:"retransmits" yaml:"retransmits"` // PDUs sent again after SNACK
	Rejects      uint64 `json:"rejects" yaml:"rejects"`         // PDUs that were rejected
	PendingBytes int64  `json:"pending_bytes" yaml:"pending_bytes"`
}

// Stats is the answer to PathStats: every storage node, in order of its name.
type Stats struct {
	APIVersion string      `json:"apiVersion" yaml:"apiVersion"`
	Nodes      []NodeStats `json:"nodes" yaml:"nodes"`
}
