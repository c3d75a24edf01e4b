package target

import (
	"slices"
	"sync"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// taskOrder obeys the task attributes in the task set of a logical unit, which all
// nexuses share (TST 000b; SAM-5 8.6). Tasks come in waves: SIMPLE tasks join the
// newest, an ORDERED task is a wave of its own and begins another behind it. A
// wave runs when every wave before it is over, so an ORDERED task waits for all
// earlier ones and holds all later ones. A HEAD OF QUEUE task waits for none.
//
// The place of a task is taken at its turn, not when its data are complete: an
// earlier write that still waits for its Data-Out is earlier.
type taskOrder struct {
	mu    sync.Mutex
	first *wave // runs
	last  *wave // is joined
}

type wave struct {
	n       int // tasks that have not ended
	ordered bool
	runs    bool
	next    *wave
	held    []*task // complete, and waiting for the waves before
}

func (o *taskOrder) init() {
	o.first = &wave{runs: true}
	o.last = o.first
}

// join gives a task its place. What the head of the queue may always answer takes
// none (SAM-5 8.6.3 and the commands that never meet a unit attention).
func (o *taskOrder) join(t *task) {
	switch t.cdb.Cmd.Op {
	case scsi.OpInquiry, scsi.OpReportLuns, scsi.OpRequestSense:
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch t.attr {
	case iscsi.AttrHead:
		t.wave = o.first
	case iscsi.AttrOrdered:
		t.wave = &wave{ordered: true}
		o.last.next = t.wave
		o.last = &wave{}
		t.wave.next = o.last
	default:
		t.wave = o.last
	}
	t.wave.n++
	if o.first != o.last {
		o.move()
	}
}

// enter tells whether a complete task may run; if not, leave returns it later.
func (o *taskOrder) enter(t *task) bool {
	if t.wave == nil {
		return true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !t.wave.runs {
		t.wave.held = append(t.wave.held, t)
		t.turn = turnHeld
	}
	return t.wave.runs
}

// taskTurn is whether a task is held for its turn; guarded by taskOrder.mu.
type taskTurn uint8

const (
	turnNone  taskTurn = iota
	turnHeld           // in wave.held
	turnComes          // taken out of it, on its way to resume
)

// cancel takes a task that was aborted from among those held: ok then. Otherwise
// comes says that resume will see to it.
func (o *taskOrder) cancel(t *task) (ok, comes bool) {
	if t.wave == nil {
		return false, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if t.turn == turnHeld {
		t.wave.held = slices.DeleteFunc(t.wave.held, func(x *task) bool { return x == t })
		t.turn = turnNone
		return true, false
	}
	return false, t.turn == turnComes
}

// leave takes a task that has ended out and returns those whose turn it is now.
func (o *taskOrder) leave(w *wave) []*task {
	o.mu.Lock()
	defer o.mu.Unlock()
	w.n--
	return o.move()
}

// move lets the waves run whose turn it is: one of SIMPLE tasks when no ORDERED
// task stands before it, an ORDERED one when nothing does.
func (o *taskOrder) move() (ready []*task) {
	for o.first.n == 0 && o.first.next != nil {
		o.first = o.first.next
	}
	empty, free := true, true
	for w := o.first; w != nil && free; w = w.next {
		if w.ordered && !empty {
			free = w.n == 0
			continue
		}
		if !w.runs {
			w.runs = true
			for _, t := range w.held {
				t.turn = turnComes
			}
			ready = append(ready, w.held...)
			w.held = nil
		}
		if w.n > 0 {
			empty = false
			free = !w.ordered
		}
	}
	return ready
}

// resume goes on with a task that was held.
func (t *task) resume() {
	t.s.mu.Lock()
	o := &t.lu.order
	o.mu.Lock()
	t.turn = turnNone
	o.mu.Unlock()
	if t.aborted {
		t.s.mu.Unlock()
		t.end()
		return
	}
	t.lockRange(false)
}

// queueError aborts what QERR of the control mode page says after a CHECK
// CONDITION (SPC-4 7.5.8): 01b the whole task set, 11b the tasks of the nexus.
func (t *task) queueError() {
	switch t.lu.mode.queueErrors() {
	case 1:
		g := &group{done: func() {}}
		for _, x := range t.s.srv.list() {
			if x.tgt == nil || !x.tgt.has(t.lu) {
				continue
			}
			if n := x.abortInto(g, func(o *task) bool { return o.lu == t.lu && o != t }); n > 0 && x != t.s {
				x.attend(t.lu, scsi.ASCCommandsCleared)
			}
		}
		g.release()
	case 3:
		t.s.abort(func(o *task) bool { return o.lu == t.lu && o != t }, func() {})
	}
}
