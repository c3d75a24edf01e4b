package target

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func sanitizeCDB(t *testing.T, sa int, immed bool, n int) scsi.CDB {
	t.Helper()
	i := uint64(0)
	if immed {
		i = 1
	}
	c, err := scsi.Build(scsi.OpSanitize, sa, scsi.Arg{ID: scsi.FImmed, Value: i}, scsi.Arg{ID: scsi.FParamLen, Value: uint64(n)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSanitize(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	fill := func() {
		c.do(0, scsi.Write(0, 2048, false), bytes.Repeat([]byte("secret.."), 128<<10), 0).want(t, "fill", scsi.StatusGood, 0, 0)
	}
	whole := func() []byte {
		p := make([]byte, 1<<20)
		if err := l.Device.ReadAt(t.Context(), p, 0); err != nil {
			t.Fatal(err)
		}
		return p
	}
	fill()
	c.do(0, sanitizeCDB(t, scsi.SASanitizeBlockErase, false, 0), nil, 0).want(t, "block erase", scsi.StatusGood, 0, 0)
	if !bytes.Equal(whole(), make([]byte, 1<<20)) {
		t.Error("block erase left data")
	}
	fill()
	list := append([]byte{2 | 0x80, 0, 0, 3}, 1, 2, 3) // two passes, inverted
	c.do(0, sanitizeCDB(t, scsi.SASanitizeOverwrite, false, len(list)), list, 0).want(t, "overwrite", scsi.StatusGood, 0, 0)
	p := whole()
	for i, v := range p {
		if v != ^[]byte{1, 2, 3}[i%512%3] {
			t.Fatalf("byte %d is %02x after the second pass", i, v)
		}
	}
	for name, x := range map[string]struct {
		list []byte
		code scsi.ASC
	}{
		"no pass":             {[]byte{0, 0, 0, 1, 9}, scsi.ASCInvalidFieldParam},
		"no pattern":          {[]byte{1, 0, 0, 0, 9}, scsi.ASCInvalidFieldParam},
		"pattern too long":    {[]byte{1, 0, 2, 1, 9}, scsi.ASCInvalidFieldParam},
		"pattern beyond list": {[]byte{1, 0, 0, 9, 9}, scsi.ASCInvalidFieldParam},
		"no list":             {[]byte{1, 0, 0, 0}, scsi.ASCInvalidFieldCDB},
	} {
		c.do(0, sanitizeCDB(t, scsi.SASanitizeOverwrite, false, len(x.list)), x.list, 0).want(t, name, scsi.StatusCheckCondition, scsi.IllegalRequest, x.code)
	}
	c.do(0, scsi.Read(0, 1), nil, 512).want(t, "afterwards", scsi.StatusGood, 0, 0)
}

// TestSanitizeGoesOn: while it runs everything else is 02/04/1B; aborts and
// resets end the command and not the operation; a fence ends it.
func TestSanitizeGoesOn(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	hold := make(chan struct{})
	f := fault.New(l.Device, fault.Rule{Ops: fault.Write, Hold: hold})
	l.Device = f
	b := newBench(t, Options{}, l)
	c := b.ready(loginOpt{})
	list := []byte{1, 0, 0, 1, 7}
	p := c.command(0, sanitizeCDB(t, scsi.SASanitizeOverwrite, false, len(list)), list, 0)
	c.send(p, list)
	waitFor(t, func() bool { return f.Hits() == 1 })
	running := func(c *client) {
		t.Helper()
		r := c.do(0, scsi.TestUnitReady(), nil, 0)
		r.want(t, "TUR", scsi.StatusCheckCondition, scsi.NotReady, scsi.ASCSanitizeInProgress)
		if r.sense == nil || !r.sense.HasProgress {
			t.Error("no progress is told")
		}
		c.do(0, scsi.Write(0, 1, false), make([]byte, 512), 0).want(t, "write", scsi.StatusCheckCondition, scsi.NotReady, scsi.ASCSanitizeInProgress)
		c.do(0, scsi.InquiryCDB(36), nil, 36).want(t, "INQUIRY", scsi.StatusGood, 0, 0)
	}
	running(c)
	c.tmf(iscsi.FuncLUReset, 0, iscsi.ReservedTag, 0)
	var r iscsi.TaskMgmtResponse
	c.must(&r)
	if r.Response != iscsi.TaskComplete {
		t.Error(r.Response)
	}
	c.do(0, scsi.TestUnitReady(), nil, 0).want(t, "reset", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCDeviceReset)
	running(c)
	o := b.login(loginOpt{name: "iqn.2026-01.net.host:o"})
	o.do(0, scsi.TestUnitReady(), nil, 0).want(t, "first", scsi.StatusCheckCondition, scsi.UnitAttention, scsi.ASCPowerOn)
	running(o)

	// The initiator that asked for it is fenced: it must not write on.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- b.srv.CutInitiator(ctx, []string{"iqn.2026-01.net.host:a"}, 1) }()
	select {
	case err := <-done:
		t.Fatalf("cut acknowledged with a write in the backend: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f.Set(fault.Rule{Ops: fault.Write, Err: block.ErrMedium})
	hits := f.Hits()
	time.Sleep(20 * time.Millisecond)
	if f.Hits() != hits {
		t.Error("it writes on after the cut")
	}
	f.Set()
	o.do(0, scsi.Read(0, 1), nil, 512).want(t, "failure mode", scsi.StatusCheckCondition, scsi.MediumError, scsi.ASCSanitizeFailed)
	o.do(0, sanitizeCDB(t, scsi.SASanitizeExitFailure, false, 0), nil, 0).want(t, "exit failure mode", scsi.StatusGood, 0, 0)
	o.do(0, scsi.Read(0, 1), nil, 512).want(t, "afterwards", scsi.StatusGood, 0, 0)
}
