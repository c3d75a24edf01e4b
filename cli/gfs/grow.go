package gfs

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/grow"
	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// offline opens an unmounted filesystem for a change. A mounted one is refused,
// and so is one with a dirty journal: some node may have it mounted.
func (a *App) offline(ctx context.Context, name, target string) (disk.Device, *fs.FS, error) {
	if !strings.Contains(target, "://") {
		if m, err := findMount(target); err == nil {
			return nil, nil, fmt.Errorf("%s is mounted on %s: unmount it on every node first; gfs2-utils' %s changes a mounted one", m.Source, m.Point, name)
		}
	}
	d, err := a.open(ctx, target, true)
	if err != nil {
		return nil, nil, errors.New(pathText(target, err))
	}
	f, err := func() (*fs.FS, error) {
		f, err := fs.Open(d)
		if errors.Is(err, ondisk.ErrMagic) || errors.Is(err, ondisk.ErrType) {
			return nil, fmt.Errorf("%s: not a gfs2 file system", target)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", target, err)
		}
		n, err := f.Journals()
		if err != nil {
			return nil, err
		}
		for i := range n {
			j, err := journal.Open(f, i)
			if err != nil {
				return nil, err
			}
			h, err := j.Head()
			if err != nil {
				return nil, fmt.Errorf("%w: run fsck.gfs2 first", err)
			}
			if !h.Clean() {
				return nil, fmt.Errorf("journal %d is dirty: a node has %s mounted, or died with it mounted; unmount it everywhere, or run fsck.gfs2, first", i, target)
			}
		}
		return f, nil
	}()
	if err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	return d, f, nil
}

const growUsage = `Usage:

gfs2_grow [options] /path/to/filesystem

Options:
  -h               Usage information
  -q               Quiet, reduce verbosity
  -T               Test, do everything except update FS
  -V               Version information
  -v               Verbose, increase verbosity
The filesystem is a device or file that no node has mounted.
`

func (a *App) gfs2Grow(ctx context.Context, name string, args []string) int {
	opts, err := getopt(name, "hqTVvDK", nil, args)
	if err != nil {
		fmt.Fprintf(a.Err, "%v\nPlease use '-h' for help.\n", err)
		return 1
	}
	quiet, test := false, false
	var targets []string
	for _, o := range opts {
		switch o.letter {
		case 'h':
			fmt.Fprint(a.Out, growUsage)
			return 0
		case 'V':
			fmt.Fprintf(a.Out, "%s %s\n", name, version.String())
			return 0
		case 'q':
			quiet = true
		case 'T':
			test = true
		case 0:
			targets = append(targets, o.arg)
		}
	}
	if len(targets) == 0 {
		fmt.Fprintf(a.Err, "%s: no filesystem specified\n", name)
		return 1
	}
	for _, t := range targets {
		if err := a.growOne(ctx, name, t, quiet, test); err != nil {
			fmt.Fprintf(a.Err, "%s: %v\n", name, err)
			return 1
		}
	}
	return 0
}

func (a *App) growOne(ctx context.Context, name, target string, quiet, test bool) (err error) {
	say := func(format string, x ...any) {
		if !quiet {
			fmt.Fprintf(a.Out, format, x...)
		}
	}
	d, f, err := a.offline(ctx, name, target)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	t := d.Topology()
	align := mkfs.Align{}
	if bs := f.Geometry().BlockSize; t.MinIO > t.Physical && t.OptIO > t.Physical && t.OptIO%t.MinIO == 0 && t.MinIO%bs == 0 {
		align = mkfs.Align{Base: uint64(t.OptIO / bs), Off: uint64(t.MinIO / bs)}
	}
	p, err := grow.Plan(f, align)
	say("FS: Mount point:             (not mounted)\n")
	say("FS: Device:                  %s\n", target)
	say("FS: Size:                    %d (0x%x)\n", p.FSBlocks, p.FSBlocks)
	say("DEV: Length:                 %d (0x%x)\n", p.DevBlocks, p.DevBlocks)
	if errors.Is(err, grow.ErrNoRoom) {
		return fmt.Errorf("%s: %w: grow the device by at least %d MB first", target, err, ondisk.MinRGMB)
	}
	if err != nil {
		return err
	}
	say("The file system will grow by %dMB.\n", p.Added*uint64(p.BlockSize)>>20)
	if test {
		say("(Test mode--File system was not changed)\n")
		return nil
	}
	if err := grow.Grow(d, f, p); err != nil {
		return err
	}
	say("gfs2_grow complete.\n")
	return nil
}

const jaddUsage = `Usage:

gfs2_jadd [options] <device>

Options:
  -c <size>         Size of quota change file, in megabytes
  -D                Enable debugging code
  -h                Display this help, then exit
  -J <size>         Size of journals, in megabytes
  -j <number>       Number of journals
  -q                Don't print anything
  -V                Display version information, then exit
The device or file must not be mounted on any node.
`

// defaultJaddMB is what gfs2_jadd takes; its manual page says 32.
const defaultJaddMB = 128

func (a *App) gfs2Jadd(ctx context.Context, name string, args []string) int {
	fail := func(format string, x ...any) int {
		fmt.Fprintf(a.Err, name+": "+format+"\n", x...)
		return 1
	}
	opts, err := getopt(name, "c:DhJ:j:qV", nil, args)
	if err != nil {
		fmt.Fprintf(a.Err, "%v\nPlease use '-h' for help.\n", err)
		return 1
	}
	n, mb, quota, quiet, target := 1, defaultJaddMB, 1, false, ""
	for _, o := range opts {
		switch o.letter {
		case 'h':
			fmt.Fprint(a.Out, jaddUsage)
			return 0
		case 'V':
			fmt.Fprintf(a.Out, "%s %s\n", name, version.String())
			return 0
		case 'q':
			quiet = true
		case 'j':
			if n, err = strconv.Atoi(o.arg); err != nil || n < 1 || n > 1<<16 {
				return fail("no journals specified: -j takes a number from 1 on, not %q", o.arg)
			}
		case 'J':
			if mb, err = megabytes(o.arg); err != nil || mb < ondisk.MinJournalMB || mb > ondisk.MaxJournalMB {
				return fail("bad journal size: -J takes 8 to 1024 megabytes, not %q", o.arg)
			}
		case 'c':
			if quota, err = megabytes(o.arg); err != nil || quota < 1 || quota > 64 {
				return fail("bad quota change size: -c takes 1 to 64 megabytes, not %q", o.arg)
			}
		case 0:
			if target != "" {
				return fail("More than one device specified (try -h for help)")
			}
			target = o.arg
		}
	}
	if target == "" {
		return fail("no path specified (try -h for help)")
	}
	d, f, err := a.offline(ctx, name, target)
	if err != nil {
		return fail("%v", err)
	}
	p, err := func() (grow.JournalPlan, error) {
		p, err := grow.PlanJournals(f, n, mb, quota)
		if errors.Is(err, grow.ErrSpace) {
			return p, fmt.Errorf("Insufficient space on the device to add %d %dMB journals (%dMB QC size)\n\nRequired space  : %*d blocks\nAvailable space : %*d blocks",
				n, mb, quota, 10, p.Need, 10, p.Free)
		}
		if err != nil {
			return p, err
		}
		return p, grow.AddJournals(d, f, p, a.Now().Unix(), nil)
	}()
	if err = errors.Join(err, d.Close()); err != nil {
		return fail("%v", err)
	}
	if !quiet {
		fmt.Fprintf(a.Out, "Filesystem: %s\nOld journals: %d\nNew journals: %d\n", target, p.Old, p.New)
	}
	return 0
}
