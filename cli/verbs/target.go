package verbs

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func targetView() view[api.Target] {
	return view[api.Target]{
		kind: "Target",
		name: func(t api.Target) string { return t.IQN },
		cols: []col[api.Target]{
			{head: "TID", right: true, cell: func(t api.Target) string { return strconv.Itoa(t.TID) }},
			{head: "IQN", cell: func(t api.Target) string { return t.IQN }},
			{head: "LUNS", right: true, cell: func(t api.Target) string { return strconv.Itoa(len(t.LUNs)) }},
			{head: "ACL", cell: func(t api.Target) string { return aclText(t.ACL) }},
			{head: "SESSIONS", right: true, cell: func(t api.Target) string { return strconv.Itoa(t.Sessions) }},
			{head: "PORTALS", cell: func(t api.Target) string { return join(t.Portals) }},
			{head: "ALIAS", wide: true, cell: func(t api.Target) string { return dash(t.Alias) }},
		},
		more: func(w io.Writer, a *app, t api.Target) {
			if len(t.LUNs) > 0 {
				fmt.Fprintln(w)
				tableOf(a, t.LUNs, lunView()).write(w, "")
			}
		},
	}
}

func (a *app) targetCmd() *cobra.Command {
	var (
		req   api.TargetCreate
		force bool
	)
	create := a.verb("create NAME", "make an iSCSI target", func(ctx context.Context, args []string) error {
		req.Name = args[0]
		if req.TID < 0 {
			return usagef("", "target create: --tid %d: must not be negative", req.TID)
		}
		t, err := post[api.Target](ctx, a, api.PathTargets, req)
		if err != nil {
			return err
		}
		return printOne(a, t, targetView())
	})
	create.Long = `Make an iSCSI target. NAME is an IQN, or a short name from which one is made.
Nobody may log in until "clusteradm acl add" or "clusteradm acl open".`
	f := create.Flags()
	f.StringVar(&req.Alias, "alias", "", "TargetAlias that initiators show")
	f.IntVar(&req.TID, "tid", 0, "tgtadm's number (default: next free)")
	f.BoolVar(&req.IfNotExists, "if-not-exists", false, "succeed if the target is there already")

	list := a.verb("list", "list the targets", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Target]](ctx, a, api.PathTargets)
		if err != nil {
			return err
		}
		return printList(a, l, targetView())
	})
	show := a.verb("show IQN", "show a target and its LUNs", func(ctx context.Context, args []string) error {
		t, err := get[api.Target](ctx, a, api.PathTargets+"/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		return printOne(a, t, targetView())
	})
	del := a.verb("delete IQN", "delete a target; its volumes stay", func(ctx context.Context, args []string) error {
		if err := a.confirm(ctx, "delete target "+args[0]+" and end its sessions"); err != nil {
			return err
		}
		path := api.PathTargets + "/" + url.PathEscape(args[0])
		if force {
			path += "?force=1"
		}
		d, err := a.delete(ctx, path)
		if err != nil {
			return err
		}
		return a.printDone(d, "target "+args[0]+" is deleted")
	})
	del.Flags().BoolVar(&force, "force", false, "although it has LUNs: they go with it, their volumes stay")
	show.ValidArgsFunction = a.targets()
	del.ValidArgsFunction = a.targets()
	return a.group(&cobra.Command{Use: "target", Short: "iSCSI targets", Aliases: []string{"tgt"}}, create, alias(list, "ls"), show, alias(del, "rm"))
}

func (a *app) targets() completer {
	return complete(a, api.PathTargets, func(t api.Target) string { return t.IQN })
}
