package target

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

type eventLog struct {
	mu sync.Mutex
	es []Event
}

func (l *eventLog) add(e Event) { l.mu.Lock(); l.es = append(l.es, e); l.mu.Unlock() }

func (l *eventLog) of(k EventKind) (out []Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.es {
		if e.Kind == k {
			out = append(out, e)
		}
	}
	return out
}

// TestEvents: login, logout, a drop with its reason, a refused login, a store
// that fails.
func TestEvents(t *testing.T) {
	t.Parallel()
	l := lunOf(t, 0)
	f := fault.New(l.Device)
	l.Device = f
	var log eventLog
	b := newBench(t, Options{OnEvent: log.add}, l)
	c := b.ready(loginOpt{name: "iqn.2026-01.net.host:a"})
	c.clearUA(0)
	in := log.of(EventLogin)
	if len(in) != 1 || in[0].Initiator != "iqn.2026-01.net.host:a" || in[0].Target != testIQN || in[0].TSIH == 0 || in[0].Remote.String() != c.nc.LocalAddr().String() || in[0].Time.IsZero() {
		t.Fatalf("%+v", in)
	}
	f.Set(fault.Rule{Ops: fault.Write, Err: block.ErrMedium})
	c.do(0, scsi.Write(0, 1, false), make([]byte, 512), 0)
	if e := log.of(EventStoreError); len(e) != 1 || e[0].Volume != "vol-0" || e[0].Target != testIQN || !strings.Contains(e[0].Cause, block.ErrMedium.Error()) {
		t.Errorf("%+v", e)
	}
	c.do(0, scsi.Read(1<<20, 1), nil, 512) // the initiator's fault, not the store's
	if e := log.of(EventStoreError); len(e) != 1 {
		t.Errorf("%+v", e)
	}
	c.itt++
	c.send(&iscsi.LogoutRequest{Immediate: true, ITT: c.itt, CmdSN: c.cmdSN, ExpStatSN: c.expSN})
	var r iscsi.LogoutResponse
	c.must(&r)
	_ = c.nc.Close()
	waitFor(t, func() bool { return len(log.of(EventLogout)) == 1 })
	d := b.login(loginOpt{})
	b.srv.ResetSessions(func(SessionInfo) bool { return true })
	d.gone()
	if e := log.of(EventDrop); len(e) != 1 || e[0].Cause != errReset.Error() {
		t.Errorf("%+v", e)
	}
	if st := dial(t, b.addr()).tryLogin(loginOpt{target: testIQN + "-none"}); st != iscsi.StatusNotFound {
		t.Error(st)
	}
	waitFor(t, func() bool { return len(log.of(EventRefused)) == 1 })
	if e := log.of(EventRefused)[0]; e.Target != testIQN+"-none" || e.Initiator == "" || !e.Remote.IsValid() {
		t.Errorf("%+v", e)
	}
	if s := b.srv.Stats(); s.Logins != 2 || s.Logouts != 1 || s.Drops != 1 || s.Refused != 1 || s.AuthFailures != 0 {
		t.Errorf("%+v", s)
	}
}

// TestEventFlood: who floods is counted and not told, whether from one address
// or from many, and others are still told of.
func TestEventFlood(t *testing.T) {
	t.Parallel()
	var log eventLog
	b := newBench(t, Options{OnEvent: log.add}, lunOf(t, 0))
	from := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 1)
	}
	told := 0
	for range 1000 {
		if b.srv.tell(Event{Kind: EventAuthFailure, Remote: from(1)}) {
			told++
		}
	}
	if told != failuresPerSource || len(log.of(EventAuthFailure)) != told {
		t.Errorf("told %d times of one address", told)
	}
	later := time.Now().Add(2 * eventWindow)
	if e := b.srv.limit.sweep(later); len(e) != 1 || e[0].Suppressed != 1000-failuresPerSource || e[0].Remote.Addr() != from(1).Addr() {
		t.Errorf("%+v", e)
	}
	for i := range 3 * eventSources {
		b.srv.tell(Event{Kind: EventAuthFailure, Remote: from(100 + i)})
	}
	if n := len(log.of(EventAuthFailure)); n != failuresInAll {
		t.Errorf("told %d times of many addresses", n)
	}
	if n := len(b.srv.limit.src); n > eventSources+8 {
		t.Errorf("%d sources are remembered", n)
	}
	if !b.srv.tell(Event{Kind: EventLogin, Remote: from(2)}) {
		t.Error("an honest login is not told")
	}
	if s := b.srv.Stats(); s.AuthFailures != 1000+3*eventSources || s.Refused != s.AuthFailures {
		t.Errorf("%d are counted", s.AuthFailures)
	}
	if e := b.srv.limit.sweep(later); len(e) == 0 || len(e) > failuresInAll {
		t.Errorf("%d series are closed", len(e))
	}
	if len(b.srv.limit.src) != 0 {
		t.Error("sources are remembered for ever")
	}
}

// TestPortHolderAddress: another address of the same port is somebody else's.
func TestPortHolderAddress(t *testing.T) {
	t.Parallel()
	a := netip.MustParseAddr
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"127.0.0.1", "127.0.0.1", true}, {"127.0.0.1", "127.0.0.2", false}, {"0.0.0.0", "127.0.0.2", true}, {"127.0.0.2", "0.0.0.0", true},
		{"::", "127.0.0.1", true}, {"::", "::1", true}, {"0.0.0.0", "::1", false}, {"::1", "127.0.0.1", false}, {"::ffff:127.0.0.1", "127.0.0.1", true},
	} {
		if got := overlap(a(c.a), a(c.b)); got != c.want {
			t.Errorf("%s and %s: %v", c.a, c.b, got)
		}
	}
	for s, want := range map[string]string{
		"0100007F:0CBC":                         "127.0.0.1:3260",
		"00000000000000000000000001000000:0CBC": "[::1]:3260",
		"00000000000000000000000000000000:0016": "[::]:22",
	} { // as a little-endian kernel prints them
		if got, ok := procAddr(s); !ok || got.String() != want {
			t.Errorf("%s is %v, want %s", s, got, want)
		}
	}
	if _, ok := procAddr("0100007F"); ok {
		t.Error("an address without a port")
	}
}

// TestRedirectIsNoLoop: both kinds, and no loop at the portal that is named.
func TestRedirectIsNoLoop(t *testing.T) {
	t.Parallel()
	var log eventLog
	b := newBench(t, Options{OnEvent: log.add}, lunOf(t, 0))
	for forever, want := range map[bool]iscsi.LoginStatus{false: iscsi.StatusMovedTemporarily, true: iscsi.StatusMovedPermanently} {
		b.conf.Targets[0].Redirect, b.conf.Targets[0].RedirectForever = "192.0.2.1:3260", forever
		b.apply()
		c := dial(t, b.addr())
		if st := c.tryLogin(loginOpt{}); st != want || !strings.Contains(fmt.Sprint(c.keys), "192.0.2.1:3260") {
			t.Errorf("%s with %v, want %s", st, c.keys, want)
		}
	}
	if e := log.of(EventRefused); len(e) != 0 {
		t.Errorf("a redirection is told as a failure: %+v", e)
	}
	b.conf.Targets[0].Redirect = b.addr()
	b.apply()
	b.login(loginOpt{})
}
