package verbs

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) fenceView() view[api.Fence] {
	return view[api.Fence]{
		kind: "Fence",
		name: func(f api.Fence) string { return f.Node },
		cols: []col[api.Fence]{
			{head: "NODE", cell: func(f api.Fence) string { return f.Node }},
			{head: "SINCE", cell: func(f api.Fence) string { return when(f.Since) }},
			{head: "OPEN", right: true, cell: func(f api.Fence) string { return a.ago(f.Since) }},
			{head: "WAITING FOR", cell: func(f api.Fence) string { return dash(f.Waiting) }},
			{head: "REASON", cell: func(f api.Fence) string { return dash(f.Reason) }},
			{head: "EPOCH", wide: true, right: true, cell: func(f api.Fence) string { return strconv.FormatUint(f.Epoch, 10) }},
			{head: "INCARNATION", wide: true, right: true, cell: func(f api.Fence) string { return strconv.FormatUint(f.Incarnation, 10) }},
			{head: "ATTEMPTS", wide: true, right: true, cell: func(f api.Fence) string { return strconv.Itoa(f.Attempts) }},
		},
	}
}

func fenceEventView() view[api.FenceEvent] {
	return view[api.FenceEvent]{
		kind: "FenceEvent",
		name: func(f api.FenceEvent) string { return strconv.FormatUint(f.Index, 10) },
		cols: []col[api.FenceEvent]{
			{head: "INDEX", right: true, cell: func(f api.FenceEvent) string { return strconv.FormatUint(f.Index, 10) }},
			{head: "TIME", cell: func(f api.FenceEvent) string { return when(f.Time) }},
			{head: "NODE", cell: func(f api.FenceEvent) string { return f.Node }},
			{head: "EVENT", cell: func(f api.FenceEvent) string { return f.Event }},
			{head: "METHOD", cell: func(f api.FenceEvent) string { return dash(f.Method) }},
			{head: "OPERATOR", cell: func(f api.FenceEvent) string { return dash(f.Operator) }},
			{head: "REASON", cell: func(f api.FenceEvent) string { return dash(f.Reason) }},
			{head: "EPOCH", wide: true, right: true, cell: func(f api.FenceEvent) string { return strconv.FormatUint(f.Epoch, 10) }},
			{head: "INCARNATION", wide: true, right: true, cell: func(f api.FenceEvent) string { return strconv.FormatUint(f.Incarnation, 10) }},
			{head: "EVIDENCE", wide: true, cell: func(f api.FenceEvent) string { return dash(f.Evidence) }},
		},
	}
}

func (a *app) fenceCmd() *cobra.Command {
	list := a.verb("list", "list the open fences: nodes whose death is not proven", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Fence]](ctx, a, api.PathFence)
		if err != nil {
			return err
		}
		return printList(a, l, a.fenceView())
	})
	history := a.verb("history", "list every fence decision that was ever made", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.FenceEvent]](ctx, a, api.PathFenceHistory)
		if err != nil {
			return err
		}
		return printList(a, l, fenceEventView())
	})
	return a.group(&cobra.Command{Use: "fence", Short: "nodes that must be stopped, and the proof that they were"},
		alias(list, "ls"), history, a.ackCmd("ack"), a.fenceRunCmd(), a.fenceTestCmd(), a.fenceDeviceCmd(), a.fenceMethodCmd())
}
