package fsck

import (
	"fmt"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// ref is one pointer to a block that has several.
type ref struct {
	owner  uint64 // inode
	parent uint64 // block that holds the pointer; 0 = found through a leaf or EA
	off    int
	meta   bool
}

// clone is a data block that gets a copy of its own once the bitmaps are right.
type clone struct {
	ref
	src uint64
}

// checkDups gives every block that was claimed twice to one owner: a dinode to
// itself, else metadata before data, else the first claim. The others get a
// copy if it is file data, and lose the reference if it is not.
func (c *checker) checkDups() error {
	if len(c.dups) == 0 {
		return nil
	}
	refs := map[uint64][]ref{}
	owners := map[uint64]bool{}
	err := c.each(func(ip *inode) error {
		return c.refs(ip.addr, func(a uint64, r ref) {
			if c.dups[a] {
				refs[a] = append(refs[a], r)
				owners[ip.addr] = true
			}
		})
	})
	if err != nil {
		return err
	}
	for a := range c.dups {
		list := refs[a]
		keep := -1
		if c.find(a) == nil {
			for i, r := range list {
				if keep < 0 || r.meta && !list[keep].meta {
					keep = i
				}
			}
		}
		for i, r := range list {
			if i == keep {
				continue
			}
			if err := c.dropRef(a, r, keep >= 0); err != nil {
				return err
			}
		}
		if keep >= 0 {
			c.blocks.set(a, ondisk.Used)
		}
	}
	c.dups = map[uint64]bool{}
	// The owners' counts.
	for addr := range owners {
		if err := c.recount(addr); err != nil {
			return err
		}
	}
	return nil
}

// dropRef takes a reference away; clonable says that the block's content may be
// copied for it.
func (c *checker) dropRef(a uint64, r ref, clonable bool) error {
	if r.parent != 0 && !r.meta && clonable {
		c.problem("Block %d belongs to several files: inode %d gets a copy", a, r.owner)
		c.clones = append(c.clones, clone{r, a})
	} else {
		c.problem("Block %d belongs to several inodes: inode %d loses it", a, r.owner)
	}
	if r.parent == 0 {
		// A leaf or an attribute block: the structure above is rebuilt or dropped.
		return c.dropPart(r.owner, a)
	}
	b, err := c.block(r.parent)
	if err != nil {
		return err
	}
	be.PutUint64(b[r.off:], 0)
	return c.put(r.parent, b)
}

// dropPart removes what a leaf or an EA block was part of.
func (c *checker) dropPart(owner, a uint64) error {
	b, err := c.block(owner)
	if err != nil {
		return err
	}
	ip := &fs.Inode{S: c.f}
	if err := ip.Decode(b); err != nil {
		return err
	}
	w := &walk{ip: ip, di: b, n: 1, visit: func(uint64, bool) {}}
	isEA := false
	if ip.Eattr != 0 {
		_ = ip.EABlocks(func(x uint64, _ ondisk.MetaType) error { // readable: it was walked
			if x == a {
				isEA = true
			}
			return nil
		})
	}
	free := func(x uint64) {
		if c.blocks.get(x) == ondisk.Used && !c.dups[x] {
			c.blocks.set(x, ondisk.Free)
		}
	}
	if isEA {
		if err := ip.EABlocks(func(x uint64, _ ondisk.MetaType) error { free(x); return nil }); err != nil {
			return err
		}
		ip.Eattr = 0
		ip.Flags &^= ondisk.DIEAIndirect
		w.change = true
		return c.finish(w)
	}
	if !ip.Exhash() {
		return nil // rebuilt already
	}
	var entries []fs.Entry
	if err := ip.EachLeaf(func(x uint64, blk []byte, _ *ondisk.Leaf) error {
		free(x)
		if x == a {
			return nil
		}
		return ondisk.EachEntry(blk, func(e *ondisk.Entry) bool {
			if !e.Sentinel() {
				entries = append(entries, fs.Entry{Name: string(e.Name), Inum: e.Inum, Type: e.Type})
			}
			return true
		})
	}); err != nil {
		return fmt.Errorf("directory %d: %w", owner, err)
	}
	c.problem("Directory %d is rebuilt from its %d entries", owner, len(entries))
	if err := c.emptyDir(w, entries); err != nil {
		return err
	}
	return c.finish(w)
}

// refs calls f for every reference of an inode.
func (c *checker) refs(addr uint64, f func(a uint64, r ref)) error {
	b, err := c.block(addr)
	if err != nil {
		return err
	}
	ip := &fs.Inode{S: c.f}
	if err := ip.Decode(b); err != nil {
		return err
	}
	var tree func(at uint64, b []byte, lvl int) error
	tree = func(at uint64, b []byte, lvl int) error {
		off := ondisk.MetaHeaderSize
		if lvl == 0 {
			off = ondisk.DinodeSize
		}
		data := lvl+1 == int(ip.Height)
		for ; off+8 <= len(b); off += 8 {
			a := be.Uint64(b[off:])
			if a == 0 || !c.valid(a) {
				continue
			}
			f(a, ref{addr, at, off, !data || ip.IsDir()})
			if data {
				continue
			}
			kid, err := c.block(a)
			if err != nil {
				return err
			}
			if ondisk.CheckMeta(kid, ondisk.TypeIN) != nil {
				continue
			}
			if err := tree(a, kid, lvl+1); err != nil {
				return err
			}
		}
		return nil
	}
	if ip.Height > 0 {
		if err := tree(addr, b, 0); err != nil {
			return err
		}
	}
	if ip.Exhash() {
		if err := ip.EachLeaf(func(a uint64, _ []byte, _ *ondisk.Leaf) error {
			f(a, ref{owner: addr, meta: true})
			return nil
		}); err != nil {
			return err
		}
	}
	return ip.EABlocks(func(a uint64, _ ondisk.MetaType) error {
		f(a, ref{owner: addr, meta: true})
		return nil
	})
}

// recount sets di_blocks of an inode to what its references add up to.
func (c *checker) recount(addr uint64) error {
	n := uint64(1)
	if err := c.refs(addr, func(uint64, ref) { n++ }); err != nil {
		return err
	}
	b, err := c.block(addr)
	if err != nil {
		return err
	}
	var d ondisk.Dinode
	if err := d.Decode(b); err != nil {
		return err
	}
	if d.Blocks == n {
		return nil
	}
	d.Blocks = n
	if err := d.Encode(b); err != nil {
		return err
	}
	return c.put(addr, b)
}
