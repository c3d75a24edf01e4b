package target

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// Options are fixed for the life of a Server. The zero value is usable.
type Options struct {
	Logger *zap.Logger // nil = none
	// OnEvent is told what happens, nil = nobody. It is called from many goroutines
	// and must not block. How much it is told is bounded (events.go).
	OnEvent func(Event)
	// NopInterval is how long a connection may be silent before it is pinged,
	// NopTimeout how long the ping may stay unanswered before the session is reset
	// (SAFETY §4: 1 s and 1 s). Negative NopInterval = no pings.
	NopInterval, NopTimeout time.Duration
	LoginTimeout            time.Duration // of the whole login phase; 0 = 15 s
	SendTimeout             time.Duration // a peer that takes nothing for so long is dropped; 0 = 30 s
	// StallLimit: when the server itself did not run for longer, every connection
	// is reset before anything is read from it (SAFETY §2). 0 = off.
	StallLimit  time.Duration
	QueueDepth  int        // command window of a session; 0 = 128
	MaxLogins   int        // connections that are not logged in yet; 0 = 256
	MaxBuffered int64      // bytes of data phases in memory; above it large commands get TASK SET FULL; 0 = 1 GiB
	Want        iscsi.Want // limits of negotiation; zero = DefaultWant
}

func (o *Options) defaults() error {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.NopInterval, time.Second)
	def(&o.NopTimeout, time.Second)
	def(&o.LoginTimeout, 15*time.Second)
	def(&o.SendTimeout, 30*time.Second)
	if o.QueueDepth == 0 {
		o.QueueDepth = 128
	}
	if o.QueueDepth < 1 || o.QueueDepth > maxQueueDepth {
		return fmt.Errorf("queue depth %d: want 1 to %d", o.QueueDepth, maxQueueDepth)
	}
	if o.MaxBuffered == 0 {
		o.MaxBuffered = 1 << 30
	}
	if o.MaxLogins == 0 {
		o.MaxLogins = 256
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Want.MaxRecv == 0 {
		o.Want = DefaultWant()
	}
	return checkWant(&o.Want)
}

// Secret is a CHAP secret. It prints as nothing, in logs and in JSON.
type Secret []byte

// String hides the secret.
func (Secret) String() string { return "(hidden)" }

// GoString hides the secret.
func (Secret) GoString() string { return "(hidden)" }

// MarshalText hides the secret.
func (Secret) MarshalText() ([]byte, error) { return []byte("(hidden)"), nil }

// Account is a CHAP name with its secret.
type Account struct {
	Name   string
	Secret Secret
}

// Auth says how initiators prove themselves. The zero value asks for nothing.
type Auth struct {
	// Accounts that may log in; with any, CHAP is required.
	Accounts []Account
	// Out answers initiators that want the target to prove itself (mutual CHAP); an
	// empty name refuses that. Its secret must differ from every account's.
	Out Account
	// Algorithms that are accepted, nil = all of them.
	Algorithms []iscsi.CHAPAlgorithm
}

func (a *Auth) required() bool { return len(a.Accounts) > 0 }

func (a *Auth) secret(name string) []byte {
	for _, c := range a.Accounts {
		if c.Name == name {
			return c.Secret
		}
	}
	return nil
}

func (a *Auth) validate() error {
	seen := map[string]bool{}
	for _, c := range a.Accounts {
		switch {
		case c.Name == "" || len(c.Secret) == 0:
			return errors.New("account without name or secret")
		case seen[c.Name]:
			return fmt.Errorf("account %s: configured twice", c.Name)
		case a.Out.Name != "" && string(c.Secret) == string(a.Out.Secret):
			return fmt.Errorf("account %s has the secret of the outgoing account: both directions need their own", c.Name)
		}
		seen[c.Name] = true
	}
	if a.Out.Name != "" && len(a.Out.Secret) == 0 {
		return fmt.Errorf("outgoing account %s: no secret", a.Out.Name)
	}
	if a.Out.Name != "" && len(a.Accounts) == 0 {
		return fmt.Errorf("outgoing account %s without an incoming one: the target proves itself only to an initiator that did", a.Out.Name)
	}
	return nil
}

// Config is the desired state of a Server. Apply makes it so, whatever the state
// was before.
type Config struct {
	Targets []Target
	// Discovery is the authentication of discovery sessions.
	Discovery Auth
	// Cut are initiator names that may not log in, with the epoch at which they
	// were fenced.
	Cut map[string]uint64
	// Optional are portals of the targets that Apply goes on without when they cannot
	// be opened; Server.Unopened tells why. Any other one fails the whole of Apply.
	Optional []netip.AddrPort
}

// Target is an iSCSI target node.
type Target struct {
	IQN   string
	Alias string // TargetAlias, optional
	// TPGT is the target portal group tag, also the SCSI target port group;
	// RelPort is the relative target port identifier. Both 1 to 65535.
	TPGT, RelPort uint16
	// Portals are ADDRESS:PORT. An unspecified address (0.0.0.0, [::]) is told to
	// initiators as the one that they came to.
	Portals []netip.AddrPort
	ACL     ACL
	Auth    Auth
	LUNs    []LUN
	// Offline refuses logins with "service unavailable", for drains.
	Offline bool
	// What follows holds for sessions that log in from now on. Zero values are the
	// server's: Want limits the negotiation, MaxSend is the most that a Data-In
	// carries whatever the initiator declares (bytes, from 512), QueueDepth the
	// command window, NopInterval and NopTimeout the pings (a negative NopInterval
	// switches them off).
	Want                    iscsi.Want
	MaxSend, QueueDepth     int
	NopInterval, NopTimeout time.Duration
	// Redirect sends initiators to another portal, HOST:PORT[,TAG], before they
	// authenticate; RedirectForever says that they should remember it. At the portal
	// that it names, by address, logins are taken.
	Redirect        string
	RedirectForever bool
}

// ACL says who may see a target. Every kind of rule that is not empty must
// match; with no rule at all Open decides.
type ACL struct {
	Open  bool
	Names []string       // iSCSI initiator names
	Nets  []netip.Prefix // of the initiator's address
}

// Allows tells whether an initiator may see the target.
func (a *ACL) Allows(name string, addr netip.Addr) bool {
	if len(a.Names) == 0 && len(a.Nets) == 0 {
		return a.Open
	}
	if len(a.Names) > 0 && !slices.ContainsFunc(a.Names, func(n string) bool { return iscsi.NormalizeName(n) == name }) {
		return false
	}
	addr = addr.Unmap()
	return len(a.Nets) == 0 || slices.ContainsFunc(a.Nets, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// LUN is an entry of a target's LUN map.
type LUN struct {
	Number scsi.LUN
	// Volume is the identity of the bytes, a UUID in text form; entries of one
	// volume under several targets share one logical unit: task set, reservations,
	// unit attentions.
	Volume string
	// Generation changes whenever the entry points to something else; sessions
	// older than the change are reset (SAFETY §4).
	Generation uint64
	// Device is closed by whoever opened it, after the entry was removed.
	Device       block.Device
	Gate         Gate         // nil = Open
	Reservations Reservations // nil = in memory, kept as long as the volume is served
	Identity     Identity
	// Groups answers REPORT TARGET PORT GROUPS: all groups through which the volume
	// can be reached and the implicit transition time in seconds. nil = this port,
	// active/optimized.
	Groups    func() ([]scsi.PortGroup, uint8)
	ReadOnly  bool
	Removable bool
	// NoCache begins with WCE 0 (SBC-3 6.5.5): a write is durable before its status.
	// MODE SELECT may change it until the next reset.
	NoCache bool
}

// Identity is frozen at the volume's creation and the same on every node.
type Identity struct {
	Product  string // INQUIRY product, 16 bytes; the first 8 are unique per volume
	Revision string // 4 bytes
	Serial   string // VPD 80
	UUID     [16]byte
}

// Vendor is the T10 vendor identification of every logical unit.
const Vendor = "BLKHOUSE"

// Validate returns the first error of a configuration.
func (c *Config) Validate() error {
	if err := c.Discovery.validate(); err != nil {
		return fmt.Errorf("discovery: %w", err)
	}
	seen := map[string]bool{}
	vols := map[string]*LUN{}
	for i := range c.Targets {
		t := &c.Targets[i]
		if err := iscsi.CheckName(t.IQN); err != nil {
			return fmt.Errorf("target: %w", err)
		}
		name := iscsi.NormalizeName(t.IQN)
		if seen[name] {
			return fmt.Errorf("target %s: configured twice", t.IQN)
		}
		seen[name] = true
		if t.TPGT == 0 || t.RelPort == 0 {
			return fmt.Errorf("target %s: portal group tag %d, relative port %d: want 1 to 65535", t.IQN, t.TPGT, t.RelPort)
		}
		if len(t.Portals) == 0 {
			return fmt.Errorf("target %s: no portal", t.IQN)
		}
		if t.Redirect != "" {
			if _, err := iscsi.ParsePortal(t.Redirect); err != nil {
				return fmt.Errorf("target %s: redirect: %w", t.IQN, err)
			}
		}
		if err := t.Auth.validate(); err != nil {
			return fmt.Errorf("target %s: %w", t.IQN, err)
		}
		if err := t.validateLimits(); err != nil {
			return fmt.Errorf("target %s: %w", t.IQN, err)
		}
		nums := map[scsi.LUN]bool{}
		for j := range t.LUNs {
			l := &t.LUNs[j]
			switch {
			case l.Number > scsi.MaxLUN:
				return fmt.Errorf("target %s lun %d: want 0 to %d", t.IQN, l.Number, scsi.MaxLUN)
			case nums[l.Number]:
				return fmt.Errorf("target %s lun %d: configured twice", t.IQN, l.Number)
			case l.Device == nil:
				return fmt.Errorf("target %s lun %d: no device", t.IQN, l.Number)
			case l.Volume == "":
				return fmt.Errorf("target %s lun %d: no volume", t.IQN, l.Number)
			}
			if v := vols[l.Volume]; v != nil && (v.Device != l.Device || v.Gate != l.Gate || v.Reservations != l.Reservations || v.Identity != l.Identity) {
				return fmt.Errorf("target %s lun %d: volume %s is configured with another device, gate or identity elsewhere", t.IQN, l.Number, l.Volume)
			}
			vols[l.Volume] = l
			nums[l.Number] = true
		}
	}
	return nil
}

func (t *Target) validateLimits() error {
	if t.Want.MaxRecv != 0 {
		if err := checkWant(&t.Want); err != nil {
			return err
		}
	}
	switch {
	case t.MaxSend != 0 && (t.MaxSend < 512 || t.MaxSend > iscsi.MaxDataSegment):
		return fmt.Errorf("segments of at most %d bytes are sent: want 512 to %d", t.MaxSend, iscsi.MaxDataSegment)
	case t.QueueDepth < 0 || t.QueueDepth > maxQueueDepth:
		return fmt.Errorf("queue depth %d: want 1 to %d", t.QueueDepth, maxQueueDepth)
	}
	return nil
}

const (
	maxQueueDepth = 4096
	// maxRecoveryLevel is what the target does of RFC 7143 section 7.
	maxRecoveryLevel = 1
)

// DefaultWant are the limits of a server that is not told others: those of
// iscsi.DefaultWant, several connections a session, and no time to retain a session
// for a task reassignment, of which there is none below error recovery level 2.
func DefaultWant() iscsi.Want {
	w := iscsi.DefaultWant()
	w.MaxConnections = 8
	w.DefaultTime2Retain = 0
	w.ErrorRecoveryLevel = maxRecoveryLevel
	return w
}

// checkWant refuses limits under which a negotiation could end with what the target
// does not do.
func checkWant(w *iscsi.Want) error {
	if err := w.Validate(); err != nil {
		return err
	}
	switch {
	case w.ErrorRecoveryLevel > maxRecoveryLevel:
		return fmt.Errorf("error recovery level %d: want 0 to %d", w.ErrorRecoveryLevel, maxRecoveryLevel)
	case !w.DataPDUInOrder || !w.DataSequenceInOrder:
		return errors.New("DataPDUInOrder and DataSequenceInOrder: only Yes is possible")
	}
	return nil
}

// Errors of the server.
var (
	ErrClosed   = errors.New("target server is closed")
	ErrPortBusy = errors.New("portal is in use")
)
