package machines_test

import (
	"slices"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/machines"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

func bmc(user string) fencing.Device {
	return fencing.Device{Name: "bmc2", Agent: "fence_ipmilan", Params: map[string]string{"ip": "192.0.2.2", "username": user},
		Sealed: []byte("0123456789012345678901234567"), Key: "0011223344556677", Actions: []string{"off", "on", "reboot"}, Timeout: 20 * time.Second}
}

func (l *log) devices() (out []fencing.Device) {
	l.c.Read(func(v machines.View) { out = v.Fencing.Devices() })
	return out
}

// TestFenceDevicesAndMethods: compare-and-set, and no method without its device.
func TestFenceDevicesAndMethods(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	bad := bmc("a")
	bad.Agent = "/bin/sh"
	l.refused(fencing.DeviceSet{Device: bad}, fsm.ErrInvalid, 2)
	bad = bmc("a\naction=off")
	l.refused(fencing.DeviceSet{Device: bad}, fsm.ErrInvalid, 2)
	l.refused(fencing.DeviceSet{Device: bmc("a"), Version: 4}, fsm.ErrNotFound, 3)
	d := must[fencing.Device](l, fencing.DeviceSet{Device: bmc("a")})
	if d.Changed != l.n {
		t.Fatalf("changed at %d, want %d", d.Changed, l.n)
	}
	l.refused(fencing.DeviceSet{Device: bmc("b")}, fsm.ErrExists, 4)
	l.refused(fencing.DeviceSet{Device: bmc("b"), Version: d.Changed + 1}, fsm.ErrConflict, 4)
	d2 := must[fencing.Device](l, fencing.DeviceSet{Device: bmc("b"), Version: d.Changed})
	if got := l.devices(); len(got) != 1 || got[0].Params["username"] != "b" || got[0].Changed != d2.Changed {
		t.Fatalf("devices: %+v", got)
	}
	ways := fencing.Ways{Node: "n2", Ways: []fencing.Way{{Name: "power", Uses: []fencing.Use{{Device: "pdu"}}}}}
	l.refused(fencing.WaysSet{Ways: ways}, fsm.ErrNotFound, 3)
	ways.Ways[0].Uses[0].Device = "bmc2"
	ways.Ways[0].Name = "target"
	l.refused(fencing.WaysSet{Ways: ways}, fsm.ErrInvalid, 2)
	ways.Ways[0].Name = "power"
	w := must[fencing.Ways](l, fencing.WaysSet{Ways: ways})
	l.refused(fencing.DeviceDelete{Name: "bmc2"}, fsm.ErrRefused, 9)
	l.refused(fencing.WaysSet{Ways: ways}, fsm.ErrExists, 4)
	must[fencing.Ways](l, fencing.WaysSet{Ways: fencing.Ways{Node: "n2"}, Version: w.Changed})
	l.c.Read(func(v machines.View) {
		if got := v.Fencing.AllWays(); len(got) != 0 {
			t.Errorf("methods: %+v", got)
		}
	})
	if r := l.apply(fencing.DeviceDelete{Name: "bmc2"}); r.Err != nil {
		t.Fatal(r.Err)
	}
	l.refused(fencing.DeviceDelete{Name: "bmc2"}, fsm.ErrNotFound, 3)
}

// TestCutAcks count only for the fence that is open.
func TestCutAcks(t *testing.T) {
	t.Parallel()
	l := bootstrapped(t)
	l.join("n2")
	e := must[members.Eviction](l, members.Evict{Now: epochStart, Node: "n2", Incarnation: 1, BootID: "boot-n2", Reason: "lease lost"})
	cuts := func() (out map[string]string) {
		l.c.Read(func(v machines.View) {
			for _, o := range v.Fencing.OpenFences() {
				out = o.Cuts
			}
		})
		return out
	}
	ack := fencing.CutAck{Victim: "n2", Epoch: e.Epoch - 1, By: "n1", Volumes: []string{"u1"}}
	l.apply(ack)
	if len(cuts()) != 0 {
		t.Fatal("an ack of an older epoch counts")
	}
	ack.Epoch = e.Epoch
	l.apply(ack)
	l.apply(ack)
	ack.Volumes = []string{"u2"}
	l.apply(ack)
	if c := cuts(); len(c) != 2 || c["u1"] != "n1" || c["u2"] != "n1" {
		t.Fatalf("cuts %v", c)
	}
	l.refused(fencing.CutAck{Victim: "n2", Epoch: e.Epoch, By: "n2", Volumes: []string{"u3"}}, fsm.ErrInvalid, 2)
	silent := fencing.Evidence{Method: fencing.Target}
	l.refused(fencing.Fenced{Now: epochStart, Node: "n2", Epoch: e.Epoch, Evidence: silent}, fsm.ErrInvalid, 2)
	silent.Silent, silent.Pending = []string{"u3"}, []string{"u4", "u5"}
	r := must[fencing.Record](l, fencing.Fenced{Now: epochStart, Node: "n2", Epoch: e.Epoch, Evidence: silent})
	if !slices.Equal(r.Evidence.Silent, silent.Silent) {
		t.Errorf("recorded %+v", r.Evidence)
	}
	pending := func() (out []fencing.PendingCut) {
		l.c.Read(func(v machines.View) { out = v.Fencing.PendingCuts() })
		return out
	}
	if p := pending(); len(p) != 2 {
		t.Fatalf("pending %+v", p)
	}
	ack.Volumes, ack.Epoch = []string{"u4"}, e.Epoch-1
	l.apply(ack)
	if p := pending(); len(p) != 2 {
		t.Fatalf("an older ack counts: %+v", p)
	}
	ack.Epoch = e.Epoch
	l.apply(ack)
	if p := pending(); len(p) != 1 || p[0].Volume != "u5" {
		t.Fatalf("pending %+v", p)
	}
	ack.Volumes, ack.Epoch = []string{"u5"}, e.Epoch+3
	l.apply(ack)
	if p := pending(); len(p) != 0 {
		t.Fatalf("pending %+v", p)
	}
}
