// Package atomic gives a store writes that a loss of power leaves whole or
// undone (SBC-4 4.29, atomic writes), by an undo journal on a second store: what
// a range held is made durable in the journal before the range is overwritten,
// and put back when the write did not end.
//
// A store alone promises that no more than for one of its blocks. The price is
// three durable writes for one; only WRITE ATOMIC pays it.
//
// It is not a general journal: ordinary writes pass by it, and the caller keeps
// overlapping writes apart (block.Device). Storage row: it imports block only.
package atomic

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	syncatomic "sync/atomic"

	"github.com/blockhouse-san/blockhouse/block"
)

// The journal holds one write. Frozen: format 1.
//
//	byte 0  magic "BHATOM\x00\x01"    8  crc32c of bytes 12 to 4096+length
//	    12  0                        16  id(16), of the store that it belongs to
//	    32  offset(8)                40  length(8)
//	  4096  what [offset, +length) of the store held
//
// Anything else, a record of zeroes too, is no record. Numbers are big endian.
const (
	header = 4096
	// Longest is the longest atomic write in bytes.
	Longest = 1 << 20
	// JournalSize is the size in bytes that a journal needs.
	JournalSize = header + Longest
)

var (
	none       = block.Alloc(header) // what is no record
	magic      = [8]byte{'B', 'H', 'A', 'T', 'O', 'M', 0, 1}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// ErrForeign tells that a journal holds a record of another store.
var ErrForeign = errors.New("the journal belongs to another store")

// records are buffers of a record: a volume whose initiators write nothing
// atomically has none.
var records = sync.Pool{New: func() any {
	b := block.Alloc(JournalSize)
	return &b
}}

// Device is a store with its journal. It implements block.AtomicWriter.
type Device struct {
	block.Device
	journal block.Device
	id      [16]byte

	mu sync.Mutex // one atomic write at a time

	// broken: a record that must not be undone may lie in the journal, so nothing
	// more may be written.
	broken syncatomic.Pointer[error]

	undoneOff, undoneLen int64 // at Open
}

// Format makes a journal empty, durably. It gives the record's header its room on
// a sparse file, so that a full disk does not keep a record from being forgotten.
func Format(ctx context.Context, journal block.Device) error {
	if err := journal.WriteAt(ctx, none, 0, block.FUA); err != nil {
		return fmt.Errorf("make a journal of atomic writes: %w", err)
	}
	return nil
}

// Open joins a store and its journal, which it undoes a write from that did not
// end. Both are closed by Close; after an error by the caller.
func Open(ctx context.Context, dev, journal block.Device, id [16]byte) (*Device, error) {
	if n := journal.Info().Size; n < JournalSize {
		return nil, fmt.Errorf("open journal of atomic writes: %d bytes, want %d", n, JournalSize)
	}
	d := &Device{Device: dev, journal: journal, id: id}
	if dev.Info().Caps.ReadOnly {
		return d, nil
	}
	if err := d.recover(ctx); err != nil {
		return nil, fmt.Errorf("open journal of atomic writes: %w", err)
	}
	return d, nil
}

func (d *Device) recover(ctx context.Context) error {
	h := block.Alloc(header)
	if err := d.journal.ReadAt(ctx, h, 0); err != nil {
		return err
	}
	if !bytes.Equal(h[:8], magic[:]) {
		return nil
	}
	be := binary.BigEndian
	off, n := int64(be.Uint64(h[32:])), int64(be.Uint64(h[40:]))
	if n <= 0 || n > Longest {
		return d.forget(ctx)
	}
	buf := block.Alloc(int(header + n))
	if err := d.journal.ReadAt(ctx, buf, 0); err != nil {
		return err
	}
	if be.Uint32(h[8:]) != crc32.Checksum(buf[12:], castagnoli) {
		return d.forget(ctx) // torn: the write had not begun
	}
	if !bytes.Equal(h[16:32], d.id[:]) {
		return ErrForeign
	}
	if err := d.restore(ctx, buf[header:], off); err != nil {
		return fmt.Errorf("undo [%d,+%d): %w", off, n, err)
	}
	d.undoneOff, d.undoneLen = off, n
	return d.forget(ctx)
}

// Undone tells the range in bytes of the write that Open undid; a length of 0 if
// there was none.
func (d *Device) Undone() (off, n int64) { return d.undoneOff, d.undoneLen }

// Inner is the store under the journal (block.Wrapper).
func (d *Device) Inner() block.Device { return d.Device }

// Failed is why the store is lost (block.Failer). A journal that cannot be
// written is no reason as long as nothing has to be undone: ordinary writes do
// without it.
func (d *Device) Failed() error {
	if err := d.failed(); err != nil {
		return err
	}
	return block.Failed(d.Device)
}

// forget makes the record none.
func (d *Device) forget(ctx context.Context) error {
	return d.journal.WriteAt(ctx, none, 0, block.FUA)
}

// restore writes what a range held; zeroes become holes again where they can, so
// that it needs no more room than there was.
func (d *Device) restore(ctx context.Context, p []byte, off int64) error {
	bs := d.Info().BlockSize
	zero := func(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }
	for len(p) > 0 {
		n := bs
		z := zero(p[:bs])
		for n < len(p) && zero(p[n:n+bs]) == z {
			n += bs
		}
		var err error
		if z {
			err = d.Device.WriteZeroes(ctx, off, int64(n), block.MayUnmap)
		} else {
			err = d.Device.WriteAt(ctx, p[:n], off, 0)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return d.Device.Flush(ctx)
}

// AtomicLimits are a megabyte and the physical block. A store that is read-only,
// or whose physical block is longer than the journal, has none.
func (d *Device) AtomicLimits() (longest, unit int64) {
	i := d.Info()
	unit = int64(i.PhysBlock)
	if i.Caps.ReadOnly || unit > Longest {
		return 0, 0
	}
	return Longest / unit * unit, unit
}

// WriteAtomic writes p at off, whole or not at all.
func (d *Device) WriteAtomic(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	longest, unit := d.AtomicLimits()
	switch err := d.Info().Check(off, n); {
	case err != nil:
		return fmt.Errorf("atomic write: %w", err)
	case n > longest:
		return fmt.Errorf("atomic write: %w: %d bytes, at most %d", block.ErrOutOfRange, n, longest)
	case unit == 0: // and nothing to write
		return nil
	case off%unit != 0 || n%unit != 0:
		return fmt.Errorf("atomic write: %w: [%d,+%d), unit %d", block.ErrMisaligned, off, n, unit)
	case n == 0:
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.failed(); err != nil {
		return err
	}
	rec := records.Get().(*[]byte)
	defer records.Put(rec)
	buf := *rec
	old := buf[header : header+n]
	if err := d.Device.ReadAt(ctx, old, off); err != nil {
		return fmt.Errorf("atomic write: read what is there: %w", err)
	}
	h, be := buf[:header], binary.BigEndian
	clear(h)
	copy(h, magic[:])
	copy(h[16:], d.id[:])
	be.PutUint64(h[32:], uint64(off))
	be.PutUint64(h[40:], uint64(n))
	be.PutUint32(h[8:], crc32.Checksum(buf[12:header+n], castagnoli))
	if err := d.journal.WriteAt(ctx, buf[:header+n], 0, block.FUA); err != nil {
		// The store is as it was, also when it could take nothing.
		return d.undone(off, nil, fmt.Errorf("atomic write: journal: %w", err))
	}
	// From here on the end comes whatever ctx says: half of it would stay.
	ctx = context.WithoutCancel(ctx)
	if err := d.Device.WriteAt(ctx, p, off, block.FUA); err != nil {
		return d.undone(off, old, fmt.Errorf("atomic write: %w", err))
	}
	if err := d.forget(ctx); err != nil {
		return d.undone(off, old, fmt.Errorf("atomic write: journal: %w", err))
	}
	return nil
}

// undone puts back what a range held, if that is given, and returns cause. When
// that, or the record, cannot be settled, the store takes no more writes until it
// is opened again.
func (d *Device) undone(off int64, old []byte, cause error) error {
	ctx := context.Background()
	var err error
	if len(old) > 0 {
		err = d.restore(ctx, old, off)
	}
	if err == nil {
		err = d.forget(ctx)
	}
	if err != nil {
		cause = errors.Join(cause, fmt.Errorf("undo [%d,+%d): %w", off, len(old), err))
		e := fmt.Errorf("%w: an atomic write could not be undone: %w", block.ErrMedium, err)
		d.broken.CompareAndSwap(nil, &e)
	}
	return cause
}

func (d *Device) failed() error {
	if e := d.broken.Load(); e != nil {
		return *e
	}
	return nil
}

// WriteAt writes to the store.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	if err := d.failed(); err != nil {
		return err
	}
	return d.Device.WriteAt(ctx, p, off, fl)
}

// Unmap unmaps in the store.
func (d *Device) Unmap(ctx context.Context, off, n int64) error {
	if err := d.failed(); err != nil {
		return err
	}
	return d.Device.Unmap(ctx, off, n)
}

// WriteZeroes writes zeroes to the store.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	if err := d.failed(); err != nil {
		return err
	}
	return d.Device.WriteZeroes(ctx, off, n, fl)
}

// Close closes the store and its journal.
func (d *Device) Close() error {
	d.mu.Lock() // the end of an atomic write
	defer d.mu.Unlock()
	return errors.Join(d.Device.Close(), d.journal.Close())
}
