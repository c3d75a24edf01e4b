package scsi

import (
	"encoding/binary"
	"fmt"
)

// Log page codes (SPC-4 7.3, SBC-3 6.4).
const (
	LogSupported    = 0x00
	LogProvisioning = 0x0C
	LogExceptions   = 0x2F
	LogAllSubpages  = 0xFF // subpage: of LogSupported, the list of pages and subpages
)

// LogParam is a parameter of a log page.
type LogParam struct {
	Code    uint16
	Control uint8 // FORMAT AND LINKING is 11b in parameters that are binary lists
	Value   []byte
}

// LogBinaryList is the control byte of a binary list parameter.
const LogBinaryList = 0x03

// LogPage builds a page: DS 0, SPF with a subpage, page code, length, body.
func LogPage(page, sub uint8, body []byte) []byte {
	b := []byte{page & 0x3F, sub, 0, 0}
	if sub != 0 {
		b[0] |= 0x40
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(body)))
	return append(b, body...)
}

// LogParams is the body of a page of parameters.
func LogParams(ps ...LogParam) (b []byte) {
	for _, p := range ps {
		b = binary.BigEndian.AppendUint16(b, p.Code)
		b = append(b, p.Control, byte(len(p.Value)))
		b = append(b, p.Value...)
	}
	return b
}

// ParseLogPage checks the frame of a page and returns its body, cut to what b
// holds.
func ParseLogPage(page, sub uint8, b []byte) ([]byte, error) {
	if len(b) < 4 {
		return nil, short(fmt.Sprintf("log page %02xh", page), len(b), 4)
	}
	if b[0]&0x3F != page || b[0]&0x40 != 0 && b[1] != sub || b[0]&0x40 == 0 && sub != 0 {
		return nil, fmt.Errorf("parse log page %02xh/%02xh: %w: the answer is page %02xh", page, sub, ErrParse, b[0]&0x3F)
	}
	return b[4:min(len(b), 4+int(binary.BigEndian.Uint16(b[2:])))], nil
}

// ParseLogParams reads the parameters that b holds whole.
func ParseLogParams(b []byte) (ps []LogParam) {
	for len(b) >= 4 && len(b) >= 4+int(b[3]) {
		n := 4 + int(b[3])
		ps = append(ps, LogParam{binary.BigEndian.Uint16(b), b[2], b[4:n]})
		b = b[n:]
	}
	return ps
}
