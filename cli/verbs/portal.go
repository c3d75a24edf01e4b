package verbs

import (
	"context"
	"fmt"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func portalView() view[api.Portal] {
	return view[api.Portal]{
		kind: "Portal",
		name: func(p api.Portal) string { return p.Node + " " + p.Address },
		cols: []col[api.Portal]{
			{head: "NODE", cell: func(p api.Portal) string { return p.Node }},
			{head: "ADDRESS", cell: func(p api.Portal) string { return p.Address }},
			{head: "FROM", cell: func(p api.Portal) string { return p.From }},
			{head: "STATE", state: true, cell: func(p api.Portal) string { return p.State }},
			{head: "WHY", cell: func(p api.Portal) string { return dash(p.Error) }},
		},
	}
}

func (a *app) portalCmd() *cobra.Command {
	list := a.verb("list [NODE]", "list the addresses at which nodes take iSCSI logins", func(ctx context.Context, args []string) error {
		l, err := get[api.List[api.Portal]](ctx, a, api.PathPortals)
		if err != nil {
			return err
		}
		if len(args) == 1 {
			items := []api.Portal{}
			for _, p := range l.Items {
				if p.Node == args[0] {
					items = append(items, p)
				}
			}
			if len(items) == 0 {
				return api.Errorf(api.CodeNotFound, "clusteradm node list", "portal list: no storage node %s", args[0])
			}
			l.Items = items
		}
		return printList(a, l, portalView())
	})
	list.Long = `List the addresses at which nodes take iSCSI logins. FROM is file (listen.iscsi of
the node's file) or cluster (portal add). STATE is open, closed (no target is there
yet), failed (WHY says who holds the port), opening, or unknown (the node says
nothing).`
	add := a.verb("add NODE ADDRESS[:PORT]", "let a node take iSCSI logins at one more address", func(ctx context.Context, args []string) error {
		p, err := post[api.Portal](ctx, a, api.PathPortals, api.PortalAdd{Node: args[0], Address: args[1]})
		if err != nil {
			return err
		}
		if p.State == "failed" {
			fmt.Fprintf(a.Err, "warning: the portal is recorded and not open yet: %s\n", clean(p.Error))
		}
		return printOne(a, p, portalView())
	})
	add.Long = `Let a node take iSCSI logins at one more address, ADDRESS or ADDRESS:PORT, without a
restart; the port is 3260 where none is given, and IPv6 with a port stands in
brackets. A portal that cannot be opened keeps no other from being served, and is
tried again every second.`
	add.Example = "  clusteradm portal add n1 192.0.2.11\n  clusteradm portal add n1 [2001:db8::11]:3261"
	rm := a.verb("rm NODE ADDRESS[:PORT]", "take a portal away that was added", func(ctx context.Context, args []string) error {
		d, err := a.delete(ctx, api.PathPortals+"/"+url.PathEscape(args[0])+"/"+url.PathEscape(args[1]))
		if err != nil {
			return err
		}
		return a.printDone(d, "portal "+args[1]+" of "+args[0]+" is removed")
	})
	rm.Long = `Take a portal away that was added. No new login comes through it; sessions that
did stay, as with tgtd: end them with clusteradm session kill.`
	nodes := complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	list.ValidArgsFunction, add.ValidArgsFunction, rm.ValidArgsFunction = nodes, nodes, nodes
	return a.group(&cobra.Command{Use: "portal", Short: "iSCSI addresses of the nodes", Aliases: []string{"portals"}}, alias(list, "ls"), add, alias(rm, "remove"))
}
