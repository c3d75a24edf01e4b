package target

import (
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
)

// guard slows down whoever guesses secrets and knows which challenges are
// outstanding, so that none is answered by reflection (RFC 7143 9.2.1).
type guard struct {
	mu         sync.Mutex
	addrs      map[netip.Addr]*failures
	challenges map[string]int
}

type failures struct {
	n    int
	last time.Time
}

// Rules of the lock-out: failures are forgotten after a quiet time; each delays
// the answer, and from the limit on logins of the address are turned away with a
// status that initiators retry later.
const (
	authForget    = 60 * time.Second
	authDelay     = 50 * time.Millisecond // for the first failure, doubled for each further one
	authMaxDelay  = 2 * time.Second
	authLimit     = 10
	authMaxAddrs  = 4096
	authLockedFor = 10 * time.Second
)

func newGuard() *guard {
	return &guard{addrs: map[netip.Addr]*failures{}, challenges: map[string]int{}}
}

// locked tells whether an address has to wait.
func (g *guard) locked(a netip.Addr, now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.addrs[a]
	return f != nil && f.n >= authLimit && now.Sub(f.last) < authLockedFor
}

// failed counts a failure and returns how long to wait before answering it.
func (g *guard) failed(a netip.Addr, now time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.addrs) >= authMaxAddrs {
		for k, f := range g.addrs {
			if now.Sub(f.last) > authForget {
				delete(g.addrs, k)
			}
		}
		if len(g.addrs) >= authMaxAddrs {
			clear(g.addrs)
		}
	}
	f := g.addrs[a]
	if f == nil || now.Sub(f.last) > authForget {
		f = &failures{}
		g.addrs[a] = f
	}
	f.n++
	f.last = now
	return min(authDelay<<min(f.n-1, 10), authMaxDelay)
}

func (g *guard) succeeded(a netip.Addr) {
	g.mu.Lock()
	delete(g.addrs, a)
	g.mu.Unlock()
}

func (g *guard) issue(ch []byte) {
	g.mu.Lock()
	g.challenges[string(ch)]++
	g.mu.Unlock()
}

func (g *guard) done(chs [][]byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, ch := range chs {
		if g.challenges[string(ch)]--; g.challenges[string(ch)] <= 0 {
			delete(g.challenges, string(ch))
		}
	}
}

func (g *guard) outstanding(ch []byte) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.challenges[string(ch)] > 0
}

// loginAuth makes the login machine's view of a configuration.
func (c *conn) loginAuth(a *Auth) iscsi.LoginAuth {
	la := iscsi.LoginAuth{Required: a.required(), Algorithms: a.Algorithms}
	if !la.Required {
		return la
	}
	la.Secret = a.secret
	la.OutName, la.OutSecret = a.Out.Name, a.Out.Secret
	la.Outstanding = c.srv.guard.outstanding
	la.Issued = func(ch []byte) {
		c.challenges = append(c.challenges, ch)
		c.srv.guard.issue(ch)
	}
	return la
}

// authOutcome does what a failed or successful authentication asks for, before
// the last response is sent.
func (c *conn) authOutcome(err *iscsi.LoginError, user string) {
	if len(c.challenges) > 0 && (err != nil || user != "") {
		defer func() {
			c.srv.guard.done(c.challenges)
			c.challenges = nil
		}()
	}
	switch {
	case err != nil && err.Status == iscsi.StatusAuthFailure:
		wait := c.srv.guard.failed(c.remote.Addr(), time.Now())
		c.log.Debug("authentication failed", zap.Error(err), zap.Duration("answered_after", wait)) // serve logs it, within limits
		select {
		case <-time.After(wait):
		case <-c.closed:
		}
	case err == nil && user != "":
		c.srv.guard.succeeded(c.remote.Addr())
	}
}
