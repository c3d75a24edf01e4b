package tool

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestFindMount: mount points with blanks (facts §4 row 29), by device and by
// path, and the sysfs directory by the device number.
func TestFindMount(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	point, dev := filepath.Join(dir, "a b"), filepath.Join(dir, "dev")
	sys := filepath.Join(dir, "sys")
	for _, err := range []error{os.Mkdir(point, 0o700), os.WriteFile(dev, nil, 0o600), os.MkdirAll(filepath.Join(sys, "c:f", "tune"), 0o700),
		os.WriteFile(filepath.Join(sys, "c:f", "id"), []byte("8:16\n"), 0o600),
		os.WriteFile(filepath.Join(sys, "c:f", "tune", "quota_quantum"), []byte("60\n"), 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	info := "30 25 0:27 / /proc rw - proc proc rw\n" +
		"36 25 8:16 / " + strings.ReplaceAll(point, " ", `\040`) + " rw,noatime shared:1 - gfs2 " + dev + " rw,lockproto=lock_dlm,localflocks\n"
	for _, p := range []string{point, dev} {
		m, err := FindMount(p, strings.NewReader(info), sys)
		if err != nil || m.Point != point || m.Source != dev || m.Options["lockproto"] != "lock_dlm" || m.Sysfs != filepath.Join(sys, "c:f") {
			t.Errorf("%+v %v", m, err)
		}
		if err := m.Set("tune/quota_quantum", "30"); err != nil {
			t.Error(err)
		}
		n, v, err := m.Tune()
		if err != nil || len(n) != 1 || n[0] != "quota_quantum" || v[0] != "30" {
			t.Error(n, v, err)
		}
		if err := m.Set("../../x", "1"); err == nil {
			t.Error("left the directory")
		}
	}
	if _, err := FindMount(dir, strings.NewReader(info), sys); !errors.Is(err, ErrNotMounted) {
		t.Error(err)
	}
}
