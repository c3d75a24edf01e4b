// Package block is what a logical unit stands on: a flat array of bytes with
// explicit durability. It holds the Device interface, its capabilities and its
// errors; the stores are sub-packages (file, mem, nbd, replica) and every one
// of them passes the suite of block/blocktest.
//
// It knows neither SCSI nor the cluster. Storage row: it may import scsi,
// iscsi, config and internal only.
package block

import (
	"context"
	"errors"
	"fmt"
)

// Device is a block device. All offsets and lengths are bytes and multiples of
// BlockSize; anything else is ErrMisaligned. A range outside [0, Size) is
// ErrOutOfRange and nothing of it is done.
//
// Calls may overlap. Overlapping ranges are ordered by the caller (the target's
// range lock); a device may tear overlapping concurrent writes at BlockSize.
// Byte slices belong to the caller again when the call returns.
//
// A nil error of WriteAt, Unmap and WriteZeroes means: visible to every later
// read. It means durable only with FUA, or after a later Flush that returned
// nil. A flush that failed once fails for ever (ErrFlushFailed): Linux may have
// marked the lost pages clean, so a retry that returns 0 proves nothing.
//
// After ctx ends a call may still be running in the kernel: Device does not
// return before the I/O that it issued has ended, so that a drain is a drain.
type Device interface {
	Info() Info
	// ReadAt fills p from off.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt writes p at off; with FUA it is durable when the call returns nil.
	WriteAt(ctx context.Context, p []byte, off int64, fl Flags) error
	// Flush makes every write that returned before the call durable.
	Flush(ctx context.Context) error
	// Unmap deallocates the range; later reads return zeroes where
	// Caps.UnmapZeroes, and anything stable otherwise.
	Unmap(ctx context.Context, off, n int64) error
	// WriteZeroes makes the range read as zeroes. With MayUnmap it may
	// deallocate, without it the range stays allocated.
	WriteZeroes(ctx context.Context, off, n int64, fl Flags) error
	// Extents describes [off, off+n) as adjacent runs, in order, without gaps.
	// The first starts at off and the last ends at off+n.
	Extents(ctx context.Context, off, n int64) ([]Extent, error)
	// Close releases the device after every call in flight has returned. It
	// flushes; the error is the flush's.
	Close() error
}

// Flags of a write.
type Flags uint8

// The numbers travel in the replica protocol; they are only ever appended.
const (
	FUA      Flags = 1 << iota // durable before return
	MayUnmap                   // WriteZeroes may deallocate
)

// Info is what a device is. All fields are constant until a resize.
type Info struct {
	Size      int64 // bytes, a multiple of BlockSize
	BlockSize int   // logical block in bytes: 512 or 4096
	PhysBlock int   // physical block in bytes, >= BlockSize: writes of this size and alignment are cheap
	MaxUnmap  int64 // bytes in one Unmap, 0 = no limit
	Caps      Caps
}

// Caps are properties of a store.
type Caps struct {
	Thin        bool // Unmap deallocates
	UnmapZeroes bool // unmapped blocks read as zeroes (LBPRZ)
	WriteCache  bool // writes without FUA may be lost at power loss before Flush (WCE)
	ReadOnly    bool
	// Fences tells that the store itself refuses writes of an older epoch
	// (replica). Without it a volume moves only on evidence that the former
	// writer is dead (SAFETY r9, "stores without epochs").
	Fences bool
}

// Extent is a run of blocks in one state.
type Extent struct {
	Off, Len int64
	Mapped   bool
}

// Errors of devices. Callers branch on them with errors.Is; the SCSI layer maps
// them to sense data (target/sense.go).
var (
	ErrOutOfRange  = errors.New("range outside the device")
	ErrMisaligned  = errors.New("offset or length is not a multiple of the block size")
	ErrNoSpace     = errors.New("no space left on the backing store")         // 07/27/07
	ErrReadOnly    = errors.New("device is read-only")                        // 07/27/00
	ErrMedium      = errors.New("medium error")                               // 03/11/00, 03/0C/00
	ErrChecksum    = fmt.Errorf("%w: checksum does not match", ErrMedium)     // 03/11/00
	ErrFlushFailed = fmt.Errorf("%w: an earlier flush failed", ErrMedium)     // 03/0C/00, sticky
	ErrClosed      = errors.New("device is closed")                           // 02/04/0C
	ErrFenced      = errors.New("epoch of the writer is older than promised") // session reset
	// ErrUnreachable: the backend does not answer now and may later. Nothing that
	// was acknowledged is in doubt.
	ErrUnreachable = errors.New("the backing store does not answer") // 02/04/0C
)

// Failer is a device that can be lost for good while it is open: after a failed
// flush, or when the connection to its backend broke with acknowledged writes
// unflushed. Failed is nil until then; it never becomes nil again.
type Failer interface{ Failed() error }

// Wrapper is a device on top of another.
type Wrapper interface{ Inner() Device }

// Failed asks d, or the first device under it that can tell.
func Failed(d Device) error {
	for d != nil {
		if f, ok := d.(Failer); ok {
			return f.Failed()
		}
		w, ok := d.(Wrapper)
		if !ok {
			return nil
		}
		d = w.Inner()
	}
	return nil
}

// Check returns ErrMisaligned or ErrOutOfRange for a range that i does not hold.
func (i Info) Check(off, n int64) error {
	bs := int64(i.BlockSize)
	switch {
	case off < 0 || n < 0 || off > i.Size || n > i.Size-off:
		return fmt.Errorf("%w: [%d,+%d) of %d", ErrOutOfRange, off, n, i.Size)
	case off%bs != 0 || n%bs != 0:
		return fmt.Errorf("%w: [%d,+%d), block %d", ErrMisaligned, off, n, bs)
	}
	return nil
}
