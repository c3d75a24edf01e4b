// Package ondisk is the GFS2 disk format: every structure, its constants and
// checksums, bitmaps, directory blocks, extended attributes and the log. It is
// pure: bytes in, values out, no I/O, no clock, no allocation policy. mkfs,
// fsck, grow, edit, tool and the mounted filesystem share it; nothing in here
// may be changed for the sake of one of them.
//
// All integers on disk are big-endian. Sizes and offsets follow
// include/uapi/linux/gfs2_ondisk.h (Linux 6.1):
//
//	block    one of {superblock, rgrp, rgrp bitmap, dinode, indirect, leaf,
//	         journaled data, log header, log descriptor, log buffer,
//	         EA header, EA data, quota change} with a 24 byte meta header,
//	         or file data without any header
//	64 KiB   superblock, at byte 65536 whatever the block size
//
//	resource group   | rgrp 128 | 2 bits a block ... |  first block
//	                 | meta  24 | 2 bits a block ... |  each following bitmap block
//	                 | data blocks ...               |
//
// The layouts are frozen: they belong to the kernel, not to us.
package ondisk

// Numbers of the format.
const (
	Magic = 0x01161970

	SBOffset    = 65536 // byte address of the superblock
	BasicBlock  = 512
	MinBlock    = 512
	MaxBlock    = 4096 // the kernel's page size on the machines we serve
	FormatFS1   = 1309 // sb_fs_format of GFS1
	FormatMulti = 1900 // sb_multihost_format of GFS2
	Format1801  = 1801
	Format1802  = 1802 // permits EA type 4 and turns rgrplvb on

	LockNameLen = 64
	MaxName     = 255
	NBBY        = 4 // blocks in one bitmap byte
	MaxHeight   = 10
	MaxDepth    = 17 // of a directory's hash table
	InumQuantum = 1048576

	MinRGMB, MaxRGMB           = 32, 2048
	MinJournalMB, MaxJournalMB = 8, 1024
)

// Sizes of the structures in bytes.
const (
	MetaHeaderSize    = 24
	SBSize            = 272
	RindexSize        = 96
	RgrpSize          = 128
	DinodeSize        = 232
	DirentSize        = 40
	LeafSize          = 104
	EAHeaderSize      = 16
	LogHeaderV1Size   = 48
	LogHeaderSize     = 120
	LogDescriptorSize = 72
	QuotaSize         = 88
	QuotaChangeSize   = 16
	StatfsChangeSize  = 24
	InumRangeSize     = 16
	LVBSize           = 32
)

// MetaType is mh_type.
type MetaType uint32

// The metadata types (GFS2_METATYPE_*).
const (
	TypeNone MetaType = iota
	TypeSB
	TypeRG
	TypeRB
	TypeDI
	TypeIN
	TypeLF
	TypeJD
	TypeLH
	TypeLD
	TypeEA
	TypeED
	TypeLB
	typeUnused13
	TypeQC
)

// Format is mh_format and the payload formats of dinodes.
type Format uint32

// The formats (GFS2_FORMAT_*).
const (
	FormatNone Format = 0
	FormatSB   Format = 100
	FormatRG   Format = 200
	FormatRB   Format = 300
	FormatDI   Format = 400
	FormatIN   Format = 500
	FormatLF   Format = 600
	FormatJD   Format = 700
	FormatLH   Format = 800
	FormatLD   Format = 900
	FormatLB   Format = 1000
	FormatRI   Format = 1100 // rindex file
	FormatDE   Format = 1200 // directory entries
	FormatQC   Format = 1400
	FormatQU   Format = 1500 // quota file
	FormatEA   Format = 1600
	FormatED   Format = 1700
)

var metaTypes = [...]struct {
	short, long string
	format      Format
}{
	TypeNone:     {"none", "Clump", FormatNone},
	TypeSB:       {"sb", "Superblock", FormatSB},
	TypeRG:       {"rg", "Resource Group Header", FormatRG},
	TypeRB:       {"rb", "Resource Group Bitmap", FormatRB},
	TypeDI:       {"di", "Dinode", FormatDI},
	TypeIN:       {"in", "Indirect Block", FormatIN},
	TypeLF:       {"lf", "Leaf", FormatLF},
	TypeJD:       {"jd", "Journaled Data", FormatJD},
	TypeLH:       {"lh", "Log Header", FormatLH},
	TypeLD:       {"ld", "Log descriptor", FormatLD},
	TypeEA:       {"ea", "Extended attribute", FormatEA},
	TypeED:       {"ed", "Eattr Data", FormatED},
	TypeLB:       {"lb", "Log Buffer", FormatLB},
	typeUnused13: {"13", "Metatype 13", FormatNone},
	TypeQC:       {"qc", "Quota Change", FormatQC},
}

// Known tells whether t is a type of the format.
func (t MetaType) Known() bool { return t > TypeNone && t <= TypeQC && t != typeUnused13 }

// Format returns the mh_format that goes with t.
func (t MetaType) Format() Format {
	if int(t) < len(metaTypes) {
		return metaTypes[t].format
	}
	return FormatNone
}

// String is the long name as gfs2_edit prints it.
func (t MetaType) String() string {
	if int(t) < len(metaTypes) {
		return metaTypes[t].long
	}
	return "Unknown"
}

// Short is the two-letter name as gfs2_edit's find takes it.
func (t MetaType) Short() string {
	if int(t) < len(metaTypes) {
		return metaTypes[t].short
	}
	return "?"
}

// MetaTypeByShort finds a type by its two-letter name.
func MetaTypeByShort(s string) (MetaType, bool) {
	for i, m := range metaTypes {
		if m.short == s {
			return MetaType(i), true
		}
	}
	return 0, false
}

// Flags of dinodes.
const (
	DIJdata        uint32 = 0x00000001
	DIExhash       uint32 = 0x00000002
	DIUnused       uint32 = 0x00000004
	DIEAIndirect   uint32 = 0x00000008
	DIDirectIO     uint32 = 0x00000010
	DIImmutable    uint32 = 0x00000020
	DIAppendOnly   uint32 = 0x00000040
	DINoAtime      uint32 = 0x00000080
	DISync         uint32 = 0x00000100
	DISystem       uint32 = 0x00000200
	DITopDir       uint32 = 0x00000400
	DITruncInProg  uint32 = 0x20000000
	DIInheritDIO   uint32 = 0x40000000
	DIInheritJdata uint32 = 0x80000000
)

// Flags of resource groups.
const (
	RGJournal uint32 = 0x00000001
	RGMeta    uint32 = 0x00000002
	RGData    uint32 = 0x00000004
	RGTrimmed uint32 = 0x00000008
	RGNoAlloc uint32 = 0x00000008 // gfs2_edit's name of the same bit
)

// Flags of log headers.
const (
	LHUnmount   uint32 = 0x00000001
	LHFlushSeq  uint32 = 0x00000002
	LHRecovery  uint32 = 0x00000020
	LHUserspace uint32 = 0x80000000
)

// Types of log descriptors.
const (
	LDMetadata uint32 = 300
	LDRevoke   uint32 = 301
	LDJdata    uint32 = 302
)

// Types of extended attributes.
const (
	EAUsr      = 1
	EASys      = 2
	EASecurity = 3
	EATrusted  = 4 // needs Format1802

	EAFlagLast = 1
	EAMaxValue = 65536
)

// File modes as stored in di_mode, and the dirent types that go with them.
const (
	ModeMask    = 0o170000
	ModeSocket  = 0o140000
	ModeSymlink = 0o120000
	ModeRegular = 0o100000
	ModeBlock   = 0o060000
	ModeDir     = 0o040000
	ModeChar    = 0o020000
	ModeFIFO    = 0o010000

	DTUnknown = 0
	DTFIFO    = 1
	DTChar    = 2
	DTDir     = 4
	DTBlock   = 6
	DTRegular = 8
	DTSymlink = 10
	DTSocket  = 12
)

// DirentType is the de_type of a file mode.
func DirentType(mode uint32) uint16 { return uint16(mode & ModeMask >> 12) }

// BlockState is the two bits that a bitmap keeps of a block.
type BlockState uint8

// The states (GFS2_BLKST_*).
const (
	Free     BlockState = iota
	Used                // file data, and metadata that is no dinode
	Unlinked            // a dinode without links that somebody may still hold open
	DinodeSt            // a dinode
)

func (s BlockState) String() string {
	return [...]string{"Free", "Data", "Unlnk", "Meta"}[s&3]
}
