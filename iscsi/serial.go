package iscsi

// Serial is a 32-bit sequence number that wraps: CmdSN, StatSN and their kin are
// compared by serial number arithmetic (RFC 7143 §4.2.2.1, RFC 1982).
type Serial uint32

// Less reports whether s comes before t. Numbers 2^31 apart are unordered: neither
// is less.
func (s Serial) Less(t Serial) bool { return s != t && int32(s-t) < 0 && s-t != 1<<31 }

// LessEq reports whether s is t or comes before it.
func (s Serial) LessEq(t Serial) bool { return s == t || s.Less(t) }

// Add returns s+n, n below 2^31.
func (s Serial) Add(n uint32) Serial { return s + Serial(n) }

// Diff returns the signed distance from t to s.
func (s Serial) Diff(t Serial) int32 { return int32(s - t) }

// InWindow reports whether s is in [exp, max], the window of §4.2.2.1. The window
// is closed, and holds nothing, when max = exp-1.
func (s Serial) InWindow(exp, max Serial) bool {
	return exp.LessEq(s) && s.LessEq(max)
}
