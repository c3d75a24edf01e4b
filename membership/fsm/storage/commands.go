package storage

import (
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/block/replica"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// Kind numbers of machine 3. Append only.
const (
	kindVolumeCreate uint16 = iota + 1
	kindVolumeReady
	kindVolumeCAS
	kindVolumeRemove
	kindVolumeRemoved
	kindTargetCreate
	kindTargetDelete
	kindLunCreate
	kindLunDelete
	kindLunCreateVolume
	kindACLSet
	kindACLAdd
	kindACLRemove
	kindAccountCreate
	kindAccountDelete
	kindAccountBind
	kindAccountUnbind
	kindTargetSet
	kindLunSet
)

// NewVolume is what a volume is made of. Config.Epoch is 1 and Others is empty.
type NewVolume struct {
	Name     string         `json:"name"`
	Config   replica.Config `json:"config"`
	Identity Identity       `json:"identity"`
	// Store is where the bytes of the only copy lie, if not in its node's own
	// folder: a URL in its one form (block/storeurl).
	Store string `json:"store,omitempty"`
	// Integrity asks for a checksum of every 4 KiB (block/integrity).
	Integrity bool `json:"integrity,omitempty"`
}

// VolumeCreate records a volume in state creating. Every member of its ISR must
// be an active storage node. Repeating it with the same Request is no change.
// Value: Volume.
type VolumeCreate struct {
	Request string    `json:"request"`
	Volume  NewVolume `json:"volume"`
}

// VolumeReady says that every member of the ISR at Epoch has its store.
// Value: Volume.
type VolumeReady struct {
	UUID  string `json:"uuid"`
	Epoch uint64 `json:"epoch"`
}

// VolumeCAS replaces the replica configuration: a compare-and-set from Epoch to
// Config.Epoch = Epoch+1 (SAFETY r3/r8). uuid, size and block size stay. A
// repeated Request that was the last one to succeed is no change; any other
// mismatch is fsm.ErrConflict, and the caller reads the record (Volume.LastCAS
// tells whose it is). Value: Volume.
type VolumeCAS struct {
	Request string         `json:"request"`
	Epoch   uint64         `json:"epoch"`
	Config  replica.Config `json:"config"`
}

// VolumeRemove puts a volume that no LUN points to into state removing; its
// primary drains. Value: Volume.
type VolumeRemove struct {
	UUID string `json:"uuid"`
}

// VolumeRemoved ends the removal: the record goes, State.Gone tells replicas
// to erase. Value: Gone.
type VolumeRemoved struct {
	UUID  string `json:"uuid"`
	Epoch uint64 `json:"epoch"`
}

// TargetCreate makes a target. TID 0 takes the lowest free number.
// Value: Target.
type TargetCreate struct {
	Request string `json:"request"`
	IQN     string `json:"iqn"`
	TID     int    `json:"tid,omitempty"`
	Alias   string `json:"alias,omitempty"`
	ACL     ACL    `json:"acl"`
}

// TargetDelete removes a target without LUNs, or with Force its LUN map too;
// the volumes stay. Value: nil.
type TargetDelete struct {
	IQN   string `json:"iqn"`
	Force bool   `json:"force,omitempty"`
}

// NextFree as a LUN number takes the lowest free one from 1 on; 0 is only given
// when asked for, because tutorials and tgtadm expect a controller there.
const NextFree = -1

// MaxLUN is the highest number of SAM's flat addressing.
const MaxLUN = 16383

// LunCreate maps a volume. Value: LUN.
type LunCreate struct {
	Request  string `json:"request"`
	Target   string `json:"target"` // iqn
	Number   int    `json:"number"`
	Volume   string `json:"volume"` // uuid
	ReadOnly bool   `json:"read_only,omitempty"`
}

// LunDelete unmaps a number; Generation 0 means whatever is there. Value: LUN,
// as it was.
type LunDelete struct {
	Target     string `json:"target"`
	Number     int    `json:"number"`
	Generation uint64 `json:"generation,omitempty"`
}

// LunCreateVolume is VolumeCreate and LunCreate in one step: both or neither.
// Value: Mapped.
type LunCreateVolume struct {
	Request  string    `json:"request"`
	Volume   NewVolume `json:"volume"`
	Target   string    `json:"target"`
	Number   int       `json:"number"`
	ReadOnly bool      `json:"read_only,omitempty"`
}

// Mapped is the value of LunCreateVolume.
type Mapped struct {
	Volume Volume `json:"volume"`
	LUN    LUN    `json:"lun"`
}

// ACLSet replaces a target's access list. Value: Target.
type ACLSet struct {
	Target string `json:"target"`
	ACL    ACL    `json:"acl"`
}

// ACLAdd adds entries, and opens the target if ACL.Open. Value: Target.
type ACLAdd struct {
	Target string `json:"target"`
	ACL    ACL    `json:"acl"`
}

// ACLRemove removes entries, and closes the target if ACL.Open; an entry that
// is not there is fsm.ErrNotFound. Value: Target.
type ACLRemove struct {
	Target string `json:"target"`
	ACL    ACL    `json:"acl"`
}

// FSMKind implements fsm.Command.
func (VolumeCreate) FSMKind() (fsm.ID, uint16, uint32)    { return fsm.Storage, kindVolumeCreate, 1 }
func (VolumeReady) FSMKind() (fsm.ID, uint16, uint32)     { return fsm.Storage, kindVolumeReady, 1 }
func (VolumeCAS) FSMKind() (fsm.ID, uint16, uint32)       { return fsm.Storage, kindVolumeCAS, 1 }
func (VolumeRemove) FSMKind() (fsm.ID, uint16, uint32)    { return fsm.Storage, kindVolumeRemove, 1 }
func (VolumeRemoved) FSMKind() (fsm.ID, uint16, uint32)   { return fsm.Storage, kindVolumeRemoved, 1 }
func (TargetCreate) FSMKind() (fsm.ID, uint16, uint32)    { return fsm.Storage, kindTargetCreate, 1 }
func (TargetDelete) FSMKind() (fsm.ID, uint16, uint32)    { return fsm.Storage, kindTargetDelete, 1 }
func (LunCreate) FSMKind() (fsm.ID, uint16, uint32)       { return fsm.Storage, kindLunCreate, 1 }
func (LunDelete) FSMKind() (fsm.ID, uint16, uint32)       { return fsm.Storage, kindLunDelete, 1 }
func (LunCreateVolume) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Storage, kindLunCreateVolume, 1 }
func (ACLSet) FSMKind() (fsm.ID, uint16, uint32)          { return fsm.Storage, kindACLSet, 1 }
func (ACLAdd) FSMKind() (fsm.ID, uint16, uint32)          { return fsm.Storage, kindACLAdd, 1 }
func (ACLRemove) FSMKind() (fsm.ID, uint16, uint32)       { return fsm.Storage, kindACLRemove, 1 }

// Kinds implements fsm.Machine.
func (*Machine) Kinds() []fsm.Kind {
	row := func(n uint16, name string, mk func() any) fsm.Kind {
		return fsm.Kind{Number: n, Name: name, Since: 1, MaxVersion: 1, New: mk}
	}
	return []fsm.Kind{
		row(kindVolumeCreate, "volume-create", func() any { return new(VolumeCreate) }),
		row(kindVolumeReady, "volume-ready", func() any { return new(VolumeReady) }),
		row(kindVolumeCAS, "volume-cas", func() any { return new(VolumeCAS) }),
		row(kindVolumeRemove, "volume-remove", func() any { return new(VolumeRemove) }),
		{Number: kindVolumeRemoved, Name: "volume-removed", Since: 1, MaxVersion: 1, New: func() any { return new(VolumeRemoved) }, Touches: []fsm.ID{fsm.PR}},
		row(kindTargetCreate, "target-create", func() any { return new(TargetCreate) }),
		row(kindTargetDelete, "target-delete", func() any { return new(TargetDelete) }),
		row(kindLunCreate, "lun-create", func() any { return new(LunCreate) }),
		row(kindLunDelete, "lun-delete", func() any { return new(LunDelete) }),
		row(kindLunCreateVolume, "lun-create-volume", func() any { return new(LunCreateVolume) }),
		row(kindACLSet, "acl-set", func() any { return new(ACLSet) }),
		row(kindACLAdd, "acl-add", func() any { return new(ACLAdd) }),
		row(kindACLRemove, "acl-remove", func() any { return new(ACLRemove) }),
		row(kindAccountCreate, "account-create", func() any { return new(AccountCreate) }),
		row(kindAccountDelete, "account-delete", func() any { return new(AccountDelete) }),
		row(kindAccountBind, "account-bind", func() any { return new(AccountBind) }),
		row(kindAccountUnbind, "account-unbind", func() any { return new(AccountUnbind) }),
		row(kindTargetSet, "target-set", func() any { return new(TargetSet) }),
		row(kindLunSet, "lun-set", func() any { return new(LunSet) }),
	}
}

// NewIdentity makes the identity of a volume from random bytes. The proposer
// calls it; a clash is found when the command is applied.
func NewIdentity(id uuid.UUID, rand io.Reader) (Identity, error) {
	var b [4]byte
	if _, err := io.ReadFull(rand, b[:]); err != nil {
		return Identity{}, fmt.Errorf("make volume identity: %w", err)
	}
	naa := scsi.NAA6(id)
	return Identity{
		Product: hex.EncodeToString(b[:]),
		NAA:     hex.EncodeToString(naa[:]),
		Serial:  strings.ReplaceAll(id.String(), "-", ""),
	}, nil
}

// CanonicalName folds an iSCSI name to the form in which names are compared
// (RFC 3722): lower case. Underscores are let through because deployed names
// have them.
func CanonicalName(s string) (string, error) {
	s = strings.ToLower(s)
	if len(s) > 223 {
		return "", fmt.Errorf("iSCSI name of %d bytes: 223 are allowed (RFC 7143 4.2.7.1)", len(s))
	}
	// A target refuses a configuration with any other name, and then it serves nothing.
	if err := iscsi.CheckName(s); err != nil {
		return "", err
	}
	for _, c := range s {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == ':' || c == '_') {
			return "", fmt.Errorf("iSCSI name %q: %q is not allowed; use a-z, 0-9, '.', '-' and ':'", s, c)
		}
	}
	return s, nil
}

// CanonicalACL gives the form in which a list is stored: canonical names and
// masked prefixes, sorted, each once. An address without a length is itself.
func CanonicalACL(a ACL) (ACL, error) {
	out := ACL{Open: a.Open}
	for _, n := range a.Initiators {
		c, err := CanonicalName(n)
		if err != nil {
			return ACL{}, err
		}
		out.Initiators = append(out.Initiators, c)
	}
	for _, s := range a.CIDRs {
		if ip, err := netip.ParseAddr(s); err == nil {
			out.CIDRs = append(out.CIDRs, netip.PrefixFrom(ip.Unmap(), ip.Unmap().BitLen()).String())
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return ACL{}, fmt.Errorf("initiator address %q: an address or address/length is needed", s)
		}
		out.CIDRs = append(out.CIDRs, p.Masked().String())
	}
	slices.Sort(out.Initiators)
	slices.Sort(out.CIDRs)
	out.Initiators, out.CIDRs = slices.Compact(out.Initiators), slices.Compact(out.CIDRs)
	return out, nil
}

// Validate checks that the list is canonical.
func (a ACL) Validate() error {
	c, err := CanonicalACL(a)
	if err != nil {
		return err
	}
	if !slices.Equal(c.Initiators, a.Initiators) || !slices.Equal(c.CIDRs, a.CIDRs) {
		return fmt.Errorf("access list is not canonical")
	}
	return nil
}

func validIQN(s string) error {
	c, err := CanonicalName(s)
	if err != nil {
		return err
	}
	if c != s {
		return fmt.Errorf("iSCSI name %q is not canonical, %q is", s, c)
	}
	return nil
}

func validConfig(c *replica.Config) error {
	if u, err := uuid.Parse(c.UUID); err != nil || u.String() != c.UUID {
		return fmt.Errorf("volume uuid %q: lower-case RFC 9562 text is needed", c.UUID)
	}
	if c.BlockSize != 512 && c.BlockSize != 4096 {
		return fmt.Errorf("volume %s: block size %d; 512 or 4096", c.UUID, c.BlockSize)
	}
	if c.Size <= 0 || c.Size%int64(c.BlockSize) != 0 {
		return fmt.Errorf("volume %s: size %d is not a positive multiple of %d", c.UUID, c.Size, c.BlockSize)
	}
	if len(c.ISR) == 0 || !slices.Contains(c.ISR, c.Primary) {
		return fmt.Errorf("volume %s: primary %q is not in the in-sync set %v", c.UUID, c.Primary, c.ISR)
	}
	all := c.Members()
	slices.Sort(all)
	if len(slices.Compact(slices.Clone(all))) != len(all) || all[0] == "" {
		return fmt.Errorf("volume %s: members %v are not distinct names", c.UUID, all)
	}
	for _, o := range c.Others {
		if o.State != "stale" && o.State != "rebuilding" {
			return fmt.Errorf("volume %s: member %s in state %q", c.UUID, o.Node, o.State)
		}
	}
	return nil
}

func validName(what, s string) error {
	if s == "" || len(s) > 127 {
		return fmt.Errorf("%s name %q: 1 to 127 characters are needed", what, s)
	}
	for i, c := range s {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || (c == '-' || c == '_' || c == '.') && i > 0) {
			return fmt.Errorf("%s name %q: use letters, digits, and after the first character also '-', '_' and '.'", what, s)
		}
	}
	return nil
}

// Validate checks a volume to be made.
func (v *NewVolume) Validate() error {
	if err := validName("volume", v.Name); err != nil {
		return err
	}
	if err := validConfig(&v.Config); err != nil {
		return err
	}
	if v.Config.Epoch != 1 || len(v.Config.Others) != 0 || v.Config.Lineage == "" {
		return fmt.Errorf("volume %s: a new one has epoch 1, a lineage and only in-sync members", v.Name)
	}
	if v.Store != "" {
		u, err := storeurl.Parse(v.Store)
		switch {
		case err != nil:
			return fmt.Errorf("volume %s: %w", v.Name, err)
		case u.String() != v.Store || u.WantsIntegrity() != "":
			return fmt.Errorf("volume %s: store %q is not in its one form, %q", v.Name, v.Store, u)
		case !u.OwnSize() && v.Integrity:
			return fmt.Errorf("volume %s: checksums of a store in memory protect nothing", v.Name)
		}
	}
	if v.Store != "" && len(v.Config.ISR) != 1 {
		return fmt.Errorf("volume %s: the store %s is on one node, the volume has %d copies", v.Name, v.Store, len(v.Config.ISR))
	}
	id := v.Identity
	if len(id.Product) != 8 || len(id.NAA) != 32 || id.NAA[0] != '6' || id.Serial == "" {
		return fmt.Errorf("volume %s: identity %+v is incomplete", v.Name, id)
	}
	return nil
}

func validLUN(n int) error {
	if n < NextFree || n > MaxLUN {
		return fmt.Errorf("LUN %d: 0 to %d are possible", n, MaxLUN)
	}
	return nil
}

func needRequest(op, r string) error {
	if r == "" {
		return fmt.Errorf("%s: request id is missing", op)
	}
	return nil
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *VolumeCreate) Validate() error {
	return first(needRequest("create volume", c.Request), c.Volume.Validate())
}

// Validate implements fsm.Validator.
func (c *VolumeCAS) Validate() error {
	if c.Config.Epoch != c.Epoch+1 {
		return fmt.Errorf("change volume %s: from epoch %d to %d; one step is allowed", c.Config.UUID, c.Epoch, c.Config.Epoch)
	}
	return first(needRequest("change volume", c.Request), validConfig(&c.Config))
}

// Validate implements fsm.Validator.
func (c *TargetCreate) Validate() error {
	if c.TID < 0 {
		return fmt.Errorf("create target: tid %d", c.TID)
	}
	return first(needRequest("create target", c.Request), validIQN(c.IQN), c.ACL.Validate())
}

// Validate implements fsm.Validator.
func (c *LunCreate) Validate() error {
	return first(needRequest("create lun", c.Request), validLUN(c.Number))
}

// Validate implements fsm.Validator.
func (c *LunCreateVolume) Validate() error {
	return first(needRequest("create lun", c.Request), validLUN(c.Number), c.Volume.Validate())
}

// Validate implements fsm.Validator.
func (c *ACLSet) Validate() error { return c.ACL.Validate() }

// Validate implements fsm.Validator.
func (c *ACLAdd) Validate() error { return c.ACL.Validate() }

// Validate implements fsm.Validator.
func (c *ACLRemove) Validate() error { return c.ACL.Validate() }
