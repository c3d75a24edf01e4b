package machines_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/fsm/settings"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
)

// log applies commands one after the other.
type log struct {
	t *testing.T
	c *machines.Cluster
	n uint64
}

func newLog(t *testing.T) *log { return &log{t: t, c: empty(t)} }

func (l *log) apply(c fsm.Command) fsm.Result {
	l.t.Helper()
	e, err := fsm.Encode(c)
	if err != nil {
		l.t.Fatalf("encode %T: %v", c, err)
	}
	l.n++
	r := l.c.ApplyEntry(l.n, e)
	if err := l.c.Err(); err != nil {
		l.t.Fatalf("%T stopped the machine: %v", c, err)
	}
	return r
}

func must[T any](l *log, c fsm.Command) T {
	l.t.Helper()
	v, err := fsm.As[T](l.apply(c))
	if err != nil {
		l.t.Fatalf("%T: %v", c, err)
	}
	return v
}

func (l *log) refused(c fsm.Command, kind error, exit int) {
	l.t.Helper()
	r := l.apply(c)
	if !errors.Is(r.Err, kind) || fsm.ExitCode(r.Err) != exit {
		l.t.Fatalf("%T: got %v (exit %d), want %v (exit %d)", c, r.Err, fsm.ExitCode(r.Err), kind, exit)
	}
}

func (l *log) member(name string) (r members.Record) {
	l.c.Read(func(v machines.View) { r, _ = v.Members.Get(name) })
	return r
}

func (l *log) epoch() (e uint64) {
	l.c.Read(func(v machines.View) { _, _, e, _ = v.Members.Cluster() })
	return e
}

func bootstrapped(t *testing.T) *log {
	l := newLog(t)
	must[members.Record](l, members.Bootstrap{Cluster: "c1", UUID: clusterUUID, Node: newNode("n1", 1)})
	return l
}

func (l *log) join(name string) members.Record {
	l.t.Helper()
	must[members.Token](l, members.TokenCreate{Now: epochStart, ID: "tok-" + name, SHA256: sum("s"), Expires: epochStart.Add(time.Hour), Uses: 1, Roles: members.Roles{Storage: true, Voter: true}})
	must[members.Record](l, members.AddNode{Request: "add-" + name, Now: epochStart, Token: "tok-" + name, Proof: sum("s"), Node: newNode(name, 1)})
	return must[members.Record](l, members.Admit{Now: epochStart, Node: name, From: 0, BootID: "boot-" + name})
}

// facts/cluster.md §9 states, SAFETY §3 "Admit by kernel": the whole life of a
// node, with every forbidden step on the way.
func TestLifeOfANode(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	l.refused(members.Leave{Node: "n1"}, fsm.ErrNotFound, 3) // no cluster yet
	b := members.Bootstrap{Cluster: "c1", UUID: clusterUUID, Node: newNode("n1", 1)}
	r := must[members.Record](l, b)
	if r.Incarnation != 1 || r.Index != 1 || r.Status != members.Member || l.epoch() != 1 {
		t.Fatalf("bootstrap gave %+v at epoch %d", r, l.epoch())
	}
	must[members.Record](l, b) // idempotent
	b.UUID = "00000000-0000-4000-8000-000000000000"
	l.refused(b, fsm.ErrExists, 4)

	tok := members.TokenCreate{Now: epochStart, ID: "t1", SHA256: sum("s"), Expires: epochStart.Add(time.Hour), Uses: 1, Roles: members.Roles{Storage: true, Voter: true}}
	must[members.Token](l, tok)
	l.refused(tok, fsm.ErrExists, 4)
	add := members.AddNode{Request: "q1", Now: epochStart, Token: "t1", Proof: sum("x"), Node: newNode("n2", 1)}
	l.refused(add, fsm.ErrDenied, 7) // wrong secret
	add.Proof = sum("s")
	add.Now = epochStart.Add(time.Hour)
	l.refused(add, fsm.ErrDenied, 7) // expired at that very moment
	add.Now = epochStart
	add.Node.Roles.Witness = true
	l.refused(add, fsm.ErrDenied, 7) // role that the token lacks
	add.Node.Roles.Witness = false
	add.Node.InitiatorName = newNode("n1", 1).InitiatorName
	l.refused(add, fsm.ErrExists, 4) // two nodes with one initiator name
	add.Node.InitiatorName = newNode("n2", 1).InitiatorName
	if r = must[members.Record](l, add); r.Status != members.Joining || r.Index != 2 || r.Incarnation != 0 {
		t.Fatalf("joined as %+v", r)
	}
	must[members.Record](l, add) // a repeat costs no use and is the same
	other := add
	other.Request, other.Node = "q2", newNode("n3", 1)
	l.refused(other, fsm.ErrDenied, 7) // the only use is gone
	if l.epoch() != 1 {
		t.Fatalf("joining moved the epoch to %d", l.epoch())
	}

	l.refused(members.Admit{Now: epochStart, Node: "n2", From: 1, BootID: "boot-n2"}, fsm.ErrConflict, 4)
	admit := members.Admit{Now: epochStart, Node: "n2", From: 0, BootID: "boot-n2"}
	r = must[members.Record](l, admit)
	if r.Incarnation != 1 || r.Status != members.Member || l.epoch() != 2 {
		t.Fatalf("admitted as %+v at %d", r, l.epoch())
	}
	must[members.Record](l, admit)
	if l.epoch() != 2 {
		t.Fatal("repeated admit moved the epoch")
	}

	evict := members.Evict{Now: epochStart, Node: "n2", Incarnation: 1, BootID: "boot-n2", Reason: "lease lost"}
	stale := evict
	stale.Incarnation = 0
	l.refused(stale, fsm.ErrConflict, 4)
	stale = evict
	stale.BootID = "boot-other"
	l.refused(stale, fsm.ErrConflict, 4)
	l.refused(fencing.Fenced{Now: epochStart, Node: "n2", Epoch: 3, Evidence: fencing.Evidence{Method: fencing.Manual, Operator: "o", Reason: "r"}}, fsm.ErrNoOpenFence, 9)
	ev := must[members.Eviction](l, evict)
	if ev.Epoch != 3 || ev.Already || l.member("n2").Status != members.Evicted {
		t.Fatalf("evicted: %+v", ev)
	}
	if again := must[members.Eviction](l, evict); again.Epoch != 3 || !again.Already || l.epoch() != 3 {
		t.Fatalf("evict is not idempotent: %+v at %d", again, l.epoch())
	}
	l.refused(members.Admit{Now: epochStart, Node: "n2", From: 1, BootID: "boot-new"}, fsm.ErrRefused, 9) // fence open
	l.refused(members.Remove{Node: "n2"}, fsm.ErrRefused, 9)

	l.refused(fencing.FenceStart{Request: "f", Now: epochStart, Node: "n3", Epoch: 3, Method: fencing.Agent, Executor: "n1", Deadline: epochStart.Add(time.Minute)}, fsm.ErrNoOpenFence, 9)
	start := fencing.FenceStart{Request: "f1", Now: epochStart, Node: "n2", Epoch: 3, Method: fencing.Agent, Executor: "n1", Deadline: epochStart.Add(time.Minute)}
	a := must[fencing.Attempt](l, start)
	if again := must[fencing.Attempt](l, start); again.ID != a.ID {
		t.Fatalf("repeat began attempt %d, had %d", again.ID, a.ID)
	}
	agentProof := fencing.Fenced{Now: epochStart, Node: "n2", Epoch: 3, Evidence: fencing.Evidence{Method: fencing.Agent, Attempt: a.ID}}
	l.refused(agentProof, fsm.ErrRefused, 9) // still runs
	l.refused(fencing.Fenced{Now: epochStart, Node: "n2", Epoch: 3, Evidence: fencing.Evidence{Method: fencing.Rejoin, BootID: "boot-n2"}}, fsm.ErrRefused, 9)
	manual := fencing.Fenced{Now: epochStart, Node: "n2", Epoch: 3, Evidence: fencing.Evidence{Method: fencing.Manual, Operator: "o", Reason: "pulled the plug"}}
	rec := must[fencing.Record](l, manual)
	if again := must[fencing.Record](l, manual); again.Seq != rec.Seq {
		t.Fatalf("repeated Fenced wrote record %d, had %d", again.Seq, rec.Seq)
	}
	if l.member("n2").Status != members.Fenced {
		t.Fatalf("after Fenced: %+v", l.member("n2"))
	}
	// SAFETY §3: a late agent would power-cycle the healthy incarnation.
	l.refused(members.Admit{Now: epochStart, Node: "n2", From: 1, BootID: "boot-new"}, fsm.ErrRefused, 9)
	l.refused(fencing.FenceEnd{Now: epochStart, Attempt: a.ID, Outcome: fencing.Abandoned}, fsm.ErrRefused, 9) // before its deadline
	if r := l.apply(fencing.FenceEnd{Now: epochStart.Add(time.Minute), Attempt: a.ID, Outcome: fencing.Abandoned}); r.Err != nil {
		t.Fatal(r.Err)
	}
	l.refused(members.Admit{Now: epochStart, Node: "n2", From: 1, BootID: "boot-n2"}, fsm.ErrRefused, 9) // the evicted kernel
	r = must[members.Record](l, members.Admit{Now: epochStart, Node: "n2", From: 1, BootID: "boot-new"})
	if r.Incarnation != 2 || l.epoch() != 4 {
		t.Fatalf("readmitted as %+v at %d", r, l.epoch())
	}

	// I6: a clean leave opens no fence.
	l.refused(members.Leave{Node: "n2", Incarnation: 2, Done: true}, fsm.ErrConflict, 4)
	must[members.Record](l, members.Leave{Node: "n2", Incarnation: 2})
	must[members.Record](l, members.Leave{Node: "n2", Incarnation: 2, Done: true})
	if l.epoch() != 5 || l.member("n2").Status != members.Left {
		t.Fatalf("left: %+v at %d", l.member("n2"), l.epoch())
	}
	if r := l.apply(members.Remove{Node: "n2"}); r.Err != nil {
		t.Fatal(r.Err)
	}
	// Coming back under the name: a new index, an incarnation above the old one.
	r = l.join2("n2", t)
	if r.Index != 3 || r.Incarnation != 4 {
		t.Fatalf("came back as %+v", r)
	}

	var events []fencing.Event
	l.c.Read(func(v machines.View) {
		h, _ := v.Fencing.History(0, 0)
		for _, r := range h {
			events = append(events, r.Event)
		}
	})
	want := []fencing.Event{"admitted", "evicted", "fence-start", "fenced", "fence-end", "admitted", "admitted"}
	if d := cmp.Diff(want, events); d != "" {
		t.Fatalf("history (-want +got):\n%s", d)
	}
}

func (l *log) join2(name string, t *testing.T) members.Record {
	t.Helper()
	must[members.Token](l, members.TokenCreate{Now: epochStart, ID: "again", SHA256: sum("s"), Expires: epochStart.Add(time.Hour), Uses: -1, Roles: members.Roles{Storage: true, Voter: true}})
	r := must[members.Record](l, members.AddNode{Request: "again", Now: epochStart, Token: "again", Proof: sum("s"), Node: newNode(name, 1)})
	return must[members.Record](l, members.Admit{Now: epochStart, Node: name, From: r.Incarnation, BootID: "boot-" + name})
}

// A node that is back with the kernel that was evicted must have looked at it.
func TestCleanEvidenceIsOfTheKernelThatWasEvicted(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	l.join("n2")
	e := must[members.Eviction](l, members.Evict{Now: epochStart, Node: "n2", Incarnation: 1, BootID: "boot-n2", Reason: "lost"})
	clean := fencing.Evidence{Method: fencing.Clean, BootID: "another", Output: "no gfs2 mounts"}
	l.refused(fencing.Fenced{Now: epochStart, Node: "n2", Epoch: e.Epoch, Evidence: clean}, fsm.ErrConflict, 4)
	clean.BootID, clean.Output = "boot-n2", ""
	l.refused(fencing.Fenced{Now: epochStart, Node: "n2", Epoch: e.Epoch, Evidence: clean}, fsm.ErrInvalid, 2)
	clean.Output = "no gfs2 mounts"
	must[fencing.Record](l, fencing.Fenced{Now: epochStart, Node: "n2", Epoch: e.Epoch, Evidence: clean})
}

// An eviction of a node that is back with another kernel is proved by that.
func TestRejoinAndAgentEvidence(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	l.join("n2")
	l.join("n3")
	e2 := must[members.Eviction](l, members.Evict{Now: epochStart, Node: "n2", Incarnation: 1, BootID: "boot-n2", Reason: "reboot"})
	must[fencing.Record](l, fencing.Fenced{Now: epochStart, Node: "n2", Epoch: e2.Epoch, Evidence: fencing.Evidence{Method: fencing.Rejoin, BootID: "boot-2"}})
	e3 := must[members.Eviction](l, members.Evict{Now: epochStart, Node: "n3", Incarnation: 1, BootID: "boot-n3", Reason: "silent"})
	a := must[fencing.Attempt](l, fencing.FenceStart{Request: "f", Now: epochStart, Node: "n3", Epoch: e3.Epoch, Method: fencing.Agent, Executor: "n1", Deadline: epochStart.Add(time.Minute)})
	l.apply(fencing.FenceEnd{Now: epochStart, Attempt: a.ID, Outcome: fencing.TimedOut})
	proof := fencing.Fenced{Now: epochStart, Node: "n3", Epoch: e3.Epoch, Evidence: fencing.Evidence{Method: fencing.Agent, Attempt: a.ID}}
	l.refused(proof, fsm.ErrRefused, 9) // a timeout is no success
	a = must[fencing.Attempt](l, fencing.FenceStart{Request: "g", Now: epochStart, Node: "n3", Epoch: e3.Epoch, Method: fencing.Agent, Executor: "n1", Deadline: epochStart.Add(time.Minute)})
	l.apply(fencing.FenceEnd{Now: epochStart, Attempt: a.ID, Outcome: fencing.OK})
	proof.Evidence.Attempt = a.ID
	must[fencing.Record](l, proof)
}

func TestStorage(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	const iqn = "iqn.2013-05.com.magedu:tsan.disk1"
	tg := storage.TargetCreate{Request: "t1", IQN: iqn}
	if got := must[storage.Target](l, tg); got.TID != 1 {
		t.Fatalf("tid %d", got.TID)
	}
	must[storage.Target](l, tg)
	tg.Request = "t2"
	l.refused(tg, fsm.ErrExists, 4)
	l.refused(storage.TargetCreate{Request: "t3", IQN: "iqn.2013-05.com.magedu:Other"}, fsm.ErrInvalid, 2)
	l.refused(storage.TargetCreate{Request: "t3", IQN: "iqn.2013-05.com.magedu:other", TID: 1}, fsm.ErrExists, 4)

	lc := storage.LunCreateVolume{Request: "l1", Volume: newVolume(t, "disk", 1, "n1"), Target: iqn, Number: storage.NextFree}
	m := must[storage.Mapped](l, lc)
	if m.LUN.Number != 1 || m.Volume.State != storage.Creating || m.Volume.Config.Epoch != 1 {
		t.Fatalf("made %+v", m)
	}
	if again := must[storage.Mapped](l, lc); again.LUN != m.LUN {
		t.Fatalf("repeat made %+v", again)
	}
	lc.Request = "l2"
	l.refused(lc, fsm.ErrExists, 4) // name
	lc.Volume.Name = "disk2"
	l.refused(lc, fsm.ErrExists, 4) // uuid
	lc.Volume = newVolume(t, "disk2", 2, "n7")
	l.refused(lc, fsm.ErrRefused, 9) // not a storage member
	lc.Volume = newVolume(t, "disk2", 2, "n1")
	lc.Volume.Identity.NAA = m.Volume.Identity.NAA
	l.refused(lc, fsm.ErrConflict, 4)
	lc.Volume = newVolume(t, "disk2", 2, "n1")
	lc.Number = 1
	l.refused(lc, fsm.ErrExists, 4) // number; and nothing of it was done:
	l.c.Read(func(v machines.View) {
		if got := v.Storage.State().ListVolumes(); len(got) != 1 {
			t.Errorf("volumes: %+v", got)
		}
	})
	lc.Number = 0
	if got := must[storage.Mapped](l, lc); got.LUN.Number != 0 {
		t.Fatalf("LUN 0 became %d", got.LUN.Number)
	}

	id := m.Volume.Config.UUID
	l.refused(storage.VolumeReady{UUID: id, Epoch: 2}, fsm.ErrConflict, 4)
	if v := must[storage.Volume](l, storage.VolumeReady{UUID: id, Epoch: 1}); v.State != storage.Ready {
		t.Fatalf("state %s", v.State)
	}
	next := m.Volume.Config
	next.Epoch = 2
	cas := storage.VolumeCAS{Request: "c1", Epoch: 1, Config: next}
	must[storage.Volume](l, cas)
	if v := must[storage.Volume](l, cas); v.Config.Epoch != 2 || v.LastCAS != "c1" {
		t.Fatalf("repeated CAS: %+v", v)
	}
	cas.Request = "c2"
	l.refused(cas, fsm.ErrConflict, 4)

	l.refused(members.Remove{Node: "n1"}, fsm.ErrRefused, 9)
	l.refused(storage.VolumeRemove{UUID: id}, fsm.ErrRefused, 9) // mapped
	l.refused(storage.TargetDelete{IQN: iqn}, fsm.ErrRefused, 9)
	l.refused(storage.LunDelete{Target: iqn, Number: 1, Generation: m.LUN.Generation + 100}, fsm.ErrConflict, 4)
	must[storage.LUN](l, storage.LunDelete{Target: iqn, Number: 1, Generation: m.LUN.Generation})
	l.refused(storage.LunDelete{Target: iqn, Number: 1}, fsm.ErrNotFound, 3)
	back := must[storage.LUN](l, storage.LunCreate{Request: "l3", Target: iqn, Number: storage.NextFree, Volume: id})
	if back.Number != 1 || back.Generation <= m.LUN.Generation {
		t.Fatalf("mapped again as %+v after %+v", back, m.LUN)
	}
	must[storage.LUN](l, storage.LunDelete{Target: iqn, Number: 1})
	l.refused(storage.VolumeRemoved{UUID: id, Epoch: 2}, fsm.ErrConflict, 4)
	must[storage.Volume](l, storage.VolumeRemove{UUID: id})
	l.refused(storage.LunCreate{Request: "l4", Target: iqn, Number: storage.NextFree, Volume: id}, fsm.ErrConflict, 4)
	g := must[storage.Gone](l, storage.VolumeRemoved{UUID: id, Epoch: 2})
	if g.Epoch != 2 || !slices.Equal(g.Members, []string{"n1"}) {
		t.Fatalf("gone: %+v", g)
	}
	must[storage.Gone](l, storage.VolumeRemoved{UUID: id, Epoch: 2})
	lc = storage.LunCreateVolume{Request: "l5", Volume: newVolume(t, "disk", 1, "n1"), Target: iqn, Number: storage.NextFree}
	l.refused(lc, fsm.ErrExists, 4) // a uuid never comes back
}

// Found by TestDeterministic: two commands with one request id made two volumes,
// and a third got either, by the order of a map.
func TestRequestMakesOneVolume(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	const iqn = "iqn.2026-01.org.x:a"
	must[storage.Target](l, storage.TargetCreate{Request: "t", IQN: iqn})
	v1, v2 := newVolume(t, "v1", 1, "n1"), newVolume(t, "v2", 2, "n1")
	must[storage.Volume](l, storage.VolumeCreate{Request: "r", Volume: v1})
	must[storage.Volume](l, storage.VolumeCreate{Request: "r", Volume: v1})
	l.refused(storage.VolumeCreate{Request: "r", Volume: v2}, fsm.ErrConflict, 4)
	l.refused(storage.LunCreateVolume{Request: "r", Volume: v2, Target: iqn, Number: 1}, fsm.ErrConflict, 4)
	l.refused(storage.LunCreateVolume{Request: "r", Volume: v1, Target: iqn, Number: 1}, fsm.ErrConflict, 4)
	must[storage.Mapped](l, storage.LunCreateVolume{Request: "s", Volume: v2, Target: iqn, Number: 1})
	must[storage.LUN](l, storage.LunDelete{Target: iqn, Number: 1})
	l.refused(storage.LunCreateVolume{Request: "s", Volume: v2, Target: iqn, Number: 1}, fsm.ErrConflict, 4)
}

func TestSettings(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	v1 := must[settings.Value](l, settings.Set{Key: "k", Value: "1"})
	must[settings.Value](l, settings.Set{Key: "k", Value: "1"}) // repeat
	l.refused(settings.Set{Key: "k", Value: "2"}, fsm.ErrConflict, 4)
	v2 := must[settings.Value](l, settings.Set{Key: "k", Value: "2", Version: v1.Version})
	l.refused(settings.Delete{Key: "k", Version: v1.Version}, fsm.ErrConflict, 4)
	l.apply(settings.Delete{Key: "k", Version: v2.Version})
	v3 := must[settings.Value](l, settings.Set{Key: "k", Value: "3"})
	if v3.Version <= v2.Version {
		t.Fatalf("version %d came again after %d", v3.Version, v2.Version)
	}
	l.refused(settings.Activate{Format: 2}, fsm.ErrRefused, 9)
	l.apply(members.ReportFormat{Node: "n1", Format: 3})
	if f := must[uint32](l, settings.Activate{Format: 2}); f != 2 {
		t.Fatalf("format %d", f)
	}
	must[members.Token](l, members.TokenCreate{Now: epochStart, ID: "t", SHA256: sum("s"), Expires: epochStart.Add(time.Hour), Uses: 1, Roles: members.Roles{Storage: true, Voter: true}})
	l.refused(members.AddNode{Request: "r", Now: epochStart, Token: "t", Proof: sum("s"), Node: newNode("old", 1)}, fsm.ErrRefused, 9)
	if a, low := l.c.Formats([]string{"n1", "stranger"}); a != 2 || low != 1 {
		t.Fatalf("formats %d %d", a, low)
	}
}

// A reader sees one index, and copies: changing them changes nothing.
func TestReadGivesCopies(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	must[storage.Target](l, storage.TargetCreate{Request: "t", IQN: "iqn.2026-01.org.x:a", ACL: storage.ACL{CIDRs: []string{"10.0.0.0/8"}}})
	must[storage.Mapped](l, storage.LunCreateVolume{Request: "l", Volume: newVolume(t, "v", 1, "n1"), Target: "iqn.2026-01.org.x:a", Number: 1})
	before := hash(t, l.c)
	l.c.Read(func(v machines.View) {
		if v.Index != l.n {
			t.Errorf("index %d, want %d", v.Index, l.n)
		}
		s := v.Storage.State()
		for _, x := range s.Targets {
			x.ACL.CIDRs[0] = "0.0.0.0/0"
			x.LUNs[1].ReadOnly = true
		}
		for _, x := range s.Volumes {
			x.Config.ISR[0] = "evil"
		}
		m := v.Members.State()
		m.Members["n1"].Addresses.ISCSI[0] = "evil:1"
		r, _ := v.Members.Get("n1")
		r.Addresses.ISCSI[0] = "evil:1"
	})
	if hash(t, l.c) != before {
		t.Fatal("a reader changed the state")
	}
}

// Modified tells watchers which machine to look at.
func TestModified(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	l.join("n2")
	before := l.c.Modified(fsm.Fence)
	_, _, next := l.c.Changed()
	must[members.Eviction](l, members.Evict{Now: epochStart, Node: "n2", Incarnation: 1, BootID: "boot-n2", Reason: "x"})
	select {
	case <-next:
	default:
		t.Fatal("no notification")
	}
	if l.c.Modified(fsm.Fence) != l.n || l.c.Modified(fsm.Members) != l.n || before == l.n {
		t.Fatalf("evict at %d: fence modified at %d, members at %d", l.n, l.c.Modified(fsm.Fence), l.c.Modified(fsm.Members))
	}
	if l.c.Modified(fsm.Storage) != 0 {
		t.Fatal("storage was not touched")
	}
	at := l.n
	l.refused(members.Remove{Node: "n2"}, fsm.ErrRefused, 9)
	if l.c.Modified(fsm.Members) != at || l.c.Index() != at+1 {
		t.Fatal("a refusal counts as applied, not as a change")
	}
}
