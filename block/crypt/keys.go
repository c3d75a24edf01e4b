package crypt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// Files keeps a key in a file of two slots, mode 0600. A new key goes to the slot
// that is not in use, durably; then the other is overwritten with zeroes in
// place, durably. At every moment there is one key or, for an instant, two, of
// which Load takes the newer and destroys the other.
//
// Overwriting in place destroys a key as well as the file system and the disk
// let it: on copy-on-write file systems, snapshots and flash a copy may stay.
// Where that matters the key must live elsewhere.
type Files struct {
	path string
	mu   sync.Mutex
}

// A slot, at 0 and at 4096. Frozen: format 1.
//
//	byte 0  magic "BHKEY\x00\x00\x01"   8  sequence number(8)   16  key(64)   80  crc32c of bytes 0 to 80
const (
	slotSize  = 4096
	slotBytes = 84
)

var (
	slotMagic  = [8]byte{'B', 'H', 'K', 'E', 'Y', 0, 0, 1}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// ErrNoKey tells that a key file holds no key.
var ErrNoKey = errors.New("no key in the key file: what was written under it is lost")

// KeyFile returns the keys at path.
func KeyFile(path string) *Files { return &Files{path: path} }

// Create makes the file with a random key. An existing path is fs.ErrExist.
func (f *Files) Create() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	h, err := os.OpenFile(f.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("create key file: %w", err)
	}
	undo := func(err error) error {
		return errors.Join(fmt.Errorf("create key file %s: %w", f.path, err), h.Close(), os.Remove(f.path))
	}
	key, err := NewKey()
	if err != nil {
		return undo(err)
	}
	defer clear(key)
	if err := h.Truncate(2 * slotSize); err != nil {
		return undo(err)
	}
	if err := put(h, 0, 1, key); err != nil {
		return undo(err)
	}
	dir, err := os.Open(filepath.Dir(f.path))
	if err != nil {
		return undo(err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return undo(err)
	}
	if err := h.Close(); err != nil {
		return fmt.Errorf("create key file: %w", err)
	}
	return nil
}

// put writes a slot durably; a nil key wipes it.
func put(h *os.File, slot int, seq uint64, key []byte) error {
	b := make([]byte, slotSize)
	defer clear(b)
	if key != nil {
		copy(b, slotMagic[:])
		binary.BigEndian.PutUint64(b[8:], seq)
		copy(b[16:], key)
		binary.BigEndian.PutUint32(b[80:], crc32.Checksum(b[:80], castagnoli))
	}
	if _, err := h.WriteAt(b, int64(slot)*slotSize); err != nil {
		return err
	}
	return h.Sync()
}

type slot struct {
	seq uint64 // 0 = none
	key []byte
	raw bool // has bytes that are no key: a torn write, or one
}

func slots(h *os.File) (out [2]slot, err error) {
	for i := range out {
		b := make([]byte, slotBytes)
		if _, err := h.ReadAt(b, int64(i)*slotSize); err != nil {
			if errors.Is(err, io.EOF) {
				continue
			}
			return out, err
		}
		out[i].raw = !zero(b[:80])
		if [8]byte(b) == slotMagic && binary.BigEndian.Uint32(b[80:]) == crc32.Checksum(b[:80], castagnoli) {
			out[i].seq, out[i].key = binary.BigEndian.Uint64(b[8:]), b[16:80]
		}
	}
	return out, nil
}

// newest returns the slot in use.
func newest(ss [2]slot) (int, error) {
	switch {
	case ss[0].seq == 0 && ss[1].seq == 0:
		return 0, ErrNoKey
	case ss[1].seq > ss[0].seq:
		return 1, nil
	}
	return 0, nil
}

func (f *Files) open() (*os.File, error) {
	h, err := os.OpenFile(f.path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open key file: %w; bring it back from where it went: without it the store is noise", err)
	}
	return h, err
}

// Load implements Keys. It ends an erase that was cut short.
func (f *Files) Load() (key []byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h, err := f.open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	ss, err := slots(h)
	if err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	}
	i, err := newest(ss)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.path, err)
	}
	if ss[1-i].raw {
		if err := put(h, 1-i, 0, nil); err != nil {
			return nil, fmt.Errorf("destroy the former key: %w", err)
		}
	}
	return ss[i].key, nil
}

// Replace implements Keys.
func (f *Files) Replace(key []byte) (err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h, err := f.open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	ss, err := slots(h)
	if err != nil {
		return fmt.Errorf("read key file: %w", err)
	}
	i, err := newest(ss)
	if err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	if err := put(h, 1-i, ss[i].seq+1, key); err != nil {
		// Which key the next start finds must be the one in use.
		return errors.Join(fmt.Errorf("write the new key: %w", err), put(h, 1-i, 0, nil))
	}
	if err := put(h, i, 0, nil); err != nil {
		return fmt.Errorf("destroy the former key: %w", err)
	}
	return nil
}
