package verbs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
)

func accountView() view[api.Account] {
	return view[api.Account]{
		kind: "Account",
		name: func(c api.Account) string { return c.Name },
		cols: []col[api.Account]{
			{head: "NAME", cell: func(c api.Account) string { return c.Name }},
			{head: "BOUND TO", cell: func(c api.Account) string {
				var s []string
				for _, b := range c.Bindings {
					t := b.Target
					if b.Direction == "outgoing" {
						t += " (outgoing)"
					}
					s = append(s, t)
				}
				return join(s)
			}},
		},
	}
}

// readSecret takes a secret from a file, from standard input ("-"), or from a
// terminal without showing it. It never comes from the command line, where every
// user of the host could read it.
func (a *app) readSecret(ctx context.Context, cmd, file string) (string, error) {
	if file != "" && file != "-" {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", usagef("", "%s: %v", cmd, err)
		}
		return oneLine(cmd, b)
	}
	if f, ok := a.In.(*os.File); ok && file == "" && isTerminal(a.In) {
		first, err := a.hidden(ctx, f, "secret: ")
		if err != nil {
			return "", err
		}
		again, err := a.hidden(ctx, f, "again: ")
		if err != nil {
			return "", err
		}
		if first != again {
			return "", usagef("", "%s: the two differ", cmd)
		}
		return first, nil
	}
	b, err := io.ReadAll(io.LimitReader(a.In, 4096))
	if err != nil {
		return "", fmt.Errorf("%s: read the secret: %w", cmd, err)
	}
	return oneLine(cmd, b)
}

func oneLine(cmd string, b []byte) (string, error) {
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if len(b) == 0 || bytes.ContainsRune(b, '\n') {
		return "", usagef("printf %s \"$SECRET\" | clusteradm "+cmd+" NAME", "%s: the secret must be one line that is not empty", cmd)
	}
	return string(b), nil
}

// hidden reads a line from a terminal whose echo is off meanwhile.
func (a *app) hidden(ctx context.Context, f *os.File, prompt string) (string, error) {
	old, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return "", fmt.Errorf("read a secret: %w", err)
	}
	quiet := *old
	quiet.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &quiet); err != nil {
		return "", fmt.Errorf("read a secret: %w", err)
	}
	defer func() {
		_ = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, old) // the terminal is gone
		fmt.Fprintln(a.Err)
	}()
	fmt.Fprint(a.Err, prompt)
	line, err := readLine(ctx, f)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil && line == "" {
		return "", usagef("", "no secret was typed")
	}
	return strings.TrimSuffix(line, "\r"), nil
}

func (a *app) accountCmd() *cobra.Command {
	var (
		file     string
		outgoing bool
		force    bool
	)
	accounts := complete(a, api.PathAccounts, func(c api.Account) string { return c.Name })
	warn := func(c api.Account) {
		if c.Warning != "" && a.format != "json" && a.format != "yaml" {
			fmt.Fprintf(a.Err, "warning: %s\n", c.Warning)
		}
	}
	create := a.verb("create NAME", "make a CHAP account", func(ctx context.Context, args []string) error {
		s, err := a.readSecret(ctx, "account create", file)
		if err != nil {
			return err
		}
		c, err := post[api.Account](ctx, a, api.PathAccounts, api.AccountCreate{Name: args[0], Secret: s, RequestID: uuid.NewString()})
		if err != nil {
			return err
		}
		warn(c)
		return printOne(a, c, accountView())
	})
	create.Long = `Make a CHAP account (RFC 7143 12.1.3). The secret is read from --secret-file, from
standard input, or typed twice on a terminal; it is never taken from the command
line and never shown again. 12 to 16 bytes are recommended.`
	create.Flags().StringVar(&file, "secret-file", "", "file with the secret; - is standard input")

	change := func(use, short string, remove bool) *cobra.Command {
		c := a.verb(use, short, func(ctx context.Context, args []string) error {
			c, err := post[api.Account](ctx, a, api.PathBindings, api.AccountBind{Account: args[0], Target: args[1], Outgoing: outgoing, Remove: remove})
			if err != nil {
				return err
			}
			warn(c)
			return printOne(a, c, accountView())
		})
		c.Flags().BoolVar(&outgoing, "outgoing", false, "with which the target proves itself (mutual CHAP)")
		c.ValidArgsFunction = func(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return accounts(c, args, word)
			}
			return complete(a, api.PathTargets, func(t api.Target) string { return t.IQN })(c, args[1:], word)
		}
		return c
	}
	bind := change("bind NAME TARGET", "let an account log in to a target", false)
	bind.Long = `Let an account log in to TARGET, or with --outgoing let the target prove itself
with it. With one incoming account CHAP is required. TARGET "discovery" is the
discovery of all targets.`
	unbind := change("unbind NAME TARGET", "take an account off a target", true)

	del := a.verb("delete NAME", "delete an account and its bindings", func(ctx context.Context, args []string) error {
		if err := a.confirm(ctx, "delete account "+args[0]); err != nil {
			return err
		}
		path := api.PathAccounts + "/" + url.PathEscape(args[0])
		if force {
			path += "?force=1"
		}
		d, err := a.delete(ctx, path)
		if err != nil {
			return err
		}
		return a.printDone(d, "account "+args[0]+" is deleted")
	})
	del.Flags().BoolVar(&force, "force", false, "although a target then asks nobody for a secret")
	del.ValidArgsFunction = accounts
	list := a.verb("list", "list the CHAP accounts", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Account]](ctx, a, api.PathAccounts)
		if err != nil {
			return err
		}
		return printList(a, l, accountView())
	})
	return a.group(&cobra.Command{Use: "account", Short: "CHAP accounts"}, create, bind, unbind, alias(del, "rm"), alias(list, "ls"))
}
