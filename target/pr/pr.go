// Package pr is the state machine of a logical unit's reservations: persistent
// reservations (SPC-4 5.13) with all types and service actions, and RESERVE /
// RELEASE (SPC-2) beside them.
//
// It is pure: Apply takes a request and changes a State, the same on every
// replica; who must be told (unit attentions) and whose tasks must be aborted is
// part of the result. The stand-alone target runs it under a mutex; the
// cluster's FSM runs it as machine `pr`. State is plain data that encodes as
// JSON.
//
// Storage row: it imports scsi only.
package pr

import (
	"errors"
	"fmt"
	"slices"

	"github.com/blockhouse-san/blockhouse/scsi"
)

// Nexus is an I_T nexus: initiator port and target port.
type Nexus struct {
	ID   scsi.TransportID `json:"id"`
	Port uint16           `json:"port"` // relative target port identifier
}

// Registration is the key of a nexus. With AllPorts it holds for the initiator
// port through every target port; Port is then the one it came through.
type Registration struct {
	Nexus
	Key      uint64 `json:"key"`
	AllPorts bool   `json:"all_ports,omitempty"`
}

func (r *Registration) is(n Nexus) bool {
	return r.ID == n.ID && (r.AllPorts || r.Port == n.Port)
}

// State is everything reserved on one logical unit. The zero value is a logical
// unit without reservations. Its JSON form stands in the cluster's log and
// snapshots: the names of its fields, and those of Request, are frozen.
type State struct {
	Generation    uint32         `json:"generation"`
	Registrations []Registration `json:"registrations,omitempty"` // in order of registration
	// Type of the persistent reservation, 0 = none is held.
	Type   scsi.PRType `json:"type,omitempty"`
	Holder *Nexus      `json:"holder,omitempty"` // nil with the all-registrants types
	APTPL  bool        `json:"aptpl,omitempty"`
	Legacy *Nexus      `json:"legacy,omitempty"` // who holds a RESERVE (6) or (10)
}

// Kind of a request. Numbers are only ever appended: they stand in the log.
type Kind uint8

// Requests.
const (
	KindOut       Kind = iota + 1 // PERSISTENT RESERVE OUT
	KindReserve                   // RESERVE
	KindRelease                   // RELEASE
	KindNexusLoss                 // the session is gone: RESERVE ends
	KindReset                     // logical unit or target reset: RESERVE ends
	KindPurge                     // the initiator was fenced: everything of its name ends
)

// Request is a change.
type Request struct {
	Kind  Kind        `json:"kind"`
	Nexus Nexus       `json:"nexus"`
	SA    int         `json:"sa,omitempty"`
	Type  scsi.PRType `json:"type,omitempty"`
	Param *scsi.PROut `json:"param,omitempty"`
	Names []string    `json:"names,omitempty"` // KindPurge
}

// Validate tells whether Apply can run the request: it checks what a device
// server has checked before it asks, so that a request from a log never panics.
func (q *Request) Validate() error {
	switch q.Kind {
	case KindReserve, KindRelease, KindNexusLoss, KindReset:
		return nil
	case KindPurge:
		if len(q.Names) == 0 {
			return errors.New("purge of reservations: no initiator is named")
		}
		return nil
	case KindOut:
	default:
		return fmt.Errorf("reservation request of kind %d", q.Kind)
	}
	p := q.Param
	switch {
	case p == nil:
		return errors.New("PERSISTENT RESERVE OUT without a parameter list")
	case q.SA == scsi.SARegisterAndMove && len(p.IDs) != 1:
		return fmt.Errorf("REGISTER AND MOVE with %d transport ids", len(p.IDs))
	case (q.SA == scsi.SAReserve || q.SA == scsi.SARelease) && !q.Type.Valid():
		return fmt.Errorf("persistent reservation of type %d", q.Type)
	case len(p.IDs) > MaxRegistrations:
		return fmt.Errorf("%d transport ids, at most %d", len(p.IDs), MaxRegistrations)
	}
	return nil
}

// Attention is a unit attention that a nexus must see.
type Attention struct {
	Nexus    Nexus
	AllPorts bool
	Code     scsi.ASC
}

// Result of a request.
type Result struct {
	Status scsi.Status // GOOD, CHECK CONDITION (with Sense), RESERVATION CONFLICT
	Sense  *scsi.Sense
	Notify []Attention
	Abort  []Victim // PREEMPT AND ABORT: abort and drain before status
}

// Victim is a registration whose tasks must end.
type Victim struct {
	Nexus    Nexus
	AllPorts bool
}

// Is tells whether n is the nexus, or one that its registration stood for.
func (v Victim) Is(n Nexus) bool { return v.Nexus.ID == n.ID && (v.AllPorts || v.Nexus.Port == n.Port) }

// For tells whether n has to see the attention.
func (a Attention) For(n Nexus) bool { return Victim{a.Nexus, a.AllPorts}.Is(n) }

func good() Result     { return Result{} }
func conflict() Result { return Result{Status: scsi.StatusReservationConflict} }
func check(s *scsi.Sense) Result {
	return Result{Status: scsi.StatusCheckCondition, Sense: s}
}

// Clone is a deep copy.
func (s *State) Clone() *State {
	c := *s
	c.Registrations = slices.Clone(s.Registrations)
	if s.Holder != nil {
		h := *s.Holder
		c.Holder = &h
	}
	if s.Legacy != nil {
		l := *s.Legacy
		c.Legacy = &l
	}
	return &c
}

// Equal tells whether two states say the same.
func (s *State) Equal(o *State) bool {
	same := func(a, b *Nexus) bool { return a == b || a != nil && b != nil && *a == *b }
	return s.Generation == o.Generation && slices.Equal(s.Registrations, o.Registrations) && s.Type == o.Type && same(s.Holder, o.Holder) &&
		s.APTPL == o.APTPL && same(s.Legacy, o.Legacy)
}

// Empty tells whether nothing is reserved and nobody is registered.
func (s *State) Empty() bool { return len(s.Registrations) == 0 && s.Type == 0 && s.Legacy == nil }

func (s *State) find(n Nexus) *Registration {
	for i := range s.Registrations {
		if s.Registrations[i].is(n) {
			return &s.Registrations[i]
		}
	}
	return nil
}

// Holds tells whether n is a holder of the persistent reservation.
func (s *State) Holds(n Nexus) bool {
	switch {
	case s.Type == 0:
		return false
	case s.Type.AllRegistrants():
		return s.find(n) != nil
	}
	r := s.find(n)
	return r != nil && s.Holder != nil && r.is(*s.Holder)
}

// Conflicts tells whether a command of class c from n conflicts with what others
// hold.
func (s *State) Conflicts(n Nexus, c scsi.Conflict) bool {
	if c == scsi.ConflictNever {
		return false
	}
	if s.Legacy != nil && *s.Legacy != n {
		return c != scsi.ConflictRelease
	}
	switch c {
	case scsi.ConflictReserve, scsi.ConflictRelease:
		return len(s.Registrations) > 0
	case scsi.ConflictLegacy, scsi.ConflictPRIn, scsi.ConflictPROut:
		return false
	}
	if s.Type == 0 {
		return false
	}
	if c == scsi.ConflictRead && s.Type.WriteExclusive() {
		return false
	}
	// What is left is ConflictWrite, ConflictRead under exclusive access, and any
	// class that is not known here, which is safest treated as a write.
	if s.Type.Registrants() {
		return s.find(n) == nil
	}
	return !s.Holds(n)
}

// Apply runs a request. A request that is not GOOD changes nothing.
func (s *State) Apply(q Request) Result {
	switch q.Kind {
	case KindOut:
		return s.out(q)
	case KindReserve:
		if len(s.Registrations) > 0 || s.Legacy != nil && *s.Legacy != q.Nexus {
			return conflict()
		}
		n := q.Nexus
		s.Legacy = &n
	case KindRelease:
		if len(s.Registrations) > 0 {
			return conflict()
		}
		if s.Legacy != nil && *s.Legacy == q.Nexus {
			s.Legacy = nil
		}
	case KindNexusLoss:
		if s.Legacy != nil && *s.Legacy == q.Nexus {
			s.Legacy = nil
		}
	case KindReset:
		s.Legacy = nil
	case KindPurge:
		return s.purge(q.Names)
	}
	return good()
}

func (s *State) purge(names []string) Result {
	if s.Legacy != nil && slices.Contains(names, s.Legacy.ID.Name) {
		s.Legacy = nil
	}
	var gone []Registration
	for _, r := range s.Registrations {
		if slices.Contains(names, r.ID.Name) {
			gone = append(gone, r)
		}
	}
	if len(gone) == 0 {
		return good()
	}
	var res Result
	for _, r := range gone {
		res.Notify = append(res.Notify, s.unregister(r.Nexus)...)
	}
	s.Generation++
	return res
}

// notify makes an attention for every registrant but n.
func (s *State) notify(n Nexus, code scsi.ASC) (out []Attention) {
	for _, r := range s.Registrations {
		if !r.is(n) {
			out = append(out, Attention{r.Nexus, r.AllPorts, code})
		}
	}
	return out
}

// unregister removes n's registration and, when that ends the reservation,
// tells the others (SPC-4 5.13.11.3).
func (s *State) unregister(n Nexus) (out []Attention) {
	held := s.Holds(n)
	s.Registrations = slices.DeleteFunc(s.Registrations, func(r Registration) bool { return r.is(n) })
	switch {
	case !held:
	case s.Type.AllRegistrants():
		if len(s.Registrations) == 0 {
			s.Type, s.Holder = 0, nil
		}
	default:
		if s.Type.Registrants() {
			out = s.notify(n, scsi.ASCReservationsReleased)
		}
		s.Type, s.Holder = 0, nil
	}
	return out
}

func (s *State) register(n Nexus, key uint64, all bool) {
	if r := s.find(n); r != nil {
		r.Key, r.AllPorts = key, all
		return
	}
	if all { // one registration stands for the ports that had their own
		s.Registrations = slices.DeleteFunc(s.Registrations, func(r Registration) bool { return r.ID == n.ID })
	}
	s.Registrations = append(s.Registrations, Registration{n, key, all})
}

// MaxRegistrations bounds the state of one logical unit.
const MaxRegistrations = 1024

func (s *State) out(q Request) Result {
	p, n := q.Param, q.Nexus
	me := s.find(n)
	if s.Legacy != nil && *s.Legacy != n {
		return conflict()
	}
	switch q.SA {
	case scsi.SARegister, scsi.SARegisterAndIgnoreKey:
		return s.outRegister(q, me)
	}
	// Everything else needs a registration and its key.
	if me == nil || me.Key != p.Key {
		return conflict()
	}
	switch q.SA {
	case scsi.SAReserve:
		if s.Type != 0 {
			if s.Type == q.Type && s.Holds(n) {
				return good()
			}
			return conflict()
		}
		s.hold(n, q.Type)
		return good()
	case scsi.SARelease:
		if !s.Holds(n) {
			return good()
		}
		if s.Type != q.Type {
			return check(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidRelease))
		}
		var res Result
		if s.Type.Registrants() {
			res.Notify = s.notify(n, scsi.ASCReservationsReleased)
		}
		s.Type, s.Holder = 0, nil
		return res
	case scsi.SAClear:
		res := Result{Notify: s.notify(n, scsi.ASCReservationsPreempted)}
		s.Registrations, s.Type, s.Holder = nil, 0, nil
		s.Generation++
		return res
	case scsi.SAPreempt, scsi.SAPreemptAndAbort:
		return s.outPreempt(q)
	case scsi.SARegisterAndMove:
		return s.outMove(q)
	}
	return check(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidFieldCDB))
}

func (s *State) hold(n Nexus, t scsi.PRType) {
	s.Type, s.Holder = t, nil
	if !t.AllRegistrants() {
		s.Holder = &n
	}
}

func (s *State) outRegister(q Request, me *Registration) Result {
	p, n := q.Param, q.Nexus
	if q.SA == scsi.SARegister {
		var have uint64
		if me != nil {
			have = me.Key
		}
		if p.Key != have {
			return conflict()
		}
	}
	if p.SpecIPT && me != nil { // SPC-4 5.13.7
		return check(scsi.InvalidParam(20, 3))
	}
	var res Result
	switch {
	case p.NewKey == 0 && me == nil:
		return good()
	case p.NewKey == 0:
		res.Notify = s.unregister(n)
	default:
		if len(s.Registrations)+1+len(p.IDs) > MaxRegistrations {
			return check(scsi.Check(scsi.IllegalRequest, scsi.ASCNoRegistration))
		}
		s.register(n, p.NewKey, p.AllTGPT)
		for _, id := range p.IDs {
			s.register(Nexus{id, n.Port}, p.NewKey, p.AllTGPT)
		}
	}
	s.APTPL = p.APTPL
	s.Generation++
	return res
}

func (s *State) outPreempt(q Request) Result {
	p, n := q.Param, q.Nexus
	all := s.Type.AllRegistrants() && p.NewKey == 0
	if p.NewKey == 0 && !all {
		return check(scsi.InvalidParam(8, -1))
	}
	var victims []Registration
	matched := false
	for _, r := range s.Registrations {
		if all || r.Key == p.NewKey {
			matched = true
			if !r.is(n) {
				victims = append(victims, r)
			}
		}
	}
	if !matched {
		return conflict()
	}
	// Does the preemption take the reservation?
	takes := all
	if s.Type != 0 && !s.Type.AllRegistrants() && s.Holder != nil {
		if h := s.find(*s.Holder); h != nil && h.Key == p.NewKey {
			takes = true
		}
	}
	if takes && !q.Type.Valid() {
		return check(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidFieldCDB))
	}
	var res Result
	for _, v := range victims {
		res.Notify = append(res.Notify, Attention{v.Nexus, v.AllPorts, scsi.ASCRegistrationsPreempted})
		if q.SA == scsi.SAPreemptAndAbort {
			res.Abort = append(res.Abort, Victim{v.Nexus, v.AllPorts})
		}
	}
	old := s.Type
	s.Registrations = slices.DeleteFunc(s.Registrations, func(r Registration) bool {
		return !r.is(n) && slices.ContainsFunc(victims, func(v Registration) bool { return v.Nexus == r.Nexus })
	})
	if takes {
		if old != 0 && old != q.Type { // SPC-4 5.13.11.4.3: the others hear of another type
			res.Notify = append(res.Notify, s.notify(n, scsi.ASCReservationsReleased)...)
		}
		s.hold(n, q.Type)
	}
	s.Generation++
	return res
}

func (s *State) outMove(q Request) Result {
	p, n := q.Param, q.Nexus
	if s.Type == 0 {
		return check(scsi.Check(scsi.IllegalRequest, scsi.ASCInvalidFieldCDB))
	}
	if s.Type.AllRegistrants() || !s.Holds(n) {
		return conflict()
	}
	if p.NewKey == 0 {
		return check(scsi.InvalidParam(8, -1))
	}
	to := Nexus{p.IDs[0], p.Port}
	if to == n || to.ID == n.ID && p.Port == n.Port {
		return check(scsi.InvalidParam(24, -1))
	}
	s.register(to, p.NewKey, false)
	s.Holder = &to
	if p.Unregister {
		s.Registrations = slices.DeleteFunc(s.Registrations, func(r Registration) bool { return r.is(n) && !r.is(to) })
	}
	s.APTPL = p.APTPL
	s.Generation++
	return good()
}

// Keys lists the registered keys, for READ KEYS.
func (s *State) Keys() []uint64 {
	ks := make([]uint64, len(s.Registrations))
	for i, r := range s.Registrations {
		ks[i] = r.Key
	}
	return ks
}

// HolderKey is the key that READ RESERVATION reports: 0 with the all-registrants
// types (SPC-4 6.15.3.2).
func (s *State) HolderKey() uint64 {
	if s.Holder == nil {
		return 0
	}
	if r := s.find(*s.Holder); r != nil {
		return r.Key
	}
	return 0
}

// FullStatus lists the registrations for READ FULL STATUS.
func (s *State) FullStatus() []scsi.PRFullStatus {
	var out []scsi.PRFullStatus
	for _, r := range s.Registrations {
		d := scsi.PRFullStatus{Key: r.Key, AllPorts: r.AllPorts, Port: r.Port, ID: r.ID}
		if s.Holds(r.Nexus) {
			d.Holder, d.Type = true, s.Type
		}
		out = append(out, d)
	}
	return out
}
