// What the two ends of every cluster stream say before anything else, inside
// TLS. The dialler sends a hello, the listener answers. All integers
// big-endian; strings are u8 length + bytes; the refusal's text is u16 length +
// bytes.
//
//	hello   "BHHS" | u16 version=1 | u16 body | cluster | node | boot id | u64 incarnation | u64 applied index
//	answer  "BHHA" | u16 version=1 | u16 body | u8 code | text | (code 0 only:) cluster | node | boot id | u64 incarnation | u64 applied index
//
// A body may grow at its end: what follows the known fields is skipped.

package raftlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/blockhouse-san/blockhouse/membership/pki"
)

const (
	helloMagic   = "BHHS"
	answerMagic  = "BHHA"
	helloVersion = 1
	maxFrame     = 4096
)

// Hello is what a node says of itself.
type Hello struct {
	Cluster     string // uuid
	Node        string
	BootID      string
	Incarnation uint64
	Index       uint64 // applied index of its state: how much it knows
}

// Reason is why a stream was refused. The strings are metric label values and
// stay; those of certificates are pki's.
type Reason string

// The reasons beside pki's.
const (
	BadFrame       Reason = "bad-frame"
	BadVersion     Reason = "bad-version"
	OldIncarnation Reason = "old-incarnation"
	UnknownNode    Reason = "unknown-node"
	RemovedNode    Reason = "removed-node"
	NotServed      Reason = "not-served" // no handler for the protocol (yet)
)

// codes are the wire numbers of reasons. Append only.
var codes = []Reason{
	1: Reason(pki.NoCertificate), 2: Reason(pki.OtherCluster), 3: Reason(pki.Untrusted), 4: Reason(pki.Expired),
	5: Reason(pki.NotYetValid), 6: Reason(pki.WrongName), 7: Reason(pki.WrongRole), 8: BadFrame, 9: BadVersion,
	10: OldIncarnation, 11: UnknownNode, 12: RemovedNode, 13: NotServed,
}

func (r Reason) code() byte {
	for i, c := range codes {
		if i > 0 && c == r {
			return byte(i)
		}
	}
	return byte(len(codes)) // unknown to the peer too, but never 0
}

// RefusedError is a stream that was refused: by this end (Remote false), or by
// the other end, which said why.
type RefusedError struct {
	Reason Reason
	Text   string
	Remote bool
}

func (e *RefusedError) Error() string {
	if e.Remote {
		return "refused by the other end (" + string(e.Reason) + "): " + e.Text
	}
	return "refused (" + string(e.Reason) + "): " + e.Text
}

func appendString(b []byte, s string) []byte {
	b = append(b, byte(len(s)))
	return append(b, s...)
}

func (h Hello) check() error {
	for _, s := range []string{h.Cluster, h.Node, h.BootID} {
		if len(s) > 255 {
			return fmt.Errorf("hello of node %q: field of %d bytes", h.Node, len(s))
		}
	}
	return nil
}

func (h Hello) appendBody(b []byte) []byte {
	b = appendString(b, h.Cluster)
	b = appendString(b, h.Node)
	b = appendString(b, h.BootID)
	b = binary.BigEndian.AppendUint64(b, h.Incarnation)
	return binary.BigEndian.AppendUint64(b, h.Index)
}

func frame(magic string, body []byte) []byte {
	b := append([]byte(magic), 0, helloVersion)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

func encodeHello(h Hello) []byte { return frame(helloMagic, h.appendBody(nil)) }

func encodeAnswer(r Reason, text string, h Hello) []byte {
	if r == "" {
		return frame(answerMagic, h.appendBody([]byte{0, 0, 0}))
	}
	text = text[:min(len(text), 2048)]
	b := []byte{r.code()}
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	return frame(answerMagic, append(b, text...))
}

var errShortBody = errors.New("frame ends early")

type cursor struct {
	b   []byte
	err error
}

func (c *cursor) take(n int) []byte {
	if c.err != nil || len(c.b) < n {
		c.err = errShortBody
		return make([]byte, n)
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) u8() byte    { return c.take(1)[0] }
func (c *cursor) u16() uint16 { return binary.BigEndian.Uint16(c.take(2)) }
func (c *cursor) u64() uint64 { return binary.BigEndian.Uint64(c.take(8)) }
func (c *cursor) str() string { return string(c.take(int(c.u8()))) }

func (c *cursor) hello() Hello {
	return Hello{Cluster: c.str(), Node: c.str(), BootID: c.str(), Incarnation: c.u64(), Index: c.u64()}
}

// readFrame reads one frame and gives its body.
func readFrame(r io.Reader, magic string) ([]byte, *RefusedError) {
	var h [8]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, &RefusedError{Reason: BadFrame, Text: fmt.Sprintf("read handshake: %v", err)}
	}
	if string(h[:4]) != magic {
		return nil, &RefusedError{Reason: BadFrame, Text: fmt.Sprintf("handshake starts with %q, want %q", h[:4], magic)}
	}
	if v := binary.BigEndian.Uint16(h[4:]); v != helloVersion {
		return nil, &RefusedError{Reason: BadVersion, Text: fmt.Sprintf("handshake version %d, this clusterd speaks %d", v, helloVersion)}
	}
	n := binary.BigEndian.Uint16(h[6:])
	if n > maxFrame {
		return nil, &RefusedError{Reason: BadFrame, Text: fmt.Sprintf("handshake of %d bytes, limit %d", n, maxFrame)}
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, &RefusedError{Reason: BadFrame, Text: fmt.Sprintf("read handshake: %v", err)}
	}
	return body, nil
}

func readHello(r io.Reader) (Hello, *RefusedError) {
	b, rerr := readFrame(r, helloMagic)
	if rerr != nil {
		return Hello{}, rerr
	}
	c := &cursor{b: b}
	h := c.hello()
	if c.err != nil {
		return Hello{}, &RefusedError{Reason: BadFrame, Text: fmt.Sprintf("read hello: %v", c.err)}
	}
	return h, nil
}

// readAnswer gives the listener's hello, or its refusal with Remote set.
func readAnswer(r io.Reader) (Hello, *RefusedError) {
	b, rerr := readFrame(r, answerMagic)
	if rerr != nil {
		return Hello{}, rerr
	}
	c := &cursor{b: b}
	code := c.u8()
	text := string(c.take(int(c.u16())))
	if code == 0 {
		h := c.hello()
		if c.err != nil {
			return Hello{}, &RefusedError{Reason: BadFrame, Text: fmt.Sprintf("read answer: %v", c.err)}
		}
		return h, nil
	}
	if c.err != nil {
		return Hello{}, &RefusedError{Reason: BadFrame, Text: fmt.Sprintf("read answer: %v", c.err)}
	}
	e := &RefusedError{Reason: Reason(fmt.Sprintf("code-%d", code)), Text: text, Remote: true}
	if int(code) < len(codes) {
		e.Reason = codes[code]
	}
	return Hello{}, e
}
