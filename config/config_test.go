package config

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPrintedDefaultReadsBack(t *testing.T) {
	var b bytes.Buffer
	want := Default()
	if err := Print(&b, want); err != nil {
		t.Fatal(err)
	}
	want.Name = "n1"
	got, err := Parse("x", append([]byte(nil), bytes.Replace(b.Bytes(), []byte(`name = ""`), []byte(`name = "n1"`), 1)...))
	if err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	for _, k := range known() {
		if !strings.Contains(b.String(), k[strings.LastIndex(k, ".")+1:]) {
			t.Errorf("key %s is not printed", k)
		}
	}
}

func TestErrorsNameTheLine(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"unknown key", "name = \"n1\"\n\n[listen]\nrapt = \"x\"\n", "f:4: listen.rapt: unknown key; did you mean listen.raft?"},
		{"wrong table", "name = \"n1\"\napi = \"x\"\n", "f:2: api: unknown key; did you mean listen.api?"},
		{"syntax", "name = \"n1\"\nprofile = \n", "f:2: profile"},
		{"type", "name = 3\n", "f:1: name"},
		{"value", "name = \"n1\"\nprofile = \"slow\"\n", "f:2: profile: \"slow\": must be one of fast, normal, wan"},
		{"duration", "name = \"n1\"\n[lease]\nttl = \"2 sec\"\n", "f:3: lease.ttl"},
		{"renew too slow", "name = \"n1\"\n[lease]\nrenew = \"1s\"\n", "f:3: lease.renew: 1s: must be 20ms to a quarter"},
		{"witness", "name = \"n1\"\n[roles]\nwitness = true\n", "f:3: roles.witness"},
		{"port", "name = \"n1\"\n[listen]\napi = \":0\"\n", "f:3: listen.api"},
		{"name", "name = \"n 1\"\n", "f:1: name: \"n 1\""},
		{"relative", "name = \"n1\"\ndata_dir = \"x\"\n", "f:2: data_dir"},
		{"same port", "name = \"n1\"\n[listen]\napi = \":1\"\nraft = \":1\"\n", "f:4: listen.raft: \":1\" is taken by listen.api"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("f", []byte(c.in))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestEveryFaultIsReportedAtOnce(t *testing.T) {
	_, err := Parse("f", []byte("name = \"n1\"\nprofile = \"x\"\nbogus = 1\n[log]\nlevel = \"loud\"\n"))
	for _, want := range []string{"f:2: profile", "f:3: bogus", "f:5: log.level"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

func TestTimesOfProfiles(t *testing.T) {
	for p, want := range map[string]Times{
		"fast":   {TTL: time.Second, Renew: 100 * time.Millisecond, TOrphan: 10 * time.Second, Heartbeat: 200 * time.Millisecond},
		"normal": {TTL: 2 * time.Second, Renew: 200 * time.Millisecond, TOrphan: 10 * time.Second, Heartbeat: 500 * time.Millisecond},
		"wan":    {TTL: 10 * time.Second, Renew: time.Second, TOrphan: 10 * time.Second, Heartbeat: 2 * time.Second},
	} {
		c := Default()
		c.Profile = p
		if d := cmp.Diff(want, c.Times()); d != "" {
			t.Errorf("%s: %s", p, d)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("name = \"n1\"\n[listen]\napi = \":1\"\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse("f", b)
		if err == nil && c.Validate() != nil {
			t.Fatalf("accepted but not valid: %v", c.Validate())
		}
	})
}
