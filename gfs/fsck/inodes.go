package fsck

import (
	"errors"
	"fmt"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// checkInodes goes through the bitmaps for dinodes and walks each.
func (c *checker) checkInodes() error {
	var bits []byte
	var where []uint64
	for i := range c.rgs {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		r := &c.rgs[i]
		need := int(r.Length) << c.g.Shift
		if cap(bits) < need {
			bits = make([]byte, need)
		}
		bits = bits[:need]
		if err := c.f.ReadBlocks(bits, r.Addr); err != nil {
			return err
		}
		if err := c.checkHeaders(i, bits); err != nil {
			return err
		}
		where = where[:0]
		zero := true
		for k := range int(r.Length) {
			off, n, first := c.g.BitmapSpan(k, r.Bitbytes)
			for j, x := range bits[k<<c.g.Shift+off : k<<c.g.Shift+off+n] {
				if x == 0 {
					continue
				}
				zero = false
				// The high bit of a pair is set for dinodes, linked or not.
				for s := range uint64(ondisk.NBBY) {
					if x>>(2*s)&2 != 0 {
						where = append(where, r.Data0+first+uint64(j)*ondisk.NBBY+s)
					}
				}
			}
		}
		c.clean[i] = zero && c.freeHeader(i, bits)
		if err := c.walkDinodes(where, bits, r); err != nil {
			return err
		}
		c.cfg.Progress("inodes", uint64(i+1), uint64(len(c.rgs)))
	}
	for _, a := range c.suspects {
		if c.blocks.get(a) != ondisk.Free {
			continue
		}
		b, err := c.block(a)
		if err != nil {
			return err
		}
		if err := c.aside(a, b); err != nil {
			return err
		}
	}
	// The two directories that everything hangs on, whatever the bitmap says.
	for _, d := range []struct {
		name string
		num  ondisk.Inum
	}{{"master", c.f.Super.Master}, {"root", c.f.Super.Root}} {
		if c.find(d.num.Addr) != nil {
			continue
		}
		ok, err := c.recover(d.num.Addr, d.num.Formal)
		if err != nil {
			return err
		}
		if !ok {
			c.hopeless("The %s directory (inode %d) cannot be read", d.name, d.num.Addr)
		}
	}
	return nil
}

// freeHeader tells whether a header says what an empty bitmap means.
func (c *checker) freeHeader(i int, bits []byte) bool {
	var h ondisk.Rgrp
	r := &c.rgs[i]
	return h.Decode(bits) == nil && h.Free == r.Data && h.Dinodes == 0 && h.Data0 == r.Data0 && h.Data == r.Data && h.Bitbytes == r.Bitbytes && ondisk.RgrpCRCOK(bits)
}

// checkHeaders repairs the meta headers of a resource group's blocks in bits and
// on disk. Counters are judged in the bitmaps pass.
func (c *checker) checkHeaders(i int, bits []byte) error {
	r := &c.rgs[i]
	for k := range int(r.Length) {
		b := bits[k<<c.g.Shift : (k+1)<<c.g.Shift]
		t := ondisk.TypeRB
		if k == 0 {
			t = ondisk.TypeRG
		}
		var mh ondisk.MetaHeader
		if err := mh.Decode(b); err != nil {
			return err
		}
		ok := ondisk.CheckMeta(b, t) == nil && mh.Format == t.Format()
		if ok && k == 0 {
			var h ondisk.Rgrp
			if err := h.Decode(b); err != nil {
				return err
			}
			// Old kernels left these four zero.
			ok = ondisk.RgrpCRCOK(b) && (h.Data0 == 0 || h.Data0 == r.Data0 && h.Data == r.Data && h.Bitbytes == r.Bitbytes)
		}
		if ok {
			continue
		}
		c.problem("Resource group %d: block %d (%s) is damaged", i, r.Addr+uint64(k), t)
		ondisk.PutMeta(b, t)
		if k == 0 {
			var h ondisk.Rgrp
			if err := h.Decode(b); err != nil {
				return err
			}
			h.Data0, h.Data, h.Bitbytes = r.Data0, r.Data, r.Bitbytes
			h.Skip = 0
			if i+1 < len(c.rgs) {
				h.Skip = uint32(c.rgs[i+1].Addr - r.Addr)
			}
			if err := h.Encode(b); err != nil {
				return err
			}
			ondisk.SealRgrp(b)
		}
		if err := c.put(r.Addr+uint64(k), b); err != nil {
			return err
		}
	}
	return nil
}

// walkDinodes reads the dinodes of one resource group, neighbours together.
func (c *checker) walkDinodes(where []uint64, bits []byte, r *ondisk.Rindex) error {
	const window = 128 // blocks; reading a few that are not needed costs less than a seek
	buf := make([]byte, 0)
	for i := 0; i < len(where); {
		k := i + 1
		for k < len(where) && where[k]-where[k-1] <= 8 && where[k]-where[i] < window {
			k++
		}
		n := where[k-1] - where[i] + 1
		if need := int(n << c.g.Shift); cap(buf) < need {
			buf = make([]byte, window<<c.g.Shift)
		}
		if err := c.f.ReadBlocks(buf[:n<<c.g.Shift], where[i]); err != nil {
			return err
		}
		for _, a := range where[i:k] {
			at := (a - where[i]) << c.g.Shift
			unlinked := c.g.GetState(bits, a-r.Data0) == ondisk.Unlinked
			if err := c.walkInode(a, buf[at:at+uint64(c.g.BlockSize)], unlinked, false); err != nil {
				return err
			}
		}
		i = k
	}
	return nil
}

// recover takes in a dinode that the bitmap does not show as one, if it is one
// and nobody else uses the block.
func (c *checker) recover(addr, formal uint64) (bool, error) {
	if !c.valid(addr) || c.blocks.get(addr) != ondisk.Free {
		return false, nil
	}
	b, err := c.block(addr)
	if err != nil {
		return false, err
	}
	var d ondisk.Dinode
	if ondisk.CheckMeta(b, ondisk.TypeDI) != nil || d.Decode(b) != nil || d.Num.Addr != addr || formal != 0 && d.Num.Formal != formal {
		return false, nil
	}
	return true, c.aside(addr, b)
}

// aside walks a dinode out of turn.
func (c *checker) aside(addr uint64, b []byte) error {
	n := len(c.inodes)
	if err := c.walkInode(addr, b, false, true); err != nil || len(c.inodes) == n {
		return err
	}
	ip := c.inodes[n] // the slice stays sorted: this one goes to the side
	c.inodes = c.inodes[:n]
	c.extra[addr] = &ip
	return nil
}

// walk is the state of one inode's walk.
type walk struct {
	ip     *fs.Inode
	n      uint64                    // blocks found, the dinode included
	di     []byte                    // the dinode's block
	change bool                      // di must be written
	visit  func(a uint64, meta bool) // called for every block
}

// walkInode judges the dinode in b and everything that it points to.
//
// Two kinds of block marked as dinodes are put off until all others are walked:
// one that carries another address (a copy in a journal, or a damaged one), and
// one without links that is not marked as unlinked (the rest of a deleted one,
// or a damaged count). They count only if nobody else has the block, and the
// latter only if it has a name. sure says that this is settled.
func (c *checker) walkInode(addr uint64, b []byte, unlinked, sure bool) error {
	if c.drop[addr] {
		return nil
	}
	ip := &fs.Inode{S: c.f}
	if err := ondisk.CheckMeta(b, ondisk.TypeDI); err != nil {
		c.problem("Block %d is marked as an inode and is none: %v", addr, err)
		return nil
	}
	if err := ip.Decode(b); err != nil {
		return err
	}
	if !sure && ip.Num.Addr != addr {
		c.suspects = append(c.suspects, addr)
		return nil
	}
	if !sure && !unlinked && ip.Nlink == 0 {
		return nil
	}
	w := &walk{ip: ip, n: 1, di: append([]byte(nil), b...)}
	if ip.Num.Addr != addr {
		c.problem("Inode %d says that it is inode %d", addr, ip.Num.Addr)
		ip.Num.Addr, w.change = addr, true
	}
	typ := ondisk.DirentType(ip.Mode)
	switch typ {
	case ondisk.DTFIFO, ondisk.DTChar, ondisk.DTDir, ondisk.DTBlock, ondisk.DTRegular, ondisk.DTSymlink, ondisk.DTSocket:
	default:
		c.problem("Inode %d has an impossible mode 0%o: it is removed", addr, ip.Mode)
		return nil
	}
	if ip.Format != ondisk.FormatDI {
		c.problem("Inode %d: header format %d", addr, ip.Format)
		ip.Format, w.change = ondisk.FormatDI, true
	}
	c.blocks.set(addr, ondisk.DinodeSt)
	c.res.Inodes++
	c.maxIno = max(c.maxIno, ip.Num.Formal)
	w.visit = func(a uint64, _ bool) {
		if c.blocks.get(a) != ondisk.Free {
			c.dups[a] = true
			return
		}
		c.blocks.set(a, ondisk.Used)
	}
	if err := c.walkAll(w); err != nil {
		return err
	}
	if w.n != ip.Blocks {
		c.problem("Inode %d has %d blocks and says %d", addr, w.n, ip.Blocks)
		ip.Blocks, w.change = w.n, true
	}
	if !c.valid(ip.GoalMeta) && ip.Flags&ondisk.DISystem == 0 {
		c.problem("Inode %d: allocation goal %d is outside the filesystem", addr, ip.GoalMeta)
		ip.GoalMeta, w.change = addr, true
	}
	if err := c.finish(w); err != nil {
		return err
	}
	c.inodes = append(c.inodes, inode{
		addr: addr, formal: ip.Num.Formal, nlink: ip.Nlink, typ: typ, unlinked: unlinked, dir: typ == ondisk.DTDir, system: ip.Flags&ondisk.DISystem != 0,
	})
	return nil
}

// finish writes the dinode if it was changed.
func (c *checker) finish(w *walk) error {
	if !w.change {
		return nil
	}
	if err := w.ip.Encode(w.di); err != nil {
		return err
	}
	return c.put(w.ip.Num.Addr, w.di)
}

// walkAll visits the tree, the leaves and the attributes of an inode and
// repairs what can be repaired in place.
func (c *checker) walkAll(w *walk) error {
	ip := w.ip
	if int(ip.Height) > ondisk.MaxHeight || ip.Height > uint16(c.g.HeightBlocks(1<<63)) {
		c.problem("Inode %d has a tree %d levels high: its content is dropped", ip.Num.Addr, ip.Height)
		clear(w.di[ondisk.DinodeSize:])
		ip.Height, ip.Size, w.change = 0, 0, true
	}
	if ip.Stuffed() && !ip.IsDir() && ip.Size > uint64(c.g.StuffedMax()) {
		c.problem("Inode %d holds %d bytes, says %d", ip.Num.Addr, c.g.StuffedMax(), ip.Size)
		ip.Size, w.change = uint64(c.g.StuffedMax()), true
	}
	if !ip.Stuffed() {
		changed, err := c.walkTree(w, w.di, 0)
		if err != nil {
			return err
		}
		w.change = w.change || changed
	}
	if ip.IsDir() {
		if err := c.walkDir(w); err != nil {
			return err
		}
	}
	if ip.Eattr != 0 {
		return c.walkEA(w)
	}
	return nil
}

// walkTree visits what the pointers in b point to. It clears impossible ones and
// tells whether it did.
func (c *checker) walkTree(w *walk, b []byte, lvl int) (bool, error) {
	off := ondisk.MetaHeaderSize
	if lvl == 0 {
		off = ondisk.DinodeSize
	}
	data := lvl+1 == int(w.ip.Height)
	changed := false
	for ; off+8 <= len(b); off += 8 {
		a := be.Uint64(b[off:])
		if a == 0 {
			continue
		}
		var kid []byte
		bad := ""
		switch {
		case !c.valid(a):
			bad = "is outside the filesystem"
		case a == w.ip.Num.Addr:
			bad = "is the inode itself"
		case !data || w.ip.IsDir():
			var err error
			if kid, err = c.block(a); err != nil {
				return changed, err
			}
			want := ondisk.TypeIN
			if data {
				want = ondisk.TypeJD
			}
			if err := ondisk.CheckMeta(kid, want); err != nil {
				bad = fmt.Sprintf("is no %s: %v", want, err)
			}
		}
		if bad != "" {
			c.problem("Inode %d: block %d %s: the pointer is cleared", w.ip.Num.Addr, a, bad)
			be.PutUint64(b[off:], 0)
			changed = true
			continue
		}
		w.n++
		w.visit(a, !data)
		if data {
			continue
		}
		sub, err := c.walkTree(w, kid, lvl+1)
		if err != nil {
			return changed, err
		}
		if sub {
			if err := c.put(a, kid); err != nil {
				return changed, err
			}
		}
	}
	return changed, nil
}

// walkEA visits the attribute blocks. Attributes that cannot be read are
// dropped as a whole: half of an ACL is worse than none.
func (c *checker) walkEA(w *walk) error {
	var list []uint64
	seen := map[uint64]bool{}
	// The values of the dinode in memory count, not those on disk.
	err := w.ip.EABlocks(func(a uint64, t ondisk.MetaType) error {
		if !c.valid(a) || seen[a] {
			return fmt.Errorf("%w: block %d", fs.ErrCorrupt, a)
		}
		seen[a] = true
		b, err := c.f.Block(a)
		if err != nil {
			return err
		}
		if err := ondisk.CheckMeta(b, t); err != nil {
			return fmt.Errorf("%w: block %d: %w", fs.ErrCorrupt, a, err)
		}
		list = append(list, a)
		return nil
	})
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrCorrupt), errors.Is(err, fs.ErrRange):
		c.problem("Inode %d: its extended attributes are damaged (%v) and removed", w.ip.Num.Addr, err)
		w.ip.Eattr, w.change = 0, true
		w.ip.Flags &^= ondisk.DIEAIndirect
		return nil
	default:
		return err
	}
	for _, a := range list {
		w.n++
		w.visit(a, true)
	}
	return nil
}

// walkDir judges the form of a directory: the hash table and its leaves, or the
// entries in the dinode. A damaged one is emptied here, its entries kept in
// memory, and filled again when the bitmaps are right.
func (c *checker) walkDir(w *walk) error {
	ip := w.ip
	if ip.Flags&ondisk.DIExhash == 0 {
		return c.walkLinear(w)
	}
	bad := ""
	var table []uint64
	switch {
	case ip.Depth == 0 || ip.Depth > ondisk.MaxDepth:
		bad = fmt.Sprintf("depth %d", ip.Depth)
	case ip.Size != 8<<ip.Depth:
		bad = fmt.Sprintf("depth %d and a table of %d bytes", ip.Depth, ip.Size)
	default:
		var err error
		// What walkTree cleared must be seen here.
		if w.change {
			if err := c.finish(w); err != nil {
				return err
			}
		}
		table, err = ip.HashTable()
		if err != nil {
			if !errors.Is(err, fs.ErrCorrupt) && !errors.Is(err, fs.ErrRange) {
				return err
			}
			bad = err.Error()
		}
	}
	type leaf struct {
		addr  uint64
		first int
		n     int
	}
	var leaves []leaf
	for i, a := range table {
		if k := len(leaves); k > 0 && leaves[k-1].addr == a {
			leaves[k-1].n++
			continue
		}
		leaves = append(leaves, leaf{a, i, 1})
	}
	seen := map[uint64]bool{}
	var entries []fs.Entry
	var chain []uint64
	count := uint32(0)
	for _, l := range leaves {
		for a, hop := l.addr, 0; a != 0 || hop == 0; hop++ {
			if !c.valid(a) || seen[a] {
				bad = fmt.Sprintf("pointer %d to leaf %d is impossible or comes twice", l.first, a)
				break
			}
			seen[a] = true
			b, err := c.block(a)
			if err != nil {
				return err
			}
			var lf ondisk.Leaf
			if err := ondisk.CheckMeta(b, ondisk.TypeLF); err != nil || lf.Decode(b) != nil {
				bad = fmt.Sprintf("block %d is no leaf: %v", a, err)
				break
			}
			chain = append(chain, a)
			if hop == 0 && (lf.Depth > ip.Depth || 1<<(ip.Depth-lf.Depth) != l.n || l.first%l.n != 0) {
				bad = fmt.Sprintf("leaf %d of depth %d has %d pointers from %d on in a table of depth %d", a, lf.Depth, l.n, l.first, ip.Depth)
			}
			n := uint16(0)
			err = ondisk.EachEntry(b, func(e *ondisk.Entry) bool {
				if e.Sentinel() {
					return true
				}
				n++
				if h := ondisk.NameHash(e.Name); h != e.Hash {
					bad = fmt.Sprintf("entry %q in leaf %d has hash %08X, not %08X", e.Name, a, e.Hash, h)
				} else if idx := int(uint64(h) >> (32 - ip.Depth)); idx < l.first || idx >= l.first+l.n {
					bad = fmt.Sprintf("entry %q is in the wrong leaf %d", e.Name, a)
				}
				entries = append(entries, fs.Entry{Name: string(e.Name), Inum: e.Inum, Type: e.Type})
				return true
			})
			if err != nil {
				bad = fmt.Sprintf("leaf %d: %v", a, err)
				break
			}
			count += uint32(n)
			if n != lf.Entries {
				c.problem("Directory %d: leaf %d has %d entries, says %d", ip.Num.Addr, a, n, lf.Entries)
				lf.Entries = n
				if err := lf.Encode(b); err != nil {
					return err
				}
				if err := c.put(a, b); err != nil {
					return err
				}
			}
			a = lf.Next
			if a == 0 {
				break
			}
		}
	}
	if bad != "" {
		c.problem("Directory %d: %s: it is rebuilt from its %d entries", ip.Num.Addr, bad, len(entries))
		return c.emptyDir(w, entries)
	}
	for _, a := range chain {
		w.n++
		w.visit(a, true)
	}
	if count != ip.Entries {
		c.problem("Directory %d has %d entries, says %d", ip.Num.Addr, count, ip.Entries)
		ip.Entries, w.change = count, true
	}
	return nil
}

func (c *checker) walkLinear(w *walk) error {
	ip := w.ip
	var entries []fs.Entry
	bad := ""
	if ip.Height != 0 {
		bad = fmt.Sprintf("height %d without a hash table", ip.Height)
	} else {
		err := ondisk.EachEntry(w.di, func(e *ondisk.Entry) bool {
			if e.Sentinel() {
				return true
			}
			if h := ondisk.NameHash(e.Name); h != e.Hash {
				bad = fmt.Sprintf("entry %q has hash %08X, not %08X", e.Name, e.Hash, h)
			}
			entries = append(entries, fs.Entry{Name: string(e.Name), Inum: e.Inum, Type: e.Type})
			return true
		})
		if err != nil {
			bad = err.Error()
		}
	}
	if bad != "" {
		c.problem("Directory %d: %s: it is rebuilt from its %d entries", ip.Num.Addr, bad, len(entries))
		return c.emptyDir(w, entries)
	}
	if n := uint32(len(entries)); n != ip.Entries {
		c.problem("Directory %d has %d entries, says %d", ip.Num.Addr, n, ip.Entries)
		ip.Entries, w.change = n, true
	}
	if ip.Size != uint64(c.g.StuffedMax()) {
		c.problem("Directory %d: size %d, not %d", ip.Num.Addr, ip.Size, c.g.StuffedMax())
		ip.Size, w.change = uint64(c.g.StuffedMax()), true
	}
	return nil
}

// emptyDir makes a directory an empty linear one and keeps its entries for
// later. Blocks visited so far stay marked until the bitmaps pass; they are
// unmarked here.
func (c *checker) emptyDir(w *walk, entries []fs.Entry) error {
	ip := w.ip
	if ip.Height > 0 {
		if _, err := c.walkTree(&walk{ip: ip, di: w.di, visit: func(a uint64, _ bool) {
			w.n--
			if c.blocks.get(a) == ondisk.Used && !c.dups[a] {
				c.blocks.set(a, ondisk.Free)
			}
		}}, w.di, 0); err != nil {
			return err
		}
	}
	parent := ip.Num
	var keep []fs.Entry
	for _, e := range entries {
		switch e.Name {
		case ".":
		case "..":
			parent = e.Inum
		default:
			keep = append(keep, e)
		}
	}
	c.salvage[ip.Num.Addr] = keep
	ip.Flags &^= ondisk.DIExhash
	ip.Height, ip.Depth, ip.Entries = 0, 0, 2
	ip.Size, ip.PayloadFormat = uint64(c.g.StuffedMax()), uint32(ondisk.FormatDE)
	w.change = true
	clear(w.di[ondisk.DinodeSize:])
	if err := ip.Encode(w.di); err != nil {
		return err
	}
	return ondisk.InitDir(w.di, ip.Num, parent)
}
