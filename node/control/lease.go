package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// The lease stream: a member sends renew, the leader answers grant or deny, in
// the frames of package link over mTLS. A lease's end is the send time of the
// renewal on the member's own clock plus TTL: nothing is assumed of two clocks
// but their rates.
const (
	tRenew link.Type = "renew"
	tGrant link.Type = "grant"
	tDeny  link.Type = "deny"
)

// renew asks for a lease and says how the node is.
type renew struct {
	Seq         uint64                `json:"seq"`
	Node        string                `json:"node"`
	Incarnation uint64                `json:"incarnation"`
	BootID      string                `json:"boot_id"`
	Applied     uint64                `json:"applied"` // FSM index
	Format      uint32                `json:"format"`
	Workers     map[string]api.Worker `json:"workers,omitempty"`
	Volumes     []volumeReport        `json:"volumes,omitempty"`
	Sessions    []api.Session         `json:"sessions,omitempty"`
}

// volumeReport is what a storage worker says of one local copy.
type volumeReport struct {
	UUID   string        `json:"uuid"`
	State  string        `json:"state"` // serving, standby, missing, error, opening, failed
	Error  string        `json:"error,omitempty"`
	Checks *checksReport `json:"checks,omitempty"`
}

// grant gives a lease: its end is the send time of renewal Seq + TTL.
type grant struct {
	Seq    uint64        `json:"seq"`
	TTL    time.Duration `json:"ttl"`
	Stamp  link.Stamp    `json:"stamp"` // Index: what a gate must have seen before it opens
	Leader string        `json:"leader"`
}

// deny refuses one, and says who or what to ask instead.
type deny struct {
	Seq    uint64   `json:"seq"`
	Code   denyCode `json:"code"`
	Leader peer     `json:"leader,omitzero"`
	Why    string   `json:"why"`
}

type denyCode string

const (
	denyNotLeader denyCode = "not-leader"
	denyAdmit     denyCode = "admit" // evicted, rebooted or never admitted: ask for admission
	denyUnknown   denyCode = "unknown"
)

// granter is the leader's end. Every grant is given behind a proof of leadership
// that began after its request had arrived: so no grant is worth more than
// TTL after the election of a successor, who waits for just that long
// (membership/detect).
type granter struct {
	ttl    time.Duration
	clock  env.Clock
	log    *zap.Logger
	verify func(context.Context) error // raft VerifyLeader
	leader func() (peer, bool)         // who leads, and whether it is us
	member func(node string) (rec members.Record, stamp link.Stamp, known bool)
	heard  func(r renew) // a granted renewal

	queue chan waiting
}

type waiting struct {
	r    renew
	conn *link.Conn
}

// run proves leadership for batches of renewals until ctx ends.
func (g *granter) run(ctx context.Context) {
	for {
		var batch []waiting
		select {
		case w := <-g.queue:
			batch = append(batch, w)
		case <-ctx.Done():
			return
		}
		for more := true; more; {
			select {
			case w := <-g.queue:
				batch = append(batch, w)
			default:
				more = false
			}
		}
		vctx, cancel := context.WithTimeout(ctx, g.ttl/2)
		var err error
		if !fault.Off(fault.GrantVerifiesLeader) {
			err = g.verify(vctx)
		}
		cancel()
		for _, w := range batch {
			g.answer(w, err)
		}
	}
}

// decide says what a renewal gets, apart from the proof of leadership.
func (g *granter) decide(r renew) (link.Stamp, *deny) {
	rec, stamp, known := g.member(r.Node)
	no := func(c denyCode, format string, a ...any) *deny {
		return &deny{Seq: r.Seq, Code: c, Why: fmt.Sprintf(format, a...)}
	}
	switch {
	case !known:
		return stamp, no(denyUnknown, "no member is called %s", r.Node)
	case !rec.Active():
		return stamp, no(denyAdmit, "%s is %s in incarnation %d", r.Node, rec.Status, rec.Incarnation)
	case rec.Incarnation != r.Incarnation:
		return stamp, no(denyAdmit, "old incarnation %d, the member is incarnation %d", r.Incarnation, rec.Incarnation)
	case rec.BootID != r.BootID:
		return stamp, no(denyAdmit, "another kernel boot than was admitted")
	}
	return stamp, nil
}

func (g *granter) answer(w waiting, verr error) {
	lead, us := g.leader()
	if verr != nil || !us {
		why := "not the leader"
		if verr != nil {
			why = "cannot prove leadership: " + verr.Error()
		}
		_ = w.conn.Send(tDeny, deny{Seq: w.r.Seq, Code: denyNotLeader, Leader: lead, Why: why})
		return
	}
	stamp, no := g.decide(w.r)
	if no != nil {
		_ = w.conn.Send(tDeny, no)
		return
	}
	g.heard(w.r)
	_ = w.conn.Send(tGrant, grant{Seq: w.r.Seq, TTL: g.ttl, Stamp: stamp, Leader: lead.Name})
}

// serve reads the renewals of one node until the connection ends. from is the
// name in the certificate: nobody renews for another.
func (g *granter) serve(ctx context.Context, from string, c net.Conn) error {
	conn := link.NewConn(c)
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer conn.Close()
	for {
		t, body, err := conn.Recv()
		if err != nil {
			return err
		}
		if t != tRenew {
			return fmt.Errorf("lease stream of %s: unknown frame %q", from, t)
		}
		var r renew
		if err := body(&r); err != nil {
			return err
		}
		if r.Node != from {
			return fmt.Errorf("lease stream of %s: renews for %s", from, r.Node)
		}
		if lead, us := g.leader(); !us {
			if err := conn.Send(tDeny, deny{Seq: r.Seq, Code: denyNotLeader, Leader: lead, Why: "not the leader"}); err != nil {
				return err
			}
			continue
		}
		select {
		case g.queue <- waiting{r, conn}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// renewer is the member's end: it keeps a stream to the leader and renews.
type renewer struct {
	interval time.Duration
	ttl      time.Duration
	clock    env.Clock
	log      *zap.Logger
	leader   func() (peer, bool) // as Raft knows it; false: nobody
	peers    func() []peer       // whom else to ask
	dial     func(ctx context.Context, p peer) (net.Conn, error)
	fill     func() renew // Seq is set here
	granted  func(end env.Boot, g grant)
	denied   func(d deny)  // code admit or unknown
	kick     chan struct{} // something changed that the leader waits for: renew now

	mu   sync.Mutex
	sent map[uint64]env.Boot
	hint peer
}

// run renews until ctx ends.
func (r *renewer) run(ctx context.Context) {
	for try := 0; ctx.Err() == nil; try++ {
		p, ok := r.whom(try)
		if ok {
			if err := r.session(ctx, p); err != nil && ctx.Err() == nil {
				r.log.Debug("lease stream ended", zap.String("peer", p.Name), zap.Error(err))
			}
		}
		_ = r.clock.Sleep(ctx, r.interval/2)
	}
}

// whom picks the next one to ask: the leader that Raft names, then the one a
// refusal named, then anybody.
func (r *renewer) whom(try int) (peer, bool) {
	if p, ok := r.leader(); ok && try%3 != 2 {
		return p, true
	}
	r.mu.Lock()
	h := r.hint
	r.hint = peer{}
	r.mu.Unlock()
	if h.Raft != "" {
		return h, true
	}
	ps := r.peers()
	if len(ps) == 0 {
		return peer{}, false
	}
	return ps[try%len(ps)], true
}

var errDenied = errors.New("denied")

func (r *renewer) session(ctx context.Context, p peer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dctx, dcancel := context.WithTimeout(ctx, r.ttl)
	c, err := r.dial(dctx, p)
	dcancel()
	if err != nil {
		return fmt.Errorf("lease stream to %s: %w", p.Name, err)
	}
	conn := link.NewConn(c)
	r.mu.Lock()
	r.sent = map[uint64]env.Boot{}
	r.mu.Unlock()
	ended := make(chan error, 1)
	go func() {
		err := r.read(conn)
		cancel()
		ended <- err
	}()
	var seq uint64
	for ctx.Err() == nil {
		seq++
		m := r.fill()
		m.Seq = seq
		r.mu.Lock()
		r.sent[seq] = r.clock.Now() // before the send: the lease may only be shorter
		delete(r.sent, seq-1000)
		r.mu.Unlock()
		if err := conn.Send(tRenew, m); err != nil {
			break
		}
		t := time.NewTimer(r.interval)
		select {
		case <-t.C:
		case <-r.kick:
		case <-ctx.Done():
		}
		t.Stop()
	}
	_ = conn.Close()
	return <-ended
}

func (r *renewer) read(conn *link.Conn) error {
	for {
		// A leader that answers nothing for a whole lease is none: ask another.
		if err := conn.SetReadDeadline(time.Now().Add(r.ttl)); err != nil {
			return err
		}
		t, body, err := conn.Recv()
		if err != nil {
			return err
		}
		switch t {
		case tGrant:
			var g grant
			if err := body(&g); err != nil {
				return err
			}
			r.mu.Lock()
			at, ok := r.sent[g.Seq]
			delete(r.sent, g.Seq)
			r.mu.Unlock()
			if ok && g.TTL > 0 && g.TTL <= time.Minute {
				r.granted(at.Add(g.TTL), g)
			}
		case tDeny:
			var d deny
			if err := body(&d); err != nil {
				return err
			}
			if d.Code == denyNotLeader {
				r.mu.Lock()
				r.hint = d.Leader
				r.mu.Unlock()
				return fmt.Errorf("%w: %s", errDenied, d.Why)
			}
			r.denied(d)
			return fmt.Errorf("%w: %s", errDenied, d.Why)
		default:
			return fmt.Errorf("unknown frame %q on the lease stream", t)
		}
	}
}
