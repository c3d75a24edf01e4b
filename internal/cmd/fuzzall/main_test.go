package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func module(t *testing.T, files map[string]string) string {
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
	return dir
}

const clean = `package a
import "testing"
func FuzzFine(f *testing.F) { f.Add(1); f.Fuzz(func(t *testing.T, n int) {}) }
func TestNotRun(t *testing.T) { t.Fatal("a test ran") }
`

const broken = `package b
import "testing"
func FuzzBroken(f *testing.F) { f.Fuzz(func(t *testing.T, n int) { t.Fatal("found") }) }
func FuzzAlsoFine(f *testing.F) { f.Fuzz(func(t *testing.T, n int) {}) }
`

func TestRunsEveryTargetAndNamesTheFailed(t *testing.T) {
	t.Parallel()
	dir := module(t, map[string]string{"a/a_test.go": clean, "b/b_test.go": broken, "c/c.go": "package c\n"})
	for _, jobs := range []string{"1", "2"} {
		var out, errs bytes.Buffer
		status := run([]string{"-fuzztime", "5x", "-jobs", jobs}, dir, &out, &errs)
		if status != 1 {
			t.Errorf("-jobs %s: exit status %d, want 1", jobs, status)
		}
		for _, want := range []string{
			"[1/3] example.test/m/a FuzzFine\n",
			"FAIL FuzzBroken; repeat it: go test -run '^FuzzBroken$' example.test/m/b\n",
			"\n2 fuzz targets clean, 1 failed\n",
		} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("-jobs %s: output lacks %q:\n%s%s", jobs, want, out.String(), errs.String())
			}
		}
	}
}

func TestPickAndClean(t *testing.T) {
	t.Parallel()
	dir := module(t, map[string]string{"a/a_test.go": clean, "b/b_test.go": broken})
	var out, errs bytes.Buffer
	if status := run([]string{"-fuzztime", "5x", "-run", "Fine$"}, dir, &out, &errs); status != 0 {
		t.Errorf("exit status %d, want 0:\n%s%s", status, out.String(), errs.String())
	}
	if !strings.Contains(out.String(), "2 fuzz targets clean, 0 failed") {
		t.Errorf("output:\n%s", out.String())
	}
}

func TestOutOfTime(t *testing.T) {
	t.Parallel()
	for said, want := range map[string]bool{
		"--- FAIL: FuzzX (10.00s)\n    context deadline exceeded\nFAIL\n":                                                    true,
		"--- FAIL: FuzzX (0.01s)\n    context deadline exceeded\n    Failing input written to testdata/fuzz/FuzzX/1\nFAIL\n": false,
		"--- FAIL: FuzzX (0.01s)\n    found\nFAIL\n":                                                                         false,
	} {
		if got := outOfTime([]byte(said)); got != want {
			t.Errorf("%q: %v", said, got)
		}
	}
}

func TestNothingToDoIsAnError(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]map[string]string{
		"no target":      {"a/a_test.go": "package a\n"},
		"does not build": {"a/a_test.go": "package a\nvar x int = \"\"\n"},
	} {
		var out, errs bytes.Buffer
		if status := run(nil, module(t, files), &out, &errs); status != 1 {
			t.Errorf("%s: exit status %d, want 1:\n%s%s", name, status, out.String(), errs.String())
		}
	}
	var out, errs bytes.Buffer
	if status := run([]string{"-run", "("}, "", &out, &errs); status != 2 {
		t.Errorf("bad -run: exit status %d, want 2", status)
	}
}
