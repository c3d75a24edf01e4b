package lab

import (
	"errors"
	"testing"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/test/internal/docrun"
)

// The blocks of docs/guide/tutorial.md that are marked lab, as they stand there.
func TestTutorialPage(t *testing.T) {
	testproc.Need(t, "iscsid", "iscsiadm", "iscsi-iname")
	blocks, err := docrun.Read("../../docs/guide/tutorial.md")
	if err != nil {
		t.Fatal(err)
	}
	l := New(t)
	br := l.Bridge("192.168.0.11/24")
	s := serve(t, l, br)
	if out := s.adm(
		"tgtadm --lld iscsi --op new --mode target --tid 1 -T iqn.2010-8.com.example.ts:disk1",
		"tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 1 -b "+s.file("sda5", 64<<20),
		"tgtadm --lld iscsi --op bind --mode target --tid 1 -I 192.168.0.0/16",
	); out != "" {
		t.Errorf("tgtadm says: %s", out)
	}
	g := l.Boot(Config{Name: "reader", Links: []Link{{br, "192.168.0.21/24"}}})[0]
	g.MustRun("rm -rf /etc/iscsi/nodes /etc/iscsi/send_targets /etc/iscsi/initiatorname.iscsi; ln -s /etc/iscsi /var/lib/iscsi")
	ran, started := 0, false
	for _, b := range blocks {
		for _, c := range b.Commands {
			if b.Kind != docrun.Lab {
				continue
			}
			if c.Program() == "iscsiadm" && !started {
				g.StartISCSID() // the page's "service iscsi start"
				started = true
			}
			out, err := g.Run(c.Text)
			code := 0
			var exit *ExitError
			switch {
			case errors.As(err, &exit):
				code = exit.Code
			case err != nil:
				t.Fatalf("$ %s\n%s%v", c.Text, out, err)
			}
			if err := c.Check(out, code); err != nil {
				t.Errorf("docs/guide/tutorial.md: %v", err)
			}
			ran++
		}
	}
	if ran == 0 {
		t.Error("the page has no block for the lab")
	}
	if err := g.Poweroff(); err != nil {
		t.Error(err)
	}
}
