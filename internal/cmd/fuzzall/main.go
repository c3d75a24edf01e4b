// Command fuzzall runs every fuzz target of the module, one after the other:
//
//	fuzzall [-fuzztime 10s] [-tags LIST] [-run REGEXP] [PACKAGE…]
//
// The packages default to ./... ; -run picks targets by name. A target that
// finds a failing input is named at the end with the command that repeats it;
// go test has then written the input to the package's testdata/fuzz, from where
// it is a test of every later run (commit it with the repair).
//
// Exit status: 0 when every target was clean, 1 when one failed or there was
// none, 2 for bad usage. It is a tool of the Makefile; nothing imports it.
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

func main() {
	os.Exit(run(os.Args[1:], "", os.Stdout, os.Stderr))
}

// target is one fuzz function.
type target struct{ pkg, name string }

// run is main without the process; dir is where go runs ("" = here).
func run(args []string, dir string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("fuzzall", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fuzztime := fs.String("fuzztime", "10s", "how long to run each target, or how often (100x)")
	tags := fs.String("tags", "", "build tags")
	pick := fs.String("run", "", "only targets that match `REGEXP`")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	re, err := regexp.Compile(*pick)
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "fuzzall: -run: %v\n", err)
		return 2
	}
	pkgs := fs.Args()
	if len(pkgs) == 0 {
		pkgs = []string{"./..."}
	}

	list := exec.Command("go", append([]string{"test", "-tags", *tags, "-list", "^Fuzz"}, pkgs...)...)
	list.Dir = dir
	var out bytes.Buffer
	list.Stdout, list.Stderr = &out, stderr
	if err := list.Run(); err != nil {
		_, _ = stdout.Write(out.Bytes())
		_, _ = fmt.Fprintf(stderr, "fuzzall: list fuzz targets: %v\n", err)
		return 1
	}
	targets := parseList(out.String(), re)
	if len(targets) == 0 {
		_, _ = fmt.Fprintln(stderr, "fuzzall: no fuzz target found")
		return 1
	}

	var failed []target
	for i, t := range targets {
		_, _ = fmt.Fprintf(stdout, "[%d/%d] %s %s\n", i+1, len(targets), t.pkg, t.name)
		start := time.Now()
		c := exec.Command("go", "test", "-tags", *tags, "-run", "^$", "-fuzz", "^"+t.name+"$", "-fuzztime", *fuzztime, t.pkg)
		c.Dir, c.Stdout, c.Stderr = dir, stdout, stderr
		if err := c.Run(); err != nil {
			failed = append(failed, t)
		}
		_, _ = fmt.Fprintf(stdout, "      %.1fs\n", time.Since(start).Seconds())
	}
	for _, t := range failed {
		_, _ = fmt.Fprintf(stdout, "FAIL %s; repeat it: go test -run '^%s$' %s\n", t.name, t.name, t.pkg)
	}
	_, _ = fmt.Fprintf(stdout, "%d fuzz targets clean, %d failed\n", len(targets)-len(failed), len(failed))
	if len(failed) > 0 {
		return 1
	}
	return 0
}

// parseList reads what `go test -list` prints: the names of a package, one a
// line, and then "ok  PACKAGE  TIME".
func parseList(out string, pick *regexp.Regexp) []target {
	var all, names []target
	sc := bufio.NewScanner(strings.NewReader(out))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		switch {
		case len(f) == 1 && strings.HasPrefix(f[0], "Fuzz"):
			if pick.MatchString(f[0]) {
				names = append(names, target{name: f[0]})
			}
		case len(f) >= 2 && f[0] == "ok":
			for _, n := range names {
				n.pkg = f[1]
				all = append(all, n)
			}
			names = nil
		}
	}
	return all
}
