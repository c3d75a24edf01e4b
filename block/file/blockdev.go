package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/block"
)

// discards tells what a block device does with ranges that nobody needs.
type discards struct {
	any    bool // it deallocates
	zeroes bool // by a command that leaves zeroes (write zeroes with unmap)
}

// openDevice completes info from what the kernel says of a block device.
func (s *File) openDevice(info *block.Info, st *syscall.Stat_t) error {
	s.blockDev = true
	var err error
	if info.Size, err = deviceSize(s.fd); err != nil {
		return err
	}
	lbs, err := unix.IoctlGetInt(s.fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("logical block size: %w", err)
	}
	if lbs > info.BlockSize {
		return fmt.Errorf("the device has blocks of %d bytes, larger than the block size %d", lbs, info.BlockSize)
	}
	if pbs, err := unix.IoctlGetInt(s.fd, unix.BLKPBSZGET); err == nil && pbs > info.PhysBlock && pbs&(pbs-1) == 0 && pbs <= 1<<20 {
		info.PhysBlock = pbs
	}
	s.discards = discardsOf("/sys", st.Rdev)
	info.Caps.Thin = s.discards.any && !info.Caps.ReadOnly
	// Without discard Unmap writes zeroes; with it, what is read afterwards is the
	// device's affair unless it has a command for it.
	info.Caps.UnmapZeroes = !s.discards.any || s.discards.zeroes
	return nil
}

// queue reads a limit of a device's request queue; a partition has its disk's.
func queue(sys string, rdev uint64, name string) uint64 {
	dir := filepath.Join(sys, "dev/block", fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)))
	for _, d := range []string{dir, dir + "/.."} {
		if b, err := os.ReadFile(d + "/queue/" + name); err == nil {
			n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
			return n
		}
	}
	return 0
}

func discardsOf(sys string, rdev uint64) discards {
	d := discards{any: queue(sys, rdev, "discard_max_bytes") > 0, zeroes: queue(sys, rdev, "write_zeroes_max_bytes") > 0}
	if d.any && !d.zeroes && queue(sys, rdev, "discard_granularity") == 0 {
		d.any = false
	}
	return d
}

// blkDiscard gives a range back; what it reads as afterwards is open.
func blkDiscard(fd int, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r))); e != 0 {
		return e
	}
	return nil
}

// inUse names who holds a block device that cannot be opened exclusively:
// mounts, swap, devices on top of it, another store.
func inUse(path string) error {
	why := users("/", path)
	if f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_CLOEXEC, 0); err == nil {
		if h := holder(f); h != "" {
			why = append(why, "as a store"+h)
		}
		_ = f.Close()
	}
	if len(why) == 0 {
		return fmt.Errorf("%w, by whom the kernel does not tell: look at lsblk %s", ErrInUse, path)
	}
	return fmt.Errorf("%w: %s; free it first", ErrInUse, strings.Join(why, ", "))
}

// users reads /proc and /sys below root.
func users(root, path string) []string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return nil
	}
	id := func(rdev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)) }
	dir := filepath.Join(root, "sys/dev/block", id(st.Rdev))
	// The device itself, and its partitions.
	names := map[string]string{id(st.Rdev): path}
	parts, _ := filepath.Glob(dir + "/*/partition")
	dirs := []string{dir}
	for _, p := range parts {
		d := filepath.Dir(p)
		if b, err := os.ReadFile(d + "/dev"); err == nil {
			names[strings.TrimSpace(string(b))] = "/dev/" + filepath.Base(d)
			dirs = append(dirs, d)
		}
	}
	var out []string
	if b, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo")); err == nil {
		for line := range strings.Lines(string(b)) {
			if w := strings.Fields(line); len(w) > 4 && names[w[2]] != "" {
				out = append(out, fmt.Sprintf("%s is mounted on %s", names[w[2]], w[4]))
			}
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, "proc/swaps")); err == nil {
		for line := range strings.Lines(string(b)) {
			w := strings.Fields(line)
			var sw unix.Stat_t
			if len(w) > 1 && w[1] == "partition" && unix.Stat(w[0], &sw) == nil && names[id(sw.Rdev)] != "" {
				out = append(out, names[id(sw.Rdev)]+" is swap")
			}
		}
	}
	for _, d := range dirs {
		hs, _ := filepath.Glob(d + "/holders/*")
		for _, h := range hs {
			n := filepath.Base(h)
			if b, err := os.ReadFile(h + "/dm/name"); err == nil {
				n = "dm device " + strings.TrimSpace(string(b))
			}
			out = append(out, n+" lies on it")
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// unmapDevice deallocates on a block device.
func (s *File) unmapDevice(off, n int64) error {
	if s.discards.zeroes {
		return fallocate(s.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	for {
		if err := blkDiscard(s.fd, off, n); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
