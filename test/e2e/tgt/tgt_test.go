// Package tgt runs the tools of tgt against our daemon and, where they are
// installed, beside the real ones, and compares every line.
package tgt

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

func TestMain(m *testing.M) {
	defer cluster.Clean()
	goleak.VerifyTestMain(m)
}

// side is one of the two stacks.
type side struct {
	dir  string // of the tools
	dev  string // folder of the backing stores
	env  []string
	args []string // before those of a line

	portal string
	second string // a portal that is free, $PORTAL in a line
	open   *initiator.Session
}

// login opens a session, which logout ends; it waits until the tools show it or no
// longer show it.
func (s *side) login(t *testing.T, words []string) {
	t.Helper()
	iqn, cfg := words[0], initiator.Config{InitiatorName: "iqn.2026-01.org.x:me"}
	if len(words) == 3 {
		cfg.CHAP = &iscsi.CHAPCredentials{User: words[1], Secret: []byte(words[2]), Algorithms: []iscsi.CHAPAlgorithm{iscsi.CHAPMD5}} // tgtd's 7 is not IANA's
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	d, err := initiator.Login(ctx, s.portal, iqn, cfg)
	if err != nil {
		t.Fatalf("login at %s: %v", s.portal, err)
	}
	s.open = d
	// A session of LUN 1 with something to count.
	if dev, err := d.OpenLUN(ctx, 1); err != nil {
		t.Fatalf("open LUN 1 at %s: %v", s.portal, err)
	} else if err := dev.ReadAt(ctx, make([]byte, 4096), 0); err != nil {
		t.Fatalf("read LUN 1 at %s: %v", s.portal, err)
	}
	s.shown(t, true)
}

func (s *side) logout(t *testing.T) {
	t.Helper()
	if s.open == nil {
		return
	}
	if err := s.open.Close(); err != nil {
		t.Log(err) // the target may have ended it
	}
	s.open = nil
	s.shown(t, false)
}

func (s *side) shown(t *testing.T, want bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if strings.Contains(strings.Join(s.run(t, "tgtadm --op show --mode target"), "\n"), "Connection: ") == want {
			return
		}
	}
	t.Fatalf("that a session is there is shown: never %v", want)
}

// run runs a line and gives what it wrote, standard error behind standard output,
// and its exit code as the last line.
func (s *side) run(t *testing.T, line string) []string {
	t.Helper()
	words := strings.Fields(strings.NewReplacer("$DEV", s.dev, "$PORTAL", s.second).Replace(line))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	args := append([]string{}, s.args...)
	cmd := exec.CommandContext(ctx, filepath.Join(s.dir, words[0]), append(args, words[1:]...)...)
	cmd.Args[0] = words[0] // it stands before messages
	cmd.Env = append(os.Environ(), s.env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	code := 0
	if err := cmd.Run(); err != nil {
		ee, ok := err.(*exec.ExitError) //nolint:errorlint // Run gives it bare
		if !ok {
			t.Fatalf("%s: %v", line, err)
		}
		code = ee.ExitCode()
	}
	text := strings.ReplaceAll(out.String()+errs.String(), s.dev, "$DEV")
	if s.second != "" {
		text = strings.ReplaceAll(text, s.second, "$PORTAL")
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if text == "" {
		lines = nil
	}
	return append(lines, fmt.Sprintf("exit %d", code))
}

// rule is an allowed difference.
type rule struct {
	// '=' a pair of lines, '-' only the real tool has it, '+' only ours, '~' the
	// whole output: real is then the command line, ours what we write for it.
	kind       byte
	real, ours *regexp.Regexp
	text       string
	used       bool
}

// readRules reads testdata/differences: "KIND /real/ /ours/ reason".
func readRules(t *testing.T) []*rule {
	t.Helper()
	b, err := os.ReadFile("testdata/differences")
	if err != nil {
		t.Fatal(err)
	}
	var out []*rule
	for n, l := range strings.Split(string(b), "\n") {
		if l == "" || l[0] == '#' {
			continue
		}
		p := strings.Split(l, "\t")
		if len(p) != 4 || len(p[0]) != 1 || !strings.Contains("=-+~", p[0]) || strings.TrimSpace(p[3]) == "" {
			t.Fatalf("testdata/differences:%d: KIND, real, ours and reason, with tabs between, are needed: %q", n+1, l)
		}
		out = append(out, &rule{kind: p[0][0], real: regexp.MustCompile("^(?:" + p[1] + ")$"), ours: regexp.MustCompile("^(?:" + p[2] + ")$"), text: l})
	}
	return out
}

// compare walks both outputs; the first line without a rule is the failure.
func compare(rules []*rule, real, ours []string) error {
	i, j := 0, 0
next:
	for i < len(real) || j < len(ours) {
		if i < len(real) && j < len(ours) && real[i] == ours[j] {
			i, j = i+1, j+1
			continue
		}
		for _, r := range rules {
			a := i < len(real) && r.real.MatchString(real[i])
			b := j < len(ours) && r.ours.MatchString(ours[j])
			switch {
			case r.kind == '=' && a && b:
				i, j = i+1, j+1
			case r.kind == '-' && a:
				i++
			case r.kind == '+' && b:
				j++
			default:
				continue
			}
			r.used = true
			continue next
		}
		return fmt.Errorf("real %q, ours %q", at(real, i), at(ours, j))
	}
	return nil
}

func at(s []string, i int) string {
	if i < len(s) {
		return s[i]
	}
	return "(nothing)"
}

func stores(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, n := range []string{"sda5", "sda6", "sda7"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(dir, n), 64<<20); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// ours starts a node and links the names.
func ours(t *testing.T) (*side, *cluster.Cluster) {
	t.Helper()
	c := cluster.New(t, 1).Up()
	dir := t.TempDir()
	if out, err := exec.Command(filepath.Join(cluster.Bin(t), "clusteradm"), "compat", "install", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return &side{dir: dir, dev: stores(t), portal: c.Nodes[0].IP + ":3260", second: c.Nodes[0].IP + ":3261", env: []string{"BLOCKHOUSE_SOCKET=" + filepath.Join(c.Nodes[0].Run, "clusterd.sock")}}, c
}

// theirs starts a tgtd with a control socket and a portal of its own.
func theirs(t *testing.T) *side {
	t.Helper()
	testproc.Need(t, "tgtd", "tgtadm", "tgt-admin")
	prog, err := testproc.Find("tgtadm")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &side{dir: filepath.Dir(prog), dev: stores(t), env: []string{"TGT_IPC_SOCKET=" + filepath.Join(dir, "s"), "PATH=" + filepath.Dir(prog) + ":" + os.Getenv("PATH")}, args: []string{"-C", "7799"}}
	port := testproc.FreePort(t)
	s.portal = fmt.Sprintf("127.0.0.1:%d", port)
	s.second = fmt.Sprintf("127.0.0.1:%d", testproc.FreePort(t))
	p := testproc.Start(t, testproc.Spec{Name: "tgtd", Env: s.env, Grace: time.Millisecond,
		Args: []string{"tgtd", "-f", "-C", "7799", "--iscsi", fmt.Sprintf("portal=127.0.0.1:%d", port)}})
	for range 100 {
		if out := s.run(t, "tgtadm --op show --mode portal"); len(out) == 2 && strings.HasPrefix(out[0], "Portal: ") {
			// A busy portal makes tgtd serve every address instead: not on this host.
			if want := fmt.Sprintf("Portal: 127.0.0.1:%d,1", port); out[0] != want {
				t.Fatalf("tgtd serves %s, want %s", out[0], want)
			}
			return s
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("tgtd does not answer: %s", p.Tail(2000))
	return nil
}

func script(t *testing.T, name string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range strings.Split(string(b), "\n") {
		if l != "" && l[0] != '#' {
			out = append(out, l)
		}
	}
	return out
}

// Every line of the scripts gives the same as with the real tools, but for the
// differences that are written down; and each of those occurs.
func TestBesideTheRealTool(t *testing.T) {
	real := theirs(t)
	our, _ := ours(t)
	our.args = real.args // taken, and of no meaning here
	rules := readRules(t)
	for _, s := range []*side{real, our} {
		if err := os.Mkdir(filepath.Join(s.dev, "conf"), 0o755); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob("testdata/conf/*.conf")
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(s.dev, "conf", filepath.Base(f)), bytes.ReplaceAll(b, []byte("$DEV"), []byte(s.dev)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, line := range append(script(t, "beside.script"), script(t, "admin.script")...) {
		words := strings.Fields(line)
		switch words[0] {
		case "@login":
			real.login(t, words[1:])
			our.login(t, words[1:])
			continue
		case "@logout":
			real.logout(t)
			our.logout(t)
			continue
		}
		a, b := real.run(t, line), our.run(t, line)
		if apart(t, rules, line, a, b) {
			continue
		}
		if err := compare(rules, a, b); err != nil {
			t.Errorf("%s\n%v\nreal:\n  %s\nours:\n  %s", line, err, strings.Join(a, "\n  "), strings.Join(b, "\n  "))
		}
	}
	for _, r := range rules {
		if !r.used {
			t.Errorf("testdata/differences: this does not occur: %s", r.text)
		}
	}
}

// apart finds a '~' rule for a line and checks that the two differ as it says.
func apart(t *testing.T, rules []*rule, line string, real, ours []string) bool {
	for _, r := range rules {
		if r.kind != '~' || !r.real.MatchString(line) {
			continue
		}
		r.used = true
		if got := strings.Join(ours, " | "); !r.ours.MatchString(got) || got == strings.Join(real, " | ") {
			t.Errorf("%s\nours: %s\nreal: %s\nrule: %s", line, got, strings.Join(real, " | "), r.text)
		}
		return true
	}
	return false
}

func TestCompare(t *testing.T) {
	t.Parallel()
	re := regexp.MustCompile
	rules := []*rule{{kind: '=', real: re("^A.*$"), ours: re("^B.*$")}, {kind: '+', real: re("^$"), ours: re("^why.*$")}, {kind: '-', real: re("^gone$"), ours: re("^$")}}
	if err := compare(rules, []string{"x", "A1", "gone", "y"}, []string{"x", "B2", "y", "why"}); err != nil {
		t.Error(err)
	}
	for _, c := range [][2][]string{{{"x"}, {"y"}}, {{"x"}, nil}, {nil, {"x"}}, {{"B1"}, {"A1"}}, {{"why"}, {}}, {{}, {"gone"}}} {
		if compare(rules, c[0], c[1]) == nil {
			t.Errorf("%q and %q are the same", c[0], c[1])
		}
	}
}
