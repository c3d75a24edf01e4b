package fs

import (
	"errors"
	"fmt"
	"slices"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Tx gathers changes of an FS in memory. It is a Store: reads see the changes.
// Nothing is written until the caller does so, with the blocks of Fresh and
// Changed (gfs/journal.Commit does it atomically).
type Tx struct {
	FS    *FS
	dirty map[uint64][]byte
	fresh map[uint64]bool // allocated in this Tx: nobody refers to them on disk
	rgs   []ondisk.Rindex
	used  map[int]*rgState
	next  int // first resource group worth looking at

	// What the allocations add up to; the caller puts it into statfs.
	FreeDelta, DinodeDelta, TotalDelta int64
}

type rgState struct {
	bits []byte // all header blocks
	hdr  ondisk.Rgrp
	hint uint64
}

// Begin starts gathering changes.
func (f *FS) Begin() (*Tx, error) {
	rgs, err := f.RGs()
	if err != nil {
		return nil, err
	}
	return &Tx{FS: f, dirty: map[uint64][]byte{}, fresh: map[uint64]bool{}, used: map[int]*rgState{}, rgs: slices.Clone(rgs)}, nil
}

// Geometry implements Store.
func (t *Tx) Geometry() ondisk.Geometry { return t.FS.geom }

// Block implements Store.
func (t *Tx) Block(addr uint64) ([]byte, error) {
	if b := t.dirty[addr]; b != nil {
		return b, nil
	}
	return t.FS.Block(addr)
}

// Dirty implements Store.
func (t *Tx) Dirty(addr uint64) ([]byte, error) {
	if b := t.dirty[addr]; b != nil {
		return b, nil
	}
	b, err := t.FS.Block(addr)
	if err != nil {
		return nil, err
	}
	b = slices.Clone(b)
	t.dirty[addr] = b
	return b, nil
}

// NewBlock implements Store.
func (t *Tx) NewBlock(addr uint64) ([]byte, error) {
	b := make([]byte, t.FS.geom.BlockSize)
	t.dirty[addr] = b
	return b, nil
}

func (t *Tx) rg(i int) (*rgState, error) {
	if st := t.used[i]; st != nil {
		return st, nil
	}
	r := &t.rgs[i]
	st := &rgState{bits: make([]byte, int(r.Length)<<t.FS.geom.Shift)}
	if err := t.FS.ReadBlocks(st.bits, r.Addr); err != nil {
		return nil, err
	}
	if err := ondisk.CheckMeta(st.bits, ondisk.TypeRG); err != nil {
		return nil, fmt.Errorf("resource group at block %d: %w: %w", r.Addr, ErrCorrupt, err)
	}
	if err := st.hdr.Decode(st.bits); err != nil {
		return nil, err
	}
	t.used[i] = st
	return st, nil
}

// setState changes the bitmap, and the counters of header and transaction.
func (t *Tx) setState(i int, st *rgState, n uint64, to ondisk.BlockState) error {
	g := t.FS.geom
	from := g.GetState(st.bits, n)
	g.SetState(st.bits, n, to)
	count := func(s ondisk.BlockState, d int64) {
		switch s {
		case ondisk.Free:
			st.hdr.Free += uint32(d)
			t.FreeDelta += d
		case ondisk.DinodeSt:
			st.hdr.Dinodes += uint32(d)
			t.DinodeDelta += d
		}
	}
	count(from, -1)
	count(to, 1)
	if err := st.hdr.Encode(st.bits); err != nil {
		return err
	}
	ondisk.SealRgrp(st.bits)
	blk, _, _ := g.BitmapOffset(n)
	for _, k := range []int{0, blk} {
		t.dirty[t.rgs[i].Addr+uint64(k)] = st.bits[k<<g.Shift : (k+1)<<g.Shift]
	}
	return nil
}

// Alloc implements Store: the first free block of the filesystem.
func (t *Tx) Alloc(dinode bool) (uint64, error) {
	to := ondisk.Used
	if dinode {
		to = ondisk.DinodeSt
	}
	for ; t.next < len(t.rgs); t.next++ {
		st, err := t.rg(t.next)
		if err != nil {
			return 0, err
		}
		r := &t.rgs[t.next]
		if st.hdr.Free == 0 || st.hdr.Flags&ondisk.RGNoAlloc != 0 {
			continue
		}
		for n := st.hint; n < uint64(r.Data); n++ {
			if t.FS.geom.GetState(st.bits, n) != ondisk.Free {
				continue
			}
			st.hint = n + 1
			a := r.Data0 + n
			t.fresh[a] = true
			return a, t.setState(t.next, st, n, to)
		}
		// The header promises blocks that the bitmap does not have: fsck's case.
		if st.hint == 0 {
			return 0, fmt.Errorf("resource group at block %d: %w: %d free blocks in the header, none in the bitmap", r.Addr, ErrCorrupt, st.hdr.Free)
		}
	}
	return 0, ErrNoSpace
}

// AllocRun takes n adjacent free blocks as data and returns the first. It looks
// through all resource groups.
func (t *Tx) AllocRun(n uint64) (uint64, error) {
	for i := range t.rgs {
		if uint64(t.rgs[i].Data) < n {
			continue
		}
		st, err := t.rg(i)
		if err != nil {
			return 0, err
		}
		if uint64(st.hdr.Free) < n || st.hdr.Flags&ondisk.RGNoAlloc != 0 {
			continue
		}
		run := uint64(0)
		for k := range uint64(t.rgs[i].Data) {
			if t.FS.geom.GetState(st.bits, k) != ondisk.Free {
				run = 0
				continue
			}
			if run++; run < n {
				continue
			}
			first := k + 1 - n
			for j := first; j <= k; j++ {
				t.fresh[t.rgs[i].Data0+j] = true
				if err := t.setState(i, st, j, ondisk.Used); err != nil {
					return 0, err
				}
			}
			return t.rgs[i].Data0 + first, nil
		}
	}
	return 0, ErrNoSpace
}

// FreeBlocks is the number of free blocks by the headers of all resource groups.
func (t *Tx) FreeBlocks() (uint64, error) {
	n := uint64(0)
	for i := range t.rgs {
		if st := t.used[i]; st != nil {
			n += uint64(st.hdr.Free)
			continue
		}
		b, err := t.FS.Block(t.rgs[i].Addr)
		if err != nil {
			return 0, err
		}
		var h ondisk.Rgrp
		if err := h.Decode(b); err != nil {
			return 0, err
		}
		n += uint64(h.Free)
	}
	return n, nil
}

// SetState changes what the bitmap says of a block.
func (t *Tx) SetState(addr uint64, to ondisk.BlockState) error {
	i, data := FindRG(t.rgs, addr)
	if i < 0 || !data {
		return fmt.Errorf("block %d: %w: no resource group describes it", addr, ErrRange)
	}
	st, err := t.rg(i)
	if err != nil {
		return err
	}
	n := addr - t.rgs[i].Data0
	if to == ondisk.Free {
		st.hint, t.next = min(st.hint, n), min(t.next, i)
	}
	return t.setState(i, st, n, to)
}

// Free implements Store.
func (t *Tx) Free(addr uint64) error {
	delete(t.fresh, addr)
	return t.SetState(addr, ondisk.Free)
}

// Master reads the master directory as the Tx sees it.
func (t *Tx) Master() (*Inode, error) { return ReadInode(t, t.FS.Super.Master.Addr) }

// System is FS.System as the Tx sees it.
func (t *Tx) System(path ...string) (*Inode, error) {
	return system(t, t.FS.Super.Master.Addr, path)
}

// AddStatfs folds the deltas gathered so far into the master statfs file.
func (t *Tx) AddStatfs() error {
	ip, err := t.System("statfs")
	if err != nil {
		return err
	}
	b, err := ip.ReadAll(4096)
	if err != nil {
		return err
	}
	var sc ondisk.StatfsChange
	if err := sc.Decode(b); err != nil {
		return fmt.Errorf("statfs file: %w: %w", ErrCorrupt, err)
	}
	sc.Total += uint64(t.TotalDelta)
	sc.Free += uint64(t.FreeDelta)
	sc.Dinodes += uint64(t.DinodeDelta)
	t.TotalDelta, t.FreeDelta, t.DinodeDelta = 0, 0, 0
	if err := sc.Encode(b); err != nil {
		return err
	}
	if _, err := ip.WriteAt(b, 0); err != nil {
		return err
	}
	return ip.Put()
}

// NextInum takes n formal inode numbers from the master inum file.
func (t *Tx) NextInum(n uint64) (uint64, error) {
	ip, err := t.System("inum")
	if err != nil {
		return 0, err
	}
	b, err := ip.ReadAll(4096)
	if err != nil {
		return 0, err
	}
	if len(b) < 8 {
		return 0, fmt.Errorf("inum file: %w: %d bytes", ErrCorrupt, len(b))
	}
	first := be.Uint64(b)
	be.PutUint64(b, first+n)
	if _, err := ip.WriteAt(b[:8], 0); err != nil {
		return 0, err
	}
	return first, ip.Put()
}

// Fresh returns, sorted, the changed blocks that nothing on disk refers to yet:
// they may be written at any time.
func (t *Tx) Fresh() []Change { return t.changes(true) }

// Changed returns, sorted, the changed blocks that Fresh does not.
func (t *Tx) Changed() []Change { return t.changes(false) }

// Change is a block and its new content.
type Change struct {
	Addr uint64
	Data []byte
}

func (t *Tx) changes(fresh bool) []Change {
	var out []Change
	for a, b := range t.dirty {
		if t.fresh[a] == fresh {
			out = append(out, Change{a, b})
		}
	}
	slices.SortFunc(out, func(x, y Change) int {
		if x.Addr < y.Addr {
			return -1
		}
		return 1
	})
	return out
}

// AllocExtent takes up to n adjacent free blocks as data: the first run of n
// where there is one, else the first free run at all. It returns where it
// starts and how long it is.
func (t *Tx) AllocExtent(n uint64) (uint64, uint64, error) {
	a, err := t.AllocRun(n)
	if !errors.Is(err, ErrNoSpace) {
		return a, n, err
	}
	first, err := t.Alloc(false)
	if err != nil {
		return 0, 0, err
	}
	got := uint64(1)
	for got < n {
		i, data := FindRG(t.rgs, first+got)
		if i < 0 || !data {
			break
		}
		st, err := t.rg(i)
		if err != nil {
			return 0, 0, err
		}
		k := first + got - t.rgs[i].Data0
		if t.FS.geom.GetState(st.bits, k) != ondisk.Free {
			break
		}
		t.fresh[first+got] = true
		if err := t.setState(i, st, k, ondisk.Used); err != nil {
			return 0, 0, err
		}
		got++
	}
	return first, got, nil
}

// EditRgrp changes the header of the resource group at block addr.
func (t *Tx) EditRgrp(addr uint64, change func(h *ondisk.Rgrp)) error {
	for i := range t.rgs {
		if t.rgs[i].Addr != addr {
			continue
		}
		st, err := t.rg(i)
		if err != nil {
			return err
		}
		change(&st.hdr)
		if err := st.hdr.Encode(st.bits); err != nil {
			return err
		}
		ondisk.SealRgrp(st.bits)
		t.dirty[addr] = st.bits[:t.FS.geom.BlockSize]
		return nil
	}
	return fmt.Errorf("resource group at block %d: %w", addr, ErrNotExist)
}
