package initiator

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target"
)

// recorder writes what goes through a proxy to a pcap file, as TCP connections to port
// 3260: capturing it for real takes privileges that a test has not.
type recorder struct {
	t     testing.TB
	mu    sync.Mutex
	f     *os.File
	w     *pcapgo.Writer
	at    time.Time
	conns map[int]*[2]uint32 // next sequence numbers: of the initiator, of the target
	pdus  map[iscsi.Opcode]int
}

func newRecorder(t testing.TB) *recorder {
	f, err := os.Create(filepath.Join(t.TempDir(), "iscsi.pcap"))
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{t: t, f: f, w: pcapgo.NewWriter(f), at: time.Unix(1790000000, 0), conns: map[int]*[2]uint32{}, pdus: map[iscsi.Opcode]int{}}
	if err := r.w.WriteFileHeader(1<<18, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *recorder) tap(conn int, toTarget bool, b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pdus[(*iscsi.BHS)(b).Opcode()]++
	if r.conns[conn] == nil {
		r.conns[conn] = &[2]uint32{1000, 5000}
		r.packet(conn, true, nil, func(t *layers.TCP) { t.SYN, t.ACK = true, false })
		r.packet(conn, false, nil, func(t *layers.TCP) { t.SYN = true })
		r.packet(conn, true, nil, func(*layers.TCP) {})
	}
	for len(b) > 0 {
		n := min(len(b), 1400)
		r.packet(conn, toTarget, b[:n], func(t *layers.TCP) { t.PSH = n == len(b) })
		r.packet(conn, !toTarget, nil, func(*layers.TCP) {})
		b = b[n:]
	}
}

func (r *recorder) packet(conn int, toTarget bool, data []byte, set func(*layers.TCP)) {
	side := 1
	ini, tgt := net.IPv4(192, 0, 2, 1), net.IPv4(192, 0, 2, 2)
	src, dst, sp, dp := tgt, ini, layers.TCPPort(3260), layers.TCPPort(40000+conn)
	if toTarget {
		side, src, dst, sp, dp = 0, ini, tgt, dp, sp
	}
	seq := r.conns[conn]
	eth := &layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, EthernetType: layers.EthernetTypeIPv4}
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: src, DstIP: dst}
	tcp := &layers.TCP{SrcPort: sp, DstPort: dp, Seq: seq[side], Ack: seq[1-side], ACK: true, Window: 65535}
	set(tcp)
	if !tcp.ACK {
		tcp.Ack = 0
	}
	seq[side] += uint32(len(data))
	if tcp.SYN {
		seq[side]++
	}
	if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
		r.t.Error(err)
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, tcp, gopacket.Payload(data)); err != nil {
		r.t.Error(err)
	}
	r.at = r.at.Add(50 * time.Microsecond)
	p := buf.Bytes()
	if err := r.w.WritePacket(gopacket.CaptureInfo{Timestamp: r.at, CaptureLength: len(p), Length: len(p)}, p); err != nil {
		r.t.Error(err)
	}
}

func (r *recorder) tshark(args ...string) string {
	r.t.Helper()
	c := exec.Command("tshark", append([]string{"-n", "-r", r.f.Name()}, args...)...)
	c.Env = append(os.Environ(), "HOME="+r.t.TempDir())
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		r.t.Fatalf("tshark %v: %v: %s", args, err, errs.String())
	}
	return string(out)
}

// marked is what tshark finds to be malformed, or worth a warning.
func (r *recorder) marked() string {
	const warning = 0x600000
	return r.tshark("-Y", fmt.Sprintf("_ws.malformed || _ws.expert.severity >= %d", warning), "-T", "fields",
		"-e", "frame.number", "-e", "iscsi.opcode", "-e", "_ws.expert.message")
}

// tshark decodes what our initiator and our target say to each other, over several
// connections with both digests, without a malformed or warning mark: login with
// CHAP, all data phases, task management, asynchronous messages, Rejects, SNACKs.
func TestCapture(t *testing.T) {
	t.Parallel()
	testproc.Need(t, "tshark")
	dev, err := mem.New(4<<20, 512)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := target.New(target.Options{NopInterval: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	conf := servedConfig(dev)
	conf.Targets[0].Auth = target.Auth{Accounts: []target.Account{{Name: "u", Secret: target.Secret("secret of twelve")}},
		Out: target.Account{Name: "t", Secret: target.Secret("another secret")}}
	if err := srv.Apply(conf); err != nil {
		t.Fatal(err)
	}
	at, _ := srv.Addr(conf.Targets[0].Portals[0])
	rec := newRecorder(t)
	p := newProxy(t, at.String(), func(int, bool, *iscsi.BHS) harm { return pass }, rec.tap)
	defer p.close()

	cfg := multiConfig(3, 1)
	cfg.CHAP = &iscsi.CHAPCredentials{User: "u", Secret: []byte("secret of twelve"), PeerUser: "t", PeerSecret: []byte("another secret")}
	asyncs := make(chan iscsi.Async, 16)
	cfg.OnAsync = func(a iscsi.Async, _ []byte) { asyncs <- a }
	s, d := openMulti(t, p.addr(), cfg)
	load(t, d, 4, 2, 0)
	if err := s.Ping(t.Context(), []byte("are you there")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SendTargets(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := scsi.Read(1<<30, 1)
	if r, err := s.Exec(t.Context(), 0, c.Bytes(), scsi.DirIn, nil, make([]byte, 512)); err != nil || len(r.Sense) == 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := s.LUReset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	// A LUN more: an asynchronous event.
	more := conf.Targets[0].LUNs[0]
	more.Number = 5
	conf.Targets[0].LUNs = append(conf.Targets[0].LUNs, more)
	if err := srv.Apply(conf); err != nil {
		t.Fatal(err)
	}
	if a := <-asyncs; a.Event != iscsi.AsyncSCSI {
		t.Errorf("%+v", a)
	}
	load(t, d, 1, 1, 0)
	// SNACKs for nothing: what is acknowledged is rejected, which costs a connection.
	l := s.first()
	l.push(work{pdu: &iscsi.SNACK{Type: iscsi.SNACKStatus, ITT: iscsi.ReservedTag, TTT: iscsi.ReservedTag}})
	l.push(work{pdu: &iscsi.SNACK{Type: iscsi.SNACKData, ITT: 0x7fff, TTT: iscsi.ReservedTag, RunLength: 1}})
	waitUntil(t, func() bool { return len(s.Connections()) == 2 })
	waitUntil(t, func() bool { return len(srv.Sessions()[0].Conns) == 2 })
	if err := s.AddConnection(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	// tshark guesses whether there are data digests, from the first data segment of a
	// connection, and guesses right when that fits into one packet.
	for range 6 {
		c := scsi.Read(0, 1)
		if r, err := s.Exec(t.Context(), 0, c.Bytes(), scsi.DirIn, nil, make([]byte, 512)); err != nil || r.Err() != nil && r.Status != scsi.StatusCheckCondition {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	load(t, d, 2, 1, 0)
	if err := s.Logout(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.close()
	if err := rec.f.Close(); err != nil {
		t.Fatal(err)
	}
	seen := map[iscsi.Opcode]int{}
	for f := range strings.FieldsFuncSeq(rec.tshark("-Y", "iscsi", "-T", "fields", "-e", "iscsi.opcode"), func(r rune) bool { return r == ',' || r == '\n' }) {
		n, err := strconv.ParseUint(f, 0, 8)
		if err != nil {
			t.Fatal(err)
		}
		seen[iscsi.Opcode(n)]++
	}
	for _, op := range []iscsi.Opcode{iscsi.OpLoginReq, iscsi.OpLoginResp, iscsi.OpScsiCommand, iscsi.OpScsiResponse, iscsi.OpDataOut, iscsi.OpDataIn, iscsi.OpR2T,
		iscsi.OpNopOut, iscsi.OpNopIn, iscsi.OpTextReq, iscsi.OpTextResp, iscsi.OpTaskMgmtReq, iscsi.OpTaskMgmtResp, iscsi.OpLogoutReq, iscsi.OpLogoutResp,
		iscsi.OpSNACK, iscsi.OpReject, iscsi.OpAsync} {
		// A Reject shows the header that it is about, too.
		if want := rec.pdus[op]; want == 0 || seen[op] < want {
			t.Errorf("%s: %d sent, tshark sees %d", op, want, seen[op])
		}
	}
	if cids := rec.tshark("-Y", "iscsi.opcode == 3", "-T", "fields", "-e", "iscsi.cid"); !strings.Contains(cids, "2") {
		t.Errorf("the connections of the session: %q", cids)
	}
	if m := rec.marked(); m != "" {
		t.Errorf("tshark marks:\n%s", m)
	}
}
