package initiator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

func testConfig() Config {
	return Config{InitiatorName: testIQN, LoginTimeout: time.Minute, AbortTimeout: time.Minute, NopInterval: time.Minute}
}

func open(t *testing.T, portal, iqn string, lun scsi.LUN, cfg Config) (*Session, block.Device) {
	t.Helper()
	s, err := Login(t.Context(), portal, iqn, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	d, err := s.OpenLUN(t.Context(), lun)
	if err != nil {
		t.Fatal(err)
	}
	return s, d
}

// Discovery, login and every call of block.Device against tgtd; the backing file is
// the judge.
func TestTgtdDevice(t *testing.T) {
	t.Parallel()
	g := startTgtd(t)
	const size = 32 << 20
	iqn := g.target(1, size)
	g.target(2, 1<<20)
	ctx := t.Context()

	ts, err := Discover(ctx, g.portal, testConfig())
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{}
	for _, x := range ts {
		names[x.Name] = fmt.Sprint(x.Portals)
	}
	at := "[" + g.portal + ",1]"
	if d := cmp.Diff(map[string]string{iqn: at, "iqn.2026-01.org.example:t2": at}, names); d != "" {
		t.Errorf("discovery: %s", d)
	}

	s, d := open(t, g.portal, iqn, 1, testConfig())
	luns, err := s.ReportLUNs(ctx)
	if err != nil || !cmp.Equal(luns, []scsi.LUN{0, 1}) {
		t.Errorf("LUNs %v, %v", luns, err)
	}
	if _, err := s.OpenLUN(ctx, 0); err == nil {
		t.Error("tgtd's controller LUN 0 was opened as a disk")
	}
	if _, err := s.OpenLUN(ctx, 7); err == nil {
		t.Error("a LUN that does not exist was opened")
	}
	i := d.Info()
	if i.Size != size || i.BlockSize != 512 || i.PhysBlock < 512 || !i.Caps.Thin || !i.Caps.UnmapZeroes || !i.Caps.WriteCache || i.Caps.ReadOnly {
		t.Errorf("info %+v", i)
	}
	if err := s.Ping(ctx, []byte("hello, tgtd")); err != nil {
		t.Error(err)
	}

	model := make([]byte, size)
	write := func(off int, b []byte, fl block.Flags) {
		t.Helper()
		if err := d.WriteAt(ctx, b, int64(off), fl); err != nil {
			t.Fatal(err)
		}
		copy(model[off:], b)
	}
	write(0, randomBytes(1, 512), 0)                // immediate
	write(512, randomBytes(2, 200<<10), block.FUA)  // immediate and unsolicited, or solicited
	write(3<<20+512, randomBytes(3, 5<<20+1024), 0) // several commands, bursts and R2Ts
	write(size-512, randomBytes(4, 512), 0)
	if err := d.WriteZeroes(ctx, 4<<20, 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	clear(model[4<<20 : 5<<20])
	if err := d.WriteZeroes(ctx, 5<<20, 64<<10, block.FUA|block.MayUnmap); err != nil {
		t.Fatal(err)
	}
	clear(model[5<<20 : 5<<20+64<<10])
	if err := d.Unmap(ctx, 6<<20+512, 1<<20); err != nil {
		t.Fatal(err)
	}
	clear(model[6<<20+512 : 7<<20+512])
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if err := d.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("device differs from the model: %v", err)
	}
	file, err := os.ReadFile(filepath.Join(g.dir, "disk1"))
	if err != nil || !bytes.Equal(file, model) {
		t.Errorf("backing file differs from the model: %v", err)
	}
	ext, err := d.Extents(ctx, 0, size)
	if err != nil {
		t.Fatal(err)
	}
	off := int64(0)
	mapped := map[bool]int{}
	for _, e := range ext {
		if e.Off != off || e.Len <= 0 {
			t.Fatalf("extents %v", ext)
		}
		off += e.Len
		mapped[e.Mapped]++
		if !e.Mapped && !bytes.Equal(model[e.Off:e.Off+e.Len], make([]byte, e.Len)) {
			t.Errorf("data in the hole %+v", e)
		}
	}
	if off != size || mapped[true] == 0 || mapped[false] == 0 {
		t.Errorf("extents %v", ext)
	}

	buf := make([]byte, 1024)
	wantErr(t, "read past the end", d.ReadAt(ctx, buf, size-512), block.ErrOutOfRange)
	wantErr(t, "misaligned write", d.WriteAt(ctx, buf, 100, 0), block.ErrMisaligned)
	// Past our own check, by a bare command: the target's word.
	c := scsi.Read(size/512, 1)
	r, err := s.Exec(ctx, 1, c.Bytes(), scsi.DirIn, nil, buf[:512])
	if err != nil || r.Status != scsi.StatusCheckCondition || r.N != 0 {
		t.Errorf("read past the end: %+v, %v", r, err)
	}
	var se *scsi.Sense
	if !errors.As(r.Err(), &se) || se.Key != scsi.IllegalRequest || se.Code != scsi.ASCLBAOutOfRange {
		t.Errorf("read past the end: %v", r.Err())
	}
	// Residuals: the command wants one block, the buffer has room for two, and for none.
	c = scsi.Read(0, 1)
	if r, err = s.Exec(ctx, 1, c.Bytes(), scsi.DirIn, nil, buf); err != nil || r.N != 512 || r.Residual != 512 || !bytes.Equal(buf[:512], model[:512]) {
		t.Errorf("underflow: %+v, %v", r, err)
	}
	if r, err = s.Exec(ctx, 1, c.Bytes(), scsi.DirIn, nil, buf[:256]); err != nil || r.Residual != -256 {
		t.Errorf("overflow: %+v, %v", r, err)
	}
	if err := s.LUReset(ctx, 1); err != nil {
		t.Error(err)
	}
	// The reset left a unit attention, which the device takes in its stride.
	if err := d.ReadAt(ctx, buf, 0); err != nil || !bytes.Equal(buf, model[:1024]) {
		t.Errorf("read after reset: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	wantErr(t, "read after close", d.ReadAt(ctx, buf, 0), block.ErrClosed)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	<-s.Done()
	wantErr(t, "session", s.Err(), ErrClosed)
	_, err = s.Exec(ctx, 1, c.Bytes(), scsi.DirIn, nil, buf)
	wantErr(t, "command after logout", err, ErrClosed)
}

// A LUN of tgtd is a block.Device like any other.
func TestTgtdConformance(t *testing.T) {
	t.Parallel()
	g := startTgtd(t)
	iqn := g.target(1, 512<<10)
	blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device {
		d, err := OpenURL(context.Background(), "iscsi://"+g.portal+"/"+iqn+"/1", testConfig())
		if err != nil {
			tb.Fatal(err)
		}
		if err := d.WriteZeroes(context.Background(), 0, d.Info().Size, block.MayUnmap); err != nil {
			tb.Fatal(err)
		}
		return d
	}})
}

// Many callers at once, each on its own stretch, with digests and queue depths.
func TestTgtdManyInFlight(t *testing.T) {
	t.Parallel()
	g := startTgtd(t)
	for tid, c := range []struct {
		header, data string
		depth        int
	}{{"None", "None", 128}, {"CRC32C", "None", 64}, {"None", "CRC32C", 7}, {"CRC32C", "CRC32C", 128}} {
		const workers, stretch = 24, 256 << 10
		iqn := g.target(tid+1, workers*stretch, "HeaderDigest="+c.header, "DataDigest="+c.data)
		t.Run(c.header+"-"+c.data, func(t *testing.T) {
			cfg := testConfig()
			w := iscsi.DefaultWant()
			w.HeaderDigests, w.DataDigests = []string{c.header}, []string{c.data}
			cfg.Want, cfg.QueueDepth = &w, c.depth
			s, d := open(t, g.portal, iqn, 1, cfg)
			if p := s.Params(); p.HeaderDigest != (c.header == "CRC32C") || p.DataDigest != (c.data == "CRC32C") {
				t.Fatalf("digests %+v", p)
			}
			var wg sync.WaitGroup
			for k := range workers {
				wg.Go(func() {
					base := int64(k) * stretch
					want := randomBytes(uint64(k), stretch)
					for at := 0; at < stretch; {
						n := min(stretch-at, 512*(1+(k*7+at/512)%100))
						if err := d.WriteAt(t.Context(), want[at:at+n], base+int64(at), 0); err != nil {
							t.Error(err)
							return
						}
						at += n
					}
					got := make([]byte, stretch)
					for at := 0; at < stretch; at += 32 << 10 {
						if err := d.ReadAt(t.Context(), got[at:at+32<<10], base+int64(at)); err != nil {
							t.Error(err)
							return
						}
					}
					if !bytes.Equal(got, want) {
						t.Errorf("worker %d reads something else than it wrote", k)
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestTgtdCHAP(t *testing.T) {
	t.Parallel()
	g := startTgtd(t)
	oneway, mutual := g.target(1, 1<<20), g.target(2, 1<<20)
	g.adm("--mode", "account", "--op", "new", "--user", "joe", "--password", "in-secret-12")
	g.adm("--mode", "account", "--op", "new", "--user", "tgt", "--password", "out-secret-12")
	for _, tid := range []string{"1", "2"} {
		g.adm("--mode", "account", "--op", "bind", "--tid", tid, "--user", "joe")
	}
	g.adm("--mode", "account", "--op", "bind", "--tid", "2", "--user", "tgt", "--outgoing")
	in := iscsi.CHAPCredentials{User: "joe", Secret: []byte("in-secret-12"), Algorithms: []iscsi.CHAPAlgorithm{iscsi.CHAPMD5}}
	with := func(f func(*iscsi.CHAPCredentials)) *iscsi.CHAPCredentials { c := in; f(&c); return &c }
	for _, c := range []struct {
		name string
		iqn  string
		chap *iscsi.CHAPCredentials
		want iscsi.LoginStatus
	}{
		{"one-way", oneway, &in, 0},
		{"none", oneway, nil, iscsi.StatusAuthFailure},
		{"wrong secret", oneway, with(func(c *iscsi.CHAPCredentials) { c.Secret = []byte("wrong-secret") }), iscsi.StatusAuthFailure},
		{"unknown user", oneway, with(func(c *iscsi.CHAPCredentials) { c.User = "jim" }), iscsi.StatusAuthFailure},
		{"mutual", mutual, with(func(c *iscsi.CHAPCredentials) { c.PeerUser, c.PeerSecret = "tgt", []byte("out-secret-12") }), 0},
		{"mutual, target has another secret", mutual, with(func(c *iscsi.CHAPCredentials) { c.PeerSecret = []byte("other-secret") }), iscsi.StatusAuthFailure},
		{"mutual, target has no account", oneway, with(func(c *iscsi.CHAPCredentials) { c.PeerSecret = []byte("out-secret-12") }), iscsi.StatusAuthFailure},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := testConfig()
			cfg.CHAP = c.chap
			s, err := Login(t.Context(), g.portal, c.iqn, cfg)
			if c.want == 0 {
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				return
			}
			var le *iscsi.LoginError
			if !errors.As(err, &le) || le.Status != c.want {
				t.Fatalf("%v, want %v", err, c.want)
			}
		})
	}
	d, err := OpenURL(t.Context(), "iscsi://joe%in-secret-12@"+g.portal+"/"+oneway+"/1",
		Config{InitiatorName: testIQN, CHAP: &iscsi.CHAPCredentials{Algorithms: in.Algorithms}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(t.Context(), randomBytes(9, 4096), 4096, 0); err != nil {
		t.Error(err)
	}
	s := d.(*Device).Session()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	<-s.Done()
	if _, err := Login(t.Context(), g.portal, "iqn.2026-01.org.example:nothing", testConfig()); err == nil {
		t.Error("login to a target that does not exist")
	}
}

// tgtd dies under load: every call in flight ends with the session's error, nothing
// is repeated, nobody is left behind.
func TestTgtdDies(t *testing.T) {
	t.Parallel()
	g := startTgtd(t)
	iqn := g.target(1, 8<<20)
	s, d := open(t, g.portal, iqn, 1, testConfig())
	var wg sync.WaitGroup
	started := make(chan struct{}, 64)
	for k := range 16 {
		wg.Go(func() {
			buf := make([]byte, 64<<10)
			for {
				var err error
				if k%2 == 0 {
					err = d.ReadAt(context.Background(), buf, int64(k)<<16)
				} else {
					err = d.WriteAt(context.Background(), buf, int64(k)<<16, 0)
				}
				if err != nil {
					wantErr(t, "call in flight", err, ErrDropped)
					return
				}
				select {
				case started <- struct{}{}:
				default:
				}
			}
		})
	}
	<-started
	g.kill()
	wg.Wait()
	<-s.Done()
	wantErr(t, "session", s.Err(), ErrDropped)
	wantErr(t, "later call", d.Flush(context.Background()), ErrDropped)
	if err := s.Close(); err != nil {
		t.Errorf("close of a dead session: %v", err)
	}
}

// Contexts that end at any time abort what they cover and nothing else: the session
// lives, and the data of other callers are right.
func TestTgtdAbort(t *testing.T) {
	t.Parallel()
	g := startTgtd(t)
	iqn := g.target(1, 8<<20)
	s, d := open(t, g.portal, iqn, 1, testConfig())
	want := randomBytes(5, 1<<20)
	if err := d.WriteAt(t.Context(), want, 0, 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() {
			for n := range 40 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n*50)*time.Microsecond)
				buf := make([]byte, 1<<20)
				var err error
				if k%2 == 0 {
					if err = d.ReadAt(ctx, buf, 0); err == nil && !bytes.Equal(buf, want) {
						t.Error("read returned other data")
					}
				} else {
					err = d.WriteAt(ctx, buf, int64(k)<<20, 0)
				}
				if err != nil {
					wantErr(t, "aborted call", err, context.DeadlineExceeded)
				}
				cancel()
				clear(buf) // the session must not touch it any more; the race detector looks
			}
		})
	}
	wg.Wait()
	got := make([]byte, 1<<20)
	if err := d.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after the aborts: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
