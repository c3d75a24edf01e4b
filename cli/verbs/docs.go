package verbs

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func (a *app) docsCmd() *cobra.Command {
	gen := func(kind string, f func(root *cobra.Command, dir string) error) *cobra.Command {
		c := a.verb(kind+" DIR", "write the reference as "+kind+" pages into DIR", nil)
		c.RunE = func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return fmt.Errorf("docs %s: %w", kind, err)
			}
			root := c.Root()
			root.DisableAutoGenTag = true // no date: the same pages from the same source
			// The default of --socket must not carry this user's environment.
			if f := root.PersistentFlags().Lookup("socket"); f != nil {
				f.DefValue = DefaultSocket
			}
			if err := f(root, args[0]); err != nil {
				return fmt.Errorf("docs %s: %w", kind, err)
			}
			fmt.Fprintf(a.Err, "wrote the reference to %s\n", args[0])
			return nil
		}
		c.ValidArgsFunction = nil
		return c
	}
	man := gen("man", func(root *cobra.Command, dir string) error {
		epoch := time.Unix(0, 0).UTC()
		return doc.GenManTree(root, &doc.GenManHeader{Section: "8", Source: "Blockhouse", Manual: "Blockhouse", Date: &epoch}, dir)
	})
	md := gen("md", doc.GenMarkdownTree)
	return a.group(&cobra.Command{Use: "docs", Short: "write the reference pages", Hidden: true}, man, md)
}
