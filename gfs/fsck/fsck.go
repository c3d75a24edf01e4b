// Package fsck checks and repairs GFS2 filesystems that no node has mounted.
//
// The passes, in order:
//
//	rindex    the index of resource groups, rebuilt from their headers if need be
//	journals  replay of what dead nodes left
//	inodes    every dinode, its tree, attributes and hash table; who uses which block
//	dups      blocks with two owners
//	dirs      entries against inodes; link counts
//	bitmaps   what the trees use against the bitmaps and counters
//	repair    orphans to lost+found, damaged directories and journals rebuilt
//	statfs    the counters of the whole filesystem
//
// A check without repair works on an overlay in memory: it replays the journals
// and repairs there, so that it reports what is wrong once and nothing that a
// replay would mend (fsck.gfs2 -n does not replay, and takes a dirty filesystem
// for a damaged one). Memory grows with what is in use, not with the size.
package fsck

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
	"strconv"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/grow"
	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

var be = binary.BigEndian

// Config says how to check.
type Config struct {
	Repair bool  // write to the device; else everything happens in memory
	Now    int64 // seconds since 1970, for what has to be made anew
	// Report is told every problem in a line of text; Info what is going on.
	Report func(text string)
	Info   func(text string)
	// Progress is told how far a pass has come.
	Progress func(pass string, done, total uint64)
}

// Result is what a run found.
type Result struct {
	Problems int // things that were wrong
	Replayed int // journals that were dirty
	Left     int // problems that cannot be repaired
	Inodes   uint64
	Total    uint64 // data blocks
	Free     uint64
}

// ErrNoFS is a device without a superblock that can be understood.
var ErrNoFS = errors.New("no GFS2 superblock")

type checker struct {
	ctx context.Context
	cfg Config
	dev journal.Device
	f   *fs.FS
	g   ondisk.Geometry
	rgs []ondisk.Rindex
	res Result

	blocks   *blockMap
	lastRG   int
	inodes   []inode // by address
	extra    map[uint64]*inode
	suspects []uint64
	dups     map[uint64]bool
	clean    []bool // by resource group: bitmap all zero and header right for that

	salvage  map[uint64][]fs.Entry // directories to be rebuilt
	journals int                   // how many there should be
	missing  map[int]bool          // journals to be made anew
	drop     map[uint64]bool       // dinodes of those
	clones   []clone
	maxIno   uint64
}

// inode is what is remembered of every dinode.
type inode struct {
	addr, formal uint64
	parent       uint64 // directories: where the entry is; 0 = none seen
	nlink, found uint32
	typ          uint16 // DT...
	unlinked     bool
	dir          bool
	system       bool
}

// Check checks the filesystem on dev. The error is that of the device or of a
// superblock that cannot be used (ErrNoFS, and those of ondisk.ReadSuperblock);
// problems of the filesystem are in the result.
func Check(ctx context.Context, dev journal.Device, cfg Config) (Result, error) {
	if cfg.Report == nil {
		cfg.Report = func(string) {}
	}
	if cfg.Info == nil {
		cfg.Info = func(string) {}
	}
	if cfg.Progress == nil {
		cfg.Progress = func(string, uint64, uint64) {}
	}
	if !cfg.Repair {
		dev = disk.NewOverlay(dev)
	}
	f, err := fs.Open(dev)
	if err != nil {
		if errors.Is(err, ondisk.ErrMagic) || errors.Is(err, ondisk.ErrType) {
			err = fmt.Errorf("%w: %w", ErrNoFS, err)
		}
		return Result{}, err
	}
	c := &checker{
		ctx: ctx, cfg: cfg, dev: dev, f: f, g: f.Geometry(),
		extra: map[uint64]*inode{}, dups: map[uint64]bool{}, salvage: map[uint64][]fs.Entry{}, missing: map[int]bool{}, drop: map[uint64]bool{},
	}
	for _, p := range []struct {
		name string
		run  func() error
	}{
		{"rindex", c.checkRindex}, {"journals", c.checkJournals}, {"inodes", c.checkInodes}, {"duplicate blocks", c.checkDups},
		{"directories", c.checkDirs}, {"bitmaps", c.checkBitmaps}, {"repair", c.repair}, {"link counts", c.checkLinks}, {"statfs", c.checkStatfs},
	} {
		if err := ctx.Err(); err != nil {
			return c.res, context.Cause(ctx)
		}
		c.cfg.Info("pass " + p.name)
		if err := p.run(); err != nil {
			return c.res, fmt.Errorf("pass %s: %w", p.name, err)
		}
	}
	if err := dev.Flush(); err != nil {
		return c.res, fmt.Errorf("flush: %w", err)
	}
	return c.res, nil
}

// problem reports something that is wrong and gets repaired.
func (c *checker) problem(format string, a ...any) {
	c.res.Problems++
	c.cfg.Report(fmt.Sprintf(format, a...))
}

// hopeless reports something that is wrong and stays so.
func (c *checker) hopeless(format string, a ...any) {
	c.res.Left++
	c.problem(format, a...)
}

func (c *checker) put(addr uint64, b []byte) error {
	if _, err := c.dev.WriteAt(b, int64(addr<<c.g.Shift)); err != nil {
		return fmt.Errorf("write block %d: %w", addr, err)
	}
	c.f.Drop()
	return nil
}

// block reads a block for change.
func (c *checker) block(addr uint64) ([]byte, error) {
	b, err := c.f.Block(addr)
	if err != nil {
		return nil, err
	}
	return append([]byte(nil), b...), nil
}

// valid tells whether a block can belong to an inode: it is data of a resource
// group.
func (c *checker) valid(a uint64) bool {
	if r := &c.rgs[c.lastRG]; a >= r.Data0 && a < r.Data0+uint64(r.Data) {
		return true
	}
	i, data := fs.FindRG(c.rgs, a)
	if i < 0 || !data {
		return false
	}
	c.lastRG = i
	return true
}

// find returns what is known of a dinode, nil if it is none.
func (c *checker) find(addr uint64) *inode {
	i := sort.Search(len(c.inodes), func(k int) bool { return c.inodes[k].addr >= addr })
	if i < len(c.inodes) && c.inodes[i].addr == addr {
		return &c.inodes[i]
	}
	return c.extra[addr]
}

// each calls f for every known dinode.
func (c *checker) each(f func(ip *inode) error) error {
	for i := range c.inodes {
		if err := f(&c.inodes[i]); err != nil {
			return err
		}
	}
	// Those found through directories only, in the order of their addresses.
	var more []uint64
	for a := range c.extra {
		more = append(more, a)
	}
	sort.Slice(more, func(i, j int) bool { return more[i] < more[j] })
	for _, a := range more {
		if err := f(c.extra[a]); err != nil {
			return err
		}
	}
	return nil
}

// checkJournals replays the dirty ones and notes those that are lost.
func (c *checker) checkJournals() error {
	n, err := c.countJournals()
	if err != nil {
		return err
	}
	c.journals = n
	for i := range n {
		_, dirty, err := journal.Recover(c.dev, c.f, i)
		switch {
		case err == nil && dirty:
			c.res.Replayed++
			c.cfg.Info(fmt.Sprintf("journal %d replayed", i))
		case err == nil:
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrCorrupt) && !errors.Is(err, journal.ErrBroken) && !errors.Is(err, journal.ErrNoHead):
			c.problem("Journal %d is missing or damaged (%v): it will be made anew", i, err)
			c.missing[i] = true
			if err := c.dropJournal(i); err != nil {
				return err
			}
		case errors.Is(err, journal.ErrBroken), errors.Is(err, journal.ErrNoHead):
			c.problem("Journal %d cannot be replayed (%v): what it held is lost, it will be cleared", i, err)
			j, err := journal.Open(c.f, i)
			if err != nil {
				c.missing[i] = true
				continue
			}
			if err := j.Reset(c.dev); err != nil {
				return err
			}
			c.f.Drop()
		default:
			return err
		}
	}
	// The replay may have changed the rindex.
	return c.loadRindex()
}

// dropJournal takes the entry of an unusable journal out of jindex; its inode is
// not walked, so that its blocks become free.
func (c *checker) dropJournal(i int) error {
	ed := c.editor()
	ji, err := system(ed, c.f.Super.Master.Addr, "jindex")
	if err != nil {
		return nil // said elsewhere
	}
	e, err := ji.Lookup("journal" + strconv.Itoa(i))
	if err != nil {
		return nil
	}
	c.drop[e.Inum.Addr] = true
	if err := ji.RemoveEntry(e.Name); err != nil {
		return err
	}
	return ed.flush()
}

func system(s fs.Store, master uint64, name string) (*fs.Inode, error) {
	m, err := fs.ReadInode(s, master)
	if err != nil {
		return nil, err
	}
	return m.Open(name)
}

// countJournals goes by jindex and by per_node: either may have lost entries.
func (c *checker) countJournals() (int, error) {
	n := 0
	for _, d := range []struct{ dir, prefix string }{{"jindex", "journal"}, {"per_node", "inum_range"}, {"per_node", "statfs_change"}, {"per_node", "quota_change"}} {
		ip, err := c.f.System(d.dir)
		if err != nil {
			c.hopeless("System directory %s cannot be read: %v", d.dir, err)
			continue
		}
		err = ip.EachEntry(func(e fs.Entry) error {
			if s, ok := cutPrefix(e.Name, d.prefix); ok {
				if k, err := strconv.Atoi(s); err == nil && k >= 0 && k < 1<<16 {
					n = max(n, k+1)
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrCorrupt) && !errors.Is(err, fs.ErrRange) {
			return 0, err
		}
	}
	return max(n, 1), nil
}

func cutPrefix(s, p string) (string, bool) {
	if len(s) > len(p) && s[:len(p)] == p {
		return s[len(p):], true
	}
	return "", false
}

// checkStatfs writes what the resource groups add up to, and zero for every
// node's own part.
func (c *checker) checkStatfs() error {
	sc, err := c.f.Statfs()
	want := ondisk.StatfsChange{Total: c.res.Total, Free: c.res.Free, Dinodes: c.res.Inodes}
	if err == nil && sc == want {
		return nil
	}
	if err != nil {
		c.problem("The statfs file cannot be read: %v", err)
	} else {
		c.problem("The statfs file is wrong: blocks %d, free %d, dinodes %d; counted %d, %d, %d",
			int64(sc.Total), int64(sc.Free), int64(sc.Dinodes), want.Total, want.Free, want.Dinodes)
	}
	set := func(v ondisk.StatfsChange, path ...string) error {
		ip, err := c.f.System(path...)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrCorrupt) {
			c.hopeless("System file %s cannot be read: %v", path[len(path)-1], err)
			return nil
		}
		if err != nil {
			return err
		}
		b, err := c.block(ip.Num.Addr)
		if err != nil {
			return err
		}
		ip.Size, ip.Height = ondisk.StatfsChangeSize, 0
		if err := ip.Encode(b); err != nil {
			return err
		}
		if err := v.Encode(b[ondisk.DinodeSize:]); err != nil {
			return err
		}
		return c.put(ip.Num.Addr, b)
	}
	if err := set(want, "statfs"); err != nil {
		return err
	}
	for i := range c.journals {
		if err := set(ondisk.StatfsChange{}, "per_node", "statfs_change"+strconv.Itoa(i)); err != nil {
			return err
		}
	}
	return nil
}

// rebuildJournals makes lost journals and per-node files anew, all in one run.
func (c *checker) rebuildJournals() error {
	for i := range c.journals {
		for _, p := range [][]string{{"jindex", "journal"}, {"per_node", "inum_range"}, {"per_node", "statfs_change"}, {"per_node", "quota_change"}} {
			ip, err := c.f.System(p[0])
			if err != nil {
				continue // said before
			}
			if _, err := ip.Lookup(p[1] + strconv.Itoa(i)); errors.Is(err, fs.ErrNotExist) {
				if !c.missing[i] {
					c.problem("System file %s%d is missing: it will be made anew", p[1], i)
				}
				c.missing[i] = true
			}
		}
	}
	if len(c.missing) == 0 {
		return nil
	}
	mb := 0
	for i := range c.journals {
		if ip, err := c.f.Journal(i); err == nil && !c.missing[i] {
			mb = int(ip.Size >> 20)
		}
	}
	if mb < ondisk.MinJournalMB || mb > ondisk.MaxJournalMB {
		mb = ondisk.MinJournalMB
	}
	for i := range c.journals {
		if !c.missing[i] {
			continue
		}
		used, dinodes, err := grow.Restore(c.dev, c.f, i, mb, 1, c.cfg.Now, c.carrier() >= 0)
		if errors.Is(err, fs.ErrNoSpace) {
			c.hopeless("No space to make journal %d anew", i)
			continue
		}
		if err != nil {
			return fmt.Errorf("restore journal %d: %w", i, err)
		}
		c.f.Drop()
		c.res.Free -= used
		c.res.Inodes += dinodes
		delete(c.missing, i)
	}
	return nil
}

// carrier is a journal that can carry transactions, -1 if none can.
func (c *checker) carrier() int {
	for i := range c.journals {
		if !c.missing[i] {
			return i
		}
	}
	return -1
}

// commit puts tx on disk: through a journal where there is one.
func (c *checker) commit(tx *fs.Tx) error {
	defer c.f.Drop()
	c.res.Free += uint64(tx.FreeDelta)
	c.res.Inodes += uint64(tx.DinodeDelta)
	if j := c.carrier(); j >= 0 {
		err := journal.Commit(c.dev, tx, j)
		if !errors.Is(err, journal.ErrTooBig) {
			return err
		}
	}
	for _, ch := range append(tx.Fresh(), tx.Changed()...) {
		if err := c.put(ch.Addr, ch.Data); err != nil {
			return err
		}
	}
	return nil
}
