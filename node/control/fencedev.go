package control

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/fence/drive"
	"github.com/blockhouse-san/blockhouse/fence/plan"
	"github.com/blockhouse-san/blockhouse/internal/seal"
	"github.com/blockhouse-san/blockhouse/membership/detect"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
)

// fenceRoutes are the handlers of fence devices, methods and deliberate fences.
func (m *member) fenceRoutes(mux *http.ServeMux) {
	for pattern, h := range map[string]handler{"GET " + api.PathFenceDevices: m.getFenceDevices, "GET " + api.PathFenceMethods: m.getFenceMethods} {
		mux.Handle(pattern, m.onLeader(true, h))
	}
	for pattern, h := range map[string]handler{
		"POST " + api.PathFenceDevices:               m.fenceDeviceSet,
		"DELETE " + api.PathFenceDevices + "/{name}": m.fenceDeviceDelete,
		"POST " + api.PathFenceMethods:               m.fenceMethodsSet,
		"POST " + api.PathFenceRun:                   m.fenceRun,
		"POST " + api.PathFenceTest:                  m.fenceTest,
		"POST " + pathFenceEnd:                       m.fenceEnd,
	} {
		mux.Handle(pattern, m.onLeader(false, h))
	}
}

// wantedKey is the id of the sealing key that records are sealed with, empty as
// long as nothing is sealed.
func wantedKey(v machines.View) string {
	if k := v.Storage.State().SealingKey(); k != "" {
		return k
	}
	for _, d := range v.Fencing.Devices() {
		if d.Key != "" {
			return d.Key
		}
	}
	return ""
}

func (m *member) clusterKey(ctx context.Context) (seal.Key, error) {
	var want string
	m.cluster.Read(func(v machines.View) { want = wantedKey(v) })
	return m.sealingKey(ctx, want)
}

// openSecrets gives the secret options of a device.
func openSecrets(key seal.Key, d *fencing.Device) (map[string]string, error) {
	b, err := key.Open(fencing.SealOwner(d.Name), d.Sealed)
	if err != nil {
		return nil, fmt.Errorf("open the secrets of fence device %s: %w", d.Name, err)
	}
	var out map[string]string
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("read the secrets of fence device %s: %w", d.Name, err)
	}
	return out, nil
}

// fenceDeviceOf shows a device; its secrets are shown by name only.
func fenceDeviceOf(d fencing.Device) api.FenceDevice {
	x := api.FenceDevice{APIVersion: api.Version, Name: d.Name, Agent: d.Agent, Params: map[string]string{}, Actions: d.Actions,
		Executors: d.Executors, TimeoutNS: d.Timeout, HasSecrets: len(d.Sealed) > 0, Version: d.Changed}
	maps.Copy(x.Params, d.Params)
	return x
}

func (m *member) getFenceDevices(r *http.Request) (any, error) {
	p := m.picture(r.Context())
	out := []api.FenceDevice{}
	m.cluster.Read(func(v machines.View) {
		for _, d := range v.Fencing.Devices() {
			out = append(out, fenceDeviceOf(d))
		}
	})
	return api.List[api.FenceDevice]{APIVersion: api.Version, Kind: "FenceDeviceList", Stale: p.Stale, Index: p.Index, Items: out}, nil
}

func (m *member) fenceDevice(name string) (d fencing.Device, ok bool) {
	m.cluster.Read(func(v machines.View) {
		for _, x := range v.Fencing.Devices() {
			if x.Name == name {
				d, ok = x, true
			}
		}
	})
	return d, ok
}

// fenceDeviceSet takes a device. The agent must be installed on this node, because
// what it can do is asked of it and not of the administrator.
func (m *member) fenceDeviceSet(r *http.Request) (any, error) {
	q, err := decode[api.FenceDeviceSet](r)
	if err != nil {
		return nil, err
	}
	old, exists := m.fenceDevice(q.Name)
	if exists && !q.Replace {
		return nil, api.Errorf(api.CodeExists, "clusteradm fence device list", "fence device %s exists; --replace changes it", q.Name)
	}
	md, err := m.agents.Metadata(r.Context(), q.Agent)
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "install it on "+m.identity().Node+", which leads, and on every node that is to run it",
			"fence device %s: what %s can do is not known: %v", q.Name, q.Agent, err)
	}
	params, _, err := md.Resolve(q.Params)
	if err != nil {
		return nil, api.Errorf(api.CodeUsage, "", "fence device %s: %v", q.Name, err)
	}
	for k := range params {
		if !md.Knows(k) {
			return nil, api.Errorf(api.CodeUsage, q.Agent+" -o metadata", "fence device %s: %s has no option %s", q.Name, q.Agent, k)
		}
	}
	if miss := slices.DeleteFunc(md.Missing(params), func(s string) bool { return s == "plug" || s == "port" || s == "nodename" }); len(miss) > 0 {
		return nil, api.Errorf(api.CodeUsage, "", "fence device %s: %s needs %v", q.Name, q.Agent, miss)
	}
	d := fencing.Device{Name: q.Name, Agent: q.Agent, Params: map[string]string{}, Executors: q.Executors, Timeout: q.TimeoutNS}
	secret := map[string]string{}
	for k, v := range params {
		if agent.Secret(k) {
			secret[k] = v
		} else {
			d.Params[k] = v
		}
	}
	for _, a := range md.Actions {
		if !slices.Contains(d.Actions, string(a.Name)) {
			d.Actions = append(d.Actions, string(a.Name))
		}
	}
	if len(secret) > 0 {
		key, err := m.clusterKey(r.Context())
		if err != nil {
			return nil, err
		}
		b, err := json.Marshal(secret)
		if err != nil {
			return nil, err
		}
		if d.Sealed, err = key.Seal(fencing.SealOwner(d.Name), b, rand.Reader); err != nil {
			return nil, err
		}
		d.Key = key.ID()
	}
	res, err := m.apply(r.Context(), fencing.DeviceSet{Device: d, Version: old.Changed})
	nd, err := fsmValue[fencing.Device](res, err)
	if err != nil {
		return nil, err
	}
	return fenceDeviceOf(nd), nil
}

func (m *member) fenceDeviceDelete(r *http.Request) (any, error) {
	name := r.PathValue("name")
	res, err := m.apply(r.Context(), fencing.DeviceDelete{Name: name})
	return done(res, err, "fence device "+name+" is deleted")
}

func fenceMethodsOf(w fencing.Ways) api.FenceMethods {
	out := api.FenceMethods{APIVersion: api.Version, Node: w.Node, Off: w.Off, Version: w.Changed, Methods: []api.FenceMethod{}}
	for _, x := range w.Ways {
		y := api.FenceMethod{Name: x.Name}
		for _, u := range x.Uses {
			y.Uses = append(y.Uses, api.FenceUse{Device: u.Device, Plug: u.Plug, Params: u.Params, Action: u.Action, DelayNS: u.Delay})
		}
		out.Methods = append(out.Methods, y)
	}
	return out
}

func (m *member) getFenceMethods(r *http.Request) (any, error) {
	p := m.picture(r.Context())
	out := []api.FenceMethods{}
	m.cluster.Read(func(v machines.View) {
		for _, n := range v.Members.State().List() {
			out = append(out, fenceMethodsOf(v.Fencing.Ways(n.Name)))
		}
	})
	return api.List[api.FenceMethods]{APIVersion: api.Version, Kind: "FenceMethodsList", Stale: p.Stale, Index: p.Index, Items: out}, nil
}

// fenceMethodsSet takes the methods of a node, after they were expanded once: one
// that cannot fence is refused today and not found out in the night.
func (m *member) fenceMethodsSet(r *http.Request) (any, error) {
	q, err := decode[api.FenceMethods](r)
	if err != nil {
		return nil, err
	}
	if _, _, known := m.record(q.Node); !known {
		return nil, api.Errorf(api.CodeNotFound, "clusteradm node list", "no node is called %s", q.Node)
	}
	w := fencing.Ways{Node: q.Node, Off: q.Off}
	for _, x := range q.Methods {
		y := fencing.Way{Name: x.Name}
		for _, u := range x.Uses {
			for k := range u.Params {
				if agent.Secret(k) {
					return nil, api.Errorf(api.CodeUsage, "clusteradm fence device add", "fence method %s of %s: %s is a secret and belongs to the device, where it is sealed", x.Name, q.Node, k)
				}
			}
			y.Uses = append(y.Uses, fencing.Use{Device: u.Device, Plug: u.Plug, Params: u.Params, Action: u.Action, Delay: u.DelayNS})
		}
		w.Ways = append(w.Ways, y)
	}
	var have fencing.Ways
	var devices []fencing.Device
	m.cluster.Read(func(v machines.View) { have, devices = v.Fencing.Ways(q.Node), v.Fencing.Devices() })
	if _, err := drive.PlanOf(w, devices); err != nil {
		return nil, api.Errorf(api.CodeUsage, "clusteradm fence device list", "%v", err)
	}
	res, err := m.apply(r.Context(), fencing.WaysSet{Ways: w, Version: have.Changed})
	nw, err := fsmValue[fencing.Ways](res, err)
	if err != nil {
		return nil, err
	}
	return fenceMethodsOf(nw), nil
}

// fenceRun evicts a live node on an operator's word; the fence then runs as for a
// dead one.
func (m *member) fenceRun(r *http.Request) (any, error) {
	q, err := decode[api.FenceRun](r)
	if err != nil {
		return nil, err
	}
	if q.Confirm != q.Node || q.Node == "" {
		return nil, api.Errorf(api.CodeRefused, "clusteradm fence run "+q.Node+" --confirm "+q.Node,
			"fencing %s ends what runs on it: the node's name must be repeated", q.Node)
	}
	rec, _, known := m.record(q.Node)
	switch {
	case !known:
		return nil, api.Errorf(api.CodeNotFound, "clusteradm node list", "no node is called %s", q.Node)
	case !rec.Active():
		return nil, api.Errorf(api.CodeConflict, "clusteradm fence list", "%s is %s already", q.Node, rec.Status)
	case q.Node == m.identity().Node:
		return nil, api.Errorf(api.CodeRefused, "clusteradm leave, on "+q.Node, "%s leads the cluster and does not fence itself", q.Node)
	}
	reason := "an operator wants it fenced"
	if q.Reason != "" {
		reason += ": " + q.Reason
	}
	res, err := m.evict(r.Context(), detect.Member{Node: rec.Name, Incarnation: rec.Incarnation, BootID: rec.BootID}, reason)
	return done(res, err, fmt.Sprintf("node %s (incarnation %d) is evicted and being fenced", rec.Name, rec.Incarnation))
}

// fenceTest asks every device of a node how it is, and changes nothing: status for
// power devices, monitor for what has no status. It runs on the leader.
func (m *member) fenceTest(r *http.Request) (any, error) {
	q, err := decode[api.FenceTest](r)
	if err != nil {
		return nil, err
	}
	if _, _, known := m.record(q.Node); !known {
		return nil, api.Errorf(api.CodeNotFound, "clusteradm node list", "no node is called %s", q.Node)
	}
	var ways fencing.Ways
	m.cluster.Read(func(v machines.View) { ways = v.Fencing.Ways(q.Node) })
	out := api.FenceTested{APIVersion: api.Version, Node: q.Node, OK: true, By: m.identity().Node, Results: []api.FenceTestResult{
		{Method: string(fencing.Target), OK: true, Text: m.targetTest(q.Node)}}}
	for _, w := range ways.Ways {
		steps, err := m.steps(r.Context(), fencing.Attempt{Node: q.Node, Device: w.Name})
		if err != nil {
			return nil, err
		}
		seen := map[string]bool{}
		for _, s := range steps {
			if id := s.Device + "\x00" + s.Plug; seen[id] {
				continue
			} else {
				seen[id] = true
			}
			res := m.testStep(r.Context(), q.Node, s)
			res.Method = w.Name
			out.OK = out.OK && res.OK
			out.Results = append(out.Results, res)
		}
	}
	return out, nil
}

func (m *member) testStep(ctx context.Context, node string, s plan.Step) api.FenceTestResult {
	out := api.FenceTestResult{Device: s.Device}
	d, _ := m.fenceDevice(s.Device)
	q := s.Request(node)
	q.Delay = 0
	q.Action = agent.Status
	if !slices.Contains(d.Actions, string(agent.Status)) {
		q.Action = agent.Monitor
	}
	if len(s.Executors) > 0 && !slices.Contains(s.Executors, m.identity().Node) {
		out.Text = "not asked: only " + fmt.Sprint(s.Executors) + " reach it, and " + m.identity().Node + " leads"
		return out
	}
	res, err := m.agents.Run(ctx, q)
	switch {
	case err != nil:
		out.Text = err.Error()
	case res.OK() || res.Power == agent.PowerOff:
		out.OK, out.Text = true, string(q.Action)+": "+string(res.Power)
	default:
		out.Text = string(q.Action) + ": " + string(res.Outcome) + ": " + res.Why
	}
	if err == nil && res.Took > 0 {
		out.TookNS = res.Took.Round(time.Millisecond)
	}
	return out
}

// targetTest says what the built-in method would do.
func (m *member) targetTest(node string) string {
	rec, _, _ := m.record(node)
	if rec.InitiatorName == "" {
		return "built in: the node has no initiator, so the targets have nothing to cut off"
	}
	return "built in: every target cuts " + rec.InitiatorName + " off"
}
