package target

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func (c *client) logSense(t *testing.T, page, sub uint8, more ...scsi.Arg) result {
	t.Helper()
	x, err := scsi.Build(scsi.OpLogSense, scsi.NoSA, append([]scsi.Arg{{ID: scsi.FPC, Value: 1}, {ID: scsi.FPage, Value: uint64(page)},
		{ID: scsi.FSubpage, Value: uint64(sub)}, {ID: scsi.FAlloc, Value: 252}}, more...)...)
	if err != nil {
		t.Fatal(err)
	}
	return c.do(0, x, nil, 252)
}

// TestLogSense: the list of pages is what is answered, the used resources are
// what the store has mapped, and what cannot be known is refused.
func TestLogSense(t *testing.T) {
	t.Parallel()
	d, err := mem.New(8<<20, 512)
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, Options{}, lunOn(0, d))
	c := b.ready(loginOpt{})
	list, err := scsi.ParseLogPage(scsi.LogSupported, 0, c.logSense(t, scsi.LogSupported, 0).data)
	if err != nil || !bytes.Equal(list, []byte{0, scsi.LogProvisioning, scsi.LogExceptions}) {
		t.Errorf("pages % x, %v", list, err)
	}
	for _, p := range list {
		r := c.logSense(t, p, 0)
		r.want(t, "listed page", scsi.StatusGood, 0, 0)
		if _, err := scsi.ParseLogPage(p, 0, r.data); err != nil {
			t.Error(err)
		}
	}
	subs, err := scsi.ParseLogPage(scsi.LogSupported, scsi.LogAllSubpages, c.logSense(t, 0, scsi.LogAllSubpages).data)
	if err != nil || !bytes.Equal(subs, []byte{0, 0, 0, 0xFF, 0x0C, 0, 0x2F, 0}) {
		t.Errorf("subpages % x, %v", subs, err)
	}
	used := func() uint32 {
		t.Helper()
		body, err := scsi.ParseLogPage(scsi.LogProvisioning, 0, c.logSense(t, scsi.LogProvisioning, 0).data)
		ps := scsi.ParseLogParams(body)
		if err != nil || len(ps) != 1 || ps[0].Code != 2 || len(ps[0].Value) != 8 || ps[0].Value[4] != 1 {
			t.Fatalf("%+v, %v", ps, err)
		}
		return binary.BigEndian.Uint32(ps[0].Value)
	}
	if n := used(); n != 0 {
		t.Errorf("%d units used of an empty volume", n)
	}
	c.do(0, scsi.Write(0, 4097, false), make([]byte, 4097*512), 0).want(t, "write", scsi.StatusGood, 0, 0)
	if n := used(); n != 3 { // 2 MiB and a block
		t.Errorf("%d units used, want 3", n)
	}
	for name, r := range map[string]result{
		"temperature": c.logSense(t, 0x0D, 0), "a subpage": c.logSense(t, scsi.LogProvisioning, 1),
		"save": c.logSense(t, 0, 0, scsi.Arg{ID: scsi.FSP, Value: 1}), "pointer": c.logSense(t, scsi.LogProvisioning, 0, scsi.Arg{ID: scsi.FParamPointer, Value: 3}),
	} {
		r.want(t, name, scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCInvalidFieldCDB)
	}
}

// TestSetTargetPortGroups: TPGS says implicit only, so the command is not there
// (SPC-4 6.4.2), whatever its parameters.
func TestSetTargetPortGroups(t *testing.T) {
	t.Parallel()
	b := newBench(t, Options{}, lunOf(t, 0))
	c := b.ready(loginOpt{})
	q, err := scsi.ParseInquiry(c.do(0, scsi.InquiryCDB(96), nil, 96).data)
	if err != nil || q.TPGS != 1 {
		t.Fatal(q, err)
	}
	x, err := scsi.Build(scsi.OpMaintenanceOut, scsi.SASetTPG, scsi.Arg{ID: scsi.FParamLen, Value: 8})
	if err != nil {
		t.Fatal(err)
	}
	c.do(0, x, make([]byte, 8), 0).want(t, "set target port groups", scsi.StatusCheckCondition, scsi.IllegalRequest, scsi.ASCInvalidOpcode)
}
