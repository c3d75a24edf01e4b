package target

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"sync"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func init() {
	none := handler{check: checkCopy, run: runCopy, slow: true, unlocked: true}
	handle(scsi.OpExtendedCopy, scsi.SAExtendedCopyLID1, none)
	handle(scsi.OpReceiveCopyResults, scsi.SACopyStatusLID1, handler{run: runCopyStatus, memory: true})
	handle(scsi.OpReceiveCopyResults, scsi.SACopyOperatingParams, handler{run: runCopyParams, memory: true})
	vpdPages[scsi.VPDThirdParty] = func(*exec) []byte { return copyLimits.ThirdPartyPage() }
}

// copyLimits of the copy manager.
var copyLimits = scsi.CopyLimits{CSCDs: 8, Segments: 64, DescriptorBytes: 8*32 + 64*28, SegmentBytes: 0xFFFF * 4096, Concurrent: 64, Granularity: 9}

// maxCopyResults bounds the results that a session keeps for RECEIVE COPY STATUS.
const maxCopyResults = 32

// copyResults are the outcomes by list identifier.
type copyResults struct {
	mu sync.Mutex
	m  map[uint8]scsi.CopyStatus
}

func (r *copyResults) set(id uint8, s scsi.CopyStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil || len(r.m) >= maxCopyResults {
		r.m = map[uint8]scsi.CopyStatus{}
	}
	r.m[id] = s
}

func (r *copyResults) get(id uint8) (scsi.CopyStatus, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.m[id]
	return s, ok
}

func checkCopy(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FParamLen) > 64<<10 {
		return scsi.Check(scsi.IllegalRequest, scsi.ASCParamListLength)
	}
	return nil
}

// aborted is COPY ABORTED with a code.
func copyAborted(code scsi.ASC) error { return scsi.Check(scsi.CopyAborted, code) }

// runCopy copies within the initiator's own LUN map: a designator of anything
// that it cannot see names nothing (CVE-2020-28374).
func runCopy(x *exec) error {
	b, err := x.params()
	if err != nil || len(b) == 0 {
		return err
	}
	l, bad := scsi.ParseCopyList(b, copyLimits)
	if bad != nil {
		return bad
	}
	cscds := make([]*entry, len(l.CSCDs))
	for i, c := range l.CSCDs {
		if c.Null { // LU ID TYPE is obsolete since SPC-4 and not looked at
			return copyAborted(scsi.ASCCopyTargetUnreachable)
		}
		if cscds[i] = x.find(c.ID); cscds[i] == nil {
			return copyAborted(scsi.ASCCopyTargetUnreachable)
		}
	}
	keep := l.IDUsage != 3
	st := scsi.CopyStatus{State: scsi.CopyInProgress}
	if keep {
		x.s.copies.set(l.ID, st)
	}
	for _, g := range l.Segments {
		var n int64
		if n, err = x.copySegment(&g, cscds); err != nil {
			break
		}
		st.Segments++
		st.Bytes = uint32(min(int64(st.Bytes)+n, 0xFFFFFFFF))
	}
	st.State = scsi.CopyDone
	if err != nil {
		st.State = scsi.CopyFailed
	}
	if keep {
		x.s.copies.set(l.ID, st)
	}
	return err
}

// find looks a designator up among the LUNs of the session's target.
func (x *exec) find(d scsi.Designator) *entry {
	if d.Assoc != scsi.AssocLU {
		return nil
	}
	for _, e := range *x.s.tgt.luns.Load() {
		naa := scsi.NAA6(e.lu.id.UUID)
		serial := (&exec{task: &task{lu: e.lu}}).serial()
		for _, own := range []scsi.Designator{scsi.DesignatorNAAValue(naa[:]), scsi.DesignatorUUIDValue(e.lu.id.UUID), scsi.DesignatorT10Value(Vendor, serial)} {
			if own.Type == d.Type && (bytes.Equal(own.Value, d.Value) || own.Type == scsi.DesignatorT10 && len(d.Value) == 20 && bytes.HasPrefix(own.Value, d.Value)) {
				return e
			}
		}
	}
	return nil
}

// copySegment copies one segment and returns its bytes.
func (x *exec) copySegment(g *scsi.CopySegment, cscds []*entry) (int64, error) {
	if int(g.Source) >= len(cscds) || int(g.Dest) >= len(cscds) {
		return 0, copyAborted(scsi.ASCCopyTargetUnreachable)
	}
	src, dst := cscds[g.Source], cscds[g.Dest]
	sb, db := int64(src.lu.blockSize()), int64(dst.lu.blockSize())
	n := int64(g.Blocks) * sb
	if g.DestCount {
		n = int64(g.Blocks) * db
	}
	if n%sb != 0 || n%db != 0 {
		return 0, copyAborted(scsi.ASCInexactSegment)
	}
	fits := func(u *logicalUnit, lba uint64, bs int64) bool {
		return lba <= u.blocks() && uint64(n/bs) <= u.blocks()-lba
	}
	switch {
	case !fits(src.lu, g.SrcLBA, sb), !fits(dst.lu, g.DestLBA, db):
		return 0, copyAborted(scsi.ASCNone)
	case dst.readOnly, dst.lu.mode.writeProtected(), dst.lu.dev.Info().Caps.ReadOnly:
		return 0, scsi.Check(scsi.DataProtect, scsi.ASCWriteProtected)
	case n == 0:
		return 0, nil
	}
	// Locks of several units are taken in one order, or two copies could wait for
	// each other.
	type place struct {
		u    *logicalUnit
		l    *rangeLock
		op   Op
		held bool
	}
	ps := []*place{
		{u: src.lu, l: &rangeLock{lo: g.SrcLBA, hi: g.SrcLBA + uint64(n/sb)}, op: OpRead},
		{u: dst.lu, l: &rangeLock{lo: g.DestLBA, hi: g.DestLBA + uint64(n/db), excl: true}, op: OpWrite},
	}
	if src.lu == dst.lu {
		// One lock over both, so that the command does not wait for itself.
		lo, hi := min(ps[0].l.lo, ps[1].l.lo), max(ps[0].l.hi, ps[1].l.hi)
		ps = []*place{{u: dst.lu, l: &rangeLock{lo: lo, hi: hi, excl: true}, op: OpWrite}}
	}
	slices.SortFunc(ps, func(a, b *place) int { return strings.Compare(a.u.volume, b.u.volume) })
	var leave []func() error
	defer func() {
		for _, p := range ps {
			if p.held {
				if ready := p.u.ranges.release(p.l); len(ready) > 0 {
					p.u.pool.submit(ready...)
				}
			}
		}
	}()
	done := func(err error) error {
		for _, f := range leave {
			if e := f(); e != nil {
				err = e
			}
		}
		return err
	}
	for _, p := range ps {
		p.l.wake = make(chan struct{})
		p.held = true
		if !p.u.ranges.add(p.l) {
			<-p.l.wake
		}
	}
	if x.gone() {
		return 0, errAborted
	}
	for _, p := range ps {
		class := scsi.ConflictWrite
		if p.op == OpRead {
			class = scsi.ConflictRead
		}
		in := x.s.incarnation(p.u)
		if p.u != x.lu { // its own gate was entered by run
			if err := x.enterUnit(p.u, in, p.op); err != nil {
				return 0, done(err)
			}
			leave = append(leave, func() error { return p.u.gate.Leave(in, p.op) })
		}
		if p.u.res.Conflicts(x.s.nexus, class) {
			return 0, done(errConflict)
		}
	}
	return n, done(x.move(src.lu, dst.lu, int64(g.SrcLBA)*sb, int64(g.DestLBA)*db, n))
}

// move copies bytes, backwards where the ranges of one unit overlap so.
func (x *exec) move(src, dst *logicalUnit, from, to, n int64) error {
	const piece = 1 << 20
	b := block.Get(int(min(n, piece)))
	defer b.Free()
	var fl block.Flags
	if !dst.mode.writeCache() {
		fl = block.FUA
	}
	backwards := src == dst && to > from && to < from+n
	for done := int64(0); done < n; {
		c := min(n-done, piece)
		o := done
		if backwards {
			o = n - done - c
		}
		if x.gone() {
			return errAborted
		}
		if err := src.dev.ReadAt(x.ctx, b.B[:c], from+o); err != nil {
			return x.thirdParty("copy: read", err)
		}
		if err := dst.dev.WriteAt(x.ctx, b.B[:c], to+o, fl); err != nil {
			return x.thirdParty("copy: write", err)
		}
		done += c
	}
	return nil
}

// thirdParty tells a store's failure as the copy manager's.
func (x *exec) thirdParty(op string, err error) error {
	if errors.Is(err, block.ErrFenced) || errors.Is(err, block.ErrNoSpace) {
		return x.fail(op, err)
	}
	return copyAborted(scsi.ASCThirdPartyFailure)
}

func runCopyStatus(x *exec) error {
	st, ok := x.s.copies.get(uint8(x.cdb.Get(scsi.FListID)))
	if !ok {
		return scsi.InvalidField(&x.cdb, scsi.FListID)
	}
	x.reply(st.Bytes12())
	return nil
}

func runCopyParams(x *exec) error {
	x.reply(copyLimits.OperatingParameters())
	return nil
}
