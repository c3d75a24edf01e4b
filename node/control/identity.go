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
)

// identity is who this node is, beside its keys: data_dir/node.json. It exists
// once the node is a member.
type identity struct {
	Cluster     string `json:"cluster"`
	UUID        string `json:"uuid"`
	Node        string `json:"node"`
	Incarnation uint64 `json:"incarnation"` // as last admitted
	GossipKey   []byte `json:"gossip_key"`  // 32 bytes, shared by the cluster
	Peers       []peer `json:"peers"`       // whom to ask when the FSM is old
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
	path := filepath.Join(dataDir, "control.incarnation")
	var n uint64
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		if n, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err != nil {
			return 0, fmt.Errorf("number this control: %s holds %q", path, b)
		}
	case !errors.Is(err, os.ErrNotExist):
		return 0, fmt.Errorf("number this control: %w", err)
	}
	n++
	if err := durable.WriteFile(path, []byte(strconv.FormatUint(n, 10)+"\n"), 0o600); err != nil {
		return 0, fmt.Errorf("number this control: %w", err)
	}
	return n, nil
}
