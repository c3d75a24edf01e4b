package fsm

import (
	"errors"
	"strings"
)

// ErrKind sorts refusals by what the caller can do about them. The numbers
// travel between nodes (a follower hands a command to the leader) and are only
// ever appended.
type ErrKind uint8

// The kinds, with the exit code of clusteradm (facts/interfaces.md §3.2).
const (
	KindOther       ErrKind = iota // 1
	KindInvalid                    // 2: the command itself is malformed
	KindNotFound                   // 3
	KindExists                     // 4
	KindConflict                   // 4: a compare-and-set failed, read again
	KindNoQuorum                   // 5: no leader, or it cannot reach a majority
	KindTimeout                    // 6: outcome unknown; repeat with the same request id
	KindDenied                     // 7: bad token, bad certificate
	KindUnreachable                // 8
	KindRefused                    // 9: refused for safety
	KindNoOpenFence                // 9: nothing to acknowledge
)

// Error is a refusal by a sub-machine or by the way to it. It is part of the
// replicated outcome, so it holds only values computed from the command and the
// state, and survives JSON.
type Error struct {
	Kind   ErrKind `json:"kind"`
	Op     string  `json:"op,omitempty"`     // "evict", "create volume"
	Object string  `json:"object,omitempty"` // what it was about: a name, a uuid
	Why    string  `json:"why"`
	Next   string  `json:"next,omitempty"` // the next command, where there is one
}

// Error is "op object: why; next".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Object != "" {
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(e.Object)
	}
	if b.Len() > 0 {
		b.WriteString(": ")
	}
	b.WriteString(e.Why)
	if e.Next != "" {
		b.WriteString("; ")
		b.WriteString(e.Next)
	}
	return b.String()
}

// Is makes errors.Is(err, ErrNotFound) true for every error of that kind.
// KindNoOpenFence is also ErrRefused, and KindExists is also ErrConflict,
// because callers that only map to exit codes do not tell them apart.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	if !ok || t.Op != "" || t.Object != "" {
		return false
	}
	switch {
	case t.Kind == e.Kind:
		return true
	case t.Kind == KindRefused:
		return e.Kind == KindNoOpenFence
	case t.Kind == KindConflict:
		return e.Kind == KindExists
	}
	return false
}

// Sentinels for errors.Is.
var (
	ErrInvalid     = &Error{Kind: KindInvalid, Why: "invalid"}
	ErrNotFound    = &Error{Kind: KindNotFound, Why: "not found"}
	ErrExists      = &Error{Kind: KindExists, Why: "exists"}
	ErrConflict    = &Error{Kind: KindConflict, Why: "conflict"}
	ErrNoQuorum    = &Error{Kind: KindNoQuorum, Why: "no quorum"}
	ErrTimeout     = &Error{Kind: KindTimeout, Why: "timed out, outcome unknown"}
	ErrDenied      = &Error{Kind: KindDenied, Why: "denied"}
	ErrUnreachable = &Error{Kind: KindUnreachable, Why: "unreachable"}
	ErrRefused     = &Error{Kind: KindRefused, Why: "refused for safety"}
	ErrNoOpenFence = &Error{Kind: KindNoOpenFence, Why: "no open fence"}
)

// ExitCode maps an error to the exit code of clusteradm, 0 for nil.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	var e *Error
	if !errors.As(err, &e) {
		return 1
	}
	switch e.Kind {
	case KindInvalid:
		return 2
	case KindNotFound:
		return 3
	case KindExists, KindConflict:
		return 4
	case KindNoQuorum:
		return 5
	case KindTimeout:
		return 6
	case KindDenied:
		return 7
	case KindUnreachable:
		return 8
	case KindRefused, KindNoOpenFence:
		return 9
	default:
		return 1
	}
}
