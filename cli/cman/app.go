// Package cman holds the commands of cman, fenced, groupd and rgmanager under
// their own names: cman_tool, fence_tool, fence_node, group_tool, clustat and
// ccs_config_validate. They ask clusterd through package api and print what the
// originals print, to the column, with their exit statuses, so that scripts and
// runbooks of twenty years go on working (facts/cluster.md §1.1).
//
// What the original changed and this cluster decides otherwise (votes, expected
// votes, killing a member) is refused with the command that does it here; nothing
// is silently ignored.
//
// cmd and cli import it; it imports api, config/clusterconf and cli/verbs (for the
// socket's name).
package cman

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/verbs"
)

// App is everything outside that the commands touch.
type App struct {
	Out, Err io.Writer
	Env      func(string) string
	Now      func() time.Time
	Zone     *time.Location
	Columns  int           // of the terminal; 0: no terminal
	Poll     time.Duration // of waiting commands

	name string
	ctx  context.Context
	cl   *api.Client
}

// Face is a name that a link to our binary may have.
type Face struct {
	Name, Short string
	run         func(a *App, args []string) int
}

var faces []Face

func init() {
	faces = []Face{
		{"cman_tool", "cman's: status, nodes, leave, wait and more", (*App).cmanTool},
		{"fence_tool", "fenced's: the fence domain", (*App).fenceTool},
		{"fence_node", "fenced's: fence one node", (*App).fenceNode},
		{"group_tool", "groupd's: all groups", (*App).groupTool},
		{"clustat", "rgmanager's: members and services", (*App).clustat},
		{"ccs_config_validate", "check a cluster.conf", (*App).ccsConfigValidate},
	}
}

// Faces lists the names that Main knows.
func Faces() []Face { return slices.Clone(faces) }

// Main runs the command that argv0 names and returns its exit status.
func Main(argv0 string, args []string, _ io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	a := &App{Out: stdout, Err: stderr, Env: os.Getenv, Now: time.Now, Zone: time.Local, Columns: columns(stdout), Poll: 200 * time.Millisecond}
	return a.Run(ctx, argv0, args)
}

// Run is Main on the streams of a.
func (a *App) Run(ctx context.Context, argv0 string, args []string) int {
	a.ctx, a.name = ctx, filepath.Base(argv0)
	defer func() {
		if a.cl != nil {
			a.cl.Close()
		}
	}()
	for _, f := range faces {
		if f.Name == a.name {
			return f.run(a, args)
		}
	}
	fmt.Fprintf(a.Err, "%s: not a name of this program\n", a.name)
	return 2
}

func columns(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return int(ws.Col)
}

// die prints as the originals do and gives their exit status.
func (a *App) die(format string, v ...any) int {
	fmt.Fprintf(a.Err, a.name+": "+format+"\n", v...)
	return 1
}

// refuse is die with what to run instead.
func (a *App) refuse(next, format string, v ...any) int {
	a.die(format, v...)
	if next != "" {
		fmt.Fprintf(a.Err, "next: %s\n", next)
	}
	return 1
}

// requestTimeout bounds each request: a command that hangs tells nobody anything
// (facts/cluster.md §6 row 15).
const requestTimeout = 30 * time.Second

func (a *App) client() *api.Client {
	if a.cl == nil {
		s := a.Env(verbs.EnvSocket)
		if s == "" {
			s = verbs.DefaultSocket
		}
		a.cl = api.Dial(s)
	}
	return a.cl
}

func get[T any](a *App, path string) (T, error) {
	ctx, cancel := context.WithTimeout(a.ctx, requestTimeout)
	defer cancel()
	return api.Get[T](ctx, a.client(), path)
}

// hdrLocal makes a node answer a read from its own copy: between nodes it marks a
// request that must not be passed on again.
const hdrLocal = "X-Blockhouse-Forwarded"

// cluster is a status with the name of the host's own node: Status.Node is who
// answered, which is the leader.
type cluster struct {
	api.Status
	Self string
}

func (a *App) cluster() (cluster, error) {
	s, err := get[api.Status](a, api.PathStatus)
	if err != nil {
		return cluster{}, err
	}
	c := cluster{s, s.Node}
	if s.Health == api.HealthUninit {
		return c, nil
	}
	ctx, cancel := context.WithTimeout(a.ctx, requestTimeout)
	defer cancel()
	sock := a.Env(verbs.EnvSocket)
	if sock == "" {
		sock = verbs.DefaultSocket
	}
	own := api.Dial(sock)
	defer own.Close()
	own.SetHeader(hdrLocal, a.name)
	l, err := api.Get[api.Status](ctx, own, api.PathStatus)
	if err != nil {
		return cluster{}, err
	}
	c.Self = l.Node
	slices.SortFunc(c.Nodes, func(x, y api.Node) int { return x.Index - y.Index })
	return c, nil
}

// self is the host's own node.
func (c cluster) self() api.Node {
	for _, n := range c.Nodes {
		if n.Name == c.Self {
			return n
		}
	}
	return api.Node{Name: c.Self}
}

func (c cluster) index(node string) int {
	for _, n := range c.Nodes {
		if n.Name == node {
			return n.Index
		}
	}
	return 0
}

// member tells whether a node counts as a member. Without a quorum nobody may say;
// then a node is sure only of itself, as cman on a minority is.
func (c cluster) member(n api.Node) bool {
	switch n.State {
	case api.NodeOnline, api.NodeSuspect, api.NodeLeaving:
		return true
	case api.NodeUnknown:
		return n.Name == c.Self
	}
	return false
}

func (c cluster) votes(n api.Node) int {
	if n.Vote == "leader" || n.Vote == "voter" {
		return 1
	}
	return 0
}

// connect is the failure to reach clusterd in cman's words.
func (a *App) connect(err error) int {
	e := api.AsError(err)
	switch e.Code {
	case api.CodeDenied:
		return a.refuse(e.Next, "Cannot open connection to cman, permission denied.")
	case api.CodeUnreachable:
		return a.refuse(e.Next, "Cannot open connection to cman, is it running ?")
	}
	return a.refuse(e.Next, "%s", e.Message)
}

// hosts are the addresses of a node, without ports, each once.
func hosts(n api.Node) []string {
	var out []string
	for _, s := range append([]string{n.Raft, n.API}, n.Portals...) {
		h := s
		if i := strings.LastIndexByte(s, ':'); i >= 0 {
			h = strings.Trim(s[:i], "[]")
		}
		if h != "" && !slices.Contains(out, h) {
			out = append(out, h)
		}
	}
	return out
}

// opt is an option as it stood on the command line; operands have the letter 0.
type opt struct {
	letter byte
	arg    string
}

// getopt reads args in order with the rules of getopt(3): "b:" takes an argument,
// "b::" only an attached one, letters combine, operands may stand between.
func getopt(name, spec string, args []string) ([]opt, error) {
	var out []opt
	for i := 0; i < len(args); i++ {
		s := args[i]
		switch {
		case s == "--":
			for _, o := range args[i+1:] {
				out = append(out, opt{arg: o})
			}
			return out, nil
		case len(s) < 2 || s[0] != '-':
			out = append(out, opt{arg: s})
			continue
		}
		for j := 1; j < len(s); j++ {
			c := s[j]
			k := strings.IndexByte(spec, c)
			if k < 0 || c == ':' {
				return out, fmt.Errorf("%s: invalid option -- '%c'", name, c)
			}
			colons := len(spec[k+1:]) - len(strings.TrimLeft(spec[k+1:], ":"))
			if colons == 0 {
				out = append(out, opt{letter: c})
				continue
			}
			v := s[j+1:]
			if v == "" && colons == 1 {
				if i++; i >= len(args) {
					return out, fmt.Errorf("%s: option requires an argument -- '%c'", name, c)
				}
				v = args[i]
			}
			out = append(out, opt{c, v})
			break
		}
	}
	return out, nil
}

// usage reports a command line that cannot be read.
func (a *App) usage(err error) int {
	fmt.Fprintln(a.Err, err)
	fmt.Fprintln(a.Err, "Please use '-h' for usage.")
	return 1
}

// clean keeps control characters of foreign names from the terminal.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
