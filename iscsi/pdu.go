package iscsi

import (
	"encoding/binary"
	"fmt"
)

// BHSLen is the length of a basic header segment in bytes.
const BHSLen = 48

// ReservedTag is the value of a task tag that names no task (§11.2.1.8).
const ReservedTag uint32 = 0xffffffff

// MaxDataSegment is the largest DataSegmentLength that 24 bits hold.
const MaxDataSegment = 1<<24 - 1

// BHS is a basic header segment (§11.2.1).
//
//	byte 0   .|I|opcode    4     TotalAHSLength (words)    16-19 initiator task tag
//	byte 1   F|specific    5-7   DataSegmentLength         20-47 specific
//	2-3      specific      8-15  LUN or specific
type BHS [BHSLen]byte

// Opcode of the PDU.
func (b *BHS) Opcode() Opcode { return Opcode(b[0] & 0x3f) }

// Immediate is the I bit: the PDU is for immediate delivery.
func (b *BHS) Immediate() bool { return b[0]&0x40 != 0 }

// Final is the F bit (T in login).
func (b *BHS) Final() bool { return b[1]&0x80 != 0 }

// AHSLen is the length of all additional header segments in bytes.
func (b *BHS) AHSLen() int { return int(b[4]) * 4 }

// DataLen is DataSegmentLength in bytes, without padding.
func (b *BHS) DataLen() int { return int(b[5])<<16 | int(b[6])<<8 | int(b[7]) }

// LUN is bytes 8-15.
func (b *BHS) LUN() LUN { return LUN(binary.BigEndian.Uint64(b[8:])) }

// ITT is the initiator task tag.
func (b *BHS) ITT() uint32 { return binary.BigEndian.Uint32(b[16:]) }

// CmdSN is bytes 24-27, which hold CmdSN in requests that have one and StatSN in
// responses.
func (b *BHS) CmdSN() Serial { return Serial(binary.BigEndian.Uint32(b[24:])) }

// ExpStatSN is bytes 28-31 of a request.
func (b *BHS) ExpStatSN() Serial { return Serial(binary.BigEndian.Uint32(b[28:])) }

// SetAHSLen sets TotalAHSLength; n is in bytes, a multiple of 4 up to 1020.
func (b *BHS) SetAHSLen(n int) { b[4] = byte(n / 4) }

// SetDataLen sets DataSegmentLength in bytes.
func (b *BHS) SetDataLen(n int) { b[5], b[6], b[7] = byte(n>>16), byte(n>>8), byte(n) }

func (b *BHS) u16(o int) uint16        { return binary.BigEndian.Uint16(b[o:]) }
func (b *BHS) u32(o int) uint32        { return binary.BigEndian.Uint32(b[o:]) }
func (b *BHS) put16(o int, v uint16)   { binary.BigEndian.PutUint16(b[o:], v) }
func (b *BHS) put32(o int, v uint32)   { binary.BigEndian.PutUint32(b[o:], v) }
func (b *BHS) putLUN(l LUN)            { binary.BigEndian.PutUint64(b[8:], uint64(l)) }
func (b *BHS) flag(o int, m byte) bool { return b[o]&m != 0 }

func (b *BHS) setFlag(o int, m byte, on bool) {
	if on {
		b[o] |= m
	}
}

// start clears the header and sets the opcode and the bit for immediate delivery.
func (b *BHS) start(o Opcode, immediate bool) {
	*b = BHS{}
	b[0] = byte(o)
	if immediate {
		b[0] |= 0x40
	}
}

// want checks that b is a PDU of opcode o.
func (b *BHS) want(o Opcode) error {
	if got := b.Opcode(); got != o {
		return &ProtocolError{Reason: RejectProtocolError, Opcode: got, Why: "decoded as " + o.String()}
	}
	return nil
}

// taskTag checks that the initiator task tag names a task.
func (b *BHS) taskTag() error {
	if b.ITT() == ReservedTag {
		return invalid(b.Opcode(), "initiator task tag is reserved value ffffffffh")
	}
	return nil
}

func invalid(o Opcode, why string) error {
	return &ProtocolError{Reason: RejectInvalidField, Opcode: o, Why: why}
}

// LUN is a logical unit number in the 8-byte form of SAM, big-endian.
type LUN uint64

// LUNOf returns LUN number n, 0-16383: peripheral addressing below 256, flat space
// from there, as initiators and REPORT LUNS use them (SAM-5 §4.7).
func LUNOf(n uint16) LUN {
	if n < 256 {
		return LUN(n) << 48
	}
	return LUN(0x4000|n&0x3fff) << 48
}

// Number returns the LUN number of a single-level LUN of peripheral (bus 0) or
// flat space addressing; ok is false for every other form.
func (l LUN) Number() (n uint16, ok bool) {
	v := uint16(l >> 48)
	if l&0xffffffffffff != 0 {
		return 0, false
	}
	switch v >> 14 {
	case 0: // peripheral: bus identifier must be 0
		return v & 0xff, v>>8 == 0
	case 1:
		return v & 0x3fff, true
	}
	return 0, false
}

func (l LUN) String() string {
	if n, ok := l.Number(); ok {
		return fmt.Sprintf("%d", n)
	}
	return fmt.Sprintf("%016x", uint64(l))
}

// Attr is the task attribute of a SCSI command (§11.3.1).
type Attr uint8

// Task attributes.
const (
	AttrUntagged Attr = 0
	AttrSimple   Attr = 1
	AttrOrdered  Attr = 2
	AttrHead     Attr = 3
	AttrACA      Attr = 4
)

// ScsiCommand is §11.3.
type ScsiCommand struct {
	Immediate   bool
	Final       bool // no unsolicited Data-Out follows
	Read, Write bool
	Attr        Attr
	LUN         LUN
	ITT         uint32
	EDTL        uint32 // expected data transfer length in bytes; of the write when bidirectional
	CmdSN       Serial
	ExpStatSN   Serial
	CDB         [16]byte // the first 16 bytes, zero-padded
	// From additional header segments (DecodeAHS, AppendAHS).
	ExtCDB   []byte // bytes 16.. of a long CDB; aliases the AHS it was decoded from
	Bidi     bool   // BidiEDTL was given
	BidiEDTL uint32 // expected bidirectional read data length
}

// Opcode of the PDU.
func (*ScsiCommand) Opcode() Opcode { return OpScsiCommand }

// Encode writes the header.
func (p *ScsiCommand) Encode(b *BHS) {
	b.start(OpScsiCommand, p.Immediate)
	b.setFlag(1, 0x80, p.Final)
	b.setFlag(1, 0x40, p.Read)
	b.setFlag(1, 0x20, p.Write)
	b[1] |= byte(p.Attr) & 7
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.EDTL)
	b.put32(24, uint32(p.CmdSN))
	b.put32(28, uint32(p.ExpStatSN))
	copy(b[32:], p.CDB[:])
}

// Decode reads the header; ExtCDB, Bidi and BidiEDTL are cleared, DecodeAHS sets
// them. F=0 with W=0 is refused (§11.3.1).
func (p *ScsiCommand) Decode(b *BHS) error {
	if err := b.want(OpScsiCommand); err != nil {
		return err
	}
	if err := b.taskTag(); err != nil {
		return err
	}
	p.Immediate = b.Immediate()
	p.Final = b.flag(1, 0x80)
	p.Read = b.flag(1, 0x40)
	p.Write = b.flag(1, 0x20)
	p.Attr = Attr(b[1] & 7)
	p.LUN = b.LUN()
	p.ITT = b.ITT()
	p.EDTL = b.u32(20)
	p.CmdSN = b.CmdSN()
	p.ExpStatSN = b.ExpStatSN()
	copy(p.CDB[:], b[32:])
	p.ExtCDB, p.Bidi, p.BidiEDTL = nil, false, 0
	if !p.Final && !p.Write {
		return invalid(OpScsiCommand, "F and W bits are both 0")
	}
	return nil
}

// Response is the iSCSI service response of a SCSI command (§11.4.3).
type Response uint8

// Service responses; 0x80-0xff are vendor specific.
const (
	ResponseCompleted     Response = 0x00
	ResponseTargetFailure Response = 0x01
)

// ScsiResponse is §11.4. Its data segment holds sense and response data, see
// AppendSense and ParseSense.
type ScsiResponse struct {
	BidiOverflow, BidiUnderflow bool // of the read part of a bidirectional command
	Overflow, Underflow         bool
	Response                    Response
	Status                      uint8 // SCSI status, valid when Response is ResponseCompleted
	ITT                         uint32
	SNACKTag                    uint32
	StatSN                      Serial
	ExpCmdSN                    Serial
	MaxCmdSN                    Serial
	ExpDataSN                   uint32 // number of Data-In (read) or R2T (write) PDUs sent
	BidiResidual                uint32 // bytes
	Residual                    uint32 // bytes
}

// Opcode of the PDU.
func (*ScsiResponse) Opcode() Opcode { return OpScsiResponse }

// Encode writes the header.
func (p *ScsiResponse) Encode(b *BHS) {
	b.start(OpScsiResponse, false)
	b[1] = 0x80
	b.setFlag(1, 0x10, p.BidiOverflow)
	b.setFlag(1, 0x08, p.BidiUnderflow)
	b.setFlag(1, 0x04, p.Overflow)
	b.setFlag(1, 0x02, p.Underflow)
	b[2], b[3] = byte(p.Response), p.Status
	b.put32(16, p.ITT)
	b.put32(20, p.SNACKTag)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
	b.put32(36, p.ExpDataSN)
	b.put32(40, p.BidiResidual)
	b.put32(44, p.Residual)
}

// Decode reads the header. O with U, or o with u, is refused (§11.4.5.1).
func (p *ScsiResponse) Decode(b *BHS) error {
	if err := b.want(OpScsiResponse); err != nil {
		return err
	}
	*p = ScsiResponse{
		BidiOverflow:  b.flag(1, 0x10),
		BidiUnderflow: b.flag(1, 0x08),
		Overflow:      b.flag(1, 0x04),
		Underflow:     b.flag(1, 0x02),
		Response:      Response(b[2]),
		Status:        b[3],
		ITT:           b.ITT(),
		SNACKTag:      b.u32(20),
		ExpDataSN:     b.u32(36),
		BidiResidual:  b.u32(40),
		Residual:      b.u32(44),
	}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	if p.Overflow && p.Underflow || p.BidiOverflow && p.BidiUnderflow {
		return invalid(OpScsiResponse, "overflow and underflow are both set")
	}
	return b.taskTag()
}

// putSN writes the three numbers that every response carries.
func (b *BHS) putSN(stat, exp, mx Serial) {
	b.put32(24, uint32(stat))
	b.put32(28, uint32(exp))
	b.put32(32, uint32(mx))
}

func (b *BHS) sn() (stat, exp, mx Serial) {
	return Serial(b.u32(24)), Serial(b.u32(28)), Serial(b.u32(32))
}

// AppendSense appends the data segment of a SCSI response: SenseLength, sense, and
// response data (§11.4.7). With neither it appends nothing. len(sense) < 65536.
func AppendSense(dst, sense, response []byte) []byte {
	if len(sense) == 0 && len(response) == 0 {
		return dst
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(sense)))
	dst = append(dst, sense...)
	return append(dst, response...)
}

// ParseSense splits the data segment of a SCSI response. The results alias d.
func ParseSense(d []byte) (sense, response []byte, err error) {
	if len(d) == 0 {
		return nil, nil, nil
	}
	if len(d) < 2 {
		return nil, nil, invalid(OpScsiResponse, "data segment of 1 byte holds no SenseLength")
	}
	n := int(binary.BigEndian.Uint16(d))
	d = d[2:]
	if n > len(d) {
		return nil, nil, invalid(OpScsiResponse, fmt.Sprintf("SenseLength %d exceeds the data segment (%d left)", n, len(d)))
	}
	return d[:n:n], d[n:], nil
}

// TaskFunc is a task management function (§11.5.1).
type TaskFunc uint8

// Task management functions.
const (
	FuncAbortTask       TaskFunc = 1
	FuncAbortTaskSet    TaskFunc = 2
	FuncClearACA        TaskFunc = 3
	FuncClearTaskSet    TaskFunc = 4
	FuncLUReset         TaskFunc = 5
	FuncTargetWarmReset TaskFunc = 6
	FuncTargetColdReset TaskFunc = 7
	FuncTaskReassign    TaskFunc = 8
)

var taskFuncNames = [...]string{1: "ABORT TASK", 2: "ABORT TASK SET", 3: "CLEAR ACA", 4: "CLEAR TASK SET",
	5: "LOGICAL UNIT RESET", 6: "TARGET WARM RESET", 7: "TARGET COLD RESET", 8: "TASK REASSIGN"}

func (f TaskFunc) String() string { return name(int(f), taskFuncNames[:], "task management function") }

// name returns names[i], or what and the number when there is none.
func name(i int, names []string, what string) string {
	if i >= 0 && i < len(names) && names[i] != "" {
		return names[i]
	}
	return fmt.Sprintf("%s %d", what, i)
}

// TaskMgmtRequest is §11.5.
type TaskMgmtRequest struct {
	Immediate bool
	Function  TaskFunc
	LUN       LUN
	ITT       uint32
	RefTag    uint32 // referenced task tag; ReservedTag unless ABORT TASK or TASK REASSIGN
	CmdSN     Serial
	ExpStatSN Serial
	RefCmdSN  Serial
	ExpDataSN uint32
}

// Opcode of the PDU.
func (*TaskMgmtRequest) Opcode() Opcode { return OpTaskMgmtReq }

// Encode writes the header.
func (p *TaskMgmtRequest) Encode(b *BHS) {
	b.start(OpTaskMgmtReq, p.Immediate)
	b[1] = 0x80 | byte(p.Function)&0x7f
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.RefTag)
	b.put32(24, uint32(p.CmdSN))
	b.put32(28, uint32(p.ExpStatSN))
	b.put32(32, uint32(p.RefCmdSN))
	b.put32(36, p.ExpDataSN)
}

// Decode reads the header. The function is not judged: an unknown one is answered
// with TaskRejected, not with a Reject.
func (p *TaskMgmtRequest) Decode(b *BHS) error {
	if err := b.want(OpTaskMgmtReq); err != nil {
		return err
	}
	*p = TaskMgmtRequest{
		Immediate: b.Immediate(),
		Function:  TaskFunc(b[1] & 0x7f),
		LUN:       b.LUN(),
		ITT:       b.ITT(),
		RefTag:    b.u32(20),
		CmdSN:     b.CmdSN(),
		ExpStatSN: b.ExpStatSN(),
		RefCmdSN:  Serial(b.u32(32)),
		ExpDataSN: b.u32(36),
	}
	return b.taskTag()
}

// TaskResp is the answer to a task management function (§11.6.1).
type TaskResp uint8

// Task management responses.
const (
	TaskComplete              TaskResp = 0
	TaskNotFound              TaskResp = 1
	TaskNoLUN                 TaskResp = 2
	TaskStillAllegiant        TaskResp = 3
	TaskReassignNotSupported  TaskResp = 4
	TaskFunctionNotSupported  TaskResp = 5
	TaskFunctionNotAuthorized TaskResp = 6
	TaskRejected              TaskResp = 255
)

func (r TaskResp) String() string {
	if r == TaskRejected {
		return "function rejected"
	}
	return name(int(r), []string{"function complete", "task does not exist", "LUN does not exist", "task still allegiant",
		"task allegiance reassignment not supported", "function not supported", "function authorization failed"}, "task management response")
}

// TaskMgmtResponse is §11.6.
type TaskMgmtResponse struct {
	Response TaskResp
	ITT      uint32
	StatSN   Serial
	ExpCmdSN Serial
	MaxCmdSN Serial
}

// Opcode of the PDU.
func (*TaskMgmtResponse) Opcode() Opcode { return OpTaskMgmtResp }

// Encode writes the header.
func (p *TaskMgmtResponse) Encode(b *BHS) {
	b.start(OpTaskMgmtResp, false)
	b[1], b[2] = 0x80, byte(p.Response)
	b.put32(16, p.ITT)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
}

// Decode reads the header.
func (p *TaskMgmtResponse) Decode(b *BHS) error {
	if err := b.want(OpTaskMgmtResp); err != nil {
		return err
	}
	*p = TaskMgmtResponse{Response: TaskResp(b[2]), ITT: b.ITT()}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	return b.taskTag()
}

// DataOut is §11.7. The data segment is the payload.
type DataOut struct {
	Final     bool
	LUN       LUN // valid with a TTT
	ITT       uint32
	TTT       uint32 // of the R2T it answers; ReservedTag when unsolicited
	ExpStatSN Serial
	DataSN    uint32
	Offset    uint32 // of the payload in the command's buffer, bytes
}

// Opcode of the PDU.
func (*DataOut) Opcode() Opcode { return OpDataOut }

// Encode writes the header.
func (p *DataOut) Encode(b *BHS) {
	b.start(OpDataOut, false)
	b.setFlag(1, 0x80, p.Final)
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.put32(28, uint32(p.ExpStatSN))
	b.put32(36, p.DataSN)
	b.put32(40, p.Offset)
}

// Decode reads the header.
func (p *DataOut) Decode(b *BHS) error {
	if err := b.want(OpDataOut); err != nil {
		return err
	}
	*p = DataOut{
		Final:     b.flag(1, 0x80),
		LUN:       b.LUN(),
		ITT:       b.ITT(),
		TTT:       b.u32(20),
		ExpStatSN: b.ExpStatSN(),
		DataSN:    b.u32(36),
		Offset:    b.u32(40),
	}
	return b.taskTag()
}

// DataIn is §11.7. The data segment is the payload. Status, the residual and
// StatSN are valid when HasStatus (S bit) is set.
type DataIn struct {
	Final               bool
	Ack                 bool // the target asks for a SNACK DataACK
	Overflow, Underflow bool
	HasStatus           bool
	Status              uint8
	LUN                 LUN // valid with a TTT
	ITT                 uint32
	TTT                 uint32 // ReservedTag unless Ack
	StatSN              Serial
	ExpCmdSN            Serial
	MaxCmdSN            Serial
	DataSN              uint32
	Offset              uint32
	Residual            uint32
}

// Opcode of the PDU.
func (*DataIn) Opcode() Opcode { return OpDataIn }

// Encode writes the header.
func (p *DataIn) Encode(b *BHS) {
	b.start(OpDataIn, false)
	b.setFlag(1, 0x80, p.Final)
	b.setFlag(1, 0x40, p.Ack)
	b.setFlag(1, 0x04, p.Overflow)
	b.setFlag(1, 0x02, p.Underflow)
	b.setFlag(1, 0x01, p.HasStatus)
	b[3] = p.Status
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
	b.put32(36, p.DataSN)
	b.put32(40, p.Offset)
	b.put32(44, p.Residual)
}

// Decode reads the header. S without F, and O with U, are refused (§11.7.1).
func (p *DataIn) Decode(b *BHS) error {
	if err := b.want(OpDataIn); err != nil {
		return err
	}
	*p = DataIn{
		Final:     b.flag(1, 0x80),
		Ack:       b.flag(1, 0x40),
		Overflow:  b.flag(1, 0x04),
		Underflow: b.flag(1, 0x02),
		HasStatus: b.flag(1, 0x01),
		Status:    b[3],
		LUN:       b.LUN(),
		ITT:       b.ITT(),
		TTT:       b.u32(20),
		DataSN:    b.u32(36),
		Offset:    b.u32(40),
		Residual:  b.u32(44),
	}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	switch {
	case p.HasStatus && !p.Final:
		return invalid(OpDataIn, "status without F bit")
	case p.Overflow && p.Underflow:
		return invalid(OpDataIn, "overflow and underflow are both set")
	}
	return b.taskTag()
}

// R2T is §11.8.
type R2T struct {
	LUN      LUN
	ITT      uint32
	TTT      uint32
	StatSN   Serial // next StatSN; an R2T does not advance it
	ExpCmdSN Serial
	MaxCmdSN Serial
	R2TSN    uint32
	Offset   uint32
	Length   uint32 // desired data transfer length, not 0
}

// Opcode of the PDU.
func (*R2T) Opcode() Opcode { return OpR2T }

// Encode writes the header.
func (p *R2T) Encode(b *BHS) {
	b.start(OpR2T, false)
	b[1] = 0x80
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
	b.put32(36, p.R2TSN)
	b.put32(40, p.Offset)
	b.put32(44, p.Length)
}

// Decode reads the header. A length of 0 and a reserved TTT are refused (§11.8.4,
// §11.8.5).
func (p *R2T) Decode(b *BHS) error {
	if err := b.want(OpR2T); err != nil {
		return err
	}
	*p = R2T{
		LUN:    b.LUN(),
		ITT:    b.ITT(),
		TTT:    b.u32(20),
		R2TSN:  b.u32(36),
		Offset: b.u32(40),
		Length: b.u32(44),
	}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	switch {
	case p.Length == 0:
		return invalid(OpR2T, "desired data transfer length is 0")
	case p.TTT == ReservedTag:
		return invalid(OpR2T, "target transfer tag is reserved value ffffffffh")
	}
	return b.taskTag()
}

// AsyncEvent is the kind of an asynchronous message (§11.9.1).
type AsyncEvent uint8

// Asynchronous events.
const (
	AsyncSCSI           AsyncEvent = 0 // sense data in the data segment
	AsyncLogoutRequest  AsyncEvent = 1 // log out within Param3 seconds
	AsyncDropConnection AsyncEvent = 2 // Param1 CID, Param2 Time2Wait, Param3 Time2Retain
	AsyncDropSession    AsyncEvent = 3 // Param2 Time2Wait, Param3 Time2Retain
	AsyncRenegotiate    AsyncEvent = 4 // text request within Param3 seconds
	AsyncTaskTerminated AsyncEvent = 5 // all tasks of LUN are gone (FastAbort)
	AsyncVendor         AsyncEvent = 255
)

func (e AsyncEvent) String() string {
	if e == AsyncVendor {
		return "vendor event"
	}
	return name(int(e), []string{"SCSI event", "target requests logout", "connection will be dropped", "session will be dropped",
		"target requests negotiation", "tasks terminated"}, "asynchronous event")
}

// Async is §11.9.
type Async struct {
	LUN      LUN
	StatSN   Serial
	ExpCmdSN Serial
	MaxCmdSN Serial
	Event    AsyncEvent
	VCode    uint8
	Param1   uint16
	Param2   uint16
	Param3   uint16
}

// Opcode of the PDU.
func (*Async) Opcode() Opcode { return OpAsync }

// Encode writes the header.
func (p *Async) Encode(b *BHS) {
	b.start(OpAsync, false)
	b[1] = 0x80
	b.putLUN(p.LUN)
	b.put32(16, ReservedTag)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
	b[36], b[37] = byte(p.Event), p.VCode
	b.put16(38, p.Param1)
	b.put16(40, p.Param2)
	b.put16(42, p.Param3)
}

// Decode reads the header.
func (p *Async) Decode(b *BHS) error {
	if err := b.want(OpAsync); err != nil {
		return err
	}
	*p = Async{
		LUN:    b.LUN(),
		Event:  AsyncEvent(b[36]),
		VCode:  b[37],
		Param1: b.u16(38),
		Param2: b.u16(40),
		Param3: b.u16(42),
	}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	return nil
}

// TextRequest is §11.10. The data segment holds pairs.
type TextRequest struct {
	Immediate bool
	Final     bool
	Continue  bool // C bit: the pairs go on in the next request
	LUN       LUN
	ITT       uint32
	TTT       uint32 // ReservedTag opens an exchange
	CmdSN     Serial
	ExpStatSN Serial
}

// Opcode of the PDU.
func (*TextRequest) Opcode() Opcode { return OpTextReq }

// Encode writes the header.
func (p *TextRequest) Encode(b *BHS) {
	b.start(OpTextReq, p.Immediate)
	b.setFlag(1, 0x80, p.Final)
	b.setFlag(1, 0x40, p.Continue)
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.put32(24, uint32(p.CmdSN))
	b.put32(28, uint32(p.ExpStatSN))
}

// Decode reads the header. F with C is refused (§11.10.2).
func (p *TextRequest) Decode(b *BHS) error {
	if err := b.want(OpTextReq); err != nil {
		return err
	}
	*p = TextRequest{
		Immediate: b.Immediate(),
		Final:     b.flag(1, 0x80),
		Continue:  b.flag(1, 0x40),
		LUN:       b.LUN(),
		ITT:       b.ITT(),
		TTT:       b.u32(20),
		CmdSN:     b.CmdSN(),
		ExpStatSN: b.ExpStatSN(),
	}
	if p.Final && p.Continue {
		return invalid(OpTextReq, "F and C bits are both set")
	}
	return b.taskTag()
}

// TextResponse is §11.11. The data segment holds pairs.
type TextResponse struct {
	Final    bool
	Continue bool
	LUN      LUN
	ITT      uint32
	TTT      uint32 // ReservedTag when the exchange is over
	StatSN   Serial
	ExpCmdSN Serial
	MaxCmdSN Serial
}

// Opcode of the PDU.
func (*TextResponse) Opcode() Opcode { return OpTextResp }

// Encode writes the header.
func (p *TextResponse) Encode(b *BHS) {
	b.start(OpTextResp, false)
	b.setFlag(1, 0x80, p.Final)
	b.setFlag(1, 0x40, p.Continue)
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
}

// Decode reads the header. F with C, and F with a TTT, are refused (§11.11.1).
func (p *TextResponse) Decode(b *BHS) error {
	if err := b.want(OpTextResp); err != nil {
		return err
	}
	*p = TextResponse{
		Final:    b.flag(1, 0x80),
		Continue: b.flag(1, 0x40),
		LUN:      b.LUN(),
		ITT:      b.ITT(),
		TTT:      b.u32(20),
	}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	if p.Final && p.Continue {
		return invalid(OpTextResp, "F and C bits are both set")
	}
	return b.taskTag()
}

// LoginRequest is §11.12. The data segment holds pairs. Login requests are always
// immediate.
type LoginRequest struct {
	Transit    bool // T: ready to leave the stage for NSG
	Continue   bool // C: the pairs go on in the next request
	CSG, NSG   Stage
	VersionMax uint8
	VersionMin uint8
	ISID       ISID
	TSIH       uint16
	ITT        uint32
	CID        uint16
	CmdSN      Serial
	ExpStatSN  Serial
}

// Opcode of the PDU.
func (*LoginRequest) Opcode() Opcode { return OpLoginReq }

// Encode writes the header.
func (p *LoginRequest) Encode(b *BHS) {
	b.start(OpLoginReq, true)
	b.setFlag(1, 0x80, p.Transit)
	b.setFlag(1, 0x40, p.Continue)
	b[1] |= byte(p.CSG&3)<<2 | byte(p.NSG&3)
	b[2], b[3] = p.VersionMax, p.VersionMin
	copy(b[8:14], p.ISID[:])
	b.put16(14, p.TSIH)
	b.put32(16, p.ITT)
	b.put16(20, p.CID)
	b.put32(24, uint32(p.CmdSN))
	b.put32(28, uint32(p.ExpStatSN))
}

// Decode reads the header. Stages are judged by the login state machine, which
// answers with a status instead of a Reject.
func (p *LoginRequest) Decode(b *BHS) error {
	if err := b.want(OpLoginReq); err != nil {
		return err
	}
	*p = LoginRequest{
		Transit:    b.flag(1, 0x80),
		Continue:   b.flag(1, 0x40),
		CSG:        Stage(b[1] >> 2 & 3),
		NSG:        Stage(b[1] & 3),
		VersionMax: b[2],
		VersionMin: b[3],
		TSIH:       b.u16(14),
		ITT:        b.ITT(),
		CID:        b.u16(20),
		CmdSN:      b.CmdSN(),
		ExpStatSN:  b.ExpStatSN(),
	}
	copy(p.ISID[:], b[8:14])
	return nil
}

// LoginResponse is §11.13. The data segment holds pairs.
type LoginResponse struct {
	Transit       bool
	Continue      bool
	CSG, NSG      Stage
	VersionMax    uint8
	VersionActive uint8
	ISID          ISID
	TSIH          uint16
	ITT           uint32
	StatSN        Serial
	ExpCmdSN      Serial
	MaxCmdSN      Serial
	Status        LoginStatus
}

// Opcode of the PDU.
func (*LoginResponse) Opcode() Opcode { return OpLoginResp }

// Encode writes the header.
func (p *LoginResponse) Encode(b *BHS) {
	b.start(OpLoginResp, false)
	b.setFlag(1, 0x80, p.Transit)
	b.setFlag(1, 0x40, p.Continue)
	b[1] |= byte(p.CSG&3)<<2 | byte(p.NSG&3)
	b[2], b[3] = p.VersionMax, p.VersionActive
	copy(b[8:14], p.ISID[:])
	b.put16(14, p.TSIH)
	b.put32(16, p.ITT)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
	b.put16(36, uint16(p.Status))
}

// Decode reads the header. T with C is refused (§11.13.2).
func (p *LoginResponse) Decode(b *BHS) error {
	if err := b.want(OpLoginResp); err != nil {
		return err
	}
	*p = LoginResponse{
		Transit:       b.flag(1, 0x80),
		Continue:      b.flag(1, 0x40),
		CSG:           Stage(b[1] >> 2 & 3),
		NSG:           Stage(b[1] & 3),
		VersionMax:    b[2],
		VersionActive: b[3],
		TSIH:          b.u16(14),
		ITT:           b.ITT(),
		Status:        LoginStatus(b.u16(36)),
	}
	copy(p.ISID[:], b[8:14])
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	if p.Transit && p.Continue {
		return invalid(OpLoginResp, "T and C bits are both set")
	}
	return nil
}

// LogoutReason is why an initiator logs out (§11.14.1).
type LogoutReason uint8

// Logout reasons.
const (
	LogoutSession    LogoutReason = 0 // close the session
	LogoutConnection LogoutReason = 1 // close connection CID
	LogoutRecovery   LogoutReason = 2 // remove connection CID for recovery
)

// LogoutRequest is §11.14.
type LogoutRequest struct {
	Immediate bool
	Reason    LogoutReason
	ITT       uint32
	CID       uint16 // valid unless LogoutSession
	CmdSN     Serial
	ExpStatSN Serial
}

// Opcode of the PDU.
func (*LogoutRequest) Opcode() Opcode { return OpLogoutReq }

// Encode writes the header.
func (p *LogoutRequest) Encode(b *BHS) {
	b.start(OpLogoutReq, p.Immediate)
	b[1] = 0x80 | byte(p.Reason)&0x7f
	b.put32(16, p.ITT)
	b.put16(20, p.CID)
	b.put32(24, uint32(p.CmdSN))
	b.put32(28, uint32(p.ExpStatSN))
}

// Decode reads the header. An unknown reason is refused.
func (p *LogoutRequest) Decode(b *BHS) error {
	if err := b.want(OpLogoutReq); err != nil {
		return err
	}
	*p = LogoutRequest{
		Immediate: b.Immediate(),
		Reason:    LogoutReason(b[1] & 0x7f),
		ITT:       b.ITT(),
		CID:       b.u16(20),
		CmdSN:     b.CmdSN(),
		ExpStatSN: b.ExpStatSN(),
	}
	if p.Reason > LogoutRecovery {
		return invalid(OpLogoutReq, fmt.Sprintf("reason code %d is not defined", p.Reason))
	}
	return b.taskTag()
}

// LogoutResult is the answer to a logout (§11.15.1).
type LogoutResult uint8

// Logout responses.
const (
	LogoutClosed        LogoutResult = 0
	LogoutCIDNotFound   LogoutResult = 1
	LogoutNoRecovery    LogoutResult = 2
	LogoutCleanupFailed LogoutResult = 3
)

func (r LogoutResult) String() string {
	return name(int(r), []string{"closed successfully", "CID not found", "connection recovery not supported", "cleanup failed"}, "logout response")
}

// LogoutResponse is §11.15.
type LogoutResponse struct {
	Response    LogoutResult
	ITT         uint32
	StatSN      Serial
	ExpCmdSN    Serial
	MaxCmdSN    Serial
	Time2Wait   uint16 // seconds
	Time2Retain uint16 // seconds
}

// Opcode of the PDU.
func (*LogoutResponse) Opcode() Opcode { return OpLogoutResp }

// Encode writes the header.
func (p *LogoutResponse) Encode(b *BHS) {
	b.start(OpLogoutResp, false)
	b[1], b[2] = 0x80, byte(p.Response)
	b.put32(16, p.ITT)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
	b.put16(40, p.Time2Wait)
	b.put16(42, p.Time2Retain)
}

// Decode reads the header.
func (p *LogoutResponse) Decode(b *BHS) error {
	if err := b.want(OpLogoutResp); err != nil {
		return err
	}
	*p = LogoutResponse{Response: LogoutResult(b[2]), ITT: b.ITT(), Time2Wait: b.u16(40), Time2Retain: b.u16(42)}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	return b.taskTag()
}

// SNACKType is what a SNACK asks for (§11.16.1).
type SNACKType uint8

// SNACK types.
const (
	SNACKData    SNACKType = 0 // Data-In or R2T PDUs again
	SNACKStatus  SNACKType = 1
	SNACKDataACK SNACKType = 2
	SNACKRData   SNACKType = 3 // Data-In again, possibly in other portions
)

// SNACK is §11.16.
type SNACK struct {
	Type      SNACKType
	LUN       LUN
	ITT       uint32 // ReservedTag for status and DataACK
	TTT       uint32 // target transfer tag (DataACK) or SNACK tag (R-Data)
	ExpStatSN Serial
	BegRun    uint32
	RunLength uint32 // 0 = all from BegRun
}

// Opcode of the PDU.
func (*SNACK) Opcode() Opcode { return OpSNACK }

// Encode writes the header.
func (p *SNACK) Encode(b *BHS) {
	b.start(OpSNACK, false)
	b[1] = 0x80 | byte(p.Type)&0xf
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.put32(28, uint32(p.ExpStatSN))
	b.put32(40, p.BegRun)
	b.put32(44, p.RunLength)
}

// Decode reads the header. An unknown type is refused.
func (p *SNACK) Decode(b *BHS) error {
	if err := b.want(OpSNACK); err != nil {
		return err
	}
	*p = SNACK{
		Type:      SNACKType(b[1] & 0xf),
		LUN:       b.LUN(),
		ITT:       b.ITT(),
		TTT:       b.u32(20),
		ExpStatSN: b.ExpStatSN(),
		BegRun:    b.u32(40),
		RunLength: b.u32(44),
	}
	if p.Type > SNACKRData {
		return invalid(OpSNACK, fmt.Sprintf("type %d is not defined", p.Type))
	}
	return nil
}

// RejectReason is why a PDU was refused (§11.17.1).
type RejectReason uint8

// Reject reasons.
const (
	RejectDataDigest       RejectReason = 0x02
	RejectSNACK            RejectReason = 0x03
	RejectProtocolError    RejectReason = 0x04
	RejectUnsupported      RejectReason = 0x05
	RejectTooManyImmediate RejectReason = 0x06
	RejectTaskInProgress   RejectReason = 0x07
	RejectInvalidDataACK   RejectReason = 0x08
	RejectInvalidField     RejectReason = 0x09
	RejectLongOperation    RejectReason = 0x0a // negotiation was reset
	RejectWaitingForLogout RejectReason = 0x0c
)

func (r RejectReason) String() string {
	return name(int(r), []string{2: "data digest error", 3: "SNACK reject", 4: "protocol error", 5: "command not supported",
		6: "too many immediate commands", 7: "task in progress", 8: "invalid DataACK", 9: "invalid PDU field",
		0xa: "long operation reject", 0xc: "waiting for logout"}, "reject reason")
}

// Reject is §11.17. The data segment holds the header of the refused PDU,
// including its AHS.
type Reject struct {
	Reason   RejectReason
	StatSN   Serial
	ExpCmdSN Serial
	MaxCmdSN Serial
	DataSN   uint32 // next DataSN or R2TSN, valid for data digest errors
}

// Opcode of the PDU.
func (*Reject) Opcode() Opcode { return OpReject }

// Encode writes the header.
func (p *Reject) Encode(b *BHS) {
	b.start(OpReject, false)
	b[1], b[2] = 0x80, byte(p.Reason)
	b.put32(16, ReservedTag)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
	b.put32(36, p.DataSN)
}

// Decode reads the header.
func (p *Reject) Decode(b *BHS) error {
	if err := b.want(OpReject); err != nil {
		return err
	}
	*p = Reject{Reason: RejectReason(b[2]), DataSN: b.u32(36)}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	return nil
}

// NopOut is §11.18. The data segment is ping data, echoed by the target. It needs
// an answer unless ITT is ReservedTag; with a TTT it answers a NOP-In.
type NopOut struct {
	Immediate bool
	LUN       LUN // copied from the NOP-In it answers
	ITT       uint32
	TTT       uint32
	CmdSN     Serial
	ExpStatSN Serial
}

// Opcode of the PDU.
func (*NopOut) Opcode() Opcode { return OpNopOut }

// Encode writes the header.
func (p *NopOut) Encode(b *BHS) {
	b.start(OpNopOut, p.Immediate)
	b[1] = 0x80
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.put32(24, uint32(p.CmdSN))
	b.put32(28, uint32(p.ExpStatSN))
}

// Decode reads the header. A reserved ITT needs immediate delivery (§11.18.1).
func (p *NopOut) Decode(b *BHS) error {
	if err := b.want(OpNopOut); err != nil {
		return err
	}
	*p = NopOut{
		Immediate: b.Immediate(),
		LUN:       b.LUN(),
		ITT:       b.ITT(),
		TTT:       b.u32(20),
		CmdSN:     b.CmdSN(),
		ExpStatSN: b.ExpStatSN(),
	}
	if p.ITT == ReservedTag && !p.Immediate {
		return invalid(OpNopOut, "initiator task tag is reserved but the I bit is not set")
	}
	return nil
}

// NopIn is §11.19. With a TTT it asks for a NOP-Out; with an ITT it answers one and
// the data segment echoes the ping data.
type NopIn struct {
	LUN      LUN
	ITT      uint32
	TTT      uint32
	StatSN   Serial // next StatSN and not advanced when ITT is ReservedTag
	ExpCmdSN Serial
	MaxCmdSN Serial
}

// Opcode of the PDU.
func (*NopIn) Opcode() Opcode { return OpNopIn }

// Encode writes the header.
func (p *NopIn) Encode(b *BHS) {
	b.start(OpNopIn, false)
	b[1] = 0x80
	b.putLUN(p.LUN)
	b.put32(16, p.ITT)
	b.put32(20, p.TTT)
	b.putSN(p.StatSN, p.ExpCmdSN, p.MaxCmdSN)
}

// Decode reads the header.
func (p *NopIn) Decode(b *BHS) error {
	if err := b.want(OpNopIn); err != nil {
		return err
	}
	*p = NopIn{LUN: b.LUN(), ITT: b.ITT(), TTT: b.u32(20)}
	p.StatSN, p.ExpCmdSN, p.MaxCmdSN = b.sn()
	return nil
}
