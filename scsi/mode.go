package scsi

import (
	"encoding/binary"
	"fmt"
)

// Mode page codes (SPC-4 7.5, SBC-3 6.5).
const (
	ModeErrorRecovery   = 0x01
	ModeDisconnect      = 0x02
	ModeCaching         = 0x08
	ModeControl         = 0x0A
	ModeInfoExceptions  = 0x1C
	ModeAllPages        = 0x3F
	SubpageControlExt   = 0x01
	SubpageProvisioning = 0x02 // of ModeInfoExceptions: logical block provisioning
	SubpageAll          = 0xFF
	ModeCurrent         = 0
	ModeChangeable      = 1
	ModeDefault         = 2
	ModeSaved           = 3
	modeHeader6         = 4
	modeHeader10        = 8
	deviceSpecificWP    = 0x80
	deviceSpecificDPFUA = 0x10
)

// ModePage is a page or subpage with its header.
type ModePage struct {
	Page, Subpage uint8
	Body          []byte // after the 2-byte or 4-byte header
}

// Append adds the page; a page with a subpage code uses the long header (SPF).
func (p ModePage) Append(b []byte) []byte {
	if p.Subpage == 0 {
		return append(append(b, p.Page, byte(len(p.Body))), p.Body...)
	}
	return append(append(b, 0x40|p.Page, p.Subpage, byte(len(p.Body)>>8), byte(len(p.Body))), p.Body...)
}

// ModeData is the parameter list of MODE SENSE and MODE SELECT.
type ModeData struct {
	WriteProtect bool // WP, MODE SENSE only
	DPOFUA       bool // MODE SENSE only
	HasBlock     bool // a block descriptor is present
	Blocks       uint64
	BlockSize    uint32
	LongLBA      bool // LLBAA: the 16-byte descriptor
	Pages        []ModePage
}

func (m *ModeData) block() []byte {
	if !m.HasBlock {
		return nil
	}
	if m.LongLBA {
		b := make([]byte, 16)
		binary.BigEndian.PutUint64(b, m.Blocks)
		binary.BigEndian.PutUint32(b[12:], m.BlockSize)
		return b
	}
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, uint32(min(m.Blocks, 0xFFFFFFFF)))
	b[4] = 0
	b[5], b[6], b[7] = byte(m.BlockSize>>16), byte(m.BlockSize>>8), byte(m.BlockSize)
	return b
}

func (m *ModeData) specific() (s byte) {
	if m.WriteProtect {
		s |= deviceSpecificWP
	}
	if m.DPOFUA {
		s |= deviceSpecificDPFUA
	}
	return s
}

// Bytes6 builds the list with the 4-byte header. It is an error if it does not
// fit the one-byte length.
func (m *ModeData) Bytes6() ([]byte, error) {
	mm := *m
	mm.LongLBA = false
	d := mm.block()
	b := append(make([]byte, modeHeader6, 64), d...)
	for _, p := range m.Pages {
		b = p.Append(b)
	}
	if len(b)-1 > 255 {
		return nil, fmt.Errorf("build mode parameter list (6): %d bytes exceed the header", len(b))
	}
	b[0], b[2], b[3] = byte(len(b)-1), m.specific(), byte(len(d))
	return b, nil
}

// Bytes10 builds the list with the 8-byte header.
func (m *ModeData) Bytes10() []byte {
	d := m.block()
	b := append(make([]byte, modeHeader10, 64), d...)
	for _, p := range m.Pages {
		b = p.Append(b)
	}
	binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	b[3] = m.specific()
	set(&b[4], m.LongLBA && m.HasBlock, 0)
	binary.BigEndian.PutUint16(b[6:], uint16(len(d)))
	return b
}

// ModeError tells where a mode parameter list is wrong; the target makes the
// sense data of it.
type ModeError struct {
	Short bool // cut inside a header, descriptor or page: 05/1A/00
	Byte  int  // else 05/26/00 with this pointer
	Why   string
}

func (e *ModeError) Error() string {
	return fmt.Sprintf("parse mode parameter list: byte %d: %s", e.Byte, e.Why)
}

// Unwrap makes errors.Is(err, ErrParse) true.
func (e *ModeError) Unwrap() error { return ErrParse }

// ParseMode reads a mode parameter list, long (10) or short (6). The header's
// length is not looked at (it is reserved in MODE SELECT). The offset of each
// page within b is returned beside it for field pointers.
func ParseMode(b []byte, long bool) (*ModeData, []int, error) {
	h, bd := modeHeader6, 0
	m := &ModeData{}
	if long {
		h = modeHeader10
	}
	if len(b) < h {
		return nil, nil, &ModeError{Short: true, Byte: len(b), Why: "list ends inside its header"}
	}
	if long {
		bd = int(binary.BigEndian.Uint16(b[6:]))
		m.LongLBA = b[4]&1 != 0
		m.WriteProtect, m.DPOFUA = b[3]&deviceSpecificWP != 0, b[3]&deviceSpecificDPFUA != 0
	} else {
		bd = int(b[3])
		m.WriteProtect, m.DPOFUA = b[2]&deviceSpecificWP != 0, b[2]&deviceSpecificDPFUA != 0
	}
	bdAt := 3
	if long {
		bdAt = 6
	}
	switch {
	case bd == 0:
	case bd == 8 && !m.LongLBA:
		if len(b) < h+8 {
			return nil, nil, &ModeError{Short: true, Byte: bdAt, Why: "list ends inside the block descriptor"}
		}
		m.HasBlock = true
		m.Blocks = uint64(binary.BigEndian.Uint32(b[h:]))
		m.BlockSize = uint32(b[h+5])<<16 | uint32(b[h+6])<<8 | uint32(b[h+7])
	case bd == 16 && m.LongLBA:
		if len(b) < h+16 {
			return nil, nil, &ModeError{Short: true, Byte: bdAt, Why: "list ends inside the block descriptor"}
		}
		m.HasBlock = true
		m.Blocks = binary.BigEndian.Uint64(b[h:])
		m.BlockSize = binary.BigEndian.Uint32(b[h+12:])
	default:
		return nil, nil, &ModeError{Byte: bdAt, Why: fmt.Sprintf("block descriptor length %d", bd)}
	}
	var at []int
	for p := h + bd; p < len(b); {
		pg := ModePage{Page: b[p] & 0x3F}
		ph, n := 2, 0
		if b[p]&0x40 != 0 {
			ph = 4
			if len(b)-p < ph {
				return nil, nil, &ModeError{Short: true, Byte: p, Why: "list ends inside a page header"}
			}
			pg.Subpage, n = b[p+1], int(binary.BigEndian.Uint16(b[p+2:]))
		} else {
			if len(b)-p < ph {
				return nil, nil, &ModeError{Short: true, Byte: p, Why: "list ends inside a page header"}
			}
			n = int(b[p+1])
		}
		if len(b)-p < ph+n {
			return nil, nil, &ModeError{Short: true, Byte: p, Why: "list ends inside a page"}
		}
		pg.Body = b[p+ph : p+ph+n]
		m.Pages = append(m.Pages, pg)
		at = append(at, p)
		p += ph + n
	}
	return m, at, nil
}
