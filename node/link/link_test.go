package link

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type recorder struct {
	mu     sync.Mutex
	states []Stamp
	leases []Lease
	ready  []bool
	down   bool
}

func (r *recorder) OnState(s State) { r.mu.Lock(); r.states = append(r.states, s.Stamp); r.mu.Unlock() }
func (r *recorder) OnLease(l Lease, ready bool) {
	r.mu.Lock()
	r.leases, r.ready = append(r.leases, l), append(r.ready, ready)
	r.mu.Unlock()
}
func (r *recorder) OnShutdown()        { r.mu.Lock(); r.down = true; r.mu.Unlock() }
func (r *recorder) Report(rep *Report) { rep.Gate = "serving" }

func start(t *testing.T) (*Server, *recorder, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "w.sock")
	r := &recorder{}
	s, err := Listen(path, WorkerHello{Kind: Storage, Incarnation: "w1", PID: 1}, r, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return s, r, path
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 500 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func run(t *testing.T, c *Control, request func(Request)) chan error {
	done := make(chan error, 1)
	if request == nil {
		request = func(Request) {}
	}
	go func() { done <- c.Run(func(Report) {}, request) }()
	t.Cleanup(func() { _ = c.Close() })
	return done
}

// ended waits for a link to end: one that is not dropped fails the test, it does
// not hang it.
func ended(t *testing.T, done chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(5 * time.Second):
		t.Fatal("the link goes on")
		return nil
	}
}

func TestWorkerRefusesWhatIsOlder(t *testing.T) {
	for _, c := range []struct {
		name string
		s    Stamp
		ok   bool
	}{
		{"same again", Stamp{10, 3, 2}, true},
		{"newer", Stamp{11, 3, 2}, true},
		{"older index", Stamp{9, 3, 2}, false},
		{"older view, newer index", Stamp{12, 2, 2}, false},
		{"older epoch, newer index", Stamp{12, 3, 1}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, r, path := start(t)
			ctl, err := Connect(t.Context(), path, ControlHello{Incarnation: 1})
			if err != nil {
				t.Fatal(err)
			}
			done := run(t, ctl, nil)
			if err := ctl.State(State{Stamp: Stamp{10, 3, 2}}); err != nil {
				t.Fatal(err)
			}
			if err := ctl.State(State{Stamp: c.s}); err != nil {
				t.Fatal(err)
			}
			if c.ok {
				eventually(t, "obeyed", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.states) == 2 })
				return
			}
			if err := ended(t, done); !errors.Is(err, ErrRefused) {
				t.Fatalf("link ended with %v, want a refusal", err)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			if len(r.states) != 1 {
				t.Fatalf("obeyed %v", r.states)
			}
			rep, err := Status(t.Context(), path)
			if err != nil || rep.Refusals != 1 || rep.Highest != (Stamp{10, 3, 2}) {
				t.Fatalf("%+v %v", rep, err)
			}
		})
	}
}

func TestTheHigherControlIsObeyed(t *testing.T) {
	_, r, path := start(t)
	old, err := Connect(t.Context(), path, ControlHello{Incarnation: 5})
	if err != nil {
		t.Fatal(err)
	}
	oldDone := run(t, old, nil)
	young, err := Connect(t.Context(), path, ControlHello{Incarnation: 6})
	if err != nil {
		t.Fatal(err)
	}
	run(t, young, nil)
	if err := ended(t, oldDone); err == nil {
		t.Fatal("the old control was not dropped")
	}
	if _, err := Connect(t.Context(), path, ControlHello{Incarnation: 5}); !errors.Is(err, ErrRefused) {
		t.Fatalf("an old control came back: %v", err)
	}
	if err := young.State(State{Stamp: Stamp{1, 1, 1}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the young one is obeyed", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.states) == 1 })
}

func TestLeaseWaitsForItsMinimumIndex(t *testing.T) {
	_, r, path := start(t)
	ctl, err := Connect(t.Context(), path, ControlHello{Incarnation: 1})
	if err != nil {
		t.Fatal(err)
	}
	run(t, ctl, nil)
	for _, f := range []func() error{
		func() error { return ctl.State(State{Stamp: Stamp{10, 1, 1}}) },
		func() error { return ctl.Lease(Lease{Stamp{12, 1, 1}, 100}) },
		func() error { return ctl.State(State{Stamp: Stamp{12, 1, 1}}) },
		func() error { return ctl.Lease(Lease{Stamp{12, 1, 1}, 101}) },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "two leases", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.ready) == 2 })
	if r.ready[0] || !r.ready[1] {
		t.Fatalf("ready: %v, want false then true", r.ready)
	}
}

func TestARequestSurvivesARestartOfControl(t *testing.T) {
	s, _, path := start(t)
	first, err := Connect(t.Context(), path, ControlHello{Incarnation: 1})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan Request, 4)
	run(t, first, func(r Request) { got <- r })
	type answer struct {
		r   Reply
		err error
	}
	ans := make(chan answer, 1)
	go func() {
		r, err := s.Request(t.Context(), "volume.ready", map[string]string{"uuid": "u"})
		ans <- answer{r, err}
	}()
	a := <-got
	_ = first.Close() // died before it answered
	second, err := Connect(t.Context(), path, ControlHello{Incarnation: 2})
	if err != nil {
		t.Fatal(err)
	}
	run(t, second, func(r Request) { got <- r })
	b := <-got
	if a.Seq != b.Seq || a.Worker != b.Worker {
		t.Fatalf("repeated as %+v, was %+v", b, a)
	}
	if err := second.Reply(Reply{Seq: b.Seq, Index: 7}); err != nil {
		t.Fatal(err)
	}
	if x := <-ans; x.err != nil || x.r.Index != 7 {
		t.Fatalf("%+v", x)
	}
}

func TestFramesBeforeHelloAndHugeFramesEndTheConnection(t *testing.T) {
	_, _, path := start(t)
	for name, raw := range map[string][]byte{
		"state first": func() []byte {
			j, _ := json.Marshal(frame{T: TState})
			return append([]byte{0, 0, 0, byte(len(j))}, j...)
		}(),
		"huge":    {0xff, 0xff, 0xff, 0xff},
		"no json": {0, 0, 0, 1, '{'},
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(raw); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 1)
		for {
			if _, err = c.Read(b); err != nil {
				break
			}
		}
		if os.IsTimeout(err) {
			t.Errorf("%s: connection stays open", name)
		}
		_ = c.Close()
	}
}

func TestHoldIsExclusiveAndNamesTheHolder(t *testing.T) {
	dir := t.TempDir()
	f, err := Hold(dir, "storage", "x")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Hold(dir, "storage", "y")
	if !errors.Is(err, os.ErrExist) || !strings.Contains(err.Error(), "locked by pid") {
		t.Fatalf("second hold: %v", err)
	}
	p, err := ReadPID(PIDFile(dir, "storage"))
	if err != nil || !p.Alive() || p.Incarnation != "x" {
		t.Fatalf("%+v %v", p, err)
	}
	p.Start++
	if p.Alive() {
		t.Fatal("another process with this pid counts as this one")
	}
	_ = f.Close()
	f, err = Hold(dir, "storage", "y")
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
}

type answerer struct{ recorder }

func (*answerer) Answer(t Type, body func(any) error) (any, error) {
	var q EventsAfter
	if err := body(&q); err != nil {
		return nil, err
	}
	return Events{Worker: string(t), Last: q.After + 1}, nil
}

// TestAsk: a question needs no hello and is no control; a worker that has no
// answer closes the connection.
func TestAsk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "w.sock")
	s, err := Listen(path, WorkerHello{Kind: Storage, Incarnation: "w1", PID: 1}, &answerer{}, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	ctl, err := Connect(t.Context(), path, ControlHello{Incarnation: 1})
	if err != nil {
		t.Fatal(err)
	}
	ended := run(t, ctl, nil)
	var e Events
	if err := Ask(t.Context(), path, TEvents, EventsAfter{After: 41}, &e); err != nil || e.Last != 42 || e.Worker != "events" {
		t.Errorf("%+v, %v", e, err)
	}
	select {
	case err := <-ended:
		t.Errorf("the question ended control's connection: %v", err)
	default:
	}
	_, _, old := start(t)
	if err := Ask(t.Context(), old, TStats, struct{}{}, &e); err == nil {
		t.Error("a worker without answers gave one")
	}
	past, stop := context.WithCancel(t.Context())
	stop()
	if err := Ask(past, path, TStats, struct{}{}, &e); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
