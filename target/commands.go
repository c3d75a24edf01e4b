package target

import (
	"bytes"
	"encoding/binary"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func init() {
	none := scsi.NoSA
	for _, op := range []scsi.Opcode{scsi.OpVerify10, scsi.OpVerify12, scsi.OpVerify16} {
		handle(op, none, handler{check: checkVerify, run: runVerify, slow: true})
	}
	for _, op := range []scsi.Opcode{scsi.OpWriteVerify10, scsi.OpWriteVerify12, scsi.OpWriteVerify16} {
		handle(op, none, handler{check: checkWriteVerify, run: runWriteVerify, slow: true})
	}
	for _, op := range []scsi.Opcode{scsi.OpWriteSame10, scsi.OpWriteSame16} {
		handle(op, none, handler{check: checkWriteSame, run: runWriteSame, slow: true, exact: true})
	}
	handle(scsi.OpUnmap, none, handler{check: checkUnmap, run: runUnmap, slow: true})
	handle(scsi.OpServiceActionIn16, scsi.SAGetLBAStatus, handler{check: checkLBAStatus, run: runLBAStatus, slow: true})
	handle(scsi.OpCompareAndWrite, none, handler{check: checkCompareAndWrite, run: runCompareAndWrite, slow: true, exact: true})
	handle(scsi.OpOrWrite16, none, handler{check: checkProtect, run: runOrWrite, slow: true})
	handle(scsi.OpWriteAtomic16, none, handler{check: checkWriteAtomic, run: runWriteAtomic, slow: true, exact: true})
	for _, op := range []scsi.Opcode{scsi.OpPrefetch10, scsi.OpPrefetch16} {
		// Nothing is cached that a later read would find faster: GOOD, not CONDITION MET.
		handle(op, none, handler{run: runNothing, memory: true})
	}
	for _, op := range []scsi.Opcode{scsi.OpReadDefectData10, scsi.OpReadDefectData12} {
		handle(op, none, handler{run: runDefects, memory: true})
	}
	for _, op := range []scsi.Opcode{scsi.OpSeek6, scsi.OpSeek10, scsi.OpRezeroUnit} {
		handle(op, none, handler{run: runNothing, memory: true}) // old initiators want them
	}
	handle(scsi.OpStartStopUnit, none, handler{check: checkStartStop, run: runStartStop, slow: true})
	handle(scsi.OpPreventAllow, none, handler{check: checkPrevent, run: runPrevent, memory: true})
	handle(scsi.OpSendDiagnostic, none, handler{check: checkDiagnostic, run: runNothing, memory: true})
	handle(scsi.OpMaintenanceIn, scsi.SAReportSupportedOps, handler{check: checkOpcodes, run: runOpcodes, memory: true})
	handle(scsi.OpMaintenanceIn, scsi.SAReportSupportedTMF, handler{run: runTMFs, memory: true})
	handle(scsi.OpMaintenanceIn, scsi.SAReportTPG, handler{check: checkReportTPG, run: runReportTPG, memory: true})
}

// pieces calls f for parts of [off, off+n) of at most 1 MiB.
func pieces(off, n int64, f func(off, n int64) error) error {
	for n > 0 {
		c := min(n, 1<<20)
		if err := f(off, c); err != nil {
			return err
		}
		off, n = off+c, n-c
	}
	return nil
}

// miscompare is 0E/1D/00 with the byte offset of the first difference in
// INFORMATION (SBC-3 5.2), 0 if there is none.
func miscompare(at int) error {
	return &scsi.Sense{Key: scsi.Miscompare, Code: scsi.ASCMiscompare, HasInfo: true, Info: uint64(at)}
}

func differ(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// compare reads from off and compares with want, base bytes into the whole.
func (x *exec) compare(want []byte, off int64, base int) error {
	b := block.Get(1 << 20)
	defer b.Free()
	done := 0
	return pieces(off, int64(len(want)), func(off, n int64) error {
		if err := x.lu.dev.ReadAt(x.ctx, b.B[:n], off); err != nil {
			return x.fail("read for compare", err)
		}
		w := want[done : done+int(n)]
		if !bytes.Equal(b.B[:n], w) {
			return miscompare(base + done + differ(b.B[:n], w))
		}
		done += int(n)
		return nil
	})
}

func checkVerify(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FByteCheck) == 2 {
		return scsi.InvalidField(&t.cdb, scsi.FByteCheck)
	}
	return checkProtect(t)
}

func runVerify(x *exec) error {
	bs := x.lu.blockSize()
	n := int64(x.cdb.Blocks()) * int64(bs)
	switch x.cdb.Get(scsi.FByteCheck) {
	case 1:
		return x.compare(x.written(), x.offset(), 0)
	case 3:
		one, err := x.params()
		if err != nil || n == 0 {
			return err
		}
		all := block.Get(int(min(n, 1<<20)))
		defer all.Free()
		for i := 0; i < len(all.B); i += bs {
			copy(all.B[i:], one)
		}
		done := int64(0)
		return pieces(x.offset(), n, func(off, n int64) error {
			err := x.compare(all.B[:n], off, int(done))
			done += n
			return err
		})
	}
	b := block.Get(1 << 20)
	defer b.Free()
	return pieces(x.offset(), n, func(off, n int64) error {
		if err := x.lu.dev.ReadAt(x.ctx, b.B[:n], off); err != nil {
			return x.fail("verify", err)
		}
		return nil
	})
}

func checkWriteVerify(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FByteCheck) > 1 {
		return scsi.InvalidField(&t.cdb, scsi.FByteCheck)
	}
	return checkProtect(t)
}

func runWriteVerify(x *exec) error {
	if err := runWrite(x); err != nil {
		return err
	}
	return x.compare(x.written(), x.offset(), 0)
}

// toEnd is the number of blocks of a command in which 0 means to the end.
func (t *task) toEnd() uint64 {
	if n := t.cdb.Blocks(); n > 0 {
		return n
	}
	return t.lu.blocks() - t.cdb.LBA()
}

func checkWriteSame(t *task) *scsi.Sense {
	c := &t.cdb
	switch {
	case c.Is(scsi.FAnchor): // ANC_SUP is 0
		return scsi.InvalidField(c, scsi.FAnchor)
	case c.Is(scsi.FUnmap) && !t.lu.dev.Info().Caps.Thin:
		return scsi.InvalidField(c, scsi.FUnmap)
	case c.Is(scsi.FPBData):
		return scsi.InvalidField(c, scsi.FPBData)
	case c.Is(scsi.FLBData):
		return scsi.InvalidField(c, scsi.FLBData)
	}
	if s := checkProtect(t); s != nil {
		return s
	}
	if c.LBA() < t.lu.blocks() && t.toEnd() > uint64(maxWriteSameBytes/t.lu.blockSize()) {
		return scsi.InvalidField(c, scsi.FCount)
	}
	return nil
}

func runWriteSame(x *exec) error {
	one, err := x.params()
	if err != nil {
		return err
	}
	bs := int64(x.lu.blockSize())
	off, n := x.offset(), int64(x.toEnd())*bs
	// With UNMAP the blocks read as zeroes afterwards whatever the data-out holds,
	// as LIO and tgt do it and libiscsi's suite expects it.
	unmap := x.cdb.Is(scsi.FUnmap) && x.lu.dev.Info().Caps.UnmapZeroes
	if zero := one == nil || len(bytes.Trim(one, "\x00")) == 0; zero || unmap {
		fl := x.flags()
		if unmap {
			fl |= block.MayUnmap
		}
		if err := x.lu.dev.WriteZeroes(x.ctx, off, n, fl); err != nil {
			return x.fail("write zeroes", err)
		}
		return nil
	}
	b := block.Get(int(min(n, 1<<20)))
	defer b.Free()
	for i := int64(0); i < int64(len(b.B)); i += bs {
		copy(b.B[i:], one)
	}
	return pieces(off, n, func(off, n int64) error {
		if err := x.lu.dev.WriteAt(x.ctx, b.B[:n], off, x.flags()); err != nil {
			return x.fail("write same", err)
		}
		return nil
	})
}

func checkUnmap(t *task) *scsi.Sense {
	if t.cdb.Is(scsi.FAnchor) {
		return scsi.InvalidField(&t.cdb, scsi.FAnchor)
	}
	return nil
}

// atomicLimits are the longest atomic write and its unit in blocks; 0, 0 where
// the store promises none.
func (u *logicalUnit) atomicLimits() (longest, unit uint32) {
	a, ok := u.dev.(block.AtomicWriter)
	if !ok {
		return 0, 0
	}
	n, g := a.AtomicLimits()
	bs := int64(u.blockSize())
	g = max(g, bs)
	return uint32(min(n, maxTransfer) / g * g / bs), uint32(g / bs)
}

// checkWriteAtomic holds what VPD page B0 says (SBC-4 5.48). There is no atomic
// boundary: a write is one atomic write or refused.
func checkWriteAtomic(t *task) *scsi.Sense {
	c := &t.cdb
	longest, unit := t.lu.atomicLimits()
	switch {
	case c.Get(scsi.FBoundary) != 0:
		return scsi.InvalidField(c, scsi.FBoundary)
	case c.Blocks() > uint64(longest):
		return scsi.InvalidField(c, scsi.FCount)
	case c.Blocks()%uint64(unit) != 0:
		return scsi.InvalidField(c, scsi.FCount)
	case c.LBA()%uint64(unit) != 0 && c.LBA() < t.lu.blocks():
		return scsi.InvalidField(c, scsi.FLBA)
	}
	return checkProtect(t)
}

func runWriteAtomic(x *exec) error {
	a, ok := x.lu.dev.(block.AtomicWriter)
	p := x.written()
	if !ok || len(p) == 0 {
		return nil
	}
	if err := a.WriteAtomic(x.ctx, p, x.offset()); err != nil {
		return x.fail("atomic write", err)
	}
	return nil
}

// runUnmap checks every descriptor before it does the first.
func runUnmap(x *exec) error {
	b, err := x.params()
	if err != nil {
		return err
	}
	rs, bad := scsi.ParseUnmap(b)
	if bad != nil {
		return bad
	}
	if len(rs) > maxUnmapDescriptors {
		return scsi.InvalidParam(2, -1)
	}
	total, capacity := uint64(0), x.lu.blocks()
	for _, r := range rs {
		if r.LBA >= capacity && r.Blocks > 0 || r.LBA > capacity || uint64(r.Blocks) > capacity-r.LBA {
			return scsi.Check(scsi.IllegalRequest, scsi.ASCLBAOutOfRange)
		}
		total += uint64(r.Blocks)
	}
	if total > uint64(x.lu.maxUnmapBlocks()) {
		return scsi.InvalidParam(8, -1)
	}
	bs := int64(x.lu.blockSize())
	for _, r := range rs {
		if r.Blocks == 0 {
			continue
		}
		if err := x.lu.dev.Unmap(x.ctx, int64(r.LBA)*bs, int64(r.Blocks)*bs); err != nil {
			return x.fail("unmap", err)
		}
	}
	if !x.lu.mode.writeCache() && len(rs) > 0 {
		if err := x.lu.dev.Flush(x.ctx); err != nil {
			return x.fail("flush", err)
		}
	}
	return nil
}

func checkLBAStatus(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FAlloc) < 24 && t.cdb.Get(scsi.FAlloc) != 0 {
		return scsi.InvalidField(&t.cdb, scsi.FAlloc)
	}
	return nil
}

// lbaStatusSpan bounds how much of the unit one GET LBA STATUS looks at.
const lbaStatusSpan = 4 << 30

func runLBAStatus(x *exec) error {
	i := x.lu.dev.Info()
	off := x.offset()
	es, err := x.lu.dev.Extents(x.ctx, off, min(i.Size-off, lbaStatusSpan))
	if err != nil {
		return x.fail("extents", err)
	}
	room := max(1, int(min(x.cdb.Get(scsi.FAlloc), 64<<10))/16)
	var ds []scsi.LBAStatus
	for _, e := range es {
		if len(ds) == room {
			break
		}
		d := scsi.LBAStatus{LBA: uint64(e.Off) / uint64(i.BlockSize), Blocks: uint32(e.Len / int64(i.BlockSize))}
		if !e.Mapped && i.Caps.Thin {
			d.State = scsi.LBADeallocated
		}
		ds = append(ds, d)
	}
	x.reply(scsi.LBAStatusList(ds))
	return nil
}

func checkCompareAndWrite(t *task) *scsi.Sense {
	if s := checkProtect(t); s != nil {
		return s
	}
	if t.cdb.Blocks() == 0 && t.edtl > 0 { // more than the field holds
		return scsi.InvalidField(&t.cdb, scsi.FCount)
	}
	return nil
}

func runCompareAndWrite(x *exec) error {
	p, err := x.params()
	if err != nil || len(p) == 0 {
		return err
	}
	half := len(p) / 2
	if err := x.compare(p[:half], x.offset(), 0); err != nil {
		return err
	}
	if err := x.lu.dev.WriteAt(x.ctx, p[half:], x.offset(), x.flags()); err != nil {
		return x.fail("write", err)
	}
	return nil
}

func runOrWrite(x *exec) error {
	p := x.written()
	if len(p) == 0 {
		return nil
	}
	b := block.Get(len(p))
	defer b.Free()
	if err := x.lu.dev.ReadAt(x.ctx, b.B, x.offset()); err != nil {
		return x.fail("read for orwrite", err)
	}
	for i := 0; i < len(p); i += 8 { // blocks are multiples of 8
		w := binary.NativeEndian.Uint64(b.B[i:]) | binary.NativeEndian.Uint64(p[i:])
		binary.NativeEndian.PutUint64(b.B[i:], w)
	}
	if err := x.lu.dev.WriteAt(x.ctx, b.B, x.offset(), x.flags()); err != nil {
		return x.fail("write", err)
	}
	return nil
}

// runDefects returns empty lists: the stores remap nothing that SCSI would see.
func runDefects(x *exec) error {
	flags := byte(x.cdb.Get(scsi.FReqPlist)<<4 | x.cdb.Get(scsi.FReqGlist)<<3 | x.cdb.Get(scsi.FDefectFormat))
	if x.cdb.Cmd.Op == scsi.OpReadDefectData12 {
		x.reply([]byte{0, flags, 0, 0, 0, 0, 0, 0})
		return nil
	}
	x.reply([]byte{0, flags, 0, 0})
	return nil
}

func checkStartStop(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FPowerCondition) == 0 && t.cdb.Is(scsi.FLoEj) && !t.lu.removable {
		return scsi.InvalidField(&t.cdb, scsi.FLoEj)
	}
	return nil
}

// runStartStop loads and ejects removable units. A unit is shared by many hosts
// and has no motor: STOP only flushes, power conditions change nothing.
func runStartStop(x *exec) error {
	m := &x.lu.medium
	start, eject := x.cdb.Is(scsi.FStart), x.cdb.Is(scsi.FLoEj)
	if x.cdb.Get(scsi.FPowerCondition) != 0 {
		return nil
	}
	if !start && !x.cdb.Is(scsi.FNoFlush) {
		if err := x.lu.dev.Flush(x.ctx); err != nil {
			return x.fail("flush", err)
		}
	}
	if !eject {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.prevent) > 0 {
		return scsi.Check(scsi.IllegalRequest, scsi.ASCRemovalPrevented)
	}
	m.ejected = !start
	return nil
}

func checkPrevent(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FPrevent) > 1 {
		return scsi.InvalidField(&t.cdb, scsi.FPrevent)
	}
	return nil
}

func runPrevent(x *exec) error {
	m := &x.lu.medium
	m.mu.Lock()
	defer m.mu.Unlock()
	if x.cdb.Get(scsi.FPrevent) == 1 {
		m.prevent[x.s.nexus] = true
	} else {
		delete(m.prevent, x.s.nexus)
	}
	return nil
}

// checkDiagnostic takes the default self-test only.
func checkDiagnostic(t *task) *scsi.Sense {
	switch {
	case t.cdb.Get(scsi.FSelfTestCode) != 0:
		return scsi.InvalidField(&t.cdb, scsi.FSelfTestCode)
	case t.cdb.Get(scsi.FParamLen) != 0:
		return scsi.InvalidField(&t.cdb, scsi.FParamLen)
	}
	return nil
}

// supports tells whether the unit runs a command now: what is advertised works.
func (u *logicalUnit) supports(c *scsi.Command) bool {
	if c == nil || handlers[c] == nil {
		return false
	}
	switch {
	case c.Op == scsi.OpUnmap:
		return u.dev.Info().Caps.Thin
	case c.Op == scsi.OpWriteAtomic16:
		n, _ := u.atomicLimits()
		return n > 0
	case c.Op == scsi.OpSanitize && c.SA == scsi.SASanitizeCryptoErase:
		return u.canCryptoErase()
	}
	return true
}

func checkOpcodes(t *task) *scsi.Sense {
	op := scsi.Opcode(t.cdb.Get(scsi.FRequestedOp))
	switch t.cdb.Get(scsi.FReportOptions) {
	case scsi.ReportAll, scsi.ReportOneEqual:
	case scsi.ReportOne:
		if scsi.HasServiceActions(op) {
			return scsi.InvalidField(&t.cdb, scsi.FRequestedOp)
		}
	case scsi.ReportOneSA:
		if scsi.Known(op) && !scsi.HasServiceActions(op) {
			return scsi.InvalidField(&t.cdb, scsi.FRequestedOp)
		}
	default:
		return scsi.InvalidField(&t.cdb, scsi.FReportOptions)
	}
	return nil
}

func runOpcodes(x *exec) error {
	rctd := x.cdb.Is(scsi.FRCTD)
	if x.cdb.Get(scsi.FReportOptions) == scsi.ReportAll {
		var cs []*scsi.Command
		for _, c := range scsi.Commands {
			if x.lu.supports(c) {
				cs = append(cs, c)
			}
		}
		x.reply(scsi.SupportedOpcodes(cs, rctd))
		return nil
	}
	op, sa := scsi.Opcode(x.cdb.Get(scsi.FRequestedOp)), int(x.cdb.Get(scsi.FRequestedSA))
	c := scsi.Find(op, sa)
	if c != nil && (!x.lu.supports(c) || c.SA == scsi.NoSA && sa != 0) {
		c = nil
	}
	x.reply(scsi.OneOpcode(c, rctd))
	return nil
}

// runTMFs reports the task management functions (SPC-4 6.36): ABORT TASK, ABORT
// TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, TARGET RESET; I_T NEXUS RESET is
// a logout.
func runTMFs(x *exec) error {
	const ats, atss, cts, lur, tr, itnr = 0x80, 0x40, 0x10, 0x08, 0x02, 0x01
	b := []byte{ats | atss | cts | lur | tr, itnr, 0, 0}
	if x.cdb.Is(scsi.FREPD) {
		b[3] = 12
		b = append(b, make([]byte, 12)...)
	}
	x.reply(b)
	return nil
}

func checkReportTPG(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FDataFormat) > 1 {
		return scsi.InvalidField(&t.cdb, scsi.FDataFormat)
	}
	return nil
}

// defaultTransition is the implicit transition time in seconds without anyone
// to ask.
const defaultTransition = 10

func runReportTPG(x *exec) error {
	c := x.s.tgt.conf.Load()
	gs, transition := []scsi.PortGroup{{State: scsi.AccessOptimized, Group: c.TPGT, Ports: []uint16{c.RelPort}}}, uint8(defaultTransition)
	if f := x.lu.groups.Load(); f != nil && *f != nil {
		gs, transition = (*f)()
	}
	x.reply(scsi.PortGroups(gs, x.cdb.Get(scsi.FDataFormat) == 1, transition))
	return nil
}
