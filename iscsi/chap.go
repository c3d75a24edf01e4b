package iscsi

import (
	"crypto/hmac"
	"crypto/md5"  //nolint:gosec // RFC 7143 §12.1.3 names it; every implementation must support it
	"crypto/sha1" //nolint:gosec // IANA CHAP algorithm 6
	"crypto/sha256"
	"crypto/sha3"
	"fmt"
	"hash"
	"slices"
	"strconv"
	"strings"
)

// CHAPAlgorithm is a digest for CHAP; the numbers are IANA's ("PPP Authentication
// Algorithms"). Note that tgt uses 7 for SHA-1.
type CHAPAlgorithm uint8

// Algorithms.
const (
	CHAPMD5     CHAPAlgorithm = 5
	CHAPSHA1    CHAPAlgorithm = 6
	CHAPSHA256  CHAPAlgorithm = 7
	CHAPSHA3256 CHAPAlgorithm = 8
)

// CHAPAlgorithms are all that we know, strongest first.
var CHAPAlgorithms = []CHAPAlgorithm{CHAPSHA3256, CHAPSHA256, CHAPSHA1, CHAPMD5}

func (a CHAPAlgorithm) hash() hash.Hash {
	switch a {
	case CHAPMD5:
		return md5.New() //nolint:gosec // see above
	case CHAPSHA1:
		return sha1.New() //nolint:gosec // see above
	case CHAPSHA256:
		return sha256.New()
	case CHAPSHA3256:
		return sha3.New256()
	}
	return nil
}

// Known tells whether we can compute the algorithm.
func (a CHAPAlgorithm) Known() bool { return a >= CHAPMD5 && a <= CHAPSHA3256 }

// Size is the length of a response in bytes, 0 if the algorithm is not known.
func (a CHAPAlgorithm) Size() int {
	if h := a.hash(); h != nil {
		return h.Size()
	}
	return 0
}

func (a CHAPAlgorithm) String() string {
	switch a {
	case CHAPMD5:
		return "MD5"
	case CHAPSHA1:
		return "SHA1"
	case CHAPSHA256:
		return "SHA-256"
	case CHAPSHA3256:
		return "SHA3-256"
	}
	return fmt.Sprintf("algorithm %d", uint8(a))
}

// Bounds of a challenge that we accept, in bytes.
const (
	CHAPMinChallenge = 16
	CHAPMaxChallenge = MaxBinary
)

// CHAPResponse computes Hash(id, secret, challenge) (RFC 1994 §4.1); nil if the
// algorithm is not known.
func CHAPResponse(a CHAPAlgorithm, id uint8, secret, challenge []byte) []byte {
	h := a.hash()
	if h == nil {
		return nil
	}
	h.Write([]byte{id})
	h.Write(secret)
	h.Write(challenge)
	return h.Sum(nil)
}

// CHAPVerify compares a response in constant time.
func CHAPVerify(a CHAPAlgorithm, id uint8, secret, challenge, response []byte) bool {
	want := CHAPResponse(a, id, secret, challenge)
	return want != nil && hmac.Equal(want, response)
}

// FormatCHAPAlgorithms returns the value of CHAP_A for an offer.
func FormatCHAPAlgorithms(as []CHAPAlgorithm) string {
	s := make([]string, len(as))
	for i, a := range as {
		s[i] = strconv.Itoa(int(a))
	}
	return strings.Join(s, ",")
}

// PickCHAPAlgorithm returns the first algorithm of an offered CHAP_A list that is
// in allowed; ok is false if there is none, err a *TextError for a malformed list.
func PickCHAPAlgorithm(offer string, allowed []CHAPAlgorithm) (a CHAPAlgorithm, ok bool, err error) {
	for v := range strings.SplitSeq(offer, ",") {
		n, err := ParseNumber(v, 0, 1<<32-1)
		if err != nil {
			return 0, false, err
		}
		if !ok && n < 256 && slices.Contains(allowed, CHAPAlgorithm(n)) {
			a, ok = CHAPAlgorithm(n), true
		}
	}
	return a, ok, nil
}
