package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/testnet"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// served is a cluster of one node, whole and with real processes, that serves on a segment of the lab.
type served struct {
	*cluster.Node
	t   *testing.T
	c   *cluster.Cluster
	dir string // of the stores
}

// serve starts it at the hub's address on br. It is patient: a guest that a busy machine lets wait for seconds keeps its
// session, and no unit attention of a lost one comes where none is expected.
func serve(t *testing.T, l *Lab, br *testnet.Bridge) *served {
	t.Helper()
	return serveAs(t, l, br, cluster.Profile("wan"), cluster.Config("[iscsi]\nnop_timeout = \"30s\""))
}

// serveAs is serve with the options of the cluster given; without any it is as it is shipped.
func serveAs(t *testing.T, l *Lab, br *testnet.Bridge, opts ...cluster.Option) *served {
	t.Helper()
	dir := filepath.Join(l.Artefacts, "stores")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := cluster.New(t, 1, append(opts, cluster.Within(l.Net.Hub(), br.IP()))...).Up()
	t.Cleanup(c.Nodes[0].API().Close)
	return &served{Node: c.Nodes[0], t: t, c: c, dir: dir}
}

// file makes an empty file of the size and returns its path.
func (s *served) file(name string, size int64) string {
	s.t.Helper()
	p := filepath.Join(s.dir, name)
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		s.t.Fatal(err)
	}
	return p
}

// adm runs lines of administration on the node, each a program of `clusteradm compat` or clusteradm itself with its arguments.
func (s *served) adm(lines ...string) string {
	s.t.Helper()
	var out strings.Builder
	for _, l := range lines {
		args := strings.Fields(l)
		if args[0] != "clusteradm" {
			args = append([]string{"clusteradm", "compat"}, args...)
		}
		ctx, cancel := context.WithTimeout(s.t.Context(), 60*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(cluster.Bin(s.t), "clusteradm"), args[1:]...)
		cmd.Env = append(os.Environ(), "BLOCKHOUSE_SOCKET="+filepath.Join(s.Run, "clusterd.sock"))
		b, err := cmd.CombinedOutput()
		if err != nil {
			s.t.Fatalf("%s: %v\n%s", l, err, b)
		}
		out.Write(b)
	}
	return out.String()
}

// within waits until the sessions of which the cluster knows are as ok says: workers report them once a second.
func (s *served) within(what string, ok func([]api.Session) bool) {
	s.t.Helper()
	s.c.Wait(what, 20*time.Second, func() (bool, string) {
		ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
		defer cancel()
		l, err := api.Get[api.List[api.Session]](ctx, s.API(), api.PathSessions)
		return err == nil && ok(l.Items), fmt.Sprintf("%+v, %v", l.Items, err)
	})
}
