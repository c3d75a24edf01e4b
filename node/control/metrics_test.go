package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/latency"
)

// TestMetricsAreDocumented: docs/metrics.md lists what the sources name, no less
// and no more.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(blockhouse_[a-z_]+)` \\|").FindAllStringSubmatch(string(doc), -1) {
		if documented[m[1]] {
			t.Errorf("%s is documented twice", m[1])
		}
		documented[m[1]] = true
	}
	inSource := map[string]bool{}
	for _, dir := range []string{".", "../../membership/raftlog"} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatal(dir, err)
		}
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			src, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`"(blockhouse_[a-z_]+)"`).FindAllStringSubmatch(string(src), -1) {
				if !strings.HasSuffix(m[1], "_sink") { // the name of a collector, of no metric
					inSource[m[1]] = true
				}
			}
		}
	}
	for n := range inSource {
		if !documented[n] {
			t.Errorf("%s is not in docs/metrics.md", n)
		}
	}
	for n := range documented {
		if !inSource[n] {
			t.Errorf("docs/metrics.md has %s, which nothing exports", n)
		}
	}
}

func gather(t *testing.T, c prometheus.Collector) map[string]*dto.MetricFamily {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(c); err != nil {
		t.Fatal(err)
	}
	fs, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*dto.MetricFamily{}
	for _, f := range fs {
		out[f.GetName()] = f
	}
	return out
}

func TestStorageMetrics(t *testing.T) {
	t.Parallel()
	var h latency.Histogram
	var r latency.Recorder
	for _, d := range []time.Duration{10 * time.Microsecond, 20 * time.Microsecond, 3 * time.Millisecond, time.Minute} {
		r.Record(int64(d))
	}
	r.AddTo(&h)
	io := api.IOStats{Commands: 9, InProgress: 2, Reads: 4, ReadBytes: 4096, Errors: map[string]uint64{"medium_error": 3}, Latency: map[string]latency.Histogram{"read": h}}
	s := api.NodeStats{Logins: 5, Refused: 3, AuthFailures: 2, LUNs: []api.LUNStats{{Target: "iqn.x:t", LUN: 7, Volume: "v", IOStats: io}}}
	for i := range 2 * maxSessionSeries {
		s.Sessions = append(s.Sessions, api.Session{Target: "iqn.x:t", Initiator: fmt.Sprintf("iqn.y:%d", i), ISID: "a", IO: &io})
	}
	s.Sessions[1].Initiator = "\xff"
	s.Sessions = append(s.Sessions, api.Session{Discovery: true, IO: &io})
	s.Sessions = slices.Insert(s.Sessions, 1, s.Sessions[0]) // one that is being reinstated
	c := &storageMetrics{log: zap.NewNop(), ask: func(context.Context) (api.NodeStats, bool, error) { return s, true, nil }}
	fs := gather(t, c)
	var names []string
	ch := make(chan *prometheus.Desc, 100)
	c.Describe(ch)
	close(ch)
	for d := range ch {
		names = append(names, regexp.MustCompile(`fqName: "([^"]+)"`).FindStringSubmatch(d.String())[1])
	}
	for _, n := range names {
		if fs[n] == nil {
			t.Errorf("%s is described and not exported", n)
		}
	}
	if n := len(fs["blockhouse_session_commands_total"].GetMetric()); n != maxSessionSeries {
		t.Errorf("%d sessions are listed", n)
	}
	if v := fs["blockhouse_target_sessions_unlisted"].GetMetric()[0].GetGauge().GetValue(); v != maxSessionSeries+2 {
		t.Errorf("%v are not listed", v)
	}
	// What the page says of cardinality.
	series := func(prefix string, of func(*dto.Metric) bool) (n int) {
		for name, f := range fs {
			if !strings.HasPrefix(name, prefix) {
				continue
			}
			for _, m := range f.GetMetric() {
				if !of(m) {
					continue
				}
				if hi := m.GetHistogram(); hi != nil {
					n += len(hi.GetBucket()) + 3 // +Inf, sum, count
				} else {
					n++
				}
			}
		}
		return n
	}
	all := func(*dto.Metric) bool { return true }
	lun := series("blockhouse_lun_", all)
	sess := series("blockhouse_session_", func(m *dto.Metric) bool {
		return slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == "initiator" && l.GetValue() == "iqn.y:5" })
	})
	node := series("blockhouse_target_", all) + series("blockhouse_storage_", all)
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("**Cardinality**: %d series for a LUN, %d for a session, %d for the node", lun, sess, node); !strings.Contains(string(doc), want) {
		t.Errorf("docs/metrics.md lacks %q", want)
	}
	for _, m := range fs["blockhouse_lun_latency_seconds"].GetMetric() {
		if m.GetLabel()[1].GetValue() != "read" && m.GetLabel()[1].GetName() == "op" {
			continue
		}
		hi := m.GetHistogram()
		if hi.GetSampleCount() != 4 || hi.GetBucket()[0].GetUpperBound() != 16e-6 || hi.GetBucket()[0].GetCumulativeCount() != 1 ||
			hi.GetBucket()[1].GetCumulativeCount() != 2 || hi.GetBucket()[len(hi.GetBucket())-1].GetCumulativeCount() != 3 {
			t.Errorf("%v", hi)
		}
	}

	c.ask = func(context.Context) (api.NodeStats, bool, error) { return api.NodeStats{}, true, errors.New("down") }
	if fs := gather(t, c); len(fs) != 1 || fs["blockhouse_storage_up"].GetMetric()[0].GetGauge().GetValue() != 0 {
		t.Errorf("%v", fs)
	}
	c.ask = func(context.Context) (api.NodeStats, bool, error) { return api.NodeStats{}, false, nil }
	if fs := gather(t, c); len(fs) != 0 {
		t.Errorf("%v", fs)
	}
}
