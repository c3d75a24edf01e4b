package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/internal/durable"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

// Fencing at the target (SAFETY §3): the members' records say who is evicted. Their
// initiators are shut out, and for each open fence this target says which of its
// volumes the victim has nothing in flight on any more. It says so behind a
// promise on disk, and once: the log keeps it.

// cutRetry is how long one attempt at draining a victim's I/O lasts before what is
// stuck is said in the log and tried again.
const cutRetry = 5 * time.Second

// cutNames are the initiators that may not use anything, with the epoch of their
// node's eviction.
func cutNames(s *members.State) map[string]uint64 {
	out := map[string]uint64{}
	for _, r := range s.Members {
		if (r.Status == members.Evicted || r.Status == members.Fenced) && r.InitiatorName != "" {
			out[r.InitiatorName] = r.EvictEpoch
		}
	}
	return out
}

// cutOf is the cut of one victim at one epoch, as far as this process got.
type cutOf struct {
	epoch uint64
	acked []string // volumes that control has recorded
	busy  bool
}

// cut brings the open fences forward. It runs in the worker's loop, with the
// volumes in the roles that want gives them, and does not wait: a stuck disk holds
// up the acks of its own node and nothing else.
func (w *worker) cut(ctx context.Context, want *desired) {
	var serving []string
	for id, v := range w.vols {
		if v.serving {
			serving = append(serving, id)
		}
	}
	slices.Sort(serving)
	for name := range w.cuts {
		if r := want.members.Members[name]; r == nil || r.Status != members.Evicted {
			delete(w.cuts, name) // its fence is closed
		}
	}
	for name, r := range want.members.Members {
		if r.Status != members.Evicted || name == want.node || len(serving) == 0 {
			continue
		}
		c := w.cuts[name]
		if c == nil || c.epoch != r.EvictEpoch {
			c = &cutOf{epoch: r.EvictEpoch}
			w.cuts[name] = c
		}
		w.mu.Lock()
		todo := !c.busy && slices.ContainsFunc(serving, func(v string) bool { return !slices.Contains(c.acked, v) })
		if todo {
			c.busy = true
		}
		w.mu.Unlock()
		if !todo {
			continue
		}
		rec := r.Clone()
		w.wg.Go(func() {
			err := w.cutOne(ctx, &rec, c.epoch, serving)
			w.mu.Lock()
			c.busy = false
			if err == nil {
				c.acked = serving
			}
			w.mu.Unlock()
			if err != nil && ctx.Err() == nil {
				w.log.Error("the cut of an evicted node is not complete; it is tried again", zap.String("victim", rec.Name), zap.Uint64("epoch", c.epoch), zap.Error(err))
				_ = w.clock.Sleep(ctx, 100*time.Millisecond)
			}
			w.poke()
		})
	}
}

// cutOne cuts a victim off and has that recorded.
func (w *worker) cutOne(ctx context.Context, r *members.Record, epoch uint64, volumes []string) error {
	drain := func() error {
		if r.InitiatorName == "" {
			return nil // it never had one: nothing of it can be here
		}
		dctx, cancel := context.WithTimeout(ctx, cutRetry)
		defer cancel()
		return w.srv.CutInitiator(dctx, []string{r.InitiatorName}, epoch)
	}
	if fault.Off(fault.CutDrainsFirst) {
		w.wg.Go(func() { _ = drain() })
	} else if err := drain(); err != nil {
		return err
	}
	if err := w.promise(r.Name, epoch); err != nil {
		return err
	}
	began := w.clock.Now()
	if _, err := w.link.Request(ctx, "cut.ack", map[string]any{"victim": r.Name, "epoch": epoch, "volumes": volumes}); err != nil {
		return fmt.Errorf("tell control of the cut of %s: %w", r.Name, err)
	}
	w.log.Info("cut an evicted node off", zap.String("victim", r.Name), zap.Uint64("epoch", epoch), zap.Strings("volumes", volumes), zap.Duration("told_in", w.clock.Now().Sub(began)))
	return nil
}

// promises is the file of the cuts that this node's targets promised: victim to
// epoch. A target that starts again takes no login before it knows a state that is
// not older than any of them.
func promisesPath(dir string) string { return filepath.Join(dir, "cuts.json") }

func loadPromises(dir string) (map[string]uint64, error) {
	out := map[string]uint64{}
	b, err := os.ReadFile(promisesPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		return nil, fmt.Errorf("read what was promised in fences: %w", err)
	}
	return out, nil
}

// promise makes a cut durable.
func (w *worker) promise(victim string, epoch uint64) error {
	w.promiseMu.Lock()
	defer w.promiseMu.Unlock()
	if w.promised[victim] >= epoch {
		return nil
	}
	next := map[string]uint64{victim: epoch}
	for k, v := range w.promised {
		next[k] = max(next[k], v)
	}
	b, err := json.Marshal(next)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(promisesPath(w.cfg.DataDir), b, 0o600); err != nil {
		return fmt.Errorf("promise the cut of %s: %w", victim, err)
	}
	w.promised = next
	return nil
}

// behindPromise tells whether a state is older than a promise of this node.
func (w *worker) behindPromise(want *desired) bool {
	w.promiseMu.Lock()
	defer w.promiseMu.Unlock()
	for _, e := range w.promised {
		if want.members.Epoch < e {
			return true
		}
	}
	return false
}
