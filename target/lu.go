package target

import (
	"context"
	"math"
	"sync"
	"sync/atomic"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// logicalUnit is a volume as SCSI sees it. Entries of several targets share it.
type logicalUnit struct {
	volume    string
	dev       block.Device
	gate      Gate
	res       Reservations
	id        Identity
	removable bool
	noCache   bool

	size      atomic.Int64 // as last told to initiators
	mode      modeState
	ranges    rangeQueue
	order     taskOrder
	usage     usage
	pool      pool
	medium    mediumState
	sanitizer sanitizer
	groups    atomic.Pointer[func() ([]scsi.PortGroup, uint8)]

	// latency is the moving average of how long backend calls wait, in ns, for the
	// choice between running a command on the reader and handing it off.
	latency atomic.Int64
}

func newLogicalUnit(l *LUN, wg *sync.WaitGroup) *logicalUnit {
	u := &logicalUnit{volume: l.Volume, dev: l.Device, gate: l.Gate, res: l.Reservations, id: l.Identity, removable: l.Removable, noCache: l.NoCache}
	if u.gate == nil {
		u.gate = Open{}
	}
	u.size.Store(u.dev.Info().Size)
	u.mode.init(u.dev.Info().Caps.WriteCache && !l.NoCache, u.dev.Info().Caps.Thin)
	u.pool.wg = wg
	u.medium.init()
	u.order.init()
	u.groups.Store(&l.Groups)
	return u
}

func (u *logicalUnit) same(l *LUN) bool {
	g := l.Gate
	if g == nil {
		g = Open{}
	}
	return u.dev == l.Device && u.gate == g && (l.Reservations == nil || u.res == l.Reservations) && u.id == l.Identity && u.removable == l.Removable && u.noCache == l.NoCache
}

func (u *logicalUnit) blockSize() int { return u.dev.Info().BlockSize }

// blocks is the capacity in logical blocks.
func (u *logicalUnit) blocks() uint64 {
	i := u.dev.Info()
	return uint64(i.Size / int64(i.BlockSize))
}

// The time of a backend call that is not waiting: bytes are copied at
// copyPerNS or faster. One call counts for no more than observeMost above the
// average, so that a preemption, or one page that was not cached, does not send
// the commands that follow to the pool.
const (
	copyPerNS   = 4 // bytes
	observeMost = 100_000
)

// observe takes the time of a backend call that moved n bytes.
func (u *logicalUnit) observe(ns int64, n int) {
	old := u.latency.Load()
	ns = min(max(ns-int64(n)/copyPerNS, 0), old+observeMost)
	u.latency.Store(old + (ns-old)/8) // a lost update does no harm
}

// entry is a row of a target's LUN map.
type entry struct {
	num      scsi.LUN
	gen      uint64
	lu       *logicalUnit
	readOnly bool
	stats    *lunStats
}

// mediumState is what START STOP UNIT and PREVENT ALLOW change.
type mediumState struct {
	mu      sync.Mutex
	ejected bool
	prevent map[pr.Nexus]bool
	// sanitizing is the progress of a SANITIZE or FORMAT UNIT under way, -1 = none;
	// sanitizeKO tells that the last one failed. busy and ko are the codes of both.
	sanitizing atomic.Int64
	sanitizeKO atomic.Bool
	busy, ko   atomic.Uint32
}

func (m *mediumState) init() {
	m.prevent = map[pr.Nexus]bool{}
	m.sanitizing.Store(-1)
}

// forget ends what a nexus prevents.
func (m *mediumState) forget(n pr.Nexus) {
	m.mu.Lock()
	delete(m.prevent, n)
	m.mu.Unlock()
}

func (m *mediumState) reset() {
	m.mu.Lock()
	clear(m.prevent)
	m.mu.Unlock()
}

// rangeQueue orders overlapping commands of a logical unit by their complete
// arrival (SAFETY §4). A command runs when no earlier one overlaps it, unless
// both only read.
type rangeQueue struct {
	mu   sync.Mutex
	list []*rangeLock // in order of arrival, granted and waiting
}

// rangeLock is a place in the queue: blocks [lo, hi).
type rangeLock struct {
	lo, hi  uint64
	excl    bool
	granted bool
	gone    bool
	t       *task         // runs when granted,
	wake    chan struct{} // or this is closed
}

func (a *rangeLock) overlaps(b *rangeLock) bool {
	return (a.excl || b.excl) && a.lo < b.hi && b.lo < a.hi
}

// add puts l at the end and tells whether it may run at once.
func (q *rangeQueue) add(l *rangeLock) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	l.granted = true
	for _, e := range q.list {
		if e.overlaps(l) {
			l.granted = false
			break
		}
	}
	q.list = append(q.list, l)
	return l.granted
}

// cancel removes l if it still waits, and tells so. Whoever waits for l comes
// back in ready.
func (q *rangeQueue) cancel(l *rangeLock) (ok bool, ready []*task) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l.granted || l.gone {
		return false, nil
	}
	return true, q.remove(l)
}

// release removes a granted lock and returns the tasks that may run now.
func (q *rangeQueue) release(l *rangeLock) []*task {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l.gone {
		return nil
	}
	return q.remove(l)
}

func (q *rangeQueue) remove(l *rangeLock) (ready []*task) {
	l.gone = true
	at := -1
	waiting := false
	for i, e := range q.list {
		if e == l {
			at = i
		} else if !e.granted {
			waiting = true
		}
	}
	if at >= 0 {
		q.list = append(q.list[:at], q.list[at+1:]...)
		q.list[:len(q.list)+1][len(q.list)] = nil
	}
	if !waiting {
		return nil
	}
next:
	for i, e := range q.list {
		if e.granted {
			continue
		}
		for _, before := range q.list[:i] {
			if before.overlaps(e) {
				continue next
			}
		}
		e.granted = true
		if e.wake != nil {
			close(e.wake)
			continue
		}
		ready = append(ready, e.t)
	}
	return ready
}

// wholeUnit as the end of a range.
const wholeUnit = math.MaxUint64

// maxWorkers bounds the commands of one logical unit that are in the backend at
// the same time.
const maxWorkers = 64

// pool runs what can block. Workers start on demand and end when there is
// nothing to do, so an idle logical unit costs nothing.
type pool struct {
	wg      *sync.WaitGroup
	mu      sync.Mutex
	queue   []*task
	workers int
}

func (p *pool) submit(ts ...*task) {
	p.mu.Lock()
	p.queue = append(p.queue, ts...)
	for n := len(ts); n > 0 && p.workers < maxWorkers; n-- {
		p.workers++
		p.wg.Add(1)
		go p.work()
	}
	p.mu.Unlock()
}

func (p *pool) busy() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.workers > 0
}

func (p *pool) work() {
	defer p.wg.Done()
	for {
		p.mu.Lock()
		if len(p.queue) == 0 {
			p.queue = nil
			p.workers--
			p.mu.Unlock()
			return
		}
		t := p.queue[0]
		p.queue[0] = nil
		p.queue = p.queue[1:]
		p.mu.Unlock()
		t.pooled = true
		t.run(context.Background())
	}
}
