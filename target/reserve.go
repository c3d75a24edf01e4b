package target

import (
	"context"
	"errors"
	"fmt"
	"slices"

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
	switch {
	case err == nil:
	case errors.Is(err, ErrNotReady), errors.Is(err, ErrStandby), errors.Is(err, ErrUnavailable):
		return err // it did not take effect, and says so
	default:
		// In force or not, nobody knows: the initiator has to ask again.
		return fmt.Errorf("%w: %s: %w", ErrReset, x.cdb.Cmd, err)
	}
	if err := x.s.srv.enforce(x.ctx, x.lu.volume, r); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrReset, x.cdb.Cmd, err)
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

// Enforce does what a change of a volume's reservations asks for besides what
// Reservations.Conflicts already answers by: it queues the attentions, aborts the
// tasks of victims, and returns nil when none of those is in the backend any more,
// nor any command that was let in before and would conflict now (SAFETY §4). For
// Reservations whose changes do not all come from this server. The error is ctx's.
func (s *Server) Enforce(ctx context.Context, volume string, r pr.Result) error {
	return s.enforce(ctx, volume, r)
}

func (s *Server) enforce(ctx context.Context, volume string, r pr.Result) error {
	s.mu.Lock()
	u := s.lus[volume]
	s.mu.Unlock()
	if u != nil {
		s.notify(u, r.Notify)
	}
	done := make(chan struct{})
	g := &group{done: func() { close(done) }}
	for _, x := range s.list() {
		if x.tgt == nil {
			continue
		}
		// By volume: a unit that Apply has just replaced may still have commands.
		if slices.ContainsFunc(r.Abort, func(v pr.Victim) bool { return v.Is(x.nexus) }) {
			x.abortInto(g, func(t *task) bool {
				return t.lu != nil && t.lu.volume == volume && t.cdb.Cmd.Effect != scsi.EffectReserve
			})
		}
		x.drainInto(g, func(t *task) bool { return t.trespasses(volume, u) })
	}
	g.release()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("volume %s: commands of initiators without the right to it have not ended: %w", volume, ctx.Err())
	}
}

// trespasses tells whether a task is in the backend of a volume, or may get there
// without asking again, though it would conflict now. Its session's mu is held.
func (t *task) trespasses(volume string, u *logicalUnit) bool {
	if t.state != stateRun || t.lu == nil {
		return false
	}
	switch {
	case t.cdb.Cmd.Effect == scsi.EffectReserve:
		return false // ordered among themselves by Reservations.Apply, which may be waiting for us
	case t.cdb.Cmd.Op == scsi.OpSanitize:
		return false // outlives every reservation (SBC-3 4.11)
	case t.lu.volume == volume:
		return t.lu.res.Conflicts(t.s.nexus, t.cdb.Conflict())
	case t.cdb.Cmd.Op == scsi.OpExtendedCopy && u != nil: // from any unit to any other
		return u.res.Conflicts(t.s.nexus, scsi.ConflictWrite) || u.res.Conflicts(t.s.nexus, scsi.ConflictRead)
	}
	return false
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
