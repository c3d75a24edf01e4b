// Package integrity keeps a crc32c of every 4 KiB of a store beside it and
// verifies what is read. What does not match is block.ErrChecksum, never data.
//
// Data and checksums lie in two places and a power cut may keep either, so a
// checksum alone cannot tell rot from a cut. Hence intents: before the first
// write into a region of 4 MiB its bit is made durable; the bit goes when data
// and checksums were flushed after the last write, some seconds later. After a
// crash the regions with a bit are *in doubt*: there a mismatch is what a store
// without checksums would have given (the write was never flushed), so the data
// are taken as they are, their checksum is made anew, and that is counted and
// said. Everywhere else a mismatch is damage. So a cut never makes good data
// unreadable, and never hides damage outside of what was being written. See
// docs/formats/integrity.md.
//
// Lock order: units (ascending) → io → st; side sectors are leaves.
//
// Storage row: it imports block only.
package integrity

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
)

// Options of Open.
type Options struct {
	UUID   uuid.UUID // of the volume; the file of checksums carries it
	Logger *zap.Logger
	// Tick is how often idle regions lose their bit; 0 = 5 s, < 0 = never, for
	// tests.
	Tick time.Duration
	// OnBad is told the offset of each unit that is found damaged for the first
	// time. It must not block. nil = none.
	OnBad func(off int64)
}

// maxHot is how many regions may have a bit before those that can lose it do so
// at once: 4 GiB that a crash may put in doubt.
const maxHot = 1024

// piece is what is locked and moved at a time.
const (
	piece     = 1 << 20
	zeroPiece = 64 << 20
)

// Device is a store with checksums. It implements block.Device.
type Device struct {
	data, side block.Device
	o          Options
	g          geometry
	info       block.Info

	units [1024]sync.RWMutex // by unit number modulo; a unit's data and entry change together
	secs  [64]sync.Mutex     // by sector of entries modulo; its read-modify-write

	io sync.Mutex // who writes intents
	st struct {
		sync.Mutex
		bits    []*intents
		hot     map[int64]*hot
		pending map[int64]bool   // hot, and its bit is not durable
		doubt   map[int64]uint64 // region → number of the doubt
		doubts  uint64
		gen     uint64 // rises with each flush
		flushed uint64 // writes up to this generation are durable, with their entries
		tick    uint64
		flushes uint64 // how many, to see that somebody flushes
		bad     map[int64]bool
	}
	failed  atomic.Pointer[error]
	damaged bool // intents that could not be read at open

	verified, mismatches, adopted atomic.Uint64

	scrub scrubber

	life   sync.RWMutex
	closed bool // guarded by life
	stop   context.CancelFunc
	kick   chan struct{}
	wg     sync.WaitGroup
}

// hot is a region that was written to.
type hot struct {
	inflight int
	gen      uint64 // generation of the last write
	tick     uint64 // of the last write
}

// Format makes an empty file of checksums on side, which must read as zeroes and
// have SideSize bytes. With adopt the store has data already: everything is in
// doubt until it was read once.
func Format(ctx context.Context, side block.Device, size int64, id uuid.UUID, adopt bool) error {
	g := geometryOf(size)
	if got := side.Info().Size; got != g.total {
		return fmt.Errorf("format checksums: %d bytes, want %d", got, g.total)
	}
	for n := range g.sectors {
		s := newIntents(n)
		for k := int64(0); adopt && k < perSector && n*perSector+k < g.regions; k++ {
			s.set(k, true)
		}
		s.seal()
		if err := side.WriteAt(ctx, s[:], intentsAt+n*sector, 0); err != nil {
			return fmt.Errorf("format checksums: %w", err)
		}
	}
	if err := side.Flush(ctx); err != nil {
		return fmt.Errorf("format checksums: %w", err)
	}
	// The marker comes last.
	h := header(size, id)
	if err := errors.Join(side.WriteAt(ctx, h, 0, block.FUA), side.WriteAt(ctx, h, sector, block.FUA)); err != nil {
		return fmt.Errorf("format checksums: %w", err)
	}
	return nil
}

// Open puts the checksums on side over data. Close closes both; if Open fails
// they are the caller's.
func Open(ctx context.Context, data, side block.Device, o Options) (*Device, error) {
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Tick == 0 {
		o.Tick = 5 * time.Second
	}
	d := &Device{data: data, side: side, o: o, g: geometryOf(data.Info().Size), info: data.Info(), kick: make(chan struct{}, 1)}
	d.info.Caps.UnmapZeroes = true
	d.st.hot, d.st.pending, d.st.doubt, d.st.bad = map[int64]*hot{}, map[int64]bool{}, map[int64]uint64{}, map[int64]bool{}
	d.st.gen, d.st.doubts = 1, 1
	if err := d.load(ctx); err != nil {
		return nil, fmt.Errorf("open checksums: %w", err)
	}
	run, stop := context.WithCancel(context.Background())
	d.stop = stop
	if o.Tick > 0 {
		d.wg.Go(func() { d.keep(run) })
	}
	return d, nil
}

func (d *Device) load(ctx context.Context) error {
	if got := d.side.Info().Size; got != d.g.total {
		return fmt.Errorf("%d bytes, want %d", got, d.g.total)
	}
	b := make([]byte, 2*sector)
	if err := d.side.ReadAt(ctx, b, 0); err != nil {
		return err
	}
	if err := parseHeader(b[:sector], d.g.size, d.o.UUID); err != nil && parseHeader(b[sector:], d.g.size, d.o.UUID) != nil {
		return err
	}
	for n := range d.g.sectors {
		s := &intents{}
		err := d.side.ReadAt(ctx, s[:], intentsAt+n*sector)
		if err == nil && !s.valid(n) {
			err = fmt.Errorf("%w: intents", block.ErrChecksum)
		}
		if err != nil {
			// What was being written is not known: all of it may have been.
			d.damaged = true
			d.o.Logger.Error("intents are damaged: their part of the store is in doubt", zap.Int64("sector", n), zap.Error(err))
			s = newIntents(n)
			for k := range int64(perSector) {
				s.set(k, true)
			}
			s.seal()
			if err := d.side.WriteAt(ctx, s[:], intentsAt+n*sector, block.FUA); err != nil {
				return err
			}
		}
		for k := int64(0); k < perSector && n*perSector+k < d.g.regions; k++ {
			if s.get(k) {
				d.st.doubt[n*perSector+k] = 0
			}
		}
		d.st.bits = append(d.st.bits, s)
	}
	if n := len(d.st.doubt); n > 0 {
		d.o.Logger.Warn("the store was not closed: what was being written is in doubt", zap.Int("regions", n))
	}
	return nil
}

// Inner is the store under the checksums (block.Wrapper).
func (d *Device) Inner() block.Device { return d.data }

// Info tells what the store is.
func (d *Device) Info() block.Info { return d.info }

// Failed is why the store is lost (block.Failer).
func (d *Device) Failed() error {
	if e := d.failed.Load(); e != nil {
		return *e
	}
	if err := block.Failed(d.data); err != nil {
		return err
	}
	return block.Failed(d.side)
}

// fail: the checksums can no longer be made durable.
func (d *Device) fail(err error) error {
	if !errors.Is(err, block.ErrFlushFailed) {
		err = fmt.Errorf("%w: %w", block.ErrFlushFailed, err)
	}
	err = fmt.Errorf("checksums: %w", err)
	if d.failed.CompareAndSwap(nil, &err) {
		d.o.Logger.Error("the checksums cannot be made durable: the store accepts no more writes", zap.Error(err))
	}
	return *d.failed.Load()
}

// enter begins a call; after nil the caller runs d.life.RUnlock.
func (d *Device) enter(ctx context.Context, off, n int64, write bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.life.RLock()
	err := d.info.Check(off, n)
	switch {
	case d.closed:
		err = block.ErrClosed
	case err == nil && write:
		if d.info.Caps.ReadOnly {
			err = block.ErrReadOnly
		} else if e := d.failed.Load(); e != nil {
			err = *e
		}
	}
	if err != nil {
		d.life.RUnlock()
	}
	return err
}

// lock takes the units [u, u+n), in one order for all.
func (d *Device) lock(u, n int64, write bool) (unlock func()) {
	const m = int64(len(d.units))
	parts := [2][2]int64{{u % m, min(u%m+n, m)}, {0, 0}}
	if n >= m {
		parts[0] = [2]int64{0, m}
	} else if u%m+n > m {
		parts = [2][2]int64{{0, u%m + n - m}, {u % m, m}}
	}
	for _, p := range parts {
		for k := p[0]; k < p[1]; k++ {
			if write {
				d.units[k].Lock()
			} else {
				d.units[k].RLock()
			}
		}
	}
	return func() {
		for _, p := range parts {
			for k := p[0]; k < p[1]; k++ {
				if write {
					d.units[k].Unlock()
				} else {
					d.units[k].RUnlock()
				}
			}
		}
	}
}

// span is the units of a range and their bytes.
func (d *Device) span(off, n int64) (u, k, from, to int64) {
	u = off / unit
	k = (off+n+unit-1)/unit - u
	return u, k, u * unit, min((u+k)*unit, d.g.size)
}

// entries calls f with the entries of the units [u, u+n). With store it writes
// them back if f says that it changed them: holes stay holes.
func (d *Device) entries(ctx context.Context, u, n int64, store bool, f func(e []byte) (changed bool)) error {
	s0, s1 := u/perEntries, (u+n-1)/perEntries
	buf := block.Get(int(s1-s0+1) * sector)
	defer buf.Free()
	if store {
		// At most zeroPiece of data, so 128 sectors; more than there are locks means
		// all of them.
		for _, k := range sectorLocks(s0, s1, int64(len(d.secs))) {
			d.secs[k].Lock()
			defer d.secs[k].Unlock()
		}
	}
	at := d.g.entries + s0*sector
	if err := d.side.ReadAt(ctx, buf.B, at); err != nil {
		return fmt.Errorf("read checksums: %w", err)
	}
	if f(buf.B[(u-s0*perEntries)*4:][:n*4]) && store {
		if err := d.side.WriteAt(ctx, buf.B, at, 0); err != nil {
			return fmt.Errorf("write checksums: %w", err)
		}
	}
	return nil
}

func sectorLocks(s0, s1, m int64) []int64 {
	var out []int64
	for s := s0; s <= s1 && s-s0 < m; s++ {
		out = append(out, s%m)
	}
	slices.Sort(out)
	return out
}

// put writes the sums of the whole units in p, which begins at unit u.
func (d *Device) put(u int64, p []byte) error {
	n := (int64(len(p)) + unit - 1) / unit
	return d.entries(background, u, n, true, func(e []byte) (changed bool) {
		for k := range n {
			v := sum(p[k*unit : min((k+1)*unit, int64(len(p)))])
			changed = changed || v != binary.LittleEndian.Uint32(e[4*k:])
			binary.LittleEndian.PutUint32(e[4*k:], v)
		}
		return changed
	})
}

// background: what has begun is not left half done because a caller lost
// interest.
var background = context.Background()

// check compares whole units with their entries. A mismatch in doubt is adopted;
// any other is returned, with the first of them as the error.
func (d *Device) check(ctx context.Context, u int64, p []byte) (bad int, err error) {
	n := (int64(len(p)) + unit - 1) / unit
	var off []int64
	err = d.entries(ctx, u, n, false, func(e []byte) bool {
		for k := range n {
			if binary.LittleEndian.Uint32(e[4*k:]) != sum(p[k*unit:min((k+1)*unit, int64(len(p)))]) {
				off = append(off, k)
			}
		}
		return false
	})
	d.verified.Add(uint64(n))
	if err != nil {
		return 0, err
	}
	for _, k := range off {
		q := p[k*unit : min((k+1)*unit, int64(len(p)))]
		r := (u + k) * unit / region
		d.st.Lock()
		_, doubt := d.st.doubt[r]
		d.st.Unlock()
		if doubt {
			if e := d.put(u+k, q); e != nil {
				return bad, e
			}
			d.adopted.Add(1)
			continue
		}
		bad++
		d.mismatches.Add(1)
		d.found((u + k) * unit)
		if err == nil {
			err = fmt.Errorf("%w: 4096 bytes at %d", block.ErrChecksum, (u+k)*unit)
		}
	}
	return bad, err
}

// maxBad bounds the list of damaged units.
const maxBad = 1024

func (d *Device) found(off int64) {
	d.st.Lock()
	known := d.st.bad[off] || len(d.st.bad) >= maxBad
	if !known {
		d.st.bad[off] = true
	}
	d.st.Unlock()
	if known {
		return
	}
	d.o.Logger.Error("data do not match their checksum", zap.Int64("offset", off))
	if d.o.OnBad != nil {
		d.o.OnBad(off)
	}
}

// healed: units that were written whole are damaged no more.
func (d *Device) healed(u, n int64) {
	d.st.Lock()
	defer d.st.Unlock()
	for off := range d.st.bad {
		if off >= u*unit && off < (u+n)*unit {
			delete(d.st.bad, off)
		}
	}
}

// ReadAt fills p from off with what matches its checksums.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.enter(ctx, off, int64(len(p)), false); err != nil {
		return err
	}
	defer d.life.RUnlock()
	for len(p) > 0 {
		n := min(int64(len(p)), piece-off%piece)
		if err := d.read(ctx, p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (d *Device) read(ctx context.Context, p []byte, off int64) error {
	u, n, from, to := d.span(off, int64(len(p)))
	unlock := d.lock(u, n, false)
	defer unlock()
	if from == off && to == off+int64(len(p)) {
		if err := d.data.ReadAt(ctx, p, off); err != nil {
			return err
		}
		_, err := d.check(ctx, u, p)
		return err
	}
	buf := block.Get(int(to - from))
	defer buf.Free()
	if err := d.data.ReadAt(ctx, buf.B, from); err != nil {
		return err
	}
	if _, err := d.check(ctx, u, buf.B); err != nil {
		return err
	}
	copy(p, buf.B[off-from:])
	return nil
}

// begin makes the intents of the regions durable and counts a write in them.
func (d *Device) begin(off, n int64) error {
	r0, r1 := off/region, (off+n-1)/region
	d.st.Lock()
	wait := false
	for r := r0; r <= r1; r++ {
		h := d.st.hot[r]
		if h == nil {
			h = &hot{}
			d.st.hot[r] = h
			if !d.st.bits[r/perSector].get(r % perSector) {
				d.st.pending[r] = true
			}
		}
		h.inflight++
		h.gen, h.tick = d.st.gen, d.st.tick
		wait = wait || d.st.pending[r]
	}
	full := len(d.st.hot) > maxHot
	d.st.Unlock()
	if full {
		select {
		case d.kick <- struct{}{}:
		default:
		}
	}
	if !wait {
		return nil
	}
	if err := d.persist(r0, r1); err != nil {
		d.end(off, n)
		return fmt.Errorf("write intent: %w", err)
	}
	return nil
}

// end counts a write out. It is dirty from now on, until a flush that begins
// later.
func (d *Device) end(off, n int64) {
	d.st.Lock()
	defer d.st.Unlock()
	for r := off / region; r <= (off+n-1)/region; r++ {
		h := d.st.hot[r]
		h.inflight--
		h.gen = d.st.gen
	}
}

// persist writes the bits of all that wait for it; whoever comes meanwhile goes
// with the next round.
func (d *Device) persist(r0, r1 int64) error {
	d.io.Lock()
	defer d.io.Unlock()
	d.st.Lock()
	mine := false
	for r := r0; r <= r1; r++ {
		mine = mine || d.st.pending[r]
	}
	if !mine { // somebody's round took them along
		d.st.Unlock()
		return nil
	}
	var all []int64
	secs := map[int64]*intents{}
	for r := range d.st.pending {
		all = append(all, r)
		s := d.st.bits[r/perSector]
		s.set(r%perSector, true)
		secs[r/perSector] = s
	}
	out := sealed(secs)
	d.st.Unlock()
	for n, s := range out {
		if err := d.side.WriteAt(background, s[:], intentsAt+n*sector, block.FUA); err != nil {
			return err // they stay pending
		}
	}
	d.st.Lock()
	for _, r := range all {
		delete(d.st.pending, r)
	}
	d.st.Unlock()
	return nil
}

// sealed copies sectors for writing; st is held.
func sealed(secs map[int64]*intents) map[int64]intents {
	out := map[int64]intents{}
	for n, s := range secs {
		s.seal()
		out[n] = *s
	}
	return out
}

// unsure puts the regions of a failed write in doubt: what is on the disk now is
// old or new.
func (d *Device) unsure(off, n int64) {
	d.st.Lock()
	for r := off / region; r <= (off+n-1)/region; r++ {
		d.st.doubts++
		d.st.doubt[r] = d.st.doubts
	}
	d.st.Unlock()
}

// WriteAt writes p and its checksums.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	if err := d.enter(ctx, off, int64(len(p)), true); err != nil {
		return err
	}
	defer d.life.RUnlock()
	for len(p) > 0 {
		n := min(int64(len(p)), piece-off%piece)
		if err := d.write(ctx, p[:n], off, fl); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (d *Device) write(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	u, n, from, to := d.span(off, int64(len(p)))
	unlock := d.lock(u, n, true)
	defer unlock()
	whole := p
	if from != off || to != off+int64(len(p)) {
		// Part of a unit: what is around it must be right, or its damage would get a
		// good checksum.
		buf := block.Get(int(to - from))
		defer buf.Free()
		if err := d.around(ctx, buf.B, u, from, off, int64(len(p))); err != nil {
			return err
		}
		copy(buf.B[off-from:], p)
		whole = buf.B
	}
	if err := d.begin(off, int64(len(p))); err != nil {
		return err
	}
	defer d.end(off, int64(len(p)))
	err := d.data.WriteAt(background, p, off, fl)
	if err == nil {
		err = d.put(u, whole)
	}
	if err != nil {
		d.unsure(off, int64(len(p)))
		return err
	}
	d.healed(u, n)
	return nil
}

// around reads and verifies the first and the last unit of b, which begins at
// from, as far as [off, off+n) does not cover them whole.
func (d *Device) around(ctx context.Context, b []byte, u, from, off, n int64) error {
	one := func(at int64) error {
		q := b[at:min(at+unit, int64(len(b)))]
		if err := d.data.ReadAt(ctx, q, from+at); err != nil {
			return err
		}
		_, err := d.check(ctx, u+at/unit, q)
		return err
	}
	last := (int64(len(b)) - 1) / unit * unit
	if off != from {
		if err := one(0); err != nil {
			return err
		}
	}
	if off+n != from+int64(len(b)) && (last > 0 || off == from) {
		return one(last)
	}
	return nil
}

// Unmap deallocates; the range reads as zeroes.
func (d *Device) Unmap(ctx context.Context, off, n int64) error {
	return d.zero(ctx, off, n, func(off, n int64) error {
		if d.data.Info().Caps.UnmapZeroes {
			return d.data.Unmap(background, off, n)
		}
		return d.data.WriteZeroes(background, off, n, block.MayUnmap)
	})
}

// WriteZeroes makes the range read as zeroes.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	return d.zero(ctx, off, n, func(off, n int64) error { return d.data.WriteZeroes(background, off, n, fl) })
}

func (d *Device) zero(ctx context.Context, off, n int64, do func(off, n int64) error) error {
	if err := d.enter(ctx, off, n, true); err != nil {
		return err
	}
	defer d.life.RUnlock()
	for n > 0 {
		k := min(n, zeroPiece-off%zeroPiece)
		if err := d.zeroOne(ctx, off, k, do); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func (d *Device) zeroOne(ctx context.Context, off, n int64, do func(off, n int64) error) error {
	u, k, from, to := d.span(off, n)
	unlock := d.lock(u, k, true)
	defer unlock()
	// The units that are zeroed in part, with what is left of them.
	type part struct {
		u int64
		p []byte
	}
	var parts []part
	add := func(at int64) error {
		q := make([]byte, min(unit, d.g.size-at))
		if err := d.data.ReadAt(ctx, q, at); err != nil {
			return err
		}
		if _, err := d.check(ctx, at/unit, q); err != nil {
			return err
		}
		clear(q[max(off-at, 0):min(off+n-at, int64(len(q)))])
		parts = append(parts, part{at / unit, q})
		return nil
	}
	last := (to - 1) / unit * unit
	if from != off {
		if err := add(from); err != nil {
			return err
		}
	}
	if to != off+n && (last != from || from == off) {
		if err := add(last); err != nil {
			return err
		}
	}
	if err := d.begin(off, n); err != nil {
		return err
	}
	defer d.end(off, n)
	err := do(off, n)
	if err == nil {
		err = d.entries(background, u, k, true, func(e []byte) bool {
			old := slices.ContainsFunc(e, func(b byte) bool { return b != 0 })
			clear(e)
			for _, x := range parts {
				binary.LittleEndian.PutUint32(e[4*(x.u-u):], sum(x.p))
			}
			return old || len(parts) > 0
		})
	}
	if err != nil {
		d.unsure(off, n)
		return err
	}
	d.healed(u, k)
	return nil
}

// Flush makes data and checksums durable.
func (d *Device) Flush(ctx context.Context) error {
	if err := d.enter(ctx, 0, 0, true); err != nil {
		if errors.Is(err, block.ErrReadOnly) {
			return nil
		}
		return err
	}
	defer d.life.RUnlock()
	return d.flush()
}

func (d *Device) flush() error {
	d.st.Lock()
	gen := d.st.gen
	d.st.gen++
	d.st.flushes++
	d.st.Unlock()
	if err := d.data.Flush(background); err != nil {
		return err
	}
	if err := d.side.Flush(background); err != nil {
		return d.fail(err)
	}
	d.st.Lock()
	d.st.flushed = max(d.st.flushed, gen)
	d.st.Unlock()
	return nil
}

// Extents are the data's.
func (d *Device) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	if err := d.enter(ctx, off, n, false); err != nil {
		return nil, err
	}
	defer d.life.RUnlock()
	return d.data.Extents(ctx, off, n)
}

// cool takes the bits of regions that idle says are idle, where all is durable.
// A bit that goes needs not be durable: one too many costs a doubt only.
func (d *Device) cool(idle func(*hot) bool, fl block.Flags) error {
	d.io.Lock()
	defer d.io.Unlock()
	d.st.Lock()
	secs := map[int64]*intents{}
	for r, h := range d.st.hot {
		if _, doubt := d.st.doubt[r]; doubt || h.inflight > 0 || h.gen > d.st.flushed || d.st.pending[r] || !idle(h) {
			continue
		}
		delete(d.st.hot, r)
		s := d.st.bits[r/perSector]
		s.set(r%perSector, false)
		secs[r/perSector] = s
	}
	out := sealed(secs)
	d.st.Unlock()
	for n, s := range out {
		if err := d.side.WriteAt(background, s[:], intentsAt+n*sector, fl); err != nil {
			return fmt.Errorf("write intents: %w", err)
		}
	}
	return nil
}

// keep takes bits away from idle regions and settles doubts.
func (d *Device) keep(ctx context.Context) {
	t := time.NewTicker(d.o.Tick)
	defer t.Stop()
	var seen, tried, triedAt uint64
	for {
		d.st.Lock()
		again := d.st.doubts != tried || d.st.tick >= triedAt+60
		if again {
			tried, triedAt = d.st.doubts, d.st.tick
		}
		d.st.Unlock()
		if again {
			d.settle(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			d.st.Lock()
			d.st.tick++
			d.st.Unlock()
		case <-d.kick:
		}
		if ctx.Err() != nil || d.Failed() != nil {
			continue
		}
		d.st.Lock()
		now, full := d.st.tick, len(d.st.hot) > maxHot
		dirty := false
		for _, h := range d.st.hot {
			dirty = dirty || h.gen > d.st.flushed
		}
		quiet := d.st.flushes == seen
		seen = d.st.flushes
		d.st.Unlock()
		if dirty && (quiet || full) {
			if err := d.Flush(ctx); err != nil {
				continue // sticky, and whoever flushes next hears it
			}
			seen++
		}
		if err := d.cool(func(h *hot) bool { return full && h.tick < now || h.tick+2 <= now }, 0); err != nil && ctx.Err() == nil {
			d.o.Logger.Warn("idle regions keep their intent", zap.Error(err))
		}
	}
}

// settle reads the regions in doubt, so that they have right checksums again.
func (d *Device) settle(ctx context.Context) {
	d.st.Lock()
	var rs []int64
	for r := range d.st.doubt {
		rs = append(rs, r)
	}
	d.st.Unlock()
	if len(rs) == 0 {
		return
	}
	slices.Sort(rs)
	before, left := d.adopted.Load(), 0
	for _, r := range rs {
		if err := d.settleOne(ctx, r); err != nil {
			if ctx.Err() != nil {
				return
			}
			left++
			d.o.Logger.Warn("a region stays in doubt", zap.Int64("offset", r*region), zap.Error(err))
		}
	}
	if n := d.adopted.Load() - before; n > 0 || left == 0 {
		d.o.Logger.Warn("regions in doubt have their checksums again", zap.Int("regions", len(rs)-left), zap.Uint64("taken_as_they_are", n))
	}
}

func (d *Device) settleOne(ctx context.Context, r int64) error {
	d.st.Lock()
	number, ok := d.st.doubt[r]
	d.st.Unlock()
	if !ok {
		return nil
	}
	for off := r * region; off < min((r+1)*region, d.g.size); off += piece {
		began := time.Now()
		if _, err := d.scan(ctx, off, min(piece, d.g.size-off)); err != nil {
			return err
		}
		// Half of the time is for others.
		if !pause(ctx, time.Since(began)) {
			return ctx.Err()
		}
	}
	d.st.Lock()
	defer d.st.Unlock()
	if d.st.doubt[r] == number { // else a write failed meanwhile
		delete(d.st.doubt, r)
		h := d.st.hot[r]
		if h == nil {
			h = &hot{}
			d.st.hot[r] = h
		}
		// The entries that were made anew go with the next flush.
		h.gen, h.tick = d.st.gen, d.st.tick
	}
	return nil
}

func pause(ctx context.Context, t time.Duration) bool {
	if t <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// scan verifies one piece; bad is how many units of it are damaged. A hole whose
// entries are zero needs no reading.
func (d *Device) scan(ctx context.Context, off, n int64) (bad int, err error) {
	if err := d.enter(ctx, off, 0, false); err != nil {
		return 0, err
	}
	defer d.life.RUnlock()
	u, k, _, _ := d.span(off, n)
	unlock := d.lock(u, k, false)
	defer unlock()
	if d.data.Info().Caps.UnmapZeroes {
		es, err := d.data.Extents(ctx, off, n)
		if err != nil {
			return 0, err
		}
		if len(es) == 1 && !es[0].Mapped {
			zero := true
			if err := d.entries(ctx, u, k, false, func(e []byte) bool {
				zero = !slices.ContainsFunc(e, func(b byte) bool { return b != 0 })
				return false
			}); err != nil {
				return 0, err
			}
			if zero {
				d.verified.Add(uint64(k))
				return 0, nil
			}
		}
	}
	buf := block.Get(int(n))
	defer buf.Free()
	if err := d.data.ReadAt(ctx, buf.B, off); err != nil {
		return 0, err
	}
	bad, err = d.check(ctx, u, buf.B)
	if errors.Is(err, block.ErrChecksum) {
		err = nil
	}
	return bad, err
}

// Stats of a device.
type Stats struct {
	Verified   uint64  `json:"verified"`          // units compared since the open
	Mismatches uint64  `json:"mismatches"`        // comparisons that failed
	Adopted    uint64  `json:"adopted"`           // units in doubt that were taken as they are
	Doubt      int     `json:"doubt"`             // regions in doubt
	Bad        []int64 `json:"bad,omitempty"`     // offsets of damaged units, at most 16
	BadUnits   int     `json:"bad_units"`         // how many are known, at most 1024
	Damaged    bool    `json:"damaged,omitempty"` // the intents themselves were damaged
	Scrub      Scrub   `json:"scrub"`
}

// Stats tells what was found.
func (d *Device) Stats() Stats {
	s := Stats{Verified: d.verified.Load(), Mismatches: d.mismatches.Load(), Adopted: d.adopted.Load(), Damaged: d.damaged, Scrub: d.scrub.get()}
	d.st.Lock()
	defer d.st.Unlock()
	s.Doubt, s.BadUnits = len(d.st.doubt), len(d.st.bad)
	for off := range d.st.bad {
		s.Bad = append(s.Bad, off)
	}
	slices.Sort(s.Bad)
	if len(s.Bad) > 16 {
		s.Bad = s.Bad[:16]
	}
	return s
}

// Close waits for every call in flight, makes everything durable and takes the
// intents back, so that nothing is in doubt at the next open.
func (d *Device) Close() error {
	d.stop()
	d.scrub.end()
	d.wg.Wait()
	d.life.Lock()
	defer d.life.Unlock()
	if d.closed {
		return fmt.Errorf("close checksums: %w", block.ErrClosed)
	}
	d.closed = true
	var err error
	if !d.info.Caps.ReadOnly {
		if err = d.Failed(); err == nil {
			err = d.flush()
		}
		if err == nil {
			err = d.cool(func(*hot) bool { return true }, block.FUA)
		}
	}
	if e := errors.Join(d.data.Close(), d.side.Close()); err == nil {
		err = e
	}
	return err
}
