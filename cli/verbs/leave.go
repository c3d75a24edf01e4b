package verbs

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) leaveCmd() *cobra.Command {
	var force bool
	c := a.verb("leave", "take this host out of the cluster", func(ctx context.Context, _ []string) error {
		if err := a.confirm(ctx, "take this host out of its cluster"); err != nil {
			return err
		}
		d, err := post[api.Done](ctx, a, api.PathLeave, api.Leave{Force: force})
		if err != nil {
			return err
		}
		return a.printDone(d, "this host has left the cluster")
	})
	c.Long = `Take this host out of the cluster in an orderly way: it hands over, gives its vote
back and is no longer waited for. Refused while volumes or the quorum would be
lost, unless --force.`
	c.Flags().BoolVar(&force, "force", false, "although volumes or votes are lost")
	return c
}
