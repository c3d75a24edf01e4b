// Package seal encrypts small secrets for storage in replicated records:
// AES-256-GCM (NIST SP 800-38D) under a key that the nodes of one cluster share.
//
//	 0          12                     n-16        n
//	+----------+----------------------+-----------+
//	| nonce    | ciphertext           | tag       |
//	+----------+----------------------+-----------+
//
// The layout is frozen. What a secret belongs to is authenticated with it, so
// that a record cannot be given the secret of another.
//
// It imports nothing of ours.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// KeySize is the length of a key in bytes.
const KeySize = 32

// Key is shared by the nodes of a cluster. It prints as nothing.
type Key []byte

// String hides the key.
func (Key) String() string { return "(hidden)" }

// GoString hides the key.
func (Key) GoString() string { return "(hidden)" }

// New makes a key of the random bytes of r.
func New(r io.Reader) (Key, error) {
	k := make(Key, KeySize)
	if _, err := io.ReadFull(r, k); err != nil {
		return nil, fmt.Errorf("make a sealing key: %w", err)
	}
	return k, nil
}

// ID names a key without telling it: 16 hex digits of a hash. Empty for no key.
func (k Key) ID() string {
	if len(k) == 0 {
		return ""
	}
	h := sha256.Sum256(append([]byte("blockhouse sealing key\x00"), k...))
	return hex.EncodeToString(h[:8])
}

// ErrOpen tells that a sealed secret is not of this key and owner, or damaged.
var ErrOpen = errors.New("the sealed secret does not open with this key")

func (k Key) aead() (cipher.AEAD, error) {
	if len(k) != KeySize {
		return nil, fmt.Errorf("sealing key of %d bytes: %d are needed", len(k), KeySize)
	}
	b, err := aes.NewCipher(k)
	if err != nil {
		return nil, fmt.Errorf("sealing key: %w", err)
	}
	return cipher.NewGCM(b)
}

// Seal encrypts secret for owner with a nonce of r.
func (k Key) Seal(owner string, secret []byte, r io.Reader) ([]byte, error) {
	a, err := k.aead()
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, a.NonceSize(), a.NonceSize()+len(secret)+a.Overhead())
	if _, err := io.ReadFull(r, nonce); err != nil {
		return nil, fmt.Errorf("seal a secret: %w", err)
	}
	return a.Seal(nonce, nonce, secret, []byte(owner)), nil
}

// Open gives the secret of owner. Errors: ErrOpen.
func (k Key) Open(owner string, sealed []byte) ([]byte, error) {
	a, err := k.aead()
	if err != nil {
		return nil, err
	}
	if len(sealed) < a.NonceSize()+a.Overhead() {
		return nil, ErrOpen
	}
	b, err := a.Open(nil, sealed[:a.NonceSize()], sealed[a.NonceSize():], []byte(owner))
	if err != nil {
		return nil, ErrOpen
	}
	return b, nil
}
