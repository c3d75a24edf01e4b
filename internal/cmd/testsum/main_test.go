package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// runGo runs testsum over a real `go test -json` of a module with the given
// files and returns what it printed and its exit status.
func runGo(t *testing.T, ci bool, files map[string]string, extra ...string) (string, int) {
	t.Helper()
	dir := t.TempDir()
	files["go.mod"] = "module example.test/m\n\ngo 1.26\n"
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	args := append([]string{"-slowest", "2", "--", "go", "-C", dir, "test", "-vet=off", "-json"}, extra...)
	args = append(args, "./...")
	var out, errs bytes.Buffer
	status := run(args, &out, &errs, ci)
	if errs.Len() > 0 {
		t.Logf("stderr: %s", errs.String())
	}
	return out.String(), status
}

// lastLine is what tools read.
func lastLine(out string) string {
	lines := strings.Split(strings.TrimRight(out, "\n"), "\n")
	return lines[len(lines)-1]
}

func check(t *testing.T, out string, status, wantStatus int, closing string, want, notWant []string) {
	t.Helper()
	if status != wantStatus {
		t.Errorf("exit status %d, want %d", status, wantStatus)
	}
	if got := lastLine(out); got != closing {
		t.Errorf("closing line %q, want %q", got, closing)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("output lacks %q", w)
		}
	}
	for _, w := range notWant {
		if strings.Contains(out, w) {
			t.Errorf("output has %q", w)
		}
	}
	if t.Failed() {
		t.Logf("output:\n%s", out)
	}
}

const skipFile = `package a
import "testing"
func TestOne(t *testing.T) { t.Log("noise") }
func TestTwo(t *testing.T) { t.Run("sub", func(t *testing.T) {}) }
func TestTgt(t *testing.T) { t.Skip("skip: tgt is not installed (make deps)") }
func TestTgtToo(t *testing.T) { t.Log("before"); t.Skip("skip: tgt is not installed (make deps)") }
`

func TestPassAndSkip(t *testing.T) {
	t.Parallel()
	out, status := runGo(t, false, map[string]string{"a/a_test.go": skipFile, "b/b.go": "package b\n"})
	check(t, out, status, 0, "3 passed, 0 failed, 2 skipped",
		[]string{"skip: tgt is not installed (make deps) [example.test/m/a.TestTgt and 1 more]\n", "The 2 slowest tests:"},
		[]string{"noise", "Failed:", "example.test/m/b"})
	if n := strings.Count(out, "not installed"); n != 1 {
		t.Errorf("the reason for skipping is printed %d times, want once", n)
	}
}

func TestMissingPeerFailsInCI(t *testing.T) {
	t.Parallel()
	out, status := runGo(t, true, map[string]string{"a/a_test.go": skipFile})
	check(t, out, status, 1, "3 passed, 2 failed, 0 skipped", []string{"a.TestTgt (tgt is not installed (make deps))"}, nil)
}

func TestFailurePrintsWholeOutput(t *testing.T) {
	t.Parallel()
	out, status := runGo(t, false, map[string]string{"a/a_test.go": `package a
import ("testing"; "fmt")
func TestQuiet(t *testing.T) { fmt.Println("of the passing test") }
func TestBad(t *testing.T) {
	t.Log("first line")
	t.Run("sub", func(t *testing.T) { fmt.Println("on stdout"); t.Fatal("the cause") })
	t.Run("fine", func(t *testing.T) { t.Log("of the passing subtest") })
}
`})
	check(t, out, status, 1, "2 passed, 2 failed, 0 skipped",
		[]string{"first line", "on stdout", "the cause", "example.test/m/a.TestBad/sub"},
		[]string{"of the passing"})
}

func TestProofsOfPassingTestsAreShown(t *testing.T) {
	t.Parallel()
	out, status := runGo(t, false, map[string]string{"a/a_test.go": `package a
import "testing"
func TestA(t *testing.T) { t.Log("PROOF 3 of 3"); t.Log("noise") }
`})
	check(t, out, status, 0, "1 passed, 0 failed, 0 skipped", []string{"proof TestA: 3 of 3"}, []string{"noise"})
}

func TestBuildFailure(t *testing.T) {
	t.Parallel()
	out, status := runGo(t, false, map[string]string{
		"a/a.go":      "package a\nfunc f() int { return \"x\" }\n",
		"a/a_test.go": "package a\nimport \"testing\"\nfunc TestA(t *testing.T) {}\n",
		"b/b_test.go": "package b\nimport \"testing\"\nfunc TestB(t *testing.T) {}\n",
	})
	check(t, out, status, 1, "1 passed, 1 failed, 0 skipped",
		[]string{"cannot use \"x\"", "example.test/m/a (does not build)"}, nil)
}

func TestFailureOutsideAnyTest(t *testing.T) {
	t.Parallel()
	out, status := runGo(t, false, map[string]string{"a/a_test.go": `package a
import ("testing"; "os"; "fmt")
func TestMain(m *testing.M) { m.Run(); fmt.Println("found a leaked goroutine"); os.Exit(1) }
func TestA(t *testing.T) {}
`})
	check(t, out, status, 1, "1 passed, 1 failed, 0 skipped",
		[]string{"found a leaked goroutine", "example.test/m/a (outside any test)"}, nil)
}

func TestPanicExitAndTimeout(t *testing.T) {
	t.Parallel()
	t.Run("panic", func(t *testing.T) {
		t.Parallel()
		out, status := runGo(t, false, map[string]string{"a/a_test.go": `package a
import "testing"
func TestA(t *testing.T) { panic("boo") }
`})
		check(t, out, status, 1, "0 passed, 1 failed, 0 skipped", []string{"panic: boo", "goroutine "}, nil)
	})
	t.Run("exit", func(t *testing.T) {
		t.Parallel()
		out, status := runGo(t, false, map[string]string{"a/a_test.go": `package a
import ("testing"; "os")
func TestA(t *testing.T) { os.Exit(3) }
`})
		check(t, out, status, 1, "0 passed, 1 failed, 0 skipped", []string{"a.TestA"}, nil)
	})
	t.Run("timeout", func(t *testing.T) {
		t.Parallel()
		out, status := runGo(t, false, map[string]string{"a/a_test.go": `package a
import "testing"
func TestA(t *testing.T) { t.Parallel(); select {} }
func TestB(t *testing.T) { t.Parallel(); select {} }
`}, "-timeout", "300ms")
		check(t, out, status, 1, "0 passed, 2 failed, 0 skipped", []string{"test timed out", "a.TestA", "a.TestB"}, nil)
	})
}

func TestCommandThatCannotRun(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	status := run([]string{"--", "/nonexistent/go"}, &out, &errs, false)
	check(t, out.String(), status, 1, "0 passed, 1 failed, 0 skipped", []string{"/nonexistent/go"}, nil)
}

// A command that fails without one event of a failure (no such package, bad
// flag) must not pass because an earlier command was green.
func TestCommandFailsWithoutEvents(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	status := run([]string{"--", "printf", `{"Action":"pass","Package":"p","Test":"T"}\n{"Action":"pass","Package":"p"}\n`, "--", "false"}, &out, &errs, false)
	check(t, out.String(), status, 1, "1 passed, 1 failed, 0 skipped", []string{"exit status 1"}, nil)
}

func TestNoTestsIsAnError(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	status := run([]string{"--", "true"}, &out, &errs, false)
	check(t, out.String(), status, 1, "0 passed, 0 failed, 0 skipped", []string{"no test ran"}, nil)
}

func TestKeepsRawEventsAndForeignLines(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "events")
	var out, errs bytes.Buffer
	const text = `go: downloading nothing\n{"Action":"pass","Package":"p","Test":"T","Elapsed":1.5}\n{"Action":"pass","Package":"p"}\n`
	status := run([]string{"-events", file, "--", "printf", text}, &out, &errs, false)
	check(t, out.String(), status, 0, "1 passed, 0 failed, 0 skipped", []string{"go: downloading nothing\n", "1.50s  p.T"}, nil)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.ReplaceAll(text, `\n`, "\n"); string(raw) != want {
		t.Errorf("events file holds %q, want %q", raw, want)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{nil, {"--"}, {"-no-such-flag"}, {"-events", "/nonexistent/dir/file", "--", "true"}} {
		var out, errs bytes.Buffer
		if status := run(args, &out, &errs, false); status != 2 || errs.Len() == 0 {
			t.Errorf("run(%q) = %d with stderr %q, want 2 and a reason", args, status, errs.String())
		}
	}
}
