// Package replica will be the synchronous, epoch-checked replica set (R-ISR)
// behind a volume. What stands here now is the record that the cluster's FSM
// keeps of a volume, because every layer carries it from the first day on; the
// protocol core and its runner come with the HA-volumes work.
//
// Storage row: it imports nothing of the cluster.
package replica

import "slices"

// Config is the committed configuration of one volume (docs/formats/fsm.md,
// machine storage). Every change is a compare-and-set on Epoch and gives
// Epoch+1 (SAFETY §1). Reads of it are copies; slices are never shared.
type Config struct {
	UUID      string   `json:"uuid"`       // RFC 9562 text form, the key of the data on every node
	Size      int64    `json:"size"`       // bytes
	BlockSize int      `json:"block_size"` // 512 or 4096
	Epoch     uint64   `json:"epoch"`      // starts at 1
	Primary   string   `json:"primary"`    // node name
	ISR       []string `json:"isr"`        // in-sync set, contains Primary, never empty
	Others    []Other  `json:"others,omitempty"`
	Lineage   string   `json:"lineage"` // changes only by forced promotion (r9)
}

// Other is a member outside the in-sync set.
type Other struct {
	Node  string `json:"node"`
	State string `json:"state"` // "stale" or "rebuilding"
	Since uint64 `json:"since"` // epoch of the drop, the key of its dirty map (r3)
}

// InSync tells whether node is in the in-sync set.
func (c *Config) InSync(node string) bool { return slices.Contains(c.ISR, node) }

// Members are all nodes that hold or should hold a copy.
func (c *Config) Members() []string {
	m := slices.Clone(c.ISR)
	for _, o := range c.Others {
		m = append(m, o.Node)
	}
	return m
}
