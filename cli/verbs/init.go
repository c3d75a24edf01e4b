package verbs

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) initCmd() *cobra.Command {
	c := a.verb("init NAME", "found a cluster on this host", func(ctx context.Context, args []string) error {
		d, err := post[api.Done](ctx, a, api.PathInit, api.Init{Cluster: args[0]})
		if err != nil {
			return err
		}
		return a.printDone(d, "cluster "+args[0]+" is founded; add nodes with the command that \"clusteradm token create\" prints")
	})
	c.Long = `Found a cluster on this host. The host becomes its first voter; the cluster's CA
is made here.

NAME is 1 to 32 of A-Z a-z 0-9 _ - and becomes the cluster part of every lock
table (mkfs-gfs -t NAME:FS). It cannot be changed later.`
	return c
}
