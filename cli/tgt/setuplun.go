package tgt

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
)

const setupUsage = `usage:
	tgt-setup-lun -n tgt_name -d dev -b bs_name -B block_size -t transport -C control_port [initiator_IP1 initiator_IP2 ...]
A target with a disk in one command. Without addresses it lets everybody in.
The same with other words: clusteradm target, lun, acl.
`

// SetupLUN runs tgt-setup-lun and gives its exit code.
func SetupLUN(ctx context.Context, args []string, o IO) int {
	ctx, cancel := context.WithTimeout(ctx, 10*timeout)
	defer cancel()
	s := newSession(ctx, "tgt-setup-lun", o)
	defer s.cl.Close()
	err := (&setup{session: s}).run(args)
	var e exit
	if errors.As(err, &e) {
		return int(e)
	}
	return s.report(err)
}

// setup is one run of tgt-setup-lun.
type setup struct {
	*session
	val  map[byte]string
	port []string // what stands before every command
}

// say prints a refusal; the tool knows one exit code.
func (u *setup) say(format string, a ...any) error {
	u.printf("Error: "+format+"\n", a...)
	return exit(1)
}

func (u *setup) tgtadm(args ...string) bool {
	return Tgtadm(u.ctx, append(slices.Clone(u.port), args...), IO{Out: io.Discard, Err: u.Err, Socket: u.Socket}) == 0
}

func (u *setup) run(args []string) error {
	if len(args) == 0 {
		u.printf("%s", setupUsage)
		return exit(1)
	}
	// As getopts of a shell: options end at the first other word.
	u.val = map[byte]string{}
	for len(args) > 0 && len(args[0]) > 1 && args[0][0] == '-' && args[0] != "--" {
		letter, v := args[0][1], args[0][2:]
		args = args[1:]
		switch {
		case letter == 'h':
			u.printf("%s", setupUsage)
			return exit(1)
		case !strings.ContainsRune("dnbBtC", rune(letter)):
			fmt.Fprintf(u.Err, "tgt-setup-lun: illegal option -- %c\n", letter)
			return exit(1) // the real tool goes on without it
		case v == "" && len(args) == 0:
			fmt.Fprintf(u.Err, "tgt-setup-lun: option requires an argument -- %c\n", letter)
			return exit(1)
		case v == "":
			v, args = args[0], args[1:]
		}
		u.val[letter] = v
	}
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	dev, name := u.val['d'], u.val['n']
	switch st, err := os.Stat(dev); {
	case dev == "":
		return u.say("a device is mandatory")
	case !strings.HasPrefix(dev, "volume:") && (err != nil || st.IsDir()):
		return u.say("%s is not a device", dev)
	case name == "":
		return u.say("target name is mandatory")
	}
	if _, err := u.status(); err != nil {
		u.printf("tgtd is not running\nExiting...\n")
		u.report(err)
		return exit(1)
	}
	if p := u.val['C']; p != "" {
		u.printf("Control port: %s\n", p)
		u.port = []string{"-C", p}
	}
	lld := u.val['t']
	if lld == "" {
		lld = "iscsi"
	}
	u.port = append(u.port, "--lld", lld)
	u.printf("Using transport: %s\n", lld)
	if !strings.HasPrefix(name, "iqn") {
		host, err := os.Hostname()
		if err != nil {
			return invalid("find the host's name: %w", err)
		}
		host, _, _ = strings.Cut(host, ".")
		name = "iqn.2001-04.com." + host + "-" + name
	}
	return u.make(name, dev, args)
}

// make makes the target or takes the one that is there, then the LUN, then the rules.
func (u *setup) make(name, dev string, initiators []string) error {
	i := slices.IndexFunc(u.st.Targets, func(t api.Target) bool { return strings.EqualFold(t.IQN, name) })
	made := i < 0
	var t api.Target
	if made {
		t.TID = 1
		for slices.ContainsFunc(u.st.Targets, func(x api.Target) bool { return x.TID == t.TID }) {
			t.TID++
		}
		u.printf("Creating new target (name=%s, tid=%d)\n", name, t.TID)
		if !u.tgtadm("--op", "new", "--mode", "target", "--tid", strconv.Itoa(t.TID), "-T", name) {
			return u.say("failed to create target (name=%s, tid=%d)", name, t.TID)
		}
	} else {
		t = u.st.Targets[i]
		u.printf("Error: target named %s already exists\n", name)
		if !u.yes() {
			return exit(1)
		}
	}
	tid := strconv.Itoa(t.TID)
	undo := func() error {
		if made {
			u.printf("Deleting new target, tid=%s\n", tid)
			if !u.tgtadm("--op", "delete", "--mode", "target", "--tid", tid) {
				u.printf("Error: failed to delete target, tid=%s\n", tid)
			}
		}
		return exit(1)
	}
	lun := 1
	for findLUN(&t, lun) != nil {
		lun++
	}
	u.printf("Adding a logical unit (%s) to target, tid=%s\n", dev, tid)
	add := []string{"--op", "new", "--mode", "logicalunit", "--tid", tid, "--lun", strconv.Itoa(lun), "-b", dev}
	if b := u.val['b']; b != "" {
		u.printf("Setting backing store type: %s\n", b)
		add = append(add, "-E", b)
	}
	if y := u.val['B']; y != "" {
		add = append(add, "--blocksize", y)
	}
	if !u.tgtadm(add...) {
		u.printf("Error: failed to add a logical unit (%s) to target, tid=%s\n", dev, tid)
		return undo()
	}
	bind := func(a string) bool { return u.tgtadm("--op", "bind", "--mode", "target", "--tid", tid, "-I", a) }
	have := rules(&t.ACL)
	switch {
	case len(initiators) > 0:
		u.printf("Accepting connections from %s\n", strings.Join(initiators, " "))
		bad := false
		for _, a := range initiators {
			if !slices.Contains(have, a) && !bind(a) {
				u.printf("Error: could not assign initiator %s to the target\n", a)
				bad = true
			}
		}
		if bad {
			return exit(1) // the real tool says 0 of a disk that somebody cannot reach
		}
	case !slices.Contains(have, "ALL"):
		u.printf("Accepting connections from all initiators\n")
		if !bind("ALL") {
			u.printf("Error: failed to set access for all initiators\n")
			return undo()
		}
	}
	return nil
}

// yes asks whether the target that exists gets another LUN. As read -p of a shell, the
// question is seen on a terminal only.
func (u *setup) yes() bool {
	if u.In == nil {
		return false
	}
	if f, ok := u.In.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			fmt.Fprint(u.Err, "Add a new lun to the existing target? (yes/NO): ")
		}
	}
	l, err := bufio.NewReader(u.In).ReadString('\n')
	return (err == nil || errors.Is(err, io.EOF)) && strings.TrimRight(l, "\n") == "yes"
}
