package storage

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/blockhouse-san/blockhouse/block/storeurl"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

// Account is a CHAP name with its secret (RFC 7143 12.1.3). The secret is sealed
// with the cluster's key (internal/seal, owner: the name); this machine cannot
// open it, and no dump of the state shows it.
type Account struct {
	Name    string `json:"name"`
	Sealed  []byte `json:"sealed"`
	Key     string `json:"key"`     // id of the sealing key; the same in all accounts
	Created uint64 `json:"created"` // log index
	Request string `json:"request"`
}

// Clone is a deep copy.
func (a *Account) Clone() Account {
	c := *a
	c.Sealed = slices.Clone(a.Sealed)
	return c
}

// Auth names the accounts of a target, or of discovery.
type Auth struct {
	// Incoming accounts may log in, in the order in which they were bound; with any
	// of them CHAP is required.
	Incoming []string `json:"incoming,omitempty"`
	// Outgoing is what the target proves itself with (mutual CHAP).
	Outgoing string `json:"outgoing,omitempty"`
}

// Clone is a deep copy.
func (a Auth) Clone() Auth {
	a.Incoming = slices.Clone(a.Incoming)
	return a
}

// remove takes the i-th incoming account away. A state has one form, so that
// its snapshot has the same bytes before and after a restore: no list is nil.
func (a *Auth) remove(i int) {
	if a.Incoming = slices.Delete(a.Incoming, i, i+1); len(a.Incoming) == 0 {
		a.Incoming = nil
	}
}

// AccountCreate records an account. Repeating it with the same Request is no
// change. Value: Account.
type AccountCreate struct {
	Request string `json:"request"`
	Name    string `json:"name"`
	Sealed  []byte `json:"sealed"`
	Key     string `json:"key"`
}

// AccountDelete removes an account and, as tgtd does, every binding of it. A
// target whose last incoming account this is would then ask for nothing, so with
// Force false it is refused. Value: nil.
type AccountDelete struct {
	Name  string `json:"name"`
	Force bool   `json:"force,omitempty"`
}

// AccountBind adds an account to a target, or to discovery if Target is empty.
// Value: Auth.
type AccountBind struct {
	Target   string `json:"target,omitempty"` // iqn
	Name     string `json:"name"`
	Outgoing bool   `json:"outgoing,omitempty"`
}

// AccountUnbind takes an account away. Value: Auth.
type AccountUnbind struct {
	Target   string `json:"target,omitempty"`
	Name     string `json:"name"`
	Outgoing bool   `json:"outgoing,omitempty"`
}

// TargetSet changes a target's parameters; an empty value takes one back to its
// default. Offline nil leaves the state as it is. Value: Target.
type TargetSet struct {
	Target  string            `json:"target"`
	Params  map[string]string `json:"params,omitempty"`
	Offline *bool             `json:"offline,omitempty"`
}

// LunSet changes what initiators see of a LUN beside its volume; nil leaves as
// it is. Value: LUN.
type LunSet struct {
	Target    string `json:"target"`
	Number    int    `json:"number"`
	ReadOnly  *bool  `json:"read_only,omitempty"`
	Removable *bool  `json:"removable,omitempty"`
	NoCache   *bool  `json:"no_cache,omitempty"`
}

// FSMKind implements fsm.Command.
func (AccountCreate) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Storage, kindAccountCreate, 1 }
func (AccountDelete) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Storage, kindAccountDelete, 1 }
func (AccountBind) FSMKind() (fsm.ID, uint16, uint32)   { return fsm.Storage, kindAccountBind, 1 }
func (AccountUnbind) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Storage, kindAccountUnbind, 1 }
func (TargetSet) FSMKind() (fsm.ID, uint16, uint32)     { return fsm.Storage, kindTargetSet, 1 }
func (LunSet) FSMKind() (fsm.ID, uint16, uint32)        { return fsm.Storage, kindLunSet, 1 }

func validAccount(s string) error {
	if s == "" || len(s) > 255 {
		return fmt.Errorf("account name of %d bytes: 1 to 255 are needed (RFC 7143 6.1)", len(s))
	}
	for _, c := range s {
		if c <= ' ' || c == 0x7f {
			return fmt.Errorf("account name %q: no blanks and no control characters are allowed", s)
		}
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *AccountCreate) Validate() error {
	if len(c.Sealed) < 29 || len(c.Sealed) > 1024 {
		return fmt.Errorf("create account %s: a sealed secret has 29 to 1024 bytes, not %d", c.Name, len(c.Sealed))
	}
	if b, err := hex.DecodeString(c.Key); err != nil || len(b) != 8 {
		return fmt.Errorf("create account %s: key id %q", c.Name, c.Key)
	}
	return first(needRequest("create account", c.Request), validAccount(c.Name))
}

// Validate implements fsm.Validator.
func (c *AccountBind) Validate() error { return validAccount(c.Name) }

// Validate implements fsm.Validator.
func (c *TargetSet) Validate() error {
	for k, v := range c.Params {
		if k == "" || len(k) > 63 || len(v) > 255 || strings.ContainsFunc(k+v, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return fmt.Errorf("change target %s: parameter %q=%q: names have 1 to 63 bytes, values up to 255", c.Target, k, v)
		}
	}
	return nil
}

// VolumeOn is the volume whose bytes a store on node would be: under whatever
// options and wrappers, and on whatever node if the name means the same on all.
// nil if there is none.
func (s *State) VolumeOn(store, node string) *Volume {
	key, shared := keyOf(store)
	if key == "" {
		return nil
	}
	for _, v := range s.ListVolumes() {
		k, _ := keyOf(v.Store)
		if k == key && (shared || slices.Contains(v.Config.Members(), node)) {
			return &v
		}
	}
	return nil
}

func keyOf(store string) (string, bool) {
	if store == "" {
		return "", false
	}
	u, err := storeurl.Parse(store)
	if err != nil {
		return "", false // validated when it was made
	}
	return u.Key()
}

func (m *Machine) account(op, name string) (*Account, error) {
	if a := m.s.Accounts[name]; a != nil {
		return a, nil
	}
	return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: name, Why: "no such account", Next: "run clusteradm account list"}
}

func (m *Machine) accountCreate(index uint64, c *AccountCreate) (any, error) {
	const op = "create account"
	if a := m.s.Accounts[c.Name]; a != nil {
		if a.Request == c.Request {
			return a.Clone(), nil
		}
		return nil, &fsm.Error{Kind: fsm.KindExists, Op: op, Object: c.Name, Why: "this account already exists"}
	}
	// One key for all: a node that lacks it knows from any account what to ask for.
	if k := m.s.SealingKey(); k != "" && k != c.Key {
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Name, Why: "the other accounts are sealed with key " + k + ", this one with " + c.Key}
	}
	a := &Account{Name: c.Name, Sealed: slices.Clone(c.Sealed), Key: c.Key, Created: index, Request: c.Request}
	if m.s.Accounts == nil {
		m.s.Accounts = map[string]*Account{}
	}
	m.s.Accounts[c.Name] = a
	return a.Clone(), nil
}

func (m *Machine) accountDelete(c *AccountDelete) (any, error) {
	const op = "delete account"
	if _, err := m.account(op, c.Name); err != nil {
		return nil, err
	}
	auths := m.auths()
	if !c.Force {
		for _, where := range slices.Sorted(maps.Keys(auths)) {
			if a := auths[where]; len(a.Incoming) == 1 && a.Incoming[0] == c.Name {
				return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Name,
					Why: "it is the only account of " + where + ", which would then ask nobody for a secret", Next: "bind another one, or add --force"}
			}
		}
	}
	m.next()
	for _, a := range auths {
		if i := slices.Index(a.Incoming, c.Name); i >= 0 {
			a.remove(i)
		}
		if a.Outgoing == c.Name {
			a.Outgoing = ""
		}
	}
	if delete(m.s.Accounts, c.Name); len(m.s.Accounts) == 0 {
		m.s.Accounts = nil
	}
	return nil, nil
}

// auths is every place that accounts are bound to, by what a user calls it.
func (m *Machine) auths() map[string]*Auth {
	out := map[string]*Auth{"discovery": &m.s.Discovery}
	for iqn, t := range m.s.Targets {
		out[iqn] = &t.Auth
	}
	return out
}

// auth finds where accounts are bound. changed must be called after a change,
// and only then: a refusal changes nothing.
func (m *Machine) auth(op, iqn string) (a *Auth, where string, changed func(), err error) {
	if iqn == "" {
		return &m.s.Discovery, "discovery", func() {}, nil
	}
	t, err := m.target(op, iqn)
	if err != nil {
		return nil, "", nil, err
	}
	return &t.Auth, iqn, func() { t.Generation = m.next() }, nil
}

func (m *Machine) accountBind(c *AccountBind) (any, error) {
	const op = "bind account"
	if _, err := m.account(op, c.Name); err != nil {
		return nil, err
	}
	a, where, changed, err := m.auth(op, c.Target)
	if err != nil {
		return nil, err
	}
	switch {
	case c.Outgoing && a.Outgoing != "":
		return nil, &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: c.Name, Why: where + " already has the outgoing account " + a.Outgoing,
			Next: "unbind that one first"}
	case !c.Outgoing && slices.Contains(a.Incoming, c.Name):
		return nil, &fsm.Error{Kind: fsm.KindExists, Op: op, Object: c.Name, Why: "it is bound to " + where}
	case c.Outgoing && slices.Contains(a.Incoming, c.Name), !c.Outgoing && a.Outgoing == c.Name:
		// One secret in both directions lets an attacker reflect a challenge (RFC 7143 9.2.1).
		return nil, &fsm.Error{Kind: fsm.KindRefused, Op: op, Object: c.Name, Why: "it is bound to " + where + " in the other direction; one secret must not serve both"}
	}
	if c.Outgoing {
		a.Outgoing = c.Name
	} else {
		a.Incoming = append(a.Incoming, c.Name)
	}
	changed()
	return a.Clone(), nil
}

func (m *Machine) accountUnbind(c *AccountUnbind) (any, error) {
	const op = "unbind account"
	a, where, changed, err := m.auth(op, c.Target)
	if err != nil {
		return nil, err
	}
	i := slices.Index(a.Incoming, c.Name)
	if c.Outgoing && a.Outgoing != c.Name || !c.Outgoing && i < 0 {
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: c.Name, Why: "it is not bound to " + where, Next: "run clusteradm account list"}
	}
	if c.Outgoing {
		a.Outgoing = ""
	} else {
		a.remove(i)
	}
	changed()
	return a.Clone(), nil
}

func (m *Machine) targetSet(c *TargetSet) (any, error) {
	t, err := m.target("change target", c.Target)
	if err != nil {
		return nil, err
	}
	for k, v := range c.Params {
		if v == "" {
			delete(t.Params, k)
			continue
		}
		if t.Params == nil {
			t.Params = map[string]string{}
		}
		t.Params[k] = v
	}
	if len(t.Params) == 0 {
		t.Params = nil
	}
	if c.Offline != nil {
		t.Offline = *c.Offline
	}
	t.Generation = m.next()
	return t.Clone(), nil
}

func (m *Machine) lunSet(c *LunSet) (any, error) {
	const op = "change lun"
	t, err := m.target(op, c.Target)
	if err != nil {
		return nil, err
	}
	l := t.LUNs[c.Number]
	if l == nil {
		return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: c.Target, Why: fmt.Sprintf("no LUN %d", c.Number), Next: "run clusteradm lun list"}
	}
	if c.ReadOnly != nil {
		l.ReadOnly = *c.ReadOnly
	}
	if c.Removable != nil {
		l.Removable = *c.Removable
	}
	if c.NoCache != nil {
		l.NoCache = *c.NoCache
	}
	t.Generation = m.next()
	return *l, nil
}

// SealingKey is the id of the key of all accounts, empty without any.
func (s *State) SealingKey() string {
	for _, a := range s.Accounts {
		return a.Key
	}
	return ""
}

// ListAccounts is the accounts, newest first as tgtadm shows them.
func (s *State) ListAccounts() []Account {
	out := make([]Account, 0, len(s.Accounts))
	for _, a := range s.Accounts {
		out = append(out, a.Clone())
	}
	slices.SortFunc(out, func(a, b Account) int { return cmp.Or(cmp.Compare(b.Created, a.Created), cmp.Compare(a.Name, b.Name)) })
	return out
}
