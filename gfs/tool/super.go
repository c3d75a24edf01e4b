// Package tool reads and tunes GFS2 filesystems on a device or at a mount
// point: the superblock's fields, usage, the system files, and the kernel's
// knobs of a mounted one (sysfs, freeze). cli/gfs prints what it returns.
package tool

import (
	"errors"
	"fmt"
	"io"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Device is a device whose superblock can be changed.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
}

// ErrNoFS is a device without a GFS or GFS2 superblock.
var ErrNoFS = errors.New("Device does not contain a GFS or GFS2 file system")

// ReadSuper reads the superblock as it is: unknown formats and GFS1 included,
// so that they can be shown. ErrNoFS when there is none.
func ReadSuper(dev io.ReaderAt) (ondisk.Superblock, error) {
	var sb ondisk.Superblock
	b := make([]byte, ondisk.BasicBlock)
	n, err := dev.ReadAt(b, ondisk.SBOffset)
	if n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			return sb, ErrNoFS
		}
		return sb, fmt.Errorf("read superblock: %w", err)
	}
	if ondisk.CheckMeta(b, ondisk.TypeSB) != nil {
		return sb, ErrNoFS
	}
	return sb, sb.Decode(b)
}

// EditSuper changes fields of the superblock. It writes one 512 byte sector,
// which a disk writes whole or not at all, and flushes. The filesystem must not
// be mounted: a kernel keeps its own copy and writes it back.
func EditSuper(dev Device, change func(sb *ondisk.Superblock) error) error {
	b := make([]byte, ondisk.BasicBlock)
	if _, err := dev.ReadAt(b, ondisk.SBOffset); err != nil {
		return fmt.Errorf("read superblock: %w", err)
	}
	sb, _, err := ondisk.ReadSuperblock(b)
	if err != nil {
		return fmt.Errorf("superblock: %w", err)
	}
	if err := change(&sb); err != nil {
		return err
	}
	if err := sb.Encode(b); err != nil {
		return err
	}
	if _, err := dev.WriteAt(b, ondisk.SBOffset); err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("flush superblock: %w", err)
	}
	return nil
}

// SetName puts text into a NUL-padded field of the superblock.
func SetName(field *[ondisk.LockNameLen]byte, s string) error {
	if len(s) >= ondisk.LockNameLen {
		return fmt.Errorf("%q is longer than %d bytes", s, ondisk.LockNameLen-1)
	}
	*field = [ondisk.LockNameLen]byte{}
	copy(field[:], s)
	return nil
}
