// Package store opens stores by URL (block/storeurl): one table of schemes,
// which every place that opens a store goes through.
//
// Storage row: it imports the stores of block only.
package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/block/nbd"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
)

// Options of Open. The URL's own options come before them.
type Options struct {
	BlockSize int // logical block, 512 or 4096; 0 = 512
	// Size is the volume's, in bytes. A store with a size of its own must have it;
	// 0 takes what there is.
	Size  int64
	Cache file.Cache // of file: and block: without cache=
	// New tells that the volume is being made. Only then may a store without a
	// lasting place (mem:) come into being: later its bytes are gone.
	New    bool
	Logger *zap.Logger // nil = none
}

// ErrGone tells that the bytes of a store without a lasting place are lost.
var ErrGone = errors.New("its bytes were in the memory of a process that has ended")

// reconnect is nbd's default.
const reconnect = 30 * time.Second

type opener func(ctx context.Context, u *storeurl.URL, o Options) (block.Device, error)

// schemes is the table.
var schemes map[storeurl.Scheme]opener

func init() {
	schemes = map[storeurl.Scheme]opener{
		storeurl.File: openFile, storeurl.Block: openFile, storeurl.Mem: openMem,
		storeurl.NBD: openNBD, storeurl.NBDUnix: openNBD,
		storeurl.Fault: openFault, storeurl.PowerCut: openPowerCut,
	}
}

// Open opens the store of a URL. Its integrity option is not looked at: that
// belongs to the volume (block/integrity).
func Open(ctx context.Context, u *storeurl.URL, o Options) (block.Device, error) {
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	open := schemes[u.Scheme]
	if open == nil {
		return nil, fmt.Errorf("open store %s: no such kind of store", u)
	}
	d, err := open(ctx, u, o)
	if err != nil {
		return nil, err
	}
	if got := d.Info().Size; o.Size != 0 && got != o.Size {
		return nil, errors.Join(fmt.Errorf("the store %s has %d bytes, the volume has %d", u, got, o.Size), d.Close())
	}
	return d, nil
}

func openFile(_ context.Context, u *storeurl.URL, o Options) (block.Device, error) {
	st, err := os.Stat(u.Path)
	isDev := err == nil && st.Mode()&fs.ModeDevice != 0 && st.Mode()&fs.ModeCharDevice == 0
	switch {
	case err != nil:
		return nil, fmt.Errorf("open store: %w", err)
	case u.Scheme == storeurl.Block && !isDev:
		return nil, fmt.Errorf("open store %s: it is no block device; for a file write %s", u.Path, storeurl.ForPath(storeurl.File, u.Path))
	case u.Scheme == storeurl.File && !st.Mode().IsRegular():
		return nil, fmt.Errorf("open store %s: it is no regular file; for a device write %s", u.Path, storeurl.ForPath(storeurl.Block, u.Path))
	}
	switch u.Opts["cache"] {
	case "direct":
		o.Cache = file.Direct
	case "sync":
		o.Cache = file.Sync
	case "buffered":
		o.Cache = file.Buffered
	}
	return file.Open(u.Path, file.Options{BlockSize: o.BlockSize, Cache: o.Cache, Logger: o.Logger})
}

func openMem(_ context.Context, _ *storeurl.URL, o Options) (block.Device, error) {
	if !o.New {
		return nil, fmt.Errorf("open store mem: %w; delete the volume", ErrGone)
	}
	bs := o.BlockSize
	if bs == 0 {
		bs = 512
	}
	return mem.New(o.Size, bs)
}

func openNBD(ctx context.Context, u *storeurl.URL, o Options) (block.Device, error) {
	n := nbd.Options{Network: "tcp", Addr: u.Addr, Export: u.Export, BlockSize: o.BlockSize, Logger: o.Logger, Reconnect: reconnect}
	if u.Scheme == storeurl.NBDUnix {
		n.Network, n.Addr = "unix", u.Path
	}
	if v := u.Opts["reconnect"]; v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			return nil, fmt.Errorf("open store %s: %w", u, err)
		}
		n.Reconnect = d
	}
	return nbd.Open(ctx, n)
}

func openFault(ctx context.Context, u *storeurl.URL, o Options) (block.Device, error) {
	var rules []fault.Rule
	if len(u.Opts) > 0 {
		r, err := rule(u)
		if err != nil {
			return nil, fmt.Errorf("open store %s: %w", u, err)
		}
		rules = append(rules, r)
	}
	d, err := Open(ctx, u.Inner, o)
	if err != nil {
		return nil, err
	}
	o.Logger.Warn("this store has faults, it is for tests", zap.String("store", u.String()))
	return fault.New(d, rules...), nil
}

// rule makes the fault of the options.
func rule(u *storeurl.URL) (r fault.Rule, err error) {
	num := func(k string) int64 {
		v := u.Opts[k]
		if v == "" {
			return 0
		}
		n, e := strconv.ParseInt(v, 10, 64)
		err = errors.Join(err, e)
		return n
	}
	r.Off, r.Len, r.Skip, r.Times = num("off"), num("len"), int(num("skip")), int(num("times"))
	if v := u.Opts["delay"]; v != "" {
		var e error
		r.Delay, e = time.ParseDuration(v)
		err = errors.Join(err, e)
	}
	r.Corrupt = u.Opts["corrupt"] == "yes"
	switch u.Opts["err"] {
	case "io":
		r.Err = fmt.Errorf("%w: injected", block.ErrMedium)
	case "nospace":
		r.Err = fmt.Errorf("%w: injected", block.ErrNoSpace)
	case "checksum":
		r.Err = fmt.Errorf("%w: injected", block.ErrChecksum)
	}
	names := map[string]fault.Op{"read": fault.Read, "write": fault.Write, "flush": fault.Flush, "unmap": fault.Unmap,
		"zeroes": fault.Zeroes, "extents": fault.Extents, "any": fault.Any, "": fault.Any}
	for w := range strings.SplitSeq(u.Opts["on"], "+") {
		r.Ops |= names[w]
	}
	if err == nil && r.Err == nil && r.Delay == 0 && !r.Corrupt {
		err = errors.New("a fault needs err=, delay= or corrupt=yes")
	}
	return r, err
}

func openPowerCut(ctx context.Context, u *storeurl.URL, o Options) (block.Device, error) {
	d, err := Open(ctx, u.Inner, o)
	if err != nil {
		return nil, err
	}
	o.Logger.Warn("this store loses unflushed writes with its process, it is for tests", zap.String("store", u.String()))
	return fault.NewPowerCut(d), nil
}
