// Command testsum runs test commands that write the events of `go test -json`
// and says what came of them, in a form that people and tools can read:
//
//	testsum [-slowest N] [-events FILE] -- go test -json ./... [-- go test -json ./test/...]
//
// It prints one line a package as it ends, the whole output of every test that
// failed, each reason for skipping once, the N slowest tests, and as its last
// line
//
//	N passed, N failed, N skipped
//
// Tests and subtests count alike. A package that does not build, or that fails
// outside every test (TestMain, a leaked goroutine, os.Exit), counts as one
// failure. With CI=true a test that was skipped because a peer is not installed
// counts as failed: a machine that lacks it proves nothing.
//
// Exit status: 0 when nothing failed and at least one test ran, 1 otherwise,
// 2 for bad usage. It is a tool of the Makefile; nothing imports it.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, os.Getenv("CI") == "true"))
}

// run is main without the process: it returns the exit status.
func run(args []string, stdout, stderr io.Writer, ci bool) int {
	fs := flag.NewFlagSet("testsum", flag.ContinueOnError)
	fs.SetOutput(stderr)
	slowest := fs.Int("slowest", 20, "how many of the slowest tests to list")
	events := fs.String("events", "", "keep the raw events in `FILE`")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	cmds := split(fs.Args())
	if len(cmds) == 0 {
		_, _ = fmt.Fprintln(stderr, "testsum: no command given; run: testsum -- go test -json ./...")
		return 2
	}

	var raw io.Writer = io.Discard
	if *events != "" {
		f, err := os.Create(*events)
		if err != nil {
			_, _ = fmt.Fprintf(stderr, "testsum: keep events: %v; choose another -events file\n", err)
			return 2
		}
		defer func() { _ = f.Close() }()
		raw = f
	}

	// An interrupt goes to the whole group, so the tests get it from the
	// terminal themselves; testsum stays to say what had failed until then.
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT)
	defer signal.Stop(sig)

	s := newSummary(stdout, ci)
	for _, argv := range cmds {
		if err := stream(argv, s, raw, stderr); err != nil {
			s.commandFailed(argv, err)
		}
	}
	return s.finish(*slowest)
}

// split cuts the arguments at each "--" into commands; empty ones are left out.
func split(args []string) [][]string {
	var cmds [][]string
	var cur []string
	for _, a := range append(args, "--") {
		if a != "--" {
			cur = append(cur, a)
			continue
		}
		if len(cur) > 0 {
			cmds = append(cmds, cur)
		}
		cur = nil
	}
	return cmds
}

// stream runs argv and feeds what it writes to s. The error is the command's
// exit status or why it could not be run.
func stream(argv []string, s *summary, raw, stderr io.Writer) error {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("open pipe: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	readErr := s.read(io.TeeReader(out, raw))
	return errors.Join(readErr, cmd.Wait())
}
