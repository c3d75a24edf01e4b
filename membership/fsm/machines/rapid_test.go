package machines_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block/replica"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/fsm/pr"
	"github.com/blockhouse-san/blockhouse/membership/fsm/settings"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/scsi"
	targetpr "github.com/blockhouse-san/blockhouse/target/pr"
)

const clusterUUID = "3f0e9c3a-7a51-4c1e-9a53-0c5d9b8e2f10"

var epochStart = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

func sum(s string) string { return strings.Repeat(hex.EncodeToString([]byte(s))[:2], 32) }

func newNode(name string, f uint32) members.NewNode {
	return members.NewNode{
		Name: name, BootID: "boot-" + name, Format: f,
		Roles:         members.Roles{Storage: true, Voter: true},
		Addresses:     members.Addresses{Raft: "127.0.0.1:7001", ISCSI: []string{"127.0.0.1:3260"}},
		InitiatorName: "iqn.2026-01.org.blockhouse:" + name,
	}
}

func config(id uuid.UUID, nodes ...string) replica.Config {
	return replica.Config{UUID: id.String(), Size: 1 << 20, BlockSize: 512, Epoch: 1, Primary: nodes[0], ISR: nodes, Lineage: "l1"}
}

func newVolume(t interface{ Fatal(...any) }, name string, seed byte, nodes ...string) storage.NewVolume {
	id := uuid.NewSHA1(uuid.NameSpaceOID, []byte{seed})
	ident, err := storage.NewIdentity(id, bytes.NewReader(bytes.Repeat([]byte{seed}, 32)))
	if err != nil {
		t.Fatal(err)
	}
	return storage.NewVolume{Name: name, Config: config(id, nodes...), Identity: ident}
}

// genCommand draws commands from small sets, so that many of them hit: names,
// incarnations, epochs and requests that exist, stale ones and repeats.
func genCommand(t *rapid.T, i int, c *machines.Cluster) fsm.Command {
	// rapid draws small numbers far more often than large ones; one seed a
	// command, spread over its fields, reaches every kind and still shrinks.
	r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "command"), uint64(i)))
	now := epochStart.Add(time.Duration(i) * time.Minute)
	node := fmt.Sprintf("n%d", 1+r.IntN(3))
	inc := r.Uint64N(4)
	boot := []string{"boot-" + node, "boot-" + node, "boot-x"}[r.IntN(3)]
	seed := byte(1 + r.IntN(4))
	req := fmt.Sprintf("r%d", 1+r.IntN(12))
	tok := fmt.Sprintf("t%d", 1+r.IntN(3))
	iqn := "iqn.2026-01.org.x:" + string("ab"[r.IntN(2)])
	vol := newVolume(t, fmt.Sprintf("v%d", seed), seed, "n1")
	acl := storage.ACL{Initiators: []string{"iqn.2026-01.org.x:i" + node}, CIDRs: []string{"10.0.0.0/8"}}
	epoch, version, attempt, volEpoch := uint64(seed)+inc, inc, inc, inc
	if r.IntN(4) > 0 { // what the state has now
		c.Read(func(v machines.View) {
			if m, ok := v.Members.Get(node); ok {
				inc, epoch = m.Incarnation, m.EvictEpoch
				boot = m.BootID
				if m.Status == members.Fenced {
					boot += "x"
				}
			}
			x, _ := v.Settings.Get(node)
			version = x.Version
			for _, a := range v.Fencing.Running() {
				attempt = a.ID
			}
			if x, ok := v.Storage.Volume(vol.Config.UUID); ok {
				volEpoch = x.Config.Epoch
			}
		})
	}
	switch r.IntN(59) {
	case 56, 57:
		return members.PortalAdd{Node: node, Address: fmt.Sprintf("127.0.0.%d:3260", 1+r.IntN(3))}
	case 58:
		return members.PortalRemove{Node: node, Address: fmt.Sprintf("127.0.0.%d:3260", 1+r.IntN(3))}
	case 50, 51, 52, 53, 54:
		q := targetpr.Request{Kind: targetpr.KindOut, SA: []int{scsi.SARegisterAndIgnoreKey, scsi.SAReserve, scsi.SAPreemptAndAbort}[r.IntN(3)], Type: scsi.PRWriteExclusiveRegOnly,
			Nexus: targetpr.Nexus{ID: scsi.TransportID{Name: newNode(node, 1).InitiatorName}, Port: 1}, Param: &scsi.PROut{Key: 1, NewKey: 1}}
		if r.IntN(4) == 0 {
			q = targetpr.Request{Kind: targetpr.KindReserve, Nexus: q.Nexus}
		}
		return pr.Change{Node: "n1", Worker: tok, Seq: uint64(i), Volume: vol.Config.UUID, Epoch: max(1, volEpoch), Request: q}
	case 55:
		return pr.Barrier{Node: "n1", Worker: tok, Seq: uint64(i), Volume: vol.Config.UUID, Epoch: max(1, volEpoch)}
	case 46:
		return fencing.DeviceSet{Device: fencing.Device{Name: tok, Agent: "fence_dummy", Actions: []string{"off"}, Params: map[string]string{"a": req}}, Version: version}
	case 47:
		return fencing.DeviceDelete{Name: tok}
	case 48:
		w := fencing.Ways{Node: node}
		if seed > 1 {
			w.Ways = []fencing.Way{{Name: "power", Uses: []fencing.Use{{Device: tok}}}}
		}
		return fencing.WaysSet{Ways: w, Version: version}
	case 49:
		return fencing.CutAck{Victim: node, Epoch: epoch, By: "n9", Volumes: []string{tok}}
	case 0, 1:
		return members.Bootstrap{Cluster: "c1", UUID: clusterUUID, Node: newNode("n1", 1)}
	case 2, 3:
		return members.TokenCreate{Now: now, ID: tok, SHA256: sum("s"), Expires: now.Add(time.Hour), Uses: int(seed), Roles: members.Roles{Storage: true, Voter: true}}
	case 4:
		return members.TokenRevoke{ID: tok}
	case 5, 6, 7:
		return members.AddNode{Request: req, Now: now, Token: tok, Proof: sum("s"), Node: newNode(node, uint32(seed))}
	case 8, 9, 10:
		return members.Admit{Now: now, Node: node, From: inc, BootID: boot, Clean: []string{"", "nothing left"}[r.IntN(2)]}
	case 11, 12:
		return members.Evict{Now: now, Node: node, Incarnation: inc, BootID: boot, Reason: "lease lost", By: "n1"}
	case 13:
		return members.Leave{Node: node, Incarnation: inc, Done: seed%2 == 0}
	case 14:
		return members.Remove{Node: node}
	case 15:
		return members.SetAddresses{Node: node, Addresses: members.Addresses{Raft: "127.0.0.1:7002"}, InitiatorName: "iqn.2026-01.org.blockhouse:" + boot}
	case 28, 29, 30:
		return storage.LunCreateVolume{Request: req, Volume: vol, Target: iqn, Number: storage.NextFree}
	case 31, 32:
		return storage.TargetCreate{Request: req, IQN: iqn, ACL: acl}
	case 33:
		return fencing.FenceStart{Request: req, Now: now, Node: node, Epoch: epoch, Method: fencing.Agent, Executor: "n9", Deadline: now.Add(time.Minute)}
	case 38, 39:
		gone := fsm.Command(storage.VolumeRemove{UUID: vol.Config.UUID})
		c.Read(func(v machines.View) {
			if x, ok := v.Storage.Volume(vol.Config.UUID); ok && x.State == storage.Removing {
				gone = storage.VolumeRemoved{UUID: vol.Config.UUID, Epoch: volEpoch}
			}
		})
		return gone
	case 40, 41:
		return storage.AccountCreate{Request: req, Name: tok, Sealed: bytes.Repeat([]byte{seed}, 40), Key: "0011223344556677"}
	case 42:
		return storage.AccountBind{Target: []string{"", iqn}[r.IntN(2)], Name: tok, Outgoing: r.IntN(3) == 0}
	case 43:
		if r.IntN(2) == 0 {
			return storage.AccountDelete{Name: tok, Force: r.IntN(2) == 0}
		}
		return storage.AccountUnbind{Target: []string{"", iqn}[r.IntN(2)], Name: tok, Outgoing: r.IntN(3) == 0}
	case 44:
		off := inc%2 == 0
		return storage.TargetSet{Target: iqn, Params: map[string]string{"nop_count": []string{"", "3"}[r.IntN(2)]}, Offline: &off}
	case 45:
		ro := inc%2 == 0
		return storage.LunSet{Target: iqn, Number: r.IntN(3), ReadOnly: &ro}
	case 34:
		return members.SetRoles{Node: node, Roles: members.Roles{Storage: true, Host: seed == 1}}
	case 35:
		return storage.LunDelete{Target: iqn, Number: int(inc)}
	case 36, 37:
		return members.Admit{Now: now, Node: node, From: inc, BootID: boot}
	case 16:
		return members.ReportFormat{Node: node, Format: uint32(seed)}
	case 17:
		return fencing.FenceStart{Request: req, Now: now, Node: node, Epoch: epoch, Method: fencing.Agent, Executor: "n9", Deadline: now.Add(time.Minute)}
	case 18:
		if seed == 1 {
			attempt = inc
		}
		return fencing.FenceEnd{Now: now, Attempt: attempt, Outcome: []fencing.Outcome{fencing.OK, fencing.Failed, fencing.Abandoned}[r.IntN(3)], Output: "out"}
	case 19:
		return fencing.Fenced{Now: now, Node: node, Epoch: epoch, Evidence: fencing.Evidence{Method: fencing.Manual, Operator: "op", Reason: "reset"}}
	case 20:
		return storage.VolumeCreate{Request: req, Volume: vol}
	case 21:
		return storage.VolumeReady{UUID: vol.Config.UUID, Epoch: volEpoch}
	case 22:
		n := vol.Config
		n.Epoch = volEpoch + 1
		n.Others = []replica.Other{{Node: "n8", State: "stale", Since: volEpoch}}
		return storage.VolumeCAS{Request: req, Epoch: volEpoch, Config: n}
	case 23:
		if seed%2 == 0 {
			return storage.VolumeRemove{UUID: vol.Config.UUID}
		}
		return storage.VolumeRemoved{UUID: vol.Config.UUID, Epoch: volEpoch}
	case 24:
		if seed == 1 && inc == 1 {
			return storage.TargetDelete{IQN: iqn, Force: true}
		}
		return storage.TargetCreate{Request: req, IQN: iqn, TID: int(inc), ACL: acl}
	case 25:
		switch seed {
		case 1:
			return storage.LunDelete{Target: iqn, Number: int(inc)}
		case 2:
			return storage.LunCreate{Request: req, Target: iqn, Number: storage.NextFree, Volume: vol.Config.UUID}
		}
		return storage.LunCreateVolume{Request: req, Volume: vol, Target: iqn, Number: storage.NextFree}
	case 26:
		switch seed {
		case 1:
			return storage.ACLRemove{Target: iqn, ACL: acl}
		case 2:
			return storage.ACLSet{Target: iqn, ACL: storage.ACL{Open: true}}
		}
		return storage.ACLAdd{Target: iqn, ACL: acl}
	default:
		switch seed {
		case 1:
			return settings.Delete{Key: node, Version: version}
		case 2:
			return settings.Activate{Format: uint32(inc)}
		}
		return settings.Set{Key: node, Value: boot, Version: version}
	}
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

func empty(t fataler) *machines.Cluster {
	t.Helper()
	c, err := machines.New(zap.NewNop())
	if err != nil {
		t.Fatalf("new: %v", err)
	}
	return c
}

func hash(t fataler, c *machines.Cluster) [32]byte {
	t.Helper()
	h, err := c.Hash()
	if err != nil {
		t.Fatalf("hash: %v", err)
	}
	return h
}

type sink struct{ bytes.Buffer }

func (*sink) ID() string    { return "test" }
func (*sink) Cancel() error { return nil }
func (*sink) Close() error  { return nil }

func snapshot(t fataler, c *machines.Cluster) []byte {
	t.Helper()
	s, err := c.Snapshot()
	if err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	var b sink
	if err := s.Persist(&b); err != nil {
		t.Fatalf("persist: %v", err)
	}
	s.Release()
	return b.Bytes()
}

func restore(t fataler, b []byte) *machines.Cluster {
	t.Helper()
	c := empty(t)
	if err := c.Restore(io.NopCloser(bytes.NewReader(b))); err != nil {
		t.Fatalf("restore: %v", err)
	}
	return c
}

// The same log gives the same state and the same answers on every node, also on
// one that restored a snapshot taken at any index on the way (SAFETY §2,
// facts/cluster.md §8 L1).
func TestDeterministic(t *testing.T) {
	t.Parallel()
	applied := map[string]int{} // accepted, by command
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(30, 60).Draw(rt, "n")
		var (
			entries [][]byte
			cmds    []fsm.Command
			snaps   [][]byte
			results []string
		)
		a, b := empty(rt), empty(rt)
		for i := range n {
			// Every run has a cluster, else most commands are refused at once.
			var c fsm.Command = members.Bootstrap{Cluster: "c1", UUID: clusterUUID, Node: newNode("n1", 3)}
			if i > 0 {
				c = genCommand(rt, i, a)
			}
			e, err := fsm.Encode(c)
			if err != nil {
				rt.Fatalf("encode %T: %v", c, err)
			}
			entries, cmds = append(entries, e), append(cmds, c)
			before := hash(rt, a)
			ra, rb := a.ApplyEntry(uint64(i+1), e), b.ApplyEntry(uint64(i+1), e)
			if a.Err() != nil {
				rt.Fatalf("stopped at %T: %v", c, a.Err())
			}
			sa, sb := text(rt, ra), text(rt, rb)
			if sa != sb {
				rt.Fatalf("%T answered %s and %s", c, sa, sb)
			}
			if ra.Err != nil && hash(rt, a) != before {
				rt.Fatalf("%T was refused (%v) but changed the state", c, ra.Err)
			}
			if ra.Err == nil {
				applied[fmt.Sprintf("%T", c)]++
			}
			results = append(results, sa)
			snaps = append(snaps, snapshot(rt, a))
		}
		want := hash(rt, a)
		if got := hash(rt, b); got != want {
			rt.Fatalf("hashes differ after the same log")
		}
		for i, s := range snaps {
			c := restore(rt, s)
			if c.Index() != uint64(i+1) {
				rt.Fatalf("restored index %d, want %d", c.Index(), i+1)
			}
			// All of the rest from a few indexes, the next four from every one.
			last := i + 5
			if i%16 == 3 {
				last = len(entries)
			}
			last = min(last, len(entries))
			for j := i + 1; j < last; j++ {
				r := c.ApplyEntry(uint64(j+1), entries[j])
				if got := text(rt, r); got != results[j] {
					rt.Fatalf("after the snapshot of %d, %T answered %s, want %s", i+1, cmds[j], got, results[j])
				}
			}
			if !bytes.Equal(snapshot(rt, c), snaps[last-1]) {
				rt.Fatalf("snapshot at %d and the entries up to %d give another state", i+1, last)
			}
			if i%16 != 0 && i != len(snaps)-1 { // a second generation of some
				continue
			}
			if !bytes.Equal(snapshot(rt, restore(rt, s)), s) {
				rt.Fatalf("a snapshot of a restored snapshot differs")
			}
		}
		check(rt, a)
	})
	total := 0
	for _, kinds := range empty(t).Kinds() {
		total += len(kinds)
	}
	if len(applied)*4 < total*3 {
		t.Errorf("only %d of %d kinds were ever accepted: the generator misses", len(applied), total)
	}
	t.Logf("accepted: %v", applied)
}

func text(t fataler, r fsm.Result) string {
	b, err := json.Marshal(r.Value)
	if err != nil {
		t.Fatalf("result of %d: %v", r.Index, err)
	}
	return fmt.Sprintf("%s %v", b, r.Err)
}

// check holds the invariants that tie the machines together.
func check(t *rapid.T, c *machines.Cluster) {
	c.Read(func(v machines.View) {
		s := v.Members.State()
		open := map[string]fencing.Open{}
		for _, o := range v.Fencing.OpenFences() {
			open[o.Node] = o
		}
		seen := map[int]string{}
		for _, r := range s.List() {
			if other := seen[r.Index]; other != "" || r.Index < 1 || r.Index > s.LastIndex {
				t.Fatalf("index %d of %s, also of %q, last %d", r.Index, r.Name, other, s.LastIndex)
			}
			seen[r.Index] = r.Name
			o, isOpen := open[r.Name]
			if isOpen != (r.Status == members.Evicted) {
				t.Fatalf("%s is %s, fence open: %v", r.Name, r.Status, isOpen)
			}
			if isOpen && (o.Incarnation != r.Incarnation || o.Epoch != r.EvictEpoch || o.Epoch > s.Epoch) {
				t.Fatalf("fence %+v of %+v at epoch %d", o, r, s.Epoch)
			}
			if r.Active() && r.Incarnation == 0 {
				t.Fatalf("%+v is a member in incarnation 0", r)
			}
		}
		for n := range open {
			if s.Members[n] == nil {
				t.Fatalf("a fence of %s is open, the node is gone", n)
			}
		}
		hist, more := v.Fencing.History(0, 0)
		if more {
			t.Fatalf("more than all")
		}
		var paged []fencing.Record
		for after := uint64(0); ; {
			p, more := v.Fencing.History(after, 2)
			paged = append(paged, p...)
			if !more {
				break
			}
			after = p[len(p)-1].Seq
		}
		if fmt.Sprintf("%+v", paged) != fmt.Sprintf("%+v", hist) && len(hist) > 0 {
			if len(paged) != len(hist) {
				t.Fatalf("pages have %d records, all %d", len(paged), len(hist))
			}
		}
		for i, r := range hist {
			if r.Seq != uint64(i+1) {
				t.Fatalf("history %d has seq %d", i, r.Seq)
			}
		}
		st := v.Storage.State()
		gens := map[uint64]bool{}
		for _, tg := range st.ListTargets() {
			for _, n := range tg.Numbers() {
				l := tg.LUNs[n]
				if st.Volumes[l.Volume] == nil {
					t.Fatalf("LUN %+v points to nothing", l)
				}
				if gens[l.Generation] || l.Generation > st.Generation {
					t.Fatalf("generation %d twice or from the future", l.Generation)
				}
				gens[l.Generation] = true
			}
		}
		re := v.PR.State()
		for id, x := range re.Volumes {
			if st.Volumes[id] == nil {
				t.Fatalf("reservations of volume %s, which is gone", id)
			}
			for _, r := range s.List() {
				if r.Status == members.Fenced && slices.ContainsFunc(x.Registrations, func(g targetpr.Registration) bool { return g.ID.Name == r.InitiatorName && x.Changed < r.Changed }) {
					t.Fatalf("%s is fenced and still registered on %s", r.Name, id)
				}
			}
		}
	})
}
