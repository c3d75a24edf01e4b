// Package libiscsi runs libiscsi's conformance program, iscsi-test-cu, against a
// target and judges its logs.
//
// The program's exit code is 0 also when tests fail, and a test that it skips is
// counted as passed; so each test runs in a process of its own, with a time
// limit, and the verdict comes from its log (facts: one process a test, because
// a crash or a hang would otherwise hide the rest).
package libiscsi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Program is the name of the conformance program (Debian: libiscsi-bin).
const Program = "iscsi-test-cu"

// Verdict of a test.
type Verdict string

// Verdicts.
const (
	Pass  Verdict = "PASS"
	Fail  Verdict = "FAIL"
	Skip  Verdict = "SKIP"  // not run, or not to its end, because the target lacks something
	Hang  Verdict = "HANG"  // killed at the time limit
	Crash Verdict = "CRASH" // the program died
	NoRun Verdict = "NORUN" // no summary in the log
)

// Result of a test.
type Result struct {
	Test    string
	Verdict Verdict
	Why     string // first line that tells
	Log     string
	Took    time.Duration
}

var testName = regexp.MustCompile(`^(SCSI|iSCSI)\.[A-Za-z0-9]+\.[A-Za-z0-9_-]+`)

// List asks the program for its tests.
func List(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, Program, "-l").CombinedOutput()
	if err != nil && len(out) == 0 {
		return nil, fmt.Errorf("list tests of %s: %w", Program, err)
	}
	var ts []string
	for line := range strings.Lines(string(out)) {
		if m := testName.FindString(strings.TrimSpace(line)); m != "" && m == strings.TrimSpace(line) && !slices.Contains(ts, m) {
			ts = append(ts, m)
		}
	}
	if len(ts) == 0 {
		return nil, fmt.Errorf("list tests of %s: none in its output", Program)
	}
	return ts, nil
}

// Family returns the tests of families such as "Read10" or "iSCSITMF".
func Family(tests []string, families ...string) (out []string) {
	for _, t := range tests {
		if slices.Contains(families, strings.Split(t, ".")[1]) {
			out = append(out, t)
		}
	}
	return out
}

// Runner runs tests against one logical unit.
type Runner struct {
	URL   string        // iscsi://HOST:PORT/IQN/LUN
	URL2  string        // a second path, or empty
	Limit time.Duration // per test, 0 = 60 s
	Args  []string      // further arguments
}

// Run runs one test.
func (r *Runner) Run(ctx context.Context, test string) Result {
	limit := r.Limit
	if limit == 0 {
		limit = 60 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	args := append([]string{"-d", "-S", "-V", "--test=" + test}, r.Args...)
	args = append(args, r.URL)
	if r.URL2 != "" {
		args = append(args, r.URL2)
	}
	cmd := exec.CommandContext(ctx, Program, args...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	begin := time.Now()
	err := cmd.Run()
	res := Result{Test: test, Log: log.String(), Took: time.Since(begin)}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		res.Verdict, res.Why = Hang, fmt.Sprintf("killed after %s", limit)
	default:
		res.Verdict, res.Why = Judge(res.Log, err)
	}
	return res
}

// summary is the row "tests  TOTAL RAN PASSED FAILED INACTIVE" of CUnit.
var summary = regexp.MustCompile(`(?m)^\s*tests\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)`)

// Judge reads the log of one test that ended by itself with err.
func Judge(log string, err error) (Verdict, string) {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if st, ok := exit.Sys().(syscall.WaitStatus); ok && st.Signaled() {
			return Crash, "died of " + st.Signal().String()
		}
		if exit.ExitCode() >= 128 {
			return Crash, err.Error()
		}
	} else if err != nil {
		return NoRun, err.Error()
	}
	m := summary.FindStringSubmatch(log)
	switch {
	case m == nil:
		return NoRun, lastLine(log)
	case m[4] != "0":
		return Fail, line(log, "[FAILED]", "FAILED")
	case m[2] != "1" || m[3] != "1":
		return NoRun, strings.TrimSpace(m[0])
	case strings.Contains(log, "[SKIPPED]"):
		return Skip, line(log, "[SKIPPED]")
	}
	return Pass, ""
}

func line(log string, marks ...string) string {
	for _, mark := range marks {
		for l := range strings.Lines(log) {
			if strings.Contains(l, mark) {
				return strings.TrimSpace(l)
			}
		}
	}
	return lastLine(log)
}

func lastLine(log string) string {
	ls := strings.Split(strings.TrimSpace(log), "\n")
	return strings.TrimSpace(ls[len(ls)-1])
}

// Count is how many tests of a family ended how; fail counts hangs and crashes
// too.
type Count struct{ Pass, Fail, Skip int }

func (c *Count) add(v Verdict) {
	switch v {
	case Pass:
		c.Pass++
	case Skip:
		c.Skip++
	default:
		c.Fail++
	}
}

// Families counts results by family, in order of first appearance.
func Families(rs []Result) (names []string, counts map[string]Count, all Count) {
	counts = map[string]Count{}
	for _, r := range rs {
		f := strings.Split(r.Test, ".")[1]
		c, ok := counts[f]
		if !ok {
			names = append(names, f)
		}
		c.add(r.Verdict)
		all.add(r.Verdict)
		counts[f] = c
	}
	return names, counts, all
}

// Best takes of each test's results the best: a test that is skipped on one
// logical unit and passes on another has passed. A failure anywhere is kept.
func Best(rs []Result) []Result {
	rank := func(v Verdict) int {
		switch v {
		case Skip:
			return 0
		case Pass:
			return 1
		}
		return 2
	}
	at := map[string]int{}
	var out []Result
	for _, r := range rs {
		i, ok := at[r.Test]
		if !ok {
			at[r.Test] = len(out)
			out = append(out, r)
		} else if rank(r.Verdict) > rank(out[i].Verdict) {
			out[i] = r
		}
	}
	return out
}
