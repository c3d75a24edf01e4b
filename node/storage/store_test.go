package storage

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/atomic"
	"github.com/blockhouse-san/blockhouse/block/store"
	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/node/link"
)

// TestChecksumsOfAVolume: made with it, needed ever after, made anew only on an
// operator's word, and erased with it.
func TestChecksumsOfAVolume(t *testing.T) {
	w := testWorker(t)
	ctx := context.Background()
	rec := record(uuid.NewString(), fsmstorage.Creating, 8<<20)
	rec.Integrity = true
	open := func() block.Device {
		t.Helper()
		d, err := w.openStore(ctx, rec)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := open()
	if err := errors.Join(d.WriteAt(ctx, bytes.Repeat([]byte{1}, 8192), 0, 0), d.Close()); err != nil {
		t.Fatal(err)
	}
	rec.State = fsmstorage.Ready
	img, sums := w.storePath(rec.Config.UUID), w.sumsPath(rec.Config.UUID)
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte{9}, 5000)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	d = open()
	if err := d.ReadAt(ctx, p, 4608); !errors.Is(err, block.ErrChecksum) {
		t.Errorf("a damaged block: %v", err)
	}
	if r := checksOf(d); r == nil || r.BadUnits != 1 || r.Bad[0] != 4096 {
		t.Errorf("%+v", r)
	}
	w.vols[rec.Config.UUID] = &volume{uuid: rec.Config.UUID, dev: d}
	w.kick = make(chan struct{}, 1)
	w.scrubs([]link.Scrub{{UUID: "none"}, {UUID: rec.Config.UUID}})
	<-w.kick
	if s := sumsOf(d).Stats().Scrub; s.State != "done" || s.Bad != 1 {
		t.Errorf("%+v", s)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(sums, sums+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.openStore(ctx, rec); err == nil || !strings.Contains(err.Error(), "touch "+sums+".adopt") {
		t.Fatalf("without its checksums: %v", err)
	}
	if err := os.WriteFile(sums+".adopt", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d = open()
	if err := errors.Join(d.ReadAt(ctx, p, 4608), d.Close()); err != nil {
		t.Errorf("after they were made anew: %v", err)
	}
	if _, err := os.Stat(sums + ".adopt"); err == nil {
		t.Error("the word is still there: the next start would take it again")
	}
	if err := w.eraseStore(rec.Config.UUID); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(w.cfg.VolumeDir(), rec.Config.UUID+".crc")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestMemoryIsGone: a volume in memory is made once.
func TestMemoryIsGone(t *testing.T) {
	w := testWorker(t)
	rec := record(theID, fsmstorage.Creating, 1<<20)
	rec.Store = "mem:"
	d, err := w.openStore(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	rec.State = fsmstorage.Ready
	if _, err := w.openStore(t.Context(), rec); !errors.Is(err, store.ErrGone) {
		t.Errorf("an empty memory in place of somebody's data: %v", err)
	}
}

// TestRemoteStoresOpenBesideTheLoop: the loop never waits for another machine.
func TestRemoteStoresOpenBesideTheLoop(t *testing.T) {
	w := testWorker(t)
	w.kick = make(chan struct{}, 1)
	rec := record(theID, fsmstorage.Creating, 1<<20)
	rec.Store = "nbd+unix:///?socket=" + filepath.Join(t.TempDir(), "none")
	v := &volume{uuid: "u"}
	w.openVolume(t.Context(), v, rec)
	if v.dev != nil || v.err == nil && v.opening == nil {
		t.Fatalf("%+v", v)
	}
	w.wg.Wait()
	w.openVolume(t.Context(), v, rec)
	if !errors.Is(v.err, block.ErrUnreachable) || v.opening != nil {
		t.Fatalf("%v", v.err)
	}
	w.openVolume(t.Context(), v, rec) // too early for the next try
	if v.opening != nil {
		t.Error("tried again at once")
	}
}

// TestAtomicWritesOfAVolume: what a worker did not end is undone by the next one
// before anybody reads, over the checksums; the journal goes with the volume.
func TestAtomicWritesOfAVolume(t *testing.T) {
	ctx := t.Context()
	for _, sums := range []bool{false, true} {
		w := testWorker(t)
		img := filepath.Join(t.TempDir(), "disk.img")
		if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 8<<20)); err != nil {
			t.Fatal(err)
		}
		rec := record(theID, fsmstorage.Creating, 8<<20)
		rec.Integrity = sums
		open := func(url string) block.Device {
			t.Helper()
			rec.Store = url
			d, err := w.openStore(ctx, rec)
			if err != nil {
				t.Fatal(err)
			}
			rec.State = fsmstorage.Ready
			return d
		}
		old, neu := bytes.Repeat([]byte{1}, 64<<10), bytes.Repeat([]byte{2}, 64<<10)
		// The second write of the store, and the undoing of it, fail.
		d := open("fault:on=write&err=io&skip=1@file:" + img)
		if err := errors.Join(d.WriteAt(ctx, old, 4096, 0), d.Flush(ctx)); err != nil {
			t.Fatal(err)
		}
		if err := d.(block.AtomicWriter).WriteAtomic(ctx, neu, 4096); !errors.Is(err, block.ErrMedium) {
			t.Fatalf("%v", err)
		}
		if err := block.Failed(d); !errors.Is(err, block.ErrMedium) {
			t.Errorf("half a write that stays, and the store is said to be good: %v", err)
		}
		_ = d.Close()
		tear(t, img, 4096, neu[:32<<10])
		d = open("file:" + img)
		got := make([]byte, len(old))
		if err := d.ReadAt(ctx, got, 4096); err != nil || !bytes.Equal(got, old) {
			t.Errorf("checksums %v: half a write was not undone: %v", sums, err)
		}
		if r := checksOf(d); sums && (r == nil || r.BadUnits != 0) {
			t.Errorf("%+v", r)
		}
		if err := errors.Join(d.(block.AtomicWriter).WriteAtomic(ctx, neu, 4096), d.ReadAt(ctx, got, 4096), d.Close()); err != nil || !bytes.Equal(got, neu) {
			t.Errorf("checksums %v: %v", sums, err)
		}
		d = open("file:" + img) // an ended write is not undone
		if err := errors.Join(d.ReadAt(ctx, got, 4096), d.Close()); err != nil || !bytes.Equal(got, neu) {
			t.Errorf("checksums %v: an ended write was undone: %v", sums, err)
		}
		if err := w.eraseStore(theID); err != nil {
			t.Fatal(err)
		}
		if left, _ := filepath.Glob(filepath.Join(w.cfg.VolumeDir(), "*")); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		if _, err := os.Stat(img); err != nil {
			t.Errorf("the user's own store: %v", err)
		}
	}
}

// tear overwrites a part of a file behind the back of its store.
func tear(t *testing.T, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(p, off)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestJournalsThatCannotBeUsed: none can be made, then the volume is served
// without; one is there and cannot be obeyed, then it is not served.
func TestJournalsThatCannotBeUsed(t *testing.T) {
	ctx := t.Context()
	w := testWorker(t)
	rec := record(theID, fsmstorage.Creating, 1<<20)
	journal := w.journalPath(theID)
	open := func(atomicToo bool) {
		t.Helper()
		d, err := w.openStore(ctx, rec)
		if err != nil {
			t.Fatal(err)
		}
		rec.State = fsmstorage.Ready
		if _, ok := d.(block.AtomicWriter); ok != atomicToo {
			t.Errorf("%T, want atomic writes: %v", d, atomicToo)
		}
		if err := errors.Join(d.WriteAt(ctx, make([]byte, 512), 0, 0), d.Close()); err != nil {
			t.Error(err)
		}
	}
	open(true)
	if err := os.Truncate(journal, 0); err != nil { // its making was cut short
		t.Fatal(err)
	}
	open(true)
	if err := os.Remove(journal); err != nil { // a volume older than journals
		t.Fatal(err)
	}
	open(true)
	// No room for one: a link to nowhere cannot be made a file of.
	if err := errors.Join(os.Remove(journal), os.Symlink(filepath.Join(w.cfg.VolumeDir(), "none"), journal)); err != nil {
		t.Fatal(err)
	}
	open(false)
	if err := errors.Join(os.Remove(journal), os.WriteFile(journal, make([]byte, 4096), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.openStore(ctx, rec); err == nil || !strings.Contains(err.Error(), "mv "+journal) {
		t.Errorf("a journal that is too short: %v", err)
	}
	if err := os.Truncate(journal, atomic.JournalSize); err != nil {
		t.Fatal(err)
	}
	open(true)
}
