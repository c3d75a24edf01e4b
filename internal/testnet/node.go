package testnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// Node is one network namespace. Its holder is this test binary started once more (see init), which also opens sockets in
// the namespace for the test: a Go process with threads cannot enter another user namespace itself.
type Node struct {
	net   *Net
	name  string
	proc  *testproc.Proc
	sock  *os.File // requests to the holder; its end of file ends the holder
	links int
}

const holderEnv = "BLOCKHOUSE_TESTNET_HOLDER"

func init() {
	if os.Getenv(holderEnv) == "" {
		return
	}
	// This process is a holder: no test runs in it.
	if err := hold(3); err != nil {
		fmt.Fprintln(os.Stderr, "namespace holder:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (n *Net) newNode(name string) *Node {
	n.t.Helper()
	self, err := os.Executable()
	if err != nil {
		n.t.Fatalf("node %s: %v", name, err)
	}
	ours, theirs, err := socketpair()
	if err != nil {
		n.t.Fatalf("node %s: %v", name, err)
	}
	defer theirs.Close()
	unshare := []string{"unshare", "-n", self}
	switch {
	case n.user && n.hub == nil:
		unshare[1] = "-Urn"
	case n.user:
		unshare = n.hub.Command(unshare...)
	}
	nd := &Node{net: n, name: name, sock: ours}
	// Registered before the holder's own end, so that it runs after: the socket closes when the holder is gone.
	n.t.Cleanup(func() { ours.Close() })
	nd.proc = testproc.Start(n.t, testproc.Spec{
		Name: "netns-" + name, Args: unshare, Env: []string{holderEnv + "=1"}, ExtraFiles: []*os.File{theirs},
	})
	nd.proc.MustWaitFor(n.t, "^ready$", 20*time.Second)
	nd.ip("link set lo up")
	return nd
}

func socketpair() (*os.File, *os.File, error) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fd[0]), "holder"), os.NewFile(uintptr(fd[1]), "holder"), nil
}

// Name is the name given to Net.Node.
func (nd *Node) Name() string { return nd.name }

// PID is the process that holds the namespace, for nsenter by hand.
func (nd *Node) PID() int { return nd.proc.PID() }

// Command puts nsenter before a command so that it runs in the node. nsenter replaces itself by the command: the pid and
// the signals are the command's.
func (nd *Node) Command(args ...string) []string {
	c := []string{"nsenter", "--target", strconv.Itoa(nd.proc.PID())}
	if nd.net.user {
		c = append(c, "--user", "--preserve-credentials")
	}
	return append(append(c, "--net", "--"), args...)
}

// Start is testproc.Start in the node.
func (nd *Node) Start(s testproc.Spec) *testproc.Proc {
	nd.net.t.Helper()
	if len(s.Args) > 0 {
		prog, err := testproc.Find(s.Args[0])
		if err != nil {
			nd.net.t.Fatalf("start %s: %v", s.Name, err)
		}
		s.Args = nd.Command(append([]string{prog}, s.Args[1:]...)...)
	}
	return testproc.Start(nd.net.t, s)
}

// Run runs a short command in the node and returns its output (stdout and stderr).
func (nd *Node) Run(args ...string) (string, error) { return nd.run("", args...) }

func (nd *Node) run(stdin string, args ...string) (string, error) {
	prog, err := testproc.Find(args[0])
	if err != nil {
		return "", err
	}
	argv := nd.Command(append([]string{prog}, args[1:]...)...)
	if argv[0], err = testproc.Find(argv[0]); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("node %s: %s: %w: %s", nd.name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

func (nd *Node) mustRun(args ...string) string {
	nd.net.t.Helper()
	out, err := nd.Run(args...)
	if err != nil {
		nd.net.t.Fatal(err)
	}
	return out
}

func (nd *Node) ip(lines ...string) {
	nd.net.t.Helper()
	if _, err := nd.run(strings.Join(lines, "\n")+"\n", "ip", "-batch", "-"); err != nil {
		nd.net.t.Fatalf("%v (%s)", err, strings.Join(lines, "; "))
	}
}

func (nd *Node) nft(lines ...string) {
	nd.net.t.Helper()
	if _, err := nd.run(strings.Join(lines, "\n")+"\n", "nft", "-f", "-"); err != nil {
		nd.net.t.Fatalf("%v (%s)", err, strings.Join(lines, "; "))
	}
}

// Listen opens a listening TCP socket in the node for the test's own use. network is tcp, tcp4 or tcp6.
func (nd *Node) Listen(network, addr string) (net.Listener, error) {
	f, err := nd.request(context.Background(), request{Op: "listen", Network: network, Addr: addr})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return net.FileListener(f)
}

// Dial connects from the node. The holder gives up after 10 s at the latest.
func (nd *Node) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	f, err := nd.request(ctx, request{Op: "dial", Network: network, Addr: addr})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return net.FileConn(f)
}

type request struct{ Op, Network, Addr string }

// request sends a request and, along with it, the socket on which the holder shall answer, so that requests do not wait for
// each other.
func (nd *Node) request(ctx context.Context, rq request) (*os.File, error) {
	fail := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("node %s: %s %s: %w", nd.name, rq.Op, rq.Addr, err)
	}
	ours, theirs, err := socketpair()
	if err != nil {
		return fail(err)
	}
	defer ours.Close()
	msg, err := json.Marshal(rq)
	if err != nil {
		return fail(err)
	}
	err = unix.Sendmsg(int(nd.sock.Fd()), msg, unix.UnixRights(int(theirs.Fd())), nil, unix.MSG_NOSIGNAL)
	theirs.Close()
	if err != nil {
		return fail(fmt.Errorf("ask the holder: %w", err))
	}
	deadline := time.Now().Add(20 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	tv := unix.NsecToTimeval(max(int64(time.Until(deadline)), int64(time.Millisecond)))
	if err := unix.SetsockoptTimeval(int(ours.Fd()), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fail(err)
	}
	text, f, err := recv(int(ours.Fd()))
	switch {
	case errors.Is(err, unix.EAGAIN):
		return fail(os.ErrDeadlineExceeded)
	case err != nil:
		return fail(err)
	case f == nil:
		return fail(errors.New(string(text)))
	}
	return f, nil
}

// recv receives one message with at most one descriptor.
func recv(fd int) ([]byte, *os.File, error) {
	buf, oob := make([]byte, 4096), make([]byte, 64)
	for {
		k, ok, _, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:ok])
		if err != nil || len(msgs) == 0 {
			return buf[:k], nil, err
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) == 0 {
			return buf[:k], nil, err
		}
		return buf[:k], os.NewFile(uintptr(fds[0]), "passed"), nil
	}
}

// hold serves requests until the other end is closed, which is also what happens when the test binary dies.
func hold(fd int) error {
	fmt.Println("ready")
	for {
		msg, reply, err := recv(fd)
		if err != nil {
			return err
		}
		if len(msg) == 0 && reply == nil {
			return nil
		}
		if reply == nil {
			return errors.New("request without a reply socket")
		}
		go answer(msg, reply) // the process ends with the namespace; nobody waits for a dial in it
	}
}

func answer(msg []byte, reply *os.File) {
	defer reply.Close()
	text, rights := []byte("ok"), []byte(nil)
	f, err := open(msg)
	if err != nil {
		text = []byte(err.Error())
	} else {
		defer f.Close()
		rights = unix.UnixRights(int(f.Fd()))
	}
	_ = unix.Sendmsg(int(reply.Fd()), text, rights, nil, unix.MSG_NOSIGNAL) // the asker may have given up
}

func open(msg []byte) (*os.File, error) {
	var rq request
	if err := json.Unmarshal(msg, &rq); err != nil {
		return nil, err
	}
	switch rq.Op {
	case "listen":
		l, err := net.Listen(rq.Network, rq.Addr)
		if err != nil {
			return nil, err
		}
		defer l.Close()
		return l.(*net.TCPListener).File()
	case "dial":
		c, err := net.DialTimeout(rq.Network, rq.Addr, 10*time.Second)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		return c.(*net.TCPConn).File()
	}
	return nil, fmt.Errorf("unknown request %q", rq.Op)
}
