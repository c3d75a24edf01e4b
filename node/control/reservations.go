package control

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/fault"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	fsmpr "github.com/blockhouse-san/blockhouse/membership/fsm/pr"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// reserveBody is the body of a storage worker's requests pr.change and pr.barrier.
type reserveBody struct {
	Volume    string      `json:"volume"`
	Epoch     uint64      `json:"epoch"`
	Request   *pr.Request `json:"request,omitempty"`
	LegacySeq uint64      `json:"legacy_seq,omitempty"`
}

// applyReserve replicates a worker's request on the reservations of a volume. The
// machine says whether it counts; the worker reads the outcome from its copy.
func (m *member) applyReserve(ctx context.Context, from string, q link.Request) (uint64, error) {
	var b reserveBody
	if err := json.Unmarshal(q.Body, &b); err != nil {
		return 0, api.Errorf(api.CodeUsage, "", "read %s: %v", q.Kind, err)
	}
	var cmd fsm.Command = fsmpr.Barrier{Node: from, Worker: q.Worker, Seq: q.Seq, Volume: b.Volume, Epoch: b.Epoch}
	if q.Kind == "pr.change" {
		if b.Request == nil {
			return 0, api.Errorf(api.CodeUsage, "", "read %s: no request", q.Kind)
		}
		cmd = fsmpr.Change{Node: from, Worker: q.Worker, Seq: q.Seq, Volume: b.Volume, Epoch: b.Epoch, Request: *b.Request, LegacySeq: b.LegacySeq}
	}
	res, err := m.apply(ctx, cmd)
	d, err := fsmValue[fsmpr.Done](res, err)
	if err != nil {
		return 0, err
	}
	fault.Crash(fault.ReserveDecided)
	if d.Changed && d.Index == res.Index { // not the repeat of one that was decided
		m.reservationEvent(b, d)
	}
	return res.Index, nil
}

var reserveActions = map[int]string{
	scsi.SARegister: "register", scsi.SARegisterAndIgnoreKey: "register", scsi.SAReserve: "reserve", scsi.SARelease: "release", scsi.SAClear: "clear",
	scsi.SAPreempt: "preempt", scsi.SAPreemptAndAbort: "preempt-and-abort", scsi.SARegisterAndMove: "register-and-move",
}

func reserveAction(q *pr.Request) string {
	switch q.Kind {
	case pr.KindOut:
		if p := q.Param; reserveActions[q.SA] == "register" && p != nil && p.NewKey == 0 {
			return "unregister"
		}
		return reserveActions[q.SA]
	case pr.KindReserve:
		return "reserve-6"
	case pr.KindRelease:
		return "release-6"
	case pr.KindNexusLoss:
		return "nexus-loss"
	case pr.KindReset:
		return "reset"
	case pr.KindPurge:
		return "purge"
	}
	return fmt.Sprintf("kind %d", q.Kind)
}

func (m *member) reservationEvent(b reserveBody, d fsmpr.Done) {
	var v storage.Volume
	var r fsmpr.Volume
	m.cluster.Read(func(w machines.View) {
		v, _ = w.Storage.Volume(b.Volume)
		r, _ = w.PR.Volume(b.Volume)
	})
	who := b.Request.Nexus.ID.String()
	if b.Request.Kind == pr.KindPurge {
		who = strings.Join(b.Request.Names, ", ")
	}
	action := reserveAction(b.Request)
	m.d.event("reservation.changed", fmt.Sprintf("volume %s: %s by %s", v.Name, action, who), map[string]any{
		"volume": v.Name, "uuid": b.Volume, "action": action, "initiator": who, "generation": r.Generation, "registrations": len(r.Registrations), "index": d.Index})
	m.log.Info("reservation changed", zap.String("volume", v.Name), zap.String("action", action), zap.String("initiator", who), zap.Uint64("index", d.Index))
}

// reservationsOf are the reservations of the volumes that have any, by name. Pure.
func reservationsOf(p picture) []api.Reservation {
	out := []api.Reservation{}
	for id, r := range p.Reserved.Volumes {
		v := p.Storage.Volumes[id]
		if v == nil || r.Empty() {
			continue
		}
		x := api.Reservation{Volume: v.Name, UUID: id, Generation: r.Generation, APTPL: r.APTPL, Registrations: []api.Registration{}}
		if r.Type != 0 {
			x.Type = r.Type.String()
		}
		if r.Legacy != nil {
			x.ReservedBy = r.Legacy.ID.String()
		}
		for _, g := range r.Registrations {
			x.Registrations = append(x.Registrations, api.Registration{Initiator: g.ID.Name, Port: g.ID.String(), TargetPort: int(g.Port), AllPorts: g.AllPorts,
				Key: fmt.Sprintf("0x%016x", g.Key), Holder: r.Holds(g.Nexus)})
			if r.Holder != nil && r.Holds(g.Nexus) {
				x.Holder = g.ID.String()
			}
		}
		if r.Type.AllRegistrants() {
			x.Holder = "all registrants"
		}
		out = append(out, x)
	}
	slices.SortFunc(out, func(a, b api.Reservation) int { return strings.Compare(a.Volume, b.Volume) })
	return out
}
