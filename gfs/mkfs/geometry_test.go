package mkfs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
)

// need skips, or fails in CI, where a peer program is missing.
func need(t testing.TB, progs ...string) {
	t.Helper()
	for _, p := range progs {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed (make deps)", p)
			}
			t.Skipf("skip: %s is not installed (make deps)", p)
		}
	}
}

// prove is the number of rounds asked for by BLOCKHOUSE_PROVE, or small.
func prove(small int) int {
	if n, err := strconv.Atoi(os.Getenv("BLOCKHOUSE_PROVE")); err == nil && n > 0 {
		return n
	}
	return small
}

type combo struct {
	size          int64
	b, j, J, r, c int
	sunit, swidth uint64
	align         int // -1 = not given
	format        uint32
	blocks        uint64
}

func (c combo) String() string {
	return fmt.Sprintf("size=%dM,b=%d,j=%d,J=%d,r=%d,c=%d,s=%d:%d,align=%d,fmt=%d,blocks=%d",
		c.size>>20, c.b, c.j, c.J, c.r, c.c, c.sunit, c.swidth, c.align, c.format, c.blocks)
}

func (c combo) args(path string) []string {
	a := []string{"-O", "-q", "-p", "lock_dlm", "-t", "cl:fs"}
	opt := func(f string, v int) {
		if v != 0 {
			a = append(a, f, strconv.Itoa(v))
		}
	}
	opt("-b", c.b)
	opt("-j", c.j)
	opt("-J", c.J)
	opt("-r", c.r)
	opt("-c", c.c)
	var o []string
	if c.sunit != 0 {
		o = append(o, fmt.Sprintf("sunit=%d,swidth=%d", c.sunit, c.swidth))
	}
	if c.align >= 0 {
		o = append(o, fmt.Sprintf("align=%d", c.align))
	}
	if c.format != 0 {
		o = append(o, fmt.Sprintf("format=%d", c.format))
	}
	if len(o) > 0 {
		a = append(a, "-o", strings.Join(o, ","))
	}
	a = append(a, path)
	if c.blocks != 0 {
		a = append(a, strconv.FormatUint(c.blocks, 10))
	}
	return a
}

func (c combo) config() Config {
	return Config{BlockSize: c.b, Journals: c.j, JournalMB: c.J, RGMB: c.r, QuotaMB: c.c, SUnit: c.sunit, SWidth: c.swidth,
		NoAlign: c.align == 0, Format: c.format, Blocks: c.blocks, LockTable: "cl:fs", Now: 1700000000, UUID: [16]byte{1, 2, 3},
		Rand: func() uint32 { return 77 }}
}

func sparse(t testing.TB, name string, size int64) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	f, err := os.Create(p)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func makeOurs(t testing.TB, path string, c Config) (Result, error) {
	t.Helper()
	d, err := disk.Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := Plan(c, d.Size(), Topology{})
	if err != nil {
		return Result{}, err
	}
	return Make(context.Background(), d, l, nil)
}

// Times, the uuid and the random start of journals may differ, nothing else.
var volatile = regexp.MustCompile(`(?m)^  (di_[acm]time|uuid|rg_crc) .*$|Seq: 0x[0-9a-f]+`)

func views(t testing.TB, path string, what ...string) string {
	t.Helper()
	var out bytes.Buffer
	for _, w := range what {
		cmd := exec.Command("gfs2_edit", append([]string{"-p"}, append(strings.Fields(w), path)...)...)
		b, err := cmd.Output()
		if err != nil {
			t.Fatalf("gfs2_edit -p %s: %v", w, err)
		}
		fmt.Fprintf(&out, "== %s\n%s", w, volatile.ReplaceAll(b, nil))
	}
	return out.String()
}

func fsckClean(t testing.TB, path string) {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command("fsck.gfs2", "-n", path)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Errorf("fsck.gfs2 -n: %v\n%s%s", err, out, stderr.Bytes())
	}
}

// TestGeometry: the same input gives the geometry of mkfs.gfs2 (facts §2.1).
func TestGeometry(t *testing.T) {
	t.Parallel()
	need(t, "mkfs.gfs2", "gfs2_edit", "fsck.gfs2")
	for _, c := range combos(prove(26)) {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			compare(t, c)
		})
	}
}

func compare(t *testing.T, c combo) {
	theirs, ours := sparse(t, "theirs", c.size), sparse(t, "ours", c.size)
	out, terr := exec.Command("mkfs.gfs2", c.args(theirs)...).CombinedOutput()
	res, oerr := makeOurs(t, ours, c.config())
	if terr != nil || oerr != nil {
		if (terr != nil) != (oerr != nil) {
			t.Fatalf("mkfs.gfs2: %v %s\nours: %v", terr, out, oerr)
		}
		return
	}
	what := []string{"sb", "rindex", "master", "jindex", "per_node", "inum", "statfs", "quota", "root", "journals"}
	if len(res.Layout.RGs) < 200 {
		what = append(what, "rgs")
	}
	// gfs2_edit prints the size of the whole image, which is the same for both.
	if d := cmp.Diff(strings.Split(views(t, theirs, what...), "\n"), strings.Split(views(t, ours, what...), "\n")); d != "" {
		t.Fatalf("-mkfs.gfs2 +ours:\n%s", d)
	}
	fsckClean(t, ours)
}

// combos are the corners first, then a walk over the product of the options.
func combos(n int) []combo {
	d := combo{size: 1 << 30, j: 1, align: -1}
	with := func(f func(c *combo)) combo { c := d; f(&c); return c }
	out := []combo{
		d,
		with(func(c *combo) { c.j = 5 }),
		with(func(c *combo) { c.size, c.b, c.j = 300<<20, 512, 3 }),
		with(func(c *combo) { c.b, c.j, c.J, c.size = 512, 20, 8, 330<<20 }), // per_node's hash table doubles
		with(func(c *combo) { c.b, c.r, c.size = 512, 32, 3<<30 }),
		with(func(c *combo) { c.size, c.sunit, c.swidth, c.j, c.J = 3<<30, 65536, 262144, 3, 16 }),
		with(func(c *combo) { c.size, c.sunit, c.swidth, c.j, c.J = 3<<30, 1<<20, 3<<20, 3, 16 }),
		with(func(c *combo) { c.size, c.sunit, c.swidth, c.r = 6<<30, 1<<20, 3<<20, 2048 }),
		with(func(c *combo) { c.size, c.j, c.c = 1<<30, 2, 3 }),
		with(func(c *combo) { c.size = 40 << 20 }),
		with(func(c *combo) { c.size = 48 << 20 }),
		with(func(c *combo) { c.size = 15 << 20 }),
		with(func(c *combo) { c.size, c.J = 64<<20, 40 }),
		with(func(c *combo) { c.size, c.J, c.j = 200<<20, 25, 5 }),
		with(func(c *combo) { c.blocks = 100000 }),
		with(func(c *combo) { c.format = 1801 }),
		with(func(c *combo) { c.size, c.r = 1280<<20, 32 }), // 40 resource groups: rindex at the edge of stuffed
	}
	sizes := []int64{100 << 20, 257 << 20, 513 << 20, 1<<30 + 12345*512, 3 << 30, 9 << 30, 70 << 30}
	bs := []int{512, 1024, 2048, 4096, 0}
	js := []int{1, 2, 5, 9, 17}
	jm := []int{0, 8, 13, 32, 64}
	rs := []int{0, 32, 33, 100, 512, 2048}
	st := [][2]uint64{{0, 0}, {0, 0}, {65536, 65536 * 4}, {4096, 4096 * 7}, {1 << 20, 1 << 20}, {524288, 524288 * 3}}
	// Primes as strides visit the product evenly whatever n is.
	for i := 0; len(out) < n; i++ {
		s := st[i*13%len(st)]
		c := combo{size: sizes[i*5%len(sizes)], b: bs[i*7%len(bs)], j: js[i/3%len(js)], J: jm[i/2%len(jm)], r: rs[i*11/4%len(rs)],
			sunit: s[0], swidth: s[1], align: i%4/2 - 1 + i%4%2, c: []int{0, 1, 2, 5}[i/7%4]}
		if c.b == 512 && c.size > 4<<30 {
			c.size = 2 << 30
		}
		if c.align > 1 {
			c.align = 1
		}
		out = append(out, c)
	}
	if n >= 100 { // slow ones: many journals, many resource groups
		out = append(out[:n-4],
			with(func(c *combo) { c.b, c.j, c.J, c.size = 512, 40, 8, 1<<30 }),
			with(func(c *combo) { c.b, c.j, c.J, c.size = 1024, 60, 8, 2<<30 }),
			with(func(c *combo) { c.j, c.J, c.size = 100, 8, 3<<30 }),
			with(func(c *combo) { c.size, c.r = 20<<30, 32 }))
	}
	return out[:n]
}
