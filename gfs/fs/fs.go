package fs

import (
	"errors"
	"fmt"
	"io"
	"sort"
	"strconv"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Reader is the device under a filesystem. Offsets and lengths are bytes and
// multiples of the filesystem's block size, but for the superblock's first read
// (512 bytes at 64 KiB).
type Reader interface {
	io.ReaderAt
	Size() int64
}

// FS is a filesystem opened for reading. It is a Store whose changing half
// answers ErrReadOnly. It is not safe for concurrent use.
type FS struct {
	dev   Reader
	Super ondisk.Superblock
	geom  ondisk.Geometry

	// A small direct-mapped cache: metadata walks come back to the same few
	// blocks (dinodes of directories, indirect blocks).
	cache [cacheSlots]cached

	rgs []ondisk.Rindex // sorted by address; nil until read
}

const cacheSlots = 256

type cached struct {
	addr uint64
	b    []byte
}

// Open reads and judges the superblock. Errors of ondisk.ReadSuperblock (GFS1,
// a newer format, damage) come back with %w.
func Open(dev Reader) (*FS, error) {
	b := make([]byte, 512)
	if _, err := dev.ReadAt(b, ondisk.SBOffset); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	sb, g, err := ondisk.ReadSuperblock(b)
	if err != nil {
		return nil, fmt.Errorf("superblock at byte %d: %w", ondisk.SBOffset, err)
	}
	return &FS{dev: dev, Super: sb, geom: g}, nil
}

// Geometry implements Store.
func (f *FS) Geometry() ondisk.Geometry { return f.geom }

// Device is what Open was given.
func (f *FS) Device() Reader { return f.dev }

// Blocks is how many whole blocks the device has.
func (f *FS) Blocks() uint64 { return uint64(f.dev.Size()) >> f.geom.Shift }

// Block implements Store. The bytes are the cache's and must not be changed.
func (f *FS) Block(addr uint64) ([]byte, error) {
	if addr >= f.Blocks() {
		return nil, fmt.Errorf("read block %d: %w: the device has %d", addr, ErrRange, f.Blocks())
	}
	c := &f.cache[addr%cacheSlots]
	if c.b != nil && c.addr == addr {
		return c.b, nil
	}
	b := make([]byte, f.geom.BlockSize) // a new one: callers may still hold the old
	if _, err := f.dev.ReadAt(b, int64(addr<<f.geom.Shift)); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read block %d: %w", addr, err)
	}
	c.addr, c.b = addr, b
	return b, nil
}

// ReadBlocks reads n adjacent blocks past the cache into p.
func (f *FS) ReadBlocks(p []byte, addr uint64) error {
	n := uint64(len(p)) >> f.geom.Shift
	if addr+n > f.Blocks() || addr+n < addr {
		return fmt.Errorf("read %d blocks at %d: %w: the device has %d", n, addr, ErrRange, f.Blocks())
	}
	if _, err := f.dev.ReadAt(p, int64(addr<<f.geom.Shift)); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %d blocks at %d: %w", n, addr, err)
	}
	return nil
}

// Drop forgets cached blocks, after the device has been written.
func (f *FS) Drop() {
	clear(f.cache[:])
	f.rgs = nil
}

// Dirty implements Store: a filesystem without a transaction is read-only.
func (f *FS) Dirty(uint64) ([]byte, error) { return nil, ErrReadOnly }

// NewBlock implements Store, as Dirty.
func (f *FS) NewBlock(uint64) ([]byte, error) { return nil, ErrReadOnly }

// Alloc implements Store, as Dirty.
func (f *FS) Alloc(bool) (uint64, error) { return 0, ErrReadOnly }

// Free implements Store, as Dirty.
func (f *FS) Free(uint64) error { return ErrReadOnly }

// Master reads the master directory, which the superblock names.
func (f *FS) Master() (*Inode, error) { return ReadInode(f, f.Super.Master.Addr) }

// Root reads the root directory, which the superblock names.
func (f *FS) Root() (*Inode, error) { return ReadInode(f, f.Super.Root.Addr) }

// System reads an inode below the master directory: System("jindex"),
// System("per_node", "statfs_change0").
func (f *FS) System(path ...string) (*Inode, error) { return system(f, f.Super.Master.Addr, path) }

func system(s Store, master uint64, path []string) (*Inode, error) {
	ip, err := ReadInode(s, master)
	for _, name := range path {
		if err != nil {
			return nil, err
		}
		ip, err = ip.Open(name)
	}
	return ip, err
}

// Journals counts the journals: the entries journal0, journal1, ... of jindex.
func (f *FS) Journals() (int, error) { return journals(f, f.Super.Master.Addr) }

func journals(s Store, master uint64) (int, error) {
	ji, err := system(s, master, []string{"jindex"})
	if err != nil {
		return 0, err
	}
	n := 0
	for {
		_, err := ji.Lookup("journal" + strconv.Itoa(n))
		if errors.Is(err, ErrNotExist) {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		n++
	}
}

// Journal reads the inode of journal n.
func (f *FS) Journal(n int) (*Inode, error) { return f.System("jindex", "journal"+strconv.Itoa(n)) }

// RGs reads the rindex file, in the order of addresses. The slice is the FS's.
func (f *FS) RGs() ([]ondisk.Rindex, error) {
	if f.rgs == nil {
		rgs, err := readRindex(f, f.Super.Master.Addr)
		if err != nil {
			return nil, err
		}
		f.rgs = rgs
	}
	return f.rgs, nil
}

func readRindex(s Store, master uint64) ([]ondisk.Rindex, error) {
	ip, err := system(s, master, []string{"rindex"})
	if err != nil {
		return nil, err
	}
	b, err := ip.ReadAll(1 << 32)
	if err != nil {
		return nil, fmt.Errorf("read rindex: %w", err)
	}
	// gfs2_grow may have died half-way: a partial entry at the end is none.
	rgs := make([]ondisk.Rindex, len(b)/ondisk.RindexSize)
	for i := range rgs {
		if err := rgs[i].Decode(b[i*ondisk.RindexSize:]); err != nil {
			return nil, err
		}
	}
	if len(rgs) == 0 {
		return nil, fmt.Errorf("read rindex: %w: no entries", ErrCorrupt)
	}
	sort.SliceStable(rgs, func(i, j int) bool { return rgs[i].Addr < rgs[j].Addr })
	return rgs, nil
}

// FindRG returns the index of the resource group that holds block addr as data,
// or as one of its header blocks (data false); -1 for blocks of none.
func FindRG(rgs []ondisk.Rindex, addr uint64) (i int, data bool) {
	i = sort.Search(len(rgs), func(k int) bool { return rgs[k].Addr > addr }) - 1
	if i < 0 {
		return -1, false
	}
	r := &rgs[i]
	switch {
	case addr < r.Data0:
		return i, false
	case addr < r.Data0+uint64(r.Data):
		return i, true
	}
	return -1, false
}

// State reads what the bitmap says of a block.
func (f *FS) State(addr uint64) (ondisk.BlockState, error) {
	rgs, err := f.RGs()
	if err != nil {
		return 0, err
	}
	i, data := FindRG(rgs, addr)
	if i < 0 || !data {
		return 0, fmt.Errorf("block %d: %w: no resource group describes it", addr, ErrRange)
	}
	blk, off, sh := f.geom.BitmapOffset(addr - rgs[i].Data0)
	b, err := f.Block(rgs[i].Addr + uint64(blk))
	if err != nil {
		return 0, err
	}
	return ondisk.BlockState(b[off]>>sh) & 3, nil
}

// Statfs reads the master statfs file and adds the local changes of every node,
// as a mount after a clean shutdown would.
func (f *FS) Statfs() (ondisk.StatfsChange, error) {
	sc, err := readStatfs(f, f.Super.Master.Addr, "statfs")
	if err != nil {
		return sc, err
	}
	n, err := f.Journals()
	if err != nil {
		return sc, err
	}
	for i := range n {
		d, err := readStatfs(f, f.Super.Master.Addr, "per_node", "statfs_change"+strconv.Itoa(i))
		if err != nil {
			return sc, err
		}
		sc.Total, sc.Free, sc.Dinodes = sc.Total+d.Total, sc.Free+d.Free, sc.Dinodes+d.Dinodes
	}
	return sc, nil
}

func readStatfs(s Store, master uint64, path ...string) (ondisk.StatfsChange, error) {
	var sc ondisk.StatfsChange
	ip, err := system(s, master, path)
	if err != nil {
		return sc, err
	}
	b, err := ip.ReadAll(4096)
	if err != nil {
		return sc, err
	}
	return sc, sc.Decode(b)
}

// Lookup reads the inode at a path below the root directory; symbolic links are
// not followed.
func (f *FS) Lookup(path ...string) (*Inode, error) { return system(f, f.Super.Root.Addr, path) }
