// Package latency counts durations in buckets whose width grows with the
// duration, so that quantiles of microseconds and of minutes come out of one
// small array. Recording is two atomic additions: no lock, no allocation.
//
// With u = (ns-1)/1000, so that a bucket's upper bound belongs to it, buckets
// are one microsecond wide below 4 µs and a quarter of the power of two below u
// from there on: the error of a quantile is at most 25 %. The last bucket holds
// everything above Max.
//
// It is a leaf: any package may import it.
package latency

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Buckets is the number of buckets, the last one open at the top.
const Buckets = 101

// Max is the upper bound of the last bucket but one: 2^26 µs, 67 s.
const Max = (1 << 26) * time.Microsecond

// Index is the bucket of a duration in ns; what is below 1 is in bucket 0.
func Index(ns int64) int {
	if ns <= 0 {
		return 0
	}
	u := uint64(ns-1) / 1000
	if u < 4 {
		return int(u)
	}
	n := bits.Len64(u)
	return min((n-2)*4+int(u>>(n-3))&3, Buckets-1)
}

// Bound is the inclusive upper bound of bucket i, for the last one Max.
func Bound(i int) time.Duration {
	if i < 4 {
		return time.Duration(i+1) * time.Microsecond
	}
	if i >= Buckets-1 {
		return Max
	}
	n, q := i/4+2, i%4
	return time.Duration(4+q+1) << (n - 3) * time.Microsecond
}

// Recorder counts. The zero value is ready; Record may be called by many
// goroutines.
type Recorder struct {
	counts [Buckets]atomic.Uint64
	sum    atomic.Uint64
}

// Record counts one duration in ns.
func (r *Recorder) Record(ns int64) {
	r.counts[Index(ns)].Add(1)
	r.sum.Add(uint64(max(ns, 0)))
}

// AddTo adds what was counted to h. A Record that runs at the same time may be
// in one of count and sum only.
func (r *Recorder) AddTo(h *Histogram) {
	for i := range r.counts {
		if n := r.counts[i].Load(); n > 0 {
			h.grow(i + 1)
			h.Counts[i] += n
		}
	}
	h.SumNS += r.sum.Load()
}

// Histogram is what was counted. Counts are per bucket, not cumulative; buckets
// behind the last one that is not zero are left out.
type Histogram struct {
	Counts []uint64 `json:"counts,omitempty" yaml:"counts,omitempty"`
	SumNS  uint64   `json:"sum_ns" yaml:"sum_ns"`
}

func (h *Histogram) grow(n int) {
	for len(h.Counts) < n {
		h.Counts = append(h.Counts, 0)
	}
}

// Count is the number of durations.
func (h Histogram) Count() (n uint64) {
	for _, c := range h.Counts {
		n += c
	}
	return n
}

// Add adds o.
func (h *Histogram) Add(o Histogram) {
	h.grow(len(o.Counts))
	for i, n := range o.Counts {
		h.Counts[i] += n
	}
	h.SumNS += o.SumNS
}

// Sub is what was counted since old. When old counted more, it was another
// process's and h is all there is.
func (h Histogram) Sub(old Histogram) Histogram {
	if len(old.Counts) > len(h.Counts) || old.SumNS > h.SumNS {
		return h
	}
	d := Histogram{Counts: append([]uint64(nil), h.Counts...), SumNS: h.SumNS - old.SumNS}
	for i, n := range old.Counts {
		if n > d.Counts[i] {
			return h
		}
		d.Counts[i] -= n
	}
	return d
}

// Quantile is the duration below which a share q (0 to 1) of the counted ones
// lies, interpolated within its bucket; 0 when nothing was counted.
func (h Histogram) Quantile(q float64) time.Duration {
	n := h.Count()
	if n == 0 {
		return 0
	}
	want := q * float64(n)
	var below float64
	for i, c := range h.Counts {
		if c == 0 || below+float64(c) < want {
			below += float64(c)
			continue
		}
		lo := time.Duration(0)
		if i > 0 {
			lo = Bound(i - 1)
		}
		return lo + time.Duration(float64(Bound(i)-lo)*max(want-below, 0)/float64(c))
	}
	return Max
}

// Mean is the average, 0 when nothing was counted.
func (h Histogram) Mean() time.Duration {
	if n := h.Count(); n > 0 {
		return time.Duration(h.SumNS / n)
	}
	return 0
}

// Below is the number of durations up to and including bound, which must be a
// bound of a bucket.
func (h Histogram) Below(bound time.Duration) (n uint64) {
	for i, c := range h.Counts {
		if i == Buckets-1 || Bound(i) > bound {
			break
		}
		n += c
	}
	return n
}
