package initiator

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// maxTransfer is what one READ or WRITE moves at most, in bytes, where the logical
// unit allows it: longer ones only make other commands wait.
const maxTransfer = 1 << 20

// parallel is how many commands one long ReadAt or WriteAt has in flight.
const parallel = 4

// How often and how long a command is repeated that the target did not do: each unit
// attention is reported once per nexus, so a handful may be pending; a busy or
// transitioning target gets time.
const (
	maxAttentions = 16
	maxAborted    = 3
	busyFor       = 30 * time.Second
	busyFirst     = 5 * time.Millisecond
	busyMax       = 500 * time.Millisecond
)

// Device is a logical unit as a block.Device. It does not own the session.
//
// What a target did not do is repeated: unit attentions, BUSY, TASK SET FULL, a
// transition (02/04/01, 02/04/0A) for up to 30 s, ABORTED COMMAND three times. What
// it failed is reported as block's errors. A changed capacity (06/2A/09) is read
// again.
type Device struct {
	s    *Session
	lun  scsi.LUN
	info atomic.Pointer[block.Info]
	lim  limits

	flushErr atomic.Pointer[error] // sticky, see block.Device

	mu struct {
		sync.Mutex
		closed bool
		calls  int
		idle   chan struct{}
	}
	closeSession bool
}

var _ block.Device = (*Device)(nil)

// limits of a logical unit. Numbers are logical blocks, 0 = none told.
type limits struct {
	transfer   uint32 // of READ and WRITE, never 0
	writeSame  uint64
	unmap      uint32 // in all descriptors of one UNMAP
	unmapDescs uint32
	fua        bool // DPOFUA: the FUA bit is understood
	useUnmap   bool // LBPU
	useSame    bool // LBPWS: WRITE SAME (16) can unmap
	noSame     atomic.Bool
	noStatus   atomic.Bool // GET LBA STATUS is not supported
}

// OpenLUN opens a logical unit: it waits for it to be ready, and reads its capacity,
// limits, provisioning and cache mode. Only direct access devices with blocks of 512
// or 4096 bytes are taken. Close the device before the session.
func (s *Session) OpenLUN(ctx context.Context, lun scsi.LUN) (block.Device, error) {
	d, err := s.openLUN(ctx, lun)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func (s *Session) openLUN(ctx context.Context, lun scsi.LUN) (*Device, error) {
	d := &Device{s: s, lun: lun}
	if err := d.probe(ctx); err != nil {
		return nil, fmt.Errorf("open %s lun %d: %w", s.target, lun, err)
	}
	return d, nil
}

// ReportLUNs returns the logical units of the target (REPORT LUNS, all that are not
// well known).
func (s *Session) ReportLUNs(ctx context.Context) ([]scsi.LUN, error) {
	d := &Device{s: s}
	for size := uint32(4096); ; {
		buf := make([]byte, size)
		c := scsi.ReportLunsCDB(0, size)
		n, err := d.do(ctx, &c, nil, buf)
		if err != nil {
			return nil, fmt.Errorf("report luns of %s: %w", s.target, err)
		}
		luns, total, err := scsi.ParseReportLuns(buf[:n])
		if err != nil {
			return nil, fmt.Errorf("report luns of %s: %w", s.target, err)
		}
		if total+8 <= int(size) {
			return luns, nil
		}
		if total > 16384*8 {
			return nil, fmt.Errorf("report luns of %s: %w: list of %d bytes", s.target, ErrProtocol, total)
		}
		size = uint32(total + 8)
	}
}

// once executes a command and turns its status into an error.
func (d *Device) once(ctx context.Context, c *scsi.CDB, out, in []byte) (int, error) {
	dir := scsi.DirNone
	switch {
	case len(out) > 0:
		dir = scsi.DirOut
	case len(in) > 0:
		dir = scsi.DirIn
	}
	r, err := d.s.Exec(ctx, d.lun, c.Bytes(), dir, out, in)
	if err != nil {
		return 0, err
	}
	return r.N, r.Err()
}

// do executes a command and repeats it as long as the target did not do it. It
// returns the bytes moved, or an error that wraps one of block's where one fits.
func (d *Device) do(ctx context.Context, c *scsi.CDB, out, in []byte) (int, error) {
	var attentions, aborted int
	wait := busyFirst
	var until time.Time
	for {
		n, err := d.once(ctx, c, out, in)
		if err == nil {
			return n, nil
		}
		var se *StatusError
		if !errors.As(err, &se) {
			return 0, fmt.Errorf("%s: %w", c.Cmd.Name, err)
		}
		busy := false
		switch {
		case se.Status == scsi.StatusBusy, se.Status == scsi.StatusTaskSetFull:
			busy = true
		case se.Status == scsi.StatusTaskAborted:
			// Another nexus cleared the task set; the command was not done, or not to
			// its end, and doing it once more is right for all that Device sends.
			if aborted++; aborted > maxAborted {
				return 0, fmt.Errorf("%s: %w", c.Cmd.Name, err)
			}
		case se.Status == scsi.StatusCheckCondition && se.Sense != nil:
			switch s := se.Sense; {
			case s.Key == scsi.UnitAttention:
				if attentions++; attentions > maxAttentions {
					return 0, fmt.Errorf("%s: %w", c.Cmd.Name, err)
				}
				d.attention(ctx, s)
			case s.Key == scsi.NotReady && (s.Code == scsi.ASCBecomingReady || s.Code == scsi.ASCTransition):
				busy = true
			case s.Key == scsi.AbortedCommand:
				if aborted++; aborted > maxAborted {
					return 0, fmt.Errorf("%s: %w", c.Cmd.Name, err)
				}
			case s.Key == scsi.RecoveredError, s.Key == scsi.NoSense:
				if n == len(out)+len(in) {
					return n, nil
				}
				return 0, fmt.Errorf("%s: %w", c.Cmd.Name, err)
			default:
				return 0, fmt.Errorf("%s: %w", c.Cmd.Name, blockError(se))
			}
		default:
			return 0, fmt.Errorf("%s: %w", c.Cmd.Name, err)
		}
		if !busy {
			continue
		}
		if now := time.Now(); until.IsZero() {
			until = now.Add(busyFor)
		} else if now.After(until) {
			return 0, fmt.Errorf("%s: busy for %v: %w", c.Cmd.Name, busyFor, err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return 0, fmt.Errorf("%s: %w: %w", c.Cmd.Name, context.Cause(ctx), err)
		case <-d.s.dead:
			t.Stop()
			return 0, fmt.Errorf("%s: %w", c.Cmd.Name, d.s.Err())
		}
		wait = min(2*wait, busyMax)
	}
}

// attention notes a unit attention; a changed capacity is read again.
func (d *Device) attention(ctx context.Context, s *scsi.Sense) {
	d.s.cfg.Logger.Info("unit attention", zap.String("iqn", d.s.target), zap.Uint16("lun", uint16(d.lun)), zap.Stringer("code", s.Code))
	old := d.info.Load()
	if s.Code != scsi.ASCCapacityChanged || old == nil {
		return
	}
	buf := make([]byte, 32)
	c := scsi.ReadCapacity16CDB(32)
	n, err := d.once(ctx, &c, nil, buf)
	if err != nil {
		return // the command that is repeated meets the next attention itself
	}
	if cp, err := scsi.ParseCapacity16(buf[:n]); err == nil && int(cp.BlockSize) == old.BlockSize && cp.LastLBA < 1<<62/uint64(cp.BlockSize) {
		now := *old
		now.Size = int64(cp.LastLBA+1) * int64(cp.BlockSize)
		d.info.Store(&now)
	}
}

// blockError finds block's error for a status with sense data.
func blockError(e *StatusError) error {
	s := e.Sense
	var as error
	switch {
	case s.Key == scsi.DataProtect && s.Code == scsi.ASCSpaceAllocationFailed:
		as = block.ErrNoSpace
	case s.Key == scsi.DataProtect:
		as = block.ErrReadOnly
	case s.Key == scsi.MediumError, s.Key == scsi.HardwareError:
		as = block.ErrMedium
	case s.Key == scsi.IllegalRequest && s.Code == scsi.ASCLBAOutOfRange:
		as = block.ErrOutOfRange
	default:
		return e
	}
	return fmt.Errorf("%w: %w", as, e)
}

// unsupported tells whether the target does not know a command or a field of it.
func unsupported(err error) bool {
	var s *scsi.Sense
	return errors.As(err, &s) && s.Key == scsi.IllegalRequest && (s.Code == scsi.ASCInvalidOpcode || s.Code == scsi.ASCInvalidFieldCDB)
}

func (d *Device) vpd(ctx context.Context, page uint8) ([]byte, error) {
	buf := make([]byte, 252)
	c := scsi.InquiryVPD(page, uint16(len(buf)))
	n, err := d.do(ctx, &c, nil, buf)
	return buf[:n], err
}

// probe reads what Info and the limits say.
func (d *Device) probe(ctx context.Context) error {
	buf := make([]byte, 96)
	c := scsi.InquiryCDB(uint16(len(buf)))
	n, err := d.do(ctx, &c, nil, buf)
	if err != nil {
		return err
	}
	inq, err := scsi.ParseInquiry(buf[:n])
	if err != nil {
		return fmt.Errorf("INQUIRY: %w", err)
	}
	if inq.Qualifier != 0 {
		return fmt.Errorf("no logical unit under this number (peripheral qualifier %d): list them with ReportLUNs", inq.Qualifier)
	}
	if inq.DeviceType != scsi.TypeDisk {
		return fmt.Errorf("device type %#02x is no direct access device", inq.DeviceType)
	}
	c = scsi.TestUnitReady()
	if _, err := d.do(ctx, &c, nil, nil); err != nil {
		return err
	}
	info := block.Info{}
	buf = make([]byte, 32)
	c = scsi.ReadCapacity16CDB(32)
	if n, err = d.do(ctx, &c, nil, buf); err != nil {
		return err
	}
	cp, err := scsi.ParseCapacity16(buf[:n])
	if err != nil {
		return fmt.Errorf("READ CAPACITY (16): %w", err)
	}
	if cp.BlockSize != 512 && cp.BlockSize != 4096 {
		return fmt.Errorf("logical block of %d bytes: want 512 or 4096", cp.BlockSize)
	}
	if cp.LastLBA >= 1<<62/uint64(cp.BlockSize) {
		return fmt.Errorf("capacity of %d blocks is out of range", cp.LastLBA)
	}
	info.BlockSize = int(cp.BlockSize)
	info.Size = int64(cp.LastLBA+1) * int64(cp.BlockSize)
	info.PhysBlock = info.BlockSize << cp.PhysExponent
	info.Caps.Thin = cp.Thin

	d.lim.transfer = maxTransfer / cp.BlockSize
	pages := map[uint8]bool{}
	if p, err := d.vpd(ctx, scsi.VPDSupported); err == nil {
		body, err := scsi.ParseVPD(scsi.VPDSupported, p)
		if err != nil {
			return fmt.Errorf("INQUIRY: %w", err)
		}
		for _, c := range body {
			pages[c] = true
		}
	} else if !unsupported(err) {
		return err
	}
	if pages[scsi.VPDBlockLimits] {
		p, err := d.vpd(ctx, scsi.VPDBlockLimits)
		if err != nil {
			return err
		}
		l, err := scsi.ParseBlockLimits(p)
		if err != nil {
			return fmt.Errorf("INQUIRY: %w", err)
		}
		if l.MaxTransfer > 0 {
			d.lim.transfer = min(d.lim.transfer, l.MaxTransfer)
		}
		d.lim.writeSame, d.lim.unmap, d.lim.unmapDescs = l.MaxWriteSame, l.MaxUnmapBlocks, l.MaxUnmapDescriptors
	}
	if pages[scsi.VPDLogicalBlocks] && cp.Thin {
		p, err := d.vpd(ctx, scsi.VPDLogicalBlocks)
		if err != nil {
			return err
		}
		l, err := scsi.ParseProvisioning(p)
		if err != nil {
			return fmt.Errorf("INQUIRY: %w", err)
		}
		d.lim.useUnmap = l.LBPU && d.lim.unmap > 0 && d.lim.unmapDescs > 0
		d.lim.useSame = l.LBPWS
		// UNMAP is a hint for each block; WRITE SAME with UNMAP leaves zeroes in any
		// case where unmapped blocks read as zeroes (SBC-3 4.7.3.4.3).
		info.Caps.UnmapZeroes = l.LBPWS && (l.LBPRZ || cp.ThinReadsZeros)
	}
	info.Caps.Thin = d.lim.useUnmap || d.lim.useSame
	switch {
	case info.Caps.UnmapZeroes && d.lim.writeSame > 0:
		info.MaxUnmap = clampBytes(d.lim.writeSame, info.BlockSize)
	case !info.Caps.UnmapZeroes && d.lim.useUnmap:
		info.MaxUnmap = clampBytes(uint64(d.lim.unmap), info.BlockSize)
	}
	// Without a caching page nothing is known: a cache is assumed, flushes are sent.
	info.Caps.WriteCache = true
	buf = make([]byte, 128)
	c = scsi.ModeSense10(scsi.ModeCaching, 0, uint16(len(buf)))
	n, err = d.do(ctx, &c, nil, buf)
	switch {
	case err == nil:
		m, _, err := scsi.ParseMode(buf[:n], true)
		if err != nil {
			return fmt.Errorf("MODE SENSE (10): %w", err)
		}
		info.Caps.ReadOnly = m.WriteProtect
		d.lim.fua = m.DPOFUA
		for _, p := range m.Pages {
			if p.Page == scsi.ModeCaching && p.Subpage == 0 && len(p.Body) > 0 {
				info.Caps.WriteCache = p.Body[0]&0x04 != 0
			}
		}
	case !unsupported(err):
		return err
	}
	d.info.Store(&info)
	return nil
}

func clampBytes(blocks uint64, bs int) int64 {
	if blocks >= 1<<62/uint64(bs) {
		return 1 << 62 / int64(bs) * int64(bs)
	}
	return int64(blocks) * int64(bs)
}

// enter counts a call in.
func (d *Device) enter() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.closed {
		return block.ErrClosed
	}
	d.mu.calls++
	return nil
}

func (d *Device) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.calls--; d.mu.calls == 0 && d.mu.idle != nil {
		close(d.mu.idle)
		d.mu.idle = nil
	}
}

// Session is the session that the device uses.
func (d *Device) Session() *Session { return d.s }

// LUN is the device's logical unit number.
func (d *Device) LUN() scsi.LUN { return d.lun }

// Info is what the logical unit said when it was opened, and its size now.
func (d *Device) Info() block.Info { return *d.info.Load() }

// begin checks a range and counts the call in.
func (d *Device) begin(ctx context.Context, op string, off, n int64) (block.Info, error) {
	if ctx.Err() != nil {
		return block.Info{}, fmt.Errorf("%s %s lun %d: %w", op, d.s.target, d.lun, context.Cause(ctx))
	}
	if err := d.enter(); err != nil {
		return block.Info{}, fmt.Errorf("%s %s lun %d: %w", op, d.s.target, d.lun, err)
	}
	i := d.Info()
	if err := i.Check(off, n); err != nil {
		d.leave()
		return i, fmt.Errorf("%s %s lun %d: %w", op, d.s.target, d.lun, err)
	}
	return i, nil
}

func (d *Device) wrap(op string, off, n int64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s lun %d [%d,+%d): %w", op, d.s.target, d.lun, off, n, err)
}

// split calls f for pieces of [0, n) of at most step bytes, up to parallel at a time,
// and returns the first error when all have ended. After an error no piece is begun.
func split(n, step int, f func(from, to int) error) error {
	if n <= step {
		if n == 0 {
			return nil
		}
		return f(0, n)
	}
	var (
		g     sync.WaitGroup
		mu    sync.Mutex
		first error
		next  int
	)
	for range min(parallel, (n+step-1)/step) {
		g.Go(func() {
			for {
				mu.Lock()
				from := next
				if first != nil || from >= n {
					mu.Unlock()
					return
				}
				next = min(n, from+step)
				to := next
				mu.Unlock()
				if err := f(from, to); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	g.Wait()
	return first
}

// ReadAt implements block.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	i, err := d.begin(ctx, "read", off, int64(len(p)))
	if err != nil {
		return err
	}
	defer d.leave()
	bs := i.BlockSize
	err = split(len(p), int(d.lim.transfer)*bs, func(from, to int) error {
		c := scsi.Read(uint64(off+int64(from))/uint64(bs), uint32((to-from)/bs))
		n, err := d.do(ctx, &c, nil, p[from:to])
		if err == nil && n != to-from {
			err = fmt.Errorf("%w: short read of %d bytes, want %d", block.ErrMedium, n, to-from)
		}
		return err
	})
	return d.wrap("read", off, int64(len(p)), err)
}

// WriteAt implements block.Device. FUA goes out as the FUA bit, or where the logical
// unit does not know it, as a SYNCHRONIZE CACHE of the range; without a volatile
// cache nothing is needed.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, fl block.Flags) error {
	i, err := d.begin(ctx, "write", off, int64(len(p)))
	if err != nil {
		return err
	}
	defer d.leave()
	if i.Caps.ReadOnly {
		return d.wrap("write", off, int64(len(p)), block.ErrReadOnly)
	}
	bs := i.BlockSize
	fua := fl&block.FUA != 0 && i.Caps.WriteCache
	err = split(len(p), int(d.lim.transfer)*bs, func(from, to int) error {
		c := scsi.Write(uint64(off+int64(from))/uint64(bs), uint32((to-from)/bs), fua && d.lim.fua)
		n, err := d.do(ctx, &c, p[from:to], nil)
		if err == nil && n != to-from {
			err = fmt.Errorf("%w: short write of %d bytes, want %d", block.ErrMedium, n, to-from)
		}
		return err
	})
	if err == nil && fua && !d.lim.fua {
		err = d.sync(ctx, off, int64(len(p)), bs)
	}
	return d.wrap("write", off, int64(len(p)), err)
}

// sync makes a range durable, the whole device when n is 0.
func (d *Device) sync(ctx context.Context, off, n int64, bs int) error {
	if e := d.flushErr.Load(); e != nil {
		return fmt.Errorf("%w: %w", block.ErrFlushFailed, *e)
	}
	blocks := n / int64(bs)
	if blocks > 1<<32-1 {
		off, blocks = 0, 0
	}
	c := scsi.SynchronizeCache(uint64(off)/uint64(bs), uint32(blocks))
	_, err := d.do(ctx, &c, nil, nil)
	if errors.Is(err, block.ErrMedium) || errors.Is(err, block.ErrNoSpace) {
		d.flushErr.CompareAndSwap(nil, &err)
		err = fmt.Errorf("%w: %w", block.ErrFlushFailed, err)
	}
	return err
}

// Flush implements block.Device.
func (d *Device) Flush(ctx context.Context) error {
	i, err := d.begin(ctx, "flush", 0, 0)
	if err != nil {
		return err
	}
	defer d.leave()
	return d.flush(ctx, i)
}

func (d *Device) flush(ctx context.Context, i block.Info) error {
	if !i.Caps.WriteCache || i.Caps.ReadOnly {
		return nil
	}
	if err := d.sync(ctx, 0, 0, i.BlockSize); err != nil {
		return fmt.Errorf("flush %s lun %d: %w", d.s.target, d.lun, err)
	}
	return nil
}

// Unmap implements block.Device: with WRITE SAME where that leaves zeroes, else with
// UNMAP. A logical unit that is not thin keeps its data, which Caps say.
func (d *Device) Unmap(ctx context.Context, off, n int64) error {
	i, err := d.begin(ctx, "unmap", off, n)
	if err != nil {
		return err
	}
	defer d.leave()
	switch {
	case i.Caps.ReadOnly:
		err = block.ErrReadOnly
	case n == 0 || !i.Caps.Thin:
	case i.Caps.UnmapZeroes || !d.lim.useUnmap:
		err = d.writeSame(ctx, off, n, i.BlockSize, true)
	default:
		err = d.unmap(ctx, off, n, i.BlockSize)
	}
	return d.wrap("unmap", off, n, err)
}

func (d *Device) unmap(ctx context.Context, off, n int64, bs int) error {
	lba, left := uint64(off)/uint64(bs), uint64(n)/uint64(bs)
	for left > 0 {
		k := uint32(min(left, uint64(d.lim.unmap)))
		list := scsi.UnmapList([]scsi.UnmapRange{{LBA: lba, Blocks: k}})
		c := scsi.UnmapCDB(uint16(len(list)))
		if _, err := d.do(ctx, &c, list, nil); err != nil {
			return err
		}
		lba, left = lba+uint64(k), left-uint64(k)
	}
	return nil
}

func (d *Device) writeSame(ctx context.Context, off, n int64, bs int, unmap bool) error {
	zero := make([]byte, bs)
	lba, left := uint64(off)/uint64(bs), uint64(n)/uint64(bs)
	step := d.lim.writeSame
	if step == 0 || step > 1<<32-1 {
		step = 1<<32 - 1
	}
	for left > 0 {
		k := uint32(min(left, step))
		c := scsi.WriteSame(lba, k, unmap, false)
		if _, err := d.do(ctx, &c, zero, nil); err != nil {
			return err
		}
		lba, left = lba+uint64(k), left-uint64(k)
	}
	return nil
}

// WriteZeroes implements block.Device with WRITE SAME (16), or by writing zeroes where
// the logical unit does not know that command.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, fl block.Flags) error {
	i, err := d.begin(ctx, "write zeroes", off, n)
	if err != nil {
		return err
	}
	defer d.leave()
	err = d.writeZeroes(ctx, off, n, fl, i)
	return d.wrap("write zeroes", off, n, err)
}

func (d *Device) writeZeroes(ctx context.Context, off, n int64, fl block.Flags, i block.Info) error {
	if i.Caps.ReadOnly {
		return block.ErrReadOnly
	}
	if n == 0 {
		return nil
	}
	done := false
	if !d.lim.noSame.Load() {
		err := d.writeSame(ctx, off, n, i.BlockSize, fl&block.MayUnmap != 0 && i.Caps.UnmapZeroes)
		switch {
		case err == nil:
			done = true
		case unsupported(err):
			d.lim.noSame.Store(true)
		default:
			return err
		}
	}
	if !done {
		step := int64(d.lim.transfer) * int64(i.BlockSize)
		zero := make([]byte, min(step, n))
		for at := int64(0); at < n; at += step {
			m := min(step, n-at)
			c := scsi.Write(uint64(off+at)/uint64(i.BlockSize), uint32(m/int64(i.BlockSize)), false)
			if _, err := d.do(ctx, &c, zero[:m], nil); err != nil {
				return err
			}
		}
	}
	if fl&block.FUA != 0 && i.Caps.WriteCache {
		return d.sync(ctx, off, n, i.BlockSize)
	}
	return nil
}

// Extents implements block.Device with GET LBA STATUS; a logical unit without it is
// mapped throughout.
func (d *Device) Extents(ctx context.Context, off, n int64) ([]block.Extent, error) {
	i, err := d.begin(ctx, "extents", off, n)
	if err != nil {
		return nil, err
	}
	defer d.leave()
	out, err := d.extents(ctx, off, n, i)
	return out, d.wrap("extents", off, n, err)
}

func (d *Device) extents(ctx context.Context, off, n int64, i block.Info) ([]block.Extent, error) {
	var out []block.Extent
	add := func(from, to int64, mapped bool) {
		if from == to {
			return
		}
		if k := len(out); k > 0 && out[k-1].Mapped == mapped {
			out[k-1].Len += to - from
			return
		}
		out = append(out, block.Extent{Off: from, Len: to - from, Mapped: mapped})
	}
	bs, end := int64(i.BlockSize), off+n
	buf := make([]byte, 8+64*16)
	for at := off; at < end; {
		if !i.Caps.Thin || d.lim.noStatus.Load() {
			add(at, end, true)
			break
		}
		c := scsi.GetLBAStatus(uint64(at/bs), uint32(len(buf)))
		k, err := d.do(ctx, &c, nil, buf)
		if unsupported(err) {
			d.lim.noStatus.Store(true)
			continue
		}
		if err != nil {
			return nil, err
		}
		ds, err := scsi.ParseLBAStatus(buf[:k])
		if err != nil {
			return nil, fmt.Errorf("GET LBA STATUS: %w", err)
		}
		before := at
		for _, e := range ds {
			// tgt's first descriptor may begin in front of the block asked for, which
			// SBC-3 5.6.2 does not allow: only the part from at on counts.
			if e.LBA > uint64(end/bs) || uint64(e.Blocks) > uint64(1<<62/bs) {
				break
			}
			from, to := int64(e.LBA)*bs, (int64(e.LBA)+int64(e.Blocks))*bs
			if from > at || at >= end {
				break
			}
			if to = min(to, end); to <= at {
				continue
			}
			add(at, to, e.State != scsi.LBADeallocated)
			at = to
		}
		if at == before {
			return nil, fmt.Errorf("%w: GET LBA STATUS does not describe block %d", ErrProtocol, at/bs)
		}
	}
	return out, nil
}

// Close implements block.Device. The session lives on, unless the device came from
// OpenURL.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.mu.closed {
		d.mu.Unlock()
		return block.ErrClosed
	}
	d.mu.closed = true
	var idle chan struct{}
	if d.mu.calls > 0 {
		d.mu.idle = make(chan struct{})
		idle = d.mu.idle
	}
	d.mu.Unlock()
	if idle != nil {
		<-idle
	}
	ctx, cancel := context.WithTimeout(context.Background(), busyFor+d.s.cfg.LogoutTimeout)
	defer cancel()
	err := d.flush(ctx, d.Info())
	if d.closeSession {
		if cerr := d.s.Close(); err == nil {
			err = cerr
		}
	}
	return err
}
