package ondisk

import (
	"errors"
	"fmt"
)

// ErrDirent marks a directory block whose records do not chain to its end.
var ErrDirent = errors.New("bad directory entry")

// DirentLen is the space that an entry with a name of n bytes needs.
func DirentLen(n int) int { return (DirentSize + n + 7) &^ 7 }

// DirStart is where the entries of a directory block begin: behind a leaf
// header or a dinode.
func DirStart(b []byte) int {
	if TypeOf(b) == TypeLF {
		return LeafSize
	}
	return DinodeSize
}

// Entry is a directory entry together with its place in the block.
type Entry struct {
	Dirent
	Off  int
	Name []byte // aliases the block
}

// Sentinel tells that the record is unused space at the start of a block.
func (e *Entry) Sentinel() bool { return e.Inum.Formal == 0 || e.Inum.Addr == 0 }

// EachEntry calls f for every record of a directory block, sentinels included,
// in order, until f returns false. The error is ErrDirent where a record is
// impossible; the records before it have been given to f.
func EachEntry(b []byte, f func(e *Entry) bool) error {
	var e Entry
	for off := DirStart(b); off < len(b); {
		if len(b)-off < DirentSize {
			return fmt.Errorf("%w: %d bytes left at offset %d", ErrDirent, len(b)-off, off)
		}
		if err := e.Decode(b[off:]); err != nil {
			return err
		}
		rec, nl := int(e.RecLen), int(e.NameLen)
		switch {
		case rec < DirentLen(0) || rec%8 != 0 || rec > len(b)-off:
			return fmt.Errorf("%w: record length %d at offset %d", ErrDirent, rec, off)
		case e.Sentinel():
			nl = 0
		case nl == 0 || nl > MaxName || DirentLen(nl) > rec:
			return fmt.Errorf("%w: name of %d bytes in a record of %d at offset %d", ErrDirent, nl, rec, off)
		}
		e.Off, e.Name = off, b[off+DirentSize:off+DirentSize+nl]
		if !f(&e) {
			return nil
		}
		off += rec
	}
	return nil
}

// FindEntry looks a name up in one directory block.
func FindEntry(b []byte, name []byte) (Entry, bool, error) {
	var hit Entry
	found := false
	h := NameHash(name)
	err := EachEntry(b, func(e *Entry) bool {
		if !e.Sentinel() && e.Hash == h && string(e.Name) == string(name) {
			hit, found = *e, true
		}
		return !found
	})
	return hit, found, err
}

// AddEntry puts an entry into the first record of a directory block with enough
// slack; false means that none has. An empty block (no records yet) must say so
// with empty. Counters in dinode or leaf are the caller's.
func AddEntry(b []byte, empty bool, name []byte, ino Inum, typ uint16) (bool, error) {
	need := DirentLen(len(name))
	d := Dirent{Inum: ino, Hash: NameHash(name), NameLen: uint16(len(name)), Type: typ}
	if empty {
		off := DirStart(b)
		d.RecLen = uint16(len(b) - off)
		if int(d.RecLen) < need {
			return false, nil
		}
		return true, putEntry(b, off, &d, name)
	}
	at := -1
	err := EachEntry(b, func(e *Entry) bool {
		if e.Sentinel() {
			if int(e.RecLen) < need {
				return true
			}
			at, d.RecLen = e.Off, e.RecLen
			return false
		}
		used := DirentLen(int(e.NameLen))
		if int(e.RecLen) < used+need {
			return true
		}
		at, d.RecLen = e.Off+used, e.RecLen-uint16(used)
		be.PutUint16(b[e.Off+20:], uint16(used))
		return false
	})
	if err != nil || at < 0 {
		return false, err
	}
	return true, putEntry(b, at, &d, name)
}

func putEntry(b []byte, off int, d *Dirent, name []byte) error {
	clear(b[off : off+DirentLen(len(name))])
	if err := d.Encode(b[off:]); err != nil {
		return err
	}
	copy(b[off+DirentSize:], name)
	return nil
}

// RemoveEntry takes the entry at off out of a directory block: its space goes
// to the record before it, and the first record of a block becomes a sentinel.
func RemoveEntry(b []byte, off int) error {
	prev, found := -1, false
	var rec uint16
	err := EachEntry(b, func(e *Entry) bool {
		if e.Off == off {
			found, rec = true, e.RecLen
			return false
		}
		prev = e.Off
		return true
	})
	switch {
	case err != nil:
		return err
	case !found:
		return fmt.Errorf("%w: no record starts at offset %d", ErrDirent, off)
	case prev < 0:
		be.PutUint64(b[off:], 0)
		be.PutUint64(b[off+8:], 0)
	default:
		be.PutUint16(b[prev+20:], be.Uint16(b[prev+20:])+rec)
	}
	return nil
}

// InitDir fills the dinode block b of a new linear directory: "." and "..".
// The dinode must already be there.
func InitDir(b []byte, self, parent Inum) error {
	first := DirentLen(1)
	d := Dirent{Inum: self, Hash: NameHash([]byte(".")), RecLen: uint16(first), NameLen: 1, Type: DTDir}
	if err := putEntry(b, DinodeSize, &d, []byte(".")); err != nil {
		return err
	}
	d = Dirent{Inum: parent, Hash: NameHash([]byte("..")), RecLen: uint16(len(b) - DinodeSize - first), NameLen: 2, Type: DTDir}
	return putEntry(b, DinodeSize+first, &d, []byte(".."))
}
