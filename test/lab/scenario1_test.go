package lab

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/testnet"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

var (
	flagTarget = flag.String("lab.target", "blockhouse", "target of scenario 1: blockhouse, or tgtd to compare")
	flagMkfs   = flag.String("lab.mkfs", "mkfs-gfs", "formatter of scenario 1: mkfs-gfs, or mkfs.gfs2 to compare")
)

// startTarget serves the image as LUN 1 of the target at the segment's address.
func startTarget(t *testing.T, l *Lab, br *testnet.Bridge, kind, name, image string) {
	t.Helper()
	switch kind {
	case "blockhouse":
		p := l.Start(testproc.Spec{Name: "labtarget", Args: []string{
			l.Build("./test/lab/cmd/labtarget"), "-iqn", name, "-portal", br.IP() + ":3260", "-lun", image,
		}})
		p.MustWaitFor(t, "^serving ", 20*time.Second)
	case "tgtd":
		testproc.Need(t, "tgtd", "tgtadm")
		ipc := "TGT_IPC_SOCKET=" + filepath.Join(l.umls, "tgtd") // else both want /var/run/tgtd, which root owns
		l.Start(testproc.Spec{Name: "tgtd", Env: []string{ipc}, Grace: time.Millisecond, Args: []string{
			"tgtd", "-f", "--iscsi", "portal=" + br.IP() + ":3260",
		}})
		adm := func(args ...string) (string, error) {
			return l.Net.Hub().Run(append([]string{"env", ipc, mustFind(t, "tgtadm"), "--lld", "iscsi"}, args...)...)
		}
		l.Within(20*time.Second, "tgtd answers", func() bool { _, err := adm("--op", "show", "--mode", "target"); return err == nil })
		for _, s := range []string{
			"--op new --mode target --tid 1 -T " + name,
			"--op new --mode logicalunit --tid 1 --lun 1 -b " + image,
			"--op bind --mode target --tid 1 -I ALL",
		} {
			if _, err := adm(strings.Fields(s)...); err != nil {
				t.Fatal(err)
			}
		}
	default:
		t.Fatalf("unknown target %q", kind)
	}
}

// complaint matches console lines of the block, SCSI, iSCSI and gfs2 layers that no healthy run has.
var complaint = regexp.MustCompile(`(?m)^.*(I/O error|critical .* error|Sense Key|conn error|fatal:|withdraw).*$`)

// A real kernel formats, mounts, writes and reads back a LUN of our target through open-iscsi.
func TestScenario1KernelInitiator(t *testing.T) {
	begin := time.Now()
	step := func(what string) { t.Logf("%5.1f s  %s", time.Since(begin).Seconds(), what) }
	testproc.Need(t, "iscsid", "iscsiadm", "fsck.gfs2")
	l := New(t)
	mkfs := *flagMkfs
	if mkfs == "mkfs-gfs" {
		l.Build("./cmd/mkfs-gfs")
	} else {
		testproc.Need(t, mkfs)
	}
	const name = "iqn.2026-11.lab.blockhouse:disk1"
	image := filepath.Join(t.TempDir(), "lun1")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 512<<20); err != nil {
		t.Fatal(err)
	}
	br := l.Bridge("10.99.0.1/24")
	startTarget(t, l, br, *flagTarget, name, image)
	step("target " + *flagTarget + " serves")

	g := l.Boot(Config{Name: "host1", Links: []Link{{br, "10.99.0.11/24"}}, Modules: []string{"gfs2"}})[0]
	step("guest is up")
	g.StartInitiator("iqn.2026-11.lab.blockhouse:host1")
	if found, want := g.Discover(br.IP()), br.IP()+":3260,1 "+name; len(found) != 1 || found[0] != want {
		t.Fatalf("discovery found %q, want %q", found, want)
	}
	dev := g.Login(name, br.IP(), 1)[0]
	step("logged in, disk " + dev)

	if out := g.MustRun("blockdev --getsize64 " + dev); strings.TrimSpace(out) != fmt.Sprint(512<<20) {
		t.Errorf("size of the disk: %s", out)
	}
	out := g.MustRun(fmt.Sprintf("%s -O -p lock_nolock -j 1 -J 32 %s", mkfs, dev))
	step("formatted by " + mkfs)
	t.Log(out)
	if strings.Contains(out, "error") {
		t.Errorf("%s met an error", mkfs) // a failed discard does not end it
	}
	// The data is random and never on a disk before: only what went through the target can have its sum.
	sum := g.MustRun(fmt.Sprintf(`mkdir -p /mnt/g; mount -t gfs2 -o lockproto=lock_nolock %s /mnt/g
head -c 64M /dev/urandom >/tmp/data
sha256sum </tmp/data
cp /tmp/data /mnt/g/data
rm /tmp/data
umount /mnt/g`, dev))
	step("64 MiB written and unmounted")
	fsck := g.MustRun("fsck.gfs2 -n " + dev)
	if !strings.Contains(fsck, "complete") {
		t.Errorf("fsck.gfs2 in the guest: %s", fsck)
	}
	step("fsck.gfs2 -n in the guest is clean")
	g.Logout(name, br.IP())
	if out := g.MustRun("ls /sys/class/iscsi_session; test ! -e " + dev); out != "" {
		t.Errorf("sessions after logout: %s", out)
	}
	// What the target stored is judged once more, without the target.
	if out, err := exec.Command(mustFind(t, "fsck.gfs2"), "-n", image).CombinedOutput(); err != nil {
		t.Errorf("fsck.gfs2 of the image: %v\n%s", err, out)
	}
	step("logged out, fsck.gfs2 -n of the image is clean")

	dev = g.Login(name, br.IP(), 1)[0]
	again := g.MustRun(fmt.Sprintf("mount -t gfs2 -o lockproto=lock_nolock %s /mnt/g; sha256sum </mnt/g/data; umount /mnt/g", dev))
	if again != sum || len(sum) < 64 {
		t.Errorf("checksum over the second login %q, want %q", again, sum)
	}
	g.Logout(name, br.IP())
	step("second login: checksum matches")
	if c := complaint.FindString(g.Console()); c != "" {
		t.Errorf("the kernel complains: %s", c)
	}
	if err := g.Poweroff(); err != nil {
		t.Error(err)
	}
	step("powered off")
	if took := time.Since(begin); took > 90*time.Second {
		t.Errorf("the scenario took %v, more than the 90 s it may", took)
	}
}

func mustFind(t *testing.T, prog string) string {
	t.Helper()
	p, err := testproc.Find(prog)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
