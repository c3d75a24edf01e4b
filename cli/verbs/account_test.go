package verbs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/api"
)

var sampleAccount = api.Account{Name: "clyde", Created: 40, Bindings: []api.Binding{{Target: "discovery", Direction: "incoming"},
	{Target: "iqn.2026-11.io.blockhouse:demo:disks", Direction: "outgoing"}}}

// A secret comes from a file or from standard input, to its last byte but the
// end of the line, and is shown nowhere.
func TestAccountCreate(t *testing.T) {
	t.Parallel()
	const secret = " s3cret with blanks "
	file := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ stdin, args string }{{secret, ""}, {secret + "\r\n", ""}, {secret + "\n", " --secret-file -"}, {"", " --secret-file " + file}} {
		for _, format := range []string{"table", "json"} {
			f := newFake(t, sample())
			got := f.run(t, c.stdin, strings.Fields("account create clyde -o "+format+c.args)...)
			if got.code != 0 || strings.Contains(got.out+got.err, "s3cret") {
				t.Fatalf("%+v: %+v", c, got)
			}
			r := f.requests()
			if len(r) != 1 || r[0].Line != "POST /v1/accounts" || r[0].Body["secret"] != secret || r[0].Body["name"] != "clyde" {
				t.Fatalf("%+v: asked %+v", c, r)
			}
			if id, _ := r[0].Body["request_id"].(string); len(id) != 36 {
				t.Fatalf("request id %q", id)
			}
		}
	}
	f := newFake(t, nil)
	for stdin, want := range map[string]string{"": "one line", "a\nb\n": "one line", "\n": "one line"} {
		if got := f.run(t, stdin, "account", "create", "clyde"); got.code != 2 || !strings.Contains(got.err, want) {
			t.Errorf("%q: %+v", stdin, got)
		}
	}
	if got := f.run(t, "", "account", "create", "clyde", "--secret-file", file+"x"); got.code != 2 || !strings.Contains(got.err, "no such file") {
		t.Errorf("%+v", got)
	}
	// There is no flag and no argument for it.
	if got := f.run(t, "", "account", "create", "clyde", "s3cret"); got.code != 2 {
		t.Errorf("a secret on the command line: %+v", got)
	}
	if r := f.requests(); len(r) != 0 {
		t.Errorf("asked %+v", r)
	}
}

func TestAccountWarning(t *testing.T) {
	t.Parallel()
	ans := sample()
	w := sampleAccount
	w.Warning = "the secret of clyde has 6 bytes"
	ans["POST /v1/accounts"], ans["POST /v1/bindings"] = w, w
	f := newFake(t, ans)
	for _, args := range []string{"account create clyde", "account bind clyde discovery"} {
		got := f.run(t, "123456", strings.Fields(args)...)
		if got.code != 0 || !strings.HasPrefix(got.err, "warning: the secret of clyde") {
			t.Errorf("%s: %+v", args, got)
		}
	}
}
