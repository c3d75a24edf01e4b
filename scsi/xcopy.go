package scsi

import (
	"encoding/binary"
	"slices"
)

// Descriptor types of EXTENDED COPY (SPC-4 6.4.5, 6.4.6).
const (
	CSCDIdentification = 0xE4
	SegmentBlockBlock  = 0x02

	copyHeaderLen     = 16
	cscdLen           = 32
	segmentLen        = 28
	maxCSCDDesignator = 20
)

// CSCD is a copy source or destination: the identification descriptor, 32 bytes.
//
//	byte 0  E4h   1  LU ID TYPE(2) NUL(1) device type(5)   4  code set   5  assoc(2) type(4)
//	     7  designator length   8  designator, 20 bytes   29  block length, 3 bytes
type CSCD struct {
	Type      uint8 // descriptor type code
	LUIDType  uint8 // 0 = logical unit number
	Null      bool
	ID        Designator
	BlockSize uint32
}

// CopySegment is the block device to block device descriptor, 28 bytes.
//
//	byte 0  02h   1  DC(bit 1) CAT(bit 0)   2  length   4  source index   6  destination index
//	    10  blocks   12  source LBA   20  destination LBA
type CopySegment struct {
	Type            uint8
	DestCount       bool // DC: Blocks are of the destination
	Source, Dest    uint16
	Blocks          uint16
	SrcLBA, DestLBA uint64
}

// CopyList is the parameter list of EXTENDED COPY (LID1).
//
//	byte 0  list identifier   1  STR(1) list id usage(2) priority(3)   2  CSCD list length
//	     8  segment list length   12  inline data length   16  descriptors
type CopyList struct {
	ID       uint8
	IDUsage  uint8 // 3 = the identifier is not used
	CSCDs    []CSCD
	Segments []CopySegment
}

// CopyLimits are what a copy manager takes; they stand in RECEIVE COPY OPERATING
// PARAMETERS and in VPD page 8Fh.
type CopyLimits struct {
	CSCDs, Segments uint16
	DescriptorBytes uint32
	SegmentBytes    uint32
	Concurrent      uint8
	Granularity     uint8 // log2 of bytes
}

// Bytes builds the list.
func (l *CopyList) Bytes() []byte {
	b := make([]byte, copyHeaderLen)
	b[0], b[1] = l.ID, l.IDUsage&3<<3
	for _, c := range l.CSCDs {
		var d [cscdLen]byte
		d[0], d[1] = c.Type, c.LUIDType&3<<6
		set(&d[1], c.Null, 5)
		d[4], d[5] = c.ID.CodeSet&0xF, c.ID.Assoc&3<<4|c.ID.Type&0xF
		d[7] = byte(copy(d[8:8+maxCSCDDesignator], c.ID.Value))
		d[29], d[30], d[31] = byte(c.BlockSize>>16), byte(c.BlockSize>>8), byte(c.BlockSize)
		b = append(b, d[:]...)
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-copyHeaderLen))
	n := len(b)
	for _, s := range l.Segments {
		var d [segmentLen]byte
		d[0] = s.Type
		set(&d[1], s.DestCount, 1)
		binary.BigEndian.PutUint16(d[2:], segmentLen-4)
		binary.BigEndian.PutUint16(d[4:], s.Source)
		binary.BigEndian.PutUint16(d[6:], s.Dest)
		binary.BigEndian.PutUint16(d[10:], s.Blocks)
		binary.BigEndian.PutUint64(d[12:], s.SrcLBA)
		binary.BigEndian.PutUint64(d[20:], s.DestLBA)
		b = append(b, d[:]...)
	}
	binary.BigEndian.PutUint32(b[8:], uint32(len(b)-n))
	return b
}

// ParseCopyList reads a parameter list against limits; errors are sense data
// (SPC-4 6.4.3.4): a truncated list 05/1A/00, too many descriptors 05/26/06 and
// /08, unsupported ones 05/26/07 and /09. An empty list is no error.
func ParseCopyList(b []byte, lim CopyLimits) (*CopyList, *Sense) {
	if len(b) == 0 {
		return &CopyList{}, nil
	}
	short := Check(IllegalRequest, ASCParamListLength)
	if len(b) < copyHeaderLen {
		return nil, short
	}
	l := &CopyList{ID: b[0], IDUsage: b[1] >> 3 & 3}
	nc := uint64(binary.BigEndian.Uint16(b[2:]))
	ns := uint64(binary.BigEndian.Uint32(b[8:]))
	ni := uint64(binary.BigEndian.Uint32(b[12:]))
	if nc+ns > uint64(lim.DescriptorBytes) || copyHeaderLen+nc+ns+ni > uint64(len(b)) || ni > 0 {
		return nil, short
	}
	at := copyHeaderLen
	for end := at + int(nc); at < end; at += cscdLen {
		d := b[at:end]
		if d[0] != CSCDIdentification {
			return nil, &Sense{Key: IllegalRequest, Code: ASCUnsupportedTargetDesc, Pointer: &FieldPointer{Byte: uint16(at), Bit: 7}}
		}
		if len(d) < cscdLen {
			return nil, short
		}
		if len(l.CSCDs) == int(lim.CSCDs) {
			return nil, Check(IllegalRequest, ASCTooManyTargetDesc)
		}
		if d[7] > maxCSCDDesignator {
			return nil, InvalidParam(at+7, 7)
		}
		l.CSCDs = append(l.CSCDs, CSCD{
			Type: d[0], LUIDType: d[1] >> 6, Null: d[1]&0x20 != 0,
			ID:        Designator{Assoc: d[5] >> 4 & 3, Type: d[5] & 0xF, CodeSet: d[4] & 0xF, Value: slices.Clone(d[8 : 8+d[7]])},
			BlockSize: uint32(d[29])<<16 | uint32(d[30])<<8 | uint32(d[31]),
		})
	}
	for end := at + int(ns); at < end; {
		d := b[at:end]
		if d[0] != SegmentBlockBlock {
			return nil, &Sense{Key: IllegalRequest, Code: ASCUnsupportedSegmentDesc, Pointer: &FieldPointer{Byte: uint16(at), Bit: 7}}
		}
		if len(d) < segmentLen {
			return nil, short
		}
		if binary.BigEndian.Uint16(d[2:]) != segmentLen-4 {
			return nil, InvalidParam(at+2, 7)
		}
		if len(l.Segments) == int(lim.Segments) {
			return nil, Check(IllegalRequest, ASCTooManySegmentDesc)
		}
		l.Segments = append(l.Segments, CopySegment{
			Type: d[0], DestCount: d[1]&2 != 0, Source: binary.BigEndian.Uint16(d[4:]), Dest: binary.BigEndian.Uint16(d[6:]),
			Blocks: binary.BigEndian.Uint16(d[10:]), SrcLBA: binary.BigEndian.Uint64(d[12:]), DestLBA: binary.BigEndian.Uint64(d[20:]),
		})
		at += segmentLen
	}
	return l, nil
}

// Copy manager states of RECEIVE COPY STATUS (LID1).
const (
	CopyInProgress = 0
	CopyDone       = 1
	CopyFailed     = 2
)

// CopyStatus is the data of RECEIVE COPY STATUS (LID1), 12 bytes.
type CopyStatus struct {
	State    uint8
	Segments uint16
	Bytes    uint32 // transfer count
}

// Bytes12 builds the data.
func (c *CopyStatus) Bytes12() []byte {
	b := make([]byte, 12)
	binary.BigEndian.PutUint32(b, 8)
	b[4] = c.State & 0x7F
	binary.BigEndian.PutUint16(b[5:], c.Segments)
	binary.BigEndian.PutUint32(b[8:], c.Bytes) // transfer count units 00h: bytes
	return b
}

// ParseCopyStatus reads it.
func ParseCopyStatus(b []byte) (*CopyStatus, error) {
	if len(b) < 12 {
		return nil, short("copy status", len(b), 12)
	}
	return &CopyStatus{b[4] & 0x7F, binary.BigEndian.Uint16(b[5:]), binary.BigEndian.Uint32(b[8:])}, nil
}

// OperatingParameters is the data of RECEIVE COPY OPERATING PARAMETERS.
func (l CopyLimits) OperatingParameters() []byte {
	b := make([]byte, 44)
	binary.BigEndian.PutUint16(b[8:], l.CSCDs)
	binary.BigEndian.PutUint16(b[10:], l.Segments)
	binary.BigEndian.PutUint32(b[12:], l.DescriptorBytes)
	binary.BigEndian.PutUint32(b[16:], l.SegmentBytes)
	binary.BigEndian.PutUint16(b[34:], uint16(l.Concurrent))
	b[36], b[37] = l.Concurrent, l.Granularity
	b = append(b, SegmentBlockBlock, CSCDIdentification)
	b[43] = 2
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// ThirdPartyPage is VPD page 8Fh (SPC-4 7.8.17) with the descriptors supported
// commands, parameter data and supported descriptors.
func (l CopyLimits) ThirdPartyPage() []byte {
	var b []byte
	add := func(typ uint16, body []byte) {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		b = binary.BigEndian.AppendUint16(b, typ)
		b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
		b = append(b, body...)
	}
	cmds := []byte{
		byte(OpExtendedCopy), 1, SAExtendedCopyLID1,
		byte(OpReceiveCopyResults), 2, SACopyStatusLID1, SACopyOperatingParams,
	}
	add(0x0001, append([]byte{byte(len(cmds))}, cmds...))
	p := make([]byte, 28)
	binary.BigEndian.PutUint16(p[4:], l.CSCDs)
	binary.BigEndian.PutUint16(p[6:], l.Segments)
	binary.BigEndian.PutUint32(p[8:], l.DescriptorBytes)
	add(0x0004, p)
	add(0x0008, []byte{2, SegmentBlockBlock, CSCDIdentification})
	return VPD(VPDThirdParty, b)
}
