package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Reason says why a peer's certificate was refused. The strings are metric
// label values and stay.
type Reason string

// The reasons.
const (
	NoCertificate Reason = "no-certificate"
	OtherCluster  Reason = "other-cluster"
	Untrusted     Reason = "untrusted" // right cluster by name, not signed by its CA
	Expired       Reason = "expired"
	NotYetValid   Reason = "not-yet-valid"
	WrongName     Reason = "wrong-name" // another node than expected, or no blockhouse URI
	WrongRole     Reason = "wrong-role" // an administrator where a node is needed
)

// RefusedError is a peer's certificate that was refused.
type RefusedError struct {
	Reason Reason
	Text   string
	Next   string
}

// Denied tells layers that do not know this package that it is a refusal.
func (e *RefusedError) Denied() bool { return true }

func (e *RefusedError) Error() string {
	s := "peer refused: " + e.Text
	if e.Next != "" {
		s += "; " + e.Next
	}
	return s
}

// Files is what a node presents and trusts.
type Files struct {
	ID   Identity
	Cert tls.Certificate // leaf and CA
	CA   *x509.Certificate
}

// NewFiles puts a signed certificate, its key and the CA together, all PEM, and
// checks that they fit.
func NewFiles(certPEM, keyPEM, caPEM []byte) (*Files, error) {
	ca, err := parseCert("cluster CA", caPEM)
	if err != nil {
		return nil, err
	}
	cluster, err := ClusterOf(ca)
	if err != nil {
		return nil, err
	}
	leaf, err := parseCert("certificate", certPEM)
	if err != nil {
		return nil, err
	}
	id, err := IdentityOf(leaf)
	if err != nil {
		return nil, err
	}
	if id.Cluster != cluster {
		return nil, fmt.Errorf("certificate of %s does not belong to cluster %s", id, cluster)
	}
	if err := leaf.CheckSignatureFrom(ca); err != nil {
		return nil, fmt.Errorf("certificate of %s: %w", id, err)
	}
	key, err := parseKey("key of "+id.String(), keyPEM)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("certificate of %s: the key is another", id)
	}
	return &Files{
		ID: id,
		// The CA goes along, so that a joining node can pin it by hash.
		Cert: tls.Certificate{Certificate: [][]byte{leaf.Raw, ca.Raw}, PrivateKey: key, Leaf: leaf},
		CA:   ca,
	}, nil
}

// Issue makes a key and certificate in one go, for the node that holds the CA.
func (ca *CA) Issue(role Role, name string, now time.Time) (certPEM, keyPEM []byte, err error) {
	csr, keyPEM, err := NewCSR(name)
	if err != nil {
		return nil, nil, err
	}
	certPEM, err = ca.SignCSR(csr, Identity{Cluster: ca.Cluster, Role: role, Name: name}, now)
	if err != nil {
		return nil, nil, err
	}
	return certPEM, keyPEM, nil
}

// SaveFiles writes node.key, ca.crt and last node.crt into dir.
func SaveFiles(dir string, certPEM, keyPEM, caPEM []byte) error {
	for _, f := range []struct {
		name string
		data []byte
		perm os.FileMode
	}{{KeyFile, keyPEM, 0o600}, {CAFile, caPEM, 0o644}, {CertFile, certPEM, 0o644}} {
		if err := WriteFile(filepath.Join(dir, f.name), f.data, f.perm); err != nil {
			return fmt.Errorf("save certificates: %w", err)
		}
	}
	return nil
}

// LoadFiles reads what SaveFiles wrote.
func LoadFiles(dir string) (*Files, error) {
	ca, err := os.ReadFile(filepath.Join(dir, CAFile))
	if err != nil {
		return nil, fmt.Errorf("load certificates: %w", err)
	}
	cert, err := os.ReadFile(filepath.Join(dir, CertFile))
	if err != nil {
		return nil, fmt.Errorf("load certificates: %w", err)
	}
	key, err := readKey(filepath.Join(dir, KeyFile))
	if err != nil {
		return nil, fmt.Errorf("load certificates: %w", err)
	}
	return NewFiles(cert, key, ca)
}

// Want restricts whom Verify accepts; empty fields accept any.
type Want struct {
	Role Role
	Name string
}

// Verify checks a peer's chain against the CA of f at time now and says who it
// is. The error is a *RefusedError.
func (f *Files) Verify(chain []*x509.Certificate, now time.Time, want Want) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, &RefusedError{
			Reason: NoCertificate, Text: "it presented no certificate",
			Next: "nodes join with clusteradm join, administrators use the local socket or a certificate of this cluster",
		}
	}
	leaf := chain[0]
	id, err := IdentityOf(leaf)
	if err != nil {
		return Identity{}, &RefusedError{Reason: WrongName, Text: err.Error()}
	}
	if id.Cluster != f.ID.Cluster {
		return id, &RefusedError{
			Reason: OtherCluster, Text: fmt.Sprintf("%s %s has a certificate of cluster %s, this is cluster %s", id.Role, id.Name, id.Cluster, f.ID.Cluster),
			Next: "check the address, or join the node anew with a token of this cluster",
		}
	}
	roots := x509.NewCertPool()
	roots.AddCert(f.CA)
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	var inv x509.CertificateInvalidError
	switch {
	case errors.As(err, &inv) && inv.Reason == x509.Expired:
		if now.Before(leaf.NotBefore) {
			return id, &RefusedError{Reason: NotYetValid, Text: fmt.Sprintf("the certificate of %s %s begins %s, the clock here says %s", id.Role, id.Name, leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)), Next: "set the clocks"}
		}
		return id, &RefusedError{Reason: Expired, Text: fmt.Sprintf("the certificate of %s %s expired %s", id.Role, id.Name, leaf.NotAfter.UTC().Format(time.RFC3339)), Next: "check the clocks, or join the node anew"}
	case err != nil:
		return id, &RefusedError{Reason: Untrusted, Text: fmt.Sprintf("the certificate of %s %s is not signed by the CA of this cluster: %v", id.Role, id.Name, err)}
	}
	if want.Role != "" && id.Role != want.Role {
		return id, &RefusedError{Reason: WrongRole, Text: fmt.Sprintf("%s %s came where a %s is needed", id.Role, id.Name, want.Role)}
	}
	if want.Name != "" && id.Name != want.Name {
		return id, &RefusedError{Reason: WrongName, Text: fmt.Sprintf("it is %s %s, %s was expected", id.Role, id.Name, want.Name), Next: "check the addresses in clusteradm node list"}
	}
	return id, nil
}

// ServerTLS is the server's side for a listener that verifies by itself after
// the handshake (Verify on ConnectionState.PeerCertificates), so that it can
// answer with a reason; raftlog.Mux does. It asks for any certificate and
// accepts none.
func (f *Files) ServerTLS(alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{f.Cert},
		NextProtos:   slices.Clone(alpn),
		// No ClientCAs: with a list of acceptable CAs a client of another
		// cluster presents nothing, and the log could not say who it was.
		ClientAuth: tls.RequestClientCert,
	}
}

// StrictServerTLS is the server's side for listeners that cannot verify by
// themselves, as net/http: the handshake fails with the *RefusedError, which
// also goes to refused, once, with the peer's address unknown. With optional a
// peer without certificate passes, for the join call.
func (f *Files) StrictServerTLS(now func() time.Time, want Want, optional bool, refused func(*RefusedError), alpn ...string) *tls.Config {
	c := f.ServerTLS(alpn...)
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if optional && len(cs.PeerCertificates) == 0 {
			return nil
		}
		_, err := f.Verify(cs.PeerCertificates, now(), want)
		return note(err, refused)
	}
	// A resumed session would skip nothing here, but tickets of a former CA
	// are not wanted either.
	c.SessionTicketsDisabled = true
	return c
}

func note(err error, refused func(*RefusedError)) error {
	var r *RefusedError
	if errors.As(err, &r) && refused != nil {
		refused(r)
	}
	return err
}

// ClientTLS is the client's side: the server must be want in this cluster, else
// the handshake fails with a *RefusedError.
func (f *Files) ClientTLS(now func() time.Time, want Want, alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{f.Cert},
		NextProtos:   slices.Clone(alpn),
		// Certificates name nodes, not hosts, so the library's check by host
		// name does not apply; VerifyConnection is the whole check.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := f.Verify(cs.PeerCertificates, now(), want)
			return err
		},
	}
}

// JoinTLS is the client's side before it has a certificate: the server must
// present a CA with the hash of the token and a node certificate signed by it.
// The CA is then given to got.
func (t Token) JoinTLS(now func() time.Time, got func(ca *x509.Certificate), alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         slices.Clone(alpn),
		InsecureSkipVerify: true, //nolint:gosec // pinned by hash instead
		VerifyConnection: func(cs tls.ConnectionState) error {
			for _, c := range cs.PeerCertificates {
				if Hash(c) != t.CAHash {
					continue
				}
				cluster, err := ClusterOf(c)
				if err != nil {
					return err
				}
				f := &Files{ID: Identity{Cluster: cluster}, CA: c}
				if _, err := f.Verify(cs.PeerCertificates, now(), Want{Role: Node}); err != nil {
					return err
				}
				if got != nil {
					got(c)
				}
				return nil
			}
			return &RefusedError{Reason: Untrusted, Text: "the server's CA is not the one of the token", Next: "check the address; the token is of another cluster or somebody is in between"}
		},
	}
}
