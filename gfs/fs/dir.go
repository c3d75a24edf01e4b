package fs

import (
	"fmt"
	"math/bits"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Entry is an entry of a directory.
type Entry struct {
	Name string
	Inum ondisk.Inum
	Type uint16 // DT...
}

// leafAt is the pointer idx of the hash table.
func (ip *Inode) leafAt(idx uint64) (uint64, error) {
	var p [8]byte
	if n, err := ip.ReadAt(p[:], int64(idx*8)); n < 8 {
		return 0, fmt.Errorf("hash table of directory %d, pointer %d: %w", ip.Num.Addr, idx, err)
	}
	return be.Uint64(p[:]), nil
}

func (ip *Inode) hashIndex(name []byte) uint64 {
	return uint64(ondisk.NameHash(name)) >> (32 - ip.Depth)
}

// HashTable reads the pointers of an exhash directory.
func (ip *Inode) HashTable() ([]uint64, error) {
	n := uint64(1) << ip.Depth
	if ip.Size != n*8 {
		return nil, fmt.Errorf("directory %d: %w: depth %d and a table of %d bytes", ip.Num.Addr, ErrCorrupt, ip.Depth, ip.Size)
	}
	b, err := ip.ReadAll(8 << ondisk.MaxDepth)
	if err != nil {
		return nil, err
	}
	out := make([]uint64, n)
	for i := range out {
		out[i] = be.Uint64(b[8*i:])
	}
	return out, nil
}

// leaf reads a leaf block; the bytes are valid until the next read.
func (ip *Inode) leaf(addr uint64) ([]byte, ondisk.Leaf, error) {
	var lf ondisk.Leaf
	b, err := ip.S.Block(addr)
	if err != nil {
		return nil, lf, err
	}
	if err := ondisk.CheckMeta(b, ondisk.TypeLF); err != nil {
		return nil, lf, fmt.Errorf("leaf %d of directory %d: %w: %w", addr, ip.Num.Addr, ErrCorrupt, err)
	}
	return b, lf, lf.Decode(b)
}

// maxChain bounds lf_next chains, so that a loop on disk is none in memory.
const maxChain = 1 << 20

// EachLeaf calls f once for every leaf of an exhash directory in the order of
// the hash table, chained ones after the one that the table names.
func (ip *Inode) EachLeaf(f func(addr uint64, b []byte, lf *ondisk.Leaf) error) error {
	table, err := ip.HashTable()
	if err != nil {
		return err
	}
	last := uint64(0)
	for _, a := range table {
		if a == last {
			continue
		}
		last = a
		for n := 0; a != 0; n++ {
			if n > maxChain {
				return fmt.Errorf("directory %d: %w: endless chain of leaves", ip.Num.Addr, ErrCorrupt)
			}
			b, lf, err := ip.leaf(a)
			if err != nil {
				return err
			}
			if err := f(a, b, &lf); err != nil {
				return err
			}
			a = lf.Next
		}
	}
	return nil
}

// EachEntry calls f for every entry, "." and ".." included, in disk order.
func (ip *Inode) EachEntry(f func(Entry) error) error {
	if !ip.IsDir() {
		return fmt.Errorf("inode %d: %w", ip.Num.Addr, ErrNotDir)
	}
	block := func(b []byte) error {
		// f may read other blocks, so the entries are copied out first.
		var list []Entry
		if err := ondisk.EachEntry(b, func(e *ondisk.Entry) bool {
			if !e.Sentinel() {
				list = append(list, Entry{string(e.Name), e.Inum, e.Type})
			}
			return true
		}); err != nil {
			return fmt.Errorf("directory %d: %w: %w", ip.Num.Addr, ErrCorrupt, err)
		}
		for _, e := range list {
			if err := f(e); err != nil {
				return err
			}
		}
		return nil
	}
	if ip.Exhash() {
		return ip.EachLeaf(func(_ uint64, b []byte, _ *ondisk.Leaf) error { return block(b) })
	}
	b, err := ip.S.Block(ip.Num.Addr)
	if err != nil {
		return err
	}
	return block(b)
}

// Lookup finds an entry; ErrNotExist when there is none.
func (ip *Inode) Lookup(name string) (Entry, error) {
	_, e, err := ip.find([]byte(name))
	if err != nil {
		return Entry{}, fmt.Errorf("look up %s in directory %d: %w", name, ip.Num.Addr, err)
	}
	return Entry{name, e.Inum, e.Type}, nil
}

// find returns the block that holds the entry, and the entry.
func (ip *Inode) find(name []byte) (uint64, ondisk.Entry, error) {
	if !ip.IsDir() {
		return 0, ondisk.Entry{}, ErrNotDir
	}
	if !ip.Exhash() {
		b, err := ip.S.Block(ip.Num.Addr)
		if err != nil {
			return 0, ondisk.Entry{}, err
		}
		e, ok, err := ondisk.FindEntry(b, name)
		if err == nil && !ok {
			err = ErrNotExist
		}
		return ip.Num.Addr, e, err
	}
	a, err := ip.leafAt(ip.hashIndex(name))
	if err != nil {
		return 0, ondisk.Entry{}, err
	}
	for n := 0; a != 0 && n < maxChain; n++ {
		b, lf, err := ip.leaf(a)
		if err != nil {
			return 0, ondisk.Entry{}, err
		}
		if e, ok, err := ondisk.FindEntry(b, name); err != nil || ok {
			return a, e, err
		}
		a = lf.Next
	}
	return 0, ondisk.Entry{}, ErrNotExist
}

// Open reads the inode of an entry.
func (ip *Inode) Open(name string) (*Inode, error) {
	e, err := ip.Lookup(name)
	if err != nil {
		return nil, err
	}
	return ReadInode(ip.S, e.Inum.Addr)
}

// AddEntry puts an entry into the directory; the caller knows that the name is
// not there yet. The link counts are the caller's too.
func (ip *Inode) AddEntry(name string, ino ondisk.Inum, typ uint16) error {
	if len(name) == 0 || len(name) > ondisk.MaxName {
		return fmt.Errorf("add to directory %d: name of %d bytes", ip.Num.Addr, len(name))
	}
	n := []byte(name)
	if !ip.Exhash() {
		b, err := ip.S.Dirty(ip.Num.Addr)
		if err != nil {
			return err
		}
		ok, err := ondisk.AddEntry(b, ip.Entries == 0, n, ino, typ)
		if err != nil {
			return err
		}
		if ok {
			ip.Entries++
			return ip.Put()
		}
		if err := ip.makeExhash(); err != nil {
			return err
		}
	}
	for {
		idx := ip.hashIndex(n)
		addr, err := ip.leafAt(idx)
		if err != nil {
			return err
		}
		done, lf, err := ip.addToLeaf(addr, n, ino, typ)
		switch {
		case err != nil || done:
			return err
		case lf.Depth < ip.Depth:
			err = ip.split(idx, addr)
		case ip.Depth < ondisk.MaxDepth:
			err = ip.double()
		default:
			return ip.addToChain(addr, n, ino, typ)
		}
		if err != nil {
			return err
		}
	}
}

func (ip *Inode) addToLeaf(addr uint64, name []byte, ino ondisk.Inum, typ uint16) (bool, ondisk.Leaf, error) {
	_, lf, err := ip.leaf(addr)
	if err != nil {
		return false, lf, err
	}
	b, err := ip.S.Dirty(addr)
	if err != nil {
		return false, lf, err
	}
	ok, err := ondisk.AddEntry(b, lf.Entries == 0, name, ino, typ)
	if err != nil || !ok {
		return false, lf, err
	}
	lf.Entries++
	ip.Entries++
	if err := lf.Encode(b); err != nil {
		return false, lf, err
	}
	return true, lf, ip.Put()
}

// addToChain is for hash tables of the greatest depth: leaves are chained.
func (ip *Inode) addToChain(addr uint64, name []byte, ino ondisk.Inum, typ uint16) error {
	for n := 0; n < maxChain; n++ {
		done, lf, err := ip.addToLeaf(addr, name, ino, typ)
		if err != nil || done {
			return err
		}
		if lf.Next == 0 {
			na, err := ip.newLeaf(lf.Depth)
			if err != nil {
				return err
			}
			b, err := ip.S.Dirty(addr)
			if err != nil {
				return err
			}
			lf.Next = na
			if err := lf.Encode(b); err != nil {
				return err
			}
		}
		addr = lf.Next
	}
	return fmt.Errorf("directory %d: %w: endless chain of leaves", ip.Num.Addr, ErrCorrupt)
}

func (ip *Inode) newLeaf(depth uint16) (uint64, error) {
	a, err := ip.take()
	if err != nil {
		return 0, err
	}
	b, err := ip.S.NewBlock(a)
	if err != nil {
		return 0, err
	}
	lf := ondisk.Leaf{MetaHeader: ondisk.Meta(ondisk.TypeLF), Depth: depth, DirentFormat: uint32(ondisk.FormatDE), Inode: ip.Num.Addr}
	be.PutUint16(b[ondisk.LeafSize+20:], uint16(len(b)-ondisk.LeafSize)) // one empty record
	return a, lf.Encode(b)
}

// makeExhash turns a linear directory into a hashed one: all entries go to one
// leaf, to which every pointer of the smallest table points.
func (ip *Inode) makeExhash() error {
	g := ip.S.Geometry()
	a, err := ip.newLeaf(0)
	if err != nil {
		return err
	}
	nb, err := ip.S.Dirty(a)
	if err != nil {
		return err
	}
	b, err := ip.S.Dirty(ip.Num.Addr)
	if err != nil {
		return err
	}
	be.PutUint16(nb[26:], uint16(ip.Entries))
	copy(nb[ondisk.LeafSize:], b[ondisk.DinodeSize:])
	// The leaf header is smaller than the dinode: the last record grows.
	last := ondisk.LeafSize
	if err := ondisk.EachEntry(b, func(e *ondisk.Entry) bool {
		last = e.Off - ondisk.DinodeSize + ondisk.LeafSize
		return true
	}); err != nil {
		return err
	}
	be.PutUint16(nb[last+20:], uint16(g.BlockSize-last))
	tail := b[ondisk.DinodeSize:]
	clear(tail)
	for i := range g.HashPtrs {
		be.PutUint64(tail[8*i:], a)
	}
	ip.Depth = uint16(bits.TrailingZeros(uint(g.HashPtrs)))
	ip.Flags |= ondisk.DIExhash
	ip.Size, ip.PayloadFormat = uint64(g.HashSize), 0
	return ip.Put()
}

// split halves the range of hashes of a leaf. The new leaf takes the lower half.
func (ip *Inode) split(idx, addr uint64) error {
	_, lf, err := ip.leaf(addr)
	if err != nil {
		return err
	}
	na, err := ip.newLeaf(lf.Depth + 1)
	if err != nil {
		return err
	}
	span := uint64(1) << (ip.Depth - lf.Depth)
	start := idx &^ (span - 1)
	ptrs := make([]byte, 8*span/2)
	for i := 0; i < len(ptrs); i += 8 {
		be.PutUint64(ptrs[i:], na)
	}
	if _, err := ip.WriteAt(ptrs, int64(start*8)); err != nil {
		return err
	}
	old, err := ip.S.Dirty(addr)
	if err != nil {
		return err
	}
	nb, err := ip.S.Dirty(na)
	if err != nil {
		return err
	}
	divider := (start + span/2) << (32 - ip.Depth)
	var moved []int
	var inner error
	n := uint16(0)
	err = ondisk.EachEntry(old, func(e *ondisk.Entry) bool {
		if e.Sentinel() || uint64(e.Hash) >= divider {
			return true
		}
		moved = append(moved, e.Off)
		_, inner = ondisk.AddEntry(nb, n == 0, e.Name, e.Inum, e.Type)
		n++
		return inner == nil
	})
	if err == nil {
		err = inner
	}
	for i := 0; i < len(moved) && err == nil; i++ {
		err = ondisk.RemoveEntry(old, moved[i])
	}
	if err != nil {
		return err
	}
	be.PutUint16(nb[26:], n)
	lf.Depth, lf.Entries = lf.Depth+1, lf.Entries-n
	return lf.Encode(old)
}

// double gives the hash table twice as many pointers. gfs2-utils does it from
// the end, half a block at a time; the order decides where blocks land.
func (ip *Inode) double() error {
	g := ip.S.Geometry()
	half := make([]byte, g.HashSize)
	full := make([]byte, 2*g.HashSize)
	for i := int64(ip.Size) / int64(g.HashSize); i > 0; i-- {
		if _, err := ip.ReadAt(half, (i-1)*int64(g.HashSize)); err != nil {
			return err
		}
		for j := 0; j < len(half); j += 8 {
			copy(full[2*j:], half[j:j+8])
			copy(full[2*j+8:], half[j:j+8])
		}
		if _, err := ip.WriteAt(full, (i-1)*int64(len(full))); err != nil {
			return err
		}
	}
	ip.Depth++
	return ip.Put()
}

// RemoveEntry takes an entry out of the directory.
func (ip *Inode) RemoveEntry(name string) error {
	addr, e, err := ip.find([]byte(name))
	if err != nil {
		return fmt.Errorf("remove %s from directory %d: %w", name, ip.Num.Addr, err)
	}
	return ip.removeAt(addr, e.Off)
}

func (ip *Inode) removeAt(addr uint64, off int) error {
	b, err := ip.S.Dirty(addr)
	if err != nil {
		return err
	}
	if err := ondisk.RemoveEntry(b, off); err != nil {
		return err
	}
	if addr != ip.Num.Addr {
		be.PutUint16(b[26:], be.Uint16(b[26:])-1)
	}
	ip.Entries--
	return ip.Put()
}
