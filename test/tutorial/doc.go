// Package tutorial runs docs/guide/tutorial.md: each command of the page, as it
// stands there, against a cluster of real processes, and compares what it writes.
package tutorial
