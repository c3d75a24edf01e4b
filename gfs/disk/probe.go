package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
)

// Content is what Probe found on a device.
type Content struct {
	Table bool   // a partition table, not a filesystem
	Type  string // the name that blkid gives it
}

type sign struct {
	off   int64
	magic string
}

// signatures are the marks of what must not be overwritten unasked, in the
// order in which they are believed: a filesystem's before the boot sector mark
// that several of them share with a partition table.
var signatures = []struct {
	name  string
	signs []sign // any of them
}{
	{"gfs2", []sign{{65536, "\x01\x16\x19\x70\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x64\x00\x00\x00\x00\x00\x00\x07"}}},
	{"gfs", []sign{{65536, "\x01\x16\x19\x70\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x64\x00\x00\x00\x00\x00\x00\x05"}}},
	{"xfs", []sign{{0, "XFSB"}}},
	{"btrfs", []sign{{65536 + 64, "_BHRfS_M"}}},
	{"ocfs2", []sign{{1024, "OCFSV2"}, {2048, "OCFSV2"}, {4096, "OCFSV2"}}},
	{"f2fs", []sign{{1024, "\x10\x20\xF5\xF2"}}},
	{"jfs", []sign{{32768, "JFS1"}}},
	{"reiserfs", []sign{{65536 + 52, "ReIsEr"}, {8192 + 52, "ReIsEr"}}},
	{"nilfs2", []sign{{1024 + 6, "\x34\x34"}}},
	{"bcachefs", []sign{{4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"}}},
	{"ntfs", []sign{{3, "NTFS    "}}},
	{"exfat", []sign{{3, "EXFAT   "}}},
	{"vfat", []sign{{0x52, "FAT32   "}, {0x36, "FAT16   "}, {0x36, "FAT12   "}, {0x36, "FAT     "}}},
	{"hfsplus", []sign{{1024, "H+\x00\x04"}, {1024, "HX\x00\x05"}}},
	{"squashfs", []sign{{0, "hsqs"}, {0, "sqsh"}}},
	{"erofs", []sign{{1024, "\xe2\xe1\xf5\xe0"}}},
	{"iso9660", []sign{{32768 + 1, "CD001"}}},
	{"udf", []sign{{32768 + 1, "BEA01"}, {32768 + 1, "NSR02"}, {32768 + 1, "NSR03"}}},
	{"swap", []sign{{4096 - 10, "SWAPSPACE2"}, {4096 - 10, "SWAP-SPACE"}, {8192 - 10, "SWAPSPACE2"}, {65536 - 10, "SWAPSPACE2"}}},
	{"swsuspend", []sign{{4096 - 10, "S1SUSPEND"}, {4096 - 10, "S2SUSPEND"}, {4096 - 10, "ULSUSPEND"}}},
	{"crypto_LUKS", []sign{{0, "LUKS\xba\xbe"}, {0, "SKUL\xba\xbe"}}},
	{"LVM2_member", []sign{{24, "LVM2 001"}, {512 + 24, "LVM2 001"}, {1024 + 24, "LVM2 001"}, {1536 + 24, "LVM2 001"}}},
	{"linux_raid_member", []sign{{0, "\xfc\x4e\x2b\xa9"}, {4096, "\xfc\x4e\x2b\xa9"}}},
	{"ceph_bluestore", []sign{{0, "bluestore block device"}}},
	{"VMFS_volume_member", []sign{{1048576, "\x0d\xd0\x01\xc0"}}},
	{"zfs_member", []sign{{128 << 10, "\x0c\xb1\xba\x00\x00\x00\x00\x00"}, {128 << 10, "\x00\x00\x00\x00\x00\xba\xb1\x0c"}, {132 << 10, "\x0c\xb1\xba\x00\x00\x00\x00\x00"}}},
}

// Probe looks for a filesystem, a volume manager's mark or a partition table.
// A zero Content means that it knows none; the error is the device's.
func Probe(d Device) (Content, error) {
	// Two MiB hold every mark but those at the end of the device.
	head := make([]byte, min(d.Size(), 2<<20)&^511)
	if _, err := d.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return Content{}, err
	}
	if t := probeExt(head); t != "" {
		return Content{Type: t}, nil
	}
	for _, s := range signatures {
		for _, m := range s.signs {
			if hasAt(head, m.off, m.magic) {
				return Content{Type: s.name}, nil
			}
		}
	}
	for _, off := range []int64{512, 4096} {
		if hasAt(head, off, "EFI PART") {
			return Content{Table: true, Type: "gpt"}, nil
		}
	}
	// The backup of a GPT survives a dd over the start of the disk.
	if d.Size() >= 1<<20 {
		tail := make([]byte, 4096)
		if _, err := d.ReadAt(tail, d.Size()&^511-4096); err != nil && !errors.Is(err, io.EOF) {
			return Content{}, err
		}
		if hasAt(tail, 4096-512, "EFI PART") || hasAt(tail, 0, "EFI PART") {
			return Content{Table: true, Type: "gpt"}, nil
		}
	}
	if probeMBR(head) {
		return Content{Table: true, Type: "dos"}, nil
	}
	return Content{}, nil
}

func hasAt(b []byte, off int64, magic string) bool {
	return int64(len(b)) >= off+int64(len(magic)) && string(b[off:off+int64(len(magic))]) == magic
}

// probeExt tells ext2, 3 and 4 apart by the features that only the later ones
// have.
func probeExt(b []byte) string {
	if !hasAt(b, 1024+56, "\x53\xef") {
		return ""
	}
	le := binary.LittleEndian
	compat, incompat, ro := le.Uint32(b[1024+92:]), le.Uint32(b[1024+96:]), le.Uint32(b[1024+100:])
	switch {
	case incompat&0x8 != 0:
		return "jbd" // an external journal
	case incompat&^0x16 != 0 || ro&^0x7 != 0:
		return "ext4"
	case compat&0x4 != 0:
		return "ext3"
	}
	return "ext2"
}

// probeMBR wants the mark and at least one entry that could be a partition: the
// mark alone is on every boot sector.
func probeMBR(b []byte) bool {
	if !hasAt(b, 510, "\x55\xaa") {
		return false
	}
	found := false
	for i := range 4 {
		e := b[446+16*i : 462+16*i]
		if e[0] != 0 && e[0] != 0x80 {
			return false
		}
		if e[4] != 0 && !bytes.Equal(e[12:16], make([]byte, 4)) {
			found = true
		}
	}
	return found
}
