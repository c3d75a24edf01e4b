// Command vulngate runs govulncheck and judges what it found:
//
//	vulngate -- govulncheck -format json -db file:///… ./…
//
// A known vulnerability in a module that this project requires fails, whether
// the vulnerable function is called or not: requiring another version is in our
// hands. One in the Go standard library is printed and does not fail: which Go
// builds the project is decided by the machine.
//
// Exit status: 0 when no module has a finding, 1 when one has or govulncheck
// itself failed, 2 for bad usage. It is a tool of the Makefile; nothing imports it.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main without the process: it returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		_, _ = fmt.Fprintln(stderr, "vulngate: no command given; run: vulngate -- govulncheck -format json ./...")
		return 2
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "vulngate: start %s: %v\n", args[0], err)
		return 1
	}
	found, readErr := parse(out)
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		_, _ = fmt.Fprintf(stderr, "vulngate: %s: %v\n", strings.Join(args, " "), err)
		return 1
	}
	return report(found, stdout)
}

// message is one value of govulncheck's JSON stream (golang.org/x/vuln,
// protocol v1.0.0); exactly one field is set.
type message struct {
	SBOM    *struct{ Modules []struct{ Path string } }
	OSV     *struct{ ID, Summary string }
	Finding *struct {
		OSV          string `json:"osv"`
		FixedVersion string `json:"fixed_version"`
		Trace        []struct{ Module, Version, Package, Receiver, Function string }
	}
}

// level is how near a vulnerability comes to our code.
type level int

const (
	required level = iota // a module in the build list has it
	imported              // a package that we build in has it
	called                // a path of calls leads from our code to it
)

func (l level) String() string { return [...]string{"required", "imported", "called"}[l] }

// finding is one vulnerability in one module, at its worst level.
type finding struct {
	id, summary, module, version, fixed, where string
	level                                      level
}

// standard tells whether the finding is in Go itself.
func (f *finding) standard() bool { return f.module == "stdlib" || f.module == "toolchain" }

// parse reads a stream of messages. A stream without a list of modules is an
// error: then nothing was scanned, and "no finding" would mean nothing.
func parse(r io.Reader) ([]*finding, error) {
	summaries := make(map[string]string)
	byKey := make(map[string]*finding)
	scanned := false
	dec := json.NewDecoder(r)
	for {
		var m message
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			_, _ = io.Copy(io.Discard, r)
			return nil, fmt.Errorf("read findings: %w", err)
		}
		switch {
		case m.SBOM != nil:
			scanned = len(m.SBOM.Modules) > 0
		case m.OSV != nil:
			summaries[m.OSV.ID] = m.OSV.Summary
		case m.Finding != nil && len(m.Finding.Trace) > 0:
			// Trace[0] is the vulnerable end, the last entry is our code.
			at := m.Finding.Trace[0]
			f := &finding{id: m.Finding.OSV, module: at.Module, version: at.Version, fixed: m.Finding.FixedVersion}
			switch {
			case at.Function != "":
				f.level, f.where = called, at.Package+"."+at.Function
			case at.Package != "":
				f.level, f.where = imported, at.Package
			}
			key := f.id + " " + f.module
			if old := byKey[key]; old == nil || f.level > old.level {
				byKey[key] = f
			}
		}
	}
	if !scanned {
		return nil, errors.New("govulncheck named no module: nothing was scanned")
	}
	all := make([]*finding, 0, len(byKey))
	for _, f := range byKey {
		f.summary = summaries[f.id]
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b *finding) int {
		return cmp.Or(cmp.Compare(b.level, a.level), cmp.Compare(a.module, b.module), cmp.Compare(a.id, b.id))
	})
	return all, nil
}

// report prints the findings and returns the exit status.
func report(all []*finding, w io.Writer) int {
	bad := 0
	for _, f := range all {
		verdict := "FAIL"
		if f.standard() {
			verdict = "note"
		} else {
			bad++
		}
		fix := "no fixed version"
		if f.fixed != "" {
			fix = "fixed in " + f.fixed
		}
		where := ""
		if f.where != "" {
			where = " " + f.where
		}
		_, _ = fmt.Fprintf(w, "%s  %s  %s@%s (%s): %s%s: %s\n", verdict, f.id, f.module, f.version, fix, f.level, where, f.summary)
	}
	_, _ = fmt.Fprintf(w, "vulnerabilities: %d in modules, %d in the standard library\n", bad, len(all)-bad)
	if bad > 0 {
		_, _ = fmt.Fprintln(w, "require the fixed versions in go.mod (go get MODULE@VERSION)")
		return 1
	}
	return 0
}
