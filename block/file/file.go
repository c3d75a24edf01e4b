// Package file is the store on a regular file or a block device: direct I/O
// where the file system allows it, fdatasync, hole punching, and an exclusive
// lock so that two processes never serve one store.
//
// Storage row: it imports block and x/sys only. It knows neither SCSI nor the
// cluster.
package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/block"
)

// Cache is how the store uses the page cache.
type Cache uint8

// Cache modes.
const (
	// Direct bypasses the page cache (O_DIRECT) where possible and falls back to
	// Buffered with a logged reason. Writes are durable after Flush.
	Direct Cache = iota
	// Sync is Direct with every write durable when it returns (WCE=0).
	Sync
	// Buffered goes through the page cache.
	Buffered
)

func (c Cache) String() string { return [...]string{"direct", "sync", "buffered"}[c%3] }

// ErrInUse tells that another process, or another open of this one, holds the
// store.
var ErrInUse = errors.New("store is in use")

// Options of Create and Open. The zero value is direct I/O on 512-byte blocks.
type Options struct {
	BlockSize int // logical block, 512 or 4096; 0 = 512
	ReadOnly  bool
	Cache     Cache
	Logger    *zap.Logger // nil = none
}

// File is an open store. It implements block.Device.
type File struct {
	f        *os.File
	fd       int
	path     string
	cache    Cache
	direct   bool
	memAlign int
	blockDev bool
	discards discards // of a block device
	log      *zap.Logger
	info     atomic.Pointer[block.Info]
	flushErr atomic.Pointer[error]

	// life is read-locked by every call and locked by Close and Resize.
	life   sync.RWMutex
	closed bool // guarded by life
}

func (o *Options) defaults() error {
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	if o.BlockSize != 512 && o.BlockSize != 4096 {
		return fmt.Errorf("block size %d: want 512 or 4096", o.BlockSize)
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	return nil
}

// Create makes a sparse file of size bytes, a multiple of the block size, and
// opens it. The file and its directory entry are durable when Create returns.
// An existing path is fs.ErrExist.
func Create(path string, size int64, o Options) (*File, error) {
	if err := o.defaults(); err != nil {
		return nil, fmt.Errorf("create store %s: %w", path, err)
	}
	if size <= 0 || size%int64(o.BlockSize) != 0 {
		return nil, fmt.Errorf("create store %s: size %d is not a positive multiple of the block size %d", path, size, o.BlockSize)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create store: %w", err)
	}
	// What was not made whole is removed, so that a later Create can succeed.
	undo := func(err error) (*File, error) {
		_ = f.Close()
		_ = os.Remove(path)
		return nil, fmt.Errorf("create store %s: %w", path, wrap(err))
	}
	if err := f.Truncate(size); err != nil {
		return undo(err)
	}
	if err := f.Sync(); err != nil {
		return undo(err)
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return undo(err)
	}
	if err := f.Close(); err != nil {
		return undo(err)
	}
	return Open(path, o)
}

// SyncDir makes the entries of a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

// Open opens an existing file or block device and locks it. A store that
// another process serves is ErrInUse.
func Open(path string, o Options) (*File, error) {
	if err := o.defaults(); err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	// A block device that is mounted, or a part of another device, is refused by
	// the kernel itself.
	if st, err := os.Stat(path); err == nil && isBlock(st.Mode()) {
		mode |= os.O_EXCL
	}
	f, err := os.OpenFile(path, mode|syscall.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("open store %s: %w", path, inUse(path))
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s, err := open(f, path, o)
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return s, nil
}

func open(f *os.File, path string, o Options) (*File, error) {
	s := &File{f: f, path: path, cache: o.Cache, log: o.Logger.With(zap.String("store", path)), memAlign: 1}
	fd := int(f.Fd()) // blocking mode; regular files never are in the poller
	s.fd = fd
	how := unix.LOCK_EX
	if o.ReadOnly {
		how = unix.LOCK_SH
	}
	if err := unix.Flock(fd, how|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w%s: stop it first", ErrInUse, holder(f))
		}
		return nil, fmt.Errorf("lock: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	info := block.Info{BlockSize: o.BlockSize, PhysBlock: 4096}
	info.Caps = block.Caps{WriteCache: o.Cache != Sync, ReadOnly: o.ReadOnly}
	switch {
	case st.Mode().IsRegular():
		info.Size = st.Size()
		info.Caps.Thin, info.Caps.UnmapZeroes = s.canPunch(info.Size, o.ReadOnly), true
	case isBlock(st.Mode()):
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !ok {
			return nil, fmt.Errorf("stat gives %T", st.Sys())
		}
		if err := s.openDevice(&info, sys); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("neither a regular file nor a block device (%s)", st.Mode().Type())
	}
	if info.Size == 0 || info.Size%int64(o.BlockSize) != 0 {
		return nil, fmt.Errorf("size %d is not a positive multiple of the block size %d", info.Size, o.BlockSize)
	}
	s.info.Store(&info)
	if o.Cache != Buffered {
		if why := s.goDirect(o.BlockSize); why != nil {
			s.log.Warn("direct I/O is not possible, the page cache is used", zap.Error(why))
		}
	}
	return s, nil
}

func isBlock(m fs.FileMode) bool { return m&fs.ModeDevice != 0 && m&fs.ModeCharDevice == 0 }

func deviceSize(fd int) (int64, error) {
	n, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		return 0, fmt.Errorf("size of the device: %w", err)
	}
	return n, nil
}

// holder names the process that has the lock, from /proc/locks.
func holder(f *os.File) string {
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return ""
	}
	key := fmt.Sprintf("%02x:%02x:%d", unix.Major(sys.Dev), unix.Minor(sys.Dev), sys.Ino)
	for line := range strings.Lines(string(locks)) {
		w := strings.Fields(line)
		if len(w) < 6 || w[1] != "FLOCK" || w[5] != key {
			continue
		}
		name, _ := os.ReadFile("/proc/" + w[4] + "/comm")
		return fmt.Sprintf(" by pid %s (%s)", w[4], strings.TrimSpace(string(name)))
	}
	return ""
}

// canPunch asks for a hole behind the end, which changes nothing.
func (s *File) canPunch(size int64, readOnly bool) bool {
	if readOnly {
		return false
	}
	err := unix.Fallocate(s.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, (size+4095)&^4095, 4096)
	if err != nil {
		s.log.Info("the file system does not punch holes: the store is not thin", zap.Error(err))
	}
	return err == nil
}

// goDirect switches the open file to direct I/O, or returns the reason why not.
func (s *File) goDirect(bs int) error {
	off, mem := 0, 0
	var stx unix.Statx_t
	err := unix.Statx(s.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx)
	if err == nil && stx.Mask&unix.STATX_DIOALIGN != 0 {
		off, mem = int(stx.Dio_offset_align), int(stx.Dio_mem_align)
		if off == 0 {
			return errors.New("the file system does not support it for this file")
		}
	}
	if off > bs {
		return fmt.Errorf("it needs offsets of %d bytes, the block size is %d", off, bs)
	}
	fl, err := unix.FcntlInt(uintptr(s.fd), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("get flags: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(s.fd), unix.F_SETFL, fl|unix.O_DIRECT); err != nil {
		return fmt.Errorf("set O_DIRECT: %w", err)
	}
	if mem == 0 {
		mem = max(bs, 512)
	}
	// Kernels before 6.1 do not tell the alignment: one block is read, at an
	// offset of one block, into a buffer aligned to no more than mem.
	probe := block.Alloc(mem + bs)[mem:][:bs]
	at := int64(0)
	if s.Info().Size >= 2*int64(bs) {
		at = int64(bs)
	}
	if _, err := unix.Pread(s.fd, probe, at); err != nil {
		if _, e := unix.FcntlInt(uintptr(s.fd), unix.F_SETFL, fl); e != nil {
			return fmt.Errorf("probe: %w, and O_DIRECT cannot be cleared: %w", err, e)
		}
		return fmt.Errorf("probe with %d bytes: %w", bs, err)
	}
	s.direct, s.memAlign = true, mem
	return nil
}

// Direct tells whether the store bypasses the page cache.
func (s *File) Direct() bool { return s.direct }

// Path is the file's name as it was opened.
func (s *File) Path() string { return s.path }

// Info tells what the store is.
func (s *File) Info() block.Info { return *s.info.Load() }

// wrap makes the errors that callers branch on.
func wrap(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", block.ErrNoSpace, err)
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.ENODATA), errors.Is(err, unix.EBADMSG):
		return fmt.Errorf("%w: %w", block.ErrMedium, err)
	}
	return err
}

func (s *File) fail(op string, off, n int64, err error) error {
	return fmt.Errorf("%s %s [%d,+%d): %w", op, s.path, off, n, wrap(err))
}

// enter begins a call; after nil the caller runs s.life.RUnlock.
func (s *File) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.life.RLock()
	if s.closed {
		s.life.RUnlock()
		return fmt.Errorf("%s: %w", s.path, block.ErrClosed)
	}
	return nil
}

// bounceMax bounds the aligned copy of an unaligned caller's buffer.
const bounceMax = 1 << 20

// each runs f over p, directly where its address suits direct I/O, else in
// aligned pieces. toDev says that f writes.
func (s *File) each(p []byte, off int64, toDev bool, f func(b []byte, off int64) error) error {
	if !s.direct || block.Aligned(p, s.memAlign) {
		return f(p, off)
	}
	bounce := block.Get(min(len(p), bounceMax))
	defer bounce.Free()
	for len(p) > 0 {
		b := bounce.B[:min(len(p), len(bounce.B))]
		if toDev {
			copy(b, p)
		}
		if err := f(b, off); err != nil {
			return err
		}
		if !toDev {
			copy(p, b)
		}
		p, off = p[len(b):], off+int64(len(b))
	}
	return nil
}

// ReadAt fills p from off.
func (s *File) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.life.RUnlock()
	if err := s.Info().Check(off, int64(len(p))); err != nil {
		return err
	}
	err := s.each(p, off, false, func(b []byte, off int64) error {
		for len(b) > 0 {
			n, err := unix.Pread(s.fd, b, off)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil:
				return err
			case n == 0: // shortened behind our back
				return fmt.Errorf("%w: the file ends at %d", block.ErrMedium, off)
			}
			b, off = b[n:], off+int64(n)
		}
		return nil
	})
	if err != nil {
		return s.fail("read", off, int64(len(p)), err)
	}
	return nil
}

// WriteAt writes p at off.
func (s *File) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.life.RUnlock()
	if err := s.writable(off, int64(len(p))); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	if err := s.write(p, off, fl&block.FUA != 0 || s.cache == Sync); err != nil {
		return s.fail("write", off, int64(len(p)), err)
	}
	return nil
}

func (s *File) write(p []byte, off int64, dsync bool) error {
	flags := 0
	if dsync {
		flags = unix.RWF_DSYNC
	}
	err := s.each(p, off, true, func(b []byte, off int64) error {
		for len(b) > 0 {
			n, err := unix.Pwritev2(s.fd, [][]byte{b}, off, flags)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case dsync && flags != 0 && (errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP)):
				flags = 0 // an old kernel: flush afterwards
				continue
			case err != nil:
				if dsync && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
					// The write may have reached the cache and the sync failed:
					// the same doubt as a failed flush.
					return s.flushFailed(err)
				}
				return err
			case n == 0:
				return fmt.Errorf("%w: nothing was written at %d", block.ErrMedium, off)
			}
			b, off = b[n:], off+int64(n)
		}
		return nil
	})
	if err == nil && dsync && flags == 0 {
		return s.flush()
	}
	return err
}

func (s *File) writable(off, n int64) error {
	i := s.Info()
	if i.Caps.ReadOnly {
		return fmt.Errorf("%s: %w", s.path, block.ErrReadOnly)
	}
	if err := i.Check(off, n); err != nil {
		return err
	}
	return s.failed()
}

// Failed is the sticky error of a failed flush (block.Failer).
func (s *File) Failed() error { return s.failed() }

// failed returns the sticky error. A store whose flush failed takes no more
// writes either: they could not be made durable.
func (s *File) failed() error {
	if e := s.flushErr.Load(); e != nil {
		return *e
	}
	return nil
}

func (s *File) flushFailed(err error) error {
	e := fmt.Errorf("%s: %w: %w", s.path, block.ErrFlushFailed, err)
	if s.flushErr.CompareAndSwap(nil, &e) {
		s.log.Error("flush failed: the store accepts no more writes", zap.Error(err))
	}
	return *s.flushErr.Load()
}

func (s *File) flush() error {
	if err := s.failed(); err != nil {
		return err
	}
	for {
		err := fdatasync(s.fd)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return s.flushFailed(err)
		}
		return nil
	}
}

// fdatasync is replaced by the test of the sticky error.
var fdatasync = unix.Fdatasync

// Flush makes every write that returned before durable.
func (s *File) Flush(ctx context.Context) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.life.RUnlock()
	if s.Info().Caps.ReadOnly {
		return nil
	}
	return s.flush()
}

// Unmap punches a hole, or writes zeroes where the file system cannot.
func (s *File) Unmap(ctx context.Context, off, n int64) error {
	return s.zero(ctx, opUnmap, off, n, block.MayUnmap)
}

// WriteZeroes makes the range read as zeroes.
func (s *File) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	return s.zero(ctx, "write zeroes", off, n, fl)
}

const opUnmap = "unmap"

var zeroes = block.Alloc(1 << 20)

func (s *File) zero(ctx context.Context, op string, off, n int64, fl block.Flags) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.life.RUnlock()
	if err := s.writable(off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	var err error
	switch thin := fl&block.MayUnmap != 0 && s.Info().Caps.Thin; {
	case thin && s.blockDev && (s.discards.zeroes || op == opUnmap):
		err = s.unmapDevice(off, n)
		if unsupported(err) && !s.discards.zeroes {
			err = nil // a part of a granule: it stays as it is, which Unmap may
		}
	case thin && !s.blockDev:
		err = fallocate(s.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	default:
		err = fallocate(s.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	for done := int64(0); unsupported(err) && done < n; {
		c := min(n-done, int64(len(zeroes)))
		if e := s.write(zeroes[:c], off+done, false); e != nil {
			return s.fail(op, off, n, e)
		}
		if done += c; done == n {
			err = nil
		}
		if e := ctx.Err(); e != nil && done < n {
			return e
		}
	}
	if err != nil {
		return s.fail(op, off, n, err)
	}
	if fl&block.FUA != 0 || s.cache == Sync {
		return s.flush()
	}
	return nil
}

func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)
}

func fallocate(fd int, mode uint32, off, n int64) error {
	for {
		if err := unix.Fallocate(fd, mode, off, n); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Extents asks SEEK_HOLE and SEEK_DATA.
func (s *File) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	if err := s.enter(ctx); err != nil {
		return nil, err
	}
	defer s.life.RUnlock()
	i := s.Info()
	if err := i.Check(off, n); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, nil
	}
	bs := int64(i.BlockSize)
	var out []block.Extent
	add := func(to int64, mapped bool) {
		if to > off {
			if k := len(out) - 1; k >= 0 && out[k].Mapped == mapped {
				out[k].Len += to - off
			} else {
				out = append(out, block.Extent{Off: off, Len: to - off, Mapped: mapped})
			}
			off = to
		}
	}
	end := off + n
	if s.blockDev {
		add(end, true)
		return out, nil
	}
	for off < end {
		data, err := unix.Seek(s.fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data = end // a hole to the end
		} else if err != nil {
			return nil, s.fail("find data", off, n, err)
		}
		// A block that is partly a hole counts as mapped.
		add(min(data/bs*bs, end), false)
		if off >= end {
			break
		}
		hole, err := unix.Seek(s.fd, max(data, off), unix.SEEK_HOLE)
		if err != nil {
			return nil, s.fail("find hole", off, n, err)
		}
		add(min((hole+bs-1)/bs*bs, end), true)
	}
	return out, nil
}

// Resize grows the store to size bytes durably. Shrinking is refused: what lies
// behind the new end would be lost.
func (s *File) Resize(size int64) error {
	s.life.Lock()
	defer s.life.Unlock()
	i := s.Info()
	switch {
	case s.closed:
		return fmt.Errorf("resize %s: %w", s.path, block.ErrClosed)
	case i.Caps.ReadOnly:
		return fmt.Errorf("resize %s: %w", s.path, block.ErrReadOnly)
	case s.blockDev:
		return fmt.Errorf("resize %s: a block device is resized by its own tools", s.path)
	case size < i.Size || size%int64(i.BlockSize) != 0:
		return fmt.Errorf("resize %s: %w: from %d to %d", s.path, block.ErrMisaligned, i.Size, size)
	}
	if err := s.f.Truncate(size); err != nil {
		return fmt.Errorf("resize: %w", wrap(err))
	}
	if err := s.f.Sync(); err != nil {
		return fmt.Errorf("resize: %w", s.flushFailed(err))
	}
	i.Size = size
	s.info.Store(&i)
	return nil
}

// Close waits for every call in flight, flushes and releases the lock.
func (s *File) Close() error {
	s.life.Lock()
	defer s.life.Unlock()
	if s.closed {
		return fmt.Errorf("close %s: %w", s.path, block.ErrClosed)
	}
	s.closed = true
	var err error
	if !s.Info().Caps.ReadOnly {
		err = s.flush()
	}
	if e := s.f.Close(); err == nil && e != nil {
		err = fmt.Errorf("close store: %w", wrap(e))
	}
	return err
}
