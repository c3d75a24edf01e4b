// Package machines puts the cluster's sub-machines together into the one FSM
// and gives typed, consistent reads of them. It is what raftlog applies and
// what node/ reads; a new sub-machine is registered here.
package machines

import (
	"fmt"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	"github.com/blockhouse-san/blockhouse/membership/fsm/pr"
	"github.com/blockhouse-san/blockhouse/membership/fsm/settings"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
)

// Format is the highest cluster format that this binary knows: members report
// it, settings.Activate raises the cluster to it.
const Format uint32 = 1

// Cluster is the cluster's state: the FSM and its typed sub-machines.
type Cluster struct {
	*fsm.FSM
	v View
}

// View is the sub-machines at one applied index. Its methods return copies;
// the View itself is valid only inside the func that got it.
type View struct {
	Index    uint64
	Members  *members.Machine
	Fencing  *fencing.Machine
	Storage  *storage.Machine
	PR       *pr.Machine
	Settings *settings.Machine
}

// New makes an empty cluster state.
func New(log *zap.Logger) (*Cluster, error) {
	fe := fencing.New()
	me := members.New(fe)
	st := storage.New(me)
	se := settings.New(me)
	re := pr.New()
	fe.Bind(me)
	me.Bind(st, se, re)
	st.Bind(re)
	re.Bind(st)
	f, err := fsm.New(log, me, fe, st, re, se)
	if err != nil {
		return nil, fmt.Errorf("put state machines together: %w", err)
	}
	return &Cluster{FSM: f, v: View{Members: me, Fencing: fe, Storage: st, PR: re, Settings: se}}, nil
}

// Read runs fn on a state that stands still. fn must be short, must not call
// c, and keeps only what the machines' readers return.
func (c *Cluster) Read(fn func(View)) {
	c.View(func(applied uint64) {
		v := c.v
		v.Index = applied
		fn(v)
	})
}

// Formats is what the proposer's gate needs (fsm.FSM.Check): the format in
// force and the lowest one that a voter reported.
func (c *Cluster) Formats(voters []string) (active, lowest uint32) {
	c.Read(func(v View) { active, lowest = v.Settings.Format(), v.Members.Formats(voters) })
	return active, lowest
}
