package lab

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// matches compares text with what was expected of it, line by line. "…" in a line of want stands for anything.
func matches(text, want string) bool {
	re := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(want)), "…", "[^\n]*")
	return regexp.MustCompile("^" + re + "$").MatchString(strings.TrimSpace(text))
}

// expect runs a line in the guest and compares its whole output (both streams) and its exit code.
func expect(t *testing.T, g *Guest, line string, code int, want string) {
	t.Helper()
	out, err := g.Run(line)
	got := 0
	var exit *ExitError
	switch {
	case errors.As(err, &exit):
		got = exit.Code
	case err != nil:
		t.Fatalf("$ %s\n%s%v", line, out, err)
	}
	if got != code || !matches(out, want) {
		t.Errorf("$ %s\n%swith exit code %d; want %d and\n%s", line, out, got, code, want)
	}
}

// The client's part of the tutorial, line by line, in a real kernel with open-iscsi; then what the tutorial leaves out: every
// pair of digests. The lines are the tutorial's own, addresses and names included.
func TestScenario2Tutorial(t *testing.T) {
	begin := time.Now()
	step := func(what string) { t.Logf("%5.1f s  %s", time.Since(begin).Seconds(), what) }
	testproc.Need(t, "iscsid", "iscsiadm", "iscsi-iname", "mkfs.ext4", "tshark", "dumpcap")
	l := New(t)
	br := l.Bridge("192.168.0.11/24")
	s := serve(t, l, br)
	const iqn = "iqn.2010-8.com.example.ts:disk1"
	store := s.file("sda5", 64<<20)
	if out := s.adm(
		"tgtadm --lld iscsi --op new --mode target --tid 1 -T "+iqn,
		"tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 1 -b "+store,
		"tgtadm --lld iscsi --op bind --mode target --tid 1 -I 192.168.0.0/16",
	); out != "" {
		t.Errorf("tgtadm says: %s", out)
	}
	step("cluster is up")
	g := l.Boot(Config{Name: "initiator1", Links: []Link{{br, "192.168.0.21/24"}}})[0]
	step("guest is up")

	// Red Hat's place of the records is the tutorial's, Debian has them in /etc/iscsi.
	g.MustRun("rm -rf /etc/iscsi/nodes /etc/iscsi/send_targets /etc/iscsi/initiatorname.iscsi; ln -s /etc/iscsi /var/lib/iscsi")
	expect(t, g, "iscsi-iname -p iqn.2013-05.com.magedu", 0, "iqn.2013-05.com.magedu:…")
	expect(t, g, "echo \"InitiatorName=`iscsi-iname -p iqn.2013-05.com.magedu`\" > /etc/iscsi/initiatorname.iscsi", 0, "")
	expect(t, g, `echo "InitiatorAlias=initiator1.magedu.com" >> /etc/iscsi/initiatorname.iscsi`, 0, "")
	name := strings.TrimSpace(g.MustRun("sed -n s/InitiatorName=//p /etc/iscsi/initiatorname.iscsi"))
	g.StartISCSID() // service iscsi start

	const (
		discover = "iscsiadm -m discovery -t sendtargets -p 192.168.0.11"
		node     = "iscsiadm -m node -T " + iqn + " -p 192.168.0.11:3260 "
		records  = "rm -rf /var/lib/iscsi/nodes/" + iqn + "; rm -rf -rf /var/lib/iscsi/send_targets/192.168.0.11,3260"
		portal   = "target: " + iqn + ", portal: 192.168.0.11,3260]"
		loggedIn = "Logging in to [iface: default, " + portal + "\nLogin to [iface: default, " + portal + " successful."
		// stderr comes first, because stdout is no terminal.
		refused = "iscsiadm: Could not login to [iface: default, " + portal + `.
iscsiadm: initiator reported error (…)
iscsiadm: Could not log into all portals
Logging in to [iface: default, ` + portal
		loggedOut = "Logging out of session [sid: …, " + portal + "\nLogout of [sid: …, " + portal + " successful."
	)
	expect(t, g, discover, 0, "192.168.0.11:3260,1 "+iqn)
	expect(t, g, node+"-l", 0, loggedIn)
	expect(t, g, "iscsiadm -m session", 0, "tcp: [1] 192.168.0.11:3260,1 "+iqn+" (non-flash)")
	dev := g.Disks(iqn, "192.168.0.11", 1)[0]
	stats := g.MustRun("iscsiadm -m session -s")
	if !strings.HasPrefix(stats, "Stats for session [sid: 1, "+portal+"\n") || !regexp.MustCompile(`\n\tscsicmd_pdus: [1-9]`).MatchString(stats) ||
		!strings.Contains(stats, "\n\tdigest_err: 0\n\ttimeout_err: 0\n") {
		t.Errorf("session -s: %s", stats)
	}
	s.within("the target's session", func(at []api.Session) bool {
		return len(at) == 1 && at[0].Initiator == name && strings.HasPrefix(at[0].Address, "192.168.0.21:") && at[0].Target == iqn
	})
	expect(t, g, node+"-l", 15, "iscsiadm: default: 1 session requested, but 1 already present.\niscsiadm: Could not log into all portals")
	step("logged in")

	// A file system that waits for the network: mount -a at boot leaves it out, netfs mounts it.
	g.MustRun("mkfs.ext4 -q " + dev + "; mkdir /mnt/data; echo '" + dev + " /mnt/data ext4 defaults,_netdev 0 0' > /etc/fstab")
	expect(t, g, "mount -a -O no_netdev", 0, "")
	expect(t, g, "mountpoint /mnt/data", 32, "/mnt/data is not a mountpoint")
	expect(t, g, "mount -a", 0, "")
	expect(t, g, "mountpoint /mnt/data", 0, "/mnt/data is a mountpoint")
	sum := g.MustRun("head -c 8M /dev/urandom > /mnt/data/file; sha256sum < /mnt/data/file; umount /mnt/data")
	expect(t, g, node+"-u", 0, loggedOut)
	expect(t, g, "test -e "+dev, 1, "")
	expect(t, g, "iscsiadm -m session", 21, "iscsiadm: No active sessions.")
	s.within("no session after the logout", func(at []api.Session) bool { return len(at) == 0 })
	expect(t, g, node+"-o delete", 0, "")
	expect(t, g, node+"-o delete", 21, "iscsiadm: No records found")
	expect(t, g, discover, 0, "192.168.0.11:3260,1 "+iqn)
	expect(t, g, "iscsiadm -m node", 0, "192.168.0.11:3260,1 "+iqn)
	expect(t, g, records, 0, "")
	expect(t, g, "iscsiadm -m node", 21, "iscsiadm: No records found")
	expect(t, g, node+"-l", 21, "iscsiadm: No records found")
	step("_netdev, logout, no records left")

	// CHAP one-way. The records are made anew, because they take iscsid.conf's values when they are made.
	if out := s.adm(
		"tgtadm --lld iscsi --op new --mode account --user christina --password 123456",
		"tgtadm --lld iscsi --op bind --mode account --tid 1 --user christina",
	); !strings.Contains(out, "12") { // shorter than RFC 7143 wants: taken, with a warning
		t.Errorf("tgtadm says: %q", out)
	}
	again := func(conf ...string) {
		t.Helper()
		script := records + "\nsed -i '/^node.session.auth/d' /etc/iscsi/iscsid.conf\n"
		for _, c := range conf {
			script += "echo 'node.session.auth." + c + "' >> /etc/iscsi/iscsid.conf\n"
		}
		g.MustRun(script)
		expect(t, g, discover, 0, "192.168.0.11:3260,1 "+iqn)
	}
	method, user := "authmethod = CHAP", "username = christina"
	again()
	expect(t, g, node+"-l", 24, refused)
	again(method, user, "password = 654321")
	expect(t, g, node+"-l", 24, refused)
	again(method, "username = clyde", "password = 123456")
	expect(t, g, node+"-l", 24, refused)
	s.within("no session without the secret", func(at []api.Session) bool { return len(at) == 0 })
	right := "password = 123456"
	again(method, user, right)
	expect(t, g, node+"-l", 0, loggedIn)
	g.Disks(iqn, "192.168.0.11", 1)
	expect(t, g, "mount -a; sha256sum < /mnt/data/file; umount /mnt/data", 0, sum)
	expect(t, g, node+"-u", 0, loggedOut)
	step("CHAP")

	// The initiator refuses the target then, which is another error (19) than the target's refusal (24).
	// Both ways: the target proves who it is too, and without an account for that it cannot.
	again(method, user, right, "username_in = clyde", "password_in = clyde-of-twelve")
	expect(t, g, node+"-l", 24, refused)
	s.adm("tgtadm --lld iscsi --op new --mode account --user clyde --password clyde-of-twelve",
		"tgtadm --lld iscsi --op bind --mode account --tid 1 --user clyde --outgoing")
	again(method, user, right, "username_in = clyde", "password_in = clyde-of-eleven")
	expect(t, g, node+"-l", 19, refused)
	again(method, user, right, "username_in = bonnie", "password_in = clyde-of-twelve")
	expect(t, g, node+"-l", 19, refused)
	again(method, user, right, "username_in = clyde", "password_in = clyde-of-twelve")
	expect(t, g, node+"-l", 0, loggedIn)
	g.Disks(iqn, "192.168.0.11", 1)
	expect(t, g, "mount -a; sha256sum < /mnt/data/file; umount /mnt/data", 0, sum)
	expect(t, g, node+"-u", 0, loggedOut)
	for _, secret := range []string{"123456", "clyde-of-twelve"} {
		if strings.Contains(s.Logs(), secret) {
			t.Errorf("the secret %s is in the cluster's logs", secret)
		}
	}
	step("mutual CHAP")

	digests(t, l, br.Capture(filepath.Join(l.Artefacts, "digests.pcapng")), g, node, iqn, store)
	step("digests")
	// 1020: the target closed the connection, which it does behind a refused login.
	if c := complaint.FindString(strings.ReplaceAll(g.Console(), "detected conn error (1020)", "")); c != "" {
		t.Errorf("the kernel complains: %s", c)
	}
	if err := g.Poweroff(); err != nil {
		t.Error(err)
	}
}

// digests logs in with each pair of digests. The kernel's word, iscsiadm's and the wire's must be the same, and the data of
// each session is compared with what lies in the target's store.
func digests(t *testing.T, l *Lab, capture *testproc.Proc, g *Guest, node, iqn, store string) {
	const size = 2 << 20
	var want []string // of each session
	written, stored := make([]byte, size), make([]byte, size)
	for i, header := range []string{"None", "CRC32C"} {
		for k, data := range []string{"None", "CRC32C"} {
			g.MustRun(fmt.Sprintf("%[1]s -o update -n node.conn[0].iscsi.HeaderDigest -v %[2]s; %[1]s -o update -n node.conn[0].iscsi.DataDigest -v %[3]s; %[1]s -l",
				node, header, data))
			dev := g.Disks(iqn, "192.168.0.11", 1)[0]
			expect(t, g, "cat /sys/class/iscsi_connection/*/header_digest /sys/class/iscsi_connection/*/data_digest", 0, fmt.Sprintf("%d\n%d", i, k))
			lines(t, g, "iscsiadm -m session -P 2", 0, "HeaderDigest: "+header, "DataDigest: "+data)
			at := 2*i + k
			rand.Read(written)
			if err := os.WriteFile(filepath.Join(l.Share, "written"), written, 0o644); err != nil {
				t.Fatal(err)
			}
			g.MustRun(fmt.Sprintf(`dd if=/lab/written of=%[1]s bs=1M seek=%[2]d oflag=direct conv=notrunc status=none
dd if=%[1]s of=/lab/back bs=1M skip=%[2]d count=%[3]d iflag=direct status=none
%[4]s -u`, dev, at*size>>20, size>>20, node))
			back, err := os.ReadFile(filepath.Join(l.Share, "back"))
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(store)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.ReadAt(stored, int64(at)*size)
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(back, written) || !bytes.Equal(stored, written) {
				t.Errorf("HeaderDigest=%s DataDigest=%s: read back what was written: %v; the target stored it: %v", header, data, bytes.Equal(back, written), bytes.Equal(stored, written))
			}
			want = append(want, header+" "+data)
		}
	}
	if err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	wire(t, filepath.Join(l.Artefacts, "digests.pcapng"), want)
}

// wire lets tshark decode a capture in which each connection is of one session, and compares the digests that the PDUs of
// each have, after the login, with want ("HEADER DATA"). No PDU may be malformed.
func wire(t *testing.T, pcap string, want []string) {
	out, err := exec.Command(mustFind(t, "tshark"), "-r", pcap, "-Y", "iscsi || (tcp && _ws.malformed)", "-T", "fields", "-E", "separator=|",
		"-e", "tcp.stream", "-e", "iscsi.opcode", "-e", "iscsi.datasegmentlength", "-e", "iscsi.headerdigest32", "-e", "iscsi.datadigest32", "-e", "_ws.malformed", "-e", "_ws.col.Info").Output()
	if err != nil {
		t.Fatalf("tshark: %v", err)
	}
	type counts struct{ pdus, withData, header, data int }
	var got []counts
	list := func(s string) []string { return strings.FieldsFunc(s, func(r rune) bool { return r == ',' }) }
	for line := range strings.Lines(string(out)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "|", 7)
		n, err := strconv.Atoi(f[0])
		if err != nil || len(f) != 7 {
			t.Fatalf("tshark says %q", line)
		}
		for n >= len(got) {
			got = append(got, counts{})
		}
		c := &got[n]
		lengths := list(f[2])
		for i, op := range list(f[1]) {
			if op == "0x03" || op == "0x23" {
				continue // login
			}
			c.pdus++
			if lengths[i] != "0" {
				c.withData++
			}
		}
		c.header += len(list(f[3]))
		c.data += len(list(f[4]))
		// Linux first asks for the 4 bytes of a VPD page's header; tshark's dissector of pages reads on beyond them.
		if f[5] != "" && !(strings.HasPrefix(f[5], "[Malformed Packet: SCSI]") && f[2] == "4" && strings.Contains(f[6], "(Inquiry Response Data)")) {
			t.Errorf("malformed: %s", line)
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%d connections in the capture, want %d", len(got), len(want))
	}
	for i, c := range got {
		exp := counts{pdus: c.pdus, withData: c.withData}
		header, data, _ := strings.Cut(want[i], " ")
		if header == "CRC32C" {
			exp.header = c.pdus
		}
		if data == "CRC32C" {
			exp.data = c.withData
		}
		if c != exp || c.pdus < 50 || c.withData < 20 {
			t.Errorf("connection %d with %s: %+v", i, want[i], c)
		}
	}
	t.Logf("tshark: PDUs, those with data, header digests, data digests of the connections %v: %v", want, got)
}
