package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/blockhouse-san/blockhouse/block"
)

// Handshake (newstyle), all fields big endian:
//
//	server  "NBDMAGIC" "IHAVEOPT" u16 flags
//	client  u32 flags
//	client  "IHAVEOPT" u32 option | u32 length | data
//	server  u64 0x3e889045565a9 | u32 option | u32 reply | u32 length | data
//
// Transmission:
//
//	request  u32 25609513h | u16 flags | u16 type | u64 cookie | u64 offset | u32 length | data
//	simple   u32 67446698h | u32 error | u64 cookie | data of a read
//	chunk    u32 668e33efh | u16 flags | u16 type | u64 cookie | u32 length | payload
const (
	magicServer   = 0x4e42444d41474943 // NBDMAGIC
	magicOption   = 0x49484156454f5054 // IHAVEOPT
	magicOldstyle = 0x00420281861253
	magicOptReply = 0x3e889045565a9
	magicRequest  = 0x25609513
	magicSimple   = 0x67446698
	magicChunk    = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optExportName      = 1
	optAbort           = 2
	optGo              = 7
	optStructuredReply = 8
	optSetMetaContext  = 10

	repAck         = 1
	repInfo        = 3
	repMetaContext = 4
	repError       = 1 << 31

	repErrUnsup         = repError | 1
	repErrPolicy        = repError | 2
	repErrTLSReqd       = repError | 5
	repErrUnknown       = repError | 6
	repErrBlockSizeReqd = repError | 8

	infoExport    = 0
	infoBlockSize = 3

	// Transmission flags of an export.
	xHasFlags    = 1 << 0
	xReadOnly    = 1 << 1
	xFlush       = 1 << 2
	xFUA         = 1 << 3
	xTrim        = 1 << 5
	xWriteZeroes = 1 << 6

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA    = 1 << 0
	cmdFlagNoHole = 1 << 1

	chunkDone        = 1 << 0
	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkIsError     = 1 << 15
	chunkErrorOffset = chunkIsError | 2

	stateHole = 1 << 0 // of base:allocation
	stateZero = 1 << 1

	requestLen = 28
	// maxText bounds what a server says beside data: error texts, extents.
	maxText = 1 << 20
	// maxPayload is the largest read or write where the server says nothing (NBD
	// protocol, "Block size constraints").
	maxPayload = 32 << 20
)

// errProtocol: the server does not keep to the protocol. The connection is no
// longer in step, so it ends.
var errProtocol = errors.New("the server breaks the NBD protocol")

func protocol(format string, a ...any) error {
	return fmt.Errorf("%w: %s", errProtocol, fmt.Sprintf(format, a...))
}

// run is one extent of BLOCK_STATUS.
type run struct {
	n     uint32
	flags uint32
}

// call is a request in flight. Until it is answered only the reader touches what
// the reply fills.
type call struct {
	cmd  uint16
	fl   uint16
	off  uint64
	n    uint32
	p    []byte // of a read or a write
	mark uint64 // flush: what it makes durable (Client.acked)

	err     error
	covered [][2]uint64 // chunks of a read
	filled  uint64
	runs    []run

	done chan error
}

// changes tells whether the command may have changed the export.
func (c *call) changes() bool {
	return c.cmd == cmdWrite || c.cmd == cmdTrim || c.cmd == cmdWriteZeroes
}

// errnoOf makes our errors of the protocol's (NBD protocol, "Error values").
func errnoOf(e uint32) error {
	switch e {
	case 1:
		return fmt.Errorf("%w: EPERM", block.ErrReadOnly)
	case 5:
		return fmt.Errorf("%w: EIO", block.ErrMedium)
	case 12:
		return errors.New("the server is out of memory (ENOMEM)")
	case 22:
		return errors.New("the server finds the request invalid (EINVAL)")
	case 28:
		return fmt.Errorf("%w: ENOSPC", block.ErrNoSpace)
	case 75:
		return errors.New("the request is too large for the server (EOVERFLOW)")
	case 95:
		return errors.New("the server does not do that (ENOTSUP)")
	case 108:
		return fmt.Errorf("%w: the server shuts down (ESHUTDOWN)", block.ErrUnreachable)
	}
	return fmt.Errorf("%w: error %d of the server", block.ErrMedium, e)
}

// decoder reads replies.
type decoder struct {
	r          io.Reader
	structured bool
	context    uint32 // id of base:allocation
	// find returns the call of a cookie, nil if there is none.
	find func(cookie uint64) *call
	head [20]byte
}

func (d *decoder) full(p []byte) error {
	_, err := io.ReadFull(d.r, p)
	return err
}

// next reads one message. If it ends a call, that is returned with its cookie
// and its err set. An error ends the connection.
func (d *decoder) next() (cookie uint64, ended *call, err error) {
	if err := d.full(d.head[:4]); err != nil {
		return 0, nil, err
	}
	switch m := binary.BigEndian.Uint32(d.head[:]); {
	case m == magicSimple:
		return d.simple()
	case m == magicChunk && d.structured:
		return d.chunk()
	default:
		return 0, nil, protocol("a reply begins with %08x", m)
	}
}

func (d *decoder) simple() (uint64, *call, error) {
	if err := d.full(d.head[:12]); err != nil {
		return 0, nil, err
	}
	errno, cookie := binary.BigEndian.Uint32(d.head[:]), binary.BigEndian.Uint64(d.head[4:])
	c := d.find(cookie)
	switch {
	case c == nil:
		return 0, nil, protocol("reply to %#x, which was not asked", cookie)
	case len(c.covered) > 0 || c.runs != nil || c.err != nil:
		return 0, nil, protocol("a simple reply after chunks")
	case errno != 0:
		c.err = errnoOf(errno)
	case d.structured && c.cmd == cmdRead, c.cmd == cmdBlockStatus:
		return 0, nil, protocol("a simple reply to command %d", c.cmd)
	case c.cmd == cmdRead:
		if err := d.full(c.p); err != nil {
			return 0, nil, err
		}
	}
	return cookie, c, nil
}

func (d *decoder) chunk() (uint64, *call, error) {
	if err := d.full(d.head[:16]); err != nil {
		return 0, nil, err
	}
	flags, typ := binary.BigEndian.Uint16(d.head[:]), binary.BigEndian.Uint16(d.head[2:])
	cookie, n := binary.BigEndian.Uint64(d.head[4:]), binary.BigEndian.Uint32(d.head[12:])
	c := d.find(cookie)
	if c == nil {
		return 0, nil, protocol("chunk for %#x, which was not asked", cookie)
	}
	done := flags&chunkDone != 0
	var err error
	switch {
	case typ == chunkNone:
		if n != 0 || !done {
			return 0, nil, protocol("an empty chunk of %d bytes", n)
		}
	case typ == chunkOffsetData && c.cmd == cmdRead:
		err = d.data(c, n)
	case typ == chunkOffsetHole && c.cmd == cmdRead:
		err = d.hole(c, n)
	case typ == chunkBlockStatus && c.cmd == cmdBlockStatus:
		err = d.status(c, n)
	case typ&chunkIsError != 0:
		err = d.failure(c, typ, n)
	default:
		err = protocol("chunk of type %d for command %d", typ, c.cmd)
	}
	if err != nil || !done {
		return 0, nil, err
	}
	if c.err == nil && c.cmd == cmdRead && c.filled != uint64(c.n) {
		return 0, nil, protocol("a read of %d bytes was answered with %d", c.n, c.filled)
	}
	if c.err == nil && c.cmd == cmdBlockStatus && len(c.runs) == 0 {
		return 0, nil, protocol("block status without extents")
	}
	return cookie, c, nil
}

// cover claims a part of the read's buffer. Each byte is given once, so that a
// call that counts n bytes has no byte of what the buffer held before.
func (c *call) cover(off, n uint64) ([]byte, error) {
	if n == 0 || off < c.off || n > uint64(c.n) || off-c.off > uint64(c.n)-n {
		return nil, protocol("a chunk [%d,+%d) of a read [%d,+%d)", off, n, c.off, c.n)
	}
	for _, x := range c.covered {
		if off < x[1] && x[0] < off+n {
			return nil, protocol("chunks of a read overlap at %d", off)
		}
	}
	if len(c.covered) >= 1<<12 {
		return nil, protocol("a read in more than %d chunks", len(c.covered))
	}
	c.covered = append(c.covered, [2]uint64{off, off + n})
	c.filled += n
	return c.p[off-c.off:][:n], nil
}

func (d *decoder) data(c *call, n uint32) error {
	if n <= 8 {
		return protocol("a data chunk of %d bytes", n)
	}
	if err := d.full(d.head[:8]); err != nil {
		return err
	}
	p, err := c.cover(binary.BigEndian.Uint64(d.head[:]), uint64(n-8))
	if err != nil {
		return err
	}
	return d.full(p)
}

func (d *decoder) hole(c *call, n uint32) error {
	if n != 12 {
		return protocol("a hole chunk of %d bytes", n)
	}
	if err := d.full(d.head[:12]); err != nil {
		return err
	}
	p, err := c.cover(binary.BigEndian.Uint64(d.head[:]), uint64(binary.BigEndian.Uint32(d.head[8:])))
	clear(p)
	return err
}

func (d *decoder) status(c *call, n uint32) error {
	if n < 12 || n > maxText || (n-4)%8 != 0 {
		return protocol("a block status of %d bytes", n)
	}
	b := make([]byte, n)
	if err := d.full(b); err != nil {
		return err
	}
	if id := binary.BigEndian.Uint32(b); id != d.context || c.runs != nil {
		return protocol("a block status of context %d", id)
	}
	for b = b[4:]; len(b) > 0; b = b[8:] {
		r := run{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])}
		if r.n == 0 {
			return protocol("an empty extent")
		}
		c.runs = append(c.runs, r)
	}
	return nil
}

func (d *decoder) failure(c *call, typ uint16, n uint32) error {
	if n < 6 || n > maxText {
		return protocol("an error chunk of %d bytes", n)
	}
	b := make([]byte, n)
	if err := d.full(b); err != nil {
		return err
	}
	text := b[6:]
	k := int(binary.BigEndian.Uint16(b[4:]))
	if k > len(text) || typ == chunkErrorOffset && len(text)-k != 8 {
		return protocol("an error text of %d bytes in %d", k, len(text))
	}
	errno := binary.BigEndian.Uint32(b)
	if errno == 0 {
		return protocol("an error chunk without an error")
	}
	if err := errnoOf(errno); c.err == nil {
		if c.err = err; k > 0 {
			c.err = fmt.Errorf("%w: %.200q", err, text[:k])
		}
	}
	return nil
}
