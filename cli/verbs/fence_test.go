package verbs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
)

// terminal opens a pseudo-terminal: what a person types goes into master, what
// they see comes out of it.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("skip: /dev/ptmx is not there")
	}
	fd := int(m.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	s, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); m.Close() })
	return m, s
}

// onTerminal runs clusteradm with all three files on a terminal on which typed
// was typed, and returns what was seen there.
func (f *fake) onTerminal(t *testing.T, env map[string]string, typed string, args ...string) (int, string) {
	t.Helper()
	m, s := terminal(t)
	if _, err := m.WriteString(typed); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(&seen, m) }) // ends with EIO when the last slave closes
	o := IO{In: s, Out: s, Err: s, Now: func() time.Time { return now }, Env: func(k string) string {
		if k == EnvSocket {
			return f.socket
		}
		return env[k]
	}}
	code := Run(t.Context(), "clusteradm", args, o)
	s.Close()
	wg.Wait()
	return code, strings.ReplaceAll(seen.String(), "\r\n", "\n")
}

const (
	warning = "About to override fencing for n1.\nImproper use of this command can cause severe file system damage.\n\n"
	prompt  = "Continue [NO/absolutely]? "
)

func acks(f *fake) []request {
	var r []request
	for _, q := range f.requests() {
		if q.Line == "POST /v1/fence/ack" {
			r = append(r, q)
		}
	}
	return r
}

func TestFenceManualOnTerminal(t *testing.T) {
	t.Parallel()
	for typed, code := range map[string]int{
		"absolutely\n": 0, " absolutely \n": 0,
		"yes\n": 1, "y\n": 1, "\n": 1, "Absolutely\n": 1, "ABSOLUTELY\n": 1, "absolutely yes\n": 1, "NO\n": 1, "n1\n": 1, "\x04": 1,
	} {
		for _, cmd := range []string{"fence_manual n1", "fence_ack_manual -n n1", "fence ack n1", "fence_manual n1 --yes"} {
			t.Run(fmt.Sprintf("%s/%q", cmd, typed), func(t *testing.T) {
				t.Parallel()
				f := newFake(t, sample())
				got, seen := f.onTerminal(t, nil, typed, strings.Fields(cmd)...)
				if got != code || !strings.Contains(seen, warning+prompt) {
					t.Errorf("exit %d, want %d; seen %q", got, code, seen)
				}
				want, end := 0, "Aborted.\n"
				if code == 0 {
					want, end = 1, "Done\n"
				}
				if n := len(acks(f)); n != want || !strings.HasSuffix(seen, end) {
					t.Errorf("%d acknowledgements, want %d; seen %q", n, want, seen)
				}
			})
		}
	}
}

// The record says who, why and how.
func TestFenceManualRecord(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	if code, seen := f.onTerminal(t, nil, "absolutely\n", "fence_manual", "n1", "--reason", "pulled the plug"); code != 0 {
		t.Fatalf("exit %d: %s", code, seen)
	}
	f.run(t, "", "fence", "ack", "n1", "--yes-i-reset-it", "n1")
	host, _ := os.Hostname()
	r := acks(f)
	if len(r) != 2 {
		t.Fatalf("%+v", r)
	}
	if op, _ := r[0].Body["operator"].(string); !strings.HasSuffix(op, "@"+host) || strings.HasPrefix(op, "@") {
		t.Errorf("operator %q", op)
	}
	if r[0].Body["node"] != "n1" || r[0].Body["reason"] != "pulled the plug" || r[0].Body["confirm"] != "absolutely" || r[1].Body["confirm"] != "n1" {
		t.Errorf("%+v", r)
	}
}

func TestOperatorBehindSudo(t *testing.T) {
	t.Parallel()
	got := operator(func(k string) string { return map[string]string{"SUDO_USER": "alice"}[k] })
	if root := os.Geteuid() == 0; root != strings.HasPrefix(got, "alice@") {
		t.Errorf("root %v: operator %q", root, got) // only root can have come through sudo
	}
}

// Without a terminal only the node's name, said twice, is taken.
func TestFenceManualWithoutTerminal(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]struct {
		code int
		text string
	}{
		"fence_manual n1":                            {9, "next: clusteradm fence_manual n1 --yes-i-reset-it n1"},
		"fence_manual n1 --yes":                      {9, "no terminal"},
		"fence_manual n1 --yes-i-reset-it n2":        {9, "is not the node n1"},
		"fence_manual n1 --yes-i-reset-it n1":        {0, ""},
		"fence ack n1 --yes-i-reset-it n1":           {0, ""},
		"fence_ack_manual -n n1 --yes-i-reset-it n1": {0, ""},
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, sample())
			got := f.run(t, "absolutely\n", strings.Fields(args)...)
			if got.code != want.code || !strings.Contains(got.err, want.text) {
				t.Errorf("%+v", got)
			}
			if n := len(acks(f)); (n == 1) != (want.code == 0) {
				t.Errorf("%d acknowledgements", n)
			}
		})
	}
}

// No open fence: refused with 9 before anything is asked, and told what to run.
func TestFenceManualWithoutFence(t *testing.T) {
	t.Parallel()
	none := sample()
	none["GET /v1/fence"] = listOf[api.Fence]()
	for _, c := range []struct {
		ans        map[string]any
		node, text string
	}{
		{none, "n2", "no open fence for n2; the node is online: nothing waits for you\nnext: clusteradm fence history\n"},
		{none, "n9", "no open fence for n9; there is no node of that name: nothing waits for you\nnext: clusteradm node list\n"},
		{sample(), "n2", "no open fence for n2; the node is online; open fences: n1: nothing waits for you\nnext: clusteradm fence list\n"},
	} {
		f := newFake(t, c.ans)
		code, seen := f.onTerminal(t, nil, "absolutely\n", "fence_manual", c.node)
		if code != 9 || !strings.Contains(seen, c.text) || strings.Contains(seen, "About to override") || len(acks(f)) != 0 {
			t.Errorf("%s: exit %d, %q", c.node, code, seen)
		}
		got := f.run(t, "", "fence_manual", c.node, "--yes-i-reset-it", c.node)
		if got.code != 9 || len(acks(f)) != 0 {
			t.Errorf("%s: %+v", c.node, got)
		}
		if got := f.face("absolutely\n", c.node); got.code != 9 || len(acks(f)) != 0 {
			t.Errorf("%s as fence_ack_manual: %+v", c.node, got)
		}
	}
}

func (f *fake) face(stdin string, args ...string) result {
	var out, errb bytes.Buffer
	code := fenceAckFace(context.Background(), "fence_ack_manual", args, IO{In: strings.NewReader(stdin), Out: &out, Err: &errb, Env: func(k string) string {
		if k == EnvSocket {
			return f.socket
		}
		return ""
	}})
	return result{code, out.String(), errb.String()}
}

// Old scripts: echo absolutely | fence_ack_manual n2.
func TestFenceAckManualFace(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		stdin, args string
		want        result
	}{
		{"absolutely\n", "n1", result{0, warning + "Done\n", ""}},
		{"absolutely\n", "-n n1", result{0, warning + "Done\n", ""}},
		{"absolutely\n", "-O -n n1", result{0, warning + "Done\n", ""}},
		{"absolutely", "n1", result{0, warning + "Done\n", ""}}, // printf, without a newline
		{"absolutely\n", "-s 127.0.0.11", result{0, warning + "Done\n", ""}},
		{"yes\n", "n1", result{1, warning + "Aborted.\n", ""}},
		{"", "n1", result{1, warning + "Aborted.\n", ""}},
		{"", "n1 --yes-i-reset-it n1", result{0, "Done\n", ""}},
		{"absolutely\n", "-s 192.0.2.1", result{9, "", "fence_ack_manual: no node has the address 192.0.2.1\nnext: clusteradm node list -o wide\n"}},
		{"absolutely\n", "", result{1, "", "fence_ack_manual: missing NODE\nnext: clusteradm fence list\n"}},
		{"absolutely\n", "-x", result{1, "", "fence_ack_manual: unknown shorthand flag: 'x' in -x\nnext: fence_ack_manual -h\n"}},
	} {
		t.Run(c.args+"/"+c.stdin, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, sample())
			got := f.face(c.stdin, strings.Fields(c.args)...)
			if got != c.want {
				t.Errorf("got %+v\nwant %+v", got, c.want)
			}
			if n := len(acks(f)); (n == 1) != (c.want.code == 0) {
				t.Errorf("%d acknowledgements", n)
			}
		})
	}
}

// The daemon has the last word.
func TestFenceManualRefusedByTheCluster(t *testing.T) {
	t.Parallel()
	ans := sample()
	ans["POST /v1/fence/ack"] = api.Errorf(api.CodeNoQuorum, "clusteradm quorum show", "fence ack n1: no quorum")
	f := newFake(t, ans)
	if code, seen := f.onTerminal(t, nil, "absolutely\n", "fence_manual", "n1"); code != 5 || strings.Contains(seen, "Done") {
		t.Errorf("exit %d: %q", code, seen)
	}
}

// ^C at the prompt ends the command; nothing is acknowledged.
func TestFenceManualInterrupted(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	_, s := terminal(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	var out bytes.Buffer
	code := Run(ctx, "clusteradm", []string{"fence_manual", "n1", "--socket", f.socket}, IO{In: s, Out: &out, Err: &out})
	if code != 130 || len(acks(f)) != 0 {
		t.Errorf("exit %d: %s", code, out.String())
	}
}

// On a terminal a loss is confirmed by a person, and --yes spares it.
func TestConfirmOnTerminal(t *testing.T) {
	t.Parallel()
	for typed, want := range map[string]int{"y\n": 0, "YES\n": 0, "n\n": 1, "\n": 1, "\x04": 1, "absolutely\n": 1} {
		f := newFake(t, sample())
		code, seen := f.onTerminal(t, nil, typed, "volume", "delete", "v1")
		if code != want || !strings.Contains(seen, "delete volume v1 and all of its data? [y/N] ") || (len(f.requests()) == 1) != (want == 0) {
			t.Errorf("%q: exit %d: %q", typed, code, seen)
		}
	}
	f := newFake(t, sample())
	if code, seen := f.onTerminal(t, nil, "", "volume", "delete", "v1", "--yes"); code != 0 || strings.Contains(seen, "[y/N]") {
		t.Errorf("exit %d: %q", code, seen)
	}
}

// Colour stands only on a terminal, and not against the user's will.
func TestColour(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	for _, c := range []struct {
		env  map[string]string
		args string
		want bool
	}{
		{nil, "node list", true}, {nil, "status", true},
		{map[string]string{"NO_COLOR": "1"}, "status", false}, {map[string]string{"TERM": "dumb"}, "status", false},
		{nil, "status --no-color", false}, {nil, "status -o json", false}, {nil, "node list -o name", false},
	} {
		_, seen := f.onTerminal(t, c.env, "", strings.Fields(c.args)...)
		if got := strings.Contains(seen, "\x1b["); got != c.want {
			t.Errorf("%s with %v: colour %v: %q", c.args, c.env, got, seen)
		}
	}
	// Columns stand under each other whatever the colours are.
	_, colour := f.onTerminal(t, nil, "", "node", "list")
	_, plain := f.onTerminal(t, nil, "", "node", "list", "--no-color")
	for _, code := range []string{"\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"} {
		colour = strings.ReplaceAll(colour, code, "")
	}
	if colour != plain {
		t.Errorf("with colour:\n%s\nwithout:\n%s", colour, plain)
	}
}

func TestCompat(t *testing.T) {
	t.Parallel()
	var ran []string
	o := func(out *bytes.Buffer) IO {
		return IO{In: strings.NewReader(""), Out: out, Err: out, Faces: []Face{
			{Name: "old_a", Of: "clusteradm", Short: "a", Main: func(n string, args []string, _ io.Reader, _, _ io.Writer) int {
				ran = append([]string{n}, args...)
				return 7
			}},
			{Name: "old_b", Of: "clusteradm", Short: "b"},
		}}
	}
	var out bytes.Buffer
	if code := Run(t.Context(), "clusteradm", []string{"compat", "old_a", "-o", "bogus", "--help"}, o(&out)); code != 7 || strings.Join(ran, " ") != "old_a -o bogus --help" {
		t.Errorf("exit %d, ran %q: %s", code, ran, out.String())
	}
	dir := filepath.Join(t.TempDir(), "compat")
	for _, want := range []string{"2 names linked", "0 names linked"} {
		out.Reset()
		if code := Run(t.Context(), "clusteradm", []string{"compat", "install", dir}, o(&out)); code != 0 || !strings.Contains(out.String(), want) {
			t.Errorf("exit %d: %s", code, out.String())
		}
	}
	self, _ := os.Executable()
	if to, err := os.Readlink(filepath.Join(dir, "old_b")); err != nil || to != self {
		t.Errorf("old_b leads to %q, %v", to, err)
	}
	// What another package owns is not touched, and no half is made.
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "old_b"), []byte("theirs"), 0o755); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	if code := Run(t.Context(), "clusteradm", []string{"compat", "install", dir}, o(&out)); code != 4 {
		t.Errorf("exit %d: %s", code, out.String())
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "old_b")); string(b) != "theirs" {
		t.Errorf("old_b is now %q", b)
	}
	if _, err := os.Lstat(filepath.Join(dir, "old_a")); err == nil {
		t.Error("old_a was made although old_b was refused")
	}
}
