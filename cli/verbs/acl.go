package verbs

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

// aclText writes an ACL in a cell.
func aclText(l api.ACL) string {
	var s []string
	if l.Open {
		s = append(s, "open")
	}
	s = append(append(s, l.Initiators...), l.Addresses...)
	if len(s) == 0 {
		return "nobody"
	}
	return strings.Join(s, ",")
}

// aclRow is one line of acl list.
type aclRow struct {
	Target string `json:"target"`
	Kind   string `json:"kind"` // open, initiator, address
	Value  string `json:"value"`
}

func aclRows(ts []api.Target) []aclRow {
	rows := []aclRow{}
	for _, t := range ts {
		if t.ACL.Open {
			rows = append(rows, aclRow{t.IQN, "open", "everybody"})
		}
		for _, n := range t.ACL.Initiators {
			rows = append(rows, aclRow{t.IQN, "initiator", n})
		}
		for _, n := range t.ACL.Addresses {
			rows = append(rows, aclRow{t.IQN, "address", n})
		}
	}
	return rows
}

func aclView() view[aclRow] {
	return view[aclRow]{
		kind: "ACL",
		name: func(r aclRow) string { return r.Target + " " + r.Value },
		cols: []col[aclRow]{
			{head: "TARGET", cell: func(r aclRow) string { return r.Target }},
			{head: "KIND", cell: func(r aclRow) string { return r.Kind }},
			{head: "WHO", cell: func(r aclRow) string { return r.Value }},
		},
	}
}

// parseACL sorts entries into initiator names (RFC 7143 §4.2.7: iqn., eui., naa.)
// and addresses.
func parseACL(cmd string, entries []string) (api.ACL, error) {
	var l api.ACL
	for _, e := range entries {
		low := strings.ToLower(e)
		if strings.HasPrefix(low, "iqn.") || strings.HasPrefix(low, "eui.") || strings.HasPrefix(low, "naa.") {
			l.Initiators = append(l.Initiators, low) // names compare case-folded
			continue
		}
		if p, err := netip.ParsePrefix(e); err == nil {
			l.Addresses = append(l.Addresses, p.Masked().String())
			continue
		}
		ip, err := netip.ParseAddr(e)
		if err != nil || ip.Zone() != "" {
			return l, usagef("clusteradm acl add --help", "%s: %q is neither an initiator name (iqn. eui. naa.) nor an address or CIDR", cmd, e)
		}
		l.Addresses = append(l.Addresses, netip.PrefixFrom(ip, ip.BitLen()).String())
	}
	return l, nil
}

func (a *app) aclCmd() *cobra.Command {
	change := func(ctx context.Context, c api.ACLChange) error {
		t, err := post[api.Target](ctx, a, api.PathACLs, c)
		if err != nil {
			return err
		}
		if a.format != "table" && a.format != "wide" {
			return printOne(a, t, targetView())
		}
		fmt.Fprintf(a.Err, "target %s may be used by: %s\n", t.IQN, clean(aclText(t.ACL)))
		return nil
	}
	several := func(c *cobra.Command, run func(ctx context.Context, args []string) error) *cobra.Command {
		c.Args = func(c *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usagef(c.CommandPath()+" --help", "%s: write IQN and at least one initiator name, address or CIDR", what(c))
			}
			return nil
		}
		c.RunE = func(c *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), a.timeout)
			defer cancel()
			return run(ctx, args)
		}
		c.ValidArgsFunction = a.targets()
		return c
	}

	list := a.verb("list [IQN]", "list who may use the targets", func(ctx context.Context, args []string) error {
		l, err := get[api.List[api.Target]](ctx, a, api.PathTargets)
		if err != nil {
			return err
		}
		ts := l.Items
		if len(args) == 1 {
			ts = nil
			for _, t := range l.Items {
				if strings.EqualFold(t.IQN, args[0]) {
					ts = append(ts, t)
				}
			}
			if ts == nil {
				return api.Errorf(api.CodeNotFound, "clusteradm target list", "acl list: no target %s", args[0])
			}
		}
		return printList(a, api.List[aclRow]{Stale: l.Stale, Index: l.Index, Items: aclRows(ts)}, aclView())
	})
	list.ValidArgsFunction = a.targets()

	add := several(&cobra.Command{
		Use: "add IQN WHO...", Short: "let initiators use a target",
		Long: `Let initiators use a target. WHO is an initiator name (iqn. eui. naa.), an address
or a CIDR. Where a target has both names and addresses, both must match.`,
		Example: "  clusteradm acl add iqn.2026-11.example:disks iqn.1993-08.org.debian:01:abc 192.0.2.0/24",
	}, func(ctx context.Context, args []string) error {
		l, err := parseACL("acl add", args[1:])
		if err != nil {
			return err
		}
		return change(ctx, api.ACLChange{Target: args[0], Add: l})
	})
	remove := several(&cobra.Command{Use: "remove IQN WHO...", Short: "take initiators off a target's list"}, func(ctx context.Context, args []string) error {
		l, err := parseACL("acl remove", args[1:])
		if err != nil {
			return err
		}
		return change(ctx, api.ACLChange{Target: args[0], Remove: l})
	})
	var off bool
	open := a.verb("open IQN", "let everybody use a target", func(ctx context.Context, args []string) error {
		v := !off
		return change(ctx, api.ACLChange{Target: args[0], Open: &v})
	})
	open.Flags().BoolVar(&off, "off", false, "only the entries of the list again")
	open.ValidArgsFunction = a.targets()
	return a.group(&cobra.Command{Use: "acl", Short: "who may use a target"}, alias(list, "ls"), add, alias(remove, "rm"), open)
}
