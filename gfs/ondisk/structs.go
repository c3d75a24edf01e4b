package ondisk

// MetaHeader starts every metadata block. JID is used in log blocks only.
type MetaHeader struct {
	Magic  uint32
	Type   MetaType
	Format Format
	JID    uint32
}

// Meta returns the header of a block of type t.
func Meta(t MetaType) MetaHeader { return MetaHeader{Magic: Magic, Type: t, Format: t.Format()} }

// Inum names an inode: the formal number never comes twice in the life of a
// filesystem, the address is the block of its dinode.
type Inum struct{ Formal, Addr uint64 }

// Superblock lies at byte 65536.
type Superblock struct {
	MetaHeader
	FSFormat        uint32
	MultihostFormat uint32
	BlockSize       uint32
	BlockShift      uint32
	Master          Inum
	Root            Inum
	LockProto       [LockNameLen]byte
	LockTable       [LockNameLen]byte
	UUID            [16]byte
}

// Rindex is one entry of the rindex file.
type Rindex struct {
	Addr     uint64 // first block: the rgrp header
	Length   uint32 // header and bitmap blocks
	Data0    uint64 // first data block
	Data     uint32 // data blocks
	Bitbytes uint32 // bitmap bytes = Data / 4
}

// Rgrp is the header of a resource group.
type Rgrp struct {
	MetaHeader
	Flags       uint32
	Free        uint32 // blocks
	Dinodes     uint32
	Skip        uint32 // blocks to the next rgrp header, 0 in the last
	Igeneration uint64
	Data0       uint64 // the four fields below repeat the rindex entry
	Data        uint32
	Bitbytes    uint32
	CRC         uint32 // RgrpCRC; 0 = written by a kernel that did not check
}

// Dinode is an inode.
type Dinode struct {
	MetaHeader
	Num                             Inum
	Mode, UID, GID, Nlink           uint32
	Size                            uint64 // bytes
	Blocks                          uint64 // filesystem blocks, the dinode included
	Atime, Mtime, Ctime             uint64 // seconds
	Major, Minor                    uint32
	GoalMeta, GoalData              uint64
	Generation                      uint64
	Flags                           uint32
	PayloadFormat                   uint32
	Height                          uint16
	Depth                           uint16 // of an exhash directory's table
	Entries                         uint32 // of a directory
	Eattr                           uint64 // block, 0 = none
	AtimeNsec, MtimeNsec, CtimeNsec uint32
}

// Dirent is the head of a directory entry; the name follows it.
type Dirent struct {
	Inum    Inum
	Hash    uint32
	RecLen  uint16
	NameLen uint16
	Type    uint16
	Rahead  uint16
}

// Leaf is the header of a leaf of an exhash directory.
type Leaf struct {
	MetaHeader
	Depth        uint16
	Entries      uint16
	DirentFormat uint32
	Next         uint64
	Inode        uint64
	Dist, Nsec   uint32
	Sec          uint64
}

// EAHeader is the head of an extended attribute; name and value follow it.
type EAHeader struct {
	RecLen  uint32
	DataLen uint32
	NameLen uint8
	Type    uint8
	Flags   uint8
	NumPtrs uint8
}

// LogHeader ends a transaction in a journal. Fields from CRC on exist since
// version 2; CRC 0 marks version 1.
type LogHeader struct {
	MetaHeader
	Sequence                            uint64
	Flags                               uint32
	Tail                                uint32 // journal block
	Blkno                               uint32 // journal block of this header
	Hash                                uint32
	CRC                                 uint32
	Nsec                                uint32
	Sec                                 uint64
	Addr                                uint64 // filesystem block of this header
	Jinode, StatfsAddr, QuotaAddr       uint64
	LocalTotal, LocalFree, LocalDinodes uint64 // two's complement
}

// LogDescriptor starts a run of journaled blocks or revokes. The list of 64 bit
// numbers starts at byte LogDescriptorSize.
type LogDescriptor struct {
	MetaHeader
	LDType       uint32
	Length       uint32
	Data1, Data2 uint32
}

// Quota is an entry of the quota file: blocks.
type Quota struct {
	Limit, Warn uint64
	Value       uint64 // two's complement
}

// QuotaChange is an entry of a quota_change block.
type QuotaChange struct {
	Change uint64 // two's complement
	Flags  uint32 // 1 = user, else group
	ID     uint32
}

// StatfsChange is the content of statfs and of statfs_changeN: blocks, blocks,
// inodes; two's complement.
type StatfsChange struct{ Total, Free, Dinodes uint64 }

// InumRange is the content of inum_rangeN.
type InumRange struct{ Start, Length uint64 }

// RgrpLVB is the lock value block of a resource group; it, InodeLVB and QuotaLVB
// are LVBSize bytes each.
type RgrpLVB struct {
	Magic, Flags, Free, Dinodes uint32
	Igeneration                 uint64
	Unlinked                    uint32
}

// InodeLVB tells other nodes that an inode is gone.
type InodeLVB struct {
	Magic             uint32
	GenerationDeleted uint64
}

// QuotaLVB caches a quota entry.
type QuotaLVB struct {
	Magic              uint32
	Limit, Warn, Value uint64
}

func inum[T any](off int, p func(*T) *Inum) []field[T] {
	return []field[T]{
		u64("no_formal_ino", off, func(v *T) *uint64 { return &p(v).Formal }),
		u64("no_addr", off+8, func(v *T) *uint64 { return &p(v).Addr }),
	}
}

func join[T any](parts ...[]field[T]) []field[T] {
	var out []field[T]
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

var metaLayout = layout[MetaHeader]{"meta header", MetaHeaderSize, 0, header(func(h *MetaHeader) *MetaHeader { return h })}

var inumLayout = layout[Inum]{"inum", 16, 0, inum(0, func(i *Inum) *Inum { return i })}

var sbLayout = layout[Superblock]{"superblock", SBSize, TypeSB, join(
	header(func(s *Superblock) *MetaHeader { return &s.MetaHeader }),
	[]field[Superblock]{
		u32("sb_fs_format", 24, func(s *Superblock) *uint32 { return &s.FSFormat }),
		u32("sb_multihost_format", 28, func(s *Superblock) *uint32 { return &s.MultihostFormat }),
		u32("sb_bsize", 36, func(s *Superblock) *uint32 { return &s.BlockSize }),
		u32("sb_bsize_shift", 40, func(s *Superblock) *uint32 { return &s.BlockShift }),
	},
	inum(48, func(s *Superblock) *Inum { return &s.Master }),
	inum(80, func(s *Superblock) *Inum { return &s.Root }),
	[]field[Superblock]{
		raw("sb_lockproto", 96, LockNameLen, KindString, func(s *Superblock) []byte { return s.LockProto[:] }),
		raw("sb_locktable", 160, LockNameLen, KindString, func(s *Superblock) []byte { return s.LockTable[:] }),
		raw("uuid", 256, 16, KindUUID, func(s *Superblock) []byte { return s.UUID[:] }),
	})}

var rindexLayout = layout[Rindex]{"rindex entry", RindexSize, 0, []field[Rindex]{
	u64("ri_addr", 0, func(r *Rindex) *uint64 { return &r.Addr }),
	u32("ri_length", 8, func(r *Rindex) *uint32 { return &r.Length }),
	u64("ri_data0", 16, func(r *Rindex) *uint64 { return &r.Data0 }),
	u32("ri_data", 24, func(r *Rindex) *uint32 { return &r.Data }),
	u32("ri_bitbytes", 28, func(r *Rindex) *uint32 { return &r.Bitbytes }),
}}

var rgrpLayout = layout[Rgrp]{"resource group", RgrpSize, TypeRG, join(
	header(func(r *Rgrp) *MetaHeader { return &r.MetaHeader }),
	[]field[Rgrp]{
		u32("rg_flags", 24, func(r *Rgrp) *uint32 { return &r.Flags }),
		u32("rg_free", 28, func(r *Rgrp) *uint32 { return &r.Free }),
		u32("rg_dinodes", 32, func(r *Rgrp) *uint32 { return &r.Dinodes }),
		u32("rg_skip", 36, func(r *Rgrp) *uint32 { return &r.Skip }),
		u64("rg_igeneration", 40, func(r *Rgrp) *uint64 { return &r.Igeneration }),
		u64("rg_data0", 48, func(r *Rgrp) *uint64 { return &r.Data0 }),
		u32("rg_data", 56, func(r *Rgrp) *uint32 { return &r.Data }),
		u32("rg_bitbytes", 60, func(r *Rgrp) *uint32 { return &r.Bitbytes }),
		u32("rg_crc", 64, func(r *Rgrp) *uint32 { return &r.CRC }),
	})}

var dinodeLayout = layout[Dinode]{"dinode", DinodeSize, TypeDI, join(
	header(func(d *Dinode) *MetaHeader { return &d.MetaHeader }),
	inum(24, func(d *Dinode) *Inum { return &d.Num }),
	[]field[Dinode]{
		u32("di_mode", 40, func(d *Dinode) *uint32 { return &d.Mode }).as(KindOct),
		u32("di_uid", 44, func(d *Dinode) *uint32 { return &d.UID }),
		u32("di_gid", 48, func(d *Dinode) *uint32 { return &d.GID }),
		u32("di_nlink", 52, func(d *Dinode) *uint32 { return &d.Nlink }),
		u64("di_size", 56, func(d *Dinode) *uint64 { return &d.Size }),
		u64("di_blocks", 64, func(d *Dinode) *uint64 { return &d.Blocks }),
		u64("di_atime", 72, func(d *Dinode) *uint64 { return &d.Atime }).as(KindSigned),
		u64("di_mtime", 80, func(d *Dinode) *uint64 { return &d.Mtime }).as(KindSigned),
		u64("di_ctime", 88, func(d *Dinode) *uint64 { return &d.Ctime }).as(KindSigned),
		u32("di_major", 96, func(d *Dinode) *uint32 { return &d.Major }),
		u32("di_minor", 100, func(d *Dinode) *uint32 { return &d.Minor }),
		u64("di_goal_meta", 104, func(d *Dinode) *uint64 { return &d.GoalMeta }),
		u64("di_goal_data", 112, func(d *Dinode) *uint64 { return &d.GoalData }),
		u64("di_generation", 120, func(d *Dinode) *uint64 { return &d.Generation }),
		u32("di_flags", 128, func(d *Dinode) *uint32 { return &d.Flags }).as(KindHex),
		u32("di_payload_format", 132, func(d *Dinode) *uint32 { return &d.PayloadFormat }),
		u16("di_height", 138, func(d *Dinode) *uint16 { return &d.Height }),
		u16("di_depth", 146, func(d *Dinode) *uint16 { return &d.Depth }),
		u32("di_entries", 148, func(d *Dinode) *uint32 { return &d.Entries }),
		u64("di_eattr", 168, func(d *Dinode) *uint64 { return &d.Eattr }),
		u32("di_atime_nsec", 176, func(d *Dinode) *uint32 { return &d.AtimeNsec }),
		u32("di_mtime_nsec", 180, func(d *Dinode) *uint32 { return &d.MtimeNsec }),
		u32("di_ctime_nsec", 184, func(d *Dinode) *uint32 { return &d.CtimeNsec }),
	})}

var direntLayout = layout[Dirent]{"directory entry", DirentSize, 0, join(
	inum(0, func(d *Dirent) *Inum { return &d.Inum }),
	[]field[Dirent]{
		u32("de_hash", 16, func(d *Dirent) *uint32 { return &d.Hash }).as(KindHex),
		u16("de_rec_len", 20, func(d *Dirent) *uint16 { return &d.RecLen }),
		u16("de_name_len", 22, func(d *Dirent) *uint16 { return &d.NameLen }),
		u16("de_type", 24, func(d *Dirent) *uint16 { return &d.Type }),
		u16("de_rahead", 26, func(d *Dirent) *uint16 { return &d.Rahead }),
	})}

var leafLayout = layout[Leaf]{"leaf", LeafSize, TypeLF, join(
	header(func(l *Leaf) *MetaHeader { return &l.MetaHeader }),
	[]field[Leaf]{
		u16("lf_depth", 24, func(l *Leaf) *uint16 { return &l.Depth }),
		u16("lf_entries", 26, func(l *Leaf) *uint16 { return &l.Entries }),
		u32("lf_dirent_format", 28, func(l *Leaf) *uint32 { return &l.DirentFormat }),
		u64("lf_next", 32, func(l *Leaf) *uint64 { return &l.Next }),
		u64("lf_inode", 40, func(l *Leaf) *uint64 { return &l.Inode }),
		u32("lf_dist", 48, func(l *Leaf) *uint32 { return &l.Dist }),
		u32("lf_nsec", 52, func(l *Leaf) *uint32 { return &l.Nsec }),
		u64("lf_sec", 56, func(l *Leaf) *uint64 { return &l.Sec }).as(KindSigned),
	})}

var eaLayout = layout[EAHeader]{"EA header", EAHeaderSize, 0, []field[EAHeader]{
	u32("ea_rec_len", 0, func(e *EAHeader) *uint32 { return &e.RecLen }),
	u32("ea_data_len", 4, func(e *EAHeader) *uint32 { return &e.DataLen }),
	u8("ea_name_len", 8, func(e *EAHeader) *uint8 { return &e.NameLen }),
	u8("ea_type", 9, func(e *EAHeader) *uint8 { return &e.Type }),
	u8("ea_flags", 10, func(e *EAHeader) *uint8 { return &e.Flags }).as(KindHex),
	u8("ea_num_ptrs", 11, func(e *EAHeader) *uint8 { return &e.NumPtrs }),
}}

var lhLayout = layout[LogHeader]{"log header", LogHeaderSize, TypeLH, join(
	header(func(l *LogHeader) *MetaHeader { return &l.MetaHeader }),
	[]field[LogHeader]{
		u64("lh_sequence", 24, func(l *LogHeader) *uint64 { return &l.Sequence }),
		u32("lh_flags", 32, func(l *LogHeader) *uint32 { return &l.Flags }).as(KindHex),
		u32("lh_tail", 36, func(l *LogHeader) *uint32 { return &l.Tail }),
		u32("lh_blkno", 40, func(l *LogHeader) *uint32 { return &l.Blkno }),
		u32("lh_hash", 44, func(l *LogHeader) *uint32 { return &l.Hash }).as(KindHex),
		u32("lh_crc", 48, func(l *LogHeader) *uint32 { return &l.CRC }).as(KindHex),
		u32("lh_nsec", 52, func(l *LogHeader) *uint32 { return &l.Nsec }),
		u64("lh_sec", 56, func(l *LogHeader) *uint64 { return &l.Sec }).as(KindSigned),
		u64("lh_addr", 64, func(l *LogHeader) *uint64 { return &l.Addr }),
		u64("lh_jinode", 72, func(l *LogHeader) *uint64 { return &l.Jinode }),
		u64("lh_statfs_addr", 80, func(l *LogHeader) *uint64 { return &l.StatfsAddr }),
		u64("lh_quota_addr", 88, func(l *LogHeader) *uint64 { return &l.QuotaAddr }),
		u64("lh_local_total", 96, func(l *LogHeader) *uint64 { return &l.LocalTotal }).as(KindSigned),
		u64("lh_local_free", 104, func(l *LogHeader) *uint64 { return &l.LocalFree }).as(KindSigned),
		u64("lh_local_dinodes", 112, func(l *LogHeader) *uint64 { return &l.LocalDinodes }).as(KindSigned),
	})}

var ldLayout = layout[LogDescriptor]{"log descriptor", LogDescriptorSize, TypeLD, join(
	header(func(l *LogDescriptor) *MetaHeader { return &l.MetaHeader }),
	[]field[LogDescriptor]{
		u32("ld_type", 24, func(l *LogDescriptor) *uint32 { return &l.LDType }),
		u32("ld_length", 28, func(l *LogDescriptor) *uint32 { return &l.Length }),
		u32("ld_data1", 32, func(l *LogDescriptor) *uint32 { return &l.Data1 }),
		u32("ld_data2", 36, func(l *LogDescriptor) *uint32 { return &l.Data2 }),
	})}

var quotaLayout = layout[Quota]{"quota", QuotaSize, 0, []field[Quota]{
	u64("qu_limit", 0, func(q *Quota) *uint64 { return &q.Limit }),
	u64("qu_warn", 8, func(q *Quota) *uint64 { return &q.Warn }),
	u64("qu_value", 16, func(q *Quota) *uint64 { return &q.Value }).as(KindSigned),
}}

var qcLayout = layout[QuotaChange]{"quota change", QuotaChangeSize, 0, []field[QuotaChange]{
	u64("qc_change", 0, func(q *QuotaChange) *uint64 { return &q.Change }).as(KindSigned),
	u32("qc_flags", 8, func(q *QuotaChange) *uint32 { return &q.Flags }).as(KindHex),
	u32("qc_id", 12, func(q *QuotaChange) *uint32 { return &q.ID }),
}}

var statfsLayout = layout[StatfsChange]{"statfs change", StatfsChangeSize, 0, []field[StatfsChange]{
	u64("sc_total", 0, func(s *StatfsChange) *uint64 { return &s.Total }).as(KindSigned),
	u64("sc_free", 8, func(s *StatfsChange) *uint64 { return &s.Free }).as(KindSigned),
	u64("sc_dinodes", 16, func(s *StatfsChange) *uint64 { return &s.Dinodes }).as(KindSigned),
}}

var inumRangeLayout = layout[InumRange]{"inum range", InumRangeSize, 0, []field[InumRange]{
	u64("ir_start", 0, func(r *InumRange) *uint64 { return &r.Start }),
	u64("ir_length", 8, func(r *InumRange) *uint64 { return &r.Length }),
}}

var rgrpLVBLayout = layout[RgrpLVB]{"rgrp LVB", LVBSize, 0, []field[RgrpLVB]{
	u32("rl_magic", 0, func(r *RgrpLVB) *uint32 { return &r.Magic }).as(KindHex),
	u32("rl_flags", 4, func(r *RgrpLVB) *uint32 { return &r.Flags }),
	u32("rl_free", 8, func(r *RgrpLVB) *uint32 { return &r.Free }),
	u32("rl_dinodes", 12, func(r *RgrpLVB) *uint32 { return &r.Dinodes }),
	u64("rl_igeneration", 16, func(r *RgrpLVB) *uint64 { return &r.Igeneration }),
	u32("rl_unlinked", 24, func(r *RgrpLVB) *uint32 { return &r.Unlinked }),
}}

var inodeLVBLayout = layout[InodeLVB]{"inode LVB", LVBSize, 0, []field[InodeLVB]{
	u32("ri_magic", 0, func(r *InodeLVB) *uint32 { return &r.Magic }).as(KindHex),
	u64("ri_generation_deleted", 8, func(r *InodeLVB) *uint64 { return &r.GenerationDeleted }),
}}

var quotaLVBLayout = layout[QuotaLVB]{"quota LVB", LVBSize, 0, []field[QuotaLVB]{
	u32("qb_magic", 0, func(q *QuotaLVB) *uint32 { return &q.Magic }).as(KindHex),
	u64("qb_limit", 8, func(q *QuotaLVB) *uint64 { return &q.Limit }),
	u64("qb_warn", 16, func(q *QuotaLVB) *uint64 { return &q.Warn }),
	u64("qb_value", 24, func(q *QuotaLVB) *uint64 { return &q.Value }).as(KindSigned),
}}

// Every structure decodes from and encodes to its own bytes. Decode does not
// judge the values: fsck needs to see the bad ones. Encode leaves reserved
// bytes of b as they were. The only error is ErrShort.

func (h *MetaHeader) Decode(b []byte) error    { return metaLayout.decode(b, h) }
func (h *MetaHeader) Encode(b []byte) error    { return metaLayout.encode(b, h) }
func (i *Inum) Decode(b []byte) error          { return inumLayout.decode(b, i) }
func (i *Inum) Encode(b []byte) error          { return inumLayout.encode(b, i) }
func (s *Superblock) Decode(b []byte) error    { return sbLayout.decode(b, s) }
func (s *Superblock) Encode(b []byte) error    { return sbLayout.encode(b, s) }
func (r *Rindex) Decode(b []byte) error        { return rindexLayout.decode(b, r) }
func (r *Rindex) Encode(b []byte) error        { return rindexLayout.encode(b, r) }
func (r *Rgrp) Decode(b []byte) error          { return rgrpLayout.decode(b, r) }
func (r *Rgrp) Encode(b []byte) error          { return rgrpLayout.encode(b, r) }
func (d *Dinode) Decode(b []byte) error        { return dinodeLayout.decode(b, d) }
func (d *Dinode) Encode(b []byte) error        { return dinodeLayout.encode(b, d) }
func (d *Dirent) Decode(b []byte) error        { return direntLayout.decode(b, d) }
func (d *Dirent) Encode(b []byte) error        { return direntLayout.encode(b, d) }
func (l *Leaf) Decode(b []byte) error          { return leafLayout.decode(b, l) }
func (l *Leaf) Encode(b []byte) error          { return leafLayout.encode(b, l) }
func (e *EAHeader) Decode(b []byte) error      { return eaLayout.decode(b, e) }
func (e *EAHeader) Encode(b []byte) error      { return eaLayout.encode(b, e) }
func (l *LogHeader) Decode(b []byte) error     { return lhLayout.decode(b, l) }
func (l *LogHeader) Encode(b []byte) error     { return lhLayout.encode(b, l) }
func (l *LogDescriptor) Decode(b []byte) error { return ldLayout.decode(b, l) }
func (l *LogDescriptor) Encode(b []byte) error { return ldLayout.encode(b, l) }
func (q *Quota) Decode(b []byte) error         { return quotaLayout.decode(b, q) }
func (q *Quota) Encode(b []byte) error         { return quotaLayout.encode(b, q) }
func (q *QuotaChange) Decode(b []byte) error   { return qcLayout.decode(b, q) }
func (q *QuotaChange) Encode(b []byte) error   { return qcLayout.encode(b, q) }
func (s *StatfsChange) Decode(b []byte) error  { return statfsLayout.decode(b, s) }
func (s *StatfsChange) Encode(b []byte) error  { return statfsLayout.encode(b, s) }
func (r *InumRange) Decode(b []byte) error     { return inumRangeLayout.decode(b, r) }
func (r *InumRange) Encode(b []byte) error     { return inumRangeLayout.encode(b, r) }
func (r *RgrpLVB) Decode(b []byte) error       { return rgrpLVBLayout.decode(b, r) }
func (r *RgrpLVB) Encode(b []byte) error       { return rgrpLVBLayout.encode(b, r) }
func (r *InodeLVB) Decode(b []byte) error      { return inodeLVBLayout.decode(b, r) }
func (r *InodeLVB) Encode(b []byte) error      { return inodeLVBLayout.encode(b, r) }
func (q *QuotaLVB) Decode(b []byte) error      { return quotaLVBLayout.decode(b, q) }
func (q *QuotaLVB) Encode(b []byte) error      { return quotaLVBLayout.encode(b, q) }

// Fields returns the table of the structure that starts a block of type t,
// including its meta header; nil for types without one of their own (the meta
// header is all they have).
func Fields(t MetaType) []FieldInfo {
	switch t {
	case TypeSB:
		return sbLayout.infos()
	case TypeRG:
		return rgrpLayout.infos()
	case TypeDI:
		return dinodeLayout.infos()
	case TypeLF:
		return leafLayout.infos()
	case TypeLH:
		return lhLayout.infos()
	case TypeLD:
		return ldLayout.infos()
	case TypeRB, TypeIN, TypeJD, TypeEA, TypeED, TypeLB, TypeQC:
		return metaLayout.infos()
	}
	return nil
}

// RindexFields is the table of an entry of rindex.
func RindexFields() []FieldInfo { return rindexLayout.infos() }

// QuotaFields is the table of an entry of the quota file.
func QuotaFields() []FieldInfo { return quotaLayout.infos() }

// StatfsFields is the table of the content of statfs.
func StatfsFields() []FieldInfo { return statfsLayout.infos() }

// InumRangeFields is the table of the content of inum_rangeN.
func InumRangeFields() []FieldInfo { return inumRangeLayout.infos() }

// DirentFields is the table of a directory entry.
func DirentFields() []FieldInfo { return direntLayout.infos() }

// EAFields is the table of the header of an extended attribute.
func EAFields() []FieldInfo { return eaLayout.infos() }
