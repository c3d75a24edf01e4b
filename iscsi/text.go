package iscsi

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Limits of text (§6.1); MaxText and MaxPairs are ours.
const (
	MaxKeyLen   = 63              // bytes of a key
	MaxValueLen = 255             // bytes of a value, unless its key says more
	MaxBinary   = 1024            // bytes of a binary value, decoded
	MaxText     = 64 << 10        // bytes of one logical text, over all its PDUs
	MaxPairs    = 128             // pairs of one logical text
	maxEncoded  = 2 + 2*MaxBinary // characters of a binary value
)

// Reserved values (§6.2).
const (
	NotUnderstood = "NotUnderstood"
	Irrelevant    = "Irrelevant"
	Rejected      = "Reject"
)

// Pair is one key=value.
type Pair struct{ Key, Value string }

func (p Pair) String() string { return p.Key + "=" + p.Value }

// TextError is text that breaks §6.1.
type TextError struct{ Why string }

func (e *TextError) Error() string { return "text: " + e.Why }

// AppendPair appends key=value and its NUL.
func AppendPair(dst []byte, key, value string) []byte {
	dst = append(dst, key...)
	dst = append(dst, '=')
	dst = append(dst, value...)
	return append(dst, 0)
}

// AppendText appends pairs in order.
func AppendText(dst []byte, pairs []Pair) []byte {
	for _, p := range pairs {
		dst = AppendPair(dst, p.Key, p.Value)
	}
	return dst
}

// ParseText takes a whole logical text apart: NUL-terminated pairs. Order and
// repetition are kept. It returns a *TextError for a missing NUL or '=', a key that
// is no standard label, a value that is too long or has control characters, and
// over MaxText bytes or MaxPairs pairs. Superfluous NULs are skipped.
func ParseText(b []byte) ([]Pair, error) {
	if len(b) > MaxText {
		return nil, &TextError{fmt.Sprintf("%d bytes exceed the limit of %d", len(b), MaxText)}
	}
	var out []Pair
	for len(b) > 0 {
		i := bytes.IndexByte(b, 0)
		if i < 0 {
			return nil, &TextError{"last pair has no NUL"}
		}
		s := b[:i]
		b = b[i+1:]
		if i == 0 {
			continue
		}
		k, v, ok := bytes.Cut(s, []byte{'='})
		if !ok {
			return nil, &TextError{fmt.Sprintf("no '=' in %.40q", s)}
		}
		if !validKey(k) {
			return nil, &TextError{fmt.Sprintf("key %.70q is no label of 1 to %d characters", k, MaxKeyLen)}
		}
		p := Pair{string(k), string(v)}
		if err := checkValue(p); err != nil {
			return nil, err
		}
		if len(out) == MaxPairs {
			return nil, &TextError{fmt.Sprintf("more than %d pairs", MaxPairs)}
		}
		out = append(out, p)
	}
	return out, nil
}

// validKey: a letter, then letters, digits and . - + @ _ (§6.1), X# and Y# and Z#
// keys with '#'. The standard wants a capital first letter; "iSCSIProtocolLevel"
// (RFC 7144) breaks that rule itself.
func validKey(k []byte) bool {
	if len(k) == 0 || len(k) > MaxKeyLen {
		return false
	}
	for i, c := range k {
		switch {
		case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z':
		case i > 0 && (c >= '0' && c <= '9' || c == '.' || c == '-' || c == '+' || c == '@' || c == '_' || c == '#'):
		default:
			return false
		}
	}
	return true
}

func checkValue(p Pair) error {
	limit := MaxValueLen
	if k, ok := LookupKey(p.Key); ok && k.Binary {
		limit = maxEncoded
	}
	if len(p.Value) > limit {
		return &TextError{fmt.Sprintf("value of %s has %d bytes, limit %d", p.Key, len(p.Value), limit)}
	}
	for i := range len(p.Value) {
		if c := p.Value[i]; c < 0x20 || c == 0x7f {
			return &TextError{fmt.Sprintf("control character %#02x in the value of %s", c, p.Key)}
		}
	}
	return nil
}

// TextBuffer collects a logical text from the data segments of PDUs with the C bit.
type TextBuffer struct {
	buf  []byte
	pdus int
}

// Add appends a segment. With more (C bit) it returns nil, nil; otherwise it
// parses what was collected and empties the buffer. A *TextError for over MaxText
// bytes comes with the segment that exceeds it.
func (t *TextBuffer) Add(seg []byte, more bool) ([]Pair, error) {
	if len(t.buf)+len(seg) > MaxText {
		return nil, &TextError{fmt.Sprintf("more than %d bytes", MaxText)}
	}
	t.pdus++
	if t.pdus > MaxText/16 {
		return nil, &TextError{"too many PDUs"}
	}
	t.buf = append(t.buf, seg...)
	if more {
		return nil, nil
	}
	p, err := ParseText(t.buf)
	t.buf, t.pdus = t.buf[:0], 0
	return p, err
}

// Empty tells that no segment waits for more.
func (t *TextBuffer) Empty() bool { return t.pdus == 0 }

// TextQueue cuts a logical text into data segments for sending.
type TextQueue struct{ buf []byte }

// Put appends pairs.
func (q *TextQueue) Put(pairs ...Pair) { q.buf = AppendText(q.buf, pairs) }

// Next returns the next data segment of at most limit bytes, and whether more
// follow (C bit). An empty queue gives an empty segment.
func (q *TextQueue) Next(limit int) (seg []byte, more bool) {
	if len(q.buf) <= limit {
		seg, q.buf = q.buf, nil
		return seg, false
	}
	seg, q.buf = q.buf[:limit:limit], q.buf[limit:]
	return seg, true
}

// Empty tells that nothing waits.
func (q *TextQueue) Empty() bool { return len(q.buf) == 0 }

// ParseNumber parses a numerical value: decimal without leading zeroes, or 0x and
// hexadecimal digits, in [lo, hi] (§6.1).
func ParseNumber(s string, lo, hi uint64) (uint64, error) {
	var n uint64
	var err error
	switch {
	case len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X") && hexDigits(s[2:]):
		n, err = strconv.ParseUint(s[2:], 16, 64)
	case digits(s) && (s[0] != '0' || len(s) == 1):
		n, err = strconv.ParseUint(s, 10, 64)
	default:
		return 0, &TextError{fmt.Sprintf("%.40q is no number", s)}
	}
	if err != nil || n < lo || n > hi {
		return 0, &TextError{fmt.Sprintf("number %.40s is not in %d-%d", s, lo, hi)}
	}
	return n, nil
}

// ParseBool parses Yes or No.
func ParseBool(s string) (bool, error) {
	switch s {
	case "Yes":
		return true, nil
	case "No":
		return false, nil
	}
	return false, &TextError{fmt.Sprintf("%.40q is neither Yes nor No", s)}
}

// FormatBool is the inverse of ParseBool.
func FormatBool(b bool) string {
	if b {
		return "Yes"
	}
	return "No"
}

// ParseBinary decodes a binary value: 0x and hexadecimal digits, an odd number of
// them with a zero in front, or 0b and base64 (§6.1). 1 to MaxBinary bytes result.
func ParseBinary(s string) ([]byte, error) {
	if len(s) > maxEncoded {
		return nil, &TextError{fmt.Sprintf("binary value of %d characters", len(s))}
	}
	var b []byte
	var err error
	switch {
	case len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X"):
		h := s[2:]
		if len(h)%2 != 0 {
			h = "0" + h
		}
		b, err = hex.DecodeString(h)
	case len(s) > 2 && (s[:2] == "0b" || s[:2] == "0B"):
		b, err = base64.StdEncoding.Strict().DecodeString(s[2:])
		if strings.ContainsAny(s, "\r\n") { // which the decoder skips
			err = &TextError{"line break in base64"}
		}
	default:
		return nil, &TextError{"binary value does not begin with 0x or 0b"}
	}
	if err != nil {
		return nil, &TextError{"binary value: " + err.Error()}
	}
	if len(b) == 0 || len(b) > MaxBinary {
		return nil, &TextError{fmt.Sprintf("binary value of %d bytes", len(b))}
	}
	return b, nil
}

// FormatBinary encodes a binary value as 0x and hexadecimal digits.
func FormatBinary(b []byte) string { return "0x" + hex.EncodeToString(b) }

func unhex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}
