package control

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	files2 := map[string]string{"proc/self/mounts": "proc /proc proc rw 0 0\n", "sys/block/vda/size": "1"}
	for k, v := range files {
		files2[k] = v
	}
	for name, text := range files2 {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			continue
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestProofFindsWhatIsLeft(t *testing.T) {
	const iqn = "iqn.2026-11.x:t"
	for _, c := range []struct {
		name, want string
		files      map[string]string
	}{
		{"nothing", "", nil},
		{"dlm loaded, no lockspace", "", map[string]string{"sys/kernel/dlm/x": ""}},
		{"lockspace", "dlm lockspace fs1", map[string]string{"sys/kernel/dlm/fs1/id": "1"}},
		{"gfs2", "gfs2 mount on /mnt", map[string]string{"proc/self/mounts": "/dev/sda /mnt gfs2 rw,lockproto=lock_dlm 0 0\n"}},
		{"local gfs2", "", map[string]string{"proc/self/mounts": "/dev/sda /mnt gfs2 rw,lockproto=lock_nolock 0 0\n"}},
		{"our session", "iscsi session to " + iqn, map[string]string{"sys/class/iscsi_session/session1/targetname": iqn + "\n"}},
		{"another array's session", "", map[string]string{"sys/class/iscsi_session/session1/targetname": "iqn.other:t\n"}},
		{"our disk", "disk /dev/sda", map[string]string{"sys/block/sda/device/vendor": "BLKHOUSE\n"}},
		{"another disk", "", map[string]string{"sys/block/sda/device/vendor": "ATA     \n"}},
		{"map on our disk", "map /dev/dm-0", map[string]string{"sys/block/sda/device/vendor": "BLKHOUSE\n",
			"sys/block/dm-0/slaves/sda": "", "sys/block/dm-0/dm/uuid": "mpath-3602424baa\n"}},
		{"map that queues", "without paths", map[string]string{"sys/block/dm-0/slaves/": "", "sys/block/dm-0/dm/uuid": "mpath-3602424baabb\n"}},
		{"lvm map", "", map[string]string{"sys/block/dm-0/slaves/vda": "", "sys/block/dm-0/dm/uuid": "LVM-xyz\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := proveClean(tree(t, c.files), map[string]bool{iqn: true})
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(p.Found, "\n")
			if c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Fatalf("found %q, want %q", got, c.want)
			}
		})
	}
}

func TestWhatCannotBeLookedAtIsNotProven(t *testing.T) {
	root := tree(t, nil)
	if err := os.Remove(filepath.Join(root, "proc/self/mounts")); err != nil {
		t.Fatal(err)
	}
	if _, err := proveClean(root, nil); err == nil {
		t.Fatal("clean without having seen the mounts")
	}
}
