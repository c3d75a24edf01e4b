package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// again repeats a request whose outcome a busy machine left open, as a user would:
// the cluster answers one that was done already as done, or as existing.
func again[T any](t *testing.T, f func(context.Context) (T, error)) (T, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for {
		v, err := f(ctx)
		if err == nil {
			return v, nil
		}
		switch api.AsError(err).Code {
		case api.CodeTimeout, api.CodeNoQuorum, api.CodeUnreachable, api.CodeNotFound:
		default:
			return v, err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return v, err
		}
	}
}

// lun makes a LUN on a node, open to everybody.
func lun(t *testing.T, c *cluster.Cluster, node string, size int64) api.LUN {
	t.Helper()
	a := c.Nodes[0].API()
	tg, err := again(t, func(ctx context.Context) (api.Target, error) {
		tg, err := api.Post[api.Target](ctx, a, api.PathTargets, api.TargetCreate{Name: "disks"})
		if err != nil && api.AsError(err).Code == api.CodeExists {
			return api.Get[api.Target](ctx, a, api.PathTargets+"/iqn.2026-11.io.blockhouse:demo.disks")
		}
		return tg, err
	})
	if err != nil {
		t.Fatal(err)
	}
	open := true
	if _, err := again(t, func(ctx context.Context) (api.Target, error) {
		return api.Post[api.Target](ctx, a, api.PathACLs, api.ACLChange{Target: tg.IQN, Open: &open})
	}); err != nil {
		t.Fatal(err)
	}
	l, err := again(t, func(ctx context.Context) (api.LUN, error) {
		return api.Post[api.LUN](ctx, a, api.PathLUNs, api.LUNCreate{Target: tg.IQN, Volume: "v1", Size: size, LUN: -1, Node: node, RequestID: "lun"})
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// stream writes and reads back stamped blocks on one connection, which it opens
// once: when the connection ends, so does the stream.
type stream struct {
	dials atomic.Int32
	local atomic.Pointer[string]
	ops   atomic.Uint64
	last  atomic.Int64 // env.Boot of the last operation that was acknowledged
	dev   block.Device
	err   atomic.Pointer[error]
	wg    sync.WaitGroup
}

func startStream(t *testing.T, portal, iqn string, n int) *stream {
	t.Helper()
	s := &stream{}
	cfg := initiator.Config{InitiatorName: "iqn.2026-11.test:stream", NopInterval: -1,
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			if err == nil {
				s.dials.Add(1)
				a := c.LocalAddr().String()
				s.local.Store(&a)
			}
			return c, err
		}}
	sess, err := initiator.Login(t.Context(), portal, iqn, cfg)
	if err != nil {
		t.Fatalf("log in to %s at %s: %v", iqn, portal, err)
	}
	dev, err := sess.OpenLUN(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	s.dev = dev
	ctx, cancel := context.WithCancel(context.Background())
	for w := range n {
		s.wg.Go(func() {
			buf, got := make([]byte, 4096), make([]byte, 4096)
			for seq := uint64(1); ctx.Err() == nil; seq++ {
				off := int64(w*64+int(seq%64)) * 4096
				binary.BigEndian.PutUint64(buf, seq)
				err := dev.WriteAt(ctx, buf, off, 0)
				if err == nil {
					err = dev.ReadAt(ctx, got, off)
				}
				if err == nil && !bytes.Equal(buf, got) {
					err = fmt.Errorf("block at %d reads back as something else", off)
				}
				if err != nil {
					s.err.CompareAndSwap(nil, &err)
					return
				}
				s.ops.Add(1)
				s.last.Store(int64(env.Real{}.Now()))
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		s.wg.Wait()
		_ = sess.Close()
	})
	return s
}

func (s *stream) failure() error {
	if e := s.err.Load(); e != nil {
		return *e
	}
	return nil
}

// TestControlRestartUnderIO: control is killed and started again, and neither
// the worker nor the initiator notices.
func TestControlRestartUnderIO(t *testing.T) {
	// A wide lease: this is about adoption, not about how fast a noisy machine
	// starts a process.
	c := cluster.New(t, 3, cluster.Profile("wan")).Up()
	n3 := c.Node("n3")
	lun(t, c, "n3", 64<<20)
	before, err := n3.Worker(link.Storage)
	if err != nil {
		t.Fatal(err)
	}
	s := startStream(t, n3.IP+":3260", "iqn.2026-11.io.blockhouse:demo.disks", 4)
	addr := *s.local.Load()
	for range 3 {
		ops := s.ops.Load()
		n3.KillControl()
		n3.Start()
		c.Wait("n3 is online again", 60*time.Second, func() (bool, string) {
			st, err := c.Nodes[0].Status()
			if err != nil {
				return false, err.Error()
			}
			for _, n := range st.Nodes {
				if n.Name == "n3" {
					return n.State == api.NodeOnline && n.Workers["storage"].State == "serving" && s.ops.Load() > ops+10, string(n.State)
				}
			}
			return false, "no n3"
		})
	}
	after, err := n3.Worker(link.Storage)
	if err != nil {
		t.Fatal(err)
	}
	if before != after || !after.Alive() {
		t.Errorf("the worker was %+v, is %+v", before, after)
	}
	if err := s.failure(); err != nil {
		t.Errorf("the initiator saw: %v", err)
	}
	if s.dials.Load() != 1 || *s.local.Load() != addr {
		t.Errorf("%d connections, from %s and then %s: it must be one", s.dials.Load(), addr, *s.local.Load())
	}
	t.Logf("PROOF control restarted 3 times under %d operations: worker pid %d start %d and connection %s unchanged",
		s.ops.Load(), after.PID, after.Start, addr)
}

// TestControlStaysDown: without control I/O goes on until lease end + T_orphan,
// and stops then.
func TestControlStaysDown(t *testing.T) {
	const orphan = 3 * time.Second
	c := cluster.New(t, 3, cluster.Config("[lease]\nt_orphan = \"3s\"")).Up()
	n3 := c.Node("n3")
	lun(t, c, "n3", 64<<20)
	s := startStream(t, n3.IP+":3260", "iqn.2026-11.io.blockhouse:demo.disks", 2)
	c.Wait("I/O flows", 10*time.Second, func() (bool, string) { return s.ops.Load() > 10, "" })
	n3.KillControl()
	rep, err := n3.Report(link.Storage)
	if err != nil {
		t.Fatal(err)
	}
	// Leases end where the last renewal said; control is dead, so this is the last.
	end := rep.LeaseEnd
	c.Wait("I/O stops", 60*time.Second, func() (bool, string) { return s.failure() != nil, fmt.Sprint(s.ops.Load()) })
	stopped := env.Boot(s.last.Load())
	now := env.Real{}.Now()
	if early := end.Add(orphan).Sub(stopped); early > 500*time.Millisecond {
		t.Errorf("the last operation was acknowledged %v before lease end + T_orphan", early)
	}
	// The initiator notes the time when the answer has come; the target sent it
	// before, and both share two busy processors with everybody else.
	if late := stopped.Sub(end.Add(orphan)); late > 250*time.Millisecond {
		t.Errorf("an operation was acknowledged %v after lease end + T_orphan", late)
	}
	t.Logf("PROOF control down: I/O stopped %v after the lease's end (T_orphan %v), noticed %v later, with: %v",
		stopped.Sub(end).Round(time.Millisecond), orphan, now.Sub(stopped).Round(time.Millisecond), s.failure())
	// Nobody may log in now.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	sess, err := initiator.Login(ctx, n3.IP+":3260", "iqn.2026-11.io.blockhouse:demo.disks", initiator.Config{InitiatorName: "iqn.2026-11.test:late"})
	if err == nil {
		_ = sess.Close()
		t.Error("a login was taken without a lease")
	}
	rep, err = n3.Report(link.Storage)
	if err != nil || rep.Gate != "shut" {
		t.Errorf("gate %q, %v", rep.Gate, err)
	}
	// And when control comes back, so does I/O, on new sessions.
	back := time.Now()
	n3.Start()
	c.Wait("n3 serves again", 60*time.Second, func() (bool, string) {
		r, err := n3.Report(link.Storage)
		return err == nil && r.Gate == "serving", r.Gate
	})
	t.Logf("n3 serves again %v after the start of its control", time.Since(back).Round(time.Millisecond))
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	sess, err = initiator.Login(ctx, n3.IP+":3260", "iqn.2026-11.io.blockhouse:demo.disks", initiator.Config{InitiatorName: "iqn.2026-11.test:late"})
	if err != nil {
		t.Fatalf("log in after control came back: %v", err)
	}
	_ = sess.Close()
}

// TestOldControlIsNotObeyed starts a control on a data folder of earlier, cut
// off from the others: the worker must not be told anything older than it has.
// Control says nothing before it has caught up, and the worker would refuse it;
// each of the two is shown to hold alone, and with both off the test sees the
// worker go back.
func TestOldControlIsNotObeyed(t *testing.T) {
	for _, m := range []struct {
		mutation string
		backward bool // the worker is expected to go back: both rules are off
	}{
		{"", false},
		{"control-catches-up", false},
		{"control-catches-up,link-never-backwards", true},
	} {
		name := m.mutation
		if name == "" {
			name = "all rules on"
		}
		t.Run(name, func(t *testing.T) {
			c := cluster.New(t, 3)
			n3 := c.Node("n3")
			if m.mutation != "" {
				n3.Env = []string{"BLOCKHOUSE_MUTATION=" + m.mutation}
			}
			c.Up()
			lun(t, c, "n3", 1<<20)
			// A snapshot makes the old state loadable without a leader: raft restores
			// it at start.
			old := filepath.Join(n3.Dir, "old")
			snapshotAndCopy(t, c, n3, old)
			create(t, c, 5)
			c.Wait("the worker has seen the new volumes", 30*time.Second, func() (bool, string) {
				r, err := n3.Report(link.Storage)
				if err != nil {
					return false, err.Error()
				}
				s, err := c.Nodes[0].Status()
				return err == nil && r.Highest.Index >= s.Index, fmt.Sprintf("%d of %d", r.Highest.Index, s.Index)
			})
			was, err := n3.Report(link.Storage)
			if err != nil {
				t.Fatal(err)
			}
			n3.KillControl()
			n3.UseData(old)
			// Nobody answers it: the others are frozen.
			for _, n := range c.Nodes[:2] {
				if err := n.Proc().Freeze(); err != nil {
					t.Fatal(err)
				}
			}
			n3.Start()
			time.Sleep(3 * time.Second)
			is, err := n3.Report(link.Storage)
			if err != nil {
				t.Fatal(err)
			}
			went := is.Highest.Before(was.Highest)
			t.Logf("worker had %v and has %v; refused %d frames; obeys control %d, before %d", was.Highest, is.Highest, is.Refusals, is.Control, was.Control)
			if went != m.backward {
				t.Errorf("worker went back: %v, expected %v", went, m.backward)
			}
			if m.mutation == "" && is.Refusals != was.Refusals {
				t.Errorf("control said %d old things before it had caught up", is.Refusals-was.Refusals)
			}
		})
	}
}

func create(t *testing.T, c *cluster.Cluster, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for i := range n {
		if _, err := api.Post[api.Volume](ctx, c.Nodes[0].API(), api.PathVolumes, api.VolumeCreate{Name: fmt.Sprintf("x%d", i), Size: 1 << 20, Replicas: 1}); err != nil {
			t.Fatal(err)
		}
	}
}

// snapshotAndCopy stops n, which makes it take a snapshot, and copies its data
// folder. The copy's control gets a high number: the rule under test is not the
// one that refuses a control of a lower number.
func snapshotAndCopy(t *testing.T, c *cluster.Cluster, n *cluster.Node, to string) {
	t.Helper()
	n.Stop()
	if out, err := exec.Command("cp", "-a", filepath.Join(n.Dir, "data"), to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(to, "control.incarnation"), []byte("1000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.Start()
	c.Wait("n3 is back", 60*time.Second, func() (bool, string) {
		r, err := n.Report(link.Storage)
		return err == nil && r.Gate == "serving", r.Gate
	})
}

func workerRuns(n *cluster.Node, pidFile string) bool {
	p, err := link.ReadPID(filepath.Join(n.Run, pidFile))
	return err == nil && p.Alive()
}

// TestWorkerKilled: a new storage worker serves under a new epoch (SAFETY r6), and
// what was flushed is there.
func TestWorkerKilled(t *testing.T) {
	c := cluster.New(t, 3).Up()
	n3 := c.Node("n3")
	l := lun(t, c, "n3", 16<<20)
	open := func(name string) block.Device {
		t.Helper()
		var dev block.Device
		c.Wait("a login", 30*time.Second, func() (bool, string) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			d, err := initiator.OpenURL(ctx, l.URLs[0], initiator.Config{InitiatorName: "iqn.2026-11.test:" + name})
			dev = d
			return err == nil, fmt.Sprint(err)
		})
		return dev
	}
	d := open("first")
	want := bytes.Repeat([]byte("flushed."), 512)
	if err := d.WriteAt(t.Context(), want, 8192, block.FUA); err != nil {
		t.Fatal(err)
	}
	for epoch := uint64(2); epoch < 4; epoch++ {
		p, err := n3.Worker(link.Storage)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		c.Wait(fmt.Sprintf("the volume is served under epoch %d", epoch), 30*time.Second, func() (bool, string) {
			s, err := c.Nodes[0].Status()
			if err != nil || len(s.Volumes) != 1 {
				return false, fmt.Sprint(err)
			}
			return s.Volumes[0].Epoch == epoch && s.Volumes[0].Health == api.HealthDegraded, cluster.JSON(s.Volumes[0])
		})
		got := make([]byte, len(want))
		d2 := open(fmt.Sprint("again", epoch))
		if err := d2.ReadAt(t.Context(), got, 8192); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("read back after the kill: %v, equal %v", err, bytes.Equal(got, want))
		}
		if err := d2.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := d.ReadAt(t.Context(), want, 0); err == nil {
		t.Error("the session of the dead worker still answers")
	}
	_ = d.Close()
}
