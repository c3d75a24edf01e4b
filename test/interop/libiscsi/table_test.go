package libiscsi

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

var rewrite = flag.Bool("rewrite", false, "write the table of docs/conformance.md, and with BLOCKHOUSE_PROVE the figures of tgtd, anew")

const (
	page       = "../../../docs/conformance.md"
	tableBegin = "<!-- table: go test ./test/interop/libiscsi -run TestList -rewrite -->\n"
	tableEnd   = "<!-- end of table -->\n"
	theirs     = "testdata/tgtd.txt"
)

// table is the table by family: ours over all variants, tgtd's from its file.
func table(t *testing.T, best []Result) string {
	t.Helper()
	b, err := os.ReadFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	tgtd := map[string]Count{}
	var all Count
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		var name string
		var c Count
		if _, err := fmt.Sscan(line, &name, &c.Pass, &c.Fail, &c.Skip); err != nil {
			t.Fatalf("%s: %q: %v", theirs, line, err)
		}
		tgtd[name] = c
		all.Pass, all.Fail, all.Skip = all.Pass+c.Pass, all.Fail+c.Fail, all.Skip+c.Skip
	}
	names, ours, n := Families(best)
	var s strings.Builder
	s.WriteString("| family | ours: pass | fail | skip | tgtd: pass | fail | skip |\n|---|---|---|---|---|---|---|\n")
	row := func(name string, a, b Count) {
		fmt.Fprintf(&s, "| %s | %d | %d | %d | %d | %d | %d |\n", name, a.Pass, a.Fail, a.Skip, b.Pass, b.Fail, b.Skip)
	}
	for _, f := range names {
		row(f, ours[f], tgtd[f])
	}
	row("**all**", n, all)
	return s.String()
}

// checkTable holds docs/conformance.md to what was just seen.
func checkTable(t *testing.T, all []string, best []Result) {
	t.Helper()
	at := map[string]Result{}
	for _, r := range best {
		at[r.Test] = r
	}
	sorted := make([]Result, 0, len(best)) // in the order of the list
	for _, name := range all {
		if r, ok := at[name]; ok {
			sorted = append(sorted, r)
		}
	}
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(b), tableBegin)
	have, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", page)
	}
	want := table(t, sorted)
	switch {
	case have == want:
	case *rewrite:
		if err := os.WriteFile(page, []byte(before+tableBegin+want+tableEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("the table of %s is not what was seen; -rewrite writes it:\n%s", page, want)
	}
}

// TestTgtd runs the whole list against the installed tgtd, as the sheet of facts
// did: one LUN of 1 GiB, thin, no variants. `make prove PKG=./test/interop/libiscsi`
// runs it.
func TestTgtd(t *testing.T) {
	if os.Getenv(testproc.ProveEnv) == "" {
		t.Skipf("skip: runs with %s (make prove)", testproc.ProveEnv)
	}
	testproc.Need(t, Program, "tgtd", "tgtadm")
	dir := t.TempDir()
	env := []string{"TGT_IPC_SOCKET=" + filepath.Join(dir, "s")}
	port := testproc.FreePort(t)
	const control = "7801"
	start := func() *testproc.Proc {
		p := testproc.Start(t, testproc.Spec{Name: "tgtd", Env: env, Grace: time.Millisecond,
			Args: []string{"tgtd", "-f", "-C", control, "--iscsi", fmt.Sprintf("portal=127.0.0.1:%d", port)}})
		for _, args := range []string{
			"--mode target --op new --tid 1 -T " + iqn,
			"--mode logicalunit --op new --tid 1 --lun 1 -b " + filepath.Join(dir, "lun"),
			"--mode logicalunit --op update --tid 1 --lun 1 --params thin_provisioning=1",
			"--mode target --op bind --tid 1 -I ALL",
		} {
			var err error
			for range 100 {
				c := testproc.Start(t, testproc.Spec{Name: "tgtadm", Env: env, Args: append([]string{"tgtadm", "-C", control, "--lld", "iscsi"}, strings.Fields(args)...)})
				if err = c.Wait(10 * time.Second); err == nil {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
			if err != nil {
				t.Fatalf("tgtadm %s: %v", args, err)
			}
		}
		return p
	}
	f, err := os.Create(filepath.Join(dir, "lun"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	all, err := List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := start()
	r := &Runner{URL: fmt.Sprintf("iscsi://127.0.0.1:%d/%s/1", port, iqn), Limit: 40 * time.Second}
	var rs []Result
	for _, name := range all {
		rs = append(rs, r.Run(t.Context(), name))
		select {
		case <-p.Done():
			t.Logf("tgtd died in %s", name)
			p = start()
		default:
		}
	}
	names, counts, n := Families(rs)
	t.Logf("tgtd: %d pass, %d fail, %d skip", n.Pass, n.Fail, n.Skip)
	if !*rewrite {
		return
	}
	var s strings.Builder
	s.WriteString("# tgtd (Debian): family, passed, failed, skipped. Written by TestTgtd -rewrite.\n")
	for _, f := range names {
		c := counts[f]
		fmt.Fprintf(&s, "%s %d %d %d\n", f, c.Pass, c.Fail, c.Skip)
	}
	if err := os.WriteFile(theirs, []byte(s.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}
