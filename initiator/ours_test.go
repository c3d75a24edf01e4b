package initiator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/target"
)

const ourIQN = "iqn.2026-01.org.example:ours"

// ours starts our own target with dev as its LUN 0. close ends both.
func ours(tb rapid.TB, size int64, bs int) (portal string, close func() error) {
	tb.Helper()
	dev, err := mem.New(size, bs)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := target.New(target.Options{NopInterval: time.Minute})
	if err != nil {
		tb.Fatal(err)
	}
	any := netip.MustParseAddrPort("127.0.0.1:0")
	err = s.Apply(target.Config{Targets: []target.Target{{IQN: ourIQN, TPGT: 1, RelPort: 1, Portals: []netip.AddrPort{any}, ACL: target.ACL{Open: true},
		LUNs: []target.LUN{{Volume: "v", Generation: 1, Device: dev, Identity: target.Identity{Product: "test", Serial: "1"}}}}}})
	if err != nil {
		tb.Fatal(err)
	}
	at, ok := s.Addr(any)
	if !ok {
		tb.Fatal("target has no portal")
	}
	return at.String(), func() error { return errors.Join(s.Close(), dev.Close()) }
}

// owned is a device that takes its target with it.
type owned struct {
	block.Device
	target func() error
}

func (o owned) Close() error {
	err := o.Device.Close()
	if errors.Is(err, block.ErrClosed) {
		return err
	}
	return errors.Join(err, o.target())
}

func config() initiator.Config {
	return initiator.Config{InitiatorName: "iqn.2026-01.org.example:initiator", LoginTimeout: time.Minute, AbortTimeout: time.Minute, NopInterval: time.Minute}
}

// A LUN of our target, through our initiator, is a block.Device like any other.
func TestOursConformance(t *testing.T) {
	t.Parallel()
	for _, bs := range []int{512, 4096} {
		t.Run(fmt.Sprint(bs), func(t *testing.T) {
			blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device {
				portal, stop := ours(tb, 512<<10, bs)
				d, err := initiator.OpenURL(context.Background(), "iscsi://"+portal+"/"+ourIQN+"/0", config())
				if err != nil {
					tb.Fatal(err)
				}
				return owned{d, stop}
			}})
		})
	}
}

// Discovery, digests, odd burst sizes, many in flight and contexts that end at any
// time, our initiator against our target.
func TestOursUnderLoad(t *testing.T) {
	t.Parallel()
	for _, digest := range []string{"None", "CRC32C"} {
		t.Run(digest, func(t *testing.T) {
			t.Parallel()
			portal, stop := ours(t, 16<<20, 512)
			defer func() {
				if err := stop(); err != nil {
					t.Error(err)
				}
			}()
			cfg := config()
			w := iscsi.DefaultWant()
			w.HeaderDigests, w.DataDigests = []string{digest}, []string{digest}
			w.MaxRecv, w.MaxBurstLength, w.FirstBurstLength = 5000, 70000, 9000
			cfg.Want = &w
			ts, err := initiator.Discover(t.Context(), portal, cfg)
			if err != nil || len(ts) != 1 || ts[0].Name != ourIQN || len(ts[0].Portals) != 1 || ts[0].Portals[0].String() != portal+",1" {
				t.Fatalf("discovered %v, %v", ts, err)
			}
			s, err := initiator.Login(t.Context(), portal, ourIQN, cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			d, err := s.OpenLUN(t.Context(), 0)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for k := range 16 {
				wg.Go(func() {
					want, got := make([]byte, 1<<20), make([]byte, 1<<20)
					for round := range 3 {
						for i := range want {
							want[i] = byte(i>>9*7 + k*31 + round)
						}
						off := int64(k) << 20
						// An aborted write may have happened in part; the whole one after it counts.
						ctx, cancel := context.WithTimeout(t.Context(), time.Duration(k*round)*300*time.Microsecond)
						_ = d.WriteAt(ctx, want[:512<<10], off, 0)
						cancel()
						if err := d.WriteAt(t.Context(), want, off, 0); err != nil {
							t.Error(err)
							return
						}
						if err := d.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, want) {
							t.Errorf("worker %d round %d: %v", k, round, err)
							return
						}
					}
				})
			}
			wg.Wait()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
