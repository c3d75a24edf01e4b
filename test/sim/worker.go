package sim

import (
	"errors"
	"slices"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/node/link"
	worker "github.com/blockhouse-san/blockhouse/node/storage"
	"github.com/blockhouse-san/blockhouse/target"
)

// startWorker runs a storage worker: gates and guard are the product's, the target
// behind them is a list of writes.
func (n *node) startWorker() {
	n.work = true
	n.workGen++
	gen := n.workGen
	n.guard, n.view, n.stamp = link.Guard{}, nil, link.Stamp{}
	n.gate = worker.NewNodeGate(n.clk, orphan)
	old := n.vols
	n.vols, n.sess, n.acking = map[string]*volume{}, map[int]*session{}, map[string]uint64{}
	for i := range n.c.opt.Targets {
		if n.c.nodes[i] != n {
			continue
		}
		v := &volume{id: volID(i), gate: worker.NewVolumeGate(n.gate)}
		// What a killed process had given to the kernel may still land: the new process
		// waits for it before it promises anything (SAFETY r0).
		if o := old[v.id]; o != nil {
			v.inflight = o.inflight
		}
		v.gate.SetRole(true, true, 1, nil)
		n.vols[v.id] = v
	}
	if n.control {
		if err := n.guard.Hello(n.ctl); err != nil {
			n.c.violation("a new worker of %s refuses: %v", n.name, err)
		}
	}
	var tick func()
	tick = func() {
		if n.workGen != gen || !n.up || !n.work {
			return
		}
		if !n.held {
			if n.gate.Tick() {
				n.sess = map[int]*session{}
			}
			n.cutOff()
		}
		n.c.after(20*time.Millisecond, tick)
	}
	tick()
}

// tellWorker hands the copy of the state over.
func (n *node) tellWorker() {
	if !n.work {
		return
	}
	var s *members.State
	var st link.Stamp
	n.state.Read(func(v machines.View) {
		s = v.Members.State()
		st = link.Stamp{Index: v.Index, View: s.View, Epoch: s.Epoch}
	})
	if st == n.stamp || s.UUID == "" {
		return
	}
	if n.guard.State(st) != nil {
		return
	}
	if st.Before(n.stamp) {
		n.c.violation("the worker of %s goes back from %v to %v", n.name, n.stamp, st)
	}
	n.view, n.stamp = s, st
	if r := s.Members[n.name]; r == nil || !r.Active() {
		n.gate.Shut()
		n.sess = map[int]*session{}
	}
	n.cutOff()
}

// onLease extends the gate, once the state has what the lease asks for.
func (n *node) onLease(s link.Stamp, end env.Boot) {
	if n.guard.Lease(s) != nil || !n.guard.Ready() || n.view == nil {
		return
	}
	r := n.view.Members[n.name]
	if r == nil || !r.Active() || r.Incarnation != n.inc {
		return
	}
	if n.gate.Extend(end, r.Incarnation) {
		n.sess = map[int]*session{}
	}
}

// cutOff is the target's part in fences, as node/storage does it: sessions of the
// evicted end, what is in flight is waited for, then the ack.
func (n *node) cutOff() {
	c := n.c
	if n.view == nil || len(n.vols) == 0 {
		return
	}
	suspend := false
	for _, r := range n.view.List() {
		if r.EvictEpoch == 0 || r.Name == n.name {
			continue
		}
		h := slices.IndexFunc(c.nodes, func(x *node) bool { return x.name == r.Name })
		if n.acking[r.Name] < r.EvictEpoch {
			delete(n.sess, h)
			busy := false
			for _, v := range n.vols {
				v.inflight = slices.DeleteFunc(v.inflight, func(w *write) bool { return w.done })
				busy = busy || slices.ContainsFunc(v.inflight, func(w *write) bool { return w.host == h && w.inc < r.EvictEpoch })
			}
			if busy && !fault.Off(fault.CutDrainsFirst) {
				suspend = suspend || r.Status != members.Evicted
				continue
			}
			n.acking[r.Name] = r.EvictEpoch
		}
		if n.control && c.lead >= 0 && c.chance(0.2) && n.unacked(r.Name) {
			ack := fencing.CutAck{Victim: r.Name, Epoch: r.EvictEpoch, By: n.name, Incarnation: n.inc}
			for id := range n.vols {
				ack.Volumes = append(ack.Volumes, id)
			}
			p := c.nodes[c.lead]
			c.send(n.i, p.i, func() { p.propose(ack) })
		}
	}
	for _, v := range n.vols {
		v.gate.Suspend(suspend)
	}
}

// unacked tells whether the control's copy still waits for our word.
func (n *node) unacked(victim string) (want bool) {
	n.state.Read(func(v machines.View) {
		for _, o := range v.Fencing.OpenFences() {
			for id := range n.vols {
				want = want || o.Node == victim && o.Cuts[id] == ""
			}
		}
		for _, p := range v.Fencing.PendingCuts() {
			want = want || p.Node == victim && n.vols[p.Volume] != nil
		}
	})
	return want
}

// startHost runs the kernel of a host: its initiator logs in everywhere and writes,
// whatever happens to the daemons beside it.
func (n *node) startHost() {
	n.hostGen++
	gen := n.hostGen
	var step func()
	step = func() {
		if n.hostGen != gen || !n.up {
			return
		}
		if !n.held {
			for range 2 {
				n.writeTo(n.c.r.IntN(n.c.opt.Targets))
			}
		}
		n.c.after(n.c.between(5*time.Millisecond, 40*time.Millisecond), step)
	}
	n.c.after(n.c.between(0, 50*time.Millisecond), step)
}

// writeTo sends a write, after a login if the target knows no session.
func (n *node) writeTo(i int) {
	c, t, boot := n.c, n.c.nodes[i], n.boot
	// A message on the wire is the sender's for as long as it travels.
	c.send(n.i, i, func() {
		if !t.up || !t.work || t.held || t.view == nil {
			return
		}
		v := t.vols[volID(i)]
		s := t.sess[n.i]
		if s == nil || s.boot != boot {
			r := t.view.Members[n.name]
			if r == nil || !r.Active() && r.Status != members.Joining || t.gate.State() != "serving" || v.gate.Enter(v.gate.Incarnation(), target.OpLogin) != nil {
				return
			}
			_ = v.gate.Leave(v.gate.Incarnation(), target.OpLogin)
			t.sess[n.i] = &session{boot: boot, inc: map[string]target.Incarnation{v.id: v.gate.Incarnation()}}
			return
		}
		in := s.inc[v.id]
		if err := v.gate.Enter(in, target.OpWrite); err != nil {
			if errors.Is(err, target.ErrReset) {
				delete(t.sess, n.i)
			}
			return
		}
		// The epoch that the target obeys names the life of the writer: its own number
		// is not on the wire.
		c.accepted(n, v.id, t.view.Epoch)
		w := &write{host: n.i, inc: t.view.Epoch, vol: v.id}
		v.inflight = append(v.inflight, w)
		c.writes++
		c.after(c.diskTime(t), func() { c.land(t, v, w, in) })
	})
}

// accepted looks at a write as it passes the gate: none of a node that evidence
// calls cut off, by its target's word or by its silence.
func (c *cluster) accepted(n *node, vol string, epoch uint64) {
	c.truth.Read(func(x machines.View) {
		r, _ := x.Members.Get(n.name)
		if r.EvictEpoch == 0 || epoch >= r.EvictEpoch {
			return
		}
		for _, o := range x.Fencing.OpenFences() {
			if o.Node == n.name && o.Cuts[vol] != "" {
				c.violation("a write of %s is accepted on %s, whose target acked its cut", n.name, vol)
			}
		}
		h, _ := x.Fencing.History(0, 0)
		for _, e := range h {
			if e.Event == fencing.EventFenced && e.Node == n.name && e.Epoch > epoch && slices.Contains(e.Evidence.Silent, vol) {
				c.violation("a write of %s is accepted on %s, whose target was taken for silent in the fence of epoch %d", n.name, vol, e.Epoch)
			}
		}
	})
}

// diskTime is how long the backend takes; a stuck disk is a fault.
func (c *cluster) diskTime(t *node) time.Duration {
	if c.stuck[t.i] {
		return c.between(time.Second, 30*time.Second)
	}
	if c.chance(0.01) {
		return c.between(50*time.Millisecond, 2*time.Second)
	}
	return c.between(50*time.Microsecond, 5*time.Millisecond)
}

// land is a write reaching the medium.
func (c *cluster) land(t *node, v *volume, w *write, in target.Incarnation) {
	if w.done {
		return
	}
	w.done = true
	c.landed++
	_ = v.gate.Leave(in, target.OpWrite)
	c.truth.Read(func(x machines.View) {
		r, _ := x.Members.Get(c.nodes[w.host].name)
		if r.EvictEpoch == 0 || w.inc >= r.EvictEpoch {
			return // of a life that nobody ended
		}
		for _, o := range x.Fencing.OpenFences() {
			if o.Node == r.Name {
				if o.Cuts[w.vol] != "" && o.Epoch > w.inc {
					c.violation("a write of %s from before epoch %d lands on %s, whose target acked the cut", r.Name, o.Epoch, w.vol)
				}
				return
			}
		}
		for _, p := range x.Fencing.PendingCuts() {
			if p.Node == r.Name && p.Volume == w.vol && p.Epoch > w.inc {
				return // nobody recovers on it yet
			}
		}
		c.violation("a write of %s lands on %s behind the fence of epoch %d", r.Name, w.vol, r.EvictEpoch)
	})
}

// snapshot keeps what committed compares with.
type snapshot struct {
	epoch uint64
	open  map[string]fencing.Open
}

func (c *cluster) snapshot() (s snapshot) {
	s.open = map[string]fencing.Open{}
	c.truth.Read(func(v machines.View) {
		_, _, s.epoch, _ = v.Members.Cluster()
		for _, o := range v.Fencing.OpenFences() {
			s.open[o.Node] = o
		}
	})
	return s
}

// committed looks at each entry as it is committed.
func (c *cluster) committed(cmd fsm.Command, res fsm.Result, before snapshot) {
	after := c.snapshot()
	if after.epoch < before.epoch {
		c.violation("the epoch goes from %d to %d", before.epoch, after.epoch)
	}
	if res.Err != nil {
		return
	}
	switch x := cmd.(type) {
	case members.Evict:
		if _, was := before.open[x.Node]; was || len(after.open) == len(before.open) {
			return
		}
		c.evictions++
		n := c.nodes[slices.IndexFunc(c.nodes, func(n *node) bool { return n.name == x.Node })]
		c.say("evicted %s: %s", x.Node, x.Reason)
		holds := n.control && n.up && !n.held && n.boot == x.BootID && n.inc == x.Incarnation && n.clk.Now() < n.lease
		if holds && !n.paused {
			c.violation("%s is evicted and holds a lease for %v", x.Node, n.lease.Sub(n.clk.Now()))
		}
		if n.lastHealthy(c.now) {
			c.violation("%s was healthy for long and is evicted: %s", x.Node, x.Reason)
		}
	case fencing.Fenced:
		if _, was := before.open[x.Node]; !was {
			return
		}
		c.fences++
		c.say("fenced %s by %s, pending %d", x.Node, x.Evidence.Method, len(x.Evidence.Pending))
	}
}
