package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// lines are tests of sg3-utils' output: each line of want must be one of the output's, where "…" stands for anything and the
// space around a line does not count.
func lines(t *testing.T, g *Guest, command string, code int, want ...string) string {
	t.Helper()
	out, err := g.Run(command)
	got := 0
	var exit *ExitError
	switch {
	case errors.As(err, &exit):
		got = exit.Code
	case err != nil:
		t.Fatalf("$ %s\n%s%v", command, out, err)
	}
	if got != code {
		t.Errorf("$ %s\n%sexit code %d, want %d", command, out, got, code)
	}
	have := strings.Split(out, "\n")
	for _, w := range want {
		if !slices.ContainsFunc(have, func(h string) bool { return matches(h, w) }) {
			t.Errorf("$ %s\n%s(exit code %d) lacks the line:\n%s", command, out, got, w)
		}
	}
	return out
}

// sg3-utils' exit codes.
const (
	sgIllegalRequest = 5
	sgUnitAttention  = 6
	sgInvalidOpcode  = 9
	sgMiscompare     = 14
	sgOutOfRange     = 22
	sgConflict       = 24
)

// sg3-utils and the kernel's own commands against our LUNs: what they print must be what the cluster says of the volume, and
// what they do to the medium is read back by another way. Two sessions of two initiators, so that one sees what the other did.
func TestScenario3Sg3utils(t *testing.T) {
	begin := time.Now()
	step := func(what string) { t.Logf("%5.1f s  %s", time.Since(begin).Seconds(), what) }
	testproc.Need(t, "iscsid", "iscsiadm", "sg_persist", "sg_inq", "sg_vpd", "blkdiscard", "lsblk")
	l := New(t)
	br := l.Bridge("10.99.0.1/24")
	s := serve(t, l, br)
	const iqn, first, second = "iqn.2026-11.lab.blockhouse:disks", "iqn.2026-11.lab.blockhouse:first", "iqn.2026-11.lab.blockhouse:second"
	store := s.file("small", 64<<20)
	s.adm("tgtadm --lld iscsi --op new --mode target --tid 1 -T "+iqn,
		"tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 1 -b "+store,
		"tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 2 --blocksize 4096 -b "+s.file("large", 96<<20),
		"tgtadm --lld iscsi --op bind --mode target --tid 1 -I ALL")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	vols, err := api.Get[api.List[api.Volume]](ctx, s.API(), api.PathVolumes)
	if err != nil {
		t.Fatal(err)
	}
	luns, err := api.Get[api.List[api.LUN]](ctx, s.API(), api.PathLUNs)
	if err != nil || len(luns.Items) != 2 {
		t.Fatalf("LUNs %+v, %v", luns, err)
	}
	step("cluster is up")

	g := l.Boot(Config{Name: "host1", Links: []Link{{br, "10.99.0.11/24"}}})[0]
	g.StartInitiator(first)
	g.MustRun(`iscsiadm -m iface -I second -o new
iscsiadm -m iface -I second -o update -n iface.initiatorname -v ` + second + `
iscsiadm -m discovery -t sendtargets -p 10.99.0.1 -I default -I second
iscsiadm -m node -T ` + iqn + ` -l`)
	disks := func(initiator string) []string {
		t.Helper()
		out := g.MustRun(`for i in $(seq 200); do
	for s in /sys/class/iscsi_session/session*; do
		read -r name <$s/initiatorname || continue
		[ "$name" = ` + initiator + ` ] || continue
		devs=()
		for d in $s/device/target*/*:[12]/block/*; do [ -e $d ] && devs+=(/dev/${d##*/}); done
		if [ ${#devs[@]} = 2 ]; then echo ${devs[@]}; exit 0; fi
	done
	sleep 0.05
done; exit 1`)
		return strings.Fields(out)
	}
	a, b := disks(first), disks(second)
	step("two sessions, disks " + fmt.Sprint(a, b))

	for i, lun := range luns.Items {
		v := vols.Items[slices.IndexFunc(vols.Items, func(v api.Volume) bool { return v.Name == lun.Volume })]
		identity(t, g, a[i], b[i], iqn, v, lun)
	}
	capabilities(t, g, a[0])
	step("identity and capabilities")
	provisioning(t, g, a[0], b[0], store)
	step("provisioning, WRITE SAME, COMPARE AND WRITE")
	modes(t, g, a[0], b[0])
	step("mode pages")
	reservations(t, g, a[0], b[0], first, second)
	step("reservations")
	g.MustRun("iscsiadm -m node -u")
	if err := g.Poweroff(); err != nil {
		t.Error(err)
	}
}

// identity: INQUIRY, VPD and capacity of one LUN are the volume's; who it is says the other session too.
func identity(t *testing.T, g *Guest, dev, other, iqn string, v api.Volume, lun api.LUN) {
	t.Helper()
	serial := strings.ReplaceAll(v.UUID, "-", "")
	blocks, bs := v.Size/int64(v.BlockSize), v.BlockSize
	for _, dev := range []string{dev, other} {
		inq := lines(t, g, "sg_inq "+dev, 0,
			"PQual=0  PDT=0  RMB=0 … version=0x06  [SPC-4]", "… HiSUP=1  Resp_data_format=2", "… TPGS=1  3PC=1  Protect=0…", "EncServ=0  MultiP=1…", "… CmdQue=1",
			"Vendor identification: BLKHOUSE", "Unit serial number: "+serial)
		if !regexp.MustCompile(`Product identification: [0-9a-f]{8}` + v.Name).MatchString(inq) {
			t.Errorf("product of %s: %s", dev, inq)
		}
		lines(t, g, "sg_vpd -p 0x83 "+dev, 0, "0x"+lun.WWID[1:], "Locally assigned UUID: "+v.UUID, "vendor id: BLKHOUSE", "vendor specific: "+serial,
			"Relative target port: 0x1", "Target port group: 0x1", iqn)
	}
	lines(t, g, "sg_inq -d "+dev, 0, "SAM-5 (no version claimed)", "iSCSI (no version claimed)", "SPC-4 (no version claimed)", "SBC-3 (no version claimed)")
	lines(t, g, "sg_vpd -p 0x80 "+dev, 0, "Unit serial number: "+serial)
	last := fmt.Sprintf("Last LBA=%d (…), Number of logical blocks=%d", blocks-1, blocks)
	length := fmt.Sprintf("Logical block length=%d bytes…", bs)
	lines(t, g, "sg_readcap "+dev, 0, last, length, fmt.Sprintf("Device size: %d bytes…", v.Size))
	lines(t, g, "sg_readcap --16 "+dev, 0, last, length, "Protection: prot_en=0…", "Logical block provisioning: lbpme=1, lbprz=1",
		fmt.Sprintf("Logical blocks per physical block exponent=%d…", map[int]int{512: 3, 4096: 0}[bs]), "Lowest aligned LBA=0")
	lines(t, g, "sg_vpd -p 0xb0 "+dev, 0, "Maximum compare and write length: 255 blocks", fmt.Sprintf("Optimal transfer length granularity: %d block…", 4096/bs),
		fmt.Sprintf("Maximum transfer length: %d blocks", 32<<20/bs), fmt.Sprintf("Optimal transfer length: %d blocks", 1<<20/bs),
		fmt.Sprintf("Maximum unmap LBA count: %d", min(1<<30/bs, 1<<20)), "Maximum unmap block descriptor count: 256",
		fmt.Sprintf("Optimal unmap granularity: %d block…", 4096/bs), "Unmap granularity alignment: 0", fmt.Sprintf("Maximum write same length: 0x%x blocks", 128<<20/bs))
	// What the kernel made of it all.
	lines(t, g, "cd /sys/block/"+filepath.Base(dev)+"; cat size queue/logical_block_size queue/physical_block_size queue/optimal_io_size device/vendor", 0,
		fmt.Sprint(v.Size/512), fmt.Sprint(bs), "4096", "1048576", "BLKHOUSE")
	lines(t, g, "lsblk -D -b -n -o NAME,DISC-ALN,DISC-GRAN,DISC-MAX "+dev, 0, fmt.Sprintf("%s … 0 … 4096 %d", filepath.Base(dev), min(1<<30, bs<<20)))
}

// capabilities: the pages and reports that are the same for every volume.
func capabilities(t *testing.T, g *Guest, dev string) {
	t.Helper()
	lines(t, g, "sg_vpd -p 0 "+dev, 0, "Supported VPD pages [sv]", "Unit serial number [sn]", "Device identification [di]", "Extended inquiry data [ei]",
		"Block limits (SBC) [bl]", "Block device characteristics (SBC) [bdc]", "Logical block provisioning (SBC) [lbpv]")
	// Every page that the list has is there, and no other.
	g.MustRun("for p in $(sg_vpd -p 0 -r " + dev + " | od -An -v -tx1 -j4); do sg_vpd -r -p 0x$p " + dev + " > /lab/vpd-$p; done")
	pages, err := filepath.Glob(filepath.Join(g.lab.Share, "vpd-*"))
	if err != nil || len(pages) < 8 {
		t.Fatalf("vpd pages: %v, %v", pages, err)
	}
	for _, p := range pages {
		if b, err := os.ReadFile(p); err != nil || len(b) < 4 || fmt.Sprintf("vpd-%02x", b[1]) != filepath.Base(p) || len(b) != 4+int(b[2])<<8+int(b[3]) {
			t.Errorf("%s: %x, %v", p, b, err)
		}
	}
	lines(t, g, "sg_raw -r 96 "+dev+" 12 01 b7 00 60 00", sgIllegalRequest, "Additional sense: Invalid field in cdb")
	lines(t, g, "sg_vpd -p 0x86 "+dev, 0, "… HEADSUP=1 ORDSUP=1 SIMPSUP=1", "… V_SUP=1")
	lines(t, g, "sg_vpd -p 0xb1 "+dev, 0, "Non-rotating medium (e.g. solid state)")
	lines(t, g, "sg_vpd -p 0xb2 "+dev, 0, "Unmap command supported (LBPU): 1", "Write same (16) with unmap bit supported (LBPWS): 1",
		"Write same (10) with unmap bit supported (LBPWS10): 1", "Logical block provisioning read zeros (LBPRZ): 1", "Anchored LBAs supported (ANC_SUP): 0",
		"Provisioning type: 2 (thin provisioned)")
	expect(t, g, "sg_luns "+dev, 0, "Lun list length = 16 which imples 2 lun entries\nReport luns [select_report=0x0]:\n    0001000000000000\n    0002000000000000")
	expect(t, g, "sg_luns --select=1 "+dev, 0, "Lun list length = 0 which imples 0 lun entries")
	expect(t, g, "sg_luns -d "+dev, 0, "Lun list length = 16 which imples 2 lun entries\nReport luns [select_report=0x0]:\n    0001000000000000\n"+
		"      Peripheral device addressing: lun=1\n    0002000000000000\n      Peripheral device addressing: lun=2")
	for _, flag := range []string{"-d", "-e -d"} {
		lines(t, g, "sg_rtpg "+flag+" "+dev, 0, "target port group id : 0x1 , Pref=0…", "target port group asymmetric access state : 0x00 (active/optimized)",
			"… U_SUP : 1, S_SUP : 1, AN_SUP : 1, AO_SUP : 1", "target port count : 01", "0x01")
	}
	ops := lines(t, g, "sg_opcodes "+dev, 0, "28                 10    0,0    Read(10)", "2a                 10    0,0    Write(10)", "42                 10    0,0    Unmap",
		"48        1        10    0,0    Sanitize, overwrite", "5f        4        10    0,0    Persistent reserve out, preempt",
		"5f        5        10    0,0    Persistent reserve out, preempt and abort", "89                 16    0,0    Compare and write",
		"93                 16    0,0    Write same(16)", "9e       12        16    0,0    Get LBA status(16)", "a3        a        12    0,0    Report target port groups")
	lines(t, g, "sg_opcodes --opcode=0x89 "+dev, 0, "Command is supported [conforming to SCSI standard]", "Usage data: 89 f8 ff ff ff ff ff ff ff ff 00 00 00 ff …")
	lines(t, g, "sg_opcodes --opcode=0xd0 "+dev, 0, "Command is NOT supported")
	lines(t, g, "sg_opcodes --tmf "+dev, 0, "Abort task", "Abort task set", "Clear task set", "Logical unit reset")
	if !strings.Contains(ops, "Log sense") {
		lines(t, g, "sg_logs "+dev, sgInvalidOpcode)
		return
	}
	if out := lines(t, g, "sg_logs -a "+dev, 0, "Supported log pages  [0x0]:"); strings.Contains(out, "nable to decode") {
		t.Errorf("sg_logs -a: %s", out)
	}
}

// provisioning: what is written and unmapped, read back by the other session and from the store, and compared with a copy that
// the test keeps.
func provisioning(t *testing.T, g *Guest, dev, other, store string) {
	t.Helper()
	const base = 2048 // of the MiB that is played with, in blocks
	img := make([]byte, 1<<20)
	rand.Read(img)
	file := func(name string, b []byte) string {
		t.Helper()
		if err := os.WriteFile(filepath.Join(g.lab.Share, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
		return guestDir + "/" + name
	}
	one, zero := bytes.Repeat([]byte("one block of 512"), 32), make([]byte, 512)
	fOne, fZero := file("one", one), file("zero", zero)
	expect(t, g, "blkdiscard "+dev, 0, "")
	lba := func(at int, want ...string) {
		t.Helper()
		lines(t, g, fmt.Sprintf("sg_get_lba_status --lba=%d --maxlen=4096 %s", at, other), 0, want...)
	}
	lba(0, "[1] LBA: 0x0000000000000000  blocks:     131072  deallocated")
	g.MustRun("dd if=" + file("img", img) + " of=" + dev + " bs=1M seek=1 oflag=direct status=none")
	lba(0, "[1] LBA: 0x0000000000000000  blocks:       2048  deallocated", "[2] LBA: 0x0000000000000800  blocks:       2048  mapped…", "[3] LBA: 0x0000000000001000  blocks:     126976  deallocated")
	lba(2051, "[1] LBA: 0x0000000000000803  blocks:       2045  mapped…")
	lines(t, g, "sg_get_lba_status --lba=131072 "+dev, sgOutOfRange)

	same := func(what string) {
		t.Helper()
		g.MustRun("dd if=" + other + " of=/lab/back bs=1M skip=1 count=1 iflag=direct status=none")
		back, err := os.ReadFile(filepath.Join(g.lab.Share, "back"))
		if err != nil {
			t.Fatal(err)
		}
		if at := differs(back, img); at >= 0 {
			t.Errorf("after %s the other session reads something else from block %d on", what, base+at/512)
		}
	}
	put := func(command string, with []byte, ranges ...int) {
		t.Helper()
		expect(t, g, command+" "+dev, 0, "")
		for i := 0; i < len(ranges); i += 2 {
			copy(img[(ranges[i]-base)*512:], bytes.Repeat(with, ranges[i+1]))
		}
		same(command)
	}
	put("sg_write_same --10 --in="+fOne+" --lba=2100 --num=9 --xferlen=512", one, 2100, 9)
	put("sg_write_same --16 --in="+fOne+" --lba=2200 --num=300 --xferlen=512", one, 2200, 300)
	put("sg_write_same --16 --unmap --in="+fZero+" --lba=2304 --num=128 --xferlen=512", zero, 2304, 128)
	put("sg_write_same --10 --unmap --in="+fZero+" --lba=2560 --num=8 --xferlen=512", zero, 2560, 8)
	put("sg_write_same --16 --ndob --lba=2600 --num=5", zero, 2600, 5)
	put("sg_unmap --force --lba=2816 --num=64", zero, 2816, 64)
	put("sg_unmap --force --lba=3600,3800 --num=8,16", zero, 3600, 8, 3800, 16)
	put("blkdiscard -z -o $((3072*512)) -l $((128*512))", zero, 3072, 128)
	lba(2304, "[1] LBA: 0x0000000000000900  blocks:        128  deallocated")
	lba(2816, "[1] LBA: 0x0000000000000b00  blocks:         64  deallocated")
	lines(t, g, "sg_unmap --force --lba=131071 --num=2 "+dev, sgOutOfRange)
	lines(t, g, "sg_unmap --force --anchor --lba=2048 --num=8 "+dev, sgIllegalRequest)
	lines(t, g, "sg_write_same --16 --anchor --in="+fZero+" --lba=2048 --num=8 --xferlen=512 "+dev, sgIllegalRequest)
	same("the refused commands")

	// COMPARE AND WRITE: once right, and then not any more. Byte 700 is the first that differs.
	is, next := bytes.Clone(img[(3048-base)*512:][:1024]), bytes.Repeat([]byte("new data of 16 b"), 64)
	wrong := bytes.Clone(is)
	wrong[700]++
	const caw = "sg_compare_and_write --lba=3048 --num=2 --xferlen=2048 --in="
	lines(t, g, caw+file("wrong", append(wrong, next...))+" "+dev, sgMiscompare, "…700…")
	same("a miscompare")
	put(caw+file("caw", append(is, next...)), next, 3048, 1)
	lines(t, g, caw+guestDir+"/caw "+other, sgMiscompare)
	same("the second COMPARE AND WRITE")

	// The store, without the target: the same bytes, and holes where it was unmapped.
	expect(t, g, "sg_sync "+dev, 0, "")
	f, err := os.Open(store)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, len(img))
	if _, err := f.ReadAt(data, 1<<20); err != nil {
		t.Fatal(err)
	}
	if at := differs(data, img); at >= 0 {
		t.Errorf("the store has something else from block %d on", base+at/512)
	}
	for _, r := range [][2]int64{{2304, 128}, {2816, 64}} {
		if at, err := unix.Seek(int(f.Fd()), r[0]*512, unix.SEEK_DATA); err != nil || at < (r[0]+r[1])*512 {
			t.Errorf("blocks %d to %d are no hole in the store: data at block %d, %v", r[0], r[0]+r[1], at/512, err)
		}
	}
}

// differs is the place of the first difference, -1 if there is none.
func differs(a, b []byte) int {
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	return -1
}

// modes: a changed mode page is the logical unit's, and the other initiator is told.
func modes(t *testing.T, g *Guest, dev, other string) {
	t.Helper()
	lines(t, g, "sg_modes -p 8 "+other, 0, "00     08 12 04 00 00 00 00 00  00 00 00 00 00 00 00 00")
	lines(t, g, "sg_modes -c 1 -p 8 "+other, 0, "00     08 12 04 00 00 00 00 00  00 00 00 00 00 00 00 00") // WCE may be changed
	lines(t, g, "sg_modes -a "+dev, 0, "Mode data length=…WP=0, DpoFua=1, longlba=0", ">> Read-Write error recovery, page_control: current", ">> Caching, page_control: current",
		">> Control, page_control: current", ">> Informational exceptions control, page_control: current", "00     0a 0a …")
	// The kernel writes the page.
	cache := "$(ls -d /sys/block/" + filepath.Base(dev) + "/device/scsi_disk/*)/cache_type"
	g.MustRun("echo 'write through' > " + cache)
	lines(t, g, "sg_turs -v "+other, sgUnitAttention, "…ode parameters changed…")
	lines(t, g, "sg_turs -v "+other, 0)
	lines(t, g, "sg_modes -p 8 "+other, 0, "00     08 12 00 00 00 00 00 00  00 00 00 00 00 00 00 00")
	g.MustRun("echo 'write back' > " + cache)
	lines(t, g, "sg_turs -v "+other, sgUnitAttention, "…ode parameters changed…")
	lines(t, g, "sg_modes -p 8 "+other, 0, "00     08 12 04 00 00 00 00 00  00 00 00 00 00 00 00 00")
	lines(t, g, "sg_modes -p 0x2d "+dev, sgIllegalRequest)
}

// reservations: the life of persistent reservations of two initiators, by sg_persist.
func reservations(t *testing.T, g *Guest, a, b, first, second string) {
	t.Helper()
	out := func(dev, args string, code int, want ...string) {
		t.Helper()
		lines(t, g, "sg_persist --out --no-inquiry "+args+" "+dev, code, want...)
	}
	in := func(dev, args string, want ...string) string {
		t.Helper()
		return lines(t, g, "sg_persist --in --no-inquiry "+args+" "+dev, 0, want...)
	}
	generation := func() int {
		t.Helper()
		m := regexp.MustCompile(`PR generation=0x([0-9a-f]+)`).FindStringSubmatch(in(a, "-k"))
		if m == nil {
			t.Fatal("no generation")
		}
		n, err := strconv.ParseInt(m[1], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return int(n)
	}
	attention := func(dev, what string) {
		t.Helper()
		lines(t, g, "sg_turs -v "+dev, sgUnitAttention, "…"+what+"…") // and only once, or what follows would fail
	}
	write := func(dev string, ok bool) {
		t.Helper()
		kernel := "dd if=/lab/one of=" + dev + " bs=512 count=1 seek=9000 oflag=direct status=none"
		if ok {
			lines(t, g, kernel, 0)
			return
		}
		lines(t, g, kernel, 1)
		// Commands that some targets forget: tgtd lets the first three through.
		for _, command := range []string{
			"sg_write_same --16 --in=/lab/one --lba=9000 --num=1 --xferlen=512 ", "sg_write_same --10 --in=/lab/one --lba=9000 --num=1 --xferlen=512 ",
			"sg_unmap --force --lba=9008 --num=8 ", "sg_compare_and_write --lba=9000 --in=/lab/two ",
		} {
			lines(t, g, command+dev, sgConflict)
		}
	}
	read := func(dev string, ok bool) {
		t.Helper()
		code := 0
		if !ok {
			code = 1
		}
		lines(t, g, "dd if="+dev+" of=/dev/null bs=512 count=8 iflag=direct status=none", code)
	}

	lines(t, g, "sg_persist -c "+a, 0, "Specify Initiator Ports Capable(SIP_C): 1", "All Target Ports Capable(ATP_C): 1", "Write Exclusive, all registrants: 1",
		"Exclusive Access, registrants only: 1", "Write Exclusive, registrants only: 1", "Exclusive Access: 1", "Write Exclusive: 1", "Exclusive Access, all registrants: 1")
	in(a, "-k", "PR generation=0x0, there are NO registered reservation keys")
	in(b, "-r", "PR generation=0x0, there is NO reservation held")
	out(a, "--reserve --param-rk=0xa1 --prout-type=1", sgConflict) // not registered
	out(a, "--register --param-sark=0xa1", 0)
	out(a, "--register --param-sark=0xa2", sgConflict) // it has another key
	out(b, "--register-ignore --param-sark=0xb2", 0)
	in(b, "-k", "PR generation=0x2, 2 registered reservation keys follow:", "0xa1", "0xb2")

	// What COMPARE AND WRITE compares is there: write(a, true) puts it.
	g.MustRun("cat /lab/one /lab/one > /lab/two")

	// Write exclusive: the other reads and does not write.
	out(a, "--reserve --param-rk=0xa1 --prout-type=1", 0)
	out(b, "--reserve --param-rk=0xb2 --prout-type=1", sgConflict)
	in(b, "-r", "PR generation=0x2, Reservation follows:", "Key=0xa1", "scope: LU_SCOPE,  type: Write Exclusive")
	write(a, true)
	write(b, false)
	read(b, true)
	in(b, "-s", "Key=0xa1", "Key=0xb2", "All target ports bit clear", "<< Reservation holder >>", "scope: LU_SCOPE,  type: Write Exclusive", "not reservation holder", "iSCSI world wide unique port id: "+first+",i,0x…",
		"iSCSI world wide unique port id: "+second+",i,0x…")

	// Preempt: the victim loses its registration, and hears of it.
	out(b, "--preempt --param-rk=0xb2 --param-sark=0xa1 --prout-type=3", 0)
	attention(a, "egistrations preempted")
	in(b, "-r", "Key=0xb2", "scope: LU_SCOPE,  type: Exclusive Access")
	in(a, "-k", "PR generation=0x3, 1 registered reservation key follows:", "0xb2")
	write(a, false)
	read(a, false)
	write(b, true)
	out(b, "-v --release --param-rk=0xb2 --prout-type=1", sgIllegalRequest, "…nvalid release of persistent reservation…")
	out(b, "--release --param-rk=0xb2 --prout-type=3", 0)
	in(a, "-r", "PR generation=0x3, there is NO reservation held")
	write(a, true)

	// Registrants only: released, so everybody else is told; then cleared.
	out(a, "--register --param-sark=0xa1", 0)
	out(b, "--reserve --param-rk=0xb2 --prout-type=5", 0)
	write(a, true)
	out(b, "--release --param-rk=0xb2 --prout-type=5", 0)
	attention(a, "eservations released")
	out(a, "--reserve --param-rk=0xa1 --prout-type=7", 0)
	in(b, "-r", "Key=0x0", "scope: LU_SCOPE,  type: Write Exclusive, all registrants")
	out(b, "--preempt-abort --param-rk=0xb2 --param-sark=0xa1 --prout-type=7", 0)
	attention(a, "egistrations preempted")
	write(a, false)
	before := generation()
	out(b, "--clear --param-rk=0xb2", 0)
	if n := generation(); n != before+1 {
		t.Errorf("generation %d after CLEAR, %d before", n, before)
	}
	in(a, "-k", "…there are NO registered reservation keys")
	write(a, true)
	write(b, true)
}
