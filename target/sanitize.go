package target

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func init() {
	for _, sa := range []int{scsi.SASanitizeOverwrite, scsi.SASanitizeBlockErase, scsi.SASanitizeCryptoErase, scsi.SASanitizeExitFailure} {
		handle(scsi.OpSanitize, sa, handler{check: checkSanitize, run: runSanitize, slow: true, unlocked: true})
	}
}

// canCryptoErase: CRYPTOGRAPHIC ERASE promises that a key is destroyed, so only a
// store that encrypts can do it.
func (u *logicalUnit) canCryptoErase() bool {
	c, ok := u.dev.(block.CryptoEraser)
	return ok && c.CanCryptoErase()
}

// sanitizer is the SANITIZE of a logical unit (SBC-3 4.11): it outlives the
// command, its session and resets.
type sanitizer struct {
	mu     sync.Mutex
	cancel context.CancelFunc // nil = none is running
	done   chan struct{}
	by     string // name of the initiator that asked for it
	err    error  // of the last one; it leaves the unit in failure mode
}

func checkSanitize(t *task) *scsi.Sense {
	raw, n := t.cdb.Bytes(), t.cdb.Get(scsi.FParamLen)
	// The reserved bytes are judged, unlike other commands': nothing can be undone.
	for i, b := range raw[2:7] {
		if b != 0 {
			return &scsi.Sense{Key: scsi.IllegalRequest, Code: scsi.ASCInvalidFieldCDB, Pointer: &scsi.FieldPointer{InCDB: true, Byte: uint16(2 + i), Bit: 7}}
		}
	}
	switch {
	case t.cdb.Is(scsi.FZNR): // no zones
		return scsi.InvalidField(&t.cdb, scsi.FZNR)
	case t.cdb.Cmd.SA == scsi.SASanitizeOverwrite:
		if n <= 4 || n > uint64(t.lu.blockSize()+4) {
			return scsi.InvalidField(&t.cdb, scsi.FParamLen)
		}
	case n != 0:
		return scsi.InvalidField(&t.cdb, scsi.FParamLen)
	}
	return nil
}

// pattern reads the parameter list of OVERWRITE:
//
//	byte 0  INVERT(1) TEST(2) OVERWRITE COUNT(5)   2  pattern length   4  pattern
func (x *exec) pattern() (passes int, invert bool, p []byte, err error) {
	b, err := x.params()
	if err != nil {
		return 0, false, nil, err
	}
	if len(b) < 5 {
		return 0, false, nil, scsi.Check(scsi.IllegalRequest, scsi.ASCParamListLength)
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	switch {
	case b[0]&0x1F == 0:
		return 0, false, nil, scsi.InvalidParam(0, 4)
	case b[0]&0x60 != 0:
		return 0, false, nil, scsi.InvalidParam(0, 6)
	case n == 0 || n > x.lu.blockSize() || 4+n > len(b):
		return 0, false, nil, scsi.InvalidParam(2, 7)
	}
	return int(b[0] & 0x1F), b[0]&0x80 != 0, append([]byte(nil), b[4:4+n]...), nil
}

func runSanitize(x *exec) error {
	u := x.lu
	if x.cdb.Cmd.SA == scsi.SASanitizeExitFailure {
		u.sanitizer.mu.Lock()
		u.sanitizer.err = nil
		u.sanitizer.mu.Unlock()
		u.medium.sanitizeKO.Store(false)
		return nil
	}
	var run func(context.Context, *progress) error
	if x.cdb.Cmd.SA == scsi.SASanitizeOverwrite {
		passes, invert, p, err := x.pattern()
		if err != nil {
			return err
		}
		run = func(ctx context.Context, pr *progress) error { return u.overwrite(ctx, passes, invert, p, pr) }
	} else if x.cdb.Cmd.SA == scsi.SASanitizeCryptoErase {
		run = u.cryptoErase
	} else {
		run = u.erase
	}
	return x.start(job{scsi.ASCSanitizeInProgress, scsi.ASCSanitizeFailed, x.cdb.Is(scsi.FImmed), run})
}

// job is an operation on the whole medium that outlives its command: SANITIZE or
// FORMAT UNIT.
type job struct {
	busy, ko scsi.ASC // told while it runs, and after it failed
	immed    bool     // status comes at once
	run      func(context.Context, *progress) error
}

// start begins a job and, unless it is immediate, waits for it.
func (x *exec) start(j job) error {
	u := x.lu
	z := &u.sanitizer
	z.mu.Lock()
	if z.cancel != nil {
		z.mu.Unlock()
		return &scsi.Sense{Key: scsi.NotReady, Code: scsi.ASC(u.medium.busy.Load()), HasProgress: true, Progress: uint16(max(0, u.medium.sanitizing.Load()))}
	}
	ctx, cancel := context.WithCancel(context.Background())
	z.cancel, z.done, z.by, z.err = cancel, make(chan struct{}), x.s.name, nil
	done := z.done
	z.mu.Unlock()
	u.medium.busy.Store(uint32(j.busy))
	u.medium.ko.Store(uint32(j.ko))
	u.medium.sanitizeKO.Store(false)
	u.medium.sanitizing.Store(0)
	log := x.s.log.With(zap.String("volume", u.volume), zap.Stringer("command", x.cdb.Cmd))
	in := x.s.incarnation(u)
	log.Warn("operation begins: all data of the volume will be destroyed")
	u.background(func(context.Context) {
		// Commands that were accepted before wait no more for anything but the
		// medium: the lock comes after the last of them.
		l := &rangeLock{hi: wholeUnit, excl: true, wake: make(chan struct{})}
		if !u.ranges.add(l) {
			<-l.wake
		}
		err := j.run(ctx, &progress{u: u, in: in})
		cancel()
		if ready := u.ranges.release(l); len(ready) > 0 {
			u.pool.submit(ready...)
		}
		if err != nil {
			log.Error("operation failed", zap.Error(err))
		} else {
			log.Info("operation is complete")
		}
		z.mu.Lock()
		z.cancel, z.err = nil, err
		u.medium.sanitizeKO.Store(err != nil)
		u.medium.sanitizing.Store(-1)
		close(z.done)
		z.mu.Unlock()
	})
	if j.immed {
		return nil
	}
	// An abort ends the command, not the operation.
	select {
	case <-done:
	case <-x.cut():
		return errAborted
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.err != nil {
		return scsi.Check(scsi.MediumError, j.ko)
	}
	return nil
}

// cut is closed when the task is aborted.
func (t *task) cut() <-chan struct{} {
	ch := make(chan struct{})
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if t.aborted {
		close(ch)
	} else {
		t.onAbort = func() { close(ch) }
	}
	return ch
}

// progress passes the gate for each piece, so that a lease that ends stops the
// operation, and tells how far it is.
type progress struct {
	u  *logicalUnit
	in Incarnation
}

func (p *progress) step(done, all int64, f func() error) error {
	if err := p.u.gate.Enter(p.in, OpWrite); err != nil {
		return err
	}
	err := f()
	if e := p.u.gate.Leave(p.in, OpWrite); e != nil {
		err = e
	}
	p.u.medium.sanitizing.Store(int64(float64(done) / float64(all) * 65535))
	return err
}

// overwrite writes the pattern over every block, so many times; with invert each
// further pass writes its complement.
func (u *logicalUnit) overwrite(ctx context.Context, passes int, invert bool, pattern []byte, pr *progress) error {
	size, bs := u.dev.Info().Size, u.blockSize()
	b := block.Get(1 << 20)
	defer b.Free()
	for pass := range passes {
		flip := byte(0)
		if invert && pass%2 == 1 {
			flip = 0xFF
		}
		for i := range b.B { // the pattern begins anew in each block
			b.B[i] = pattern[i%bs%len(pattern)] ^ flip
		}
		err := pieces(0, size, func(off, n int64) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return pr.step(int64(pass)*size+off, int64(passes)*size, func() error { return u.dev.WriteAt(ctx, b.B[:n], off, 0) })
		})
		if err != nil {
			return fmt.Errorf("overwrite pass %d: %w", pass+1, err)
		}
		if err := u.dev.Flush(ctx); err != nil {
			return fmt.Errorf("overwrite pass %d: %w", pass+1, err)
		}
	}
	return nil
}

// erase overwrites what holds data with zeroes before it lets go of it: a hole
// alone would leave the data in the file system's free space.
func (u *logicalUnit) erase(ctx context.Context, pr *progress) error {
	size := u.dev.Info().Size
	b := block.Get(1 << 20)
	defer b.Free()
	clear(b.B)
	const span = 1 << 30
	for at := int64(0); at < size; at += span {
		es, err := u.dev.Extents(ctx, at, min(span, size-at))
		if err != nil {
			return fmt.Errorf("block erase: %w", err)
		}
		for _, e := range es {
			if !e.Mapped {
				continue
			}
			err := pieces(e.Off, e.Len, func(off, n int64) error {
				if err := ctx.Err(); err != nil {
					return err
				}
				return pr.step(off, size, func() error { return u.dev.WriteAt(ctx, b.B[:n], off, 0) })
			})
			if err != nil {
				return fmt.Errorf("block erase: %w", err)
			}
		}
	}
	if err := u.dev.Flush(ctx); err != nil { // the zeroes first, then the holes
		return fmt.Errorf("block erase: %w", err)
	}
	return pr.step(size, size, func() error {
		return errors.Join(u.dev.WriteZeroes(ctx, 0, size, block.MayUnmap), u.dev.Flush(ctx))
	})
}

// cryptoErase destroys the key. What the blocks hold afterwards is noise, which
// reads tell as data (WACEREQ 01b).
func (u *logicalUnit) cryptoErase(ctx context.Context, pr *progress) error {
	c, ok := u.dev.(block.CryptoEraser)
	if !ok {
		return errors.New("cryptographic erase: the store has no key")
	}
	return pr.step(1, 1, func() error { return c.CryptoErase(ctx) })
}

// stopSanitize ends a SANITIZE that match picks by the name of its initiator, and
// waits until it has left the backend, or for ctx. The unit is in failure mode
// afterwards.
func (u *logicalUnit) stopSanitize(ctx context.Context, match func(initiator string) bool) error {
	z := &u.sanitizer
	z.mu.Lock()
	if z.cancel == nil || !match(z.by) {
		z.mu.Unlock()
		return nil
	}
	z.cancel()
	done := z.done
	z.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
