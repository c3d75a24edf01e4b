package target

import (
	"context"
	"math/bits"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// handlers is the device server: which commands there are, and what runs them.
// It is filled by init because the handlers of REPORT SUPPORTED OPERATION CODES
// look at it.
var handlers = map[*scsi.Command]*handler{}

func handle(op scsi.Opcode, sa int, h handler) {
	c := scsi.Find(op, sa)
	if c == nil {
		panic("handler for a command that the table does not hold")
	}
	if c.SA == scsi.NoSA && sa != scsi.NoSA {
		panic("service action of a command without any: " + c.Name)
	}
	handlers[c] = &h
}

func init() {
	none := scsi.NoSA
	handle(scsi.OpInquiry, none, handler{check: checkInquiry, run: runInquiry, memory: true, noLUN: true})
	handle(scsi.OpReportLuns, none, handler{check: checkReportLuns, run: runReportLuns, memory: true, noLUN: true})
	handle(scsi.OpRequestSense, none, handler{run: runRequestSense, memory: true, noLUN: true})
	handle(scsi.OpTestUnitReady, none, handler{run: runNothing, memory: true})
	handle(scsi.OpReadCapacity10, none, handler{check: checkCapacity10, run: runCapacity10, memory: true})
	handle(scsi.OpServiceActionIn16, scsi.SAReadCapacity16, handler{run: runCapacity16, memory: true})
	for _, op := range []scsi.Opcode{scsi.OpModeSense6, scsi.OpModeSense10} {
		handle(op, none, handler{check: checkModeSense, run: runModeSense, memory: true})
	}
	for _, op := range []scsi.Opcode{scsi.OpModeSelect6, scsi.OpModeSelect10} {
		handle(op, none, handler{check: checkModeSelect, run: runModeSelect, slow: true})
	}
	for _, op := range []scsi.Opcode{scsi.OpRead6, scsi.OpRead10, scsi.OpRead12, scsi.OpRead16} {
		handle(op, none, handler{check: checkProtect, run: runRead})
	}
	for _, op := range []scsi.Opcode{scsi.OpWrite6, scsi.OpWrite10, scsi.OpWrite12, scsi.OpWrite16} {
		handle(op, none, handler{check: checkProtect, run: runWrite})
	}
	for _, op := range []scsi.Opcode{scsi.OpSynchronizeCache10, scsi.OpSynchronizeCache16} {
		handle(op, none, handler{run: runFlush, slow: true})
	}
}

func runNothing(*exec) error { return nil }

// checkProtect refuses protection information: the medium has none.
func checkProtect(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FProtect) != 0 {
		return scsi.InvalidField(&t.cdb, scsi.FProtect)
	}
	return nil
}

func (u *logicalUnit) capacity() *scsi.Capacity {
	i := u.dev.Info()
	return &scsi.Capacity{
		LastLBA: u.blocks() - 1, BlockSize: uint32(i.BlockSize),
		PhysExponent: uint8(bits.Len(uint(i.PhysBlock/i.BlockSize)) - 1),
		Thin:         i.Caps.Thin, ThinReadsZeros: i.Caps.Thin && i.Caps.UnmapZeroes,
	}
}

func checkCapacity10(t *task) *scsi.Sense {
	if !t.cdb.Is(scsi.FPMI) && t.cdb.LBA() != 0 {
		return scsi.InvalidField(&t.cdb, scsi.FLBA)
	}
	return nil
}

func runCapacity10(x *exec) error {
	x.reply(x.lu.capacity().Bytes10())
	return nil
}

func runCapacity16(x *exec) error {
	x.reply(x.lu.capacity().Bytes16())
	return nil
}

// runRead reads what the initiator has room for.
func runRead(x *exec) error {
	bs := uint64(x.lu.blockSize())
	all := x.cdb.Blocks() * bs
	n := min(all, (uint64(x.edtl)+bs-1)/bs*bs)
	if !x.read {
		n = 0
	}
	if n > 0 {
		if !x.s.srv.reserve(int64(n)) {
			x.status = scsi.StatusTaskSetFull
			return nil
		}
		x.held = int64(n)
		x.dbuf = block.Get(int(n))
		if err := x.lu.dev.ReadAt(x.ctx, x.dbuf.B, x.offset()); err != nil {
			return x.fail("read", err)
		}
		x.data = x.dbuf.B
	}
	x.moved = all
	return nil
}

func runWrite(x *exec) error {
	p := x.written()
	if len(p) == 0 {
		return nil
	}
	if err := x.lu.dev.WriteAt(x.ctx, p, x.offset(), x.flags()); err != nil {
		return x.fail("write", err)
	}
	return nil
}

// runFlush makes the whole store durable; a range is no cheaper. With IMMED the
// status comes at once and a failure is told to the next flush, which the store
// keeps failing.
func runFlush(x *exec) error {
	if x.cdb.Is(scsi.FImmed) {
		x.lu.background(func(ctx context.Context) { _ = x.lu.dev.Flush(ctx) })
		return nil
	}
	if err := x.lu.dev.Flush(x.ctx); err != nil {
		return x.fail("flush", err)
	}
	return nil
}

// background runs f outside of any command; the server's Close waits for it.
func (u *logicalUnit) background(f func(context.Context)) {
	u.pool.wg.Add(1)
	go func() {
		defer u.pool.wg.Done()
		f(context.Background())
	}()
}
