package verbs

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

func (a *app) tokenView() view[api.Token] {
	return view[api.Token]{
		kind: "Token",
		name: func(t api.Token) string { return t.ID },
		cols: []col[api.Token]{
			{head: "ID", cell: func(t api.Token) string { return t.ID }},
			{head: "EXPIRES", cell: func(t api.Token) string { return when(t.Expires) }},
			{head: "IN", cell: func(t api.Token) string { return span(t.Expires.Sub(a.Now())) }},
			{head: "USES", right: true, cell: func(t api.Token) string { return strconv.Itoa(t.Uses) }},
		},
		more: func(w io.Writer, _ *app, t api.Token) {
			if t.Secret != "" {
				fmt.Fprintf(w, "token:   %s\n", t.Secret)
			}
			if t.Join != "" {
				fmt.Fprintf(w, "\nOn the new host:\n\n  %s\n", t.Join)
			}
		},
	}
}

func (a *app) tokenCmd() *cobra.Command {
	var (
		ttl   time.Duration
		uses  int
		quiet bool
	)
	create := a.verb("create", "make a join token", func(ctx context.Context, _ []string) error {
		if ttl <= 0 || uses < 1 {
			return usagef("", "token create: --ttl and --uses must be more than 0")
		}
		t, err := post[api.Token](ctx, a, api.PathTokens, api.TokenCreate{TTL: ttl, Uses: uses})
		if err != nil {
			return err
		}
		if quiet {
			fmt.Fprintln(a.Out, t.Secret)
			return nil
		}
		return printOne(a, t, a.tokenView())
	})
	create.Long = `Make a token with which a new host joins. The secret is shown once and never
again. It holds the fingerprint of the cluster's CA, so the new host knows whom it
talks to.`
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it may be used")
	create.Flags().IntVar(&uses, "uses", 1, "how many hosts may join with it")
	create.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the secret and nothing else")

	list := a.verb("list", "list the tokens that may still be used", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Token]](ctx, a, api.PathTokens)
		if err != nil {
			return err
		}
		return printList(a, l, a.tokenView())
	})
	revoke := a.verb("revoke ID", "make a token useless", func(ctx context.Context, args []string) error {
		d, err := a.delete(ctx, api.PathTokens+"/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		return a.printDone(d, "token "+args[0]+" is revoked")
	})
	revoke.ValidArgsFunction = complete(a, api.PathTokens, func(t api.Token) string { return t.ID })
	return a.group(&cobra.Command{Use: "token", Short: "join tokens"}, create, alias(list, "ls"), revoke)
}
