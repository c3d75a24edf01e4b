// Package membership is who is in the cluster, under which epoch, and whether
// we are quorate. Its sub-packages:
//
//	fsm       the one replicated state machine and its sub-machines
//	raftlog   the replicated log that feeds it, the cluster port, who votes
//	pki       the cluster's CA, certificates, join tokens
//	gossip    hints about who can be reached
//
// It decides nothing about data, locks or services, and has no data path in its
// process (facts/cluster.md §9).
//
// Cluster row: node, cli, clvm, gfs, service, dlm and fence may import it.
package membership
