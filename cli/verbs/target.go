package verbs

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

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
			{head: "REDIRECT", wide: true, cell: func(t api.Target) string { return redirectText(t) }},
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
	var permanent, off bool
	redirect := a.verb("redirect IQN [PORTAL]", "send initiators to another portal when they log in", func(ctx context.Context, args []string) error {
		q := api.TargetSet{Params: map[string]string{api.RedirectAddress: "", api.RedirectPort: "", api.RedirectReason: ""}}
		if (len(args) == 2) == off {
			return usagef("", "target redirect: give a portal, ADDRESS or ADDRESS:PORT, or --off")
		}
		if !off {
			host, port, err := splitPortal(args[1])
			if err != nil {
				return err
			}
			q.Params[api.RedirectAddress], q.Params[api.RedirectPort] = host, port
			if permanent {
				q.Params[api.RedirectReason] = "Permanent"
			}
			for k, v := range q.Params {
				if err := api.CheckTargetParam(k, v); err != nil {
					return usagef("", "target redirect: %v", err)
				}
			}
		}
		t, err := post[api.Target](ctx, a, api.PathTargets+"/"+url.PathEscape(args[0]), q)
		if err != nil {
			return err
		}
		return printOne(a, t, targetView())
	})
	redirect.Long = `Send initiators to another portal (ADDRESS or ADDRESS:PORT) when they log in to a
target, before they authenticate. The portal itself takes logins: name one of another
node to have all new sessions there. Sessions that exist stay where they are.`
	redirect.Flags().BoolVar(&permanent, "permanent", false, "tell initiators to remember it")
	redirect.Flags().BoolVar(&off, "off", false, "take logins at every portal again")
	redirect.ValidArgsFunction = a.targets()
	show.ValidArgsFunction = a.targets()
	del.ValidArgsFunction = a.targets()
	return a.group(&cobra.Command{Use: "target", Short: "iSCSI targets", Aliases: []string{"tgt"}}, create, alias(list, "ls"), show, redirect, alias(del, "rm"))
}

func redirectText(t api.Target) string {
	p, forever := api.RedirectOf(t.Params)
	if forever {
		p += " (permanent)"
	}
	return dash(p)
}

// splitPortal takes ADDRESS[:PORT] apart; an IPv6 address with a port stands in
// brackets.
func splitPortal(s string) (host, port string, err error) {
	if ip, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return ip.String(), "", nil
	}
	if !strings.Contains(s, ":") {
		return s, "", nil
	}
	host, port, err = net.SplitHostPort(s)
	if err != nil {
		return "", "", usagef("", "%q is no portal: write ADDRESS or ADDRESS:PORT, IPv6 in brackets", s)
	}
	return host, port, nil
}

func (a *app) targets() completer {
	return complete(a, api.PathTargets, func(t api.Target) string { return t.IQN })
}
