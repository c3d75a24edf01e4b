package block

import "context"

// What only some devices can do. A caller asks by a type assertion and, where
// there is one, by the limits: a wrapper may have the method and nothing to
// offer.

// AtomicWriter is a Device that writes whole or not at all.
type AtomicWriter interface {
	// AtomicLimits returns the longest atomic write and the unit, in bytes, of which
	// offsets and lengths are multiples; 0, 0 if there are none.
	AtomicLimits() (longest, unit int64)
	// WriteAtomic writes p at off. nil: all of it is durable. An error, or a loss
	// of power before it returned: later reads return what was there before.
	WriteAtomic(ctx context.Context, p []byte, off int64) error
}

// CryptoEraser is a Device whose bytes lie encrypted under a key that it can
// destroy.
type CryptoEraser interface {
	// CanCryptoErase tells whether there is a key.
	CanCryptoErase() bool
	// CryptoErase destroys the key and takes a new one, durably. What was written
	// before reads as noise afterwards, and nobody can bring it back.
	CryptoErase(ctx context.Context) error
}
