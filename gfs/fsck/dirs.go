package fsck

import (
	"errors"
	"fmt"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// checkDirs goes through the directories from master and root down and judges
// each entry; what is not reached that way is looked at last.
func (c *checker) checkDirs() error {
	done := map[uint64]bool{}
	var queue []uint64
	for _, top := range []uint64{c.f.Super.Master.Addr, c.f.Super.Root.Addr} {
		if ip := c.find(top); ip != nil && ip.dir {
			ip.parent = top
			queue = append(queue, top)
		}
	}
	run := func() error {
		for n := 0; len(queue) > 0; n++ {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			addr := queue[0]
			queue = queue[1:]
			if done[addr] {
				continue
			}
			done[addr] = true
			sub, err := c.checkDir(addr)
			if err != nil {
				return err
			}
			queue = append(queue, sub...)
			c.cfg.Progress("directories", uint64(len(done)), uint64(len(done)+len(queue)))
		}
		return nil
	}
	if err := run(); err != nil {
		return err
	}
	// Directories that nothing leads to: the highest of each lost tree has no
	// entry anywhere, so entries of all of them are judged before it is known
	// which those are.
	if err := c.each(func(ip *inode) error {
		if ip.dir && !done[ip.addr] && !ip.unlinked {
			queue = append(queue, ip.addr)
		}
		return nil
	}); err != nil {
		return err
	}
	return run()
}

// checkDir judges the entries of one directory and returns its sub-directories.
func (c *checker) checkDir(addr uint64) ([]uint64, error) {
	if keep, ok := c.salvage[addr]; ok {
		return c.checkSalvaged(addr, keep)
	}
	d, err := fs.ReadInode(c.f, addr)
	if err != nil {
		return nil, err
	}
	self := c.find(addr)
	var sub []uint64
	var bad []string
	dot, dotdot := false, false
	names := map[string]bool{}
	err = d.EachEntry(func(e fs.Entry) error {
		switch e.Name {
		case ".":
			dot = true
			if e.Inum != d.Num {
				c.problem("Directory %d: \".\" points to inode %d", addr, e.Inum.Addr)
				bad = append(bad, e.Name)
				dot = false
				return nil
			}
			self.found++
			return nil
		case "..":
			dotdot = true
			return nil // judged when the parent is known
		}
		if names[e.Name] {
			c.problem("Directory %d: entry %q comes twice", addr, e.Name)
			bad = append(bad, e.Name)
			return nil
		}
		names[e.Name] = true
		ip, ok, err := c.judge(addr, e)
		if err != nil {
			return err
		}
		if !ok {
			bad = append(bad, e.Name)
			return nil
		}
		if ip.dir {
			sub = append(sub, ip.addr)
		}
		return nil
	})
	if err != nil {
		if errors.Is(err, fs.ErrCorrupt) {
			return sub, fmt.Errorf("directory %d was judged and is unreadable: %w", addr, err)
		}
		return sub, err
	}
	if len(bad) > 0 || !dot || !dotdot {
		if err := c.fixDir(d, bad, dot, dotdot); err != nil {
			return sub, err
		}
		if !dot {
			self.found++
		}
	}
	return sub, c.checkParent(addr)
}

// judge tells whether an entry points to an inode that it may point to, and
// counts the link.
func (c *checker) judge(dir uint64, e fs.Entry) (*inode, bool, error) {
	ip := c.find(e.Inum.Addr)
	if ip == nil {
		ok, err := c.recover(e.Inum.Addr, e.Inum.Formal)
		if err != nil {
			return nil, false, err
		}
		if !ok {
			c.problem("Directory %d: entry %q points to block %d, which is no inode: it is removed", dir, e.Name, e.Inum.Addr)
			return nil, false, nil
		}
		if ip = c.find(e.Inum.Addr); ip == nil {
			return nil, false, nil // its mode was impossible: said
		}
		c.problem("Inode %d is not marked as one in the bitmap, or says that it has no links", e.Inum.Addr)
	}
	if ip.formal == 0 && e.Inum.Formal != 0 {
		c.problem("Inode %d has no formal number: it gets that of its entry %q", ip.addr, e.Name)
		if err := c.setFormal(ip, e.Inum.Formal); err != nil {
			return nil, false, err
		}
	}
	switch {
	case ip.formal != e.Inum.Formal:
		c.problem("Directory %d: entry %q is for inode %d/%d, there is %d now: it is removed", dir, e.Name, e.Inum.Formal, e.Inum.Addr, ip.formal)
		return nil, false, nil
	case ip.dir && ip.parent != 0:
		c.problem("Directory %d: entry %q is a second link to directory %d: it is removed", dir, e.Name, ip.addr)
		return nil, false, nil
	case ip.typ != e.Type:
		c.problem("Directory %d: entry %q has type %d, inode %d is of type %d: it is removed", dir, e.Name, e.Type, ip.addr, ip.typ)
		return nil, false, nil
	}
	ip.found++
	if ip.unlinked {
		c.problem("Inode %d is marked as unlinked and has the name %q in directory %d", ip.addr, e.Name, dir)
		ip.unlinked = false
	}
	if ip.dir {
		ip.parent = dir
	}
	return ip, true, nil
}

func (c *checker) setFormal(ip *inode, n uint64) error {
	b, err := c.block(ip.addr)
	if err != nil {
		return err
	}
	var d ondisk.Dinode
	if err := d.Decode(b); err != nil {
		return err
	}
	d.Num.Formal, ip.formal = n, n
	if err := d.Encode(b); err != nil {
		return err
	}
	return c.put(ip.addr, b)
}

// checkParent compares ".." with where the directory was found, and counts it
// for the parent. A directory without a parent is dealt with in the repair pass.
func (c *checker) checkParent(addr uint64) error {
	self := c.find(addr)
	if self.parent == 0 {
		return nil
	}
	if p := c.find(self.parent); p != nil {
		p.found++
	}
	d, err := fs.ReadInode(c.f, addr)
	if err != nil {
		return err
	}
	e, err := d.Lookup("..")
	if err != nil {
		return err
	}
	want := c.inum(self.parent)
	if e.Inum == want {
		return nil
	}
	c.problem("Directory %d: \"..\" points to inode %d, the parent is %d", addr, e.Inum.Addr, self.parent)
	return c.setEntry(d, "..", want)
}

func (c *checker) inum(addr uint64) ondisk.Inum {
	if ip := c.find(addr); ip != nil {
		return ondisk.Inum{Formal: ip.formal, Addr: addr}
	}
	return ondisk.Inum{Addr: addr}
}

// editor is a fs.Store that writes through: for changes that need no blocks.
type editor struct {
	*fs.FS
	c     *checker
	dirty map[uint64][]byte
}

func (c *checker) editor() *editor { return &editor{c.f, c, map[uint64][]byte{}} }

func (e *editor) Block(a uint64) ([]byte, error) {
	if b := e.dirty[a]; b != nil {
		return b, nil
	}
	return e.FS.Block(a)
}

func (e *editor) Dirty(a uint64) ([]byte, error) {
	if b := e.dirty[a]; b != nil {
		return b, nil
	}
	b, err := e.c.block(a)
	if err == nil {
		e.dirty[a] = b
	}
	return b, err
}

func (e *editor) flush() error {
	for a, b := range e.dirty {
		if err := e.c.put(a, b); err != nil {
			return err
		}
	}
	clear(e.dirty)
	return nil
}

// setEntry replaces the inode of an entry in place.
func (c *checker) setEntry(d *fs.Inode, name string, to ondisk.Inum) error {
	blocks := []uint64{d.Num.Addr}
	if d.Exhash() {
		blocks = blocks[:0]
		if err := d.EachLeaf(func(a uint64, _ []byte, _ *ondisk.Leaf) error { blocks = append(blocks, a); return nil }); err != nil {
			return err
		}
	}
	for _, a := range blocks {
		b, err := c.block(a)
		if err != nil {
			return err
		}
		e, ok, err := ondisk.FindEntry(b, []byte(name))
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if err := to.Encode(b[e.Off:]); err != nil {
			return err
		}
		return c.put(a, b)
	}
	return fmt.Errorf("directory %d: %q: %w", d.Num.Addr, name, fs.ErrNotExist)
}

// fixDir removes entries and puts "." and ".." back. What needs space that the
// directory does not have is done in the repair pass.
func (c *checker) fixDir(d *fs.Inode, bad []string, dot, dotdot bool) error {
	ed := c.editor()
	ip, err := fs.ReadInode(ed, d.Num.Addr)
	if err != nil {
		return err
	}
	for _, name := range bad {
		if err := ip.RemoveEntry(name); err != nil {
			return err
		}
	}
	if err := ed.flush(); err != nil {
		return err
	}
	for _, x := range []struct {
		have bool
		name string
	}{{dot, "."}, {dotdot, ".."}} {
		if x.have {
			continue
		}
		c.problem("Directory %d has no %q", d.Num.Addr, x.name)
		err := ip.AddEntry(x.name, ip.Num, ondisk.DTDir)
		if errors.Is(err, fs.ErrReadOnly) {
			// Full: it is emptied and filled again.
			return c.rebuildLater(d.Num.Addr)
		}
		if err != nil {
			return err
		}
	}
	return ed.flush()
}

// rebuildLater empties a directory and keeps its entries for the repair pass.
// Links to them have been counted.
func (c *checker) rebuildLater(addr uint64) error {
	b, err := c.block(addr)
	if err != nil {
		return err
	}
	ip := &fs.Inode{S: c.f}
	if err := ip.Decode(b); err != nil {
		return err
	}
	var keep []fs.Entry
	if err := ip.EachEntry(func(e fs.Entry) error { keep = append(keep, e); return nil }); err != nil {
		return err
	}
	if ip.Exhash() {
		if err := ip.EachLeaf(func(a uint64, _ []byte, _ *ondisk.Leaf) error { c.blocks.set(a, ondisk.Free); return nil }); err != nil {
			return err
		}
	}
	w := &walk{ip: ip, di: b, n: 1, visit: func(uint64, bool) {}}
	if err := c.emptyDir(w, keep); err != nil {
		return err
	}
	if err := c.finish(w); err != nil {
		return err
	}
	return c.recount(addr)
}

// checkSalvaged judges the entries kept of a damaged directory.
func (c *checker) checkSalvaged(addr uint64, keep []fs.Entry) ([]uint64, error) {
	self := c.find(addr)
	self.found++ // its new "."
	var sub []uint64
	var good []fs.Entry
	names := map[string]bool{}
	for _, e := range keep {
		if names[e.Name] {
			continue
		}
		ip, ok, err := c.judge(addr, e)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		names[e.Name] = true
		good = append(good, e)
		if ip.dir {
			sub = append(sub, ip.addr)
		}
	}
	c.salvage[addr] = good
	return sub, c.checkParent(addr)
}
