package link

import (
	"bytes"
	"encoding/json"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/seal"
)

// Kind of a worker.
type Kind string

// The workers of a node.
const (
	Storage Kind = "storage"
	Locks   Kind = "locks"
)

// ControlHello is control's first frame.
type ControlHello struct {
	Incarnation uint64 `json:"incarnation"` // of the control process, taken under flock
	Node        string `json:"node"`
	Cluster     string `json:"cluster"` // uuid
	PID         int    `json:"pid"`
}

// WorkerHello is the worker's first frame.
type WorkerHello struct {
	Kind        Kind   `json:"kind"`
	Incarnation string `json:"incarnation"` // random, of this worker process
	PID         int    `json:"pid"`
	Start       uint64 `json:"start"` // field 22 of /proc/PID/stat: pid and start name one process
	Highest     Stamp  `json:"highest"`
	Control     uint64 `json:"control"` // incarnation of the control that it obeys
}

// Refused says why a frame was not obeyed. The connection is closed after it.
type Refused struct {
	Reason string `json:"reason"`
}

// State is the whole picture that a worker needs of the FSM.
type State struct {
	Stamp
	Node        string          `json:"node"`
	Index       int             `json:"node_index"` // 1.., the target port group tag
	Incarnation uint64          `json:"node_incarnation"`
	Cluster     string          `json:"cluster"` // name
	UUID        string          `json:"uuid"`
	Members     json.RawMessage `json:"members,omitempty"` // state of machine 1
	Storage     json.RawMessage `json:"storage,omitempty"` // state of machine 3
	// Reservations is the state of machine 4. It and the two above travel only when
	// they differ from those of the State before on the same connection: a PERSISTENT
	// RESERVE OUT must not cost the whole LUN map. Handlers get them whole.
	Reservations json.RawMessage `json:"reservations,omitempty"`
	// SealingKey opens the secrets in Storage; empty if this node has none yet.
	SealingKey seal.Key `json:"sealing_key,omitempty"`
}

// sections are the parts that are left out when they did not change.
func (s *State) sections() []*json.RawMessage {
	return []*json.RawMessage{&s.Members, &s.Storage, &s.Reservations}
}

// without leaves out what old has alike.
func (s State) without(old *State) State {
	have := old.sections()
	for i, p := range s.sections() {
		if bytes.Equal(*p, *have[i]) {
			*p = nil
		}
	}
	return s
}

// with fills in what was left out.
func (s *State) with(old *State) {
	have := old.sections()
	for i, p := range s.sections() {
		if len(*p) == 0 {
			*p = *have[i]
		}
	}
}

// Kill asks the storage worker to end sessions; initiators may log in again.
type Kill struct {
	TSIH uint16 `json:"tsih"`
}

// Scrub asks the storage worker to verify its copy of a volume, or to stop that.
type Scrub struct {
	UUID string `json:"uuid"`
	Rate int64  `json:"rate"` // bytes a second, 0 = no limit
	Stop bool   `json:"stop,omitempty"`
}

// Lease says until when this node is a member, on CLOCK_BOOTTIME of this kernel.
// Its stamp is the leader's; its Index is the minimum that the state must have
// reached before a gate opens.
type Lease struct {
	Stamp
	End env.Boot `json:"end"`
}

// Report is what a worker does. It is sent when it changes and once a second.
type Report struct {
	WorkerHello
	Gate      string          `json:"gate"`       // serving, waiting, orphaned, shut
	LeaseEnd  env.Boot        `json:"lease_end"`  // 0: never had one
	Refusals  uint64          `json:"refusals"`   // frames that were older than what was obeyed
	GateOpens uint64          `json:"gate_opens"` // incarnation of the gate
	Detail    json.RawMessage `json:"detail,omitempty"`
}

// Request asks control for a change of the FSM. It is repeated until answered, so
// it is idempotent by (worker incarnation, Seq).
type Request struct {
	Worker string          `json:"worker"`
	Seq    uint64          `json:"seq"`
	Kind   string          `json:"kind"` // volume.ready, volume.removed, pr.change …
	Body   json.RawMessage `json:"body"`
}

// Reply answers a request.
type Reply struct {
	Seq   uint64 `json:"seq"`
	Error string `json:"error,omitempty"`
	// Code of the error, as of package api ("conflict"), for callers that branch.
	Code  string `json:"code,omitempty"`
	Index uint64 `json:"index"`
}

// EventsAfter asks (TEvents) for the events behind number After of a worker
// process; with another process's name, for all that are still remembered.
type EventsAfter struct {
	Worker string `json:"worker"`
	After  uint64 `json:"after"`
}

// Events is the answer: the events in order, the last one with number Last.
type Events struct {
	Worker string      `json:"worker"`
	Last   uint64      `json:"last"`
	Events []api.Event `json:"events"`
}
