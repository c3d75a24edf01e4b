package target

import (
	"testing"

	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// A read and a write of 4 KiB in steady state cost at most one allocation for many
// commands (newTask), over a real connection.
func TestAllocationsPerCommand(t *testing.T) {
	s := newBench(t, Options{NopInterval: -1}, lunOf(t, 0))
	c := s.ready(loginOpt{})
	c.clearUA(0)
	data := make([]byte, 4096)
	one := func(cdb scsi.CDB, out []byte, in uint32) func() {
		p := c.command(0, cdb, out, in)
		c.cmdSN-- // it is only the pattern
		return func() {
			c.itt++
			p.ITT, p.CmdSN = c.itt, c.cmdSN
			c.cmdSN++
			p.Encode(c.w.Begin())
			if err := c.w.End(nil, out); err != nil {
				t.Fatal(err)
			}
			if err := c.w.Flush(); err != nil {
				t.Fatal(err)
			}
			h, err := c.r.Next()
			if err != nil {
				t.Fatal(err)
			}
			if op := h.Opcode(); op != iscsi.OpDataIn && op != iscsi.OpScsiResponse || h.ITT() != p.ITT {
				t.Fatalf("%s for %#x, want an answer to %#x", op, h.ITT(), p.ITT)
			}
			if err := c.r.DiscardData(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, x := range []struct {
		name string
		cdb  scsi.CDB
		out  []byte
		in   uint32
	}{{"read", scsi.Read(8, 8), nil, 4096}, {"write", scsi.Write(8, 8, false), data, 0}} {
		p := one(x.cdb, x.out, x.in)
		p()
		if n := testing.AllocsPerRun(2000, p); n > 1 {
			t.Errorf("%s: %v allocations a command, want at most 1", x.name, n)
		} else {
			t.Logf("%s: %v allocations a command", x.name, n)
		}
	}
}
