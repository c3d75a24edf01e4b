// Package sim runs a whole cluster in one process on a clock of its own: the
// replicated state machine, the leader's detection and fencing, the workers' gates
// and guards are those that clusterd links; the network, the disks, the clocks, the
// hosts' kernels and the log are the simulator's. The log is linearizable and its
// leader changes at will, which is all that the rest may assume of Raft.
//
// Everything follows from a seed. After each step the invariants are looked at
// (facts/cluster.md §8): above all, no write of an evicted node lands on a volume
// behind its Fenced, and nobody is evicted who holds a lease.
package sim

import (
	"container/heap"
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/env"
)

// event is something that happens at a time.
type event struct {
	at   time.Duration
	seq  uint64 // first come, first served
	what func()
}

type queue []event

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *queue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

// time0 is the wall clock at the start.
var time0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// world is the clock, the chance and the network.
type world struct {
	r    *rand.Rand
	now  time.Duration
	q    queue
	seq  uint64
	cut  map[[2]int]bool // links that are down, by direction
	loss float64         // of messages
	slow time.Duration   // added to each message at most

	broken string // the first violation
	trace  []string
	loud   bool
}

func newWorld(seed uint64) *world {
	return &world{r: rand.New(rand.NewPCG(seed, 0x9E3779B97F4A7C15)), cut: map[[2]int]bool{}}
}

func (w *world) after(d time.Duration, f func()) {
	w.seq++
	heap.Push(&w.q, event{w.now + max(0, d), w.seq, f})
}

// run lets events happen until the end or a violation.
func (w *world) run(end time.Duration) {
	for w.q.Len() > 0 && w.broken == "" {
		e := heap.Pop(&w.q).(event)
		if e.at > end {
			return
		}
		w.now = e.at
		e.what()
	}
}

func (w *world) violation(format string, a ...any) {
	if w.broken == "" {
		w.broken = fmt.Sprintf("at %v: ", w.now) + fmt.Sprintf(format, a...)
		w.say("VIOLATION %s", w.broken)
	}
}

func (w *world) say(format string, a ...any) {
	line := fmt.Sprintf("%10.3fs ", w.now.Seconds()) + fmt.Sprintf(format, a...)
	w.trace = append(w.trace, line)
	if w.loud {
		fmt.Println(line)
	}
	if len(w.trace) > 400 {
		w.trace = w.trace[len(w.trace)-300:]
	}
}

func (w *world) between(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(w.r.Int64N(int64(hi-lo)+1))
}

func (w *world) chance(p float64) bool { return w.r.Float64() < p }

// send delivers a message from one node to another, or does not.
func (w *world) send(from, to int, f func()) {
	if from != to && (w.cut[[2]int{from, to}] || w.chance(w.loss)) {
		return
	}
	d := w.between(50*time.Microsecond, time.Millisecond)
	if from != to && w.slow > 0 {
		d += w.between(0, w.slow)
	}
	w.after(d, f)
}

// linked tells whether two nodes reach each other both ways.
func (w *world) linked(a, b int) bool {
	return a == b || !w.cut[[2]int{a, b}] && !w.cut[[2]int{b, a}]
}

// clock is a machine's CLOCK_BOOTTIME: it runs a little fast or slow, and does not
// advance while a hypervisor holds the machine.
type clock struct {
	w    *world
	rate float64       // 1 = true
	base env.Boot      // at mark
	mark time.Duration // world time of base
	held bool
}

// Now implements env.Clock.
func (c *clock) Now() env.Boot {
	if c.held {
		return c.base
	}
	return c.base.Add(time.Duration(float64(c.w.now-c.mark) * c.rate))
}

// Wall implements env.Clock.
func (c *clock) Wall() time.Time { return time0.Add(c.w.now) }

// Sleep implements env.Clock; nothing of what is simulated sleeps.
func (*clock) Sleep(context.Context, time.Duration) error { panic("a pure part sleeps") }

func (c *clock) hold(on bool) {
	c.base, c.mark = c.Now(), c.w.now
	c.held = on
}
