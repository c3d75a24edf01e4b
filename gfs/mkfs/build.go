package mkfs

import (
	"encoding/binary"
	"fmt"
	"strconv"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

var be = binary.BigEndian

// image is the filesystem under construction: which blocks of each resource
// group are taken, and the content of all that cannot be computed from their
// place. Journals and quota_change files can, so they are kept as runs.
//
// Nothing is ever freed while a filesystem is made, so the taken blocks of a
// resource group are always its first ones.
type image struct {
	l       *Layout
	used    []uint64   // taken blocks of each resource group
	dinodes [][]uint64 // blocks of dinodes, relative to data0
	cursor  int        // first resource group with room
	blocks  map[uint64][]byte
	qc      []run
	formal  uint64 // last formal inode number given out

	master, root *fs.Inode
	nDinodes     uint64
}

// run is a range of blocks.
type run struct{ start, n uint64 }

// image is a fs.Store.

func (im *image) Geometry() ondisk.Geometry { return im.l.Geom }

func (im *image) Block(addr uint64) ([]byte, error) {
	b := im.blocks[addr]
	if b == nil {
		return nil, fmt.Errorf("block %d is not in memory", addr)
	}
	return b, nil
}

func (im *image) Dirty(addr uint64) ([]byte, error) { return im.Block(addr) }

func (im *image) NewBlock(addr uint64) ([]byte, error) {
	b := make([]byte, im.l.Geom.BlockSize)
	im.blocks[addr] = b
	return b, nil
}

func (im *image) Free(uint64) error { return fs.ErrReadOnly }

func (im *image) Alloc(dinode bool) (uint64, error) {
	for ; im.cursor < len(im.l.RGs); im.cursor++ {
		rg := &im.l.RGs[im.cursor]
		n := im.used[im.cursor]
		if n >= uint64(rg.Data) {
			continue
		}
		im.used[im.cursor]++
		if dinode {
			im.dinodes[im.cursor] = append(im.dinodes[im.cursor], n)
			im.nDinodes++
		}
		return rg.Data0 + n, nil
	}
	return 0, ErrNoFit
}

// build makes all of the filesystem in memory but for the superblock.
func build(l *Layout) (*image, error) {
	im := &image{
		l: l, used: make([]uint64, len(l.RGs)), dinodes: make([][]uint64, len(l.RGs)),
		blocks: map[uint64][]byte{},
	}
	var journals []ondisk.Inum
	for i := range l.RGs {
		if l.RGs[i].Journal < 0 {
			continue
		}
		ino, err := im.journal(i)
		if err != nil {
			return nil, err
		}
		journals = append(journals, ino)
	}
	steps := []struct {
		name string
		f    func() error
	}{
		{"master", im.makeMaster},
		{"jindex", func() error { return im.makeJindex(journals) }},
		{"per_node", im.makePerNode},
		{"inum", func() error { return im.makeSmall(im.master, "inum", 8, 0) }},
		{"statfs", func() error { return im.makeSmall(im.master, "statfs", ondisk.StatfsChangeSize, 0) }},
		{"rindex", im.makeRindex},
		{"quota", im.makeQuota},
		{"root", im.makeRoot},
		{"counters", im.fillCounters},
	}
	for _, s := range steps {
		if err := s.f(); err != nil {
			return nil, fmt.Errorf("make %s: %w", s.name, err)
		}
	}
	return im, nil
}

// newInode takes a block and a formal number.
func (im *image) newInode(mode, flags uint32, parent ondisk.Inum) (*fs.Inode, error) {
	addr, err := im.Alloc(true)
	if err != nil {
		return nil, err
	}
	im.formal++
	return fs.NewInode(im, ondisk.Inum{Formal: im.formal, Addr: addr}, mode, flags, parent, im.l.Now)
}

// journal fills a journal's own resource group: dinode, pointer blocks level by
// level, data.
func (im *image) journal(rgi int) (ondisk.Inum, error) {
	l, g := im.l, im.l.Geom
	rg := &l.RGs[rgi]
	im.formal++
	im.used[rgi], im.nDinodes = 1, im.nDinodes+1
	im.dinodes[rgi] = []uint64{0}
	ip, err := fs.NewInode(im, ondisk.Inum{Formal: im.formal, Addr: rg.Data0}, ondisk.ModeRegular|0o600, ondisk.DISystem, ondisk.Inum{}, l.Now)
	if err != nil {
		return ondisk.Inum{}, err
	}
	levels := g.TreeBlocks(l.JBlocks)
	ip.Height = uint16(len(levels) + 1)
	ip.Size = l.JBlocks << g.Shift
	// parents of the level being placed: blocks and where their pointers start
	parents, off, per := [][]byte{im.blocks[rg.Data0]}, ondisk.DinodeSize, g.DinodePtrs
	next := rg.Data0 + 1
	for lvl, n := range append(levels, l.JBlocks) {
		data := lvl == len(levels)
		var kids [][]byte
		for i := range n {
			be.PutUint64(parents[int(i)/per][off+8*(int(i)%per):], next+i)
			if !data {
				b, err := im.NewBlock(next + i)
				if err != nil {
					return ondisk.Inum{}, err
				}
				ondisk.PutMeta(b, ondisk.TypeIN)
				kids = append(kids, b)
			}
		}
		if !data {
			ip.GoalMeta = next + n - 1
			parents, off, per = kids, ondisk.MetaHeaderSize, g.InPtrs
		}
		next += n
	}
	ip.GoalData = next - 1
	ip.Blocks = next - rg.Data0
	im.used[rgi] = ip.Blocks
	return ip.Num, ip.Put()
}

// journalData is the first data block of the journal in resource group rgi, and
// journalEnd the block behind its last.
func (l *Layout) journalData(rgi int) uint64 {
	at := l.RGs[rgi].Data0 + 1
	for _, n := range l.Geom.TreeBlocks(l.JBlocks) {
		at += n
	}
	return at
}
func (l *Layout) journalEnd(rgi int) uint64 { return l.journalData(rgi) + l.JBlocks }

func (im *image) makeMaster() (err error) {
	im.master, err = im.newInode(ondisk.ModeDir|0o755, ondisk.DISystem, ondisk.Inum{})
	return err
}

func (im *image) makeRoot() (err error) {
	im.root, err = im.newInode(ondisk.ModeDir|0o755, 0, ondisk.Inum{})
	return err
}

// create makes an inode and its entry in dir. The block of the inode is taken
// first, then those that the directory may need.
func (im *image) create(dir *fs.Inode, name string, mode, flags uint32) (*fs.Inode, error) {
	ip, err := im.newInode(mode, flags, dir.Num)
	if err != nil {
		return nil, err
	}
	if ip.IsDir() {
		dir.Nlink++
	}
	return ip, dir.AddEntry(name, ip.Num, ondisk.DirentType(mode))
}

func (im *image) makeJindex(journals []ondisk.Inum) error {
	dir, err := im.create(im.master, "jindex", ondisk.ModeDir|0o700, ondisk.DISystem)
	if err != nil {
		return err
	}
	for j, ino := range journals {
		if err := dir.AddEntry("journal"+strconv.Itoa(j), ino, ondisk.DTRegular); err != nil {
			return err
		}
	}
	return nil
}

func (im *image) makePerNode() error {
	dir, err := im.create(im.master, "per_node", ondisk.ModeDir|0o700, ondisk.DISystem)
	if err != nil {
		return err
	}
	for j := range im.l.Journals {
		n := strconv.Itoa(j)
		if err := im.makeSmall(dir, "inum_range"+n, ondisk.InumRangeSize, 0); err != nil {
			return err
		}
		if err := im.makeSmall(dir, "statfs_change"+n, ondisk.StatfsChangeSize, 0); err != nil {
			return err
		}
		if err := im.makeQuotaChange(dir, "quota_change"+n); err != nil {
			return err
		}
	}
	return nil
}

// makeSmall makes a stuffed system file of zeroes.
func (im *image) makeSmall(dir *fs.Inode, name string, size uint64, payload ondisk.Format) error {
	ip, err := im.create(dir, name, ondisk.ModeRegular|0o600, ondisk.DISystem|ondisk.DIJdata)
	if err != nil {
		return err
	}
	ip.Size, ip.PayloadFormat = size, uint32(payload)
	return ip.Put()
}

func (im *image) makeQuotaChange(dir *fs.Inode, name string) error {
	g := im.l.Geom
	ip, err := im.create(dir, name, ondisk.ModeRegular|0o600, ondisk.DISystem)
	if err != nil {
		return err
	}
	blocks := uint64(im.l.QuotaMB) << 20 >> g.Shift
	ip.Height = uint16(g.HeightBlocks(blocks))
	for i := range blocks {
		a, err := ip.MapNew(i)
		if err != nil {
			return err
		}
		delete(im.blocks, a) // its content is computed when it is written
		if n := len(im.qc); n > 0 && im.qc[n-1].start+im.qc[n-1].n == a {
			im.qc[n-1].n++
		} else {
			im.qc = append(im.qc, run{a, 1})
		}
	}
	ip.Size = blocks << g.Shift
	return ip.Put()
}

func (im *image) makeRindex() error {
	ip, err := im.create(im.master, "rindex", ondisk.ModeRegular|0o600, ondisk.DISystem|ondisk.DIJdata)
	if err != nil {
		return err
	}
	ip.PayloadFormat = uint32(ondisk.FormatRI)
	var e [ondisk.RindexSize]byte
	for i := range im.l.RGs {
		if err := im.l.RGs[i].Encode(e[:]); err != nil {
			return err
		}
		if _, err := ip.WriteAt(e[:], int64(i)*ondisk.RindexSize); err != nil {
			return err
		}
	}
	// mkfs.gfs2 leaves room for one entry more, so that gfs2_grow on a full
	// filesystem need not allocate: the blocks are there, the size excludes it.
	size := ip.Size
	if _, err := ip.WriteAt(make([]byte, ondisk.RindexSize), int64(size)); err != nil {
		return err
	}
	ip.Size = size
	return ip.Put()
}

func (im *image) makeQuota() error {
	ip, err := im.create(im.master, "quota", ondisk.ModeRegular|0o600, ondisk.DISystem|ondisk.DIJdata)
	if err != nil {
		return err
	}
	ip.PayloadFormat = uint32(ondisk.FormatQU)
	q := ondisk.Quota{Value: 1} // the root directory's block, once for user 0, once for group 0
	var e [ondisk.QuotaSize]byte
	if err := q.Encode(e[:]); err != nil {
		return err
	}
	for i := range int64(2) {
		if _, err := ip.WriteAt(e[:], i*ondisk.QuotaSize); err != nil {
			return err
		}
	}
	return ip.Put()
}

// fillCounters writes the master inum and statfs files, which depend on all
// that was allocated.
func (im *image) fillCounters() error {
	var total, used uint64
	for i := range im.l.RGs {
		total += uint64(im.l.RGs[i].Data)
		used += im.used[i]
	}
	sf := ondisk.StatfsChange{Total: total, Free: total - used, Dinodes: im.nDinodes}
	for name, put := range map[string]func(b []byte) error{
		"inum":   func(b []byte) error { be.PutUint64(b, im.formal+1); return nil },
		"statfs": sf.Encode,
	} {
		e, err := im.master.Lookup(name)
		if err != nil {
			return err
		}
		if err := put(im.blocks[e.Inum.Addr][ondisk.DinodeSize:]); err != nil {
			return err
		}
	}
	return im.master.Put()
}

// superblock returns the finished superblock, one block long.
func (im *image) superblock() ([]byte, error) {
	l := im.l
	sb := ondisk.Superblock{
		MetaHeader: ondisk.Meta(ondisk.TypeSB), FSFormat: l.Format, MultihostFormat: ondisk.FormatMulti,
		BlockSize: uint32(l.Geom.BlockSize), BlockShift: uint32(l.Geom.Shift),
		Master: im.master.Num, Root: im.root.Num, UUID: l.UUID,
	}
	copy(sb.LockProto[:ondisk.LockNameLen-1], l.LockProto)
	copy(sb.LockTable[:ondisk.LockNameLen-1], l.LockTable)
	b := make([]byte, l.Geom.BlockSize)
	return b, sb.Encode(b)
}
