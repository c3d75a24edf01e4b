package verbs

import (
	"encoding/json"
	"math"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/latency"
)

func lunAt(n int, reads, bytes uint64, us ...int64) api.LUNStats {
	var r latency.Recorder
	for _, u := range us {
		r.Record(u * 1000)
	}
	var h latency.Histogram
	r.AddTo(&h)
	return api.LUNStats{Target: "iqn.t", LUN: n, Volume: "v", UUID: "u", IOStats: api.IOStats{Reads: reads, ReadBytes: bytes, InProgress: 3,
		Errors: map[string]uint64{"medium_error": reads / 10}, Latency: map[string]latency.Histogram{"read": h}}}
}

func TestLUNRates(t *testing.T) {
	t.Parallel()
	at := func(s int, worker string, ls ...api.LUNStats) api.Stats {
		return api.Stats{Nodes: []api.NodeStats{{Node: "n1", Time: now.Add(time.Duration(s) * time.Second), Worker: worker, LUNs: ls}}}
	}
	old := at(0, "w", lunAt(1, 100, 1<<20, 10, 10, 10))
	s := ratesOf(old, at(2, "w", lunAt(1, 140, 5<<20, 10, 10, 10, 1000, 1000, 1000, 8000), lunAt(2, 10, 0, 5)))
	if len(s.LUNs) != 2 {
		t.Fatalf("%+v", s)
	}
	l := s.LUNs[0]
	if l.IOPS != 2 || l.ReadIOPS != 20 || l.ReadBytes != 2<<20 || l.Errors != 2 || l.QueueDepth != 3 {
		t.Errorf("%+v", l)
	}
	if l.P50NS < 750*time.Microsecond || l.P50NS > 1250*time.Microsecond || l.P99NS < 6*time.Millisecond || l.P99NS > 10*time.Millisecond {
		t.Errorf("p50 %v, p99 %v: the old ones must not count", l.P50NS, l.P99NS)
	}
	if s.LUNs[1].IOPS != 0.5 || s.LUNs[1].ReadIOPS != 5 {
		t.Errorf("a LUN that began in between: %+v", s.LUNs[1])
	}
	// Another worker process begins at 0.
	if l := ratesOf(old, at(2, "x", lunAt(1, 120, 0, 7))).LUNs[0]; l.ReadIOPS != 60 || l.IOPS != 0.5 {
		t.Errorf("%+v", l)
	}
	// The counters of a LUN that was made again are lower.
	if l := ratesOf(old, at(2, "w", lunAt(1, 50, 0, 7))).LUNs[0]; l.ReadIOPS != 25 || l.ReadBytes != 0 || math.IsInf(l.IOPS, 0) {
		t.Errorf("%+v", l)
	}
	down := api.Stats{Nodes: []api.NodeStats{{Node: "n1", Error: "down", Time: now}}}
	if s := ratesOf(old, down); len(s.LUNs) != 0 || s.Missing["n1"] != "down" {
		t.Errorf("%+v", s)
	}
	if s := ratesOf(down, at(2, "w", lunAt(1, 50, 0, 7))); len(s.LUNs) != 0 {
		t.Errorf("one answer makes no rate: %+v", s)
	}
	ls := []lunRate{{Volume: "slow", P99NS: 9, IOPS: 1}, {Volume: "busy", IOPS: 50, LUN: 2}}
	for by, first := range map[string]string{"iops": "busy", "p99": "slow", "name": "slow"} {
		if sortLUNs(ls, by); ls[0].Volume != first {
			t.Errorf("--sort %s: %+v", by, ls)
		}
	}
}

func TestLUNTop(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	answers := sample()
	answers["GET /v1/stats"] = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		i := n.Add(1)
		us := make([]int64, i*10)
		for k := range us {
			us[k] = 100
		}
		st := api.Stats{Nodes: []api.NodeStats{
			{Node: "n1", Time: now.Add(time.Duration(i) * time.Second), Worker: "w", LUNs: []api.LUNStats{lunAt(1, uint64(i)*10, uint64(i)*1e6, us...), {Target: "iqn.t", LUN: 2, Volume: "idle"}}},
			{Node: "n2", Error: "it is asleep"}}}
		_ = json.NewEncoder(w).Encode(st)
	})
	f := newFake(t, answers)
	got := f.run(t, "", "lun", "top", "--count", "2", "--interval", "100ms")
	lines := strings.Split(strings.TrimRight(got.out, "\n"), "\n")
	if got.code != 0 || len(lines) != 5 || !strings.HasPrefix(lines[0], "TIME") || !strings.Contains(got.err, "n2 does not answer: it is asleep") || strings.Contains(got.out, "\x1b") {
		t.Fatalf("%+v", got)
	}
	if w := strings.Fields(lines[1]); w[3] != "1" || w[5] != "10.0" || w[8] != "1.00" || !strings.HasSuffix(w[11], "µs") || w[12] != "3" {
		t.Errorf("%q", w)
	}
	got = f.run(t, "", "lun", "top", "-n", "2", "--interval", "100ms", "-o", "json", "--busy")
	docs := strings.Split(strings.TrimRight(got.out, "\n"), "\n")
	if got.code != 0 || len(docs) != 2 {
		t.Fatalf("%+v", got)
	}
	for _, d := range docs {
		var s lunSample
		if err := json.Unmarshal([]byte(d), &s); err != nil || len(s.LUNs) != 1 || s.Kind != "LUNSample" || s.APIVersion != api.Version || s.Missing["n2"] == "" {
			t.Errorf("%v: %s", err, d)
		}
	}
	for _, args := range [][]string{{"--sort", "size"}, {"--interval", "1ms"}, {"--count", "-1"}, {"-o", "yaml"}} {
		if got := f.run(t, "", append([]string{"lun", "top"}, args...)...); got.code != 2 || !strings.Contains(got.err, "lun top") {
			t.Errorf("%v: %+v", args, got)
		}
	}
}
