package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/pki"
	"github.com/blockhouse-san/blockhouse/membership/raftlog"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// TestRefusals: who does not belong is refused on the Raft port and on the API
// port, and the log of the refusing node says which of the reasons it was.
func TestRefusals(t *testing.T) {
	c := cluster.New(t, 3).Up()
	other := cluster.New(t, 1)
	other.Name = "other"
	o1 := other.Nodes[0]
	o1.Start()
	o1.Init()
	n1, n2 := c.Nodes[0], c.Nodes[1]

	ours, err := pki.LoadFiles(filepath.Join(n2.Dir, "data", "pki"))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := pki.LoadFiles(filepath.Join(o1.Dir, "data", "pki"))
	if err != nil {
		t.Fatal(err)
	}
	// n2 comes to be evicted and admitted again: incarnation 1 is an old one then.
	n2.Kill()
	c.Wait("n2 is lost", 60*time.Second, func() (bool, string) {
		s, err := n1.Status()
		if err != nil {
			return false, err.Error()
		}
		return s.Nodes[1].State == api.NodeLost, string(s.Nodes[1].State)
	})
	n2.Start()
	c.Wait("n2 is back in incarnation 2", 60*time.Second, func() (bool, string) {
		s, err := n1.Status()
		if err != nil {
			return false, err.Error()
		}
		return s.Nodes[1].State == api.NodeOnline && s.Nodes[1].Incarnation == 2, cluster.JSON(s.Nodes[1])
	})

	for _, x := range []struct {
		name    string
		raft    func(t *testing.T) string // what the refused one was told
		api     func(t *testing.T) string
		inLogs  []string
		answers string
	}{
		{"a node of a second cluster",
			// Its own check of our certificate would end the dial before ours of its.
			func(t *testing.T) string { return dialBare(t, &theirs.Cert, n1) },
			func(t *testing.T) string { return getAPI(t, &theirs.Cert, "1", n1) },
			[]string{"other-cluster"}, "cluster"},
		{"an old incarnation",
			func(t *testing.T) string { return dialRaft(t, ours, 1, n1) },
			func(t *testing.T) string { return getAPI(t, &ours.Cert, "1", n1) },
			[]string{"old-incarnation"}, "incarnation"},
		{"no certificate",
			func(t *testing.T) string { return dialBare(t, nil, n1) },
			func(t *testing.T) string { return getAPI(t, nil, "1", n1) },
			[]string{"no-certificate"}, "certificate"},
	} {
		t.Run(x.name, func(t *testing.T) {
			before := len(n1.Logs())
			for port, try := range map[string]func(*testing.T) string{"raft": x.raft, "api": x.api} {
				said := try(t)
				if !strings.Contains(said, x.answers) {
					t.Errorf("%s: was told %q, which does not name the %s", port, said, x.answers)
				}
			}
			log := n1.Logs()[before:]
			for _, line := range []string{"cluster stream refused", "refused an API request"} {
				ok := false
				for l := range strings.Lines(log) {
					if strings.Contains(l, line) {
						for _, want := range x.inLogs {
							ok = ok || strings.Contains(l, want)
						}
					}
				}
				if !ok {
					t.Errorf("the log has no %q with %v:\n%s", line, x.inLogs, tail(log, 2000))
				}
			}
			if !t.Failed() {
				t.Logf("PROOF refused on the Raft and the API port; the log says %v", x.inLogs)
			}
		})
	}

	// The same node in its present incarnation is heard.
	if said := getAPI(t, &ours.Cert, "2", n1); !strings.Contains(said, `"cluster": "demo"`) {
		t.Errorf("n2 in incarnation 2 was answered %s", tail(said, 300))
	}
	if said := dialRaft(t, ours, 2, n1); said != "" {
		t.Errorf("n2 in incarnation 2 was told %q", said)
	}
}

func tail(s string, n int) string {
	if len(s) > n {
		return s[len(s)-n:]
	}
	return s
}

// dialRaft opens a Raft stream with real keys and says which incarnation it is.
// It returns the refusal's text, "" if there was none.
func dialRaft(t *testing.T, f *pki.Files, inc uint64, to *cluster.Node) string {
	t.Helper()
	empty, err := machines.New(zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	mux, err := raftlog.NewMux(raftlog.MuxConfig{Files: f, Cluster: empty, BootID: "boot", Incarnation: func() uint64 { return inc }, Log: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer mux.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, conn, err := mux.Dial(ctx, to.IP+":7421", raftlog.ALPNRaft, "")
	if err != nil {
		return err.Error()
	}
	_ = conn.Close()
	return ""
}

// dialBare speaks TLS to the Raft port, with the certificate or none, and returns
// what it is told.
func dialBare(t *testing.T, cert *tls.Certificate, to *cluster.Node) string {
	t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{raftlog.ALPNRaft}, MinVersion: tls.VersionTLS13}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	c, err := tls.Dial("tcp", to.IP+":7421", cfg)
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	// Not even a hello: half a frame, as from a scanner.
	_, _ = c.Write(bytes.Repeat([]byte{0}, 64))
	b, err := io.ReadAll(c)
	if len(b) == 0 && err != nil {
		return err.Error()
	}
	return string(b)
}

func getAPI(t *testing.T, cert *tls.Certificate, inc string, to *cluster.Node) string {
	t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg}, Timeout: 10 * time.Second}
	defer h.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+to.IP+":7420"+api.PathStatus, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Blockhouse-Incarnation", inc)
	resp, err := h.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode >= 400 {
		var eb api.ErrorBody
		if err := json.Unmarshal(b, &eb); err != nil || eb.Error == nil || eb.Error.Code != api.CodeDenied {
			t.Errorf("refused with %s: %s", resp.Status, b)
		}
	}
	return string(b)
}
