package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// workers keeps one worker process of each kind running and connected. It adopts
// a worker that outlived the former control, and it never ends one, except by
// shutdown: I/O and locks do not notice that control was restarted.
type workers struct {
	hello   link.ControlHello
	runDir  string
	command func(link.Kind) *exec.Cmd // not started
	request func(ctx context.Context, k link.Kind, r link.Request) link.Reply
	clock   env.Clock
	log     *zap.Logger

	changed func() // a worker's report says something new; must not wait

	state *cell[link.State] // set only once control has caught up
	lease *cell[link.Lease]

	mu      sync.Mutex
	reports map[link.Kind]workerReport
	conns   map[link.Kind]*link.Control // connected ones
	halt    context.CancelFunc          // ends run, so that shutdown is not undone by a restart
	ended   chan struct{}               // run has returned
}

type workerReport struct {
	link.Report
	at        env.Boot
	connected bool
}

func newWorkers(hello link.ControlHello, runDir string, clock env.Clock, log *zap.Logger) *workers {
	return &workers{hello: hello, runDir: runDir, clock: clock, log: log,
		state: newCell[link.State](), lease: newCell[link.Lease](), reports: map[link.Kind]workerReport{}, conns: map[link.Kind]*link.Control{}}
}

// run keeps the workers of the kinds until ctx ends; they live on.
func (w *workers) run(ctx context.Context, kinds []link.Kind) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	defer close(ended)
	w.mu.Lock()
	w.halt, w.ended = cancel, ended
	w.mu.Unlock()
	var wg sync.WaitGroup
	for _, k := range kinds {
		wg.Go(func() { w.keep(ctx, k) })
	}
	wg.Wait()
}

// report gives the last report of a worker.
func (w *workers) report(k link.Kind) (workerReport, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	r, ok := w.reports[k]
	return r, ok
}

func (w *workers) keep(ctx context.Context, k link.Kind) {
	log := w.log.With(zap.String("worker", string(k)))
	for backoff := 50 * time.Millisecond; ctx.Err() == nil; {
		c, err := link.Connect(ctx, link.Socket(w.runDir, k), w.hello)
		if errors.Is(err, link.ErrRefused) {
			// A younger control exists. Its lock file should have kept us from
			// starting; whatever happened, we are not the one.
			log.Error("worker obeys another control; this one is out", zap.Error(err))
			_ = w.clock.Sleep(ctx, 5*time.Second)
			continue
		}
		if err != nil {
			if err := w.start(ctx, k, log); err != nil {
				log.Error("cannot start worker", zap.Error(err), zap.Duration("retry_in", backoff))
				_ = w.clock.Sleep(ctx, backoff)
				backoff = min(2*backoff, 5*time.Second)
			}
			continue
		}
		began := w.clock.Now()
		log.Info("connected to worker", zap.Int("pid", c.Hello.PID), zap.String("incarnation", c.Hello.Incarnation),
			zap.Bool("adopted", c.Hello.Highest != link.Stamp{}))
		err = w.talk(ctx, k, c)
		w.mu.Lock()
		r := w.reports[k]
		r.connected = false
		w.reports[k] = r
		delete(w.conns, k)
		w.mu.Unlock()
		if ctx.Err() == nil {
			log.Warn("connection to worker ended", zap.Error(err))
		}
		if w.clock.Now().Sub(began) > 10*time.Second {
			backoff = 50 * time.Millisecond
		} else {
			_ = w.clock.Sleep(ctx, backoff)
			backoff = min(2*backoff, 5*time.Second)
		}
	}
}

// start runs a new worker process and waits until it listens. If one already
// runs (it holds the lock file), the new process says so and ends, and the next
// connect finds the old one.
func (w *workers) start(ctx context.Context, k link.Kind, log *zap.Logger) error {
	cmd := w.command(k)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // signals to control's group do not reach it
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start worker %s: %w", k, err)
	}
	log.Info("started worker", zap.Int("pid", cmd.Process.Pid))
	dead := make(chan error, 1)
	// A worker outlives control, so nobody can wait for this goroutine before the
	// process ends; it holds nothing but the exit status.
	go func() { dead <- cmd.Wait() }()
	for range 200 {
		if _, err := os.Stat(link.Socket(w.runDir, k)); err == nil {
			if p, err := link.ReadPID(link.PIDFile(w.runDir, string(k))); err == nil && p.Alive() {
				return nil
			}
		}
		select {
		case err := <-dead:
			return fmt.Errorf("worker %s ended at once: %w", k, errOrExit(err))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(25 * time.Millisecond):
		}
	}
	return fmt.Errorf("worker %s does not listen on %s", k, link.Socket(w.runDir, k))
}

func errOrExit(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// talk hands over states and leases, and answers requests, until the connection
// ends. Nothing is sent before the state cell is set: after its start control
// says nothing but hello until it has caught up with a leader (SAFETY §2).
func (w *workers) talk(ctx context.Context, k link.Kind, c *link.Control) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		defer cancel()
		w.push(ctx, c)
	})
	w.mu.Lock()
	w.reports[k] = workerReport{Report: link.Report{WorkerHello: c.Hello}, at: w.clock.Now(), connected: true}
	w.conns[k] = c
	w.mu.Unlock()
	return c.Run(func(r link.Report) {
		w.mu.Lock()
		old := w.reports[k]
		w.reports[k] = workerReport{r, w.clock.Now(), true}
		w.mu.Unlock()
		if old.Gate != r.Gate || !bytes.Equal(old.Detail, r.Detail) {
			w.changed()
		}
	}, func(r link.Request) {
		wg.Go(func() {
			rep := w.request(ctx, k, r)
			if ctx.Err() == nil { // unanswered requests are repeated to the next control
				_ = c.Reply(rep)
			}
		})
	})
}

func (w *workers) push(ctx context.Context, c *link.Control) {
	var sentState, sentLease uint64
	for {
		st, sg, sn := w.state.get()
		if sg != 0 && sg != sentState {
			if c.State(st) != nil {
				return
			}
			sentState = sg
			continue // a lease goes out only behind the newest state
		}
		le, lg, ln := w.lease.get()
		if sentState != 0 && lg != 0 && lg != sentLease {
			if c.Lease(le) != nil {
				return
			}
			sentLease = lg
			continue
		}
		select {
		case <-sn:
		case <-ln:
		case <-ctx.Done():
			return
		}
	}
}

// shutdown asks every connected worker to drain and to end, and waits for the
// processes.
func (w *workers) shutdown(ctx context.Context, kinds []link.Kind) error {
	w.mu.Lock()
	halt, ended := w.halt, w.ended
	w.mu.Unlock()
	if halt != nil {
		halt()
		<-ended
	}
	var errs []error
	for _, k := range kinds {
		p, err := link.ReadPID(link.PIDFile(w.runDir, string(k)))
		if err != nil || !p.Alive() {
			continue
		}
		c, err := link.Connect(ctx, link.Socket(w.runDir, k), w.hello)
		if err != nil {
			errs = append(errs, fmt.Errorf("shut worker %s down: %w", k, err))
			continue
		}
		if err := c.Shutdown(); err != nil {
			errs = append(errs, fmt.Errorf("shut worker %s down: %w", k, err))
		}
		for p.Alive() {
			if err := w.clock.Sleep(ctx, 10*time.Millisecond); err != nil {
				errs = append(errs, fmt.Errorf("worker %s (pid %d) does not end: %w", k, p.PID, err))
				break
			}
		}
		_ = c.Close()
	}
	return errors.Join(errs...)
}
