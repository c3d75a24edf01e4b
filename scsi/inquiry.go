package scsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ErrParse tells that data of a device server or an application client do not
// follow their layout.
var ErrParse = errors.New("malformed parameter data")

func short(what string, have, want int) error {
	return fmt.Errorf("parse %s: %w: %d bytes of %d", what, ErrParse, have, want)
}

// Version descriptors of standard INQUIRY data (SPC-4 table D.?, "version
// descriptor values").
const (
	VersionSAM5  uint16 = 0x00A0
	VersionSPC4  uint16 = 0x0460
	VersionSBC3  uint16 = 0x04C0
	VersionISCSI uint16 = 0x0960
)

// Peripheral device types and qualifiers (SPC-4 6.4.2).
const (
	TypeDisk    = 0x00
	TypeUnknown = 0x1F
	// QualifierNone in Qualifier: this target port cannot reach a logical unit
	// under this LUN.
	QualifierNone = 0x3
)

// Inquiry is standard INQUIRY data.
//
//	byte 0  qualifier(3) type(5)      1  RMB(1)
//	     2  version (06h SPC-4)       3  NORMACA HISUP(1) format(4)=2
//	     4  additional length         5  SCCS ACC TPGS(2) 3PC(1) PROTECT(1)
//	     6  ENCSERV VS MULTIP(1)      7  CMDQUE(1)
//	     8  vendor(8) 16 product(16) 32 revision(4)
//	    58  version descriptors 8 x 2
type Inquiry struct {
	Qualifier, DeviceType uint8
	Removable             bool
	Version               uint8 // 06h is SPC-4
	TPGS                  uint8 // 01b implicit, 10b explicit, 11b both
	ThirdPartyCopy        bool
	Protect               bool
	MultiPort             bool
	CmdQue                bool
	Vendor                string // at most 8 bytes of ASCII
	Product               string // at most 16
	Revision              string // at most 4
	Versions              []uint16
}

func padded(b []byte, s string) {
	n := copy(b, s)
	for i := n; i < len(b); i++ {
		b[i] = ' '
	}
	for i, c := range b {
		if c < 0x20 || c > 0x7E {
			b[i] = '?'
		}
	}
}

func set(b *byte, on bool, bit uint) {
	if on {
		*b |= 1 << bit
	}
}

// InquiryLen is the length of what Append makes.
const InquiryLen = 96

// Bytes builds the 96 bytes of standard data.
func (q *Inquiry) Bytes() []byte {
	b := make([]byte, InquiryLen)
	b[0] = q.Qualifier<<5 | q.DeviceType&0x1F
	set(&b[1], q.Removable, 7)
	b[2] = q.Version
	b[3] = 0x10 | 0x02 // HISUP: LUNs follow SAM-5; response data format 2
	b[4] = InquiryLen - 5
	b[5] = q.TPGS & 3 << 4
	set(&b[5], q.ThirdPartyCopy, 3)
	set(&b[5], q.Protect, 0)
	set(&b[6], q.MultiPort, 4)
	set(&b[7], q.CmdQue, 1)
	padded(b[8:16], q.Vendor)
	padded(b[16:32], q.Product)
	padded(b[32:36], q.Revision)
	for i, v := range q.Versions {
		if i < 8 {
			binary.BigEndian.PutUint16(b[58+2*i:], v)
		}
	}
	return b
}

// ParseInquiry reads standard data of at least 36 bytes.
func ParseInquiry(b []byte) (*Inquiry, error) {
	if len(b) < 36 {
		return nil, short("inquiry data", len(b), 36)
	}
	q := &Inquiry{
		Qualifier: b[0] >> 5, DeviceType: b[0] & 0x1F, Removable: b[1]&0x80 != 0, Version: b[2],
		TPGS: b[5] >> 4 & 3, ThirdPartyCopy: b[5]&8 != 0, Protect: b[5]&1 != 0, MultiPort: b[6]&0x10 != 0, CmdQue: b[7]&2 != 0,
		Vendor:   strings.TrimRight(string(b[8:16]), " \x00"),
		Product:  strings.TrimRight(string(b[16:32]), " \x00"),
		Revision: strings.TrimRight(string(b[32:36]), " \x00"),
	}
	for i := 58; i+2 <= len(b) && i < 74 && i < 5+int(b[4]); i += 2 {
		if v := binary.BigEndian.Uint16(b[i:]); v != 0 {
			q.Versions = append(q.Versions, v)
		}
	}
	return q, nil
}

// VPD page codes (SPC-4 7.8, SBC-3 6.6).
const (
	VPDSupported     = 0x00
	VPDSerial        = 0x80
	VPDDeviceID      = 0x83
	VPDExtended      = 0x86
	VPDThirdParty    = 0x8F
	VPDBlockLimits   = 0xB0
	VPDBlockDevice   = 0xB1
	VPDLogicalBlocks = 0xB2
)

// VPD frames a page: peripheral byte, page code, length, body.
func VPD(page uint8, body []byte) []byte {
	b := make([]byte, 4, 4+len(body))
	b[0] = TypeDisk
	b[1] = page
	binary.BigEndian.PutUint16(b[2:], uint16(len(body)))
	return append(b, body...)
}

// ParseVPD checks the frame of a page and returns its body, cut to what b
// holds.
func ParseVPD(page uint8, b []byte) ([]byte, error) {
	if len(b) < 4 {
		return nil, short(fmt.Sprintf("vpd page %02xh", page), len(b), 4)
	}
	if b[1] != page {
		return nil, fmt.Errorf("parse vpd page %02xh: %w: the answer is page %02xh", page, ErrParse, b[1])
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	return b[4:min(len(b), 4+n)], nil
}

// SupportedVPD is page 00h; pages are sorted, 00h itself is added.
func SupportedVPD(pages ...uint8) []byte {
	p := append([]byte{VPDSupported}, pages...)
	slices.Sort(p)
	return VPD(VPDSupported, slices.Compact(p))
}

// Designation descriptor constants (SPC-4 7.8.6).
const (
	AssocLU     = 0
	AssocPort   = 1
	AssocTarget = 2

	DesignatorVendor   = 0x0
	DesignatorT10      = 0x1
	DesignatorEUI64    = 0x2
	DesignatorNAA      = 0x3
	DesignatorPort     = 0x4 // relative target port identifier
	DesignatorTPG      = 0x5 // target port group
	DesignatorLUGroup  = 0x6
	DesignatorSCSIName = 0x8
	DesignatorUUID     = 0xA

	CodeBinary = 1
	CodeASCII  = 2
	CodeUTF8   = 3

	ProtocolISCSI = 5
)

// Designator is one descriptor of VPD page 83h.
type Designator struct {
	Assoc, Type, CodeSet uint8
	Value                []byte
}

// DesignatorNAAValue is the LU designator of an NAA identifier (8 or 16 bytes).
func DesignatorNAAValue(naa []byte) Designator {
	return Designator{AssocLU, DesignatorNAA, CodeBinary, naa}
}

// DesignatorT10Value is vendor (8 bytes, padded) followed by a vendor specific id.
func DesignatorT10Value(vendor, id string) Designator {
	v := make([]byte, 8, 8+len(id))
	padded(v, vendor)
	return Designator{AssocLU, DesignatorT10, CodeASCII, append(v, id...)}
}

// DesignatorUUIDValue is the locally assigned UUID designator (SPC-5 7.7.6.12).
func DesignatorUUIDValue(uuid [16]byte) Designator {
	return Designator{AssocLU, DesignatorUUID, CodeBinary, append([]byte{0x10, 0}, uuid[:]...)}
}

// DesignatorPortValue names the target port by its relative port identifier.
func DesignatorPortValue(rel uint16) Designator {
	return Designator{AssocPort, DesignatorPort, CodeBinary, []byte{0, 0, byte(rel >> 8), byte(rel)}}
}

// DesignatorTPGValue names the target port group of the port.
func DesignatorTPGValue(tpg uint16) Designator {
	return Designator{AssocPort, DesignatorTPG, CodeBinary, []byte{0, 0, byte(tpg >> 8), byte(tpg)}}
}

// DesignatorName is a SCSI name string, NUL-terminated and padded to 4 bytes.
func DesignatorName(assoc uint8, name string) Designator {
	v := append([]byte(name), 0)
	for len(v)%4 != 0 {
		v = append(v, 0)
	}
	return Designator{assoc, DesignatorSCSIName, CodeUTF8, v}
}

// Append adds the descriptor.
//
//	byte 0  protocol(4) code set(4)   1  PIV(1) 0 assoc(2) type(4)   3  length   4  designator
func (d Designator) Append(b []byte) []byte {
	h := [4]byte{d.CodeSet & 0xF, d.Assoc&3<<4 | d.Type&0xF, 0, byte(len(d.Value))}
	if d.Assoc != AssocLU {
		h[0] |= ProtocolISCSI << 4
		h[1] |= 0x80
	}
	return append(append(b, h[:]...), d.Value...)
}

// DeviceID is VPD page 83h.
func DeviceID(ds ...Designator) []byte {
	var b []byte
	for _, d := range ds {
		b = d.Append(b)
	}
	return VPD(VPDDeviceID, b)
}

// ParseDeviceID reads the descriptors of page 83h.
func ParseDeviceID(page []byte) ([]Designator, error) {
	b, err := ParseVPD(VPDDeviceID, page)
	if err != nil {
		return nil, err
	}
	return ParseDesignators(b)
}

// ParseDesignators reads designation descriptors.
func ParseDesignators(b []byte) ([]Designator, error) {
	var ds []Designator
	for len(b) > 0 {
		if len(b) < 4 || len(b) < 4+int(b[3]) {
			return ds, short("designation descriptor", len(b), 4)
		}
		n := 4 + int(b[3])
		ds = append(ds, Designator{b[1] >> 4 & 3, b[1] & 0xF, b[0] & 0xF, slices.Clone(b[4:n])})
		b = b[n:]
	}
	return ds, nil
}

// NAA6 makes the 16-byte NAA-6 identifier of a UUID: NAA nibble 6, a company id
// with the locally administered bit set (02424Bh), then the UUID's entropy: its
// bytes folded to 100 bits. Two random UUIDs collide with the chance of 100-bit
// numbers.
func NAA6(uuid [16]byte) [16]byte {
	const company = 0x02424B
	var n [16]byte
	// 28 bits fold into the tail, so that also time-based UUIDs keep every bit's influence.
	f := uuid
	for i := range 4 {
		f[12+i] ^= uuid[i]
	}
	// Nibbles: 6, six of the company id, then 25 of the folded UUID (its last 25).
	put := func(i int, v byte) {
		if i%2 == 0 {
			n[i/2] |= v << 4
		} else {
			n[i/2] |= v & 0xF
		}
	}
	nib := func(i int) byte {
		if i%2 == 0 {
			return f[i/2] >> 4
		}
		return f[i/2] & 0xF
	}
	put(0, 6)
	for i := range 6 {
		put(1+i, byte(uint32(company)>>(4*(5-i)))&0xF)
	}
	for i := range 25 {
		put(7+i, nib(7+i))
	}
	return n
}

// Extended is VPD page 86h (SPC-4 7.8.7), the fields in use.
type Extended struct {
	Simple, Ordered, HeadOfQueue bool // task attributes: SIMPSUP, ORDSUP, HEADSUP
	VolatileCache                bool // V_SUP
	NotifyLUReset                bool // LUICLR: UA to all nexuses on reset
	ExtendedSelfTest             uint16
}

// Bytes builds the page.
func (x *Extended) Bytes() []byte {
	b := make([]byte, 60)
	b[1] = 0 // GROUP_SUP, PRIOR_SUP
	set(&b[1], x.Simple, 0)
	set(&b[1], x.Ordered, 1)
	set(&b[1], x.HeadOfQueue, 2)
	set(&b[2], x.VolatileCache, 0)
	set(&b[3], x.NotifyLUReset, 0)
	binary.BigEndian.PutUint16(b[6:], x.ExtendedSelfTest)
	return VPD(VPDExtended, b)
}

// ParseExtended reads page 86h.
func ParseExtended(page []byte) (*Extended, error) {
	b, err := ParseVPD(VPDExtended, page)
	if err != nil {
		return nil, err
	}
	if len(b) < 8 {
		return nil, short("vpd page 86h", len(b), 8)
	}
	return &Extended{b[1]&1 != 0, b[1]&2 != 0, b[1]&4 != 0, b[2]&1 != 0, b[3]&1 != 0, binary.BigEndian.Uint16(b[6:])}, nil
}

// BlockLimits is VPD page B0h (SBC-3 6.6.3, SBC-4 for the atomic fields). All
// lengths are in logical blocks; 0 means not reported, except where SBC says
// otherwise.
type BlockLimits struct {
	WSNZ                bool
	MaxCompareAndWrite  uint8
	OptimalGranularity  uint16
	MaxTransfer         uint32
	OptimalTransfer     uint32
	MaxPrefetch         uint32
	MaxUnmapBlocks      uint32
	MaxUnmapDescriptors uint32
	UnmapGranularity    uint32
	UnmapAlignment      uint32
	UnmapAlignmentValid bool
	MaxWriteSame        uint64
	MaxAtomic           uint32
	AtomicAlignment     uint32
	AtomicGranularity   uint32
	MaxAtomicBoundary   uint32 // with atomic boundary
	MaxAtomicBoundarySz uint32
}

// Bytes builds the page, 64 bytes.
func (l *BlockLimits) Bytes() []byte {
	b := make([]byte, 0x3C)
	be := binary.BigEndian
	set(&b[0], l.WSNZ, 0)
	b[1] = l.MaxCompareAndWrite
	be.PutUint16(b[2:], l.OptimalGranularity)
	be.PutUint32(b[4:], l.MaxTransfer)
	be.PutUint32(b[8:], l.OptimalTransfer)
	be.PutUint32(b[12:], l.MaxPrefetch)
	be.PutUint32(b[16:], l.MaxUnmapBlocks)
	be.PutUint32(b[20:], l.MaxUnmapDescriptors)
	be.PutUint32(b[24:], l.UnmapGranularity)
	be.PutUint32(b[28:], l.UnmapAlignment&0x7FFFFFFF)
	set(&b[28], l.UnmapAlignmentValid, 7)
	be.PutUint64(b[32:], l.MaxWriteSame)
	be.PutUint32(b[40:], l.MaxAtomic)
	be.PutUint32(b[44:], l.AtomicAlignment)
	be.PutUint32(b[48:], l.AtomicGranularity)
	be.PutUint32(b[52:], l.MaxAtomicBoundary)
	be.PutUint32(b[56:], l.MaxAtomicBoundarySz)
	return VPD(VPDBlockLimits, b)
}

// ParseBlockLimits reads page B0h; the 12-byte body of SBC-2 is accepted.
func ParseBlockLimits(page []byte) (*BlockLimits, error) {
	p, err := ParseVPD(VPDBlockLimits, page)
	if err != nil {
		return nil, err
	}
	if len(p) < 12 {
		return nil, short("vpd page b0h", len(p), 12)
	}
	b := make([]byte, 0x3C)
	copy(b, p)
	be := binary.BigEndian
	return &BlockLimits{
		WSNZ: b[0]&1 != 0, MaxCompareAndWrite: b[1], OptimalGranularity: be.Uint16(b[2:]),
		MaxTransfer: be.Uint32(b[4:]), OptimalTransfer: be.Uint32(b[8:]), MaxPrefetch: be.Uint32(b[12:]),
		MaxUnmapBlocks: be.Uint32(b[16:]), MaxUnmapDescriptors: be.Uint32(b[20:]), UnmapGranularity: be.Uint32(b[24:]),
		UnmapAlignment: be.Uint32(b[28:]) & 0x7FFFFFFF, UnmapAlignmentValid: b[28]&0x80 != 0, MaxWriteSame: be.Uint64(b[32:]),
		MaxAtomic: be.Uint32(b[40:]), AtomicAlignment: be.Uint32(b[44:]), AtomicGranularity: be.Uint32(b[48:]),
		MaxAtomicBoundary: be.Uint32(b[52:]), MaxAtomicBoundarySz: be.Uint32(b[56:]),
	}, nil
}

// BlockDevice is VPD page B1h (SBC-3 6.6.2).
type BlockDevice struct {
	RotationRate uint16 // 1 = non-rotating, 0 = not reported
	FormFactor   uint8
	FUAB, VBULS  bool
	// WABEREQ and WACEREQ tell how reads behave after SANITIZE BLOCK ERASE and
	// CRYPTOGRAPHIC ERASE: 0 not told, 1 they succeed, 2 and 3 they fail.
	WABEREQ, WACEREQ uint8
}

// Bytes builds the page, 64 bytes.
func (d *BlockDevice) Bytes() []byte {
	b := make([]byte, 0x3C)
	binary.BigEndian.PutUint16(b, d.RotationRate)
	b[3] = d.WABEREQ&3<<6 | d.WACEREQ&3<<4 | d.FormFactor&0xF
	set(&b[4], d.FUAB, 1)
	set(&b[4], d.VBULS, 0)
	return VPD(VPDBlockDevice, b)
}

// ParseBlockDevice reads page B1h.
func ParseBlockDevice(page []byte) (*BlockDevice, error) {
	b, err := ParseVPD(VPDBlockDevice, page)
	if err != nil {
		return nil, err
	}
	if len(b) < 5 {
		return nil, short("vpd page b1h", len(b), 5)
	}
	return &BlockDevice{binary.BigEndian.Uint16(b), b[3] & 0xF, b[4]&2 != 0, b[4]&1 != 0, b[3] >> 6, b[3] >> 4 & 3}, nil
}

// Provisioning is VPD page B2h (SBC-3 6.6.4).
type Provisioning struct {
	ThresholdExponent    uint8
	LBPU, LBPWS, LBPWS10 bool
	LBPRZ                bool
	ANCSup               bool
	Type                 uint8 // 0 not reported, 1 resource, 2 thin
}

// Bytes builds the page, 8 bytes.
func (p *Provisioning) Bytes() []byte {
	b := make([]byte, 4)
	b[0] = p.ThresholdExponent
	set(&b[1], p.LBPU, 7)
	set(&b[1], p.LBPWS, 6)
	set(&b[1], p.LBPWS10, 5)
	set(&b[1], p.LBPRZ, 2)
	set(&b[1], p.ANCSup, 1)
	b[2] = p.Type & 7
	return VPD(VPDLogicalBlocks, b)
}

// ParseProvisioning reads page B2h.
func ParseProvisioning(page []byte) (*Provisioning, error) {
	b, err := ParseVPD(VPDLogicalBlocks, page)
	if err != nil {
		return nil, err
	}
	if len(b) < 4 {
		return nil, short("vpd page b2h", len(b), 4)
	}
	return &Provisioning{b[0], b[1]&0x80 != 0, b[1]&0x40 != 0, b[1]&0x20 != 0, b[1]&4 != 0, b[1]&2 != 0, b[2] & 7}, nil
}
