// Package control is the control process of a node: membership, the leader's
// work (leases, evictions, voters), the API, and the link to the workers. It has
// no data path, so that busy disks and networks cannot starve the vote (measured:
// DESIGN "Processes on a node").
//
// Parts, each a goroutine that its owner waits for:
//
//	Daemon     owns everything; the local API answers even before the node is a member
//	member     Raft, gossip, lease stream, workers of a node that is a member
//	leader     what only a verified leader does: grants, evictions, admissions, voters
//	workers    starts or adopts the worker processes and hands them states and leases
//
// Lock order: member.mu before table.mu; neither is held over I/O.
//
// Only cmd/clusterd imports it.
package control
