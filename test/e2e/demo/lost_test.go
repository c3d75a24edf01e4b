package demo

import (
	"testing"

	"github.com/blockhouse-san/blockhouse/api"
)

// A node that was evicted while it was down comes back by itself: nothing of its
// former life is left on its host, and its clusterd proves that.
func TestLostNodeComesBack(t *testing.T) {
	d := newDemo(t)
	d.must("up")
	d.must("kill", "n3") // it has the LUN, so no target can speak for it
	d.until("n3 lost", func(s api.Status) bool { return s.Quorum.Quorate && problem(s, `n3 is lost`) != nil })
	d.must("up")
	d.until("three nodes online", func(s api.Status) bool { return online(s) == 3 && len(s.Fences) == 0 })
	d.down()
}
