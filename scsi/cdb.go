package scsi

import (
	"errors"
	"fmt"
)

// Errors of CDB decoding. The target answers them with INVALID COMMAND
// OPERATION CODE and INVALID FIELD IN CDB.
var (
	ErrOpcode        = errors.New("operation code is not known")         // 05/20/00
	ErrServiceAction = errors.New("service action is not known")         // 05/24/00, field pointer to byte 1
	ErrShortCDB      = errors.New("cdb is shorter than its command")     // 05/24/00
	ErrControl       = errors.New("NACA or LINK in the control byte")    // 05/24/00
	ErrNoField       = errors.New("the command has no such field")       // a programming error of a builder's caller
	ErrFieldRange    = errors.New("value does not fit the field's bits") // likewise
)

// MaxCDB is the longest CDB of the table.
const MaxCDB = 16

// CDB is a decoded command descriptor block.
type CDB struct {
	Cmd *Command
	Raw [MaxCDB]byte
}

// Decode looks a CDB up. b may be longer than the command's CDB (iSCSI pads to
// 16 bytes); what follows is ignored.
func Decode(b []byte) (CDB, error) {
	var c CDB
	if len(b) == 0 {
		return c, fmt.Errorf("decode cdb: %w: empty", ErrShortCDB)
	}
	row := &table[b[0]]
	if !row.some {
		return c, fmt.Errorf("decode cdb: %w: %02xh", ErrOpcode, b[0])
	}
	cmd := row.one
	if cmd == nil {
		if len(b) < 2 {
			return c, fmt.Errorf("decode cdb: %w: %d bytes", ErrShortCDB, len(b))
		}
		if cmd = row.bySA[b[1]&0x1F]; cmd == nil {
			return c, fmt.Errorf("decode cdb %02xh: %w: %02xh", b[0], ErrServiceAction, b[1]&0x1F)
		}
	}
	if len(b) < cmd.Len {
		return c, fmt.Errorf("decode cdb %s: %w: %d bytes of %d", cmd.Name, ErrShortCDB, len(b), cmd.Len)
	}
	c.Cmd = cmd
	copy(c.Raw[:cmd.Len], b)
	if c.Raw[cmd.Len-1]&0x05 != 0 {
		return c, fmt.Errorf("decode cdb %s: %w", cmd.Name, ErrControl)
	}
	return c, nil
}

// Bytes is the CDB as it travels, Cmd.Len bytes.
func (c *CDB) Bytes() []byte { return c.Raw[:c.Cmd.Len] }

// Get returns the value of a field, 0 if the command has none.
func (c *CDB) Get(id FieldID) uint64 {
	i := c.Cmd.index[id]
	if i == 0 {
		return 0
	}
	return c.Cmd.Fields[i-1].get(c.Raw[:])
}

// Is tells whether a one-bit field is set.
func (c *CDB) Is(id FieldID) bool { return c.Get(id) != 0 }

// LBA is the logical block address, 0 if the command has none.
func (c *CDB) LBA() uint64 { return c.Get(FLBA) }

// Blocks is the number of logical blocks that the command addresses. The 0 of
// READ (6) and WRITE (6) means 256 (SBC-3 5.8).
func (c *CDB) Blocks() uint64 {
	n := c.Get(FCount)
	if n == 0 && (c.Cmd.Op == OpRead6 || c.Cmd.Op == OpWrite6) {
		return 256
	}
	return n
}

// TransferLength is the number of bytes that the command wants to move in its
// direction, for a logical block of bs bytes. For data-in by allocation length
// it is the upper limit.
func (c *CDB) TransferLength(bs int) uint64 {
	switch c.Cmd.Xfer {
	case XferBlocks:
		return c.Blocks() * uint64(bs)
	case XferAlloc:
		return c.Get(FAlloc)
	case XferParam:
		return c.Get(FParamLen)
	case XferOneBlock:
		if c.Is(FNDOB) {
			return 0
		}
		return uint64(bs)
	case XferTwice:
		return 2 * c.Blocks() * uint64(bs)
	case XferByteCheck:
		switch c.Get(FByteCheck) {
		case 1:
			return c.Blocks() * uint64(bs)
		case 3:
			return uint64(bs)
		}
	case XferFixed8:
		return 8
	}
	return 0
}

// Direction is the direction of the data phase of this CDB; it differs from the
// table's where a field switches the data phase off.
func (c *CDB) Direction() Direction {
	if c.Cmd.Dir == DirOut {
		switch c.Cmd.Xfer {
		case XferByteCheck:
			if c.Get(FByteCheck) == 0 {
				return DirNone
			}
		case XferOneBlock:
			if c.Is(FNDOB) {
				return DirNone
			}
		case XferParam:
			if c.Get(FParamLen) == 0 {
				return DirNone
			}
		case XferFormat:
			if !c.Is(FFmtData) {
				return DirNone
			}
		}
	}
	return c.Cmd.Dir
}

// Conflict is the reservation class of this CDB, with the classes that depend
// on a field (PREVENT ALLOW, START STOP UNIT) resolved.
func (c *CDB) Conflict() Conflict {
	switch c.Cmd.Conflict {
	case ConflictPrevent:
		if c.Get(FPrevent) == 0 {
			return ConflictNever
		}
		return ConflictWrite
	case ConflictStart:
		if c.Is(FStart) && c.Get(FPowerCondition) == 0 {
			return ConflictLegacy
		}
		return ConflictWrite
	}
	return c.Cmd.Conflict
}

// Pointer is the place of a field in this CDB for sense data.
func (c *CDB) Pointer(id FieldID) FieldPointer {
	if c.Cmd == nil {
		return FieldPointer{InCDB: true, Bit: -1}
	}
	i := c.Cmd.index[id]
	if i == 0 {
		return FieldPointer{InCDB: true, Bit: -1}
	}
	f := c.Cmd.Fields[i-1]
	return FieldPointer{InCDB: true, Byte: uint16(f.Byte), Bit: f.Bit()}
}

// Arg is a field with its value, for Build.
type Arg struct {
	ID    FieldID
	Value uint64
}

// Build makes a CDB from the table. It fails with ErrOpcode, ErrNoField or
// ErrFieldRange.
func Build(op Opcode, sa int, args ...Arg) (CDB, error) {
	cmd := Find(op, sa)
	if cmd == nil {
		return CDB{}, fmt.Errorf("build cdb: %w: %02xh service action %d", ErrOpcode, uint8(op), sa)
	}
	c := CDB{Cmd: cmd}
	c.Raw[0] = byte(op)
	if cmd.SA != NoSA {
		c.Raw[1] = byte(cmd.SA)
	}
	for _, a := range args {
		i := cmd.index[a.ID]
		if i == 0 {
			return CDB{}, fmt.Errorf("build cdb %s: %w: %s", cmd.Name, ErrNoField, a.ID)
		}
		f := cmd.Fields[i-1]
		if a.Value&^f.mask() != 0 {
			return CDB{}, fmt.Errorf("build cdb %s: %w: %s = %d, %d bits", cmd.Name, ErrFieldRange, a.ID, a.Value, f.Width)
		}
		f.put(c.Raw[:], a.Value)
	}
	return c, nil
}

func must(c CDB, err error) CDB {
	if err != nil {
		panic(err)
	}
	return c
}

// TestUnitReady builds TEST UNIT READY.
func TestUnitReady() CDB { return must(Build(OpTestUnitReady, NoSA)) }

// InquiryCDB builds INQUIRY for standard data, alloc in bytes.
func InquiryCDB(alloc uint16) CDB {
	return must(Build(OpInquiry, NoSA, Arg{FAlloc, uint64(alloc)}))
}

// InquiryVPD builds INQUIRY with EVPD for one page.
func InquiryVPD(page uint8, alloc uint16) CDB {
	return must(Build(OpInquiry, NoSA, Arg{FEVPD, 1}, Arg{FPage, uint64(page)}, Arg{FAlloc, uint64(alloc)}))
}

// ReportLunsCDB builds REPORT LUNS.
func ReportLunsCDB(selectReport uint8, alloc uint32) CDB {
	return must(Build(OpReportLuns, NoSA, Arg{FSelectReport, uint64(selectReport)}, Arg{FAlloc, uint64(alloc)}))
}

// ReadCapacity10CDB builds READ CAPACITY (10).
func ReadCapacity10CDB() CDB { return must(Build(OpReadCapacity10, NoSA)) }

// ReadCapacity16CDB builds READ CAPACITY (16).
func ReadCapacity16CDB(alloc uint32) CDB {
	return must(Build(OpServiceActionIn16, SAReadCapacity16, Arg{FAlloc, uint64(alloc)}))
}

// Read builds READ (16), the one form that addresses every block.
func Read(lba uint64, blocks uint32) CDB {
	return must(Build(OpRead16, NoSA, Arg{FLBA, lba}, Arg{FCount, uint64(blocks)}))
}

// Write builds WRITE (16); with fua the data are durable before status.
func Write(lba uint64, blocks uint32, fua bool) CDB {
	c := must(Build(OpWrite16, NoSA, Arg{FLBA, lba}, Arg{FCount, uint64(blocks)}))
	if fua {
		c.Raw[1] |= 1 << 3
	}
	return c
}

// SynchronizeCache builds SYNCHRONIZE CACHE (16); 0 blocks means to the end.
func SynchronizeCache(lba uint64, blocks uint32) CDB {
	return must(Build(OpSynchronizeCache16, NoSA, Arg{FLBA, lba}, Arg{FCount, uint64(blocks)}))
}

// UnmapCDB builds UNMAP for a parameter list of n bytes.
func UnmapCDB(n uint16) CDB { return must(Build(OpUnmap, NoSA, Arg{FParamLen, uint64(n)})) }

// WriteSame builds WRITE SAME (16); unmap lets the target deallocate, ndob says
// that there is no data-out and the block is zeroes.
func WriteSame(lba uint64, blocks uint32, unmap, ndob bool) CDB {
	c := must(Build(OpWriteSame16, NoSA, Arg{FLBA, lba}, Arg{FCount, uint64(blocks)}))
	if unmap {
		c.Raw[1] |= 1 << 3
	}
	if ndob {
		c.Raw[1] |= 1
	}
	return c
}

// CompareAndWrite builds COMPARE AND WRITE.
func CompareAndWrite(lba uint64, blocks uint8) CDB {
	return must(Build(OpCompareAndWrite, NoSA, Arg{FLBA, lba}, Arg{FCount, uint64(blocks)}))
}

// GetLBAStatus builds GET LBA STATUS.
func GetLBAStatus(lba uint64, alloc uint32) CDB {
	return must(Build(OpServiceActionIn16, SAGetLBAStatus, Arg{FLBA, lba}, Arg{FAlloc, uint64(alloc)}))
}

// ModeSense10 builds MODE SENSE (10) for current values.
func ModeSense10(page, subpage uint8, alloc uint16) CDB {
	return must(Build(OpModeSense10, NoSA, Arg{FPage, uint64(page & 0x3F)}, Arg{FSubpage, uint64(subpage)}, Arg{FAlloc, uint64(alloc)}))
}

// RequestSenseCDB builds REQUEST SENSE.
func RequestSenseCDB(alloc uint8) CDB {
	return must(Build(OpRequestSense, NoSA, Arg{FAlloc, uint64(alloc)}))
}

// PersistentReserveIn builds PERSISTENT RESERVE IN.
func PersistentReserveIn(sa int, alloc uint16) (CDB, error) {
	return Build(OpPersistentReserveIn, sa, Arg{FAlloc, uint64(alloc)})
}

// PersistentReserveOut builds PERSISTENT RESERVE OUT with logical unit scope.
func PersistentReserveOut(sa int, typ PRType, paramLen uint32) (CDB, error) {
	return Build(OpPersistentReserve, sa, Arg{FType, uint64(typ)}, Arg{FParamLen, uint64(paramLen)})
}

// ReportTPG builds REPORT TARGET PORT GROUPS; extended asks for the extended
// header.
func ReportTPG(extended bool, alloc uint32) CDB {
	f := uint64(0)
	if extended {
		f = 1
	}
	return must(Build(OpMaintenanceIn, SAReportTPG, Arg{FDataFormat, f}, Arg{FAlloc, uint64(alloc)}))
}
