// Package gfs holds the commands of the GFS2 filesystem under all their names:
// mkfs-gfs and its faces (mkfs.gfs2, gfs2_mkfs, gfs_mkfs), and the tools that
// work on a device. Each command parses its options as the original does,
// calls a package below gfs/, and prints what scripts expect; what the original
// gets wrong is said more clearly here, and never differently in a line that a
// script may read.
//
// cmd and cli import it; it imports gfs/..., the initiator and cli/size.
package gfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
)

// Opener opens a target like iscsi://host/iqn/lun.
type Opener func(ctx context.Context, target string, write bool) (disk.Device, error)

// App is everything outside that the commands touch.
type App struct {
	In       io.Reader
	Out, Err io.Writer
	Openers  map[string]Opener // by URL scheme, without "://"
	Now      func() time.Time
}

// Main runs the command that argv0 names and returns its exit status.
func Main(argv0 string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	a := &App{In: stdin, Out: stdout, Err: stderr, Openers: defaultOpeners(), Now: time.Now}
	return a.Run(ctx, argv0, args)
}

// Face is a name that a link to a binary may have.
type Face struct {
	Name, Of, Short string
	run             func(a *App, ctx context.Context, name string, args []string) int
}

// Faces lists the names that Main knows.
func Faces() []Face { return append([]Face(nil), faces...) }

var faces []Face

func init() {
	faces = []Face{
		{"mkfs-gfs", "mkfs-gfs", "make a GFS2 filesystem", (*App).mkfs},
		{"mkfs.gfs2", "mkfs-gfs", "gfs2-utils' name of mkfs-gfs", (*App).mkfs},
		{"gfs2_mkfs", "mkfs-gfs", "gfs2-utils' older name of mkfs-gfs", (*App).mkfs},
		{"gfs_mkfs", "mkfs-gfs", "GFS1's name of mkfs-gfs", (*App).mkfs},
		{"gfs_tool", "clusteradm", "look at and tune a GFS2 filesystem", (*App).gfsTool},
		{"gfs2_tool", "clusteradm", "the same under its later name", (*App).gfsTool},
		{"gfs2_grow", "clusteradm", "make a GFS2 filesystem larger", (*App).gfs2Grow},
		{"gfs2_jadd", "clusteradm", "add journals to a GFS2 filesystem", (*App).gfs2Jadd},
		{"fsck-gfs", "clusteradm", "check and repair a GFS2 filesystem", (*App).fsckFace},
		{"fsck.gfs2", "clusteradm", "gfs2-utils' name of fsck-gfs", (*App).fsckFace},
		{"gfs2_fsck", "clusteradm", "gfs2-utils' older name of fsck-gfs", (*App).fsckFace},
		{"gfs_fsck", "clusteradm", "GFS1's name of fsck-gfs", (*App).fsckFace},
		{"tunegfs2", "clusteradm", "change the superblock of a GFS2 filesystem", (*App).tunegfs2},
	}
}

// Run is Main on the streams of a.
func (a *App) Run(ctx context.Context, argv0 string, args []string) int {
	name := filepath.Base(argv0)
	for _, f := range faces {
		if f.Name == name {
			return f.run(a, ctx, name, args)
		}
	}
	var names []string
	for _, f := range faces {
		names = append(names, f.Name)
	}
	fmt.Fprintf(a.Err, "%s: not a name of this program; it answers to %s\n", name, strings.Join(names, ", "))
	return 2
}

// errScheme is a target with a scheme that nobody opens.
var errScheme = errors.New("unknown kind of target")

// open opens a path or a URL.
func (a *App) open(ctx context.Context, target string, write bool) (disk.Device, error) {
	if scheme, _, ok := strings.Cut(target, "://"); ok {
		o := a.Openers[scheme]
		if o == nil {
			return nil, fmt.Errorf("%s: %w %q: use a file, a block device or iscsi://HOST[:PORT]/IQN/LUN", target, errScheme, scheme)
		}
		return o(ctx, target, write)
	}
	return disk.Open(target, write)
}

// isTerminal tells whether progress may be drawn.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// pathText is the text of an error on a path as the C tools print it:
// "PATH: No such file or directory".
func pathText(path string, err error) string {
	var pe *os.PathError
	if !errors.As(err, &pe) {
		return err.Error()
	}
	var no syscall.Errno
	switch {
	case errors.Is(err, disk.ErrKind):
		return fmt.Sprintf("'%s' is not a block device or regular file", path)
	case errors.Is(err, disk.ErrTooSmall):
		return fmt.Sprintf("Device '%s' is too small", path)
	case errors.As(err, &no):
		return path + ": " + strerror(no)
	}
	return path + ": " + pe.Err.Error()
}

// strerror is the C library's text where it differs from Go's in more than the
// first letter being small.
func strerror(no syscall.Errno) string {
	if no == syscall.EBUSY {
		return "Device or resource busy"
	}
	s := no.Error()
	return strings.ToUpper(s[:1]) + s[1:]
}
