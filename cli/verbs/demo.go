package verbs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/cli/demo"
)

// upTimeout is how long demo up may take unless --timeout says otherwise: three
// daemons start, elect and format on a machine that may be slow.
const upTimeout = 3 * time.Minute

func (a *app) demoCmd() *cobra.Command {
	var dir string
	open := func() (*demo.Demo, error) {
		d := &demo.Demo{Out: a.Out, Err: a.Err, Dir: dir}
		var err error
		if d.Dir == "" {
			d.Dir, err = demo.DefaultDir(a.Env)
		} else {
			d.Dir, err = filepath.Abs(d.Dir)
		}
		if err != nil {
			return nil, err
		}
		if d.Clusteradm, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("demo: find this program: %w", err)
		}
		d.Clusterd, d.Mkfs = program(d.Clusteradm, "clusterd"), program(d.Clusteradm, "mkfs-gfs")
		return d, nil
	}
	long := func(c *cobra.Command, run func(ctx context.Context, d *demo.Demo, args []string) error) *cobra.Command {
		c.RunE = func(c *cobra.Command, args []string) error {
			d, err := open()
			if err != nil {
				return err
			}
			timeout := a.timeout
			if !c.Flags().Changed("timeout") {
				timeout = upTimeout
			}
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			return run(ctx, d, args)
		}
		return c
	}

	up := long(a.verb("up", "bring up three nodes, a LUN and a filesystem on this machine", nil),
		func(ctx context.Context, d *demo.Demo, _ []string) error { return d.Up(ctx) })
	up.Long = `Bring up a cluster on this machine, as an ordinary user: three nodes on loopback
addresses, one LUN and a gfs2 filesystem on it. Each real command is printed before
it runs. Run again it starts what was killed. If it fails, everything is undone.`
	kill := long(a.verb("kill NODE", "kill all processes of a node, as a power cut would", nil),
		func(ctx context.Context, d *demo.Demo, args []string) error { return d.Kill(ctx, args[0]) })
	kill.ValidArgsFunction = cobra.FixedCompletions([]cobra.Completion{"n1", "n2", "n3"}, cobra.ShellCompDirectiveNoFileComp)
	down := long(a.verb("down", "end the demo and remove all of it", nil),
		func(ctx context.Context, d *demo.Demo, _ []string) error { return d.Down(ctx) })

	status := a.statusCmd()
	status.Short = "show the status of the demo's cluster, from a node that lives"
	plain := status.RunE
	status.RunE = func(c *cobra.Command, args []string) error {
		d, err := open()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), a.timeout)
		socket, dead, err := d.Living(ctx)
		cancel()
		if err != nil {
			return err
		}
		if len(dead) > 0 {
			fmt.Fprintf(a.Err, "not running: %s\n", strings.Join(dead, ", "))
		}
		a.socket = socket
		return plain(c, args)
	}

	c := a.group(&cobra.Command{Use: "demo", Short: "a whole cluster on this machine, without root"}, up, status, kill, down)
	c.PersistentFlags().StringVar(&dir, "dir", "", "the demo's folder (default ${XDG_DATA_HOME:-~/.local/share}/blockhouse-demo)")
	return c
}

// program finds a program of ours beside this one, or in PATH; "" if there is
// none.
func program(self, name string) string {
	// A link (compat) leads to where the others lie.
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	if p := filepath.Join(filepath.Dir(self), name); executable(p) {
		return p
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	if p, err = filepath.Abs(p); err != nil {
		return ""
	}
	return p
}

func executable(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}
