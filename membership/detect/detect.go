// Package detect decides whose node lease has ended. It is the leader's view,
// pure: time comes in as an argument, decisions go out as values. Leases alone
// accuse; gossip, a closed connection or a dead disk are hints that may start a
// probe but evict nobody (DESIGN "What is decided by whom").
//
// Cluster row; it imports internal/env and internal/fault only.
package detect

import (
	"slices"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/fault"
)

// Config holds the times of a profile.
type Config struct {
	TTL time.Duration // of a node lease
	// Margin is waited on top of TTL before a node is called lost: its clock may
	// run slower than ours (5 % of rate, SAFETY r5) and its last request was sent
	// before we saw it.
	Margin time.Duration
	// MaxDrift: when our own loop was late by more than this, we were not
	// listening, and for Quiet nobody is accused.
	MaxDrift time.Duration
	Quiet    time.Duration
	Tick     time.Duration // how often Tick is called
}

// Default fills a Config from the lease alone.
func Default(ttl time.Duration) Config {
	return Config{TTL: ttl, Margin: ttl/20 + 100*time.Millisecond, MaxDrift: 250 * time.Millisecond,
		Quiet: 2 * time.Second, Tick: 50 * time.Millisecond}
}

// Member is one who must hold a lease.
type Member struct {
	Node        string
	Incarnation uint64
	BootID      string
}

// Lost is a member whose lease is over.
type Lost struct {
	Member
	For    time.Duration // since the last renewal, or since we lead
	Reason string
}

// Table is the leader's memory of renewals. It means something only while its
// owner leads; Lead starts it anew.
type Table struct {
	cfg   Config
	since env.Boot // when we began to lead, or last heard nothing by our own fault
	tick  env.Boot // last Tick
	quiet env.Boot // nobody is accused before
	heard map[string]seen
	// first is when we first saw an incarnation as a member: one that was admitted
	// just now has had no time to renew.
	first map[string]seen
}

type seen struct {
	inc uint64
	at  env.Boot
}

// New makes an empty table.
func New(cfg Config) *Table {
	return &Table{cfg: cfg, heard: map[string]seen{}, first: map[string]seen{}}
}

// Lead begins a leadership at now: everybody may hold a lease that the former
// leader gave up to now, so nobody's can be over before now + TTL.
func (t *Table) Lead(now env.Boot) {
	t.since, t.tick, t.quiet = now, now, now
	if fault.Off(fault.LeaderWaitsForOldLeases) {
		t.since = now.Add(-t.cfg.TTL - t.cfg.Margin)
	}
	clear(t.heard)
	clear(t.first)
}

// Tick measures our own punctuality. It returns how late we were when that was
// too much: then the renewals of that time may still lie unread in our sockets,
// and the silence is ours.
func (t *Table) Tick(now env.Boot) (late time.Duration) {
	late = now.Sub(t.tick) - t.cfg.Tick
	t.tick = now
	if late <= t.cfg.MaxDrift {
		return 0
	}
	t.since = now
	t.quiet = now.Add(t.cfg.Quiet)
	return late
}

// Heard notes a renewal that was granted.
func (t *Table) Heard(node string, incarnation uint64, now env.Boot) {
	t.heard[node] = seen{incarnation, now}
}

// last is when the lease of m was last renewed, as far as we may know.
func (t *Table) last(m Member) env.Boot {
	at := t.since
	if s, ok := t.first[m.Node]; ok && s.inc == m.Incarnation {
		at = max(at, s.at)
	}
	if s, ok := t.heard[m.Node]; ok && s.inc == m.Incarnation {
		at = max(at, s.at)
	}
	return at
}

// Left is how long the lease of m still runs; negative: over for so long.
func (t *Table) Left(m Member, now env.Boot) time.Duration {
	return t.last(m).Add(t.cfg.TTL).Sub(now)
}

// Renewed tells whether m has renewed with us at all.
func (t *Table) Renewed(m Member) bool {
	s, ok := t.heard[m.Node]
	return ok && s.inc == m.Incarnation
}

// Lost lists the members whose lease is over, sorted by name. It is empty while
// we distrust ourselves.
func (t *Table) Lost(members []Member, now env.Boot) []Lost {
	for _, m := range members {
		if s, ok := t.first[m.Node]; (!ok || s.inc != m.Incarnation) && !fault.Off(fault.LeaderWaitsForOldLeases) {
			t.first[m.Node] = seen{m.Incarnation, now}
		}
	}
	if now < t.quiet {
		return nil
	}
	var out []Lost
	for _, m := range members {
		silent := now.Sub(t.last(m))
		if silent < t.cfg.TTL+t.cfg.Margin {
			continue
		}
		why := "no lease renewal for " + silent.Round(time.Millisecond).String()
		if !t.Renewed(m) {
			why = "no lease renewal since its admission or this leader's election, " + silent.Round(time.Millisecond).String() + " ago"
		}
		out = append(out, Lost{m, silent, why})
	}
	slices.SortFunc(out, func(a, b Lost) int { return strings.Compare(a.Node, b.Node) })
	return out
}
