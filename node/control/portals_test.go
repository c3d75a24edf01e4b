package control

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

// What is listed is what the records say, with the state that the node says; and
// nothing is known of a node that says nothing.
func TestPortalsOf(t *testing.T) {
	t.Parallel()
	rec := func(name string, index int, added ...string) *members.Record {
		return &members.Record{Name: name, Index: index, Roles: members.Roles{Storage: true}, Addresses: members.Addresses{ISCSI: []string{"10.0.0.1:3260"}}, Portals: added}
	}
	w := &members.Record{Name: "w", Index: 3, Roles: members.Roles{Witness: true}, Addresses: members.Addresses{ISCSI: []string{"10.0.0.3:3260"}}}
	p := picture{Members: &members.State{Members: map[string]*members.Record{"n1": rec("n1", 1, "10.0.0.2:3260", "10.0.0.4:3260"), "n2": rec("n2", 2, "10.0.0.5:3260"), "w": w}},
		Leases: map[string]leasePicture{"n1": {Workers: map[string]api.Worker{"storage": {State: "serving", Portals: []api.Portal{
			{Node: "n1", Address: "0.0.0.0:3260", From: "file", State: "open"},
			{Node: "n1", Address: "10.0.0.2:3260", From: "cluster", State: "failed", Error: "held"},
			{Node: "n1", Address: "10.0.0.9:3260", From: "cluster", State: "open"}, // taken away meanwhile
		}}}}}}
	want := []api.Portal{
		{Node: "n1", Address: "10.0.0.1:3260", From: "file", State: "open"},
		{Node: "n1", Address: "10.0.0.2:3260", From: "cluster", State: "failed", Error: "held"},
		{Node: "n1", Address: "10.0.0.4:3260", From: "cluster", State: "opening"},
		{Node: "n2", Address: "10.0.0.1:3260", From: "file", State: "unknown"},
		{Node: "n2", Address: "10.0.0.5:3260", From: "cluster", State: "unknown"},
	}
	if diff := cmp.Diff(want, portalsOf(p)); diff != "" {
		t.Error(diff)
	}
	p.Stale = true
	for _, x := range portalsOf(p) {
		if x.State != "unknown" || x.Error != "" {
			t.Errorf("of a stale picture: %+v", x)
		}
	}
}
