package fsck

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// repair does what needs free blocks, now that the bitmaps can be trusted.
func (c *checker) repair() error {
	if err := c.mendJournals(); err != nil {
		return err
	}
	if err := c.rebuildJournals(); err != nil {
		return err
	}
	if err := c.checkInum(); err != nil {
		return err
	}
	if err := c.cloneBlocks(); err != nil {
		return err
	}
	for addr, entries := range c.salvage {
		if err := c.refill(addr, entries); err != nil {
			return err
		}
	}
	return c.lostFound()
}

// mendJournals fills holes that the passes before have torn into journals whose
// pointers were wrong. The journals are clean: what was in them is in place.
func (c *checker) mendJournals() error {
	for i := range c.journals {
		if c.missing[i] {
			continue
		}
		if _, err := journal.Open(c.f, i); err == nil {
			continue
		} else if !errors.Is(err, fs.ErrCorrupt) {
			return err
		}
		c.problem("Journal %d has holes: they are filled", i)
		tx, err := c.f.Begin()
		if err != nil {
			return err
		}
		ip, err := tx.System("jindex", "journal"+strconv.Itoa(i))
		if err != nil {
			return err
		}
		// A copy of another file's block is of no use in a journal.
		c.clones = slices.DeleteFunc(c.clones, func(cl clone) bool { return cl.owner == ip.Num.Addr })
		for b := range ip.Size >> c.g.Shift {
			if a, err := ip.Map(b); err != nil || a != 0 {
				if err != nil {
					return err
				}
				continue
			}
			a, err := ip.MapNew(b)
			if err != nil {
				return err
			}
			p, err := tx.Dirty(a)
			if err != nil {
				return err
			}
			journal.FormatBlock(p, ip.Num.Addr, a, uint32(b), 0)
		}
		if err := ip.Put(); err != nil {
			return err
		}
		c.res.Free += uint64(tx.FreeDelta)
		for _, ch := range append(tx.Fresh(), tx.Changed()...) {
			if err := c.put(ch.Addr, ch.Data); err != nil {
				return err
			}
		}
		// fsck.gfs2 and older kernels look for the head by bisection: the sequence
		// has to rise from block to block, also where the new blocks are.
		j, err := journal.Open(c.f, i)
		if err != nil {
			return err
		}
		if err := j.Reset(c.dev); err != nil {
			return err
		}
		c.f.Drop()
	}
	return nil
}

// batch is how many changes go into one transaction: a journal of 8 MB with
// 512 byte blocks holds them all.
const batch = 200

// refill puts the entries of a rebuilt directory back.
func (c *checker) refill(addr uint64, entries []fs.Entry) error {
	for len(entries) > 0 {
		tx, err := c.f.Begin()
		if err != nil {
			return err
		}
		d, err := fs.ReadInode(tx, addr)
		if err != nil {
			return err
		}
		k := min(batch, len(entries))
		for _, e := range entries[:k] {
			if err := d.AddEntry(e.Name, e.Inum, e.Type); err != nil {
				if !errors.Is(err, fs.ErrNoSpace) {
					return err
				}
				c.hopeless("No space to rebuild directory %d: its entries go to lost+found", addr)
				return nil
			}
		}
		if err := c.commit(tx); err != nil {
			return err
		}
		entries = entries[k:]
	}
	return nil
}

// cloneBlocks gives files that shared a block a copy.
func (c *checker) cloneBlocks() error {
	for _, cl := range c.clones {
		tx, err := c.f.Begin()
		if err != nil {
			return err
		}
		a, err := tx.Alloc(false)
		if errors.Is(err, fs.ErrNoSpace) {
			c.hopeless("No space to copy block %d for inode %d: it has a hole there", cl.src, cl.owner)
			continue
		}
		if err != nil {
			return err
		}
		src, err := c.block(cl.src)
		if err != nil {
			return err
		}
		dst, err := tx.NewBlock(a)
		if err != nil {
			return err
		}
		copy(dst, src)
		p, err := tx.Dirty(cl.parent)
		if err != nil {
			return err
		}
		be.PutUint64(p[cl.off:], a)
		di, err := tx.Dirty(cl.owner)
		if err != nil {
			return err
		}
		be.PutUint64(di[64:], be.Uint64(di[64:])+1) // di_blocks
		if err := c.commit(tx); err != nil {
			return err
		}
	}
	return nil
}

// checkInum wants the counter of formal inode numbers to be there. Its value is
// not judged: the kernel (6.1) numbers inodes by the generation of
// their resource group instead, so numbers above it are common, and so are equal
// ones.
func (c *checker) checkInum() error {
	ip, err := c.f.System("inum")
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrCorrupt):
		c.hopeless("The inum file cannot be read: %v", err)
		return nil
	case err != nil:
		return err
	case ip.Stuffed() && ip.Size >= 8:
		return nil
	}
	b, err := c.block(ip.Num.Addr)
	if err != nil {
		return err
	}
	c.problem("The inum file has %d bytes, not 8", ip.Size)
	ip.Size, ip.Height = 8, 0
	if err := ip.Encode(b); err != nil {
		return err
	}
	clear(b[ondisk.DinodeSize:])
	be.PutUint64(b[ondisk.DinodeSize:], c.maxIno+ondisk.InumQuantum)
	return c.put(ip.Num.Addr, b)
}

// lostFound gives every inode without a name one.
func (c *checker) lostFound() error {
	var lost []*inode
	top := map[uint64]bool{c.f.Super.Master.Addr: true, c.f.Super.Root.Addr: true}
	if err := c.each(func(ip *inode) error {
		switch {
		case top[ip.addr] || ip.unlinked:
		case ip.dir && ip.parent == 0, !ip.dir && ip.found == 0:
			lost = append(lost, ip)
		}
		return nil
	}); err != nil {
		return err
	}
	if len(lost) == 0 {
		return nil
	}
	root := c.find(c.f.Super.Root.Addr)
	if root == nil {
		c.hopeless("%d inodes have no name, and there is no root directory for lost+found", len(lost))
		return nil
	}
	lf, err := c.openLostFound(root)
	if err != nil {
		return err
	}
	if lf == nil {
		c.hopeless("No space for lost+found: %d inodes stay without a name", len(lost))
		return nil
	}
	for len(lost) > 0 {
		tx, err := c.f.Begin()
		if err != nil {
			return err
		}
		d, err := fs.ReadInode(tx, lf.addr)
		if err != nil {
			return err
		}
		k := min(batch, len(lost))
		for _, ip := range lost[:k] {
			if ip.formal == 0 {
				c.maxIno++
				if err := c.setFormal(ip, c.maxIno); err != nil {
					return err
				}
			}
			name := fmt.Sprintf("lost_%s_%d", kindName(ip), ip.addr)
			if _, err := d.Lookup(name); err == nil {
				name += fmt.Sprintf("_%d", ip.formal)
			}
			c.problem("Inode %d has no name: it is now lost+found/%s", ip.addr, name)
			if err := d.AddEntry(name, ondisk.Inum{Formal: ip.formal, Addr: ip.addr}, ip.typ); err != nil {
				return err
			}
			ip.found++
			if ip.dir {
				ip.parent = lf.addr
				lf.found++
			}
		}
		if err := c.commit(tx); err != nil {
			return err
		}
		for _, ip := range lost[:k] {
			if !ip.dir {
				continue
			}
			d, err := fs.ReadInode(c.f, ip.addr)
			if err != nil {
				return err
			}
			if err := c.setEntry(d, "..", c.inum(lf.addr)); err != nil {
				return err
			}
		}
		lost = lost[k:]
	}
	return nil
}

func kindName(ip *inode) string {
	if ip.dir {
		return "dir"
	}
	return "file"
}

// openLostFound finds or makes lost+found in the root directory; nil when there
// is no space.
func (c *checker) openLostFound(root *inode) (*inode, error) {
	d, err := fs.ReadInode(c.f, root.addr)
	if err != nil {
		return nil, err
	}
	e, err := d.Lookup("lost+found")
	if err == nil {
		if ip := c.find(e.Inum.Addr); ip != nil && ip.dir {
			return ip, nil
		}
		return nil, fmt.Errorf("lost+found is no directory")
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	tx, err := c.f.Begin()
	if err != nil {
		return nil, err
	}
	addr, err := tx.Alloc(true)
	if errors.Is(err, fs.ErrNoSpace) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	formal, err := tx.NextInum(1)
	if err != nil {
		return nil, err
	}
	num := ondisk.Inum{Formal: formal, Addr: addr}
	rd, err := fs.ReadInode(tx, root.addr)
	if err != nil {
		return nil, err
	}
	if _, err := fs.NewInode(tx, num, ondisk.ModeDir|0o700, 0, rd.Num, c.cfg.Now); err != nil {
		return nil, err
	}
	if err := rd.AddEntry("lost+found", num, ondisk.DTDir); err != nil {
		return nil, err
	}
	if err := c.commit(tx); err != nil {
		return nil, err
	}
	root.found++
	ip := &inode{addr: addr, formal: formal, parent: root.addr, nlink: 2, found: 2, typ: ondisk.DTDir, dir: true}
	c.extra[addr] = ip
	return ip, nil
}

// checkLinks compares link counts with the names found.
func (c *checker) checkLinks() error {
	return c.each(func(ip *inode) error {
		if ip.unlinked || ip.nlink == ip.found || ip.found == 0 {
			return nil
		}
		// Directories that were made in the repair pass carry the right count
		// already but for children added since.
		b, err := c.block(ip.addr)
		if err != nil {
			return err
		}
		var d ondisk.Dinode
		if err := d.Decode(b); err != nil {
			return err
		}
		if d.Nlink == ip.found {
			return nil
		}
		c.problem("Inode %d has %d links, says %d", ip.addr, ip.found, d.Nlink)
		d.Nlink = ip.found
		if err := d.Encode(b); err != nil {
			return err
		}
		return c.put(ip.addr, b)
	})
}
