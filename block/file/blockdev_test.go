package file

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// loop makes a block device of size bytes.
func loop(t *testing.T, size int64) (dev, back string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skip: a loop device needs root")
	}
	testproc.Need(t, "losetup")
	back = filepath.Join(t.TempDir(), "back")
	if err := errors.Join(os.WriteFile(back, nil, 0o600), os.Truncate(back, size)); err != nil {
		t.Fatal(err)
	}
	var out []byte
	var err error
	for range 20 { // somebody else may take the free one first
		if out, err = exec.Command("losetup", "-f", "--show", back).CombinedOutput(); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		testproc.SkipOrFail(t, "no loop device is to be had: "+string(out))
	}
	dev = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v %s", dev, err, out)
		}
	})
	return dev, back
}

// TestBlockDevice: the suite on a device of the kernel.
func TestBlockDevice(t *testing.T) {
	for _, o := range []Options{{}, {Cache: Buffered, BlockSize: 4096}} {
		t.Run(o.Cache.String(), func(t *testing.T) {
			t.Parallel()
			dev, _ := loop(t, 1<<20)
			try := func(tb rapid.TB) *File {
				for k := 0; ; k++ { // udev looks at a device that was written and closed
					d, err := Open(dev, o)
					if err == nil {
						return d
					}
					if k == 100 || !errors.Is(err, ErrInUse) {
						tb.Fatal(err)
					}
					time.Sleep(10 * time.Millisecond)
				}
			}
			blocktest.Run(t, blocktest.Store{
				New: func(tb rapid.TB) block.Device {
					d := try(tb)
					if err := d.WriteZeroes(t.Context(), 0, 1<<20, block.MayUnmap); err != nil {
						tb.Fatal(err)
					}
					return d
				},
				Reopen: func(tb rapid.TB, _ block.Device) block.Device { return try(tb) },
			})
		})
	}
}

// TestDiscard: Unmap of a device gives the space back and leaves zeroes.
func TestDiscard(t *testing.T) {
	t.Parallel()
	dev, back := loop(t, 4<<20)
	d, err := Open(dev, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if c := d.Info().Caps; !c.Thin || !c.UnmapZeroes || c.Fences {
		t.Skipf("skip: the loop device here does not discard: %+v", c)
	}
	used := func() int64 {
		var st unix.Stat_t
		if err := errors.Join(d.Flush(t.Context()), unix.Stat(back, &st)); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	p := bytes.Repeat([]byte{1}, 2<<20)
	if err := d.WriteAt(t.Context(), p, 0, 0); err != nil {
		t.Fatal(err)
	}
	full := used()
	if err := d.Unmap(t.Context(), 1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if left := used(); left > full-900<<10 {
		t.Errorf("%d bytes in use after unmapping 1 MiB of %d", left, full)
	}
	got := make([]byte, 2<<20)
	clear(p[1<<20:])
	if err := d.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, p) {
		t.Error("an unmapped range does not read as zeroes, or its neighbour was touched", err)
	}
	// The other way down, for devices that only discard.
	if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 1<<20), 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	d.discards.zeroes = false
	if err := d.Unmap(t.Context(), 1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if left := used(); left > full-900<<10 {
		t.Errorf("BLKDISCARD: %d bytes in use of %d", left, full)
	}
	if err := d.WriteZeroes(t.Context(), 0, 4096, block.MayUnmap); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadAt(t.Context(), got[:4096], 0); err != nil || !bytes.Equal(got[:4096], make([]byte, 4096)) {
		t.Error("zeroes were asked for, a discard does not promise them", err)
	}
}

// TestDeviceInUse: a device that somebody uses is refused, with who it is.
func TestDeviceInUse(t *testing.T) {
	t.Parallel()
	dev, _ := loop(t, 4<<20)
	d, err := Open(dev, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dev, Options{}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "as a store by pid") {
		t.Errorf("opened twice: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	testproc.Need(t, "mkfs.ext4", "unshare")
	if out, err := exec.Command("mkfs.ext4", "-q", dev).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	mnt := t.TempDir()
	if err := unix.Mount(dev, mnt, "ext4", 0, ""); err != nil {
		t.Skipf("skip: mounting a loop device is not possible here: %v", err)
	}
	defer func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	}()
	if _, err := Open(dev, Options{}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), dev+" is mounted on "+mnt) {
		t.Errorf("opened while mounted: %v", err)
	}
}

// TestDiscardsOf reads the limits of disks and partitions.
func TestDiscardsOf(t *testing.T) {
	t.Parallel()
	sys := t.TempDir()
	put := func(p, v string) {
		p = filepath.Join(sys, p)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o700), os.WriteFile(p, []byte(v+"\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	put("disk/queue/discard_max_bytes", "1024")
	put("disk/queue/discard_granularity", "512")
	put("disk/queue/write_zeroes_max_bytes", "0")
	put("disk/part/partition", "1")
	if err := os.MkdirAll(filepath.Join(sys, "dev/block"), 0o700); err != nil {
		t.Fatal(err)
	}
	for id, to := range map[string]string{"8:0": "disk", "8:1": "disk/part"} {
		if err := os.Symlink(filepath.Join(sys, to), filepath.Join(sys, "dev/block", id)); err != nil {
			t.Fatal(err)
		}
	}
	for minor := range uint32(2) {
		if d := discardsOf(sys, unix.Mkdev(8, minor)); d != (discards{any: true}) {
			t.Errorf("8:%d: %+v", minor, d)
		}
	}
	put("disk/queue/write_zeroes_max_bytes", "4096")
	if d := discardsOf(sys, unix.Mkdev(8, 1)); d != (discards{true, true}) {
		t.Errorf("%+v", d)
	}
	if d := discardsOf(sys, unix.Mkdev(9, 1)); d != (discards{}) {
		t.Errorf("%+v", d)
	}
}
