package clusterconf

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	p := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.WriteFile(p, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", p, diff)
	}
}

func full(t *testing.T) *Config {
	t.Helper()
	b, err := os.ReadFile("testdata/full.conf")
	if err != nil {
		t.Fatal(err)
	}
	c, warn, err := Parse("full.conf", b, Options{})
	if err != nil || len(warn) > 0 {
		t.Fatalf("%v, %v", warn, err)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestParse(t *testing.T) {
	t.Parallel()
	c := full(t)
	if c.Name != "alpha" || c.Version != 42 || c.Cman.TwoNode || c.Cman.ExpectedVotes != 3 || c.Cman.Multicast != "239.192.0.1" || c.Totem.Token != 21*time.Second || c.Lease() != 21*time.Second {
		t.Errorf("%+v %+v", c.Cman, c.Totem)
	}
	q := *c.Quorumd
	q.Attrs = nil
	want := Quorumd{Line: 8, Interval: time.Second, TKO: 10, Votes: 1, MinScore: 2, Label: "qdisk", Heuristics: []Heuristic{
		{9, "ping -c1 -w1 192.0.2.254", 2, 2 * time.Second, 3}, {10, `test -e "/run/ok"`, 1, 2 * time.Second, 1}}}
	if diff := cmp.Diff(want, q); diff != "" {
		t.Error(diff)
	}
	n, ok := c.Node("n1")
	if !ok || n.ID != 1 || n.Votes != 1 || len(n.Methods) != 2 || n.Methods[0].Name != "power" || len(n.Methods[0].Uses) != 4 {
		t.Fatalf("%+v", n)
	}
	if diff := cmp.Diff(Use{23, "pdu2", Attrs{{"port", "1"}, {"action", "on"}}}, n.Methods[0].Uses[3]); diff != "" {
		t.Error(diff)
	}
	// A tag over several lines counts from its first.
	if n, _ = c.Node("n2"); n.Line != 28 || n.Weight != "3" || n.AltNames[0] != "n2-b" || n.Unfence[0].Device != "scsi" {
		t.Errorf("%+v", n)
	}
	d, ok := c.Device("pdu1")
	if v, _ := d.Args.Get("passwd"); !ok || d.Agent != "fence_apc" || v != "a&b <c>" {
		t.Errorf("%+v", d)
	}
	if h, _ := c.Device("human"); !h.Manual() || d.Manual() {
		t.Error("fence_manual is not seen")
	}
	if diff := cmp.Diff(map[string]string{"ipaddr": "192.0.2.1", "login": "apc"}, d.Args.Map("passwd")); diff != "" {
		t.Error(diff)
	}
	if len(c.RM.Services) != 2 || c.RM.Services[0].Domain != "db" || c.RM.Domains[0].Nodes[1].Priority != 2 || len(c.RM.Resources) != 2 {
		t.Errorf("%+v", c.RM)
	}
}

func TestExport(t *testing.T) {
	t.Parallel()
	c := full(t)
	out := c.Export()
	golden(t, "full.export", string(out))
	again, warn, err := Parse("again", out, Options{})
	if err != nil || len(warn) > 0 {
		t.Fatalf("%v, %v", warn, err)
	}
	if diff := cmp.Diff(string(out), string(again.Export())); diff != "" {
		t.Error(diff)
	}
}

// What becomes of each option (facts §9).
func TestNotes(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	for _, n := range full(t).Notes(map[string]bool{"n1": true}) {
		fmt.Fprintln(&b, n)
	}
	golden(t, "full.notes", b.String())
}

const two = `<cluster name="a" config_version="1"><cman two_node="1" expected_votes="1"/>
<clusternodes><clusternode name="n1" nodeid="1">%[1]s</clusternode><clusternode name="n2" nodeid="2">%[1]s</clusternode></clusternodes>
<fencedevices><fencedevice name="scsi" agent="fence_scsi"/><fencedevice name="apc" agent="/usr/sbin/fence_apc"/></fencedevices></cluster>`

func TestTwoNode(t *testing.T) {
	t.Parallel()
	for dev, want := range map[string]Weight{"scsi": Changed, "apc": Refused} {
		c, _, err := Parse("f", []byte(fmt.Sprintf(two, `<fence><method name="1"><device name="`+dev+`"/></method></fence>`)), Options{})
		if err != nil || c.Validate() != nil {
			t.Fatal(err)
		}
		var got []Note
		for _, n := range c.Notes(map[string]bool{"n1": true}) {
			if n.What == "two_node=1" {
				got = append(got, n)
			}
		}
		if len(got) != 1 || got[0].Weight != want {
			t.Errorf("%s: %v", dev, got)
		}
	}
}

func TestNoMethod(t *testing.T) {
	t.Parallel()
	c, _, err := Parse("f", []byte(fmt.Sprintf(two, "")), Options{})
	if err != nil {
		t.Fatal(err)
	}
	text := func(i map[string]bool) string {
		var s []string
		for _, n := range c.Notes(i) {
			if strings.HasPrefix(n.What, "no fence method") {
				s = append(s, n.Text)
			}
		}
		return strings.Join(s, "|")
	}
	if got := text(map[string]bool{"n1": true}); got != "it is cut off at the targets|its failure waits for an operator (clusteradm fence_manual n2)" {
		t.Error(got)
	}
	if got := text(nil); !strings.Contains(got, "if it has an initiator name") {
		t.Error(got)
	}
}

// Each mistake is found, with its line.
func TestErrors(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("testdata/full.conf")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, to, want string }{
		{`post_join_delay="20"`, `post_join_dealy="20"`, `f:12: <fence_daemon> has no attribute post_join_dealy; is it post_join_delay?`},
		{`<gfs_controld enable`, `<gfs_contrld enable`, `f:14: <cluster> has no element <gfs_contrld>; is it gfs_controld?`},
		{`nodeid="3"`, ``, `f:36: <clusternode> needs the attribute nodeid`},
		{`nodeid="3"`, `nodeid="two"`, `f:36: <clusternode> nodeid="two": a whole number from 1 on is needed`},
		{`token="21000"`, `token="-1"`, `f:7: <totem> token="-1"`},
		{`ordered="1"`, `ordered="maybe"`, `f:46: <failoverdomain> ordered="maybe": 0 or 1 is needed`},
		{`config_version="42"`, `config_version="0"`, `f:3: <cluster> config_version="0"`},
		{`<dlm log`, `<dlm/><dlm log`, `f:13: <cluster> has the element <dlm> twice`},
		{`nodeid="3"`, `nodeid="3" nodeid="4"`, `f:36: <clusternode> has the attribute nodeid twice`},
		{`</cluster>`, ``, `f:63: unexpected EOF`},
		{`<clusternodes>`, `<clusternodes>hello`, `f:16: text in <clusternodes>`},
		{`<clusternodes>`, `<clusternodes><x:clusternode/>`, `f:16: <clusternodes> has no element <x:clusternode>`},
		{`<cluster name`, `<klaster name`, `f:`},
		// Validate.
		{`nodeid="3"`, `nodeid="2"`, `f:36: nodes n2 and n3 have the same nodeid 2`},
		{`name="n3"`, `name="n2"`, `f:36: node n2 is there twice`},
		{`<device name="pdu2" port="1" action="off"/>`, `<device name="pdu9"/>`, `f:21: method power of node n1: no fencedevice is called pdu9`},
		{`<unfence><device name="scsi"`, `<unfence><device name="s"`, `f:34: unfence of node n2: no fencedevice is called s`},
		{`agent="fence_scsi"`, `agent="scsi"`, `f:41: fence device scsi: "scsi" is no name of a fence agent`},
		{`name="pdu2" agent`, `name="pdu1" agent`, `f:40: fence device pdu1 is there twice`},
		{`<method name="hand">`, `<method name="power">`, `f:25: node n1 has the method power twice`},
		{`expected_votes="3"`, `expected_votes="1" two_node="1"`, `f:4: two_node=1 needs expected_votes=1 and two nodes; there are 3`},
		{`label="qdisk"`, ``, `f:8: <quorumd> needs device or label`},
		{`min_score="2"`, `min_score="9"`, `f:8: min_score 9 is more than all heuristics together have (3)`},
		{`<failoverdomainnode name="n2"`, `<failoverdomainnode name="n7"`, `f:46: failover domain db: no node is called n7`},
		{`domain="db"`, `domain="dx"`, `f:56: service:mysql: no failover domain is called dx`},
		{`<fs ref="data">`, `<fs ref="dat">`, `f:57: <fs ref="dat">: there is no such resource`},
		{`depend="service:mysql"`, `depend="mysql"`, `f:60: service web depends on mysql`},
		{`recovery="relocate"`, `recovery="pray"`, `f:56: service mysql: recovery="pray"`},
		{`name="alpha"`, `name="al pha"`, `f:3: the cluster's name "al pha"`},
	} {
		if strings.Count(string(b), c.from) < 1 {
			t.Fatalf("%q is not in the file", c.from)
		}
		conf, _, err := Parse("f", []byte(strings.Replace(string(b), c.from, c.to, 1)), Options{})
		if err == nil {
			err = conf.Validate()
		}
		var e *Error
		if err == nil || !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s → %s:\n got %v\nwant %s", c.from, c.to, err, c.want)
		}
	}
}

func TestLenient(t *testing.T) {
	t.Parallel()
	b := []byte("<cluster name='a' config_version='1' nmae='b'>\n<cmann/><clusternodes><clusternode name='n1' nodeid='1'/></clusternodes></cluster>")
	c, warn, err := Parse("f", b, Options{Lenient: true})
	if err != nil || len(warn) != 2 || warn[0].Line != 1 || warn[1].Line != 2 || strings.Contains(string(c.Export()), "cmann") {
		t.Errorf("%v, %v", warn, err)
	}
	if _, _, err := Parse("f", b, Options{}); err == nil || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("%v", err)
	}
	// What is missing is missing for the lenient too.
	if _, _, err := Parse("f", []byte("<cluster/>"), Options{Lenient: true}); err == nil {
		t.Error("a cluster without a name")
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]string{
		"size": strings.Repeat(" ", MaxFile+1), "depth": strings.Repeat("<cluster>", maxDepth+1), "empty": "", "two": "<cluster/><cluster/>",
		"entity": `<!DOCTYPE x [<!ENTITY a "aaaa">]><cluster name="&a;" config_version="1"/>`, "encoding": `<?xml version="1.0" encoding="utf-16"?><cluster/>`,
	} {
		if _, _, err := Parse("f", []byte(s), Options{}); err == nil {
			t.Errorf("%s is read", name)
		}
	}
	if !NotXML([]byte("<a>")) || !NotXML(nil) || NotXML([]byte("<a/>")) {
		t.Error("NotXML")
	}
}

func FuzzParse(f *testing.F) {
	b, err := os.ReadFile("testdata/full.conf")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(fmt.Sprintf(two, "")))
	f.Add([]byte("<cluster name='a' config_version='1'>\r\n<rm><service name=' a&#10;b'/></rm></cluster>"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, lenient := range []bool{false, true} {
			c, _, err := Parse("f", b, Options{Lenient: lenient})
			if err != nil {
				continue
			}
			_ = c.Validate()
			_ = c.Notes(nil)
			out := c.Export()
			again, _, err := Parse("f", out, Options{})
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if string(again.Export()) != string(out) {
				t.Fatalf("%s\n%s", out, again.Export())
			}
		}
	})
}
