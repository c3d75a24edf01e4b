// Command fuzzall runs every fuzz target of the module:
//
//	fuzzall [-fuzztime 10s] [-jobs N] [-tags LIST] [-run REGEXP] [PACKAGE…]
//
// The packages default to ./... ; -run picks targets by name. N targets run at a
// time (all processors), one worker each; what a target prints comes when it is
// through, with -jobs 1 at once. A target that
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
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
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
	jobs := fs.Int("jobs", runtime.NumCPU(), "how many targets run at a time")
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

	var (
		mu     sync.Mutex // guards stdout, stderr and failed
		failed []target
		group  errgroup.Group
	)
	group.SetLimit(max(1, *jobs))
	for i, t := range targets {
		group.Go(func() error {
			start := time.Now()
			args := []string{"test", "-tags", *tags, "-run", "^$", "-fuzz", "^" + t.name + "$", "-fuzztime", *fuzztime}
			if *jobs > 1 {
				args = append(args, "-parallel", "1")
			}
			title := fmt.Sprintf("[%d/%d] %s %s\n", i+1, len(targets), t.pkg, t.name)
			live := io.Discard
			if *jobs <= 1 {
				_, _ = io.WriteString(stdout, title)
				live = stdout
			}
			said, err := fuzz(dir, live, append(args, t.pkg))
			if err != nil && outOfTime(said) {
				var again []byte
				again, err = fuzz(dir, live, append(args, t.pkg))
				said = append(append(said, "the time ran out inside an input; once more\n"...), again...)
			}
			mu.Lock()
			defer mu.Unlock()
			if *jobs > 1 {
				_, _ = fmt.Fprintf(stdout, "%s%s", title, said)
			}
			_, _ = fmt.Fprintf(stdout, "      %.1fs\n", time.Since(start).Seconds())
			if err != nil {
				failed = append(failed, t)
			}
			return nil
		})
	}
	_ = group.Wait()
	for _, t := range failed {
		_, _ = fmt.Fprintf(stdout, "FAIL %s; repeat it: go test -run '^%s$' %s\n", t.name, t.name, t.pkg)
	}
	_, _ = fmt.Fprintf(stdout, "%d fuzz targets clean, %d failed\n", len(targets)-len(failed), len(failed))
	if len(failed) > 0 {
		return 1
	}
	return 0
}

// fuzz runs go test and returns what it printed, which also goes to live.
func fuzz(dir string, live io.Writer, args []string) ([]byte, error) {
	var said bytes.Buffer
	c := exec.Command("go", args...)
	c.Dir = dir
	c.Stdout = io.MultiWriter(&said, live)
	c.Stderr = c.Stdout
	err := c.Run()
	return said.Bytes(), err
}

// outOfTime tells that go test failed because -fuzztime ended while an input ran,
// which it reports as a failure without one. A found input is
// always named.
func outOfTime(said []byte) bool {
	return bytes.Contains(said, []byte("context deadline exceeded")) && !bytes.Contains(said, []byte("Failing input written to"))
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
