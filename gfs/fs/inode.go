package fs

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

var be = binary.BigEndian

// Inode is an inode of a Store. Its fields are those of the dinode; a change to
// them is on its way to disk after Put.
type Inode struct {
	S Store
	ondisk.Dinode
}

// ReadInode reads the dinode at block addr.
func ReadInode(s Store, addr uint64) (*Inode, error) {
	b, err := s.Block(addr)
	if err != nil {
		return nil, fmt.Errorf("read inode %d: %w", addr, err)
	}
	if err := ondisk.CheckMeta(b, ondisk.TypeDI); err != nil {
		return nil, fmt.Errorf("read inode %d: %w: %w", addr, ErrCorrupt, err)
	}
	ip := &Inode{S: s}
	if err := ip.Decode(b); err != nil {
		return nil, err
	}
	switch {
	case ip.Num.Addr != addr:
		return nil, fmt.Errorf("read inode %d: %w: it says that it is %d", addr, ErrCorrupt, ip.Num.Addr)
	case ip.Height > ondisk.MaxHeight:
		return nil, fmt.Errorf("read inode %d: %w: height %d", addr, ErrCorrupt, ip.Height)
	case ip.Depth > ondisk.MaxDepth:
		return nil, fmt.Errorf("read inode %d: %w: depth %d", addr, ErrCorrupt, ip.Depth)
	}
	return ip, nil
}

// NewInode writes a fresh dinode into block addr. A directory gets "." and ".."
// (parent zero = itself). now is in seconds since 1970.
func NewInode(s Store, num ondisk.Inum, mode, flags uint32, parent ondisk.Inum, now int64) (*Inode, error) {
	b, err := s.NewBlock(num.Addr)
	if err != nil {
		return nil, err
	}
	t := uint64(now)
	ip := &Inode{S: s, Dinode: ondisk.Dinode{
		MetaHeader: ondisk.Meta(ondisk.TypeDI), Num: num,
		Mode: mode, Nlink: 1, Blocks: 1, Atime: t, Mtime: t, Ctime: t,
		GoalMeta: num.Addr, GoalData: num.Addr, Flags: flags,
	}}
	if ip.IsDir() {
		ip.Nlink, ip.Entries = 2, 2
		ip.Size = uint64(s.Geometry().StuffedMax())
		ip.Flags |= ondisk.DIJdata
		ip.PayloadFormat = uint32(ondisk.FormatDE)
		if parent.Addr == 0 {
			parent = num
		}
		if err := ip.Encode(b); err != nil {
			return nil, err
		}
		if err := ondisk.InitDir(b, num, parent); err != nil {
			return nil, err
		}
	}
	return ip, ip.Encode(b)
}

// Put stores the fields of the dinode in its block.
func (ip *Inode) Put() error {
	b, err := ip.S.Dirty(ip.Num.Addr)
	if err != nil {
		return err
	}
	return ip.Encode(b)
}

// IsDir tells whether ip is a directory.
func (ip *Inode) IsDir() bool { return ip.Mode&ondisk.ModeMask == ondisk.ModeDir }

// Exhash tells whether ip is a directory with a hash table.
func (ip *Inode) Exhash() bool { return ip.IsDir() && ip.Flags&ondisk.DIExhash != 0 }

// Stuffed tells that the content lies behind the dinode.
func (ip *Inode) Stuffed() bool { return ip.Height == 0 }

// Unit is the payload of one data block: directories keep a header in each.
func (ip *Inode) Unit() uint64 {
	if ip.IsDir() {
		return uint64(ip.S.Geometry().JBSize)
	}
	return uint64(ip.S.Geometry().BlockSize)
}

// take allocates a block of the inode's tree. System files are journaled, so
// even their data counts as metadata.
func (ip *Inode) take() (uint64, error) {
	a, err := ip.S.Alloc(false)
	if err != nil {
		return 0, err
	}
	ip.GoalMeta = a
	ip.Blocks++
	return a, nil
}

// raise makes the tree h levels high. A level is inserted under the dinode; it
// needs a block only when there is something to move down.
func (ip *Inode) raise(h int) error {
	for int(ip.Height) < h {
		b, err := ip.S.Dirty(ip.Num.Addr)
		if err != nil {
			return err
		}
		tail := b[ondisk.DinodeSize:]
		inUse := false
		for _, x := range tail {
			if x != 0 {
				inUse = true
				break
			}
		}
		if inUse {
			a, err := ip.take()
			if err != nil {
				return err
			}
			nb, err := ip.S.NewBlock(a)
			if err != nil {
				return err
			}
			ondisk.PutMeta(nb, ondisk.TypeIN)
			copy(nb[ondisk.MetaHeaderSize:], tail)
			clear(tail)
			be.PutUint64(tail, a)
		}
		ip.Height++
	}
	return nil
}

// unstuff moves the content behind the dinode into the first data block.
func (ip *Inode) unstuff() error {
	b, err := ip.S.Dirty(ip.Num.Addr)
	if err != nil {
		return err
	}
	tail := b[ondisk.DinodeSize:]
	if ip.Size > 0 {
		a, err := ip.take()
		if err != nil {
			return err
		}
		nb, err := ip.S.NewBlock(a)
		if err != nil {
			return err
		}
		off := 0
		if ip.IsDir() {
			ondisk.PutMeta(nb, ondisk.TypeJD)
			off = ondisk.MetaHeaderSize
		}
		copy(nb[off:], tail)
		clear(tail)
		be.PutUint64(tail, a)
	}
	ip.Height = 1
	return nil
}

// Map returns the block that holds data block n of an inode that is not
// stuffed; 0 is a hole.
func (ip *Inode) Map(n uint64) (uint64, error) { return ip.walk(n, false) }

// MapNew is Map that allocates the block and the pointer blocks above it where
// they are missing.
func (ip *Inode) MapNew(n uint64) (uint64, error) {
	if err := ip.raise(ip.S.Geometry().HeightBlocks(n + 1)); err != nil {
		return 0, err
	}
	return ip.walk(n, true)
}

func (ip *Inode) walk(n uint64, create bool) (uint64, error) {
	g := ip.S.Geometry()
	var path [ondisk.MaxHeight]uint64
	h := int(ip.Height)
	if h == 0 || h > len(path) {
		return 0, fmt.Errorf("map block of inode %d: %w: height %d", ip.Num.Addr, ErrCorrupt, h)
	}
	for i := h - 1; i > 0; i-- {
		path[i] = n % uint64(g.InPtrs)
		n /= uint64(g.InPtrs)
	}
	if n >= uint64(g.DinodePtrs) {
		return 0, nil // beyond what the tree can map
	}
	path[0] = n
	at, off := ip.Num.Addr, uint64(ondisk.DinodeSize)
	for lvl := range h {
		b, err := ip.S.Block(at)
		if err != nil {
			return 0, err
		}
		if lvl > 0 {
			if err := ondisk.CheckMeta(b, ondisk.TypeIN); err != nil {
				return 0, fmt.Errorf("indirect block %d of inode %d: %w: %w", at, ip.Num.Addr, ErrCorrupt, err)
			}
		}
		p := off + 8*path[lvl]
		a := be.Uint64(b[p:])
		last := lvl == h-1
		if a == 0 {
			if !create {
				return 0, nil
			}
			if a, err = ip.take(); err != nil {
				return 0, err
			}
			if b, err = ip.S.Dirty(at); err != nil {
				return 0, err
			}
			be.PutUint64(b[p:], a)
			nb, err := ip.S.NewBlock(a)
			if err != nil {
				return 0, err
			}
			switch {
			case !last:
				ondisk.PutMeta(nb, ondisk.TypeIN)
			case ip.IsDir():
				ondisk.PutMeta(nb, ondisk.TypeJD)
			}
		}
		if last {
			return a, nil
		}
		at, off = a, ondisk.MetaHeaderSize
	}
	return 0, nil
}

// WriteAt puts p at byte off of a file or of a directory's hash table, and
// grows it. The dinode is not Put.
func (ip *Inode) WriteAt(p []byte, off int64) (int, error) {
	g := ip.S.Geometry()
	at, done := uint64(off), 0
	if ip.Stuffed() && at+uint64(len(p)) > uint64(g.StuffedMax()) {
		if err := ip.unstuff(); err != nil {
			return 0, err
		}
	}
	if ip.Stuffed() {
		b, err := ip.S.Dirty(ip.Num.Addr)
		if err != nil {
			return 0, err
		}
		done = copy(b[ondisk.DinodeSize+at:], p)
		at += uint64(done)
	}
	head := uint64(g.BlockSize) - ip.Unit()
	for done < len(p) {
		a, err := ip.MapNew(at / ip.Unit())
		if err != nil {
			return done, err
		}
		b, err := ip.S.Dirty(a)
		if err != nil {
			return done, err
		}
		n := copy(b[head+at%ip.Unit():], p[done:])
		at, done = at+uint64(n), done+n
	}
	ip.Size = max(ip.Size, at)
	return done, nil
}

// ReadAt reads file content or a directory's hash table; holes read as zeroes.
func (ip *Inode) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || uint64(off) >= ip.Size {
		return 0, io.EOF
	}
	g := ip.S.Geometry()
	want := len(p)
	p = p[:min(uint64(len(p)), ip.Size-uint64(off))]
	at, done := uint64(off), 0
	if ip.Stuffed() {
		if ip.Size > uint64(g.StuffedMax()) {
			return 0, fmt.Errorf("inode %d: %w: %d bytes in a dinode", ip.Num.Addr, ErrCorrupt, ip.Size)
		}
		b, err := ip.S.Block(ip.Num.Addr)
		if err != nil {
			return 0, err
		}
		done = copy(p, b[ondisk.DinodeSize+at:])
	}
	head := uint64(g.BlockSize) - ip.Unit()
	for done < len(p) {
		in := at % ip.Unit()
		n := int(min(uint64(len(p)-done), ip.Unit()-in))
		a, err := ip.Map(at / ip.Unit())
		if err != nil {
			return done, err
		}
		if a == 0 {
			clear(p[done : done+n])
		} else {
			b, err := ip.S.Block(a)
			if err != nil {
				return done, err
			}
			copy(p[done:done+n], b[head+in:])
		}
		at, done = at+uint64(n), done+n
	}
	if done < want {
		return done, io.EOF
	}
	return done, nil
}

// ReadAll reads the whole content of a small file; the error names the limit.
func (ip *Inode) ReadAll(limit uint64) ([]byte, error) {
	if ip.Size > limit {
		return nil, fmt.Errorf("inode %d: %w: %d bytes, at most %d expected", ip.Num.Addr, ErrCorrupt, ip.Size, limit)
	}
	b := make([]byte, ip.Size)
	if len(b) == 0 {
		return b, nil
	}
	n, err := ip.ReadAt(b, 0)
	if n == len(b) {
		err = nil
	}
	return b, err
}

// EachBlock calls f for every block of the inode but the dinode, pointer blocks
// before what they point to: level 1 is just under the dinode, data says that
// the block is of the lowest level. f may stop the walk with an error. Pointers
// to blocks that cannot be read or that are no indirect blocks end that branch
// after f saw them.
func (ip *Inode) EachBlock(f func(addr uint64, level int, data bool) error) error {
	if ip.Stuffed() {
		return nil
	}
	var visit func(at uint64, lvl int) error
	visit = func(at uint64, lvl int) error {
		b, err := ip.S.Block(at)
		if err != nil {
			return err
		}
		off := ondisk.MetaHeaderSize
		if lvl == 0 {
			off = ondisk.DinodeSize
		}
		ptrs := make([]uint64, 0, (len(b)-off)/8)
		for ; off+8 <= len(b); off += 8 {
			if a := be.Uint64(b[off:]); a != 0 {
				ptrs = append(ptrs, a)
			}
		}
		data := lvl+1 == int(ip.Height)
		for _, a := range ptrs {
			if err := f(a, lvl+1, data); err != nil {
				return err
			}
			if !data {
				if b, err := ip.S.Block(a); err != nil || ondisk.CheckMeta(b, ondisk.TypeIN) != nil {
					continue
				}
				if err := visit(a, lvl+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return visit(ip.Num.Addr, 0)
}
