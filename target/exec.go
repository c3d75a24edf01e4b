package target

import (
	"context"
	"errors"
	"fmt"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// exec is a command at work.
type exec struct {
	*task
	ctx    context.Context
	status scsi.Status // other than GOOD, with a nil error
	data   []byte
	dbuf   *block.Buf
	moved  uint64 // bytes that the CDB asks for, when more than data holds
}

// handler runs one command of the table. What has no handler is not supported
// and is not reported as supported.
type handler struct {
	// check judges the CDB before any data are asked for; nil = nothing to check.
	check func(*task) *scsi.Sense
	run   func(*exec) error
	// memory: never touches the backend, so it runs on the reader and takes no
	// range. slow: always handed off. whole: locks all blocks.
	memory, slow, whole bool
	// unlocked: takes its ranges itself.
	unlocked bool
	// noLUN: answers also where there is no logical unit.
	noLUN bool
	// exact: the expected length must be the CDB's; a cut write is not what the
	// command is for.
	exact bool
}

var errConflict = errors.New("reservation conflict")

// check runs the checks of facts/iscsi.md §2.6 in their common order. nil means
// that the command may have its data.
func (t *task) check() *outcome {
	bad := func(s *scsi.Sense) *outcome { return &outcome{status: scsi.StatusCheckCondition, sense: s} }
	if t.lu == nil && (t.bad != nil || t.h == nil || !t.h.noLUN) {
		return bad(scsi.Check(scsi.IllegalRequest, scsi.ASCLUNotSupported))
	}
	if t.bad != nil {
		switch {
		case errors.Is(t.bad, scsi.ErrServiceAction):
			return bad(&scsi.Sense{Key: scsi.IllegalRequest, Code: scsi.ASCInvalidFieldCDB, Pointer: &scsi.FieldPointer{InCDB: true, Byte: 1, Bit: 4}})
		case errors.Is(t.bad, scsi.ErrControl):
			return bad(&scsi.Sense{Key: scsi.IllegalRequest, Code: scsi.ASCInvalidFieldCDB, Pointer: &scsi.FieldPointer{InCDB: true, Byte: uint16(t.cdb.Cmd.Len - 1), Bit: 2}})
		}
		return bad(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidOpcode))
	}
	if t.h == nil {
		return bad(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidOpcode))
	}
	cmd := t.cdb.Cmd
	if t.attr >= iscsi.AttrACA { // NormACA is 0: there is never an ACA to add to
		return bad(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidMessage))
	}
	if t.lu != nil && !t.lu.supports(cmd) {
		if cmd.SA != scsi.NoSA {
			return bad(&scsi.Sense{Key: scsi.IllegalRequest, Code: scsi.ASCInvalidFieldCDB, Pointer: &scsi.FieldPointer{InCDB: true, Byte: 1, Bit: 4}})
		}
		return bad(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidOpcode))
	}
	if t.lu != nil {
		switch cmd.Op {
		case scsi.OpInquiry, scsi.OpReportLuns, scsi.OpRequestSense:
		default:
			if code, ok := t.s.attention(t.lu); ok {
				return bad(scsi.Check(scsi.UnitAttention, code))
			}
		}
		if t.lu.res.Conflicts(t.s.nexus, t.cdb.Conflict()) {
			return &outcome{status: scsi.StatusReservationConflict}
		}
		if s := t.mediumReady(cmd); s != nil {
			return bad(s)
		}
	}
	if t.h.check != nil {
		if s := t.h.check(t); s != nil {
			return bad(s)
		}
	}
	if t.lu != nil {
		if s := t.checkRange(); s != nil {
			return bad(s)
		}
		if cmd.Effect == scsi.EffectWrite && (t.ent.readOnly || t.lu.mode.writeProtected() || t.lu.dev.Info().Caps.ReadOnly) {
			return bad(scsi.Check(scsi.DataProtect, scsi.ASCWriteProtected))
		}
		if n := t.cdb.TransferLength(t.lu.blockSize()); n > maxTransfer && (cmd.Xfer == scsi.XferBlocks || cmd.Xfer == scsi.XferTwice || cmd.Xfer == scsi.XferByteCheck || cmd.Xfer == scsi.XferParam) {
			id := scsi.FCount
			if cmd.Xfer == scsi.XferParam {
				id = scsi.FParamLen
			}
			return bad(scsi.InvalidField(&t.cdb, id))
		}
	}
	if t.h.exact && uint64(t.edtl) != t.transferLength() {
		return bad(scsi.Check(scsi.IllegalRequest, scsi.ASCParamListLength))
	}
	// A write whose data phase has the wrong direction has no data and cannot be
	// GOOD; a read moves nothing then, which the residual tells.
	if t.edtl > 0 && t.cdb.Direction() == scsi.DirOut && !t.write {
		return bad(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidFieldCDB))
	}
	if t.full {
		return &outcome{status: scsi.StatusTaskSetFull}
	}
	// Data are asked for only from a unit that would take them; run asks again.
	if t.missing {
		op := gateOp(cmd)
		in := t.s.incarnation(t.lu)
		err := t.lu.gate.Enter(in, op)
		if err == nil {
			err = t.lu.gate.Leave(in, op)
		}
		if err != nil && !errors.Is(err, ErrUnsure) && !errors.Is(err, ErrReset) { // run decides on those
			o := (&exec{task: t}).outcome(err)
			return &o
		}
	}
	return nil
}

// mediumReady checks the state of the medium.
func (t *task) mediumReady(cmd *scsi.Command) *scsi.Sense {
	m := &t.lu.medium
	if p := m.sanitizing.Load(); p >= 0 {
		switch cmd.Op {
		case scsi.OpInquiry, scsi.OpReportLuns, scsi.OpRequestSense, scsi.OpPersistentReserveIn, scsi.OpPersistentReserve, scsi.OpReserve6, scsi.OpReserve10,
			scsi.OpRelease6, scsi.OpRelease10, scsi.OpLogSense, scsi.OpModeSense6, scsi.OpModeSense10, scsi.OpMaintenanceIn:
		default:
			return &scsi.Sense{Key: scsi.NotReady, Code: scsi.ASC(m.busy.Load()), HasProgress: true, Progress: uint16(p)}
		}
	}
	if m.sanitizeKO.Load() && (cmd.Effect == scsi.EffectRead || cmd.Effect == scsi.EffectWrite) && cmd.Op != scsi.OpSanitize && cmd.Op != scsi.OpFormatUnit {
		return scsi.Check(scsi.MediumError, scsi.ASC(m.ko.Load()))
	}
	switch cmd.Effect {
	case scsi.EffectRead, scsi.EffectWrite, scsi.EffectFlush, scsi.EffectState:
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.ejected {
			return scsi.Check(scsi.NotReady, scsi.ASCMediumNotPresent)
		}
	}
	return nil
}

// checkRange compares LBA and length with the capacity, without wrapping.
func (t *task) checkRange() *scsi.Sense {
	cmd := t.cdb.Cmd
	if !cmd.Has(scsi.FLBA) || cmd.Op == scsi.OpReadCapacity10 || cmd.Op == scsi.OpServiceActionIn16 && cmd.SA == scsi.SAReadCapacity16 {
		return nil
	}
	lba, n, capacity := t.cdb.LBA(), uint64(0), t.lu.blocks()
	if cmd.Has(scsi.FCount) {
		n = t.cdb.Blocks()
	}
	if lba >= capacity || n > capacity-lba {
		return &scsi.Sense{Key: scsi.IllegalRequest, Code: scsi.ASCLBAOutOfRange, Pointer: &scsi.FieldPointer{InCDB: true, Byte: uint16(cmd.Fields[0].Byte), Bit: -1}}
	}
	return nil
}

// drop gives back what the command read.
func (x *exec) drop() {
	if x.dbuf != x.buf {
		x.dbuf.Free()
	}
	x.dbuf, x.data = nil, nil
}

// outcome makes status and sense of what a handler returned.
func (x *exec) outcome(err error) outcome {
	if err == nil {
		return outcome{status: x.status, data: x.data, buf: x.dbuf, moved: x.moved}
	}
	x.drop()
	if errors.Is(err, errConflict) {
		return outcome{status: scsi.StatusReservationConflict}
	}
	return outcome{status: scsi.StatusCheckCondition, sense: senseOf(err, x.cdb.Cmd.Effect)}
}

// senseOf maps the errors of gates and devices (block/device.go).
func senseOf(err error, e scsi.Effect) *scsi.Sense {
	var s *scsi.Sense
	if errors.As(err, &s) {
		return s
	}
	code := func(k scsi.Key, a scsi.ASC) *scsi.Sense { return scsi.Check(k, a) }
	switch {
	case errors.Is(err, ErrNotReady), errors.Is(err, ErrUnsure):
		return code(scsi.NotReady, scsi.ASCTransition)
	case errors.Is(err, ErrStandby):
		return code(scsi.NotReady, scsi.ASCStandby)
	case errors.Is(err, ErrUnavailable), errors.Is(err, block.ErrClosed), errors.Is(err, block.ErrUnreachable):
		return code(scsi.NotReady, scsi.ASCUnavailable)
	case errors.Is(err, block.ErrNoSpace):
		return code(scsi.DataProtect, scsi.ASCSpaceAllocationFailed)
	case errors.Is(err, block.ErrReadOnly):
		return code(scsi.DataProtect, scsi.ASCWriteProtected)
	case errors.Is(err, block.ErrOutOfRange), errors.Is(err, block.ErrMisaligned):
		return code(scsi.IllegalRequest, scsi.ASCLBAOutOfRange)
	case errors.Is(err, block.ErrMedium):
		if e == scsi.EffectWrite || e == scsi.EffectFlush {
			return code(scsi.MediumError, scsi.ASCWriteError)
		}
		return code(scsi.MediumError, scsi.ASCReadError)
	}
	return code(scsi.HardwareError, scsi.ASCInternalFailure)
}

// reply sets the data-in, cut to the allocation length.
func (x *exec) reply(b []byte) {
	if x.cdb.Cmd.Xfer == scsi.XferAlloc {
		if n := x.cdb.Get(scsi.FAlloc); uint64(len(b)) > n {
			b = b[:n]
		}
	}
	x.data = b
}

// params is the parameter list of a data-out command. A list that the initiator
// did not send whole is 05/1A/00.
func (x *exec) params() ([]byte, error) {
	n := x.cdb.TransferLength(x.lu.blockSize())
	if n == 0 {
		return nil, nil
	}
	if uint64(x.want) < n || x.buf == nil {
		return nil, scsi.Check(scsi.IllegalRequest, scsi.ASCParamListLength)
	}
	return x.buf.B[:n], nil
}

// written is the whole blocks of a write's data-out. An expected length below
// the CDB's cuts the write, and the residual tells so (RFC 7143 11.4.5).
func (x *exec) written() []byte {
	if x.buf == nil {
		return nil
	}
	bs := x.lu.blockSize()
	return x.buf.B[:x.want/bs*bs]
}

func (x *exec) offset() int64 { return int64(x.cdb.LBA()) * int64(x.lu.blockSize()) }

// flags of a write: FUA when asked for, or when the write cache is off.
func (x *exec) flags() (f block.Flags) {
	if x.cdb.Is(scsi.FFUA) || !x.lu.mode.writeCache() {
		f |= block.FUA
	}
	return f
}

func (x *exec) fail(op string, err error) error {
	return fmt.Errorf("%s lun %d: %s: %w", x.s.tgt.iqn, x.ent.num, op, err)
}
