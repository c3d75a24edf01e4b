// Package clvm will be volume groups under cluster locks: it reads and writes
// LVM2's metadata text, holds the lock of a volume group while it changes it, and
// answers lvm2's lvmlockd protocol, so that the lvm2 commands of a distribution
// work on shared disks without clvmd. Metadata never travels through Raft.
//
// Nothing is in it yet. It may import dlm, membership, fence, the storage row and
// what is below.
package clvm
