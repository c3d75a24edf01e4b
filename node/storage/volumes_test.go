package storage

import (
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/blockhouse-san/blockhouse/block/replica"
	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/internal/env"
	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testWorker(t *testing.T) *worker {
	cfg := config.Default()
	cfg.DataDir = t.TempDir()
	if err := os.MkdirAll(cfg.VolumeDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	return &worker{cfg: cfg, log: zaptest.NewLogger(t), clock: env.NewManual(0), vols: map[string]*volume{}, erased: map[string]bool{}}
}

// theID is the volume of a test with one.
const theID = "5f0c2f0a-6c3e-4b5e-9f55-0a4f5f5c2b11"

func record(id string, st fsmstorage.VolumeState, size int64) *fsmstorage.Volume {
	return &fsmstorage.Volume{Name: id, State: st, Config: replica.Config{UUID: id, Size: size, BlockSize: 512, Epoch: 1, Primary: "n1", ISR: []string{"n1"}}}
}

func TestAMissingStoreIsNeverMadeAnew(t *testing.T) {
	w := testWorker(t)
	if _, err := w.openStore(t.Context(), record(theID, fsmstorage.Ready, 1<<20)); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Fatalf("opened a store that is not there: %v", err)
	}
	if _, err := os.Stat(w.storePath(theID)); !os.IsNotExist(err) {
		t.Fatal("an empty store was put in its place")
	}
}

func TestAnUnfinishedStoreIsMadeAnewOnlyWhileCreating(t *testing.T) {
	w := testWorker(t)
	if err := os.WriteFile(w.storePath(theID), []byte(strings.Repeat("x", 512)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.openStore(t.Context(), record(theID, fsmstorage.Ready, 1<<20)); err == nil || !strings.Contains(err.Error(), "512 bytes") {
		t.Fatalf("opened a store of another size: %v", err)
	}
	f, err := w.openStore(t.Context(), record(theID, fsmstorage.Creating, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if f.Info().Size != 1<<20 {
		t.Fatalf("size %d", f.Info().Size)
	}
	// Held by one process: a second worker cannot serve it.
	if _, err := w.openStore(t.Context(), record(theID, fsmstorage.Ready, 1<<20)); err == nil {
		t.Fatal("opened twice")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOnlyWhatTheFSMSaysIsErased(t *testing.T) {
	w := testWorker(t)
	for _, id := range []string{"gone", "elsewhere", "unknown"} {
		if err := os.WriteFile(w.storePath(id), []byte("data"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := &desired{node: "n1"}
	want.storage.Gone = map[string]*fsmstorage.Gone{
		"gone":      {Name: "gone", Epoch: 1, Members: []string{"n1"}},
		"elsewhere": {Name: "elsewhere", Epoch: 1, Members: []string{"n2"}},
	}
	w.dropVolumes(want)
	w.dropVolumes(want) // again changes nothing
	for id, there := range map[string]bool{"gone": false, "elsewhere": true, "unknown": true} {
		if _, err := os.Stat(w.storePath(id)); (err == nil) != there {
			t.Errorf("store %s: %v, expected there: %v", id, err, there)
		}
	}
}
