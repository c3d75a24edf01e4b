package testproc

import (
	"os"
	"strconv"
	"testing"
)

// ProveEnv asks for the counts of a proof: `make prove N=…` sets it.
const ProveEnv = "BLOCKHOUSE_PROVE"

// Count gives how often a test repeats: few in `make test`, N in `make prove`.
func Count(t testing.TB, few int) int {
	t.Helper()
	v := os.Getenv(ProveEnv)
	if v == "" {
		return few
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: a positive number is needed", ProveEnv, v)
	}
	return n
}
