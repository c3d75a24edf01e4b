package sim

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/fault"
)

// seeds is how many runs: few in `make test`, SIM_SEEDS in `make sim`.
func seeds(t *testing.T, few int) int {
	t.Helper()
	v := os.Getenv("SIM_SEEDS")
	if v == "" {
		return few
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("SIM_SEEDS=%q: a positive number is needed", v)
	}
	return n
}

func report(t *testing.T, o Options, r Result) {
	t.Helper()
	r = Shrink(o, r)
	var fs []string
	for _, f := range r.Faults {
		fs = append(fs, f.String())
	}
	t.Errorf("seed %d: %s\nfaults that are enough:\n  %s\nhow it ended:\n%s", r.Seed, r.Violation, strings.Join(fs, "\n  "), strings.Join(r.Trace[max(0, len(r.Trace)-60):], "\n"))
}

// shape is the cluster of a seed: small ones mostly, because their trouble is the
// same, and every hundredth large.
func shape(seed uint64) Options {
	o := Options{Nodes: 3 + int(seed%4), Voters: 3, Targets: 1 + int(seed/4%3), Seed: seed, For: 3 * time.Minute, Pauses: seed%3 == 0}
	if o.Nodes > 4 {
		o.Voters = 5
	}
	if seed%100 == 99 {
		o.Nodes, o.Voters, o.Targets, o.For = 128, 5, 8, time.Minute
	}
	return o
}

// TestSim runs the cluster through random faults; no seed may break an invariant.
func TestSim(t *testing.T) {
	var sum Result
	n := seeds(t, 12)
	for s := range n {
		o := shape(uint64(s))
		r := Run(o)
		if r.Violation != "" {
			report(t, o, r)
			return
		}
		sum.Writes += r.Writes
		sum.Fences += r.Fences
		sum.Evictions += r.Evictions
		sum.Admissions += r.Admissions
		sum.Attempts += r.Attempts
	}
	if sum.Fences == 0 || sum.Admissions == 0 || sum.Writes == 0 {
		t.Fatalf("nothing happened: %+v", sum)
	}
	t.Logf("PROOF %d seeds: %d writes, %d evictions, %d fences, %d admissions; no violation", n, sum.Writes, sum.Evictions, sum.Fences, sum.Admissions)
}

// mutations are the rules that the simulation must miss, each on some seed. Control
// catching up is backed by the worker's memory, so the two are off together.
var mutations = []struct {
	off  string
	from int // the seed to begin with, where the rule is missed rarely
}{
	{string(fault.CutDrainsFirst), 0}, {string(fault.GateShutsAtLeaseEnd), 50}, {string(fault.GrantVerifiesLeader), 0}, {string(fault.LeaderWaitsForOldLeases), 0},
	{string(fault.AdmitWaitsForAttempts), 0}, {string(fault.ControlCatchesUp) + "," + string(fault.LinkNeverBackwards), 0},
}

// TestMutations switches off one rule after the other: each must be missed. The
// rules can be switched off only in a build with the tag mutations, so the test
// builds itself anew.
func TestMutations(t *testing.T) {
	t.Parallel()
	if os.Getenv("BLOCKHOUSE_MUTATION") != "" {
		t.Skip("helper of itself")
	}
	bin := filepath.Join(t.TempDir(), "sim")
	if out, err := exec.Command("go", "test", "-c", "-tags", "mutations,invariants", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	for _, m := range mutations {
		c := exec.Command(bin, "-test.run=^TestOneMutation$", "-test.v")
		c.Env = append(os.Environ(), "BLOCKHOUSE_MUTATION="+m.off, fmt.Sprint("SIM_FROM=", m.from))
		out, err := c.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "MISSED ") {
			t.Errorf("%s is off and nobody notices: %v\n%s", m.off, err, out)
			continue
		}
		_, what, _ := strings.Cut(string(out), "MISSED ")
		t.Logf("PROOF without %s: %s", m.off, strings.SplitN(what, "\n", 2)[0])
	}
}

// TestOneMutation looks for the first seed that misses the rule which is off.
func TestOneMutation(t *testing.T) {
	if os.Getenv("BLOCKHOUSE_MUTATION") == "" {
		t.Skip("helper of TestMutations")
	}
	from, err := strconv.ParseUint(os.Getenv("SIM_FROM"), 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	for s := from; s < from+200; s++ {
		if r := Run(shape(s)); r.Violation != "" {
			fmt.Printf("MISSED seed %d: %s\n", s, r.Violation)
			return
		}
	}
}
