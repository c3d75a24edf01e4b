package sim

import (
	"fmt"
	"time"
)

// Fault is something that goes wrong at a time, and is over after another.
type Fault struct {
	At   time.Duration
	For  time.Duration
	Kind string
	Node int
	Peer int // partition: the other side; 0 is everybody
}

func (f Fault) String() string {
	return fmt.Sprintf("%v %s n%d for %v (peer %d)", f.At, f.Kind, f.Node+1, f.For, f.Peer)
}

var kinds = []string{"control", "worker", "power", "stop", "cut", "cut", "asym", "stuck", "loss", "slow"}

// makeFaults draws a schedule from the seed.
func (c *cluster) makeFaults() (out []Fault) {
	ks := kinds
	if c.opt.Pauses {
		ks = append(append([]string{}, kinds...), "pause", "pause")
	}
	for at := c.between(2*time.Second, 6*time.Second); at < c.opt.For-20*time.Second; at += c.between(time.Second, 15*time.Second) {
		out = append(out, Fault{At: at, For: c.between(200*time.Millisecond, 15*time.Second), Kind: ks[c.r.IntN(len(ks))], Node: c.r.IntN(len(c.nodes)), Peer: c.r.IntN(len(c.nodes))})
	}
	return out
}

func (c *cluster) inject(f Fault) {
	n := c.nodes[f.Node]
	c.say("fault %v", f)
	hurt := func(n *node) { n.hurt = max(n.hurt, c.now+f.For) }
	hurt(n)
	link := func(a, b int, down bool) {
		if down {
			c.cut[[2]int{a, b}] = true
		} else {
			delete(c.cut, [2]int{a, b})
		}
	}
	switch f.Kind {
	case "control": // kill -9 of control, and a restart
		if n.control {
			n.control = false
			n.gen++
			c.after(f.For, func() {
				if n.up && !n.control {
					n.startControl(c.r.IntN(n.applied + 1))
				}
			})
		}
	case "worker":
		if n.work {
			n.work = false
			n.workGen++
			c.after(f.For/10, func() {
				if n.up && !n.work {
					n.startWorker()
				}
			})
		}
	case "power":
		if n.up {
			n.power(true, 0)
			c.after(f.For, func() { n.power(false, int(c.seq)) })
		}
	case "stop": // SIGSTOP of everything on it; clocks go on
		if n.up && !n.held {
			n.held = true
			c.after(f.For, func() { n.held = false })
		}
	case "pause": // by a hypervisor: its clock stands still too
		if n.up && !n.held {
			n.held, n.paused = true, true
			n.clk.hold(true)
			c.after(f.For, func() {
				if n.clk.held {
					n.held = false
					n.clk.hold(false)
				}
			})
		}
	case "cut":
		for j := range c.nodes {
			if j != f.Node && (f.Peer == 0 || j == f.Peer) {
				link(f.Node, j, true)
				link(j, f.Node, true)
				hurt(c.nodes[j])
				c.after(f.For, func() { link(f.Node, j, false); link(j, f.Node, false) })
			}
		}
	case "asym":
		for j := range c.nodes {
			if j != f.Node {
				link(f.Node, j, true)
				hurt(c.nodes[j])
				c.after(f.For, func() { link(f.Node, j, false) })
			}
		}
	case "stuck":
		c.stuck[f.Node] = true
		c.after(f.For, func() { delete(c.stuck, f.Node) })
	case "loss":
		c.loss = 0.3
		c.everyoneHurt(f.For)
		c.after(f.For, func() { c.loss = 0 })
	case "slow":
		c.slow = c.between(10*time.Millisecond, 3*time.Second)
		c.everyoneHurt(f.For)
		c.after(f.For, func() { c.slow = 0 })
	}
}

func (c *cluster) everyoneHurt(d time.Duration) {
	for _, n := range c.nodes {
		n.hurt = max(n.hurt, c.now+d)
	}
}

// calm is how long a node must have been untouched, and led, for its eviction to be
// a mistake: leases of before have run out and been renewed many times.
const calm = 3 * (ttl + ttl)

// lastHealthy tells whether nothing had been done to a node, nor to who leads, for
// long.
func (n *node) lastHealthy(now time.Duration) bool {
	c := n.c
	if !n.control || !n.up || n.held {
		return false
	}
	for _, x := range []*node{n, c.nodes[c.lead]} {
		if now < x.hurt+calm || now < calm {
			return false
		}
	}
	return c.chanceless()
}

// chanceless tells that no leader changed of late.
func (c *cluster) chanceless() bool { return c.now > c.ledSince+calm }

// Result of a run.
type Result struct {
	Seed                                                    uint64
	Violation                                               string
	Faults                                                  []Fault
	Trace                                                   []string
	Writes, Landed, Fences, Evictions, Admissions, Attempts int
}

// Run runs one seed.
func Run(o Options) Result {
	c := newCluster(o)
	fs := o.Faults
	if fs == nil {
		fs = c.makeFaults()
	}
	for _, f := range fs {
		c.after(f.At, func() { c.inject(f) })
	}
	c.run(o.For)
	if c.broken == "" {
		c.replay()
	}
	return Result{Seed: o.Seed, Violation: c.broken, Faults: fs, Trace: c.trace, Writes: c.writes, Landed: c.landed, Fences: c.fences,
		Evictions: c.evictions, Admissions: c.admissions, Attempts: c.attempts}
}

// Shrink leaves out faults as long as the violation stays.
func Shrink(o Options, r Result) Result {
	for changed := true; changed; {
		changed = false
		for i := range r.Faults {
			o.Faults = append(append([]Fault{}, r.Faults[:i]...), r.Faults[i+1:]...)
			if len(o.Faults) == 0 {
				o.Faults = []Fault{}
			}
			if n := Run(o); n.Violation != "" {
				r, changed = n, true
				break
			}
		}
	}
	return r
}
