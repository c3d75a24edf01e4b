// Package grow makes an unmounted filesystem larger and adds journals to it.
// Both are atomic: all that is new is written into space that nothing refers to
// yet, and one transaction of gfs/journal makes it part of the filesystem. A
// crash at any write leaves the old filesystem, or a committed journal whose
// replay gives the new one.
package grow

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Errors that callers branch on.
var (
	ErrNoRoom = errors.New("the device has no room for another resource group")
	ErrSpace  = errors.New("insufficient space on the device")
)

// Room is what Grow will take; sizes are in blocks.
type Room struct {
	BlockSize int
	FSBlocks  uint64 // end of the last resource group
	DevBlocks uint64
	RGs       []ondisk.Rindex // the new ones
	Added     uint64          // data blocks
}

// Plan looks how far the filesystem can grow. ErrNoRoom when it cannot.
func Plan(f *fs.FS, align mkfs.Align) (Room, error) {
	g := f.Geometry()
	p := Room{BlockSize: g.BlockSize, DevBlocks: f.Blocks()}
	rgs, err := f.RGs()
	if err != nil {
		return p, err
	}
	for _, r := range rgs {
		p.FSBlocks = max(p.FSBlocks, r.Data0+uint64(r.Data))
	}
	at := align.Addr(p.FSBlocks)
	// A resource group smaller than the least that mkfs makes is not worth it.
	if p.DevBlocks <= at || p.DevBlocks-at < uint64(ondisk.MinRGMB<<20)>>g.Shift {
		return p, ErrNoRoom
	}
	for _, n := range mkfs.PlanRGs(g, align, p.DevBlocks-at, uint64(mkfs.GrowRGMB)<<20>>g.Shift) {
		ri, err := mkfs.NewRindex(g, at, n)
		if err != nil {
			return p, err
		}
		p.RGs = append(p.RGs, ri)
		p.Added += uint64(ri.Data)
		at += n
	}
	if len(p.RGs) == 0 {
		return p, ErrNoRoom
	}
	return p, nil
}

// Grow adds the resource groups of p. All journals must be clean.
func Grow(dev journal.Device, f *fs.FS, p Room) error {
	if err := writeRGs(dev, f, p.RGs); err != nil {
		return err
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("flush new resource groups: %w", err)
	}
	left := p.RGs
	for len(left) > 0 {
		n, err := link(dev, f, left)
		if err != nil {
			return err
		}
		left = left[n:]
	}
	return nil
}

// writeRGs writes headers and empty bitmaps beyond the end of the filesystem.
func writeRGs(dev journal.Device, f *fs.FS, rgs []ondisk.Rindex) error {
	g := f.Geometry()
	for i, r := range rgs {
		b := make([]byte, int(r.Length)<<g.Shift)
		h := ondisk.Rgrp{MetaHeader: ondisk.Meta(ondisk.TypeRG), Free: r.Data, Data0: r.Data0, Data: r.Data, Bitbytes: r.Bitbytes}
		if i+1 < len(rgs) {
			h.Skip = uint32(rgs[i+1].Addr - r.Addr)
		}
		if err := h.Encode(b); err != nil {
			return err
		}
		ondisk.SealRgrp(b)
		for k := 1; k < int(r.Length); k++ {
			ondisk.PutMeta(b[k<<g.Shift:], ondisk.TypeRB)
		}
		if _, err := dev.WriteAt(b, int64(r.Addr<<g.Shift)); err != nil {
			return fmt.Errorf("write resource group at block %d: %w", r.Addr, err)
		}
	}
	return nil
}

// link puts as many of rgs as it can into the rindex file in one transaction
// and returns how many: all of them, unless the filesystem is full. Then those
// come first for which the file has room (mkfs leaves some), and their space
// serves the rest.
func link(dev journal.Device, f *fs.FS, rgs []ondisk.Rindex) (int, error) {
	for n := len(rgs); ; n = 1 {
		err := linkN(dev, f, rgs[:n], n == len(rgs) && n > 1)
		switch {
		case err == nil:
			f.Drop()
			return n, nil
		case n > 1 && errors.Is(err, fs.ErrNoSpace):
			continue
		}
		return 0, fmt.Errorf("extend rindex: %w", err)
	}
}

func linkN(dev journal.Device, f *fs.FS, rgs []ondisk.Rindex, spare bool) error {
	tx, err := f.Begin()
	if err != nil {
		return err
	}
	ip, err := tx.System("rindex")
	if err != nil {
		return err
	}
	// An interrupted gfs2_grow may have left a part of an entry.
	ip.Size -= ip.Size % ondisk.RindexSize
	size := ip.Size
	e := make([]byte, ondisk.RindexSize)
	for _, r := range rgs {
		if err := r.Encode(e); err != nil {
			return err
		}
		if _, err := ip.WriteAt(e, int64(ip.Size)); err != nil {
			return err
		}
		tx.TotalDelta += int64(r.Data)
		tx.FreeDelta += int64(r.Data)
		size += ondisk.RindexSize
	}
	if spare { // room for one more, as mkfs leaves it: a full filesystem can still grow
		clear(e)
		if _, err := ip.WriteAt(e, int64(ip.Size)); err != nil && !errors.Is(err, fs.ErrNoSpace) {
			return err
		}
		ip.Size = size
	}
	if err := ip.Put(); err != nil {
		return err
	}
	if err := setSkip(tx, rgs[0].Addr); err != nil {
		return err
	}
	if err := tx.AddStatfs(); err != nil {
		return err
	}
	return journal.Commit(dev, tx, 0)
}

// setSkip makes the last old resource group point to the first new one.
func setSkip(tx *fs.Tx, next uint64) error {
	rgs, err := tx.FS.RGs()
	if err != nil {
		return err
	}
	last := rgs[len(rgs)-1]
	return tx.EditRgrp(last.Addr, func(h *ondisk.Rgrp) { h.Skip = uint32(next - last.Addr) })
}

// JournalPlan is what AddJournals will do.
type JournalPlan struct {
	Old, New  int // journals before and after
	MB        int // of each new journal
	QuotaMB   int
	Need      uint64 // blocks
	Free      uint64
	BlockSize int
}

// PlanJournals looks whether n journals of mb megabytes fit. ErrSpace when they
// do not; the plan says what is missing.
func PlanJournals(f *fs.FS, n, mb, quotaMB int) (JournalPlan, error) {
	g := f.Geometry()
	p := JournalPlan{MB: mb, QuotaMB: quotaMB, BlockSize: g.BlockSize}
	var err error
	if p.Old, err = f.Journals(); err != nil {
		return p, err
	}
	p.New = p.Old + n
	tree := func(bytes uint64) uint64 {
		data := bytes >> g.Shift
		all := 1 + data
		for _, k := range g.TreeBlocks(data) {
			all += k
		}
		return all
	}
	// Two stuffed files, and what the two directories may need to grow.
	p.Need = uint64(n) * (tree(uint64(mb)<<20) + tree(uint64(quotaMB)<<20) + 2 + 16)
	tx, err := f.Begin()
	if err != nil {
		return p, err
	}
	if p.Free, err = tx.FreeBlocks(); err != nil {
		return p, err
	}
	if p.Free < p.Need {
		return p, ErrSpace
	}
	return p, nil
}

// AddJournals adds the journals of p. All old journals must be clean. now is in
// seconds since 1970. progress, if not nil, is told how many are written.
func AddJournals(dev journal.Device, f *fs.FS, p JournalPlan, now int64, progress func(done, total int)) error {
	tx, err := f.Begin()
	if err != nil {
		return err
	}
	b := &builder{tx: tx, dev: dev, now: now}
	jindex, err := tx.System("jindex")
	if err != nil {
		return err
	}
	perNode, err := tx.System("per_node")
	if err != nil {
		return err
	}
	for j := p.Old; j < p.New; j++ {
		if err := b.add(jindex, perNode, j, p, false); err != nil {
			return fmt.Errorf("add journal %d: %w", j, err)
		}
		if progress != nil {
			progress(j-p.Old+1, p.New-p.Old)
		}
	}
	if err := tx.AddStatfs(); err != nil {
		return err
	}
	return journal.Commit(dev, tx, 0)
}

type builder struct {
	tx  *fs.Tx
	dev journal.Device
	now int64
}

// add makes the four files of a journal. With missing, those that exist stay.
func (b *builder) add(jindex, perNode *fs.Inode, j int, p JournalPlan, missing bool) error {
	n := strconv.Itoa(j)
	create := func(dir *fs.Inode, name string, flags uint32) (*fs.Inode, error) {
		ip, err := b.create(dir, name+n, flags)
		if missing && errors.Is(err, fs.ErrExist) {
			return nil, nil
		}
		return ip, err
	}
	for _, s := range []struct {
		name string
		size uint64
	}{{"inum_range", ondisk.InumRangeSize}, {"statfs_change", ondisk.StatfsChangeSize}} {
		ip, err := create(perNode, s.name, ondisk.DISystem|ondisk.DIJdata)
		if err != nil {
			return err
		}
		if ip == nil {
			continue
		}
		ip.Size = s.size
		if err := ip.Put(); err != nil {
			return err
		}
	}
	quota, err := create(perNode, "quota_change", ondisk.DISystem)
	if err != nil {
		return err
	}
	if quota != nil {
		if err := b.fill(quota, uint64(p.QuotaMB)<<20, func(blk []byte, _ uint64, _ uint32) { ondisk.PutMeta(blk, ondisk.TypeQC) }); err != nil {
			return err
		}
	}
	jr, err := create(jindex, "journal", ondisk.DISystem)
	if err != nil || jr == nil {
		return err
	}
	return b.fill(jr, uint64(p.MB)<<20, func(blk []byte, addr uint64, i uint32) {
		journal.FormatBlock(blk, jr.Num.Addr, addr, i, uint64(i))
	})
}

func (b *builder) create(dir *fs.Inode, name string, flags uint32) (*fs.Inode, error) {
	switch _, err := dir.Lookup(name); {
	case err == nil:
		return nil, fmt.Errorf("create %s: %w", name, fs.ErrExist)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	addr, err := b.tx.Alloc(true)
	if err != nil {
		return nil, err
	}
	formal, err := b.tx.NextInum(1)
	if err != nil {
		return nil, err
	}
	ino := ondisk.Inum{Formal: formal, Addr: addr}
	ip, err := fs.NewInode(b.tx, ino, ondisk.ModeRegular|0o600, flags, ondisk.Inum{}, b.now)
	if err != nil {
		return nil, err
	}
	return ip, dir.AddEntry(name, ino, ondisk.DTRegular)
}

const writeBytes = 4 << 20

// fill gives an empty inode size bytes of adjacent blocks, as far as the free
// space allows, and writes format's content into them right away: nothing
// refers to them yet, and a journal may be larger than memory should hold.
func (b *builder) fill(ip *fs.Inode, size uint64, format func(blk []byte, addr uint64, i uint32)) error {
	g := b.tx.Geometry()
	blocks := size >> g.Shift
	// Pointer blocks first, level by level, like mkfs.
	levels := g.TreeBlocks(blocks)
	addrs := make([][]uint64, len(levels))
	for i, n := range levels {
		for range n {
			a, err := b.tx.Alloc(false)
			if err != nil {
				return err
			}
			nb, err := b.tx.NewBlock(a)
			if err != nil {
				return err
			}
			ondisk.PutMeta(nb, ondisk.TypeIN)
			addrs[i] = append(addrs[i], a)
			ip.GoalMeta = a
		}
		ip.Blocks += n
	}
	pointer := func(level int, i, to uint64) error { // pointer i of a level; level 0 is the dinode
		at, off := ip.Num.Addr, uint64(ondisk.DinodeSize)+8*i
		if level > 0 {
			at, off = addrs[level-1][i/uint64(g.InPtrs)], ondisk.MetaHeaderSize+8*(i%uint64(g.InPtrs))
		}
		p, err := b.tx.Dirty(at)
		if err != nil {
			return err
		}
		for k := range 8 {
			p[off+uint64(k)] = byte(to >> (56 - 8*k))
		}
		return nil
	}
	for lvl := range addrs {
		for i, a := range addrs[lvl] {
			if err := pointer(lvl, uint64(i), a); err != nil {
				return err
			}
		}
	}
	buf := make([]byte, writeBytes)
	for done := uint64(0); done < blocks; {
		first, n, err := b.tx.AllocExtent(blocks - done)
		if err != nil {
			return err
		}
		for k := uint64(0); k < n; {
			m := min(n-k, uint64(writeBytes)>>g.Shift)
			p := buf[:m<<g.Shift]
			clear(p)
			for x := range m {
				a := first + k + x
				format(p[x<<g.Shift:(x+1)<<g.Shift], a, uint32(done+k+x))
				if err := pointer(len(levels), done+k+x, a); err != nil {
					return err
				}
			}
			if _, err := b.dev.WriteAt(p, int64((first+k)<<g.Shift)); err != nil {
				return fmt.Errorf("write %d blocks at %d: %w", m, first+k, err)
			}
			k += m
		}
		done += n
		ip.GoalData = first + n - 1
	}
	ip.Height = uint16(len(levels) + 1)
	ip.Size = size
	ip.Blocks += blocks
	return ip.Put()
}

// Restore makes the missing ones of journal j's four system files anew, as fsck
// does after their loss. It returns the blocks and dinodes that it took. With logged, the
// change goes through the first clean journal; else blocks are written in an
// order that leaves the files unreferenced until the end.
func Restore(dev journal.Device, f *fs.FS, j, mb, quotaMB int, now int64, logged bool) (blocks, dinodes uint64, err error) {
	tx, err := f.Begin()
	if err != nil {
		return 0, 0, err
	}
	b := &builder{tx: tx, dev: dev, now: now}
	jindex, err := tx.System("jindex")
	if err != nil {
		return 0, 0, err
	}
	perNode, err := tx.System("per_node")
	if err != nil {
		return 0, 0, err
	}
	err = b.add(jindex, perNode, j, JournalPlan{MB: mb, QuotaMB: quotaMB}, true)
	if err != nil {
		return 0, 0, err
	}
	blocks, dinodes = uint64(-tx.FreeDelta), uint64(tx.DinodeDelta)
	if logged {
		total, err := f.Journals()
		if err != nil {
			return 0, 0, err
		}
		for i := range total {
			if i == j {
				continue
			}
			err := journal.Commit(dev, tx, i)
			if err == nil || !errors.Is(err, journal.ErrUnclean) && !errors.Is(err, journal.ErrNoHead) && !errors.Is(err, fs.ErrCorrupt) && !errors.Is(err, fs.ErrNotExist) {
				return blocks, dinodes, err
			}
		}
	}
	g := f.Geometry()
	for _, part := range [][]fs.Change{tx.Fresh(), tx.Changed()} {
		for _, c := range part {
			if _, err := dev.WriteAt(c.Data, int64(c.Addr<<g.Shift)); err != nil {
				return 0, 0, fmt.Errorf("write block %d: %w", c.Addr, err)
			}
		}
		if err := dev.Flush(); err != nil {
			return 0, 0, err
		}
	}
	f.Drop()
	return blocks, dinodes, nil
}
