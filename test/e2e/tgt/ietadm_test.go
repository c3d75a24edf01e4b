package tgt

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// iscsitarget's words for the same, LUN 0 included.
func TestIetadm(t *testing.T) {
	s, c := ours(t)
	s.expect(t, "ietadm --op new --tid=0 --params Name=iqn.2001-04.com.example:disk2", "")
	s.expect(t, "ietadm --op new --tid=1 --lun=0 --params Path=$DEV/sda5,Type=fileio,IOMode=ro", "")
	s.expect(t, "ietadm --op new --tid=1 --user --params IncomingUser=joe,Password=a-secret-of-16-b", "")
	s.expect(t, "ietadm --op new --user --params=OutgoingUser=jim,Password=b-secret-of-16-b", "")
	s.expect(t, "ietadm --op update --tid=1 --params MaxBurstLength=524288,QueuedCommands=64", "")
	s.expect(t, "ietadm --op show --tid=1 --user", "IncomingUser joe")
	st, err := c.Nodes[0].Status()
	if err != nil || len(st.Targets) != 1 {
		t.Fatalf("%+v, %v", st.Targets, err)
	}
	x := st.Targets[0]
	if len(x.LUNs) != 1 || x.LUNs[0].LUN != 0 || !x.LUNs[0].ReadOnly || x.Params["MaxBurstLength"] != "524288" || x.Params["MaxQueueCmd"] != "64" {
		t.Errorf("%+v", x)
	}
	show := strings.Join(s.run(t, "ietadm --op show"), "\n")
	if !strings.Contains(show, "        LUN: 0\n            Type: disk\n") || strings.Contains(show, "controller") {
		t.Errorf("%s", show)
	}
	s.expect(t, "ietadm --op delete --tid=1 --user --params IncomingUser=joe", "")
	s.expect(t, "ietadm --op show --user", "Account list:\n    jim")
	s.expect(t, "ietadm --op delete --tid=1 --lun=0", "")
	s.expect(t, "ietadm --op delete --tid=1", "")

	file := filepath.Join(t.TempDir(), "ietd.conf")
	if err := os.WriteFile(file, []byte("Target iqn.2001-04.com.example:disk3\n\tIncomingUser joe a-secret-of-16-b\n\tLun 0 Path="+s.dev+"/sda6,Type=fileio\n\tMaxConnections 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	plan := strings.Join(s.run(t, "ietadm --import "+file+" --pretend"), "\n")
	if !strings.HasSuffix(plan, "exit 0") || strings.Contains(plan, "a-secret") {
		t.Errorf("%s", plan)
	}
	if out := s.run(t, "ietadm --import "+file); out[len(out)-1] != "exit 0" {
		t.Errorf("%s", strings.Join(out, "\n"))
	}
	if st, err = c.Nodes[0].Status(); err != nil || len(st.Targets) != 1 || len(st.Targets[0].LUNs) != 1 || len(st.Targets[0].Incoming) != 1 {
		t.Errorf("%+v, %v", st.Targets, err)
	}
}
