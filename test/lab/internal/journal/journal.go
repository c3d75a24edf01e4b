// Package journal writes numbered records to a disk or a file and notes of each, in another place, that its write was
// acknowledged; afterwards it tells which acknowledged records are gone. It is the independent witness of crash tests: it
// shares nothing with the file system or the tools whose survival they judge.
//
// Records lie in slots, the n-th (from 1) in slot (n-1) mod slots, so that a long run needs no more than the space there is.
//
//	record, 4096 bytes   8 magic | 8 run | 8 number | 4068 a pattern of run and number | 4 CRC32C of all before
//	note, 8 bytes        the number, big-endian, appended
package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
)

// Size of a record in bytes; a disk's blocks are not larger.
const Size = 4096

const magic = 0x424c4b4a4f55524e

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fill makes record n of a run in b, Size bytes.
func fill(b []byte, run, n uint64) {
	be := binary.BigEndian
	be.PutUint64(b, magic)
	be.PutUint64(b[8:], run)
	be.PutUint64(b[16:], n)
	r := rand.NewPCG(run, n)
	for i := 24; i+8 < Size; i += 8 {
		be.PutUint64(b[i:], r.Uint64())
	}
	be.PutUint32(b[Size-8:], 0)
	be.PutUint32(b[Size-4:], crc32.Checksum(b[:Size-4], castagnoli))
}

// Writer writes the records 1, 2, … of a run. Buf is where they are made: Size bytes, aligned as To needs it.
type Writer struct {
	To    io.WriterAt // whose WriteAt returns when the data is durable
	Slots uint64
	Run   uint64
	Notes io.Writer
	Buf   []byte
}

// Write writes until stop says so and returns the number of the last record. An error is a write that failed or could not be
// noted.
func (w *Writer) Write(stop func() bool) (uint64, error) {
	var note [8]byte
	for n := uint64(1); ; n++ {
		if stop() {
			return n - 1, nil
		}
		fill(w.Buf, w.Run, n)
		if _, err := w.To.WriteAt(w.Buf, int64((n-1)%w.Slots)*Size); err != nil {
			return n - 1, fmt.Errorf("write record %d: %w", n, err)
		}
		binary.BigEndian.PutUint64(note[:], n)
		if _, err := w.Notes.Write(note[:]); err != nil {
			return n, fmt.Errorf("note record %d: %w", n, err)
		}
	}
}

// Result of a check.
type Result struct {
	Acked uint64 // records that were acknowledged
	Ahead int    // slots that hold a later record than the last one acknowledged there: it was written and its answer was lost
}

// ErrLost tells that an acknowledged record is not there.
var ErrLost = errors.New("acknowledged record is lost")

// Check reads every slot that an acknowledged record went to. notes is what the Writer noted: it may end in a part of a note.
func Check(from io.ReaderAt, slots, run uint64, notes []byte) (Result, error) {
	var r Result
	for ; len(notes) >= 8; notes = notes[8:] {
		n := binary.BigEndian.Uint64(notes)
		if n != r.Acked+1 {
			return r, fmt.Errorf("the notes say %d behind %d", n, r.Acked)
		}
		r.Acked = n
	}
	b, want := make([]byte, Size), make([]byte, Size)
	for slot := range min(slots, r.Acked) {
		last := r.Acked - (r.Acked-1-slot)%slots
		if _, err := from.ReadAt(b, int64(slot)*Size); err != nil {
			return r, fmt.Errorf("read slot %d: %w", slot, err)
		}
		n := binary.BigEndian.Uint64(b[16:])
		fill(want, run, n)
		switch {
		case string(b) != string(want):
			return r, fmt.Errorf("slot %d: %w: want record %d, there is none", slot, ErrLost, last)
		case n < last:
			return r, fmt.Errorf("slot %d: %w: want record %d, there is %d", slot, ErrLost, last, n)
		case n > last+slots || (n-1)%slots != slot:
			return r, fmt.Errorf("slot %d has record %d, and %d was the last acknowledged one", slot, n, last)
		case n > last:
			r.Ahead++
		}
	}
	if r.Ahead > 1 {
		return r, fmt.Errorf("%d records that were not acknowledged: there is one at a time", r.Ahead)
	}
	return r, nil
}
