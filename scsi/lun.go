package scsi

import (
	"encoding/binary"
	"fmt"
)

// LUN is a logical unit number as an application sees it, 0 to 16383. On the
// wire it is the first level of the 8-byte field of SAM-5 4.7.
type LUN uint16

// MaxLUN is the highest LUN that flat space addressing holds.
const MaxLUN LUN = 0x3FFF

// LUN addresses of well-known logical units (SAM-5 4.7.7.5.1).
const (
	WellKnownReportLuns = 0xC101
)

// Wire encodes l: peripheral device addressing to 255 (what every initiator
// reads), flat space addressing above.
func (l LUN) Wire() (b [8]byte) {
	if l < 256 {
		b[1] = byte(l)
	} else {
		binary.BigEndian.PutUint16(b[:], 0x4000|uint16(l&MaxLUN))
	}
	return b
}

// ParseLUN decodes a single level LUN: peripheral device addressing with bus 0
// and flat space addressing. Anything else names no logical unit here.
func ParseLUN(b [8]byte) (LUN, error) {
	for _, x := range b[2:] {
		if x != 0 {
			return 0, fmt.Errorf("parse lun % x: %w: more than one level", b, ErrParse)
		}
	}
	switch b[0] >> 6 {
	case 0:
		if b[0] != 0 {
			return 0, fmt.Errorf("parse lun % x: %w: bus %d", b, ErrParse, b[0])
		}
		return LUN(b[1]), nil
	case 1:
		return LUN(binary.BigEndian.Uint16(b[:])) & MaxLUN, nil
	}
	return 0, fmt.Errorf("parse lun % x: %w: address method %d", b, ErrParse, b[0]>>6)
}

// ReportLuns builds the parameter data of REPORT LUNS (SPC-4 6.33): length in
// bytes, 4 reserved bytes, 8 bytes for each LUN.
func ReportLuns(luns []LUN) []byte {
	b := make([]byte, 8, 8+8*len(luns))
	binary.BigEndian.PutUint32(b, uint32(8*len(luns)))
	for _, l := range luns {
		w := l.Wire()
		b = append(b, w[:]...)
	}
	return b
}

// ParseReportLuns returns the LUNs of the parameter data and the length in
// bytes that the whole list would have; the list may be cut by the allocation
// length. LUNs of other addressing methods are left out.
func ParseReportLuns(b []byte) (luns []LUN, total int, err error) {
	if len(b) < 8 {
		return nil, 0, short("report luns data", len(b), 8)
	}
	total = 8 + int(binary.BigEndian.Uint32(b))
	for p := 8; p+8 <= len(b) && p+8 <= total; p += 8 {
		if l, err := ParseLUN([8]byte(b[p : p+8])); err == nil {
			luns = append(luns, l)
		}
	}
	return luns, total, nil
}
