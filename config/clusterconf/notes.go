package clusterconf

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
)

// Weight of a note.
type Weight string

// The weights.
const (
	Kept    Weight = "kept"    // it does the same here
	Changed Weight = "changed" // it does something else, which the note says
	Ignored Weight = "ignored" // it does nothing here
	Refused Weight = "refused" // the import cannot go on like this
)

// Note says what becomes of an option (facts/cluster.md §9).
type Note struct {
	Line   int
	Weight Weight
	What   string // "two_node=1"
	Text   string
}

// String is a line for people.
func (n Note) String() string {
	return fmt.Sprintf("line %d: %s: %s: %s", n.Line, n.Weight, n.What, n.Text)
}

// DefaultLease is this cluster's node lease in its normal profile.
const DefaultLease = 2 * time.Second

// cmanToken is what cman used without <totem token=…>.
const cmanToken = 10 * time.Second

// Lease is the node lease of an imported cluster: the token's timeout, kept,
// because the old cluster's other times were chosen to fit it.
func (c *Config) Lease() time.Duration {
	if c.Totem.Token > 0 {
		return c.Totem.Token
	}
	return cmanToken
}

// arbiters are agents that can decide a race of two nodes at one place, in one
// step. Power switches are not: both nodes may lose.
var arbiters = []string{"fence_scsi", "fence_mpath", "fence_sbd"}

// Arbiter gives the first device that both nodes of a two-node cluster use and
// that can arbitrate.
func (c *Config) Arbiter() (FenceDevice, bool) {
	for _, d := range c.Devices {
		if !slices.Contains(arbiters, path.Base(d.Agent)) {
			continue
		}
		users := 0
		for _, n := range c.Nodes {
			if slices.ContainsFunc(n.Methods, func(m Method) bool {
				return slices.ContainsFunc(m.Uses, func(u Use) bool { return u.Device == d.Name })
			}) {
				users++
			}
		}
		if users == len(c.Nodes) {
			return d, true
		}
	}
	return FenceDevice{}, false
}

// Manual tells whether a device is fence_manual: an operator's word.
func (d FenceDevice) Manual() bool { return path.Base(d.Agent) == "fence_manual" }

// Notes says what becomes of everything in the file that is not the same here, by
// line. initiators tells which nodes have an iSCSI initiator name, so that a
// target can cut them off; nil: not known.
func (c *Config) Notes(initiators map[string]bool) []Note {
	var out []Note
	add := func(line int, w Weight, what, text string, v ...any) {
		out = append(out, Note{line, w, what, fmt.Sprintf(text, v...)})
	}
	c.quorumNotes(add)
	c.totemNotes(add)
	c.fenceNotes(add, initiators)
	if c.RM != nil {
		for _, a := range c.RM.Attrs {
			switch a.Name {
			case "central_processing":
				add(c.RM.Line, Ignored, "central_processing="+a.Value, "services are always placed by the leader")
			case "log_level", "log_facility":
				add(c.RM.Line, Ignored, a.Name+"="+a.Value, "logging is set in clusterd's configuration file")
			default:
				add(c.RM.Line, Ignored, a.Name+"="+a.Value, "services are watched by their own intervals")
			}
		}
		for _, s := range c.RM.Services {
			add(s.Line, Changed, s.Tree.Name+" "+s.Name, "becomes a service of this cluster")
			if s.Tree.attr("hardrecovery") == "1" {
				add(s.Line, Kept, "hardrecovery=1", "a failed stop fences the node")
			}
		}
	}
	for _, e := range c.Others {
		text := map[string]string{
			"dlm": "locks are run by this cluster itself", "gfs_controld": "filesystems are mounted by this cluster itself; a withdraw is a death",
			"group": "there is no groupd", "logging": "logging is set in clusterd's configuration file",
			"fence_xvmd": "there is no fence_xvmd: run it outside, or use an agent of the hypervisor", "clvmd": "clvm uses this cluster's locks",
		}[e.Name]
		add(e.Line, Ignored, "<"+e.Name+">", "%s", text)
	}
	slices.SortStableFunc(out, func(a, b Note) int { return a.Line - b.Line })
	return out
}

type adder func(line int, w Weight, what, text string, v ...any)

func (c *Config) quorumNotes(add adder) {
	if c.Cman.TwoNode {
		if d, ok := c.Arbiter(); ok {
			add(c.Cman.Line, Changed, "two_node=1", "becomes a race of the two nodes at one arbiter, device %s: the winner goes on alone. A third vote (clusterd --witness) is better", d.Name)
		} else {
			add(c.Cman.Line, Refused, "two_node=1", "needs an arbiter that decides in one step: a device of %s that both nodes use, clusterd --arbiter, or a third vote (clusterd --witness). Power switches alone can stop both nodes", strings.Join(arbiters, ", "))
		}
	} else if c.Cman.ExpectedVotes > 0 {
		add(c.Cman.Line, Ignored, fmt.Sprintf("expected_votes=%d", c.Cman.ExpectedVotes), "the quorum is the majority of the voters, which are 3 or 5 nodes")
	}
	for _, a := range c.Cman.Attrs {
		switch a.Name {
		case "two_node", "expected_votes":
		case "keyfile":
			add(c.Cman.Line, Changed, a.Name+"="+a.Value, "every connection uses certificates of the cluster's own CA")
		case "broadcast", "transport":
			add(c.Cman.Line, Ignored, a.Name+"="+a.Value, "only TCP and unicast UDP are used")
		case "port":
			add(c.Cman.Line, Ignored, a.Name+"="+a.Value, "ports are set in clusterd's configuration file (listen)")
		case "quorum_dev_poll":
			add(c.Cman.Line, Ignored, a.Name+"="+a.Value, "a quorum disk is evidence and has no vote")
		default:
			add(c.Cman.Line, Ignored, a.Name+"="+a.Value, "has no meaning here")
		}
	}
	if c.Cman.Multicast != "" {
		add(c.Cman.Line, Ignored, "multicast "+c.Cman.Multicast, "no multicast is used")
	}
	for _, n := range c.Nodes {
		if n.Votes != 1 {
			add(n.Line, Changed, fmt.Sprintf("votes=%d of %s", n.Votes, n.Name), "a node has one vote or none")
		}
		if n.Weight != "" {
			add(n.Line, Ignored, fmt.Sprintf("weight=%s of %s", n.Weight, n.Name), "locks are mastered where they are used")
		}
		for _, a := range n.AltNames {
			add(n.Line, Ignored, fmt.Sprintf("altname %s of %s", a, n.Name), "there are no redundant rings: give the node a bonded interface")
		}
	}
	if len(c.Nodes)%2 == 0 && !c.Cman.TwoNode {
		add(c.root.Line, Changed, fmt.Sprintf("%d nodes", len(c.Nodes)), "an even number of voters survives no more than one less: add a witness")
	}
	if q := c.Quorumd; q != nil {
		add(q.Line, Changed, "quorumd", "becomes evidence: a block that each node writes tells a lost network from a dead node. It has no vote")
		if q.Votes > 0 || q.MasterWins {
			add(q.Line, Changed, fmt.Sprintf("quorumd votes=%d", q.Votes), "add a witness in its place (clusterd --witness): a third vote that needs no disk")
		}
		for _, h := range q.Heuristics {
			add(h.Line, Kept, "heuristic "+h.Program, "score %d every %v, %d misses", h.Score, h.Interval, h.TKO)
		}
		if need := q.Interval * time.Duration(q.TKO+1); c.Lease() < need {
			add(q.Line, Changed, "quorumd interval and tko", "the disk takes %v to notice what the lease of %v notices earlier: it will say little", need, c.Lease())
		}
	}
}

func (c *Config) totemNotes(add adder) {
	if c.Totem.Token > 0 {
		w, more := Kept, ""
		if c.Totem.Token > DefaultLease {
			more = fmt.Sprintf(". The default here is %v: a failure would be noticed %v earlier", DefaultLease, c.Totem.Token-DefaultLease)
		} else if c.Totem.Token < time.Second {
			w, more = Changed, ". Less than 1s is not possible: 1s is used"
		}
		add(c.Totem.Line, w, fmt.Sprintf("token=%d", c.Totem.Token.Milliseconds()), "becomes the node lease of %v%s", max(c.Totem.Token, time.Second), more)
	} else {
		add(c.root.Line, Kept, "no totem token", "the node lease is cman's %v. The default here is %v", cmanToken, DefaultLease)
	}
	for _, a := range c.Totem.Attrs {
		switch a.Name {
		case "token":
		case "rrp_mode":
			add(c.Totem.Line, Ignored, a.Name+"="+a.Value, "there are no redundant rings: give the nodes a bonded interface")
		case "secauth", "keyfile":
			add(c.Totem.Line, Changed, a.Name+"="+a.Value, "every connection uses certificates of the cluster's own CA")
		default:
			add(c.Totem.Line, Ignored, a.Name+"="+a.Value, "there is no totem")
		}
	}
}

func (c *Config) fenceNotes(add adder, initiators map[string]bool) {
	f := c.Fence
	if f.postJoinSet {
		add(f.Line, Ignored, "post_join_delay", "whoever was evicted is let in when it is proved harmless, without a delay")
	}
	if f.postFailSet && f.PostFailDelay > 0 {
		add(f.Line, Ignored, "post_fail_delay", "a node is evicted when its lease is over: make the lease longer instead")
	}
	if f.CleanStart {
		add(f.Line, Ignored, "clean_start=1", "nodes that were not seen are never taken for dead")
	}
	if f.SkipUndefined {
		add(f.Line, Ignored, "skip_undefined=1", "a node without a method waits for an operator")
	}
	if f.OverridePath != "" || f.overrideT {
		add(f.Line, Ignored, "override_path, override_time", "an operator's word (clusteradm fence_manual) is taken at any time")
	}
	for _, d := range c.Devices {
		if d.Manual() {
			add(d.Line, Changed, "device "+d.Name+" (fence_manual)", "becomes the manual method: every failure of its nodes waits for an operator, and status says so each time")
		}
	}
	for _, n := range c.Nodes {
		if len(n.Methods) > 0 {
			continue
		}
		switch has, known := initiators[n.Name], initiators != nil; {
		case !known:
			add(n.Line, Changed, "no fence method of "+n.Name, "it is cut off at the targets if it has an initiator name, and otherwise waits for an operator")
		case has:
			add(n.Line, Changed, "no fence method of "+n.Name, "it is cut off at the targets")
		default:
			add(n.Line, Changed, "no fence method of "+n.Name, "its failure waits for an operator (clusteradm fence_manual %s)", n.Name)
		}
	}
}
