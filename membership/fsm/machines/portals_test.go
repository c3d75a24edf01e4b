package machines_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

func TestPortals(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	l.join("n2") // 127.0.0.1:3260 is of the file, :7001 is Raft's
	add := func(a string) members.PortalAdd { return members.PortalAdd{Node: "n2", Address: a} }
	was := l.member("n2")
	for _, a := range []string{"127.0.0.9:3260", "[fd00::1]:3260", "127.0.0.8:3261", "0.0.0.0:4000"} {
		must[members.Record](l, add(a))
	}
	if got := l.member("n2"); !slices.Equal(got.Portals, []string{"0.0.0.0:4000", "127.0.0.8:3261", "127.0.0.9:3260", "[fd00::1]:3260"}) || got.Changed != was.Changed {
		t.Fatalf("%+v", got)
	}
	before := hash(t, l.c)
	for _, tc := range []struct {
		c    fsm.Command
		kind error
		exit int
		text string
	}{
		{add("127.0.0.9:3260"), fsm.ErrExists, 4, "was added before"},
		{add("127.0.0.1:3260"), fsm.ErrExists, 4, "in the file"},
		{add("0.0.0.0:3261"), fsm.ErrConflict, 4, "127.0.0.8:3261"},
		{add("[::]:3260"), fsm.ErrConflict, 4, "excludes it"},
		{add("10.0.0.1:4000"), fsm.ErrConflict, 4, "0.0.0.0:4000"},
		{add("10.0.0.1:7001"), fsm.ErrRefused, 9, "raft address"},
		{members.PortalAdd{Node: "n9", Address: "10.0.0.1:1"}, fsm.ErrNotFound, 3, "no such node"},
		{members.PortalRemove{Node: "n9", Address: "10.0.0.1:1"}, fsm.ErrNotFound, 3, "no such node"},
		{members.PortalRemove{Node: "n2", Address: "10.0.0.1:1"}, fsm.ErrNotFound, 3, "no such portal"},
		{members.PortalRemove{Node: "n1", Address: "127.0.0.9:3260"}, fsm.ErrNotFound, 3, "no such portal"},
		{members.PortalRemove{Node: "n2", Address: "127.0.0.1:3260"}, fsm.ErrRefused, 9, "listen.iscsi"},
	} {
		l.refused(tc.c, tc.kind, tc.exit)
		if err := l.apply(tc.c).Err; !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%+v: %v, want %q", tc.c, err, tc.text)
		}
	}
	if hash(t, l.c) != before {
		t.Fatal("a refusal changed the state")
	}
	// IPv4's wildcard leaves IPv6 alone.
	must[members.Record](l, add("[::1]:4000"))
	must[members.Record](l, members.PortalRemove{Node: "n2", Address: "[::1]:4000"})
	// What a reader gets is its own; a snapshot has it.
	l.c.Read(func(v machines.View) { v.Members.State().Members["n2"].Portals[0] = "evil" })
	if got := restore(t, snapshot(t, l.c)); hash(t, got) != hash(t, l.c) {
		t.Fatal("a restored state differs")
	}
	if l.member("n2").Portals[0] == "evil" {
		t.Fatal("a reader changed the state")
	}
	for _, a := range slices.Clone(l.member("n2").Portals) {
		must[members.Record](l, members.PortalRemove{Node: "n2", Address: a})
	}
	if p := l.member("n2").Portals; p != nil {
		t.Fatalf("%#v", p)
	}
	must[members.Record](l, members.SetRoles{Node: "n2", Roles: members.Roles{Witness: true}})
	l.refused(add("10.0.0.1:3260"), fsm.ErrRefused, 9)
}

func TestCanonicalPortal(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{"10.0.0.1:3260": "10.0.0.1:3260", "[FD00:0::1]:3260": "[fd00::1]:3260", "[::ffff:10.0.0.1]:3260": "10.0.0.1:3260", "[::]:1": "[::]:1"} {
		got, err := members.CanonicalPortal(in)
		if err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
		if c := (&members.PortalAdd{Node: "n", Address: in}); (c.Validate() == nil) != (in == want) {
			t.Errorf("%q: only the one form is recorded: %v", in, c.Validate())
		}
	}
	for _, in := range []string{"", "10.0.0.1", "host:3260", ":3260", "10.0.0.1:0", "10.0.0.1:70000", "[fe80::1%eth0]:3260", "224.0.0.1:3260", "[ff02::1]:3260", "255.255.255.255:3260", "999.0.0.1:3260", "fd00::1:3260"} {
		if got, err := members.CanonicalPortal(in); err == nil {
			t.Errorf("%q became %q", in, got)
		}
	}
}
