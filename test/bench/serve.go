package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	_ "net/http/pprof" // asked for by -pprof alone
	"net/netip"
	"os"
	"time"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/node/storage"
	"github.com/blockhouse-san/blockhouse/target"
)

// served is what the serving process tells its parent on stdout.
type served struct {
	Portal string `json:"portal"`
}

// serve is the process that is measured: target.Server over block/file behind the
// gates of the storage worker, with the worker's settings. What it lacks of a worker
// is the link to control, which has no part in the data path. It ends with its stdin.
func serve(args []string) error {
	fl := flag.NewFlagSet("serve", flag.ContinueOnError)
	plain := fl.String("file", "", "store of target "+iqnPlain)
	sums := fl.String("integrity", "", "store of target "+iqnIntegrity)
	prof := fl.String("pprof", "", "address of net/http/pprof")
	if err := fl.Parse(args); err != nil {
		return err
	}
	if *prof != "" {
		go func() { fmt.Fprintln(os.Stderr, http.ListenAndServe(*prof, nil)) }()
	}
	storage.TuneRuntime()
	cfg := config.Default()
	srv, err := target.New(target.Options{NopInterval: cfg.ISCSI.NopInterval.D(), NopTimeout: cfg.ISCSI.NopTimeout.D(), StallLimit: time.Second})
	if err != nil {
		return err
	}
	defer srv.Close()
	clock := env.Real{}
	gate := storage.NewNodeGate(clock, cfg.Times().TOrphan)
	gate.Extend(clock.Now().Add(time.Hour), 1)
	portal := netip.MustParseAddrPort("127.0.0.1:0")
	var c target.Config
	for i, st := range []struct{ iqn, path string }{{iqnPlain, *plain}, {iqnIntegrity, *sums}} {
		if st.path == "" {
			continue
		}
		d, err := openStore(st.path, st.iqn == iqnIntegrity)
		if err != nil {
			return err
		}
		defer d.Close()
		vg := storage.NewVolumeGate(gate)
		vg.SetRole(true, true, 1, nil)
		c.Targets = append(c.Targets, target.Target{IQN: st.iqn, TPGT: 1, RelPort: 1, Portals: []netip.AddrPort{portal}, ACL: target.ACL{Open: true},
			LUNs: []target.LUN{{Number: 1, Volume: fmt.Sprintf("volume-%d", i), Generation: 1, Device: d, Gate: vg,
				Identity: target.Identity{Product: fmt.Sprintf("bench%03d", i), Revision: "0001", Serial: fmt.Sprintf("bench-%d", i), UUID: [16]byte{15: byte(i + 1)}}}}})
	}
	if err := srv.Apply(c); err != nil {
		return err
	}
	addr, ok := srv.Addr(portal)
	if !ok {
		return errors.New("the portal is not open")
	}
	if err := json.NewEncoder(os.Stdout).Encode(served{Portal: addr.String()}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// openStore opens a store in the cache mode that tgtd's default has, the page cache.
func openStore(path string, integrity bool) (block.Device, error) {
	if integrity {
		return openIntegrity(context.Background(), path)
	}
	return file.Open(path, file.Options{Cache: file.Buffered})
}
