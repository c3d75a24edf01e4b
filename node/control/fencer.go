package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/fence/drive"
	"github.com/blockhouse-san/blockhouse/fence/plan"
	"github.com/blockhouse-san/blockhouse/membership/detect"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
)

// Paths between nodes; not for users.
const pathFenceEnd = "/v1/cluster/fence-end"

// silenceMargin is added to T_orphan: the clocks of two machines may run at rates
// that differ by a little, and a worker looks at its own every few milliseconds.
const silenceMargin = time.Second

// pursue takes the open fences one step further. Only a leader calls it, and what
// it decides counts when it is committed.
func (m *member) pursue(ctx context.Context, l *drive.Leader) {
	t := m.d.cfg.Times()
	seen := drive.Seen{Leader: m.identity().Node, NoPause: m.d.cfg.Fence.AssumeNoPause, Silence: t.TTL + t.TOrphan + silenceMargin,
		Alive: func(node string, inc uint64, boot string) bool {
			left, renewed := m.table.left(detect.Member{Node: node, Incarnation: inc, BootID: boot})
			return renewed && left > 0
		},
		Now: m.d.clock.Now(), Wall: m.d.clock.Wall()}
	var todo []drive.Decision
	m.cluster.Read(func(v machines.View) { todo = l.Step(v, seen) })
	why := map[string]string{}
	for _, d := range todo {
		why[d.Open.Node] = d.Act.Why
		if d.New {
			m.log.Info("fence", zap.String("victim", d.Open.Node), zap.Uint64("epoch", d.Open.Epoch), zap.String("waits_for", d.Act.Why))
			if d.Err != nil {
				m.log.Error("the fence methods of a node cannot be used", zap.String("victim", d.Open.Node), zap.Error(d.Err))
			}
		}
		if err := m.carryOut(ctx, d.Open, d.Act); err != nil && ctx.Err() == nil {
			m.log.Warn("cannot take the fence further", zap.String("victim", d.Open.Node), zap.Error(err))
		}
	}
	m.mu.Lock()
	m.mu.fenceWhy = why
	m.mu.Unlock()
}

func (m *member) carryOut(ctx context.Context, o fencing.Open, act drive.Act) error {
	ctx, cancel := context.WithTimeout(ctx, m.d.cfg.Times().TTL)
	defer cancel()
	switch {
	case act.Start != nil:
		_, err := m.apply(ctx, *act.Start)
		if err == nil {
			m.d.event("fence.start", fmt.Sprintf("fence of %s: %s on %s", o.Node, act.Start.Device, act.Start.Executor),
				map[string]any{"node": o.Node, "epoch": o.Epoch, "executor": act.Start.Executor})
		}
		return err
	case act.End != nil:
		_, err := m.apply(ctx, *act.End)
		return err
	case act.Close != nil:
		_, err := m.apply(ctx, *act.Close)
		if errors.Is(err, fsm.ErrNoOpenFence) {
			return nil // an operator was quicker
		}
		if err == nil {
			ev := act.Close.Evidence
			m.log.Warn("fenced", zap.String("victim", o.Node), zap.Uint64("epoch", o.Epoch), zap.String("method", string(ev.Method)),
				zap.Strings("acks", ev.Acks), zap.Strings("pending", ev.Pending), zap.Duration("after", act.Close.Now.Sub(o.Since)))
			m.d.event("node.fenced", "node "+o.Node+" is fenced: "+evidenceText(ev), map[string]any{"node": o.Node, "epoch": o.Epoch})
		}
		return err
	}
	return nil
}

// cutAck is a target's word, checked and committed.
type cutAck struct {
	Victim  string   `json:"victim"`
	Epoch   uint64   `json:"epoch"`
	Volumes []string `json:"volumes"`
}

func (m *member) applyCutAck(ctx context.Context, from string, body json.RawMessage) (uint64, error) {
	var q cutAck
	if err := json.Unmarshal(body, &q); err != nil {
		return 0, api.Errorf(api.CodeUsage, "", "read cut.ack: %v", err)
	}
	var inc uint64
	wanted := false
	m.cluster.Read(func(v machines.View) {
		for _, o := range v.Fencing.OpenFences() {
			wanted = wanted || o.Node == q.Victim
		}
		for _, p := range v.Fencing.PendingCuts() {
			wanted = wanted || p.Node == q.Victim
		}
		if r, ok := v.Members.Get(from); ok {
			inc = r.Incarnation
		}
		// Only the primary speaks for a volume; who was primary a moment ago does not.
		q.Volumes = slices.DeleteFunc(q.Volumes, func(id string) bool {
			x, ok := v.Storage.Volume(id)
			return !ok || x.Config.Primary != from
		})
	})
	if len(q.Volumes) == 0 || !wanted {
		return m.cluster.Index(), nil
	}
	res, err := m.apply(ctx, fencing.CutAck{Victim: q.Victim, Epoch: q.Epoch, By: from, Incarnation: inc, Volumes: q.Volumes})
	return res.Index, err
}

// execute is every member's part in fencing: it runs the attempts that the log
// gives to this node. An attempt that was begun by an earlier process of this node
// is left to its deadline: what that process had started may still act.
func (m *member) execute(ctx context.Context) {
	began := map[uint64]bool{}
	first := true
	for {
		_, _, next := m.cluster.Changed()
		if m.isCaughtUp() {
			me := m.identity().Node
			for _, a := range m.attempts() {
				if a.Executor != me || began[a.ID] {
					continue
				}
				began[a.ID] = true
				if first {
					m.log.Warn("a fence attempt was begun before this process: it is left to its deadline", zap.Uint64("attempt", a.ID), zap.String("victim", a.Node))
					continue
				}
				m.wg.Go(func() { m.attempt(ctx, a) })
			}
			first = false
			select {
			case <-next:
				continue
			case <-ctx.Done():
				return
			}
		}
		if m.d.clock.Sleep(ctx, 50*time.Millisecond) != nil {
			return
		}
	}
}

func (m *member) attempts() (out []fencing.Attempt) {
	m.cluster.Read(func(v machines.View) { out = v.Fencing.Running() })
	return out
}

// attempt runs the steps of one attempt and has its end recorded. It ends with
// this node's lease: an executor that is no member any more may not power-cycle
// anybody (SAFETY §3).
func (m *member) attempt(ctx context.Context, a fencing.Attempt) {
	log := m.log.With(zap.Uint64("attempt", a.ID), zap.String("victim", a.Node), zap.String("method", a.Device))
	rctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	m.wg.Go(func() {
		for rctx.Err() == nil {
			left := m.leaseLeft()
			if left <= 0 {
				cancel(errors.New("the node lease of the executor has ended"))
				return
			}
			_ = m.d.clock.Sleep(rctx, min(left, 50*time.Millisecond))
		}
	})
	end := fencing.FenceEnd{Attempt: a.ID, Outcome: fencing.Failed, ExitCode: -1}
	steps, err := m.steps(rctx, a)
	if err != nil {
		end.Output = err.Error()
	} else {
		end = m.runSteps(rctx, log, a, steps)
	}
	end.Now = m.d.clock.Wall()
	if len(end.Output) > fencing.MaxOutput {
		end.Output = strings.ToValidUTF8(end.Output[len(end.Output)-fencing.MaxOutput:], "?")
	}
	log.Info("fence attempt ended", zap.String("outcome", string(end.Outcome)), zap.String("output", end.Output))
	// The end is worth repeating for as long as anybody waits for it.
	for m.d.clock.Wall().Before(a.Deadline) && ctx.Err() == nil {
		if err = m.toLeader(ctx, pathFenceEnd, end, func() error { _, err := m.apply(ctx, end); return err }); err == nil {
			return
		}
		log.Debug("cannot record the end of a fence attempt yet", zap.Error(err))
		_ = m.d.clock.Sleep(ctx, 100*time.Millisecond)
	}
	log.Warn("the end of a fence attempt could not be recorded before its deadline", zap.Error(err))
}

// toLeader posts to the leader, or does it here if that is us.
func (m *member) toLeader(ctx context.Context, path string, body any, here func() error) error {
	p, us := m.leaderPeer()
	if us {
		return here()
	}
	if p.API == "" {
		return api.Errorf(api.CodeNoQuorum, "", "no leader is known")
	}
	ctx, cancel := context.WithTimeout(ctx, m.d.cfg.Times().TTL)
	defer cancel()
	_, err := api.Post[api.Done](ctx, m.client(p), path, body)
	return err
}

// fenceEnd takes an executor's word for the attempt that it was given.
func (m *member) fenceEnd(r *http.Request) (any, error) {
	q, err := decode[fencing.FenceEnd](r)
	if err != nil {
		return nil, err
	}
	c := callerOf(r)
	for _, a := range m.attempts() {
		if a.ID == q.Attempt && (c.local || a.Executor != c.id.Name) {
			return nil, api.Errorf(api.CodeDenied, "", "attempt %d is %s's, not %v's", a.ID, a.Executor, c)
		}
	}
	if q.Outcome == fencing.Abandoned {
		return nil, api.Errorf(api.CodeDenied, "", "only the leader gives an attempt up")
	}
	res, err := m.apply(r.Context(), q)
	if err != nil {
		return nil, err
	}
	return api.Done{APIVersion: api.Version, Index: res.Index}, nil
}

// steps are those of the attempt's method, with the devices' secrets in.
func (m *member) steps(ctx context.Context, a fencing.Attempt) ([]plan.Step, error) {
	var ways fencing.Ways
	var devices []fencing.Device
	m.cluster.Read(func(v machines.View) { ways, devices = v.Fencing.Ways(a.Node), v.Fencing.Devices() })
	for i := range devices {
		d := &devices[i]
		if len(d.Sealed) == 0 {
			continue
		}
		key, err := m.sealingKey(ctx, d.Key)
		if err != nil {
			return nil, err
		}
		secrets, err := openSecrets(key, d)
		if err != nil {
			return nil, err
		}
		if d.Params == nil {
			d.Params = map[string]string{}
		}
		maps.Copy(d.Params, secrets)
	}
	p, err := drive.PlanOf(ways, devices)
	if err != nil {
		return nil, err
	}
	for _, pm := range p.Methods {
		if pm.Name == a.Device {
			return pm.Steps, nil
		}
	}
	return nil, fmt.Errorf("node %s has no fence method %s any more", a.Node, a.Device)
}

// runSteps runs the steps in order until the method has failed or all are done.
func (m *member) runSteps(ctx context.Context, log *zap.Logger, a fencing.Attempt, steps []plan.Step) fencing.FenceEnd {
	end := fencing.FenceEnd{Attempt: a.ID, Outcome: fencing.Failed, ExitCode: -1}
	method := plan.Planned{Name: a.Device, Kind: fencing.Agent, Steps: steps}
	var ok []bool
	var said []string
	for _, s := range steps {
		log.Info("fence step", zap.String("step", s.String()), zap.String("agent", s.Agent))
		res, err := m.agents.Run(ctx, s.Request(a.Node))
		line := s.String() + ": "
		if err != nil {
			line += err.Error()
		} else {
			line += string(res.Outcome)
			if res.Why != "" {
				line += ": " + res.Why
			}
			if res.Output != "" {
				line += "\n" + res.Output
			}
			end.ExitCode = res.ExitCode
		}
		said = append(said, line)
		ok = append(ok, err == nil && res.OK())
		if done, good := method.Outcome(ok); done && !good {
			if err == nil && res.Outcome == fencing.TimedOut {
				end.Outcome = fencing.TimedOut
			}
			break
		}
	}
	if _, good := method.Outcome(ok); good && method.Fenced(ok) {
		end.Outcome = fencing.OK
	}
	end.Output = strings.Join(said, "\n")
	return end
}

// leaseLeft is how long this node's lease still holds.
func (m *member) leaseLeft() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.lease.Sub(m.d.clock.Now())
}
