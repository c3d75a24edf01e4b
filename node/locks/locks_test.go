package locks

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/node/link"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLocksStopWithTheLease(t *testing.T) {
	c := env.NewManual(0)
	w := &worker{clock: c, stop: func() {}}
	gate := func() string { var r link.Report; w.Report(&r); return r.Gate }
	if gate() != "shut" {
		t.Fatal("open without a lease")
	}
	w.OnState(link.State{Incarnation: 1})
	w.OnLease(link.Lease{End: env.Boot(2 * time.Second)}, false)
	if gate() != "shut" {
		t.Fatal("open before the state has reached the lease's minimum")
	}
	w.OnLease(link.Lease{End: env.Boot(2 * time.Second)}, true)
	w.OnLease(link.Lease{End: env.Boot(time.Second)}, true) // never back
	c.Step(2*time.Second - 1)
	if gate() != "serving" {
		t.Fatal("shut within the lease")
	}
	c.Step(1)
	if gate() != "shut" {
		t.Fatal("open after the lease: locks have no orphan time")
	}
	w.OnLease(link.Lease{End: env.Boot(9 * time.Second)}, true)
	w.OnState(link.State{Incarnation: 2})
	if gate() != "shut" {
		t.Fatal("the lease of another incarnation counts")
	}
}
