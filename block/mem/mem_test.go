package mem

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
)

func TestConformance(t *testing.T) {
	for _, bs := range []int{512, 4096} {
		blocktest.Run(t, blocktest.Store{New: func(tb rapid.TB) block.Device {
			d, err := New(1<<20, bs)
			if err != nil {
				tb.Fatal(err)
			}
			return d
		}})
	}
}

func TestResize(t *testing.T) {
	d, err := New(1<<20, 512)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := []byte{511: 1}
	if err := d.WriteAt(t.Context(), p, 512<<10, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Resize(512 << 10); err != nil {
		t.Fatal(err)
	}
	if err := d.Resize(1 << 20); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadAt(t.Context(), p, 512<<10); err != nil || p[511] != 0 {
		t.Error("data behind the end came back", err)
	}
}
