package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// eventsOf are the remembered events of a node of one kind.
func eventsOf(t *testing.T, n *cluster.Node, kind string) (out []api.Event) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := n.API().RecentEvents(ctx, func(e api.Event) error {
		if e.Kind == kind {
			out = append(out, e)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestObserved: a portal that another program holds is told with its name; what a
// session does is in the answers of another node, in /metrics and in the events.
func TestObserved(t *testing.T) {
	c := cluster.New(t, 3).Up()
	n1, n2, n3 := c.Node("n1"), c.Node("n2"), c.Node("n3")
	foreign, err := net.Listen("tcp", n2.IP+":3260")
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	l := lun(t, c, "n3", 1<<20)
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	holder := fmt.Sprintf("portal is in use by pid %d (%s)", os.Getpid(), strings.TrimSpace(string(comm)))
	c.Wait("status says who holds the portal", 30*time.Second, func() (bool, string) {
		s, err := n1.Status()
		if err != nil {
			return false, err.Error()
		}
		i := slices.IndexFunc(s.Problems, func(p api.Problem) bool { return strings.Contains(p.What, "n2") && strings.Contains(p.Cause, holder) })
		return i >= 0 && s.Problems[i].Severity == api.HealthFaulted, cluster.JSON(s.Problems)
	})
	c.Wait("an event says it, once", 10*time.Second, func() (bool, string) {
		es := eventsOf(t, n2, "portal.busy")
		return len(es) == 1 && strings.Contains(es[0].Text, holder), cluster.JSON(es)
	})
	if !strings.Contains(n2.Logs(), holder) {
		t.Error("the log does not say who holds the portal")
	}
	if nc, err := net.DialTimeout("tcp", n1.IP+":3260", time.Second); err != nil {
		t.Errorf("the other portals are closed too: %v", err)
	} else {
		_ = nc.Close()
	}
	_ = foreign.Close()
	c.Wait("the portal is opened when it is free", 30*time.Second, func() (bool, string) {
		es := eventsOf(t, n2, "target.ok")
		return len(es) == 1, cluster.JSON(es)
	})

	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	const name = "iqn.2026-11.test:observed"
	s, err := initiator.Login(ctx, n3.IP+":3260", l.Target, initiator.Config{InitiatorName: name})
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenLUN(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for i := range 10 {
		if err := d.WriteAt(ctx, buf, int64(i)*4096, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.ReadAt(ctx, buf, 0); err != nil {
		t.Fatal(err)
	}
	st, err := api.Get[api.Stats](ctx, n1.API(), api.PathStats) // n1 asks n3
	if err != nil || len(st.Nodes) != 3 {
		t.Fatalf("%s, %v", cluster.JSON(st), err)
	}
	ls := st.Nodes[2].LUNs
	if len(ls) != 1 || ls[0].Target != l.Target || ls[0].LUN != 1 || ls[0].Volume != l.Volume || ls[0].WriteBytes != 40960 || ls[0].Writes != 10 ||
		ls[0].ReadBytes < 4096 || ls[0].Latency["write"].Count() != 10 || ls[0].Latency["write"].Quantile(0.5) <= 0 || ls[0].InProgress != 0 {
		t.Errorf("%s", cluster.JSON(ls))
	}
	ss, err := api.Get[api.List[api.Session]](ctx, n2.API(), api.PathSessions)
	if err != nil || len(ss.Items) != 1 {
		t.Fatalf("%s, %v", cluster.JSON(ss), err)
	}
	if x := ss.Items[0]; x.Node != "n3" || x.Initiator != name || x.Local != n3.IP+":3260" || x.Connections != 1 || x.IO == nil || x.IO.WriteBytes != 40960 || x.Params["ImmediateData"] == "" {
		t.Errorf("%s", cluster.JSON(x))
	}
	_, m := local(t, n3, "/metrics")
	id := fmt.Sprintf(`lun="1",target="%s",volume="%s"`, l.Target, l.Volume)
	for _, want := range []string{
		"blockhouse_storage_up 1", "blockhouse_lun_written_bytes_total{" + id + "} 40960",
		fmt.Sprintf(`blockhouse_lun_latency_seconds_count{lun="1",op="write",target="%s",volume="%s"} 10`, l.Target, l.Volume),
		`blockhouse_session_written_bytes_total{initiator="` + name + `",`, `blockhouse_target_logins_total{type="normal"} 1`,
	} {
		if !strings.Contains(m, want) {
			t.Errorf("/metrics of n3 lacks %s", want)
		}
	}
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range regexp.MustCompile(`(?m)^# TYPE (blockhouse_\w+) (\w+)`).FindAllStringSubmatch(m, -1) {
		if !strings.Contains(string(doc), "| `"+f[1]+"` | "+f[2]+" |") {
			t.Errorf("docs/metrics.md does not have %s as a %s", f[1], f[2])
		}
	}

	// Events: the login, the logout, and who has no right.
	if _, err := initiator.Login(ctx, n3.IP+":3260", l.Target+"x", initiator.Config{InitiatorName: name}); err == nil {
		t.Error("logged in to a target that does not exist")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for kind, want := range map[string]string{"session.login": name, "session.logout": name, "login.refused": l.Target + "x"} {
		c.Wait("event "+kind, 10*time.Second, func() (bool, string) {
			es := eventsOf(t, n3, kind)
			return len(es) == 1 && strings.Contains(es[0].Text, want) && es[0].Data["node"] == "n3", cluster.JSON(es)
		})
	}
	if _, m = local(t, n3, "/metrics"); strings.Contains(m, name) {
		t.Error("a session that has ended is in /metrics")
	}

	// Who comes to n1 is sent to n3, where it is taken.
	to := map[string]string{api.RedirectAddress: n3.IP}
	if _, err := api.Post[api.Target](ctx, n2.API(), api.PathTargets+"/"+l.Target, api.TargetSet{Params: to}); err != nil {
		t.Fatal(err)
	}
	for _, at := range []*cluster.Node{n1, n3} {
		s, err := initiator.Login(ctx, at.IP+":3260", l.Target, initiator.Config{InitiatorName: name})
		if err != nil {
			t.Fatalf("at %s: %v", at.Name, err)
		}
		if p := s.Portal(); p.Host != n3.IP {
			t.Errorf("who came to %s is at %v", at.Name, p)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	to[api.RedirectAddress] = ""
	if _, err := api.Post[api.Target](ctx, n2.API(), api.PathTargets+"/"+l.Target, api.TargetSet{Params: to}); err != nil {
		t.Fatal(err)
	}
	back, err := initiator.Login(ctx, n1.IP+":3260", l.Target, initiator.Config{InitiatorName: name})
	if err != nil {
		t.Fatal(err)
	}
	if p := back.Portal(); p.Host != n1.IP {
		t.Errorf("without redirection it is at %v", p)
	}
	if err := back.Close(); err != nil {
		t.Error(err)
	}

	portals(ctx, t, c, l.Target)

	// A failed authentication is told with address and name; a flood of them is not.
	const secret = "twelve-bytes+"
	if _, err := api.Post[api.Account](ctx, n1.API(), api.PathAccounts, api.AccountCreate{Name: "christina", Secret: secret}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Post[api.Account](ctx, n1.API(), api.PathBindings, api.AccountBind{Account: "christina", Target: l.Target}); err != nil {
		t.Fatal(err)
	}
	for range 6 { // each answer is delayed more
		_, err := initiator.Login(ctx, n3.IP+":3260", l.Target, initiator.Config{InitiatorName: name, CHAP: &iscsi.CHAPCredentials{User: "clyde", Secret: []byte(secret)}})
		if err == nil {
			t.Fatal("logged in")
		}
		if strings.Contains(err.Error(), "deadline") {
			t.Fatal(err)
		}
	}
	c.Wait("the failures are told, some of them", 10*time.Second, func() (bool, string) {
		es := eventsOf(t, n3, "login.auth-failed")
		return len(es) == 5 && strings.Contains(es[0].Text, name) && strings.Contains(es[0].Text, "clyde") &&
			strings.HasPrefix(fmt.Sprint(es[0].Data["address"]), "127."), cluster.JSON(es)
	})
	// A control that was started again has what its worker still has.
	n3.KillControl()
	n3.Start()
	c.Wait("the events are still there", 30*time.Second, func() (bool, string) {
		es := eventsOf(t, n3, "session.login")
		return len(es) == 5, cluster.JSON(es) // two of them of portals
	})
}

// portals adds a portal to n3 by way of another node, uses it, and takes it away;
// one that is held keeps nothing else from being served.
func portals(ctx context.Context, t *testing.T, c *cluster.Cluster, iqn string) {
	t.Helper()
	n1, n2, n3 := c.Node("n1"), c.Node("n2"), c.Node("n3")
	second := n3.IP + ":3261"
	state := func(addr, from, want string) func() (bool, string) {
		return func() (bool, string) {
			l, err := api.Get[api.List[api.Portal]](ctx, n1.API(), api.PathPortals)
			if err != nil {
				return false, err.Error()
			}
			i := slices.IndexFunc(l.Items, func(p api.Portal) bool { return p.Node == "n3" && p.Address == addr })
			return i >= 0 && l.Items[i].From == from && l.Items[i].State == want || i < 0 && want == "", cluster.JSON(l.Items)
		}
	}
	c.Wait("the file's portal is listed", 10*time.Second, state(n3.IP+":3260", "file", "open"))
	foreign, err := net.Listen("tcp", second)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if p, err := api.Post[api.Portal](ctx, n2.API(), api.PathPortals, api.PortalAdd{Node: "n3", Address: second}); err != nil || p.Address != second || p.From != "cluster" {
		t.Fatalf("%+v, %v", p, err)
	}
	c.Wait("the portal is held, and listed so", 10*time.Second, state(second, "cluster", "failed"))
	if s, err := n1.Status(); err != nil || !slices.ContainsFunc(s.Problems, func(p api.Problem) bool {
		return strings.Contains(p.What, second) && strings.Contains(p.Cause, fmt.Sprintf("pid %d", os.Getpid())) && p.Severity == api.HealthDegraded
	}) {
		t.Errorf("%s, %v", cluster.JSON(s.Problems), err)
	}
	login := func(at string) *initiator.Session {
		t.Helper()
		s, err := initiator.Login(ctx, at, iqn, initiator.Config{InitiatorName: "iqn.2026-11.test:portals"})
		if err != nil {
			t.Fatalf("at %s: %v", at, err)
		}
		return s
	}
	if err := login(n3.IP + ":3260").Close(); err != nil { // the others are served meanwhile
		t.Error(err)
	}
	_ = foreign.Close()
	c.Wait("the portal is opened when it is free", 30*time.Second, state(second, "cluster", "open"))
	s := login(second)
	if p := s.Portal(); p.Port != 3261 {
		t.Errorf("%+v", p)
	}
	d, err := s.OpenLUN(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []api.PortalAdd{{Node: "n3", Address: second}, {Node: "n3", Address: n3.IP}, {Node: "n9", Address: second}, {Node: "n3", Address: "host:1"}} {
		if _, err := api.Post[api.Portal](ctx, n2.API(), api.PathPortals, bad); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
	if _, err := api.Delete(ctx, n2.API(), api.PathPortals+"/n3/"+second); err != nil {
		t.Fatal(err)
	}
	c.Wait("the portal is closed", 10*time.Second, func() (bool, string) {
		nc, err := net.DialTimeout("tcp", second, time.Second)
		if err == nil {
			_ = nc.Close()
		}
		return err != nil, "still open"
	})
	c.Wait("it is no longer listed", 10*time.Second, state(second, "", ""))
	if err := d.ReadAt(ctx, make([]byte, 4096), 0); err != nil { // as with tgtd
		t.Errorf("the session that came through it: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
