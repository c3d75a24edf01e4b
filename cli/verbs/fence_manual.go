package verbs

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/fence/manual"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// The texts of fence_ack_manual after manual.Warning and manual.Prompt, which
// operators and scripts know (facts/interfaces.md §3.4).
const (
	ackAborted = "Aborted."
	ackDone    = "Done"
)

// ack is one operator's word that a node was reset.
type ack struct {
	node   string // name
	addr   string // -s of old releases: the node by its address
	reset  string // --yes-i-reset-it
	reason string
	// script is the legacy face: the word comes from stdin whatever stdin is,
	// as the original script took it.
	script bool
	prefix string // of errors: "fence_manual: "
}

func (a *app) fenceManualCmd() *cobra.Command {
	c := a.ackCmd("fence_manual")
	c.Aliases = []string{"fence_ack_manual"}
	return c
}

// ackCmd makes fence ack, fence_manual and fence_ack_manual.
func (a *app) ackCmd(name string) *cobra.Command {
	var k ack
	c := a.verb(name+" [NODE]", "tell the cluster that you have reset a lost node", nil)
	c.Long = `Tell the cluster that you have reset a lost node, or cut its power.

The cluster waits for this where no fence device could prove the node's death. Do
it only after you have seen the node dead: a node that still runs and is told to be
dead will destroy filesystems.

It shows a warning and takes only the word "absolutely", on a terminal. A script
must name the node twice: fence_manual NODE --yes-i-reset-it NODE. Who said it, and
why (--reason), is kept for ever: clusteradm fence history.`
	c.RunE = func(c *cobra.Command, args []string) error {
		k.prefix = what(c) + ": "
		if err := k.setNode(args); err != nil {
			return err
		}
		return a.runAck(c.Context(), k)
	}
	f := c.Flags()
	f.StringVarP(&k.node, "node", "n", "", "the node, as in fence_ack_manual -n NODE")
	f.StringVar(&k.reset, "yes-i-reset-it", "", "NODE again: confirm without a terminal")
	f.StringVar(&k.reason, "reason", "", "what you did, for the history")
	c.ValidArgsFunction = complete(a, api.PathFence, func(f api.Fence) string { return f.Node })
	return c
}

func (k *ack) setNode(args []string) error {
	switch {
	case len(args) == 1 && k.node == "" && k.addr == "":
		k.node = args[0]
	case len(args) == 1:
		return usagef("clusteradm fence list", "%sthe node is given twice", k.prefix)
	case k.node == "" && k.addr == "":
		return usagef("clusteradm fence list", "%smissing NODE", k.prefix)
	}
	return nil
}

// runAck finds the open fence, asks, and commits. Asking has no deadline: the
// operator may walk to the machine.
func (a *app) runAck(ctx context.Context, k ack) error {
	f, err := a.openFence(ctx, &k)
	if err != nil {
		return err
	}
	confirm, err := a.askAck(ctx, k, f)
	if err != nil {
		return err
	}
	cctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	d, err := post[api.Done](cctx, a, api.PathFenceAck, api.FenceAck{Node: k.node, Operator: operator(a.Env), Reason: k.reason, Confirm: confirm})
	if err != nil {
		return err
	}
	if a.format == "json" || a.format == "yaml" {
		d.APIVersion = api.Version
		return a.writeDoc(a.Out, d)
	}
	fmt.Fprintln(a.Out, ackDone)
	return nil
}

// openFence gives the open fence of the node that k names, and completes k.node.
func (a *app) openFence(ctx context.Context, k *ack) (api.Fence, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	l, err := get[api.List[api.Fence]](ctx, a, api.PathFence)
	if err != nil {
		return api.Fence{}, err
	}
	var nodes []api.Node
	if k.addr != "" {
		nl, err := get[api.List[api.Node]](ctx, a, api.PathNodes)
		if err != nil {
			return api.Fence{}, err
		}
		nodes = nl.Items
		if k.node = nodeByAddress(nodes, k.addr); k.node == "" {
			return api.Fence{}, api.Errorf(api.CodeRefused, "clusteradm node list -o wide", "%sno node has the address %s", k.prefix, k.addr)
		}
	}
	for _, f := range l.Items {
		if f.Node == k.node {
			return f, nil
		}
	}
	return api.Fence{}, a.noFence(ctx, k, l.Items)
}

// noFence says why there is nothing to acknowledge and what to run instead.
func (a *app) noFence(ctx context.Context, k *ack, open []api.Fence) error {
	why, next := "", "clusteradm status"
	if nl, err := get[api.List[api.Node]](ctx, a, api.PathNodes); err == nil {
		why, next = "; there is no node of that name", "clusteradm node list"
		for _, n := range nl.Items {
			if n.Name == k.node {
				why, next = fmt.Sprintf("; the node is %s", n.State), "clusteradm fence history"
			}
		}
	}
	if len(open) > 0 {
		var s []string
		for _, f := range open {
			s = append(s, f.Node)
		}
		why += "; open fences: " + strings.Join(s, ", ")
		next = "clusteradm fence list"
	}
	return api.Errorf(api.CodeRefused, next, "%sno open fence for %s%s: nothing waits for you", k.prefix, k.node, why)
}

// askAck gets the operator's confirmation and returns what FenceAck.Confirm
// takes.
func (a *app) askAck(ctx context.Context, k ack, f api.Fence) (string, error) {
	if k.reset != "" {
		if k.reset != k.node {
			return "", api.Errorf(api.CodeRefused, fmt.Sprintf("clusteradm fence_manual %s --yes-i-reset-it %s", k.node, k.node),
				"%s--yes-i-reset-it %s is not the node %s", k.prefix, k.reset, k.node)
		}
		return k.node, nil
	}
	if !k.script && !isTerminal(a.In) {
		return "", api.Errorf(api.CodeRefused, fmt.Sprintf("clusteradm fence_manual %s --yes-i-reset-it %s", k.node, k.node),
			"%sthere is no terminal to ask on, so nobody says that %s was reset", k.prefix, k.node)
	}
	if !k.script {
		fmt.Fprintf(a.Err, "node %s is out of the cluster since %s: %s\n\n", clean(f.Node), when(f.Since), clean(dash(f.Reason)))
	}
	out := a.Out
	if a.format == "json" || a.format == "yaml" {
		out = a.Err // the document stands alone on stdout
	}
	fmt.Fprint(out, manual.Warning(k.node))
	// As the shell's read -p: the prompt is for a person, and stands on stderr.
	tty := isTerminal(a.In)
	if tty {
		fmt.Fprint(a.Err, manual.Prompt)
	}
	word, err := readLine(ctx, a.In)
	if tty && err != nil && word == "" {
		fmt.Fprintln(a.Err)
	}
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if !manual.Accepted(word) {
		fmt.Fprintln(out, ackAborted)
		return "", exitStatus(1)
	}
	return manual.Word, nil
}

// nodeByAddress finds the node that listens on the given address.
func nodeByAddress(nodes []api.Node, addr string) string {
	want := net.ParseIP(addr)
	for _, n := range nodes {
		for _, s := range []string{n.API, n.Raft, n.Gossip} {
			host, _, err := net.SplitHostPort(s)
			if err == nil && (host == addr || want != nil && want.Equal(net.ParseIP(host))) {
				return n.Name
			}
		}
	}
	return ""
}

// operator names who speaks: the person behind sudo, at this host.
func operator(env func(string) string) string {
	name := ""
	if os.Geteuid() == 0 {
		name = env("SUDO_USER")
	}
	if name == "" {
		if u, err := user.Current(); err == nil {
			name = u.Username
		} else {
			name = fmt.Sprintf("uid%d", os.Getuid())
		}
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return name + "@" + host
}

// FenceAckFace is fence_ack_manual and fence_manual under argv[0]: the flags of
// the old script, and the word from stdin even without a terminal, because old
// scripts pipe it.
func FenceAckFace(ctx context.Context, argv0 string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return fenceAckFace(ctx, argv0, args, IO{In: stdin, Out: stdout, Err: stderr})
}

func fenceAckFace(ctx context.Context, argv0 string, args []string, o IO) int {
	a := newApp(argv0, o)
	defer a.close()
	k := ack{script: true}
	var override bool
	c := a.verb(argv0+" [NODE]", "tell the cluster that you have reset a lost node", nil)
	c.SilenceErrors, c.SilenceUsage = true, true
	c.Use = argv0 + " [-O] [-n NODE | -s IP | NODE]"
	c.Args = argsOf("x [NODE]")
	c.Version = version.String()
	c.SetIn(a.In)
	c.SetOut(a.Out)
	c.SetErr(a.Err)
	c.SetArgs(args)
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usagef(argv0+" -h", "%v", err) })
	c.CompletionOptions.DisableDefaultCmd = true
	f := c.Flags()
	f.StringVarP(&k.node, "node", "n", "", "the node")
	f.StringVarP(&k.addr, "address", "s", "", "the node by its IP address (RHEL 3)")
	f.BoolVarP(&override, "override", "O", false, "accepted and ignored: the open fence decides")
	f.StringVar(&k.reset, "yes-i-reset-it", "", "NODE again: confirm without the word")
	f.StringVar(&k.reason, "reason", "", "what you did, for the history")
	f.BoolP("version", "V", false, "print the version")
	def := a.Env(EnvSocket)
	if def == "" {
		def = DefaultSocket
	}
	f.StringVar(&a.socket, "socket", def, "unix socket of clusterd")
	f.DurationVar(&a.timeout, "timeout", defaultTimeout, "deadline of each request")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := k.setNode(args); err != nil {
			return err
		}
		return a.runAck(c.Context(), k)
	}
	st := a.finish(ctx, c.ExecuteContext(ctx), args)
	if st == api.CodeUsage.Exit() {
		return 1 // as the script
	}
	return st
}
