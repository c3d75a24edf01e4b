package target

import (
	"bytes"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// TestFormatUnit: everything reads as zeroes afterwards, IMMED answers at once and
// 04/04 tells the progress, a failed format keeps the medium shut until the next.
func TestFormatUnit(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	f := fault.New(l.Device)
	l.Device = f
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	cdb := func(args ...scsi.Arg) scsi.CDB {
		x, err := scsi.Build(scsi.OpFormatUnit, scsi.NoSA, args...)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	fill := func() {
		c.do(0, scsi.Write(7, 1, false), bytes.Repeat([]byte{9}, 512), 0).want(t, "write", scsi.StatusGood, 0, 0)
	}
	clean := func() {
		t.Helper()
		if r := c.do(0, scsi.Read(7, 1), nil, 512); !bytes.Equal(r.data, make([]byte, 512)) {
			t.Error("data are left", r.status, r.sense)
		}
	}
	fill()
	c.do(0, cdb(), nil, 0).want(t, "format", scsi.StatusGood, 0, 0)
	clean()
	data := scsi.Arg{ID: scsi.FFmtData, Value: 1}
	for name, list := range map[string][]byte{"pattern": {0, 0x08, 0, 0}, "defects": {0, 0, 0, 4}, "option without FOV": {0, 0x40, 0, 0}, "field": {1, 0, 0, 0}} {
		c.do(0, cdb(data), list, 0).want(t, name, scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCInvalidFieldParam)
	}
	c.do(0, cdb(data), []byte{0, 0}, 0).want(t, "short list", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCParamListLength)
	c.do(0, cdb(scsi.Arg{ID: scsi.FFmtPInfo, Value: 2}), nil, 0).want(t, "protection", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCInvalidFieldCDB)
	fill()
	hold := make(chan struct{})
	f.Set(fault.Rule{Ops: fault.Zeroes, Hold: hold})
	c.do(0, cdb(data, scsi.Arg{ID: scsi.FLongList, Value: 1}), []byte{0, 0x02, 0, 0, 0, 0, 0, 0}, 0).want(t, "format, immed", scsi.StatusGood, 0, 0)
	r := c.do(0, scsi.TestUnitReady(), nil, 0)
	r.want(t, "while it runs", scsi.StatusCheckCondition, scsi.NotReady, scsi.ASCFormatInProgress)
	if r.sense != nil && !r.sense.HasProgress {
		t.Error("no progress is told")
	}
	close(hold)
	for end := time.Now().Add(20 * time.Second); c.do(0, scsi.TestUnitReady(), nil, 0).status != scsi.StatusGood; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the format does not end")
		}
	}
	clean()
	f.Set(fault.Rule{Ops: fault.Zeroes, Err: block.ErrMedium})
	c.do(0, cdb(), nil, 0).want(t, "failing format", scsi.StatusCheckCondition, scsi.MediumError, scsi.ASCFormatFailed)
	c.do(0, scsi.Read(7, 1), nil, 512).want(t, "read afterwards", scsi.StatusCheckCondition, scsi.MediumError, scsi.ASCFormatFailed)
	f.Set()
	c.do(0, cdb(), nil, 0).want(t, "next format", scsi.StatusGood, 0, 0)
	clean()
}
