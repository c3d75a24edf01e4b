// Package mem is a sparse store in memory: nothing survives the process. It is
// for tests, for scratch volumes, and the model that other stores are compared
// with.
//
// Storage row: it imports block only.
package mem

import (
	"context"
	"fmt"
	"sync"

	"github.com/blockhouse-san/blockhouse/block"
)

const chunk = 64 << 10

// Mem is a store in memory. It implements block.Device.
type Mem struct {
	mu     sync.RWMutex
	info   block.Info
	chunks map[int64][]byte // chunk number -> content, absent reads as zeroes
	mapped map[int64][]bool // chunk number -> block is mapped
	closed bool
}

// New returns an empty store of size bytes with blocks of bs bytes (512 or 4096).
func New(size int64, bs int) (*Mem, error) {
	if bs != 512 && bs != 4096 {
		return nil, fmt.Errorf("create memory store: block size %d: want 512 or 4096", bs)
	}
	if size <= 0 || size%int64(bs) != 0 {
		return nil, fmt.Errorf("create memory store: size %d is not a positive multiple of the block size %d", size, bs)
	}
	return &Mem{
		info:   block.Info{Size: size, BlockSize: bs, PhysBlock: max(bs, 4096), Caps: block.Caps{Thin: true, UnmapZeroes: true}},
		chunks: map[int64][]byte{}, mapped: map[int64][]bool{},
	}, nil
}

// Info tells what the store is.
func (m *Mem) Info() block.Info {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.info
}

// check is called with mu held.
func (m *Mem) check(ctx context.Context, off, n int64, write bool) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case m.closed:
		return fmt.Errorf("memory store: %w", block.ErrClosed)
	case write && m.info.Caps.ReadOnly:
		return fmt.Errorf("memory store: %w", block.ErrReadOnly)
	}
	return m.info.Check(off, n)
}

// pieces calls f for each part of [off, off+n) that lies in one chunk.
func pieces(off, n int64, f func(c, at, n int64)) {
	for n > 0 {
		at := off % chunk
		k := min(n, chunk-at)
		f(off/chunk, at, k)
		off, n = off+k, n-k
	}
}

// ReadAt fills p from off.
func (m *Mem) ReadAt(ctx context.Context, p []byte, off int64) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check(ctx, off, int64(len(p)), false); err != nil {
		return err
	}
	pieces(off, int64(len(p)), func(c, at, n int64) {
		if b := m.chunks[c]; b != nil {
			copy(p[:n], b[at:])
		} else {
			clear(p[:n])
		}
		p = p[n:]
	})
	return nil
}

// WriteAt writes p at off.
func (m *Mem) WriteAt(ctx context.Context, p []byte, off int64, _ block.Flags) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(ctx, off, int64(len(p)), true); err != nil {
		return err
	}
	pieces(off, int64(len(p)), func(c, at, n int64) {
		copy(m.chunk(c)[at:], p[:n])
		m.mark(c, at, n, true)
		p = p[n:]
	})
	return nil
}

func (m *Mem) chunk(c int64) []byte {
	b := m.chunks[c]
	if b == nil {
		b = make([]byte, chunk)
		m.chunks[c], m.mapped[c] = b, make([]bool, chunk/m.info.BlockSize)
	}
	return b
}

func (m *Mem) mark(c, at, n int64, mapped bool) {
	bs := int64(m.info.BlockSize)
	for i := at / bs; i < (at+n)/bs; i++ {
		m.mapped[c][i] = mapped
	}
}

// Flush has nothing to do.
func (m *Mem) Flush(ctx context.Context) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.check(ctx, 0, 0, false)
}

// Unmap deallocates the range.
func (m *Mem) Unmap(ctx context.Context, off, n int64) error {
	return m.WriteZeroes(ctx, off, n, block.MayUnmap)
}

// WriteZeroes makes the range read as zeroes.
func (m *Mem) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(ctx, off, n, true); err != nil {
		return err
	}
	unmap := fl&block.MayUnmap != 0
	pieces(off, n, func(c, at, n int64) {
		switch {
		case unmap && n == chunk:
			delete(m.chunks, c)
			delete(m.mapped, c)
		case unmap && m.chunks[c] == nil:
		default:
			clear(m.chunk(c)[at : at+n])
			m.mark(c, at, n, !unmap)
		}
	})
	return nil
}

// Extents tells what is mapped.
func (m *Mem) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check(ctx, off, n, false); err != nil {
		return nil, err
	}
	var out []block.Extent
	bs := int64(m.info.BlockSize)
	add := func(n int64, mapped bool) {
		if k := len(out) - 1; k >= 0 && out[k].Mapped == mapped {
			out[k].Len += n
		} else {
			out = append(out, block.Extent{Off: off, Len: n, Mapped: mapped})
		}
		off += n
	}
	pieces(off, n, func(c, at, n int64) {
		mp := m.mapped[c]
		if mp == nil {
			add(n, false)
			return
		}
		for i := at / bs; i < (at+n)/bs; i++ {
			add(bs, mp[i])
		}
	})
	return out, nil
}

// Resize changes the size; what lies behind a smaller end is dropped.
func (m *Mem) Resize(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size <= 0 || size%int64(m.info.BlockSize) != 0 {
		return fmt.Errorf("resize memory store: %w: size %d", block.ErrMisaligned, size)
	}
	for c, b := range m.chunks {
		switch {
		case c*chunk >= size:
			delete(m.chunks, c)
			delete(m.mapped, c)
		case (c+1)*chunk > size:
			clear(b[size-c*chunk:])
			m.mark(c, size-c*chunk, (c+1)*chunk-size, false)
		}
	}
	m.info.Size = size
	return nil
}

// Close releases the memory.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return fmt.Errorf("close memory store: %w", block.ErrClosed)
	}
	m.closed, m.chunks, m.mapped = true, nil, nil
	return nil
}
