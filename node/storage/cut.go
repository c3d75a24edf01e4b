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
	if fault.Off(fault.TargetsCut) {
		return out
	}
	for _, r := range s.Members {
		if (r.Status == members.Evicted || r.Status == members.Fenced) && r.InitiatorName != "" {
			out[r.InitiatorName] = r.EvictEpoch
		}
	}
	return out
}

// cutOf is the cut of one victim at one epoch, as far as this process got. All but
// epoch is guarded by worker.mu.
type cutOf struct {
	epoch   uint64
	drained bool     // nothing of it is in flight, and that is promised
	acked   []string // volumes that control knows of
	busy    bool
}

// cut brings the fences forward. It runs in the worker's loop, with the volumes in
// the roles that want gives them, and does not wait: a stuck disk holds up the acks
// of its own node and nothing else. It is level-triggered: an eviction counts until
// it was acted on, also when the node is a member again by the time this target
// hears of it. As long as something of an evicted node may be in flight and its fence
// is closed, nobody uses the volumes, because others may be recovering on them.
func (w *worker) cut(ctx context.Context, want *desired) {
	var serving []string
	for id, v := range w.vols {
		if v.serving {
			serving = append(serving, id)
		}
	}
	slices.Sort(serving)
	suspend := false
	for name, r := range want.members.Members {
		if r.EvictEpoch == 0 || name == want.node {
			continue
		}
		w.mu.Lock()
		c := w.cuts[name]
		if c == nil || c.epoch != r.EvictEpoch {
			c = &cutOf{epoch: r.EvictEpoch, drained: w.promisedTo(name) >= r.EvictEpoch}
			w.cuts[name] = c
		}
		if !c.drained && r.Status != members.Evicted {
			suspend = true
		}
		todo := !c.busy && (!c.drained || slices.ContainsFunc(serving, func(v string) bool { return !slices.Contains(c.acked, v) }))
		c.busy = c.busy || todo
		w.mu.Unlock()
		if !todo {
			continue
		}
		rec := r.Clone()
		w.wg.Go(func() {
			err := w.cutOne(ctx, &rec, c, serving)
			w.mu.Lock()
			c.busy = false
			w.mu.reapply = true // who is a member again may log in
			w.mu.Unlock()
			if err != nil && ctx.Err() == nil {
				w.log.Error("the cut of an evicted node is not complete; it is tried again", zap.String("victim", rec.Name), zap.Uint64("epoch", c.epoch), zap.Error(err))
				_ = w.clock.Sleep(ctx, 100*time.Millisecond)
			}
			w.poke()
		})
	}
	for _, v := range w.vols {
		v.gate.Suspend(suspend)
	}
}

// cutOne cuts a victim off and has that recorded.
func (w *worker) cutOne(ctx context.Context, r *members.Record, c *cutOf, volumes []string) error {
	w.mu.Lock()
	drained := c.drained
	w.mu.Unlock()
	if !drained {
		drain := func() error {
			if r.InitiatorName == "" || fault.Off(fault.TargetsCut) {
				return nil // it never had one: nothing of it can be here
			}
			dctx, cancel := context.WithTimeout(ctx, cutRetry)
			defer cancel()
			return w.srv.CutInitiator(dctx, []string{r.InitiatorName}, c.epoch)
		}
		if fault.Off(fault.CutDrainsFirst) {
			w.wg.Go(func() { _ = drain() })
		} else if err := drain(); err != nil {
			return err
		}
		if err := w.promise(r.Name, c.epoch); err != nil {
			return err
		}
		w.mu.Lock()
		c.drained = true
		w.mu.Unlock()
		w.poke()
	}
	if len(volumes) == 0 {
		return nil
	}
	if _, err := w.link.Request(ctx, "cut.ack", map[string]any{"victim": r.Name, "epoch": c.epoch, "volumes": volumes}); err != nil {
		return fmt.Errorf("tell control of the cut of %s: %w", r.Name, err)
	}
	w.mu.Lock()
	c.acked = volumes
	w.mu.Unlock()
	w.log.Info("an evicted node is cut off", zap.String("victim", r.Name), zap.Uint64("epoch", c.epoch), zap.Strings("volumes", volumes))
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

// promisedTo is the epoch up to which a victim's cut is on disk.
func (w *worker) promisedTo(victim string) uint64 {
	w.promiseMu.Lock()
	defer w.promiseMu.Unlock()
	return w.promised[victim]
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
