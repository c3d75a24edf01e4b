package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

// event is one line of `go test -json` (go doc test2json; build events: go help
// buildjson).
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build events, instead of Package
	Test        string
	Elapsed     float64 // seconds
	Output      string
	FailedBuild string // of a package's fail event: the ImportPath that did not build
}

// line is one piece of output, with the test that wrote it ("" = the package).
type line struct{ test, text string }

// pkg is a package that has started and not yet ended.
type pkg struct {
	out     []line
	running map[string]bool // tests without a verdict
	failed  map[string]bool
	passed  int
	noTests bool
}

// timing is how long a test took.
type timing struct {
	name string
	took time.Duration
}

// skip is one reason, and the tests that gave it, in order.
type skip struct {
	reason string
	tests  []string
}

// summary collects the events of all commands. It is used by one goroutine.
type summary struct {
	w  io.Writer
	ci bool

	pkgs   map[string]*pkg
	builds map[string][]string // output of builds, by ImportPath
	told   map[string]bool     // builds whose output was printed

	passed, failed, skipped int
	failures                []string // names, for the list before the closing line
	skips                   []*skip
	timings                 []timing
	npkgs                   int // packages that ended, but those without tests
	start                   time.Time
	cmdFailures             int // failures that this command has shown as events
}

func newSummary(w io.Writer, ci bool) *summary {
	return &summary{
		w:      w,
		ci:     ci,
		start:  time.Now(),
		pkgs:   make(map[string]*pkg),
		builds: make(map[string][]string),
		told:   make(map[string]bool),
	}
}

// printf writes to the report. A report that cannot be written (a closed
// terminal) must not end the tests, so its error is not looked at.
func (s *summary) printf(format string, args ...any) { _, _ = fmt.Fprintf(s.w, format, args...) }

// read takes events until the end of r. Lines that are no events are printed
// as they are: go writes some of its complaints that way.
func (s *summary) read(r io.Reader) error {
	s.cmdFailures = 0
	br := bufio.NewReaderSize(r, 1<<16)
	for {
		b, err := br.ReadBytes('\n')
		if len(b) > 0 {
			var ev event
			if b[0] == '{' && json.Unmarshal(b, &ev) == nil && ev.Action != "" {
				s.add(ev)
			} else {
				s.printf("%s\n", strings.TrimRight(string(b), "\n"))
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read test events: %w", err)
		}
	}
	// A package without an end was cut off with its process.
	for _, name := range sortedKeys(s.pkgs) {
		s.endPackage(event{Action: "fail", Package: name})
	}
	return nil
}

// add takes one event.
func (s *summary) add(ev event) {
	switch ev.Action {
	case "build-output":
		s.builds[ev.ImportPath] = append(s.builds[ev.ImportPath], ev.Output)
		return
	case "build-fail":
		return // the packages that need it say so with FailedBuild
	}
	if ev.Package == "" {
		return
	}
	p := s.pkgs[ev.Package]
	if p == nil {
		p = &pkg{running: make(map[string]bool), failed: make(map[string]bool)}
		s.pkgs[ev.Package] = p
	}
	if ev.Test == "" {
		switch ev.Action {
		case "output":
			if strings.Contains(ev.Output, "[no test files]") {
				p.noTests = true
			}
			p.out = append(p.out, line{"", ev.Output})
		case "pass", "fail", "skip":
			s.endPackage(ev)
		}
		return
	}
	name := ev.Package + "." + ev.Test
	switch ev.Action {
	case "run":
		p.running[ev.Test] = true
	case "output":
		p.out = append(p.out, line{ev.Test, ev.Output})
		// A figure that a test wants to be read, also when it passes.
		if _, text, ok := strings.Cut(ev.Output, ": PROOF "); ok {
			s.printf("proof %s: %s\n", ev.Test, strings.TrimSpace(text))
		}
	case "pass":
		delete(p.running, ev.Test)
		s.time(ev)
		s.passed++
		p.passed++
	case "fail":
		delete(p.running, ev.Test)
		s.time(ev)
		p.failed[ev.Test] = true
		s.fail(name)
	case "skip":
		delete(p.running, ev.Test)
		reason := skipReason(p.out, ev.Test)
		if s.ci && notInstalled.MatchString(reason) {
			p.failed[ev.Test] = true
			p.out = append(p.out, line{ev.Test, "CI=true and a peer is missing: add it to tools/deps\n"})
			s.fail(name + " (" + reason + ")")
			return
		}
		s.skipped++
		s.addSkip(reason, name)
	}
}

func (s *summary) fail(name string) {
	s.failed++
	s.cmdFailures++
	s.failures = append(s.failures, name)
}

// time remembers the duration of a top-level test. Subtests are left out: their
// time is in their parent's.
func (s *summary) time(ev event) {
	if !strings.Contains(ev.Test, "/") {
		s.timings = append(s.timings, timing{ev.Package + "." + ev.Test, time.Duration(ev.Elapsed * float64(time.Second))})
	}
}

// endPackage gives the verdict on a package and prints what must be seen of it.
func (s *summary) endPackage(ev event) {
	p := s.pkgs[ev.Package]
	delete(s.pkgs, ev.Package)

	for _, t := range sortedKeys(p.running) {
		p.failed[t] = true
		s.fail(ev.Package + "." + t + " (did not end)")
	}
	switch {
	case ev.FailedBuild != "":
		s.fail(ev.Package + " (does not build)")
		if !s.told[ev.FailedBuild] {
			s.told[ev.FailedBuild] = true
			s.printf("%s", strings.Join(s.builds[ev.FailedBuild], ""))
		}
	case ev.Action == "fail" && len(p.failed) == 0:
		s.fail(ev.Package + " (outside any test)")
	}

	if !p.noTests {
		s.npkgs++
	}
	bad := ev.Action == "fail" || len(p.failed) > 0
	if bad {
		s.printOutput(p)
		s.printf("FAIL  %-60s %7.2fs\n", ev.Package, ev.Elapsed)
		return
	}
	switch {
	case p.noTests:
	case p.passed == 0 && ev.Action == "skip":
		s.printf("skip  %-60s\n", ev.Package)
	default:
		s.printf("ok    %-60s %7.2fs\n", ev.Package, ev.Elapsed)
	}
}

// printOutput prints, in the order of writing, what the failed tests and the
// package itself wrote, and what parents of failed tests wrote.
func (s *summary) printOutput(p *pkg) {
	last := ""
	for _, l := range p.out {
		if strings.HasPrefix(l.text, "=== ") || (l.test != "" && !p.failed[l.test]) {
			continue
		}
		if l.test != last && l.test != "" {
			s.printf("=== %s\n", l.test)
		}
		last = l.test
		s.printf("%s", l.text)
	}
}

// commandFailed is called when a test command ended with an error. It counts
// only if the events had not shown why already.
func (s *summary) commandFailed(argv []string, err error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) && s.cmdFailures > 0 {
		return
	}
	s.printf("testsum: %s: %v\n", strings.Join(argv, " "), err)
	s.fail(strings.Join(argv, " "))
}

var (
	notInstalled = regexp.MustCompile(`\bnot installed\b`)
	// location is the "    file.go:12: " that package testing puts before a log line.
	location = regexp.MustCompile(`^\s*[\w.-]+\.go:\d+: `)
)

// skipReason finds in what a test wrote the line that it was skipped with.
func skipReason(out []line, test string) string {
	reason := ""
	for _, l := range out {
		if l.test != test || !location.MatchString(l.text) {
			continue
		}
		t := strings.TrimSpace(location.ReplaceAllString(l.text, ""))
		// The last line is the one of t.Skip, unless an earlier one says so itself.
		if !strings.HasPrefix(reason, "skip:") || strings.HasPrefix(t, "skip:") {
			reason = t
		}
	}
	reason = strings.TrimSpace(strings.TrimPrefix(reason, "skip:"))
	if reason == "" {
		return "no reason given"
	}
	return reason
}

func (s *summary) addSkip(reason, name string) {
	for _, k := range s.skips {
		if k.reason == reason {
			k.tests = append(k.tests, name)
			return
		}
	}
	s.skips = append(s.skips, &skip{reason, []string{name}})
}

// finish prints the summary and returns the exit status.
func (s *summary) finish(slowest int) int {
	for _, k := range s.skips {
		more := ""
		if n := len(k.tests); n > 1 {
			more = fmt.Sprintf(" and %d more", n-1)
		}
		s.printf("skip: %s [%s%s]\n", k.reason, k.tests[0], more)
	}

	slices.SortStableFunc(s.timings, func(a, b timing) int { return cmp.Compare(b.took, a.took) })
	if n := min(slowest, len(s.timings)); n > 0 {
		s.printf("\nThe %d slowest tests:\n", n)
		for _, t := range s.timings[:n] {
			s.printf("%8.2fs  %s\n", t.took.Seconds(), t.name)
		}
	}

	if len(s.failures) > 0 {
		s.printf("\nFailed:\n")
		for _, f := range s.failures {
			s.printf("  %s\n", f)
		}
	}
	status := 0
	if s.failed > 0 {
		status = 1
	}
	if s.passed+s.failed == 0 {
		s.printf("\ntestsum: no test ran; is the package list empty?\n")
		status = 1
	}
	s.printf("\n%d packages in %s\n", s.npkgs, time.Since(s.start).Round(time.Second))
	s.printf("%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	return status
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
