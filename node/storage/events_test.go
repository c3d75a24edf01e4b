package storage

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/target"
)

// TestEventNumbers: who asks with the number of the last answer gets what is new,
// and who knows another process gets everything.
func TestEventNumbers(t *testing.T) {
	t.Parallel()
	w := &worker{incarnation: "me"}
	ask := func(who string, after uint64) (first string, n int, last uint64) {
		a := w.answerEvents(link.EventsAfter{Worker: who, After: after})
		if len(a.Events) > 0 {
			first = a.Events[0].Text
		}
		if a.Worker != "me" {
			t.Errorf("it is %q", a.Worker)
		}
		return first, len(a.Events), a.Last
	}
	if _, n, last := ask("", 0); n != 0 || last != 0 {
		t.Error(n, last)
	}
	for _, s := range []string{"a", "b", "c"} {
		w.events.add(api.Event{Text: s})
	}
	for _, c := range []struct {
		who   string
		after uint64
		first string
		n     int
	}{{"", 0, "a", 3}, {"me", 1, "b", 2}, {"me", 3, "", 0}, {"me", 9, "", 0}, {"another", 3, "a", 3}} {
		if first, n, last := ask(c.who, c.after); first != c.first || n != c.n || last != 3 {
			t.Errorf("%+v: %q, %d, %d", c, first, n, last)
		}
	}
	for range 3 * keepEvents {
		w.events.add(api.Event{Text: "x"})
	}
	if _, n, last := ask("me", 0); n > keepEvents || n < keepEvents/2 || last != 3+3*keepEvents {
		t.Errorf("%d are kept, the last is %d", n, last)
	}
	if _, n, _ := ask("me", 3+3*keepEvents-1); n != 1 {
		t.Errorf("%d, want the last one", n)
	}
}

func TestEventTexts(t *testing.T) {
	t.Parallel()
	r := netip.MustParseAddrPort("192.0.2.1:4000")
	for _, c := range []struct {
		e    target.Event
		want string
	}{
		{target.Event{Kind: target.EventLogin, Initiator: "iqn.i", Target: "iqn.t", Remote: r}, "iqn.i logged in to iqn.t from 192.0.2.1:4000"},
		{target.Event{Kind: target.EventDrop, Initiator: "iqn.i", Target: "iqn.t", Cause: "why"}, "the session of iqn.i with iqn.t was dropped: why"},
		{target.Event{Kind: target.EventAuthFailure, Initiator: "iqn.i", Target: "iqn.t", Cause: "no such account", Remote: r, Suppressed: 7},
			"iqn.i at 192.0.2.1:4000 failed to authenticate for iqn.t: no such account (and 7 more before that were not told)"},
		{target.Event{Kind: target.EventRefused, Cause: "garbage", Remote: r}, "a login of an initiator without a name at 192.0.2.1:4000 to the list of targets failed: garbage"},
		{target.Event{Kind: target.EventAuthFailure, Cause: "suppressed", Suppressed: 9}, "9 more events login.auth-failed of 192.0.2.1:4000 were counted and not told"},
		{target.Event{Kind: target.EventStoreError, Cause: "suppressed", Suppressed: 9}, "9 more events lun.store-error of volume v were counted and not told"},
		{target.Event{Kind: target.EventStoreError, Initiator: "iqn.i", Target: "iqn.t", LUN: 3, Cause: "EIO"}, "the store of volume v (iqn.t/3) failed a command of iqn.i: EIO"},
	} {
		if got := eventText(c.e, "v", "192.0.2.1:4000"); got != c.want || strings.Contains(got, "%!") {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
