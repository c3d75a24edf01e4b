package members

import (
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

// Kind numbers of machine 1. Append only.
const (
	kindBootstrap uint16 = iota + 1
	kindTokenCreate
	kindTokenRevoke
	kindAddNode
	kindAdmit
	kindEvict
	kindLeave
	kindRemove
	kindSetRoles
	kindSetAddresses
	kindReportFormat
	kindPortalAdd
	kindPortalRemove
)

// NewNode is what a node says of itself when it is added.
type NewNode struct {
	Name          string    `json:"name"`
	BootID        string    `json:"boot_id"`
	Roles         Roles     `json:"roles"`
	Addresses     Addresses `json:"addresses"`
	InitiatorName string    `json:"initiator_name,omitempty"`
	Format        uint32    `json:"format"`
}

// Bootstrap makes the cluster and its first member (incarnation 1, index 1,
// epoch 1, view 1). Repeating it with the same uuid is no change; another uuid
// is ErrExists. Value: Record.
type Bootstrap struct {
	Cluster string  `json:"cluster"`
	UUID    string  `json:"uuid"` // RFC 9562 text
	Node    NewNode `json:"node"`
}

// TokenCreate adds a join token and forgets the ones that ended before Now.
// Value: Token.
type TokenCreate struct {
	Now     time.Time `json:"now"`
	ID      string    `json:"id"`
	SHA256  string    `json:"sha256"` // hex of SHA-256 of the secret
	Expires time.Time `json:"expires"`
	Uses    int       `json:"uses"` // ≥ 1, or -1 for unlimited
	Roles   Roles     `json:"roles"`
}

// TokenRevoke removes a token. Value: nil.
type TokenRevoke struct {
	ID string `json:"id"`
}

// AddNode consumes one use of a token and adds the node in state joining, with
// the next node index, in one step. The proposer hashes the presented secret:
// it is never in the log. Roles of the node must be a subset of the token's.
// Repeating it with the same Request is no change and costs no use.
// Value: Record.
type AddNode struct {
	Request string    `json:"request"`
	Now     time.Time `json:"now"`
	Token   string    `json:"token"` // id
	Proof   string    `json:"proof"` // hex of SHA-256 of the secret that was presented
	Node    NewNode   `json:"node"`
}

// Admit makes a joining, left or fenced node a member in incarnation From+1
// and raises the epoch. It is refused while a fence or an attempt of the node
// is open, and for the kernel that was evicted unless Clean says how it was
// proved that nothing of its storage is left there (SAFETY §3). Repeating it
// is no change. Value: Record.
type Admit struct {
	Now    time.Time `json:"now"`
	Node   string    `json:"node"`
	From   uint64    `json:"from"` // the incarnation that the proposer saw
	BootID string    `json:"boot_id"`
	Format uint32    `json:"format,omitempty"` // 0 = as before
	Clean  string    `json:"clean,omitempty"`
}

// Evict ends the membership of an incarnation: state evicted, epoch+1, a fence
// is opened in machine 2. It is a compare-and-set on incarnation and boot id
// and idempotent. Value: Evicted node's Eviction.
type Evict struct {
	Now         time.Time `json:"now"`
	Node        string    `json:"node"`
	Incarnation uint64    `json:"incarnation"`
	BootID      string    `json:"boot_id"`
	Reason      string    `json:"reason"`
	By          string    `json:"by,omitempty"` // leader or operator
}

// Eviction is the value of Evict.
type Eviction struct {
	Epoch   uint64 `json:"epoch"` // of the eviction
	Already bool   `json:"already,omitempty"`
}

// Leave is the planned way out: first with Done false (state leaving), and
// when the node has drained with Done true (state left, epoch+1). No fence.
// Value: Record.
type Leave struct {
	Node        string `json:"node"`
	Incarnation uint64 `json:"incarnation"`
	Done        bool   `json:"done"`
}

// Remove forgets a node that is joining, left or fenced. Its index and
// incarnation are never used again. Value: nil.
type Remove struct {
	Node string `json:"node"`
}

// SetRoles replaces the roles. Value: Record.
type SetRoles struct {
	Node  string `json:"node"`
	Roles Roles  `json:"roles"`
}

// SetAddresses replaces the addresses and the initiator name. Value: Record.
type SetAddresses struct {
	Node          string    `json:"node"`
	Addresses     Addresses `json:"addresses"`
	InitiatorName string    `json:"initiator_name,omitempty"`
}

// ReportFormat says which cluster format the node's binary knows; a restart
// with another binary reports again. Value: nil.
type ReportFormat struct {
	Node   string `json:"node"`
	Format uint32 `json:"format"`
}

// FSMKind implements fsm.Command.
func (Bootstrap) FSMKind() (fsm.ID, uint16, uint32)    { return fsm.Members, kindBootstrap, 1 }
func (TokenCreate) FSMKind() (fsm.ID, uint16, uint32)  { return fsm.Members, kindTokenCreate, 1 }
func (TokenRevoke) FSMKind() (fsm.ID, uint16, uint32)  { return fsm.Members, kindTokenRevoke, 1 }
func (AddNode) FSMKind() (fsm.ID, uint16, uint32)      { return fsm.Members, kindAddNode, 1 }
func (Admit) FSMKind() (fsm.ID, uint16, uint32)        { return fsm.Members, kindAdmit, 1 }
func (Evict) FSMKind() (fsm.ID, uint16, uint32)        { return fsm.Members, kindEvict, 1 }
func (Leave) FSMKind() (fsm.ID, uint16, uint32)        { return fsm.Members, kindLeave, 1 }
func (Remove) FSMKind() (fsm.ID, uint16, uint32)       { return fsm.Members, kindRemove, 1 }
func (SetRoles) FSMKind() (fsm.ID, uint16, uint32)     { return fsm.Members, kindSetRoles, 1 }
func (SetAddresses) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Members, kindSetAddresses, 1 }
func (ReportFormat) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Members, kindReportFormat, 1 }
func (PortalAdd) FSMKind() (fsm.ID, uint16, uint32)    { return fsm.Members, kindPortalAdd, 1 }
func (PortalRemove) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Members, kindPortalRemove, 1 }

// Kinds implements fsm.Machine.
func (*Machine) Kinds() []fsm.Kind {
	row := func(n uint16, name string, mk func() any, touches ...fsm.ID) fsm.Kind {
		return fsm.Kind{Number: n, Name: name, Since: 1, MaxVersion: 1, New: mk, Touches: touches}
	}
	return []fsm.Kind{
		row(kindBootstrap, "bootstrap", func() any { return new(Bootstrap) }),
		row(kindTokenCreate, "token-create", func() any { return new(TokenCreate) }),
		row(kindTokenRevoke, "token-revoke", func() any { return new(TokenRevoke) }),
		row(kindAddNode, "add-node", func() any { return new(AddNode) }),
		row(kindAdmit, "admit", func() any { return new(Admit) }, fsm.Fence),
		row(kindEvict, "evict", func() any { return new(Evict) }, fsm.Fence),
		row(kindLeave, "leave", func() any { return new(Leave) }),
		row(kindRemove, "remove", func() any { return new(Remove) }),
		row(kindSetRoles, "set-roles", func() any { return new(SetRoles) }),
		row(kindSetAddresses, "set-addresses", func() any { return new(SetAddresses) }),
		row(kindReportFormat, "report-format", func() any { return new(ReportFormat) }),
		row(kindPortalAdd, "portal-add", func() any { return new(PortalAdd) }),
		row(kindPortalRemove, "portal-remove", func() any { return new(PortalRemove) }),
	}
}

// ValidName tells whether s can be a node or cluster name: a DNS label, as it
// stands in certificates, lock tables and file names.
func ValidName(s string) error {
	if s == "" || len(s) > 63 {
		return fmt.Errorf("name %q: 1 to 63 characters are needed", s)
	}
	for i, c := range s {
		ok := c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || (c == '-' || c == '_' || c == '.') && i > 0
		if !ok {
			return fmt.Errorf("name %q: use a-z, 0-9, and after the first character also '-', '_' and '.'", s)
		}
	}
	return nil
}

func validHostPort(what, a string) error {
	h, p, err := net.SplitHostPort(a)
	if err != nil || h == "" || p == "" || p == "0" {
		return fmt.Errorf("%s address %q: host:port is needed", what, a)
	}
	return nil
}

// Validate checks the shape of the addresses.
func (a Addresses) Validate() error {
	if err := validHostPort("raft", a.Raft); err != nil {
		return err
	}
	if a.API != "" {
		if err := validHostPort("api", a.API); err != nil {
			return err
		}
	}
	if a.Gossip != "" {
		if err := validHostPort("gossip", a.Gossip); err != nil {
			return err
		}
	}
	for _, p := range a.ISCSI {
		if err := validHostPort("iscsi", p); err != nil {
			return err
		}
	}
	return nil
}

// Validate implements fsm.Validator for the part that several commands share.
func (n NewNode) Validate() error {
	if err := ValidName(n.Name); err != nil {
		return err
	}
	if n.BootID == "" {
		return fmt.Errorf("node %s: boot id is missing", n.Name)
	}
	if n.Format == 0 {
		return fmt.Errorf("node %s: cluster format is missing", n.Name)
	}
	return n.Addresses.Validate()
}

// Validate implements fsm.Validator.
func (c *Bootstrap) Validate() error {
	if err := ValidName(c.Cluster); err != nil {
		return err
	}
	if len(c.UUID) != 36 || c.UUID != strings.ToLower(c.UUID) {
		return fmt.Errorf("cluster uuid %q: lower-case RFC 9562 text is needed", c.UUID)
	}
	return c.Node.Validate()
}

func validSum(s string) error {
	if b, err := hex.DecodeString(s); err != nil || len(b) != 32 || s != strings.ToLower(s) {
		return fmt.Errorf("hash %q: 64 lower-case hex digits are needed", s)
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *TokenCreate) Validate() error {
	if c.ID == "" {
		return fmt.Errorf("token id is missing")
	}
	if c.Uses == 0 || c.Uses < -1 {
		return fmt.Errorf("token %s: uses %d; give 1 or more, or -1 for unlimited", c.ID, c.Uses)
	}
	if c.Now.IsZero() || !c.Expires.After(c.Now) {
		return fmt.Errorf("token %s: expiry is not after its creation", c.ID)
	}
	return validSum(c.SHA256)
}

// Validate implements fsm.Validator.
func (c *AddNode) Validate() error {
	if c.Request == "" {
		return fmt.Errorf("add node %s: request id is missing", c.Node.Name)
	}
	if c.Now.IsZero() {
		return fmt.Errorf("add node %s: time is missing", c.Node.Name)
	}
	if err := validSum(c.Proof); err != nil {
		return err
	}
	return c.Node.Validate()
}

// Validate implements fsm.Validator.
func (c *Admit) Validate() error {
	if c.BootID == "" {
		return fmt.Errorf("admit %s: boot id is missing", c.Node)
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *Evict) Validate() error {
	if c.BootID == "" || c.Reason == "" || c.Now.IsZero() {
		return fmt.Errorf("evict %s: boot id, reason and time are needed", c.Node)
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *SetAddresses) Validate() error { return c.Addresses.Validate() }

// Validate implements fsm.Validator.
func (c *ReportFormat) Validate() error {
	if c.Format == 0 {
		return fmt.Errorf("report format of %s: 0", c.Node)
	}
	return nil
}
