package lab

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blockhouse-san/blockhouse/internal/testnet"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		cluster.Clean()
		os.Exit(code)
	}))
}

// processesOf lists live processes whose command line or environment names s.
func processesOf(t *testing.T, s string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), s) {
			found = append(found, f)
		}
	}
	return found
}

// The harness itself, as root and by the ordinary user's way.
func TestHarness(t *testing.T) {
	t.Parallel()
	t.Run("own", func(t *testing.T) { t.Parallel(); harness(t) })
	if os.Getuid() == 0 {
		t.Run("userns", func(t *testing.T) { t.Parallel(); harness(t, testnet.UserNamespace) })
	}
}

func harness(t *testing.T, opts ...testnet.Option) {
	begin := time.Now()
	l := New(t, opts...)
	br := l.Bridge("10.99.0.1/24")
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	g := l.Boot(Config{
		Name: "n1", MemMB: 256, Modules: []string{"dlm", "gfs2"}, Disks: []string{disk},
		Links: []Link{{Bridge: br, CIDR: "10.99.0.11/24"}},
	})[0]
	t.Logf("guest answers %.1f s after the start of the test", time.Since(begin).Seconds())

	if out := g.MustRun("hostname; id -u; cat /sys/class/net/eth0/address"); out != "n1\n0\n"+g.Port(0).MAC+"\n" {
		t.Errorf("identity: %q", out)
	}
	var exit *ExitError
	if out, err := g.Run("echo before; (exit 3); echo after"); !errors.As(err, &exit) || exit.Code != 3 || out != "before\n" {
		t.Errorf("failing script: %q %v, want it to stop with code 3", out, err)
	}
	if out := g.MustRun("seq 20000; echo end >&2"); strings.Count(out, "\n") != 20001 || !strings.HasSuffix(out, "\n20000\nend\n") {
		t.Errorf("long output: %d lines, %d bytes", strings.Count(out, "\n"), len(out))
	}
	// The device nodes have no udev to link them; the plock node is registered with the module.
	g.MustRun("for d in dlm-control dlm-monitor dlm_plock; do test -c /dev/misc/$d; done; test -b /dev/ubda")
	// A folder of both sides.
	g.MustRun("echo from guest > /lab/note; touch /root/mine; test -w /etc")
	if b, err := os.ReadFile(filepath.Join(l.Share, "note")); err != nil || string(b) != "from guest\n" {
		t.Errorf("shared file: %q %v", b, err)
	}
	// The network, and commands side by side.
	ln, err := l.Net.Hub().Listen("tcp4", br.IP()+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := strings.Cut(ln.Addr().String(), ":")
	c := g.Start("exec 3<>/dev/tcp/" + br.IP() + "/" + port + "; cat <&3")
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.RemoteAddr().String(); !strings.HasPrefix(got, "10.99.0.11:") {
		t.Errorf("guest connects from %s", got)
	}
	if _, err := c.Wait(50 * time.Millisecond); !errors.Is(err, ErrTimeout) {
		t.Errorf("waiting for a command that runs: %v", err)
	}
	if out := g.MustRun("echo meanwhile"); out != "meanwhile\n" {
		t.Errorf("second command: %q", out)
	}
	if err := c.Signal(9); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(DefaultTimeout); !errors.As(err, &exit) || exit.Code != 137 {
		t.Errorf("signalled command: %v", err)
	}
	// A process left behind does not hold the command.
	g.MustRun("sleep 600 & echo started")

	uptime := func() float64 {
		up, err := strconv.ParseFloat(strings.Fields(g.MustRun("cat /proc/uptime"))[0], 64)
		if err != nil {
			t.Fatal(err)
		}
		return up
	}
	tick := g.Start("while :; do echo tick; sleep 0.05; done")
	for end := time.Now().Add(DefaultTimeout); tick.Output() == ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no tick")
		}
	}
	before := uptime()
	if err := g.Freeze(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // what is under way arrives
	seen := len(tick.Output())
	const pause = time.Second
	time.Sleep(pause)
	if now := len(tick.Output()); now != seen {
		t.Errorf("a frozen guest wrote %d bytes", now-seen)
	}
	if err := g.Thaw(); err != nil {
		t.Fatal(err)
	}
	if after := uptime(); after-before < pause.Seconds() {
		t.Errorf("the guest's clock moved %.2f s over a pause of %v", after-before, pause)
	}
	if err := tick.Signal(15); err != nil {
		t.Fatal(err)
	}
	if _, err := tick.Wait(DefaultTimeout); !errors.As(err, &exit) {
		t.Errorf("tick: %v", err)
	}

	pending := g.Start("sleep 600")
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := pending.Wait(DefaultTimeout); !errors.Is(err, ErrGone) {
		t.Errorf("command of a killed guest: %v", err)
	}
	if _, err := g.Run("true"); !errors.Is(err, ErrGone) {
		t.Errorf("run in a killed guest: %v", err)
	}
	if left := processesOf(t, l.umls); len(left) != 0 {
		t.Errorf("processes of the guest are left: %v", left)
	}
	if _, err := os.Stat("/root/mine"); err == nil {
		t.Error("the guest wrote to the host's root")
	}
}

func TestWatchdogSavesTheTasksOfAHungGuest(t *testing.T) {
	t.Parallel()
	l := New(t)
	gs := l.Boot(Config{Name: "hung", MemMB: 256}, Config{Name: "frozen", MemMB: 256}, Config{Name: "mute", MemMB: 256})

	_, err := gs[0].RunTimeout(time.Second, "exec -a stuck-here sleep 600")
	if !errors.Is(err, ErrTimeout) {
		t.Fatalf("hung command: %v", err)
	}
	dump := func(g *Guest) string {
		b, err := os.ReadFile(g.tasksFile())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	d := dump(gs[0])
	for _, want := range []string{"command 0: did not end in time", "sysrq: Show Blocked State", "(labagent) state", "(sleep) state S\n[<0>] __switch_to", "hrtimer_nanosleep"} {
		if !strings.Contains(d, want) {
			t.Errorf("dump of %d bytes lacks %q:\n%.2000s", len(d), want, d)
		}
	}
	<-gs[0].Done()
	if _, err := gs[0].Run("true"); !errors.Is(err, ErrTimeout) {
		t.Errorf("run after the watchdog: %v, want its reason", err)
	}

	// A stopped kernel is let go first, else it tells nothing.
	if err := gs[1].Freeze(); err != nil {
		t.Fatal(err)
	}
	if _, err := gs[1].RunTimeout(500*time.Millisecond, "true"); !errors.Is(err, ErrTimeout) {
		t.Fatalf("command of a frozen guest: %v", err)
	}
	if d := dump(gs[1]); !strings.Contains(d, "(labagent) state") {
		t.Errorf("dump of the frozen guest: %.2000s", d)
	}
	// Without its agent the kernel tells by itself.
	_, err = gs[2].Start("kill -STOP $(cat /proc/[0-9]*/stat | awk '$2 == \"(labagent)\" { print $1 }'); sleep 600").Wait(time.Second)
	if !errors.Is(err, ErrTimeout) {
		t.Fatal(err)
	}
	if _, err := gs[2].RunTimeout(500*time.Millisecond, "true"); !errors.Is(err, ErrTimeout) {
		t.Fatalf("command of a mute guest: %v", err)
	}
	if d := dump(gs[2]); !strings.Contains(d, "no answer of the agent") || strings.Count(d, "\ntask ") < 20 || !strings.Contains(d, "schedule+") {
		t.Errorf("dump of the mute guest: %.2000s", d)
	}
	if left := processesOf(t, l.umls); len(left) != 0 {
		t.Errorf("processes are left: %v", left)
	}
}

func TestLifetimeEndsAGuest(t *testing.T) {
	t.Parallel()
	l := New(t)
	g := l.Boot(Config{Name: "short", MemMB: 256, Lifetime: 8 * time.Second})[0]
	_, err := g.Start("sleep 600").Wait(DefaultTimeout)
	if err == nil || !strings.Contains(err.Error(), "lifetime") {
		t.Errorf("after the lifetime: %v", err)
	}
}

func TestPoweroffAndReboot(t *testing.T) {
	t.Parallel()
	l := New(t)
	br := l.Bridge("10.99.0.1/24")
	g := l.Boot(Config{Name: "off", MemMB: 256, Links: []Link{{br, "10.99.0.11/24"}}})[0]
	const who = "cat /proc/sys/kernel/random/boot_id; cat /sys/class/net/eth0/address"
	first := g.MustRun(who)
	if err := g.Poweroff(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(g.Console(), "reboot: System halted") {
		t.Errorf("console:\n%s", g.Console())
	}
	again := g.Reboot()
	second := again.MustRun(who)
	if len(first) != len(second) || first[:36] == second[:36] || first[36:] != second[36:] {
		t.Errorf("before %q, after %q: want another boot id and the same link", first, second)
	}
	if _, err := g.Run("true"); !errors.Is(err, ErrGone) {
		t.Errorf("run in the guest before: %v", err)
	}
	third := again.Reboot().MustRun(who) // from a running kernel: a crash
	if third[:36] == second[:36] || third[36:] != second[36:] {
		t.Errorf("before %q, after %q: want another boot id and the same link", second, third)
	}
}
