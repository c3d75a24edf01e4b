// Package powercut records what a program writes to a device and gives back the
// states that a power cut could leave: everything before the last completed
// flush, and any part, in any order, of what was written since. Only tests
// import it.
package powercut

import (
	"fmt"
	"io"
	"math/rand/v2"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
)

// Base is the device before the run.
type Base interface {
	io.ReaderAt
	Size() int64
}

// Recorder is a device over base that remembers the order of writes and
// flushes. Base is not written.
type Recorder struct {
	*disk.Overlay
	base   Base
	epochs [][]write // writes between flushes
}

type write struct {
	off  int64
	data []byte
}

// New records over base.
func New(base Base) *Recorder {
	return &Recorder{Overlay: disk.NewOverlay(base), base: base, epochs: [][]write{nil}}
}

// WriteAt implements disk.Device.
func (r *Recorder) WriteAt(p []byte, off int64) (int, error) {
	last := len(r.epochs) - 1
	r.epochs[last] = append(r.epochs[last], write{off, append([]byte(nil), p...)})
	return r.Overlay.WriteAt(p, off)
}

// Flush ends an epoch.
func (r *Recorder) Flush() error {
	r.epochs = append(r.epochs, nil)
	return nil
}

// Writes counts all writes.
func (r *Recorder) Writes() int {
	n := 0
	for _, e := range r.epochs {
		n += len(e)
	}
	return n
}

const sector = 512

// Each gives f the states after a cut, with a text that says which: for each
// epoch nothing of it, each write of it alone and missing (at most limit of
// each), and random torn subsets. f gets a device that it may write.
func (r *Recorder) Each(seed uint64, limit int, f func(what string, d *disk.Overlay)) error {
	rng := rand.New(rand.NewPCG(seed, 0))
	done := []write{}
	state := func(what string, part []write) error {
		d := disk.NewOverlay(r.base)
		for _, w := range append(append([]write(nil), done...), part...) {
			if _, err := d.WriteAt(w.data, w.off); err != nil {
				return err
			}
		}
		f(what, d)
		return nil
	}
	for i, e := range r.epochs {
		if err := state(fmt.Sprintf("epoch %d: nothing", i), nil); err != nil {
			return err
		}
		step := max(1, len(e)/max(limit, 1))
		for k := 0; k < len(e); k += step {
			if err := state(fmt.Sprintf("epoch %d: write %d of %d alone", i, k, len(e)), e[k:k+1]); err != nil {
				return err
			}
			if err := state(fmt.Sprintf("epoch %d: write %d of %d missing", i, k, len(e)), append(append([]write(nil), e[:k]...), e[k+1:]...)); err != nil {
				return err
			}
		}
		for k := 0; k < limit && len(e) > 1; k++ {
			var part []write
			for _, w := range e {
				switch rng.IntN(3) {
				case 0:
					part = append(part, w)
				case 1: // torn: single sectors of it
					for o := 0; o < len(w.data); o += sector {
						if rng.IntN(2) == 0 {
							part = append(part, write{w.off + int64(o), w.data[o:min(o+sector, len(w.data))]})
						}
					}
				}
			}
			rng.Shuffle(len(part), func(a, b int) {
				// The order shows only where writes overlap, and there any order counts.
				part[a], part[b] = part[b], part[a]
			})
			if err := state(fmt.Sprintf("epoch %d: random part %d (seed %d)", i, k, seed), part); err != nil {
				return err
			}
		}
		done = append(done, e...)
	}
	return nil
}
