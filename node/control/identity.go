package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/blockhouse-san/blockhouse/internal/durable"
	"github.com/blockhouse-san/blockhouse/internal/seal"
)

// identity is who this node is, beside its keys: data_dir/node.json. It exists
// once the node is a member.
type identity struct {
	Cluster     string `json:"cluster"`
	UUID        string `json:"uuid"`
	Node        string `json:"node"`
	Incarnation uint64 `json:"incarnation"` // as last admitted
	GossipKey   []byte `json:"gossip_key"`  // 32 bytes, shared by the cluster
	// ClusterKey seals the secrets in the log (internal/seal). A node whose state
	// is older than accounts has none until it needs it.
	ClusterKey seal.Key `json:"cluster_key,omitempty"`
	Peers      []peer   `json:"peers"` // whom to ask when the FSM is old
	// Founding: the cluster was made here and its first record may not be written yet.
	Founding bool `json:"founding,omitempty"`
}

// peer is a member's address for asking.
type peer struct {
	Name string `json:"name"`
	API  string `json:"api"`
	Raft string `json:"raft"`
}

func identityPath(dataDir string) string { return filepath.Join(dataDir, "node.json") }

// loadIdentity gives false when the node is no member yet.
func loadIdentity(dataDir string) (identity, bool, error) {
	var id identity
	b, err := os.ReadFile(identityPath(dataDir))
	if errors.Is(err, os.ErrNotExist) {
		return id, false, nil
	}
	if err != nil {
		return id, false, fmt.Errorf("read identity: %w", err)
	}
	if err := json.Unmarshal(b, &id); err != nil {
		return id, false, fmt.Errorf("read identity %s: %w", identityPath(dataDir), err)
	}
	return id, true, nil
}

func (id *identity) save(dataDir string) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	return durable.WriteFile(identityPath(dataDir), append(b, '\n'), 0o600)
}

// nextIncarnation numbers this control process. The caller holds the node's lock
// file, so that of two controls the later one has the higher number, and it is
// taken before Raft opens (SAFETY §2, two controls).
func nextIncarnation(dataDir string) (uint64, error) {
	n, err := peekIncarnation(dataDir)
	if err != nil {
		return 0, err
	}
	n++
	path := filepath.Join(dataDir, "control.incarnation")
	if err := durable.WriteFile(path, []byte(strconv.FormatUint(n, 10)+"\n"), 0o600); err != nil {
		return 0, fmt.Errorf("number this control: %w", err)
	}
	return n, nil
}

// peekIncarnation is the number of the last control; 0 before the first.
func peekIncarnation(dataDir string) (uint64, error) {
	path := filepath.Join(dataDir, "control.incarnation")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("number this control: %w", err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("number this control: %s holds %q", path, b)
	}
	return n, nil
}
