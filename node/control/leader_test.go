package control

import (
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

func TestAFlappingNodeIsHeldOutTwiceAsLongEachTime(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	evicted := func(ages ...time.Duration) (h []fencing.Record) {
		for _, a := range ages {
			h = append(h, fencing.Record{Event: fencing.EventEvicted, Node: "n1", At: now.Add(-a)},
				fencing.Record{Event: fencing.EventFenced, Node: "n1", At: now.Add(-a)},
				fencing.Record{Event: fencing.EventEvicted, Node: "n2", At: now})
		}
		return h
	}
	for _, c := range []struct {
		name string
		ages []time.Duration
		want time.Duration
	}{
		{"never", nil, 0},
		{"twice", []time.Duration{time.Minute, 0}, 0},
		{"three times", []time.Duration{3 * time.Minute, time.Minute, 0}, 10 * time.Second},
		{"four times, 3 s ago", []time.Duration{4 * time.Minute, 3 * time.Minute, time.Minute, 3 * time.Second}, 17 * time.Second},
		{"three times, long ago", []time.Duration{3 * time.Hour, 2 * time.Hour, 0}, 0},
		{"a dozen times", []time.Duration{9 * time.Minute, 8 * time.Minute, 7 * time.Minute, 6 * time.Minute, 5 * time.Minute, 4 * time.Minute,
			3 * time.Minute, 2 * time.Minute, time.Minute, 0}, 10 * time.Minute},
	} {
		if got := holdOut(evicted(c.ages...), "n1", now); got != c.want {
			t.Errorf("%s: held out %v, want %v", c.name, got, c.want)
		}
	}
}
