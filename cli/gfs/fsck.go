package gfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/fsck"
	"github.com/blockhouse-san/blockhouse/gfs/journal"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// Exit statuses of fsck.gfs2: those of fsck(8), as bits.
const (
	fsckOK          = 0
	fsckCorrected   = 1
	fsckUncorrected = 4
	fsckError       = 8
	fsckUsage       = 16
	fsckCanceled    = 32
)

const fsckUsageText = `Usage: %s [-afhnpqvVy] <device>
  -a, -p  preen: repair without asking; a clean filesystem is not looked at
  -f      check even a clean filesystem (with -a and -p)
  -n      repair nothing; dirty journals are replayed in memory
  -y      repair without asking
  -q      say less
  -v      say more
  -V      version
  -h      this text
Without -a, -n, -p or -y it checks first and asks before it repairs.
`

func (a *App) fsckFace(ctx context.Context, name string, args []string) int {
	fail := func(rc int, format string, x ...any) int {
		fmt.Fprintf(a.Err, name+": "+format+"\n", x...)
		return rc
	}
	opts, err := getopt(name, "afhnpqvVy", nil, args)
	if err != nil {
		fmt.Fprintln(a.Err, err)
		return fail(fsckUsage, "please use '-h' for help")
	}
	var preen, force, no, yes, quiet, verbose bool
	target := ""
	for _, o := range opts {
		switch o.letter {
		case 'a', 'p':
			preen = true
		case 'f':
			force = true
		case 'n':
			no = true
		case 'y':
			yes = true
		case 'q':
			quiet = true
		case 'v':
			verbose = true
		case 'h':
			fmt.Fprintf(a.Out, fsckUsageText, name)
			return fsckOK
		case 'V':
			fmt.Fprintf(a.Out, "%s %s\n", name, version.String())
			return fsckOK
		case 0:
			if target != "" {
				return fail(fsckUsage, "more than one device: %s and %s", target, o.arg)
			}
			target = o.arg
		}
	}
	if b := count(preen, no, yes); b > 1 {
		return fail(fsckUsage, "options -p/-a, -n and -y may not be used together")
	}
	if target == "" {
		return fail(fsckUsage, "no device specified; please use '-h' for help")
	}
	if !no && !strings.Contains(target, "://") {
		if m, err := findMount(target); err == nil {
			return fail(fsckUsage, "%s is mounted on %s: unmount it on every node first, or look with -n", m.Source, m.Point)
		}
	}
	d, err := a.open(ctx, target, !no)
	if err != nil {
		return fail(fsckUsage, "%s", pathText(target, err))
	}
	rc := a.fsckRun(ctx, name, target, d, preen, force, no, yes, quiet, verbose)
	if err := d.Close(); err != nil {
		return fail(fsckError, "close %s: %v", target, err)
	}
	return rc
}

func count(b ...bool) (n int) {
	for _, x := range b {
		if x {
			n++
		}
	}
	return n
}

func (a *App) fsckRun(ctx context.Context, name, target string, d disk.Device, preen, force, no, yes, quiet, verbose bool) int {
	if preen && !force {
		clean, proto, err := looksClean(d)
		if err == nil && clean {
			if !quiet {
				fmt.Fprintf(a.Out, "%s: clean.\n", target)
			}
			return fsckOK
		}
		if err == nil && proto != "lock_nolock" {
			fmt.Fprintf(a.Err, "%s: %s is a cluster filesystem (%s) with a dirty journal: a node may have it mounted, so -a and -p leave it alone; use -y when none has\n", name, target, proto)
			return fsckUncorrected
		}
	}
	bar := &fsckBar{w: a.Err, draw: isTerminal(a.Err) && !quiet, now: a.Now, start: a.Now()}
	run := func(repair, show bool) (fsck.Result, error) {
		res, err := fsck.Check(ctx, d, fsck.Config{
			Repair: repair, Now: a.Now().Unix(),
			Report: func(s string) {
				if show {
					bar.clear()
					fmt.Fprintln(a.Out, s)
				}
			},
			Info: func(s string) {
				if verbose {
					bar.clear()
					fmt.Fprintln(a.Out, s)
				}
			},
			Progress: bar.update,
		})
		bar.clear()
		return res, err
	}
	// Without an order to repair the first look is in memory only.
	first := preen || yes
	res, err := run(first, true)
	if rc, bad := a.fsckFailed(name, target, err); bad {
		return rc
	}
	if !first && !no && (res.Problems > 0 || res.Replayed > 0) {
		fmt.Fprintf(a.Out, "%s. Repair? [y/n] ", summary(res))
		s, rerr := bufio.NewReader(a.In).ReadString('\n')
		if rerr != nil && !errors.Is(rerr, io.EOF) {
			fmt.Fprintf(a.Err, "%s: read the answer: %v\n", name, rerr)
			return fsckError
		}
		if c := strings.TrimSpace(s); c == "" || c[0] != 'y' && c[0] != 'Y' {
			fmt.Fprintln(a.Out)
			return fsckUncorrected
		}
		first = true
		res, err = run(true, verbose)
		if rc, bad := a.fsckFailed(name, target, err); bad {
			return rc
		}
	}
	if !quiet {
		fmt.Fprintf(a.Out, "%s: %s.\n", target, summary(res))
	}
	switch {
	case res.Problems == 0 && (res.Replayed == 0 || !first):
		return fsckOK
	case !first || res.Left > 0:
		return fsckUncorrected
	}
	return fsckCorrected
}

// fsckFailed turns an error of the run into what is said and returned.
func (a *App) fsckFailed(name, target string, err error) (int, bool) {
	if err == nil {
		return 0, false
	}
	rc := fsckError
	switch {
	case errors.Is(err, context.Canceled):
		rc = fsckCanceled
	case errors.Is(err, ondisk.ErrNewFormat), errors.Is(err, ondisk.ErrGFS1), errors.Is(err, fsck.ErrNoFS):
		rc = fsckUsage
	case errors.Is(err, ondisk.ErrSB):
		rc = fsckUncorrected
	}
	fmt.Fprintf(a.Err, "%s: %s: %v\n", name, target, err)
	return rc, true
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func summary(r fsck.Result) string {
	var parts []string
	if r.Replayed > 0 {
		parts = append(parts, plural(r.Replayed, "journal to replay", "journals to replay"))
	}
	if r.Problems > 0 {
		parts = append(parts, plural(r.Problems, "problem", "problems"))
	} else {
		parts = append(parts, "no errors")
	}
	if r.Left > 0 {
		parts = append(parts, fmt.Sprintf("%d of them beyond repair", r.Left))
	}
	return strings.Join(parts, ", ")
}

// looksClean tells whether all journals are clean.
func looksClean(d disk.Device) (bool, string, error) {
	f, err := fs.Open(d)
	if err != nil {
		return false, "", err
	}
	proto := ondisk.CString(f.Super.LockProto[:])
	n, err := f.Journals()
	if err != nil {
		return false, proto, err
	}
	for i := range n {
		j, err := journal.Open(f, i)
		if err != nil {
			return false, proto, err
		}
		if h, err := j.Head(); err != nil || !h.Clean() {
			return false, proto, err
		}
	}
	return true, proto, nil
}

// fsckBar draws how far a pass is, and when it will be done, on a terminal.
type fsckBar struct {
	w     io.Writer
	draw  bool
	shown bool
	pass  string
	now   func() time.Time
	start time.Time
	last  time.Time
}

func (b *fsckBar) update(pass string, done, total uint64) {
	if !b.draw {
		return
	}
	t := b.now()
	if pass != b.pass {
		b.pass, b.start = pass, t
	}
	if t.Sub(b.last) < 200*time.Millisecond || total == 0 {
		return
	}
	b.last = t
	eta := time.Duration(0)
	if done > 0 {
		eta = time.Duration(float64(t.Sub(b.start)) * float64(total-done) / float64(done)).Round(time.Second)
	}
	fmt.Fprintf(b.w, "\r%s: %d%%, %s left\x1b[K", pass, done*100/total, eta)
	b.shown = true
}

func (b *fsckBar) clear() {
	if b.shown {
		fmt.Fprint(b.w, "\r\x1b[K")
		b.shown = false
	}
}
