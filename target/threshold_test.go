package target

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// TestThinThreshold: the rise to the threshold is told once to every nexus, or to
// the one that wrote, and again after the use fell below.
func TestThinThreshold(t *testing.T) {
	t.Parallel()
	for _, single := range []bool{false, true} {
		dev, err := mem.New(8<<20, 512)
		if err != nil {
			t.Fatal(err)
		}
		b := newBench(t, Options{}, lunOn(0, dev))
		c, d := b.ready(loginOpt{name: "iqn.2026-01.net.host:c"}), b.ready(loginOpt{name: "iqn.2026-01.net.host:d"})
		r := c.do(0, scsi.ModeSense10(scsi.ModeInfoExceptions, scsi.SubpageProvisioning, 256), nil, 256)
		m, _, err := scsi.ParseMode(r.data, true)
		if err != nil || len(m.Pages) != 1 || len(m.Pages[0].Body) != thresholdLen {
			t.Fatal(m, err)
		}
		m.HasBlock, m.WriteProtect, m.DPOFUA = false, false, false
		body := m.Pages[0].Body
		body[thresholdAt] |= thresholdEnabled
		if single {
			body[0] |= thresholdSITUA
		}
		binary.BigEndian.PutUint32(body[thresholdCountByte:], 3) // units of 1 MiB
		list := m.Bytes10()
		list[0], list[1] = 0, 0
		sel, err := scsi.Build(scsi.OpModeSelect10, scsi.NoSA, scsi.Arg{ID: scsi.FPF, Value: 1}, scsi.Arg{ID: scsi.FParamLen, Value: uint64(len(list))})
		if err != nil {
			t.Fatal(err)
		}
		c.do(0, sel, list, 0).want(t, "mode select", scsi.StatusGood, 0, 0)
		d.do(0, scsi.TestUnitReady(), nil, 0).want(t, "changed", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCModeChanged)
		told := func(x *client, within time.Duration) bool {
			t.Helper()
			for end := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
				if r := x.do(0, scsi.TestUnitReady(), nil, 0); r.status != scsi.StatusGood {
					r.want(t, "threshold", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCThinThreshold)
					return true
				}
				if time.Now().After(end) {
					return false
				}
			}
		}
		mib := make([]byte, 1<<20)
		write := func(at uint64) {
			t.Helper()
			c.do(0, scsi.Write(at*2048, 2048, false), mib, 0).want(t, "write", scsi.StatusGood, 0, 0)
		}
		write(0)
		write(1)
		if told(c, 1500*time.Millisecond) {
			t.Error("told below the threshold")
		}
		write(2)
		if !told(c, 20*time.Second) {
			t.Error("not told")
		}
		if told(d, 100*time.Millisecond) == single {
			t.Errorf("SITUA %v: the other nexus was told: %v", single, !single)
		}
		write(3)
		if told(c, 1500*time.Millisecond) {
			t.Error("told twice")
		}
	}
	// A unit that is not thin has no such page.
	if (&modeState{}).knows(scsi.ModeInfoExceptions) {
		t.Error("pages before init")
	}
}
