package storage

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
)

func (w *worker) close(v *volume) {
	if v.dev == nil {
		return
	}
	if err := v.dev.Close(); err != nil {
		w.log.Error("close store", zap.String("volume", v.uuid), zap.Error(err))
	}
	v.dev = nil
}

// syncVolumes brings the local copies to what want says and sets their roles.
// Sessions to reset are named by volume.
func (w *worker) syncVolumes(ctx context.Context, want *desired) (reset []string) {
	for id, rec := range want.storage.Volumes {
		if !slices.Contains(rec.Config.Members(), want.node) {
			continue
		}
		v := w.vols[id]
		if v == nil {
			v = &volume{uuid: id, gate: NewVolumeGate(w.gate)}
			w.vols[id] = v
		}
		if v.dev == nil && rec.State != fsmstorage.Removing {
			w.openVolume(ctx, v, rec)
		}
		w.act(ctx, want, v, rec)
		v.serving = v.dev != nil && rec.State == fsmstorage.Ready && rec.Config.Primary == want.node && v.acted == rec.Config.Epoch
		if v.gate.SetRole(v.serving, len(rec.Config.ISR) == 1, rec.Config.Epoch, v.err) {
			reset = append(reset, id)
		}
	}
	for id, v := range w.vols {
		if rec := want.storage.Volumes[id]; rec == nil || !slices.Contains(rec.Config.Members(), want.node) {
			v.serving = false
			if v.gate.SetRole(false, false, ^uint64(0), nil) {
				reset = append(reset, id)
			}
		}
	}
	return reset
}

// act asks for the changes of the FSM that this copy needs.
func (w *worker) act(ctx context.Context, want *desired, v *volume, rec *fsmstorage.Volume) {
	if rec.Config.Primary != want.node {
		return
	}
	switch rec.State {
	case fsmstorage.Creating:
		if v.dev != nil {
			v.acted = rec.Config.Epoch // nobody served it before it was ready
			w.ask(ctx, v, "volume.ready", rec.Config.Epoch, map[string]any{"uuid": v.uuid, "epoch": rec.Config.Epoch})
		}
	case fsmstorage.Ready:
		if v.dev == nil || v.acted == rec.Config.Epoch {
			return
		}
		if v.cas != "" && rec.LastCAS == v.cas {
			v.acted = rec.Config.Epoch
			return
		}
		if v.cas == "" {
			v.cas = uuid.NewString()
		}
		w.ask(ctx, v, "volume.raise", rec.Config.Epoch, map[string]any{"uuid": v.uuid, "epoch": rec.Config.Epoch, "request": v.cas})
	case fsmstorage.Removing:
		// No LUN points to it any more (the FSM saw to that); once no command is
		// inside, nothing of it is in flight.
		if v.gate.in.Load() == 0 {
			w.close(v)
			w.ask(ctx, v, "volume.removed", rec.Config.Epoch, map[string]any{"uuid": v.uuid, "epoch": rec.Config.Epoch})
		}
	}
}

// ask sends one request for a volume at a time; the state that follows from it
// comes back as a state.
func (w *worker) ask(ctx context.Context, v *volume, kind string, epoch uint64, body any) {
	key := fmt.Sprintf("%s@%d", kind, epoch)
	if v.asking == key {
		return
	}
	v.asking = key
	w.wg.Go(func() {
		if _, err := w.link.Request(ctx, kind, body); err != nil && ctx.Err() == nil {
			w.log.Warn("control refused", zap.String("request", kind), zap.String("volume", v.uuid), zap.Error(err))
			w.mu.Lock()
			w.mu.again = append(w.mu.again, v.uuid)
			w.mu.Unlock()
		}
	})
}

// forgetAsked lets refused requests be asked again, against the state of now.
func (w *worker) forgetAsked() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range w.mu.again {
		if v := w.vols[id]; v != nil {
			v.asking = ""
		}
	}
	w.mu.again = nil
}

// dropVolumes closes copies that are none any more, after the server has let go
// of them, and erases what the FSM says was removed, by uuid; a file that the
// FSM does not know is left alone, since an old FSM knows little.
func (w *worker) dropVolumes(want *desired) {
	for id, v := range w.vols {
		if rec := want.storage.Volumes[id]; rec != nil && slices.Contains(rec.Config.Members(), want.node) {
			continue
		}
		if v.opening != nil {
			select {
			case o := <-v.opening:
				v.dev, v.opening = o.dev, nil
			default:
				continue // it comes to its end, and then this does
			}
		}
		w.close(v)
		delete(w.vols, id)
		w.forgetReservations(id)
	}
	for id, g := range want.storage.Gone {
		if !slices.Contains(g.Members, want.node) || w.erased[id] {
			continue
		}
		if err := w.eraseStore(id); err != nil {
			w.log.Error("cannot erase the store of a removed volume", zap.String("volume", g.Name), zap.Error(err))
			continue
		}
		w.erased[id] = true
	}
}

// reports describes the copies for control.
func (w *worker) reports(want *desired) []volumeReport {
	out := []volumeReport{}
	for id, v := range w.vols {
		rec := want.storage.Volumes[id]
		if rec == nil {
			continue
		}
		r := volumeReport{UUID: id, State: "standby"}
		switch {
		case v.err != nil:
			r.State, r.Error = "error", v.err.Error()
		case v.serving:
			r.State = "serving"
		case rec.Config.Primary == want.node:
			r.State = "opening"
		}
		if v.dev != nil {
			if err := block.Failed(v.dev); err != nil {
				r.State, r.Error = "failed", err.Error()
			}
			r.Checks = checksOf(v.dev)
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b volumeReport) int { return strings.Compare(a.UUID, b.UUID) })
	return out
}
