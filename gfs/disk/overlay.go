package disk

import (
	"errors"
	"io"
	"sync"
)

// Overlay is a device whose writes stay in memory: reads see them over the base,
// and the base is never written. fsck -n repairs such a device. Calls may
// overlap.
type Overlay struct {
	base Base
	mu   struct {
		sync.RWMutex
		pages map[int64]*[overlayPage]byte
	}
}

// Base is what an Overlay reads.
type Base interface {
	io.ReaderAt
	Size() int64
}

const overlayPage = 4096

// NewOverlay lays an empty overlay over base.
func NewOverlay(base Base) *Overlay {
	o := &Overlay{base: base}
	o.mu.pages = map[int64]*[overlayPage]byte{}
	return o
}

func (o *Overlay) Size() int64        { return o.base.Size() }
func (o *Overlay) Flush() error       { return nil }
func (o *Overlay) Close() error       { return nil }
func (o *Overlay) Topology() Topology { return Topology{} }

// Discard reports that it is not done: the base may not support it either.
func (o *Overlay) Discard(int64, int64) error { return ErrNoDiscard }

// Pages is how many pages of 4096 bytes have been written.
func (o *Overlay) Pages() int {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return len(o.mu.pages)
}

func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.base.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	if len(o.mu.pages) == 0 {
		return n, err
	}
	for at := off; at < off+int64(n); {
		in := at % overlayPage
		k := min(overlayPage-in, off+int64(n)-at)
		if pg := o.mu.pages[at/overlayPage]; pg != nil {
			copy(p[at-off:at-off+k], pg[in:])
		}
		at += k
	}
	return n, err
}

func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > o.Size() {
		return 0, io.ErrShortWrite
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for at := off; at < off+int64(len(p)); {
		in := at % overlayPage
		k := min(overlayPage-in, off+int64(len(p))-at)
		pg := o.mu.pages[at/overlayPage]
		if pg == nil {
			pg = new([overlayPage]byte)
			if k < overlayPage {
				if _, err := o.base.ReadAt(pg[:], at-in); err != nil && !errors.Is(err, io.EOF) {
					return int(at - off), err
				}
			}
			o.mu.pages[at/overlayPage] = pg
		}
		copy(pg[in:in+k], p[at-off:])
		at += k
	}
	return len(p), nil
}
