// Package load is a load generator on our own initiator: a fixed number of
// commands in flight on each of some sessions, for a fixed time. The benchmarks use
// it against every target alike.
package load

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// Target is a logical unit with blocks of 512 bytes, and how to talk to it.
type Target struct {
	Portal string // ADDRESS:PORT
	IQN    string
	LUN    scsi.LUN
	Size   int64 // bytes that are used, from the beginning
	// Digests asks for header and data digests; a target that refuses is an error.
	Digests  bool
	Sessions int
	// Path is the ISID's qualifier of the first session (initiator.Config.Path). Two
	// clients of one target need ranges of their own.
	Path uint16
}

// Pattern is what every session does.
type Pattern struct {
	Write  bool
	Random bool // else sequential, every session from another place
	Size   int  // bytes of a command, a multiple of 512
	Depth  int  // commands in flight on each session
}

// Result is what was done in Took, all sessions together.
type Result struct {
	IOs       int
	Bytes     int64
	Took      time.Duration
	Latencies []time.Duration // of each command, in ascending order
}

// Quantile is the latency below which the share q of the commands lies.
func (r *Result) Quantile(q float64) time.Duration {
	if len(r.Latencies) == 0 {
		return 0
	}
	return r.Latencies[min(int(q*float64(len(r.Latencies))), len(r.Latencies)-1)]
}

// Client is a set of sessions with one logical unit.
type Client struct {
	t        Target
	sessions []*initiator.Session
}

const block = 512

// Open logs the sessions in. Close the client.
func Open(ctx context.Context, t Target) (_ *Client, err error) {
	c := &Client{t: t}
	defer func() {
		if err != nil {
			_ = c.Close()
		}
	}()
	w := iscsi.DefaultWant()
	if t.Digests {
		w.HeaderDigests, w.DataDigests = []string{"CRC32C"}, []string{"CRC32C"}
	} else {
		w.HeaderDigests, w.DataDigests = []string{"None"}, []string{"None"}
	}
	for i := range t.Sessions {
		s, err := initiator.Login(ctx, t.Portal, t.IQN, initiator.Config{InitiatorName: "iqn.2026-01.org.blockhouse:bench", Path: t.Path + uint16(i),
			Want: &w, NopInterval: 30 * time.Second, NopTimeout: 30 * time.Second})
		if err != nil {
			return nil, fmt.Errorf("session %d: %w", i, err)
		}
		c.sessions = append(c.sessions, s)
		if p := s.Params(); p.HeaderDigest != t.Digests || p.DataDigest != t.Digests {
			return nil, fmt.Errorf("%s: digests %v/%v were negotiated, want %v", t.IQN, p.HeaderDigest, p.DataDigest, t.Digests)
		}
		// It takes the unit attentions too.
		d, err := s.OpenLUN(ctx, t.LUN)
		if err != nil {
			return nil, err
		}
		if i := d.Info(); i.Size < t.Size || i.BlockSize != block {
			return nil, fmt.Errorf("%s lun %d: %d bytes in blocks of %d, want %d in blocks of %d", t.IQN, t.LUN, i.Size, i.BlockSize, t.Size, block)
		}
		if err := d.Close(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// Close logs out.
func (c *Client) Close() error {
	var errs []error
	for _, s := range c.sessions {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// Run warms up and then measures. begin and end are called at the edges of the
// measured time, for what the caller measures itself.
func (c *Client) Run(ctx context.Context, p Pattern, warm, measure time.Duration, begin, end func()) (Result, error) {
	if p.Size <= 0 || p.Size%block != 0 || int64(p.Size) > c.t.Size || p.Depth < 1 {
		return Result{}, fmt.Errorf("pattern %+v on %d bytes: size and depth must be positive, the size a multiple of %d", p, c.t.Size, block)
	}
	const idle, on, stop = 0, 1, 2
	var phase atomic.Int32
	n := len(c.sessions) * p.Depth
	lats := make([][]time.Duration, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for si, s := range c.sessions {
		var seq atomic.Int64
		slots := c.t.Size / int64(p.Size)
		seq.Store(slots / int64(len(c.sessions)) * int64(si))
		for k := range p.Depth {
			i := si*p.Depth + k
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 1))
				buf := make([]byte, p.Size)
				for j := range buf {
					buf[j] = byte(i + j)
				}
				lat := make([]time.Duration, 0, 4096)
				for {
					was := phase.Load()
					if was == stop {
						break
					}
					at := seq.Add(1)
					if p.Random {
						at = r.Int64N(slots)
					}
					lba, blocks := uint64(at%slots)*uint64(p.Size/block), uint32(p.Size/block)
					t0 := time.Now()
					var res initiator.Result
					var err error
					if p.Write {
						cdb := scsi.Write(lba, blocks, false)
						res, err = s.Exec(ctx, c.t.LUN, cdb.Bytes(), scsi.DirOut, buf, nil)
					} else {
						cdb := scsi.Read(lba, blocks)
						res, err = s.Exec(ctx, c.t.LUN, cdb.Bytes(), scsi.DirIn, nil, buf)
					}
					if err == nil {
						err = res.Err()
					}
					if err == nil && res.N != p.Size {
						err = fmt.Errorf("%d bytes moved of %d", res.N, p.Size)
					}
					if err != nil {
						errs[i] = fmt.Errorf("command at block %d: %w", lba, err)
						phase.Store(stop)
						break
					}
					// Only what lies in the measured time as a whole counts.
					if was == on && phase.Load() == on {
						lat = append(lat, time.Since(t0))
					}
				}
				lats[i] = lat
			})
		}
	}
	time.Sleep(warm)
	begin()
	t0 := time.Now()
	phase.CompareAndSwap(idle, on)
	time.Sleep(measure)
	took := time.Since(t0)
	end()
	phase.Store(stop)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return Result{}, err
	}
	r := Result{Took: took, Latencies: slices.Concat(lats...)}
	slices.Sort(r.Latencies)
	r.IOs = len(r.Latencies)
	r.Bytes = int64(r.IOs) * int64(p.Size)
	return r, nil
}
