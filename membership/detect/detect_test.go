package detect

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/internal/env"
)

const ms = time.Millisecond

func at(d time.Duration) env.Boot { return env.Boot(d) }

func TestALeaseEndsAfterTTLAndMargin(t *testing.T) {
	cfg := Default(2 * time.Second)
	tb := New(cfg)
	tb.Lead(0)
	n := []Member{{"n1", 1, "b"}}
	for now := time.Duration(0); now < 10*time.Second; now += cfg.Tick {
		tb.Tick(at(now))
		if now == time.Second {
			tb.Heard("n1", 1, at(now))
		}
		lost := len(tb.Lost(n, at(now))) == 1
		if want := now >= time.Second+cfg.TTL+cfg.Margin; lost != want {
			t.Fatalf("at %v: lost %v", now, lost)
		}
	}
}

func TestANewLeaderWaitsForTheOldOnesLeases(t *testing.T) {
	cfg := Default(2 * time.Second)
	tb := New(cfg)
	tb.Lead(at(100 * time.Second))
	n := []Member{{"n1", 1, "b"}}
	tb.Lost(n, at(100*time.Second))
	if l := tb.Lost(n, at(100*time.Second+cfg.TTL)); len(l) != 0 {
		t.Fatalf("accused within the old leader's lease: %v", l)
	}
	if l := tb.Lost(n, at(100*time.Second+cfg.TTL+cfg.Margin)); len(l) != 1 {
		t.Fatal("never accused")
	}
}

func TestOurOwnStallAccusesNobody(t *testing.T) {
	cfg := Default(time.Second)
	tb := New(cfg)
	tb.Lead(0)
	tb.Tick(0)
	tb.Heard("n1", 1, 0)
	n := []Member{{"n1", 1, "b"}}
	// We were frozen for 5 s; the renewals lie in our socket.
	if tb.Tick(at(5*time.Second)) == 0 {
		t.Fatal("did not notice the stall")
	}
	if len(tb.Lost(n, at(5*time.Second))) != 0 {
		t.Fatal("accused after our own stall")
	}
	for now := 5*time.Second + cfg.Tick; now < 5*time.Second+cfg.Quiet; now += cfg.Tick {
		if tb.Tick(at(now)) != 0 {
			t.Fatal("punctual ticks counted as late")
		}
		if len(tb.Lost(n, at(now))) != 0 {
			t.Fatalf("accused at %v, within the quiet time", now)
		}
	}
	if len(tb.Lost(n, at(5*time.Second+cfg.Quiet))) != 1 {
		t.Fatal("still silent after the quiet time and not lost")
	}
}

func TestARenewalOfAnOldIncarnationDoesNotCount(t *testing.T) {
	cfg := Default(time.Second)
	tb := New(cfg)
	tb.Lead(0)
	tb.Heard("n1", 1, at(900*ms))
	if tb.Renewed(Member{"n1", 2, "b"}) {
		t.Fatal("incarnation 1 renewed for 2")
	}
	if len(tb.Lost([]Member{{"n1", 2, "b"}}, at(950*ms))) != 0 {
		t.Fatal("lost at the moment of its admission")
	}
	if len(tb.Lost([]Member{{"n1", 2, "b"}}, at(950*ms+cfg.TTL+cfg.Margin))) != 1 {
		t.Fatal("not lost, though incarnation 2 never renewed")
	}
}

// Seen in the demo: a node that was admitted long after the leader's election was
// evicted at once, since it had not renewed yet, and admitted again, for ever.
func TestWhoWasAdmittedJustNowHasTimeToRenew(t *testing.T) {
	cfg := Default(time.Second)
	tb := New(cfg)
	tb.Lead(0)
	for inc := uint64(1); inc < 4; inc++ {
		now := at(time.Duration(inc) * time.Minute)
		m := []Member{{"n1", inc, "b"}}
		if len(tb.Lost(m, now)) != 0 || len(tb.Lost(m, now.Add(cfg.TTL))) != 0 {
			t.Fatalf("incarnation %d is lost within its first lease", inc)
		}
		if len(tb.Lost(m, now.Add(cfg.TTL+cfg.Margin))) != 1 {
			t.Fatalf("incarnation %d never renewed and is not lost", inc)
		}
	}
}

// No member is lost less than TTL + Margin after a granted renewal of it, after
// the start of the leadership, and after the end of a stall of ours.
func TestNeverLostEarly(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		cfg := Default(time.Duration(rapid.IntRange(500, 3000).Draw(rt, "ttl")) * ms)
		tb := New(cfg)
		now := at(time.Hour)
		tb.Lead(now)
		floor := map[string]env.Boot{"a": now, "b": now}
		members := []Member{{"a", 1, "x"}, {"b", 1, "x"}}
		for range rapid.IntRange(1, 200).Draw(rt, "steps") {
			step := cfg.Tick
			if rapid.IntRange(0, 20).Draw(rt, "stall") == 0 {
				step = time.Duration(rapid.IntRange(300, 5000).Draw(rt, "by")) * ms
			}
			now = now.Add(step)
			if tb.Tick(now) != 0 {
				floor["a"], floor["b"] = now, now
			}
			if n := rapid.SampledFrom([]string{"", "a", "b"}).Draw(rt, "renews"); n != "" {
				tb.Heard(n, 1, now)
				floor[n] = now
			}
			for _, l := range tb.Lost(members, now) {
				if now.Sub(floor[l.Node]) < cfg.TTL+cfg.Margin {
					rt.Fatalf("%s lost %v after its renewal", l.Node, now.Sub(floor[l.Node]))
				}
			}
		}
	})
}
