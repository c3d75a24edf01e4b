package fencing

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
)

// Device is a fence device as an administrator set it up.
type Device struct {
	Name   string            `json:"name"`
	Agent  string            `json:"agent"` // fence_ipmilan
	Params map[string]string `json:"params,omitempty"`
	// Sealed holds the secret options, a JSON object, sealed for SealOwner(Name)
	// with the cluster's key Key. Nobody sees them in a dump of the log.
	Sealed []byte `json:"sealed,omitempty"`
	Key    string `json:"key,omitempty"`
	// Actions are what the agent advertised when the device was set up.
	Actions   []string      `json:"actions"`
	Executors []string      `json:"executors,omitempty"` // the only nodes that reach it; none: all
	Timeout   time.Duration `json:"timeout_ns,omitempty"`
	Changed   uint64        `json:"changed"` // log index of the last change; the version for compare-and-set
}

// SealOwner is what the secrets of a device are sealed for.
func SealOwner(device string) string { return "fence-device/" + device }

func (d *Device) clone() Device {
	c := *d
	c.Params, c.Sealed = maps.Clone(d.Params), slices.Clone(d.Sealed)
	c.Actions, c.Executors = slices.Clone(d.Actions), slices.Clone(d.Executors)
	return c
}

// Use is a device in a method of a node.
type Use struct {
	Device string            `json:"device"`
	Plug   string            `json:"plug,omitempty"` // how the device calls the node; empty: by its name
	Params map[string]string `json:"params,omitempty"`
	Action string            `json:"action,omitempty"` // as it stands; empty: what the agent does best
	Delay  time.Duration     `json:"delay_ns,omitempty"`
}

// Way is a configured method of a node: all its uses must succeed.
type Way struct {
	Name string `json:"name"`
	Uses []Use  `json:"uses"`
}

// Ways are the configured methods of a node, tried in order after the cut at the
// targets, which needs no configuration.
type Ways struct {
	Node    string `json:"node"`
	Ways    []Way  `json:"ways"`
	Off     bool   `json:"off,omitempty"` // leave it off; else it is brought back
	Changed uint64 `json:"changed"`
}

func (w *Ways) clone() Ways {
	c := *w
	c.Ways = slices.Clone(w.Ways)
	for i := range c.Ways {
		c.Ways[i].Uses = slices.Clone(c.Ways[i].Uses)
		for k := range c.Ways[i].Uses {
			c.Ways[i].Uses[k].Params = maps.Clone(c.Ways[i].Uses[k].Params)
		}
	}
	return c
}

// DeviceSet makes a device (Version 0) or replaces the one whose Changed is
// Version. Value: Device.
type DeviceSet struct {
	Device  Device `json:"device"`
	Version uint64 `json:"version"`
}

// DeviceDelete removes a device that no node's method uses. Value: nil.
type DeviceDelete struct {
	Name string `json:"name"`
}

// WaysSet replaces the configured methods of a node; none removes them. Version
// is Changed of what it replaces, 0 for nothing. Value: Ways.
type WaysSet struct {
	Ways    Ways   `json:"ways"`
	Version uint64 `json:"version"`
}

// CutAck is a target's word that the victim of an open fence is cut off from the
// volumes: its sessions are gone, nothing of it is in the backend, and no login of
// it will be taken (SAFETY §3 "Cut is per volume", case a). The target made that
// promise durable before. Where the fence is closed already it ends what was left
// pending. Value: nil.
type CutAck struct {
	Victim      string   `json:"victim"`
	Epoch       uint64   `json:"epoch"` // of the eviction
	By          string   `json:"by"`    // the target's node
	Incarnation uint64   `json:"incarnation"`
	Volumes     []string `json:"volumes"` // uuids
}

// FSMKind implements fsm.Command.
func (DeviceSet) FSMKind() (fsm.ID, uint16, uint32)    { return fsm.Fence, kindDeviceSet, 1 }
func (DeviceDelete) FSMKind() (fsm.ID, uint16, uint32) { return fsm.Fence, kindDeviceDelete, 1 }
func (WaysSet) FSMKind() (fsm.ID, uint16, uint32)      { return fsm.Fence, kindWaysSet, 1 }
func (CutAck) FSMKind() (fsm.ID, uint16, uint32)       { return fsm.Fence, kindCutAck, 1 }

func name(what, s string) error {
	if s == "" || len(s) > 63 || strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
	}) {
		return fmt.Errorf("%s %q: 1 to 63 letters, digits, dots, underscores and hyphens are needed", what, s)
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *DeviceSet) Validate() error {
	d := &c.Device
	if err := name("fence device", d.Name); err != nil {
		return err
	}
	switch _, err := hex.DecodeString(d.Key); {
	case !strings.HasPrefix(d.Agent, "fence_") || strings.ContainsAny(d.Agent, "/ "):
		return fmt.Errorf("fence device %s: agent %q is not a program called fence_*", d.Name, d.Agent)
	case len(d.Actions) == 0:
		return fmt.Errorf("fence device %s: it is not known what %s can do", d.Name, d.Agent)
	case d.Timeout < 0:
		return fmt.Errorf("fence device %s: negative timeout", d.Name)
	case (len(d.Sealed) > 0) != (d.Key != ""), err != nil:
		return fmt.Errorf("fence device %s: sealed options and the key's name belong together", d.Name)
	}
	for k, v := range d.Params {
		if strings.ContainsAny(k, "\n=") || strings.Contains(v, "\n") || k == "" {
			return fmt.Errorf("fence device %s: option %q has a name or a value that an agent cannot read", d.Name, k)
		}
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *WaysSet) Validate() error {
	if c.Ways.Node == "" {
		return fmt.Errorf("fence methods: the node is missing")
	}
	seen := map[string]bool{}
	for _, w := range c.Ways.Ways {
		if err := name("fence method", w.Name); err != nil {
			return err
		}
		if seen[w.Name] || w.Name == string(Target) || w.Name == string(Manual) {
			return fmt.Errorf("fence method %s of %s: the name is taken", w.Name, c.Ways.Node)
		}
		seen[w.Name] = true
		if len(w.Uses) == 0 {
			return fmt.Errorf("fence method %s of %s: it has no device", w.Name, c.Ways.Node)
		}
	}
	return nil
}

// Validate implements fsm.Validator.
func (c *CutAck) Validate() error {
	if c.Victim == "" || c.By == "" || c.Epoch == 0 {
		return fmt.Errorf("ack of a cut: victim, epoch and target are needed")
	}
	if c.Victim == c.By {
		return fmt.Errorf("ack of a cut: %s speaks for itself", c.By)
	}
	return nil
}

// Devices lists the fence devices by name; call it inside fsm.FSM.View.
func (m *Machine) Devices() []Device {
	out := make([]Device, 0, len(m.s.Devices))
	for _, k := range slices.Sorted(maps.Keys(m.s.Devices)) {
		out = append(out, m.s.Devices[k].clone())
	}
	return out
}

// Ways are the configured methods of a node, the zero value without any; call it
// inside fsm.FSM.View.
func (m *Machine) Ways(node string) Ways {
	if w := m.s.Ways[node]; w != nil {
		return w.clone()
	}
	return Ways{Node: node}
}

// AllWays lists the configured methods of all nodes; call it inside fsm.FSM.View.
func (m *Machine) AllWays() []Ways {
	out := make([]Ways, 0, len(m.s.Ways))
	for _, k := range slices.Sorted(maps.Keys(m.s.Ways)) {
		out = append(out, m.s.Ways[k].clone())
	}
	return out
}

func stale(op, object string, have, want uint64) error {
	why := fmt.Sprintf("it was changed at %d, not at %d: somebody else changed it", have, want)
	switch {
	case have == 0:
		return &fsm.Error{Kind: fsm.KindNotFound, Op: op, Object: object, Why: "there is none", Next: "clusteradm fence device list"}
	case want == 0:
		return &fsm.Error{Kind: fsm.KindExists, Op: op, Object: object, Why: "it exists", Next: "clusteradm fence device list"}
	}
	return &fsm.Error{Kind: fsm.KindConflict, Op: op, Object: object, Why: why, Next: "clusteradm fence device list"}
}

func (m *Machine) deviceSet(index uint64, c *DeviceSet) (any, error) {
	d := c.Device.clone()
	have := uint64(0)
	if old := m.s.Devices[d.Name]; old != nil {
		have = old.Changed
	}
	if have != c.Version {
		return nil, stale("set fence device", d.Name, have, c.Version)
	}
	d.Changed = index
	m.s.Devices[d.Name] = &d
	return d.clone(), nil
}

func (m *Machine) deviceDelete(c *DeviceDelete) (any, error) {
	if m.s.Devices[c.Name] == nil {
		return nil, stale("delete fence device", c.Name, 0, 0)
	}
	for _, w := range m.AllWays() {
		for _, x := range w.Ways {
			if slices.ContainsFunc(x.Uses, func(u Use) bool { return u.Device == c.Name }) {
				return nil, &fsm.Error{Kind: fsm.KindRefused, Op: "delete fence device", Object: c.Name,
					Why: fmt.Sprintf("method %s of node %s uses it", x.Name, w.Node), Next: "clusteradm fence method clear " + w.Node}
			}
		}
	}
	delete(m.s.Devices, c.Name)
	return nil, nil
}

func (m *Machine) waysSet(index uint64, c *WaysSet) (any, error) {
	w := c.Ways.clone()
	have := uint64(0)
	if old := m.s.Ways[w.Node]; old != nil {
		have = old.Changed
	}
	if have != c.Version {
		return nil, stale("set fence methods of", w.Node, have, c.Version)
	}
	for _, x := range w.Ways {
		for _, u := range x.Uses {
			if m.s.Devices[u.Device] == nil {
				return nil, &fsm.Error{Kind: fsm.KindNotFound, Op: "set fence methods of", Object: w.Node,
					Why: "no fence device is called " + u.Device, Next: "clusteradm fence device list"}
			}
		}
	}
	if len(w.Ways) == 0 {
		delete(m.s.Ways, w.Node)
		return w, nil
	}
	w.Changed = index
	m.s.Ways[w.Node] = &w
	return w.clone(), nil
}

// cutAck notes it at the open fence, and closes what older fences of the victim left
// open: a cut at an epoch is one at all epochs before. Volumes are a set: acks repeat.
func (m *Machine) cutAck(c *CutAck) (any, error) {
	m.s.Pending = slices.DeleteFunc(m.s.Pending, func(p PendingCut) bool {
		return p.Node == c.Victim && p.Epoch <= c.Epoch && slices.Contains(c.Volumes, p.Volume)
	})
	o := m.s.Open[c.Victim]
	if o == nil || o.Epoch != c.Epoch {
		return nil, nil
	}
	if o.Cuts == nil {
		o.Cuts = map[string]string{}
	}
	for _, v := range c.Volumes {
		o.Cuts[v] = c.By
	}
	return nil, nil
}
