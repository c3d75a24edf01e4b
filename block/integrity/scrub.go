package integrity

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Scrub is one pass over the whole store.
type Scrub struct {
	State string    `json:"state"` // "" (never), running, done, stopped, failed
	Began time.Time `json:"began,omitzero"`
	Ended time.Time `json:"ended,omitzero"`
	Done  int64     `json:"done"` // bytes
	Size  int64     `json:"size"`
	Bad   uint64    `json:"bad"`  // units that it found damaged
	Rate  int64     `json:"rate"` // bytes a second, 0 = no limit
	Error string    `json:"error,omitempty"`
}

type scrubber struct {
	mu   sync.Mutex
	now  Scrub
	stop context.CancelFunc // of the one that runs
	over bool               // the device closes
}

func (s *scrubber) get() Scrub {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

func (s *scrubber) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	if s.stop != nil {
		s.stop()
	}
}

// ErrScrubbing tells that a scrub runs already.
var ErrScrubbing = errors.New("a scrub is running")

// StartScrub verifies every unit in the background, with rate bytes a second at
// most (0 = no limit). Damage is counted and reported as by a read, and does not
// end it. done, if not nil, is called once at its end.
func (d *Device) StartScrub(rate int64, done func(Scrub)) error {
	s := &d.scrub
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.over:
		return errors.New("the store is being closed")
	case s.stop != nil:
		return ErrScrubbing
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	s.now = Scrub{State: "running", Began: time.Now(), Size: d.g.size, Rate: rate}
	d.wg.Go(func() {
		defer cancel()
		err := d.pass(ctx, rate)
		s.mu.Lock()
		s.stop = nil
		s.now.Ended = time.Now()
		switch {
		case err == nil:
			s.now.State = "done"
		case ctx.Err() != nil:
			s.now.State = "stopped"
		default:
			s.now.State, s.now.Error = "failed", err.Error()
		}
		r := s.now
		s.mu.Unlock()
		d.o.Logger.Info("scrub ended", zap.String("state", r.State), zap.Int64("bytes", r.Done), zap.Uint64("bad", r.Bad), zap.Duration("took", r.Ended.Sub(r.Began)))
		if done != nil {
			done(r)
		}
	})
	return nil
}

// StopScrub ends a running scrub; it is false if none runs.
func (d *Device) StopScrub() bool {
	d.scrub.mu.Lock()
	defer d.scrub.mu.Unlock()
	if d.scrub.stop == nil {
		return false
	}
	d.scrub.stop()
	return true
}

func (d *Device) pass(ctx context.Context, rate int64) error {
	began := time.Now()
	var unread error
	for off := int64(0); off < d.g.size; off += piece {
		n := min(piece, d.g.size-off)
		bad, err := d.scan(ctx, off, n)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			// What the disk cannot read is as bad as what does not match; the rest
			// is looked at all the same.
			unread = errors.Join(first(unread), err)
			if d.Failed() != nil || ctx.Err() != nil {
				return err
			}
		}
		d.scrub.mu.Lock()
		d.scrub.now.Done, d.scrub.now.Bad = off+n, d.scrub.now.Bad+uint64(bad)
		d.scrub.mu.Unlock()
		if rate > 0 {
			due := time.Duration(float64(off+n) / float64(rate) * float64(time.Second))
			if !pause(ctx, due-time.Since(began)) {
				return ctx.Err()
			}
		}
	}
	return unread
}

// first keeps a list of errors short.
func first(err error) error {
	if err != nil && len(err.Error()) > 200 {
		return errors.New(err.Error()[:200] + " …")
	}
	return err
}
