package target

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// EventKind is what happened.
type EventKind string

// The events of a server.
const (
	EventLogin       EventKind = "session.login"     // a session began
	EventLogout      EventKind = "session.logout"    // its initiator ended it
	EventDrop        EventKind = "session.dropped"   // it ended otherwise; Cause says why
	EventAuthFailure EventKind = "login.auth-failed" // CHAP; Cause has the CHAP name
	EventRefused     EventKind = "login.refused"     // any other login that failed
	EventStoreError  EventKind = "lun.store-error"   // the store under a LUN failed a command
)

// Event is told to Options.OnEvent. What does not apply is zero.
type Event struct {
	Time              time.Time
	Kind              EventKind
	Target, Initiator string
	User              string // CHAP name that was proven
	Remote            netip.AddrPort
	ISID              iscsi.ISID
	TSIH              uint16
	Discovery         bool
	LUN               scsi.LUN
	Volume            string
	Cause             string
	// Suppressed is the number of events of this kind and source (address, or
	// volume) that were not told since the last one that was. With Kind, Time and
	// source alone filled in and Cause "suppressed", it closes such a series.
	Suppressed uint64
}

// Limits of what is told, in a window of eventWindow: nobody who floods the portal
// may push what matters out of the log. Numbers in Stats count everything.
const (
	eventWindow       = time.Minute
	eventsPerSource   = 60  // logins, logouts and drops of an address
	failuresPerSource = 5   // failed logins of an address, errors of a store
	failuresInAll     = 100 // failed logins of all addresses
	eventSources      = 4096
)

type eventSource struct {
	kind   EventKind
	addr   netip.Addr
	volume string
}

type eventCount struct {
	since            time.Time
	told, suppressed uint64
}

// eventLimit decides what is told.
type eventLimit struct {
	mu  sync.Mutex
	src map[eventSource]*eventCount
	all eventCount // failed logins
}

func (e *Event) source() eventSource {
	s := eventSource{kind: e.Kind, volume: e.Volume}
	if e.Volume == "" {
		s.addr = e.Remote.Addr()
	}
	return s
}

// take tells whether e may be told, and fills in what was not told before it.
func (l *eventLimit) take(e *Event) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.src == nil {
		l.src = map[eventSource]*eventCount{}
	}
	failure := e.Kind == EventAuthFailure || e.Kind == EventRefused
	limit := uint64(eventsPerSource)
	if failure || e.Kind == EventStoreError {
		limit = failuresPerSource
	}
	k := e.source()
	c := l.src[k]
	if c == nil {
		if len(l.src) >= eventSources { // more sources than a site has: they share one
			k = eventSource{kind: e.Kind}
			if c = l.src[k]; c == nil {
				c = &eventCount{since: e.Time}
				l.src[k] = c
			}
		} else {
			c = &eventCount{since: e.Time}
			l.src[k] = c
		}
	}
	if e.Time.Sub(c.since) >= eventWindow {
		e.Suppressed = c.suppressed
		*c = eventCount{since: e.Time}
	}
	if e.Time.Sub(l.all.since) >= eventWindow {
		l.all = eventCount{since: e.Time}
	}
	if c.told >= limit || failure && l.all.told >= failuresInAll {
		c.suppressed++
		return false
	}
	c.told++
	if failure {
		l.all.told++
	}
	return true
}

// sweep forgets sources whose window is over and returns what is to be told of
// them. At most failuresInAll series are closed by name.
func (l *eventLimit) sweep(now time.Time) (out []Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k, c := range l.src {
		if now.Sub(c.since) < eventWindow {
			continue
		}
		delete(l.src, k)
		if c.suppressed > 0 && len(out) < failuresInAll {
			out = append(out, Event{Time: now, Kind: k.kind, Remote: netip.AddrPortFrom(k.addr, 0), Volume: k.volume,
				Cause: "suppressed", Suppressed: c.suppressed})
		}
	}
	return out
}

// tell counts an event and passes it on, within the limits. It tells whether it
// did: what is not told is not logged either.
func (s *Server) tell(e Event) bool {
	switch t := &s.totals; e.Kind {
	case EventLogin:
		if e.Discovery {
			t.discoveries.Add(1)
		} else {
			t.logins.Add(1)
		}
	case EventLogout:
		t.logouts.Add(1)
	case EventDrop:
		t.drops.Add(1)
	case EventAuthFailure:
		t.authKO.Add(1)
		t.refused.Add(1)
	case EventRefused:
		t.refused.Add(1)
	}
	e.Time = time.Now()
	if !s.limit.take(&e) {
		return false
	}
	if s.opt.OnEvent != nil {
		s.opt.OnEvent(e)
	}
	return true
}

// tellSuppressed closes series that are over.
func (s *Server) tellSuppressed() {
	for _, e := range s.limit.sweep(time.Now()) {
		if s.opt.OnEvent != nil {
			s.opt.OnEvent(e)
		}
	}
}

func (s *session) event(k EventKind, cause error) Event {
	e := Event{Kind: k, Initiator: s.name, User: s.user, Remote: s.remote, ISID: s.isid, TSIH: s.tsih, Discovery: s.tgt == nil}
	if s.tgt != nil {
		e.Target = s.tgt.iqn
	}
	if cause != nil {
		e.Cause = cause.Error()
	}
	return e
}

// over tells how a session ended.
func (s *session) over(why error) bool {
	if s.loggedOut.Load() {
		return s.srv.tell(s.event(EventLogout, nil))
	}
	return s.srv.tell(s.event(EventDrop, why))
}

// loginFailed tells of a login that failed, and whether to log it. A connection
// that ends before it has said who it is is no event: port scans and probes of
// load balancers do that.
func (c *conn) loginFailed(err error, id *iscsi.LoginIdentity) bool {
	e := Event{Kind: EventRefused, Target: id.TargetName, Initiator: id.InitiatorName, Remote: c.remote, ISID: id.ISID, Discovery: id.Discovery,
		Cause: err.Error()}
	var le *iscsi.LoginError
	switch {
	case errors.As(err, &le) && le.Status.Class() == 1: // sent elsewhere, as configured
		return false
	case errors.As(err, &le) && le.Status == iscsi.StatusAuthFailure:
		e.Kind = EventAuthFailure
	}
	return c.srv.tell(e)
}

// storeFailed tells of a command that the store failed.
func (t *task) storeFailed(err error) {
	t.c.srv.tell(Event{Kind: EventStoreError, Target: t.s.tgt.iqn, Initiator: t.s.name, LUN: t.ent.num, Volume: t.lu.volume, Cause: err.Error()})
}
