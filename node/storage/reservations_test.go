package storage

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	fsmpr "github.com/blockhouse-san/blockhouse/membership/fsm/pr"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// fsmVolumes is machine 3 of the copies' log.
type fsmVolumes struct{ epoch uint64 }

func (v *fsmVolumes) Serving(string) (string, uint64, bool) { return "n1", v.epoch, true }

// copyOf is the reservations of one volume at a primary, with the real machine as
// the cluster, whose states arrive when the test says so.
type copyOf struct {
	*reservations
	t      *testing.T
	clock  *env.Manual
	gate   *NodeGate
	log    *fsmpr.Machine
	vols   fsmVolumes
	mu     sync.Mutex
	index  uint64
	seq    uint64
	hold   chan struct{}                 // not nil: the answers wait for it
	late   bool                          // states are not pushed by themselves
	fail   func() error                  // of a request, after it was decided
	acts   []pr.Result                   // what the enforcer did
	block  atomic.Pointer[chan struct{}] // the enforcer waits for it
	forgot atomic.Int32
	wg     sync.WaitGroup
}

func nexusOf(i int) pr.Nexus {
	return pr.Nexus{ID: scsi.TransportID{Name: fmt.Sprintf("iqn.h%d", i)}, Port: 1}
}

func newCopy(t *testing.T) *copyOf {
	t.Helper()
	c := &copyOf{t: t, clock: env.NewManual(env.Boot(time.Second)), log: fsmpr.New(), vols: fsmVolumes{1}}
	c.log.Bind(&c.vols)
	c.gate = NewNodeGate(c.clock, 10*time.Second)
	c.gate.Extend(c.clock.Now().Add(2*time.Second), 1)
	vg := NewVolumeGate(c.gate)
	vg.SetRole(true, true, 1, nil)
	ctx, cancel := context.WithCancel(t.Context())
	r := &reservations{volume: "v1", gate: vg, clock: c.clock, log: zaptest.NewLogger(t), worker: func() string { return "w1" }, over: ctx.Done()}
	c.reservations = r
	r.ask = c.request
	r.act = func(ctx context.Context, _ string, res pr.Result) error {
		if b := c.block.Load(); b != nil {
			select {
			case <-*b:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.acts = append(c.acts, res)
		return nil
	}
	r.forget = func() { c.forgot.Add(1) }
	r.wake = func() { c.wg.Go(func() { c.work(ctx) }) }
	r.start(nil, 0)
	t.Cleanup(func() { cancel(); c.wg.Wait() })
	return c
}

func (c *copyOf) work(ctx context.Context) {
	if c.due() {
		c.enforce(ctx)
	}
}

// request is what control and leader do with a worker's request.
func (c *copyOf) request(ctx context.Context, kind string, body any) (link.Reply, error) {
	b := body.(changeBody)
	c.mu.Lock()
	c.seq++
	seq, hold, late := c.seq, c.hold, c.late
	c.mu.Unlock()
	idx, err := c.decide(kind, seq, b)
	if err != nil {
		var fe *fsm.Error
		if errors.As(err, &fe) {
			return link.Reply{}, &link.RefusedError{Kind: kind, Code: "conflict", Text: err.Error()}
		}
		return link.Reply{}, err
	}
	if !late {
		c.push()
	}
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return link.Reply{Seq: seq}, ctx.Err()
		}
	}
	if c.fail != nil {
		if err := c.fail(); err != nil {
			return link.Reply{Seq: seq}, err
		}
	}
	return link.Reply{Seq: seq, Index: idx}, nil
}

func (c *copyOf) decide(kind string, seq uint64, b changeBody) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.index++
	var err error
	if kind == "pr.barrier" {
		_, err = c.log.Apply(c.index, &fsmpr.Barrier{Node: "n1", Worker: "w1", Seq: seq, Volume: b.Volume, Epoch: b.Epoch})
	} else {
		_, err = c.log.Apply(c.index, &fsmpr.Change{Node: "n1", Worker: "w1", Seq: seq, Volume: b.Volume, Epoch: b.Epoch, Request: *b.Request, LegacySeq: b.LegacySeq})
	}
	return c.index, err
}

// push delivers the state of now.
func (c *copyOf) push() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set(c.log.State().Volumes["v1"], c.index)
}

func outOf(i, sa int, typ scsi.PRType, key, newKey uint64) pr.Request {
	return pr.Request{Kind: pr.KindOut, SA: sa, Type: typ, Nexus: nexusOf(i), Param: &scsi.PROut{Key: key, NewKey: newKey}}
}

type answer struct {
	res pr.Result
	err error
}

func (c *copyOf) start(q pr.Request) chan answer {
	out := make(chan answer, 1)
	c.wg.Go(func() {
		res, err := c.Apply(context.Background(), q)
		out <- answer{res, err}
	})
	return out
}

func (c *copyOf) good(q pr.Request) {
	c.t.Helper()
	a := c.wait(c.start(q))
	if a.err != nil || a.res.Status != scsi.StatusGood {
		c.t.Fatalf("%+v: %+v", q, a)
	}
}

func (c *copyOf) wait(out chan answer) answer {
	c.t.Helper()
	select {
	case a := <-out:
		return a
	case <-time.After(10 * time.Second):
		c.t.Fatal("not answered")
		return answer{}
	}
}

func (c *copyOf) silent(out chan answer, why string) {
	c.t.Helper()
	select {
	case a := <-out:
		c.t.Fatalf("answered %s: %+v", why, a)
	case <-time.After(100 * time.Millisecond):
	}
}

// SAFETY §4 and §7: a PERSISTENT RESERVE OUT is answered when the primary has
// applied it and done what it asks for, not when the log has it.
func TestAnsweredWhenThePrimaryAppliedIt(t *testing.T) {
	t.Parallel()
	c := newCopy(t)
	c.late = true
	out := c.start(outOf(1, scsi.SARegister, 0, 0, 7))
	c.silent(out, "before the copy here has it")
	block := make(chan struct{})
	c.block.Store(&block)
	c.push()
	if len(c.Snapshot().Registrations) != 1 {
		t.Fatal("commands are not judged by the new state")
	}
	c.silent(out, "before the trespassers were out of the backend")
	close(block)
	if a := c.wait(out); a.err != nil || a.res.Status != scsi.StatusGood {
		t.Fatalf("%+v", a)
	}
	c.late = false
	// What SCSI refuses comes the same way.
	if a := c.wait(c.start(outOf(2, scsi.SAReserve, scsi.PRWriteExclusive, 9, 0))); a.err != nil || a.res.Status != scsi.StatusReservationConflict {
		t.Fatalf("%+v", a)
	}
	if a := c.wait(c.start(outOf(1, scsi.SAPreempt, scsi.PRWriteExclusive, 7, 0))); a.err != nil || a.res.Sense == nil || a.res.Sense.Code != scsi.ASCInvalidFieldParam {
		t.Fatalf("%+v", a)
	}
}

// A reply that came when the node lease was over gives no GOOD: the change is in
// force, and this target may not speak any more (SAFETY §2, r1).
func TestNeverGoodWithoutALease(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(c *copyOf) (release func()){
		"before the reply": func(c *copyOf) func() { c.hold = make(chan struct{}); return func() { close(c.hold) } },
		"before the state": func(c *copyOf) func() { c.late = true; return c.push },
		"before the victims ended": func(c *copyOf) func() {
			block := make(chan struct{})
			c.block.Store(&block)
			return func() { close(block) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCopy(t)
			release := prepare(c)
			out := c.start(outOf(1, scsi.SARegister, 0, 0, 7))
			c.silent(out, "too early")
			c.clock.Step(3 * time.Second)
			a := answer{}
			select {
			case a = <-out:
				release()
			case <-time.After(time.Second): // nobody gave it up
				release()
				a = c.wait(out)
			}
			if a.err == nil {
				t.Fatalf("answered %+v", a.res)
			}
			if errors.Is(a.err, target.ErrNotReady) {
				t.Fatalf("it took effect, and is said not to have: %v", a.err)
			}
		})
	}
}

// What no control took has no effect and says so; what was given up is made void
// before it can take effect later.
func TestGivenUp(t *testing.T) {
	t.Parallel()
	c := newCopy(t)
	c.ask = func(context.Context, string, any) (link.Reply, error) {
		return link.Reply{}, fmt.Errorf("x: %w", link.ErrNotSent)
	}
	if a := c.wait(c.start(outOf(1, scsi.SARegister, 0, 0, 7))); !errors.Is(a.err, target.ErrNotReady) {
		t.Fatalf("%+v", a)
	}
	// Sent, and not decided: control has it still.
	var lost changeBody
	c.ask = func(ctx context.Context, _ string, b any) (link.Reply, error) {
		lost = b.(changeBody)
		c.mu.Lock()
		c.seq++
		c.mu.Unlock()
		<-ctx.Done()
		return link.Reply{}, ctx.Err()
	}
	out := c.start(outOf(1, scsi.SARegister, 0, 0, 7))
	c.silent(out, "without a decision")
	c.clock.Step(3 * time.Second)
	if a := c.wait(out); a.err == nil || errors.Is(a.err, target.ErrNotReady) {
		t.Fatalf("%+v", a)
	}
	c.ask = c.request
	c.tidy(t.Context(), &c.wg, func(pr.Nexus) bool { return true })
	if c.seq != 1 {
		t.Fatal("asked without a lease")
	}
	c.gate.Extend(c.clock.Now().Add(2*time.Second), 1)
	c.tidy(t.Context(), &c.wg, func(pr.Nexus) bool { return true })
	c.wg.Wait()
	if _, err := c.decide("pr.change", 1, lost); !errors.Is(err, fsm.ErrConflict) {
		t.Fatalf("the request that was given up: %v", err)
	}
	before := c.seq
	c.tidy(t.Context(), &c.wg, func(pr.Nexus) bool { return true })
	c.wg.Wait()
	if c.seq != before {
		t.Error("a doubt that has ended is settled again")
	}
	c.good(outOf(1, scsi.SARegister, 0, 0, 7))
}

func TestSuperseded(t *testing.T) {
	t.Parallel()
	c := newCopy(t)
	c.vols.epoch = 2
	if a := c.wait(c.start(outOf(1, scsi.SARegister, 0, 0, 7))); !errors.Is(a.err, target.ErrNotReady) {
		t.Fatalf("%+v", a)
	}
	c.reservations.gate.SetRole(false, false, 2, nil)
	if a := c.wait(c.start(outOf(1, scsi.SARegister, 0, 0, 7))); !errors.Is(a.err, target.ErrStandby) {
		t.Fatalf("%+v", a)
	}
}

// Whatever is skipped, everybody hears of what concerns them (SAFETY §2).
func TestEnforcedFromTheState(t *testing.T) {
	t.Parallel()
	c := newCopy(t)
	c.good(outOf(1, scsi.SARegister, 0, 0, 1))
	c.good(outOf(2, scsi.SARegister, 0, 0, 2))
	c.good(outOf(2, scsi.SAReserve, scsi.PRWriteExclusiveRegOnly, 2, 0))
	c.acts = nil
	// Three changes that come as one state.
	for i, q := range []pr.Request{outOf(2, scsi.SARelease, scsi.PRWriteExclusiveRegOnly, 2, 0), outOf(1, scsi.SAPreemptAndAbort, scsi.PRWriteExclusive, 1, 2), outOf(1, scsi.SAReserve, scsi.PRWriteExclusive, 1, 0)} {
		if _, err := c.decide("pr.change", 100+uint64(i), changeBody{Volume: "v1", Epoch: 1, Request: &q}); err != nil {
			t.Fatal(err)
		}
	}
	c.push()
	c.wg.Wait()
	if len(c.acts) != 1 {
		t.Fatalf("%+v", c.acts)
	}
	got := c.acts[0]
	if len(got.Notify) != 2 || got.Notify[0].Nexus != nexusOf(1) || got.Notify[0].Code != scsi.ASCReservationsReleased ||
		got.Notify[1].Nexus != nexusOf(2) || got.Notify[1].Code != scsi.ASCRegistrationsPreempted || len(got.Abort) != 1 || got.Abort[0].Nexus != nexusOf(2) {
		t.Fatalf("%+v", got)
	}
	c.push() // the same again says nothing
	c.wg.Wait()
	if len(c.acts) != 1 || c.forgot.Load() != 0 {
		t.Fatalf("%+v, sessions reset %d times", c.acts, c.forgot.Load())
	}
	// More was skipped than the record keeps.
	c.reservations.set(&fsmpr.Volume{Seq: 5000, Horizon: 4000}, 99)
	c.wg.Wait()
	if c.forgot.Load() != 1 {
		t.Error("sessions were not reset")
	}
}

// RESERVE ends with its nexus, also when the process that knew the nexus is gone.
func TestReserveEndsWithItsNexus(t *testing.T) {
	t.Parallel()
	c := newCopy(t)
	reserve := pr.Request{Kind: pr.KindReserve, Nexus: nexusOf(1)}
	loss := pr.Request{Kind: pr.KindNexusLoss, Nexus: nexusOf(1)}
	c.good(loss)
	c.good(pr.Request{Kind: pr.KindReset, Nexus: nexusOf(1)})
	c.good(pr.Request{Kind: pr.KindPurge, Names: []string{"iqn.h1"}})
	if c.index != 0 {
		t.Fatal("what changes nothing went through the log")
	}
	c.good(reserve)
	if !c.Conflicts(nexusOf(2), scsi.ConflictRead) {
		t.Fatal("not reserved")
	}
	c.tidy(t.Context(), &c.wg, func(pr.Nexus) bool { return true })
	c.wg.Wait()
	if c.Snapshot().Legacy == nil {
		t.Fatal("taken from a live nexus")
	}
	c.tidy(t.Context(), &c.wg, func(pr.Nexus) bool { return false })
	c.wg.Wait()
	if c.Snapshot().Legacy != nil {
		t.Fatal("held by nobody")
	}
	c.good(reserve)
	c.good(loss)
	if c.Snapshot().Legacy != nil {
		t.Fatal("it survived the loss of its nexus")
	}
	c.good(reserve)
	before := c.index
	c.good(pr.Request{Kind: pr.KindPurge, Names: []string{"iqn.h1"}}) // the log's business, with Fenced
	if c.index != before {
		t.Fatal("a cut waits for the log")
	}
}

func BenchmarkConflicts(b *testing.B) {
	r := &reservations{}
	s := pr.State{Type: scsi.PRWriteExclusiveRegOnly}
	for i := range 16 {
		s.Registrations = append(s.Registrations, pr.Registration{Nexus: nexusOf(i), Key: 1})
	}
	r.start(&fsmpr.Volume{State: s}, 1)
	n := nexusOf(15)
	b.ReportAllocs()
	for b.Loop() {
		if r.Conflicts(n, scsi.ConflictWrite) {
			b.Fatal("conflict")
		}
	}
}
