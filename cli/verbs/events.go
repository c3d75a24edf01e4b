package verbs

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) eventsCmd() *cobra.Command {
	var follow bool
	c := a.verb("events", "print what happened lately", nil)
	c.Long = "Print the events that this node still remembers; with -f go on with new ones until\ninterrupted. -o json prints one document a line."
	c.RunE = func(c *cobra.Command, _ []string) error {
		if a.format == "name" {
			return usagef("", "events: -o name is for lists")
		}
		cl, err := a.client()
		if err != nil {
			return err
		}
		if follow {
			err = cl.Events(c.Context(), a.printEvent)
			if c.Context().Err() != nil {
				return nil // ^C is the normal end
			}
			if err == nil {
				return api.Errorf(api.CodeUnreachable, "the same command again", "events: clusterd ended the stream")
			}
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), a.timeout)
		defer cancel()
		err = cl.RecentEvents(ctx, a.printEvent)
		if err == nil && ctx.Err() != nil {
			return api.Errorf(api.CodeTimeout, "", "events: the list did not end within %s", a.timeout)
		}
		return err
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new events")
	return c
}

func (a *app) printEvent(e api.Event) error {
	switch a.format {
	case "json":
		return json.NewEncoder(a.Out).Encode(e)
	case "yaml":
		if _, err := fmt.Fprintln(a.Out, "---"); err != nil {
			return err
		}
		return a.writeDoc(a.Out, e)
	}
	_, err := fmt.Fprintf(a.Out, "%s  %-16s  %s\n", when(e.Time), clean(e.Kind), clean(e.Text))
	return err
}
