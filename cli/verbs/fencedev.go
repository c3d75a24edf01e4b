package verbs

import (
	"context"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/fence/agent"
)

func fenceDeviceView() view[api.FenceDevice] {
	return view[api.FenceDevice]{
		kind: "FenceDevice",
		name: func(d api.FenceDevice) string { return d.Name },
		cols: []col[api.FenceDevice]{
			{head: "NAME", cell: func(d api.FenceDevice) string { return d.Name }},
			{head: "AGENT", cell: func(d api.FenceDevice) string { return d.Agent }},
			{head: "OPTIONS", cell: func(d api.FenceDevice) string {
				s := pairs(d.Params)
				if d.HasSecrets {
					s = append(s, "(secrets)")
				}
				return join(s)
			}},
			{head: "REACHED FROM", cell: func(d api.FenceDevice) string {
				if len(d.Executors) == 0 {
					return "all nodes"
				}
				return join(d.Executors)
			}},
			{head: "ACTIONS", wide: true, cell: func(d api.FenceDevice) string { return join(d.Actions) }},
			{head: "TIMEOUT", wide: true, cell: func(d api.FenceDevice) string {
				if d.TimeoutNS == 0 {
					return "default"
				}
				return d.TimeoutNS.String()
			}},
		},
	}
}

func pairs(m map[string]string) []string {
	var out []string
	for k, v := range m {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return out
}

func fenceMethodsView() view[api.FenceMethods] {
	return view[api.FenceMethods]{
		kind: "FenceMethods",
		name: func(m api.FenceMethods) string { return m.Node },
		cols: []col[api.FenceMethods]{
			{head: "NODE", cell: func(m api.FenceMethods) string { return m.Node }},
			{head: "IN THIS ORDER", cell: func(m api.FenceMethods) string {
				s := []string{"target"}
				for _, x := range m.Methods {
					var us []string
					for _, u := range x.Uses {
						t := u.Device
						if u.Plug != "" {
							t += ":" + u.Plug
						}
						if u.Action != "" {
							t = u.Action + " " + t
						}
						us = append(us, t)
					}
					s = append(s, x.Name+" ("+strings.Join(us, " and ")+")")
				}
				return strings.Join(append(s, "manual"), ", ")
			}},
			{head: "THEN", cell: func(m api.FenceMethods) string {
				if m.Off {
					return "left off"
				}
				return "brought back"
			}},
		},
	}
}

func fenceTestView(t api.FenceTested) view[api.FenceTestResult] {
	return view[api.FenceTestResult]{
		kind: "FenceTestResult",
		name: func(r api.FenceTestResult) string { return r.Method },
		cols: []col[api.FenceTestResult]{
			{head: "NODE", cell: func(api.FenceTestResult) string { return t.Node }},
			{head: "METHOD", cell: func(r api.FenceTestResult) string { return r.Method }},
			{head: "DEVICE", cell: func(r api.FenceTestResult) string { return dash(r.Device) }},
			{head: "OK", cell: func(r api.FenceTestResult) string { return strconv.FormatBool(r.OK) }},
			{head: "ANSWER", cell: func(r api.FenceTestResult) string { return dash(strings.SplitN(r.Text, "\n", 2)[0]) }},
		},
	}
}

// keyValue takes NAME=VALUE apart.
func keyValue(cmd, s string) (string, string, error) {
	k, v, ok := strings.Cut(s, "=")
	if !ok || k == "" {
		return "", "", usagef("", "%s: %q is not NAME=VALUE", cmd, s)
	}
	return k, v, nil
}

func (a *app) fenceDeviceCmd() *cobra.Command {
	var (
		set, secret, from []string
		timeout           time.Duration
		replace           bool
	)
	devices := complete(a, api.PathFenceDevices, func(d api.FenceDevice) string { return d.Name })
	add := a.verb("add NAME AGENT", "set a fence device up", func(ctx context.Context, args []string) error {
		const cmd = "fence device add"
		q := api.FenceDeviceSet{Name: args[0], Agent: args[1], Params: map[string]string{}, Executors: from, TimeoutNS: timeout, Replace: replace}
		for _, s := range set {
			k, v, err := keyValue(cmd, s)
			if err != nil {
				return err
			}
			if agent.Secret(k) {
				return usagef("clusteradm fence device add "+args[0]+" "+args[1]+" --secret-file "+k+"=FILE",
					"%s: %s is a secret: on the command line every user of this host can read it", cmd, k)
			}
			q.Params[k] = v
		}
		for _, s := range secret {
			k, file, err := keyValue(cmd, s)
			if err != nil {
				return err
			}
			if q.Params[k], err = a.readSecret(ctx, cmd, file); err != nil {
				return err
			}
		}
		d, err := post[api.FenceDevice](ctx, a, api.PathFenceDevices, q)
		if err != nil {
			return err
		}
		return printOne(a, d, fenceDeviceView())
	})
	add.Long = `Set a fence device up: AGENT is a fence agent of ClusterLabs (fence_ipmilan, …), and
--set its options by the names that its man page gives. Secrets come from files. The
cluster asks the agent what it can do, so it must be installed on the node that leads,
and on every node that is to run it.

A device fences nobody until a node's methods use it: clusteradm fence method set.`
	f := add.Flags()
	f.StringArrayVar(&set, "set", nil, "option of the agent, NAME=VALUE; may be repeated")
	f.StringArrayVar(&secret, "secret-file", nil, "secret option, NAME=FILE (- is standard input); may be repeated")
	f.StringSliceVar(&from, "from", nil, "the only nodes that reach the device; may be repeated")
	f.DurationVar(&timeout, "timeout", 0, "of one action; 0 is 60s")
	f.BoolVar(&replace, "replace", false, "change the device of that name")
	list := a.verb("list", "list the fence devices", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.FenceDevice]](ctx, a, api.PathFenceDevices)
		if err != nil {
			return err
		}
		return printList(a, l, fenceDeviceView())
	})
	rm := a.verb("rm NAME", "forget a fence device", func(ctx context.Context, args []string) error {
		d, err := a.delete(ctx, api.PathFenceDevices+"/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		return a.printDone(d, "fence device "+args[0]+" is deleted")
	})
	rm.ValidArgsFunction = devices
	return a.group(&cobra.Command{Use: "device", Short: "what switches nodes off"}, add, alias(list, "ls"), alias(rm, "delete", "remove"))
}

func (a *app) fenceMethodCmd() *cobra.Command {
	var off bool
	nodes := complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	set := a.verb("set NODE METHOD...", "say how a node is fenced", func(ctx context.Context, args []string) error {
		q := api.FenceMethods{Node: args[0], Off: off}
		for _, s := range args[1:] {
			m, err := parseMethod(s)
			if err != nil {
				return err
			}
			q.Methods = append(q.Methods, m)
		}
		m, err := post[api.FenceMethods](ctx, a, api.PathFenceMethods, q)
		if err != nil {
			return err
		}
		return printOne(a, m, fenceMethodsView())
	})
	set.Long = `Say how a node is fenced: the methods are tried in this order, again and again, until one
succeeds. The cut at the targets is always the first, an operator's word always counts.

  NAME=DEVICE[:PLUG][,DEVICE[:PLUG]...]

All devices of a method must succeed: two power supplies are pdu=pdu1:4,pdu2:4, and both
are off before either is on again. PLUG is what the device calls the node.

  clusteradm fence method set n2 ipmi=bmc2 pdu=pdu1:4,pdu2:4`
	set.Args = cobra.MinimumNArgs(2)
	set.Flags().BoolVar(&off, "off", false, "leave the node off; otherwise it is brought back")
	list := a.verb("list", "list how each node is fenced", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.FenceMethods]](ctx, a, api.PathFenceMethods)
		if err != nil {
			return err
		}
		return printList(a, l, fenceMethodsView())
	})
	wipe := a.verb("clear NODE", "forget the methods of a node", func(ctx context.Context, args []string) error {
		m, err := post[api.FenceMethods](ctx, a, api.PathFenceMethods, api.FenceMethods{Node: args[0]})
		if err != nil {
			return err
		}
		return printOne(a, m, fenceMethodsView())
	})
	set.ValidArgsFunction, wipe.ValidArgsFunction = nodes, nodes
	return a.group(&cobra.Command{Use: "method", Short: "how nodes are fenced"}, set, alias(list, "ls"), wipe)
}

// parseMethod reads NAME=DEVICE[:PLUG],….
func parseMethod(s string) (api.FenceMethod, error) {
	name, uses, err := keyValue("fence method set", s)
	if err != nil {
		return api.FenceMethod{}, err
	}
	m := api.FenceMethod{Name: name}
	for _, u := range strings.Split(uses, ",") {
		dev, plug, _ := strings.Cut(u, ":")
		if dev == "" {
			return m, usagef("clusteradm fence method set --help", "fence method set: %q names no device", s)
		}
		m.Uses = append(m.Uses, api.FenceUse{Device: dev, Plug: plug})
	}
	return m, nil
}

func (a *app) fenceRunCmd() *cobra.Command {
	var confirm, reason string
	c := a.verb("run NODE", "fence a node that is a member", func(ctx context.Context, args []string) error {
		d, err := post[api.Done](ctx, a, api.PathFenceRun, api.FenceRun{Node: args[0], Reason: reason, Confirm: confirm})
		if err != nil {
			return err
		}
		return a.printDone(d, "node "+args[0]+" is evicted and being fenced")
	})
	c.Long = `Fence a node that is a member: it is evicted, and then stopped as a dead one would be.
What runs on it ends. --confirm repeats the node's name.`
	c.Flags().StringVar(&confirm, "confirm", "", "NODE again")
	c.Flags().StringVar(&reason, "reason", "", "why, for the history")
	c.ValidArgsFunction = complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	return c
}

func (a *app) fenceTestCmd() *cobra.Command {
	c := a.verb("test NODE", "ask the fence devices of a node how they are; changes nothing", func(ctx context.Context, args []string) error {
		t, err := post[api.FenceTested](ctx, a, api.PathFenceTest, api.FenceTest{Node: args[0]})
		if err != nil {
			return err
		}
		l := api.List[api.FenceTestResult]{APIVersion: t.APIVersion, Kind: "FenceTestResultList", Items: t.Results}
		if err := printList(a, l, fenceTestView(t)); err != nil {
			return err
		}
		if !t.OK {
			return api.Errorf(api.CodeInternal, "clusteradm fence device list", "%s could not be fenced by every method that is configured", t.Node)
		}
		return nil
	})
	c.ValidArgsFunction = complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	return c
}
