package scsi

import (
	"encoding/binary"
	"fmt"
)

// UnmapRange is one block descriptor of an UNMAP parameter list.
type UnmapRange struct {
	LBA    uint64
	Blocks uint32
}

// UnmapList builds the parameter list of UNMAP (SBC-3 5.28.2).
//
//	byte 0  data length (rest)   2  block descriptor length   4  reserved   8  {lba 8, blocks 4, reserved 4} ...
func UnmapList(rs []UnmapRange) []byte {
	b := make([]byte, 8, 8+16*len(rs))
	binary.BigEndian.PutUint16(b, uint16(6+16*len(rs)))
	binary.BigEndian.PutUint16(b[2:], uint16(16*len(rs)))
	for _, r := range rs {
		b = binary.BigEndian.AppendUint64(b, r.LBA)
		b = binary.BigEndian.AppendUint32(b, r.Blocks)
		b = append(b, 0, 0, 0, 0)
	}
	return b
}

// ParseUnmap reads a parameter list. Errors are sense data: a list below 8 bytes
// or shorter than its own lengths is 05/1A/00, a block descriptor length that is
// no multiple of 16 is 05/26/00. An empty list is no error.
func ParseUnmap(b []byte) ([]UnmapRange, *Sense) {
	if len(b) == 0 {
		return nil, nil
	}
	if len(b) < 8 {
		return nil, Check(IllegalRequest, ASCParamListLength)
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n%16 != 0 {
		return nil, InvalidParam(2, -1)
	}
	if int(binary.BigEndian.Uint16(b))+2 > len(b) || 8+n > len(b) {
		return nil, Check(IllegalRequest, ASCParamListLength)
	}
	rs := make([]UnmapRange, 0, n/16)
	for p := 8; p < 8+n; p += 16 {
		rs = append(rs, UnmapRange{binary.BigEndian.Uint64(b[p:]), binary.BigEndian.Uint32(b[p+8:])})
	}
	return rs, nil
}

// Provisioning states of GET LBA STATUS (SBC-3 5.6.2).
const (
	LBAMapped      = 0
	LBADeallocated = 1
	LBAAnchored    = 2
)

// LBAStatus is one descriptor of GET LBA STATUS.
type LBAStatus struct {
	LBA    uint64
	Blocks uint32
	State  uint8
}

// LBAStatusList builds the parameter data of GET LBA STATUS.
func LBAStatusList(ds []LBAStatus) []byte {
	b := make([]byte, 8, 8+16*len(ds))
	binary.BigEndian.PutUint32(b, uint32(4+16*len(ds)))
	for _, d := range ds {
		b = binary.BigEndian.AppendUint64(b, d.LBA)
		b = binary.BigEndian.AppendUint32(b, d.Blocks)
		b = append(b, d.State&0xF, 0, 0, 0)
	}
	return b
}

// ParseLBAStatus reads the descriptors that b holds whole.
func ParseLBAStatus(b []byte) ([]LBAStatus, error) {
	if len(b) < 8 {
		return nil, short("lba status", len(b), 8)
	}
	end := min(len(b), 4+int(binary.BigEndian.Uint32(b)))
	var ds []LBAStatus
	for p := 8; p+16 <= end; p += 16 {
		ds = append(ds, LBAStatus{binary.BigEndian.Uint64(b[p:]), binary.BigEndian.Uint32(b[p+8:]), b[p+12] & 0xF})
	}
	return ds, nil
}

// Reporting of REPORT SUPPORTED OPERATION CODES (SPC-4 6.35).
const (
	ReportAll      = 0
	ReportOne      = 1 // by operation code, which must have no service actions
	ReportOneSA    = 2 // by operation code and service action, which it must have
	ReportOneEqual = 3 // either
)

func timeouts(b []byte, c *Command) []byte {
	b = append(b, 0, 0x0A, 0, 0)
	b = binary.BigEndian.AppendUint32(b, c.Timeout)
	return binary.BigEndian.AppendUint32(b, c.Timeout)
}

// SupportedOpcodes builds the all_commands parameter data; with rctd each
// descriptor carries its timeouts.
func SupportedOpcodes(cmds []*Command, rctd bool) []byte {
	b := make([]byte, 4, 4+20*len(cmds))
	for _, c := range cmds {
		var d [8]byte
		d[0] = byte(c.Op)
		if c.SA != NoSA {
			binary.BigEndian.PutUint16(d[2:], uint16(c.SA))
			d[5] |= 1 // SERVACTV
		}
		set(&d[5], rctd, 1) // CTDP
		binary.BigEndian.PutUint16(d[6:], uint16(c.Len))
		b = append(b, d[:]...)
		if rctd {
			b = timeouts(b, c)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// OneOpcode builds the one_command parameter data; c nil means not supported.
func OneOpcode(c *Command, rctd bool) []byte {
	b := make([]byte, 4)
	if c == nil {
		b[1] = 1 // SUPPORT: not supported
		return b
	}
	b[1] = 3 // conforming to a standard
	set(&b[1], rctd, 7)
	binary.BigEndian.PutUint16(b[2:], uint16(c.Len))
	b = append(b, c.Usage()...)
	if rctd {
		b = timeouts(b, c)
	}
	return b
}

// AccessState is an asymmetric access state (SPC-4 5.15.2.4).
type AccessState uint8

// Access states.
const (
	AccessOptimized     AccessState = 0x0
	AccessNonOptimized  AccessState = 0x1
	AccessStandby       AccessState = 0x2
	AccessUnavailable   AccessState = 0x3
	AccessOffline       AccessState = 0xE
	AccessTransitioning AccessState = 0xF
)

func (a AccessState) String() string {
	switch a {
	case AccessOptimized:
		return "active/optimized"
	case AccessNonOptimized:
		return "active/non-optimized"
	case AccessStandby:
		return "standby"
	case AccessUnavailable:
		return "unavailable"
	case AccessOffline:
		return "offline"
	case AccessTransitioning:
		return "transitioning"
	}
	return fmt.Sprintf("access state %d", uint8(a))
}

// PortGroup is one descriptor of REPORT TARGET PORT GROUPS.
type PortGroup struct {
	Preferred bool
	State     AccessState
	Group     uint16
	Status    uint8    // 0 none, 1 by STPG, 2 by implicit behaviour
	Ports     []uint16 // relative target port identifiers
}

// supportedStates: T_SUP, U_SUP, S_SUP, AN_SUP, AO_SUP.
const supportedStates = 0x8F

// PortGroups builds the parameter data of RTPG. With extended the header tells
// the implicit transition time in seconds.
func PortGroups(gs []PortGroup, extended bool, transition uint8) []byte {
	b := make([]byte, 4)
	if extended {
		b = append(b, 0x10, transition, 0, 0)
	}
	for _, g := range gs {
		d := [8]byte{byte(g.State) & 0xF, supportedStates, byte(g.Group >> 8), byte(g.Group), 0, g.Status, 0, byte(len(g.Ports))}
		set(&d[0], g.Preferred, 7)
		b = append(b, d[:]...)
		for _, p := range g.Ports {
			b = append(b, 0, 0, byte(p>>8), byte(p))
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// ParsePortGroups reads RTPG data; extended says which header was asked for.
func ParsePortGroups(b []byte, extended bool) (gs []PortGroup, transition uint8, err error) {
	p := 4
	if extended {
		p = 8
	}
	if len(b) < p {
		return nil, 0, short("target port groups", len(b), p)
	}
	if extended {
		transition = b[5]
	}
	end := min(len(b), 4+int(binary.BigEndian.Uint32(b)))
	for p+8 <= end {
		g := PortGroup{b[p]&0x80 != 0, AccessState(b[p] & 0xF), binary.BigEndian.Uint16(b[p+2:]), b[p+5], nil}
		n := int(b[p+7])
		p += 8
		if p+4*n > end {
			return gs, transition, short("target port group descriptor", end-p, 4*n)
		}
		for i := range n {
			g.Ports = append(g.Ports, binary.BigEndian.Uint16(b[p+4*i+2:]))
		}
		p += 4 * n
		gs = append(gs, g)
	}
	return gs, transition, nil
}
