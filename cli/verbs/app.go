package verbs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
)

// DefaultSocket is where clusterd listens on a host that was installed from the
// package.
const DefaultSocket = "/run/blockhouse/clusterd.sock"

const defaultTimeout = 30 * time.Second

// EnvSocket names the variable that replaces DefaultSocket.
const EnvSocket = "BLOCKHOUSE_SOCKET"

// exitInterrupted is the shell's number for a program that ended by SIGINT.
const exitInterrupted = 130

// Face is a legacy command that the same binary serves under another name.
type Face struct {
	Name  string                                                                           `json:"name"` // argv[0]
	Short string                                                                           `json:"short"`
	Of    string                                                                           `json:"binary"` // the binary that a link of this name leads to
	Main  func(argv0 string, args []string, stdin io.Reader, stdout, stderr io.Writer) int `json:"-"`
}

// IO is where a command reads and writes, and what it learns from outside. The
// zero value of each function means the real one.
type IO struct {
	In       io.Reader
	Out, Err io.Writer
	Env      func(string) string
	Now      func() time.Time
	Faces    []Face
}

// app is one run of clusteradm.
type app struct {
	IO
	name string // argv[0], for messages

	socket, addr, certs string
	format              string
	noColor, yes        bool
	timeout             time.Duration

	cl *api.Client
}

// Run runs clusteradm with args (without argv[0]) and returns its exit status.
// It ends early, with 130, when ctx ends.
func Run(ctx context.Context, name string, args []string, o IO) int {
	a := newApp(name, o)
	root := a.root()
	root.SetArgs(args)
	defer a.close()
	return a.finish(ctx, root.ExecuteContext(ctx), args)
}

// finish turns the error of a command into its exit status and reports it.
func (a *app) finish(ctx context.Context, err error, args []string) int {
	if err == nil {
		return 0
	}
	var st exitStatus
	if errors.As(err, &st) {
		return int(st)
	}
	if ctx.Err() != nil {
		return exitInterrupted
	}
	if a.format == "" { // the flags were not understood; -o may still be among them
		a.format = scanFormat(args)
	}
	return a.report(err)
}

func newApp(name string, o IO) *app {
	if o.Env == nil {
		o.Env = os.Getenv
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &app{IO: o, name: name}
}

func (a *app) close() {
	if a.cl != nil {
		a.cl.Close()
	}
}

// exitStatus ends a command whose output is already complete.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// report writes err in the form that the user asked for and gives its exit
// status.
func (a *app) report(err error) int {
	e := api.AsError(err)
	if e.Code == "" {
		e.Code = api.CodeInternal
	}
	if a.format == "json" || a.format == "yaml" {
		if a.writeDoc(a.Err, api.ErrorBody{APIVersion: api.Version, Error: e}) == nil {
			return e.Code.Exit()
		}
	}
	c := a.colours(a.Err)
	fmt.Fprintf(a.Err, "%s %s\n", c.paint(bad, a.name+":"), strings.TrimSpace(e.Message))
	if e.Next != "" {
		fmt.Fprintf(a.Err, "next: %s\n", e.Next)
	}
	return e.Code.Exit()
}

// scanFormat finds -o json in arguments that cobra did not accept, so that a
// script that asked for JSON gets its usage errors as JSON too.
func scanFormat(args []string) string {
	for i, s := range args {
		var v string
		switch {
		case (s == "-o" || s == "--output") && i+1 < len(args):
			v = args[i+1]
		case strings.HasPrefix(s, "--output="):
			v = strings.TrimPrefix(s, "--output=")
		case strings.HasPrefix(s, "-o") && !strings.HasPrefix(s, "--"):
			v = strings.TrimPrefix(strings.TrimPrefix(s, "-o"), "=")
		case s == "--":
			return ""
		}
		if v == "json" || v == "yaml" {
			return v
		}
	}
	return ""
}

func usagef(next, format string, v ...any) error {
	return api.Errorf(api.CodeUsage, next, format, v...)
}

// root builds the tree.
func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "clusteradm",
		Short: "administer a Blockhouse cluster",
		Long: `clusteradm administers a Blockhouse cluster: shared block storage, its fencing
and its quorum. It talks to the clusterd of this host.

Start with "clusteradm demo up" (three nodes on this machine, no root) or
"clusteradm init NAME" (found a cluster on this host).`,
		SilenceErrors: true, SilenceUsage: true,
		// Sorted output is easier to scan than the order of AddCommand.
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usagef(c.CommandPath()+" --help", "%s: %v", what(c), err)
	})
	root.SetHelpCommand(&cobra.Command{Use: "help [COMMAND]", Short: "help about a command", RunE: func(c *cobra.Command, args []string) error {
		sub, rest, err := c.Root().Find(args)
		if err != nil || len(rest) > 0 {
			return usagef("clusteradm --help", "help: no command %q", strings.Join(args, " "))
		}
		sub.InitDefaultHelpFlag()
		return sub.Help()
	}})

	f := root.PersistentFlags()
	def := a.Env(EnvSocket)
	if def == "" {
		def = DefaultSocket
	}
	f.StringVar(&a.socket, "socket", def, "unix socket of clusterd (or $"+EnvSocket+")")
	f.StringVar(&a.addr, "addr", "", "HOST:PORT of a clusterd's API instead of the socket; needs --certs")
	f.StringVar(&a.certs, "certs", "", "directory with ca.crt, node.crt and node.key for --addr")
	f.StringVarP(&a.format, "output", "o", "table", "output: table, wide, json, yaml or name")
	f.BoolVar(&a.noColor, "no-color", false, "no colour (also: NO_COLOR)")
	f.DurationVar(&a.timeout, "timeout", defaultTimeout, "deadline of the command")
	f.BoolVarP(&a.yes, "yes", "y", false, "do not ask before a change that loses something")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))

	root.PersistentPreRunE = func(c *cobra.Command, _ []string) error { return a.checkFlags(c) }
	a.group(root)
	root.AddCommand(
		a.statusCmd(), a.initCmd(), a.tokenCmd(), a.joinCmd(), a.leaveCmd(), a.nodeCmd(), a.quorumCmd(),
		a.volumeCmd(), a.targetCmd(), a.lunCmd(), a.aclCmd(), a.portalCmd(), a.accountCmd(), a.sessionCmd(), a.reservationCmd(),
		a.fenceCmd(), a.fenceManualCmd(), a.eventsCmd(), a.demoCmd(),
		a.versionCmd(), a.completionCmd(), a.docsCmd(), a.compatCmd(),
	)
	return root
}

var formats = []string{"table", "wide", "json", "yaml", "name"}

func (a *app) checkFlags(c *cobra.Command) error {
	if !contains(formats, a.format) {
		bad := a.format
		a.format = "table"
		return usagef("", "unknown output format %q: use %s", bad, strings.Join(formats, ", "))
	}
	if a.timeout <= 0 {
		return usagef("", "--timeout %s: must be more than 0", a.timeout)
	}
	if (a.addr == "") != (a.certs == "") {
		return usagef("", "--addr and --certs go together: the API on TCP takes only clients with a certificate of the cluster")
	}
	if a.addr != "" && c.Flags().Changed("socket") {
		return usagef("", "--addr and --socket name two daemons: give one")
	}
	return nil
}

func contains(s []string, v string) bool {
	for _, x := range s {
		if x == v {
			return true
		}
	}
	return false
}

// group makes c a noun: alone it is a usage error, and an unknown verb gets a
// suggestion.
func (a *app) group(c *cobra.Command, verbs ...*cobra.Command) *cobra.Command {
	c.AddCommand(verbs...)
	c.Args = cobra.ArbitraryArgs
	c.SuggestionsMinimumDistance = 2
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			fmt.Fprintln(a.Err, strings.TrimRight(c.UsageString(), "\n"))
			return usagef(c.CommandPath()+" --help", "%s: missing command", what(c))
		}
		next := c.CommandPath() + " --help"
		if s := c.SuggestionsFor(args[0]); len(s) > 0 {
			next = c.CommandPath() + " " + s[0]
		}
		return usagef(next, "%s: unknown command %q", what(c), args[0])
	}
	return c
}

// what names a command in a message that already begins with the program.
func what(c *cobra.Command) string {
	return strings.TrimPrefix(c.CommandPath(), c.Root().Name()+" ")
}

// verb makes a command that takes exactly the named arguments.
func (a *app) verb(use, short string, run func(ctx context.Context, args []string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: argsOf(use),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), a.timeout)
			defer cancel()
			return run(ctx, args)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

// argsOf checks the number of arguments by the words in use after the verb.
func argsOf(use string) cobra.PositionalArgs {
	var need, may []string
	for _, w := range strings.Fields(use)[1:] {
		if strings.HasPrefix(w, "[") {
			may = append(may, w)
		} else {
			need = append(need, w)
		}
	}
	return func(c *cobra.Command, args []string) error {
		if len(args) < len(need) {
			return usagef(c.CommandPath()+" --help", "%s: missing %s", what(c), strings.Join(need[len(args):], " "))
		}
		if n := len(need) + len(may); len(args) > n {
			return usagef(c.CommandPath()+" --help", "%s: too many arguments: %q", what(c), args[n])
		}
		for i, s := range args {
			if s == "" && i < len(need) {
				return usagef(c.CommandPath()+" --help", "%s: %s is empty", what(c), need[i])
			}
		}
		return nil
	}
}

// client gives the API client that the flags ask for.
func (a *app) client() (*api.Client, error) {
	if a.cl != nil {
		return a.cl, nil
	}
	if a.addr == "" {
		a.cl = api.Dial(a.socket)
		return a.cl, nil
	}
	cfg, err := loadTLS(a.certs)
	if err != nil {
		return nil, err
	}
	a.cl = api.DialTLS(a.addr, cfg)
	return a.cl, nil
}

func get[T any](ctx context.Context, a *app, path string) (T, error) {
	c, err := a.client()
	if err != nil {
		var zero T
		return zero, err
	}
	return api.Get[T](ctx, c, path)
}

func post[T any](ctx context.Context, a *app, path string, in any) (T, error) {
	c, err := a.client()
	if err != nil {
		var zero T
		return zero, err
	}
	return api.Post[T](ctx, c, path, in)
}

func (a *app) delete(ctx context.Context, path string) (api.Done, error) {
	c, err := a.client()
	if err != nil {
		return api.Done{}, err
	}
	return api.Delete(ctx, c, path)
}

// confirm asks before something is lost. Without a terminal it refuses: a
// script must say --yes, and a pipe must not answer by accident.
func (a *app) confirm(ctx context.Context, what string) error {
	if a.yes {
		return nil
	}
	if !isTerminal(a.In) {
		return api.Errorf(api.CodeRefused, "the same command with --yes", "%s: not confirmed, and there is no terminal to ask on", what)
	}
	fmt.Fprintf(a.Err, "%s? [y/N] ", what)
	line, err := readLine(ctx, a.In)
	if err != nil && line == "" {
		fmt.Fprintln(a.Err)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if s := strings.ToLower(strings.TrimSpace(line)); s != "y" && s != "yes" {
		fmt.Fprintln(a.Err, "Aborted.")
		return exitStatus(1)
	}
	return nil
}

// readLine reads one line byte by byte, so that nothing that follows it is
// taken from a reader that others go on to use. It ends early when ctx ends:
// SIGINT cancels ctx and would otherwise not interrupt the read of a terminal.
func readLine(ctx context.Context, r io.Reader) (string, error) {
	var b strings.Builder
	var p [1]byte
	for b.Len() < 4096 {
		if f, ok := r.(*os.File); ok {
			if err := waitReadable(ctx, int(f.Fd())); err != nil {
				return "", err
			}
		}
		n, err := r.Read(p[:])
		if n == 1 {
			if p[0] == '\n' {
				return b.String(), nil
			}
			b.WriteByte(p[0])
		}
		if err != nil {
			return b.String(), err
		}
	}
	return b.String(), nil
}

func waitReadable(ctx context.Context, fd int) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 100)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return nil // readable, ended or in error: Read tells which
		}
	}
}
