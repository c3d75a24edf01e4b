package tool

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is a mounted GFS2 filesystem.
type Mount struct {
	Point, Source string
	Options       map[string]string
	Sysfs         string // directory under /sys/fs/gfs2, "" when it was not found
}

// ErrNotMounted is a path that is no GFS2 mount.
var ErrNotMounted = errors.New("not a mounted gfs2 file system")

// FindMount looks path up, a mount point or the device under it. mountinfo is
// the text of /proc/self/mountinfo.
func FindMount(path string, mountinfo io.Reader, sysfs string) (Mount, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return Mount{}, err
	}
	if real, err = filepath.Abs(real); err != nil {
		return Mount{}, err
	}
	s := bufio.NewScanner(mountinfo)
	for s.Scan() {
		// 36 35 98:0 / /mnt rw,noatime shared:1 - gfs2 /dev/x rw,lockproto=...
		pre, post, ok := strings.Cut(s.Text(), " - ")
		p, q := strings.Fields(pre), strings.Fields(post)
		if !ok || len(p) < 6 || len(q) < 3 || q[0] != "gfs2" {
			continue
		}
		m := Mount{Point: unescape(p[4]), Source: unescape(q[1]), Options: map[string]string{}}
		if m.Point != real && m.Source != real {
			continue
		}
		for _, o := range strings.Split(p[5]+","+q[2], ",") {
			k, v, _ := strings.Cut(o, "=")
			m.Options[k] = v
		}
		// /sys/fs/gfs2/NAME/id is "major:minor".
		dirs, err := os.ReadDir(sysfs)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return m, err
		}
		for _, d := range dirs {
			if id, err := os.ReadFile(filepath.Join(sysfs, d.Name(), "id")); err == nil && strings.TrimSpace(string(id)) == p[2] {
				m.Sysfs = filepath.Join(sysfs, d.Name())
			}
		}
		return m, nil
	}
	if err := s.Err(); err != nil {
		return Mount{}, err
	}
	return Mount{}, fmt.Errorf("%s: %w", path, ErrNotMounted)
}

// unescape undoes the octal escapes of mountinfo: a mount point may hold blanks.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n := (s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'); s[i+1] <= '3' && s[i+1] >= '0' {
				b.WriteByte(n)
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

const (
	fiFreeze = 0xC0045877 // _IOWR('X', 119, int), linux/fs.h
	fiThaw   = 0xC0045878
)

// Freeze stops writes to a mounted filesystem, Thaw lets them go on.
func Freeze(point string) error { return freezeCall(point, fiFreeze, "freeze") }

// Thaw undoes Freeze.
func Thaw(point string) error { return freezeCall(point, fiThaw, "unfreeze") }

func freezeCall(point string, req uint, what string) error {
	d, err := os.Open(point)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.IoctlSetInt(int(d.Fd()), req, 0); err != nil {
		return fmt.Errorf("%s %s: %w", what, point, err)
	}
	return nil
}

// Tune reads all tunables of a mount in the order of their names.
func (m Mount) Tune() (names, values []string, err error) {
	if m.Sysfs == "" {
		return nil, nil, fmt.Errorf("%s: the kernel shows no /sys/fs/gfs2 entry for it", m.Point)
	}
	dir, err := os.ReadDir(filepath.Join(m.Sysfs, "tune"))
	if err != nil {
		return nil, nil, err
	}
	for _, e := range dir {
		b, err := os.ReadFile(filepath.Join(m.Sysfs, "tune", e.Name()))
		if err != nil {
			return nil, nil, err
		}
		names = append(names, e.Name())
		values = append(values, strings.TrimSpace(string(b)))
	}
	return names, values, nil
}

// Set writes a sysfs file of the mount: "tune/quota_quantum", "withdraw".
func (m Mount) Set(name, value string) error {
	if m.Sysfs == "" {
		return fmt.Errorf("%s: the kernel shows no /sys/fs/gfs2 entry for it", m.Point)
	}
	if strings.Contains(name, "..") {
		return fmt.Errorf("%s: not a tunable", name)
	}
	f, err := os.OpenFile(filepath.Join(m.Sysfs, filepath.FromSlash(name)), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value + "\n")
	return errors.Join(err, f.Close())
}
