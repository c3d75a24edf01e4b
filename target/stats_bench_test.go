package target

import (
	"testing"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// BenchmarkRead4kQD32 keeps 32 reads in flight over one loopback connection.
func BenchmarkRead4kQD32(b *testing.B) {
	s := newBench(b, Options{}, lunOf(b, 0))
	c := s.ready(loginOpt{})
	c.clearUA(0)
	c.do(0, scsi.Read(0, 8), nil, 4096)
	b.ReportAllocs()
	b.ResetTimer()
	sent := 0
	put := func(n int) {
		for ; n > 0 && sent < b.N; n-- {
			p := c.command(0, scsi.Read(uint64(sent%200), 8), nil, 4096)
			p.Encode(c.w.Begin())
			if err := c.w.End(nil); err != nil {
				b.Fatal(err)
			}
			sent++
		}
		if err := c.w.Flush(); err != nil {
			b.Fatal(err)
		}
	}
	put(32)
	back := 0
	for done := 0; done < b.N; {
		h, err := c.r.Next()
		if err != nil {
			b.Fatal(err)
		}
		if h.Opcode() == iscsi.OpDataIn {
			done++
			back++
			if err := c.r.DiscardData(); err != nil {
				b.Fatal(err)
			}
		}
		if back >= 8 || done == sent {
			put(back)
			back = 0
		}
	}
}
