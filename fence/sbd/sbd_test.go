package sbd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/internal/env"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

var (
	id    = uuid.MustParse("7204c671-fb76-48c3-90b5-da226c7400dc")
	quick = Timeouts{Watchdog: time.Second, Allocate: 0, Loop: 0, MsgWait: 2 * time.Second}
)

func image(t *testing.T, size int64) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(p, size); err != nil {
		t.Fatal(err)
	}
	return p
}

func open(t *testing.T, path string) *Disk {
	t.Helper()
	d, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func created(t *testing.T, tm Timeouts) *Disk {
	t.Helper()
	d := open(t, image(t, 1<<20))
	if _, err := d.Create(tm, id, false); err != nil {
		t.Fatal(err)
	}
	return d
}

// The bytes that Debian's sbd 1.5.2 wrote (facts §2.4; hexdump of the same
// timeouts and UUID).
func TestBytes(t *testing.T) {
	t.Parallel()
	p := image(t, 1<<20)
	d := open(t, p)
	if _, err := d.Create(Timeouts{2 * time.Second, 2 * time.Second, time.Second, 4 * time.Second}, id, false); err != nil {
		t.Fatal(err)
	}
	clock := env.NewManual(0)
	for i, n := range []string{"node1", "node2"} {
		done := make(chan error, 1)
		go func() {
			got, err := d.Allocate(t.Context(), clock, n)
			if err == nil && got != i {
				err = fmt.Errorf("slot %d, want %d", got, i)
			}
			done <- err
		}()
		for running := true; running; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				running = false
			case <-time.After(5 * time.Millisecond):
				clock.Step(time.Second)
			}
		}
	}
	if err := d.Send("NODE1", "vm", Test); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, len(b))
	copy(want, "SBD_SBD_\x02\xff\x00\x00\x00\x00\x02\x00\x00\x00\x00\x02\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x04\x01\x72\x04\xc6\x71\xfb\x76\x48\xc3\x90\xb5\xda\x22\x6c\x74\x00\xdc")
	copy(want[0x200:], "\x01node1")
	copy(want[0x400:], "\x01vm")
	copy(want[0x600:], "\x01node2")
	if diff := cmp.Diff(want, b); diff != "" {
		t.Error(diff)
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		sec := func(l string) time.Duration {
			return time.Duration(rapid.Uint32().Draw(t, l)) * time.Second
		}
		h := Header{Version: 2, Minor: rapid.Byte().Draw(t, "minor"), Slots: rapid.ByteRange(1, 255).Draw(t, "slots"),
			SectorSize: uint32(512) << rapid.IntRange(0, 3).Draw(t, "size"), Timeouts: Timeouts{sec("a"), sec("b"), sec("c"), sec("d")}}
		copy(h.UUID[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "uuid"))
		b := make([]byte, 512)
		h.encode(b)
		got, err := ParseHeader(b)
		if err != nil || got != h {
			t.Fatalf("%+v, %+v, %v", h, got, err)
		}
	})
}

func FuzzParseHeader(f *testing.F) {
	b := make([]byte, 512)
	Header{Version: 2, Minor: 1, Slots: 255, SectorSize: 512, Timeouts: DefaultTimeouts, UUID: id}.encode(b)
	f.Add(b)
	f.Add([]byte("SBD_SBD_"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		out := make([]byte, headerSize)
		h.encode(out)
		if again, err := ParseHeader(out); err != nil || again != h {
			t.Fatalf("%+v, %+v, %v", h, again, err)
		}
	})
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	d := created(t, DefaultTimeouts)
	if _, err := d.Create(DefaultTimeouts, id, false); !errors.Is(err, ErrInUse) {
		t.Errorf("over a header: %v", err)
	}
	if _, err := d.Create(DefaultTimeouts, id, true); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		t    Timeouts
		want error
	}{
		{Timeouts{5 * time.Second, 0, 0, 9 * time.Second}, ErrMsgWait},
		{Timeouts{0, 0, 0, 9 * time.Second}, ErrParam},
		{Timeouts{1500 * time.Millisecond, 0, 0, 9 * time.Second}, ErrParam},
		{Timeouts{time.Second, -1, 0, 9 * time.Second}, ErrParam},
	} {
		if _, err := d.Create(c.t, id, true); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c.t, err)
		}
	}
	if _, err := open(t, image(t, 1<<20)).Header(); !errors.Is(err, ErrFormat) {
		t.Errorf("no header: %v", err)
	}
	small := open(t, image(t, 512*100))
	if _, err := small.Create(DefaultTimeouts, id, false); err == nil {
		t.Error("a device that is too small")
	}
	for _, p := range []string{"/dev/null", t.TempDir(), filepath.Join(t.TempDir(), "none")} {
		if _, err := Open(p, false); err == nil {
			t.Errorf("%s is opened", p)
		}
	}
}

func TestSlots(t *testing.T) {
	t.Parallel()
	d := created(t, quick)
	if _, err := d.Lookup("n1"); !errors.Is(err, ErrNoSlot) {
		t.Errorf("%v", err)
	}
	if err := d.Send("n1", "n2", Reset); !errors.Is(err, ErrNoSlot) {
		t.Errorf("%v", err)
	}
	for i := range maxSlots {
		if n, err := d.Allocate(t.Context(), env.Real{}, fmt.Sprintf("n%d", i)); err != nil || n != i {
			t.Fatalf("slot %d: %d, %v", i, n, err)
		}
	}
	if n, err := d.Allocate(t.Context(), env.Real{}, "N7"); err != nil || n != 7 {
		t.Errorf("again: %d, %v", n, err)
	}
	if _, err := d.Allocate(t.Context(), env.Real{}, "more"); !errors.Is(err, ErrFull) {
		t.Errorf("%v", err)
	}
	for _, n := range []string{"", "a b", strings.Repeat("x", 64), "a\nb"} {
		if _, err := d.Allocate(t.Context(), env.Real{}, n); !errors.Is(err, ErrParam) {
			t.Errorf("%q: %v", n, err)
		}
	}
	for m := Clear; m <= CrashDump; m++ {
		if err := d.Send("n9", "n1", m); err != nil {
			t.Error(err)
		}
		if got, from, err := d.Mailbox(9); err != nil || got != m || from != "n1" {
			t.Errorf("%v, %s, %v", got, from, err)
		}
		if p, err := ParseMessage(m.String()); err != nil || p != m {
			t.Errorf("%v: %v, %v", m, p, err)
		}
	}
	if err := d.Send("n9", "n1", 6); !errors.Is(err, ErrParam) {
		t.Errorf("%v", err)
	}
	if _, err := ParseMessage("die"); !errors.Is(err, ErrParam) {
		t.Errorf("%v", err)
	}
}

// Two nodes that take the same free slot at once end up in two slots.
func TestAllocateRace(t *testing.T) {
	t.Parallel()
	d := created(t, Timeouts{time.Second, time.Second, 0, 2 * time.Second})
	slots := make([]int, 4)
	var wg sync.WaitGroup
	for i := range slots {
		wg.Go(func() {
			var err error
			if slots[i], err = d.Allocate(t.Context(), env.Real{}, fmt.Sprintf("n%d", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l, err := d.List()
	if err != nil || len(l) != len(slots) {
		t.Fatalf("%v, %v", l, err)
	}
	for _, s := range l {
		var i int
		if _, err := fmt.Sscanf(s.Node, "n%d", &i); err != nil || slots[i] != s.Number {
			t.Errorf("%+v, told %v", s, slots)
		}
	}
}

// Join clears what is older than the kernel, and nothing after a restart of the
// process.
func TestJoin(t *testing.T) {
	t.Parallel()
	d := created(t, quick)
	if _, _, err := Join(t.Context(), env.Real{}, []*Disk{d}, "n1", true); err != nil {
		t.Fatal(err)
	}
	if err := d.Send("n1", "n2", Reset); err != nil {
		t.Fatal(err)
	}
	for _, fresh := range []bool{false, true} {
		slots, found, err := Join(t.Context(), env.Real{}, []*Disk{d}, "n1", fresh)
		if err != nil || len(slots) != 1 || slots[0] != 0 || found[0] != Reset {
			t.Fatalf("%v, %v, %v", slots, found, err)
		}
		want := Reset
		if fresh {
			want = Clear
		}
		if m, _, err := d.Mailbox(0); err != nil || m != want {
			t.Errorf("fresh %v: %v, %v", fresh, m, err)
		}
	}
}

// broken fails or forgets what is written to it.
type broken struct {
	File
	fail, forget bool
}

func (b *broken) WriteAt(p []byte, off int64) (int, error) {
	if b.fail {
		return 0, errors.New("the cable is out")
	}
	if b.forget {
		return len(p), nil
	}
	return b.File.WriteAt(p, off)
}

// More than half of the devices must take the message, and then it takes msgwait.
func TestFence(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		devices, bad int
		forget       bool
		ok           bool
	}{{1, 0, false, true}, {1, 1, false, false}, {1, 1, true, false}, {2, 0, false, true}, {2, 1, false, false}, {3, 1, false, true}, {3, 1, true, true}, {3, 2, false, false}} {
		t.Run(fmt.Sprintf("%d of %d, forget %v", c.bad, c.devices, c.forget), func(t *testing.T) {
			t.Parallel()
			var disks []*Disk
			for i := range c.devices {
				d := created(t, quick)
				if _, err := d.Allocate(t.Context(), env.Real{}, "n2"); err != nil {
					t.Fatal(err)
				}
				if i < c.bad {
					d.f = &broken{File: d.f, fail: !c.forget, forget: c.forget}
				}
				disks = append(disks, d)
			}
			start := time.Now()
			err := Fence(t.Context(), env.Real{}, disks, "n2", "n1", Reset)
			took := time.Since(start)
			if (err == nil) != c.ok || err == nil && took < quick.MsgWait || err != nil && (!errors.Is(err, ErrQuorum) || took > patience) {
				t.Fatalf("%v after %v", err, took)
			}
			if c.forget && !c.ok && !errors.Is(err, ErrVerify) {
				t.Errorf("%v", err)
			}
			for i, d := range disks {
				if m, from, err := d.Mailbox(0); err != nil || (m == Reset && from == "n1") != (i >= c.bad) {
					t.Errorf("device %d: %v from %s, %v", i, m, from, err)
				}
			}
		})
	}
	d := created(t, quick)
	if _, err := d.Allocate(t.Context(), env.Real{}, "n2"); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		Fence(t.Context(), env.Real{}, nil, "n2", "n1", Reset), Fence(t.Context(), env.Real{}, []*Disk{d}, "n2", "N2", Reset),
		Fence(t.Context(), env.Real{}, []*Disk{d}, "n2", "n1", Test), Fence(t.Context(), env.Real{}, []*Disk{d}, "n2", "n1", Exit),
	} {
		if !errors.Is(err, ErrParam) {
			t.Errorf("%v", err)
		}
	}
	// The end of the context before msgwait is no proof.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := Fence(ctx, env.Real{}, []*Disk{d}, "n2", "n1", Off); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "msgwait") {
		t.Errorf("%v", err)
	}
	// sbd lets one make a device that proves nothing.
	b := aligned(512)
	Header{Version: 2, Minor: 1, Slots: 255, SectorSize: 512, Timeouts: Timeouts{5 * time.Second, 0, 0, 5 * time.Second}}.encode(b)
	if err := d.put(0, b); err != nil {
		t.Fatal(err)
	}
	if err := Fence(t.Context(), env.Real{}, []*Disk{d}, "n2", "n1", Reset); !errors.Is(err, ErrMsgWait) {
		t.Errorf("%v", err)
	}
}

const s = env.Boot(time.Second)

// The verdict by devices that answer (sbd(8)): one of one, one of two, two of
// three, or the node lease.
func TestWatcherPets(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		devices, good int
		vouched, pet  bool
	}{{1, 1, false, true}, {1, 0, false, false}, {1, 0, true, true}, {2, 1, false, true}, {2, 0, false, false}, {3, 3, false, true}, {3, 2, false, true}, {3, 1, false, false}, {3, 1, true, true}} {
		w := NewWatcher(DefaultTimeouts, c.devices, 0)
		for i := range c.good {
			w.Read(i, 10*s, Clear, "")
		}
		v := w.Tick(13*s, c.vouched) // 3 s after: still good
		if v.Pet != c.pet || v.Do != Clear || v.Pet != (v.Why == "") {
			t.Errorf("%d of %d: %+v", c.good, c.devices, v)
		}
		if v := w.Tick(13*s+1, false); v.Pet {
			t.Errorf("%d of %d: petted with readings older than 3/5 of the watchdog", c.good, c.devices)
		}
	}
	if v := NewWatcher(DefaultTimeouts, 3, 5*s).Tick(6*s, false); !v.Pet {
		t.Errorf("at the start: %+v", v)
	}
}

func TestWatcherMessages(t *testing.T) {
	t.Parallel()
	for m := Message(-2); m < 9; m++ {
		w := NewWatcher(DefaultTimeouts, 3, 0)
		w.Read(2, 0, m, "n2")
		v := w.Tick(0, true)
		switch {
		case m.Kills():
			if v.Pet || v.Do != m || v.From != "n2" {
				t.Errorf("%v: %+v", m, v)
			}
			// Later messages take nothing back.
			w.Read(2, s, Clear, "")
			w.Read(1, s, Exit, "n3")
			if v := w.Tick(s, true); v.Pet || v.Do != m {
				t.Errorf("%v: %+v", m, v)
			}
		case m == Exit:
			if v.Do != Exit || !v.Pet {
				t.Errorf("%v: %+v", m, v)
			}
			w.Read(0, s, Reset, "n3")
			if v := w.Tick(s, true); v.Do != Reset || v.Pet {
				t.Errorf("reset after exit: %+v", v)
			}
		default:
			if v.Do != Clear || !v.Pet || (len(v.Tests) == 1) != (m == Test) {
				t.Errorf("%v: %+v", m, v)
			}
			// The same test is reported once, the next one again.
			w.Read(2, s, m, "n2")
			if v := w.Tick(s, true); len(v.Tests) != 0 {
				t.Errorf("%v: %+v", m, v)
			}
			w.Read(2, s, Clear, "")
			w.Read(2, s, m, "n2")
			if v := w.Tick(s, true); (len(v.Tests) == 1) != (m == Test) {
				t.Errorf("%v: %+v", m, v)
			}
		}
	}
}

// The safety of the whole: with any devices failing or slow for the victim, and
// whichever of them the sender reaches, a Fence that succeeded finds the victim
// told, or with its watchdog fired, when msgwait is over.
func TestFenceProves(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		tm := Timeouts{Watchdog: 5 * time.Second, Loop: time.Second, MsgWait: 10 * time.Second}
		n := rapid.IntRange(1, 3).Draw(t, "devices")
		w := NewWatcher(tm, n, 0)
		sent := env.Boot(rapid.Int64Range(0, int64(20*s)).Draw(t, "sent"))
		took := 0
		told := make([]bool, n)     // the sender reached it
		lost := make([]env.Boot, n) // the victim reads it until then
		for i := range n {
			told[i] = rapid.Bool().Draw(t, "told")
			lost[i] = env.Boot(rapid.Int64Range(0, int64(60*s)).Draw(t, "lost"))
			if told[i] {
				took++
			}
		}
		if 2*took <= n {
			return // Fence fails
		}
		pet := env.Boot(0)
		step := env.Boot(rapid.Int64Range(int64(s/10), int64(s)).Draw(t, "step"))
		for now := env.Boot(0); ; now += step {
			if now.Sub(pet) > tm.Watchdog {
				return // the watchdog fired
			}
			if now >= sent.Add(tm.MsgWait) {
				t.Fatalf("alive at %v, told at %v", time.Duration(now), time.Duration(sent))
			}
			for i := range n {
				if now < lost[i] {
					m := Clear
					if told[i] && now >= sent {
						m = Reset
					}
					w.Read(i, now, m, "n1")
				}
			}
			v := w.Tick(now, false) // evicted: no lease
			if v.Do.Kills() {
				return
			}
			if v.Pet {
				pet = now
			}
		}
	})
}

// The loop over real files: tests are heard, a lost device alone ends nothing, the
// message does.
func TestWatch(t *testing.T) {
	t.Parallel()
	disks := []*Disk{created(t, quick), created(t, quick), created(t, quick)}
	slots, _, err := Join(t.Context(), env.Real{}, disks, "n1", true)
	if err != nil {
		t.Fatal(err)
	}
	disks[0].f = &unreadable{disks[0].f}
	type seen struct{ what, from string }
	events := make(chan seen, 1000)
	note := func(what, from string) {
		select {
		case events <- seen{what, from}:
		default:
		}
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		done <- Watch(ctx, env.Real{}, quick, disks, slots, Hooks{
			Pet: func() { note("pet", "") }, Test: func(from string) { note("test", from) }, Vouched: func() bool { return false },
			Do:     func(m Message, from string) { note(m.String(), from) },
			Failed: func(dev string, _ error) { note("failed", dev) }, Silent: func(why string) { note("silent", why) },
		})
	}()
	await := func(what string) seen {
		t.Helper()
		for {
			select {
			case e := <-events:
				if e.what == what {
					return e
				}
				if e.what != "pet" && e.what != "failed" && e.what != "test" {
					t.Logf("%+v", e) // silent, on a machine that stood still
				}
			case <-time.After(patience):
				t.Fatalf("no %s", what)
			}
		}
	}
	await("pet")
	if e := await("failed"); e.from != disks[0].path {
		t.Errorf("%+v", e)
	}
	if err := disks[1].Send("n1", "n3", Test); err != nil {
		t.Fatal(err)
	}
	if e := await("test"); e.from != "n3" {
		t.Errorf("%+v", e)
	}
	if err := disks[2].Send("n1", "n2", Off); err != nil {
		t.Fatal(err)
	}
	if e := await("off"); e.from != "n2" {
		t.Errorf("%+v", e)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := Watch(ctx, env.Real{}, quick, disks, slots[:1], Hooks{}); !errors.Is(err, ErrParam) {
		t.Errorf("%v", err)
	}
}

type unreadable struct{ File }

func (unreadable) ReadAt([]byte, int64) (int, error) { return 0, errors.New("the cable is out") }
