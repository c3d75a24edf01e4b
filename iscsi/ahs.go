package iscsi

import (
	"encoding/binary"
	"fmt"
)

// Additional header segment (§11.2.2):
//
//	0-1 AHSLength   bytes that follow byte 2, without padding
//	2   AHSType     bits 7-6 reserved
//	3   specific    ... padded with zeroes to a multiple of 4
//
// Extended CDB (type 1, §11.2.2.3): byte 3 reserved, then CDB bytes 16.., AHSLength = CDB length - 15.
// Bidirectional read length (type 2, §11.2.2.4): byte 3 reserved, then 4 bytes, AHSLength = 5.
const (
	AHSExtendedCDB uint8 = 1
	AHSBidiRead    uint8 = 2

	// MaxAHS is the largest total of additional header segments in bytes.
	MaxAHS = 255 * 4
	// MaxCDB is the largest CDB in bytes (variable length CDB, SPC-4 §4.2.3).
	MaxCDB = 260
)

// DecodeAHS reads the additional header segments of a SCSI command, as long as
// TotalAHSLength says. ExtCDB aliases ahs. Unknown types are skipped, as §11.2.2
// lets a receiver do; lengths that lie, a second segment of a type, and an extended
// CDB longer than MaxCDB give a *ProtocolError with RejectInvalidField.
func (p *ScsiCommand) DecodeAHS(ahs []byte) error {
	p.ExtCDB, p.Bidi, p.BidiEDTL = nil, false, 0
	for len(ahs) > 0 {
		if len(ahs) < 4 {
			return invalid(OpScsiCommand, fmt.Sprintf("%d bytes left hold no additional header segment", len(ahs)))
		}
		n := int(binary.BigEndian.Uint16(ahs))
		typ := ahs[2] & 0x3f
		size := (3 + n + 3) &^ 3
		if n == 0 || size > len(ahs) {
			return invalid(OpScsiCommand, fmt.Sprintf("AHSLength %d in %d bytes of additional header segments", n, len(ahs)))
		}
		body := ahs[4 : 3+n : 3+n]
		switch typ {
		case AHSExtendedCDB:
			if p.ExtCDB != nil {
				return invalid(OpScsiCommand, "two extended CDBs")
			}
			if len(body) == 0 || len(body) > MaxCDB-16 {
				return invalid(OpScsiCommand, fmt.Sprintf("extended CDB of %d bytes", len(body)))
			}
			p.ExtCDB = body
		case AHSBidiRead:
			if p.Bidi {
				return invalid(OpScsiCommand, "two bidirectional read lengths")
			}
			if len(body) != 4 {
				return invalid(OpScsiCommand, fmt.Sprintf("bidirectional read length of %d bytes", len(body)))
			}
			p.Bidi, p.BidiEDTL = true, binary.BigEndian.Uint32(body)
		}
		ahs = ahs[size:]
	}
	return nil
}

// AppendAHS appends the additional header segments that the command needs: none,
// an extended CDB, a bidirectional read length, or both. len(ExtCDB) <= MaxCDB-16.
func (p *ScsiCommand) AppendAHS(dst []byte) []byte {
	if n := len(p.ExtCDB); n > 0 {
		dst = binary.BigEndian.AppendUint16(dst, uint16(n+1))
		dst = append(dst, AHSExtendedCDB, 0)
		dst = append(dst, p.ExtCDB...)
		for i := n; i%4 != 0; i++ {
			dst = append(dst, 0)
		}
	}
	if p.Bidi {
		dst = append(dst, 0, 5, AHSBidiRead, 0)
		dst = binary.BigEndian.AppendUint32(dst, p.BidiEDTL)
	}
	return dst
}

// SetCDB stores a CDB of 1 to MaxCDB bytes in CDB and ExtCDB. ExtCDB aliases cdb.
func (p *ScsiCommand) SetCDB(cdb []byte) error {
	if len(cdb) == 0 || len(cdb) > MaxCDB {
		return fmt.Errorf("CDB of %d bytes: want 1 to %d", len(cdb), MaxCDB)
	}
	p.CDB = [16]byte{}
	n := copy(p.CDB[:], cdb)
	p.ExtCDB = nil
	if len(cdb) > n {
		p.ExtCDB = cdb[n:]
	}
	return nil
}
