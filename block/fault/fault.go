// Package fault wraps a store with faults for tests: errors, delays, stalls,
// wrong data (Device), and the loss of unflushed writes at a power cut
// (PowerCut). It is no store for data that anyone wants to keep.
//
// Storage row: it imports block only.
package fault

import (
	"context"
	"sync"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
)

// Op is a set of calls of a device.
type Op uint8

// Calls.
const (
	Read Op = 1 << iota
	Write
	Flush
	Unmap
	Zeroes
	Extents
	Any = Read | Write | Flush | Unmap | Zeroes | Extents
)

// Rule is one fault. It matches calls in Ops whose range touches [Off, Off+Len);
// Len 0 matches everywhere.
type Rule struct {
	Ops      Op
	Off, Len int64
	Skip     int             // so many matches pass unharmed first
	Times    int             // then so many are hit; 0 = all
	Err      error           // returned instead of the call
	Delay    time.Duration   // slept before the call
	Hold     <-chan struct{} // waited for before the call: a stalled disk
	// Corrupt flips a bit in the first byte of data read, or of data on its way
	// to the store: a lying disk.
	Corrupt bool

	hits int
}

// Device is a store with faults.
type Device struct {
	block.Device
	mu    sync.Mutex
	rules []*Rule
	hits  int
}

// New wraps d, which New's result closes.
func New(d block.Device, rules ...Rule) *Device {
	f := &Device{Device: d}
	f.Set(rules...)
	return f
}

// Set replaces the rules and their counts.
func (d *Device) Set(rules ...Rule) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules = nil
	for _, r := range rules {
		d.rules = append(d.rules, &r)
	}
}

// Hits is the number of calls that a rule has hit since New.
func (d *Device) Hits() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hits
}

// Inner is the store under the faults (block.Wrapper).
func (d *Device) Inner() block.Device { return d.Device }

func (d *Device) hit(op Op, off, n int64) (r Rule) {
	d.mu.Lock()
	for _, x := range d.rules {
		if x.Ops&op == 0 || x.Len > 0 && (off+n <= x.Off || off >= x.Off+x.Len) {
			continue
		}
		x.hits++
		if x.hits <= x.Skip || x.Times > 0 && x.hits > x.Skip+x.Times {
			continue
		}
		d.hits++
		r = *x
		break
	}
	d.mu.Unlock()
	if r.Delay > 0 {
		time.Sleep(r.Delay)
	}
	if r.Hold != nil {
		<-r.Hold // as a kernel would: ctx does not help
	}
	return r
}

// ReadAt with faults.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	r := d.hit(Read, off, int64(len(p)))
	if r.Err != nil {
		return r.Err
	}
	err := d.Device.ReadAt(ctx, p, off)
	if r.Corrupt && len(p) > 0 {
		p[0] ^= 1
	}
	return err
}

// WriteAt with faults.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	r := d.hit(Write, off, int64(len(p)))
	if r.Err != nil {
		return r.Err
	}
	if r.Corrupt && len(p) > 0 {
		q := append([]byte(nil), p...)
		q[0] ^= 1
		p = q
	}
	return d.Device.WriteAt(ctx, p, off, fl)
}

// Flush with faults.
func (d *Device) Flush(ctx context.Context) error {
	if r := d.hit(Flush, 0, d.Info().Size); r.Err != nil {
		return r.Err
	}
	return d.Device.Flush(ctx)
}

// Unmap with faults.
func (d *Device) Unmap(ctx context.Context, off, n int64) error {
	if r := d.hit(Unmap, off, n); r.Err != nil {
		return r.Err
	}
	return d.Device.Unmap(ctx, off, n)
}

// WriteZeroes with faults.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	if r := d.hit(Zeroes, off, n); r.Err != nil {
		return r.Err
	}
	return d.Device.WriteZeroes(ctx, off, n, fl)
}

// Extents with faults.
func (d *Device) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	if r := d.hit(Extents, off, n); r.Err != nil {
		return nil, r.Err
	}
	return d.Device.Extents(ctx, off, n)
}
