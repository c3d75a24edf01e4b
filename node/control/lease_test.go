package control

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/node/link"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stand is a leader and one member with a pipe between them.
type stand struct {
	g         *granter
	r         *renewer
	verifyErr atomic.Pointer[error]
	verified  atomic.Int64
	leads     atomic.Bool

	mu     sync.Mutex
	rec    members.Record
	ends   []env.Boot
	sentBy []env.Boot // now, when the grant came
	denies []deny
	dialed []string
}

func newStand(t *testing.T, inc uint64) *stand {
	s := &stand{rec: members.Record{Name: "n1", Incarnation: 1, BootID: "b1", Status: members.Member}}
	s.leads.Store(true)
	log := zaptest.NewLogger(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	s.g = &granter{ttl: 400 * time.Millisecond, clock: env.Real{}, log: log, queue: make(chan waiting, 8),
		verify: func(context.Context) error {
			s.verified.Add(1)
			if e := s.verifyErr.Load(); e != nil {
				return *e
			}
			return nil
		},
		leader: func() (peer, bool) { return peer{Name: "n9", Raft: "n9:1"}, s.leads.Load() },
		member: func(n string) (members.Record, link.Stamp, bool) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.rec, link.Stamp{Index: 7, View: 2, Epoch: 3}, n == s.rec.Name
		},
		heard: func(renew) {},
	}
	wg.Go(func() { s.g.run(ctx) })
	s.r = &renewer{interval: 20 * time.Millisecond, ttl: 400 * time.Millisecond, clock: env.Real{}, log: log,
		leader: func() (peer, bool) { return peer{}, false },
		peers:  func() []peer { return []peer{{Name: "p", Raft: "p:1"}} },
		fill:   func() renew { return renew{Node: "n1", Incarnation: inc, BootID: "b1"} },
		dial: func(_ context.Context, p peer) (net.Conn, error) {
			s.mu.Lock()
			s.dialed = append(s.dialed, p.Name)
			s.mu.Unlock()
			a, b := net.Pipe()
			wg.Go(func() { _ = s.g.serve(ctx, "n1", b) })
			return a, nil
		},
		granted: func(end env.Boot, _ grant) {
			s.mu.Lock()
			s.ends = append(s.ends, end)
			s.sentBy = append(s.sentBy, env.Real{}.Now())
			s.mu.Unlock()
		},
		denied: func(d deny) { s.mu.Lock(); s.denies = append(s.denies, d); s.mu.Unlock() },
	}
	wg.Go(func() { s.r.run(ctx) })
	return s
}

func (s *stand) wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		s.mu.Lock()
		done := ok()
		s.mu.Unlock()
		if done {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func TestALeaseCountsFromTheSendOfItsRequest(t *testing.T) {
	s := newStand(t, 1)
	s.wait(t, "five grants", func() bool { return len(s.ends) >= 5 })
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range s.ends {
		if e.Sub(s.sentBy[i]) > s.g.ttl {
			t.Fatalf("lease %d ends %v after its grant came: more than the TTL", i, e.Sub(s.sentBy[i]))
		}
	}
	if s.verified.Load() == 0 {
		t.Fatal("granted without a proof of leadership")
	}
}

func TestNoProofNoGrant(t *testing.T) {
	s := newStand(t, 1)
	s.wait(t, "a grant", func() bool { return len(s.ends) > 0 })
	err := errors.New("deposed")
	s.verifyErr.Store(&err)
	time.Sleep(100 * time.Millisecond) // what was proven before may still arrive
	s.mu.Lock()
	n := len(s.ends)
	s.mu.Unlock()
	time.Sleep(300 * time.Millisecond)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ends) != n {
		t.Fatalf("%d grants of a leader that cannot prove it", len(s.ends)-n)
	}
}

func TestARefusalNamesWhomToAsk(t *testing.T) {
	s := newStand(t, 1)
	s.leads.Store(false)
	s.wait(t, "the hint is followed", func() bool {
		for _, d := range s.dialed {
			if d == "n9" {
				return true
			}
		}
		return false
	})
	s.leads.Store(true)
	s.wait(t, "a grant", func() bool { return len(s.ends) > 0 })
}

func TestWhoMustBeAdmittedIsTold(t *testing.T) {
	for name, c := range map[string]struct {
		inc  uint64
		rec  members.Record
		code denyCode
	}{
		"old incarnation": {1, members.Record{Name: "n1", Incarnation: 2, BootID: "b1", Status: members.Member}, denyAdmit},
		"evicted":         {1, members.Record{Name: "n1", Incarnation: 1, BootID: "b1", Status: members.Evicted}, denyAdmit},
		"rebooted":        {1, members.Record{Name: "n1", Incarnation: 1, BootID: "b0", Status: members.Member}, denyAdmit},
		"removed":         {1, members.Record{Name: "other"}, denyUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, c.inc)
			s.mu.Lock()
			s.rec = c.rec
			s.ends = nil
			s.mu.Unlock()
			s.wait(t, "told", func() bool { return len(s.denies) > 0 && s.denies[len(s.denies)-1].Code == c.code })
		})
	}
}

func TestNobodyRenewsForAnother(t *testing.T) {
	s := newStand(t, 1)
	a, b := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- s.g.serve(t.Context(), "n2", b) }()
	c := link.NewConn(a)
	if err := c.Send(tRenew, renew{Node: "n1", Incarnation: 1, BootID: "b1"}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Fatal("n2 renewed for n1")
	}
	_ = c.Close()
}
