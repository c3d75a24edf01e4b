package scsi

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// PRType is the type of a persistent reservation (SPC-4 table 195).
type PRType uint8

// Persistent reservation types.
const (
	PRWriteExclusive        PRType = 1
	PRExclusiveAccess       PRType = 3
	PRWriteExclusiveRegOnly PRType = 5
	PRExclusiveAccessRO     PRType = 6
	PRWriteExclusiveAllReg  PRType = 7
	PRExclusiveAccessAR     PRType = 8
)

// PRTypes lists them all.
var PRTypes = []PRType{PRWriteExclusive, PRExclusiveAccess, PRWriteExclusiveRegOnly, PRExclusiveAccessRO, PRWriteExclusiveAllReg, PRExclusiveAccessAR}

// Valid tells whether t is a defined type.
func (t PRType) Valid() bool {
	switch t {
	case 1, 3, 5, 6, 7, 8:
		return true
	}
	return false
}

// WriteExclusive tells whether reading is open to everyone.
func (t PRType) WriteExclusive() bool { return t == 1 || t == 5 || t == 7 }

// Registrants tells whether every registrant has access (RO and AR types).
func (t PRType) Registrants() bool { return t >= 5 }

// AllRegistrants tells whether every registrant is a holder.
func (t PRType) AllRegistrants() bool { return t >= 7 }

func (t PRType) String() string {
	switch t {
	case 1:
		return "write exclusive"
	case 3:
		return "exclusive access"
	case 5:
		return "write exclusive, registrants only"
	case 6:
		return "exclusive access, registrants only"
	case 7:
		return "write exclusive, all registrants"
	case 8:
		return "exclusive access, all registrants"
	}
	return fmt.Sprintf("reservation type %d", uint8(t))
}

// PRTypeMask is the PERSISTENT RESERVATION TYPE MASK of REPORT CAPABILITIES for
// all six types.
const PRTypeMask = 0xEA01

// TransportID names an initiator port: the iSCSI name and the ISID of its
// session (SPC-4 7.6.4.7, format code 01b). ISID zero with HasISID false is
// format code 00b, the initiator device.
//
// Its JSON form stands in the cluster's log: the names of its fields are frozen.
type TransportID struct {
	Name    string  `json:"name"`
	ISID    [6]byte `json:"isid"`
	HasISID bool    `json:"has_isid,omitempty"`
}

// String is the iSCSI initiator port name, "NAME,i,0x00023D000001".
func (t TransportID) String() string {
	if !t.HasISID {
		return t.Name
	}
	return fmt.Sprintf("%s,i,0x%012x", t.Name, t.ISID[:])
}

// Append adds the TransportID: format and protocol, 2 bytes length, the name
// string NUL-terminated and padded to 4, at least 24 bytes in all.
func (t TransportID) Append(b []byte) []byte {
	start := len(b)
	f := byte(ProtocolISCSI)
	s := t.Name
	if t.HasISID {
		f |= 0x40
		s = t.String()
	}
	b = append(b, f, 0, 0, 0)
	b = append(b, s...)
	b = append(b, 0)
	for (len(b)-start)%4 != 0 || len(b)-start < 24 {
		b = append(b, 0)
	}
	binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start-4))
	return b
}

// ParseTransportID reads one TransportID and tells its length.
func ParseTransportID(b []byte) (t TransportID, n int, err error) {
	if len(b) < 4 {
		return t, 0, short("transport id", len(b), 4)
	}
	n = 4 + int(binary.BigEndian.Uint16(b[2:]))
	if b[0]&0xF != ProtocolISCSI {
		return t, 0, fmt.Errorf("parse transport id: %w: protocol %d", ErrParse, b[0]&0xF)
	}
	if n < 24 || n%4 != 0 || n > len(b) || n > 4+244 {
		return t, 0, fmt.Errorf("parse transport id: %w: length %d of %d", ErrParse, n, len(b))
	}
	s, rest, ok := strings.Cut(string(b[4:n]), "\x00")
	if !ok || strings.Trim(rest, "\x00") != "" || s == "" {
		return t, 0, fmt.Errorf("parse transport id: %w: name is not terminated", ErrParse)
	}
	switch b[0] >> 6 {
	case 0:
		t.Name = s
	case 1:
		name, isid, ok := strings.Cut(s, ",i,0x")
		var v uint64
		if ok && len(isid) == 12 {
			for _, c := range []byte(strings.ToLower(isid)) {
				switch {
				case c >= '0' && c <= '9':
					v = v<<4 | uint64(c-'0')
				case c >= 'a' && c <= 'f':
					v = v<<4 | uint64(c-'a'+10)
				default:
					ok = false
				}
			}
		}
		if !ok || len(isid) != 12 || name == "" {
			return t, 0, fmt.Errorf("parse transport id: %w: port name %q", ErrParse, s)
		}
		t.Name, t.HasISID = name, true
		for i := range 6 {
			t.ISID[i] = byte(v >> (8 * (5 - i)))
		}
	default:
		return t, 0, fmt.Errorf("parse transport id: %w: format %d", ErrParse, b[0]>>6)
	}
	return t, n, nil
}

// PRReadKeys builds the data of READ KEYS.
func PRReadKeys(generation uint32, keys []uint64) []byte {
	b := make([]byte, 8, 8+8*len(keys))
	binary.BigEndian.PutUint32(b, generation)
	binary.BigEndian.PutUint32(b[4:], uint32(8*len(keys)))
	for _, k := range keys {
		b = binary.BigEndian.AppendUint64(b, k)
	}
	return b
}

// ParseReadKeys reads it.
func ParseReadKeys(b []byte) (generation uint32, keys []uint64, err error) {
	if len(b) < 8 {
		return 0, nil, short("read keys data", len(b), 8)
	}
	end := min(len(b), 8+int(binary.BigEndian.Uint32(b[4:])))
	for p := 8; p+8 <= end; p += 8 {
		keys = append(keys, binary.BigEndian.Uint64(b[p:]))
	}
	return binary.BigEndian.Uint32(b), keys, nil
}

// PRReadReservation builds the data of READ RESERVATION; typ 0 means none is
// held.
func PRReadReservation(generation uint32, key uint64, typ PRType) []byte {
	b := make([]byte, 8, 24)
	binary.BigEndian.PutUint32(b, generation)
	if typ == 0 {
		return b
	}
	binary.BigEndian.PutUint32(b[4:], 16)
	b = binary.BigEndian.AppendUint64(b, key)
	return append(b, 0, 0, 0, 0, 0, byte(typ)&0xF, 0, 0)
}

// ParseReadReservation reads it; typ 0 means none is held.
func ParseReadReservation(b []byte) (generation uint32, key uint64, typ PRType, err error) {
	if len(b) < 8 {
		return 0, 0, 0, short("read reservation data", len(b), 8)
	}
	generation = binary.BigEndian.Uint32(b)
	if binary.BigEndian.Uint32(b[4:]) < 16 || len(b) < 24 {
		return generation, 0, 0, nil
	}
	return generation, binary.BigEndian.Uint64(b[8:]), PRType(b[21] & 0xF), nil
}

// PRCapabilities is the data of REPORT CAPABILITIES.
type PRCapabilities struct {
	CompatibleReserve    bool // CRH
	SpecifyInitiator     bool // SIP_C
	AllTargetPorts       bool // ATP_C
	PersistThroughPower  bool // PTPL_C
	PersistNowActive     bool // PTPL_A
	AllowCommands        uint8
	TypeMask             uint16
	ReplaceLostSupported bool
}

// Bytes builds the 8 bytes.
func (c *PRCapabilities) Bytes() []byte {
	b := make([]byte, 8)
	b[1] = 8
	set(&b[2], c.ReplaceLostSupported, 7)
	set(&b[2], c.CompatibleReserve, 4)
	set(&b[2], c.SpecifyInitiator, 3)
	set(&b[2], c.AllTargetPorts, 2)
	set(&b[2], c.PersistThroughPower, 0)
	b[3] = 0x80 | c.AllowCommands&7<<4 // TMV: the type mask is valid
	set(&b[3], c.PersistNowActive, 0)
	binary.BigEndian.PutUint16(b[4:], c.TypeMask)
	return b
}

// ParsePRCapabilities reads it.
func ParsePRCapabilities(b []byte) (*PRCapabilities, error) {
	if len(b) < 8 {
		return nil, short("report capabilities data", len(b), 8)
	}
	return &PRCapabilities{b[2]&0x10 != 0, b[2]&8 != 0, b[2]&4 != 0, b[2]&1 != 0, b[3]&1 != 0, b[3] >> 4 & 7, binary.BigEndian.Uint16(b[4:]), b[2]&0x80 != 0}, nil
}

// PRFullStatus is one descriptor of READ FULL STATUS.
type PRFullStatus struct {
	Key      uint64
	AllPorts bool
	Holder   bool
	Type     PRType // of the reservation, when Holder
	Port     uint16 // relative target port, when not AllPorts
	ID       TransportID
}

// PRReadFullStatus builds the data.
func PRReadFullStatus(generation uint32, ds []PRFullStatus) []byte {
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, generation)
	for _, d := range ds {
		var h [24]byte
		binary.BigEndian.PutUint64(h[:], d.Key)
		set(&h[12], d.AllPorts, 1)
		set(&h[12], d.Holder, 0)
		if d.Holder {
			h[13] = byte(d.Type) & 0xF
		}
		binary.BigEndian.PutUint16(h[18:], d.Port)
		id := d.ID.Append(nil)
		binary.BigEndian.PutUint32(h[20:], uint32(len(id)))
		b = append(append(b, h[:]...), id...)
	}
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8))
	return b
}

// ParseReadFullStatus reads the descriptors that b holds whole.
func ParseReadFullStatus(b []byte) (generation uint32, ds []PRFullStatus, err error) {
	if len(b) < 8 {
		return 0, nil, short("read full status data", len(b), 8)
	}
	generation = binary.BigEndian.Uint32(b)
	end := min(len(b), 8+int(binary.BigEndian.Uint32(b[4:])))
	for p := 8; p+24 <= end; {
		d := PRFullStatus{Key: binary.BigEndian.Uint64(b[p:]), AllPorts: b[p+12]&2 != 0, Holder: b[p+12]&1 != 0, Port: binary.BigEndian.Uint16(b[p+18:])}
		if d.Holder {
			d.Type = PRType(b[p+13] & 0xF)
		}
		n := int(binary.BigEndian.Uint32(b[p+20:]))
		if n > end-p-24 {
			break
		}
		if d.ID, _, err = ParseTransportID(b[p+24 : p+24+n]); err != nil {
			return generation, ds, err
		}
		ds = append(ds, d)
		p += 24 + n
	}
	return generation, ds, nil
}

// PROut is the parameter list of PERSISTENT RESERVE OUT. Its JSON form stands in
// the cluster's log: the names of its fields are frozen.
type PROut struct {
	Key     uint64        `json:"key"`     // RESERVATION KEY
	NewKey  uint64        `json:"new_key"` // SERVICE ACTION RESERVATION KEY
	SpecIPT bool          `json:"spec_i_pt,omitempty"`
	AllTGPT bool          `json:"all_tg_pt,omitempty"`
	APTPL   bool          `json:"aptpl,omitempty"`
	IDs     []TransportID `json:"ids,omitempty"` // with SPEC_I_PT, or the one of REGISTER AND MOVE
	// REGISTER AND MOVE only.
	Unregister bool   `json:"unregister,omitempty"`
	Port       uint16 `json:"port,omitempty"`
}

// Bytes builds the list for a service action.
func (p *PROut) Bytes(sa int) []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint64(b, p.Key)
	binary.BigEndian.PutUint64(b[8:], p.NewKey)
	if sa == SARegisterAndMove {
		set(&b[17], p.Unregister, 1)
		set(&b[17], p.APTPL, 0)
		binary.BigEndian.PutUint16(b[18:], p.Port)
		var id []byte
		for _, t := range p.IDs {
			id = t.Append(id)
		}
		binary.BigEndian.PutUint32(b[20:], uint32(len(id)))
		return append(b, id...)
	}
	set(&b[20], p.SpecIPT, 3)
	set(&b[20], p.AllTGPT, 2)
	set(&b[20], p.APTPL, 0)
	if p.SpecIPT {
		var id []byte
		for _, t := range p.IDs {
			id = t.Append(id)
		}
		b = binary.BigEndian.AppendUint32(b, uint32(len(id)))
		b = append(b, id...)
	}
	return b
}

// ParsePROut reads a parameter list; errors are sense data. Without SPEC_I_PT
// the list is exactly 24 bytes (SPC-4 6.16.3), else 05/1A/00.
func ParsePROut(sa int, b []byte) (*PROut, *Sense) {
	if len(b) < 24 {
		return nil, Check(IllegalRequest, ASCParamListLength)
	}
	p := &PROut{Key: binary.BigEndian.Uint64(b), NewKey: binary.BigEndian.Uint64(b[8:])}
	if sa == SARegisterAndMove {
		p.Unregister, p.APTPL = b[17]&2 != 0, b[17]&1 != 0
		p.Port = binary.BigEndian.Uint16(b[18:])
		n := binary.BigEndian.Uint32(b[20:])
		if uint64(n)+24 != uint64(len(b)) {
			return nil, Check(IllegalRequest, ASCParamListLength)
		}
		t, used, err := ParseTransportID(b[24:])
		if err != nil || used != int(n) {
			return nil, InvalidParam(24, -1)
		}
		p.IDs = []TransportID{t}
		return p, nil
	}
	p.SpecIPT, p.AllTGPT, p.APTPL = b[20]&8 != 0, b[20]&4 != 0, b[20]&1 != 0
	if !p.SpecIPT {
		if len(b) != 24 {
			return nil, Check(IllegalRequest, ASCParamListLength)
		}
		return p, nil
	}
	if sa != SARegister {
		return nil, InvalidParam(20, 3)
	}
	if len(b) < 28 {
		return nil, Check(IllegalRequest, ASCParamListLength)
	}
	n := binary.BigEndian.Uint32(b[24:])
	if uint64(n)+28 != uint64(len(b)) {
		return nil, Check(IllegalRequest, ASCParamListLength)
	}
	for at := 28; at < len(b); {
		t, used, err := ParseTransportID(b[at:])
		if err != nil {
			return nil, InvalidParam(at, -1)
		}
		p.IDs = append(p.IDs, t)
		at += used
	}
	return p, nil
}
