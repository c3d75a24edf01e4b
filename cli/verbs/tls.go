package verbs

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"

	"github.com/blockhouse-san/blockhouse/api"
)

// loadTLS reads the credentials of a remote administrator from dir.
func loadTLS(dir string) (*tls.Config, error) {
	crt, key, ca := filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"), filepath.Join(dir, "ca.crt")
	pair, err := tls.LoadX509KeyPair(crt, key)
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "ls -l "+dir, "read the client certificate %s and its key %s: %v", crt, key, err)
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "ls -l "+dir, "read the cluster's CA: %v", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, api.Errorf(api.CodeUsage, "", "read the cluster's CA %s: no certificate in it", ca)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, MinVersion: tls.VersionTLS13}, nil
}
