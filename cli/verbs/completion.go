package verbs

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

type completer = func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective)

// complete offers the names of a list as the first argument. A daemon that does
// not answer at once gives no names: a TAB must not hang.
func complete[T any](a *app, path string, name func(T) string) completer {
	return func(c *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(c.Context(), time.Second)
		defer cancel()
		l, err := get[api.List[T]](ctx, a, path)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var s []cobra.Completion
		for _, it := range l.Items {
			s = append(s, name(it))
		}
		return s, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeNodes offers node names for a flag, whatever the arguments are.
func (a *app) completeNodes(c *cobra.Command, flag string) {
	names := complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	_ = c.RegisterFlagCompletionFunc(flag, func(c *cobra.Command, _ []string, s string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return names(c, nil, s)
	})
}

// alias gives c more names.
func alias(c *cobra.Command, names ...string) *cobra.Command {
	c.Aliases = names
	return c
}

func (a *app) completionCmd() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	c := a.verb("completion SHELL", "print the completion script of a shell: bash, zsh or fish", nil)
	c.Long = `Print the completion script of a shell: bash, zsh or fish. For bash:

  clusteradm completion bash > /etc/bash_completion.d/clusteradm`
	c.ValidArgs = shells
	c.ValidArgsFunction = nil
	c.RunE = func(c *cobra.Command, args []string) error {
		gen := map[string]func(io.Writer) error{
			"bash": func(w io.Writer) error { return c.Root().GenBashCompletionV2(w, true) },
			"zsh":  c.Root().GenZshCompletion,
			"fish": func(w io.Writer) error { return c.Root().GenFishCompletion(w, true) },
		}[args[0]]
		if gen == nil {
			return usagef("clusteradm completion bash", "completion: unknown shell %q: bash, zsh or fish", args[0])
		}
		return gen(a.Out)
	}
	return c
}
