package fsck

import "github.com/blockhouse-san/blockhouse/gfs/ondisk"

// blockMap is what the trees say of every block: two bits each, in chunks that
// exist only where something is in use, so that an empty filesystem costs next
// to nothing whatever its size.
type blockMap struct {
	chunks [][]byte
}

const (
	chunkBlocks = 1 << 16
	chunkBytes  = chunkBlocks / ondisk.NBBY
)

func newBlockMap(blocks uint64) *blockMap {
	return &blockMap{chunks: make([][]byte, (blocks+chunkBlocks-1)/chunkBlocks)}
}

func (m *blockMap) get(a uint64) ondisk.BlockState {
	c := m.chunks[a/chunkBlocks]
	if c == nil {
		return ondisk.Free
	}
	a %= chunkBlocks
	return ondisk.BlockState(c[a/ondisk.NBBY]>>(a%ondisk.NBBY*2)) & 3
}

func (m *blockMap) set(a uint64, s ondisk.BlockState) {
	p := &m.chunks[a/chunkBlocks]
	if *p == nil {
		if s == ondisk.Free {
			return
		}
		*p = make([]byte, chunkBytes)
	}
	a %= chunkBlocks
	sh := a % ondisk.NBBY * 2
	(*p)[a/ondisk.NBBY] = (*p)[a/ondisk.NBBY]&^(3<<sh) | byte(s)<<sh
}

// empty tells that [a, a+n) is all free, as far as whole chunks show it.
func (m *blockMap) empty(a, n uint64) bool {
	for c := a / chunkBlocks; c <= (a+n-1)/chunkBlocks; c++ {
		if m.chunks[c] != nil {
			return false
		}
	}
	return true
}
