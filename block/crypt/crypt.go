// Package crypt encrypts a store (AES-256 in XTS mode, IEEE 1619, the tweak is
// the block's number), so that destroying one key destroys everything that was
// ever written: SANITIZE CRYPTOGRAPHIC ERASE (SBC-3 4.11.2.4).
//
// It does not authenticate: who can write to the inner store can change blocks,
// and the checksums of another layer are what finds that. A block of zeroes below
// is unmapped here and reads as zeroes, so that holes stay holes; a ciphertext of
// only zeroes does not come up in the life of a universe.
//
// Storage row: it imports block and x/crypto.
package crypt

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/crypto/xts"

	"github.com/blockhouse-san/blockhouse/block"
)

// KeySize is the size of a key in bytes: two AES-256 keys.
const KeySize = 64

// Keys keeps the key of one store. Files is the one on files; a cluster may keep
// keys sealed elsewhere.
type Keys interface {
	// Load returns the key.
	Load() ([]byte, error)
	// Replace makes key the key. When it returns nil the former one cannot be had
	// any more, also after a loss of power.
	Replace(key []byte) error
}

// Device is an encrypted store. It implements block.CryptoEraser, and
// block.AtomicWriter as far as the inner store does.
type Device struct {
	inner block.Device
	keys  Keys

	// mu is read-locked by every call that uses the key.
	mu  sync.RWMutex
	xts *xts.Cipher
}

// Open encrypts inner under the key of keys.
func Open(inner block.Device, keys Keys) (*Device, error) {
	key, err := keys.Load()
	if err != nil {
		return nil, fmt.Errorf("open encrypted store: %w", err)
	}
	c, err := newCipher(key)
	if err != nil {
		return nil, fmt.Errorf("open encrypted store: %w", err)
	}
	return &Device{inner: inner, keys: keys, xts: c}, nil
}

func newCipher(key []byte) (*xts.Cipher, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("a key of %d bytes, want %d", len(key), KeySize)
	}
	return xts.NewCipher(func(k []byte) (cipher.Block, error) { return aes.NewCipher(k) }, key)
}

// NewKey makes a random key.
func NewKey() ([]byte, error) {
	k := make([]byte, KeySize)
	if _, err := rand.Read(k); err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return k, nil
}

// Inner is the store of ciphertext (block.Wrapper).
func (d *Device) Inner() block.Device { return d.inner }

// Info is the inner store's.
func (d *Device) Info() block.Info { return d.inner.Info() }

func zero(b []byte) bool {
	for len(b) >= 8 {
		if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
			return false
		}
		b = b[8:]
	}
	return true
}

// ReadAt reads and decrypts.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.inner.ReadAt(ctx, p, off); err != nil {
		return err
	}
	bs := d.inner.Info().BlockSize
	for o := 0; o < len(p); o += bs {
		if b := p[o : o+bs]; !zero(b) {
			d.xts.Decrypt(b, b, uint64(off+int64(o))/uint64(bs))
		}
	}
	return nil
}

func (d *Device) encrypt(dst, src []byte, off int64) {
	bs := d.inner.Info().BlockSize
	for o := 0; o < len(src); o += bs {
		d.xts.Encrypt(dst[o:o+bs], src[o:o+bs], uint64(off+int64(o))/uint64(bs))
	}
}

// WriteAt encrypts and writes.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.inner.Info().Check(off, int64(len(p))); err != nil {
		return err
	}
	if len(p) == 0 {
		return d.inner.WriteAt(ctx, p, off, fl)
	}
	b := block.Get(min(len(p), 1<<20))
	defer b.Free()
	for len(p) > 0 {
		c := b.B[:min(len(p), len(b.B))]
		d.encrypt(c, p[:len(c)], off)
		if err := d.inner.WriteAt(ctx, c, off, fl); err != nil {
			return err
		}
		p, off = p[len(c):], off+int64(len(c))
	}
	return nil
}

// AtomicLimits are the inner store's.
func (d *Device) AtomicLimits() (longest, unit int64) {
	if a, ok := d.inner.(block.AtomicWriter); ok {
		return a.AtomicLimits()
	}
	return 0, 0
}

// WriteAtomic encrypts and writes, whole or not at all.
func (d *Device) WriteAtomic(ctx context.Context, p []byte, off int64) error {
	a, ok := d.inner.(block.AtomicWriter)
	if !ok {
		return errors.New("atomic write: the store has none")
	}
	if err := d.inner.Info().Check(off, int64(len(p))); err != nil {
		return err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	b := block.Get(len(p))
	defer b.Free()
	d.encrypt(b.B, p, off)
	return a.WriteAtomic(ctx, b.B, off)
}

// Flush flushes the inner store.
func (d *Device) Flush(ctx context.Context) error { return d.inner.Flush(ctx) }

// Unmap unmaps in the inner store.
func (d *Device) Unmap(ctx context.Context, off, n int64) error { return d.inner.Unmap(ctx, off, n) }

// WriteZeroes writes zeroes, which are not encrypted.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	return d.inner.WriteZeroes(ctx, off, n, fl)
}

// Extents are the inner store's.
func (d *Device) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	return d.inner.Extents(ctx, off, n)
}

// CanCryptoErase is true.
func (d *Device) CanCryptoErase() bool { return !d.inner.Info().Caps.ReadOnly }

// CryptoErase destroys the key and takes a new one, after every call in flight
// has ended. An error leaves the former key in use.
func (d *Device) CryptoErase(context.Context) error {
	key, err := NewKey()
	if err != nil {
		return fmt.Errorf("cryptographic erase: %w", err)
	}
	c, err := newCipher(key)
	if err != nil {
		return fmt.Errorf("cryptographic erase: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.keys.Replace(key); err != nil {
		return fmt.Errorf("cryptographic erase: %w", err)
	}
	d.xts = c
	clear(key)
	return nil
}

// Close closes the inner store.
func (d *Device) Close() error { return d.inner.Close() }
