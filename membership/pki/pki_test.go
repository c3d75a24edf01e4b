package pki

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	uuidA = "3f0e9c3a-7a51-4c1e-9a53-0c5d9b8e2f10"
	uuidB = "b1b1b1b1-7a51-4c1e-9a53-0c5d9b8e2f10"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func newCA(t *testing.T, cluster string) *CA {
	t.Helper()
	ca, err := NewCA(cluster, t0)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t *testing.T, ca *CA, role Role, name string) *Files {
	t.Helper()
	cert, key, err := ca.Issue(role, name, t0)
	if err != nil {
		t.Fatal(err)
	}
	caPEM, _, err := ca.Encode()
	if err != nil {
		t.Fatal(err)
	}
	f, err := NewFiles(cert, key, caPEM)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func chain(f *Files) []*x509.Certificate { return []*x509.Certificate{f.Cert.Leaf, f.CA} }

// Every refusal, by its reason and with the words an operator needs.
func TestVerify(t *testing.T) {
	t.Parallel()
	a, b, a2 := newCA(t, uuidA), newCA(t, uuidB), newCA(t, uuidA)
	me, n2, adm := issue(t, a, Node, "n1"), issue(t, a, Node, "n2"), issue(t, a, Admin, "root")
	other, forged := issue(t, b, Node, "n1"), issue(t, a2, Node, "n2")
	later := t0.Add(LeafLifetime + time.Second)
	for _, tc := range []struct {
		name  string
		chain []*x509.Certificate
		now   time.Time
		want  Want
		why   Reason
		text  []string
	}{
		{"good", chain(n2), t0, Want{Role: Node, Name: "n2"}, "", nil},
		{"any name", chain(n2), t0, Want{}, "", nil},
		{"admin", chain(adm), t0, Want{Role: Admin}, "", nil},
		{"none", nil, t0, Want{}, NoCertificate, []string{"no certificate"}},
		{"other cluster", chain(other), t0, Want{}, OtherCluster, []string{uuidA, uuidB, "n1"}},
		{"same uuid, other CA", chain(forged), t0, Want{}, Untrusted, []string{"n2", "not signed"}},
		{"expired", chain(n2), later, Want{}, Expired, []string{"n2", "expired 2031"}},
		{"not yet", chain(n2), t0.Add(-2 * time.Hour), Want{}, NotYetValid, []string{"n2", "clocks"}},
		{"wrong name", chain(n2), t0, Want{Name: "n3"}, WrongName, []string{"n2", "n3"}},
		{"wrong role", chain(adm), t0, Want{Role: Node}, WrongRole, []string{"admin root"}},
		{"the CA itself", []*x509.Certificate{me.CA}, t0, Want{}, WrongName, []string{"/ca"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			id, err := me.Verify(tc.chain, tc.now, tc.want)
			if tc.why == "" {
				if err != nil || id.Cluster != uuidA {
					t.Fatalf("%v, %v", id, err)
				}
				return
			}
			var r *RefusedError
			if !errors.As(err, &r) || r.Reason != tc.why {
				t.Fatalf("got %v, want reason %s", err, tc.why)
			}
			for _, s := range tc.text {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q lacks %q", err, s)
				}
			}
		})
	}
}

func TestSignCSR(t *testing.T) {
	t.Parallel()
	ca := newCA(t, uuidA)
	csr, key, err := NewCSR("asks-to-be-n9")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.SignCSR(csr, Identity{uuidA, Node, "n2"}, t0)
	if err != nil {
		t.Fatal(err)
	}
	caPEM, _, err := ca.Encode()
	if err != nil {
		t.Fatal(err)
	}
	f, err := NewFiles(cert, key, caPEM)
	if err != nil {
		t.Fatal(err)
	}
	if f.ID.String() != "blockhouse://"+uuidA+"/node/n2" || f.Cert.Leaf.Subject.CommonName != "n2" {
		t.Fatalf("signed %s, %s", f.ID, f.Cert.Leaf.Subject)
	}
	if len(f.Cert.Leaf.DNSNames)+len(f.Cert.Leaf.IPAddresses) != 0 {
		t.Fatal("the request chose names")
	}
	if _, err := ca.SignCSR(csr, Identity{uuidB, Node, "n2"}, t0); err == nil {
		t.Error("signed for another cluster")
	}
	if _, err := ca.SignCSR(csr, Identity{uuidA, Node, "n2/x"}, t0); err == nil {
		t.Error("signed a bad name")
	}
	if _, err := ca.SignCSR(bytes.Replace(csr, []byte("REQUEST-----\nMI"), []byte("REQUEST-----\nMJ"), 1), Identity{uuidA, Node, "n2"}, t0); err == nil {
		t.Error("signed a damaged request")
	}
	_, otherKey, err := NewCSR("x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewFiles(cert, otherKey, caPEM); err == nil {
		t.Error("took another key")
	}
}

func TestSaveLoad(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "pki")
	ca := newCA(t, uuidA)
	if err := ca.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := LoadCA(dir)
	if err != nil || got.Cluster != uuidA || Hash(got.Cert) != Hash(ca.Cert) {
		t.Fatalf("%+v, %v", got, err)
	}
	cert, key, err := ca.Issue(Node, "n1", t0)
	if err != nil {
		t.Fatal(err)
	}
	caPEM, _, _ := ca.Encode()
	if err := SaveFiles(dir, cert, key, caPEM); err != nil {
		t.Fatal(err)
	}
	f, err := LoadFiles(dir)
	if err != nil || f.ID.Name != "n1" {
		t.Fatalf("%+v, %v", f, err)
	}
	for name, mode := range map[string]os.FileMode{CAKeyFile: 0o600, KeyFile: 0o600, CertFile: 0o644, CAFile: 0o644} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v %v", name, fi.Mode(), err)
		}
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 4 {
		t.Fatalf("temporary files left: %v %v", names, err)
	}
	if err := os.Chmod(filepath.Join(dir, KeyFile), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadFiles(dir); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Fatalf("a key that others can read: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, CAKeyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCA(dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("no key: %v", err)
	}
}

func TestToken(t *testing.T) {
	t.Parallel()
	ca := newCA(t, uuidA)
	tok, err := NewToken(Hash(ca.Cert), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := tok.Text()
	if len(s) != 3+1+8+1+26+1+52 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || !strings.HasPrefix(s, "bh1-") {
		t.Fatalf("text %q of %d", s, len(s))
	}
	for _, in := range []string{s, " \t" + s + "\r\n", strings.ToUpper(s)} {
		got, err := ParseToken(in)
		if err != nil || got != tok {
			t.Fatalf("%q: %v", in, err)
		}
	}
	secret := strings.Split(s, "-")[2]
	for _, str := range []string{fmt.Sprint(tok), fmt.Sprintf("%v %+v %#v", tok, tok, tok)} {
		if strings.Contains(str, secret) {
			t.Fatalf("printed the secret: %s", str)
		}
	}
	for i := range s {
		in := s[:i]
		if _, err := ParseToken(in); err == nil {
			t.Fatalf("took the first %d characters", i)
		} else if i > 20 && strings.Contains(err.Error(), in[13:]) {
			t.Fatalf("the error shows the secret: %v", err)
		}
	}
	// The last character of each part carries spare bits.
	for _, end := range []int{38, len(s) - 1} {
		for c := byte('a'); c <= 'z'; c++ {
			in := []byte(s)
			if in[end] == c {
				continue
			}
			in[end] = c
			if got, err := ParseToken(string(in)); err == nil && got == tok {
				t.Fatalf("two texts for one token: %s", in)
			}
		}
	}
}

// handshake runs TLS over a pair of real sockets and gives both ends' errors.
func handshake(t *testing.T, srv, cli *tls.Config) (serr, cerr error) {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			done <- err
			return
		}
		defer c.Close()
		s := tls.Server(c, srv)
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if err := s.HandshakeContext(context.Background()); err != nil {
			done <- err
			return
		}
		_, err = s.Write([]byte("x"))
		done <- err
	}()
	raw, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
	c := tls.Client(raw, cli)
	if cerr = c.HandshakeContext(t.Context()); cerr == nil {
		// In TLS 1.3 the client hears of a refusal only when it reads.
		_, cerr = c.Read(make([]byte, 1))
	}
	_ = raw.Close()
	return <-done, cerr
}

func TestTLS(t *testing.T) {
	t.Parallel()
	a, b := newCA(t, uuidA), newCA(t, uuidB)
	n1, n2, foreign := issue(t, a, Node, "n1"), issue(t, a, Node, "n2"), issue(t, b, Node, "n9")
	now := func() time.Time { return t0 }
	tok, err := NewToken(Hash(a.Cert), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wrongTok, err := NewToken(Hash(b.Cert), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	reason := func(err error) Reason {
		var r *RefusedError
		if errors.As(err, &r) {
			return r.Reason
		}
		return ""
	}
	for _, tc := range []struct {
		name     string
		optional bool
		cli      *tls.Config
		srvWhy   Reason
		cliWhy   Reason
		ok       bool
	}{
		{"mutual", false, n2.ClientTLS(now, Want{Name: "n1"}), "", "", true},
		{"server is another", false, n2.ClientTLS(now, Want{Name: "n3"}), "", WrongName, false},
		{"client of another cluster", false, insecure(foreign), OtherCluster, "", false},
		{"server of another cluster", false, foreign.ClientTLS(now, Want{}), "", OtherCluster, false},
		{"no certificate", false, insecure(nil), NoCertificate, "", false},
		{"join", true, tok.JoinTLS(now, nil), "", "", true},
		{"join where a certificate is needed", false, tok.JoinTLS(now, nil), NoCertificate, "", false},
		{"join, CA is not the pinned one", true, wrongTok.JoinTLS(now, nil), "", Untrusted, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var noted []Reason
			srv := n1.StrictServerTLS(now, Want{Role: Node}, tc.optional, func(r *RefusedError) { noted = append(noted, r.Reason) })
			serr, cerr := handshake(t, srv, tc.cli)
			if tc.ok != (serr == nil && cerr == nil) {
				t.Fatalf("server %v, client %v", serr, cerr)
			}
			if reason(serr) != tc.srvWhy || reason(cerr) != tc.cliWhy {
				t.Fatalf("server %v, client %v; want %q, %q", serr, cerr, tc.srvWhy, tc.cliWhy)
			}
			if tc.srvWhy != "" && (len(noted) != 1 || noted[0] != tc.srvWhy) {
				t.Fatalf("noted %v", noted)
			}
		})
	}
	var pinned *x509.Certificate
	if serr, cerr := handshake(t, n1.ServerTLS(), tok.JoinTLS(now, func(c *x509.Certificate) { pinned = c })); serr != nil || cerr != nil || pinned == nil || Hash(pinned) != tok.CAHash {
		t.Fatalf("join: %v %v %v", serr, cerr, pinned)
	}
}

// insecure trusts every server, so that only the server judges.
func insecure(f *Files) *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true} //nolint:gosec // a test's bad client
	if f != nil {
		c.Certificates = []tls.Certificate{f.Cert}
	}
	return c
}

func FuzzParseToken(f *testing.F) {
	f.Add("bh1-aaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err != nil {
			return
		}
		if got := tok.Text(); got != strings.ToLower(strings.TrimSpace(s)) {
			t.Fatalf("%q became %q", s, got)
		}
	})
}
