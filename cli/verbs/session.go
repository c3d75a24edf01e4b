package verbs

import (
	"context"
	"net/url"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/size"
)

func (a *app) sessionCmd() *cobra.Command {
	v := view[api.Session]{
		kind: "Session",
		name: func(s api.Session) string { return s.Node + " " + s.Target + " " + s.Initiator + " " + s.ISID },
		cols: []col[api.Session]{
			{head: "NODE", cell: func(s api.Session) string { return s.Node }},
			{head: "TARGET", cell: func(s api.Session) string { return s.Target }},
			{head: "INITIATOR", cell: func(s api.Session) string { return s.Initiator }},
			{head: "ADDRESS", cell: func(s api.Session) string { return s.Address }},
			{head: "UP", right: true, cell: func(s api.Session) string { return a.ago(s.Since) }},
			{head: "READ", right: true, cell: func(s api.Session) string { return size.Format(clamp(s.ReadBytes)) }},
			{head: "WRITTEN", right: true, cell: func(s api.Session) string { return size.Format(clamp(s.WriteBytes)) }},
			{head: "COMMANDS", wide: true, right: true, cell: func(s api.Session) string { return strconv.FormatUint(s.Commands, 10) }},
			{head: "ISID", wide: true, cell: func(s api.Session) string { return s.ISID }},
			{head: "TSIH", wide: true, right: true, cell: func(s api.Session) string { return strconv.Itoa(int(s.TSIH)) }},
		},
	}
	list := a.verb("list", "list the iSCSI sessions of every node", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Session]](ctx, a, api.PathSessions)
		if err != nil {
			return err
		}
		return printList(a, l, v)
	})
	kill := a.verb("kill NODE TSIH", "end a session; its initiator may log in again", func(ctx context.Context, args []string) error {
		if n, err := strconv.ParseUint(args[1], 10, 16); err != nil || n == 0 {
			return usagef("clusteradm session list -o wide", "session kill: %q is no TSIH: 1 to 65535", args[1])
		}
		if err := a.confirm(ctx, "end session "+args[1]+" on "+args[0]+", whose commands are aborted"); err != nil {
			return err
		}
		d, err := a.delete(ctx, api.PathSessions+"/"+url.PathEscape(args[0])+"/"+args[1])
		if err != nil {
			return err
		}
		return a.printDone(d, "session "+args[1]+" on "+args[0]+" is ended")
	})
	kill.Long = `End a session; "session list -o wide" shows its TSIH. Its commands are aborted. An
initiator logs in again by itself: to keep it out, take it off the target's list
first (clusteradm acl remove).`
	kill.ValidArgsFunction = complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	return a.group(&cobra.Command{Use: "session", Short: "iSCSI sessions"}, alias(list, "ls"), kill)
}

func clamp(n uint64) int64 { return int64(min(n, 1<<63-1)) }
