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
	return a.group(&cobra.Command{Use: "session", Short: "iSCSI sessions"}, alias(list, "ls"))
}

func clamp(n uint64) int64 { return int64(min(n, 1<<63-1)) }
