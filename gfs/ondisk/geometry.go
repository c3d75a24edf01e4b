package ondisk

import "fmt"

// Geometry is what follows from the block size alone.
type Geometry struct {
	BlockSize  int
	Shift      uint
	DinodePtrs int // block pointers in a dinode
	InPtrs     int // block pointers in an indirect block
	JBSize     int // payload of a block with a meta header: directory hash tables
	HashSize   int // bytes of the smallest hash table, the one inside a dinode
	HashPtrs   int
}

// NewGeometry returns the geometry of a block size; the error names the limits.
func NewGeometry(bsize int) (Geometry, error) {
	if bsize < MinBlock || bsize > MaxBlock || bsize&(bsize-1) != 0 {
		return Geometry{}, fmt.Errorf("block size must be a power of two between %d and %d, not %d", MinBlock, MaxBlock, bsize)
	}
	g := Geometry{
		BlockSize:  bsize,
		DinodePtrs: (bsize - DinodeSize) / 8,
		InPtrs:     (bsize - MetaHeaderSize) / 8,
		JBSize:     bsize - MetaHeaderSize,
		HashSize:   bsize / 2,
		HashPtrs:   bsize / 2 / 8,
	}
	for 1<<g.Shift < bsize {
		g.Shift++
	}
	return g, nil
}

// StuffedMax is the largest content that fits behind a dinode.
func (g Geometry) StuffedMax() int { return g.BlockSize - DinodeSize }

// SBBlock is the block of the superblock.
func (g Geometry) SBBlock() uint64 { return SBOffset >> g.Shift }

// Height is the smallest tree height that maps size bytes in blocks of unit
// bytes (BlockSize for files, JBSize for directories). It is at least 1; a
// stuffed inode, height 0, is the caller's decision.
func (g Geometry) Height(size uint64, unit int) int {
	blocks := size / uint64(unit)
	if size%uint64(unit) != 0 {
		blocks++
	}
	return g.HeightBlocks(blocks)
}

// HeightBlocks is Height for a number of blocks.
func (g Geometry) HeightBlocks(blocks uint64) int {
	h, reach := 1, uint64(g.DinodePtrs)
	for reach < blocks && h < MaxHeight {
		h++
		if next := reach * uint64(g.InPtrs); next/uint64(g.InPtrs) == reach {
			reach = next
		} else {
			break
		}
	}
	return h
}

// TreeBlocks counts the indirect blocks that map `data` data blocks without
// holes, from the level below the dinode down; nil when the dinode's own
// pointers do.
func (g Geometry) TreeBlocks(data uint64) []uint64 {
	var lv []uint64
	for n := data; n > uint64(g.DinodePtrs); {
		n = (n + uint64(g.InPtrs) - 1) / uint64(g.InPtrs)
		lv = append([]uint64{n}, lv...)
	}
	return lv
}

// BitBlocks returns how many header and bitmap blocks describe `data` blocks.
func (g Geometry) BitBlocks(data uint64) uint64 {
	first := uint64(NBBY * (g.BlockSize - RgrpSize))
	more := uint64(NBBY * (g.BlockSize - MetaHeaderSize))
	if data <= first {
		return 1
	}
	return 1 + (data-first+more-1)/more
}

// SplitRG divides n blocks into header blocks and data blocks, the data a
// multiple of four; up to three blocks at the end stay unused. Data is 0 when n
// is too small.
func (g Geometry) SplitRG(n uint64) (length, data uint64) {
	length = 1
	for {
		if n <= length {
			return length, 0
		}
		// The bitmap is judged by what is left before rounding down: that is
		// how mkfs.gfs2 counts, and the kernel takes any length that suffices.
		if need := g.BitBlocks(n - length); need > length {
			length++
			continue
		}
		return length, (n - length) &^ (NBBY - 1)
	}
}

// BitmapOffset says where bit pair n of a resource group lies: which of its
// header blocks, which byte of that block, and the shift inside the byte.
func (g Geometry) BitmapOffset(n uint64) (block int, off int, shift uint) {
	shift = uint(n%NBBY) * 2
	b := n / NBBY
	if first := uint64(g.BlockSize - RgrpSize); b < first {
		return 0, RgrpSize + int(b), shift
	} else {
		b -= first
		per := uint64(g.BlockSize - MetaHeaderSize)
		return 1 + int(b/per), MetaHeaderSize + int(b%per), shift
	}
}

// BitmapSpan is the part of header block i that holds bit pairs: its byte range
// within the block and the first block number (relative to data0) it describes.
// bitbytes is rg_bitbytes.
func (g Geometry) BitmapSpan(i int, bitbytes uint32) (off, n int, first uint64) {
	off = RgrpSize
	if i > 0 {
		off = MetaHeaderSize
		first = uint64(g.BlockSize-RgrpSize) + uint64(i-1)*uint64(g.BlockSize-MetaHeaderSize)
	}
	if uint64(bitbytes) > first {
		n = int(min(uint64(g.BlockSize-off), uint64(bitbytes)-first))
	}
	return off, n, first * NBBY
}

// GetState reads bit pair n out of the header blocks of a resource group, laid
// out one after the other in bits.
func (g Geometry) GetState(bits []byte, n uint64) BlockState {
	blk, off, sh := g.BitmapOffset(n)
	return BlockState(bits[blk*g.BlockSize+off]>>sh) & 3
}

// SetState writes bit pair n.
func (g Geometry) SetState(bits []byte, n uint64, s BlockState) {
	blk, off, sh := g.BitmapOffset(n)
	p := &bits[blk*g.BlockSize+off]
	*p = *p&^(3<<sh) | byte(s)<<sh
}

// CountStates counts the four states in n bytes of bitmap.
func CountStates(b []byte) (c [4]uint64) {
	var hist [256]uint32
	for _, x := range b {
		hist[x]++
	}
	for x, k := range hist {
		if k != 0 {
			for s := 0; s < 8; s += 2 {
				c[x>>s&3] += uint64(k)
			}
		}
	}
	return c
}
