package raftlog

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/pki"
)

// known makes a state of cluster uuidA with the nodes n1 (incarnation 1), n2
// (incarnation 3) and n3, which was removed in incarnation 1.
func known(t *testing.T) *machines.Cluster {
	t.Helper()
	c, err := machines.New(zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	nn := func(name string) members.NewNode {
		return members.NewNode{Name: name, BootID: "boot-" + name, Format: 1, Addresses: members.Addresses{Raft: "127.0.0.1:1"}}
	}
	sum := strings.Repeat("0", 64)
	cmds := []fsm.Command{
		members.Bootstrap{Cluster: "c1", UUID: uuidA, Node: nn("n1")},
		members.TokenCreate{Now: now, ID: "t", SHA256: sum, Expires: now.Add(time.Hour), Uses: -1},
		members.AddNode{Request: "a2", Now: now, Token: "t", Proof: sum, Node: nn("n2")},
		members.AddNode{Request: "a3", Now: now, Token: "t", Proof: sum, Node: nn("n3")},
		members.Admit{Now: now, Node: "n2", From: 0, BootID: "boot-n2"},
		members.Admit{Now: now, Node: "n3", From: 0, BootID: "boot-n3"},
		members.Leave{Node: "n3", Incarnation: 1}, members.Leave{Node: "n3", Incarnation: 1, Done: true}, members.Remove{Node: "n3"},
	}
	for inc := uint64(1); inc < 3; inc++ {
		cmds = append(cmds, members.Leave{Node: "n2", Incarnation: inc}, members.Leave{Node: "n2", Incarnation: inc, Done: true},
			members.Admit{Now: now, Node: "n2", From: inc, BootID: "boot-n2"})
	}
	for i, cmd := range cmds {
		e, err := fsm.Encode(cmd)
		if err != nil {
			t.Fatal(err)
		}
		if r := c.ApplyEntry(uint64(i+1), e); r.Err != nil {
			t.Fatalf("%T: %v", cmd, r.Err)
		}
	}
	return c
}

type server struct {
	*Mux
	logs *observer.ObservedLogs
	reg  *prometheus.Registry
}

func serve(t *testing.T, f *pki.Files, c *machines.Cluster) server {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	reg := prometheus.NewRegistry()
	m, err := NewMux(MuxConfig{Files: f, Cluster: c, BootID: "boot-" + f.ID.Name, Log: zap.New(core), Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	m.Handle(ALPNRaft, func(_ context.Context, p Peer, conn net.Conn) {
		_, _ = io.WriteString(conn, "hello "+p.Node)
		_, _ = io.Copy(io.Discard, conn)
	})
	if err := m.Listen("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	return server{m, logs, reg}
}

func (s server) count(t *testing.T, metric string, labels map[string]string) float64 {
	t.Helper()
	fams, err := s.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range fams {
		if f.GetName() != metric {
			continue
		}
	next:
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if want, ok := labels[l.GetName()]; ok && want != l.GetValue() {
					continue next
				}
			}
			sum += m.GetCounter().GetValue()
		}
	}
	return sum
}

// rawClient speaks to the port without our dialler, so that it can lie.
func rawClient(t *testing.T, addr string, f *pki.Files, alpn string, send []byte) (Hello, *RefusedError) {
	t.Helper()
	d := &tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{alpn}}} //nolint:gosec // a test's bad client
	if f != nil {
		d.Config.Certificates = []tls.Certificate{f.Cert}
	}
	c, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(send); err != nil {
		t.Fatal(err)
	}
	h, rerr := readAnswer(c)
	if rerr != nil {
		// After a refusal the stream is closed.
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("the stream stays open after a refusal")
		}
	}
	return h, rerr
}

// Issue 2, "Shows": a node of a second cluster, an old incarnation, no
// certificate and more are refused on real sockets; the peer is told why, the
// log says which, the counter counts it.
func TestRefusals(t *testing.T) {
	t.Parallel()
	now := time.Now()
	a, b, fake := newCA(t, uuidA), newCA(t, uuidB), newCA(t, uuidA)
	n2 := issue(t, a, pki.Node, "n2", now)
	hello := func(change func(*Hello)) []byte {
		h := Hello{Cluster: uuidA, Node: "n2", BootID: "boot-n2", Incarnation: 3, Index: 1}
		if change != nil {
			change(&h)
		}
		return encodeHello(h)
	}
	for _, tc := range []struct {
		name  string
		files *pki.Files
		alpn  string
		send  []byte
		why   Reason
		text  []string // in the answer and in the log
	}{
		{"accepted", n2, ALPNRaft, hello(nil), "", nil},
		{"newer incarnation than known", n2, ALPNRaft, hello(func(h *Hello) { h.Incarnation = 4 }), "", nil},
		{"no certificate", nil, ALPNRaft, hello(nil), "no-certificate", []string{"no certificate"}},
		{"certificate of a second cluster", issue(t, b, pki.Node, "n2", now), ALPNRaft, hello(nil), "other-cluster", []string{uuidA, uuidB}},
		{"certificate of a CA that claims to be ours", issue(t, fake, pki.Node, "n2", now), ALPNRaft, hello(nil), "untrusted", []string{"not signed by the CA"}},
		{"expired certificate", issue(t, a, pki.Node, "n2", now.Add(-2*pki.LeafLifetime)), ALPNRaft, hello(nil), "expired", []string{"n2 expired"}},
		{"administrator's certificate", issue(t, a, pki.Admin, "n2", now), ALPNRaft, hello(nil), "wrong-role", []string{"admin n2"}},
		{"hello of another cluster", n2, ALPNRaft, hello(func(h *Hello) { h.Cluster = uuidB }), "other-cluster", []string{uuidA, uuidB}},
		{"hello of another node", n2, ALPNRaft, hello(func(h *Hello) { h.Node = "n1" }), "wrong-name", []string{"node n1", "says n2"}},
		{"old incarnation", n2, ALPNRaft, hello(func(h *Hello) { h.Incarnation = 2 }), "old-incarnation", []string{"incarnation 2, 3 was admitted"}},
		{"old incarnation that claims to know more", n2, ALPNRaft, hello(func(h *Hello) { h.Incarnation = 2; h.Index = 1 << 40 }), "old-incarnation", []string{"incarnation 2"}},
		{"unknown node", issue(t, a, pki.Node, "n9", now), ALPNRaft, hello(func(h *Hello) { h.Node = "n9" }), "unknown-node", []string{"n9 is no member"}},
		{"removed node", issue(t, a, pki.Node, "n3", now), ALPNRaft, hello(func(h *Hello) { h.Node, h.Incarnation, h.Index = "n3", 1, 1<<40 }), "removed-node", []string{"n3 was removed"}},
		{"node we have not heard of yet", issue(t, a, pki.Node, "n9", now), ALPNRaft, hello(func(h *Hello) { h.Node, h.Index = "n9", 1<<40 }), "", nil},
		{"protocol nobody serves", n2, ALPNLease, hello(nil), "not-served", []string{ALPNLease}},
		{"garbage", n2, ALPNRaft, bytes.Repeat([]byte("x"), 64), "bad-frame", []string{"handshake starts with"}},
		{"future version", n2, ALPNRaft, append([]byte("BHHS\x00\x07"), hello(nil)[6:]...), "bad-version", []string{"version 7"}},
		{"short body", n2, ALPNRaft, []byte("BHHS\x00\x01\x00\x02\xff\xff"), "bad-frame", []string{"ends early"}},
		{"huge body", n2, ALPNRaft, []byte("BHHS\x00\x01\xff\xff"), "bad-frame", []string{"limit"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, issue(t, a, pki.Node, "n1", now), known(t))
			h, rerr := rawClient(t, s.Addr().String(), tc.files, tc.alpn, tc.send)
			if tc.why == "" {
				if rerr != nil || h.Node != "n1" || h.Cluster != uuidA || h.BootID != "boot-n1" || h.Incarnation != 1 || h.Index == 0 {
					t.Fatalf("%+v, %v", h, rerr)
				}
				if n := s.count(t, "blockhouse_stream_accepted_total", nil); n != 1 {
					t.Errorf("accepted counted %v", n)
				}
				return
			}
			if rerr == nil || rerr.Reason != tc.why || !rerr.Remote {
				t.Fatalf("answer %v, want %s", rerr, tc.why)
			}
			refusals := s.logs.FilterMessage("cluster stream refused").All()
			if len(refusals) != 1 {
				t.Fatalf("log lines: %v", s.logs.All())
			}
			f := refusals[0].ContextMap()
			if f["reason"] != string(tc.why) || refusals[0].Level != zapcore.WarnLevel {
				t.Errorf("log: %v", f)
			}
			for _, want := range tc.text {
				if why, ok := f["why"].(string); !ok || !strings.Contains(why, want) {
					t.Errorf("log %q lacks %q", f["why"], want)
				}
				if !strings.Contains(rerr.Text, want) {
					t.Errorf("answer %q lacks %q", rerr.Text, want)
				}
			}
			if n := s.count(t, "blockhouse_stream_refused_total", map[string]string{"reason": string(tc.why), "protocol": tc.alpn, "by": "here"}); n != 1 {
				t.Errorf("refusal counted %v", n)
			}
			if n := s.count(t, "blockhouse_stream_accepted_total", nil); n != 0 {
				t.Errorf("accepted counted %v", n)
			}
		})
	}
}

// The same through our own dialler, which must also refuse by itself.
func TestDial(t *testing.T) {
	t.Parallel()
	now := time.Now()
	a, b := newCA(t, uuidA), newCA(t, uuidB)
	s := serve(t, issue(t, a, pki.Node, "n1", now), known(t))
	addr := s.Addr().String()
	client := func(f *pki.Files, inc uint64) server {
		core, logs := observer.New(zapcore.InfoLevel)
		reg := prometheus.NewRegistry()
		m, err := NewMux(MuxConfig{Files: f, Cluster: known(t), BootID: "b", Log: zap.New(core), Registerer: reg, Incarnation: func() uint64 { return inc }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Close() })
		return server{m, logs, reg}
	}
	n2 := issue(t, a, pki.Node, "n2", now)

	p, conn, err := client(n2, 3).Dial(within(t), addr, ALPNRaft, "n1")
	if err != nil || p.Node != "n1" || p.Incarnation != 1 || p.ALPN != ALPNRaft {
		t.Fatalf("%+v, %v", p, err)
	}
	buf := make([]byte, 8)
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "hello n2" {
		t.Fatalf("%q %v", buf, err)
	}
	_ = conn.Close()

	for _, tc := range []struct {
		name   string
		cli    server
		expect string
		why    Reason
		by     string
	}{
		{"another node answers", client(n2, 3), "n7", "wrong-name", "here"},
		{"server of another cluster", client(issue(t, b, pki.Node, "n2", now), 3), "n1", "other-cluster", "here"},
		{"our incarnation is old", client(n2, 1), "n1", "old-incarnation", "there"},
	} {
		_, _, err := tc.cli.Dial(within(t), addr, ALPNRaft, tc.expect)
		var r *RefusedError
		if !errors.As(err, &r) || r.Reason != tc.why || r.Remote != (tc.by == "there") {
			t.Errorf("%s: %v", tc.name, err)
		}
		if n := tc.cli.count(t, "blockhouse_stream_refused_total", map[string]string{"reason": string(tc.why), "by": tc.by}); n != 1 {
			t.Errorf("%s: counted %v", tc.name, n)
		}
		if l := tc.cli.logs.FilterMessage("cluster stream refused").All(); len(l) != 1 || l[0].ContextMap()["by"] != tc.by {
			t.Errorf("%s: log %v", tc.name, l)
		}
	}

	// A peer that accepts and stays silent costs a bounded time.
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := client(n2, 3).Dial(ctx, ln.Addr().String(), ALPNRaft, "n1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("silent peer: %v", err)
	}
}

// Close ends handlers that sit in a read, silent handshakes, and new streams.
func TestMuxClose(t *testing.T) {
	t.Parallel()
	now := time.Now()
	a := newCA(t, uuidA)
	s := serve(t, issue(t, a, pki.Node, "n1", now), known(t))
	cli := serve(t, issue(t, a, pki.Node, "n2", now), known(t))
	_, conn, err := cli.Dial(within(t), s.Addr().String(), ALPNRaft, "n1")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	silent, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	done := make(chan error, 1)
	go func() { done <- s.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("close hangs")
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("the stream outlived the mux")
	}
	if _, _, err := cli.Dial(within(t), s.Addr().String(), ALPNRaft, "n1"); err == nil {
		t.Fatal("a closed mux answers")
	}
}

func TestHelloRoundTrip(t *testing.T) {
	t.Parallel()
	h := Hello{Cluster: uuidA, Node: "n1", BootID: "b", Incarnation: 1 << 60, Index: 42}
	got, rerr := readHello(bytes.NewReader(encodeHello(h)))
	if rerr != nil || got != h {
		t.Fatalf("%+v %v", got, rerr)
	}
	// A longer body of a later minor change is read as far as it is known.
	b := encodeHello(h)
	b = append(b, "more"...)
	b[7] += 4
	if got, rerr = readHello(bytes.NewReader(b)); rerr != nil || got != h {
		t.Fatalf("%+v %v", got, rerr)
	}
	for _, r := range codes[1:] {
		_, rerr := readAnswer(bytes.NewReader(encodeAnswer(r, "why", Hello{})))
		if rerr == nil || rerr.Reason != r || rerr.Text != "why" || !rerr.Remote {
			t.Errorf("%s came back as %v", r, rerr)
		}
	}
	if _, rerr := readAnswer(bytes.NewReader([]byte("BHHA\x00\x01\x00\x04\xfa\x00\x01x"))); rerr == nil || rerr.Reason != "code-250" || rerr.Text != "x" {
		t.Errorf("a reason of a newer peer: %v", rerr)
	}
}

func FuzzHello(f *testing.F) {
	f.Add(encodeHello(Hello{Cluster: uuidA, Node: "n1", BootID: "b", Incarnation: 1, Index: 2}))
	f.Add(encodeAnswer("", "", Hello{Cluster: uuidA, Node: "n1"}))
	f.Add(encodeAnswer(OldIncarnation, "old", Hello{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, rerr := readHello(bytes.NewReader(b)); rerr == nil {
			if back, rerr := readHello(bytes.NewReader(encodeHello(h))); rerr != nil || back != h {
				t.Fatalf("%+v became %+v, %v", h, back, rerr)
			}
		}
		_, _ = readAnswer(bytes.NewReader(b))
	})
}
