package iscsi

import "fmt"

// Stage is a stage of the login phase (§11.12.3).
type Stage uint8

// Stages. 2 is not used.
const (
	StageSecurity    Stage = 0
	StageOperational Stage = 1
	StageFull        Stage = 3 // full feature phase
)

func (s Stage) String() string {
	switch s {
	case StageSecurity:
		return "security negotiation"
	case StageOperational:
		return "operational negotiation"
	case StageFull:
		return "full feature phase"
	}
	return fmt.Sprintf("stage %d", uint8(s))
}

// LoginStatus is status class (high byte) and detail (low byte) of a login response
// (§11.13.5).
type LoginStatus uint16

// Login statuses.
const (
	StatusSuccess            LoginStatus = 0x0000
	StatusMovedTemporarily   LoginStatus = 0x0101
	StatusMovedPermanently   LoginStatus = 0x0102
	StatusInitiatorError     LoginStatus = 0x0200
	StatusAuthFailure        LoginStatus = 0x0201
	StatusForbidden          LoginStatus = 0x0202
	StatusNotFound           LoginStatus = 0x0203
	StatusTargetRemoved      LoginStatus = 0x0204
	StatusUnsupportedVersion LoginStatus = 0x0205
	StatusTooManyConnections LoginStatus = 0x0206
	StatusMissingParameter   LoginStatus = 0x0207
	StatusCannotInclude      LoginStatus = 0x0208
	StatusSessionType        LoginStatus = 0x0209
	StatusNoSession          LoginStatus = 0x020a
	StatusInvalidDuringLogin LoginStatus = 0x020b
	StatusTargetError        LoginStatus = 0x0300
	StatusServiceUnavailable LoginStatus = 0x0301
	StatusOutOfResources     LoginStatus = 0x0302
)

var statusNames = map[LoginStatus]string{
	StatusSuccess:            "success",
	StatusMovedTemporarily:   "target moved temporarily",
	StatusMovedPermanently:   "target moved permanently",
	StatusInitiatorError:     "initiator error",
	StatusAuthFailure:        "authentication failure",
	StatusForbidden:          "authorization failure",
	StatusNotFound:           "target not found",
	StatusTargetRemoved:      "target removed",
	StatusUnsupportedVersion: "unsupported version",
	StatusTooManyConnections: "too many connections",
	StatusMissingParameter:   "missing parameter",
	StatusCannotInclude:      "cannot include connection in session",
	StatusSessionType:        "session type not supported",
	StatusNoSession:          "session does not exist",
	StatusInvalidDuringLogin: "invalid request during login",
	StatusTargetError:        "target error",
	StatusServiceUnavailable: "service unavailable",
	StatusOutOfResources:     "out of resources",
}

// Class is the status class: 0 success, 1 redirection, 2 initiator error, 3 target
// error.
func (s LoginStatus) Class() uint8 { return uint8(s >> 8) }

// Detail is the status detail.
func (s LoginStatus) Detail() uint8 { return uint8(s) }

func (s LoginStatus) String() string {
	n := statusNames[s]
	if n == "" {
		n = [...]string{"success", "redirection", "initiator error", "target error", "login status"}[min(s.Class(), 4)]
	}
	return fmt.Sprintf("%s (%d/%d)", n, s.Class(), s.Detail())
}

// LoginError is a login that failed, on either side.
type LoginError struct {
	Status LoginStatus
	// Address is the TargetAddress of a redirection.
	Address string
	Why     string

	reply []Pair // what the failing response says besides the status
}

func (e *LoginError) Error() string {
	s := "login: " + e.Status.String()
	if e.Address != "" {
		s += " to " + e.Address
	}
	if e.Why != "" {
		s += ": " + e.Why
	}
	return s
}

// Limits of a login (§6.3 leaves them to us). The time limit is the caller's.
const (
	MaxLoginPDUs = 32 // requests of one login, C-bit continuation included
	MaxLoginText = MaxText
)
