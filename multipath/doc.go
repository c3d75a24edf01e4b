// Package multipath will give one block.Device over several paths to the same
// logical unit: discovery of paths by their VPD 83 designator, checkers (test
// unit ready, read of sector 0, NOP-Out), priorities from ALUA target port
// groups, path groups and selectors, failback, no_path_retry, and the words of
// multipath.conf and multipathd. Where the kernel's dm-multipath is present it
// is driven, not replaced.
//
// Nothing is in it yet. Storage row: it may import initiator, block, scsi, iscsi,
// config and internal, and nothing of the cluster.
package multipath
