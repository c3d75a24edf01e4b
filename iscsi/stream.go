package iscsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC32C updates a digest (§13.1) with p; start with 0. On the wire the digest
// stands little-endian: AppendDigest.
func CRC32C(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// DigestLen is the length of a digest in bytes.
const DigestLen = 4

// Errors of a Reader. A header digest error leaves no way to find the next PDU, a
// data digest error does: the PDU was read to its end.
var (
	ErrHeaderDigest = errors.New("header digest does not match")
	ErrDataDigest   = errors.New("data digest does not match")
)

// Source is what a Reader reads from; *bufio.Reader is one. Reads longer than its
// buffer should go past the buffer into the caller's slice, as bufio's do.
type Source interface {
	io.Reader
	Discard(n int) (int, error)
	Buffered() int
}

// Reader takes a byte stream apart into PDUs. The data segment is not buffered:
// Next stops in front of it and the caller says where it goes. Nothing is allocated
// in steady state. Not safe for concurrent use.
//
//	for {
//		h, err := r.Next()            // header, AHS, header digest; bounds checked
//		switch h.Opcode() { ... r.ReadData(task.buf[off:off+r.DataLen()]) ... }
//	}
type Reader struct {
	// MaxData is the MaxRecvDataSegmentLength that we declared (8192 in login): a
	// longer data segment is a fatal ProtocolError, before anything is read of it.
	MaxData int
	// HeaderDigest and DataDigest take effect with the next PDU.
	HeaderDigest, DataDigest bool

	src  Source
	left int    // bytes of the data segment not yet read
	pad  int    // padding behind it
	dig  bool   // a data digest follows
	crc  uint32 // of what was read of the data segment
	tail [3 + DigestLen]byte
	hdr  [BHSLen + MaxAHS + DigestLen]byte
	bhs  BHS
	ahs  []byte
}

// NewReader returns a reader for src that refuses data segments over maxData bytes.
func NewReader(src Source, maxData int) *Reader { return &Reader{src: src, MaxData: maxData} }

// Buffered is the number of bytes that can be read without waiting.
func (r *Reader) Buffered() int { return r.src.Buffered() }

// Next reads the next header. What is left of the data segment before it is read
// and dropped first, its digest included. The header and AHS are valid until the
// next call. io.EOF means that the stream ended between PDUs. A *ProtocolError with
// Fatal false has consumed header and AHS, and the header is returned with it.
func (r *Reader) Next() (*BHS, error) {
	if err := r.DiscardData(); err != nil && !errors.Is(err, ErrDataDigest) {
		return nil, err
	}
	b := &r.bhs
	if _, err := io.ReadFull(r.src, b[:]); err != nil {
		if err == io.EOF {
			return nil, io.EOF
		}
		return nil, fmt.Errorf("read header: %w", err)
	}
	n := b.AHSLen()
	if n > 0 || r.HeaderDigest {
		more := n
		if r.HeaderDigest {
			more += DigestLen
		}
		copy(r.hdr[:], b[:])
		if _, err := io.ReadFull(r.src, r.hdr[BHSLen:BHSLen+more]); err != nil {
			return nil, fmt.Errorf("read additional header: %w", unexpected(err))
		}
		if r.HeaderDigest {
			want := binary.LittleEndian.Uint32(r.hdr[BHSLen+n:])
			if got := CRC32C(0, r.hdr[:BHSLen+n]); got != want {
				return nil, fmt.Errorf("%w: computed %08x, received %08x", ErrHeaderDigest, got, want)
			}
		}
	}
	r.ahs = r.hdr[BHSLen : BHSLen+n : BHSLen+n]
	size := b.DataLen()
	if size > r.MaxData {
		return nil, &ProtocolError{Reason: RejectProtocolError, Opcode: b.Opcode(), Fatal: true,
			Why: fmt.Sprintf("data segment of %d bytes exceeds MaxRecvDataSegmentLength %d", size, r.MaxData)}
	}
	r.left, r.pad, r.crc = size, -size&3, 0
	r.dig = r.DataDigest && size > 0
	return b, nil
}

// AHS is the additional header of the current PDU, valid until Next.
func (r *Reader) AHS() []byte { return r.ahs }

// DataLen is the number of bytes of the data segment that were not read yet.
func (r *Reader) DataLen() int { return r.left }

// ReadData reads len(p) bytes of the data segment into p, at most DataLen. With the
// last byte it reads padding and digest too, and returns an error that wraps
// ErrDataDigest when the digest does not match; p must not be used then, and the
// stream can be read on.
func (r *Reader) ReadData(p []byte) error {
	if len(p) > r.left {
		return fmt.Errorf("read %d bytes of a data segment with %d left", len(p), r.left)
	}
	if len(p) > 0 {
		if _, err := io.ReadFull(r.src, p); err != nil {
			return fmt.Errorf("read data segment: %w", unexpected(err))
		}
		r.left -= len(p)
		if r.dig {
			r.crc = CRC32C(r.crc, p)
		}
	}
	if r.left > 0 {
		return nil
	}
	return r.finish()
}

// finish reads padding and data digest.
func (r *Reader) finish() error {
	n := r.pad
	if r.dig {
		n += DigestLen
	}
	if n == 0 {
		return nil
	}
	t := r.tail[:n]
	pad, dig := r.pad, r.dig
	r.pad, r.dig = 0, false
	if _, err := io.ReadFull(r.src, t); err != nil {
		return fmt.Errorf("read end of data segment: %w", unexpected(err))
	}
	if dig {
		r.crc = CRC32C(r.crc, t[:pad])
		if want := binary.LittleEndian.Uint32(t[pad:]); want != r.crc {
			return fmt.Errorf("%w: %s, computed %08x, received %08x", ErrDataDigest, r.bhs.Opcode(), r.crc, want)
		}
	}
	return nil
}

// AppendData reads the rest of the data segment behind dst and returns the longer
// slice. Its length is bounded by MaxData.
func (r *Reader) AppendData(dst []byte) ([]byte, error) {
	n := len(dst)
	if need := n + r.left; need > cap(dst) {
		d := make([]byte, need)
		copy(d, dst)
		dst = d
	} else {
		dst = dst[:need]
	}
	return dst, r.ReadData(dst[n:])
}

// DiscardData reads the rest of the PDU and drops it. The digest is checked.
func (r *Reader) DiscardData() error {
	for r.left > 0 && r.dig {
		// The digest needs the bytes; the header buffer is free while a data
		// segment is read unless an AHS lies in it, and an AHS is short.
		p := r.hdr[BHSLen+len(r.ahs):]
		if len(p) < 64 {
			p = make([]byte, 4096)
		}
		if err := r.ReadData(p[:min(len(p), r.left)]); err != nil {
			return err
		}
	}
	if r.left > 0 {
		if _, err := r.src.Discard(r.left); err != nil {
			return fmt.Errorf("skip data segment: %w", unexpected(err))
		}
		r.left = 0
	}
	return r.finish()
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

const (
	arenaChunk = 64 << 10
	// inlineData: shorter data is copied behind its header, since an iovec costs
	// more than the copy.
	inlineData = 512
	// maxHeader is what one PDU can take of the arena.
	maxHeader = BHSLen + MaxAHS + DigestLen + inlineData + 3 + DigestLen
)

// Writer puts PDUs together and writes many of them with one writev. Headers,
// padding and digests live in an arena of the Writer; data segments are referenced,
// not copied, and belong to the Writer from End to the return of Flush. Nothing is
// allocated in steady state. Not safe for concurrent use.
//
//	rsp.Encode(w.Begin())
//	err := w.End(nil, data)
//	...
//	err = w.Flush()
type Writer struct {
	// MaxData is the peer's MaxRecvDataSegmentLength: End refuses more.
	MaxData int
	// HeaderDigest and DataDigest take effect with the next PDU.
	HeaderDigest, DataDigest bool

	dst     io.Writer
	chunks  [][]byte // arena
	cur     int      // chunk in use
	used    int      // bytes of it
	begun   int      // where the header of the PDU under way stands, or -1
	iov     [][]byte // what Flush writes, in order
	tail    bool     // last iov is the end of the arena and can grow
	pending int
	bufs    net.Buffers // Flush's view of iov, kept to not escape per call
}

// NewWriter returns a writer to dst that refuses data segments over maxData bytes.
// A dst that is a *net.TCPConn gets writev.
func NewWriter(dst io.Writer, maxData int) *Writer {
	return &Writer{dst: dst, MaxData: maxData, begun: -1}
}

// Pending is the number of bytes queued.
func (w *Writer) Pending() int { return w.pending }

// Begin returns the header of a new PDU to encode into. End follows, or the next
// Begin gives the header up.
func (w *Writer) Begin() *BHS {
	if len(w.chunks) == 0 || arenaChunk-w.used < maxHeader {
		if len(w.chunks) > 0 {
			w.cur++
		}
		if w.cur == len(w.chunks) {
			w.chunks = append(w.chunks, make([]byte, arenaChunk))
		}
		w.used, w.tail = 0, false
	}
	w.begun = w.used
	return (*BHS)(w.chunks[w.cur][w.used:])
}

// End queues the PDU begun with Begin. ahs is a multiple of 4 up to MaxAHS bytes;
// the data segment is the concatenation of data. TotalAHSLength and
// DataSegmentLength are filled in, padding and digests added. On error nothing is
// queued.
func (w *Writer) End(ahs []byte, data ...[]byte) error {
	if w.begun < 0 {
		return errors.New("write PDU: End without Begin")
	}
	c := w.chunks[w.cur]
	h := (*BHS)(c[w.begun:])
	size := 0
	for _, d := range data {
		size += len(d)
	}
	switch {
	case size > w.MaxData || size > MaxDataSegment:
		return fmt.Errorf("write %s: data segment of %d bytes exceeds the peer's limit %d", h.Opcode(), size, w.MaxData)
	case len(ahs)%4 != 0 || len(ahs) > MaxAHS:
		return fmt.Errorf("write %s: additional header of %d bytes", h.Opcode(), len(ahs))
	}
	start := w.begun
	w.begun = -1
	h.SetAHSLen(len(ahs))
	h.SetDataLen(size)
	at := start + BHSLen
	at += copy(c[at:], ahs)
	if w.HeaderDigest {
		binary.LittleEndian.PutUint32(c[at:], CRC32C(0, c[start:at]))
		at += DigestLen
	}
	pad := -size & 3
	var crc uint32
	if w.DataDigest {
		for _, d := range data {
			crc = CRC32C(crc, d)
		}
	}
	if size <= inlineData {
		for _, d := range data {
			at += copy(c[at:], d)
		}
		w.arena(start, at)
	} else {
		w.arena(start, at)
		for _, d := range data {
			if len(d) > 0 {
				w.iov = append(w.iov, d)
			}
		}
		w.tail = false
	}
	w.used = at
	if size == 0 {
		w.pending += at - start
		return nil
	}
	from := at
	for i := 0; i < pad; i++ {
		c[at] = 0
		at++
	}
	if w.DataDigest {
		crc = CRC32C(crc, c[from:at])
		binary.LittleEndian.PutUint32(c[at:], crc)
		at += DigestLen
	}
	w.arena(from, at)
	w.used = at
	w.pending += BHSLen + len(ahs) + size + (at - from)
	if w.HeaderDigest {
		w.pending += DigestLen
	}
	return nil
}

// arena queues [from, to) of the current chunk, by extending the last piece where
// it ends at from.
func (w *Writer) arena(from, to int) {
	if from == to {
		return
	}
	c := w.chunks[w.cur]
	if w.tail {
		last := &w.iov[len(w.iov)-1]
		*last = c[from-len(*last) : to]
		return
	}
	w.iov = append(w.iov, c[from:to])
	w.tail = true
}

// Append queues p with its data segment; for PDUs off the hot path.
func (w *Writer) Append(p PDU, data ...[]byte) error {
	h := w.Begin()
	p.Encode(h)
	var ahs []byte
	if c, ok := p.(*ScsiCommand); ok {
		ahs = c.AppendAHS(nil)
	}
	return w.End(ahs, data...)
}

// Flush writes everything queued and releases the data segments, also on error.
// After an error the stream is broken.
func (w *Writer) Flush() error {
	if len(w.iov) == 0 {
		return nil
	}
	w.bufs = net.Buffers(w.iov)
	_, err := w.bufs.WriteTo(w.dst)
	clear(w.iov) // let go of the data
	w.iov = w.iov[:0]
	w.bufs = nil
	w.cur, w.used, w.tail, w.pending, w.begun = 0, 0, false, 0, -1
	if err != nil {
		return fmt.Errorf("write PDUs: %w", err)
	}
	return nil
}
