package initiator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target"
)

// served is our own target with a memory store of size bytes as LUN 0.
func served(t testing.TB, size int64) (*target.Server, string) {
	t.Helper()
	dev, err := mem.New(size, 512)
	if err != nil {
		t.Fatal(err)
	}
	s, err := target.New(target.Options{NopInterval: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	conf := servedConfig(dev)
	if err := s.Apply(conf); err != nil {
		t.Fatal(err)
	}
	at, _ := s.Addr(conf.Targets[0].Portals[0])
	return s, at.String()
}

func servedConfig(dev block.Device) target.Config {
	return target.Config{Targets: []target.Target{{IQN: testIQN, TPGT: 1, RelPort: 1, Portals: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		ACL: target.ACL{Open: true}, LUNs: []target.LUN{{Number: 0, Volume: "v", Generation: 1, Device: dev, Identity: target.Identity{Product: "v", Serial: "s"}}}}}}
}

func multiConfig(conns, level int) Config {
	w := iscsi.DefaultWant()
	w.HeaderDigests, w.DataDigests = []string{"CRC32C"}, []string{"CRC32C"}
	w.ErrorRecoveryLevel = level
	w.MaxRecv, w.MaxBurstLength, w.FirstBurstLength = 4096, 16384, 6000
	return Config{InitiatorName: "iqn.2026-01.org.example:initiator", Connections: conns, Want: &w,
		LoginTimeout: time.Minute, AbortTimeout: time.Minute, NopInterval: time.Minute, NopTimeout: time.Minute}
}

// load writes and reads back over workers; each repeats what went down with its
// connection, at most retries times.
func load(t *testing.T, d block.Device, workers, rounds, retries int) {
	t.Helper()
	var wg sync.WaitGroup
	for k := range workers {
		wg.Go(func() {
			want, got := make([]byte, 40<<10), make([]byte, 40<<10)
			off := int64(k) * int64(len(want))
			try := func(what string, f func() error) bool {
				var err error
				for range retries + 1 {
					if err = f(); err == nil {
						return true
					}
					if !errors.Is(err, ErrDropped) && !errors.Is(err, ErrAborted) {
						break
					}
				}
				t.Errorf("worker %d: %s: %v", k, what, err)
				return false
			}
			for round := range rounds {
				for i := range want {
					want[i] = byte(i>>8*3 + k*31 + round*7)
				}
				if !try("write", func() error { return d.WriteAt(t.Context(), want, off, 0) }) ||
					!try("read", func() error { return d.ReadAt(t.Context(), got, off) }) {
					return
				}
				if !bytes.Equal(got, want) {
					t.Errorf("worker %d round %d: read differs", k, round)
					return
				}
			}
		})
	}
	wg.Wait()
}

func openMulti(t *testing.T, portal string, cfg Config) (*Session, block.Device) {
	t.Helper()
	s, err := Login(t.Context(), portal, testIQN, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	d, err := s.OpenLUN(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return s, d
}

// Commands go round robin over the connections of one session, and each keeps to its
// own.
func TestConnections(t *testing.T) {
	t.Parallel()
	srv, at := served(t, 1<<20)
	var cmds [8]atomic.Int64
	p := newProxy(t, at, func(n int, toTarget bool, h *iscsi.BHS) harm {
		if toTarget && h.Opcode() == iscsi.OpScsiCommand {
			cmds[n].Add(1)
		}
		return pass
	})
	defer p.close()
	s, d := openMulti(t, p.addr(), multiConfig(4, 0))
	if got := s.Connections(); fmt.Sprint(got) != "[0 1 2 3]" {
		t.Errorf("connections %v", got)
	}
	if i := srv.Sessions(); len(i) != 1 || len(i[0].Conns) != 4 || !i[0].Conns[3].DataDigest {
		t.Errorf("%+v", i)
	}
	load(t, d, 8, 4, 0)
	for n := range 4 {
		if cmds[n].Load() < 16 {
			t.Errorf("connection %d carried %d commands", n, cmds[n].Load())
		}
	}
	if err := s.LUReset(t.Context(), 0); err != nil {
		t.Error(err)
	}
	load(t, d, 2, 1, 0)
	// More than the target allows: as many as it does.
	many, _ := openMulti(t, at, func() Config { c := multiConfig(20, 0); c.Path = 1; return c }())
	if n := len(many.Connections()); n != 8 {
		t.Errorf("%d connections", n)
	}
	if err := s.Logout(t.Context()); err != nil {
		t.Error(err)
	}
}

// A connection that is lost takes its commands along and nothing else: no gap stays in
// CmdSN, and it can be added again.
func TestConnectionLoss(t *testing.T) {
	t.Parallel()
	srv, at := served(t, 1<<20)
	var pdus atomic.Int64
	p := newProxy(t, at, func(n int, toTarget bool, h *iscsi.BHS) harm {
		if n > 0 && n < 4 && toTarget {
			if k := pdus.Add(1); k%60 == 0 {
				return cutOff
			} else if k%130 == 0 {
				return badHead // which ends it as well
			}
		}
		return pass
	})
	defer p.close()
	s, d := openMulti(t, p.addr(), multiConfig(4, 0))
	load(t, d, 8, 12, 8)
	waitUntil(t, func() bool { return len(s.Connections()) < 4 })
	if s.Err() != nil {
		t.Fatal(s.Err())
	}
	cid := uint16(9)
	if err := s.AddConnection(t.Context(), cid); err != nil {
		t.Fatal(err)
	}
	if err := s.AddConnection(t.Context(), cid); err != nil { // in its own place
		t.Fatal(err)
	}
	load(t, d, 4, 2, 8)
	waitUntil(t, func() bool {
		i := srv.Sessions()
		return len(i) == 1 && i[0].Tasks == 0 && len(i[0].Conns) == len(s.Connections())
	})
}

func waitUntil(t *testing.T, f func() bool) {
	t.Helper()
	for range 2000 {
		if f() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("it does not come to pass")
}

// Data that are hurt on their way: at level 0 the session ends and no wrong byte gets
// through; at level 1 nobody notices.
func TestDataDigests(t *testing.T) {
	t.Parallel()
	for _, conns := range []int{1, 3} {
		t.Run(fmt.Sprintf("level 1, %d connections", conns), func(t *testing.T) {
			t.Parallel()
			srv, at := served(t, 1<<20)
			var pdus atomic.Int64
			var hurt [64]atomic.Int64
			p := newProxy(t, at, func(n int, toTarget bool, h *iscsi.BHS) harm {
				if h.DataLen() > 0 && h.Opcode() != iscsi.OpReject && pdus.Add(1)%7 == 0 {
					hurt[h.Opcode()].Add(1)
					return badData
				}
				return pass
			})
			defer p.close()
			s, d := openMulti(t, p.addr(), multiConfig(conns, 1))
			load(t, d, 6, 4, 0)
			// A status with sense data, a ping and a text.
			for range 10 {
				c := scsi.Read(1<<30, 1)
				r, err := s.Exec(t.Context(), 0, c.Bytes(), scsi.DirIn, nil, make([]byte, 512))
				if err != nil || r.Status != scsi.StatusCheckCondition || len(r.Sense) == 0 {
					t.Fatalf("%+v, %v", r, err)
				}
				if err := s.Ping(t.Context(), []byte("hello")); err != nil {
					t.Fatal(err)
				}
				if _, err := s.SendTargets(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			for _, op := range []iscsi.Opcode{iscsi.OpScsiCommand, iscsi.OpDataOut, iscsi.OpDataIn, iscsi.OpScsiResponse} {
				if hurt[op].Load() == 0 {
					t.Errorf("no %s was hurt", op)
				}
			}
			if i := srv.Sessions()[0]; i.DigestErrors == 0 || i.Retransmits == 0 {
				t.Errorf("%+v", i)
			}
			if s.Err() != nil || len(s.Connections()) != conns {
				t.Errorf("%v, %v", s.Err(), s.Connections())
			}
		})
	}
	t.Run("level 0", func(t *testing.T) {
		t.Parallel()
		for _, toTarget := range []bool{false, true} {
			_, at := served(t, 1<<20)
			var armed atomic.Bool
			p := newProxy(t, at, func(n int, to bool, h *iscsi.BHS) harm {
				if armed.Load() && to == toTarget && h.DataLen() >= 4096 {
					return badData
				}
				return pass
			})
			s, d := openMulti(t, p.addr(), multiConfig(2, 0))
			b := bytes.Repeat([]byte{9}, 8192)
			if err := d.WriteAt(t.Context(), b, 0, 0); err != nil {
				t.Fatal(err)
			}
			armed.Store(true)
			var err error
			for range 3 { // each takes a connection along
				if toTarget {
					err = d.WriteAt(t.Context(), b, 0, 0)
				} else {
					err = d.ReadAt(t.Context(), b, 0)
				}
				if err == nil {
					t.Error("hurt data were taken")
				}
			}
			<-s.Done()
			p.close()
		}
	})
}

// Aborts, at any time, of commands whose data are being recovered, and on connections
// that go.
func TestAbortsOverConnections(t *testing.T) {
	t.Parallel()
	srv, at := served(t, 1<<20)
	var pdus atomic.Int64
	p := newProxy(t, at, func(n int, toTarget bool, h *iscsi.BHS) harm {
		k := pdus.Add(1)
		if h.DataLen() > 0 && h.Opcode() != iscsi.OpReject && k%5 == 0 {
			return badData
		}
		return pass
	})
	defer p.close()
	s, d := openMulti(t, p.addr(), multiConfig(3, 1))
	var wg sync.WaitGroup
	for k := range 6 {
		wg.Go(func() {
			b := make([]byte, 40<<10)
			for i := range 12 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i*k)*200*time.Microsecond)
				_ = d.WriteAt(ctx, b, int64(k)*40<<10, 0)
				_ = d.ReadAt(ctx, b, int64(k)*40<<10)
				cancel()
			}
		})
	}
	wg.Wait()
	load(t, d, 3, 2, 0)
	if s.Err() != nil {
		t.Error(s.Err())
	}
	waitUntil(t, func() bool { return srv.Sessions()[0].Tasks == 0 })
}
