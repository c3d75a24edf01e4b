package control

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// clean is the proof that nothing of this node's former incarnation is left in
// the kernel (SAFETY §3, Admit by kernel): no lockspace, no gfs2 mount, no iSCSI
// session to a target of ours, no multipath map and no open disk of ours. It
// reads what the kernel says, below root ("/" but in tests).
//
// Found is what is in the way, one line each; empty means clean. An unreadable
// file is an error: what cannot be looked at is not proven.
type proof struct {
	Checked []string `json:"checked"`
	Found   []string `json:"found"`
}

// vendor is what INQUIRY says of our LUNs, padded by the kernel to 8 bytes.
const vendor = "BLKHOUSE"

func proveClean(root string, iqns map[string]bool) (proof, error) {
	var p proof
	for _, c := range []struct {
		name string
		fn   func(string, map[string]bool) ([]string, error)
	}{
		{"dlm lockspaces", lockspaces},
		{"gfs2 mounts", gfsMounts},
		{"iscsi sessions", kernelSessions},
		{"disks of ours", disks},
	} {
		found, err := c.fn(root, iqns)
		if err != nil {
			return p, fmt.Errorf("prove that no %s are left: %w", c.name, err)
		}
		p.Checked = append(p.Checked, c.name)
		p.Found = append(p.Found, found...)
	}
	sort.Strings(p.Found)
	return p, nil
}

func lockspaces(root string, _ map[string]bool) ([]string, error) {
	es, err := os.ReadDir(filepath.Join(root, "sys/kernel/dlm"))
	if os.IsNotExist(err) {
		return nil, nil // the module is not loaded
	}
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range es {
		if e.IsDir() {
			out = append(out, "dlm lockspace "+e.Name()+": unmount its filesystem")
		}
	}
	return out, nil
}

func gfsMounts(root string, _ map[string]bool) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(root, "proc/self/mounts"))
	if err != nil {
		return nil, err
	}
	var out []string
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) >= 4 && f[2] == "gfs2" && !strings.Contains(f[3], "lockproto=lock_nolock") {
			out = append(out, "gfs2 mount on "+f[1]+": umount it")
		}
	}
	return out, nil
}

func kernelSessions(root string, iqns map[string]bool) ([]string, error) {
	names, err := filepath.Glob(filepath.Join(root, "sys/class/iscsi_session/session*/targetname"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range names {
		b, err := os.ReadFile(n)
		if os.IsNotExist(err) {
			continue // logged out meanwhile
		}
		if err != nil {
			return nil, err
		}
		if iqn := strings.TrimSpace(string(b)); iqns[iqn] {
			out = append(out, "iscsi session to "+iqn+": iscsiadm -m node -T "+iqn+" -u")
		}
	}
	return out, nil
}

// disks finds SCSI disks with our vendor, and device-mapper maps that stand on
// one (a multipath map keeps queued writes of a session that is gone).
func disks(root string, _ map[string]bool) ([]string, error) {
	blocks := filepath.Join(root, "sys/block")
	es, err := os.ReadDir(blocks)
	if os.IsNotExist(err) {
		return nil, nil // no block layer in this container
	}
	if err != nil {
		return nil, err
	}
	ours := map[string]bool{}
	for _, e := range es {
		b, err := os.ReadFile(filepath.Join(blocks, e.Name(), "device/vendor"))
		if err == nil && strings.TrimSpace(string(b)) == vendor {
			ours[e.Name()] = true
		}
	}
	var out []string
	for _, e := range es {
		switch {
		case ours[e.Name()]:
			out = append(out, "disk /dev/"+e.Name()+" is ours: log out of its target")
		case strings.HasPrefix(e.Name(), "dm-"):
			slaves, err := os.ReadDir(filepath.Join(blocks, e.Name(), "slaves"))
			if err != nil && !os.IsNotExist(err) {
				return nil, err
			}
			uuid, _ := os.ReadFile(filepath.Join(blocks, e.Name(), "dm/uuid"))
			mpath := strings.HasPrefix(string(uuid), "mpath-")
			for _, s := range slaves {
				if ours[s.Name()] {
					out = append(out, "map /dev/"+e.Name()+" stands on our disk /dev/"+s.Name()+": multipath -f")
					mpath = false
				}
			}
			// A multipath map without a path queues writes for whatever comes back:
			// its name holds our NAA, since no disk is left to ask.
			if mpath && len(slaves) == 0 && strings.Contains(string(uuid), naaPrefix) {
				out = append(out, "multipath map /dev/"+e.Name()+" without paths may hold writes: multipath -f")
			}
		}
	}
	return out, nil
}

// naaPrefix begins the WWID of every LUN of ours in a map's uuid: designator
// type 3, NAA 6 with our locally administered company id (scsi.NAA6).
const naaPrefix = "mpath-3602424b"
