package mkfs

import (
	"errors"
	"fmt"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// unit is the payload of one data block: directories keep a header in each.
func (ip *inode) unit() uint64 {
	if ip.isDir() {
		return uint64(ip.im.l.Geom.JBSize)
	}
	return uint64(ip.im.l.Geom.BlockSize)
}

// take allocates a block of the inode's tree. All system files are journaled,
// so even their data counts as metadata.
func (ip *inode) take() (uint64, error) {
	a, err := ip.im.alloc(false)
	if err != nil {
		return 0, err
	}
	ip.GoalMeta = a
	ip.Blocks++
	return a, nil
}

// raise makes the tree h levels high. A level is inserted under the dinode; it
// needs a block only when there is something to move down.
func (ip *inode) raise(h int) error {
	for int(ip.Height) < h {
		tail := ip.b[ondisk.DinodeSize:]
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
			b := ip.im.block(a)
			ondisk.PutMeta(b, ondisk.TypeIN)
			copy(b[ondisk.MetaHeaderSize:], tail)
			clear(tail)
			be.PutUint64(tail, a)
		}
		ip.Height++
	}
	return nil
}

// unstuff moves the content behind the dinode into the first data block.
func (ip *inode) unstuff() error {
	tail := ip.b[ondisk.DinodeSize:]
	off := 0
	if ip.isDir() {
		off = ondisk.MetaHeaderSize
	}
	if ip.Size > 0 {
		a, err := ip.take()
		if err != nil {
			return err
		}
		b := ip.im.block(a)
		if ip.isDir() {
			ondisk.PutMeta(b, ondisk.TypeJD)
		}
		copy(b[off:], tail)
		clear(tail)
		be.PutUint64(tail, a)
	}
	ip.Height = 1
	return nil
}

// mapBlock finds data block n of an unstuffed inode and allocates it and the
// pointer blocks above it where they are missing.
func (ip *inode) mapBlock(n uint64) (uint64, error) {
	g := ip.im.l.Geom
	if err := ip.raise(g.HeightBlocks(n + 1)); err != nil {
		return 0, err
	}
	path := make([]int, ip.Height)
	for i := len(path) - 1; i > 0; i-- {
		path[i] = int(n % uint64(g.InPtrs))
		n /= uint64(g.InPtrs)
	}
	path[0] = int(n)
	b, off := ip.b, ondisk.DinodeSize
	for lvl, idx := range path {
		p := b[off+8*idx:]
		a := be.Uint64(p)
		last := lvl == len(path)-1
		if a == 0 {
			var err error
			if a, err = ip.take(); err != nil {
				return 0, err
			}
			be.PutUint64(p, a)
			nb := ip.im.block(a)
			switch {
			case !last:
				ondisk.PutMeta(nb, ondisk.TypeIN)
			case ip.isDir():
				ondisk.PutMeta(nb, ondisk.TypeJD)
			}
		}
		if last {
			return a, nil
		}
		b, off = ip.im.blocks[a], ondisk.MetaHeaderSize
		if b == nil {
			return 0, fmt.Errorf("block %d of inode %d is not in memory", a, ip.Num.Addr)
		}
	}
	panic("unreachable: a path has at least one level")
}

// write puts p at byte off of a file or of a directory's hash table.
func (ip *inode) write(p []byte, off uint64) error {
	g := ip.im.l.Geom
	if ip.Height == 0 && off+uint64(len(p)) > uint64(g.StuffedMax()) {
		if err := ip.unstuff(); err != nil {
			return err
		}
	}
	end := off + uint64(len(p))
	if ip.Height == 0 {
		copy(ip.b[ondisk.DinodeSize+off:], p)
	} else {
		head := g.BlockSize - int(ip.unit())
		for len(p) > 0 {
			a, err := ip.mapBlock(off / ip.unit())
			if err != nil {
				return err
			}
			n := copy(ip.im.blocks[a][head+int(off%ip.unit()):], p)
			p, off = p[n:], off+uint64(n)
		}
	}
	ip.Size = max(ip.Size, end)
	return nil
}

// read is the inverse of write.
func (ip *inode) read(p []byte, off uint64) error {
	if ip.Height == 0 {
		copy(p, ip.b[ondisk.DinodeSize+off:])
		return nil
	}
	head := ip.im.l.Geom.BlockSize - int(ip.unit())
	for len(p) > 0 {
		a, err := ip.mapBlock(off / ip.unit())
		if err != nil {
			return err
		}
		n := copy(p, ip.im.blocks[a][head+int(off%ip.unit()):])
		p, off = p[n:], off+uint64(n)
	}
	return nil
}

// add puts an entry into the directory; the name must not be there yet.
func (ip *inode) add(name string, ino ondisk.Inum, typ uint16) error {
	n := []byte(name)
	if ip.Flags&ondisk.DIExhash == 0 {
		ok, err := ondisk.AddEntry(ip.b, false, n, ino, typ)
		if err != nil {
			return err
		}
		if ok {
			ip.Entries++
			return ip.put()
		}
		if err := ip.makeExhash(); err != nil {
			return err
		}
	}
	h := ondisk.NameHash(n)
	for {
		idx := uint64(h >> (32 - ip.Depth))
		addr, err := ip.leafAt(idx)
		if err != nil {
			return err
		}
		b := ip.im.blocks[addr]
		var lf ondisk.Leaf
		if err := lf.Decode(b); err != nil {
			return err
		}
		ok, err := ondisk.AddEntry(b, lf.Entries == 0, n, ino, typ)
		switch {
		case err != nil:
			return err
		case ok:
			lf.Entries++
			ip.Entries++
			if err := lf.Encode(b); err != nil {
				return err
			}
			return ip.put()
		case lf.Depth < ip.Depth:
			err = ip.split(idx, addr)
		case ip.Depth < ondisk.MaxDepth:
			err = ip.double()
		default:
			// 2^17 leaves are full only beyond any number of journals.
			err = fmt.Errorf("directory %d: hash table is full", ip.Num.Addr)
		}
		if err != nil {
			return err
		}
	}
}

func (ip *inode) leafAt(idx uint64) (uint64, error) {
	var p [8]byte
	err := ip.read(p[:], idx*8)
	return be.Uint64(p[:]), err
}

func (ip *inode) newLeaf(depth uint16) (uint64, []byte, error) {
	a, err := ip.take()
	if err != nil {
		return 0, nil, err
	}
	b := ip.im.block(a)
	lf := ondisk.Leaf{MetaHeader: ondisk.Meta(ondisk.TypeLF), Depth: depth, DirentFormat: uint32(ondisk.FormatDE), Inode: ip.Num.Addr}
	return a, b, lf.Encode(b)
}

// makeExhash turns a linear directory into a hashed one: all entries go to one
// leaf, to which every pointer of the smallest table points.
func (ip *inode) makeExhash() error {
	g := ip.im.l.Geom
	a, b, err := ip.newLeaf(0)
	if err != nil {
		return err
	}
	be.PutUint16(b[26:], uint16(ip.Entries))
	copy(b[ondisk.LeafSize:], ip.b[ondisk.DinodeSize:])
	// The leaf header is smaller than the dinode: the last record grows.
	last := 0
	for off := ondisk.LeafSize; off < g.BlockSize-(ondisk.DinodeSize-ondisk.LeafSize); {
		last = off
		off += int(be.Uint16(b[off+20:]))
	}
	be.PutUint16(b[last+20:], uint16(g.BlockSize-last))
	tail := ip.b[ondisk.DinodeSize:]
	clear(tail)
	for i := range g.HashPtrs {
		be.PutUint64(tail[8*i:], a)
	}
	for ip.Depth = 0; 1<<ip.Depth < g.HashPtrs; ip.Depth++ {
	}
	ip.Flags |= ondisk.DIExhash
	ip.Size, ip.PayloadFormat = uint64(g.HashSize), 0
	return ip.put()
}

// split halves the range of hashes of a leaf. The new leaf takes the lower half.
func (ip *inode) split(idx, addr uint64) error {
	old := ip.im.blocks[addr]
	var lf ondisk.Leaf
	if err := lf.Decode(old); err != nil {
		return err
	}
	na, nb, err := ip.newLeaf(lf.Depth + 1)
	if err != nil {
		return err
	}
	span := uint64(1) << (ip.Depth - lf.Depth)
	start := idx &^ (span - 1)
	ptrs := make([]byte, 8*span/2)
	for i := 0; i < len(ptrs); i += 8 {
		be.PutUint64(ptrs[i:], na)
	}
	if err := ip.write(ptrs, start*8); err != nil {
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
	if n == 0 { // a leaf without entries still needs one record
		be.PutUint16(nb[ondisk.LeafSize+20:], uint16(len(nb)-ondisk.LeafSize))
	}
	be.PutUint16(nb[26:], n)
	lf.Depth, lf.Entries = lf.Depth+1, lf.Entries-n
	return lf.Encode(old)
}

// double gives the hash table twice as many pointers. mkfs.gfs2 does it from
// the end, half a block at a time; the order decides where blocks land.
func (ip *inode) double() error {
	g := ip.im.l.Geom
	half := make([]byte, g.HashSize)
	full := make([]byte, 2*g.HashSize)
	for i := ip.Size / uint64(g.HashSize); i > 0; i-- {
		if err := ip.read(half, (i-1)*uint64(g.HashSize)); err != nil {
			return err
		}
		for j := 0; j < len(half); j += 8 {
			copy(full[2*j:], half[j:j+8])
			copy(full[2*j+8:], half[j:j+8])
		}
		if err := ip.write(full, (i-1)*uint64(len(full))); err != nil {
			return err
		}
	}
	ip.Depth++
	return ip.put()
}

// lookup finds the address of an entry.
func (ip *inode) lookup(name string) (uint64, error) {
	b := ip.b
	if ip.Flags&ondisk.DIExhash != 0 {
		a, err := ip.leafAt(uint64(ondisk.NameHash([]byte(name)) >> (32 - ip.Depth)))
		if err != nil {
			return 0, err
		}
		b = ip.im.blocks[a]
	}
	e, ok, err := ondisk.FindEntry(b, []byte(name))
	if err == nil && !ok {
		err = errors.New("no such entry")
	}
	if err != nil {
		return 0, fmt.Errorf("look up %s in directory %d: %w", name, ip.Num.Addr, err)
	}
	return e.Inum.Addr, nil
}
