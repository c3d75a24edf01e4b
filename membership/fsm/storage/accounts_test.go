package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/block/replica"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

type everybody struct{}

func (everybody) IsStorage(string) bool { return true }

// run applies commands to a machine; a refusal must leave the state as it was.
type run struct {
	t *testing.T
	m *Machine
	n uint64
}

func newRun(t *testing.T) *run {
	r := &run{t: t, m: New(everybody{})}
	for i, iqn := range []string{"iqn.2026-01.org.x:a", "iqn.2026-01.org.x:b"} {
		r.ok(&TargetCreate{Request: iqn, IQN: iqn, TID: i + 1})
	}
	return r
}

func (r *run) dump() string {
	var b bytes.Buffer
	if err := r.m.Snapshot(&b); err != nil {
		r.t.Fatal(err)
	}
	return b.String()
}

func (r *run) apply(c any) (any, error) {
	if v, ok := c.(fsm.Validator); ok {
		if err := v.Validate(); err != nil {
			return nil, err
		}
	}
	r.n++
	return r.m.Apply(r.n, c)
}

func (r *run) ok(c any) any {
	r.t.Helper()
	v, err := r.apply(c)
	if err != nil {
		r.t.Fatalf("%T: %v", c, err)
	}
	return v
}

func (r *run) refused(c any, kind error, text string) {
	r.t.Helper()
	before := r.dump()
	_, err := r.apply(c)
	if !errors.Is(err, kind) || !strings.Contains(err.Error(), text) {
		r.t.Fatalf("%T: %v, want %v with %q", c, err, kind, text)
	}
	if diff := cmp.Diff(before, r.dump()); diff != "" {
		r.t.Fatalf("%T was refused and changed the state: %s", c, diff)
	}
}

func acct(name string) *AccountCreate {
	return &AccountCreate{Request: "r-" + name, Name: name, Sealed: bytes.Repeat([]byte{7}, 40), Key: "0011223344556677"}
}

func TestAccounts(t *testing.T) {
	t.Parallel()
	const a, b = "iqn.2026-01.org.x:a", "iqn.2026-01.org.x:b"
	r := newRun(t)
	r.ok(acct("christina"))
	before := r.dump()
	r.ok(acct("christina")) // the same request again
	if r.dump() != before {
		t.Fatal("a repeated request changed the state")
	}
	other := acct("christina")
	other.Request = "another"
	r.refused(other, fsm.ErrExists, "already exists")
	wrong := acct("clyde")
	wrong.Key = "8899aabbccddeeff"
	r.refused(wrong, fsm.ErrConflict, "sealed with key")
	r.ok(acct("clyde"))
	if got := r.m.State().ListAccounts(); len(got) != 2 || got[0].Name != "clyde" {
		t.Fatalf("newest first: %+v", got)
	}

	r.refused(&AccountBind{Target: a, Name: "nobody"}, fsm.ErrNotFound, "no such account")
	r.refused(&AccountBind{Target: "iqn.x:none", Name: "clyde"}, fsm.ErrNotFound, "no such target")
	r.ok(&AccountBind{Target: a, Name: "christina"})
	r.refused(&AccountBind{Target: a, Name: "christina"}, fsm.ErrExists, "it is bound")
	r.refused(&AccountBind{Target: a, Name: "christina", Outgoing: true}, fsm.ErrRefused, "both")
	r.ok(&AccountBind{Target: a, Name: "clyde", Outgoing: true})
	r.refused(&AccountBind{Target: a, Name: "clyde", Outgoing: true}, fsm.ErrConflict, "already has the outgoing account")
	r.refused(&AccountBind{Target: a, Name: "clyde"}, fsm.ErrRefused, "both")
	r.ok(&AccountBind{Name: "clyde"})
	r.ok(&AccountBind{Target: b, Name: "clyde"})
	r.ok(&AccountBind{Target: b, Name: "christina"})

	s := r.m.State()
	if got := s.Targets[a].Auth; !slices.Equal(got.Incoming, []string{"christina"}) || got.Outgoing != "clyde" {
		t.Fatalf("%+v", got)
	}
	if !slices.Equal(s.Discovery.Incoming, []string{"clyde"}) {
		t.Fatalf("%+v", s.Discovery)
	}
	s.Targets[a].Auth.Incoming[0] = "evil"
	s.Accounts["clyde"].Sealed[0] = 99
	if x := r.m.State(); x.Targets[a].Auth.Incoming[0] == "evil" || x.Accounts["clyde"].Sealed[0] == 99 {
		t.Fatal("a reader changed the state")
	}

	// Taking the only account away would open the target.
	r.refused(&AccountDelete{Name: "christina"}, fsm.ErrRefused, "only account of "+a)
	r.refused(&AccountDelete{Name: "clyde"}, fsm.ErrRefused, "only account of discovery")
	r.refused(&AccountUnbind{Target: a, Name: "clyde"}, fsm.ErrNotFound, "not bound")
	r.refused(&AccountUnbind{Target: b, Name: "clyde", Outgoing: true}, fsm.ErrNotFound, "not bound")
	r.ok(&AccountUnbind{Target: b, Name: "clyde"})
	r.ok(&AccountDelete{Name: "clyde", Force: true})
	s = r.m.State()
	if s.Targets[a].Auth.Outgoing != "" || len(s.Discovery.Incoming) != 0 || s.Accounts["clyde"] != nil {
		t.Fatalf("%+v", s)
	}
	r.refused(&AccountDelete{Name: "clyde"}, fsm.ErrNotFound, "no such account")

	// A snapshot brings all of it back, and one of the version before is read.
	m := New(everybody{})
	dump := r.dump()
	put, err := m.Restore(2, strings.NewReader(dump))
	if err != nil {
		t.Fatal(err)
	}
	put()
	if diff := cmp.Diff(r.m.State(), m.State()); diff != "" {
		t.Fatal(diff)
	}
	old := `{"volumes":{},"targets":{},"gone":{},"generation":3}`
	if put, err = m.Restore(1, strings.NewReader(old)); err != nil {
		t.Fatal(err)
	}
	put()
	if m.State().Generation != 3 || m.State().SealingKey() != "" {
		t.Fatalf("%+v", m.State())
	}
}

func TestAccountRules(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]fsm.Validator{
		"no name":      &AccountCreate{Request: "r", Sealed: make([]byte, 40), Key: "0011223344556677"},
		"blank":        &AccountCreate{Request: "r", Name: "a b", Sealed: make([]byte, 40), Key: "0011223344556677"},
		"no secret":    &AccountCreate{Request: "r", Name: "a", Key: "0011223344556677"},
		"a bare one":   &AccountCreate{Request: "r", Name: "a", Sealed: []byte("123456"), Key: "0011223344556677"},
		"no key":       &AccountCreate{Request: "r", Name: "a", Sealed: make([]byte, 40)},
		"no request":   &AccountCreate{Name: "a", Sealed: make([]byte, 40), Key: "0011223344556677"},
		"long name":    &AccountCreate{Request: "r", Name: strings.Repeat("a", 256), Sealed: make([]byte, 40), Key: "0011223344556677"},
		"bind no name": &AccountBind{},
		"param name":   &TargetSet{Params: map[string]string{"": "1"}},
		"param value":  &TargetSet{Params: map[string]string{"x": "a\nb"}},
	} {
		if c.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestTargetAndLunSet(t *testing.T) {
	t.Parallel()
	const a = "iqn.2026-01.org.x:a"
	r := newRun(t)
	yes, no := true, false
	g := r.m.s.Targets[a].Generation
	r.ok(&TargetSet{Target: a, Params: map[string]string{"MaxBurstLength": "524288", "nop_count": "3"}, Offline: &yes})
	r.ok(&TargetSet{Target: a, Params: map[string]string{"nop_count": ""}})
	x := r.m.State().Targets[a]
	if !x.Offline || !cmp.Equal(x.Params, map[string]string{"MaxBurstLength": "524288"}) || x.Generation <= g {
		t.Fatalf("%+v", x)
	}
	r.ok(&TargetSet{Target: a, Params: map[string]string{"MaxBurstLength": ""}, Offline: &no})
	if x = r.m.State().Targets[a]; x.Offline || x.Params != nil {
		t.Fatalf("%+v", x)
	}
	r.refused(&TargetSet{Target: "iqn.x:none"}, fsm.ErrNotFound, "no such target")
	r.refused(&LunSet{Target: a, Number: 1, ReadOnly: &yes}, fsm.ErrNotFound, "no LUN 1")
	r.ok(&LunCreateVolume{Request: "l", Volume: volumeAt(t, "v1", 1, ""), Target: a, Number: 1})
	r.ok(&LunSet{Target: a, Number: 1, ReadOnly: &yes, Removable: &yes})
	if l := r.m.State().Targets[a].LUNs[1]; !l.ReadOnly || !l.Removable {
		t.Fatalf("%+v", l)
	}
	r.ok(&LunSet{Target: a, Number: 1, ReadOnly: &no})
	if l := r.m.State().Targets[a].LUNs[1]; l.ReadOnly || !l.Removable {
		t.Fatalf("%+v", l)
	}
}

func volumeAt(t *testing.T, name string, seed byte, store string, nodes ...string) NewVolume {
	if nodes == nil {
		nodes = []string{"n1"}
	}
	id := uuid.NewSHA1(uuid.NameSpaceOID, []byte{seed})
	ident, err := NewIdentity(id, bytes.NewReader(bytes.Repeat([]byte{seed}, 32)))
	if err != nil {
		t.Fatal(err)
	}
	return NewVolume{Name: name, Identity: ident, Store: store,
		Config: replica.Config{UUID: id.String(), Size: 1 << 20, BlockSize: 512, Epoch: 1, Primary: nodes[0], ISR: nodes, Lineage: "l"}}
}

func TestStores(t *testing.T) {
	t.Parallel()
	r := newRun(t)
	r.ok(&VolumeCreate{Request: "1", Volume: volumeAt(t, "v1", 1, "file:/srv/a.img")})
	r.refused(&VolumeCreate{Request: "2", Volume: volumeAt(t, "v2", 2, "file:/srv/a.img")}, fsm.ErrConflict, "is the store of volume v1")
	r.ok(&VolumeCreate{Request: "3", Volume: volumeAt(t, "v3", 3, "file:/srv/a.img", "n2")}) // another disk
	r.ok(&VolumeCreate{Request: "4", Volume: volumeAt(t, "v4", 4, "block:/dev/sda5")})
	if v := r.m.State().VolumeByName("v4"); v.Store != "block:/dev/sda5" {
		t.Fatalf("%+v", v)
	}
	for n, same := range []string{"file:/srv/a.img?cache=sync", "file:/srv//x/../a.img", "block:/dev/sda5", "powercut:file:/srv/a.img"} {
		want := map[string]string{"block:/dev/sda5": "volume v4"}[same]
		if want == "" {
			want = "volume v1"
		}
		r.refused(&VolumeCreate{Request: "s" + same, Volume: volumeAt(t, "same", byte(20+n), same)}, fsm.ErrConflict, want)
	}
	// An export is one store for all nodes, memory is nobody's.
	r.ok(&VolumeCreate{Request: "5", Volume: volumeAt(t, "v5", 5, "nbd://h:10809/x")})
	r.refused(&VolumeCreate{Request: "6", Volume: volumeAt(t, "v6", 6, "nbd://h:10809/x?reconnect=5s", "n2")}, fsm.ErrConflict, "volume v5")
	r.ok(&VolumeCreate{Request: "7", Volume: volumeAt(t, "v7", 7, "mem:")})
	with := volumeAt(t, "v8", 8, "mem:")
	r.ok(&VolumeCreate{Request: "8", Volume: with})
	if with.Integrity = true; with.Validate() == nil {
		t.Error("checksums in memory")
	}
	with = volumeAt(t, "v10", 10, "")
	with.Integrity = true
	r.ok(&VolumeCreate{Request: "10", Volume: with})
	if !r.m.State().VolumeByName("v10").Integrity {
		t.Error("integrity is not recorded")
	}
	for _, bad := range []string{"/srv/a.img", "file:", "file:a", "nbd:/x", "nbd://H/x", "file:/a?integrity=on", "file:/a?cache=none", "file:/a\x00b", "file:" + "/" + strings.Repeat("x", 4096)} {
		v := volumeAt(t, "v9", 9, bad)
		if v.Validate() == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
	v := volumeAt(t, "v9", 9, "file:/srv/b", "n1", "n2")
	if v.Validate() == nil {
		t.Error("two copies in one file")
	}
	b, err := json.Marshal(volumeAt(t, "v9", 9, ""))
	if err != nil || bytes.Contains(b, []byte("store")) {
		t.Fatalf("a volume without a store needs no new field: %s, %v", b, err)
	}
}
