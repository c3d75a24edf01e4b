package store

import (
	"context"
	"errors"
	"flag"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
)

func TestMain(m *testing.M) {
	if err := flag.Set("rapid.checks", "10"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

func open(tb rapid.TB, s string, o Options) (block.Device, error) {
	u, err := storeurl.Parse(s)
	if err != nil {
		tb.Fatal(err)
	}
	return Open(context.Background(), u, o)
}

// TestEveryScheme: what can be named can be opened.
func TestEveryScheme(t *testing.T) {
	t.Parallel()
	var have []string
	for s := range schemes {
		have = append(have, string(s))
	}
	if slices.Sort(have); !slices.Equal(have, storeurl.Schemes()) {
		t.Fatalf("opened: %v, named: %v", have, storeurl.Schemes())
	}
}

func image(tb rapid.TB, dir string) string {
	f, err := os.CreateTemp(dir, "img")
	if err == nil {
		err = errors.Join(f.Truncate(1<<20), f.Close())
	}
	if err != nil {
		tb.Fatal(err)
	}
	return f.Name()
}

// TestConformance: the suite through the registry; nbd and block: have theirs
// beside the stores.
func TestConformance(t *testing.T) {
	t.Parallel()
	for _, pattern := range []string{"file:PATH", "file:PATH?cache=sync", "file:PATH?cache=buffered", "mem:", "fault:file:PATH?cache=buffered", "powercut:mem:",
		"fault:on=read&delay=1us@powercut:file:PATH?cache=buffered"} {
		t.Run(pattern, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device {
				d, err := open(tb, strings.ReplaceAll(pattern, "PATH", image(tb, dir)), Options{Size: 1 << 20, New: true})
				if err != nil {
					tb.Fatal(err)
				}
				return d
			}})
		})
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := image(t, dir)
	for s, want := range map[string]error{"file:" + p + "x": fs.ErrNotExist, "mem:": ErrGone, "nbd+unix:///x?socket=" + p + "x": block.ErrUnreachable} {
		if _, err := open(t, s, Options{}); !errors.Is(err, want) {
			t.Errorf("%s: %v", s, err)
		}
	}
	for s, want := range map[string]string{
		"block:" + p:         "for a file write file:",
		"file:" + dir:        "no regular file",
		"fault:on=read@mem:": "a fault needs err=",
	} {
		if _, err := open(t, s, Options{Size: 1 << 20, New: true}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", s, err)
		}
	}
	if _, err := open(t, "file:"+p, Options{Size: 4096}); err == nil || !strings.Contains(err.Error(), "the volume has 4096") {
		t.Errorf("another size: %v", err)
	}
	d, err := open(t, "file:"+p+"?cache=sync", Options{Cache: file.Buffered})
	if err != nil {
		t.Fatal(err)
	}
	if d.Info().Caps.WriteCache {
		t.Error("cache=sync was not obeyed")
	}
	if _, err := open(t, "file:"+p, Options{}); !errors.Is(err, file.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestWrappers: the faults are those of the URL, and an unflushed write is in no
// file before it is flushed.
func TestWrappers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p := make([]byte, 512)
	d, err := open(t, "fault:on=write+flush&err=nospace&skip=1&times=2@mem:", Options{Size: 1 << 20, New: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for i, want := range []error{nil, block.ErrNoSpace, block.ErrNoSpace, nil} {
		if err := d.WriteAt(ctx, p, 0, 0); !errors.Is(err, want) {
			t.Errorf("write %d: %v, want %v", i, err, want)
		}
	}
	img := image(t, t.TempDir())
	c, err := open(t, "powercut:file:"+img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	p[0] = 7
	first := func() byte {
		b, err := os.ReadFile(img)
		if err != nil {
			t.Fatal(err)
		}
		return b[0]
	}
	if err := c.WriteAt(ctx, p, 0, 0); err != nil || first() != 0 {
		t.Error("written through", err)
	}
	if err := c.Flush(ctx); err != nil || first() != 7 {
		t.Error("not flushed", err)
	}
	if err := c.(*fault.PowerCut).Cut(func(int64, int) int { return 0 }); err != nil {
		t.Error(err)
	}
	_ = c.Close()
}
