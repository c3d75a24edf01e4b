package verbs

import (
	"context"
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
			{head: "TARGET", cell: func(s api.Session) string {
				if s.Discovery || s.Target == "" {
					return "(discovery)"
				}
				return s.Target
			}},
			{head: "INITIATOR", cell: func(s api.Session) string { return s.Initiator }},
			{head: "ADDRESS", cell: func(s api.Session) string { return s.Address }},
			{head: "UP", right: true, cell: func(s api.Session) string { return a.ago(s.Since) }},
			{head: "READ", right: true, cell: func(s api.Session) string { return size.Format(clamp(s.ReadBytes)) }},
			{head: "WRITTEN", right: true, cell: func(s api.Session) string { return size.Format(clamp(s.WriteBytes)) }},
			{head: "COMMANDS", wide: true, right: true, cell: func(s api.Session) string { return strconv.FormatUint(s.Commands, 10) }},
			{head: "QD", wide: true, right: true, cell: func(s api.Session) string { return ofIO(s, func(i *api.IOStats) uint64 { return i.InProgress }) }},
			{head: "NOT GOOD", wide: true, right: true, cell: func(s api.Session) string { return ofIO(s, (*api.IOStats).Failed) }},
			{head: "CONNS", wide: true, right: true, cell: func(s api.Session) string { return strconv.Itoa(max(1, s.Connections)) }},
			{head: "PORTAL", wide: true, cell: func(s api.Session) string { return dash(s.Local) }},
			{head: "USER", wide: true, cell: func(s api.Session) string { return dash(s.User) }},
			{head: "DIGESTS", wide: true, cell: func(s api.Session) string { return digests(s) }},
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
		tsih, err := parseTSIH("session kill", args[1])
		if err != nil {
			return err
		}
		if err := a.confirm(ctx, "end session "+args[1]+" on "+args[0]+", whose commands are aborted"); err != nil {
			return err
		}
		d, err := a.delete(ctx, sessionPath(args[0], tsih))
		if err != nil {
			return err
		}
		return a.printDone(d, "session "+args[1]+" on "+args[0]+" is ended")
	})
	kill.Long = `End a session; "session list -o wide" shows its TSIH. Its commands are aborted. An
initiator logs in again by itself: to keep it out, take it off the target's list
first (clusteradm acl remove).`
	kill.ValidArgsFunction = complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	return a.group(&cobra.Command{Use: "session", Short: "iSCSI sessions"}, alias(list, "ls"), a.sessionShowCmd(v), kill)
}

// ofIO is a number that only the session's own node knows.
func ofIO(s api.Session, f func(*api.IOStats) uint64) string {
	if s.IO == nil {
		return "-"
	}
	return strconv.FormatUint(f(s.IO), 10)
}

// digests are those of the header and of the data.
func digests(s api.Session) string {
	if s.Params == nil {
		return "-"
	}
	return s.Params["HeaderDigest"] + "," + s.Params["DataDigest"]
}

func clamp(n uint64) int64 { return int64(min(n, 1<<63-1)) }
