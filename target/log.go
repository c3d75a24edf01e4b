package target

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/blockhouse-san/blockhouse/scsi"
)

func init() {
	handle(scsi.OpLogSense, scsi.NoSA, handler{check: checkLogSense, run: runLogSense, slow: true})
}

// thresholdExponent: resource counts of the provisioning log page are in units of
// 2^11 blocks, 1 MiB of 512 bytes (SBC-3 6.6.4).
const thresholdExponent = 11

// logPages are the pages of a unit. There is no temperature, no motor and no
// background scan here, so there are no pages that would invent them.
func (u *logicalUnit) logPages() (ps []uint8) {
	ps = append(ps, scsi.LogSupported)
	if u.dev.Info().Caps.Thin {
		ps = append(ps, scsi.LogProvisioning)
	}
	return append(ps, scsi.LogExceptions)
}

func checkLogSense(t *task) *scsi.Sense {
	c := &t.cdb
	page, sub := uint8(c.Get(scsi.FPage)), uint8(c.Get(scsi.FSubpage))
	known := false
	for _, p := range t.lu.logPages() {
		known = known || p == page
	}
	switch {
	case c.Is(scsi.FSP): // nothing is saved
		return scsi.InvalidField(c, scsi.FSP)
	case !known:
		return scsi.InvalidField(c, scsi.FPage)
	case sub != 0 && !(page == scsi.LogSupported && sub == scsi.LogAllSubpages):
		return scsi.InvalidField(c, scsi.FSubpage)
	case c.Get(scsi.FPC) > 1: // threshold and default values: there are none
		return scsi.InvalidField(c, scsi.FPC)
	case c.Get(scsi.FParamPointer) > 2 || page != scsi.LogProvisioning && c.Get(scsi.FParamPointer) > 0:
		return scsi.InvalidField(c, scsi.FParamPointer)
	}
	return nil
}

func runLogSense(x *exec) error {
	page, sub := uint8(x.cdb.Get(scsi.FPage)), uint8(x.cdb.Get(scsi.FSubpage))
	switch page {
	case scsi.LogSupported:
		var b []byte
		for _, p := range x.lu.logPages() {
			b = append(b, p)
			if sub != 0 {
				b = append(b, 0)
				if p == scsi.LogSupported {
					b = append(b, p, scsi.LogAllSubpages)
				}
			}
		}
		x.reply(scsi.LogPage(page, sub, b))
	case scsi.LogProvisioning:
		used, err := x.lu.used(x.ctx)
		if err != nil {
			return err
		}
		// Parameter 2, used LBA mapping resources, of this logical unit alone. What is
		// available is the file system's, shared and not known here.
		v := make([]byte, 8)
		binary.BigEndian.PutUint32(v, used)
		v[4] = 1
		x.reply(scsi.LogPage(page, 0, scsi.LogParams(scsi.LogParam{Code: 2, Control: scsi.LogBinaryList, Value: v})))
	default:
		// No exception; the temperature is not known (FFh).
		x.reply(scsi.LogPage(page, 0, scsi.LogParams(scsi.LogParam{Code: 0, Control: scsi.LogBinaryList, Value: []byte{0, 0, 0xFF, 0}})))
	}
	return nil
}

// used counts what is mapped, in threshold units rounded up.
func (u *logicalUnit) used(ctx context.Context) (uint32, error) {
	i := u.dev.Info()
	var sum int64
	const span = 4 << 30
	for at := int64(0); at < i.Size; at += span {
		es, err := u.dev.Extents(ctx, at, min(span, i.Size-at))
		if err != nil {
			return 0, fmt.Errorf("count what is mapped: %w", err)
		}
		for _, e := range es {
			if e.Mapped {
				sum += e.Len
			}
		}
	}
	unit := int64(i.BlockSize) << thresholdExponent
	return uint32((sum + unit - 1) / unit), nil
}
