package cli

import (
	"bytes"
	"strings"
	"testing"
)

// argv[0] picks the command, whatever folder it stands in; an unknown name is
// clusteradm.
func TestMainPicksTheFace(t *testing.T) {
	t.Setenv("BLOCKHOUSE_SOCKET", "/nonexistent/sock")
	for _, c := range []struct {
		argv0 string
		args  []string
		code  int
		text  string // on stderr
	}{
		{"/usr/bin/clusteradm", []string{"status"}, 8, "clusteradm: connect to clusterd at /nonexistent/sock"},
		{"clusteradm-1.2", []string{"status"}, 8, "clusteradm: "},
		{"/x/fence_ack_manual", []string{"-n", "n1"}, 8, "fence_ack_manual: connect to clusterd at /nonexistent/sock"},
		{"tgtadm", []string{"--op", "show", "--mode", "target"}, 107, "tgtadm: failed to send request hdr to tgt daemon, Transport endpoint is not connected"},
		{"fence_manual", nil, 1, "fence_manual: missing NODE"},
		{"clusteradm", []string{"compat", "fence_manual"}, 1, "fence_manual: missing NODE"},
	} {
		var out, errs bytes.Buffer
		if code := Main(c.argv0, c.args, strings.NewReader(""), &out, &errs); code != c.code || !strings.Contains(errs.String(), c.text) {
			t.Errorf("%s %q: exit %d, %q", c.argv0, c.args, code, errs.String())
		}
	}
}

// Every face has a name, a binary and a line for compat list, and no name twice.
func TestFaces(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range faces {
		if f.Name == "" || f.Of == "" || f.Short == "" || f.Main == nil || seen[f.Name] {
			t.Errorf("%+v", f)
		}
		seen[f.Name] = true
	}
	for _, n := range []string{"tgtadm", "tgt-admin", "ietadm", "fence_ack_manual", "fence_manual", "cman_tool", "clustat", "fence_tool", "fence_node", "group_tool", "ccs_config_validate", "mkfs-gfs", "gfs_mkfs", "mkfs.gfs2", "gfs2_mkfs"} {
		if !seen[n] {
			t.Errorf("no face %s", n)
		}
	}
}
