// Package gfstest gives tests of gfs/... images that the kernel wrote (see
// data/make/README.md) and fresh ones of ours. Only tests import it.
package gfstest

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"embed"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
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

// chunk is a part of an image that is not all zero.
type chunk struct {
	off  int64
	data []byte
}

// unpacked keeps images once they are decompressed: that takes seconds under
// the race detector, and tests load the same few over and over.
var unpacked struct {
	sync.Mutex
	chunks map[string][]chunk
	size   map[string]int64
}

func unpack(name string) ([]chunk, int64, error) {
	unpacked.Lock()
	defer unpacked.Unlock()
	if c := unpacked.chunks[name]; c != nil {
		return c, unpacked.size[name], nil
	}
	f, err := data.Open("data/" + name + ".img.bz2")
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	r := bzip2.NewReader(f)
	var out []chunk
	buf, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	off := int64(0)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 && !bytes.Equal(buf[:n], zero[:n]) {
			out = append(out, chunk{off, bytes.Clone(buf[:n])})
		}
		off += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return nil, 0, err
		}
	}
	if unpacked.chunks == nil {
		unpacked.chunks, unpacked.size = map[string][]chunk{}, map[string]int64{}
	}
	unpacked.chunks[name], unpacked.size[name] = out, off
	return out, off, nil
}

// Load writes a copy of a kernel image to a file of t's own and returns its path.
func Load(t testing.TB, name string) string {
	t.Helper()
	chunks, size, err := unpack(name)
	if err != nil {
		t.Fatal(err)
	}
	path := Sparse(t, size)
	out, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chunks {
		if _, err := out.WriteAt(c.data, c.off); err != nil {
			t.Fatal(err)
		}
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

// File is an image file whose Flush does nothing: who looks at it afterwards
// reads the same page cache, and hundreds of fsyncs would be all that a test run
// waits for. What must be flushed when is powercut's to judge.
type File struct{ *disk.File }

// Flush implements disk.Device.
func (File) Flush() error { return nil }

// Open opens an image for writing until the test ends.
func Open(t testing.TB, path string) File {
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
	return File{d}
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
