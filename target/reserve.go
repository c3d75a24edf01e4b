package target

import (
	"errors"
	"fmt"

	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

func init() {
	for _, sa := range []int{scsi.SAReadKeys, scsi.SAReadReservation, scsi.SAReportCapabilities, scsi.SAReadFullStatus} {
		handle(scsi.OpPersistentReserveIn, sa, handler{run: runReserveIn, memory: true})
	}
	for _, sa := range []int{scsi.SARegister, scsi.SAReserve, scsi.SARelease, scsi.SAClear, scsi.SAPreempt, scsi.SAPreemptAndAbort,
		scsi.SARegisterAndIgnoreKey, scsi.SARegisterAndMove} {
		handle(scsi.OpPersistentReserve, sa, handler{check: checkReserveOut, run: runReserveOut, slow: true})
	}
	for _, op := range []scsi.Opcode{scsi.OpReserve6, scsi.OpReserve10, scsi.OpRelease6, scsi.OpRelease10} {
		handle(op, scsi.NoSA, handler{check: checkReserve, run: runReserve, slow: true})
	}
}

// persister is what Reservations implement whose registrations survive a loss of
// power; only then is APTPL taken.
type persister interface{ Persistent() bool }

func persistent(r Reservations) bool {
	p, ok := r.(persister)
	return ok && p.Persistent()
}

func runReserveIn(x *exec) error {
	s := x.lu.res.Snapshot()
	switch x.cdb.Cmd.SA {
	case scsi.SAReadKeys:
		x.reply(scsi.PRReadKeys(s.Generation, s.Keys()))
	case scsi.SAReadReservation:
		x.reply(scsi.PRReadReservation(s.Generation, s.HolderKey(), s.Type))
	case scsi.SAReportCapabilities:
		p := persistent(x.lu.res)
		x.reply((&scsi.PRCapabilities{SpecifyInitiator: true, AllTargetPorts: true, PersistThroughPower: p, PersistNowActive: p && s.APTPL, TypeMask: scsi.PRTypeMask}).Bytes())
	case scsi.SAReadFullStatus:
		x.reply(scsi.PRReadFullStatus(s.Generation, s.FullStatus()))
	}
	return nil
}

func checkReserveOut(t *task) *scsi.Sense {
	switch t.cdb.Cmd.SA {
	case scsi.SAReserve, scsi.SARelease, scsi.SAPreempt, scsi.SAPreemptAndAbort:
		if t.cdb.Get(scsi.FScope) != 0 { // LU_SCOPE
			return scsi.InvalidField(&t.cdb, scsi.FScope)
		}
	}
	switch t.cdb.Cmd.SA {
	case scsi.SAReserve, scsi.SARelease:
		if !scsi.PRType(t.cdb.Get(scsi.FType)).Valid() {
			return scsi.InvalidField(&t.cdb, scsi.FType)
		}
	}
	if t.cdb.Get(scsi.FParamLen) < 24 {
		return scsi.Check(scsi.IllegalRequest, scsi.ASCParamListLength)
	}
	return nil
}

func runReserveOut(x *exec) error {
	b, err := x.params()
	if err != nil {
		return err
	}
	sa := x.cdb.Cmd.SA
	p, bad := scsi.ParsePROut(sa, b)
	if bad != nil {
		return bad
	}
	if p.APTPL && !persistent(x.lu.res) {
		return scsi.InvalidParam(20, 0)
	}
	return x.reserve(pr.Request{Kind: pr.KindOut, Nexus: x.s.nexus, SA: sa, Type: scsi.PRType(x.cdb.Get(scsi.FType)), Param: p})
}

// reserve runs a request and does what its result says, before status.
func (x *exec) reserve(q pr.Request) error {
	r, err := x.lu.res.Apply(x.ctx, q)
	if err != nil {
		// In force or not, nobody knows: the initiator has to ask again.
		return fmt.Errorf("%w: %s: %w", ErrReset, x.cdb.Cmd, err)
	}
	srv := x.s.srv
	srv.notify(x.lu, r.Notify)
	if len(r.Abort) > 0 {
		done := make(chan struct{})
		g := &group{done: func() { close(done) }}
		for _, s := range srv.list() {
			for _, n := range r.Abort {
				if s.tgt != nil && n.Is(s.nexus) && s != x.s {
					s.abortInto(g, func(t *task) bool { return t.lu == x.lu })
				}
			}
		}
		g.release()
		<-done
	}
	switch r.Status {
	case scsi.StatusGood:
		return nil
	case scsi.StatusReservationConflict:
		return errConflict
	}
	if r.Sense == nil {
		return errors.New("reservation refused without a reason")
	}
	return r.Sense
}

func checkReserve(t *task) *scsi.Sense {
	for _, f := range []scsi.FieldID{scsi.FThirdParty, scsi.FLongID, scsi.FParamLen} {
		if t.cdb.Get(f) != 0 {
			return scsi.InvalidField(&t.cdb, f)
		}
	}
	return nil
}

func runReserve(x *exec) error {
	k := pr.KindReserve
	if x.cdb.Cmd.Op == scsi.OpRelease6 || x.cdb.Cmd.Op == scsi.OpRelease10 {
		k = pr.KindRelease
	}
	return x.reserve(pr.Request{Kind: k, Nexus: x.s.nexus})
}
