package verbs

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// versions is the document of version.
type versions struct {
	Client   string `json:"client"`
	Go       string `json:"go"`
	Clusterd string `json:"clusterd,omitempty"` // empty: not asked or not reachable
	Node     string `json:"node,omitempty"`
}

func (a *app) versionCmd() *cobra.Command {
	var client bool
	c := a.verb("version", "print the versions of clusteradm and of the clusterd it talks to", func(ctx context.Context, _ []string) error {
		v := versions{Client: version.String(), Go: runtime.Version()}
		why := ""
		if !client {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			st, err := get[api.Status](ctx, a, api.PathStatus)
			if err != nil {
				why = api.AsError(err).Message // the client's version is an answer by itself
			}
			v.Clusterd, v.Node = st.Version, st.Node
		}
		switch a.format {
		case "json", "yaml":
			return a.writeObject(a.Out, "Version", v)
		case "name":
			fmt.Fprintln(a.Out, v.Client)
			return nil
		}
		fmt.Fprintf(a.Out, "clusteradm %s (%s)\n", v.Client, v.Go)
		if v.Clusterd != "" {
			fmt.Fprintf(a.Out, "clusterd   %s (node %s)\n", clean(v.Clusterd), clean(dash(v.Node)))
		} else if why != "" {
			fmt.Fprintf(a.Err, "clusterd: %s\n", why)
		}
		return nil
	})
	c.Flags().BoolVar(&client, "client", false, "do not ask clusterd")
	return c
}
