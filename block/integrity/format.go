package integrity

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
)

// The file of checksums (docs/formats/integrity.md), little endian:
//
//	0      header, 512 bytes, and its copy at 512
//	       "BHCRC32C" | u32 version | u32 unit | u64 region | u64 size | uuid | 0 … | crc of the 508 bytes before
//	4096   intents: sectors of 512 bytes, 3872 regions each
//	       "BHIN" | u32 sector | u64 sequence | 484 bytes of bits | 8 bytes 0 | crc of the 508 bytes before
//	…      entries, on the next multiple of 4096: u32 a unit
const (
	version    = 1
	unit       = 4096    // bytes under one checksum
	region     = 4 << 20 // bytes under one intent bit
	sector     = 512
	bitsAt     = 16
	bitsLen    = 484
	perSector  = bitsLen * 8 // regions
	intentsAt  = 4096
	perEntries = sector / 4 // units under one sector of entries
)

var magic = [8]byte{'B', 'H', 'C', 'R', 'C', '3', '2', 'C'}
var magicIntent = [4]byte{'B', 'H', 'I', 'N'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// geometry of a volume of size bytes.
type geometry struct {
	size    int64
	regions int64
	sectors int64 // of intents
	entries int64 // offset
	total   int64 // of the file
}

func geometryOf(size int64) geometry {
	g := geometry{size: size, regions: (size + region - 1) / region}
	g.sectors = (g.regions + perSector - 1) / perSector
	up := func(n int64) int64 { return (n + 4095) / 4096 * 4096 }
	g.entries = up(intentsAt + g.sectors*sector)
	g.total = g.entries + up((size+unit-1)/unit*4)
	return g
}

// SideSize is how large the file of checksums of a volume of size bytes is.
func SideSize(size int64) int64 { return geometryOf(size).total }

func header(size int64, id uuid.UUID) []byte {
	b := make([]byte, sector)
	copy(b, magic[:])
	binary.LittleEndian.PutUint32(b[8:], version)
	binary.LittleEndian.PutUint32(b[12:], unit)
	binary.LittleEndian.PutUint32(b[16:], region)
	binary.LittleEndian.PutUint64(b[20:], uint64(size))
	copy(b[28:], id[:])
	binary.LittleEndian.PutUint32(b[508:], crc32.Checksum(b[:508], castagnoli))
	return b
}

// parseHeader tells whether b is the header of this volume's checksums.
func parseHeader(b []byte, size int64, id uuid.UUID) error {
	le := binary.LittleEndian
	switch {
	case [8]byte(b) != magic:
		return errors.New("no file of checksums")
	case le.Uint32(b[508:]) != crc32.Checksum(b[:508], castagnoli):
		return errors.New("the header is damaged")
	case le.Uint32(b[8:]) != version:
		return fmt.Errorf("version %d, this program knows %d", le.Uint32(b[8:]), version)
	case le.Uint32(b[12:]) != unit || le.Uint32(b[16:]) != region:
		return fmt.Errorf("units of %d and regions of %d bytes", le.Uint32(b[12:]), le.Uint32(b[16:]))
	case le.Uint64(b[20:]) != uint64(size):
		return fmt.Errorf("it is for %d bytes, the store has %d", le.Uint64(b[20:]), size)
	case uuid.UUID(b[28:44]) != id:
		return fmt.Errorf("it is of volume %s", uuid.UUID(b[28:44]))
	}
	return nil
}

// intents is one sector of bits.
type intents [sector]byte

func newIntents(n int64) *intents {
	s := &intents{}
	copy(s[:], magicIntent[:])
	binary.LittleEndian.PutUint32(s[4:], uint32(n))
	return s
}

func (s *intents) get(k int64) bool { return s[bitsAt+k/8]&(1<<(k%8)) != 0 }

func (s *intents) set(k int64, on bool) {
	if on {
		s[bitsAt+k/8] |= 1 << (k % 8)
	} else {
		s[bitsAt+k/8] &^= 1 << (k % 8)
	}
}

// seal makes the sector ready to be written.
func (s *intents) seal() {
	binary.LittleEndian.PutUint64(s[8:], binary.LittleEndian.Uint64(s[8:])+1)
	binary.LittleEndian.PutUint32(s[508:], crc32.Checksum(s[:508], castagnoli))
}

func (s *intents) valid(n int64) bool {
	return [4]byte(s[:]) == magicIntent && binary.LittleEndian.Uint32(s[4:]) == uint32(n) &&
		binary.LittleEndian.Uint32(s[508:]) == crc32.Checksum(s[:508], castagnoli)
}

var zeroUnit [unit]byte

// zeroSums[n] is the checksum of n sectors of zeroes; only the last unit of a
// volume is short.
var zeroSums = func() (z [unit/sector + 1]uint32) {
	for k := range z {
		z[k] = crc32.Checksum(zeroUnit[:k*sector], castagnoli)
	}
	return z
}()

// sum is the entry of a unit: its crc32c, xored so that zeroes have entry 0. A
// hole in the data is then a hole in the entries, and what was never written has
// its checksum from the beginning.
func sum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) ^ zeroSums[len(p)/sector] }
