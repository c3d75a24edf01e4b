package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// In a child that the harness starts, the test binary is the program.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		if err := serve(os.Args[2:]); err != nil {
			_, _ = os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// The harness does not rot: every server, with and without digests, once, short. No
// figure is judged, only that each row has one.
func TestSmoke(t *testing.T) {
	t.Parallel()
	testproc.Need(t, "tgtd", "tgtadm")
	dir := t.TempDir()
	out, js := filepath.Join(dir, "page.md"), filepath.Join(dir, "runs.json")
	var log strings.Builder
	err := run([]string{"-time", "60ms", "-warm", "10ms", "-reps", "1", "-size", "8", "-sessions=false", "-iscsi-perf=false", "-dir", dir,
		"-rows", "^(randread 4k qd32|write 128k qd8)$", "-out", out, "-json", js}, []string{os.Args[0]}, &log)
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	b, err := os.ReadFile(js)
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	rows := map[string]int{}
	cpu := 0.0
	for _, s := range r.Series {
		if m := s.mid(); m.IOPS <= 0 || m.MBs <= 0 || m.P50 <= 0 || m.P99 < m.P50 {
			t.Errorf("%s on %s: %+v", s.Row, s.Server, m)
		}
		rows[s.Server]++
		cpu += s.mid().CPU // a short run may be below the clock's tick, all of them are not
	}
	if rows[srvDefault] != 4 || rows[srvTuned] != 4 || rows[srvOurs] != 4 || rows[srvIntegrity] != 2 || cpu <= 0 {
		t.Errorf("rows %v, cpu %v", rows, cpu)
	}
	page, err := os.ReadFile(out)
	if err != nil || !strings.Contains(string(page), "| write 128k qd8 | 1 | on | ours |") {
		t.Errorf("page: %v\n%s", err, page)
	}
	if files, _ := filepath.Glob(filepath.Join(dir, "bench*")); len(files) > 0 {
		t.Errorf("left behind: %v", files)
	}
}

func TestBadArguments(t *testing.T) {
	t.Parallel()
	for _, a := range [][]string{{"-servers", "lio"}, {"-rows", "("}, {"-reps", "0"}, {"-size", "1"}, {"x"}} {
		if err := run(a, nil, &strings.Builder{}); err == nil {
			t.Errorf("%v is taken", a)
		}
	}
}

// The page keeps what stands around the table; the goals are judged on medians.
func TestReport(t *testing.T) {
	t.Parallel()
	page, err := splice("", "one\n")
	if err != nil {
		t.Fatal(err)
	}
	if page, err = splice(page+"why\n", "two\n"); err != nil || !strings.Contains(page, "two\n") || strings.Contains(page, "one") || !strings.HasSuffix(page, "why\n") {
		t.Errorf("%q, %v", page, err)
	}
	if _, err := splice("something else\n", "x"); err == nil {
		t.Error("a page without marks was overwritten")
	}
	r := &report{}
	p := patterns[1]
	for s, iops := range map[string][]float64{srvDefault: {100, 1, 900}, srvOurs: {190, 1, 900}} {
		x := r.series(p.name, p.p, s, 1, false)
		for _, n := range iops {
			x.Samples = append(x.Samples, sample{IOPS: n, P50: time.Millisecond, P99: 2 * time.Millisecond, CPU: 1})
		}
	}
	r.judge()
	got := map[string]bool{}
	for _, v := range r.Verdicts {
		got[v.What] = v.OK
	}
	if len(got) != 3 || got["IOPS : tgtd default"] || got["CPU : tgtd default"] || !got["p99 : tgtd default"] {
		t.Errorf("%+v", r.Verdicts)
	}
}
