package storage

import (
	"errors"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/target"
)

func TestNodeGateThroughALease(t *testing.T) {
	c := env.NewManual(0)
	g := NewNodeGate(c, 10*time.Second)
	check := func(at time.Duration, state string, write, login error) {
		t.Helper()
		c.Step(at - time.Duration(c.Now()))
		in := g.Incarnation()
		if g.State() != state {
			t.Errorf("at %v: %s, want %s", at, g.State(), state)
		}
		if err := g.Enter(in, target.OpWrite); !errors.Is(err, write) {
			t.Errorf("at %v: write %v, want %v", at, err, write)
		}
		if err := g.Enter(in, target.OpLogin); !errors.Is(err, login) {
			t.Errorf("at %v: login %v, want %v", at, err, login)
		}
	}
	check(0, "shut", target.ErrReset, target.ErrReset)
	g.Extend(env.Boot(2*time.Second), 1)
	first := g.Incarnation()
	check(time.Second, "serving", nil, nil)
	check(2*time.Second-1, "serving", nil, nil)
	check(2*time.Second, "orphaned", nil, target.ErrUnsure)
	check(12*time.Second-1, "orphaned", nil, target.ErrUnsure)
	// Renewed within the orphan time: sessions go on.
	g.Extend(env.Boot(13*time.Second), 1)
	if g.Incarnation() != first {
		t.Fatal("a renewal in time changed the incarnation")
	}
	check(12*time.Second, "serving", nil, nil)
	// Over: before Tick nothing passes, Tick tells once, and a new lease is another one.
	check(23*time.Second, "shut", target.ErrReset, target.ErrReset)
	if !g.Tick() || g.Tick() {
		t.Fatal("Tick must tell once that the gate shut")
	}
	g.Extend(env.Boot(30*time.Second), 1)
	if g.Incarnation() == first {
		t.Fatal("a new lease has the old incarnation")
	}
	if err := g.Enter(first, target.OpRead); !errors.Is(err, target.ErrReset) {
		t.Fatalf("a command of the old lease runs under the new one: %v", err)
	}
	check(24*time.Second, "serving", nil, nil)
}

func TestLeaseEndNeverMovesBack(t *testing.T) {
	c := env.NewManual(0)
	g := NewNodeGate(c, time.Second)
	g.Extend(env.Boot(10*time.Second), 1)
	g.Extend(env.Boot(5*time.Second), 1)
	if g.LeaseEnd() != env.Boot(10*time.Second) {
		t.Fatalf("lease end %v", g.LeaseEnd())
	}
	// A lease that is already over opens nothing.
	g2 := NewNodeGate(c, time.Second)
	c.Step(time.Minute)
	g2.Extend(env.Boot(10*time.Second), 1)
	if g2.State() != "shut" {
		t.Fatal("a dead lease opened the gate")
	}
}

func TestAnotherNodeIncarnationResetsSessions(t *testing.T) {
	g := NewNodeGate(env.NewManual(0), time.Second)
	g.Extend(10, 1)
	in := g.Incarnation()
	if !g.Extend(20, 2) {
		t.Fatal("no reset asked for")
	}
	if err := g.Enter(in, target.OpWrite); !errors.Is(err, target.ErrReset) {
		t.Fatalf("%v", err)
	}
	if g.Enter(g.Incarnation(), target.OpWrite) != nil {
		t.Fatal("shut under the new incarnation")
	}
}

func TestVolumeGateRoles(t *testing.T) {
	c := env.NewManual(0)
	n := NewNodeGate(c, 10*time.Second)
	g := NewVolumeGate(n)
	n.Extend(env.Boot(time.Second), 1)
	in := g.Incarnation()
	if err := g.Enter(in, target.OpRead); !errors.Is(err, target.ErrStandby) {
		t.Fatalf("no role: %v", err)
	}
	if g.SetRole(true, true, 1, nil) {
		t.Fatal("the first role resets nobody")
	}
	if err := g.Enter(in, target.OpWrite); err != nil {
		t.Fatal(err)
	}
	// The role goes while the command is inside: no status.
	if !g.SetRole(false, false, 2, nil) {
		t.Fatal("losing the role must reset sessions")
	}
	if err := g.Leave(in, target.OpWrite); !errors.Is(err, target.ErrReset) {
		t.Fatalf("status after the role was lost: %v", err)
	}
	if g.in.Load() != 0 {
		t.Fatalf("%d inside", g.in.Load())
	}
	in = g.Incarnation()
	if err := g.Enter(in, target.OpWrite); !errors.Is(err, target.ErrStandby) {
		t.Fatalf("%v", err)
	}
	if g.Enter(in, target.OpInquire) != nil {
		t.Fatal("INQUIRY is answered in standby")
	}
	// Another copy must confirm the orphan time; nobody can yet, so it stops.
	g.SetRole(true, false, 3, nil)
	in = g.Incarnation()
	if g.Enter(in, target.OpWrite) != nil {
		t.Fatal("serving primary refuses")
	}
	c.Step(2 * time.Second)
	if err := g.Enter(in, target.OpWrite); !errors.Is(err, target.ErrReset) {
		t.Fatalf("orphaned with other copies: %v", err)
	}
	if err := g.Leave(in, target.OpWrite); !errors.Is(err, target.ErrReset) {
		t.Fatalf("orphaned with other copies: %v", err)
	}
}

func BenchmarkEnterLeave(b *testing.B) {
	n := NewNodeGate(env.Real{}, time.Second)
	g := NewVolumeGate(n)
	n.Extend(env.Real{}.Now().Add(time.Hour), 1)
	g.SetRole(true, true, 1, nil)
	in := g.Incarnation()
	b.ReportAllocs()
	for b.Loop() {
		if g.Enter(in, target.OpRead) != nil || g.Leave(in, target.OpRead) != nil {
			b.Fatal("shut")
		}
	}
}

func TestNextIsWhenTheStateChanges(t *testing.T) {
	c := env.NewManual(0)
	g := NewNodeGate(c, 300*time.Millisecond)
	g.Extend(env.Boot(200*time.Millisecond), 1)
	for _, want := range []time.Duration{200 * time.Millisecond, 300 * time.Millisecond, time.Second} {
		if d := g.Next(); d != want {
			t.Fatalf("at %v: next %v, want %v", time.Duration(c.Now()), d, want)
		}
		c.Step(want)
	}
}
