package verbs

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) nodeView() view[api.Node] {
	return view[api.Node]{
		kind: "Node",
		name: func(n api.Node) string { return n.Name },
		cols: []col[api.Node]{
			{head: "NAME", cell: func(n api.Node) string { return n.Name }},
			{head: "STATE", state: true, cell: func(n api.Node) string { return string(n.State) }},
			{head: "VOTE", state: true, cell: func(n api.Node) string { return dash(n.Vote) }},
			{head: "ROLES", cell: func(n api.Node) string { return join(n.Roles) }},
			{head: "CONTROL", state: true, cell: func(n api.Node) string { return dash(n.Control) }},
			{head: "WORKERS", cell: workers},
			{head: "LEASE", right: true, cell: lease},
			{head: "SINCE", cell: func(n api.Node) string { return a.ago(n.Since) }},
			{head: "INDEX", wide: true, right: true, cell: func(n api.Node) string { return strconv.Itoa(n.Index) }},
			{head: "INCARNATION", wide: true, right: true, cell: func(n api.Node) string { return strconv.FormatUint(n.Incarnation, 10) }},
			{head: "API", wide: true, cell: func(n api.Node) string { return dash(n.API) }},
			{head: "RAFT", wide: true, cell: func(n api.Node) string { return dash(n.Raft) }},
			{head: "GOSSIP", wide: true, cell: func(n api.Node) string { return dash(n.Gossip) }},
			{head: "PORTALS", wide: true, cell: func(n api.Node) string { return join(n.Portals) }},
			{head: "INITIATOR", wide: true, cell: func(n api.Node) string { return dash(n.Initiator) }},
			{head: "BOOT-ID", wide: true, cell: func(n api.Node) string { return dash(n.BootID) }},
			{head: "FORMAT", wide: true, right: true, cell: func(n api.Node) string { return strconv.FormatUint(uint64(n.Format), 10) }},
			{head: "REASON", wide: true, cell: func(n api.Node) string { return dash(n.Reason) }},
		},
		more: func(w io.Writer, a *app, n api.Node) {
			if len(n.Workers) == 0 {
				return
			}
			t := &table{colours: a.colours(a.Out)}
			t.head("WORKER", false, false)
			t.head("STATE", false, true)
			t.head("PID", true, false)
			t.head("UP", true, false)
			t.head("INDEX", true, false)
			t.head("INCARNATION", false, false)
			for _, k := range slices.Sorted(maps.Keys(n.Workers)) {
				wk := n.Workers[k]
				t.row(k, wk.State, strconv.Itoa(wk.PID), a.ago(wk.Started), strconv.FormatUint(wk.Index, 10), dash(wk.Incarnation))
			}
			fmt.Fprintln(w)
			t.write(w, "")
		},
	}
}

// workers writes the workers of a node in a cell: "storage serving, locks idle".
func workers(n api.Node) string {
	var s []string
	for _, k := range slices.Sorted(maps.Keys(n.Workers)) {
		s = append(s, k+" "+n.Workers[k].State)
	}
	return dash(strings.Join(s, ", "))
}

func lease(n api.Node) string {
	if n.LeaseLeft <= 0 {
		return "-"
	}
	return span(n.LeaseLeft)
}

func (a *app) nodeCmd() *cobra.Command {
	list := a.verb("list", "list the members", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Node]](ctx, a, api.PathNodes)
		if err != nil {
			return err
		}
		return printList(a, l, a.nodeView())
	})
	show := a.verb("show NAME", "show everything known of a member", func(ctx context.Context, args []string) error {
		n, err := get[api.Node](ctx, a, api.PathNodes+"/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		return printOne(a, n, a.nodeView())
	})
	remove := a.verb("remove NAME", "strike a node that left or is fenced from the cluster", func(ctx context.Context, args []string) error {
		if err := a.confirm(ctx, "strike node "+args[0]+" from the cluster"); err != nil {
			return err
		}
		d, err := a.delete(ctx, api.PathNodes+"/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		return a.printDone(d, "node "+args[0]+" is removed")
	})
	names := complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	show.ValidArgsFunction, remove.ValidArgsFunction = names, names
	return a.group(&cobra.Command{Use: "node", Short: "the members of the cluster"}, alias(list, "ls"), show, alias(remove, "rm"))
}
