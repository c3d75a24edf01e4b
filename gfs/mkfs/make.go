// Package mkfs makes GFS2 filesystems. For the same input the result has the
// geometry of mkfs.gfs2 3.5: every resource group, inode and pointer block at
// the same place. It differs in how it gets there: the whole of the metadata is
// built in memory (a few blocks, whatever the size), and the device is written
// once, in address order, in large requests; the superblock comes last, after
// a flush, so that an interrupted run leaves no filesystem rather than half of
// one.
//
// Plan decides and does no I/O; Make writes. Neither reads a clock.
package mkfs

import (
	"context"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Device is where a filesystem is made. Offsets and lengths are bytes and
// multiples of 512. WriteAt may be called from several goroutines at once on
// ranges that do not overlap; a nil error of Flush means that every write that
// returned before it is durable.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	Flush() error
}

// Stage is a step of Make.
type Stage int

// The steps come in this order.
const (
	StageJournals Stage = iota
	StageRGs
	StageQuota
	StageSuper
)

// Progress is told how far a stage has come; done == total once at its end.
type Progress func(s Stage, done, total uint64)

// Result is what was made.
type Result struct {
	Layout *Layout
	Super  ondisk.Superblock
	Writes int // write calls
}

const (
	chunk   = 4 << 20 // bytes in one write
	writers = 2       // requests in flight: one would idle while the next is filled
)

// Make writes the filesystem of l to dev and returns when it is durable. After
// an error, or when ctx ends, the device holds no superblock.
func Make(ctx context.Context, dev Device, l *Layout, progress Progress) (Result, error) {
	if progress == nil {
		progress = func(Stage, uint64, uint64) {}
	}
	im, err := build(l)
	if err != nil {
		return Result{}, err
	}
	sb, err := im.superblock()
	if err != nil {
		return Result{}, err
	}
	res := Result{Layout: l}
	if err := res.Super.Decode(sb); err != nil {
		return Result{}, err
	}

	// Whatever was there stops being a filesystem before any of it is touched.
	head := make([]byte, (l.Geom.SBBlock()+1)<<l.Geom.Shift)
	if _, err := dev.WriteAt(head, 0); err != nil {
		return Result{}, fmt.Errorf("clear the old superblock: %w", err)
	}
	if err := dev.Flush(); err != nil {
		return Result{}, fmt.Errorf("clear the old superblock: %w", err)
	}

	w := newBatch(ctx, dev, l.Geom)
	err = im.emit(w, progress)
	if werr := w.close(); werr != nil {
		err = werr // emit only sees that writing has stopped
	}
	if err != nil {
		return Result{}, err
	}
	progress(StageQuota, 1, 1)
	if err := dev.Flush(); err != nil {
		return Result{}, fmt.Errorf("flush: %w", err)
	}
	copy(head[len(head)-len(sb):], sb)
	if _, err := dev.WriteAt(head, 0); err != nil {
		return Result{}, fmt.Errorf("write superblock: %w", err)
	}
	if err := dev.Flush(); err != nil {
		return Result{}, fmt.Errorf("flush superblock: %w", err)
	}
	progress(StageSuper, 1, 1)
	res.Writes = w.writes + 2
	return res, nil
}

// emit gives every block that is in use to w, in address order, together with
// the bitmap blocks and the up to three blocks between resource groups.
func (im *image) emit(w *batch, progress Progress) error {
	l, g := im.l, im.l.Geom
	qc := im.qc
	end := g.SBBlock() + 1
	for i := range l.RGs {
		rg := &l.RGs[i]
		for ; end < rg.Addr; end++ {
			if _, err := w.next(end); err != nil {
				return err
			}
		}
		if err := im.emitBitmap(w, i); err != nil {
			return err
		}
		var jd, je uint64
		seq := uint32(0)
		if rg.Journal >= 0 {
			jd, je = l.journalData(i), l.journalEnd(i)
			if l.Rand != nil {
				seq = l.Rand() % uint32(l.JBlocks)
			}
		}
		for a := rg.Data0; a < rg.Data0+im.used[i]; a++ {
			b, err := w.next(a)
			if err != nil {
				return err
			}
			for len(qc) > 0 && a >= qc[0].start+qc[0].n {
				qc = qc[1:]
			}
			switch {
			case a >= jd && a < je:
				journal.FormatBlock(b, rg.Data0, a, uint32(a-jd), uint64((seq+uint32(a-jd))%uint32(l.JBlocks)))
			case len(qc) > 0 && a >= qc[0].start:
				ondisk.PutMeta(b, ondisk.TypeQC)
			default:
				src, ok := im.blocks[a]
				if !ok {
					return fmt.Errorf("block %d is in use and has no content", a)
				}
				copy(b, src)
			}
		}
		end = rg.Data0 + uint64(rg.Data)
		if rg.Journal >= 0 {
			progress(StageJournals, uint64(rg.Journal)+1, uint64(l.Journals))
		}
		progress(StageRGs, uint64(i)+1, uint64(len(l.RGs)))
	}
	return nil
}

func (im *image) emitBitmap(w *batch, i int) error {
	l, g := im.l, im.l.Geom
	rg := &l.RGs[i]
	used, dinodes := im.used[i], im.dinodes[i]
	hdr := ondisk.Rgrp{
		MetaHeader: ondisk.Meta(ondisk.TypeRG), Free: rg.Data - uint32(used), Dinodes: uint32(len(dinodes)),
		Skip: rg.Skip, Data0: rg.Data0, Data: rg.Data, Bitbytes: rg.Bitbytes,
	}
	di := 0
	for k := range int(rg.Length) {
		b, err := w.next(rg.Addr + uint64(k))
		if err != nil {
			return err
		}
		if k == 0 {
			if err := hdr.Encode(b); err != nil {
				return err
			}
			ondisk.SealRgrp(b)
		} else {
			ondisk.PutMeta(b, ondisk.TypeRB)
		}
		off, n, first := g.BitmapSpan(k, rg.Bitbytes)
		if used <= first {
			continue
		}
		in := min(used-first, uint64(n)*ondisk.NBBY)
		m := b[off : off+n]
		for j := range m[:in/ondisk.NBBY] {
			m[j] = 0x55 // four blocks in use
		}
		for r := uint64(0); r < in%ondisk.NBBY; r++ {
			m[in/ondisk.NBBY] |= 1 << (2 * r)
		}
		for ; di < len(dinodes) && dinodes[di] < first+in; di++ {
			r := dinodes[di] - first
			m[r/ondisk.NBBY] |= 3 << (2 * (r % ondisk.NBBY))
		}
	}
	return nil
}

// batch gathers blocks that follow one another into large writes. The caller
// fills one buffer while the others are being written.
type batch struct {
	dev    Device
	g      ondisk.Geometry
	ctx    context.Context
	eg     *errgroup.Group
	free   chan []byte
	full   chan extent
	cur    []byte // being filled
	start  uint64 // its first block
	writes int
}

type extent struct {
	b   []byte
	off int64
}

func newBatch(ctx context.Context, dev Device, g ondisk.Geometry) *batch {
	w := &batch{dev: dev, g: g, free: make(chan []byte, writers+1), full: make(chan extent)}
	w.eg, w.ctx = errgroup.WithContext(ctx)
	for range writers + 1 {
		w.free <- make([]byte, 0, chunk)
	}
	for range writers {
		w.eg.Go(w.write)
	}
	return w
}

func (w *batch) write() error {
	for e := range w.full {
		if _, err := w.dev.WriteAt(e.b, e.off); err != nil {
			return fmt.Errorf("write %d bytes at block %d: %w", len(e.b), uint64(e.off)>>w.g.Shift, err)
		}
		w.free <- e.b[:0]
	}
	return nil
}

// next returns a zeroed block that will be written at addr. Addresses only rise.
func (w *batch) next(addr uint64) ([]byte, error) {
	bs := w.g.BlockSize
	if w.cur != nil && (len(w.cur)+bs > chunk || w.start+uint64(len(w.cur)/bs) != addr) {
		if err := w.send(); err != nil {
			return nil, err
		}
	}
	if w.cur == nil {
		select {
		case w.cur = <-w.free:
			w.start = addr
		case <-w.ctx.Done():
			return nil, context.Cause(w.ctx)
		}
	}
	n := len(w.cur)
	w.cur = w.cur[:n+bs]
	b := w.cur[n:]
	clear(b)
	return b, nil
}

func (w *batch) send() error {
	e := extent{w.cur, int64(w.start << w.g.Shift)}
	w.cur = nil
	select {
	case w.full <- e:
		w.writes++
		return nil
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	}
}

// close writes what is left and waits for all writes.
func (w *batch) close() error {
	var err error
	if len(w.cur) > 0 {
		err = w.send()
	}
	close(w.full)
	if werr := w.eg.Wait(); werr != nil {
		return werr
	}
	return err
}
