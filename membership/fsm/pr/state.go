// Package pr is sub-machine 4: the reservations of every volume, persistent ones
// (SPC-4 5.13) and RESERVE / RELEASE (SPC-2). What a request does to one logical
// unit is decided by target/pr; this machine adds what a replicated copy needs:
// a request takes effect once, only from the volume's primary and only in the
// volume's epoch, and what other nexuses must be told is part of the state, so
// that a worker that skipped entries can still derive it (SAFETY §2 and §4).
//
// It is pure. The storage workers enforce from a copy (node/storage).
package pr

import (
	"maps"
	"slices"

	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// Volume is the reservations of one volume.
type Volume struct {
	pr.State
	// Seq numbers the changes of State from 1, without gaps. A worker that has
	// acted up to a Seq finds in Notices what came after it.
	Seq     uint64 `json:"seq"`
	Changed uint64 `json:"changed"` // log index of the last change of State
	// LegacySeq is the Seq at which the holder of Legacy last asked for it. A
	// nexus loss names it, so that it cannot end what a new session reserved.
	LegacySeq uint64 `json:"legacy_seq,omitempty"`
	// Notices are by At, the last one of each kind for each nexus.
	Notices []Notice `json:"notices,omitempty"`
	// Horizon: notices up to this Seq may have been dropped. A worker that has
	// acted only up to a lower one does not know whom to tell and resets every
	// session of the volume.
	Horizon uint64 `json:"horizon,omitempty"`
	// Last is the last request that was decided, GOOD or not.
	Last Done `json:"last"`
}

// Notice is what the change At asks for beyond what is held from then on: a unit
// attention that a nexus must see, or the end of its tasks.
type Notice struct {
	Nexus    pr.Nexus `json:"nexus"`
	AllPorts bool     `json:"all_ports,omitempty"`
	Code     scsi.ASC `json:"code,omitempty"`
	Abort    bool     `json:"abort,omitempty"` // abort and drain its tasks; Code is 0
	At       uint64   `json:"at"`              // Seq
}

func (n *Notice) same(o *Notice) bool {
	return n.Nexus == o.Nexus && n.AllPorts == o.AllPorts && n.Code == o.Code && n.Abort == o.Abort
}

// Done is a decided request: (Worker, Seq) names it.
type Done struct {
	Worker  string  `json:"worker"` // incarnation of the worker process
	Seq     uint64  `json:"seq"`    // the worker's number of the request
	Index   uint64  `json:"index"`  // log index at which it was decided
	At      uint64  `json:"at"`     // Volume.Seq after it
	Changed bool    `json:"changed,omitempty"`
	Outcome Outcome `json:"outcome"`
}

// Outcome is how the SCSI command ends.
type Outcome struct {
	Status scsi.Status `json:"status"` // GOOD, CHECK CONDITION (with Sense), RESERVATION CONFLICT
	Sense  *Sense      `json:"sense,omitempty"`
}

// Sense is the part of scsi.Sense that reservations use; a type of its own,
// because its JSON form is frozen.
type Sense struct {
	Key     scsi.Key `json:"key"`
	Code    scsi.ASC `json:"code"`
	Pointer *Pointer `json:"pointer,omitempty"`
}

// Pointer is scsi.FieldPointer.
type Pointer struct {
	InCDB bool   `json:"in_cdb,omitempty"`
	Byte  uint16 `json:"byte"`
	Bit   int8   `json:"bit"`
}

func outcomeOf(r *pr.Result) Outcome {
	o := Outcome{Status: r.Status}
	if r.Sense != nil {
		o.Sense = &Sense{Key: r.Sense.Key, Code: r.Sense.Code}
		if p := r.Sense.Pointer; p != nil {
			o.Sense.Pointer = &Pointer{p.InCDB, p.Byte, p.Bit}
		}
	}
	return o
}

// Result is the outcome as target/pr gives it, without what others are told:
// that is in Volume.Notices.
func (o Outcome) Result() pr.Result {
	r := pr.Result{Status: o.Status}
	if o.Sense != nil {
		r.Sense = scsi.Check(o.Sense.Key, o.Sense.Code)
		if p := o.Sense.Pointer; p != nil {
			r.Sense.Pointer = &scsi.FieldPointer{InCDB: p.InCDB, Byte: p.Byte, Bit: p.Bit}
		}
	}
	return r
}

// Since lists what the changes after seq ask for. lost tells that it is not known
// any more (Horizon).
func (v *Volume) Since(seq uint64) (r pr.Result, lost bool) {
	if seq < v.Horizon {
		return r, true
	}
	for i := range v.Notices {
		switch n := &v.Notices[i]; {
		case n.At <= seq:
		case n.Abort:
			r.Abort = append(r.Abort, pr.Victim{Nexus: n.Nexus, AllPorts: n.AllPorts})
		default:
			r.Notify = append(r.Notify, pr.Attention{Nexus: n.Nexus, AllPorts: n.AllPorts, Code: n.Code})
		}
	}
	return r, false
}

// maxNotices bounds Volume.Notices: every registrant can be told of two things.
const maxNotices = 2 * pr.MaxRegistrations

// Clone is a deep copy.
func (v *Volume) Clone() *Volume {
	c := *v
	c.State = *v.State.Clone()
	c.Notices = slices.Clone(v.Notices)
	c.Last = v.Last.clone()
	return &c
}

func (d Done) clone() Done {
	if d.Outcome.Sense != nil {
		s := *d.Outcome.Sense
		if s.Pointer != nil {
			p := *s.Pointer
			s.Pointer = &p
		}
		d.Outcome.Sense = &s
	}
	return d
}

// State is all of machine 4.
type State struct {
	Volumes map[string]*Volume `json:"volumes"` // by uuid; what was never reserved has none
}

func newState() *State { return &State{Volumes: map[string]*Volume{}} }

// Clone is a deep copy.
func (s *State) Clone() *State {
	c := &State{Volumes: make(map[string]*Volume, len(s.Volumes))}
	for k, v := range s.Volumes {
		c.Volumes[k] = v.Clone()
	}
	return c
}

// IDs is the volumes that have a record, sorted.
func (s *State) IDs() []string { return slices.Sorted(maps.Keys(s.Volumes)) }
