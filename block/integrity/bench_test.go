package integrity

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/file"
)

// BenchmarkDevice compares a file with and without checksums: the price of
// --integrity is the ratio of the two in one run.
func BenchmarkDevice(b *testing.B) {
	const size = 64 << 20
	for _, sums := range []bool{false, true} {
		for _, n := range []int{4096, 128 << 10, 1 << 20} {
			for _, op := range []string{"read", "write"} {
				b.Run(fmt.Sprintf("%s/%d/sums=%v", op, n, sums), func(b *testing.B) {
					o := file.Options{Cache: file.Buffered}
					f, err := file.Create(filepath.Join(b.TempDir(), "d"), size, o)
					if err != nil {
						b.Fatal(err)
					}
					var d block.Device = f
					if sums {
						s, err := file.Create(filepath.Join(b.TempDir(), "c"), SideSize(size), o)
						if err == nil {
							err = Format(bg, s, size, id, false)
						}
						if err != nil {
							b.Fatal(err)
						}
						d = open(b, f, s, 0)
					}
					defer d.Close()
					p := block.Alloc(n)
					for k := range p {
						p[k] = byte(k)
					}
					for off := int64(0); off < size; off += int64(n) {
						if err := d.WriteAt(bg, p, off, 0); err != nil {
							b.Fatal(err)
						}
					}
					b.SetBytes(int64(n))
					b.ReportAllocs()
					off := int64(0)
					for b.Loop() {
						if op == "read" {
							err = errors.Join(err, d.ReadAt(bg, p, off))
						} else {
							err = errors.Join(err, d.WriteAt(bg, p, off, 0))
						}
						off = (off + 7*int64(n)) % size
					}
					if err != nil {
						b.Fatal(err)
					}
				})
			}
		}
	}
}
