package storage

import (
	"os"
	"runtime/debug"
)

// gcPercent: the live heap of a storage worker is a few MiB, and the data path
// takes its buffers from pools. With the default of 100 the collector would run
// every few MiB of garbage; the memory that this costs is a few live heaps.
const gcPercent = 400

// TuneRuntime sets the garbage collector for a process that serves storage, unless
// the administrator did (GOGC).
func TuneRuntime() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}
