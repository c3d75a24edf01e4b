package fsck_test

import (
	"context"
	"os"
	"slices"
	"testing"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/fsck"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest/powercut"
)

// TestPowerCut: a repair that is cut at any write can be done again, and ends
// clean.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	path := gfstest.Load(t, gfstest.Clean4096)
	for _, w := range wounds {
		few := []string{"leaf magic", "data shared by two files"}
		if os.Getenv("BLOCKHOUSE_PROVE") == "" && !slices.Contains(few, w.name) {
			continue
		}
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			hurt := disk.NewOverlay(gfstest.Open(t, path))
			f, err := fs.Open(hurt)
			if err != nil {
				t.Fatal(err)
			}
			w.do(t, hurt, f)
			rec := powercut.New(hurt)
			if res, lines := check(t, rec, true); res.Problems == 0 || res.Left != 0 {
				t.Fatalf("%+v\n%s", res, lines)
			}
			n := 0
			if err := rec.Each(11, min(gfstest.Prove(1), 4), func(what string, d *disk.Overlay) {
				n++
				if _, err := fsck.Check(context.Background(), d, fsck.Config{Repair: true}); err != nil {
					t.Errorf("%s: %v", what, err)
					return
				}
				if res, lines := check(t, d, false); res.Problems != 0 {
					t.Errorf("%s: %+v\n%s", what, res, lines)
				}
			}); err != nil {
				t.Fatal(err)
			}
			if n < 4 {
				t.Errorf("%d states", n)
			}
		})
	}
}
