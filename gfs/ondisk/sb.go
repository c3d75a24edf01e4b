package ondisk

import (
	"bytes"
	"errors"
	"fmt"
)

// Errors of CheckSuperblock; callers branch on them.
var (
	ErrGFS1      = errors.New("this is a GFS1 filesystem: use gfs2_convert first")
	ErrNewFormat = errors.New("filesystem format is newer than this program")
	ErrSB        = errors.New("superblock is damaged")
)

// ReadSuperblock decodes and judges the superblock in b, which starts at byte
// SBOffset of the device. ErrMagic and ErrType mean that there is none.
func ReadSuperblock(b []byte) (Superblock, Geometry, error) {
	var sb Superblock
	var g Geometry
	if err := CheckMeta(b, TypeSB); err != nil {
		return sb, g, err
	}
	if err := sb.Decode(b); err != nil {
		return sb, g, err
	}
	switch {
	case sb.FSFormat == FormatFS1:
		return sb, g, ErrGFS1
	case sb.FSFormat < Format1801 || sb.FSFormat >= 1900:
		return sb, g, fmt.Errorf("%w: format %d", ErrSB, sb.FSFormat)
	case sb.FSFormat > Format1802:
		return sb, g, fmt.Errorf("%w: format %d, newest known is %d", ErrNewFormat, sb.FSFormat, Format1802)
	case sb.MultihostFormat != FormatMulti:
		return sb, g, fmt.Errorf("%w: multihost format %d", ErrSB, sb.MultihostFormat)
	}
	g, err := NewGeometry(int(sb.BlockSize))
	if err != nil {
		return sb, g, fmt.Errorf("%w: %w", ErrSB, err)
	}
	if sb.BlockShift != uint32(g.Shift) {
		return sb, g, fmt.Errorf("%w: shift %d for blocks of %d bytes", ErrSB, sb.BlockShift, sb.BlockSize)
	}
	return sb, g, nil
}

// CString is a NUL-terminated field as text.
func CString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// FormatUUID is the usual text form.
func FormatUUID(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
