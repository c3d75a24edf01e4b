// Package fs reads GFS2 filesystems and changes them in memory: superblock,
// resource groups, inodes as trees of blocks, directories, extended attributes.
// Changes are gathered in a Tx, which gfs/journal makes atomic on disk.
//
// It takes no locks: the caller owns the filesystem (it is not mounted
// anywhere) or only reads. gfs/mkfs, journal, grow, edit, tool and fsck build
// on it; it imports gfs/ondisk only.
package fs

import (
	"errors"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Errors that callers branch on.
var (
	ErrReadOnly = errors.New("filesystem is opened for reading only")
	ErrNoSpace  = errors.New("no free blocks")
	ErrNotExist = errors.New("no such entry")
	ErrExist    = errors.New("entry exists")
	ErrCorrupt  = errors.New("filesystem is damaged")
	ErrNotDir   = errors.New("not a directory")
	ErrRange    = errors.New("block number outside the filesystem")
)

// Store is where the blocks of a tree live. Block returns the content of a
// block: the store's own bytes, valid until the next call, and to be changed
// only through Dirty. A read-only store answers ErrReadOnly to the rest.
type Store interface {
	Geometry() ondisk.Geometry
	Block(addr uint64) ([]byte, error)
	// Dirty returns the content of a block for change.
	Dirty(addr uint64) ([]byte, error)
	// NewBlock returns a zeroed block for a newly allocated address.
	NewBlock(addr uint64) ([]byte, error)
	// Alloc takes a free block; dinode says for what.
	Alloc(dinode bool) (uint64, error)
	// Free gives a block back.
	Free(addr uint64) error
}
