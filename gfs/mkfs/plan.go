package mkfs

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Config is what the caller chose. A zero field takes the default.
type Config struct {
	BlockSize int    // bytes; 0 = from the topology, else 4096
	Blocks    uint64 // size of the filesystem in blocks; 0 = the whole device
	Journals  int    // default 1
	JournalMB int    // 8..1024; 0 = by the size of the device
	RGMB      int    // 32..2048; default 256
	QuotaMB   int    // 1..64: each quota_change file; default 1
	LockProto string // default lock_dlm
	LockTable string
	UUID      [16]byte
	Format    uint32 // 1801 or 1802; default 1802

	NoAlign       bool
	SUnit, SWidth uint64 // bytes; both or none

	Now  int64         // seconds since 1970: all inode times
	Rand func() uint32 // start sequence of each journal; nil = 0
}

// Topology is what a device says about its preferred I/O, in bytes; zero =
// unknown. A file has none.
type Topology struct {
	Logical, Physical int
	MinIO, OptIO      int
}

// Defaults.
const (
	DefaultBlock   = 4096
	DefaultRGMB    = 256
	DefaultQuotaMB = 1
	// GrowRGMB is the target that gfs2_grow uses.
	GrowRGMB = 2048
)

// Error is an input that mkfs refuses. Its text is mkfs.gfs2's where that has
// one; Hint says what to type instead.
type Error struct {
	Msg  string
	Hint string
}

func (e *Error) Error() string { return e.Msg }

func refuse(hint, format string, a ...any) error {
	return &Error{Msg: fmt.Sprintf(format, a...), Hint: hint}
}

// ErrNoFit is a device too small for what was asked.
var ErrNoFit = errors.New("gfs2 will not fit on this device.")

// CheckLocking judges lock protocol and lock table as mount will.
func CheckLocking(proto, table string) error {
	switch proto {
	case "lock_nolock":
		return nil
	case "lock_dlm":
	case "lock_gulm":
		return refuse("no kernel has had lock_gulm since 2008: use -p lock_dlm", "Invalid lock protocol: %s", proto)
	default:
		return refuse("use -p lock_dlm (shared) or -p lock_nolock (one node only)", "Invalid lock protocol: %s", proto)
	}
	if table == "" {
		return refuse("say -t CLUSTER:FSNAME, or -p lock_nolock for a filesystem of one node", "No lock table specified.")
	}
	return CheckLockTable(table)
}

// CheckLockTable judges the form CLUSTER:FSNAME.
func CheckLockTable(table string) error {
	bad := func(what string) error {
		return refuse("the form is CLUSTER:FSNAME, letters, digits, - and _ , at most 32 and 30 long", "Invalid lock table: %s", what)
	}
	for _, r := range table {
		ok := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == ':'
		if !ok {
			return bad(fmt.Sprintf("invalid character '%c'", r))
		}
	}
	cluster, fs, ok := strings.Cut(table, ":")
	switch {
	case !ok:
		return bad("missing colon")
	case cluster == "":
		return bad("cluster name is missing")
	case len(cluster) > 32:
		return bad("cluster name is too long")
	case strings.Contains(fs, ":"):
		return bad("contains more than one colon")
	case fs == "":
		return bad("file system name is missing")
	case len(fs) > 30:
		return bad("file system name is too long")
	}
	return nil
}

// Check judges everything that does not need the device.
func (c Config) Check() error {
	if c.LockProto == "" {
		c.LockProto = "lock_dlm"
	}
	if err := CheckLocking(c.LockProto, c.LockTable); err != nil {
		return err
	}
	switch {
	case c.BlockSize != 0 && (c.BlockSize < 512 || c.BlockSize > maxBlock() || c.BlockSize&(c.BlockSize-1) != 0):
		return refuse("", "Block size must be a power of two between 512 and %d", maxBlock())
	case c.RGMB != 0 && (c.RGMB < ondisk.MinRGMB || c.RGMB > ondisk.MaxRGMB):
		return refuse("-r takes 32 to 2048 megabytes", "Bad resource group size")
	case c.Journals < 0:
		return refuse("", "Number of journals cannot be negative: %d", c.Journals)
	case c.JournalMB != 0 && (c.JournalMB < ondisk.MinJournalMB || c.JournalMB > ondisk.MaxJournalMB):
		return refuse("-J takes 8 to 1024 megabytes", "Bad journal size")
	case c.QuotaMB != 0 && (c.QuotaMB < 1 || c.QuotaMB > 64):
		return refuse("-c takes 1 to 64 megabytes", "Bad quota change size")
	case (c.SUnit == 0) != (c.SWidth == 0):
		return refuse("say -o sunit=BYTES,swidth=BYTES", "Stripe unit and stripe width must be specified together")
	case c.Format != 0 && c.Format != ondisk.Format1801 && c.Format != ondisk.Format1802:
		return refuse("-o format takes 1801 or 1802", "Invalid filesystem format: %d", c.Format)
	}
	return nil
}

func maxBlock() int { return min(os.Getpagesize(), ondisk.MaxBlock) }

// RG is a planned resource group.
type RG struct {
	ondisk.Rindex
	Skip    uint32
	Journal int // number of the journal inside, -1 = none
}

// Layout is a filesystem on paper.
type Layout struct {
	Config
	Geom      ondisk.Geometry
	DevBlocks uint64 // blocks that the plan may use
	FSBlocks  uint64 // one past the last block in use
	JBlocks   uint64 // data blocks of one journal
	Align     Align
	RGs       []RG
}

// Align is the placement rule of resource groups: Base the stripe width, Off
// the stripe unit, in blocks; both 0 = none.
type Align struct{ Base, Off uint64 }

func roundUp(n, to uint64) uint64 {
	if to == 0 {
		return n
	}
	return (n + to - 1) / to * to
}

// Addr aligns the start of a resource group: to the stripe unit.
func (a Align) Addr(n uint64) uint64 { return roundUp(n, a.Off) }

// Len aligns the length of a resource group: whole stripes and one unit more,
// so that successive headers land on successive disks.
func (a Align) Len(n uint64) uint64 { return roundUp(n, a.Base) + a.Off }

// step is the smallest change of a length that keeps the alignment.
func (a Align) step() uint64 { return max(a.Base, 1) }

// ChooseBlockSize applies the rule of mkfs.gfs2 ≥ 3.3 to a device's topology:
// the optimal I/O size or the physical sector where it is a block size of at
// least 4096, else 4096.
func ChooseBlockSize(t Topology) int {
	page := maxBlock()
	pow2 := func(n int) bool { return n >= DefaultBlock && n <= page && n&(n-1) == 0 }
	switch {
	case pow2(t.OptIO) && t.OptIO >= t.MinIO:
		return t.OptIO
	case pow2(t.Physical):
		return t.Physical
	}
	return DefaultBlock
}

func chooseAlign(c Config, t Topology, bs uint64) (Align, error) {
	switch {
	case c.NoAlign:
		return Align{}, nil
	case c.SUnit != 0:
		if c.SUnit%bs != 0 {
			return Align{}, refuse("", "Stripe unit (%d) must be a multiple of block size (%d)", c.SUnit, bs)
		}
		if c.SWidth%c.SUnit != 0 {
			return Align{}, refuse("", "Stripe width (%d) must be a multiple of stripe unit (%d)", c.SWidth, c.SUnit)
		}
		return Align{Base: c.SWidth / bs, Off: c.SUnit / bs}, nil
	case t.MinIO > t.Physical && t.OptIO > t.Physical && t.OptIO%t.MinIO == 0 && uint64(t.MinIO)%bs == 0:
		return Align{Base: uint64(t.OptIO) / bs, Off: uint64(t.MinIO) / bs}, nil
	}
	return Align{}, nil
}

// defaultJournalMB follows mkfs.gfs2: a number of blocks by the device's blocks
// per journal, and never less than the smallest journal.
func defaultJournalMB(blocks uint64, bs int) (int, bool) {
	if blocks < 2*(ondisk.MinJournalMB<<20)/uint64(bs) {
		return 0, false
	}
	const k = 1024
	journal := uint64(256 * k)
	for _, s := range []struct{ below, blocks uint64 }{
		{128 * k, 2 * k}, {512 * k, 4 * k}, {2048 * k, 8 * k}, {4096 * k, 16 * k}, {262144 * k, 32 * k}, {2621440 * k, 128 * k},
	} {
		if blocks < s.below {
			journal = s.blocks
			break
		}
	}
	return max(int(journal*uint64(bs)>>20), ondisk.MinJournalMB), true
}

// Plan lays a filesystem out on a device of size bytes. It does no I/O.
func Plan(c Config, size int64, t Topology) (*Layout, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	if c.BlockSize == 0 {
		c.BlockSize = ChooseBlockSize(t)
	}
	if c.BlockSize < t.Logical {
		return nil, refuse("", "Error: Block size %d is less than minimum logical block size (%d).", c.BlockSize, t.Logical)
	}
	if c.Journals == 0 {
		c.Journals = 1
	}
	if c.RGMB == 0 {
		c.RGMB = DefaultRGMB
	}
	if c.QuotaMB == 0 {
		c.QuotaMB = DefaultQuotaMB
	}
	if c.Format == 0 {
		c.Format = ondisk.Format1802
	}
	if c.LockProto == "" {
		c.LockProto = "lock_dlm"
	}
	g, err := ondisk.NewGeometry(c.BlockSize)
	if err != nil {
		return nil, err
	}
	bs := uint64(c.BlockSize)
	l := &Layout{Geom: g, DevBlocks: uint64(size) / bs}
	if c.Blocks != 0 {
		if c.Blocks > l.DevBlocks {
			return nil, refuse("", "Specified size is bigger than the device.Device size: %.2f GB (%d blocks)",
				float64(size)/(1<<30), l.DevBlocks)
		}
		l.DevBlocks = c.Blocks
	}
	if l.Align, err = chooseAlign(c, t, bs); err != nil {
		return nil, err
	}
	perJournal := l.DevBlocks / uint64(c.Journals)
	mb, ok := defaultJournalMB(perJournal, c.BlockSize)
	if !ok {
		return nil, ErrNoFit
	}
	if c.JournalMB == 0 {
		c.JournalMB = mb
	} else if maxMB := perJournal / 2 * bs >> 20; uint64(c.JournalMB) > maxMB {
		return nil, fmt.Errorf("%w\nMaximum size for %d journals on this device is %dMB.", ErrNoFit, c.Journals, maxMB)
	}
	l.Config = c
	l.JBlocks = uint64(c.JournalMB) << 20 / bs

	tree := uint64(1)
	for _, n := range g.TreeBlocks(l.JBlocks) {
		tree += n
	}
	need := roundUp(l.JBlocks+tree, ondisk.NBBY)
	jlen := l.Align.Len(g.BitBlocks(need) + need)
	at := l.Align.Addr(g.SBBlock() + 1)
	for j := range c.Journals {
		if at, err = l.add(at, jlen, j); err != nil {
			return nil, err
		}
	}
	if at >= l.DevBlocks {
		return nil, ErrNoFit
	}
	lens := PlanRGs(l.Geom, l.Align, l.DevBlocks-at, uint64(c.RGMB)<<20/bs)
	if len(lens) == 0 {
		return nil, ErrNoFit
	}
	for _, n := range lens {
		if at, err = l.add(at, n, -1); err != nil {
			return nil, err
		}
	}
	for i := range l.RGs[:len(l.RGs)-1] {
		l.RGs[i].Skip = uint32(l.RGs[i+1].Addr - l.RGs[i].Addr)
	}
	last := l.RGs[len(l.RGs)-1]
	l.FSBlocks = last.Data0 + uint64(last.Data)
	return l, nil
}

// add appends a resource group of n blocks at block at and returns where the
// next one starts.
func (l *Layout) add(at, n uint64, journal int) (uint64, error) {
	if at+n > l.DevBlocks {
		return 0, ErrNoFit
	}
	ri, err := NewRindex(l.Geom, at, n)
	if err != nil {
		return 0, err
	}
	l.RGs = append(l.RGs, RG{Rindex: ri, Journal: journal})
	return at + n, nil
}

// NewRindex describes a resource group of n blocks at block at.
func NewRindex(g ondisk.Geometry, at, n uint64) (ondisk.Rindex, error) {
	length, data := g.SplitRG(n)
	if data == 0 {
		return ondisk.Rindex{}, fmt.Errorf("plan resource group at block %d: %d blocks are too few", at, n)
	}
	return ondisk.Rindex{Addr: at, Length: uint32(length), Data0: at + length, Data: uint32(data), Bitbytes: uint32(data / ondisk.NBBY)}, nil
}

// PlanRGs divides space blocks into resource groups near target blocks. So that
// no tiny one is left over, all are shortened evenly: the result has at most
// two lengths, one alignment step apart, the longer first. It is empty where
// the space does not hold one.
func PlanRGs(g ondisk.Geometry, a Align, space, target uint64) []uint64 {
	maxLen := uint64(ondisk.MaxRGMB<<20) >> g.Shift
	n0 := a.Len(target)
	for t := target; n0 > maxLen && t > a.Base+1; {
		t -= a.Base + 1
		n0 = a.Len(t)
	}
	count := space / n0
	step := a.step()
	longer, shorter := n0, uint64(0)
	shortCount := uint64(0)
	if space-count*n0 > a.Base {
		count++
		// The longest length that still overshoots: one step less would fit.
		if need := space / count; need+step < longer {
			k := (longer - need - 1) / step // steps to come within one step above need
			longer -= k * step
		}
		for (longer-step)*count >= space {
			longer -= step
		}
		shorter = longer - step
		// mkfs.gfs2 goes on until a block or more is left over.
		if over := count * longer; over >= space {
			shortCount = (over-space)/step + 1
		}
	}
	if count == 0 || shortCount > count {
		return nil
	}
	out := make([]uint64, count)
	for i := range out {
		if uint64(i) < count-shortCount {
			out[i] = longer
		} else {
			out[i] = shorter
		}
	}
	return out
}
