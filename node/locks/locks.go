// Package locks is the locks worker of a node. It will run the DLM engine and
// drive the kernel's DLM; so far it holds its place in the node: it listens,
// keeps the stamps it was told, and knows when the node lease ends. It has no
// orphan time: locks stop with the lease (SAFETY §2).
//
// Only cmd/clusterd imports it.
package locks

import (
	"context"
	"sync"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/sched"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// Run is the worker process. It returns when ctx ends or control says so.
func Run(ctx context.Context, cfg config.Config, log *zap.Logger) error {
	if err := sched.Normal(); err != nil {
		log.Warn("cannot return to normal priority", zap.Error(err))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &worker{clock: env.Real{}, stop: cancel}
	return link.Run(ctx, cfg.RunDir, link.Locks, w, func(ctx context.Context, _ *link.Server) error {
		<-ctx.Done()
		return nil
	}, log)
}

type worker struct {
	clock env.Clock
	stop  context.CancelFunc

	mu   sync.Mutex
	inc  uint64 // incarnation of the node
	end  env.Boot
	open uint64 // openings so far
}

func (w *worker) OnState(s link.State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.Incarnation != w.inc {
		w.inc, w.end = s.Incarnation, 0
	}
}

func (w *worker) OnLease(l link.Lease, ready bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !ready || l.End <= w.end {
		return
	}
	if now := w.clock.Now(); w.end <= now && now < l.End {
		w.open++
	}
	w.end = l.End
}

func (w *worker) OnShutdown() { w.stop() }

func (w *worker) Report(r *link.Report) {
	w.mu.Lock()
	defer w.mu.Unlock()
	r.LeaseEnd, r.GateOpens, r.Gate = w.end, w.open, "shut"
	if w.clock.Now() < w.end {
		r.Gate = "serving"
	}
}
