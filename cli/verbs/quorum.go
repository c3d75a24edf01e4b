package verbs

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) quorumCmd() *cobra.Command {
	v := view[api.Quorum]{
		kind: "Quorum",
		cols: []col[api.Quorum]{
			{head: "QUORATE", state: true, cell: func(q api.Quorum) string { return yesNo(q.Quorate) }},
			{head: "LEADER", cell: func(q api.Quorum) string { return dash(q.Leader) }},
			{head: "VOTERS", cell: func(q api.Quorum) string { return fmt.Sprintf("%d (%s)", len(q.Voters), join(q.Voters)) }},
			{head: "ONLINE", cell: func(q api.Quorum) string { return fmt.Sprintf("%d (%s)", len(q.Online), join(q.Online)) }},
			{head: "NEEDED", cell: func(q api.Quorum) string { return strconv.Itoa(q.Needed) }},
			{head: "SURVIVES", cell: func(q api.Quorum) string {
				return fmt.Sprintf("%d more lost %s", q.Survives, plural(q.Survives, "voter"))
			}},
			{head: "TERM", cell: func(q api.Quorum) string { return strconv.FormatUint(q.Term, 10) }},
			{head: "COMMIT", cell: func(q api.Quorum) string { return strconv.FormatUint(q.Commit, 10) }},
			{head: "PROFILE", cell: func(q api.Quorum) string { return dash(q.Profile) }},
		},
	}
	show := a.verb("show", "show the votes", func(ctx context.Context, _ []string) error {
		if a.format == "name" {
			return usagef("", "quorum show: -o name is for lists")
		}
		q, err := get[api.Quorum](ctx, a, api.PathQuorum)
		if err != nil {
			return err
		}
		return printOne(a, q, v)
	})
	return a.group(&cobra.Command{Use: "quorum", Short: "the vote"}, show)
}

func plural(n int, s string) string {
	if n == 1 {
		return s
	}
	return s + "s"
}
