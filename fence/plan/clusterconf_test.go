package plan

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/blockhouse-san/blockhouse/config/clusterconf"
)

// The off, off, on, on of an old file stays what it is.
func TestFromClusterConf(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../../config/clusterconf/testdata/full.conf")
	if err != nil {
		t.Fatal(err)
	}
	c, _, err := clusterconf.Parse("full.conf", b, clusterconf.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for node, want := range map[string]string{
		"n1": "power agent\n  off pdu1:1\n  off pdu2:1\n  on pdu1:1 (if possible)\n  on pdu2:1 (if possible)\nhand manual\n",
		"n2": "san agent\n  off scsi\n", "n3": "",
	} {
		methods, devices, err := FromClusterConf(c, node)
		if err != nil {
			t.Fatal(err)
		}
		for i := range devices {
			devices[i].Actions = powerActions
			if devices[i].Agent == "fence_scsi" {
				devices[i].Actions = fabricActions
			}
		}
		p, err := New(node, methods, devices, Reboot)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, show(p)); diff != "" {
			t.Errorf("%s:\n%s", node, diff)
		}
		if node == "n1" && p.Methods[0].Steps[0].Params["passwd"] != "a&b <c>" {
			t.Errorf("%+v", p.Methods[0].Steps[0])
		}
	}
	if _, _, err := FromClusterConf(c, "n9"); err == nil {
		t.Error("an unknown node")
	}
}
