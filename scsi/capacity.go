package scsi

import "encoding/binary"

// Capacity is what READ CAPACITY reports (SBC-3 5.15, 5.16).
type Capacity struct {
	LastLBA   uint64
	BlockSize uint32
	// From READ CAPACITY (16) only.
	PhysExponent   uint8 // 2^n logical blocks per physical block
	LowestAligned  uint16
	Thin           bool // LBPME
	ThinReadsZeros bool // LBPRZ
}

// Bytes10 is the data of READ CAPACITY (10); the last LBA is FFFFFFFFh if it
// does not fit, which sends the initiator to the 16-byte form.
func (c *Capacity) Bytes10() []byte {
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, uint32(min(c.LastLBA, 0xFFFFFFFF)))
	binary.BigEndian.PutUint32(b[4:], c.BlockSize)
	return b
}

// Bytes16 is the 32 bytes of READ CAPACITY (16).
func (c *Capacity) Bytes16() []byte {
	b := make([]byte, 32)
	binary.BigEndian.PutUint64(b, c.LastLBA)
	binary.BigEndian.PutUint32(b[8:], c.BlockSize)
	b[13] = c.PhysExponent & 0xF
	binary.BigEndian.PutUint16(b[14:], c.LowestAligned&0x3FFF)
	set(&b[14], c.Thin, 7)
	set(&b[14], c.ThinReadsZeros, 6)
	return b
}

// ParseCapacity10 reads 8 bytes.
func ParseCapacity10(b []byte) (*Capacity, error) {
	if len(b) < 8 {
		return nil, short("read capacity (10) data", len(b), 8)
	}
	return &Capacity{LastLBA: uint64(binary.BigEndian.Uint32(b)), BlockSize: binary.BigEndian.Uint32(b[4:])}, nil
}

// ParseCapacity16 reads at least 12 bytes.
func ParseCapacity16(b []byte) (*Capacity, error) {
	if len(b) < 12 {
		return nil, short("read capacity (16) data", len(b), 12)
	}
	c := &Capacity{LastLBA: binary.BigEndian.Uint64(b), BlockSize: binary.BigEndian.Uint32(b[8:])}
	if len(b) >= 16 {
		c.PhysExponent = b[13] & 0xF
		c.LowestAligned = binary.BigEndian.Uint16(b[14:]) & 0x3FFF
		c.Thin, c.ThinReadsZeros = b[14]&0x80 != 0, b[14]&0x40 != 0
	}
	return c, nil
}
