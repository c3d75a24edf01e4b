package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const head = `{"config":{"protocol_version":"v1.0.0"}}
{"SBOM":{"go_version":"go1.26.8","modules":[{"path":"example.test/m"}]}}
{"osv":{"id":"GO-1","summary":"first"}}
{"osv":{"id":"GO-2","summary":"second"}}
`

const std = `{"finding":{"osv":"GO-1","fixed_version":"v1.26.9","trace":[{"module":"stdlib","version":"v1.26.8"}]}}
{"finding":{"osv":"GO-1","fixed_version":"v1.26.9","trace":[{"module":"stdlib","version":"v1.26.8","package":"net/http","function":"Get"},{"module":"example.test/m"}]}}
{"finding":{"osv":"GO-1","fixed_version":"v1.26.9","trace":[{"module":"stdlib","version":"v1.26.8","package":"net/http"}]}}
`

func TestVerdicts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		stream string
		status int
		want   string // in stdout
		errs   string // in stderr
	}{
		"clean":           {head, 0, "vulnerabilities: 0 in modules, 0 in the standard library\n", ""},
		"standard only":   {head + std, 0, "note  GO-1  stdlib@v1.26.8 (fixed in v1.26.9): called net/http.Get: first\n", ""},
		"module required": {head + std + `{"finding":{"osv":"GO-2","trace":[{"module":"example.test/x","version":"v1.0.0"}]}}`, 1, "FAIL  GO-2  example.test/x@v1.0.0 (no fixed version): required: second\n", ""},
		"module imported": {head + `{"finding":{"osv":"GO-2","fixed_version":"v1.0.1","trace":[{"module":"example.test/x","version":"v1.0.0","package":"example.test/x/y"}]}}`, 1, "imported example.test/x/y", ""},
		"nothing scanned": {`{"config":{}}`, 1, "", "nothing was scanned"},
		"empty":           {"", 1, "", "nothing was scanned"},
		"cut off":         {head + `{"finding":{"osv"`, 1, "", "read findings"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "stream")
			if err := os.WriteFile(file, []byte(c.stream), 0o644); err != nil {
				t.Fatal(err)
			}
			var out, errs bytes.Buffer
			if status := run([]string{"--", "cat", file}, &out, &errs); status != c.status {
				t.Errorf("exit status %d, want %d", status, c.status)
			}
			if !strings.Contains(out.String(), c.want) {
				t.Errorf("output lacks %q:\n%s", c.want, out.String())
			}
			if !strings.Contains(errs.String(), c.errs) {
				t.Errorf("stderr lacks %q:\n%s", c.errs, errs.String())
			}
		})
	}
}

func TestCommandFails(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--", "/nonexistent/govulncheck"}, {"sh", "-c", "echo '" + strings.ReplaceAll(head, "\n", " ") + "'; exit 3"}} {
		var out, errs bytes.Buffer
		if status := run(args, &out, &errs); status != 1 || errs.Len() == 0 {
			t.Errorf("run(%q) = %d with stderr %q, want 1 and a reason", args, status, errs.String())
		}
	}
	var out, errs bytes.Buffer
	if status := run(nil, &out, &errs); status != 2 {
		t.Errorf("no arguments: exit status %d, want 2", status)
	}
}
