package lab

import (
	"fmt"
	"strings"
	"time"
)

// StartInitiator gives the guest the iSCSI name and starts open-iscsi's daemon with an empty record database.
func (g *Guest) StartInitiator(name string) {
	g.t.Helper()
	g.MustRun(fmt.Sprintf(`rm -rf /etc/iscsi/nodes /etc/iscsi/send_targets /etc/iscsi/initiatorname.iscsi
echo InitiatorName=%s >/etc/iscsi/initiatorname.iscsi`, name))
	g.StartISCSID()
}

// StartISCSID starts open-iscsi's daemon with the files below /etc/iscsi as they are, and a log in /run/iscsid.log.
func (g *Guest) StartISCSID() {
	g.t.Helper()
	g.MustRun(`modprobe -a iscsi_tcp sd_mod sg
mkdir -p /run/lock/iscsi
iscsid -f >/run/iscsid.log 2>&1 &
for i in $(seq 200); do
	if grep -q ISCSIADM_ABSTRACT_NAMESPACE /proc/net/unix; then exit 0; fi
	sleep 0.05
done
cat /run/iscsid.log; exit 1`)
}

// Discover runs a SendTargets discovery at the portal, an address with an optional port, and returns iscsiadm's lines,
// "ADDRESS:PORT,GROUP NAME" each.
func (g *Guest) Discover(portal string) []string {
	g.t.Helper()
	return strings.Split(strings.TrimSpace(g.MustRun("iscsiadm -m discovery -t sendtargets -p "+portal)), "\n")
}

// Login logs in to a discovered target at one portal and returns the block devices of the new session (/dev/sda, ...), as
// many as disks says.
func (g *Guest) Login(target, portal string, disks int) []string {
	g.t.Helper()
	g.MustRun(fmt.Sprintf("iscsiadm -m node -T %s -p %s -l", target, portal))
	return g.Disks(target, portal, disks)
}

// Disks waits for the block devices of a session, as many as disks says, and returns them. Nothing but sysfs tells when they
// appear: there is no udev.
func (g *Guest) Disks(target, portal string, disks int) []string {
	g.t.Helper()
	// Words of bash only: a program for each look would take longer than what is waited for.
	out := g.MustRun(fmt.Sprintf(`devs=()
for i in $(seq 300); do
	for s in /sys/class/iscsi_session/session*; do
		read -r name <$s/targetname || continue
		[ "$name" = %[1]s ] || continue
		c=($s/device/connection*/iscsi_connection/connection*)
		read -r address <$c/persistent_address || continue
		read -r port <$c/persistent_port || continue
		[ "$address:$port" = %[2]s ] || continue
		devs=()
		for d in $s/device/target*/*/block/*; do [ -e $d ] && devs+=(/dev/${d##*/}); done
		if [ ${#devs[@]} = %[3]d ]; then echo disks: ${devs[@]}; exit 0; fi
	done
	sleep 0.05
done
echo "want %[3]d disks of the session, have: ${devs[@]}"; exit 1`, target, withPort(portal), disks))
	_, devs, _ := strings.Cut(out, "disks: ")
	return strings.Fields(devs)
}

func withPort(portal string) string {
	if strings.Contains(portal, ":") {
		return portal
	}
	return portal + ":3260"
}

// Logout ends the session and waits until its disks are gone.
func (g *Guest) Logout(target, portal string) {
	g.t.Helper()
	g.MustRun(fmt.Sprintf("iscsiadm -m node -T %s -p %s -u", target, portal))
}

// Within waits until cond is true and fails the test after limit.
func (l *Lab) Within(limit time.Duration, what string, cond func() bool) {
	l.t.Helper()
	for end := time.Now().Add(limit); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("not within %v: %s", limit, what)
		}
	}
}
