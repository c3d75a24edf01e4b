package verbs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) compatCmd() *cobra.Command {
	install := a.verb("install DIR", "link the legacy names into DIR", func(_ context.Context, args []string) error {
		return a.installLinks(args[0])
	})
	install.Long = `Link the legacy names (fence_ack_manual, gfs_mkfs, ...) into DIR, for users to put
on their PATH. Names that other packages own are never overwritten: choose a
directory of its own, such as /usr/lib/clusterd/compat.`
	install.ValidArgsFunction = nil
	list := a.verb("list", "list the legacy names", func(context.Context, []string) error {
		return printList(a, api.List[Face]{Items: a.Faces}, view[Face]{
			kind: "Face",
			name: func(f Face) string { return f.Name },
			cols: []col[Face]{
				{head: "NAME", cell: func(f Face) string { return f.Name }},
				{head: "BINARY", cell: func(f Face) string { return f.Of }},
				{head: "WHAT", cell: func(f Face) string { return f.Short }},
			},
		})
	})
	c := a.group(&cobra.Command{Use: "compat", Short: "the commands that old tutorials use"}, alias(list, "ls"), install)
	for _, f := range a.Faces {
		if f.Main == nil {
			continue
		}
		c.AddCommand(&cobra.Command{
			Use: f.Name, Short: f.Short, DisableFlagParsing: true,
			// The face has its own flags, exit codes and messages.
			PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
			RunE: func(_ *cobra.Command, args []string) error {
				if st := f.Main(f.Name, args, a.In, a.Out, a.Err); st != 0 {
					return exitStatus(st)
				}
				return nil
			},
		})
	}
	return c
}

// installLinks makes one symbolic link a face. Links that are right already are
// left; anything else of that name is refused before the first link is made.
func (a *app) installLinks(dir string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("compat install: find this program: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("compat install: %w", err)
	}
	type link struct{ name, to string }
	var missing []link
	for _, f := range a.Faces {
		to := filepath.Join(filepath.Dir(self), f.Of)
		if _, err := os.Stat(to); err != nil {
			to = self // every binary of ours serves every face
		}
		path := filepath.Join(dir, f.Name)
		got, err := os.Readlink(path)
		switch {
		case err == nil && got == to:
			continue
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, link{path, to})
		default:
			return api.Errorf(api.CodeExists, "clusteradm compat install /usr/lib/clusterd/compat", "compat install: %s is there already and is not a link to %s", path, to)
		}
	}
	for _, l := range missing {
		if err := os.Symlink(l.to, l.name); err != nil {
			return fmt.Errorf("compat install: %w", err)
		}
	}
	fmt.Fprintf(a.Err, "%d names linked in %s (%d were there); use them: PATH=%s:$PATH\n", len(missing), dir, len(a.Faces)-len(missing), dir)
	return nil
}
