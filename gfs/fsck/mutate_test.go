package fsck_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/fsck"
	"github.com/blockhouse-san/blockhouse/gfs/gfstest"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// mutation is one field of one structure with another value.
type mutation struct {
	what  string
	addr  uint64
	off   int
	value []byte
}

// mutations picks n of them: every kind of block, every field, values that look
// innocent as well as wild ones.
func mutations(t *testing.T, f *fs.FS, n int, seed uint64) []mutation {
	t.Helper()
	byType := map[ondisk.MetaType][]uint64{}
	rgs, err := f.RGs()
	if err != nil {
		t.Fatal(err)
	}
	journals := map[uint64]bool{}
	for i := range 2 {
		ip, err := f.Journal(i)
		if err != nil {
			t.Fatal(err)
		}
		if err := ip.EachBlock(func(a uint64, _ int, data bool) error {
			if data {
				journals[a] = true
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range rgs {
		for a := r.Addr; a < r.Data0+uint64(r.Data); a++ {
			if a >= r.Data0 {
				if s, err := f.State(a); err != nil || s == ondisk.Free {
					continue
				}
			}
			b, err := f.Block(a)
			if err != nil {
				t.Fatal(err)
			}
			if typ := ondisk.TypeOf(b); typ != ondisk.TypeNone && !journals[a] {
				byType[typ] = append(byType[typ], a)
			}
		}
	}
	rng := rand.New(rand.NewPCG(seed, 5))
	types := []ondisk.MetaType{ondisk.TypeDI, ondisk.TypeRG, ondisk.TypeLF, ondisk.TypeIN, ondisk.TypeRB, ondisk.TypeEA, ondisk.TypeDI, ondisk.TypeDI}
	var out []mutation
	for i := 0; len(out) < n; i++ {
		typ := types[i%len(types)]
		if len(byType[typ]) == 0 {
			continue
		}
		a := byType[typ][rng.IntN(len(byType[typ]))]
		b, err := f.Block(a)
		if err != nil {
			t.Fatal(err)
		}
		fields := ondisk.Fields(typ)
		if i/len(types)%3 == 2 { // behind the header: pointers, entries, bitmaps
			size := map[ondisk.MetaType]int{ondisk.TypeDI: ondisk.DinodeSize, ondisk.TypeRG: ondisk.RgrpSize, ondisk.TypeLF: ondisk.LeafSize}[typ]
			if size == 0 {
				size = ondisk.MetaHeaderSize
			}
			off := size + rng.IntN(64)
			v := byte(rng.Uint32())
			if b[off] == v {
				continue
			}
			out = append(out, mutation{fmt.Sprintf("%s %d byte %d: %#x to %#x", typ, a, off, b[off], v), a, off, []byte{v}})
			continue
		}
		fd := fields[rng.IntN(len(fields))]
		old := fd.Uint(b)
		v := []uint64{0, 1, old + 1, old - 1, old ^ 1<<rng.IntN(8*fd.Size), rng.Uint64(), ^uint64(0)}[rng.IntN(7)]
		if fd.Size < 8 {
			v &= 1<<(8*fd.Size) - 1
		}
		if v == old {
			continue
		}
		val := make([]byte, fd.Size)
		for k := range val {
			val[k] = byte(v >> (8 * (fd.Size - 1 - k)))
		}
		out = append(out, mutation{fmt.Sprintf("%s %d %s: %d to %d", typ, a, fd.Name, old, v), a, fd.Off, val})
	}
	return out
}

// TestMutations: whatever fsck.gfs2 reports we report; nothing makes us panic;
// and what we have repaired is clean for both.
func TestMutations(t *testing.T) {
	t.Parallel()
	gfstest.Need(t, "fsck.gfs2")
	seed := uint64(5)
	if n, err := strconv.ParseUint(os.Getenv("BLOCKHOUSE_SEED"), 10, 64); err == nil {
		seed = n
	}
	base := gfstest.Load(t, gfstest.Clean4096)
	bf, err := fs.Open(gfstest.Open(t, base))
	if err != nil {
		t.Fatal(err)
	}
	list := mutations(t, bf, gfstest.Prove(16), seed)
	const lanes = 4
	t.Logf("seed %d (BLOCKHOUSE_SEED)", seed)
	for lane := range lanes {
		t.Run(fmt.Sprint(lane), func(t *testing.T) {
			t.Parallel()
			for i := lane; i < len(list); i += lanes {
				m := list[i]
				path := copyOf(t, base)
				d := gfstest.Open(t, path)
				if _, err := d.WriteAt(m.value, int64(m.addr)<<12+int64(m.off)); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				out, terr := exec.CommandContext(ctx, "fsck.gfs2", "-n", path).CombinedOutput()
				cancel()
				var lines []string
				res, err := fsck.Check(context.Background(), d, fsck.Config{Report: func(s string) { lines = append(lines, s) }})
				if err != nil {
					t.Errorf("%s: %v", m.what, err)
					continue
				}
				if terr != nil && res.Problems == 0 {
					t.Errorf("%s: we find nothing, fsck.gfs2 says %v\n%s", m.what, terr, out)
				}
				if _, err := fsck.Check(context.Background(), d, fsck.Config{Repair: true}); err != nil {
					t.Errorf("%s: repair: %v", m.what, err)
					continue
				}
				if again, l := check(t, d, false); again.Problems != 0 {
					t.Errorf("%s: after repair %+v\n%s\nbefore: %q", m.what, again, l, lines)
				}
				if out, err := exec.Command("fsck.gfs2", "-n", path).CombinedOutput(); err != nil {
					t.Errorf("%s: after our repair fsck.gfs2 says %v\n%s\nwe said %q", m.what, err, out, lines)
				}
			}
		})
	}
}
