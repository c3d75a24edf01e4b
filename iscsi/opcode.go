package iscsi

import "fmt"

// Opcode is the type of a PDU (RFC 7143 §11.2.1.2). Bits 6 and 7 of the byte on
// the wire (immediate delivery, reserved) are not part of it.
type Opcode uint8

// Opcodes. Those of initiators are below 0x20, those of targets from 0x20.
const (
	OpNopOut       Opcode = 0x00
	OpScsiCommand  Opcode = 0x01
	OpTaskMgmtReq  Opcode = 0x02
	OpLoginReq     Opcode = 0x03
	OpTextReq      Opcode = 0x04
	OpDataOut      Opcode = 0x05
	OpLogoutReq    Opcode = 0x06
	OpSNACK        Opcode = 0x10
	OpNopIn        Opcode = 0x20
	OpScsiResponse Opcode = 0x21
	OpTaskMgmtResp Opcode = 0x22
	OpLoginResp    Opcode = 0x23
	OpTextResp     Opcode = 0x24
	OpDataIn       Opcode = 0x25
	OpLogoutResp   Opcode = 0x26
	OpR2T          Opcode = 0x31
	OpAsync        Opcode = 0x32
	OpReject       Opcode = 0x3f
)

// PDU is one of the typed structs of this package.
//
// Encode writes all 48 bytes of the header, except TotalAHSLength and
// DataSegmentLength, which it leaves zero: the Writer knows them. Decode reads a
// header whose opcode is the struct's; it ignores reserved bits and fields, as
// §11 demands, and returns a *ProtocolError for what no receiver can act upon.
// Additional header segments and the data segment are not part of the struct.
type PDU interface {
	Opcode() Opcode
	Encode(*BHS)
	Decode(*BHS) error
}

// opInfo is one row of the opcode table.
type opInfo struct {
	name   string
	sender Role
	// immediate: the I bit may be set (requests other than Data-Out and SNACK)
	immediate bool
	ahs       bool // additional header segments are defined for it
	data      bool // a data segment is defined for it
	new       func() PDU
}

var opTable = [64]opInfo{
	OpNopOut:       {"NOP-Out", Initiator, true, false, true, func() PDU { return new(NopOut) }},
	OpScsiCommand:  {"SCSI Command", Initiator, true, true, true, func() PDU { return new(ScsiCommand) }},
	OpTaskMgmtReq:  {"Task Management Function Request", Initiator, true, false, false, func() PDU { return new(TaskMgmtRequest) }},
	OpLoginReq:     {"Login Request", Initiator, true, false, true, func() PDU { return new(LoginRequest) }},
	OpTextReq:      {"Text Request", Initiator, true, false, true, func() PDU { return new(TextRequest) }},
	OpDataOut:      {"SCSI Data-Out", Initiator, false, false, true, func() PDU { return new(DataOut) }},
	OpLogoutReq:    {"Logout Request", Initiator, true, false, false, func() PDU { return new(LogoutRequest) }},
	OpSNACK:        {"SNACK Request", Initiator, false, false, false, func() PDU { return new(SNACK) }},
	OpNopIn:        {"NOP-In", Target, false, false, true, func() PDU { return new(NopIn) }},
	OpScsiResponse: {"SCSI Response", Target, false, false, true, func() PDU { return new(ScsiResponse) }},
	OpTaskMgmtResp: {"Task Management Function Response", Target, false, false, false, func() PDU { return new(TaskMgmtResponse) }},
	OpLoginResp:    {"Login Response", Target, false, false, true, func() PDU { return new(LoginResponse) }},
	OpTextResp:     {"Text Response", Target, false, false, true, func() PDU { return new(TextResponse) }},
	OpDataIn:       {"SCSI Data-In", Target, false, false, true, func() PDU { return new(DataIn) }},
	OpLogoutResp:   {"Logout Response", Target, false, false, false, func() PDU { return new(LogoutResponse) }},
	OpR2T:          {"Ready To Transfer", Target, false, false, false, func() PDU { return new(R2T) }},
	OpAsync:        {"Asynchronous Message", Target, false, false, true, func() PDU { return new(Async) }},
	OpReject:       {"Reject", Target, false, false, true, func() PDU { return new(Reject) }},
}

// Known tells whether the opcode is one of RFC 7143.
func (o Opcode) Known() bool { return int(o) < len(opTable) && opTable[o].new != nil }

// FromInitiator tells whether initiators send the opcode: below 0x20, known or not.
func (o Opcode) FromInitiator() bool { return o < 0x20 }

// MayHaveData tells whether a data segment is defined for the opcode.
func (o Opcode) MayHaveData() bool { return o.Known() && opTable[o].data }

// MayHaveAHS tells whether additional header segments are defined for the opcode.
func (o Opcode) MayHaveAHS() bool { return o.Known() && opTable[o].ahs }

// MayBeImmediate tells whether the I bit is defined for the opcode.
func (o Opcode) MayBeImmediate() bool { return o.Known() && opTable[o].immediate }

func (o Opcode) String() string {
	if o.Known() {
		return opTable[o].name
	}
	return fmt.Sprintf("opcode %#02x", uint8(o))
}

// New returns an empty struct for the opcode, or a ProtocolError with
// RejectUnsupported for one that RFC 7143 does not define.
func New(o Opcode) (PDU, error) {
	if !o.Known() {
		return nil, &ProtocolError{Reason: RejectUnsupported, Opcode: o, Why: "opcode is not defined"}
	}
	return opTable[o].new(), nil
}

// DecodePDU returns the typed struct for b. It allocates; hot paths call Decode of
// a struct of their own.
func DecodePDU(b *BHS) (PDU, error) {
	p, err := New(b.Opcode())
	if err != nil {
		return nil, err
	}
	if err := p.Decode(b); err != nil {
		return nil, err
	}
	return p, nil
}

// Role is an end of a connection.
type Role uint8

// The two ends.
const (
	Initiator Role = iota + 1
	Target
)

func (r Role) String() string {
	switch r {
	case Initiator:
		return "initiator"
	case Target:
		return "target"
	}
	return "nobody"
}

// ProtocolError is a PDU that breaks the standard. Reason is what a target would
// put in a Reject; Fatal tells that the byte stream cannot be followed further, so
// that the connection has to be closed (§7.7, format errors).
type ProtocolError struct {
	Reason RejectReason
	Opcode Opcode
	Fatal  bool
	Why    string
}

func (e *ProtocolError) Error() string { return e.Opcode.String() + ": " + e.Why }
