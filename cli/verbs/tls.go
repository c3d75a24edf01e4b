package verbs

import (
	"crypto/tls"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/pki"
)

// loadTLS reads the credentials of a remote administrator from dir: ca.crt,
// node.crt and node.key, as clusterd keeps its own. The far end must be a node
// of the same cluster; its address says nothing, because certificates name
// nodes and not addresses.
func loadTLS(dir string) (*tls.Config, error) {
	f, err := pki.LoadFiles(dir)
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "ls -l "+dir, "--certs %s: %v", dir, err)
	}
	return f.ClientTLS(time.Now, pki.Want{Role: pki.Node}), nil
}
