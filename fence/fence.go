// Package fence is who must be stopped, and the proof that it was. An evicted
// incarnation is fenced when evidence says that nothing it still does can reach
// shared data; only then is anything recovered (SAFETY §3). What is open, which
// attempts run and the history are facts of the replicated state
// (membership/fsm/fencing); this tree holds the methods: manual now, the cut at
// the target, ClusterLabs agents and sbd with their issues.
//
// It is not the decision to evict (membership) and not the order of recovery
// (node/).
//
// Cluster row: node and cli may import it; it may import membership.
package fence

import "github.com/blockhouse-san/blockhouse/membership/fsm"

// ErrNoOpenFence is the refusal to acknowledge or run a fence that is not open
// (exit code 9): an acknowledgement given ahead of need would be used up by a
// later failure that nobody has looked at.
var ErrNoOpenFence error = fsm.ErrNoOpenFence
