// Package disk opens what a GFS2 filesystem lies on: a file, a block device or
// a block.Device (a LUN of our own initiator), all behind one small interface
// that mkfs, fsck, grow and the other tools take. It also holds the overlay
// that lets fsck -n repair in memory only.
//
// It knows nothing of GFS2.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/block"
)

// Device is random access to bytes with explicit durability. Offsets and
// lengths are multiples of Topology().Logical. Calls may overlap; ranges of
// concurrent writes may not. Flush returning nil makes every write that
// returned before it durable.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Size() int64 // bytes
	Topology() Topology
	Flush() error
	// Discard tells the device that nobody needs the range. ErrNoDiscard
	// means that it cannot; the data is unchanged then.
	Discard(off, n int64) error
	Close() error
}

// Topology is what a device says about its I/O, in bytes; 0 = unknown.
type Topology struct {
	Block             bool // a device, not a file
	Logical, Physical int
	MinIO, OptIO      int
}

// Errors of Open and Discard.
var (
	ErrNoDiscard = errors.New("device does not support discard")
	ErrKind      = errors.New("neither a block device nor a regular file")
	ErrTooSmall  = errors.New("device is too small")
)

// File is a regular file or a block device of the host.
type File struct {
	f    *os.File
	size int64
	topo Topology
}

// Open opens path. For writing, a block device is opened exclusively: one that
// is mounted or held by another driver answers EBUSY.
func Open(path string, write bool) (*File, error) {
	fl := os.O_RDONLY
	if write {
		// O_EXCL without O_CREAT acts on block devices only (open(2)).
		fl = os.O_RDWR | unix.O_EXCL
	}
	f, err := os.OpenFile(path, fl, 0)
	if err != nil {
		return nil, err
	}
	d, err := newFile(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

func newFile(f *os.File) (*File, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	d := &File{f: f, size: st.Size()}
	switch {
	case st.Mode().IsRegular():
		return d, nil
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
	default:
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: ErrKind}
	}
	if d.size, err = f.Seek(0, io.SeekEnd); err != nil {
		return nil, err
	}
	if d.size < 1 {
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: ErrTooSmall}
	}
	fd := int(f.Fd())
	d.topo.Block = true
	// A driver that does not know a value leaves it 0.
	for req, p := range map[uint]*int{
		unix.BLKSSZGET: &d.topo.Logical, unix.BLKPBSZGET: &d.topo.Physical,
		unix.BLKIOMIN: &d.topo.MinIO, unix.BLKIOOPT: &d.topo.OptIO,
	} {
		if n, err := unix.IoctlGetInt(fd, req); err == nil {
			*p = n
		}
	}
	return d, nil
}

func (d *File) ReadAt(p []byte, off int64) (int, error)  { return d.f.ReadAt(p, off) }
func (d *File) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }
func (d *File) Size() int64                              { return d.size }
func (d *File) Topology() Topology                       { return d.topo }
func (d *File) Flush() error                             { return d.f.Sync() }
func (d *File) Close() error                             { return d.f.Close() }

// Discard discards on block devices; files keep their allocation.
func (d *File) Discard(off, n int64) error {
	if !d.topo.Block {
		return ErrNoDiscard
	}
	rng := [2]uint64{uint64(off), uint64(n)}
	return ioctlDiscard(d.f.Fd(), &rng)
}

// LUN adapts a block.Device. The context bounds every call.
type LUN struct {
	ctx context.Context
	d   block.Device
}

// FromBlock wraps d; Close closes it.
func FromBlock(ctx context.Context, d block.Device) *LUN { return &LUN{ctx, d} }

func (l *LUN) ReadAt(p []byte, off int64) (int, error) {
	if off >= l.Size() {
		return 0, io.EOF
	}
	n := min(int64(len(p)), l.Size()-off)
	if err := l.d.ReadAt(l.ctx, p[:n], off); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func (l *LUN) WriteAt(p []byte, off int64) (int, error) {
	if err := l.d.WriteAt(l.ctx, p, off, 0); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (l *LUN) Size() int64  { return l.d.Info().Size }
func (l *LUN) Flush() error { return l.d.Flush(l.ctx) }
func (l *LUN) Close() error { return l.d.Close() }

func (l *LUN) Topology() Topology {
	i := l.d.Info()
	return Topology{Block: true, Logical: i.BlockSize, Physical: i.PhysBlock}
}

func (l *LUN) Discard(off, n int64) error {
	i := l.d.Info()
	if !i.Caps.Thin {
		return ErrNoDiscard
	}
	step := n
	if i.MaxUnmap > 0 {
		step = min(step, i.MaxUnmap)
	}
	for n > 0 {
		k := min(step, n)
		if err := l.d.Unmap(l.ctx, off, k); err != nil {
			return fmt.Errorf("discard %d bytes at %d: %w", k, off, err)
		}
		off, n = off+k, n-k
	}
	return nil
}
