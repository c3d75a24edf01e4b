package control

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync"

	"github.com/blockhouse-san/blockhouse/api"
)

// events keeps the last events and hands new ones to who listens. They are for
// people and tests; nothing is decided by them.
type events struct {
	mu   sync.Mutex
	ring []api.Event // the last keepEvents
	subs map[chan api.Event]bool
}

const keepEvents = 1000

func newEvents() *events { return &events{subs: map[chan api.Event]bool{}} }

func (e *events) add(ev api.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ring = append(e.ring, ev)
	if len(e.ring) > keepEvents {
		e.ring = append(e.ring[:0:0], e.ring[len(e.ring)-keepEvents:]...)
	}
	for c := range e.subs {
		select {
		case c <- ev:
		default: // a listener that does not read loses events, not the daemon its time
		}
	}
}

func (e *events) subscribe() (past []api.Event, c chan api.Event, cancel func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c = make(chan api.Event, 256)
	e.subs[c] = true
	return append(past, e.ring...), c, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.subs, c)
	}
}

// serve streams server-sent events: first the remembered ones, then, unless
// follow=0, new ones until the client goes.
func (e *events) serve(w http.ResponseWriter, r *http.Request) {
	f, ok := w.(http.Flusher)
	if !ok {
		writeError(w, api.Errorf(api.CodeInternal, "", "this connection cannot stream"))
		return
	}
	past, c, cancel := e.subscribe()
	defer cancel()
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	send := func(ev api.Event) bool {
		b, err := json.Marshal(ev)
		if err != nil {
			return false
		}
		_, err = fmt.Fprintf(w, "data: %s\n\n", b)
		return err == nil
	}
	for _, ev := range past {
		if !send(ev) {
			return
		}
	}
	f.Flush()
	if r.URL.Query().Get("follow") == "0" {
		return
	}
	for {
		select {
		case ev := <-c:
			if !send(ev) {
				return
			}
			f.Flush()
		case <-r.Context().Done():
			return
		}
	}
}
