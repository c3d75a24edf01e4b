// Package testnet builds small networks of the test's own out of Linux network namespaces: a hub with bridges, nodes with
// addresses on them, taps for guests, and faults between any two ends.
//
// Every namespace is anonymous and lives exactly as long as the process that holds it, and the holder lives as long as the
// test: nothing has to be deleted, nothing is left behind when a test binary is killed, and no name can collide. As root the
// namespaces are made directly; an ordinary user gets them inside a user namespace (unshare -Urn). All work on them is done
// by iproute2, nft and nsenter on the holder's pid, which is the same in both cases.
//
// Faults are nftables rules of the netdev family on the hub's end of each link, so they act below ARP and IP, hit guests
// and nodes alike, and each direction has its own rule. Latency is made by Proxy, because no netem is to be counted on.
//
// Only tests import it. A test that uses it needs no call of its own in TestMain.
package testnet

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// Option changes how New makes the namespaces.
type Option int

// UserNamespace takes the ordinary user's way also as root.
const UserNamespace Option = 1

// Net is one hub namespace and the nodes around it. Methods fail the test on error. They may be called from several
// goroutines, but those that fail the test only from the test's own.
type Net struct {
	t    testing.TB
	user bool // inside a user namespace
	hub  *Node

	mu struct {
		sync.Mutex
		bridges int
		ports   []*Port
	}
}

// New makes the hub namespace with its loopback up. Where the machine allows neither way the test is skipped with a line
// that says why, and fails where CI=true.
func New(t testing.TB, opts ...Option) *Net {
	t.Helper()
	testproc.Need(t, "ip", "nft", "nsenter", "unshare")
	n := &Net{t: t}
	why := probe("-n")
	if why != nil || len(opts) > 0 && opts[0] == UserNamespace {
		n.user = true
		if err := probe("-Urn"); err != nil {
			testproc.SkipOrFail(t, fmt.Sprintf("no network namespace: unshare -n: %v; unshare -Urn: %v", why, err))
		}
	}
	n.hub = n.newNode("hub")
	n.hub.mustRun("nft", "add", "table", "netdev", table)
	return n
}

const table = "faults"

func probe(flags string) error {
	prog, err := testproc.Find("unshare")
	if err != nil {
		return err
	}
	if out, err := exec.Command(prog, flags, "true").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// User says whether the namespaces belong to a user namespace, where uid 0 is the test's own user and files of others seem
// to belong to nobody.
func (n *Net) User() bool { return n.user }

// Hub is the namespace that holds the bridges and taps. Processes started in it reach every bridge.
func (n *Net) Hub() *Node { return n.hub }

// Node makes a namespace with nothing but a loopback; Bridge.Attach gives it links.
func (n *Net) Node(name string) *Node {
	n.t.Helper()
	return n.newNode(name)
}

// Bridge is a network segment. The hub has the address Addr on it.
type Bridge struct {
	net  *Net
	id   int
	dev  string
	mac  string
	addr netip.Prefix
	hub  *Port
}

// Bridge makes a segment; cidr is the hub's address on it, such as 10.99.0.1/24.
func (n *Net) Bridge(cidr string) *Bridge {
	n.t.Helper()
	addr, err := netip.ParsePrefix(cidr)
	if err != nil {
		n.t.Fatalf("bridge: %v", err)
	}
	n.mu.Lock()
	id := n.mu.bridges
	n.mu.bridges++
	n.mu.Unlock()
	b := &Bridge{net: n, id: id, dev: "br" + strconv.Itoa(id), mac: mac(id, 0), addr: addr}
	b.hub = &Port{Dev: b.dev, MAC: b.mac, Addr: addr, bridge: b}
	n.hub.ip(
		fmt.Sprintf("link add %s address %s type bridge forward_delay 0 stp_state 0 mcast_snooping 0", b.dev, b.mac),
		fmt.Sprintf("addr add %s dev %s", addr, b.dev),
		fmt.Sprintf("link set %s up", b.dev),
	)
	return b
}

// IP returns the hub's address on the segment, without the length.
func (b *Bridge) IP() string { return b.addr.Addr().String() }

// Hub is the hub's own end of the segment, for faults to and from processes in the hub.
func (b *Bridge) Hub() *Port { return b.hub }

// mac gives locally administered addresses that are unique in one Net.
func mac(bridge, port int) string {
	return fmt.Sprintf("02:bb:00:%02x:%02x:%02x", bridge, port>>8, port&255)
}

// Port is one end of a segment: a node's link, a guest's tap, or the hub itself.
type Port struct {
	Dev  string       // device in the hub
	MAC  string       // address of the far end: the node's or the guest's interface
	Addr netip.Prefix // address of the far end; zero for a tap, whose guest has it
	If   string       // device in the node; empty for a tap

	bridge *Bridge
	node   *Node
}

// IP returns the far end's address without the length.
func (p *Port) IP() string { return p.Addr.Addr().String() }

func (b *Bridge) newPort(addr netip.Prefix, node *Node) *Port {
	n := b.net
	n.mu.Lock()
	defer n.mu.Unlock()
	k := len(n.mu.ports) + 1
	p := &Port{Dev: "p" + strconv.Itoa(k), MAC: mac(b.id, k), Addr: addr, bridge: b, node: node}
	n.mu.ports = append(n.mu.ports, p)
	return p
}

// Attach gives the node an interface on the segment with the address cidr, up.
func (b *Bridge) Attach(node *Node, cidr string) *Port {
	t := b.net.t
	t.Helper()
	addr, err := netip.ParsePrefix(cidr)
	if err != nil {
		t.Fatalf("attach %s: %v", node.name, err)
	}
	p := b.newPort(addr, node)
	p.If = fmt.Sprintf("eth%d", node.links)
	node.links++
	b.net.hub.ip(
		fmt.Sprintf("link add %s type veth peer name %s address %s netns %d", p.Dev, p.If, p.MAC, node.proc.PID()),
		fmt.Sprintf("link set %s master %s up", p.Dev, b.dev),
	)
	node.ip(
		fmt.Sprintf("addr add %s dev %s", addr, p.If),
		fmt.Sprintf("link set %s up", p.If),
	)
	p.chains()
	return p
}

// Tap makes a tap device on the segment for a guest, which shall use the MAC of the port.
func (b *Bridge) Tap() *Port {
	t := b.net.t
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		testproc.SkipOrFail(t, fmt.Sprintf("no tap device: %v", err))
	}
	f.Close()
	p := b.newPort(netip.Prefix{}, nil)
	b.net.hub.ip(
		fmt.Sprintf("tuntap add dev %s mode tap", p.Dev),
		fmt.Sprintf("link set %s master %s up", p.Dev, b.dev),
	)
	p.chains()
	return p
}

// Down cuts the link: both ends lose their carrier.
func (p *Port) Down() { p.bridge.net.t.Helper(); p.bridge.net.hub.ip("link set " + p.Dev + " down") }

// Up restores the link.
func (p *Port) Up() { p.bridge.net.t.Helper(); p.bridge.net.hub.ip("link set " + p.Dev + " up") }

// DelAddr removes the node's address and leaves the link up: what an administrator's `ip addr del` does.
func (p *Port) DelAddr() {
	p.bridge.net.t.Helper()
	p.ownAddr().ip(fmt.Sprintf("addr del %s dev %s", p.Addr, p.If))
}

// AddAddr gives the address back.
func (p *Port) AddAddr() {
	p.bridge.net.t.Helper()
	p.ownAddr().ip(fmt.Sprintf("addr add %s dev %s", p.Addr, p.If))
}

func (p *Port) ownAddr() *Node {
	if p.node == nil {
		p.bridge.net.t.Helper()
		p.bridge.net.t.Fatalf("port %s has no node; change a guest's address inside the guest", p.Dev)
	}
	return p.node
}

// Fault is a set of drop rules.
type Fault struct {
	net   *Net
	rules []rule
}

type rule struct{ chain, handle string }

func (p *Port) chains() {
	p.bridge.net.hub.nft(
		fmt.Sprintf("add chain netdev %s in_%s { type filter hook ingress device \"%s\" priority 0; }", table, p.Dev, p.Dev),
		fmt.Sprintf("add chain netdev %s out_%s { type filter hook egress device \"%s\" priority 0; }", table, p.Dev, p.Dev),
	)
}

// Drop discards every frame that from sends to to, in this direction only; broadcasts of from still pass. A nil from means
// everyone, a nil to means everything that from sends, broadcasts too. Ports of one call lie on one segment.
func (n *Net) Drop(from, to *Port) *Fault {
	n.t.Helper()
	return n.Loss(from, to, 100)
}

// Loss discards each frame of Drop's choice with the given probability in percent, independently at random.
func (n *Net) Loss(from, to *Port, percent float64) *Fault {
	n.t.Helper()
	if percent <= 0 || percent > 100 || from == nil && to == nil {
		n.t.Fatalf("loss: want a port and more than 0 up to 100 percent, have %v", percent)
	}
	match := ""
	var chains []string
	switch {
	case to == nil && from.isHub():
		match = "ether saddr " + from.MAC + " "
		chains = from.bridge.chainsOf("out_")
	case to == nil:
		chains = []string{"in_" + from.Dev}
	case to.isHub() && from == nil:
		match = "ether daddr " + to.MAC + " "
		chains = to.bridge.chainsOf("in_")
	case to.isHub():
		match = "ether daddr " + to.MAC + " "
		chains = []string{"in_" + from.Dev}
	case from == nil:
		chains = []string{"out_" + to.Dev}
	default:
		// Not the ingress of from: a frame between two nodes and one to the hub then follow one rule.
		match = "ether saddr " + from.MAC + " ether daddr " + to.MAC + " "
		chains = []string{"out_" + to.Dev}
	}
	if percent < 100 {
		match += fmt.Sprintf("numgen random mod 10000 < %d ", int(percent*100))
	}
	f := &Fault{net: n}
	for _, c := range chains {
		out := n.hub.mustRun("nft", "-e", "-a", "add", "rule", "netdev", table, c, match+"counter drop")
		_, handle, ok := strings.Cut(out, "# handle ")
		if !ok {
			n.t.Fatalf("loss: nft named no handle: %q", out)
		}
		f.rules = append(f.rules, rule{c, strings.Fields(handle)[0]})
	}
	return f
}

func (p *Port) isHub() bool { return p.bridge.hub == p }

func (b *Bridge) chainsOf(prefix string) []string {
	b.net.mu.Lock()
	defer b.net.mu.Unlock()
	var c []string
	for _, p := range b.net.mu.ports {
		if p.bridge == b {
			c = append(c, prefix+p.Dev)
		}
	}
	return c
}

// Heal ends the fault. A second call does nothing.
func (f *Fault) Heal() {
	f.net.t.Helper()
	for _, r := range f.rules {
		f.net.hub.mustRun("nft", "delete", "rule", "netdev", table, r.chain, "handle", r.handle)
	}
	f.rules = nil
}

// Dropped counts the frames that the fault has discarded so far, so that a test can prove that its fault acted.
func (f *Fault) Dropped() int {
	f.net.t.Helper()
	total := 0
	for _, r := range f.rules {
		out := f.net.hub.mustRun("nft", "-a", "list", "chain", "netdev", table, r.chain)
		for line := range strings.Lines(out) {
			if !strings.HasSuffix(strings.TrimSpace(line), "# handle "+r.handle) {
				continue
			}
			if _, count, ok := strings.Cut(line, "counter packets "); ok {
				k, err := strconv.Atoi(strings.Fields(count)[0])
				if err != nil {
					f.net.t.Fatalf("dropped: %q: %v", line, err)
				}
				total += k
			}
		}
	}
	return total
}

// Capture writes the segment's frames to a pcap file until the returned process is closed or the test ends. It needs
// tshark's dumpcap.
func (b *Bridge) Capture(file string) *testproc.Proc {
	b.net.t.Helper()
	testproc.Need(b.net.t, "dumpcap")
	p := b.net.hub.Start(testproc.Spec{Name: "dumpcap-" + b.dev, Args: []string{"dumpcap", "-q", "-i", b.dev, "-w", file}})
	p.MustWaitFor(b.net.t, "^File: ", 10*time.Second)
	return p
}
