package ondisk

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// NameHash is de_hash of a name.
func NameHash(name []byte) uint32 { return crc32.ChecksumIEEE(name) }

var zero4 [4]byte

// RgrpCRC computes rg_crc over the first RgrpSize bytes of b with the field
// itself taken as zero.
func RgrpCRC(b []byte) uint32 {
	c := crc32.ChecksumIEEE(b[:64])
	c = crc32.Update(c, crc32.IEEETable, zero4[:])
	return crc32.Update(c, crc32.IEEETable, b[68:RgrpSize])
}

// SealRgrp stores rg_crc in the header block b.
func SealRgrp(b []byte) { be.PutUint32(b[64:], RgrpCRC(b)) }

// RgrpCRCOK tells whether the stored checksum of b is right. A stored zero
// means that the last writer did not compute it.
func RgrpCRCOK(b []byte) bool {
	c := be.Uint32(b[64:])
	return c == 0 || c == RgrpCRC(b)
}

// LogHeaderHash computes lh_hash: the first 48 bytes with the field as zero.
func LogHeaderHash(b []byte) uint32 {
	c := crc32.ChecksumIEEE(b[:44])
	return crc32.Update(c, crc32.IEEETable, zero4[:])
}

// LogHeaderCRC computes lh_crc of a whole block: CRC-32C of everything behind
// the field, without the usual final inversion.
func LogHeaderCRC(b []byte) uint32 { return ^crc32.Checksum(b[52:], castagnoli) }

// SealLogHeader stores lh_hash and lh_crc in the log header block b.
func SealLogHeader(b []byte) {
	be.PutUint32(b[44:], LogHeaderHash(b))
	be.PutUint32(b[48:], LogHeaderCRC(b))
}

// LogHeaderOK tells whether b, a whole block, is a log header with valid
// checksums for journal block blkno. Version 1 headers carry no lh_crc.
func LogHeaderOK(b []byte, blkno uint32) bool {
	if CheckMeta(b, TypeLH) != nil || len(b) < LogHeaderSize {
		return false
	}
	if be.Uint32(b[40:]) != blkno || be.Uint32(b[44:]) != LogHeaderHash(b) {
		return false
	}
	c := be.Uint32(b[48:])
	return c == 0 || c == LogHeaderCRC(b)
}
