package verbs

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"gopkg.in/yaml.v3"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/pki"
)

// reads are all commands that only ask, with the document's type.
var reads = []struct {
	name string
	args []string
	typ  func() any // nil: not one of api's documents
}{
	{"status", []string{"status"}, func() any { return &api.Status{} }},
	{"token_list", []string{"token", "list"}, func() any { return &api.List[api.Token]{} }},
	{"node_list", []string{"node", "list"}, func() any { return &api.List[api.Node]{} }},
	{"node_show", []string{"node", "show", "n2"}, func() any { return &api.Node{} }},
	{"quorum_show", []string{"quorum", "show"}, func() any { return &api.Quorum{} }},
	{"volume_list", []string{"volume", "list"}, func() any { return &api.List[api.Volume]{} }},
	{"volume_show", []string{"volume", "show", "v1"}, func() any { return &api.Volume{} }},
	{"target_list", []string{"target", "list"}, func() any { return &api.List[api.Target]{} }},
	{"target_show", []string{"target", "show", iqnPath}, func() any { return &api.Target{} }},
	{"lun_list", []string{"lun", "list"}, func() any { return &api.List[api.LUN]{} }},
	{"lun_show", []string{"lun", "show", iqnPath + "/1"}, nil},
	{"acl_list", []string{"acl", "list"}, nil},
	{"portal_list", []string{"portal", "list"}, func() any { return &api.List[api.Portal]{} }},
	{"account_list", []string{"account", "list"}, func() any { return &api.List[api.Account]{} }},
	{"session_list", []string{"session", "list"}, func() any { return &api.List[api.Session]{} }},
	{"session_show", []string{"session", "show", "n3", "3"}, nil},
	{"reservation_list", []string{"reservation", "list"}, func() any { return &api.List[api.Reservation]{} }},
	{"fence_list", []string{"fence", "list"}, func() any { return &api.List[api.Fence]{} }},
	{"fence_history", []string{"fence", "history"}, func() any { return &api.List[api.FenceEvent]{} }},
	{"events", []string{"events"}, func() any { return &api.Event{} }},
}

func TestReads(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	for _, r := range reads {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			for _, format := range []string{"table", "wide", "json", "yaml", "name"} {
				got := f.run(t, "", append(r.args, "-o", format)...)
				if format == "name" && (r.name == "status" || r.name == "quorum_show" || r.name == "events") {
					if got.code != 2 || got.out != "" {
						t.Errorf("-o name of %s: %+v, want a usage error", r.name, got)
					}
					continue
				}
				if got.code != 0 || got.err != "" {
					t.Fatalf("-o %s: exit %d, stderr %q", format, got.code, got.err)
				}
				golden(t, r.name+"."+format, got.out)
				for i, l := range strings.Split(got.out, "\n") {
					if strings.TrimRight(l, " ") != l {
						t.Errorf("-o %s line %d ends in blanks: %q", format, i+1, l)
					}
				}
				if strings.ContainsRune(got.out, '\x1b') {
					t.Errorf("-o %s: escape sequence in output that is no terminal: %q", format, got.out)
				}
			}
		})
	}
}

// -o json is the very document of package api: decoded strictly (but for
// apiVersion and kind of single objects) it gives what the daemon sent. -o yaml
// is the same document.
func TestJSONIsTheAPI(t *testing.T) {
	t.Parallel()
	ans := sample()
	f := newFake(t, ans)
	for _, r := range reads {
		if r.typ == nil {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			js, ym := f.run(t, "", append(r.args, "-o", "json")...), f.run(t, "", append(r.args, "-o", "yaml")...)
			var doc map[string]any
			if err := json.Unmarshal([]byte(js.out), &doc); err != nil {
				t.Fatal(err)
			}
			if r.name != "events" && doc["apiVersion"] != api.Version {
				t.Errorf("apiVersion is %v", doc["apiVersion"])
			}
			var fromYAML map[string]any
			if err := yaml.Unmarshal([]byte(ym.out), &fromYAML); err != nil {
				t.Fatal(err)
			}
			again, err := json.Marshal(fromYAML)
			if err != nil {
				t.Fatal(err)
			}
			var y map[string]any
			if err := json.Unmarshal(again, &y); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(doc, y); diff != "" {
				t.Errorf("json and yaml differ: %s", diff)
			}

			want := ans["GET "+path(r.name)]
			if r.name == "events" {
				want = sampleEvent
			}
			got := r.typ()
			if err := json.Unmarshal([]byte(js.out), got); err != nil {
				t.Fatal(err)
			}
			gb, _ := json.Marshal(got)
			wb, _ := json.Marshal(want)
			var g, w map[string]any
			_ = json.Unmarshal(gb, &g)
			_ = json.Unmarshal(wb, &w)
			delete(g, "kind") // the list's kind is filled in
			delete(w, "kind")
			if diff := cmp.Diff(w, g); diff != "" {
				t.Errorf("the document lost or changed something (-sent +printed): %s", diff)
			}
		})
	}
}

func path(name string) string {
	return map[string]string{
		"status": api.PathStatus, "token_list": api.PathTokens, "portal_list": api.PathPortals, "node_list": api.PathNodes, "node_show": api.PathNodes + "/n2", "quorum_show": api.PathQuorum,
		"volume_list": api.PathVolumes, "volume_show": api.PathVolumes + "/v1", "target_list": api.PathTargets, "target_show": api.PathTargets + "/" + iqnPath,
		"lun_list": api.PathLUNs, "session_list": api.PathSessions, "reservation_list": api.PathReservations, "account_list": api.PathAccounts, "fence_list": api.PathFence, "fence_history": api.PathFenceHistory,
	}[name]
}

// Every command that changes something sends exactly this.
func TestChanges(t *testing.T) {
	t.Parallel()
	acl := func(open any, add, remove map[string]any) map[string]any {
		m := map[string]any{"target": iqnPath, "add": add, "remove": remove}
		if open != nil {
			m["open"] = open
		}
		return m
	}
	empty := map[string]any{"open": false, "initiators": nil, "addresses": nil}
	who := map[string]any{"open": false, "initiators": []any{"iqn.1993-08.org.debian:01:abc"}, "addresses": []any{"192.0.2.7/32", "10.0.0.0/8", "2001:db8::1/128"}}
	lun := map[string]any{"target": iqnPath, "volume": "v1", "size": 64.0 * (1 << 20), "block_size": 4096.0, "replicas": 1.0, "node": "n3", "lun": -1.0, "read_only": false, "if_not_exists": false}
	vol := map[string]any{"name": "v1", "size": 1.5 * (1 << 30), "block_size": 512.0, "replicas": 1.0, "node": "", "if_not_exists": true}
	for _, c := range []struct {
		args, line string
		body       map[string]any
	}{
		{"init demo", "POST /v1/init", map[string]any{"cluster": "demo"}},
		{"join bh1-x@127.0.0.11:7420", "POST /v1/join", map[string]any{"token": "bh1-x", "address": "127.0.0.11:7420"}},
		{"join bh1-x@[::1]:7420", "POST /v1/join", map[string]any{"token": "bh1-x", "address": "[::1]:7420"}},
		{"leave --yes", "POST /v1/leave", map[string]any{"force": false}},
		{"leave -y --force", "POST /v1/leave", map[string]any{"force": true}},
		{"token create", "POST /v1/tokens", map[string]any{"ttl_ns": 3600e9, "uses": 1.0}},
		{"token create --ttl 10m --uses 3", "POST /v1/tokens", map[string]any{"ttl_ns": 600e9, "uses": 3.0}},
		{"token revoke t1", "DELETE /v1/tokens/t1", nil},
		{"node remove n1 --yes", "DELETE /v1/nodes/n1", nil},
		{"volume create v1 --size 1.5G --if-not-exists", "POST /v1/volumes", vol},
		{"volume delete v1 --yes", "DELETE /v1/volumes/v1", nil},
		{"target create disks --alias A --tid 3", "POST /v1/targets", map[string]any{"name": "disks", "alias": "A", "tid": 3.0, "if_not_exists": false}},
		{"target delete " + iqnPath + " --yes", "DELETE /v1/targets/" + iqnPath, nil},
		{"target delete " + iqnPath + " --yes --force", "DELETE /v1/targets/" + iqnPath + "?force=1", nil},
		{"target redirect " + iqnPath + " 192.0.2.9", "POST /v1/targets/" + iqnPath, map[string]any{"params": map[string]any{"RedirectAddress": "192.0.2.9", "RedirectPort": "", "RedirectReason": ""}}},
		{"target redirect " + iqnPath + " [2001:db8::9]:3261 --permanent", "POST /v1/targets/" + iqnPath, map[string]any{"params": map[string]any{"RedirectAddress": "2001:db8::9", "RedirectPort": "3261", "RedirectReason": "Permanent"}}},
		{"target redirect " + iqnPath + " --off", "POST /v1/targets/" + iqnPath, map[string]any{"params": map[string]any{"RedirectAddress": "", "RedirectPort": "", "RedirectReason": ""}}},
		{"lun create v1 --target " + iqnPath + " --size 64MiB --node n3 --block-size 4096", "POST /v1/luns", lun},
		{"lun delete " + iqnPath + "/1 --yes", "DELETE /v1/luns/" + iqnPath + "/1", nil},
		{"lun delete " + iqnPath + " 1 --yes", "DELETE /v1/luns/" + iqnPath + "/1", nil},
		{"acl add " + iqnPath + " IQN.1993-08.org.debian:01:abc 192.0.2.7 10.1.2.3/8 2001:db8::1", "POST /v1/acls", acl(nil, who, empty)},
		{"acl remove " + iqnPath + " 192.0.2.7", "POST /v1/acls", acl(nil, empty, map[string]any{"open": false, "initiators": nil, "addresses": []any{"192.0.2.7/32"}})},
		{"acl open " + iqnPath, "POST /v1/acls", acl(true, empty, empty)},
		{"session kill n2 7 --yes", "DELETE /v1/sessions/n2/7", nil},
		{"account bind christina " + iqnPath, "POST /v1/bindings", map[string]any{"account": "christina", "target": iqnPath}},
		{"account bind clyde " + iqnPath + " --outgoing", "POST /v1/bindings", map[string]any{"account": "clyde", "target": iqnPath, "outgoing": true}},
		{"account unbind clyde discovery", "POST /v1/bindings", map[string]any{"account": "clyde", "target": "discovery", "remove": true}},
		{"account delete clyde --yes", "DELETE /v1/accounts/clyde", nil},
		{"account delete clyde --yes --force", "DELETE /v1/accounts/clyde?force=1", nil},
		{"volume create v1 --store file:/srv/a.img", "POST /v1/volumes", map[string]any{"name": "v1", "size": 0.0, "block_size": 512.0, "replicas": 1.0, "node": "", "if_not_exists": false, "store": "file:/srv/a.img"}},
		{"acl open " + iqnPath + " --off", "POST /v1/acls", acl(false, empty, empty)},
	} {
		t.Run(c.args, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, sample())
			got := f.run(t, "", strings.Fields(c.args)...)
			if got.code != 0 {
				t.Fatalf("exit %d: %s", got.code, got.err)
			}
			reqs := f.requests()
			if len(reqs) != 1 || reqs[0].Line != c.line {
				t.Fatalf("asked %+v, want %s", reqs, c.line)
			}
			body := reqs[0].Body
			if id, ok := body["request_id"]; ok {
				if s, _ := id.(string); len(s) != 36 {
					t.Errorf("request_id is %v", id)
				}
				delete(body, "request_id")
			} else if strings.Contains(c.line, "volumes") && c.body != nil {
				t.Error("no request_id")
			}
			want := c.body
			if want == nil {
				want = map[string]any{}
			}
			if diff := cmp.Diff(want, body); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
			// The same again as JSON: a document on stdout, nothing else.
			js := f.run(t, "", append(strings.Fields(c.args), "-o", "json")...)
			if js.code != 0 || js.err != "" || !json.Valid([]byte(js.out)) || !strings.Contains(js.out, `"apiVersion"`) {
				t.Errorf("-o json: %+v", js)
			}
		})
	}
}

// Two runs never share a request id: the second is another wish.
func TestRequestIDsDiffer(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	for range 2 {
		f.run(t, "", "volume", "create", "v1", "--size", "1M")
	}
	r := f.requests()
	if len(r) != 2 || r[0].Body["request_id"] == r[1].Body["request_id"] {
		t.Errorf("%+v", r)
	}
}

func TestTokenCreateText(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	golden(t, "token_create.table", f.run(t, "", "token", "create").out)
	if got := f.run(t, "", "token", "create", "-q"); got.out != "bh1-secret\n" {
		t.Errorf("-q printed %q", got.out)
	}
}

func TestJoinTokenFile(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	file := filepath.Join(t.TempDir(), "tok")
	if err := os.WriteFile(file, []byte("bh1-y\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.run(t, "", "join", "h:1", "--token-file", file)
	f.run(t, " bh1-z \n", "join", "h:1", "--token-file", "-")
	r := f.requests()
	if len(r) != 2 || r[0].Body["token"] != "bh1-y" || r[1].Body["token"] != "bh1-z" {
		t.Errorf("%+v", r)
	}
}

// What is wrong with the command line is told without asking the daemon, with
// exit status 2.
func TestUsage(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	for args, want := range map[string]string{
		"":                            "missing command",
		"volume":                      "volume: missing command",
		"volume lst":                  `unknown command "lst"`,
		"frobnicate":                  `unknown command "frobnicate"`,
		"volume list x":               `volume list: too many arguments: "x"`,
		"volume show":                 "volume show: missing NAME",
		"volume list --nope":          "unknown flag: --nope",
		"volume list -o xml":          `unknown output format "xml"`,
		"volume list --timeout 0s":    "must be more than 0",
		"volume list --addr h:1":      "--addr and --certs go together",
		"volume create v1":            "--size is missing",
		"volume create v1 --size 1MB": "binary",
		"volume create v1 --size 0":   "must be more than 0",
		"volume create v1 --size 1M --store file:/x":         "the size is the store's",
		"target redirect " + iqnPath:                         "--off",
		"target redirect " + iqnPath + " a --off":            "--off",
		"target redirect " + iqnPath + " 0.0.0.0":            "no initiator can connect",
		"target redirect " + iqnPath + " h:0":                "1 to 65535",
		"target redirect " + iqnPath + " a_b!":               "host name",
		"session kill n1 0":                                  "no TSIH",
		"session kill n1":                                    "missing TSIH",
		"account create x":                                   "must be one line",
		"volume create v1 --size 1M --block-size 1024":       "512 or 4096",
		"volume create v1 --size 1M --replicas 0":            "at least one copy",
		"lun create v1":                                      "--target is missing",
		"lun create v1 --target t --lun 16384":               "0 to 16383",
		"lun create v1 --target t --node n3":                 "without --size or --store none is made",
		"lun create v1 --target t --store rbd:x":             "is no kind of store",
		"lun create v1 --target t --store file:/a --size 1M": "the size is the store's",
		"lun create v1 --target t --store mem:":              "--size is missing",
		"lun create v1 --target t --integrity":               "are of a new volume",
		"volume create v1 --store nbd://h/x?tls=on":          "has no option",
		"volume scrub v1 --stop --rate 1M":                   "a scrub that ends has no rate",
		"lun delete t --yes":                                 "not IQN/NUMBER",
		"lun delete t/x --yes":                               "not IQN/NUMBER",
		"acl add t":                                          "write IQN and at least one",
		"acl add t nonsense":                                 "neither an initiator name",
		"acl add t fe80::1%eth0":                             "neither an initiator name",
		"join nonsense":                                      "not HOST:PORT",
		"join h:1":                                           "no token",
		"join tok@h:1 --token-file x":                        "given twice",
		"token create --uses 0":                              "more than 0",
		"fence_manual":                                       "missing NODE",
		"fence_manual n1 -n n1":                              "given twice",
		"completion tcsh":                                    "unknown shell",
		"status --interval 1ms":                              "at least 100ms",
		"help no such":                                       "no command",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			got := f.run(t, "", strings.Fields(args)...)
			if got.code != 2 || got.out != "" || !strings.Contains(got.err, want) || !strings.Contains(got.err, "clusteradm: ") {
				t.Errorf("exit %d, stdout %q, stderr %q; want 2, nothing, %q", got.code, got.out, got.err, want)
			}
			js := f.run(t, "", append([]string{"-o", "json"}, strings.Fields(args)...)...)
			if strings.Contains(args, "-o xml") || args == "" || args == "volume" {
				return // there the last -o wins, or the usage stands before the document
			}
			var eb api.ErrorBody
			if err := json.Unmarshal([]byte(js.err), &eb); err != nil || eb.Error == nil || eb.Error.Code != api.CodeUsage {
				t.Errorf("-o json: %q is no usage error document", js.err)
			}
		})
	}
	if r := f.requests(); len(r) != 0 {
		t.Errorf("asked the daemon %+v", r)
	}
}

// Each code of the API ends with its exit status, in text and as a document.
func TestErrors(t *testing.T) {
	t.Parallel()
	for code, exit := range map[api.Code]int{
		api.CodeInternal: 1, api.CodeUsage: 2, api.CodeNotFound: 3, api.CodeExists: 4, api.CodeConflict: 4, api.CodeNoQuorum: 5,
		api.CodeTimeout: 6, api.CodeDenied: 7, api.CodeUnreachable: 8, api.CodeRefused: 9,
	} {
		t.Run(string(code), func(t *testing.T) {
			t.Parallel()
			f := newFake(t, map[string]any{"GET /v1/volumes/v1": api.Errorf(code, "clusteradm volume list", "volume v1: because")})
			got := f.run(t, "", "volume", "show", "v1")
			if want := (result{exit, "", "clusteradm: volume v1: because\nnext: clusteradm volume list\n"}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
			js := f.run(t, "", "volume", "show", "v1", "-o", "json")
			var eb api.ErrorBody
			if err := json.Unmarshal([]byte(js.err), &eb); err != nil {
				t.Fatalf("%q: %v", js.err, err)
			}
			want := api.ErrorBody{APIVersion: api.Version, Error: &api.Error{Code: code, Message: "volume v1: because", Next: "clusteradm volume list"}}
			if diff := cmp.Diff(want, eb); diff != "" || js.code != exit || js.out != "" {
				t.Errorf("exit %d, stdout %q, %s", js.code, js.out, diff)
			}
		})
	}
}

func TestNotJSON(t *testing.T) {
	t.Parallel()
	f := newFake(t, map[string]any{"GET /v1/volumes": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "boom", http.StatusBadGateway) })})
	if got := f.run(t, "", "volume", "list"); got.code != 1 || !strings.Contains(got.err, "502 Bad Gateway: boom") {
		t.Errorf("%+v", got)
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	got := runWith(t.Context(), filepath.Join(t.TempDir(), "none"), strings.NewReader(""), nil, "status")
	if got.code != 8 || got.out != "" || !strings.Contains(got.err, "next: systemctl status clusterd") {
		t.Errorf("%+v", got)
	}
}

// A daemon that does not answer is not waited for longer than --timeout.
func TestTimeout(t *testing.T) {
	t.Parallel()
	hang := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	f := newFake(t, map[string]any{"GET /v1/status": hang, "GET /v1/events?follow=0": events(true)})
	for _, cmd := range []string{"status", "events", "status -w"} {
		begin := time.Now()
		got := f.run(t, "", append(strings.Fields(cmd), "--timeout", "200ms")...)
		if got.code != 6 || time.Since(begin) > 5*time.Second {
			t.Errorf("%s: exit %d after %s: %s", cmd, got.code, time.Since(begin), got.err)
		}
	}
}

func TestInterrupted(t *testing.T) {
	t.Parallel()
	f := newFake(t, map[string]any{"GET /v1/volumes": http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for len(f.requests()) == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if got := runWith(ctx, f.socket, strings.NewReader(""), nil, "volume", "list"); got.code != 130 {
		t.Errorf("%+v", got)
	}
}

// Nothing is lost without a word: no --yes and no terminal is a refusal, and
// the daemon is not asked.
func TestConfirmWithoutTerminal(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	for _, args := range []string{"volume delete v1", "target delete " + iqnPath, "lun delete " + iqnPath + "/1", "node remove n1", "leave"} {
		got := f.run(t, "y\n", strings.Fields(args)...)
		if got.code != 9 || !strings.Contains(got.err, "--yes") {
			t.Errorf("%s: %+v", args, got)
		}
	}
	if r := f.requests(); len(r) != 0 {
		t.Errorf("asked the daemon %+v", r)
	}
}

func TestEmptyLists(t *testing.T) {
	t.Parallel()
	f := newFake(t, map[string]any{"GET /v1/volumes": api.List[api.Volume]{Stale: true, Index: 7}})
	got := f.run(t, "", "volume", "list")
	if got.code != 0 || got.out != "" || got.err != "note: no quorum; read from this node's own copy, as of index 7\nno volumes\n" {
		t.Errorf("%+v", got)
	}
	golden(t, "volume_list_empty.json", f.run(t, "", "volume", "list", "-o", "json").out)
}

// Names travel as one segment, whatever is in them.
func TestNamesAreEscaped(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	if got := f.run(t, "", "volume", "show", "a/b?c"); got.code != 0 {
		t.Errorf("%+v asked %+v", got, f.requests())
	}
}

func TestStatusOtherStates(t *testing.T) {
	t.Parallel()
	ok := sampleStatus
	ok.Health, ok.Problems, ok.Fences = api.HealthOK, nil, nil
	ok.Quorum.Online, ok.Quorum.Survives = ok.Quorum.Voters, 1
	noq := sampleStatus
	noq.Health, noq.Stale = api.HealthNoQuorum, true
	noq.Quorum.Quorate, noq.Quorum.Leader, noq.Quorum.Online = false, "", []string{"n2"}
	noq.Problems = []api.Problem{{Severity: api.HealthNoQuorum, What: "no quorum", Cause: "1 of 3 votes", Action: "start clusterd on one more node"}}
	uninit := api.Status{Health: api.HealthUninit, Node: "n1"}
	for name, c := range map[string]struct {
		st   api.Status
		exit int
	}{"ok": {ok, 0}, "faulted": {sampleStatus, 1}, "no-quorum": {noq, 5}, "uninitialised": {uninit, 1}} {
		f := newFake(t, map[string]any{"GET /v1/status": c.st})
		got := f.run(t, "", "status")
		if got.code != 0 {
			t.Errorf("%s: %+v", name, got)
		}
		golden(t, "status_"+name+".table", got.out)
		if got := f.run(t, "", "status", "--check"); got.code != c.exit {
			t.Errorf("%s: --check gives %d, want %d", name, got.code, c.exit)
		}
	}
}

// status -w goes on over a restart of the daemon and ends with the user's ^C.
func TestStatusWatch(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	ans := map[string]any{"GET /v1/status": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n++
		switch n {
		case 2:
			writeError(w, api.Errorf(api.CodeNoQuorum, "", "no leader"))
			return
		case 3:
			cancel()
		}
		_ = json.NewEncoder(w).Encode(sampleStatus)
	})}
	f := newFake(t, ans)
	got := runWith(ctx, f.socket, strings.NewReader(""), nil, "status", "-w", "--interval", "100ms")
	if got.code != 0 || strings.Count(got.out, "cluster: demo") != 1 || !strings.Contains(got.out, "12:00:00Z: no leader\n") {
		t.Errorf("%+v", got)
	}
}

func TestEventsFollow(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	got := runWith(ctx, f.socket, strings.NewReader(""), nil, "events", "-f", "-o", "json")
	if got.code != 0 || strings.Count(got.out, "\n") != 1 || !strings.Contains(got.out, `"kind":"node.lost"`) {
		t.Errorf("%+v", got)
	}
	f = newFake(t, map[string]any{"GET /v1/events": events(false, sampleEvent)})
	if got := f.run(t, "", "events", "-f"); got.code != 8 {
		t.Errorf("a stream that the daemon ends: %+v", got)
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	if got := f.run(t, "", "version"); got.code != 0 || !strings.Contains(got.out, "clusterd   0.1.0 (node n2)") {
		t.Errorf("%+v", got)
	}
	if got := f.run(t, "", "version", "--client", "-o", "json"); got.code != 0 || strings.Contains(got.out, "clusterd") || len(f.requests()) != 1 {
		t.Errorf("%+v", got)
	}
	got := runWith(t.Context(), "/nonexistent", strings.NewReader(""), nil, "version")
	if got.code != 0 || got.out == "" || !strings.Contains(got.err, "/nonexistent") {
		t.Errorf("without a daemon: %+v", got)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	for _, sh := range []string{"bash", "zsh", "fish"} {
		if got := f.run(t, "", "completion", sh); got.code != 0 || !strings.Contains(got.out, "clusteradm") {
			t.Errorf("%s: exit %d, %d bytes", sh, got.code, len(got.out))
		}
	}
	for args, want := range map[string]string{
		"node show ":              "n1\nn2\nn3\n:4\n",
		"volume delete ":          "v1\n:4\n",
		"fence_manual ":           "n1\n:4\n",
		"lun delete ":             iqnPath + "/1\n:4\n",
		"volume list -o ":         "table\nwide\njson\nyaml\nname\n:4\n",
		"volume create x --node ": "n1\nn2\nn3\n:4\n",
	} {
		got := f.run(t, "", append([]string{"__complete"}, strings.Split(args, " ")...)...)
		if got.out != want {
			t.Errorf("%s: %q, want %q", args, got.out, want)
		}
	}
	// A TAB without a daemon offers nothing and says nothing.
	got := runWith(t.Context(), "/nonexistent", strings.NewReader(""), nil, "__complete", "node", "show", "")
	if got.out != ":4\n" {
		t.Errorf("%+v", got)
	}
}

// The reference is the same on every host and day.
func TestDocs(t *testing.T) {
	t.Parallel()
	var first map[string]string
	for _, env := range []map[string]string{{EnvSocket: "/a"}, {EnvSocket: "/b"}} {
		dir := t.TempDir()
		for _, kind := range []string{"man", "md"} {
			if got := runWith(t.Context(), "", strings.NewReader(""), env, "docs", kind, dir); got.code != 0 {
				t.Fatalf("%+v", got)
			}
		}
		files := map[string]string{}
		ents, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ents {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			files[e.Name()] = string(b)
		}
		if files["clusteradm-volume-create.8"] == "" || files["clusteradm_volume_create.md"] == "" || !strings.Contains(files["clusteradm.8"], DefaultSocket) {
			t.Fatalf("files: %d", len(files))
		}
		if first == nil {
			first = files
		} else if diff := cmp.Diff(first, files); diff != "" {
			t.Error(diff)
		}
	}
}

// --addr speaks mutual TLS: a node of our cluster answers, one of another
// cluster and one with an administrator's certificate do not.
func TestRemote(t *testing.T) {
	t.Parallel()
	issue := func(ca *pki.CA, role pki.Role, name string) (dir string) {
		dir = t.TempDir()
		cert, key, err := ca.Issue(role, name, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		caPEM, _, err := ca.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := pki.SaveFiles(dir, cert, key, caPEM); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	newCA := func(cluster string) *pki.CA {
		ca, err := pki.NewCA(cluster, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return ca
	}
	ours, theirs := newCA("00000000-0000-4000-8000-000000000001"), newCA("00000000-0000-4000-8000-000000000002")
	me := issue(ours, pki.Admin, "me")
	serve := func(dir string) string {
		files, err := pki.LoadFiles(dir)
		if err != nil {
			t.Fatal(err)
		}
		f := &fake{answers: sample()}
		s := httptest.NewUnstartedServer(f)
		s.TLS = files.StrictServerTLS(time.Now, pki.Want{}, false, nil)
		s.Config.ErrorLog = zap.NewStdLog(zap.NewNop()) // refused handshakes are the point
		s.StartTLS()
		t.Cleanup(s.Close)
		return s.Listener.Addr().String()
	}
	run := func(addr, certs string) result {
		return runWith(t.Context(), "", strings.NewReader(""), nil, "node", "list", "-o", "name", "--addr", addr, "--certs", certs)
	}
	good := serve(issue(ours, pki.Node, "n1"))
	if got := run(good, me); got.code != 0 || got.out != "n1\nn2\nn3\n" {
		t.Errorf("our node: %+v", got)
	}
	if got := run(serve(issue(theirs, pki.Node, "n1")), me); got.code != 7 || !strings.Contains(got.err, "cluster") {
		t.Errorf("a node of another cluster: %+v", got)
	}
	if got := run(serve(issue(ours, pki.Admin, "mallory")), me); got.code != 7 || !strings.Contains(got.err, "mallory") {
		t.Errorf("an administrator who plays a node: %+v", got)
	}
	if got := run(good, issue(theirs, pki.Admin, "me")); got.code == 0 {
		t.Errorf("our node took a certificate of another cluster: %+v", got)
	}
	if got := run(good, t.TempDir()); got.code != 2 || !strings.Contains(got.err, "ca.crt") {
		t.Errorf("no certificates: %+v", got)
	}
}
