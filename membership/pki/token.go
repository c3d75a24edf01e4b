package pki

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
)

// Token is a join token. Its text is bh1-ID-SECRET-CAHASH in lower-case base32
// (RFC 4648 alphabet without padding): letters, digits and '-' only, so it
// survives shells, mails and line-wrapping terminals.
//
//	ID       8 characters,  40 random bits, the key of the record
//	SECRET  26 characters, 128 random bits, known to the two ends only
//	CAHASH  52 characters, SHA-256 of the CA certificate's DER
type Token struct {
	ID     string
	secret [16]byte
	CAHash [sha256.Size]byte
}

var b32 = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

const tokenPrefix = "bh1"

// NewToken makes a token from rand for the cluster with this CA hash.
func NewToken(caHash [sha256.Size]byte, rand io.Reader) (Token, error) {
	var id [5]byte
	t := Token{CAHash: caHash}
	if _, err := io.ReadFull(rand, id[:]); err != nil {
		return Token{}, fmt.Errorf("make token: %w", err)
	}
	if _, err := io.ReadFull(rand, t.secret[:]); err != nil {
		return Token{}, fmt.Errorf("make token: %w", err)
	}
	t.ID = b32.EncodeToString(id[:])
	return t, nil
}

// Text is the whole token, a secret.
func (t Token) Text() string {
	return strings.Join([]string{tokenPrefix, t.ID, b32.EncodeToString(t.secret[:]), b32.EncodeToString(t.CAHash[:])}, "-")
}

// String hides the secret: tokens end up in logs by accident.
func (t Token) String() string { return tokenPrefix + "-" + t.ID + "-…" }

// GoString hides the secret from %#v.
func (t Token) GoString() string { return t.String() }

// SecretSHA256 is hex of SHA-256 of the secret: what the cluster stores and
// compares (members.Token.SHA256, members.AddNode.Proof).
func (t Token) SecretSHA256() string {
	s := sha256.Sum256(t.secret[:])
	return hex.EncodeToString(s[:])
}

// ParseToken reads a token's text; space around it, as pasting leaves it, and
// upper case do no harm. The error never shows the secret.
func ParseToken(s string) (Token, error) {
	s = strings.ToLower(strings.TrimSpace(s))
	p := strings.Split(s, "-")
	if len(p) != 4 || p[0] != tokenPrefix {
		return Token{}, fmt.Errorf("join token: %d parts in %d characters; bh1-ID-SECRET-CAHASH is needed: copy all of what clusteradm token create printed", len(p), len(s))
	}
	t := Token{ID: p[1]}
	var id [5]byte
	for _, f := range []struct {
		what string
		text string
		dst  []byte
	}{{"id", p[1], id[:]}, {"secret", p[2], t.secret[:]}, {"CA hash", p[3], t.CAHash[:]}} {
		b, err := b32.DecodeString(f.text)
		// The re-encoding catches stray bits in the last character.
		if err != nil || len(b) != len(f.dst) || b32.EncodeToString(b) != f.text {
			return Token{}, fmt.Errorf("join token: the %s is damaged (%d characters, want %d): copy all of what clusteradm token create printed", f.what, len(f.text), b32.EncodedLen(len(f.dst)))
		}
		copy(f.dst, b)
	}
	return t, nil
}
