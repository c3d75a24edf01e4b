package verbs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/size"
)

func (a *app) statusCmd() *cobra.Command {
	var (
		watch, check bool
		interval     time.Duration
	)
	c := a.verb("status", "show what the state is, what is wrong and what to do", nil)
	c.Long = `Show the whole cluster on one screen: its state, what is wrong, why, and what to do.

With --check the exit status tells the state: 0 ok, 1 something needs attention,
5 no quorum.`
	c.RunE = func(c *cobra.Command, _ []string) error {
		if a.format == "name" {
			return usagef("", "status: -o name is for lists")
		}
		if interval < 100*time.Millisecond {
			return usagef("", "status: --interval %s: at least 100ms", interval)
		}
		if watch {
			return a.watchStatus(c.Context(), interval)
		}
		ctx, cancel := context.WithTimeout(c.Context(), a.timeout)
		defer cancel()
		st, err := get[api.Status](ctx, a, api.PathStatus)
		if err != nil {
			return err
		}
		if err := a.printStatus(a.Out, st); err != nil {
			return err
		}
		if check {
			return healthExit(st.Health)
		}
		return nil
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "refresh until interrupted")
	c.Flags().DurationVar(&interval, "interval", time.Second, "time between two refreshes")
	c.Flags().BoolVar(&check, "check", false, "tell the state by the exit status")
	return c
}

func healthExit(h api.Health) error {
	switch h {
	case api.HealthOK:
		return nil
	case api.HealthNoQuorum:
		return exitStatus(api.CodeNoQuorum.Exit())
	}
	return exitStatus(1)
}

// watchStatus refreshes until ctx ends. On a terminal each screen replaces the
// last one; -o json writes one compact document a line.
func (a *app) watchStatus(ctx context.Context, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for first := true; ; first = false {
		rctx, cancel := context.WithTimeout(ctx, a.timeout)
		st, err := get[api.Status](rctx, a, api.PathStatus)
		cancel()
		if ctx.Err() != nil {
			return nil // the user's ^C is the normal end
		}
		switch {
		case err != nil && first:
			return err
		case a.format == "json" && err == nil:
			st.APIVersion = api.Version
			if err := json.NewEncoder(a.Out).Encode(st); err != nil {
				return err
			}
		default:
			if err := a.screen(st, err); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (a *app) screen(st api.Status, failed error) error {
	var b bytes.Buffer
	tty := isTerminal(a.Out)
	if tty {
		b.WriteString("\x1b[H\x1b[2J")
	} else if a.format == "yaml" {
		b.WriteString("---\n")
	}
	if failed != nil {
		// The daemon may come back (it is being restarted); the screen says
		// what it cannot see instead of showing an old state as a new one.
		fmt.Fprintf(&b, "%s: %s\n", a.Now().UTC().Format("15:04:05Z"), api.AsError(failed).Message)
	} else if err := a.printStatus(&b, st); err != nil {
		return err
	}
	if !tty {
		b.WriteString("\n")
	}
	_, err := a.Out.Write(b.Bytes())
	return err
}

func (a *app) printStatus(w io.Writer, st api.Status) error {
	if a.format == "json" || a.format == "yaml" {
		st.APIVersion = api.Version
		return a.writeDoc(w, st)
	}
	a.statusText(w, st)
	return nil
}

// statusText writes status as zpool status does: what, why, what to do, then
// the parts.
func (a *app) statusText(w io.Writer, st api.Status) {
	c := a.colours(a.Out)
	line := func(label, text string) {
		for i, l := range strings.Split(text, "\n") {
			if i > 0 {
				label = ""
			} else if label != "" {
				label += ":"
			}
			fmt.Fprintf(w, "%8s %s\n", label, l)
		}
	}
	line("cluster", clean(dash(st.Cluster)))
	line("state", c.paint(toneOf(string(st.Health)), string(st.Health)))
	switch {
	case st.Health != api.HealthUninit:
		line("quorum", a.quorumLine(st))
	case len(st.Problems) == 0:
		line("status", "this host is not a member of a cluster")
		line("action", "found one:  clusteradm init NAME\nor join:    clusteradm join TOKEN@HOST:PORT   (a member prints it: clusteradm token create)")
	}
	if st.Stale {
		line("note", fmt.Sprintf("no quorum: this is node %s's own copy, as of index %d", clean(st.Node), st.Index))
	}
	for _, p := range st.Problems {
		fmt.Fprintln(w)
		line("status", c.paint(toneOf(string(p.Severity)), clean(p.What)))
		if p.Cause != "" {
			line("cause", clean(p.Cause))
		}
		if p.Action != "" || p.Command != "" {
			line("action", strings.Trim(clean(p.Action)+"\n  "+clean(p.Command), "\n "))
		}
	}
	if len(st.Nodes) > 0 {
		fmt.Fprint(w, "\nconfig:\n\n")
		a.statusNodes(st.Nodes).write(w, "  ")
	}
	if len(st.Volumes) > 0 {
		fmt.Fprintln(w)
		t := &table{colours: c}
		t.head("VOLUME", false, false)
		t.head("STATE", false, true)
		t.head("SIZE", true, false)
		t.head("PRIMARY", false, false)
		t.head("COPIES", false, false)
		t.head("NOTE", false, false)
		for _, v := range st.Volumes {
			t.row(v.Name, string(v.Health), size.Format(v.Size), dash(v.Primary), join(v.Replicas), dash(v.Cause))
		}
		t.write(w, "  ")
	}
	if luns := statusLUNs(st); len(luns) > 0 {
		fmt.Fprintln(w)
		t := &table{colours: c}
		t.head("LUN", false, false)
		t.head("STATE", false, true)
		t.head("VOLUME", false, false)
		t.head("URL", false, false)
		for _, l := range luns {
			t.row(lunName(l), dash(string(l.State)), l.Volume, join(l.URLs))
		}
		t.write(w, "  ")
	}
	if len(st.Fences) > 0 {
		fmt.Fprintln(w)
		t := &table{colours: c}
		t.head("OPEN FENCE", false, false)
		t.head("SINCE", true, false)
		t.head("WAITING FOR", false, false)
		for _, f := range st.Fences {
			t.row(f.Node, a.ago(f.Since), dash(f.Waiting))
		}
		t.write(w, "  ")
	}
	fmt.Fprintf(w, "\nerrors: %s\n", problemCount(st.Problems))
}

func (a *app) quorumLine(st api.Status) string {
	q := st.Quorum
	s := fmt.Sprintf("%d of %d votes, %d needed", len(q.Online), len(q.Voters), q.Needed)
	if !q.Quorate {
		return s + ": no quorum, nothing can be changed"
	}
	switch {
	case q.Survives == 0:
		s += "; the next lost vote stops the cluster"
	case q.Survives > 0:
		s += fmt.Sprintf("; survives the loss of %d more", q.Survives)
	}
	return s + fmt.Sprintf("; leader %s, epoch %d", dash(clean(q.Leader)), st.Epoch)
}

func (a *app) statusNodes(nodes []api.Node) *table {
	v := a.nodeView()
	if a.format != "wide" {
		v.cols = v.cols[:7]
	}
	return tableOf(a, nodes, v)
}

// statusLUNs gives the LUNs of the status, which may also hang on the targets.
func statusLUNs(st api.Status) []api.LUN {
	if len(st.LUNs) > 0 {
		return st.LUNs
	}
	var l []api.LUN
	for _, t := range st.Targets {
		l = append(l, t.LUNs...)
	}
	return l
}

func problemCount(ps []api.Problem) string {
	if len(ps) == 0 {
		return "no known problems"
	}
	n := map[api.Health]int{}
	for _, p := range ps {
		n[p.Severity]++
	}
	var parts []string
	for _, h := range []api.Health{api.HealthNoQuorum, api.HealthFaulted, api.HealthDegraded, api.HealthUninit} {
		if n[h] > 0 {
			parts = append(parts, strconv.Itoa(n[h])+" "+string(h))
		}
	}
	s := fmt.Sprintf("%d known %s", len(ps), plural(len(ps), "problem"))
	if len(parts) > 0 {
		s += " (" + strings.Join(parts, ", ") + ")"
	}
	return s
}
