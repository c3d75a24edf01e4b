package control

import "sync"

// cell holds the newest value of something and tells who waits that it changed.
// Older values are lost on purpose: everything that goes through a cell is a
// whole picture.
type cell[T any] struct {
	mu   sync.Mutex
	v    T
	gen  uint64 // 0: nothing yet
	next chan struct{}
}

func newCell[T any]() *cell[T] { return &cell[T]{next: make(chan struct{})} }

// set puts a value and wakes the waiters.
func (c *cell[T]) set(v T) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.v = v
	c.gen++
	close(c.next)
	c.next = make(chan struct{})
}

// get gives the newest value, its generation, and a channel that is closed when
// there is a newer one.
func (c *cell[T]) get() (v T, gen uint64, next <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.v, c.gen, c.next
}
