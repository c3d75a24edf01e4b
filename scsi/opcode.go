// Package scsi is the codec of the SCSI primary and block commands: operation
// codes, CDBs, sense data, INQUIRY and VPD pages, mode pages, capacities, LUN
// addresses, reservations' parameter lists. It has no sockets, no state and no
// goroutines; target and initiator share it.
//
// One table (Commands) says everything there is to know about a command: CDB
// length, field layout, data direction, how the transfer length follows from
// the CDB, which reservations it conflicts with and what it does to the medium.
// CDB decoding and building, the usage bitmaps of REPORT SUPPORTED OPERATION
// CODES, the reservation checks and the tests all derive from it, so that a
// command cannot be fenced in one place and forgotten in another.
//
// Standards: SPC-4 (T10/1731-D), SBC-3 (T10/1799-D), SAM-5. Numbers are big
// endian. Storage row: it imports nothing but the standard library.
package scsi

import "fmt"

// Opcode is the first byte of a CDB (SPC-4 6.1, SBC-3 5.1).
type Opcode uint8

// Operation codes.
const (
	OpTestUnitReady       Opcode = 0x00
	OpRezeroUnit          Opcode = 0x01
	OpRequestSense        Opcode = 0x03
	OpFormatUnit          Opcode = 0x04
	OpReassignBlocks      Opcode = 0x07
	OpRead6               Opcode = 0x08
	OpWrite6              Opcode = 0x0A
	OpSeek6               Opcode = 0x0B
	OpInquiry             Opcode = 0x12
	OpModeSelect6         Opcode = 0x15
	OpReserve6            Opcode = 0x16
	OpRelease6            Opcode = 0x17
	OpModeSense6          Opcode = 0x1A
	OpStartStopUnit       Opcode = 0x1B
	OpReceiveDiagnostic   Opcode = 0x1C
	OpSendDiagnostic      Opcode = 0x1D
	OpPreventAllow        Opcode = 0x1E
	OpReadCapacity10      Opcode = 0x25
	OpRead10              Opcode = 0x28
	OpWrite10             Opcode = 0x2A
	OpSeek10              Opcode = 0x2B
	OpWriteVerify10       Opcode = 0x2E
	OpVerify10            Opcode = 0x2F
	OpPrefetch10          Opcode = 0x34
	OpSynchronizeCache10  Opcode = 0x35
	OpReadDefectData10    Opcode = 0x37
	OpWriteBuffer         Opcode = 0x3B
	OpReadBuffer          Opcode = 0x3C
	OpWriteSame10         Opcode = 0x41
	OpUnmap               Opcode = 0x42
	OpSanitize            Opcode = 0x48
	OpLogSelect           Opcode = 0x4C
	OpLogSense            Opcode = 0x4D
	OpXDWriteRead10       Opcode = 0x53
	OpModeSelect10        Opcode = 0x55
	OpReserve10           Opcode = 0x56
	OpRelease10           Opcode = 0x57
	OpModeSense10         Opcode = 0x5A
	OpPersistentReserveIn Opcode = 0x5E
	OpPersistentReserve   Opcode = 0x5F // PERSISTENT RESERVE OUT
	OpVariableLength      Opcode = 0x7F
	OpExtendedCopy        Opcode = 0x83 // THIRD-PARTY COPY OUT
	OpReceiveCopyResults  Opcode = 0x84 // THIRD-PARTY COPY IN
	OpRead16              Opcode = 0x88
	OpCompareAndWrite     Opcode = 0x89
	OpWrite16             Opcode = 0x8A
	OpOrWrite16           Opcode = 0x8B
	OpWriteVerify16       Opcode = 0x8E
	OpVerify16            Opcode = 0x8F
	OpPrefetch16          Opcode = 0x90
	OpSynchronizeCache16  Opcode = 0x91
	OpWriteSame16         Opcode = 0x93
	OpWriteAtomic16       Opcode = 0x9C
	OpServiceActionIn16   Opcode = 0x9E
	OpReportLuns          Opcode = 0xA0
	OpMaintenanceIn       Opcode = 0xA3
	OpMaintenanceOut      Opcode = 0xA4
	OpRead12              Opcode = 0xA8
	OpWrite12             Opcode = 0xAA
	OpWriteVerify12       Opcode = 0xAE
	OpVerify12            Opcode = 0xAF
	OpReadDefectData12    Opcode = 0xB7
)

// Service actions, by operation code.
const (
	SAReadCapacity16       = 0x10 // of OpServiceActionIn16
	SAGetLBAStatus         = 0x12
	SAReportTPG            = 0x0A // of OpMaintenanceIn
	SAReportSupportedOps   = 0x0C
	SAReportSupportedTMF   = 0x0D
	SASetTPG               = 0x0A // of OpMaintenanceOut
	SAReadKeys             = 0x00 // of OpPersistentReserveIn
	SAReadReservation      = 0x01
	SAReportCapabilities   = 0x02
	SAReadFullStatus       = 0x03
	SARegister             = 0x00 // of OpPersistentReserve
	SAReserve              = 0x01
	SARelease              = 0x02
	SAClear                = 0x03
	SAPreempt              = 0x04
	SAPreemptAndAbort      = 0x05
	SARegisterAndIgnoreKey = 0x06
	SARegisterAndMove      = 0x07
	SASanitizeOverwrite    = 0x01 // of OpSanitize
	SASanitizeBlockErase   = 0x02
	SASanitizeCryptoErase  = 0x03
	SASanitizeExitFailure  = 0x1F
	SAExtendedCopyLID1     = 0x00 // of OpExtendedCopy
	SACopyStatusLID1       = 0x00 // of OpReceiveCopyResults
	SACopyOperatingParams  = 0x03
)

// NoSA marks a command without service actions.
const NoSA = -1

// Direction is where the data of a command goes, seen from the initiator.
type Direction uint8

// Directions.
const (
	DirNone Direction = iota
	DirIn             // target to initiator
	DirOut            // initiator to target
	DirBidi
)

func (d Direction) String() string { return [...]string{"none", "in", "out", "bidi"}[d&3] }

// Xfer is the rule by which the transfer length follows from the CDB.
type Xfer uint8

// Transfer-length rules.
const (
	XferNone      Xfer = iota
	XferBlocks         // Count logical blocks
	XferAlloc          // Alloc bytes at most, data-in
	XferParam          // ParamLen bytes, data-out
	XferOneBlock       // one logical block; none with NDOB (WRITE SAME)
	XferTwice          // two times Count blocks (COMPARE AND WRITE)
	XferByteCheck      // BYTCHK 0: none, 1: Count blocks, 3: one block (VERIFY)
	XferFixed8         // 8 bytes (READ CAPACITY (10))
	XferFormat         // parameter list when FMTDATA, length inside the list
)

// Conflict is a command's class towards reservations of other I_T nexuses
// (SPC-4 5.13.1 table "commands allowed in the presence of various
// reservations", SBC-3 4.16 likewise, SPC-2 for RESERVE/RELEASE).
type Conflict uint8

// Conflict classes. Numbers are only ever appended: the cluster's FSM keeps them.
const (
	ConflictNever   Conflict = iota // allowed under every reservation, also RESERVE(6)
	ConflictLegacy                  // allowed under every persistent reservation, not under another's RESERVE(6)
	ConflictRead                    // allowed under Write Exclusive types, not under Exclusive Access types
	ConflictWrite                   // conflicts under every type
	ConflictPRIn                    // PERSISTENT RESERVE IN: as ConflictLegacy
	ConflictPROut                   // PERSISTENT RESERVE OUT: the service action decides
	ConflictReserve                 // RESERVE (6), (10): also conflicts with any registration
	ConflictRelease                 // RELEASE (6), (10): GOOD without effect for a non-holder
	ConflictPrevent                 // PREVENT ALLOW: never when PREVENT is 0, else as ConflictWrite
	ConflictStart                   // START STOP UNIT: as ConflictLegacy when START is 1 and POWER CONDITION 0, else as ConflictWrite
)

// Effect is what a command does to the logical unit; read-only checks, gates and
// range locks derive from it.
type Effect uint8

// Effects. Numbers are only ever appended.
const (
	EffectNone    Effect = iota // answers from memory
	EffectRead                  // returns or compares medium data
	EffectWrite                 // changes the medium or its allocation
	EffectFlush                 // makes earlier writes durable
	EffectReserve               // changes reservations
	EffectConfig                // changes parameters of the logical unit
	EffectState                 // needs a ready medium but touches no data: TEST UNIT READY, READ CAPACITY
)

// Command is one row of the table.
type Command struct {
	Op       Opcode
	SA       int // service action or NoSA
	Name     string
	Len      int // CDB length in bytes
	Dir      Direction
	Xfer     Xfer
	Conflict Conflict
	Effect   Effect
	Fields   []Field // without operation code, service action and control byte
	// Timeout is the nominal and recommended command timeout in seconds that
	// REPORT SUPPORTED OPERATION CODES prints with RCTD.
	Timeout uint32

	index [numFields]int8 // 1 + position in Fields, 0 = the command has no such field
}

// String is the standard's name of the command.
func (c *Command) String() string { return c.Name }

// Has tells whether the CDB has field id.
func (c *Command) Has(id FieldID) bool { return c.index[id] != 0 }

// FieldID names a field of a CDB. The same meaning has the same ID in every CDB.
type FieldID uint8

// Fields.
const (
	FLBA FieldID = iota
	FCount
	FAlloc
	FParamLen
	FProtect // RDPROTECT, WRPROTECT, VRPROTECT, ORPROTECT
	FDPO
	FFUA
	FByteCheck
	FGroup
	FUnmap
	FAnchor
	FNDOB
	FPBData
	FLBData
	FImmed
	FPMI
	FEVPD
	FPage
	FSubpage
	FPC
	FDBD
	FLLBAA
	FPF
	FSP
	FRTD
	FDesc
	FSelectReport
	FReportOptions
	FRequestedOp
	FRequestedSA
	FRCTD
	FREPD
	FScope
	FType
	FPrevent
	FStart
	FLoEj
	FNoFlush
	FPowerCondition
	FPowerModifier
	FSelfTest
	FSelfTestCode
	FDevOffL
	FUnitOffL
	FPCV
	FPageControl
	FParamPointer
	FDataFormat
	FListID
	FBoundary
	FAUSE
	FZNR
	FFmtPInfo
	FLongList
	FFmtData
	FCmpLst
	FDefectFormat
	FReqPlist
	FReqGlist
	FDescIndex
	FThirdParty
	FLongID
	FReserveID
	FMode
	FBufferID
	FBufferOffset
	FSector
	numFields
)

var fieldNames = [numFields]string{
	"lba", "count", "allocation length", "parameter list length", "protect", "dpo", "fua", "bytchk", "group",
	"unmap", "anchor", "ndob", "pbdata", "lbdata", "immed", "pmi", "evpd", "page code", "subpage code", "pc", "dbd", "llbaa",
	"pf", "sp", "rtd", "desc", "select report", "reporting options", "requested operation code",
	"requested service action", "rctd", "repd", "scope", "type", "prevent", "start", "loej", "no_flush", "power condition", "power condition modifier",
	"selftest", "self-test code", "devoffl", "unitoffl", "pcv", "page control", "parameter pointer", "parameter data format",
	"list identifier", "atomic boundary", "ause", "znr", "fmtpinfo", "longlist", "fmtdata", "cmplst", "defect list format",
	"req_plist", "req_glist", "address descriptor index", "3rdpty", "longid", "reservation identification", "mode", "buffer id",
	"buffer offset", "sector",
}

func (f FieldID) String() string {
	if f < numFields {
		return fieldNames[f]
	}
	return fmt.Sprintf("field %d", uint8(f))
}

// Field places a field in a CDB: bytes [Byte, Byte+N) as one big-endian number,
// shifted right by Shift, Width bits wide.
type Field struct {
	ID             FieldID
	Byte, N, Shift uint8
	Width          uint8
}

func (f Field) mask() uint64 {
	if f.Width >= 64 {
		return ^uint64(0)
	}
	return 1<<f.Width - 1
}

func (f Field) get(cdb []byte) uint64 {
	var v uint64
	for _, b := range cdb[f.Byte : f.Byte+f.N] {
		v = v<<8 | uint64(b)
	}
	return v >> f.Shift & f.mask()
}

func (f Field) put(cdb []byte, v uint64) {
	v = v & f.mask() << f.Shift
	for i := int(f.N) - 1; i >= 0; i-- {
		cdb[int(f.Byte)+i] |= byte(v)
		v >>= 8
	}
}

// Bit is the number (7 to 0) of the field's most significant bit in its first
// byte, as the field pointer of sense data wants it.
func (f Field) Bit() int8 { return int8((int(f.Shift) + int(f.Width) - 1) % 8) }

func num(id FieldID, b, n uint8) Field { return Field{ID: id, Byte: b, N: n, Width: 8 * n} }
func bits(id FieldID, b, shift, width uint8) Field {
	return Field{ID: id, Byte: b, N: 1, Shift: shift, Width: width}
}
func flag(id FieldID, b, shift uint8) Field { return bits(id, b, shift, 1) }

// Layouts shared by families.
func rw6() []Field {
	return []Field{{ID: FLBA, Byte: 1, N: 3, Width: 21}, num(FCount, 4, 1)}
}

func with(extra []Field, base ...Field) []Field { return append(base, extra...) }

func lba10(extra ...Field) []Field {
	return with(extra, num(FLBA, 2, 4), bits(FGroup, 6, 0, 5), num(FCount, 7, 2))
}

func lba12(extra ...Field) []Field {
	return with(extra, num(FLBA, 2, 4), num(FCount, 6, 4), bits(FGroup, 10, 0, 5))
}

func lba16(extra ...Field) []Field {
	return with(extra, num(FLBA, 2, 8), num(FCount, 10, 4), bits(FGroup, 14, 0, 5))
}

func protectFUA() []Field {
	return []Field{bits(FProtect, 1, 5, 3), flag(FDPO, 1, 4), flag(FFUA, 1, 3)}
}

func protectCheck() []Field {
	return []Field{bits(FProtect, 1, 5, 3), flag(FDPO, 1, 4), bits(FByteCheck, 1, 1, 2)}
}

// Commands is the table, in order of operation code and service action. It is
// read-only.
var Commands = []*Command{
	{Op: OpTestUnitReady, SA: NoSA, Name: "TEST UNIT READY", Len: 6, Conflict: ConflictLegacy, Effect: EffectState},
	{Op: OpRezeroUnit, SA: NoSA, Name: "REZERO UNIT", Len: 6, Conflict: ConflictRead, Effect: EffectState},
	{Op: OpRequestSense, SA: NoSA, Name: "REQUEST SENSE", Len: 6, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictNever,
		Fields: []Field{flag(FDesc, 1, 0), num(FAlloc, 4, 1)}},
	{Op: OpFormatUnit, SA: NoSA, Name: "FORMAT UNIT", Len: 6, Dir: DirOut, Xfer: XferFormat, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 3600,
		Fields: []Field{bits(FFmtPInfo, 1, 6, 2), flag(FLongList, 1, 5), flag(FFmtData, 1, 4), flag(FCmpLst, 1, 3), bits(FDefectFormat, 1, 0, 3)}},
	{Op: OpRead6, SA: NoSA, Name: "READ (6)", Len: 6, Dir: DirIn, Xfer: XferBlocks, Conflict: ConflictRead, Effect: EffectRead, Fields: rw6()},
	{Op: OpWrite6, SA: NoSA, Name: "WRITE (6)", Len: 6, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: rw6()},
	{Op: OpSeek6, SA: NoSA, Name: "SEEK (6)", Len: 6, Conflict: ConflictRead, Effect: EffectState,
		Fields: []Field{{ID: FLBA, Byte: 1, N: 3, Width: 21}}},
	{Op: OpInquiry, SA: NoSA, Name: "INQUIRY", Len: 6, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictNever,
		Fields: []Field{flag(FEVPD, 1, 0), num(FPage, 2, 1), num(FAlloc, 3, 2)}},
	{Op: OpModeSelect6, SA: NoSA, Name: "MODE SELECT (6)", Len: 6, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectConfig,
		Fields: []Field{flag(FPF, 1, 4), flag(FRTD, 1, 1), flag(FSP, 1, 0), num(FParamLen, 4, 1)}},
	{Op: OpReserve6, SA: NoSA, Name: "RESERVE (6)", Len: 6, Dir: DirNone, Conflict: ConflictReserve, Effect: EffectReserve,
		Fields: []Field{flag(FThirdParty, 1, 4), num(FReserveID, 2, 1)}},
	{Op: OpRelease6, SA: NoSA, Name: "RELEASE (6)", Len: 6, Dir: DirNone, Conflict: ConflictRelease, Effect: EffectReserve,
		Fields: []Field{flag(FThirdParty, 1, 4), num(FReserveID, 2, 1)}},
	{Op: OpModeSense6, SA: NoSA, Name: "MODE SENSE (6)", Len: 6, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead,
		Fields: []Field{flag(FDBD, 1, 3), bits(FPC, 2, 6, 2), bits(FPage, 2, 0, 6), num(FSubpage, 3, 1), num(FAlloc, 4, 1)}},
	{Op: OpStartStopUnit, SA: NoSA, Name: "START STOP UNIT", Len: 6, Conflict: ConflictStart, Effect: EffectConfig, Timeout: 60,
		Fields: []Field{flag(FImmed, 1, 0), bits(FPowerModifier, 3, 0, 4), bits(FPowerCondition, 4, 4, 4), flag(FNoFlush, 4, 2), flag(FLoEj, 4, 1), flag(FStart, 4, 0)}},
	{Op: OpReceiveDiagnostic, SA: NoSA, Name: "RECEIVE DIAGNOSTIC RESULTS", Len: 6, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead,
		Fields: []Field{flag(FPCV, 1, 0), num(FPage, 2, 1), num(FAlloc, 3, 2)}},
	{Op: OpSendDiagnostic, SA: NoSA, Name: "SEND DIAGNOSTIC", Len: 6, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectState,
		Fields: []Field{bits(FSelfTestCode, 1, 5, 3), flag(FPF, 1, 4), flag(FSelfTest, 1, 2), flag(FDevOffL, 1, 1), flag(FUnitOffL, 1, 0), num(FParamLen, 3, 2)}},
	{Op: OpPreventAllow, SA: NoSA, Name: "PREVENT ALLOW MEDIUM REMOVAL", Len: 6, Conflict: ConflictPrevent,
		Fields: []Field{bits(FPrevent, 4, 0, 2)}},
	{Op: OpReadCapacity10, SA: NoSA, Name: "READ CAPACITY (10)", Len: 10, Dir: DirIn, Xfer: XferFixed8, Conflict: ConflictLegacy, Effect: EffectState,
		Fields: []Field{num(FLBA, 2, 4), flag(FPMI, 8, 0)}},
	{Op: OpRead10, SA: NoSA, Name: "READ (10)", Len: 10, Dir: DirIn, Xfer: XferBlocks, Conflict: ConflictRead, Effect: EffectRead, Fields: lba10(protectFUA()...)},
	{Op: OpWrite10, SA: NoSA, Name: "WRITE (10)", Len: 10, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: lba10(protectFUA()...)},
	{Op: OpSeek10, SA: NoSA, Name: "SEEK (10)", Len: 10, Conflict: ConflictRead, Effect: EffectState, Fields: []Field{num(FLBA, 2, 4)}},
	{Op: OpWriteVerify10, SA: NoSA, Name: "WRITE AND VERIFY (10)", Len: 10, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: lba10(protectCheck()...)},
	{Op: OpVerify10, SA: NoSA, Name: "VERIFY (10)", Len: 10, Dir: DirOut, Xfer: XferByteCheck, Conflict: ConflictRead, Effect: EffectRead, Fields: lba10(protectCheck()...)},
	{Op: OpPrefetch10, SA: NoSA, Name: "PRE-FETCH (10)", Len: 10, Conflict: ConflictRead, Effect: EffectRead, Fields: lba10(flag(FImmed, 1, 1))},
	{Op: OpSynchronizeCache10, SA: NoSA, Name: "SYNCHRONIZE CACHE (10)", Len: 10, Conflict: ConflictWrite, Effect: EffectFlush, Timeout: 60, Fields: lba10(flag(FImmed, 1, 1))},
	{Op: OpReadDefectData10, SA: NoSA, Name: "READ DEFECT DATA (10)", Len: 10, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead, Effect: EffectState,
		Fields: []Field{flag(FReqPlist, 2, 4), flag(FReqGlist, 2, 3), bits(FDefectFormat, 2, 0, 3), num(FAlloc, 7, 2)}},
	{Op: OpWriteSame10, SA: NoSA, Name: "WRITE SAME (10)", Len: 10, Dir: DirOut, Xfer: XferOneBlock, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 600,
		Fields: lba10(bits(FProtect, 1, 5, 3), flag(FAnchor, 1, 4), flag(FUnmap, 1, 3), flag(FPBData, 1, 2), flag(FLBData, 1, 1))},
	{Op: OpUnmap, SA: NoSA, Name: "UNMAP", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 600,
		Fields: []Field{flag(FAnchor, 1, 0), bits(FGroup, 6, 0, 5), num(FParamLen, 7, 2)}},
	{Op: OpSanitize, SA: SASanitizeOverwrite, Name: "SANITIZE OVERWRITE", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 3600, Fields: sanitize()},
	{Op: OpSanitize, SA: SASanitizeBlockErase, Name: "SANITIZE BLOCK ERASE", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 3600, Fields: sanitize()},
	{Op: OpSanitize, SA: SASanitizeCryptoErase, Name: "SANITIZE CRYPTOGRAPHIC ERASE", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 3600, Fields: sanitize()},
	{Op: OpSanitize, SA: SASanitizeExitFailure, Name: "SANITIZE EXIT FAILURE MODE", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectWrite, Fields: sanitize()},
	{Op: OpLogSense, SA: NoSA, Name: "LOG SENSE", Len: 10, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictLegacy,
		Fields: []Field{flag(FSP, 1, 0), bits(FPC, 2, 6, 2), bits(FPage, 2, 0, 6), num(FSubpage, 3, 1), num(FParamPointer, 5, 2), num(FAlloc, 7, 2)}},
	{Op: OpModeSelect10, SA: NoSA, Name: "MODE SELECT (10)", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectConfig,
		Fields: []Field{flag(FPF, 1, 4), flag(FRTD, 1, 1), flag(FSP, 1, 0), num(FParamLen, 7, 2)}},
	{Op: OpReserve10, SA: NoSA, Name: "RESERVE (10)", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictReserve, Effect: EffectReserve,
		Fields: []Field{flag(FThirdParty, 1, 4), flag(FLongID, 1, 1), num(FReserveID, 2, 1), num(FParamLen, 7, 2)}},
	{Op: OpRelease10, SA: NoSA, Name: "RELEASE (10)", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictRelease, Effect: EffectReserve,
		Fields: []Field{flag(FThirdParty, 1, 4), flag(FLongID, 1, 1), num(FReserveID, 2, 1), num(FParamLen, 7, 2)}},
	{Op: OpModeSense10, SA: NoSA, Name: "MODE SENSE (10)", Len: 10, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead,
		Fields: []Field{flag(FLLBAA, 1, 4), flag(FDBD, 1, 3), bits(FPC, 2, 6, 2), bits(FPage, 2, 0, 6), num(FSubpage, 3, 1), num(FAlloc, 7, 2)}},
	{Op: OpPersistentReserveIn, SA: SAReadKeys, Name: "PERSISTENT RESERVE IN, READ KEYS", Len: 10, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictPRIn, Fields: prIn()},
	{Op: OpPersistentReserveIn, SA: SAReadReservation, Name: "PERSISTENT RESERVE IN, READ RESERVATION", Len: 10, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictPRIn, Fields: prIn()},
	{Op: OpPersistentReserveIn, SA: SAReportCapabilities, Name: "PERSISTENT RESERVE IN, REPORT CAPABILITIES", Len: 10, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictPRIn, Fields: prIn()},
	{Op: OpPersistentReserveIn, SA: SAReadFullStatus, Name: "PERSISTENT RESERVE IN, READ FULL STATUS", Len: 10, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictPRIn, Fields: prIn()},
	{Op: OpPersistentReserve, SA: SARegister, Name: "PERSISTENT RESERVE OUT, REGISTER", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpPersistentReserve, SA: SAReserve, Name: "PERSISTENT RESERVE OUT, RESERVE", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpPersistentReserve, SA: SARelease, Name: "PERSISTENT RESERVE OUT, RELEASE", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpPersistentReserve, SA: SAClear, Name: "PERSISTENT RESERVE OUT, CLEAR", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpPersistentReserve, SA: SAPreempt, Name: "PERSISTENT RESERVE OUT, PREEMPT", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpPersistentReserve, SA: SAPreemptAndAbort, Name: "PERSISTENT RESERVE OUT, PREEMPT AND ABORT", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpPersistentReserve, SA: SARegisterAndIgnoreKey, Name: "PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpPersistentReserve, SA: SARegisterAndMove, Name: "PERSISTENT RESERVE OUT, REGISTER AND MOVE", Len: 10, Dir: DirOut, Xfer: XferParam, Conflict: ConflictPROut, Effect: EffectReserve, Fields: prOut()},
	{Op: OpExtendedCopy, SA: SAExtendedCopyLID1, Name: "EXTENDED COPY (LID1)", Len: 16, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 600,
		Fields: []Field{num(FParamLen, 10, 4)}},
	{Op: OpReceiveCopyResults, SA: SACopyStatusLID1, Name: "RECEIVE COPY STATUS (LID1)", Len: 16, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictWrite,
		Fields: []Field{num(FListID, 2, 1), num(FAlloc, 10, 4)}},
	{Op: OpReceiveCopyResults, SA: SACopyOperatingParams, Name: "RECEIVE COPY OPERATING PARAMETERS", Len: 16, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictWrite,
		Fields: []Field{num(FAlloc, 10, 4)}},
	{Op: OpRead16, SA: NoSA, Name: "READ (16)", Len: 16, Dir: DirIn, Xfer: XferBlocks, Conflict: ConflictRead, Effect: EffectRead, Fields: lba16(protectFUA()...)},
	{Op: OpCompareAndWrite, SA: NoSA, Name: "COMPARE AND WRITE", Len: 16, Dir: DirOut, Xfer: XferTwice, Conflict: ConflictWrite, Effect: EffectWrite,
		Fields: with(protectFUA(), num(FLBA, 2, 8), num(FCount, 13, 1), bits(FGroup, 14, 0, 5))},
	{Op: OpWrite16, SA: NoSA, Name: "WRITE (16)", Len: 16, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: lba16(protectFUA()...)},
	{Op: OpOrWrite16, SA: NoSA, Name: "ORWRITE (16)", Len: 16, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: lba16(protectFUA()...)},
	{Op: OpWriteVerify16, SA: NoSA, Name: "WRITE AND VERIFY (16)", Len: 16, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: lba16(protectCheck()...)},
	{Op: OpVerify16, SA: NoSA, Name: "VERIFY (16)", Len: 16, Dir: DirOut, Xfer: XferByteCheck, Conflict: ConflictRead, Effect: EffectRead, Fields: lba16(protectCheck()...)},
	{Op: OpPrefetch16, SA: NoSA, Name: "PRE-FETCH (16)", Len: 16, Conflict: ConflictRead, Effect: EffectRead, Fields: lba16(flag(FImmed, 1, 1))},
	{Op: OpSynchronizeCache16, SA: NoSA, Name: "SYNCHRONIZE CACHE (16)", Len: 16, Conflict: ConflictWrite, Effect: EffectFlush, Timeout: 60, Fields: lba16(flag(FImmed, 1, 1))},
	{Op: OpWriteSame16, SA: NoSA, Name: "WRITE SAME (16)", Len: 16, Dir: DirOut, Xfer: XferOneBlock, Conflict: ConflictWrite, Effect: EffectWrite, Timeout: 600,
		Fields: lba16(bits(FProtect, 1, 5, 3), flag(FAnchor, 1, 4), flag(FUnmap, 1, 3), flag(FPBData, 1, 2), flag(FLBData, 1, 1), flag(FNDOB, 1, 0))},
	{Op: OpWriteAtomic16, SA: NoSA, Name: "WRITE ATOMIC (16)", Len: 16, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite,
		Fields: with(protectFUA(), num(FLBA, 2, 8), num(FBoundary, 10, 2), num(FCount, 12, 2), bits(FGroup, 14, 0, 5))},
	{Op: OpServiceActionIn16, SA: SAReadCapacity16, Name: "READ CAPACITY (16)", Len: 16, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictLegacy, Effect: EffectState,
		Fields: []Field{num(FLBA, 2, 8), num(FAlloc, 10, 4), flag(FPMI, 14, 0)}},
	{Op: OpServiceActionIn16, SA: SAGetLBAStatus, Name: "GET LBA STATUS", Len: 16, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead, Effect: EffectRead,
		Fields: []Field{num(FLBA, 2, 8), num(FAlloc, 10, 4)}},
	{Op: OpReportLuns, SA: NoSA, Name: "REPORT LUNS", Len: 12, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictNever,
		Fields: []Field{num(FSelectReport, 2, 1), num(FAlloc, 6, 4)}},
	{Op: OpMaintenanceIn, SA: SAReportTPG, Name: "REPORT TARGET PORT GROUPS", Len: 12, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictNever,
		Fields: []Field{bits(FDataFormat, 1, 5, 3), num(FAlloc, 6, 4)}},
	{Op: OpMaintenanceIn, SA: SAReportSupportedOps, Name: "REPORT SUPPORTED OPERATION CODES", Len: 12, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead,
		Fields: []Field{flag(FRCTD, 2, 7), bits(FReportOptions, 2, 0, 3), num(FRequestedOp, 3, 1), num(FRequestedSA, 4, 2), num(FAlloc, 6, 4)}},
	{Op: OpMaintenanceIn, SA: SAReportSupportedTMF, Name: "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", Len: 12, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead,
		Fields: []Field{flag(FREPD, 2, 7), num(FAlloc, 6, 4)}},
	{Op: OpMaintenanceOut, SA: SASetTPG, Name: "SET TARGET PORT GROUPS", Len: 12, Dir: DirOut, Xfer: XferParam, Conflict: ConflictWrite, Effect: EffectConfig,
		Fields: []Field{num(FParamLen, 6, 4)}},
	{Op: OpRead12, SA: NoSA, Name: "READ (12)", Len: 12, Dir: DirIn, Xfer: XferBlocks, Conflict: ConflictRead, Effect: EffectRead, Fields: lba12(protectFUA()...)},
	{Op: OpWrite12, SA: NoSA, Name: "WRITE (12)", Len: 12, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: lba12(protectFUA()...)},
	{Op: OpWriteVerify12, SA: NoSA, Name: "WRITE AND VERIFY (12)", Len: 12, Dir: DirOut, Xfer: XferBlocks, Conflict: ConflictWrite, Effect: EffectWrite, Fields: lba12(protectCheck()...)},
	{Op: OpVerify12, SA: NoSA, Name: "VERIFY (12)", Len: 12, Dir: DirOut, Xfer: XferByteCheck, Conflict: ConflictRead, Effect: EffectRead, Fields: lba12(protectCheck()...)},
	{Op: OpReadDefectData12, SA: NoSA, Name: "READ DEFECT DATA (12)", Len: 12, Dir: DirIn, Xfer: XferAlloc, Conflict: ConflictRead, Effect: EffectState,
		Fields: []Field{flag(FReqPlist, 1, 4), flag(FReqGlist, 1, 3), bits(FDefectFormat, 1, 0, 3), num(FDescIndex, 2, 4), num(FAlloc, 6, 4)}},
}

func sanitize() []Field {
	return []Field{flag(FImmed, 1, 7), flag(FZNR, 1, 6), flag(FAUSE, 1, 5), num(FParamLen, 7, 2)}
}

func prIn() []Field { return []Field{num(FAlloc, 7, 2)} }

func prOut() []Field {
	return []Field{bits(FScope, 2, 4, 4), bits(FType, 2, 0, 4), num(FParamLen, 5, 4)}
}

// opRow is what the first byte of a CDB leads to.
type opRow struct {
	one  *Command     // without service actions
	bySA [32]*Command // by service action
	some bool
}

// table is built before any package that uses it is initialised, and read-only
// from then on.
var table = buildTable()

func buildTable() *[256]opRow {
	t := new([256]opRow)
	for _, c := range Commands {
		for i, f := range c.Fields {
			c.index[f.ID] = int8(i + 1)
		}
		if c.Timeout == 0 {
			c.Timeout = 30
		}
		r := &t[c.Op]
		r.some = true
		if c.SA == NoSA {
			r.one = c
		} else {
			r.bySA[c.SA] = c
		}
	}
	return t
}

// Find returns the row of an operation code and service action; sa is ignored
// for operation codes without one. It returns nil for what the table does not
// hold.
func Find(op Opcode, sa int) *Command {
	r := &table[op]
	if r.one != nil {
		return r.one
	}
	if sa < 0 || sa >= len(r.bySA) {
		return nil
	}
	return r.bySA[sa]
}

// HasServiceActions tells whether the operation code is qualified by a service
// action.
func HasServiceActions(op Opcode) bool { return table[op].some && table[op].one == nil }

// Known tells whether the table has any row with this operation code.
func Known(op Opcode) bool { return table[op].some }

// Usage is the CDB usage data of REPORT SUPPORTED OPERATION CODES (SPC-4
// 6.35.3): the operation code, the service action in its place, and a 1 for
// every bit that the command reads. The control byte is 0: neither NACA nor
// LINK is supported.
func (c *Command) Usage() []byte {
	u := make([]byte, c.Len)
	u[0] = byte(c.Op)
	for _, f := range c.Fields {
		f.put(u, f.mask())
	}
	if c.SA != NoSA {
		u[1] |= byte(c.SA)
	}
	return u
}

func (o Opcode) String() string {
	r := &table[o]
	switch {
	case r.one != nil:
		return r.one.Name
	case r.some:
		for _, c := range r.bySA {
			if c != nil {
				return fmt.Sprintf("operation code %02xh (%s, ...)", uint8(o), c.Name)
			}
		}
	}
	return fmt.Sprintf("operation code %02xh", uint8(o))
}
