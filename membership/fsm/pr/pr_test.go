package pr

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

type volumes struct {
	primary string
	epoch   uint64
}

func (v *volumes) Serving(uuid string) (string, uint64, bool) {
	return v.primary, v.epoch, uuid == "v1"
}

func nexus(i int) pr.Nexus {
	return pr.Nexus{ID: scsi.TransportID{Name: fmt.Sprintf("iqn.h%d", i), ISID: [6]byte{0, 2, 61, 0, 0, byte(i)}, HasISID: true}, Port: 1}
}

func register(i int, key, newKey uint64) pr.Request {
	return pr.Request{Kind: pr.KindOut, SA: scsi.SARegister, Nexus: nexus(i), Param: &scsi.PROut{Key: key, NewKey: newKey}}
}

func out(i, sa int, t scsi.PRType, key, newKey uint64) pr.Request {
	return pr.Request{Kind: pr.KindOut, SA: sa, Type: t, Nexus: nexus(i), Param: &scsi.PROut{Key: key, NewKey: newKey}}
}

type machine struct {
	*Machine
	t     *testing.T
	vols  *volumes
	index uint64
	seq   uint64
}

func newMachine(t *testing.T) *machine {
	m := &machine{Machine: New(), t: t, vols: &volumes{"n1", 1}}
	m.Bind(m.vols)
	return m
}

func (m *machine) ask(q pr.Request) Done {
	m.t.Helper()
	m.seq++
	return m.change(Change{Node: "n1", Worker: "w1", Seq: m.seq, Volume: "v1", Epoch: m.vols.epoch, Request: q})
}

func (m *machine) change(c Change) Done {
	m.t.Helper()
	d, err := m.try(&c)
	if err != nil {
		m.t.Fatal(err)
	}
	return d
}

func (m *machine) try(c any) (Done, error) {
	m.index++
	v, err := m.Apply(m.index, c)
	d, _ := v.(Done)
	return d, err
}

// A request takes effect once, whoever repeats it, and its repeat says what the
// first said, also when the state would now say something else (SAFETY §4).
func TestARequestIsDecidedOnce(t *testing.T) {
	m := newMachine(t)
	first := Change{Node: "n1", Worker: "w1", Seq: 1, Volume: "v1", Epoch: 1, Request: register(1, 0, 7)}
	d := m.change(first)
	if d.Outcome.Status != scsi.StatusGood || !d.Changed || d.At != 1 {
		t.Fatalf("%+v", d)
	}
	// Applied again it would conflict: the key is 7 now.
	if again := m.change(first); again.Outcome.Status != scsi.StatusGood || again.Index != d.Index {
		t.Fatalf("repeat: %+v", again)
	}
	v, _ := m.Volume("v1")
	if v.Generation != 1 || len(v.Registrations) != 1 || v.Seq != 1 {
		t.Fatalf("applied twice: %+v", v)
	}
	m.vols.epoch, m.vols.primary = 2, "n2"
	if again := m.change(first); again.Index != d.Index {
		t.Fatalf("repeat in a later epoch: %+v", again)
	}
}

func TestWhoMayAsk(t *testing.T) {
	m := newMachine(t)
	ok := Change{Node: "n1", Worker: "w1", Seq: 5, Volume: "v1", Epoch: 1, Request: register(1, 0, 7)}
	for name, c := range map[string]func(*Change){
		"not the primary": func(c *Change) { c.Node = "n2" },
		"an old epoch":    func(c *Change) { c.Epoch = 0 },
		"a later epoch":   func(c *Change) { c.Epoch = 2 },
	} {
		bad := ok
		c(&bad)
		if _, err := m.try(&bad); !errors.Is(err, fsm.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	bad := ok
	bad.Volume = "v2"
	if _, err := m.try(&bad); !errors.Is(err, fsm.ErrNotFound) {
		t.Error(err)
	}
	if len(m.s.Volumes) != 0 {
		t.Fatalf("a refusal left %v", m.s.Volumes)
	}
	m.change(ok)
	late := ok
	late.Seq, late.Request = 4, register(2, 0, 8)
	if _, err := m.try(&late); !errors.Is(err, fsm.ErrConflict) {
		t.Errorf("a request that was given up: %v", err)
	}
	if _, err := m.try(&Barrier{Node: "n1", Worker: "w1", Seq: 9, Volume: "v1", Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	late.Seq = 8
	if _, err := m.try(&late); !errors.Is(err, fsm.ErrConflict) {
		t.Errorf("a request before the barrier: %v", err)
	}
	if v, _ := m.Volume("v1"); len(v.Registrations) != 1 || v.Seq != 1 {
		t.Fatalf("%+v", v)
	}
}

// A late loss of a nexus must not end what the nexus reserved anew.
func TestNexusLossNamesWhatItEnds(t *testing.T) {
	m := newMachine(t)
	m.ask(pr.Request{Kind: pr.KindReserve, Nexus: nexus(1)})
	v, _ := m.Volume("v1")
	loss := Change{Node: "n1", Worker: "w1", Volume: "v1", Epoch: 1, Request: pr.Request{Kind: pr.KindNexusLoss, Nexus: nexus(1)}, LegacySeq: v.LegacySeq}
	m.ask(pr.Request{Kind: pr.KindReserve, Nexus: nexus(1)}) // the new session
	m.seq++
	loss.Seq = m.seq
	if d := m.change(loss); d.Changed {
		t.Fatalf("%+v", d)
	}
	v, _ = m.Volume("v1")
	if v.Legacy == nil || v.LegacySeq != 2 {
		t.Fatalf("the new reservation is gone: %+v", v)
	}
	m.seq++
	loss.Seq, loss.LegacySeq = m.seq, 2
	if d := m.change(loss); !d.Changed {
		t.Fatalf("%+v", d)
	}
	if v, _ = m.Volume("v1"); v.Legacy != nil || v.LegacySeq != 0 {
		t.Fatalf("%+v", v)
	}
}

// What a worker must do is derived from the state alone, from whatever point it
// last acted at (SAFETY §2, level-triggered).
func TestNoticesAreDerivedFromTheState(t *testing.T) {
	m := newMachine(t)
	m.ask(register(1, 0, 1))                                                  // 1
	m.ask(register(2, 0, 2))                                                  // 2
	m.ask(register(3, 0, 3))                                                  // 3
	m.ask(out(1, scsi.SAReserve, scsi.PRWriteExclusiveRegOnly, 1, 0))         // 4
	m.ask(out(2, scsi.SAReserve, scsi.PRWriteExclusive, 2, 0))                // conflict
	m.ask(out(1, scsi.SARelease, scsi.PRWriteExclusiveRegOnly, 1, 0))         // 5: 2A/04 to 2 and 3
	m.ask(out(3, scsi.SAPreemptAndAbort, scsi.PRExclusiveAccess, 3, 2))       // 6: 2A/05 to 2, its tasks end
	d := m.ask(out(3, scsi.SAReserve, scsi.PRExclusiveAccess, 3, 0))          // 7
	if v, _ := m.Volume("v1"); v.Seq != 7 || d.At != 7 || v.Generation != 4 { // 3 registrations and the preemption
		t.Fatalf("%+v", v)
	}
	att := func(i int, code scsi.ASC) pr.Attention { return pr.Attention{Nexus: nexus(i), Code: code} }
	v, _ := m.Volume("v1")
	for since, want := range map[uint64]pr.Result{
		0: {Notify: []pr.Attention{att(2, scsi.ASCReservationsReleased), att(3, scsi.ASCReservationsReleased), att(2, scsi.ASCRegistrationsPreempted)},
			Abort: []pr.Victim{{Nexus: nexus(2)}}},
		5: {Notify: []pr.Attention{att(2, scsi.ASCRegistrationsPreempted)}, Abort: []pr.Victim{{Nexus: nexus(2)}}},
		6: {}, 7: {},
	} {
		got, lost := v.Since(since)
		if d := cmp.Diff(want, got); d != "" || lost {
			t.Errorf("since %d (lost %v): %s", since, lost, d)
		}
	}
}

// A record of bounded size says when it does not know any more.
func TestNoticesAreBounded(t *testing.T) {
	m := newMachine(t)
	n := func(i int) pr.Nexus { return pr.Nexus{ID: scsi.TransportID{Name: fmt.Sprintf("iqn.%d", i)}, Port: 1} }
	m.ask(register(1, 0, 1))
	for i := range maxNotices + 10 { // each registers and is preempted
		m.ask(pr.Request{Kind: pr.KindOut, SA: scsi.SARegister, Nexus: n(i), Param: &scsi.PROut{NewKey: 9}})
		m.ask(out(1, scsi.SAPreempt, 0, 1, 9))
	}
	v, _ := m.Volume("v1")
	if len(v.Notices) != maxNotices || v.Horizon == 0 {
		t.Fatalf("%d notices, horizon %d", len(v.Notices), v.Horizon)
	}
	if _, lost := v.Since(v.Horizon - 1); !lost {
		t.Error("what was dropped is not missed")
	}
	if r, lost := v.Since(v.Horizon); lost || len(r.Notify) != maxNotices {
		t.Errorf("%d, lost %v", len(r.Notify), lost)
	}
}

func TestPurgeAndGone(t *testing.T) {
	m := newMachine(t)
	m.ask(register(1, 0, 1))
	m.ask(register(2, 0, 2))
	m.ask(out(1, scsi.SAReserve, scsi.PRWriteExclusiveRegOnly, 1, 0))
	m.Purge(99, []string{"iqn.h1"})
	v, _ := m.Volume("v1")
	if v.Type != 0 || len(v.Registrations) != 1 || v.Changed != 99 || v.Seq != 4 {
		t.Fatalf("%+v", v)
	}
	if r, _ := v.Since(3); len(r.Notify) != 1 || r.Notify[0].Nexus != nexus(2) || r.Notify[0].Code != scsi.ASCReservationsReleased {
		t.Fatalf("%+v", r)
	}
	m.Purge(100, []string{"iqn.h1"})
	if v, _ := m.Volume("v1"); v.Seq != 4 || v.Changed != 99 {
		t.Fatalf("a purge of nothing changed %+v", v)
	}
	m.VolumeGone("v1")
	if _, ok := m.Volume("v1"); ok {
		t.Fatal("still there")
	}
}

// The log's form is frozen: who changes a name here breaks every old log.
func TestFrozenForm(t *testing.T) {
	q := out(1, scsi.SARegisterAndMove, scsi.PRWriteExclusive, 1, 2)
	q.Param.IDs, q.Param.Port, q.Param.APTPL, q.Param.Unregister, q.Param.AllTGPT, q.Param.SpecIPT = []scsi.TransportID{nexus(2).ID}, 3, true, true, true, true
	q.Names = []string{"x"}
	b, err := json.Marshal(Change{Node: "n1", Worker: "w1", Seq: 4, Volume: "v1", Epoch: 2, Request: q, LegacySeq: 3})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"node":"n1","worker":"w1","seq":4,"volume":"v1","epoch":2,"request":{"kind":1,"nexus":{"id":{"name":"iqn.h1","isid":[0,2,61,0,0,1],"has_isid":true},"port":1},` +
		`"sa":7,"type":1,"param":{"key":1,"new_key":2,"spec_i_pt":true,"all_tg_pt":true,"aptpl":true,"ids":[{"name":"iqn.h2","isid":[0,2,61,0,0,2],"has_isid":true}],"unregister":true,"port":3},` +
		`"names":["x"]},"legacy_seq":3}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	m := newMachine(t)
	m.ask(register(1, 0, 1))
	m.ask(out(1, scsi.SAReserve, scsi.PRWriteExclusive, 1, 0))
	m.ask(register(2, 0, 2))
	m.ask(out(1, scsi.SAPreemptAndAbort, scsi.PRWriteExclusive, 1, 2))
	m.ask(out(1, scsi.SAPreempt, scsi.PRWriteExclusive, 1, 0)) // 05/26/00
	var s bytes.Buffer
	if err := m.Snapshot(&s); err != nil {
		t.Fatal(err)
	}
	h1 := `{"id":{"name":"iqn.h1","isid":[0,2,61,0,0,1],"has_isid":true},"port":1`
	h2 := `{"id":{"name":"iqn.h2","isid":[0,2,61,0,0,2],"has_isid":true},"port":1}`
	want = `{"volumes":{"v1":{"generation":3,"registrations":[` + h1 + `,"key":1}],"type":1,"holder":` + h1 + `},"seq":4,"changed":4,"notices":[` +
		`{"nexus":` + h2 + `,"code":10757,"at":4},{"nexus":` + h2 + `,"abort":true,"at":4}],` +
		`"last":{"worker":"w1","seq":5,"index":5,"at":4,"outcome":{"status":2,"sense":{"key":5,"code":9728,"pointer":{"byte":8,"bit":-1}}}}}}}`
	if s.String() != want {
		t.Errorf("got  %s\nwant %s", s.String(), want)
	}
}

// Nothing that a log may hold makes the machine panic, and a restored copy goes
// on as the one that wrote the snapshot.
func TestAnyRequest(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		vols := &volumes{"n1", 1}
		a := New()
		a.Bind(vols)
		ids := []scsi.TransportID{nexus(1).ID, nexus(2).ID, nexus(3).ID}
		for i := range rapid.IntRange(1, 30).Draw(r, "n") {
			c := &Change{Node: "n1", Worker: rapid.SampledFrom([]string{"w1", "w2"}).Draw(r, "worker"), Seq: uint64(rapid.IntRange(1, 30).Draw(r, "seq")), Volume: "v1", Epoch: 1,
				Request: pr.Request{Kind: pr.Kind(rapid.IntRange(0, 7).Draw(r, "kind")), SA: rapid.IntRange(0, 9).Draw(r, "sa"),
					Type: scsi.PRType(rapid.IntRange(0, 8).Draw(r, "type")), Nexus: nexus(rapid.IntRange(1, 3).Draw(r, "who"))},
				LegacySeq: uint64(rapid.IntRange(0, 5).Draw(r, "legacy"))}
			if rapid.IntRange(0, 9).Draw(r, "param") > 0 {
				c.Request.Param = &scsi.PROut{Key: rapid.Uint64Range(0, 3).Draw(r, "key"), NewKey: rapid.Uint64Range(0, 3).Draw(r, "new"), AllTGPT: rapid.Bool().Draw(r, "all"),
					SpecIPT: rapid.Bool().Draw(r, "spec"), Unregister: rapid.Bool().Draw(r, "unreg"), IDs: ids[:rapid.IntRange(0, 3).Draw(r, "ids")]}
				if len(c.Request.Param.IDs) == 0 {
					c.Request.Param.IDs = nil
				}
			}
			if rapid.Bool().Draw(r, "names") {
				c.Request.Names = []string{"iqn.h1"}
			}
			if c.Validate() != nil {
				continue
			}
			var s bytes.Buffer
			if err := a.Snapshot(&s); err != nil {
				r.Fatal(err)
			}
			b := New()
			b.Bind(vols)
			install, err := b.Restore(1, &s)
			if err != nil {
				r.Fatal(err)
			}
			install()
			av, ae := a.Apply(uint64(i+1), c)
			bv, be := b.Apply(uint64(i+1), c)
			if d := cmp.Diff(av, bv); d != "" || fmt.Sprint(ae) != fmt.Sprint(be) {
				r.Fatalf("the restored copy answers otherwise: %s %v %v", d, ae, be)
			}
			if d := cmp.Diff(a.State(), b.State()); d != "" {
				r.Fatalf("the restored copy differs: %s", d)
			}
		}
	})
}
