package plan

import (
	"fmt"
	"path"

	"github.com/blockhouse-san/blockhouse/config/clusterconf"
	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

// FromClusterConf gives the methods of a node of an imported cluster.conf, and
// the devices of all. A method with a fence_manual device is the manual one. The
// devices' Actions are the caller's to fill in: only the agent knows them.
func FromClusterConf(c *clusterconf.Config, node string) ([]Method, []Device, error) {
	n, ok := c.Node(node)
	if !ok {
		return nil, nil, fmt.Errorf("no clusternode is called %s", node)
	}
	var devices []Device
	manual := map[string]bool{}
	for _, d := range c.Devices {
		if d.Manual() {
			manual[d.Name] = true
			continue
		}
		devices = append(devices, Device{Name: d.Name, Agent: path.Base(d.Agent), Params: d.Args.Map()})
	}
	var methods []Method
	for _, m := range n.Methods {
		x := Method{Name: m.Name, Kind: fencing.Agent}
		for _, u := range m.Uses {
			if manual[u.Device] {
				x.Kind = fencing.Manual
				continue
			}
			a, ok := u.Args.Get("action")
			if !ok {
				a, _ = u.Args.Get("option")
			}
			x.Uses = append(x.Uses, Use{Device: u.Device, Params: u.Args.Map("action", "option", "nodename"), Action: agent.Action(a)})
			// The plug tells two outlets of one device apart.
			last := &x.Uses[len(x.Uses)-1]
			for _, k := range []string{"plug", "port"} {
				if v, ok := last.Params[k]; ok {
					last.Plug = v
					delete(last.Params, k)
				}
			}
		}
		if x.Kind == fencing.Manual && len(x.Uses) > 0 {
			return nil, nil, fmt.Errorf("%w %s of %s: an operator and devices in one method: give the operator a method of its own, the last", ErrConfig, m.Name, node)
		}
		methods = append(methods, x)
	}
	return methods, devices, nil
}
