// Package fault switches single safety rules off, so that the suite can prove
// that it would notice: a rule whose absence no test sees is no rule (SAFETY
// §7). In ordinary builds Off is the constant false and the compiler removes
// the branch; with the build tag `mutations` the environment variable
// BLOCKHOUSE_MUTATION lists the rules that are off.
//
// It imports nothing of ours; everyone may import it.
package fault

// Rule names a safety rule. The names are listed here and nowhere else.
type Rule string

// The rules.
const (
	// LinkNeverBackwards: a worker refuses a stamp lower than it has seen (SAFETY §2).
	LinkNeverBackwards Rule = "link-never-backwards"
	// ControlCatchesUp: control says nothing but hello before it has reached a leader's read index.
	ControlCatchesUp Rule = "control-catches-up"
	// GateShutsAtLeaseEnd: the storage gate shuts at lease end + T_orphan.
	GateShutsAtLeaseEnd Rule = "gate-shuts-at-lease-end"
	// GrantVerifiesLeader: a leader proves that it leads before it grants a lease.
	GrantVerifiesLeader Rule = "grant-verifies-leader"
	// LeaderWaitsForOldLeases: a new leader calls nobody lost before the leases of the old one are over (SAFETY §2).
	LeaderWaitsForOldLeases Rule = "leader-waits-for-old-leases"
	// AdmitWaitsForAttempts: nobody is a member again while a fence attempt may still act on it (SAFETY §3).
	AdmitWaitsForAttempts Rule = "admit-waits-for-attempts"
	// TargetsCut: a target does cut an evicted node off before it says so (SAFETY §3).
	TargetsCut Rule = "targets-cut"
	// CutDrainsFirst: a target acks a cut only when nothing of the victim is in the backend (SAFETY §3).
	CutDrainsFirst Rule = "cut-drains-first"
	// ReserveAppliedFirst: a PERSISTENT RESERVE OUT is answered when the primary enforces it (SAFETY §4).
	ReserveAppliedFirst Rule = "reserve-applied-first"
	// ReserveLeased: a PERSISTENT RESERVE OUT is answered GOOD only within the node lease (SAFETY §2).
	ReserveLeased Rule = "reserve-leased"
)

// Point names a place in the code at which a process can be made to die, for tests
// of what others then make of it.
type Point string

// The points. With the build tag `mutations`, BLOCKHOUSE_CRASH names one.
const (
	// ReserveDecided: a leader has committed a reservation request and answered nobody.
	ReserveDecided Point = "reserve-decided"
)
