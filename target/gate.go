package target

import (
	"errors"
)

// Incarnation numbers the lease under which a target serves. The gate's value
// is taken when a session is admitted to full feature phase; a command read
// under one incarnation never runs under a later one (DESIGN "A SCSI WRITE").
type Incarnation uint64

// Op is what a command wants to do to a logical unit. The numbers are only ever
// appended.
type Op uint8

// The classes the gate tells apart.
const (
	OpInquire Op = iota // answers from memory: INQUIRY, REPORT LUNS, REQUEST SENSE, RTPG
	OpRead              // returns medium data; must not be stale
	OpWrite             // changes the medium or its allocation
	OpFlush             // SYNCHRONIZE CACHE and FUA barriers
	OpReserve           // PERSISTENT RESERVE OUT, RESERVE, RELEASE
	OpLogin             // a new session; refused while only the orphan time holds
	OpConfig            // MODE SELECT, FORMAT, SANITIZE
)

// Gate says whether a command may run now. It is asked on entry of every command
// (role, lease, epoch in one place), again before status is sent, and it counts
// who is inside, so that a cut can drain. The cluster implements it (node/storage);
// a stand-alone target uses Open.
//
// Enter returns nil or one of the errors below; after nil the caller calls Leave
// exactly once, with the same Op, when its backend I/O has ended and before it
// sends status: a nil error of Leave says that status may be sent. ErrReset from
// either means: no status, the session is reset (SAFETY r1). So does ErrUnsure from
// Leave, for a command that may have had an effect.
type Gate interface {
	Incarnation() Incarnation
	Enter(in Incarnation, op Op) error
	Leave(in Incarnation, op Op) error
}

// Verdicts of a gate.
var (
	ErrReset       = errors.New("lease ended: session is reset without status")
	ErrNotReady    = errors.New("logical unit not ready, in transition")         // 02/04/0A
	ErrStandby     = errors.New("target port is in standby state")               // 02/04/0B
	ErrUnavailable = errors.New("target port is in unavailable state")           // 02/04/0C
	ErrUnsure      = errors.New("no quorum: command is held until there is one") // not answered yet
)

// Open is the gate of a target that stands alone: everything may run.
type Open struct{}

// Incarnation is always 1.
func (Open) Incarnation() Incarnation { return 1 }

// Enter lets everything in.
func (Open) Enter(Incarnation, Op) error { return nil }

// Leave lets every status out.
func (Open) Leave(Incarnation, Op) error { return nil }
