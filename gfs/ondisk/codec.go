package ondisk

import (
	"encoding/binary"
	"errors"
	"fmt"
)

var be = binary.BigEndian

// Errors of decoding.
var (
	ErrShort = errors.New("block too short")
	ErrMagic = errors.New("no GFS2 magic number")
	ErrType  = errors.New("wrong metadata type")
)

// Kind tells how a field is meant to be shown; all numbers are unsigned and
// big-endian whatever the kind.
type Kind uint8

// The kinds.
const (
	KindDec Kind = iota
	KindHex
	KindOct
	KindSigned
	KindString
	KindUUID
	KindBytes
)

// FieldInfo is one row of a structure's table: the name of the kernel's
// header, where it lies and how it is shown.
type FieldInfo struct {
	Name string
	Off  int
	Size int // bytes: 1, 2, 4 or 8 for numbers
	Kind Kind
}

// Uint reads the field out of the bytes of its structure. b must hold it.
func (f FieldInfo) Uint(b []byte) uint64 {
	switch f.Size {
	case 1:
		return uint64(b[f.Off])
	case 2:
		return uint64(be.Uint16(b[f.Off:]))
	case 4:
		return uint64(be.Uint32(b[f.Off:]))
	case 8:
		return be.Uint64(b[f.Off:])
	}
	return 0
}

// PutUint writes the field into the bytes of its structure. Bits that do not
// fit are an error and nothing is written.
func (f FieldInfo) PutUint(b []byte, v uint64) error {
	if f.Size < 8 && v>>(8*f.Size) != 0 {
		return fmt.Errorf("field %s holds %d bytes, %d does not fit", f.Name, f.Size, v)
	}
	switch f.Size {
	case 1:
		b[f.Off] = byte(v)
	case 2:
		be.PutUint16(b[f.Off:], uint16(v))
	case 4:
		be.PutUint32(b[f.Off:], uint32(v))
	case 8:
		be.PutUint64(b[f.Off:], v)
	default:
		return fmt.Errorf("field %s is no number", f.Name)
	}
	return nil
}

// field ties a row of the table to the Go struct. Exactly one accessor is set.
type field[T any] struct {
	FieldInfo
	p8  func(*T) *uint8
	p16 func(*T) *uint16
	p32 func(*T) *uint32
	p64 func(*T) *uint64
	pb  func(*T) []byte
}

func u8[T any](name string, off int, p func(*T) *uint8) field[T] {
	return field[T]{FieldInfo: FieldInfo{name, off, 1, KindDec}, p8: p}
}
func u16[T any](name string, off int, p func(*T) *uint16) field[T] {
	return field[T]{FieldInfo: FieldInfo{name, off, 2, KindDec}, p16: p}
}
func u32[T any](name string, off int, p func(*T) *uint32) field[T] {
	return field[T]{FieldInfo: FieldInfo{name, off, 4, KindDec}, p32: p}
}
func u64[T any](name string, off int, p func(*T) *uint64) field[T] {
	return field[T]{FieldInfo: FieldInfo{name, off, 8, KindDec}, p64: p}
}
func raw[T any](name string, off, size int, k Kind, p func(*T) []byte) field[T] {
	return field[T]{FieldInfo: FieldInfo{name, off, size, k}, pb: p}
}
func (f field[T]) as(k Kind) field[T] { f.Kind = k; return f }

// layout is the table of one structure.
type layout[T any] struct {
	name   string
	size   int
	typ    MetaType // 0 = structure without a meta header
	fields []field[T]
}

func (l *layout[T]) decode(b []byte, v *T) error {
	if len(b) < l.size {
		return fmt.Errorf("%w: %s needs %d bytes, have %d", ErrShort, l.name, l.size, len(b))
	}
	for i := range l.fields {
		f := &l.fields[i]
		switch {
		case f.p64 != nil:
			*f.p64(v) = be.Uint64(b[f.Off:])
		case f.p32 != nil:
			*f.p32(v) = be.Uint32(b[f.Off:])
		case f.p16 != nil:
			*f.p16(v) = be.Uint16(b[f.Off:])
		case f.p8 != nil:
			*f.p8(v) = b[f.Off]
		default:
			copy(f.pb(v), b[f.Off:f.Off+f.Size])
		}
	}
	return nil
}

// encode writes the named fields only; reserved bytes of b stay as they are.
func (l *layout[T]) encode(b []byte, v *T) error {
	if len(b) < l.size {
		return fmt.Errorf("%w: %s needs %d bytes, have %d", ErrShort, l.name, l.size, len(b))
	}
	for i := range l.fields {
		f := &l.fields[i]
		switch {
		case f.p64 != nil:
			be.PutUint64(b[f.Off:], *f.p64(v))
		case f.p32 != nil:
			be.PutUint32(b[f.Off:], *f.p32(v))
		case f.p16 != nil:
			be.PutUint16(b[f.Off:], *f.p16(v))
		case f.p8 != nil:
			b[f.Off] = *f.p8(v)
		default:
			copy(b[f.Off:f.Off+f.Size], f.pb(v))
		}
	}
	return nil
}

func (l *layout[T]) infos() []FieldInfo {
	out := make([]FieldInfo, len(l.fields))
	for i, f := range l.fields {
		out[i] = f.FieldInfo
	}
	return out
}

// header is the part of the table that all blocks with a meta header share.
func header[T any](p func(*T) *MetaHeader) []field[T] {
	return []field[T]{
		u32("mh_magic", 0, func(v *T) *uint32 { return &p(v).Magic }).as(KindHex),
		u32("mh_type", 4, func(v *T) *uint32 { return (*uint32)(&p(v).Type) }),
		u32("mh_format", 16, func(v *T) *uint32 { return (*uint32)(&p(v).Format) }),
		u32("mh_jid", 20, func(v *T) *uint32 { return &p(v).JID }),
	}
}

// CheckMeta tells whether b begins with the header of a block of type t.
func CheckMeta(b []byte, t MetaType) error {
	if len(b) < MetaHeaderSize {
		return ErrShort
	}
	if m := be.Uint32(b); m != Magic {
		return fmt.Errorf("%w: %#08x", ErrMagic, m)
	}
	if got := MetaType(be.Uint32(b[4:])); got != t {
		return fmt.Errorf("%w: %d (%s), not %d (%s)", ErrType, uint32(got), got, uint32(t), t)
	}
	return nil
}

// TypeOf returns the type in the header of b, TypeNone where there is no magic.
func TypeOf(b []byte) MetaType {
	if len(b) < MetaHeaderSize || be.Uint32(b) != Magic {
		return TypeNone
	}
	return MetaType(be.Uint32(b[4:]))
}

// PutMeta writes the header of a block of type t.
func PutMeta(b []byte, t MetaType) {
	be.PutUint32(b, Magic)
	be.PutUint32(b[4:], uint32(t))
	be.PutUint64(b[8:], 0)
	be.PutUint32(b[16:], uint32(t.Format()))
	be.PutUint32(b[20:], 0)
}
