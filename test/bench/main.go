// Command bench compares our target with Debian's tgtd: same machine, same file
// system, same load, page cache warm, in one run, in turns. `make bench-target` runs
// it. It is a measurement and no test: IOPS on shared cores are noise, the ratios of
// medians of alternating runs and the CPU time per command are less so.
//
// tgtd runs twice, with Debian's defaults and tuned. CPU is that of the target's
// process, user and system, from /proc/PID/stat.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/test/bench/load"
)

func main() {
	if err := run(os.Args[1:], []string{"/proc/self/exe"}, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// patterns are the rows of facts/iscsi.md §6.
var patterns = []struct {
	name string
	p    load.Pattern
}{
	{"randread 4k qd1", load.Pattern{Random: true, Size: 4 << 10, Depth: 1}},
	{"randread 4k qd32", load.Pattern{Random: true, Size: 4 << 10, Depth: 32}},
	{"randwrite 4k qd1", load.Pattern{Write: true, Random: true, Size: 4 << 10, Depth: 1}},
	{"randwrite 4k qd32", load.Pattern{Write: true, Random: true, Size: 4 << 10, Depth: 32}},
	{"read 128k qd8", load.Pattern{Size: 128 << 10, Depth: 8}},
	{"write 128k qd8", load.Pattern{Write: true, Size: 128 << 10, Depth: 8}},
	{"read 1M qd4", load.Pattern{Size: 1 << 20, Depth: 4}},
	{"write 1M qd4", load.Pattern{Write: true, Size: 1 << 20, Depth: 4}},
}

// The servers. The order is the order of the table.
const (
	srvDefault   = "tgtd default"
	srvTuned     = "tgtd tuned"
	srvOurs      = "ours"
	srvIntegrity = "ours, integrity"
)

type options struct {
	time, warm time.Duration
	reps       int
	size       int64
	dir, out   string
	json       string
	rows       *regexp.Regexp
	servers    []string
	sessions   bool // also four sessions
	digests    bool // also with digests
	pprof      string
	profile    string
	perf       bool
	client     string
}

func run(args, self []string, w io.Writer) error {
	if len(args) > 0 && args[0] == "serve" {
		return serve(args[1:])
	}
	fl := flag.NewFlagSet("bench", flag.ContinueOnError)
	o := options{}
	fl.DurationVar(&o.time, "time", time.Second, "measured time of a run")
	fl.DurationVar(&o.warm, "warm", 150*time.Millisecond, "time before it that does not count")
	fl.IntVar(&o.reps, "reps", 5, "runs of a row; the median counts")
	fl.StringVar(&o.dir, "dir", "", "folder for the backing files; a new one in $TMPDIR")
	fl.StringVar(&o.out, "out", "", "write the table to this Markdown file, between its marks, too")
	fl.StringVar(&o.json, "json", "", "write every run to this file")
	fl.StringVar(&o.pprof, "pprof", "", "address of net/http/pprof of our target")
	fl.StringVar(&o.profile, "profile", "", "folder for a CPU profile of our target per row")
	fl.StringVar(&o.client, "client-profile", "", "file for a CPU profile of the load generator")
	fl.BoolVar(&o.sessions, "sessions", true, "also with four sessions")
	fl.BoolVar(&o.digests, "digests", true, "also with digests")
	fl.BoolVar(&o.perf, "iscsi-perf", true, "cross-check with libiscsi's iscsi-perf")
	size := fl.Int64("size", 256, "backing files in MiB")
	rows := fl.String("rows", "", "only rows that match this regular expression")
	servers := fl.String("servers", "default,tuned,ours,integrity", "what to measure")
	if err := fl.Parse(args); err != nil {
		return err
	}
	if fl.NArg() > 0 || o.reps < 1 || o.time <= 0 || *size < 8 {
		return errors.New("no arguments, -reps from 1, -time above 0, -size from 8: see -help")
	}
	var err error
	if o.rows, err = regexp.Compile(*rows); err != nil {
		return fmt.Errorf("-rows: %w", err)
	}
	names := map[string]string{"default": srvDefault, "tuned": srvTuned, "ours": srvOurs, "integrity": srvIntegrity}
	for s := range strings.SplitSeq(*servers, ",") {
		if names[s] == "" {
			return fmt.Errorf("-servers: %q is none of default, tuned, ours, integrity", s)
		}
		o.servers = append(o.servers, names[s])
	}
	o.size = *size << 20
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if o.client != "" {
		f, err := os.Create(o.client)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	r, err := measure(ctx, &o, self, w)
	if err != nil {
		return err
	}
	return r.publish(&o, w)
}

// measure runs everything.
func measure(ctx context.Context, o *options, self []string, w io.Writer) (_ *report, err error) {
	dir, err := os.MkdirTemp(o.dir, "bench")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	file := func(name string) string { return filepath.Join(dir, name) }
	targets := map[string]load.Target{}
	procs := map[string]*proc{}
	has := func(s string) bool { return slices.Contains(o.servers, s) }
	for _, s := range o.servers {
		if err := fill(file(s), o.size); err != nil {
			return nil, err
		}
	}
	syscall.Sync()

	if has(srvDefault) || has(srvTuned) {
		g, err := startTgtd(dir)
		if err != nil {
			return nil, err
		}
		defer func() { _ = g.stop() }()
		for i, s := range []string{srvDefault, srvTuned} {
			if !has(s) {
				continue
			}
			iqn, params := []string{iqnDefault, iqnTuned}[i], [][]string{nil, tuned}[i]
			if err := g.target(i+1, iqn, file(s), params); err != nil {
				return nil, err
			}
			targets[s], procs[s] = load.Target{Portal: g.portal, IQN: iqn, LUN: 1, Size: o.size}, &g.proc
		}
	}
	if has(srvOurs) || has(srvIntegrity) {
		var args []string
		if has(srvOurs) {
			args = append(args, "-file", file(srvOurs))
		}
		if has(srvIntegrity) {
			args = append(args, "-integrity", file(srvIntegrity))
		}
		addr := o.pprof
		if addr == "" && o.profile != "" {
			addr = "127.0.0.1:6061"
			o.pprof = addr
		}
		if addr != "" {
			args = append(args, "-pprof", addr)
		}
		p, err := startOurs(self, args...)
		if err != nil {
			return nil, err
		}
		defer func() {
			if e := p.stop(); e != nil {
				err = errors.Join(err, fmt.Errorf("our target: %w: %s", e, p.log.String()))
			}
		}()
		for i, s := range []string{srvOurs, srvIntegrity} {
			if has(s) {
				targets[s], procs[s] = load.Target{Portal: p.portal, IQN: []string{iqnPlain, iqnIntegrity}[i], LUN: 1, Size: o.size}, p
			}
		}
	}

	rep := newReport(o)
	for _, row := range patterns {
		if !o.rows.MatchString(row.name) {
			continue
		}
		if err := measureRow(ctx, o, rep, row.name, row.p, targets, procs, w); err != nil {
			return nil, fmt.Errorf("%s: %w", row.name, err)
		}
	}
	if o.perf {
		if err := rep.crossCheck(ctx, o, targets); err != nil {
			return nil, err
		}
	}
	rep.LoadAfter = loadAverage()
	return rep, nil
}

// measureRow runs one pattern on every server, in each variant, in turns.
func measureRow(ctx context.Context, o *options, rep *report, name string, p load.Pattern, targets map[string]load.Target, procs map[string]*proc, w io.Writer) (err error) {
	type cell struct {
		*series
		client *load.Client
		pid    int
	}
	var cells []cell
	defer func() {
		for _, c := range cells {
			err = errors.Join(err, c.client.Close())
		}
	}()
	path := uint16(1)
	for _, v := range []struct {
		sessions int
		digests  bool
	}{{1, false}, {1, true}, {4, false}} {
		if v.sessions > 1 && !o.sessions || v.digests && !o.digests {
			continue
		}
		for _, s := range o.servers {
			if s == srvIntegrity && (v.sessions > 1 || v.digests) {
				continue
			}
			t := targets[s]
			t.Sessions, t.Digests, t.Path = v.sessions, v.digests, path
			path += uint16(v.sessions)
			c, err := load.Open(ctx, t)
			if err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
			cells = append(cells, cell{rep.series(name, p, s, v.sessions, v.digests), c, procs[s].pid()})
		}
	}
	for i := range o.reps {
		for k := range cells {
			c := cells[(k+i)%len(cells)] // nobody is always first
			var cpu0, cpu1 time.Duration
			var e0, e1 error
			done := func() error { return nil }
			if o.profile != "" && i == o.reps-1 && strings.HasPrefix(c.Server, srvOurs) {
				if done, err = profile(o, c.series); err != nil {
					return err
				}
			}
			r, err := c.client.Run(ctx, p, o.warm, o.time, func() { cpu0, e0 = cpuTime(c.pid) }, func() { cpu1, e1 = cpuTime(c.pid) })
			if err := errors.Join(err, e0, e1, done()); err != nil {
				return fmt.Errorf("%s, %d sessions, digests %v: %w", c.Server, c.Sessions, c.Digests, err)
			}
			if r.IOs == 0 {
				return fmt.Errorf("%s, %d sessions, digests %v: no command ended in %v", c.Server, c.Sessions, c.Digests, o.time)
			}
			c.add(&r, cpu1-cpu0)
		}
	}
	for _, c := range cells {
		fmt.Fprintln(w, c.line())
	}
	return nil
}

// fill makes a file of random bytes and leaves it in the page cache.
func fill(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{1}), size)
	return errors.Join(err, f.Close())
}

// profile takes a CPU profile of our target while a run goes on.
func profile(o *options, s *series) (func() error, error) {
	if err := os.MkdirAll(o.profile, 0o755); err != nil {
		return nil, err
	}
	name := strings.ReplaceAll(fmt.Sprintf("%s %s s%d d%v.pprof", s.Row, s.Server, s.Sessions, s.Digests), " ", "-")
	url := fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", o.pprof, max(1, int((o.time+o.warm)/time.Second)))
	done := make(chan error, 1)
	go func() { done <- fetch(url, filepath.Join(o.profile, name)) }()
	return func() error { return <-done }, nil
}

var perfIOPS = regexp.MustCompile(`iops average (\d+)`)

// crossCheck lets libiscsi's iscsi-perf, which only reads, say the same thing once.
func (r *report) crossCheck(ctx context.Context, o *options, targets map[string]load.Target) error {
	prog, err := testproc.Find("iscsi-perf")
	if err != nil {
		r.Notes = append(r.Notes, "iscsi-perf is not installed: no cross-check")
		return nil
	}
	for _, row := range []struct{ name, blocks, depth string }{{"randread 4k qd32", "8", "32"}, {"randread 4k qd1", "8", "1"}} {
		if !o.rows.MatchString(row.name) {
			continue
		}
		got := map[string][]float64{}
		for range 3 {
			for _, s := range o.servers {
				t := targets[s]
				secs := max(1, int(o.time/time.Second))
				// A session of its own name: none of ours is thrown out.
				c := exec.CommandContext(ctx, prog, "-i", "iqn.2026-01.org.blockhouse:iscsi-perf", "-b", row.blocks, "-m", row.depth, "-t", strconv.Itoa(secs+1), "-r",
					fmt.Sprintf("iscsi://%s/%s/%d", t.Portal, t.IQN, t.LUN))
				out, err := c.CombinedOutput()
				m := perfIOPS.FindAllStringSubmatch(string(out), -1)
				if err != nil || len(m) == 0 {
					return fmt.Errorf("iscsi-perf on %s gave no figure: %w: %s", s, errors.Join(err, ctx.Err()), out)
				}
				n, err := strconv.ParseFloat(m[len(m)-1][1], 64)
				if err != nil {
					return err
				}
				got[s] = append(got[s], n)
			}
		}
		for _, s := range o.servers {
			r.Cross = append(r.Cross, cross{row.name, s, median(got[s])})
		}
	}
	return nil
}
