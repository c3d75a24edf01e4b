package storage

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/target"
)

// eventLog keeps the last events of this worker until control fetches them. They
// have numbers, so that a control that was started again misses none that is
// still here and tells none twice.
type eventLog struct {
	mu   sync.Mutex
	last uint64 // number of the newest
	ring []api.Event
}

// keepEvents bounds what waits for control.
const keepEvents = 512

func (l *eventLog) add(e api.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	l.ring = append(l.ring, e)
	if len(l.ring) > keepEvents {
		l.ring = append(l.ring[:0:0], l.ring[len(l.ring)-keepEvents/2:]...)
	}
}

func (l *eventLog) seq() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// after gives the events with a number above n that are still here.
func (l *eventLog) after(n uint64) ([]api.Event, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n >= l.last {
		return nil, l.last
	}
	k := min(uint64(len(l.ring)), l.last-n)
	return append([]api.Event(nil), l.ring[uint64(len(l.ring))-k:]...), l.last
}

// event notes what happened. It never waits for anything but a mutex.
func (w *worker) event(kind, text string, data map[string]any) {
	w.events.add(api.Event{Time: w.clock.Wall(), Kind: kind, Text: text, Data: data})
	if w.link != nil {
		w.link.Changed()
	}
}

// OnEvent is told by the target.
func (w *worker) onEvent(e target.Event) {
	w.mu.Lock()
	want := w.mu.want
	w.mu.Unlock()
	data := map[string]any{}
	set := func(k, v string) {
		if v != "" {
			data[k] = v
		}
	}
	vol := e.Volume
	if want != nil {
		set("node", want.node)
		if v := want.storage.Volumes[e.Volume]; v != nil {
			vol = v.Name
		}
	}
	set("target", e.Target)
	set("initiator", e.Initiator)
	set("user", e.User)
	set("cause", e.Cause)
	set("volume", vol)
	addr := ""
	if e.Remote.Port() != 0 {
		addr = e.Remote.String()
	} else if e.Remote.Addr().IsValid() {
		addr = e.Remote.Addr().String()
	}
	set("address", addr)
	if e.TSIH != 0 {
		data["tsih"], data["isid"] = e.TSIH, e.ISID.String()
	}
	if e.Suppressed > 0 {
		data["suppressed"] = e.Suppressed
	}
	w.events.add(api.Event{Time: e.Time, Kind: string(e.Kind), Text: eventText(e, vol, addr), Data: data})
	w.link.Changed()
}

func eventText(e target.Event, vol, addr string) string {
	who, what := e.Initiator, e.Target
	if who == "" {
		who = "an initiator without a name"
	}
	if what == "" {
		what = "the list of targets"
	}
	var s string
	switch {
	case e.Suppressed > 0 && e.Cause == "suppressed":
		src := addr
		if e.Kind == target.EventStoreError {
			src = "volume " + vol
		} else if addr == "" {
			src = "other addresses"
		}
		return fmt.Sprintf("%d more events %s of %s were counted and not told", e.Suppressed, e.Kind, src)
	case e.Kind == target.EventLogin:
		s = fmt.Sprintf("%s logged in to %s from %s", who, what, addr)
	case e.Kind == target.EventLogout:
		s = fmt.Sprintf("%s logged out of %s", who, what)
	case e.Kind == target.EventDrop:
		s = fmt.Sprintf("the session of %s with %s was dropped: %s", who, what, e.Cause)
	case e.Kind == target.EventAuthFailure:
		s = fmt.Sprintf("%s at %s failed to authenticate for %s: %s", who, addr, what, e.Cause)
	case e.Kind == target.EventRefused:
		s = fmt.Sprintf("a login of %s at %s to %s failed: %s", who, addr, what, e.Cause)
	case e.Kind == target.EventStoreError:
		s = fmt.Sprintf("the store of volume %s (%s/%d) failed a command of %s: %s", vol, e.Target, e.LUN, who, e.Cause)
	default:
		s = fmt.Sprintf("%s: %s", e.Kind, e.Cause)
	}
	if e.Suppressed > 0 {
		s += fmt.Sprintf(" (and %d more before that were not told)", e.Suppressed)
	}
	return s
}

// answerEvents answers link.TEvents.
func (w *worker) answerEvents(q link.EventsAfter) link.Events {
	n := q.After
	if q.Worker != w.incarnation {
		n = 0 // it knows another process's numbers
	}
	es, last := w.events.after(n)
	return link.Events{Worker: w.incarnation, Last: last, Events: es}
}

// tellTarget says once that the target cannot serve what the cluster wants, and
// once that it can again. A retry that fails in the same way is not told.
func (w *worker) tellTarget(want *desired, err error) {
	now := ""
	if err != nil {
		now = err.Error()
	}
	if now == w.told {
		return
	}
	was := w.told
	w.told = now
	data := map[string]any{"node": want.node}
	switch {
	case err == nil:
		w.log.Info("the target serves what the cluster wants again", zap.String("was", was))
		w.event("target.ok", "the target of "+want.node+" serves what the cluster wants again", data)
	case errors.Is(err, target.ErrPortBusy):
		w.log.Error("a portal is held by another program; nothing is served elsewhere instead", zap.Error(err))
		data["cause"] = now
		w.event("portal.busy", want.node+": "+now, data)
	default:
		w.log.Error("the target cannot serve what the cluster wants", zap.Error(err))
		data["cause"] = now
		w.event("target.error", "the target of "+want.node+" cannot serve what the cluster wants: "+now, data)
	}
}

// tellStores says what has become of the stores of volumes that cannot be opened.
func (w *worker) tellStores(want *desired, reps []volumeReport) {
	w.mu.Lock()
	old := w.mu.vols
	w.mu.Unlock()
	for _, r := range reps {
		i := slices.IndexFunc(old, func(o volumeReport) bool { return o.UUID == r.UUID })
		failed := i >= 0 && old[i].State == "error"
		name := r.UUID
		if v := want.storage.Volumes[r.UUID]; v != nil {
			name = v.Name
		}
		data := map[string]any{"node": want.node, "volume": name}
		switch {
		case r.State == "error" && !failed:
			data["cause"] = r.Error
			w.event("volume.store-failed", "the store of volume "+name+" on "+want.node+" cannot be used: "+r.Error, data)
		case r.State != "error" && failed:
			w.event("volume.store-ok", "the store of volume "+name+" on "+want.node+" can be used again", data)
		}
	}
}
