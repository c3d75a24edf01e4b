package sim

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block/replica"
	"github.com/blockhouse-san/blockhouse/fence/drive"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/membership/detect"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/node/link"
	worker "github.com/blockhouse-san/blockhouse/node/storage"
	"github.com/blockhouse-san/blockhouse/target"
)

// Options of a simulated cluster.
type Options struct {
	Nodes   int
	Targets int // of them serve a volume each
	Voters  int
	Seed    uint64
	For     time.Duration
	// Pauses: machines may be held by a hypervisor. Then time proves nothing about a
	// silent target (fence.assume_no_pause is off).
	Pauses bool
	Faults []Fault // nil: made from the seed
	Loud   bool
}

// The times of the normal profile.
const (
	ttl     = 2 * time.Second
	renew   = ttl / 10
	orphan  = 10 * time.Second
	silence = ttl + orphan + time.Second
)

// cluster is everything there is.
type cluster struct {
	*world
	opt   Options
	nodes []*node
	log   [][]byte
	truth *machines.Cluster // every committed entry is applied
	lead  int               // who leads, -1 nobody
	term  int

	stuck    map[int]bool // disks
	ledSince time.Duration

	writes, landed, fences, evictions, admissions, attempts int
}

// node is a machine with its processes.
type node struct {
	c    *cluster
	i    int
	name string
	clk  *clock
	boot string
	// rebooting is the boot in which its watchdog was left to bite.
	rebooting string

	up   bool // the machine has power
	held bool // by its hypervisor, or by SIGSTOP: nothing runs
	// paused: a hypervisor held it once, so that its clock may be behind for good.
	paused bool
	hurt   time.Duration // until when something was done to it

	// Control.
	control  bool // runs
	ctl      uint64
	gen      int               // of the control process: callbacks of a dead one do nothing
	state    *machines.Cluster // its copy
	applied  int               // entries of the log in it
	caughtUp bool
	inc      uint64
	lease    env.Boot
	sent     map[uint64]env.Boot
	seq      uint64
	asking   bool
	table    *detect.Table
	drive    *drive.Leader
	reigns   int // the term in which it found out that it leads
	began    map[uint64]bool

	// The storage worker.
	work    bool
	workGen int
	guard   link.Guard
	view    *members.State // what control told it last
	stamp   link.Stamp
	gate    *worker.NodeGate
	vols    map[string]*volume
	sess    map[int]*session // by initiator node
	acking  map[string]uint64

	// The host's kernel and its initiator.
	hostGen int
}

type volume struct {
	id       string
	gate     *worker.VolumeGate
	inflight []*write
}

type session struct {
	inc  map[string]target.Incarnation
	boot string // of the initiator's kernel
}

// write is one on its way to the medium.
type write struct {
	host int
	inc  uint64 // life of the host when it was sent
	vol  string
	done bool
}

// sum is the hash of the join token's secret; any will do.
var sum = fmt.Sprintf("%x", sha256.Sum256([]byte("s")))

func identityOf(i int) storage.Identity {
	id, err := storage.NewIdentity(uuid.MustParse(volID(i)), bytes.NewReader(bytes.Repeat([]byte{byte(i), byte(i >> 8), 7}, 16)))
	if err != nil {
		panic(err)
	}
	return id
}

func volID(i int) string {
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte{byte(i), byte(i >> 8)}).String()
}

// newCluster makes a cluster in which everybody is a member and every volume is served.
func newCluster(o Options) *cluster {
	c := &cluster{world: newWorld(o.Seed), opt: o, lead: -1, stuck: map[int]bool{}}
	c.loud = o.Loud
	c.truth = mustCluster()
	for i := range o.Nodes {
		n := &node{c: c, i: i, name: fmt.Sprintf("n%d", i+1), up: true, boot: fmt.Sprintf("boot-%d-0", i+1)}
		n.clk = &clock{w: c.world, rate: 1 + (c.r.Float64()-0.5)*0.04, base: env.Boot(c.between(time.Second, time.Hour))}
		c.nodes = append(c.nodes, n)
	}
	c.must(members.Bootstrap{Cluster: "sim", UUID: "00000000-0000-4000-8000-000000000001", Node: c.newNode(0)})
	tok := members.TokenCreate{Now: c.wall(), ID: "t", SHA256: sum, Expires: c.wall().Add(time.Hour), Uses: -1, Roles: members.Roles{Storage: true, Host: true, Voter: true}}
	c.must(tok)
	for i := 1; i < o.Nodes; i++ {
		c.must(members.AddNode{Request: c.nodes[i].name, Now: c.wall(), Token: "t", Proof: sum, Node: c.newNode(i)})
		c.must(members.Admit{Now: c.wall(), Node: c.nodes[i].name, BootID: c.nodes[i].boot})
	}
	c.must(storage.TargetCreate{Request: "t", IQN: "iqn.2026-01.sim:t", ACL: storage.ACL{Open: true}})
	for i := range o.Targets {
		c.must(storage.LunCreateVolume{Request: fmt.Sprint("v", i), Target: "iqn.2026-01.sim:t", Number: storage.NextFree, Volume: storage.NewVolume{
			Name: fmt.Sprintf("v%d", i+1), Identity: identityOf(i), Config: replica.Config{UUID: volID(i), Size: 1 << 20, BlockSize: 512, Epoch: 1, Lineage: "l1", Primary: c.nodes[i].name, ISR: []string{c.nodes[i].name}}}})
		c.must(storage.VolumeReady{UUID: volID(i), Epoch: 1})
	}
	if o.Seed%2 == 1 { // power switches for everybody
		c.must(fencing.DeviceSet{Device: fencing.Device{Name: "pdu", Agent: "fence_sim", Actions: []string{"off", "on", "reboot"}, Timeout: 20 * time.Second}})
		for _, n := range c.nodes {
			c.must(fencing.WaysSet{Ways: fencing.Ways{Node: n.name, Ways: []fencing.Way{{Name: "power", Uses: []fencing.Use{{Device: "pdu", Plug: n.name}}}}}})
		}
	}
	for _, n := range c.nodes {
		n.inc = 1
		n.startControl(len(c.log))
		n.startWorker()
		n.startHost()
	}
	c.elect()
	return c
}

func (c *cluster) newNode(i int) members.NewNode {
	n := c.nodes[i]
	return members.NewNode{Name: n.name, BootID: n.boot, Roles: members.Roles{Storage: true, Host: true, Voter: true}, Format: 1,
		Addresses:     members.Addresses{Raft: fmt.Sprintf("10.0.%d.%d:7421", i/250, 1+i%250)},
		InitiatorName: "iqn.2026-01.sim:" + n.name}
}

func (c *cluster) wall() time.Time { return time0.Add(c.now) }

func mustCluster() *machines.Cluster {
	m, err := machines.New(zap.NewNop())
	if err != nil {
		panic(err)
	}
	return m
}

// commit puts a command into the log, where it is applied to the truth at once.
func (c *cluster) commit(cmd fsm.Command) fsm.Result {
	e, err := fsm.Encode(cmd)
	if err != nil {
		panic(fmt.Sprintf("%T: %v", cmd, err))
	}
	before := c.snapshot()
	c.log = append(c.log, e)
	res := c.truth.ApplyEntry(uint64(len(c.log)), e)
	c.committed(cmd, res, before)
	return res
}

// must is commit of what cannot be refused.
func (c *cluster) must(cmd fsm.Command) {
	if r := c.commit(cmd); r.Err != nil {
		panic(fmt.Sprintf("%T: %v", cmd, r.Err))
	}
}

// quorate tells whether a node runs and reaches a majority of running voters.
func (c *cluster) quorate(i int) bool {
	v := min(c.opt.Voters, len(c.nodes))
	n := 0
	for j := range v {
		if p := c.nodes[j]; p.control && p.up && !p.held && c.linked(i, j) {
			n++
		}
	}
	return n > v/2 && c.nodes[i].control && c.nodes[i].up && !c.nodes[i].held
}

// elect makes one of the voters the leader when there is none, or another one at
// will. The old one does not know.
func (c *cluster) elect() {
	if c.lead >= 0 && c.quorate(c.lead) && !c.chance(0.02) {
		c.after(c.between(100*time.Millisecond, time.Second), c.elect)
		return
	}
	var can []int
	for i := range min(c.opt.Voters, len(c.nodes)) {
		if c.quorate(i) {
			can = append(can, i)
		}
	}
	c.lead = -1
	if len(can) > 0 {
		c.lead = can[c.r.IntN(len(can))]
		c.term++
		c.ledSince = c.now
		c.say("%s leads in term %d", c.nodes[c.lead].name, c.term)
	}
	c.after(c.between(200*time.Millisecond, time.Second), c.elect)
}

// propose is what a node that believes to lead does. It fails for one that was
// deposed, and sometimes although it was committed.
func (n *node) propose(cmd fsm.Command) (fsm.Result, bool) {
	c := n.c
	if c.lead != n.i || !c.quorate(n.i) {
		return fsm.Result{}, false
	}
	res := c.commit(cmd)
	if c.chance(0.01) {
		return fsm.Result{}, false // the answer was lost
	}
	return res, true
}

// startControl runs a control process whose copy of the state is as old as entries
// says: Raft restores a snapshot and learns the rest from the leader.
func (n *node) startControl(entries int) {
	n.control, n.gen, n.ctl = true, n.gen+1, n.ctl+1
	n.state, n.applied, n.caughtUp = mustCluster(), 0, false
	n.sent, n.lease, n.asking = map[uint64]env.Boot{}, 0, false
	n.table, n.drive, n.reigns, n.began = detect.New(detect.Default(ttl)), nil, 0, nil
	n.apply(entries)
	if n.work {
		if err := n.guard.Hello(n.ctl); err != nil {
			n.c.violation("worker of %s refuses its control: %v", n.name, err)
		}
	}
	n.every(n.gen, renew, n.renewLease)
	n.every(n.gen, 50*time.Millisecond, n.lookAtLog)
	n.every(n.gen, 50*time.Millisecond, n.reign)
}

// every repeats f for as long as this control process runs; a held machine catches
// up afterwards.
func (n *node) every(gen int, d time.Duration, f func()) {
	var tick func()
	tick = func() {
		if n.gen != gen || !n.control || !n.up {
			return
		}
		if !n.held {
			f()
		}
		n.c.after(time.Duration(float64(d)*(0.95+0.1*n.c.r.Float64())), tick)
	}
	n.c.after(n.c.between(0, d), tick)
}

func (n *node) apply(to int) {
	for n.applied < to {
		n.state.ApplyEntry(uint64(n.applied+1), n.c.log[n.applied])
		n.applied++
	}
}

// lookAtLog is replication: a node that the leader reaches gets what is committed.
func (n *node) lookAtLog() {
	c := n.c
	if c.lead < 0 || !c.linked(c.lead, n.i) {
		return
	}
	if to := len(c.log); n.applied < to {
		if c.chance(0.2) {
			to = n.applied + 1 + c.r.IntN(to-n.applied)
		}
		n.apply(to)
	}
	if !n.caughtUp && n.applied == len(c.log) { // the read index of a leader
		n.caughtUp = true
		n.ownIncarnation()
	}
	if n.caughtUp || fault.Off(fault.ControlCatchesUp) {
		n.tellWorker()
		n.runAttempts()
	}
}

func (n *node) ownIncarnation() {
	n.state.Read(func(v machines.View) {
		if r, ok := v.Members.Get(n.name); ok && r.BootID == n.boot && r.Active() {
			n.inc = max(n.inc, r.Incarnation)
		}
	})
}

// renewLease asks who leads for a lease.
func (n *node) renewLease() {
	c := n.c
	to := c.lead
	if to < 0 {
		// Or one who led once and does not know better.
		to = c.r.IntN(min(c.opt.Voters, len(c.nodes)))
	} else if c.chance(0.1) {
		to = c.r.IntN(min(c.opt.Voters, len(c.nodes)))
	}
	n.seq++
	seq, at, inc, boot, gen := n.seq, n.clk.Now(), n.inc, n.boot, n.gen
	n.sent[seq] = at
	p := c.nodes[to]
	c.send(n.i, to, func() {
		if !p.control || !p.up || p.held || p.reigns == 0 {
			return
		}
		p.grant(n, gen, seq, inc, boot)
	})
}

// grant is the leader's answer to a renewal, behind a proof of leadership.
func (p *node) grant(n *node, gen int, seq, inc uint64, boot string) {
	c := p.c
	if !fault.Off(fault.GrantVerifiesLeader) && (c.lead != p.i || !c.quorate(p.i)) {
		return
	}
	var rec members.Record
	var known bool
	idx := max(p.state.Modified(fsm.Members), p.state.Modified(fsm.Fence))
	var stamp link.Stamp
	p.state.Read(func(v machines.View) {
		rec, known = v.Members.Get(n.name)
		_, _, epoch, view := v.Members.Cluster()
		stamp = link.Stamp{Index: idx, View: view, Epoch: epoch}
	})
	if !known || !rec.Active() || rec.Incarnation != inc || rec.BootID != boot {
		c.send(p.i, n.i, func() {
			if n.gen == gen && n.control && n.up && !n.held {
				n.askAdmission()
			}
		})
		return
	}
	p.table.Heard(n.name, inc, p.clk.Now())
	c.send(p.i, n.i, func() {
		if n.gen != gen || !n.control || !n.up || n.held {
			return
		}
		at, ok := n.sent[seq]
		if !ok {
			return
		}
		delete(n.sent, seq)
		if n.state.Index() < stamp.Index {
			return
		}
		end := at.Add(ttl)
		n.lease = max(n.lease, end)
		if n.caughtUp && n.work {
			n.onLease(stamp, end)
		}
	})
}

// reign is the leader's loop. Whether it leads it knows from the log's barrier.
func (n *node) reign() {
	c := n.c
	if c.lead != n.i {
		if n.reigns != 0 && c.chance(0.05) {
			n.reigns = 0 // it has heard of the new term
		}
		if n.reigns == 0 {
			return
		}
	} else if n.reigns != c.term {
		if n.applied < len(c.log) {
			return // the barrier
		}
		n.reigns = c.term
		n.table = detect.New(detect.Default(ttl))
		n.table.Lead(n.clk.Now())
		n.drive = &drive.Leader{}
	}
	n.table.Tick(n.clk.Now())
	var active []detect.Member
	n.state.Read(func(v machines.View) {
		for _, r := range v.Members.State().List() {
			if r.Active() {
				active = append(active, detect.Member{Node: r.Name, Incarnation: r.Incarnation, BootID: r.BootID})
			}
		}
	})
	for _, l := range n.table.Lost(active, n.clk.Now()) {
		if l.Node != n.name {
			n.propose(members.Evict{Now: c.wall(), Node: l.Node, Incarnation: l.Incarnation, BootID: l.BootID, Reason: l.Reason, By: n.name})
		}
	}
	var todo []drive.Decision
	n.state.Read(func(v machines.View) {
		todo = n.drive.Step(v, drive.Seen{Leader: n.name, Silence: silence, NoPause: !c.opt.Pauses, Now: n.clk.Now(), Wall: c.wall(),
			Alive: func(name string, inc uint64, boot string) bool {
				m := detect.Member{Node: name, Incarnation: inc, BootID: boot}
				return n.table.Renewed(m) && n.table.Left(m, n.clk.Now()) > 0
			}})
	})
	for _, d := range todo {
		switch {
		case d.Act.Start != nil:
			n.propose(*d.Act.Start)
		case d.Act.End != nil:
			n.propose(*d.Act.End)
		case d.Act.Close != nil:
			n.propose(*d.Act.Close)
		}
	}
}

// askAdmission is what an evicted or rebooted node does.
func (n *node) askAdmission() {
	c := n.c
	if n.asking || c.lead < 0 {
		return
	}
	n.asking = true
	gen, boot, p := n.gen, n.boot, c.nodes[c.lead]
	if n.rebooting != boot && c.chance(0.2) { // it gives up on itself
		n.rebooting = boot
		c.after(c.between(time.Second, 20*time.Second), func() {
			if n.up && n.boot == boot && n.gen == gen && n.clk.Now() >= n.lease {
				n.power(true, 0)
				c.after(c.between(time.Second, 5*time.Second), func() { n.power(false, int(c.seq)) })
			}
		})
	}
	c.after(c.between(50*time.Millisecond, 500*time.Millisecond), func() { n.asking = false })
	c.send(n.i, p.i, func() {
		if p.control && p.up && !p.held && c.lead == p.i {
			p.admit(n, gen, boot)
		}
	})
}

// admit follows the leader's order of commands; the machines refuse what must be.
func (p *node) admit(n *node, gen int, boot string) {
	var rec members.Record
	var epoch uint64
	var pending []string
	p.state.Read(func(v machines.View) {
		rec, _ = v.Members.Get(n.name)
		pending = drive.Pending(v, n.name)
		for _, o := range v.Fencing.OpenFences() {
			if o.Node == n.name {
				epoch = o.Epoch
			}
		}
	})
	switch {
	case rec.Active() && rec.BootID == boot:
	case rec.Active():
		p.propose(members.Evict{Now: p.c.wall(), Node: rec.Name, Incarnation: rec.Incarnation, BootID: rec.BootID, Reason: "its kernel was booted anew", By: p.name})
		return // the next request finds it evicted
	case rec.Status == members.Evicted && boot != rec.BootID:
		p.propose(fencing.Fenced{Now: p.c.wall(), Node: n.name, Epoch: epoch, Evidence: fencing.Evidence{Method: fencing.Rejoin, BootID: boot, Pending: pending}})
		return
	default:
		res, ok := p.propose(members.Admit{Now: p.c.wall(), Node: n.name, From: rec.Incarnation, BootID: boot})
		if !ok || res.Err != nil {
			return
		}
		p.c.admissions++
		rec.Incarnation++
	}
	inc := rec.Incarnation
	p.c.send(p.i, n.i, func() {
		if n.gen == gen && n.control && n.boot == boot {
			n.inc = max(n.inc, inc)
		}
	})
}

// power ends everything on the machine at once.
func (n *node) power(off bool, boots int) {
	if off {
		n.up, n.control, n.work = false, false, false
		n.gen++
		n.workGen++
		n.hostGen++
		n.sess = nil
		for _, v := range n.vols {
			for _, w := range v.inflight {
				w.done = true
			}
		}
		return
	}
	if n.up {
		return
	}
	n.up, n.held = true, false
	n.clk.hold(false)
	n.boot = fmt.Sprintf("boot-%d-%d", n.i+1, boots)
	n.startControl(n.c.r.IntN(n.applied + 1))
	n.startWorker()
	n.startHost()
}

// runAttempts is the executor: it runs what the log gives it.
func (n *node) runAttempts() {
	c := n.c
	first := n.began == nil
	if first {
		n.began = map[uint64]bool{}
	}
	var mine []fencing.Attempt
	n.state.Read(func(v machines.View) {
		for _, a := range v.Fencing.Running() {
			if a.Executor == n.name && !n.began[a.ID] {
				mine = append(mine, a)
			}
		}
	})
	for _, a := range mine {
		n.began[a.ID] = true
		if first {
			continue
		}
		gen := n.gen
		out := []fencing.Outcome{fencing.OK, fencing.OK, fencing.Failed, fencing.TimedOut}[c.r.IntN(4)]
		took := c.between(50*time.Millisecond, 20*time.Second)
		alive := func() bool {
			// The agent's group is killed when the lease of its executor ends.
			return n.gen == gen && n.control && n.up && n.clk.Now() < n.lease
		}
		var watch func()
		killed := false
		watch = func() {
			if n.gen == gen && n.up && !n.held && n.clk.Now() >= n.lease {
				killed = true
			}
			if n.gen == gen && !killed {
				c.after(50*time.Millisecond, watch)
			}
		}
		watch()
		c.after(took, func() {
			if killed || !alive() || n.held {
				return
			}
			c.attempts++
			if out == fencing.OK {
				c.pullThePlug(a)
			}
			n.report(gen, fencing.FenceEnd{Now: c.wall(), Attempt: a.ID, Outcome: out, Output: "said"}, a.Deadline)
		})
	}
}

// report tells the leader the end of an attempt, until it hears that it is known.
func (n *node) report(gen int, e fencing.FenceEnd, deadline time.Time) {
	c := n.c
	if n.gen != gen || !n.control || !n.up || c.wall().After(deadline) {
		return
	}
	known := true
	n.state.Read(func(v machines.View) {
		for _, a := range v.Fencing.Running() {
			known = known && a.ID != e.Attempt
		}
	})
	if known {
		return
	}
	if c.lead >= 0 && !n.held {
		p := c.nodes[c.lead]
		c.send(n.i, p.i, func() { p.propose(e) })
	}
	c.after(200*time.Millisecond, func() { n.report(gen, e, deadline) })
}

// pullThePlug is what an agent does to its victim.
func (c *cluster) pullThePlug(a fencing.Attempt) {
	i := slices.IndexFunc(c.nodes, func(n *node) bool { return n.name == a.Node })
	n := c.nodes[i]
	var r members.Record
	c.truth.Read(func(v machines.View) { r, _ = v.Members.Get(a.Node) })
	if r.Active() {
		c.violation("attempt %d of epoch %d powers %s off, which is a member in incarnation %d", a.ID, a.Epoch, a.Node, r.Incarnation)
	}
	c.say("attempt %d powers %s off", a.ID, a.Node)
	n.power(true, 0)
	c.after(c.between(time.Second, 20*time.Second), func() { n.power(false, 1000+int(c.seq)) })
}

// replay applies the log to two fresh machines, one of them through a snapshot in
// the middle: they must end as the same bytes (the machine is deterministic).
func (c *cluster) replay() {
	straight, half := mustCluster(), mustCluster()
	for i, e := range c.log {
		straight.ApplyEntry(uint64(i+1), e)
		half.ApplyEntry(uint64(i+1), e)
		if i == len(c.log)/2 {
			var b bytes.Buffer
			if err := snapshotTo(half, &b); err != nil {
				c.violation("snapshot: %v", err)
				return
			}
			half = mustCluster()
			if err := half.Restore(io.NopCloser(&b)); err != nil {
				c.violation("restore: %v", err)
				return
			}
		}
	}
	var x, y, z bytes.Buffer
	for m, b := range map[*machines.Cluster]*bytes.Buffer{straight: &x, half: &y, c.truth: &z} {
		if err := snapshotTo(m, b); err != nil {
			c.violation("snapshot: %v", err)
			return
		}
	}
	if !bytes.Equal(x.Bytes(), y.Bytes()) || !bytes.Equal(x.Bytes(), z.Bytes()) {
		c.violation("the same log gives different states")
	}
}

// sink is a raft.SnapshotSink into memory.
type sink struct{ io.Writer }

func (sink) ID() string    { return "sim" }
func (sink) Cancel() error { return nil }
func (sink) Close() error  { return nil }

func snapshotTo(m *machines.Cluster, w io.Writer) error {
	s, err := m.Snapshot()
	if err != nil {
		return err
	}
	defer s.Release()
	return s.Persist(sink{w})
}
