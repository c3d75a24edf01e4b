package verbs

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
	"github.com/blockhouse-san/blockhouse/internal/latency"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// now is the time of every test.
var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// request is what the fake daemon was asked.
type request struct {
	Line string // "POST /v1/volumes"
	Body map[string]any
}

// fake is a daemon with scripted answers. It checks nothing of the cluster; it
// records what clusteradm sends, and sends what clusteradm must print.
type fake struct {
	socket  string
	answers map[string]any // "GET /v1/status" → document, *api.Error or http.HandlerFunc

	mu struct {
		sync.Mutex
		got []request
	}
}

func newFake(t *testing.T, answers map[string]any) *fake {
	t.Helper()
	// Not t.TempDir: its path may be longer than a socket's name may be.
	dir, err := os.MkdirTemp("", "ca")
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{socket: filepath.Join(dir, "s"), answers: answers}
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
	line := r.Method + " " + r.URL.RequestURI()
	body := map[string]any{}
	b, _ := io.ReadAll(r.Body)
	if len(b) > 0 {
		if err := json.Unmarshal(b, &body); err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
	}
	f.mu.Lock()
	f.mu.got = append(f.mu.got, request{line, body})
	f.mu.Unlock()
	switch v := f.answers[line].(type) {
	case nil:
		writeError(w, api.Errorf(api.CodeInternal, "", "the fake has no answer to %s", line))
	case *api.Error:
		writeError(w, v)
	case http.HandlerFunc:
		v(w, r)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
}

func writeError(w http.ResponseWriter, e *api.Error) {
	w.WriteHeader(e.Code.HTTP())
	_ = json.NewEncoder(w).Encode(api.ErrorBody{APIVersion: api.Version, Error: e})
}

func (f *fake) requests() []request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]request(nil), f.mu.got...)
}

// result is what a run left.
type result struct {
	code     int
	out, err string
}

// run runs clusteradm against the fake.
func (f *fake) run(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	return runWith(t.Context(), f.socket, strings.NewReader(stdin), nil, args...)
}

func runWith(ctx context.Context, socket string, in io.Reader, env map[string]string, args ...string) result {
	var out, errb bytes.Buffer
	o := IO{In: in, Out: &out, Err: &errb, Now: func() time.Time { return now }, Env: func(k string) string {
		if v, ok := env[k]; ok {
			return v
		}
		if k == EnvSocket {
			return socket
		}
		return ""
	}}
	code := Run(ctx, "clusteradm", args, o)
	return result{code, out.String(), errb.String()}
}

// golden compares with testdata/NAME; go test -rewrite writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		t.Fatalf("%s is missing: go test ./cli/verbs -rewrite, then read it", path)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// The objects of a cluster that has lost n1.

var (
	sampleNodes = []api.Node{
		{Name: "n1", State: api.NodeLost, Index: 1, Incarnation: 4, BootID: "b1", Roles: []string{"voter", "storage"}, Vote: "voter", Raft: "127.0.0.11:7421", API: "127.0.0.11:7420", Gossip: "127.0.0.11:7422",
			Portals: []string{"127.0.0.11:3260"}, Initiator: "iqn.2026-11.io.blockhouse:n1", Control: "unknown", Since: now.Add(-3 * time.Minute), Reason: "node lease ended", Format: 1},
		{Name: "n2", State: api.NodeOnline, Index: 2, Incarnation: 5, BootID: "b2", Roles: []string{"voter", "storage", "host"}, Vote: "leader", Raft: "127.0.0.12:7421", API: "127.0.0.12:7420", Gossip: "127.0.0.12:7422",
			Portals: []string{"127.0.0.12:3260"}, Initiator: "iqn.2026-11.io.blockhouse:n2", LeaseLeft: 1900 * time.Millisecond, Control: "up", Since: now.Add(-26 * time.Hour), Format: 1,
			Workers: map[string]api.Worker{
				"storage": {Kind: "storage", PID: 101, Started: now.Add(-26 * time.Hour), Incarnation: "w1", State: "serving", Index: 42},
				"locks":   {Kind: "locks", PID: 102, Started: now.Add(-2 * time.Second), Incarnation: "w2", State: "shut", Index: 41},
			}},
		{Name: "n3", State: api.NodeOnline, Index: 3, Roles: []string{"voter", "storage"}, Vote: "voter", LeaseLeft: 1800 * time.Millisecond, Control: "up", Since: now.Add(-25 * time.Hour), Format: 1},
	}
	sampleQuorum = api.Quorum{Quorate: true, Leader: "n2", Voters: []string{"n1", "n2", "n3"}, Online: []string{"n2", "n3"}, Needed: 2, Term: 7, Commit: 42, Survives: 0, Profile: "normal"}
	sampleVolume = api.Volume{Name: "v1", UUID: "4a1c0f2e-0000-4000-8000-000000000001", Size: 64 << 20, BlockSize: 512, State: "ready", Health: api.HealthDegraded, Cause: "not redundant: one copy",
		Epoch: 3, Primary: "n3", ISR: []string{"n3"}, Replicas: []string{"n3"}, LUNs: []string{"iqn.2026-11.io.blockhouse:demo:disks/1"}}
	sampleLUN = api.LUN{Target: "iqn.2026-11.io.blockhouse:demo:disks", LUN: 1, Volume: "v1", Generation: 9, State: api.HealthOK, WWID: "36e0c0de000000000000000000000001",
		URLs: []string{"iscsi://127.0.0.13:3260/iqn.2026-11.io.blockhouse:demo:disks/1"}}
	sampleTarget = api.Target{IQN: sampleLUN.Target, TID: 1, LUNs: []api.LUN{sampleLUN}, ACL: api.ACL{Initiators: []string{"iqn.1993-08.org.debian:01:abc"}, Addresses: []string{"192.0.2.0/24"}},
		Portals: []string{"127.0.0.11:3260,1", "127.0.0.13:3260,3"}, Sessions: 2}
	samplePortals = []api.Portal{{Node: "n1", Address: "127.0.0.11:3260", From: "file", State: "unknown"}, {Node: "n2", Address: "127.0.0.12:3260", From: "file", State: "open"},
		{Node: "n2", Address: "[fd00::12]:3261", From: "cluster", State: "failed", Error: "open portal [fd00::12]:3261: portal is in use by pid 7 (tgtd)"}}
	sampleFence = api.Fence{Node: "n1", Incarnation: 4, Epoch: 12, Since: now.Add(-3 * time.Minute), Reason: "node lease ended", Waiting: "an operator: clusteradm fence_manual n1"}
	sampleToken = api.Token{ID: "t1", Expires: now.Add(time.Hour), Uses: 1}
	sampleSess  = api.Session{Node: "n3", Target: sampleLUN.Target, Initiator: "iqn.1993-08.org.debian:01:abc\x1b[31m", Address: "192.0.2.7:51000", ISID: "00023d000001", TSIH: 3, Since: now.Add(-90 * time.Second),
		Commands: 12, ReadBytes: 3 << 29, WriteBytes: 4096, Local: "127.0.0.13:3260", User: "christina", Connections: 2, IO: &sampleIO,
		Params: map[string]string{"HeaderDigest": "CRC32C", "DataDigest": "None", "MaxConnections": "4"}, DigestErrors: 1}
	sampleIO = api.IOStats{Commands: 12, InProgress: 2, Reads: 6, Writes: 2, ReadBytes: 3 << 29, WriteBytes: 4096, Aborted: 1, Errors: map[string]uint64{"medium_error": 1, "unit_attention": 2},
		Latency: map[string]latency.Histogram{"read": {Counts: []uint64{0, 0, 0, 0, 4, 0, 0, 0, 2}, SumNS: 60000}, "write": {Counts: []uint64{0, 0, 2}, SumNS: 5000}}}
	sampleStats = api.Stats{APIVersion: api.Version, Nodes: []api.NodeStats{{Node: "n3", Time: now, Worker: "w", Sessions: []api.Session{},
		LUNs: []api.LUNStats{{Node: "n3", Target: sampleLUN.Target, LUN: 1, Volume: "v1", UUID: sampleVolume.UUID, Sessions: 1, IOStats: sampleIO}}}}}
	sampleHistory = api.FenceEvent{Index: 40, Time: now.Add(-3 * time.Minute), Node: "n1", Incarnation: 4, Epoch: 12, Event: "fenced", Method: "manual", Operator: "alice@desk", Reason: "pulled the plug", Evidence: "operator"}
	sampleEvent   = api.Event{Time: now.Add(-3 * time.Minute), Index: 39, Kind: "node.lost", Text: "node n1 is lost: node lease ended", Data: map[string]any{"node": "n1"}}
	sampleStatus  = api.Status{APIVersion: api.Version, Health: api.HealthFaulted, Cluster: "demo", UUID: "u", Node: "n2", Version: "0.1.0", Epoch: 12, View: 8, Index: 42,
		Problems: []api.Problem{
			{Severity: api.HealthFaulted, What: "node n1 is lost", Cause: "its node lease ended 3 minutes ago and nothing proves that it is dead", Action: "reset n1 or cut its power, then say so", Command: "clusteradm fence_manual n1"},
			{Severity: api.HealthDegraded, What: "volume v1 is not redundant", Cause: "one copy, on n3", Action: "nothing today: copies on more nodes come later"},
		},
		Quorum: sampleQuorum, Nodes: sampleNodes, Volumes: []api.Volume{sampleVolume}, Fences: []api.Fence{sampleFence}, LUNs: []api.LUN{sampleLUN}, Targets: []api.Target{sampleTarget}}
)

func listOf[T any](v ...T) api.List[T] {
	return api.List[T]{APIVersion: api.Version, Index: 42, Items: v}
}

const iqnPath = "iqn.2026-11.io.blockhouse:demo:disks"

// sample answers everything.
var sampleReservations = []api.Reservation{
	{Volume: "v1", UUID: "0190-1", Type: "write exclusive, registrants only", Holder: "iqn.1993-08.org.debian:01:abc,i,0x00023d000001", Generation: 3, APTPL: true,
		Registrations: []api.Registration{
			{Initiator: "iqn.1993-08.org.debian:01:abc", Port: "iqn.1993-08.org.debian:01:abc,i,0x00023d000001", TargetPort: 3, Key: "0x000000000000000a", Holder: true},
			{Initiator: "iqn.1993-08.org.debian:01:def", Port: "iqn.1993-08.org.debian:01:def,i,0x00023d000002", TargetPort: 3, AllPorts: true, Key: "0x000000000000000b"}}},
	{Volume: "v2", UUID: "0190-2", ReservedBy: "iqn.1993-08.org.debian:01:def,i,0x00023d000002", Registrations: []api.Registration{}},
}

func sample() map[string]any {
	created := sampleToken
	created.Secret, created.Join = "bh1-secret", "clusteradm join bh1-secret@127.0.0.12:7420"
	done := api.Done{APIVersion: api.Version, Index: 43}
	return map[string]any{
		"GET /v1/status":                             sampleStatus,
		"POST /v1/init":                              done,
		"POST /v1/join":                              done,
		"POST /v1/leave":                             done,
		"GET /v1/tokens":                             listOf(sampleToken),
		"GET /v1/reservations":                       listOf(sampleReservations...),
		"POST /v1/tokens":                            created,
		"DELETE /v1/tokens/t1":                       done,
		"GET /v1/nodes":                              listOf(sampleNodes...),
		"GET /v1/nodes/n2":                           sampleNodes[1],
		"DELETE /v1/nodes/n1":                        done,
		"GET /v1/quorum":                             sampleQuorum,
		"GET /v1/volumes":                            listOf(sampleVolume),
		"POST /v1/volumes":                           sampleVolume,
		"GET /v1/volumes/v1":                         sampleVolume,
		"DELETE /v1/volumes/v1":                      done,
		"GET /v1/targets":                            listOf(sampleTarget),
		"POST /v1/targets":                           sampleTarget,
		"POST /v1/targets/" + iqnPath:                sampleTarget,
		"GET /v1/targets/" + iqnPath:                 sampleTarget,
		"DELETE /v1/targets/" + iqnPath:              done,
		"DELETE /v1/targets/" + iqnPath + "?force=1": done,
		"GET /v1/luns":                               listOf(sampleLUN),
		"POST /v1/luns":                              sampleLUN,
		"DELETE /v1/luns/" + iqnPath + "/1":          done,
		"POST /v1/acls":                              sampleTarget,
		"GET /v1/portals":                            listOf(samplePortals...),
		"POST /v1/portals":                           samplePortals[2],
		"DELETE /v1/portals/n2/%5Bfd00::12%5D:3261":  done,
		"GET /v1/sessions":                           listOf(sampleSess),
		"GET /v1/stats":                              sampleStats,
		"GET /v1/accounts":                           listOf(sampleAccount),
		"POST /v1/accounts":                          sampleAccount,
		"POST /v1/bindings":                          sampleAccount,
		"DELETE /v1/accounts/clyde":                  done,
		"DELETE /v1/accounts/clyde?force=1":          done,
		"DELETE /v1/sessions/n2/7":                   done,
		"GET /v1/fence":                              listOf(sampleFence),
		"GET /v1/fence/history":                      listOf(sampleHistory),
		"POST /v1/fence/ack":                         done,
		"GET /v1/events?follow=0":                    events(false, sampleEvent),
		"GET /v1/events":                             events(true, sampleEvent),
		"GET /v1/volumes/a%2Fb%3Fc":                  sampleVolume,
	}
}

func events(follow bool, evs ...api.Event) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, ": hello\n\n")
		for _, e := range evs {
			b, _ := json.Marshal(e)
			fmt.Fprintf(w, "event: %s\ndata: %s\n\n", e.Kind, b)
		}
		w.(http.Flusher).Flush()
		if follow {
			<-r.Context().Done()
		}
	}
}
