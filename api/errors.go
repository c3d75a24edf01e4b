package api

import (
	"errors"
	"fmt"
)

// Code is the machine-readable reason of an error. Codes are only ever appended.
type Code string

// The codes, with the exit status that clusteradm ends with (docs/cli.md).
const (
	CodeInternal    Code = "internal"    // 1
	CodeUsage       Code = "usage"       // 2
	CodeNotFound    Code = "not_found"   // 3
	CodeExists      Code = "exists"      // 4
	CodeConflict    Code = "conflict"    // 4
	CodeNoQuorum    Code = "no_quorum"   // 5
	CodeTimeout     Code = "timeout"     // 6
	CodeDenied      Code = "denied"      // 7
	CodeUnreachable Code = "unreachable" // 8
	CodeRefused     Code = "refused"     // 9: refused for safety
)

// Exit gives the exit status of a code.
func (c Code) Exit() int {
	switch c {
	case CodeUsage:
		return 2
	case CodeNotFound:
		return 3
	case CodeExists, CodeConflict:
		return 4
	case CodeNoQuorum:
		return 5
	case CodeTimeout:
		return 6
	case CodeDenied:
		return 7
	case CodeUnreachable:
		return 8
	case CodeRefused:
		return 9
	}
	return 1
}

// HTTP gives the status that carries a code over HTTP.
func (c Code) HTTP() int {
	switch c {
	case CodeUsage:
		return 400
	case CodeNotFound:
		return 404
	case CodeExists, CodeConflict:
		return 409
	case CodeNoQuorum, CodeUnreachable:
		return 503
	case CodeTimeout:
		return 504
	case CodeDenied:
		return 403
	case CodeRefused:
		return 412
	}
	return 500
}

// Error is what a user is told: what failed, why, and what to do next.
type Error struct {
	Code    Code   `json:"code" yaml:"code"`
	Message string `json:"message" yaml:"message"`               // what and why, lowercase
	Next    string `json:"next,omitempty" yaml:"next,omitempty"` // the next command to type
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error.
func Errorf(c Code, next, format string, a ...any) *Error {
	return &Error{Code: c, Message: fmt.Sprintf(format, a...), Next: next}
}

// AsError finds the Error in err, or wraps err as internal.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Code: CodeInternal, Message: err.Error()}
}

// ErrorBody is the document of a failed request.
type ErrorBody struct {
	APIVersion string `json:"apiVersion"`
	Error      *Error `json:"error"`
}
