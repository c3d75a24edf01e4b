// Package cli tests the programs as users run them: each file below
// testdata/script is a txtar script (github.com/rogpeppe/go-internal/testscript)
// that runs the real binaries against a real clusterd.
package cli
