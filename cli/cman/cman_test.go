package cman

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/verbs"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var now = time.Date(2026, 11, 5, 9, 8, 7, 0, time.UTC)

// fake is a daemon with scripted answers: the leader is n2, this host is n3.
type fake struct {
	socket string
	mu     sync.Mutex
	status func(asked int) any // api.Status or *api.Error
	asked  int
	leave  any
	posted []string
}

func newFake(t *testing.T, status func(int) any) *fake {
	t.Helper()
	// Not t.TempDir: its path may be longer than a socket's name may be.
	dir, err := os.MkdirTemp("", "cm")
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{socket: filepath.Join(dir, "s"), status: status, leave: api.Done{APIVersion: api.Version}}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(f)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(func() { s.Close(); os.RemoveAll(dir) })
	return f
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var v any
	switch r.Method + " " + r.URL.Path {
	case "GET " + api.PathStatus:
		if r.Header.Get(hdrLocal) == "" {
			f.asked++
		}
		v = f.status(f.asked)
		if s, ok := v.(api.Status); ok && r.Header.Get(hdrLocal) != "" {
			s.Node = "n3"
			v = s
		}
	case "GET " + api.PathFenceHistory:
		v = api.List[api.FenceEvent]{APIVersion: api.Version, Items: history}
	case "POST " + api.PathLeave:
		b, _ := io.ReadAll(r.Body)
		f.posted = append(f.posted, string(b))
		v = f.leave
	default:
		v = api.Errorf(api.CodeInternal, "", "the fake has no answer to %s %s", r.Method, r.URL)
	}
	if e, ok := v.(*api.Error); ok {
		w.WriteHeader(e.Code.HTTP())
		v = api.ErrorBody{APIVersion: api.Version, Error: e}
	}
	_ = json.NewEncoder(w).Encode(v)
}

func (f *fake) run(t *testing.T, argv ...string) (code int, out, errs string) {
	t.Helper()
	return runOn(t.Context(), f.socket, argv...)
}

func runOn(ctx context.Context, socket string, argv ...string) (int, string, string) {
	var out, errs bytes.Buffer
	a := &App{Out: &out, Err: &errs, Now: func() time.Time { return now }, Zone: time.FixedZone("x", 3600), Poll: 5 * time.Millisecond, Env: func(k string) string {
		if k == verbs.EnvSocket {
			return socket
		}
		return ""
	}}
	code := a.Run(ctx, "/usr/sbin/"+argv[0], argv[1:])
	return code, out.String(), errs.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		t.Fatalf("%s is missing: go test ./cli/cman -rewrite, then read it", path)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// The nodes stand out of order, as lists by name do.
var nodes = []api.Node{
	{Name: "n10", Index: 10, State: api.NodeOnline, Incarnation: 123456, Vote: "nonvoter", Raft: "192.0.2.10:7421", API: "192.0.2.10:7420", Since: now.Add(-time.Minute)},
	{Name: "n1", Index: 1, State: api.NodeLost, Incarnation: 4, Vote: "voter", Raft: "192.0.2.1:7421", Since: now.Add(-3 * time.Minute)},
	{Name: "n2", Index: 2, State: api.NodeOnline, Incarnation: 5, Vote: "leader", Raft: "192.0.2.2:7421", API: "192.0.2.2:7420", Portals: []string{"198.51.100.2:3260"}, Since: now.Add(-26 * time.Hour)},
	{Name: "n3", Index: 3, State: api.NodeOnline, Incarnation: 6, Vote: "voter", Raft: "[2001:db8::3]:7421", Since: now.Add(-26 * time.Hour),
		Workers: map[string]api.Worker{"storage": {State: "serving"}, "locks": {State: "down"}}},
	{Name: "n4", Index: 4, State: api.NodeFenced, Incarnation: 2, Vote: "none", Since: now.Add(-time.Hour)},
	{Name: "n5", Index: 5, State: api.NodeJoining, Vote: "none"},
}

var history = []api.FenceEvent{
	{Index: 30, Time: now.Add(-2 * time.Hour), Node: "n4", Incarnation: 1, Epoch: 9, Event: "evict", Reason: "node lease ended"},
	{Index: 31, Time: now.Add(-time.Hour), Node: "n4", Incarnation: 1, Epoch: 9, Event: "fenced", Method: "manual", Operator: "root@n2", Reason: "pulled\nthe plug"},
	{Index: 20, Time: now.Add(-time.Hour), Node: "n2", Incarnation: 4, Epoch: 10, Event: "fenced", Method: "rejoin"},
	{Index: 40, Time: now.Add(-time.Minute), Node: "n10", Incarnation: 3, Epoch: 11, Event: "fenced", Method: "agent:pdu1", Evidence: "Success: Powered OFF"},
}

func status() api.Status {
	return api.Status{APIVersion: api.Version, Health: api.HealthDegraded, Cluster: "alpha", Node: "n2", View: 8, Index: 42, Epoch: 12,
		Quorum: api.Quorum{Quorate: true, Leader: "n2", Voters: []string{"n1", "n2", "n3"}, Online: []string{"n2", "n3"}, Needed: 2},
		Nodes:  append([]api.Node(nil), nodes...),
		Fences: []api.Fence{{Node: "n1", Incarnation: 4, Epoch: 12, Since: now.Add(-3 * time.Minute), Reason: "node lease ended", Waiting: "an operator"}}}
}

func inquorate() api.Status {
	s := status()
	s.Stale, s.Quorum.Quorate, s.Quorum.Leader, s.Fences = true, false, "", nil
	for i := range s.Nodes {
		if s.Nodes[i].State == api.NodeOnline {
			s.Nodes[i].State = api.NodeUnknown
		}
	}
	return s
}

func quorate(int) any { return status() }

// The layouts, to the column (facts §1.1).
func TestGolden(t *testing.T) {
	t.Parallel()
	ok, lost := newFake(t, quorate), newFake(t, func(int) any { return inquorate() })
	for _, c := range []struct {
		file string
		f    *fake
		argv string
		code int
	}{
		{"status", ok, "cman_tool status", 0},
		{"status.inquorate", lost, "cman_tool status", 0},
		{"nodes", ok, "cman_tool nodes", 0},
		{"nodes.inquorate", lost, "cman_tool nodes", 0},
		{"nodes.a", ok, "cman_tool nodes -a", 0},
		{"nodes.n", ok, "cman_tool nodes -n n3 -n n4 -n none", 0},
		{"nodes.F", ok, "cman_tool nodes -F id,name,type,addr,votes,exp,state,nonsense", 0},
		{"version", ok, "cman_tool version", 0},
		{"services", ok, "cman_tool services", 0},
		{"fence_ls", ok, "fence_tool ls", 0},
		{"fence_ls.inquorate", lost, "fence_tool ls", 0},
		{"fence_ls.n", ok, "fence_tool -n ls", 0},
		{"fence_dump", ok, "fence_tool dump", 0},
		{"group_ls", ok, "group_tool", 0},
		{"group_ls.n", ok, "group_tool ls -n", 0},
		{"group_ls.g1", ok, "group_tool list -g1", 0},
		{"group_compat", ok, "group_tool compat", 0},
		{"fence_dump", ok, "group_tool dump fence", 0},
		{"clustat", ok, "clustat", 0},
		{"clustat.inquorate", lost, "clustat -f", 0},
		{"clustat.m", ok, "clustat -m n3", 0},
		{"clustat.m.down", ok, "clustat -m n1", 1},
		{"clustat.x", ok, "clustat -x", 0},
		{"clustat.x.inquorate", lost, "clustat -x", 0},
		{"clustat.x.m", ok, "clustat -x -m n1", 1},
		{"clustat.I", ok, "clustat -I", 0},
	} {
		code, out, errs := c.f.run(t, strings.Fields(c.argv)...)
		if code != c.code || errs != "" {
			t.Errorf("%s: exit %d, %q", c.argv, code, errs)
		}
		golden(t, c.file, out)
	}
}

// What the originals' format strings give, by hand: a golden file that nobody read
// would prove nothing.
func TestLayouts(t *testing.T) {
	t.Parallel()
	f := newFake(t, quorate)
	has := func(argv string, lines ...string) {
		t.Helper()
		_, out, _ := f.run(t, strings.Fields(argv)...)
		for _, l := range lines {
			if !strings.Contains("\n"+out, "\n"+l+"\n") {
				t.Errorf("%s: no line %q in\n%s", argv, l, out)
			}
		}
	}
	has("cman_tool nodes", "Node  Sts   Inc   Joined               Name",
		"   1   X      4                        n1", "   2   M      5   2026-11-04 08:08:07  n2", "  10   M  123456   2026-11-05 10:07:07  n10", "   5   X      0                        n5")
	has("cman_tool nodes -a", "       Addresses: 192.0.2.2 198.51.100.2 ", "       Addresses: 2001:db8::3 ")
	has("cman_tool nodes -F id,name,type,votes", "3 n3 M 1 ", "4 n4 X 0 ")
	has("cman_tool status", "Version: 6.2.0", "Nodes: 3", "Expected votes: 3", "Total votes: 2", "Node votes: 1", "Quorum: 2  ", "Active subsystems: 2", "Flags: ", "Ports Bound: 0  ",
		"Node name: n3", "Node ID: 3", "Node addresses: 2001:db8::3 ")
	has("fence_tool ls", "fence domain", "member count  3", "victim count  1", "victim now    1", "master nodeid 2", "wait state    fencing", "members       2 3 10 ")
	has("fence_tool ls -n", "nodeid 4 member 0 victim 0 last fence master 0 how override", "nodeid 1 member 0 victim 1 last fence master 0 how none", "nodeid 2 member 1 victim 0 last fence master 0 how member", "nodeid 10 member 1 victim 0 last fence master 0 how agent")
	has("clustat", "Cluster Status for alpha @ Thu Nov  5 10:08:07 2026", "Member Status: Quorate",
		" Member Name                             ID   Status", " ------ ----                             ---- ------", " n3                                          3 Online, Local", " n1                                          1 Offline")
	has("clustat -x", `    <node name="n3" state="1" local="1" estranged="0" rgmanager="0" rgmanager_master="0" qdisk="0" nodeid="0x00000003"/>`, `  <quorum quorate="1" groupmember="0"/>`)
}

// Exit statuses and words of the originals; what is refused names the command
// that does it.
func TestAnswers(t *testing.T) {
	t.Parallel()
	ok, lost := newFake(t, quorate), newFake(t, func(int) any { return inquorate() })
	uninit := newFake(t, func(int) any { return api.Status{Health: api.HealthUninit, Node: "n3"} })
	for _, c := range []struct {
		f    *fake
		argv string
		code int
		errs string // part of stderr; "" = empty
	}{
		{ok, "clustat -Q", 0, ""}, {lost, "clustat -Q", 1, ""}, {ok, "clustat -m none", 255, ""}, {ok, "clustat -s web", 255, "there is no service service:web"},
		{ok, "clustat -i 1 -x", 1, ""}, {uninit, "clustat", 1, "Could not connect to CMAN"}, {ok, "clustat -v", 0, ""}, {ok, "clustat -h", 0, ""},
		{ok, "cman_tool", 1, "cman_tool: no operation specified"}, {ok, "cman_tool status nodes", 1, "can't specify two operations"}, {ok, "cman_tool frob", 1, "unknown option frob"},
		{ok, "cman_tool -y status", 1, "invalid option -- 'y'"}, {ok, "cman_tool expected -e x", 1, "argument to e (x) is not an integer"}, {ok, "cman_tool -h", 0, ""}, {ok, "cman_tool -V", 0, ""},
		{ok, "cman_tool expected -e 3", 0, ""}, {ok, "cman_tool expected -e 1", 1, "next: clusteradm quorum show"}, {ok, "cman_tool votes -v 1", 0, ""}, {ok, "cman_tool votes -v 4", 1, "every voter has one vote"},
		{ok, "cman_tool kill", 1, "No node name specified"}, {ok, "cman_tool kill -n n1", 1, "next: clusteradm fence_manual n1"}, {ok, "cman_tool kill -n n2", 1, "next: clusteradm leave, on n2"},
		{ok, "cman_tool kill -n n4", 1, "next: clusteradm node remove n4"}, {ok, "cman_tool kill -n x", 1, "next: clusteradm node list"},
		{ok, "cman_tool version -r", 1, "Not reloading"}, {ok, "cman_tool debug -d3", 1, "next: clusteradm events"},
		{uninit, "cman_tool status", 1, "Node is not yet a cluster member"}, {uninit, "cman_tool join", 1, "next: clusteradm join TOKEN@HOST:PORT"}, {ok, "cman_tool join", 1, "Node is already active"},
		{ok, "cman_tool join -w", 0, ""}, {ok, "cman_tool wait -q -t 5", 0, ""}, {lost, "cman_tool wait", 0, ""}, {lost, "cman_tool -t 1 -q wait", 2, "Timed-out waiting for cluster"},
		{ok, "fence_tool join", 0, ""}, {uninit, "fence_tool join", 1, "clusteradm join"}, {ok, "fence_tool leave", 1, "next: clusteradm leave"}, {ok, "fence_tool", 1, "no operation"}, {ok, "fence_tool up", 1, "unknown option up"},
		{ok, "fence_node", 1, "no node name"}, {ok, "fence_node n4", 0, "fence n4 success"}, {ok, "fence_node n1", 1, "next: clusteradm fence_manual n1"}, {ok, "fence_node n2", 1, "fence n2 failed"},
		{ok, "fence_node -U", 0, "unfence n3 success"}, {ok, "fence_node -U n1", 1, "unfence n1 failed"}, {ok, "fence_node nope", 1, "no node is called nope"}, {ok, "fence_node a b", 1, "unknown option b"},
		{ok, "group_tool dump dlm", 1, "no log of dlm"}, {ok, "group_tool -z", 1, "Please use '-h' for usage."},
		{ok, "other", 2, "not a name"},
	} {
		code, _, errs := c.f.run(t, strings.Fields(c.argv)...)
		if code != c.code || !strings.Contains(errs, c.errs) || c.errs == "" && errs != "" {
			t.Errorf("%s: exit %d, %q", c.argv, code, errs)
		}
	}
	none := filepath.Join(t.TempDir(), "none")
	for _, argv := range []string{"cman_tool status", "cman_tool wait", "cman_tool nodes", "fence_tool ls", "fence_node n1", "group_tool ls"} {
		code, out, errs := runOn(t.Context(), none, strings.Fields(argv)...)
		if code != 1 || out != "" || !strings.Contains(errs, "Cannot open connection to cman, is it running ?\nnext: ") {
			t.Errorf("%s: exit %d, %q, %q", argv, code, out, errs)
		}
	}
	if code, _, errs := runOn(t.Context(), none, "clustat"); code != 1 || !strings.HasPrefix(errs, "Could not connect to CMAN: ") {
		t.Errorf("exit %d, %q", code, errs)
	}
}

func TestLeave(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(n int) any {
		if n > 3 { // the first look, and two while waiting
			return api.Status{Health: api.HealthUninit, Node: "n3"}
		}
		return status()
	})
	if code, out, errs := f.run(t, "cman_tool", "leave", "-w", "remove", "force"); code != 0 || out != "" || errs != "" {
		t.Errorf("exit %d, %q, %q", code, out, errs)
	}
	if diff := cmp.Diff([]string{`{"force":true}`}, f.posted); diff != "" || f.asked < 4 {
		t.Errorf("asked %d times; %s", f.asked, diff)
	}
	f = newFake(t, quorate)
	f.leave = api.Errorf(api.CodeRefused, "clusteradm volume delete v1", "n3 holds the only copy")
	if code, _, errs := f.run(t, "cman_tool", "leave"); code != 1 || errs != "cman_tool: Error leaving cluster: n3 holds the only copy\nnext: clusteradm volume delete v1\n" {
		t.Errorf("exit %d, %q", code, errs)
	}
	f.leave = api.Done{}
	if code, _, errs := f.run(t, "cman_tool", "leave", "-w", "-t", "1"); code != 2 || !strings.Contains(errs, "Timed-out") {
		t.Errorf("exit %d, %q", code, errs)
	}
}

// clustat -i shows until it is stopped.
func TestRefresh(t *testing.T) {
	t.Parallel()
	f := newFake(t, quorate)
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if code, out, _ := runOn(ctx, f.socket, "clustat", "-i", "1"); code > 1 || !strings.HasPrefix(out, "\x1b[H\x1b[2JCluster Status") {
		t.Errorf("exit %d, %q", code, out)
	}
}

func TestValidateFace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(text string) string {
		p := filepath.Join(dir, fmt.Sprint(len(text)))
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := file(`<cluster name="a" config_version="7"><clusternodes><clusternode name="n1" nodeid="1"/></clusternodes></cluster>`)
	bad := file(`<cluster name="a" config_version="7">` + "\n" + `<cmann/></cluster>`)
	torn := file(`<cluster name="a"`)
	for _, c := range []struct {
		args      string
		code      int
		out, errs string
	}{
		{"-f " + good, 0, "Configuration validates\n", ""}, {"-q -l " + good, 0, "", ""}, {"-R 6 -f " + good, 0, "Configuration validates\n", ""},
		{"-R 7 -f " + good, 254, "", "Error: Configuration version is older than running config!\n"},
		{"-f " + bad, 3, bad + ":2: <cluster> has no element <cmann>; is it cman?\nConfiguration fails to validate\n", ""},
		{"-q -f " + bad, 3, bad + ":2: <cluster> has no element <cmann>; is it cman?\nConfiguration fails to validate\n", ""},
		{"-q -v -f " + good, 255, "", "Error: invalid options. -v can not be set together with -q\n"},
		{"-r", 255, "", "Error: there is no running cluster.conf; validate a file with -f\n"},
	} {
		code, out, errs := runOn(t.Context(), "none", append([]string{"ccs_config_validate"}, strings.Fields(c.args)...)...)
		if code != c.code || out != c.out || errs != c.errs {
			t.Errorf("%s: exit %d, %q, %q", c.args, code, out, errs)
		}
	}
	if code, out, _ := runOn(t.Context(), "none", "ccs_config_validate", "-f", torn); code != 1 || !strings.Contains(out, torn+":1: ") {
		t.Errorf("exit %d, %q", code, out)
	}
	if code, _, errs := runOn(t.Context(), "none", "ccs_config_validate", "-f", filepath.Join(dir, "none")); code != 255 || !strings.Contains(errs, "Unable to get the configuration") {
		t.Errorf("exit %d, %q", code, errs)
	}
	if code, out, _ := runOn(t.Context(), "none", "ccs_config_validate", "-v", "-f", good); code != 0 || !strings.Contains(out, "no fence method of n1") {
		t.Errorf("exit %d, %q", code, out)
	}
}
