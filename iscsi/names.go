package iscsi

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"
)

// DefaultPort is the TCP port of iSCSI targets (IANA).
const DefaultPort = 3260

// MaxName is the longest iSCSI name in bytes (§4.2.7.1).
const MaxName = 223

// ISID is the initiator's part of a session identifier (§11.12.5).
//
//	byte 0    T(2) A(6)   T: 0 OUI, 1 EN, 2 random, 3 reserved
//	1-2       B           OUI: A,B = 24-bit OUI   EN: B,C = enterprise number
//	3         C           random: B,C = 24-bit random number
//	4-5       D           qualifier
type ISID [6]byte

// RandomISID returns an ISID of the random format with 24 bits of number and
// qualifier q.
func RandomISID(number uint32, q uint16) ISID {
	return ISID{0x80, byte(number >> 16), byte(number >> 8), byte(number), byte(q >> 8), byte(q)}
}

func (i ISID) String() string { return fmt.Sprintf("%x", i[:]) }

// NormalizeName returns an iSCSI name in the form in which names are compared:
// iqn. lower-cased, eui. and naa. with upper-cased hexadecimal digits (§4.2.7.2 and
// the stringprep profile of RFC 3722, of which the ASCII part is done).
func NormalizeName(s string) string {
	if len(s) >= 4 && strings.EqualFold(s[:4], "eui.") {
		return "eui." + strings.ToUpper(s[4:])
	}
	if len(s) >= 4 && strings.EqualFold(s[:4], "naa.") {
		return "naa." + strings.ToUpper(s[4:])
	}
	return strings.ToLower(s)
}

// CheckName returns nil for an iSCSI name of type iqn., eui. or naa. (§4.2.7). A
// month of one digit is let through: old tutorials have iqn.2010-8.com.example, and
// the tools of their time took it.
func CheckName(s string) error {
	bad := func(why string) error { return fmt.Errorf("iSCSI name %q: %s", s, why) }
	if len(s) > MaxName {
		return fmt.Errorf("iSCSI name of %d bytes: longer than %d", len(s), MaxName)
	}
	if len(s) < 4 {
		return bad("want iqn.YYYY-MM.DOMAIN[:NAME], eui.16HEX or naa.16HEX|32HEX")
	}
	switch strings.ToLower(s[:4]) {
	case "iqn.":
		d := s[4:]
		if len(d) > 6 && d[4] == '-' && d[6] == '.' {
			d = d[:5] + "0" + d[5:]
		}
		if len(d) < 8 || d[4] != '-' || d[7] != '.' || !digits(d[:4]) || !digits(d[5:7]) {
			return bad("want iqn.YYYY-MM.DOMAIN[:NAME]")
		}
		if m := d[5:7]; m < "01" || m > "12" {
			return bad("month " + m + " is not 01-12")
		}
		auth, _, _ := strings.Cut(d[8:], ":")
		if auth == "" {
			return bad("the naming authority is empty")
		}
		if !utf8.ValidString(s) {
			return bad("not UTF-8")
		}
		for _, r := range d[8:] {
			switch {
			case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '.', r == ':':
			case r == '_': // not in the standard's set, but in use (Windows hosts, old tools)
			case r >= 0x80: // international names, RFC 3722
			default:
				return bad(fmt.Sprintf("character %q is not allowed", r))
			}
		}
	case "eui.":
		if len(s) != 20 || !hexDigits(s[4:]) {
			return bad("want eui. and 16 hexadecimal digits")
		}
	case "naa.":
		if len(s) != 20 && len(s) != 36 || !hexDigits(s[4:]) {
			return bad("want naa. and 16 or 32 hexadecimal digits")
		}
	default:
		return bad("does not begin with iqn., eui. or naa.")
	}
	return nil
}

func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

func hexDigits(s string) bool {
	for i := range len(s) {
		if unhex(s[i]) < 0 {
			return false
		}
	}
	return s != ""
}

// Portal is a TargetAddress: host[:port][,portal-group-tag] (§13.8).
type Portal struct {
	Host string // IPv4, IPv6 without brackets, or a DNS name
	Port uint16
	TPGT uint16 // valid with HasTPGT
	// HasTPGT tells that a tag was given.
	HasTPGT bool
}

// ParsePortal parses ADDRESS[:PORT][,TAG]; IPv6 addresses stand in brackets. The
// port defaults to DefaultPort.
func ParsePortal(s string) (Portal, error) {
	bad := func(why string) (Portal, error) {
		return Portal{}, fmt.Errorf("portal %q: %s, want ADDRESS[:PORT][,TAG] with IPv6 in brackets", s, why)
	}
	p := Portal{Port: DefaultPort}
	rest := s
	if a, tag, ok := strings.Cut(s, ","); ok {
		n, err := strconv.ParseUint(tag, 10, 16)
		if err != nil {
			return bad("portal group tag is not 0-65535")
		}
		p.TPGT, p.HasTPGT, rest = uint16(n), true, a
	}
	var port string
	hasPort := false
	if strings.HasPrefix(rest, "[") {
		a, after, ok := strings.Cut(rest[1:], "]")
		if !ok {
			return bad("no closing bracket")
		}
		ip, err := netip.ParseAddr(a)
		if err != nil || !ip.Is6() {
			return bad("no IPv6 address in the brackets")
		}
		p.Host = a
		if after != "" {
			if after[0] != ':' {
				return bad("text after the bracket")
			}
			port, hasPort = after[1:], true
		}
	} else {
		p.Host, port, hasPort = strings.Cut(rest, ":")
		if strings.Contains(port, ":") {
			return bad("IPv6 address without brackets")
		}
		if err := checkHost(p.Host); err != "" {
			return bad(err)
		}
	}
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return bad("port is not 1-65535")
		}
		p.Port = uint16(n)
	}
	return p, nil
}

func checkHost(h string) string {
	if h == "" {
		return "no address"
	}
	if len(h) > 253 {
		return "host name is too long"
	}
	for i := range len(h) {
		c := h[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.', c == '_':
		default:
			return fmt.Sprintf("character %q in the address", c)
		}
	}
	return ""
}

// HostPort returns the portal in the form that net.Dial takes.
func (p Portal) HostPort() string {
	return net.JoinHostPort(p.Host, strconv.Itoa(int(p.Port)))
}

// String returns the portal as a TargetAddress, with port and, if there is one, tag.
func (p Portal) String() string {
	s := p.HostPort()
	if p.HasTPGT {
		s += "," + strconv.Itoa(int(p.TPGT))
	}
	return s
}
