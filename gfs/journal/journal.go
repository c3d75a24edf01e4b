// Package journal reads, replays and writes GFS2 journals of a filesystem that
// nobody has mounted. It finds the head of a journal, replays what a dead node
// left (as the kernel's recovery does), and commits a gfs/fs.Tx through a
// journal, so that a change of many blocks is on disk whole or not at all.
//
//	log   | LD list | block | block ... | LD | ... | LH |   LH: header, ends a transaction
//	           ^ lh_tail: first block not yet in place  ^ head
//
// It takes no cluster locks: node/locks orders recovery among live nodes.
package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

var be = binary.BigEndian

// Device is a device that can be written. Flush returning nil makes every write
// before it durable.
type Device interface {
	fs.Reader
	io.WriterAt
	Flush() error
}

// Errors that callers branch on.
var (
	ErrNoHead  = errors.New("journal has no valid header")
	ErrBroken  = errors.New("journal cannot be replayed")
	ErrTooBig  = errors.New("transaction does not fit into the journal")
	ErrUnclean = errors.New("journal is not clean")
)

// Journal is one journal of a filesystem.
type Journal struct {
	N    int
	f    *fs.FS
	ip   *fs.Inode
	runs []run // journal block -> filesystem block
	n    uint32
}

type run struct {
	jblk uint32
	addr uint64
	n    uint32
}

// Open maps journal n.
func Open(f *fs.FS, n int) (*Journal, error) {
	ip, err := f.Journal(n)
	if err != nil {
		return nil, fmt.Errorf("open journal %d: %w", n, err)
	}
	g := f.Geometry()
	blocks := ip.Size >> g.Shift
	if blocks < 2 || blocks > 1<<31 || ip.Size != blocks<<g.Shift {
		return nil, fmt.Errorf("open journal %d: %w: %d bytes", n, fs.ErrCorrupt, ip.Size)
	}
	j := &Journal{N: n, f: f, ip: ip, n: uint32(blocks)}
	for b := uint64(0); b < blocks; b++ {
		a, err := ip.Map(b)
		if err == nil && (a == 0 || a >= f.Blocks()) {
			err = fmt.Errorf("%w: journal block %d is at block %d", fs.ErrCorrupt, b, a)
		}
		if err != nil {
			return nil, fmt.Errorf("open journal %d: %w", n, err)
		}
		if k := len(j.runs); k > 0 && j.runs[k-1].addr+uint64(j.runs[k-1].n) == a {
			j.runs[k-1].n++
			continue
		}
		j.runs = append(j.runs, run{uint32(b), a, 1})
	}
	return j, nil
}

// Blocks is the length of the journal in blocks.
func (j *Journal) Blocks() uint32 { return j.n }

// Inode is the journal's inode.
func (j *Journal) Inode() *fs.Inode { return j.ip }

// Addr is the filesystem block of journal block b.
func (j *Journal) Addr(b uint32) uint64 {
	lo, hi := 0, len(j.runs)
	for hi-lo > 1 {
		if m := (lo + hi) / 2; j.runs[m].jblk <= b {
			lo = m
		} else {
			hi = m
		}
	}
	return j.runs[lo].addr + uint64(b-j.runs[lo].jblk)
}

func (j *Journal) next(b uint32, k uint32) uint32 {
	return uint32((uint64(b) + uint64(k)) % uint64(j.n))
}

// Head is the newest header of a journal.
type Head struct{ ondisk.LogHeader }

// Clean tells that nothing has to be replayed.
func (h Head) Clean() bool { return h.Flags&ondisk.LHUnmount != 0 }

const scanBytes = 1 << 20

// Head finds the newest header by reading the whole journal: every block that
// carries valid checksums counts, whatever the others hold.
func (j *Journal) Head() (Head, error) {
	g := j.f.Geometry()
	buf := make([]byte, scanBytes)
	var best Head
	found := false
	for _, r := range j.runs {
		for done := uint32(0); done < r.n; {
			k := min(uint32(scanBytes>>g.Shift), r.n-done)
			p := buf[:uint64(k)<<g.Shift]
			if err := j.f.ReadBlocks(p, r.addr+uint64(done)); err != nil {
				return best, fmt.Errorf("journal %d: %w", j.N, err)
			}
			for i := range k {
				b := p[uint64(i)<<g.Shift : uint64(i+1)<<g.Shift]
				// The sequence first: in a journal in use nearly all headers are old.
				if ondisk.TypeOf(b) != ondisk.TypeLH || found && be.Uint64(b[24:]) <= best.Sequence {
					continue
				}
				if !ondisk.LogHeaderOK(b, r.jblk+done+i) {
					continue
				}
				if err := best.Decode(b); err != nil {
					return best, err
				}
				found = true
			}
			done += k
		}
	}
	if !found {
		return best, fmt.Errorf("journal %d: %w", j.N, ErrNoHead)
	}
	return best, nil
}

// Stats is what a replay did.
type Stats struct {
	Found    int // journaled blocks in the log
	Replayed int // blocks written
	Revoked  int // blocks that a later revoke forbids
	Revokes  int
}

// Replay gives every block that the log holds, and that no later revoke forbids,
// to apply, oldest first. It does not write the journal. data is valid during
// the call.
func (j *Journal) Replay(h Head, apply func(addr uint64, data []byte) error) (Stats, error) {
	var st Stats
	if h.Tail >= j.n || h.Blkno >= j.n {
		return st, fmt.Errorf("journal %d: %w: tail %d, head %d of %d blocks", j.N, ErrBroken, h.Tail, h.Blkno, j.n)
	}
	g := j.f.Geometry()
	// Positions count from the tail, so that the wrap is not seen below.
	revoked := map[uint64]uint32{}
	err := j.each(h, func(pos uint32, b []byte, ld *ondisk.LogDescriptor) error {
		if ld.LDType != ondisk.LDRevoke {
			return nil
		}
		list := make([]uint64, 0, min(ld.Data1, 1<<16))
		for i := uint32(0); i < ld.Length; i++ {
			if i > 0 {
				var err error
				if b, err = j.read(j.next(h.Tail, pos+i)); err != nil {
					return err
				}
				if err := ondisk.CheckMeta(b, ondisk.TypeLB); err != nil {
					return fmt.Errorf("%w: journal block %d: %w", ErrBroken, j.next(h.Tail, pos+i), err)
				}
			}
			list = g.Revokes(list, b, int(i), int(ld.Data1))
		}
		for _, a := range list {
			revoked[a] = pos
			st.Revokes++
		}
		return nil
	})
	if err != nil {
		return st, err
	}
	err = j.each(h, func(pos uint32, b []byte, ld *ondisk.LogDescriptor) error {
		if ld.LDType != ondisk.LDMetadata && ld.LDType != ondisk.LDJdata {
			return nil
		}
		list, err := g.LogEntries(b)
		if err != nil {
			return fmt.Errorf("%w: journal block %d: %w", ErrBroken, j.next(h.Tail, pos), err)
		}
		for i, e := range list {
			st.Found++
			at := pos + 1 + uint32(i)
			if r, ok := revoked[e.Block]; ok && at < r {
				st.Revoked++
				continue
			}
			d, err := j.read(j.next(h.Tail, at))
			if err != nil {
				return err
			}
			if e.Escaped {
				ondisk.Unescape(d)
			}
			if ld.LDType == ondisk.LDMetadata && be.Uint32(d) != ondisk.Magic {
				return fmt.Errorf("%w: journal block %d for block %d: %w", ErrBroken, j.next(h.Tail, at), e.Block, ondisk.ErrMagic)
			}
			if e.Block <= g.SBBlock() || e.Block >= j.f.Blocks() {
				return fmt.Errorf("%w: journal block %d is for block %d", ErrBroken, j.next(h.Tail, at), e.Block)
			}
			if err := apply(e.Block, d); err != nil {
				return err
			}
			st.Replayed++
		}
		return nil
	})
	return st, err
}

// each calls f for every descriptor between tail and head.
func (j *Journal) each(h Head, f func(pos uint32, b []byte, ld *ondisk.LogDescriptor) error) error {
	end := uint32((uint64(h.Blkno) + uint64(j.n) - uint64(h.Tail)) % uint64(j.n))
	for pos := uint32(0); pos < end; {
		at := j.next(h.Tail, pos)
		b, err := j.read(at)
		if err != nil {
			return err
		}
		switch ondisk.TypeOf(b) {
		case ondisk.TypeLH:
			if !ondisk.LogHeaderOK(b, at) {
				return fmt.Errorf("journal %d: %w: header in block %d is damaged", j.N, ErrBroken, at)
			}
			pos++
		case ondisk.TypeLD:
			var ld ondisk.LogDescriptor
			if err := ld.Decode(b); err != nil {
				return err
			}
			if ld.Length == 0 || ld.Length > end-pos {
				return fmt.Errorf("journal %d: %w: descriptor in block %d has length %d, %d blocks before the head", j.N, ErrBroken, at, ld.Length, end-pos)
			}
			if err := f(pos, b, &ld); err != nil {
				return fmt.Errorf("journal %d: %w", j.N, err)
			}
			pos += ld.Length
		default:
			return fmt.Errorf("journal %d: %w: block %d is neither header nor descriptor", j.N, ErrBroken, at)
		}
	}
	return nil
}

// read reads a journal block past the cache; the slice is the caller's.
func (j *Journal) read(b uint32) ([]byte, error) {
	p := make([]byte, j.f.Geometry().BlockSize)
	return p, j.f.ReadBlocks(p, j.Addr(b))
}

// header writes a log header as journal block b.
func (j *Journal) header(dev Device, seq uint64, b, tail, flags uint32) (Head, error) {
	p := make([]byte, j.f.Geometry().BlockSize)
	h := Head{ondisk.LogHeader{
		MetaHeader: ondisk.Meta(ondisk.TypeLH), Sequence: seq, Flags: flags, Tail: tail, Blkno: b,
		Addr: j.Addr(b), Jinode: j.ip.Num.Addr,
	}}
	if err := h.Encode(p); err != nil {
		return h, err
	}
	ondisk.SealLogHeader(p)
	if err := h.Decode(p); err != nil {
		return h, err
	}
	return h, put(dev, j.f.Geometry(), h.Addr, p)
}

// MarkClean writes the header that says that everything before it is in place.
// The caller has flushed that.
func (j *Journal) MarkClean(dev Device, h Head, flags uint32) (Head, error) {
	b := j.next(h.Blkno, 1)
	nh, err := j.header(dev, h.Sequence+1, b, b, flags|ondisk.LHUnmount|ondisk.LHUserspace)
	if err == nil {
		err = dev.Flush()
	}
	if err != nil {
		return h, fmt.Errorf("mark journal %d clean: %w", j.N, err)
	}
	return nh, nil
}

// Reset writes a fresh, clean header into every block, as mkfs does. It is for
// journals whose content is lost.
func (j *Journal) Reset(dev Device) error {
	g := j.f.Geometry()
	buf := make([]byte, 0, scanBytes)
	for _, r := range j.runs {
		for done := uint32(0); done < r.n; {
			k := min(uint32(scanBytes>>g.Shift), r.n-done)
			buf = buf[:uint64(k)<<g.Shift]
			for i := range k {
				FormatBlock(buf[uint64(i)<<g.Shift:uint64(i+1)<<g.Shift], j.ip.Num.Addr, r.addr+uint64(done+i), r.jblk+done+i, uint64(r.jblk+done+i))
			}
			if err := put(dev, g, r.addr+uint64(done), buf); err != nil {
				return fmt.Errorf("reset journal %d: %w", j.N, err)
			}
			done += k
		}
	}
	return dev.Flush()
}

// FormatBlock fills a block of a new journal: a header that says that the
// journal was left clean. Every block carries one, so that the head can be
// found by bisection wherever it is looked for.
func FormatBlock(b []byte, jinode, addr uint64, blkno uint32, seq uint64) {
	clear(b)
	ondisk.PutMeta(b, ondisk.TypeLH)
	be.PutUint64(b[24:], seq)
	be.PutUint32(b[32:], ondisk.LHUnmount|ondisk.LHUserspace)
	be.PutUint32(b[40:], blkno)
	be.PutUint64(b[64:], addr)
	be.PutUint64(b[72:], jinode)
	ondisk.SealLogHeader(b)
}

func put(dev Device, g ondisk.Geometry, addr uint64, p []byte) error {
	if _, err := dev.WriteAt(p, int64(addr<<g.Shift)); err != nil {
		return fmt.Errorf("write block %d: %w", addr, err)
	}
	return nil
}

// Recover replays journal n of the filesystem on dev if it is dirty, folds the
// statfs changes of its head into the master statfs file, and marks it clean.
// A crash at any point leaves a journal that Recover replays again, to the same
// result: the fold is a transaction of its own, whose header carries no more
// local changes.
func Recover(dev Device, f *fs.FS, n int) (Stats, bool, error) {
	j, err := Open(f, n)
	if err != nil {
		return Stats{}, false, err
	}
	h, err := j.Head()
	if err != nil || h.Clean() {
		return Stats{}, false, err
	}
	g := f.Geometry()
	st, err := j.Replay(h, func(addr uint64, d []byte) error { return put(dev, g, addr, d) })
	if err != nil {
		return st, true, err
	}
	if err := dev.Flush(); err != nil {
		return st, true, fmt.Errorf("flush after replay of journal %d: %w", n, err)
	}
	f.Drop()
	fold, err := foldStatfs(f, n, h)
	if err != nil {
		return st, true, fmt.Errorf("journal %d: fold statfs: %w", n, err)
	}
	if len(fold) > 0 {
		switch nh, err := j.commit(dev, h, fold); {
		case err == nil:
			h = nh
		case !errors.Is(err, ErrTooBig):
			return st, true, err
			// A log without room for two blocks: as the kernel does, without the
			// transaction.
		}
		if err := putAll(dev, g, fold); err != nil {
			return st, true, err
		}
		if err := dev.Flush(); err != nil {
			return st, true, fmt.Errorf("flush after replay of journal %d: %w", n, err)
		}
	}
	_, err = j.MarkClean(dev, h, ondisk.LHRecovery)
	f.Drop()
	return st, true, err
}

// foldStatfs returns the changed blocks: the head's local counters added to the
// master file, the node's own file zero.
func foldStatfs(f *fs.FS, n int, h Head) ([]fs.Change, error) {
	if h.LocalTotal == 0 && h.LocalFree == 0 && h.LocalDinodes == 0 {
		return nil, nil
	}
	edit := func(path []string, change func(sc *ondisk.StatfsChange)) (fs.Change, error) {
		ip, err := f.System(path...)
		if err != nil {
			return fs.Change{}, err
		}
		b, err := f.Block(ip.Num.Addr)
		if err != nil {
			return fs.Change{}, err
		}
		if !ip.Stuffed() || ip.Size < ondisk.StatfsChangeSize {
			return fs.Change{}, fmt.Errorf("%w: %s of %d bytes", fs.ErrCorrupt, path[len(path)-1], ip.Size)
		}
		p := append([]byte(nil), b...)
		var sc ondisk.StatfsChange
		if err := sc.Decode(p[ondisk.DinodeSize:]); err != nil {
			return fs.Change{}, err
		}
		change(&sc)
		return fs.Change{Addr: ip.Num.Addr, Data: p}, sc.Encode(p[ondisk.DinodeSize:])
	}
	master, err := edit([]string{"statfs"}, func(sc *ondisk.StatfsChange) {
		sc.Total += h.LocalTotal
		sc.Free += h.LocalFree
		sc.Dinodes += h.LocalDinodes
	})
	if err != nil {
		return nil, err
	}
	local, err := edit([]string{"per_node", "statfs_change" + strconv.Itoa(n)}, func(sc *ondisk.StatfsChange) { *sc = ondisk.StatfsChange{} })
	if err != nil {
		return nil, err
	}
	return []fs.Change{master, local}, nil
}

// RecoverAll recovers every dirty journal and returns how many there were.
func RecoverAll(dev Device, f *fs.FS) (int, error) {
	n, err := f.Journals()
	if err != nil {
		return 0, err
	}
	dirty := 0
	for i := range n {
		_, was, err := Recover(dev, f, i)
		if err != nil {
			return dirty, err
		}
		if was {
			dirty++
		}
	}
	return dirty, nil
}

// Commit puts the changes of tx on disk: first the blocks that nothing refers
// to yet, then the others through journal n, which must be clean. After a crash
// at any point the filesystem is either as before or, once the journal has been
// replayed, as after.
func Commit(dev Device, tx *fs.Tx, n int) error {
	f := tx.FS
	g := f.Geometry()
	j, err := Open(f, n)
	if err != nil {
		return err
	}
	h, err := j.Head()
	if err != nil {
		return err
	}
	if !h.Clean() {
		return fmt.Errorf("journal %d: %w", n, ErrUnclean)
	}
	fresh, changed := tx.Fresh(), tx.Changed()
	if err := putAll(dev, g, fresh); err != nil {
		return err
	}
	if len(changed) == 0 {
		return dev.Flush()
	}
	nh, err := j.commit(dev, h, changed)
	if err != nil {
		return err
	}
	if err := putAll(dev, g, changed); err != nil {
		return err
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	_, err = j.MarkClean(dev, nh, 0)
	f.Drop()
	return err
}

// commit writes changes into the log behind head h, and a header that makes them
// count. The log before h stays whole until then. One flush serves the log and
// whatever was written before: the header makes both count.
func (j *Journal) commit(dev Device, h Head, cs []fs.Change) (Head, error) {
	first := j.next(h.Blkno, 1)
	room := j.n - 1
	if !h.Clean() {
		room -= uint32((uint64(h.Blkno) + uint64(j.n) - uint64(h.Tail)) % uint64(j.n))
	}
	at, err := j.writeLog(dev, first, room, cs)
	if err != nil {
		return h, err
	}
	if err := dev.Flush(); err != nil {
		return h, fmt.Errorf("flush journal %d: %w", j.N, err)
	}
	nh, err := j.header(dev, h.Sequence+1, at, first, ondisk.LHUserspace)
	if err == nil {
		err = dev.Flush()
	}
	if err != nil {
		return h, fmt.Errorf("commit in journal %d: %w", j.N, err)
	}
	return nh, nil
}

// putAll writes changes, adjacent blocks together.
func putAll(dev Device, g ondisk.Geometry, cs []fs.Change) error {
	for i := 0; i < len(cs); {
		k := i + 1
		for k < len(cs) && cs[k].Addr == cs[k-1].Addr+1 && (k-i)<<g.Shift < scanBytes {
			k++
		}
		p := cs[i].Data
		if k > i+1 {
			p = make([]byte, 0, (k-i)<<g.Shift)
			for _, c := range cs[i:k] {
				p = append(p, c.Data...)
			}
		}
		if err := put(dev, g, cs[i].Addr, p); err != nil {
			return err
		}
		i = k
	}
	return nil
}

// writeLog writes descriptors and blocks into at most room journal blocks from
// at on, and returns the block after them. Two blocks of the room are kept for
// the commit header and the clean one.
func (j *Journal) writeLog(dev Device, at, room uint32, cs []fs.Change) (uint32, error) {
	g := j.f.Geometry()
	var meta, data []fs.Change
	for _, c := range cs {
		if be.Uint32(c.Data) == ondisk.Magic {
			meta = append(meta, c)
		} else {
			data = append(data, c)
		}
	}
	need := uint32(2 + len(meta) + len(data))
	need += uint32((len(meta)+g.LDPerBlock(ondisk.LDMetadata)-1)/g.LDPerBlock(ondisk.LDMetadata) + (len(data)+g.LDPerBlock(ondisk.LDJdata)-1)/g.LDPerBlock(ondisk.LDJdata))
	if need > room {
		return at, fmt.Errorf("journal %d: %w: %d blocks, room for %d", j.N, ErrTooBig, need, room)
	}
	write := func(p []byte) error {
		err := put(dev, g, j.Addr(at), p)
		at = j.next(at, 1)
		return err
	}
	for _, part := range []struct {
		typ  uint32
		list []fs.Change
	}{{ondisk.LDMetadata, meta}, {ondisk.LDJdata, data}} {
		per := g.LDPerBlock(part.typ)
		for len(part.list) > 0 {
			k := min(per, len(part.list))
			b := make([]byte, g.BlockSize)
			ld := ondisk.LogDescriptor{MetaHeader: ondisk.Meta(ondisk.TypeLD), LDType: part.typ, Length: uint32(k + 1), Data1: uint32(k)}
			if err := ld.Encode(b); err != nil {
				return at, err
			}
			for i, c := range part.list[:k] {
				if part.typ == ondisk.LDMetadata {
					be.PutUint64(b[ondisk.LogDescriptorSize+8*i:], c.Addr)
				} else {
					be.PutUint64(b[ondisk.LogDescriptorSize+16*i:], c.Addr)
				}
			}
			if err := write(b); err != nil {
				return at, err
			}
			for _, c := range part.list[:k] {
				if err := write(c.Data); err != nil {
					return at, err
				}
			}
			part.list = part.list[k:]
		}
	}
	return at, nil
}
