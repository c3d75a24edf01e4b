// Package dlm will be the distributed lock manager: its client and the runner
// around dlm/core, the pure state machine of lock modes, conversions, queues,
// directory and master. dlm/wire will hold the messages (first the Linux kernel's
// own protocol, so that a Go node and a kernel node can share a lockspace),
// dlm/control the lockspace changes that go through Raft, dlm/kctl the in-kernel
// lock manager under our control.
//
// Locks are never in Raft: after a death the survivors rebuild them, and nothing
// is granted between quiesce and the committed Fenced record (SAFETY §3, §5).
//
// Nothing is in it yet. It may import membership, fence, the storage row and what
// is below; gfs, clvm and service import it.
package dlm
