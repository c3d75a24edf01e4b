package verbs

import (
	"context"
	"io"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) joinCmd() *cobra.Command {
	var file string
	c := a.verb("join TOKEN@HOST:PORT", "make this host a member of a cluster", func(ctx context.Context, args []string) error {
		tok, addr, err := splitJoin(args[0])
		if err != nil {
			return err
		}
		switch {
		case file != "" && tok != "":
			return usagef("", "join: the token is given twice: write HOST:PORT alone with --token-file")
		case file != "":
			if tok, err = a.readToken(file); err != nil {
				return err
			}
		case tok == "":
			return usagef("clusteradm token create", "join: no token in %q: write TOKEN@HOST:PORT", args[0])
		}
		d, err := post[api.Done](ctx, a, api.PathJoin, api.Join{Token: tok, Address: addr})
		if err != nil {
			return err
		}
		return a.printDone(d, "this host is a member; see clusteradm status")
	})
	c.Long = `Make this host a member of a cluster. "clusteradm token create" on any member
prints the whole command. HOST:PORT is the API of any member.

With --token-file the token is read from a file ("-" is stdin), so that it is
seen by nobody in the list of processes.`
	c.Flags().StringVar(&file, "token-file", "", "read the token from FILE, \"-\" is stdin")
	return c
}

// splitJoin takes TOKEN@HOST:PORT apart. A token has no "@".
func splitJoin(s string) (token, addr string, err error) {
	token, addr, ok := strings.Cut(s, "@")
	if !ok {
		token, addr = "", s
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" || port == "" {
		return "", "", usagef("clusteradm join --help", "join: %q is not HOST:PORT", addr)
	}
	return token, addr, nil
}

func (a *app) readToken(file string) (string, error) {
	r := a.In
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", usagef("", "join: read the token: %v", err)
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, 64<<10))
	if err != nil {
		return "", usagef("", "join: read the token: %v", err)
	}
	tok := strings.TrimSpace(string(b))
	if tok == "" {
		return "", usagef("clusteradm token create", "join: no token in %s", file)
	}
	return tok, nil
}
