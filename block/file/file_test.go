package file

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
)

func TestMain(m *testing.M) {
	// Each check syncs a disk many times; `go test -rapid.checks=N` still overrides.
	if err := flag.Set("rapid.checks", "25"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

func fresh(tb rapid.TB, dir string, o Options) *File {
	f, err := os.CreateTemp(dir, "store")
	if err != nil {
		tb.Fatal(err)
	}
	name := f.Name()
	if err := errors.Join(f.Close(), os.Remove(name)); err != nil {
		tb.Fatal(err)
	}
	d, err := Create(name, 1<<20, o)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	for _, o := range []Options{{}, {BlockSize: 4096}, {Cache: Sync, BlockSize: 4096}, {Cache: Buffered}} {
		name := o.Cache.String() + " 512"
		if o.BlockSize == 4096 {
			name = o.Cache.String() + " 4096"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			blocktest.Run(t, blocktest.Store{
				New: func(tb rapid.TB) block.Device { return fresh(tb, dir, o) },
				Reopen: func(tb rapid.TB, d block.Device) block.Device {
					r, err := Open(d.(*File).Path(), o)
					if err != nil {
						tb.Fatal(err)
					}
					return r
				},
			})
		})
	}
}

// TestDirect: either direct I/O is on, or a reason was logged.
func TestDirect(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	d := fresh(t, t.TempDir(), Options{BlockSize: 4096, Logger: zap.New(core)})
	defer d.Close()
	fl, err := unix.FcntlInt(d.f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		t.Fatal(err)
	}
	if on := fl&unix.O_DIRECT != 0; on != d.Direct() || on == (logs.Len() > 0) {
		t.Errorf("O_DIRECT %v, Direct() %v, %d log lines", on, d.Direct(), logs.Len())
	}
	t.Logf("direct I/O: %v, memory alignment %d, log %v", d.Direct(), d.memAlign, logs.All())
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "a")
	for _, size := range []int64{0, -512, 1000} {
		if _, err := Create(p, size, Options{}); err == nil {
			t.Errorf("size %d accepted", size)
		}
	}
	if _, err := Create(p, 4096, Options{BlockSize: 1000}); err == nil {
		t.Error("block size 1000 accepted")
	}
	if _, err := os.Stat(p); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a refused create left a file")
	}
	d, err := Create(p, 4096, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := Create(p, 4096, Options{}); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	if _, err := Create(filepath.Join(dir, "no", "such"), 4096, Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := Open(dir, Options{ReadOnly: true}); err == nil {
		t.Error("a directory was opened")
	}
	odd := filepath.Join(dir, "odd")
	if err := os.WriteFile(odd, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(odd, Options{}); err == nil {
		t.Error("a file of 1000 bytes was opened")
	}
}

func TestLock(t *testing.T) {
	d := fresh(t, t.TempDir(), Options{})
	_, err := Open(d.Path(), Options{})
	if !errors.Is(err, ErrInUse) {
		t.Fatalf("opened twice: %v", err)
	}
	if _, e := os.ReadFile("/proc/locks"); e == nil && !strings.Contains(err.Error(), "pid ") {
		t.Logf("holder is not named: %v", err)
	}
	if _, err := Open(d.Path(), Options{ReadOnly: true}); !errors.Is(err, ErrInUse) {
		t.Errorf("opened for reading while served: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	a, err := Open(d.Path(), Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := Open(d.Path(), Options{ReadOnly: true})
	if err != nil {
		t.Fatal("two readers:", err)
	}
	defer b.Close()
	p := make([]byte, 512)
	for _, err := range []error{a.WriteAt(t.Context(), p, 0, 0), a.Unmap(t.Context(), 0, 512), a.WriteZeroes(t.Context(), 0, 512, 0)} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Error(err)
		}
	}
	if err := a.ReadAt(t.Context(), p, 0); err != nil {
		t.Error(err)
	}
}

// TestThin: a hole gives the space back and reads as zeroes, WriteZeroes
// without MayUnmap keeps it.
func TestThin(t *testing.T) {
	ctx := context.Background()
	d := fresh(t, t.TempDir(), Options{})
	defer d.Close()
	if !d.Info().Caps.Thin {
		t.Skip("skip: the file system of the temporary directory does not punch holes")
	}
	p := bytes.Repeat([]byte{1}, 256<<10)
	if err := errors.Join(d.WriteAt(ctx, p, 0, 0), d.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	mapped := func() (n int64) {
		es, err := d.Extents(ctx, 0, d.Info().Size)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			if e.Mapped {
				n += e.Len
			}
		}
		return n
	}
	full := mapped()
	if full < int64(len(p)) {
		t.Fatalf("%d bytes mapped after writing %d", full, len(p))
	}
	if err := d.Unmap(ctx, 64<<10, 64<<10); err != nil {
		t.Fatal(err)
	}
	if got := mapped(); got != full-64<<10 {
		t.Errorf("%d bytes mapped after unmap, %d before", got, full)
	}
	// A single block inside a file system block: its neighbours keep their data.
	if err := d.Unmap(ctx, 512, 512); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2048)
	if err := d.ReadAt(ctx, got, 0); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1}, 2048)
	clear(want[512:1024])
	if !bytes.Equal(got, want) {
		t.Error("unmap of one block touched its neighbours")
	}
}

func TestResize(t *testing.T) {
	d := fresh(t, t.TempDir(), Options{})
	defer d.Close()
	if err := d.Resize(2 << 20); err != nil || d.Info().Size != 2<<20 {
		t.Fatal(err, d.Info().Size)
	}
	if err := d.WriteAt(t.Context(), make([]byte, 512), 2<<20-512, 0); err != nil {
		t.Error(err)
	}
	if err := d.Resize(1 << 20); err == nil {
		t.Error("shrunk")
	}
}

// TestStickyFlush: one failed fdatasync and nothing is accepted ever again, also
// when the kernel says 0 the next time.
func TestStickyFlush(t *testing.T) {
	ctx := context.Background()
	core, logs := observer.New(zap.ErrorLevel)
	d := fresh(t, t.TempDir(), Options{Logger: zap.New(core)})
	defer func() { fdatasync = unix.Fdatasync }()
	p := make([]byte, 512)
	if err := errors.Join(d.WriteAt(ctx, p, 0, 0), d.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	fdatasync = func(int) error { return unix.EIO }
	if err := d.Flush(ctx); !errors.Is(err, block.ErrFlushFailed) || !errors.Is(err, block.ErrMedium) {
		t.Fatal(err)
	}
	fdatasync = func(int) error { return nil }
	for op, err := range map[string]error{
		"flush": d.Flush(ctx), "write": d.WriteAt(ctx, p, 0, 0), "fua": d.WriteAt(ctx, p, 0, block.FUA),
		"unmap": d.Unmap(ctx, 0, 512), "zeroes": d.WriteZeroes(ctx, 0, 512, 0),
	} {
		if !errors.Is(err, block.ErrFlushFailed) {
			t.Errorf("%s after a failed flush: %v", op, err)
		}
	}
	if err := d.ReadAt(ctx, p, 0); err != nil {
		t.Errorf("read after a failed flush: %v", err)
	}
	if err := d.Close(); !errors.Is(err, block.ErrFlushFailed) {
		t.Errorf("close after a failed flush: %v", err)
	}
	if logs.Len() != 1 {
		t.Errorf("logged %d times", logs.Len())
	}
}

// TestNoSpace fills a file up to the process's file size limit's like: a tmpfs
// of its own needs root, so the error mapping is checked where it happens.
func TestNoSpace(t *testing.T) {
	for _, e := range []error{unix.ENOSPC, unix.EDQUOT} {
		if err := wrap(&fs.PathError{Op: "write", Path: "x", Err: e}); !errors.Is(err, block.ErrNoSpace) || !errors.Is(err, e) {
			t.Error(err)
		}
	}
	if err := wrap(unix.EIO); !errors.Is(err, block.ErrMedium) {
		t.Error(err)
	}
	if f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0); err == nil {
		_, err = f.Write([]byte{1})
		_ = f.Close()
		if !errors.Is(wrap(err), block.ErrNoSpace) {
			t.Errorf("/dev/full: %v", err)
		}
	}
}
