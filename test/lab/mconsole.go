package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/test/lab/internal/agent"
)

// Sysrq presses a magic key in the guest and returns what the kernel has to say, for instance all blocked tasks for 'w'. The
// kernel answers by itself: no process of the guest has to run. The key 't' is refused: in UML 6.1 it panics at the first idle
// kworker, whose printing reads through a null pointer that UML does not catch. Use Tasks.
func (g *Guest) Sysrq(key byte) (string, error) {
	if key == 't' {
		return "", fmt.Errorf("sysrq t of %s would make this kernel panic; use Tasks", g.cfg.Name)
	}
	text, err := g.mconsole("sysrq " + string(key))
	if err != nil {
		return text, fmt.Errorf("sysrq %c of %s: %w", key, g.cfg.Name, err)
	}
	return text, nil
}

// Tasks returns what sysrq t would: the state and the kernel stack of every task, behind the blocked tasks of sysrq w. Where
// the agent does not answer it returns the stacks as the kernel itself shows them, by number and without names. With an error
// the text so far is returned too.
func (g *Guest) Tasks() (string, error) {
	dump, err := g.Sysrq('w')
	if err != nil {
		return dump, err
	}
	c := g.submit(func(id int) (agent.Request, error) { return agent.Request{ID: id, Op: agent.Tasks}, nil })
	all, err := c.Wait(mconsoleTimeout)
	dump += all
	if err == nil {
		return dump, nil
	}
	dump += fmt.Sprintf("no answer of the agent: %v\n", err)
	// The last field of loadavg is the newest process id.
	load, err := g.mconsole("proc loadavg")
	if err != nil {
		return dump, err
	}
	f := strings.Fields(load)
	if len(f) == 0 {
		return dump, fmt.Errorf("mconsole: empty loadavg of %s", g.cfg.Name)
	}
	last, err := strconv.Atoi(f[len(f)-1])
	if err != nil {
		return dump, fmt.Errorf("mconsole: loadavg of %s: %w", g.cfg.Name, err)
	}
	for pid := 1; pid <= last; pid++ {
		stack, err := g.mconsole("stack " + strconv.Itoa(pid))
		switch {
		case err == nil:
			dump += fmt.Sprintf("task %d\n%s\n", pid, strings.TrimSpace(stack))
		case !errors.Is(err, errRefused):
			return dump, err
		}
	}
	return dump, nil
}

const mconsoleTimeout = 5 * time.Second

func (g *Guest) mconsole(command string) (string, error) {
	return mconsole(filepath.Join(g.lab.umls, g.cfg.Name), command, mconsoleTimeout)
}

/*
UML's management console, one datagram a request on the unix socket DIR/mconsole, in the byte order of the host:

	request  u32 magic 0xcafebabe | u32 version 2 | u32 length | 512 bytes of command
	reply    u32 error | u32 more replies follow | u32 length | 512 bytes of text
*/
const (
	mconsoleMagic   = 0xcafebabe
	mconsoleVersion = 2
	mconsoleText    = 512
)

var errRefused = errors.New("mconsole: the kernel refuses")

// mconsole sends one command to the kernel whose UML folder is dir and returns its answer. The socket of the client lies in
// the same folder: an abstract address would belong to the test's network namespace, where the kernel does not see it.
func mconsole(dir, command string, limit time.Duration) (string, error) {
	if len(command) >= mconsoleText {
		return "", fmt.Errorf("mconsole: command of %d bytes is too long", len(command))
	}
	own, err := os.MkdirTemp(dir, "c")
	if err != nil {
		return "", fmt.Errorf("mconsole: %w", err)
	}
	defer os.RemoveAll(own)
	c, err := net.DialUnix("unixgram",
		&net.UnixAddr{Name: filepath.Join(own, "s"), Net: "unixgram"},
		&net.UnixAddr{Name: filepath.Join(dir, "mconsole"), Net: "unixgram"})
	if err != nil {
		return "", fmt.Errorf("mconsole: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", fmt.Errorf("mconsole: %w", err)
	}
	msg := make([]byte, 12+mconsoleText)
	binary.NativeEndian.PutUint32(msg[0:], mconsoleMagic)
	binary.NativeEndian.PutUint32(msg[4:], mconsoleVersion)
	binary.NativeEndian.PutUint32(msg[8:], uint32(len(command)))
	copy(msg[12:], command)
	if _, err := c.Write(msg); err != nil {
		return "", fmt.Errorf("mconsole: %w", err)
	}
	var text strings.Builder
	for {
		k, err := c.Read(msg)
		if err != nil {
			return text.String(), fmt.Errorf("mconsole: %w", err)
		}
		if k < 12 {
			return text.String(), fmt.Errorf("mconsole: reply of %d bytes", k)
		}
		failed, more := binary.NativeEndian.Uint32(msg[0:]), binary.NativeEndian.Uint32(msg[4:])
		part := msg[12:k]
		if n := binary.NativeEndian.Uint32(msg[8:]); int(n) < len(part) {
			part = part[:n]
		}
		text.Write(bytes.TrimRight(part, "\x00"))
		if failed != 0 {
			return text.String(), fmt.Errorf("%w %s: %s", errRefused, command, text.String())
		}
		if more == 0 {
			return text.String(), nil
		}
	}
}
