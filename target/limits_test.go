package target

import (
	"testing"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// A target's own limits are used at its logins, and only there.
func TestTargetLimits(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	other := b.conf.Targets[0]
	other.IQN = "iqn.2026-01.net.blockhouse:t2"
	w := DefaultWant()
	w.MaxBurstLength, w.FirstBurstLength, w.InitialR2T, w.HeaderDigests = 65536, 4096, true, []string{"CRC32C"}
	other.Want, other.MaxSend, other.QueueDepth = w, 1024, 8
	b.conf.Targets = append(b.conf.Targets, other)
	b.apply()
	offers := kv("MaxBurstLength=1048576", "FirstBurstLength=262144", "InitialR2T=No", "HeaderDigest=None,CRC32C", "MaxRecvDataSegmentLength=65536")
	for _, x := range []struct {
		iqn           string
		burst, window int
		digest        bool
		pdus          int
	}{{testIQN, 1 << 20, 128, false, 1}, {other.IQN, 65536, 8, true, 4}} {
		c := dial(t, b.addr())
		if st := c.tryLogin(loginOpt{target: x.iqn, isid: iscsi.ISID{byte(x.burst)}, keys: offers}); st != iscsi.StatusSuccess {
			t.Fatal(st)
		}
		if c.p.MaxBurstLength != x.burst || c.p.HeaderDigest != x.digest || int(c.maxCmd.Diff(c.cmdSN))+1 != x.window {
			t.Errorf("%s: %+v, window to %d from %d", x.iqn, c.p, c.maxCmd, c.cmdSN)
		}
		c.clearUA(0)
		c.send(c.command(0, scsi.Read(0, 8), nil, 4096))
		n := 0
		for {
			bh, d, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			if n++; len(d) > 4096/x.pdus {
				t.Errorf("%s: a segment of %d bytes", x.iqn, len(d))
			}
			if bh.Opcode() == iscsi.OpDataIn && bh[1]&1 != 0 {
				break
			}
		}
		if n != x.pdus {
			t.Errorf("%s: %d Data-In", x.iqn, n)
		}
	}
	bad := b.conf
	bad.Targets[1].Want.DataPDUInOrder = false
	if err := bad.Validate(); err == nil {
		t.Error("data out of order were promised")
	}
}
