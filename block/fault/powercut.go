package fault

import (
	"bytes"
	"context"
	"slices"
	"sync"

	"github.com/blockhouse-san/blockhouse/block"
)

// PowerCut is a store with a volatile write cache: writes without FUA reach the
// inner store only with Flush, or at Cut as far as the test says. Each block
// keeps every version written since the last flush, because a disk may have
// written any of them.
type PowerCut struct {
	mu    sync.RWMutex
	inner block.Device
	cache map[int64][]version // block number -> versions, oldest first
	cut   bool
}

// version is one state of a block; nil data means unmapped.
type version []byte

// NewPowerCut wraps inner. Close of the wrapper closes inner.
func NewPowerCut(inner block.Device) *PowerCut {
	return &PowerCut{inner: inner, cache: map[int64][]version{}}
}

// Inner is the store under the cache (block.Wrapper).
func (d *PowerCut) Inner() block.Device { return d.inner }

// Info is the inner store's with a write cache.
func (d *PowerCut) Info() block.Info {
	i := d.inner.Info()
	i.Caps.WriteCache = true
	return i
}

func (d *PowerCut) check(ctx context.Context, off, n int64) error {
	if d.cut {
		return block.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return d.inner.Info().Check(off, n)
}

// ReadAt returns the newest version.
func (d *PowerCut) ReadAt(ctx context.Context, p []byte, off int64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.check(ctx, off, int64(len(p))); err != nil {
		return err
	}
	if err := d.inner.ReadAt(ctx, p, off); err != nil {
		return err
	}
	bs := int64(d.inner.Info().BlockSize)
	for o := int64(0); o < int64(len(p)); o += bs {
		if vs := d.cache[(off+o)/bs]; len(vs) > 0 {
			v := vs[len(vs)-1]
			if v == nil {
				clear(p[o : o+bs])
			} else {
				copy(p[o:o+bs], v)
			}
		}
	}
	return nil
}

// WriteAt caches, or with FUA writes through.
func (d *PowerCut) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	return d.put(ctx, off, int64(len(p)), fl, func(o, bs int64) version { return bytes.Clone(p[o : o+bs]) })
}

// Unmap caches.
func (d *PowerCut) Unmap(ctx context.Context, off, n int64) error {
	return d.put(ctx, off, n, 0, func(int64, int64) version { return nil })
}

// WriteZeroes caches, or with FUA writes through.
func (d *PowerCut) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	return d.put(ctx, off, n, fl, func(_, bs int64) version {
		if fl&block.MayUnmap != 0 {
			return nil
		}
		return make(version, bs)
	})
}

func (d *PowerCut) put(ctx context.Context, off, n int64, fl block.Flags, at func(o, bs int64) version) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.check(ctx, off, n); err != nil {
		return err
	}
	if d.inner.Info().Caps.ReadOnly {
		return block.ErrReadOnly
	}
	bs := int64(d.inner.Info().BlockSize)
	for o := int64(0); o < n; o += bs {
		k := (off + o) / bs
		if fl&block.FUA != 0 {
			// A durable write supersedes what was cached of its blocks.
			delete(d.cache, k)
			if err := d.apply(ctx, k, at(o, bs), block.FUA); err != nil {
				return err
			}
			continue
		}
		d.cache[k] = append(d.cache[k], at(o, bs))
	}
	return nil
}

func (d *PowerCut) apply(ctx context.Context, k int64, v version, fl block.Flags) error {
	bs := int64(d.inner.Info().BlockSize)
	if v == nil {
		return d.inner.Unmap(ctx, k*bs, bs)
	}
	return d.inner.WriteAt(ctx, v, k*bs, fl)
}

// Flush writes the newest versions.
func (d *PowerCut) Flush(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.check(ctx, 0, 0); err != nil {
		return err
	}
	return d.flush(ctx)
}

func (d *PowerCut) flush(ctx context.Context) error {
	for k, vs := range d.cache {
		if err := d.apply(ctx, k, vs[len(vs)-1], 0); err != nil {
			return err
		}
		delete(d.cache, k)
	}
	return d.inner.Flush(ctx)
}

// Extents are those after a flush.
func (d *PowerCut) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.check(ctx, off, n); err != nil {
		return nil, err
	}
	under, err := d.inner.Extents(ctx, off, n)
	if err != nil {
		return nil, err
	}
	bs := int64(d.inner.Info().BlockSize)
	var out []block.Extent
	for _, e := range under {
		for o := e.Off; o < e.Off+e.Len; o += bs {
			m := e.Mapped
			if vs := d.cache[o/bs]; len(vs) > 0 {
				m = vs[len(vs)-1] != nil
			}
			if i := len(out) - 1; i >= 0 && out[i].Mapped == m {
				out[i].Len += bs
			} else {
				out = append(out, block.Extent{Off: o, Len: bs, Mapped: m})
			}
		}
	}
	return out, nil
}

// Cut takes the power away. For each block with unflushed versions keep says
// which one the disk had written: 0 none of them, i the i-th oldest of n. Every
// later call is block.ErrClosed; the inner store is what the next start finds.
func (d *PowerCut) Cut(keep func(blk int64, n int) int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut {
		return block.ErrClosed
	}
	d.cut = true
	ks := make([]int64, 0, len(d.cache))
	for k := range d.cache {
		ks = append(ks, k)
	}
	slices.Sort(ks) // the same seed decides the same way
	for _, k := range ks {
		vs := d.cache[k]
		if i := keep(k, len(vs)); i > 0 {
			if err := d.apply(context.Background(), k, vs[i-1], 0); err != nil {
				return err
			}
		}
	}
	d.cache = nil
	return nil
}

// Close flushes and closes the inner store, also after a cut.
func (d *PowerCut) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.cut {
		d.cut = true
		if err := d.flush(context.Background()); err != nil {
			_ = d.inner.Close()
			return err
		}
	}
	return d.inner.Close()
}
