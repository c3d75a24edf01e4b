package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/test/lab/internal/journal"
)

const crashSlots = 8192 // of a journal: 32 MiB

// A kernel writes through open-iscsi while the target's processes are killed every 5 s and started again: by turns all of the
// node (control and both workers) and the storage worker alone. Nothing that was acknowledged may be lost, no error may reach
// a program, and the file system is clean. In `make prove N=n` there are n kills.
func TestScenario4KillsUnderIO(t *testing.T) {
	kills := testproc.Count(t, 2)
	const period = 5 * time.Second
	begin := time.Now()
	step := func(what string) { t.Logf("%5.1f s  %s", time.Since(begin).Seconds(), what) }
	testproc.Need(t, "iscsid", "iscsiadm", "mkfs.ext4", "fsck.ext4", "fio", "sg_persist")
	l := New(t)
	l.Build("./test/lab/cmd/labjournal")
	br := l.Bridge("10.99.0.1/24")
	s := serveAs(t, l, br)
	const iqn = "iqn.2026-11.lab.blockhouse:crash"
	disk, raw := s.file("fs", 256<<20), s.file("raw", crashSlots*journal.Size)
	s.adm("tgtadm --lld iscsi --op new --mode target --tid 1 -T "+iqn,
		"tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 1 -b "+disk,
		"tgtadm --lld iscsi --op bind --mode target --tid 1 -I ALL")
	// The raw disk has a write cache that is gone with the worker: what is acknowledged must have been flushed.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := api.Post[api.LUN](ctx, s.API(), api.PathLUNs, api.LUNCreate{Target: iqn, Volume: "raw", Store: "powercut:file:" + raw, LUN: 2, BlockSize: 512}); err != nil {
		t.Fatal(err)
	}
	step("cluster is up")
	g := l.Boot(Config{Name: "host1", Links: []Link{{br, "10.99.0.11/24"}}, Lifetime: time.Duration(kills)*time.Minute + DefaultLifetime})[0]
	g.StartInitiator("iqn.2026-11.lab.blockhouse:host1")
	g.Discover(br.IP())
	// With digests, so that the kernel judges every byte that comes back too.
	for _, d := range []string{"HeaderDigest", "DataDigest"} {
		g.MustRun("iscsiadm -m node -o update -n node.conn[0].iscsi." + d + " -v CRC32C")
	}
	devs := g.Login(iqn, br.IP(), 2)
	g.MustRun("mkfs.ext4 -q " + devs[0] + "; mkdir /mnt/e; mount " + devs[0] + " /mnt/e")
	// A reservation that nobody but this initiator port may write under: it survives with the session's name.
	g.MustRun("sg_persist --out --no-inquiry --register --param-sark=0xc1 " + devs[1] + "; sg_persist --out --no-inquiry --reserve --param-rk=0xc1 --prout-type=1 " + devs[1])
	step("ext4 is mounted")

	// Direct with many outstanding and a flush now and then; buffered and synchronous; and the two journals.
	job := `[global]
directory=/mnt/e
size=8m
verify=crc32c
verify_fatal=1
[direct]
rw=randwrite
bsrange=4k-64k
direct=1
ioengine=libaio
iodepth=8
fsync=16
[buffered]
rw=randwrite
bs=4k
size=1m
ioengine=psync
sync=1
`
	if err := os.WriteFile(filepath.Join(l.Share, "job.fio"), []byte(job), 0o644); err != nil {
		t.Fatal(err)
	}
	jobs := map[string]*Cmd{
		"fio": g.Start("n=0; until [ -e /lab/stop ]; do fio --output=/lab/fio.out --aux-path=/tmp --randseed=$((1000+n)) /lab/job.fio || { cat /lab/fio.out; exit 1; }; " +
			"n=$((n+1)); echo $n > /lab/rounds; done; cat /lab/fio.out"),
		"raw journal":  g.Start(fmt.Sprintf("labjournal -to %s -direct -slots %d -run 1 -notes /lab/raw -stop /lab/stop", devs[1], crashSlots)),
		"file journal": g.Start(fmt.Sprintf("labjournal -to /mnt/e/journal -slots %d -run 2 -notes /lab/file -stop /lab/stop", crashSlots)),
	}
	alive := func() {
		t.Helper()
		for name, c := range jobs {
			select {
			case <-c.Done():
				_, err := c.Wait(time.Second)
				t.Fatalf("%s ended: %v\n%s\nconsole:\n%s", name, err, c.Output(), g.Console())
			default:
			}
		}
	}
	noted := func(file string) int64 {
		fi, err := os.Stat(filepath.Join(l.Share, file))
		if err != nil {
			return 0
		}
		return fi.Size() / 8
	}
	// flows waits until each journal got answers to writes that it made after the call.
	flows := func() {
		t.Helper()
		raw, file := noted("raw"), noted("file")
		l.Within(90*time.Second, "writes are acknowledged", func() bool {
			alive()
			return noted("raw") > raw+1 && noted("file") > file+1
		})
	}
	flows()
	step("I/O flows")
	// open-iscsi's own default, which no file of ours changes: until then the kernel holds what was not answered.
	tmo := strings.TrimSpace(g.MustRun("cat /sys/class/iscsi_session/*/recovery_tmo"))
	var longest time.Duration
	for i := range kills {
		killed := time.Now()
		what := "all processes of the node"
		if i%2 == 0 {
			s.Kill()
			s.Start()
		} else {
			what = "the storage worker"
			w, err := s.Worker(link.Storage)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		flows()
		took := time.Since(killed)
		longest = max(longest, took)
		step(fmt.Sprintf("killed %s: writes are acknowledged again after %.1f s", what, took.Seconds()))
		for time.Since(killed) < period {
			alive()
			time.Sleep(50 * time.Millisecond)
		}
	}
	if err := os.WriteFile(filepath.Join(l.Share, "stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range jobs {
		if out, err := c.Wait(2 * time.Minute); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	rounds, _ := os.ReadFile(filepath.Join(l.Share, "rounds"))
	if !regexp.MustCompile(`(?s)direct: .*err= 0.*buffered: .*err= 0`).MatchString(jobs["fio"].Output()) {
		t.Errorf("fio says:\n%s", jobs["fio"].Output())
	}
	// The session lived through it all, and is the first.
	expect(t, g, "iscsiadm -m session", 0, "tcp: [1] 10.99.0.1:3260,1 "+iqn+" (non-flash)")
	lines(t, g, "sg_persist -c "+devs[1], 0, "Persist Through Power Loss Capable(PTPL_C): 1")
	lines(t, g, "sg_persist --in --no-inquiry -r "+devs[1], 0, "Key=0xc1", "scope: LU_SCOPE,  type: Write Exclusive")
	g.MustRun("umount /mnt/e")
	fsck := g.MustRun("fsck.ext4 -fn " + devs[0] + "; mount " + devs[0] + " /mnt/e")
	if !strings.Contains(fsck, "Pass 5") || strings.Contains(fsck, "Fix?") {
		t.Errorf("fsck.ext4: %s", fsck)
	}
	out := g.MustRun(fmt.Sprintf("labjournal -check -to /mnt/e/journal -slots %d -run 2 -notes /lab/file; umount /mnt/e", crashSlots))
	g.Logout(iqn, br.IP())
	// The other one is checked in the store, without the target.
	f, err := os.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	notes, err := os.ReadFile(filepath.Join(l.Share, "raw"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := journal.Check(f, crashSlots, 1, notes)
	if err != nil {
		t.Errorf("raw journal: %v", err)
	}
	if n := strings.Count(g.Console(), "detected conn error"); n < kills {
		t.Errorf("the kernel noticed %d of %d kills", n, kills)
	}
	if b := broken.FindString(g.Console()); b != "" {
		t.Errorf("the kernel complains: %s", b)
	}
	if t.Failed() {
		return
	}
	t.Logf("PROOF %d kills of clusterd under I/O: no error reached a program, fio verified %s rounds, fsck.ext4 is clean; longest silence of the target %.1f s (recovery_tmo %s); raw journal %d acknowledged, %d ahead; file journal %s",
		kills, strings.TrimSpace(string(rounds)), longest.Seconds(), tmo, r.Acked, r.Ahead, strings.TrimSpace(out))
}

// broken matches what the console says when an error has reached a file system or a program. Lost connections do not.
var broken = regexp.MustCompile(`(?m)^.*(I/O error|critical .* error|EXT4-fs (error|warning)|Aborting journal|rejecting I/O|offline|recovery timed out).*$`)
