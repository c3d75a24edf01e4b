// Package pki is the cluster's certificate authority and the TLS that stands on
// it: one ECDSA P-256 CA made at init, certificates that name a node or an
// administrator by URI, and a verification that says why it refuses.
//
// A certificate carries exactly one SAN, a URI:
//
//	blockhouse://CLUSTER-UUID/node/NAME
//	blockhouse://CLUSTER-UUID/admin/NAME
//
// Addresses are not in certificates: a node may move. Who is at the other end
// is decided by the URI alone.
//
// Cluster row: node, cli and the packages of membership may import it.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Role is what a certificate makes its holder.
type Role string

// The roles.
const (
	Node  Role = "node"
	Admin Role = "admin"
)

// Identity is what a certificate says: a role and name in a cluster.
type Identity struct {
	Cluster string // uuid, RFC 9562 text
	Role    Role
	Name    string
}

// URI is the identity as it stands in the certificate.
func (i Identity) URI() *url.URL {
	return &url.URL{Scheme: "blockhouse", Host: i.Cluster, Path: "/" + string(i.Role) + "/" + i.Name}
}

// String is the URI.
func (i Identity) String() string { return i.URI().String() }

// IdentityOf reads the identity of a certificate. It verifies nothing.
func IdentityOf(c *x509.Certificate) (Identity, error) {
	if len(c.URIs) != 1 || c.URIs[0].Scheme != "blockhouse" {
		return Identity{}, fmt.Errorf("certificate %s: no blockhouse URI", c.Subject)
	}
	u := c.URIs[0]
	role, name, ok := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	id := Identity{Cluster: u.Host, Role: Role(role), Name: name}
	if !ok || id.Cluster == "" || name == "" || strings.Contains(name, "/") || id.Role != Node && id.Role != Admin {
		return Identity{}, fmt.Errorf("certificate %s: URI %s", c.Subject, u)
	}
	return id, nil
}

// Lifetimes of what is signed. Rotation before the end is the API's task.
const (
	CALifetime   = 20 * 365 * 24 * time.Hour
	LeafLifetime = 5 * 365 * 24 * time.Hour
	// backdate allows for clocks that are not set yet.
	backdate = time.Hour
)

// CA signs certificates of one cluster.
type CA struct {
	Cluster string // uuid
	Cert    *x509.Certificate
	key     *ecdsa.PrivateKey
}

// caURI marks the CA certificate with its cluster.
func caURI(cluster string) *url.URL {
	return &url.URL{Scheme: "blockhouse", Host: cluster, Path: "/ca"}
}

func serial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// NewCA makes the CA of a cluster, valid from now.
func NewCA(cluster string, now time.Time) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make CA key: %w", err)
	}
	sn, err := serial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          sn,
		Subject:               pkix.Name{Organization: []string{"Blockhouse"}, CommonName: "cluster " + cluster},
		URIs:                  []*url.URL{caURI(cluster)},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CALifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	return &CA{Cluster: cluster, Cert: c, key: key}, nil
}

// Hash is SHA-256 of a CA certificate's DER, what a join token pins.
func Hash(ca *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(ca.Raw) }

// Sign makes the certificate of id over pub, valid from now for d. The result
// is DER.
func (ca *CA) Sign(id Identity, pub crypto.PublicKey, now time.Time, d time.Duration) ([]byte, error) {
	if id.Cluster != ca.Cluster {
		return nil, fmt.Errorf("sign %s: the CA is of cluster %s", id, ca.Cluster)
	}
	if id.Role != Node && id.Role != Admin || id.Name == "" || strings.ContainsAny(id.Name, "/ ") {
		return nil, fmt.Errorf("sign %s: not a node or admin name", id)
	}
	sn, err := serial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: sn,
		Subject:      pkix.Name{Organization: []string{"Blockhouse " + string(id.Role)}, CommonName: id.Name},
		URIs:         []*url.URL{id.URI()},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(d),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if id.Role == Node {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.Cert, pub, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	return der, nil
}

// SignCSR signs a certificate request (PEM) for id. What the request says of
// itself is ignored but for the key: the caller knows who asks.
func (ca *CA) SignCSR(csrPEM []byte, id Identity, now time.Time) (certPEM []byte, err error) {
	b, rest := pem.Decode(csrPEM)
	if b == nil || b.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		return nil, fmt.Errorf("sign %s: no single certificate request in the input", id)
	}
	req, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("sign %s: request: %w", id, err)
	}
	if _, ok := req.PublicKey.(*ecdsa.PublicKey); !ok {
		return nil, fmt.Errorf("sign %s: request with a %T; ECDSA P-256 is needed", id, req.PublicKey)
	}
	der, err := ca.Sign(id, req.PublicKey, now, LeafLifetime)
	if err != nil {
		return nil, err
	}
	return encodePEM("CERTIFICATE", der), nil
}

// NewCSR makes a key and a request for it, both PEM. The key stays with the
// caller.
func NewCSR(name string) (csrPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key of %s: %w", name, err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request of %s: %w", name, err)
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		return nil, nil, err
	}
	return encodePEM("CERTIFICATE REQUEST", der), keyPEM, nil
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func encodeKey(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return encodePEM("PRIVATE KEY", der), nil
}

func parseCert(what string, b []byte) (*x509.Certificate, error) {
	p, _ := pem.Decode(b)
	if p == nil || p.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s: no PEM certificate", what)
	}
	c, err := x509.ParseCertificate(p.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return c, nil
}

func parseKey(what string, b []byte) (*ecdsa.PrivateKey, error) {
	p, _ := pem.Decode(b)
	if p == nil || p.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("%s: no PEM private key", what)
	}
	k, err := x509.ParsePKCS8PrivateKey(p.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	e, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: %T, ECDSA is needed", what, k)
	}
	return e, nil
}

// Encode gives certificate and key as PEM.
func (ca *CA) Encode() (certPEM, keyPEM []byte, err error) {
	keyPEM, err = encodeKey(ca.key)
	if err != nil {
		return nil, nil, err
	}
	return encodePEM("CERTIFICATE", ca.Cert.Raw), keyPEM, nil
}

// ClusterOf reads the cluster uuid of a CA certificate.
func ClusterOf(ca *x509.Certificate) (string, error) {
	if !ca.IsCA || len(ca.URIs) != 1 || ca.URIs[0].Scheme != "blockhouse" || ca.URIs[0].Path != "/ca" {
		return "", fmt.Errorf("certificate %s is no cluster CA", ca.Subject)
	}
	return ca.URIs[0].Host, nil
}

// ParseCA is the inverse of Encode.
func ParseCA(certPEM, keyPEM []byte) (*CA, error) {
	c, err := parseCert("cluster CA", certPEM)
	if err != nil {
		return nil, err
	}
	cluster, err := ClusterOf(c)
	if err != nil {
		return nil, err
	}
	k, err := parseKey("cluster CA", keyPEM)
	if err != nil {
		return nil, err
	}
	if !k.PublicKey.Equal(c.PublicKey) {
		return nil, errors.New("cluster CA: key and certificate do not belong together")
	}
	return &CA{Cluster: cluster, Cert: c, key: k}, nil
}

// File names in a PKI folder. Keys are 0600.
const (
	CAFile    = "ca.crt"
	CAKeyFile = "ca.key"
	CertFile  = "node.crt"
	KeyFile   = "node.key"
)

// Save writes ca.crt and ca.key into dir.
func (ca *CA) Save(dir string) error {
	cert, key, err := ca.Encode()
	if err != nil {
		return err
	}
	if err := WriteFile(filepath.Join(dir, CAKeyFile), key, 0o600); err != nil {
		return fmt.Errorf("save cluster CA: %w", err)
	}
	if err := WriteFile(filepath.Join(dir, CAFile), cert, 0o644); err != nil {
		return fmt.Errorf("save cluster CA: %w", err)
	}
	return nil
}

// LoadCA reads ca.crt and ca.key from dir. A node that was not given the key
// has none: errors.Is(err, os.ErrNotExist).
func LoadCA(dir string) (*CA, error) {
	cert, err := os.ReadFile(filepath.Join(dir, CAFile))
	if err != nil {
		return nil, fmt.Errorf("load cluster CA: %w", err)
	}
	key, err := readKey(filepath.Join(dir, CAKeyFile))
	if err != nil {
		return nil, fmt.Errorf("load cluster CA: %w", err)
	}
	return ParseCA(cert, key)
}

func readKey(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if m := fi.Mode().Perm(); m&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: others can read the key; run chmod 600 %s", path, m, path)
	}
	return os.ReadFile(path)
}
