package testnet

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ways runs a test with namespaces of root and with those of an ordinary user.
func ways(t *testing.T, f func(t *testing.T, opts ...Option)) {
	if os.Getuid() == 0 {
		t.Run("root", func(t *testing.T) { t.Parallel(); f(t) })
	}
	t.Run("user", func(t *testing.T) { t.Parallel(); f(t, UserNamespace) })
}

// ping connects count times and returns how many were answered.
func ping(t *testing.T, from *Node, to string, count int) int {
	t.Helper()
	// TCP connects instead of ICMP: no program is needed.
	answered := 0
	for range count {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		c, err := from.Dial(ctx, "tcp4", to)
		cancel()
		if err == nil {
			answered++
			c.Close()
		}
	}
	return answered
}

// echo serves TCP echo in the node and returns its address.
func echo(t *testing.T, nd *Node, addr string) string {
	t.Helper()
	l, err := nd.Listen("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			// One at a time: the tests open one connection after the other.
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func TestNodesTalkAndFaultsAct(t *testing.T) {
	t.Parallel()
	ways(t, func(t *testing.T, opts ...Option) {
		n := New(t, opts...)
		br := n.Bridge("10.99.0.1/24")
		a, b := n.Node("a"), n.Node("b")
		pa, pb := br.Attach(a, "10.99.0.11/24"), br.Attach(b, "10.99.0.12/24")
		onB := echo(t, b, "10.99.0.12:0")
		onHub := echo(t, n.Hub(), "10.99.0.1:0")

		check := func(what string, from *Node, to string, want bool) {
			t.Helper()
			tries := 1
			if want {
				tries = 10 // a link needs a moment; one answer proves the path
			}
			got := false
			for i := 0; i < tries && !got; i++ {
				got = ping(t, from, to, 1) > 0
			}
			if got != want {
				t.Errorf("%s: reached %s = %v, want %v", what, to, got, want)
			}
		}
		check("no fault", a, onB, true)
		check("no fault", a, onHub, true)

		f := n.Drop(pb, pa)
		check("answers dropped", a, onB, false)
		check("other pair untouched", a, onHub, true)
		if f.Dropped() == 0 {
			t.Error("drop of b to a counted nothing")
		}
		f.Heal()
		check("healed", a, onB, true)

		f = n.Drop(br.Hub(), pa)
		check("hub's answers dropped", a, onHub, false)
		check("hub's answers dropped, b untouched", a, onB, true)
		f.Heal()
		f = n.Drop(pa, br.Hub())
		check("requests to hub dropped", a, onHub, false)
		f.Heal()
		f = n.Drop(pa, nil)
		check("a is mute", a, onB, false)
		f.Heal()
		f = n.Drop(nil, pa)
		check("a is deaf", a, onHub, false)
		f.Heal()

		pa.Down()
		check("link down", a, onB, false)
		pa.Up()
		check("link up", a, onB, true)
		pb.DelAddr()
		check("address gone", a, onB, false)
		pb.AddAddr()
		check("address back", a, onB, true)
	})
}

func TestLossIsPartial(t *testing.T) {
	t.Parallel()
	n := New(t)
	br := n.Bridge("10.99.0.1/24")
	a := n.Node("a")
	pa := br.Attach(a, "10.99.0.11/24")
	l, err := n.Hub().Listen("tcp4", "10.99.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := n.Loss(pa, br.Hub(), 50)
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	// TCP repairs the loss, so the data must arrive whole, and the counter must show that there was one.
	c, err := a.Dial(ctx, "tcp4", l.Addr().String())
	for err != nil && ctx.Err() == nil {
		c, err = a.Dial(ctx, "tcp4", l.Addr().String())
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := 0
	for range 20 {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	dropped := f.Dropped()
	f.Heal()
	if err := s.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 20)
	for got < 20 {
		k, err := s.Read(buf)
		if err != nil {
			t.Fatalf("after %d bytes: %v", got, err)
		}
		got += k
	}
	// 2^-20 is the chance that none of about 25 frames at 50 % is dropped.
	if dropped == 0 {
		t.Error("loss of 50 % dropped nothing")
	}
}

func TestChildRunsInNode(t *testing.T) {
	t.Parallel()
	ways(t, func(t *testing.T, opts ...Option) {
		n := New(t, opts...)
		br := n.Bridge("10.99.7.1/24")
		a := n.Node("a")
		br.Attach(a, "10.99.7.11/24")
		p := a.Start(testproc.Spec{Name: "addr", Args: []string{"ip", "-4", "-o", "addr", "show", "dev", "eth0"}})
		if err := p.Wait(20 * time.Second); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(p.Output(), "10.99.7.11/24") {
			t.Errorf("address of the node is not in %q", p.Output())
		}
		if _, err := a.Run("ip", "link", "show", "dev", "nonesuch"); err == nil {
			t.Error("a failing command gave no error")
		}
		tap := br.Tap()
		out, err := n.Hub().Run("ip", "-o", "link", "show", "master", "br0")
		if err != nil || !strings.Contains(out, tap.Dev+":") {
			t.Errorf("tap %s is not on the bridge: %v %q", tap.Dev, err, out)
		}
	})
}

// The namespace must be gone when its test is over.
func TestNamespaceEndsWithItsTest(t *testing.T) {
	t.Parallel()
	var pids []int
	t.Run("inner", func(t *testing.T) {
		n := New(t)
		pids = append(pids, n.Hub().PID(), n.Node("a").PID())
	})
	for _, pid := range pids {
		if err := unix.Kill(pid, 0); err != unix.ESRCH {
			t.Errorf("holder %d: %v, want no such process", pid, err)
		}
	}
}

func TestDialReportsRefusal(t *testing.T) {
	t.Parallel()
	n := New(t)
	_, err := n.Hub().Dial(context.Background(), "tcp4", "127.0.0.1:1")
	if err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("dial of a closed port: %v, want connection refused", err)
	}
}

func TestProxyDelaysStallsAndResets(t *testing.T) {
	t.Parallel()
	n := New(t)
	br := n.Bridge("10.99.0.1/24")
	a, b := n.Node("a"), n.Node("b")
	br.Attach(a, "10.99.0.11/24")
	br.Attach(b, "10.99.0.12/24")
	server := echo(t, b, "10.99.0.12:0")
	ln, err := n.Hub().Listen("tcp4", "10.99.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := StartProxy(t, ln, func(ctx context.Context) (net.Conn, error) { return n.Hub().Dial(ctx, "tcp4", server) })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := a.Dial(ctx, "tcp4", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	round := func(wait time.Duration) (time.Duration, error) {
		begin := time.Now()
		if _, err := c.Write([]byte("ping")); err != nil {
			return 0, err
		}
		if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return 0, err
		}
		_, err := io.ReadFull(c, make([]byte, 4))
		return time.Since(begin), err
	}
	if _, err := round(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	const delay = 100 * time.Millisecond
	p.SetDelay(delay)
	took, err := round(20 * time.Second)
	if err != nil || took < 2*delay {
		t.Errorf("round trip with delay %v each way took %v, %v", delay, took, err)
	}
	p.SetDelay(0)
	p.SetStall(true)
	if _, err := round(200 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("stalled: %v, want a timeout", err)
	}
	p.SetStall(false)
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		t.Errorf("the stalled bytes are lost: %v", err)
	}
	p.Reset()
	if _, err := round(20 * time.Second); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after reset: %v, want a broken connection", err)
	}
}

func TestPortsHaveOwnNames(t *testing.T) {
	t.Parallel()
	n := New(t)
	b0, b1 := n.Bridge("10.99.0.1/24"), n.Bridge("10.99.1.1/24")
	a := n.Node("a")
	seen := map[string]bool{}
	for i, p := range []*Port{b0.Attach(a, "10.99.0.11/24"), b1.Attach(a, "10.99.1.11/24")} {
		if p.If != "eth"+strconv.Itoa(i) || seen[p.Dev] || seen[p.MAC] {
			t.Errorf("port %d: %+v", i, p)
		}
		seen[p.Dev], seen[p.MAC] = true, true
	}
	out, err := a.Run("ip", "-4", "-br", "addr")
	if err != nil || !strings.Contains(out, "10.99.0.11") || !strings.Contains(out, "10.99.1.11") {
		t.Errorf("addresses: %v %q", err, out)
	}
}
