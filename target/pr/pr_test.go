package pr

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/scsi"
)

func nexus(i int) Nexus {
	return Nexus{scsi.TransportID{Name: fmt.Sprintf("iqn.h%d", i), ISID: [6]byte{byte(i)}, HasISID: true}, 1}
}

func out(s *State, n Nexus, sa int, t scsi.PRType, key, newKey uint64) Result {
	return s.Apply(Request{Kind: KindOut, Nexus: n, SA: sa, Type: t, Param: &scsi.PROut{Key: key, NewKey: newKey}})
}

var a, b, c = nexus(1), nexus(2), nexus(3)

// TestMatrix is SPC-4 5.13.1: 6 types x {holder, registrant, other} x every row
// of the command table.
func TestMatrix(t *testing.T) {
	for _, typ := range scsi.PRTypes {
		s := &State{}
		out(s, a, scsi.SARegister, 0, 0, 1)
		out(s, b, scsi.SARegister, 0, 0, 2)
		if r := out(s, a, scsi.SAReserve, typ, 1, 0); r.Status != scsi.StatusGood {
			t.Fatal(r)
		}
		for _, cmd := range scsi.Commands {
			cl := cmd.Conflict
			for who, n := range map[string]Nexus{"holder": a, "registrant": b, "other": c} {
				var want bool
				switch cl {
				case scsi.ConflictReserve, scsi.ConflictRelease:
					want = true
				case scsi.ConflictRead:
					want = !typ.WriteExclusive() && (who == "other" || who == "registrant" && typ == scsi.PRExclusiveAccess)
				case scsi.ConflictWrite, scsi.ConflictPrevent, scsi.ConflictStart:
					want = who == "other" || who == "registrant" && typ <= scsi.PRExclusiveAccess
				}
				if got := s.Conflicts(n, cl); got != want {
					t.Errorf("%s from %s under %s: conflict %v, want %v", cmd, who, typ, got, want)
				}
			}
		}
	}
}

func TestLegacy(t *testing.T) {
	s := &State{}
	if r := s.Apply(Request{Kind: KindReserve, Nexus: a}); r.Status != scsi.StatusGood {
		t.Fatal(r)
	}
	for cl, want := range map[scsi.Conflict]bool{
		scsi.ConflictNever: false, scsi.ConflictRelease: false, scsi.ConflictLegacy: true, scsi.ConflictRead: true,
		scsi.ConflictWrite: true, scsi.ConflictPRIn: true, scsi.ConflictPROut: true, scsi.ConflictReserve: true,
	} {
		if s.Conflicts(b, cl) != want {
			t.Errorf("class %d: want %v", cl, want)
		}
		if s.Conflicts(a, cl) {
			t.Errorf("class %d conflicts with the holder", cl)
		}
	}
	if r := s.Apply(Request{Kind: KindReserve, Nexus: b}); r.Status != scsi.StatusReservationConflict {
		t.Error("two holders")
	}
	if r := s.Apply(Request{Kind: KindRelease, Nexus: b}); r.Status != scsi.StatusGood || s.Legacy == nil {
		t.Error("release by another", r)
	}
	if r := out(s, b, scsi.SARegister, 0, 0, 1); r.Status != scsi.StatusReservationConflict {
		t.Error("registered under another's RESERVE")
	}
	s.Apply(Request{Kind: KindNexusLoss, Nexus: b})
	if s.Legacy == nil {
		t.Error("another's nexus loss ended it")
	}
	s.Apply(Request{Kind: KindNexusLoss, Nexus: a})
	if s.Legacy != nil {
		t.Error("it survived nexus loss")
	}
	out(s, b, scsi.SARegister, 0, 0, 1)
	if r := s.Apply(Request{Kind: KindReserve, Nexus: a}); r.Status != scsi.StatusReservationConflict {
		t.Error("RESERVE beside a registration")
	}
}

func TestRegister(t *testing.T) {
	s := &State{}
	if r := out(s, a, scsi.SARegister, 0, 5, 1); r.Status != scsi.StatusReservationConflict {
		t.Error("unregistered nexus with a key")
	}
	out(s, a, scsi.SARegister, 0, 0, 1)
	if r := out(s, a, scsi.SARegister, 0, 9, 2); r.Status != scsi.StatusReservationConflict || s.Generation != 1 {
		t.Error("wrong key", s.Generation)
	}
	if r := out(s, a, scsi.SARegisterAndIgnoreKey, 0, 9, 2); r.Status != scsi.StatusGood || s.Registrations[0].Key != 2 || s.Generation != 2 {
		t.Error(r, s)
	}
	if r := out(s, b, scsi.SARegister, 0, 0, 0); r.Status != scsi.StatusGood || s.Generation != 2 {
		t.Error("key 0 of an unregistered nexus", r, s.Generation)
	}
	s.Apply(Request{Kind: KindOut, Nexus: b, SA: scsi.SARegister, Param: &scsi.PROut{NewKey: 7, SpecIPT: true, AllTGPT: true, IDs: []scsi.TransportID{c.ID}}})
	if len(s.Registrations) != 3 || !s.Registrations[2].AllPorts || s.Registrations[2].ID != c.ID {
		t.Errorf("%+v", s.Registrations)
	}
	if s.find(Nexus{c.ID, 77}) == nil {
		t.Error("ALL_TG_PT does not hold on another port")
	}
	if s.find(Nexus{a.ID, 77}) != nil {
		t.Error("a registration holds on a port it was not made on")
	}
}

// TestUnregisterHolder: the others hear of it under RO types, never the nexus
// itself (facts/iscsi.md 1.3, where tgtd fails).
func TestUnregisterHolder(t *testing.T) {
	for _, typ := range scsi.PRTypes {
		s := &State{}
		out(s, a, scsi.SARegister, 0, 0, 1)
		out(s, b, scsi.SARegister, 0, 0, 2)
		out(s, a, scsi.SAReserve, typ, 1, 0)
		r := out(s, a, scsi.SARegister, 0, 1, 0)
		var want []Attention
		if typ == scsi.PRWriteExclusiveRegOnly || typ == scsi.PRExclusiveAccessRO {
			want = []Attention{{b, false, scsi.ASCReservationsReleased}}
		}
		if d := cmp.Diff(want, r.Notify); d != "" {
			t.Errorf("%s: %s", typ, d)
		}
		if held := s.Type != 0; held != typ.AllRegistrants() {
			t.Errorf("%s: held %v", typ, held)
		}
		if typ.AllRegistrants() {
			out(s, b, scsi.SARegister, 0, 2, 0)
			if s.Type != 0 {
				t.Errorf("%s: held by nobody", typ)
			}
		}
	}
}

func TestReserveRelease(t *testing.T) {
	for _, typ := range scsi.PRTypes {
		s := &State{}
		if r := out(s, a, scsi.SAReserve, typ, 0, 0); r.Status != scsi.StatusReservationConflict {
			t.Error("reserved without registration")
		}
		out(s, a, scsi.SARegister, 0, 0, 1)
		out(s, b, scsi.SARegister, 0, 0, 2)
		out(s, a, scsi.SAReserve, typ, 1, 0)
		if r := out(s, a, scsi.SAReserve, typ, 1, 0); r.Status != scsi.StatusGood {
			t.Error("the same again")
		}
		other := scsi.PRWriteExclusive
		if typ == other {
			other = scsi.PRExclusiveAccess
		}
		if r := out(s, a, scsi.SAReserve, other, 1, 0); r.Status != scsi.StatusReservationConflict {
			t.Error("another type")
		}
		if r := out(s, a, scsi.SARelease, other, 1, 0); r.Status != scsi.StatusCheckCondition || r.Sense.Code != scsi.ASCInvalidRelease {
			t.Error("release of another type", r)
		}
		r := out(s, b, scsi.SARelease, typ, 2, 0)
		if r.Status != scsi.StatusGood || (s.Type == 0) != typ.AllRegistrants() {
			t.Error("release by the registrant", r, s.Type)
		}
		if s.Type == 0 {
			out(s, a, scsi.SAReserve, typ, 1, 0)
		}
		r = out(s, a, scsi.SARelease, typ, 1, 0)
		if s.Type != 0 || (len(r.Notify) == 1) != typ.Registrants() {
			t.Error("release", r)
		}
	}
}

func TestPreempt(t *testing.T) {
	for _, typ := range scsi.PRTypes {
		for _, sa := range []int{scsi.SAPreempt, scsi.SAPreemptAndAbort} {
			s := &State{}
			out(s, a, scsi.SARegister, 0, 0, 1)
			out(s, b, scsi.SARegister, 0, 0, 2)
			out(s, c, scsi.SARegister, 0, 0, 3)
			out(s, a, scsi.SAReserve, typ, 1, 0)
			if r := out(s, b, sa, typ, 2, 99); r.Status != scsi.StatusReservationConflict {
				t.Error("unknown key", r)
			}
			if r := out(s, b, sa, typ, 2, 0); !typ.AllRegistrants() && (r.Status != scsi.StatusCheckCondition || r.Sense.Code != scsi.ASCInvalidFieldParam) {
				t.Error("key 0", r)
			} else if typ.AllRegistrants() {
				if len(r.Notify) != 2 || len(s.Registrations) != 1 || s.Type != typ {
					t.Error("key 0 preempts all", r, s)
				}
				continue
			}
			r := out(s, b, sa, scsi.PRExclusiveAccess, 2, 1)
			if s.Type != scsi.PRExclusiveAccess || !s.Holds(b) || s.find(a) != nil || len(s.Registrations) != 2 {
				t.Errorf("%+v", s)
			}
			want := []Attention{{a, false, scsi.ASCRegistrationsPreempted}}
			if typ != scsi.PRExclusiveAccess {
				want = append(want, Attention{c, false, scsi.ASCReservationsReleased})
			}
			if d := cmp.Diff(want, r.Notify); d != "" {
				t.Error(d)
			}
			if (len(r.Abort) == 1) != (sa == scsi.SAPreemptAndAbort) {
				t.Error("abort", r.Abort)
			}
		}
	}
}

func TestMoveAndClear(t *testing.T) {
	s := &State{}
	out(s, a, scsi.SARegister, 0, 0, 1)
	out(s, b, scsi.SARegister, 0, 0, 2)
	mv := func(n Nexus, key, newKey uint64, to Nexus, unreg bool) Result {
		return s.Apply(Request{Kind: KindOut, Nexus: n, SA: scsi.SARegisterAndMove, Param: &scsi.PROut{Key: key, NewKey: newKey, Unregister: unreg, Port: to.Port, IDs: []scsi.TransportID{to.ID}}})
	}
	if r := mv(a, 1, 3, c, false); r.Status != scsi.StatusCheckCondition {
		t.Error("move of nothing", r)
	}
	out(s, a, scsi.SAReserve, scsi.PRWriteExclusive, 1, 0)
	if r := mv(b, 2, 3, c, false); r.Status != scsi.StatusReservationConflict {
		t.Error("move by a registrant that does not hold (tgtd says GOOD)", r)
	}
	if r := mv(a, 1, 3, c, true); r.Status != scsi.StatusGood || !s.Holds(c) || s.find(a) != nil {
		t.Errorf("%v %+v", r, s)
	}
	r := out(s, b, scsi.SAClear, 0, 2, 0)
	if s.Type != 0 || len(s.Registrations) != 0 || !cmp.Equal(r.Notify, []Attention{{c, false, scsi.ASCReservationsPreempted}}) {
		t.Errorf("%v %+v", r, s)
	}
}

func TestPurge(t *testing.T) {
	s := &State{}
	out(s, a, scsi.SARegister, 0, 0, 1)
	out(s, b, scsi.SARegister, 0, 0, 2)
	out(s, a, scsi.SAReserve, scsi.PRWriteExclusiveRegOnly, 1, 0)
	r := s.Apply(Request{Kind: KindPurge, Names: []string{a.ID.Name}})
	if s.Type != 0 || len(s.Registrations) != 1 || !cmp.Equal(r.Notify, []Attention{{b, false, scsi.ASCReservationsReleased}}) {
		t.Errorf("%v %+v", r, s)
	}
}

// TestInvariants: whatever is asked, a reservation has a registered holder, a
// refused request changes nothing, and two replicas stay the same.
func TestInvariants(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		s, twin := &State{}, &State{}
		for range rapid.IntRange(1, 40).Draw(r, "n") {
			q := Request{
				Kind: rapid.SampledFrom([]Kind{KindOut, KindOut, KindOut, KindOut, KindReserve, KindRelease, KindNexusLoss, KindReset, KindPurge}).Draw(r, "kind"),
				SA:   rapid.IntRange(0, 7).Draw(r, "sa"), Type: rapid.SampledFrom(scsi.PRTypes).Draw(r, "type"),
				Nexus: nexus(rapid.IntRange(1, 3).Draw(r, "who")),
				Param: &scsi.PROut{
					Key: rapid.Uint64Range(0, 3).Draw(r, "key"), NewKey: rapid.Uint64Range(0, 3).Draw(r, "new"), Unregister: rapid.Bool().Draw(r, "unreg"),
					AllTGPT: rapid.Bool().Draw(r, "all"), Port: 1, IDs: []scsi.TransportID{nexus(rapid.IntRange(1, 3).Draw(r, "to")).ID},
				},
				Names: []string{"iqn.h1"},
			}
			if q.SA != scsi.SARegisterAndMove {
				q.Param.IDs = nil
			}
			before := s.Clone()
			res := s.Apply(q)
			if res.Status != scsi.StatusGood {
				if d := cmp.Diff(before, s); d != "" {
					r.Fatalf("refused and changed: %s", d)
				}
			}
			if d := cmp.Diff(res, twin.Apply(q)); d != "" {
				r.Fatalf("not deterministic: %s", d)
			}
			if s.Type != 0 {
				if len(s.Registrations) == 0 {
					r.Fatal("a reservation without registrants")
				}
				if !s.Type.AllRegistrants() && (s.Holder == nil || s.find(*s.Holder) == nil) {
					r.Fatalf("the holder is not registered: %+v", s)
				}
			}
			for _, g := range s.Registrations {
				if g.Key == 0 {
					r.Fatal("key 0 is registered")
				}
			}
			for _, n := range res.Notify {
				if n.Nexus == q.Nexus && q.Kind == KindOut {
					r.Fatalf("the requester is told of its own change: %+v", res)
				}
			}
		}
		j, err := json.Marshal(s)
		if err != nil {
			r.Fatal(err)
		}
		var back State
		if err := json.Unmarshal(j, &back); err != nil {
			r.Fatal(err)
		}
		if back.Registrations == nil {
			back.Registrations = s.Registrations[:0]
		}
		if s.Registrations == nil {
			s.Registrations = back.Registrations
		}
		if d := cmp.Diff(s, &back); d != "" {
			r.Fatal(d)
		}
	})
}
