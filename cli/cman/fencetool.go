package cman

import (
	"fmt"
	"slices"
	"strings"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

const fenceToolUsage = `Usage:

fence_tool <ls|join|leave|dump> [options]

Actions:
  ls               List nodes status
  join             Join the default fence domain (each member is in it)
  leave            Refused: clusteradm leave
  dump             Dump the history of fencing

Options:
  -n               Show all node information in ls
  -t, -q, -m, -w <seconds>
                   Accepted
  -V               Print program version information, then exit
  -h               Print this help, then exit
`

// fenceTool is fence_tool(8).
func (a *App) fenceTool(args []string) int {
	opts, err := getopt(a.name, "nt:q:m:w:Vh", args)
	if err != nil {
		return a.usage(err)
	}
	op, all := "", false
	for _, o := range opts {
		switch o.letter {
		case 'n':
			all = true
		case 'V':
			fmt.Fprintf(a.Out, "fence_tool %s (Blockhouse)\n", version.String())
			return 0
		case 'h':
			fmt.Fprint(a.Out, fenceToolUsage)
			return 0
		case 0:
			if !slices.Contains([]string{"ls", "join", "leave", "dump"}, o.arg) {
				return a.die("unknown option %s", o.arg)
			}
			op = o.arg
		}
	}
	switch op {
	case "":
		return a.die("no operation specified")
	case "ls":
		return a.fenceList(all)
	case "dump":
		return a.fenceDump()
	}
	c, st := a.here()
	if st != 0 {
		return st
	}
	if op == "join" {
		if isMember(c, nil) {
			return 0
		}
		return a.refuse("clusteradm status", "join not complete: %s is %s", clean(c.Self), c.self().State)
	}
	return a.refuse("clusteradm leave", "cannot leave: a member of the cluster is in its fence domain, and leaves both together")
}

// fenceList prints do_list of fence_tool. The master, which in fenced is the
// member with the lowest id, is the leader: it is who fences.
func (a *App) fenceList(all bool) int {
	c, st := a.here()
	if st != 0 {
		return st
	}
	var ids []string
	victims := map[string]bool{}
	for _, f := range c.Fences {
		victims[f.Node] = true
	}
	for _, n := range c.Nodes {
		if c.member(n) && !victims[n.Name] {
			ids = append(ids, fmt.Sprint(n.Index))
		}
	}
	now, wait := 0, "none"
	switch {
	case !c.Quorum.Quorate:
		wait = "quorum"
	case len(c.Fences) > 0:
		wait = "fencing"
	}
	if len(c.Fences) > 0 {
		now = c.index(c.Fences[0].Node)
	}
	fmt.Fprintf(a.Out, "fence domain\nmember count  %d\nvictim count  %d\nvictim now    %d\nmaster nodeid %d\nwait state    %s\nmembers       %s\n",
		len(ids), len(c.Fences), now, c.index(c.Quorum.Leader), wait, spaced(ids))
	if !all {
		fmt.Fprintln(a.Out)
		return 0
	}
	l, err := get[api.List[api.FenceEvent]](a, api.PathFenceHistory)
	if err != nil {
		fmt.Fprintf(a.Err, "fenced query error: %v\n", err)
		fmt.Fprintln(a.Out)
		return 1
	}
	how := map[string]string{}
	for _, e := range l.Items {
		if e.Event == "fenced" {
			how[e.Node] = howFenced(e.Method)
		}
	}
	fmt.Fprintln(a.Out, "all nodes")
	for _, n := range c.Nodes {
		h, ok := how[n.Name]
		if !ok {
			h = "none"
		}
		// The history does not say who led then; fenced prints 0 where it does not know.
		fmt.Fprintf(a.Out, "nodeid %d member %d victim %d last fence master %d how %s\n", n.Index, b2i(c.member(n)), b2i(victims[n.Name]), 0, h)
	}
	fmt.Fprintln(a.Out)
	return 0
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// howFenced is fenced's word for a method.
func howFenced(m string) string {
	switch {
	case m == "manual":
		return "override"
	case m == "rejoin" || m == "clean":
		return "member"
	case m == "target":
		return "external"
	case strings.HasPrefix(m, "agent"):
		return "agent"
	}
	return "unknown"
}

// fenceDump prints the history in the shape of fenced's debug log: seconds, text.
func (a *App) fenceDump() int {
	l, err := get[api.List[api.FenceEvent]](a, api.PathFenceHistory)
	if err != nil {
		e := api.AsError(err)
		return a.refuse(e.Next, "dump: can't communicate with fenced: %s", e.Message)
	}
	for _, e := range l.Items {
		line := fmt.Sprintf("%d %s %s epoch %d incarnation %d", e.Time.Unix(), e.Event, e.Node, e.Epoch, e.Incarnation)
		for _, x := range [][2]string{{"method", e.Method}, {"operator", e.Operator}, {"reason", e.Reason}, {"evidence", e.Evidence}} {
			if x[1] != "" {
				line += " " + x[0] + " " + x[1]
			}
		}
		fmt.Fprintln(a.Out, clean(line))
	}
	return 0
}

const fenceNodeUsage = `Usage:

fence_node [options] node_name

Options:
  -U               Unfence the node, the local one if no name is given
  -v               Show what is done
  -h               Print this help, then exit
  -V               Print program version information, then exit
`

// fenceNode is fence_node(8). Whom to fence is the cluster's decision: what it has
// decided and done is reported, and everything else refused.
func (a *App) fenceNode(args []string) int {
	opts, err := getopt(a.name, "UvhV", args)
	if err != nil {
		return a.usage(err)
	}
	victim, word, verbose := "", "fence", false
	for _, o := range opts {
		switch o.letter {
		case 'U':
			word = "unfence"
		case 'v':
			verbose = true
		case 'h':
			fmt.Fprint(a.Out, fenceNodeUsage)
			return 0
		case 'V':
			fmt.Fprintf(a.Out, "fence_node %s (Blockhouse)\n", version.String())
			return 0
		case 0:
			if victim != "" {
				return a.die("unknown option %s", o.arg)
			}
			victim = o.arg
		}
	}
	if victim == "" && word == "fence" {
		return a.die("no node name specified")
	}
	c, st := a.here()
	if st != 0 {
		return st
	}
	if victim == "" {
		victim = c.Self
	}
	i := slices.IndexFunc(c.Nodes, func(n api.Node) bool { return n.Name == victim })
	if i < 0 {
		fmt.Fprintf(a.Err, "%s %s failed\n", word, clean(victim))
		return a.refuse("clusteradm node list", "no node is called %s", clean(victim))
	}
	n := c.Nodes[i]
	done := n.State == api.NodeFenced
	if word == "unfence" {
		done = n.State == api.NodeOnline
	}
	if done {
		if verbose {
			fmt.Fprintf(a.Err, "%s %s: it is %s since %s\n", word, clean(victim), n.State, n.Since.In(a.Zone).Format("2006-01-02 15:04:05"))
		}
		fmt.Fprintf(a.Err, "%s %s success\n", word, clean(victim))
		return 0
	}
	fmt.Fprintf(a.Err, "%s %s failed\n", word, clean(victim))
	switch {
	case word == "unfence":
		return a.refuse("systemctl start clusterd, on "+victim, "%s is %s; a node is let in again by its own clusterd", clean(victim), n.State)
	case n.State == api.NodeLost:
		return a.refuse("clusteradm fence_manual "+victim, "the fence of %s is open and waits for %s", clean(victim), clean(waiting(c, victim)))
	}
	return a.refuse("clusteradm node show "+victim, "%s is %s; a node is fenced when its lease is over, and not before", clean(victim), n.State)
}

func waiting(c cluster, node string) string {
	for _, f := range c.Fences {
		if f.Node == node && f.Waiting != "" {
			return f.Waiting
		}
	}
	return "an operator"
}

const groupToolUsage = `Usage:

group_tool [options] [compat|ls|dump]

Options:
  -h               Print this help, then exit
  -V               Print program version information, then exit

compat             Show compatibility mode that groupd is running

ls                 Show group state
   -g <num>        0: as fence_tool shows it, 1: as groupd did. Default 0
   -n              Show all node information (with -g0)
   -v              The same

dump [fence]       Show the history of fencing (fence_tool dump)
`

// groupTool is group_tool(8).
func (a *App) groupTool(args []string) int {
	opts, err := getopt(a.name, "g:hVvn", args)
	if err != nil {
		return a.usage(err)
	}
	op, all, old, what := "ls", false, false, ""
	for i, o := range opts {
		switch o.letter {
		case 'g':
			old = o.arg == "1"
		case 'n', 'v':
			all = true
		case 'h':
			fmt.Fprint(a.Out, groupToolUsage)
			return 0
		case 'V':
			fmt.Fprintf(a.Out, "group_tool %s (Blockhouse)\n", version.String())
			return 0
		case 0:
			if slices.Contains([]string{"dump", "ls", "list", "compat"}, o.arg) {
				if op = o.arg; op == "list" {
					op = "ls"
				}
				for _, r := range opts[i+1:] {
					if r.letter == 0 {
						what = r.arg
						break
					}
				}
			}
		}
		if op != "ls" {
			break
		}
	}
	switch op {
	case "compat":
		if _, st := a.here(); st != 0 {
			return st
		}
		fmt.Fprintln(a.Out, "groupd compatibility mode 0")
		return 0
	case "dump":
		if what != "" && !strings.HasPrefix(what, "fence") {
			return a.refuse("clusteradm events", "there is no log of %s", clean(what))
		}
		return a.fenceDump()
	}
	if old {
		return a.groupOld()
	}
	return a.groupList(all)
}

// groupList is what group_tool runs: fence_tool ls, and dlm_tool ls where there is
// a lock manager.
func (a *App) groupList(all bool) int { return a.fenceList(all) }

// groupOld prints groupd_list: the table of the second cluster suite.
func (a *App) groupOld() int {
	c, st := a.here()
	if st != 0 {
		return st
	}
	var ids []string
	for _, n := range c.Nodes {
		if c.member(n) {
			ids = append(ids, fmt.Sprint(n.Index))
		}
	}
	state := "none"
	if len(c.Fences) > 0 {
		state = "FAIL_STOP_WAIT"
	}
	const name = "default"
	fmt.Fprintf(a.Out, "%-16s %-5s %-*s %-8s %-12s\n", "type", "level", len(name)+1, "name", "id", "state")
	fmt.Fprintf(a.Out, "%-16s %-5d %-*s %08x %-12s\n[%s]\n", "fence", 0, len(name)+1, name, 0x10001, state, strings.Join(ids, " "))
	return 0
}
