package clusterconf

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Config is a cluster.conf. Attributes of which nothing is decided here are kept
// in Attrs fields, so that Export loses nothing.
type Config struct {
	Name    string
	Version int
	Cman    Cman
	Totem   Totem
	Quorumd *Quorumd // nil: none
	Fence   FenceDaemon
	Nodes   []Node
	Devices []FenceDevice
	RM      *RM // nil: none
	// Others are dlm, gfs_controld, group, logging, fence_xvmd, clvmd.
	Others []*Element

	file string
	root *Element
}

// Cman is <cman>.
type Cman struct {
	Line          int
	TwoNode       bool
	ExpectedVotes int // 0: the sum of the nodes' votes
	Multicast     string
	Attrs         Attrs // all
}

// Totem is <totem>.
type Totem struct {
	Line  int
	Token time.Duration // 0: not set
	Attrs Attrs         // all
}

// Quorumd is <quorumd>.
type Quorumd struct {
	Line       int
	Interval   time.Duration
	TKO        int
	Votes      int // 0: not set
	MinScore   int // 0: more than half
	Device     string
	Label      string
	MasterWins bool
	Heuristics []Heuristic
	Attrs      Attrs
}

// Heuristic is <heuristic>: a program that says whether this node is well.
type Heuristic struct {
	Line     int
	Program  string
	Score    int
	Interval time.Duration
	TKO      int
}

// FenceDaemon is <fence_daemon>.
type FenceDaemon struct {
	Line                                int
	PostJoinDelay, PostFailDelay        time.Duration
	OverrideTime                        time.Duration
	OverridePath                        string
	CleanStart, SkipUndefined           bool
	postJoinSet, postFailSet, overrideT bool
}

// Node is <clusternode>.
type Node struct {
	Line     int
	Name     string
	ID       int
	Votes    int // 1 where it is not set
	Weight   string
	AltNames []string
	Methods  []Method
	Unfence  []Use
}

// Method is <method>: any of a node's is enough, all devices of it must succeed.
type Method struct {
	Line int
	Name string
	Uses []Use
}

// Use is <device>: a fence device and this node's arguments to it.
type Use struct {
	Line   int
	Device string
	Args   Attrs // without name
}

// FenceDevice is <fencedevice>.
type FenceDevice struct {
	Line  int
	Name  string
	Agent string
	Args  Attrs // without name and agent
}

// RM is <rm>: rgmanager's services.
type RM struct {
	Line      int
	Domains   []Domain
	Resources []*Element // shared ones, referred to by ref=
	Services  []Service
	Attrs     Attrs
}

// Domain is <failoverdomain>.
type Domain struct {
	Line                            int
	Name                            string
	Ordered, Restricted, NoFailback bool
	Nodes                           []DomainNode
}

// DomainNode is a node in a failover domain; a lower priority is better.
type DomainNode struct {
	Name     string
	Priority int // 0: not set
}

// Service is <service> or <vm>, with its tree of resources.
type Service struct {
	Line   int
	Name   string
	Domain string
	Tree   *Element
}

// Warning is something that was passed over.
type Warning struct {
	Line int
	Text string
}

// Options of Parse.
type Options struct {
	// Lenient turns unknown elements and attributes into warnings. They are left
	// out of the result.
	Lenient bool
}

// Parse reads a file. file is for messages. The error joins one *Error for each
// thing that is wrong, in the order of the lines.
func Parse(file string, b []byte, o Options) (*Config, []Warning, error) {
	root, err := parseTree(file, b)
	if err != nil {
		return nil, nil, err
	}
	if root.Name != "cluster" {
		return nil, nil, &Error{file, root.Line, fmt.Sprintf("the file begins with <%s>: a cluster.conf begins with <cluster>", root.Name)}
	}
	p := &parser{file: file}
	var warn []Warning
	unknown := p.bad
	if o.Lenient {
		unknown = func(line int, why string) { warn = append(warn, Warning{line, why + "; passed over"}) }
	}
	schema.check(root, unknown, p.bad)
	c := p.config(root)
	if err := p.err(); err != nil {
		return nil, warn, err
	}
	return c, warn, nil
}

type parser struct {
	file string
	errs []*Error
}

func (p *parser) bad(line int, why string) {
	p.errs = append(p.errs, &Error{p.file, line, why})
}

func (p *parser) err() error {
	if len(p.errs) == 0 {
		return nil
	}
	slices.SortStableFunc(p.errs, func(a, b *Error) int { return a.Line - b.Line })
	var out []error
	for i, e := range p.errs {
		if i == maxErrs {
			out = append(out, fmt.Errorf("and %d more", len(p.errs)-i))
			break
		}
		out = append(out, e)
	}
	return errors.Join(out...)
}

// number reads an attribute of an element as a whole number from low on.
func (p *parser) number(e *Element, name string, low, def int) int {
	s, ok := e.Attrs.Get(name)
	if !ok {
		return def
	}
	n, err := strconv.Atoi(strings.TrimSpace(s))
	if err != nil || n < low || n > 1<<30 {
		p.bad(e.Line, fmt.Sprintf("<%s> %s=%q: a whole number from %d on is needed", e.Name, name, s, low))
		return def
	}
	return n
}

func (p *parser) flag(e *Element, name string) bool {
	switch s := e.attr(name); strings.ToLower(s) {
	case "", "0", "no", "off", "false":
		return false
	case "1", "yes", "on", "true":
		return true
	default:
		p.bad(e.Line, fmt.Sprintf("<%s> %s=%q: 0 or 1 is needed", e.Name, name, s))
		return false
	}
}

func (p *parser) config(root *Element) *Config {
	c := &Config{Name: root.attr("name"), Version: p.number(root, "config_version", 1, 0), file: p.file, root: root}
	for _, e := range root.Children {
		switch e.Name {
		case "cman":
			c.Cman = Cman{Line: e.Line, TwoNode: p.flag(e, "two_node"), ExpectedVotes: p.number(e, "expected_votes", 1, 0), Attrs: e.Attrs}
			p.number(e, "port", 1, 0)
			p.number(e, "cluster_id", 0, 0)
			p.number(e, "quorum_dev_poll", 0, 0)
			for _, m := range e.all("multicast") {
				c.Cman.Multicast = m.attr("addr")
			}
		case "totem":
			c.Totem = Totem{Line: e.Line, Token: time.Duration(p.number(e, "token", 1, 0)) * time.Millisecond, Attrs: e.Attrs}
		case "quorumd":
			c.Quorumd = p.quorumd(e)
		case "fence_daemon":
			f := FenceDaemon{Line: e.Line, CleanStart: p.flag(e, "clean_start"), SkipUndefined: p.flag(e, "skip_undefined"), OverridePath: e.attr("override_path")}
			// -1 is fenced's "for ever".
			f.PostJoinDelay, f.postJoinSet = time.Duration(p.number(e, "post_join_delay", -1, 0))*time.Second, has(e, "post_join_delay")
			f.PostFailDelay, f.postFailSet = time.Duration(p.number(e, "post_fail_delay", 0, 0))*time.Second, has(e, "post_fail_delay")
			f.OverrideTime, f.overrideT = time.Duration(p.number(e, "override_time", 0, 0))*time.Second, has(e, "override_time")
			c.Fence = f
		case "clusternodes":
			for _, n := range e.Children {
				c.Nodes = append(c.Nodes, p.node(n))
			}
		case "fencedevices":
			for _, d := range e.Children {
				c.Devices = append(c.Devices, FenceDevice{d.Line, d.attr("name"), d.attr("agent"), without(d.Attrs, "name", "agent")})
			}
		case "rm":
			c.RM = p.rm(e)
		default:
			c.Others = append(c.Others, e)
		}
	}
	return c
}

func has(e *Element, name string) bool { _, ok := e.Attrs.Get(name); return ok }

func without(a Attrs, names ...string) Attrs {
	return slices.DeleteFunc(slices.Clone(a), func(x Attr) bool { return slices.Contains(names, x.Name) })
}

func (p *parser) quorumd(e *Element) *Quorumd {
	q := &Quorumd{Line: e.Line, Interval: time.Duration(p.number(e, "interval", 1, 1)) * time.Second, TKO: p.number(e, "tko", 1, 10), Votes: p.number(e, "votes", 0, 0),
		MinScore: p.number(e, "min_score", 0, 0), Device: e.attr("device"), Label: e.attr("label"), MasterWins: p.flag(e, "master_wins"), Attrs: e.Attrs}
	for _, h := range e.Children {
		q.Heuristics = append(q.Heuristics, Heuristic{Line: h.Line, Program: h.attr("program"), Score: p.number(h, "score", 1, 1),
			Interval: time.Duration(p.number(h, "interval", 1, 2)) * time.Second, TKO: p.number(h, "tko", 1, 1)})
	}
	return q
}

func (p *parser) node(e *Element) Node {
	n := Node{Line: e.Line, Name: e.attr("name"), ID: p.number(e, "nodeid", 1, 0), Votes: p.number(e, "votes", 0, 1), Weight: e.attr("weight")}
	for _, c := range e.Children {
		switch c.Name {
		case "altname":
			n.AltNames = append(n.AltNames, c.attr("name"))
		case "fence":
			for _, m := range c.Children {
				x := Method{Line: m.Line, Name: m.attr("name")}
				for _, d := range m.Children {
					x.Uses = append(x.Uses, Use{d.Line, d.attr("name"), without(d.Attrs, "name")})
				}
				n.Methods = append(n.Methods, x)
			}
		case "unfence":
			for _, d := range c.Children {
				n.Unfence = append(n.Unfence, Use{d.Line, d.attr("name"), without(d.Attrs, "name")})
			}
		}
	}
	return n
}

func (p *parser) rm(e *Element) *RM {
	r := &RM{Line: e.Line, Attrs: e.Attrs}
	for _, c := range e.Children {
		switch c.Name {
		case "failoverdomains":
			for _, d := range c.Children {
				x := Domain{Line: d.Line, Name: d.attr("name"), Ordered: p.flag(d, "ordered"), Restricted: p.flag(d, "restricted"), NoFailback: p.flag(d, "nofailback")}
				for _, n := range d.Children {
					x.Nodes = append(x.Nodes, DomainNode{n.attr("name"), p.number(n, "priority", 0, 0)})
				}
				r.Domains = append(r.Domains, x)
			}
		case "resources":
			r.Resources = append(r.Resources, c.Children...)
		case "service", "vm":
			s := Service{Line: c.Line, Name: c.attr("name"), Domain: c.attr("domain"), Tree: c}
			if s.Name == "" {
				s.Name = c.attr("ref")
			}
			r.Services = append(r.Services, s)
		}
	}
	return r
}

// Export writes the configuration as a cluster.conf that Parse reads back.
func (c *Config) Export() []byte {
	var b strings.Builder
	b.WriteString("<?xml version=\"1.0\"?>\n")
	c.root.encode(&b, 0)
	return []byte(b.String())
}

// Node gives a node by name.
func (c *Config) Node(name string) (Node, bool) {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return Node{}, false
}

// Device gives a fence device by name.
func (c *Config) Device(name string) (FenceDevice, bool) {
	for _, d := range c.Devices {
		if d.Name == name {
			return d, true
		}
	}
	return FenceDevice{}, false
}

var (
	clusterName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,32}$`)
	agentName   = regexp.MustCompile(`^(fence_[A-Za-z0-9_.-]+|/.*/fence_[A-Za-z0-9_.-]+)$`)
)

// Validate checks what belongs together. The error joins one *Error each.
func (c *Config) Validate() error {
	p := &parser{file: c.file}
	if !clusterName.MatchString(c.Name) {
		p.bad(c.root.Line, fmt.Sprintf("the cluster's name %q: 1 to 32 of A-Z a-z 0-9 _ - are needed", c.Name))
	}
	if len(c.Nodes) == 0 {
		p.bad(c.root.Line, "there is no clusternode")
	}
	ids, names, devices := map[int]string{}, map[string]bool{}, map[string]bool{}
	for _, d := range c.Devices {
		if devices[d.Name] {
			p.bad(d.Line, fmt.Sprintf("fence device %s is there twice", d.Name))
		}
		devices[d.Name] = true
		if !agentName.MatchString(d.Agent) {
			p.bad(d.Line, fmt.Sprintf("fence device %s: %q is no name of a fence agent (fence_…)", d.Name, d.Agent))
		}
	}
	uses := func(what string, l []Use) {
		for _, u := range l {
			if !devices[u.Device] {
				p.bad(u.Line, fmt.Sprintf("%s: no fencedevice is called %s", what, u.Device))
			}
		}
	}
	votes := 0
	for _, n := range c.Nodes {
		if names[n.Name] {
			p.bad(n.Line, fmt.Sprintf("node %s is there twice", n.Name))
		}
		names[n.Name] = true
		if other, twice := ids[n.ID]; twice {
			p.bad(n.Line, fmt.Sprintf("nodes %s and %s have the same nodeid %d", other, n.Name, n.ID))
		}
		ids[n.ID] = n.Name
		votes += n.Votes
		seen := map[string]bool{}
		for _, m := range n.Methods {
			if seen[m.Name] {
				p.bad(m.Line, fmt.Sprintf("node %s has the method %s twice", n.Name, m.Name))
			}
			seen[m.Name] = true
			if len(m.Uses) == 0 {
				p.bad(m.Line, fmt.Sprintf("method %s of node %s has no device", m.Name, n.Name))
			}
			uses("method "+m.Name+" of node "+n.Name, m.Uses)
		}
		uses("unfence of node "+n.Name, n.Unfence)
	}
	if c.Cman.TwoNode && (len(c.Nodes) != 2 || c.Cman.ExpectedVotes != 1) {
		p.bad(c.Cman.Line, fmt.Sprintf("two_node=1 needs expected_votes=1 and two nodes; there are %d and expected_votes is %d", len(c.Nodes), c.Cman.ExpectedVotes))
	}
	if q := c.Quorumd; q != nil {
		c.checkQuorumd(p, q)
	}
	if c.RM != nil {
		c.checkRM(p, names)
	}
	return p.err()
}

func (c *Config) checkQuorumd(p *parser, q *Quorumd) {
	if q.Device == "" && q.Label == "" {
		p.bad(q.Line, "<quorumd> needs device or label")
	}
	if len(q.Heuristics) > 10 {
		p.bad(q.Line, fmt.Sprintf("%d heuristics: there may be 10", len(q.Heuristics)))
	}
	sum := 0
	for _, h := range q.Heuristics {
		sum += h.Score
	}
	if len(q.Heuristics) > 0 && q.MinScore > sum {
		p.bad(q.Line, fmt.Sprintf("min_score %d is more than all heuristics together have (%d): no node would ever be well", q.MinScore, sum))
	}
	if q.MasterWins && len(q.Heuristics) > 0 {
		p.bad(q.Line, "master_wins does not go with heuristics")
	}
	if len(c.Nodes) > 16 {
		p.bad(q.Line, fmt.Sprintf("a quorum disk has room for 16 nodes, there are %d", len(c.Nodes)))
	}
}

func (c *Config) checkRM(p *parser, nodes map[string]bool) {
	domains, services, shared := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, d := range c.RM.Domains {
		if domains[d.Name] {
			p.bad(d.Line, fmt.Sprintf("failover domain %s is there twice", d.Name))
		}
		domains[d.Name] = true
		in := map[string]bool{}
		for _, n := range d.Nodes {
			if !nodes[n.Name] {
				p.bad(d.Line, fmt.Sprintf("failover domain %s: no node is called %s", d.Name, n.Name))
			}
			if in[n.Name] {
				p.bad(d.Line, fmt.Sprintf("failover domain %s has node %s twice", d.Name, n.Name))
			}
			in[n.Name] = true
		}
	}
	for _, r := range c.RM.Resources {
		shared[r.Name+":"+primary(r)] = true
	}
	for _, s := range c.RM.Services {
		id := s.Tree.Name + ":" + s.Name
		if s.Name == "" {
			p.bad(s.Line, fmt.Sprintf("<%s> needs name or ref", s.Tree.Name))
		}
		if services[id] {
			p.bad(s.Line, fmt.Sprintf("%s is there twice", id))
		}
		services[id] = true
		if s.Domain != "" && !domains[s.Domain] {
			p.bad(s.Line, fmt.Sprintf("%s: no failover domain is called %s", id, s.Domain))
		}
		refs(p, s.Tree, shared)
	}
	for _, s := range c.RM.Services {
		if d := s.Tree.attr("depend"); d != "" && !services[d] {
			p.bad(s.Line, fmt.Sprintf("service %s depends on %s, which does not exist (write service:NAME)", s.Name, d))
		}
		if r := s.Tree.attr("recovery"); r != "" && !slices.Contains([]string{"restart", "relocate", "disable", "restart-disable"}, r) {
			p.bad(s.Line, fmt.Sprintf("service %s: recovery=%q: restart, relocate, disable or restart-disable is needed", s.Name, r))
		}
	}
}

// primary is the attribute by which ref= finds a resource.
func primary(e *Element) string {
	if e.Name == "ip" {
		return e.attr("address")
	}
	return e.attr("name")
}

func refs(p *parser, e *Element, shared map[string]bool) {
	if r, ok := e.Attrs.Get("ref"); ok && !shared[e.Name+":"+r] {
		p.bad(e.Line, fmt.Sprintf("<%s ref=%q>: there is no such resource", e.Name, r))
	}
	for _, c := range e.Children {
		refs(p, c, shared)
	}
}
