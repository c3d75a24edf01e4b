package verbs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/latency"
)

// lunRate is what one LUN did on one node between two samples.
type lunRate struct {
	Node       string        `json:"node"`
	Target     string        `json:"target"`
	LUN        int           `json:"lun"`
	Volume     string        `json:"volume"`
	Sessions   int           `json:"sessions"`
	IOPS       float64       `json:"iops"` // commands that ended with a status, a second
	ReadIOPS   float64       `json:"read_iops"`
	WriteIOPS  float64       `json:"write_iops"`
	ReadBytes  float64       `json:"read_bytes_per_second"`
	WriteBytes float64       `json:"write_bytes_per_second"`
	P50NS      time.Duration `json:"p50_ns"` // over all commands; 0 without any
	P99NS      time.Duration `json:"p99_ns"`
	QueueDepth uint64        `json:"queue_depth"` // at the end
	Errors     float64       `json:"errors_per_second"`
}

// lunSample is a document of lun top -o json.
type lunSample struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Time       time.Time         `json:"time"`
	LUNs       []lunRate         `json:"luns"`
	Missing    map[string]string `json:"missing,omitempty"` // nodes that did not answer, and why
}

// ratesOf compares two answers. A LUN that is only in the later one began in
// between; a worker that was started again begins at 0.
func ratesOf(old, now api.Stats) lunSample {
	out := lunSample{APIVersion: api.Version, Kind: "LUNSample", LUNs: []lunRate{}}
	before := map[string]api.NodeStats{}
	for _, n := range old.Nodes {
		before[n.Node] = n
	}
	for _, n := range now.Nodes {
		if n.Time.After(out.Time) {
			out.Time = n.Time
		}
		if n.Error != "" {
			if out.Missing == nil {
				out.Missing = map[string]string{}
			}
			out.Missing[n.Node] = n.Error
			continue
		}
		o, ok := before[n.Node]
		dt := n.Time.Sub(o.Time).Seconds()
		if !ok || o.Error != "" || dt <= 0 {
			continue // two answers of a node make a rate
		}
		was := map[string]api.LUNStats{}
		if o.Worker == n.Worker {
			for _, l := range o.LUNs {
				was[l.Target+"/"+strconv.Itoa(l.LUN)+" "+l.UUID] = l
			}
		}
		for _, l := range n.LUNs {
			w := was[l.Target+"/"+strconv.Itoa(l.LUN)+" "+l.UUID]
			since := func(a, b uint64) float64 { // a counter that fell is of a LUN that was made again
				if b > a {
					b = 0
				}
				return float64(a-b) / dt
			}
			var all latency.Histogram
			for k, h := range l.Latency {
				all.Add(h.Sub(w.Latency[k]))
			}
			out.LUNs = append(out.LUNs, lunRate{Node: n.Node, Target: l.Target, LUN: l.LUN, Volume: l.Volume, Sessions: l.Sessions,
				IOPS: float64(all.Count()) / dt, ReadIOPS: since(l.Reads, w.Reads), WriteIOPS: since(l.Writes, w.Writes),
				ReadBytes: since(l.ReadBytes, w.ReadBytes), WriteBytes: since(l.WriteBytes, w.WriteBytes),
				P50NS: all.Quantile(0.5), P99NS: all.Quantile(0.99), QueueDepth: l.InProgress, Errors: since(l.Failed(), w.Failed())})
		}
	}
	return out
}

// lunSorts are the values of --sort; the highest comes first, names alphabetically.
var lunSorts = map[string]func(a, b lunRate) int{
	"iops":   func(a, b lunRate) int { return cmp.Compare(b.IOPS, a.IOPS) },
	"mb":     func(a, b lunRate) int { return cmp.Compare(b.ReadBytes+b.WriteBytes, a.ReadBytes+a.WriteBytes) },
	"p50":    func(a, b lunRate) int { return cmp.Compare(b.P50NS, a.P50NS) },
	"p99":    func(a, b lunRate) int { return cmp.Compare(b.P99NS, a.P99NS) },
	"qd":     func(a, b lunRate) int { return cmp.Compare(b.QueueDepth, a.QueueDepth) },
	"errors": func(a, b lunRate) int { return cmp.Compare(b.Errors, a.Errors) },
	"name":   func(lunRate, lunRate) int { return 0 },
}

var lunSortNames = []string{"iops", "mb", "p50", "p99", "qd", "errors", "name"}

func sortLUNs(ls []lunRate, by string) {
	slices.SortFunc(ls, func(a, b lunRate) int {
		return cmp.Or(lunSorts[by](a, b), strings.Compare(a.Target, b.Target), cmp.Compare(a.LUN, b.LUN), strings.Compare(a.Node, b.Node))
	})
}

func (a *app) lunTopCmd() *cobra.Command {
	var (
		count    int
		interval time.Duration
		by       string
		busy     bool
	)
	c := a.verb("top", "show what the LUNs do, again and again", nil)
	c.Long = `Show what every LUN does on every node that serves it: commands and bytes a second,
the latency of half and of 99 of 100 commands, and the queue depth, until
interrupted or --count samples were shown. On a terminal each sample replaces the
last one. Elsewhere each LUN is a line that begins with the time. -o json prints one
object a sample.

A sample compares two answers of each node: the first one comes after --interval.`
	c.Example = "  clusteradm lun top --sort p99\n  clusteradm lun top --count 1 --interval 10s -o json"
	c.RunE = func(c *cobra.Command, _ []string) error {
		switch {
		case a.format == "name" || a.format == "yaml":
			return usagef("", "lun top: -o %s is not for samples: use table, wide or json", a.format)
		case interval < 100*time.Millisecond:
			return usagef("", "lun top: --interval %s: at least 100ms", interval)
		case count < 0:
			return usagef("", "lun top: --count %d: 0 (until interrupted) or more", count)
		case lunSorts[by] == nil:
			return usagef("", "lun top: --sort %q: use %s", by, strings.Join(lunSortNames, ", "))
		}
		return a.lunTop(c.Context(), count, interval, by, busy)
	}
	f := c.Flags()
	f.IntVarP(&count, "count", "n", 0, "end after so many samples (0: until interrupted)")
	f.DurationVar(&interval, "interval", 2*time.Second, "time of a sample")
	f.StringVar(&by, "sort", "iops", "order: "+strings.Join(lunSortNames, ", "))
	f.BoolVar(&busy, "busy", false, "leave out LUNs that do nothing")
	_ = c.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(lunSortNames, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) lunTop(ctx context.Context, count int, every time.Duration, by string, busy bool) error {
	ask := func() (api.Stats, error) {
		rctx, cancel := context.WithTimeout(ctx, a.timeout)
		defer cancel()
		return get[api.Stats](rctx, a, api.PathStats)
	}
	old, err := ask()
	if err != nil {
		return err
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 0; count == 0 || n < count; {
		select {
		case <-ctx.Done():
			return nil // the user's ^C is the normal end
		case <-tick.C:
		}
		now, err := ask()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && (count > 0 || !isTerminal(a.Out)):
			return err
		case err != nil: // the daemon may come back
			fmt.Fprintf(a.Out, "\x1b[H\x1b[2J%s\n", api.AsError(err).Message)
			continue
		}
		s := ratesOf(old, now)
		old = now
		if busy {
			s.LUNs = slices.DeleteFunc(s.LUNs, func(l lunRate) bool { return l.IOPS == 0 && l.QueueDepth == 0 })
		}
		sortLUNs(s.LUNs, by)
		if err := a.printSample(s, n == 0); err != nil {
			return err
		}
		n++
	}
	return nil
}

func (a *app) printSample(s lunSample, first bool) error {
	if a.format == "json" {
		return json.NewEncoder(a.Out).Encode(s)
	}
	tty := isTerminal(a.Out)
	at := s.Time.UTC().Format("15:04:05Z")
	t := &table{colours: a.colours(a.Out)}
	if !tty {
		t.head("TIME", false, false)
	}
	for _, h := range []string{"NODE", "TARGET", "LUN", "VOLUME"} {
		t.head(h, h == "LUN", false)
	}
	heads := []string{"IOPS", "READ/S", "WRITE/S", "READ MB/S", "WRITE MB/S", "P50", "P99", "QD", "ERR/S"}
	if a.format == "wide" {
		heads = append(heads, "SESSIONS")
	}
	for _, h := range heads {
		t.head(h, true, false)
	}
	for _, l := range s.LUNs {
		var row []string
		if !tty {
			row = append(row, at)
		}
		row = append(row, l.Node, l.Target, strconv.Itoa(l.LUN), l.Volume, rate(l.IOPS), rate(l.ReadIOPS), rate(l.WriteIOPS),
			rate(l.ReadBytes/1e6), rate(l.WriteBytes/1e6), lat(l.P50NS), lat(l.P99NS), strconv.FormatUint(l.QueueDepth, 10), rate(l.Errors))
		if a.format == "wide" {
			row = append(row, strconv.Itoa(l.Sessions))
		}
		t.row(row...)
	}
	var b bytes.Buffer
	if tty {
		var iops, bytes float64
		for _, l := range s.LUNs {
			iops, bytes = iops+l.IOPS, bytes+l.ReadBytes+l.WriteBytes
		}
		fmt.Fprintf(&b, "\x1b[H\x1b[2J%s   %d LUNs   %s IOPS   %s MB/s\n", at, len(s.LUNs), rate(iops), rate(bytes/1e6))
	}
	t.write(&b, "")
	out := b.Bytes()
	if !tty && !first { // the heads were shown
		_, out, _ = bytes.Cut(out, []byte("\n"))
	}
	if _, err := a.Out.Write(out); err != nil {
		return err
	}
	for n, why := range s.Missing {
		fmt.Fprintf(a.Err, "note: %s does not answer: %s\n", clean(n), clean(why))
	}
	return nil
}

// rate writes a number with as many digits as mean something.
func rate(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v < 10:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case v < 100:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 0, 64)
}

// lat writes a latency; 0 is none.
func lat(d time.Duration) string {
	switch {
	case d == 0:
		return "-"
	case d < time.Millisecond:
		return strconv.FormatInt(d.Microseconds(), 10) + "µs"
	case d < time.Second:
		return rate(float64(d)/1e6) + "ms"
	}
	return rate(d.Seconds()) + "s"
}
