package ondisk

import (
	"errors"
	"fmt"
)

// ErrLog marks a log descriptor that cannot be.
var ErrLog = errors.New("bad log descriptor")

// LDPerBlock is how many entries of a descriptor's list fit into its own block:
// single numbers for METADATA and REVOKE, pairs for JDATA.
func (g Geometry) LDPerBlock(ldType uint32) int {
	n := (g.BlockSize - LogDescriptorSize) / 8
	if ldType == LDJdata {
		n /= 2
	}
	return n
}

// LogEntry is one journaled block: where it belongs, and whether its first four
// bytes had to be hidden because they were the magic number.
type LogEntry struct {
	Block   uint64
	Escaped bool
}

// LogEntries reads the list of a METADATA or JDATA descriptor block. The
// journaled blocks follow the descriptor in the same order.
func (g Geometry) LogEntries(b []byte) ([]LogEntry, error) {
	var ld LogDescriptor
	if err := ld.Decode(b); err != nil {
		return nil, err
	}
	n := int(ld.Data1)
	if ld.LDType != LDMetadata && ld.LDType != LDJdata {
		return nil, fmt.Errorf("%w: type %d holds no blocks", ErrLog, ld.LDType)
	}
	if ld.Data1 > uint32(g.LDPerBlock(ld.LDType)) || ld.Length < ld.Data1+1 {
		return nil, fmt.Errorf("%w: %d blocks in a descriptor of length %d", ErrLog, ld.Data1, ld.Length)
	}
	out := make([]LogEntry, n)
	for i := range out {
		if ld.LDType == LDMetadata {
			out[i].Block = be.Uint64(b[LogDescriptorSize+8*i:])
		} else {
			out[i].Block = be.Uint64(b[LogDescriptorSize+16*i:])
			out[i].Escaped = be.Uint64(b[LogDescriptorSize+16*i+8:]) != 0
		}
	}
	return out, nil
}

// Revokes appends the revoked block numbers that block i of a revoke run holds
// (0 = the descriptor, then log buffers) to list, which must not grow beyond
// total.
func (g Geometry) Revokes(list []uint64, b []byte, i, total int) []uint64 {
	off := LogDescriptorSize
	if i > 0 {
		off = MetaHeaderSize
	}
	for ; off+8 <= len(b) && len(list) < total; off += 8 {
		list = append(list, be.Uint64(b[off:]))
	}
	return list
}

// Escape prepares a jdata block for the log, and tells whether it had to.
func Escape(b []byte) bool {
	if be.Uint32(b) != Magic {
		return false
	}
	be.PutUint32(b, 0)
	return true
}

// Unescape undoes Escape.
func Unescape(b []byte) { be.PutUint32(b, Magic) }
