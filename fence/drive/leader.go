package drive

import (
	"slices"
	"time"

	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/fence/plan"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
)

// Seen is what a leader knows beside the log.
type Seen struct {
	Leader string
	// Alive tells whether a member in an incarnation holds a lease of this leader.
	Alive func(node string, incarnation uint64, bootID string) bool
	// Silence is how long after the end of its node lease a target can still serve.
	Silence time.Duration
	// NoPause tells that no machine can stop without noticing.
	NoPause bool
	Now     env.Boot
	Wall    time.Time
}

// Decision is the next act for one open fence.
type Decision struct {
	Open fencing.Open
	Act  Act
	Err  error // the configured methods cannot be used
	New  bool  // Act.Why is not what it was
}

// Leader drives all open fences. It holds nothing that another leader could not
// find out; the zero value is a new leader.
type Leader struct {
	drivers map[uint64]*Driver  // by epoch of the eviction
	silent  map[string]env.Boot // nodes without a lease, since when this leader sees that
	said    map[uint64]string
}

// Step decides for every open fence. It is called inside machines.Cluster.Read and
// keeps nothing of v.
func (l *Leader) Step(v machines.View, s Seen) []Decision {
	if l.drivers == nil {
		*l = Leader{drivers: map[uint64]*Driver{}, silent: map[string]env.Boot{}, said: map[uint64]string{}}
	}
	opens := v.Fencing.OpenFences()
	if len(opens) == 0 {
		clear(l.drivers)
		clear(l.silent)
		clear(l.said)
		return nil
	}
	var members []plan.Candidate
	alive := map[string]bool{}
	for _, r := range v.Members.State().List() {
		if r.Active() && (r.Name == s.Leader || s.Alive(r.Name, r.Incarnation, r.BootID)) {
			alive[r.Name] = true
			members = append(members, plan.Candidate{Node: r.Name, Leader: r.Name == s.Leader})
			delete(l.silent, r.Name)
		} else if _, ok := l.silent[r.Name]; !ok {
			l.silent[r.Name] = s.Now
		}
	}
	volumes := l.volumes(v.Storage.State(), alive, s)
	running := v.Fencing.Running()
	history, _ := v.Fencing.History(0, 0)
	devices := v.Fencing.Devices()
	out := make([]Decision, 0, len(opens))
	for _, o := range opens {
		in := Input{Open: o, Members: members, Volumes: volumes, Silence: s.Silence, Wall: s.Wall, Now: s.Now}
		for _, a := range running {
			if a.Node == o.Node {
				in.Running = append(in.Running, a)
			}
		}
		for _, h := range history {
			if h.Node == o.Node && h.Epoch == o.Epoch {
				in.History = append(in.History, h)
			}
		}
		d := Decision{Open: o}
		in.Plan, d.Err = PlanOf(v.Fencing.Ways(o.Node), devices)
		if l.drivers[o.Epoch] == nil {
			l.drivers[o.Epoch] = &Driver{}
		}
		d.Act = l.drivers[o.Epoch].Next(&in)
		d.New = d.Act.Why != l.said[o.Epoch]
		l.said[o.Epoch] = d.Act.Why
		out = append(out, d)
	}
	for e := range l.drivers {
		if !slices.ContainsFunc(opens, func(o fencing.Open) bool { return o.Epoch == e }) {
			delete(l.drivers, e)
			delete(l.said, e)
		}
	}
	return out
}

// volumes are those that an initiator can have reached.
func (l *Leader) volumes(st *storage.State, alive map[string]bool, s Seen) (out []Volume) {
	for _, v := range st.ListVolumes() {
		if !reachable(st, &v) {
			continue
		}
		x := Volume{UUID: v.Config.UUID, Name: v.Name, Primary: v.Config.Primary}
		if !alive[x.Primary] {
			x.Silent, x.Since, x.Pauses = true, l.silent[x.Primary], !s.NoPause
		}
		out = append(out, x)
	}
	return out
}

// Pending are the volumes on which an evicted node may still have something in
// flight: those that it can have reached and whose target has not acked its cut.
// Evidence of any kind names them (SAFETY §3): power that is off, or a node that is
// back, says nothing about what lies in a target.
func Pending(v machines.View, node string) (out []string) {
	var cuts map[string]string
	for _, o := range v.Fencing.OpenFences() {
		if o.Node == node {
			cuts = o.Cuts
		}
	}
	st := v.Storage.State()
	for _, x := range st.ListVolumes() {
		if _, acked := cuts[x.Config.UUID]; !acked && reachable(st, &x) {
			out = append(out, x.Config.UUID)
		}
	}
	return out
}

// reachable tells whether an initiator can have something in flight on a volume.
func reachable(st *storage.State, v *storage.Volume) bool {
	// Without a LUN none has pointed to it yet, or its sessions were drained when the
	// last one went.
	return v.State != storage.Creating && len(st.LUNsOf(v.Config.UUID)) > 0
}

// PlanOf expands the configured methods of a node. Secrets are not needed for it:
// the executor opens them.
func PlanOf(w fencing.Ways, devices []fencing.Device) (plan.Plan, error) {
	var ds []plan.Device
	for _, d := range devices {
		pd := plan.Device{Name: d.Name, Agent: d.Agent, Params: d.Params, Executors: d.Executors, Timeout: d.Timeout}
		for _, a := range d.Actions {
			pd.Actions = append(pd.Actions, agent.Action(a))
		}
		ds = append(ds, pd)
	}
	var ms []plan.Method
	for _, x := range w.Ways {
		pm := plan.Method{Name: x.Name, Kind: fencing.Agent}
		for _, u := range x.Uses {
			pm.Uses = append(pm.Uses, plan.Use{Device: u.Device, Plug: u.Plug, Params: u.Params, Action: agent.Action(u.Action), Delay: u.Delay})
		}
		ms = append(ms, pm)
	}
	want := plan.Reboot
	if w.Off {
		want = plan.Off
	}
	p, err := plan.New(w.Node, ms, ds, want)
	if err != nil {
		return plan.Plan{Victim: w.Node}, err
	}
	return p, nil
}
