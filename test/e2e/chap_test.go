package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// TestCHAP: an account that is bound to a target is asked for at every login, its
// secret is told to nobody, and it survives a restart of the worker.
func TestCHAP(t *testing.T) {
	c := cluster.New(t, 3).Up()
	n3 := c.Node("n3")
	l := lun(t, c, "n3", 1<<20)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	const secret = "twelve-bytes+"
	a := c.Nodes[1].API()
	if _, err := api.Post[api.Account](ctx, a, api.PathAccounts, api.AccountCreate{Name: "christina", Secret: secret}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Post[api.Account](ctx, a, api.PathBindings, api.AccountBind{Account: "christina", Target: l.Target}); err != nil {
		t.Fatal(err)
	}
	login := func(user, pass string) error {
		cfg := initiator.Config{InitiatorName: "iqn.2026-11.test:chap"}
		if user != "" {
			cfg.CHAP = &iscsi.CHAPCredentials{User: user, Secret: []byte(pass)}
		}
		s, err := initiator.Login(ctx, n3.IP+":3260", l.Target, cfg)
		if err != nil {
			return err
		}
		return s.Close()
	}
	check := func(when string) {
		t.Helper()
		if err := login("christina", secret); err != nil {
			t.Errorf("%s: the right secret: %v", when, err)
		}
		for _, bad := range [][2]string{{"", ""}, {"christina", "twelve-bytes-"}, {"clyde", secret}} {
			if login(bad[0], bad[1]) == nil {
				t.Errorf("%s: logged in as %q with %q", when, bad[0], bad[1])
			}
		}
	}
	check("first")
	if err := n3.Proc().Stop(); err != nil {
		t.Fatal(err)
	}
	n3.Start()
	c.Wait("n3 serves again", 30*time.Second, func() (bool, string) {
		s, err := c.Nodes[0].Status()
		if err != nil || len(s.Volumes) != 1 {
			return false, "no status"
		}
		return s.Volumes[0].Health == api.HealthDegraded, s.Volumes[0].Cause
	})
	check("after a restart")
	for _, n := range c.Nodes {
		if strings.Contains(n.Logs(), secret) {
			t.Errorf("the secret is in the log of %s", n.Name)
		}
	}
	acc, err := api.Get[api.List[api.Account]](ctx, a, api.PathAccounts)
	if err != nil || len(acc.Items) != 1 || strings.Contains(cluster.JSON(acc), secret) {
		t.Errorf("accounts: %s, %v", cluster.JSON(acc), err)
	}
}
