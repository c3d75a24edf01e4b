package latency

import (
	"testing"
	"time"
)

// Every duration lies in the bucket between whose bounds it is, bounds
// included at the top.
func TestBounds(t *testing.T) {
	for i := 1; i < Buckets-1; i++ {
		lo, hi := Bound(i-1), Bound(i)
		if hi <= lo {
			t.Fatalf("bucket %d: bound %v is not above %v", i, hi, lo)
		}
		for _, c := range []struct {
			d    time.Duration
			want int
		}{{lo, i - 1}, {lo + 1, i}, {(lo + hi) / 2, i}, {hi, i}, {hi + 1, i + 1}} {
			if got := Index(int64(c.d)); got != c.want {
				t.Fatalf("%v lies in bucket %d, want %d", c.d, got, c.want)
			}
		}
	}
	if Bound(Buckets-2) != Max || Index(int64(time.Hour)) != Buckets-1 || Index(0) != 0 || Index(-5) != 0 {
		t.Fatal("ends")
	}
	// The exported bounds are powers of two of a microsecond.
	for k := range 27 {
		b := time.Duration(1<<k) * time.Microsecond
		if i := Index(int64(b)); Bound(i) != b {
			t.Fatalf("%v is no bound: bucket %d ends at %v", b, i, Bound(i))
		}
	}
}

func TestQuantiles(t *testing.T) {
	var r Recorder
	for i := int64(1); i <= 1000; i++ {
		r.Record(i * 10_000) // 10 µs to 10 ms
	}
	var h Histogram
	r.AddTo(&h)
	for _, c := range []struct {
		q    float64
		want time.Duration
	}{{0.5, 5 * time.Millisecond}, {0.99, 9900 * time.Microsecond}, {1, 10 * time.Millisecond}} {
		if got := h.Quantile(c.q); got < c.want*3/4 || got > c.want*5/4 {
			t.Errorf("quantile %v: %v, want about %v", c.q, got, c.want)
		}
	}
	if h.Count() != 1000 || h.Mean() != 5005*time.Microsecond {
		t.Errorf("count %d, mean %v", h.Count(), h.Mean())
	}
	if n := h.Below(1024 * time.Microsecond); n != 102 {
		t.Errorf("%d are at most 1.024 ms, want 102", n)
	}
	r.Record(int64(time.Millisecond))
	var later Histogram
	r.AddTo(&later)
	if d := later.Sub(h); d.Count() != 1 || d.SumNS != uint64(time.Millisecond) {
		t.Errorf("difference %+v", d)
	}
	if d := h.Sub(later); d.Count() != h.Count() {
		t.Errorf("of a process that was started again all counts are new: %d", d.Count())
	}
	if (Histogram{}).Quantile(0.5) != 0 {
		t.Error("a quantile of nothing")
	}
}

func BenchmarkRecord(b *testing.B) {
	var r Recorder
	for i := range b.N {
		r.Record(int64(i))
	}
	if b.Elapsed() > 0 && testing.AllocsPerRun(10, func() { r.Record(1) }) != 0 {
		b.Fatal("Record allocates")
	}
}
