package scsi

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Status is the status byte of a command (SAM-5 5.3).
type Status uint8

// Statuses.
const (
	StatusGood                Status = 0x00
	StatusCheckCondition      Status = 0x02
	StatusConditionMet        Status = 0x04
	StatusBusy                Status = 0x08
	StatusReservationConflict Status = 0x18
	StatusTaskSetFull         Status = 0x28
	StatusACAActive           Status = 0x30
	StatusTaskAborted         Status = 0x40
)

func (s Status) String() string {
	switch s {
	case StatusGood:
		return "GOOD"
	case StatusCheckCondition:
		return "CHECK CONDITION"
	case StatusConditionMet:
		return "CONDITION MET"
	case StatusBusy:
		return "BUSY"
	case StatusReservationConflict:
		return "RESERVATION CONFLICT"
	case StatusTaskSetFull:
		return "TASK SET FULL"
	case StatusACAActive:
		return "ACA ACTIVE"
	case StatusTaskAborted:
		return "TASK ABORTED"
	}
	return fmt.Sprintf("status %02xh", uint8(s))
}

// Key is a sense key (SPC-4 table 44).
type Key uint8

// Sense keys.
const (
	NoSense        Key = 0x0
	RecoveredError Key = 0x1
	NotReady       Key = 0x2
	MediumError    Key = 0x3
	HardwareError  Key = 0x4
	IllegalRequest Key = 0x5
	UnitAttention  Key = 0x6
	DataProtect    Key = 0x7
	BlankCheck     Key = 0x8
	CopyAborted    Key = 0xA
	AbortedCommand Key = 0xB
	Miscompare     Key = 0xE
	Completed      Key = 0xF
)

var keyNames = [16]string{
	"NO SENSE", "RECOVERED ERROR", "NOT READY", "MEDIUM ERROR", "HARDWARE ERROR", "ILLEGAL REQUEST",
	"UNIT ATTENTION", "DATA PROTECT", "BLANK CHECK", "VENDOR SPECIFIC", "COPY ABORTED", "ABORTED COMMAND", "reserved", "VOLUME OVERFLOW", "MISCOMPARE", "COMPLETED",
}

func (k Key) String() string { return keyNames[k&0xF] }

// ASC is an additional sense code (high byte) with its qualifier (low byte)
// (SPC-4 annex D.2).
type ASC uint16

// Additional sense codes in use.
const (
	ASCNone                    ASC = 0x0000
	ASCSanitizeInProgress      ASC = 0x041B
	ASCNotReady                ASC = 0x0400
	ASCBecomingReady           ASC = 0x0401
	ASCInitializingRequired    ASC = 0x0402
	ASCFormatInProgress        ASC = 0x0404
	ASCTransition              ASC = 0x040A
	ASCStandby                 ASC = 0x040B
	ASCUnavailable             ASC = 0x040C
	ASCWriteError              ASC = 0x0C00
	ASCUnexpectedUnsolicited   ASC = 0x0C0C
	ASCNotEnoughUnsolicited    ASC = 0x0C0D
	ASCThirdPartyFailure       ASC = 0x0D01
	ASCCopyTargetUnreachable   ASC = 0x0D02
	ASCReadError               ASC = 0x1100
	ASCReadRetransmit          ASC = 0x1113 // SNACK refused (RFC 7143 11.4.7.2)
	ASCParamListLength         ASC = 0x1A00
	ASCMiscompare              ASC = 0x1D00
	ASCInvalidOpcode           ASC = 0x2000
	ASCLBAOutOfRange           ASC = 0x2100
	ASCInvalidFieldCDB         ASC = 0x2400
	ASCLUNotSupported          ASC = 0x2500
	ASCInvalidFieldParam       ASC = 0x2600
	ASCParamNotSupported       ASC = 0x2601
	ASCParamValueInvalid       ASC = 0x2602
	ASCInvalidRelease          ASC = 0x2604
	ASCTooManyTargetDesc       ASC = 0x2606
	ASCUnsupportedTargetDesc   ASC = 0x2607
	ASCTooManySegmentDesc      ASC = 0x2608
	ASCUnsupportedSegmentDesc  ASC = 0x2609
	ASCInexactSegment          ASC = 0x260A
	ASCWriteProtected          ASC = 0x2700
	ASCSpaceAllocationFailed   ASC = 0x2707
	ASCMediumChanged           ASC = 0x2800
	ASCPowerOn                 ASC = 0x2900
	ASCPowerOnOccurred         ASC = 0x2901
	ASCBusReset                ASC = 0x2902
	ASCDeviceReset             ASC = 0x2903
	ASCNexusLoss               ASC = 0x2907
	ASCModeChanged             ASC = 0x2A01
	ASCReservationsPreempted   ASC = 0x2A03
	ASCReservationsReleased    ASC = 0x2A04
	ASCRegistrationsPreempted  ASC = 0x2A05
	ASCAsymmetricAccessChanged ASC = 0x2A06
	ASCCapacityChanged         ASC = 0x2A09
	ASCCommandsCleared         ASC = 0x2F00
	ASCThinThreshold           ASC = 0x3807
	ASCSavingNotSupported      ASC = 0x3900
	ASCMediumNotPresent        ASC = 0x3A00
	ASCTrayOpen                ASC = 0x3A02
	ASCInquiryChanged          ASC = 0x3F03
	ASCReportedLunsChanged     ASC = 0x3F0E
	ASCInternalFailure         ASC = 0x4400
	ASCInvalidMessage          ASC = 0x4900
	ASCAbortedTMF              ASC = 0x4500 // SELECT OR RESELECT FAILURE
	ASCProtocolCRC             ASC = 0x4705
	ASCDataPhase               ASC = 0x4B00
	ASCInvalidTTT              ASC = 0x4B01
	ASCTooMuchWriteData        ASC = 0x4B02
	ASCDataOffset              ASC = 0x4B05
	ASCOverlapped              ASC = 0x4E00
	ASCFormatFailed            ASC = 0x3101
	ASCSanitizeFailed          ASC = 0x3103
	ASCRemovalPrevented        ASC = 0x5302
	ASCNoResources             ASC = 0x5503
	ASCNoRegistration          ASC = 0x5504 // INSUFFICIENT REGISTRATION RESOURCES
)

var ascNames = map[ASC]string{
	ASCNone:                    "NO ADDITIONAL SENSE INFORMATION",
	ASCNotReady:                "LOGICAL UNIT NOT READY, CAUSE NOT REPORTABLE",
	ASCBecomingReady:           "LOGICAL UNIT IS IN PROCESS OF BECOMING READY",
	ASCInitializingRequired:    "LOGICAL UNIT NOT READY, INITIALIZING COMMAND REQUIRED",
	ASCFormatInProgress:        "LOGICAL UNIT NOT READY, FORMAT IN PROGRESS",
	ASCTransition:              "LOGICAL UNIT NOT ACCESSIBLE, ASYMMETRIC ACCESS STATE TRANSITION",
	ASCStandby:                 "LOGICAL UNIT NOT ACCESSIBLE, TARGET PORT IN STANDBY STATE",
	ASCUnavailable:             "LOGICAL UNIT NOT ACCESSIBLE, TARGET PORT IN UNAVAILABLE STATE",
	ASCSanitizeInProgress:      "LOGICAL UNIT NOT READY, SANITIZE IN PROGRESS",
	ASCWriteError:              "WRITE ERROR",
	ASCUnexpectedUnsolicited:   "WRITE ERROR - UNEXPECTED UNSOLICITED DATA",
	ASCNotEnoughUnsolicited:    "WRITE ERROR - NOT ENOUGH UNSOLICITED DATA",
	ASCThirdPartyFailure:       "THIRD PARTY DEVICE FAILURE",
	ASCCopyTargetUnreachable:   "COPY TARGET DEVICE NOT REACHABLE",
	ASCReadError:               "UNRECOVERED READ ERROR",
	ASCReadRetransmit:          "READ ERROR - FAILED RETRANSMISSION REQUEST",
	ASCParamListLength:         "PARAMETER LIST LENGTH ERROR",
	ASCMiscompare:              "MISCOMPARE DURING VERIFY OPERATION",
	ASCInvalidOpcode:           "INVALID COMMAND OPERATION CODE",
	ASCLBAOutOfRange:           "LOGICAL BLOCK ADDRESS OUT OF RANGE",
	ASCInvalidFieldCDB:         "INVALID FIELD IN CDB",
	ASCLUNotSupported:          "LOGICAL UNIT NOT SUPPORTED",
	ASCInvalidFieldParam:       "INVALID FIELD IN PARAMETER LIST",
	ASCParamNotSupported:       "PARAMETER NOT SUPPORTED",
	ASCParamValueInvalid:       "PARAMETER VALUE INVALID",
	ASCInvalidRelease:          "INVALID RELEASE OF PERSISTENT RESERVATION",
	ASCTooManyTargetDesc:       "TOO MANY TARGET DESCRIPTORS",
	ASCUnsupportedTargetDesc:   "UNSUPPORTED TARGET DESCRIPTOR TYPE CODE",
	ASCTooManySegmentDesc:      "TOO MANY SEGMENT DESCRIPTORS",
	ASCUnsupportedSegmentDesc:  "UNSUPPORTED SEGMENT DESCRIPTOR TYPE CODE",
	ASCInexactSegment:          "UNEXPECTED INEXACT SEGMENT",
	ASCWriteProtected:          "WRITE PROTECTED",
	ASCSpaceAllocationFailed:   "SPACE ALLOCATION FAILED WRITE PROTECT",
	ASCMediumChanged:           "NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED",
	ASCPowerOn:                 "POWER ON, RESET, OR BUS DEVICE RESET OCCURRED",
	ASCPowerOnOccurred:         "POWER ON OCCURRED",
	ASCBusReset:                "SCSI BUS RESET OCCURRED",
	ASCDeviceReset:             "BUS DEVICE RESET FUNCTION OCCURRED",
	ASCNexusLoss:               "I_T NEXUS LOSS OCCURRED",
	ASCModeChanged:             "MODE PARAMETERS CHANGED",
	ASCReservationsPreempted:   "RESERVATIONS PREEMPTED",
	ASCReservationsReleased:    "RESERVATIONS RELEASED",
	ASCRegistrationsPreempted:  "REGISTRATIONS PREEMPTED",
	ASCAsymmetricAccessChanged: "ASYMMETRIC ACCESS STATE CHANGED",
	ASCCapacityChanged:         "CAPACITY DATA HAS CHANGED",
	ASCCommandsCleared:         "COMMANDS CLEARED BY ANOTHER INITIATOR",
	ASCThinThreshold:           "THIN PROVISIONING SOFT THRESHOLD REACHED",
	ASCSavingNotSupported:      "SAVING PARAMETERS NOT SUPPORTED",
	ASCMediumNotPresent:        "MEDIUM NOT PRESENT",
	ASCTrayOpen:                "MEDIUM NOT PRESENT - TRAY OPEN",
	ASCInquiryChanged:          "INQUIRY DATA HAS CHANGED",
	ASCReportedLunsChanged:     "REPORTED LUNS DATA HAS CHANGED",
	ASCInternalFailure:         "INTERNAL TARGET FAILURE",
	ASCInvalidMessage:          "INVALID MESSAGE ERROR",
	ASCAbortedTMF:              "SELECT OR RESELECT FAILURE",
	ASCProtocolCRC:             "PROTOCOL SERVICE CRC ERROR",
	ASCDataPhase:               "DATA PHASE ERROR",
	ASCInvalidTTT:              "INVALID TARGET PORT TRANSFER TAG RECEIVED",
	ASCTooMuchWriteData:        "TOO MUCH WRITE DATA",
	ASCDataOffset:              "DATA OFFSET ERROR",
	ASCOverlapped:              "OVERLAPPED COMMANDS ATTEMPTED",
	ASCFormatFailed:            "FORMAT COMMAND FAILED",
	ASCSanitizeFailed:          "SANITIZE COMMAND FAILED",
	ASCRemovalPrevented:        "MEDIUM REMOVAL PREVENTED",
	ASCNoResources:             "INSUFFICIENT RESOURCES",
	ASCNoRegistration:          "INSUFFICIENT REGISTRATION RESOURCES",
}

func (a ASC) String() string {
	if n, ok := ascNames[a]; ok {
		return n
	}
	return fmt.Sprintf("additional sense %02xh/%02xh", uint8(a>>8), uint8(a))
}

// FieldPointer is the sense-key specific data of ILLEGAL REQUEST (SPC-4
// 4.5.2.4.2).
type FieldPointer struct {
	InCDB bool   // C/D: in the CDB, else in the parameter data
	Byte  uint16 // offset of the field's first byte
	Bit   int8   // most significant bit of the field in that byte, -1 = not told
}

// Sense is decoded sense data. It is also the error that a device server
// returns for CHECK CONDITION.
type Sense struct {
	Key      Key
	Code     ASC
	Deferred bool

	HasInfo bool
	Info    uint64 // INFORMATION: an LBA or a byte offset
	HasCmd  bool
	CmdInfo uint64 // COMMAND-SPECIFIC INFORMATION

	Pointer     *FieldPointer // nil = none; only with ILLEGAL REQUEST
	HasProgress bool
	Progress    uint16 // numerator of /65536, with NO SENSE and NOT READY
}

// Check is a Sense without further fields.
func Check(k Key, code ASC) *Sense { return &Sense{Key: k, Code: code} }

// InvalidField is 05/24/00 with a pointer to field id of c.
func InvalidField(c *CDB, id FieldID) *Sense {
	p := c.Pointer(id)
	return &Sense{Key: IllegalRequest, Code: ASCInvalidFieldCDB, Pointer: &p}
}

// InvalidParam is 05/26/00 with a pointer to a byte and bit (-1 = none) of the
// parameter list.
func InvalidParam(byteOff int, bit int8) *Sense {
	return &Sense{Key: IllegalRequest, Code: ASCInvalidFieldParam, Pointer: &FieldPointer{Byte: uint16(byteOff), Bit: bit}}
}

// Error describes the sense as "KEY: CODE (kk/aa/qq)".
func (s *Sense) Error() string {
	e := fmt.Sprintf("%s: %s (%02x/%02x/%02x)", s.Key, s.Code, uint8(s.Key), uint8(s.Code>>8), uint8(s.Code))
	if s.HasInfo {
		e += fmt.Sprintf(", information %d", s.Info)
	}
	if p := s.Pointer; p != nil {
		where := "parameter list"
		if p.InCDB {
			where = "cdb"
		}
		e += fmt.Sprintf(", %s byte %d", where, p.Byte)
		if p.Bit >= 0 {
			e += fmt.Sprintf(" bit %d", p.Bit)
		}
	}
	return e
}

func (s *Sense) sks() (b [3]byte, ok bool) {
	switch {
	case s.Pointer != nil:
		b[0] = 0x80
		if s.Pointer.InCDB {
			b[0] |= 0x40
		}
		if s.Pointer.Bit >= 0 {
			b[0] |= 0x08 | byte(s.Pointer.Bit)&7
		}
		binary.BigEndian.PutUint16(b[1:], s.Pointer.Byte)
		return b, true
	case s.HasProgress:
		b[0] = 0x80
		binary.BigEndian.PutUint16(b[1:], s.Progress)
		return b, true
	}
	return b, false
}

func (s *Sense) setSKS(b []byte) {
	if b[0]&0x80 == 0 {
		return
	}
	switch s.Key {
	case IllegalRequest:
		p := FieldPointer{InCDB: b[0]&0x40 != 0, Byte: binary.BigEndian.Uint16(b[1:]), Bit: -1}
		if b[0]&0x08 != 0 {
			p.Bit = int8(b[0] & 7)
		}
		s.Pointer = &p
	case NoSense, NotReady:
		s.HasProgress, s.Progress = true, binary.BigEndian.Uint16(b[1:])
	}
}

// FixedLen is the length of fixed format sense data as Fixed builds it.
const FixedLen = 18

// Fixed is fixed format sense data, response codes 70h and 71h (SPC-4 4.5.3).
// An INFORMATION that does not fit 32 bits is left out with VALID = 0.
func (s *Sense) Fixed() []byte {
	b := make([]byte, FixedLen)
	b[0] = 0x70
	if s.Deferred {
		b[0] = 0x71
	}
	b[2] = byte(s.Key)
	if s.HasInfo && s.Info <= 0xFFFFFFFF {
		b[0] |= 0x80
		binary.BigEndian.PutUint32(b[3:], uint32(s.Info))
	}
	b[7] = FixedLen - 8
	if s.HasCmd && s.CmdInfo <= 0xFFFFFFFF {
		binary.BigEndian.PutUint32(b[8:], uint32(s.CmdInfo))
	}
	binary.BigEndian.PutUint16(b[12:], uint16(s.Code))
	if k, ok := s.sks(); ok {
		copy(b[15:], k[:])
	}
	return b
}

// Descriptor is descriptor format sense data, response codes 72h and 73h (SPC-4
// 4.5.2).
func (s *Sense) Descriptor() []byte {
	b := make([]byte, 8, 40)
	b[0] = 0x72
	if s.Deferred {
		b[0] = 0x73
	}
	b[1] = byte(s.Key)
	binary.BigEndian.PutUint16(b[2:], uint16(s.Code))
	if s.HasInfo {
		b = append(b, 0x00, 0x0A, 0x80, 0)
		b = binary.BigEndian.AppendUint64(b, s.Info)
	}
	if s.HasCmd {
		b = append(b, 0x01, 0x0A, 0, 0)
		b = binary.BigEndian.AppendUint64(b, s.CmdInfo)
	}
	if k, ok := s.sks(); ok {
		b = append(b, 0x02, 0x06, 0, 0, k[0], k[1], k[2], 0)
	}
	b[7] = byte(len(b) - 8)
	return b
}

// Bytes is the sense data in the format that the D_SENSE bit of the control
// mode page asks for.
func (s *Sense) Bytes(descriptor bool) []byte {
	if descriptor {
		return s.Descriptor()
	}
	return s.Fixed()
}

// ErrSense tells that sense data could not be read.
var ErrSense = errors.New("malformed sense data")

// ParseSense reads fixed and descriptor format sense data. Trailing bytes are
// ignored; truncated fixed data (as a short allocation length leaves it) is
// read as far as it goes, at least to the sense key.
func ParseSense(b []byte) (*Sense, error) {
	if len(b) < 1 {
		return nil, fmt.Errorf("parse sense: %w: empty", ErrSense)
	}
	s := &Sense{Deferred: b[0]&1 != 0}
	switch b[0] & 0x7F {
	case 0x70, 0x71:
		if len(b) < 3 {
			return nil, fmt.Errorf("parse sense: %w: %d bytes", ErrSense, len(b))
		}
		var full [FixedLen]byte
		n := len(b)
		if n > 8 {
			n = min(n, 8+int(b[7]))
		}
		copy(full[:], b[:n])
		s.Key = Key(full[2] & 0xF)
		if full[0]&0x80 != 0 {
			s.HasInfo, s.Info = true, uint64(binary.BigEndian.Uint32(full[3:]))
		}
		if c := binary.BigEndian.Uint32(full[8:]); c != 0 {
			s.HasCmd, s.CmdInfo = true, uint64(c)
		}
		s.Code = ASC(binary.BigEndian.Uint16(full[12:]))
		s.setSKS(full[15:18])
	case 0x72, 0x73:
		if len(b) < 8 {
			return nil, fmt.Errorf("parse sense: %w: %d bytes", ErrSense, len(b))
		}
		s.Key = Key(b[1] & 0xF)
		s.Code = ASC(binary.BigEndian.Uint16(b[2:]))
		d := b[8:min(len(b), 8+int(b[7]))]
		for len(d) >= 2 {
			n := 2 + int(d[1])
			if n > len(d) {
				break
			}
			switch {
			case d[0] == 0 && n >= 12 && d[2]&0x80 != 0:
				s.HasInfo, s.Info = true, binary.BigEndian.Uint64(d[4:])
			case d[0] == 1 && n >= 12:
				s.HasCmd, s.CmdInfo = true, binary.BigEndian.Uint64(d[4:])
			case d[0] == 2 && n >= 8:
				s.setSKS(d[4:7])
			}
			d = d[n:]
		}
	default:
		return nil, fmt.Errorf("parse sense: %w: response code %02xh", ErrSense, b[0]&0x7F)
	}
	return s, nil
}
