package ondisk

import (
	"errors"
	"fmt"
)

// ErrEA marks an EA block whose records do not chain to its end.
var ErrEA = errors.New("bad extended attribute")

// EA is an extended attribute in an EA block. Value aliases the block and is
// nil when the value lies in the EA data blocks of Ptrs.
type EA struct {
	EAHeader
	Off   int
	Name  []byte
	Value []byte
	Ptrs  []uint64
}

// Unused tells that the record is free space.
func (e *EA) Unused() bool { return e.Type == 0 }

// EAPrefix is the name space of an EA type as users write it.
func EAPrefix(t uint8) string {
	switch t {
	case EAUsr:
		return "user."
	case EASys:
		return "system."
	case EASecurity:
		return "security."
	case EATrusted:
		return "trusted."
	}
	return ""
}

// EachEA calls f for every record of an EA block until f returns false.
func EachEA(b []byte, f func(e *EA) bool) error {
	per := len(b) - MetaHeaderSize
	for off := MetaHeaderSize; ; {
		if len(b)-off < EAHeaderSize {
			return fmt.Errorf("%w: %d bytes left at offset %d", ErrEA, len(b)-off, off)
		}
		var e EA
		if err := e.Decode(b[off:]); err != nil {
			return err
		}
		rec := int(e.RecLen)
		if rec < EAHeaderSize || rec > len(b)-off || rec%8 != 0 {
			return fmt.Errorf("%w: record length %d at offset %d", ErrEA, rec, off)
		}
		r := b[off : off+rec]
		e.Off = off
		if !e.Unused() {
			end := EAHeaderSize + int(e.NameLen)
			if e.Type > EATrusted {
				return fmt.Errorf("%w: type %d at offset %d", ErrEA, e.Type, off)
			}
			if end > rec || e.NameLen == 0 {
				return fmt.Errorf("%w: name of %d bytes in a record of %d at offset %d", ErrEA, e.NameLen, rec, off)
			}
			e.Name = r[EAHeaderSize:end]
			if e.NumPtrs == 0 {
				if uint64(end)+uint64(e.DataLen) > uint64(rec) {
					return fmt.Errorf("%w: value of %d bytes in a record of %d at offset %d", ErrEA, e.DataLen, rec, off)
				}
				e.Value = r[end : end+int(e.DataLen)]
			} else {
				p := (end + 7) &^ 7
				if p+8*int(e.NumPtrs) > rec || uint64(e.DataLen) > uint64(e.NumPtrs)*uint64(per) {
					return fmt.Errorf("%w: %d pointers for %d bytes in a record of %d at offset %d", ErrEA, e.NumPtrs, e.DataLen, rec, off)
				}
				for i := 0; i < int(e.NumPtrs); i++ {
					e.Ptrs = append(e.Ptrs, be.Uint64(r[p+8*i:]))
				}
			}
		}
		if !f(&e) {
			return nil
		}
		off += rec
		last := e.Flags&EAFlagLast != 0
		switch {
		case last && off != len(b):
			return fmt.Errorf("%w: last record ends at %d of %d", ErrEA, off, len(b))
		case last:
			return nil
		case off >= len(b):
			return fmt.Errorf("%w: no record is marked last", ErrEA)
		}
	}
}
