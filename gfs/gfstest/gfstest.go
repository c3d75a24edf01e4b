// Package gfstest gives tests of gfs/... images that the kernel wrote (see
// data/make/README.md) and fresh ones of ours. Only tests import it.
package gfstest

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"embed"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
)

//go:embed data
var data embed.FS

// Names of the kernel's images.
const (
	Clean4096 = "clean4096"
	Dirty4096 = "dirty4096"
	Dirty1024 = "dirty1024"
)

// Load writes a copy of a kernel image to a file of t's own and returns its path.
func Load(t testing.TB, name string) string {
	t.Helper()
	f, err := data.Open("data/" + name + ".img.bz2")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	path := filepath.Join(t.TempDir(), name)
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	r := bzip2.NewReader(f)
	buf, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	off := int64(0)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 && !bytes.Equal(buf[:n], zero[:n]) {
			if _, err := out.WriteAt(buf[:n], off); err != nil {
				t.Fatal(err)
			}
		}
		off += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := out.Truncate(off); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// Sums is the md5 of every regular file of a kernel image, by its path below
// the root directory.
func Sums(t testing.TB, name string) map[string]string {
	t.Helper()
	f, err := data.Open("data/" + name + ".md5.bz2")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]string{}
	s := bufio.NewScanner(bzip2.NewReader(f))
	for s.Scan() {
		sum, path, _ := strings.Cut(s.Text(), "  ./")
		out[path] = sum
	}
	if err := s.Err(); err != nil || len(out) == 0 {
		t.Fatal(len(out), err)
	}
	return out
}

// Make makes a filesystem of ours in a new file of size bytes.
func Make(t testing.TB, size int64, c mkfs.Config) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	if c.LockTable == "" {
		c.LockProto = "lock_nolock"
	}
	c.Now = 1700000000
	d := Open(t, path)
	l, err := mkfs.Plan(c, size, mkfs.Topology{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mkfs.Make(context.Background(), d, l, nil); err != nil {
		t.Fatal(err)
	}
	return path
}

// Open opens an image for writing until the test ends.
func Open(t testing.TB, path string) *disk.File {
	t.Helper()
	d, err := disk.Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Need skips where a peer program is missing, and fails in CI.
func Need(t testing.TB, progs ...string) {
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

// Prove is the number of rounds that BLOCKHOUSE_PROVE asks for, or small.
func Prove(small int) int {
	if n, err := strconv.Atoi(os.Getenv("BLOCKHOUSE_PROVE")); err == nil && n > 0 {
		return n
	}
	return small
}

// FsckClean fails the test unless fsck.gfs2 -n finds nothing and says nothing
// on stderr.
func FsckClean(t testing.TB, path string) {
	t.Helper()
	Need(t, "fsck.gfs2")
	var stderr bytes.Buffer
	cmd := exec.Command("fsck.gfs2", "-n", path)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Errorf("fsck.gfs2 -n %s: %v\n%s%s", path, err, out, stderr.Bytes())
	}
}

// Sparse makes an empty file of size bytes.
func Sparse(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}
