package storage

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	"go.uber.org/zap"

	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/target"
)

// auth opens the secrets of the accounts that are bound to where. What a target
// cannot have is left out and logged: a pair with one secret in both directions
// (RFC 7143 9.2.1), an outgoing account without an incoming one. An error means
// that an incoming secret is not to be had.
func (w *worker) auth(want *desired, where string, a fsmstorage.Auth) (target.Auth, error) {
	var out target.Auth
	open := func(name string) (target.Account, error) {
		acc := want.storage.Accounts[name]
		if acc == nil {
			return target.Account{}, fmt.Errorf("account %s of %s: no such account", name, where)
		}
		s, err := want.key.Open(name, acc.Sealed)
		if err != nil {
			return target.Account{}, fmt.Errorf("account %s of %s: %w", name, where, err)
		}
		return target.Account{Name: name, Secret: s}, nil
	}
	for _, name := range a.Incoming {
		acc, err := open(name)
		if err != nil {
			w.complain(want, where, err)
			return target.Auth{}, err
		}
		out.Accounts = append(out.Accounts, acc)
	}
	if a.Outgoing == "" {
		return out, nil
	}
	acc, err := open(a.Outgoing)
	if err == nil && len(out.Accounts) == 0 {
		err = fmt.Errorf("account %s of %s is outgoing and there is no incoming one: the target proves itself only to who did", acc.Name, where)
	}
	for _, in := range out.Accounts {
		if err == nil && string(in.Secret) == string(acc.Secret) {
			err = fmt.Errorf("accounts %s and %s of %s have one secret: mutual CHAP is refused", in.Name, acc.Name, where)
		}
	}
	if err != nil {
		w.complain(want, where, err)
		return out, nil
	}
	out.Out = acc
	return out, nil
}

// nobody is the authentication of who cannot be authenticated: a secret that was
// made now and is told to no one.
var nobody = target.Auth{Accounts: []target.Account{{Name: "nobody", Secret: random()}}}

func random() target.Secret {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		panic("no randomness: " + err.Error()) // crypto/rand never fails on Linux; without it nothing here is safe
	}
	return b
}

// complain logs once for a state.
func (w *worker) complain(want *desired, where string, err error) {
	key := fmt.Sprintf("%d %s", want.stamp.Index, where)
	if w.complained == nil {
		w.complained = map[string]string{}
	}
	if w.complained[where] != key {
		w.complained[where] = key
		w.log.Warn("authentication is not as configured", zap.Error(err))
	}
}

// secretsOf stands for the secrets of a configuration, which print as nothing, in
// the comparison of two of them.
func secretsOf(c *target.Config) string {
	h := sha256.New()
	add := func(a *target.Auth) {
		for _, x := range slices.Concat(a.Accounts, []target.Account{a.Out}) {
			fmt.Fprintf(h, "%q %q;", x.Name, string(x.Secret))
		}
	}
	add(&c.Discovery)
	for i := range c.Targets {
		add(&c.Targets[i].Auth)
	}
	return hex.EncodeToString(h.Sum(nil))
}
