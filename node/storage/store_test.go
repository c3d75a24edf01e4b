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
	"github.com/blockhouse-san/blockhouse/block/integrity"
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
	if s := d.(*integrity.Device).Stats().Scrub; s.State != "done" || s.Bad != 1 {
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
	rec := record("u", fsmstorage.Creating, 1<<20)
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
	rec := record("u", fsmstorage.Creating, 1<<20)
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
