package target

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func init() {
	handle(scsi.OpFormatUnit, scsi.NoSA, handler{check: checkFormat, run: runFormat, slow: true, unlocked: true})
}

// checkFormat: no protection information, and no defect lists of any format but
// the empty one.
func checkFormat(t *task) *scsi.Sense {
	for _, f := range []scsi.FieldID{scsi.FFmtPInfo, scsi.FDefectFormat} {
		if t.cdb.Get(f) != 0 {
			return scsi.InvalidField(&t.cdb, f)
		}
	}
	return nil
}

// runFormat makes every block read as zeroes; a thin unit lets go of them (SBC-3
// 5.4). The parameter list has a header only:
//
//	byte 0  0   1  FOV DPRY DCRT STPF IP 0 IMMED 0   2  defect list length(2), or with LONGLIST 4(4)
func runFormat(x *exec) error {
	immed := false
	if x.cdb.Is(scsi.FFmtData) {
		n := 4
		if x.cdb.Is(scsi.FLongList) {
			n = 8
		}
		if x.want < n || x.buf == nil {
			return scsi.Check(scsi.IllegalRequest, scsi.ASCParamListLength)
		}
		b := x.buf.B[:n]
		defects := uint32(binary.BigEndian.Uint16(b[2:]))
		if n == 8 {
			defects = binary.BigEndian.Uint32(b[4:])
		}
		const fov, options, ip, imm = 0x80, 0x70, 0x08, 0x02
		switch {
		case b[0] != 0:
			return scsi.InvalidParam(0, 7)
		case b[1]&ip != 0: // zeroes are the only pattern
			return scsi.InvalidParam(1, 3)
		case b[1]&fov == 0 && b[1]&options != 0:
			return scsi.InvalidParam(1, 7)
		case defects != 0:
			return scsi.InvalidParam(n/2, 7)
		}
		immed = b[1]&imm != 0
	}
	return x.start(job{scsi.ASCFormatInProgress, scsi.ASCFormatFailed, immed, x.lu.format})
}

func (u *logicalUnit) format(ctx context.Context, pr *progress) error {
	size := u.dev.Info().Size
	const span = 64 << 20
	for at := int64(0); at < size; at += span {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(span, size-at)
		if err := pr.step(at, size, func() error { return u.dev.WriteZeroes(ctx, at, n, block.MayUnmap) }); err != nil {
			return fmt.Errorf("format: %w", err)
		}
	}
	return pr.step(size, size, func() error { return u.dev.Flush(ctx) })
}
