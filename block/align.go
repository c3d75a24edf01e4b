package block

import (
	"sync"
	"unsafe"
)

// Align is the alignment of the buffers that Alloc and Pool give out: enough for
// direct I/O on every device and file system in use.
const Align = 4096

// Alloc returns n zero bytes whose first lies on a multiple of Align, so that a
// store can do direct I/O into them without a copy.
func Alloc(n int) []byte {
	b := make([]byte, n+Align)
	o := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (Align - 1))
	return b[o : o+n : o+n]
}

// Aligned tells whether p begins on a multiple of a, a power of two.
func Aligned(p []byte, a int) bool {
	return len(p) == 0 || uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(a-1) == 0
}

// The size classes of the pool.
const (
	minClass = 12 // 4 KiB
	maxClass = 20 // 1 MiB
)

// Buf is a pooled, aligned buffer. B may be shortened by its user; Free gives the
// whole buffer back.
type Buf struct {
	B     []byte
	class int8
}

var pools [maxClass - minClass + 1]sync.Pool

// Get returns a buffer of n bytes with undefined content. Above 1 MiB it is
// allocated anew and not pooled.
func Get(n int) *Buf {
	c := minClass
	for n > 1<<c && c <= maxClass {
		c++
	}
	if c > maxClass {
		return &Buf{B: Alloc(n), class: -1}
	}
	if v := pools[c-minClass].Get(); v != nil {
		b := v.(*Buf)
		b.B = b.B[:n]
		return b
	}
	return &Buf{B: Alloc(1 << c)[:n], class: int8(c - minClass)}
}

// Free returns the buffer to the pool; b and b.B must not be used afterwards.
func (b *Buf) Free() {
	if b == nil || b.class < 0 {
		return
	}
	b.B = b.B[:1<<(int(b.class)+minClass)]
	pools[b.class].Put(b)
}
