package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/atomic"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/block/integrity"
	"github.com/blockhouse-san/blockhouse/block/store"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// storePath is where the bytes of a volume lie, sumsPath where its checksums do,
// journalPath where its journal of atomic writes does: in the folder of the
// node's volumes, also when the bytes lie elsewhere.
func (w *worker) storePath(uuid string) string {
	return filepath.Join(w.cfg.VolumeDir(), uuid+".img")
}

func (w *worker) sumsPath(uuid string) string {
	return filepath.Join(w.cfg.VolumeDir(), uuid+".crc")
}

func (w *worker) journalPath(uuid string) string {
	return filepath.Join(w.cfg.VolumeDir(), uuid+".img.atomic")
}

func (w *worker) fileOptions(blockSize int) file.Options {
	o := file.Options{BlockSize: blockSize, Logger: w.log}
	switch w.cfg.Storage.Cache {
	case "sync":
		o.Cache = file.Sync
	case "buffered":
		o.Cache = file.Buffered
	}
	return o
}

// openStore makes the store of a volume that is being created, and opens one
// that exists. A store that is missing is never made anew once the volume was
// ready: an empty disk in place of somebody's data is the worst answer.
func (w *worker) openStore(ctx context.Context, v *fsmstorage.Volume) (block.Device, error) {
	var d block.Device
	var err error
	if v.Store != "" {
		d, err = w.openGiven(ctx, v)
	} else {
		d, err = w.openOwn(v)
	}
	if err != nil {
		return nil, err
	}
	if v.Integrity {
		s, err := w.withSums(ctx, v, d)
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		d = s
	}
	// Above the checksums: what the journal puts back gets its checksums with it,
	// and what it keeps was verified. Below them an undo would leave old data under
	// new checksums, which is damage.
	a, err := w.withJournal(ctx, v, d)
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return a, nil
}

func (w *worker) openOwn(v *fsmstorage.Volume) (block.Device, error) {
	f, err := w.openPath(w.storePath(v.Config.UUID), v.State == fsmstorage.Creating, v.Config.Size, w.fileOptions(v.Config.BlockSize))
	if err != nil {
		return nil, err // not a nil *File in an interface
	}
	return f, nil
}

// openPath opens a file of ours; making says that it may be made.
func (w *worker) openPath(path string, making bool, size int64, o file.Options) (*file.File, error) {
	f, err := file.Open(path, o)
	if errors.Is(err, fs.ErrNotExist) {
		if !making {
			return nil, fmt.Errorf("the store %s is missing; bring it back from where it went", path)
		}
		return file.Create(path, size, o)
	}
	if err != nil {
		return nil, err
	}
	if got := f.Info().Size; got != size && making {
		// Its making was cut short, and nobody has written to it yet.
		if err := errors.Join(f.Close(), os.Remove(path)); err != nil {
			return nil, fmt.Errorf("make the store %s anew: %w", path, err)
		}
		return file.Create(path, size, o)
	} else if got != size {
		return nil, errors.Join(fmt.Errorf("the store %s has %d bytes, the volume has %d", path, got, size), f.Close())
	}
	return f, nil
}

// openGiven opens the store that a user named. It must exist: a path that is
// missing is a disk that is not plugged in, or a file system that is not mounted.
func (w *worker) openGiven(ctx context.Context, v *fsmstorage.Volume) (block.Device, error) {
	u, err := storeurl.Parse(v.Store)
	if err != nil {
		return nil, err
	}
	if p := u.Base().Path; p != "" && u.Base().Scheme != storeurl.NBDUnix {
		if rel, err := filepath.Rel(w.cfg.VolumeDir(), p); err == nil && filepath.IsLocal(rel) {
			return nil, fmt.Errorf("open store %s: it lies in the folder of our own volumes", p)
		}
	}
	return store.Open(ctx, u, store.Options{BlockSize: v.Config.BlockSize, Size: v.Config.Size, Cache: w.fileOptions(0).Cache,
		New: v.State == fsmstorage.Creating, Logger: w.log})
}

// adoptMark beside a file of checksums is the operator's word that they may be
// made anew from the data as they are.
const adoptMark = ".adopt"

// withSums puts the checksums over a store.
func (w *worker) withSums(ctx context.Context, v *fsmstorage.Volume, d block.Device) (block.Device, error) {
	id, err := uuid.Parse(v.Config.UUID)
	if err != nil {
		return nil, fmt.Errorf("checksums: %w", err)
	}
	path, size := w.sumsPath(v.Config.UUID), d.Info().Size
	making := v.State == fsmstorage.Creating
	_, noMark := os.Stat(path + adoptMark)
	adopt := noMark == nil
	if making || adopt {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("make checksums anew: %w", err)
		}
	}
	// The page cache holds them: what a crash of this process leaves is whole.
	side, err := w.openPath(path, making || adopt, integrity.SideSize(size), file.Options{Cache: file.Buffered, Logger: w.log})
	if err != nil {
		return nil, fmt.Errorf("checksums: %w; to have them made anew from the data as they are: touch %s%s", err, path, adoptMark)
	}
	if making || adopt {
		// A given store may hold data already, which is read once then.
		err = integrity.Format(ctx, side, size, id, adopt || v.Store != "")
		if err == nil && adopt {
			w.log.Warn("checksums are made anew from the data as they are", zap.String("volume", v.Name))
			if err = os.Remove(path + adoptMark); err == nil {
				err = file.SyncDir(w.cfg.VolumeDir())
			}
		}
	}
	var s *integrity.Device
	if err == nil {
		s, err = integrity.Open(ctx, d, side, integrity.Options{UUID: id, Logger: w.log.With(zap.String("volume", v.Name)), OnBad: func(int64) { w.poke() }})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("checksums %s: %w; to have them made anew from the data as they are: touch %s%s", path, err, path, adoptMark), side.Close())
	}
	return s, nil
}

// withJournal puts the journal of atomic writes over a store, and undoes the write
// that the last process did not end. A journal that cannot be made is an ability
// that the volume lacks; one that is there and cannot be obeyed is an error, since
// half a write may lie under it.
func (w *worker) withJournal(ctx context.Context, v *fsmstorage.Volume, d block.Device) (block.Device, error) {
	if d.Info().Caps.ReadOnly {
		return d, nil
	}
	id, err := uuid.Parse(v.Config.UUID)
	if err != nil {
		return nil, fmt.Errorf("journal of atomic writes: %w", err)
	}
	path := w.journalPath(v.Config.UUID)
	log := w.log.With(zap.String("volume", v.Name), zap.String("journal", path))
	j, err := w.openJournal(ctx, path)
	if errors.Is(err, errNoJournal) {
		log.Warn("the volume has no atomic writes", zap.Error(err))
		return d, nil
	}
	var a *atomic.Device
	if err == nil {
		if a, err = atomic.Open(ctx, d, j, id); err != nil {
			err = errors.Join(err, j.Close())
		}
	}
	switch {
	case err == nil:
	case errors.Is(err, file.ErrInUse) || errors.Is(err, block.ErrUnreachable): // which may pass
		return nil, fmt.Errorf("journal %s: %w", path, err)
	default:
		return nil, fmt.Errorf("journal %s: %w; to serve the volume with what a write that was cut off left behind: mv %s %s.old", path, err, path, path)
	}
	if off, n := a.Undone(); n > 0 {
		log.Warn("an atomic write that was cut off was undone", zap.Int64("offset", off), zap.Int64("bytes", n))
	}
	return a, nil
}

// errNoJournal: there is no journal, and none can be made.
var errNoJournal = errors.New("its journal cannot be made")

// openJournal opens a journal, or makes it where there is none: a volume may be
// older than the journals are, and one that is lost can only be replaced. Writes
// of a journal are durable by themselves; the page cache gives it no rules of
// alignment.
func (w *worker) openJournal(ctx context.Context, path string) (*file.File, error) {
	o := file.Options{Cache: file.Buffered, Logger: w.log}
	st, err := os.Stat(path)
	if err == nil && st.Size() > 0 {
		return file.Open(path, o)
	}
	if err == nil { // its making was cut short
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	j, err := file.Create(path, atomic.JournalSize, o)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoJournal, err)
	}
	if err := atomic.Format(ctx, j); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", errNoJournal, err), j.Close(), os.Remove(path))
	}
	return j, nil
}

// opened is the outcome of an opening beside the work loop.
type opened struct {
	dev block.Device
	err error
}

// retryStore is how often a store that could not be opened is tried again.
const retryStore = time.Second

// remote tells that opening the store waits for another machine or process.
func remote(v *fsmstorage.Volume) bool {
	u, err := storeurl.Parse(v.Store)
	return v.Store != "" && err == nil && (u.Base().Scheme == storeurl.NBD || u.Base().Scheme == storeurl.NBDUnix)
}

// openVolume opens the store of v, or begins to: what waits for a network runs
// beside the loop, which must not.
func (w *worker) openVolume(ctx context.Context, v *volume, rec *fsmstorage.Volume) {
	if !remote(rec) {
		dev, err := w.openStore(ctx, rec)
		w.installStore(v, rec, dev, err)
		return
	}
	if v.opening == nil {
		if w.clock.Now() < v.retryAt {
			return
		}
		c := make(chan opened, 1)
		v.opening = c
		w.wg.Go(func() {
			dev, err := w.openStore(ctx, rec)
			c <- opened{dev, err}
			w.poke()
		})
	}
	select {
	case o := <-v.opening:
		v.opening, v.retryAt = nil, w.clock.Now().Add(retryStore)
		w.installStore(v, rec, o.dev, o.err)
	default:
	}
}

func (w *worker) installStore(v *volume, rec *fsmstorage.Volume, dev block.Device, err error) {
	if err != nil && (v.err == nil || v.err.Error() != err.Error()) {
		w.log.Error("volume cannot be served", zap.String("volume", rec.Name), zap.Error(err))
	}
	v.dev, v.err = dev, err
}

// eraseStore removes what lies in our folder of a volume that is gone; a store
// that the user named stays.
func (w *worker) eraseStore(id string) (err error) {
	found := false
	for _, p := range []string{w.storePath(id), w.sumsPath(id), w.sumsPath(id) + adoptMark, w.journalPath(id)} {
		switch e := os.Remove(p); {
		case e == nil:
			found = true
		case !errors.Is(e, fs.ErrNotExist):
			err = errors.Join(err, e)
		}
	}
	if found {
		err = errors.Join(err, file.SyncDir(w.cfg.VolumeDir()))
		w.log.Info("erased what lay here of a removed volume", zap.String("uuid", id))
	}
	return err
}

// OnScrub verifies a copy, or stops that.
func (w *worker) OnScrub(s link.Scrub) {
	w.mu.Lock()
	w.mu.scrub = append(w.mu.scrub, s)
	w.mu.Unlock()
	w.poke()
}

// scrubs does what control asked.
func (w *worker) scrubs(asked []link.Scrub) {
	for _, s := range asked {
		log := w.log.With(zap.String("volume", s.UUID))
		v := w.vols[s.UUID]
		var d *integrity.Device
		if v != nil {
			d = sumsOf(v.dev)
		}
		switch {
		case d == nil:
			log.Warn("a volume without checksums, or not open, cannot be verified")
		case s.Stop:
			d.StopScrub()
		default:
			if err := d.StartScrub(s.Rate, func(integrity.Scrub) { w.poke() }); err != nil {
				log.Warn("the volume is not verified", zap.Error(err))
			} else {
				log.Info("the volume is verified", zap.Int64("bytes_per_second", s.Rate))
			}
		}
	}
}

// sumsOf finds the checksums among what is stacked on a store.
func sumsOf(d block.Device) *integrity.Device {
	for {
		switch x := d.(type) {
		case *integrity.Device:
			return x
		case block.Wrapper:
			d = x.Inner()
		default:
			return nil
		}
	}
}

// checksReport is what control is told of the checksums of a copy. It is coarse,
// so that it does not change with each command.
type checksReport struct {
	integrity.Stats
}

func checksOf(d block.Device) *checksReport {
	i := sumsOf(d)
	if i == nil {
		return nil
	}
	r := checksReport{i.Stats()}
	r.Verified = 0
	if p := r.Scrub.Size / 100; p > 0 && r.Scrub.State == "running" {
		r.Scrub.Done = r.Scrub.Done / p * p
	}
	return &r
}

func sameReport(a, b volumeReport) bool {
	ca, cb := a.Checks, b.Checks
	a.Checks, b.Checks = nil, nil
	if a != b || (ca == nil) != (cb == nil) {
		return false
	}
	return ca == nil || fmt.Sprintf("%+v", *ca) == fmt.Sprintf("%+v", *cb)
}
