package disk

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

const blkDiscard = 0x1277 // _IO(0x12,119), linux/fs.h

func ioctlDiscard(fd uintptr, rng *[2]uint64) error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, fd, blkDiscard, uintptr(unsafe.Pointer(rng)))
	switch {
	case e == 0:
		return nil
	case errors.Is(e, unix.EOPNOTSUPP), errors.Is(e, unix.ENOTTY), errors.Is(e, unix.EINVAL):
		return ErrNoDiscard
	}
	return e
}
