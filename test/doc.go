// Package test is proof: its sub-packages run whole programs and real peers.
//
//	test/interop   our target and tools under other people's programs
//	test/lab       a real Linux kernel as a process (User Mode Linux) as the peer
//	test/e2e       clusters of real processes in network namespaces, with faults
//	test/sim       seeded simulations of the pure cores
//	test/bench     ratios against peers in the same run
//
// Folders appear with their first test. Tests of one package lie beside it. A
// test whose peer is missing skips with one line, "skip: NAME is not installed
// (make deps)", and fails where the environment says CI=true.
//
// Everything may be imported here; nothing imports it.
package test
