package cman

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// cmanVersion is what the last cman said of its protocol; scripts compare it.
const cmanVersion = "6.2.0"

const cmanUsage = `Usage:

cman_tool <join|leave|kill|expected|votes|version|wait|status|nodes|services|debug> [options]

  status             Show the cluster as this node sees it
  nodes              Show the nodes
    -a                 Also show node address(es)
    -n <nodename>      Only show information for specific node
    -F <format>        Columns: id,name,type,addr,votes,exp,state
  services           Show the fence domain and the lockspaces
  version            Show the version
  wait               Wait until the node is a member of a cluster
    -q                 Wait until the cluster is quorate
    -t <seconds>       Maximum time to wait
  leave [remove] [force]
    -w                 Wait until this node has left
    -t <seconds>       Maximum time to wait
  join, kill, expected, votes, debug
                     Refused, with the command that does it

  -h                 Print this help, then exit
  -V                 Print program version information, then exit
`

// cmanArgs is a command line of cman_tool.
type cmanArgs struct {
	op            string
	nodes         []string
	format        string
	addresses     bool
	quorate, wait bool
	timeout       time.Duration
	votes         int
	expected      int
	reload        bool
	force         bool
}

var cmanOps = []string{"join", "leave", "expected", "votes", "kill", "version", "wait", "status", "nodes", "services", "debug"}

// cmanTool is cman_tool(8).
func (a *App) cmanTool(args []string) int {
	opts, err := getopt(a.name, "m:n:v:e:2p:c:i:N:t:o:k:F:C:VAPwfqazhXD::Sd::r::", args)
	if err != nil {
		return a.usage(err)
	}
	c := cmanArgs{votes: -1, expected: -1}
	help := false
	number := func(o opt) (int, bool) {
		n, err := strconv.Atoi(o.arg)
		switch {
		case err != nil:
			a.die("argument to %c (%s) is not an integer", o.letter, o.arg)
		case n < 0:
			a.die("argument to %c cannot be negative", o.letter)
		}
		return n, err == nil && n >= 0
	}
	for _, o := range opts {
		ok := true
		switch o.letter {
		case 'h':
			help = true
		case 'V':
			fmt.Fprintf(a.Out, "cman_tool %s (Blockhouse)\n", version.String())
			return 0
		case 'n':
			c.nodes = append(c.nodes, o.arg)
		case 'F':
			c.format = o.arg
		case 'a':
			c.addresses = true
		case 'q':
			c.quorate = true
		case 'w':
			c.wait = true
		case 't':
			var n int
			n, ok = number(o)
			c.timeout = time.Duration(n) * time.Second
		case 'v':
			c.votes, ok = number(o)
		case 'e':
			c.expected, ok = number(o)
		case 'p', 'N':
			_, ok = number(o)
		case 'r':
			c.reload = true
		case 0:
			switch {
			case slices.Contains(cmanOps, o.arg):
				if c.op != "" {
					return a.die("can't specify two operations")
				}
				c.op = o.arg
			case o.arg == "force":
				c.force = true
			case o.arg == "remove":
			default:
				return a.die("unknown option %s", o.arg)
			}
		}
		if !ok {
			return 1
		}
	}
	if help {
		fmt.Fprint(a.Out, cmanUsage)
		return 0
	}
	switch c.op {
	case "":
		return a.die("no operation specified")
	case "status":
		return a.cmanStatus()
	case "nodes":
		return a.cmanNodes(c)
	case "services":
		return a.groupList(false)
	case "version":
		return a.cmanVersion(c)
	case "wait":
		return a.cmanWait(c)
	case "leave":
		return a.cmanLeave(c)
	case "join":
		return a.cmanJoin(c)
	}
	return a.cmanRefused(c)
}

// clusterID is cman's 16-bit number of a cluster's name.
func clusterID(name string) int {
	v := 0
	for _, b := range []byte(name) {
		v = v<<1 + int(b)
	}
	return v & 0xffff
}

// here is the cluster that this host is a member of.
func (a *App) here() (cluster, int) {
	c, err := a.cluster()
	if err != nil {
		return c, a.connect(err)
	}
	if c.Health == api.HealthUninit {
		return c, a.refuse("clusteradm join TOKEN@HOST:PORT", "Error getting cluster info: Node is not yet a cluster member")
	}
	return c, 0
}

// cmanStatus prints the lines of show_status in cman_tool, in their order.
func (a *App) cmanStatus() int {
	c, st := a.here()
	if st != 0 {
		return st
	}
	self := c.self()
	state := "Cluster-Member"
	switch self.State {
	case api.NodeJoining:
		state = "Joining"
	case api.NodeLeaving:
		state = "Leaving"
	case api.NodeLost, api.NodeFenced, api.NodeLeft:
		state = "Not-in-Cluster"
	}
	members, total := 0, 0
	for _, n := range c.Nodes {
		if c.member(n) {
			members++
			total += c.votes(n)
		}
	}
	blocked := " "
	if !c.Quorum.Quorate {
		blocked = "Activity blocked"
	}
	up := 0
	for _, w := range self.Workers {
		if w.State != "down" {
			up++
		}
	}
	p := func(format string, v ...any) { fmt.Fprintf(a.Out, format+"\n", v...) }
	p("Version: %s", cmanVersion)
	p("Config Version: %d", c.Index)
	p("Cluster Name: %s", clean(c.Cluster))
	p("Cluster Id: %d", clusterID(c.Cluster))
	p("Cluster Member: Yes")
	p("Cluster Generation: %d", c.View)
	p("Membership state: %s", state)
	p("Nodes: %d", members)
	p("Expected votes: %d", len(c.Quorum.Voters))
	p("Total votes: %d", total)
	p("Node votes: %d", c.votes(self))
	p("Quorum: %d %s", c.Quorum.Needed, blocked)
	// cman counts its clients; here they are control itself and its workers.
	p("Active subsystems: %d", 1+up)
	p("Flags: ")
	p("Ports Bound: 0  ")
	p("Node name: %s", clean(c.Self))
	p("Node ID: %d", self.Index)
	p("Multicast addresses: ") // there are none: no multicast is used
	p("Node addresses: %s", spaced(hosts(self)))
	return 0
}

// spaced is a list with a blank after each item, as print_address leaves it.
func spaced(l []string) string {
	var b strings.Builder
	for _, s := range l {
		b.WriteString(clean(s) + " ")
	}
	return b.String()
}

// cmanNodes prints the table of show_nodes.
func (a *App) cmanNodes(o cmanArgs) int {
	c, st := a.here()
	if st != 0 {
		return st
	}
	if o.format == "" {
		fmt.Fprintln(a.Out, "Node  Sts   Inc   Joined               Name")
	}
	for _, n := range c.Nodes {
		if len(o.nodes) > 0 && !slices.Contains(o.nodes, n.Name) {
			continue
		}
		sts, joined := 'X', strings.Repeat(" ", 19)
		if c.member(n) {
			sts = 'M'
			if !n.Since.IsZero() {
				joined = n.Since.In(a.Zone).Format("2006-01-02 15:04:05")
			}
		}
		if o.format == "" {
			fmt.Fprintf(a.Out, "%4d   %c  %5d   %s  %s\n", n.Index, sts, n.Incarnation, joined, clean(n.Name))
			if h := hosts(n); o.addresses && len(h) > 0 {
				fmt.Fprintf(a.Out, "       Addresses: %s\n", spaced(h))
			}
			continue
		}
		var b strings.Builder
		for _, f := range strings.Split(o.format, ",") {
			switch f {
			case "id":
				fmt.Fprintf(&b, "%d ", n.Index)
			case "name":
				b.WriteString(clean(n.Name) + " ")
			case "type":
				b.WriteString(string(sts) + " ")
			case "addr":
				b.WriteString(strings.Join(hosts(n), ",") + " ")
			case "votes":
				fmt.Fprintf(&b, "%d ", c.votes(n))
			case "exp":
				fmt.Fprintf(&b, "%d ", len(c.Quorum.Voters))
			case "state":
				b.WriteString(nodeState(n.State) + " ")
			}
		}
		fmt.Fprintln(a.Out, b.String())
	}
	return 0
}

func nodeState(s api.NodeState) string {
	switch s {
	case api.NodeOnline, api.NodeSuspect:
		return "Member"
	case api.NodeJoining:
		return "Joining"
	case api.NodeLeaving:
		return "Leaving"
	case api.NodeLost, api.NodeFenced, api.NodeLeft:
		return "Dead"
	}
	return "Unknown"
}

func (a *App) cmanVersion(o cmanArgs) int {
	if o.reload {
		return a.refuse("clusteradm status", "Not reloading: no cluster.conf is read while the cluster runs; a change is in force everywhere when its clusteradm command returns")
	}
	c, st := a.here()
	if st == 0 {
		fmt.Fprintf(a.Out, "%s config %d\n", cmanVersion, c.Index)
	}
	return st
}

// cmanTimedOut is what SIGALRM does in cman_tool.
func (a *App) cmanTimedOut() int {
	fmt.Fprintln(a.Err, "Timed-out waiting for cluster")
	return 2
}

// waitUntil polls until done says so; the status is 0, 2 after the timeout (0:
// none), or 130 when the user gives up.
func (a *App) waitUntil(timeout time.Duration, done func(c cluster, err error) bool) int {
	ctx, cancel := a.ctx, context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, cancel = context.WithTimeout(a.ctx, timeout)
	}
	defer cancel()
	outer := a.ctx
	a.ctx = ctx
	defer func() { a.ctx = outer }()
	t := time.NewTicker(a.Poll)
	defer t.Stop()
	for {
		c, err := a.cluster()
		if ctx.Err() == nil && done(c, err) {
			return 0
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			if outer.Err() != nil {
				return 130
			}
			return a.cmanTimedOut()
		}
	}
}

func isMember(c cluster, err error) bool {
	return err == nil && c.Health != api.HealthUninit && c.member(c.self())
}

func (a *App) cmanWait(o cmanArgs) int {
	if _, err := a.cluster(); err != nil && api.AsError(err).Code != api.CodeTimeout {
		return a.connect(err) // as the original, which waits for members and not for daemons
	}
	return a.waitUntil(o.timeout, func(c cluster, err error) bool {
		return isMember(c, err) && (!o.quorate || c.Quorum.Quorate)
	})
}

func (a *App) cmanLeave(o cmanArgs) int {
	if _, st := a.here(); st != 0 {
		return st
	}
	ctx, cancel := a.ctx, context.CancelFunc(func() {})
	if o.wait && o.timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, o.timeout)
	}
	defer cancel()
	// "remove" is what every leave does here: the vote goes with the node.
	if _, err := api.Post[api.Done](ctx, a.client(), api.PathLeave, api.Leave{Force: o.force}); err != nil {
		if ctx.Err() != nil && a.ctx.Err() == nil {
			return a.cmanTimedOut()
		}
		e := api.AsError(err)
		return a.refuse(e.Next, "Error leaving cluster: %s", e.Message)
	}
	if !o.wait {
		return 0
	}
	return a.waitUntil(o.timeout, func(c cluster, err error) bool { return err != nil || !isMember(c, nil) })
}

// cmanJoin joins nothing: who joins proves by a token that it may. For init
// scripts it waits like the original where this host is a member already.
func (a *App) cmanJoin(o cmanArgs) int {
	c, err := a.cluster()
	if err != nil {
		return a.connect(err)
	}
	if c.Health == api.HealthUninit {
		return a.refuse("clusteradm join TOKEN@HOST:PORT (the token: clusteradm token create, on a member)", "cannot join without a token")
	}
	if o.wait || o.quorate {
		return a.waitUntil(o.timeout, func(c cluster, err error) bool {
			return isMember(c, err) && (!o.quorate || c.Quorum.Quorate)
		})
	}
	return a.refuse("clusteradm status", "Node is already active")
}

func (a *App) cmanRefused(o cmanArgs) int {
	c, st := a.here()
	if st != 0 {
		return st
	}
	voters := len(c.Quorum.Voters)
	switch o.op {
	case "expected":
		if o.expected == voters {
			return 0
		}
		return a.refuse("clusteradm quorum show", "can't set expected votes: they are the number of voters (%d: %s) and follow them by themselves", voters, strings.Join(c.Quorum.Voters, ", "))
	case "votes":
		if o.votes == c.votes(c.self()) && len(o.nodes) == 0 {
			return 0
		}
		return a.refuse("clusteradm quorum show", "can't set votes: every voter has one vote")
	case "kill":
		if len(o.nodes) == 0 {
			return a.die("No node name specified")
		}
		for _, name := range o.nodes {
			i := slices.IndexFunc(c.Nodes, func(n api.Node) bool { return n.Name == name })
			next := "clusteradm leave, on " + name
			switch {
			case i < 0:
				next = "clusteradm node list"
			case c.Nodes[i].State == api.NodeLost:
				next = "clusteradm fence_manual " + name
			case c.Nodes[i].State == api.NodeFenced || c.Nodes[i].State == api.NodeLeft:
				next = "clusteradm node remove " + name
			}
			a.refuse(next, "Can't kill node %s : a member is put out only when its lease is over, or leaves by itself", clean(name))
		}
		return 1
	}
	return a.refuse("clusteradm events", "%s is not possible: the daemon's log level is set in its configuration file", o.op)
}
