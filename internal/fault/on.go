//go:build mutations

package fault

import (
	"os"
	"slices"
	"strings"
	"syscall"
)

// Off tells whether BLOCKHOUSE_MUTATION lists the rule.
func Off(r Rule) bool {
	return slices.Contains(strings.Split(os.Getenv("BLOCKHOUSE_MUTATION"), ","), string(r))
}

// Crash ends the process with SIGKILL if BLOCKHOUSE_CRASH names the point.
func Crash(p Point) {
	if os.Getenv("BLOCKHOUSE_CRASH") == string(p) {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // not a step further
	}
}
