package sbd

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/fence/agent"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// loop makes a loop device: sbd refuses plain files. sectors of 512 or 4096 bytes.
func loop(t *testing.T, sector string) string {
	t.Helper()
	testproc.Need(t, "sbd", "losetup")
	if os.Getuid() != 0 {
		testproc.SkipOrFail(t, "a loop device needs root")
	}
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", sector, image(t, 4<<20)).CombinedOutput()
	dev := strings.TrimSpace(string(out))
	if err != nil {
		testproc.SkipOrFail(t, "no loop device: "+dev)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

func sbd(t *testing.T, args ...string) string {
	t.Helper()
	p, err := testproc.Find("sbd")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(p, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("sbd %q: %v: %s", args, err, out)
	}
	return string(out)
}

// Debian's sbd makes the device, we read it; we write, it reads.
func TestDebianCreates(t *testing.T) {
	t.Parallel()
	for _, sector := range []string{"512", "4096"} {
		dev := loop(t, sector)
		sbd(t, "-d", dev, "-1", "1", "-2", "0", "-3", "1", "-4", "2", "create")
		sbd(t, "-d", dev, "allocate", "node1")
		d := open(t, dev)
		h, err := d.Header()
		if err != nil || h.Version != 2 || h.Minor != 1 || h.Slots != 255 || h.Timeouts != (Timeouts{time.Second, 0, time.Second, 2 * time.Second}) {
			t.Fatalf("%+v, %v", h, err)
		}
		if diff := cmp.Diff(sbd(t, "-d", dev, "dump"), h.Dump(dev)); diff != "" {
			t.Errorf("dump (-sbd +ours):\n%s", diff)
		}
		if n, err := d.Allocate(t.Context(), env.Real{}, "node2"); err != nil || n != 1 {
			t.Errorf("%d, %v", n, err)
		}
		if err := d.Send("node1", "node2", CrashDump); err != nil {
			t.Error(err)
		}
		sbd(t, "-d", dev, "-n", "node1", "message", "node2", "exit")
		l, err := d.List()
		want := []Slot{{0, "node1", CrashDump, "node2"}, {1, "node2", Exit, "node1"}}
		if diff := cmp.Diff(want, l); diff != "" || err != nil {
			t.Errorf("%v\n%s", err, diff)
		}
		if diff := cmp.Diff(sbd(t, "-d", dev, "list"), ListText(l)); diff != "" {
			t.Errorf("list (-sbd +ours):\n%s", diff)
		}
	}
}

// We make the device, Debian's sbd uses it; its message is what ends a watcher.
func TestDebianReadsOurs(t *testing.T) {
	t.Parallel()
	for _, sector := range []string{"512", "4096"} {
		dev := loop(t, sector)
		d := open(t, dev)
		h, err := d.Create(quick, uuid.New(), false)
		if err != nil {
			t.Fatal(err)
		}
		slots, _, err := Join(t.Context(), env.Real{}, []*Disk{d}, "node1", true)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(sbd(t, "-d", dev, "dump"), h.Dump(dev)); diff != "" {
			t.Errorf("dump (-sbd +ours):\n%s", diff)
		}
		told := make(chan Message, 1)
		done := make(chan error, 1)
		go func() {
			done <- Watch(t.Context(), env.Real{}, quick, []*Disk{d}, slots, Hooks{Pet: func() {}, Test: func(string) {}, Vouched: func() bool { return true },
				Do: func(m Message, _ string) { told <- m }, Failed: func(_ string, err error) { t.Error(err) }, Silent: func(string) {}})
		}()
		start := time.Now()
		sbd(t, "-d", dev, "-n", "node9", "message", "node1", "reset")
		if took := time.Since(start); took < quick.MsgWait {
			t.Errorf("sbd waited %v", took)
		}
		// msgwait is over: the watcher must know.
		select {
		case m := <-told:
			if m != Reset {
				t.Errorf("told %v", m)
			}
		case <-time.After(patience):
			t.Error("not told")
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := sbd(t, "-d", dev, "list"); got != "0\tnode1\treset\tnode9\n" {
			t.Errorf("%q", got)
		}
	}
}

// fence_sbd of ClusterLabs, unmodified, on a device of ours.
func TestFenceSbdAgent(t *testing.T) {
	t.Parallel()
	testproc.Need(t, "fence_sbd")
	dev := loop(t, "512")
	d := open(t, dev)
	if _, err := d.Create(quick, uuid.New(), false); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"n1", "n2"} {
		if _, err := d.Allocate(t.Context(), env.Real{}, n); err != nil {
			t.Fatal(err)
		}
	}
	r := agent.New(agent.Config{Node: "n1"})
	q := agent.Request{Agent: "fence_sbd", Target: "n2", Params: map[string]string{"devices": dev}}
	plugs, _, err := r.List(t.Context(), q, false)
	if err != nil || len(plugs) != 2 || plugs[0].ID != "n1" || plugs[1].ID != "n2" {
		t.Errorf("%+v, %v", plugs, err)
	}
	q.Action = agent.Off
	res, err := r.Run(t.Context(), q)
	if err != nil || !res.OK() {
		t.Fatalf("%+v, %v", res, err)
	}
	if m, _, err := d.Mailbox(1); err != nil || m != Off {
		t.Errorf("%v, %v", m, err)
	}
	q.Action = agent.Status
	if res, err = r.Run(t.Context(), q); err != nil || res.Power != agent.PowerOff {
		t.Errorf("%+v, %v", res, err)
	}
}
