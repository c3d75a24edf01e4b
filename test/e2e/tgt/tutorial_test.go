package tgt

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/iscsi"
)

// expect runs a line and compares what it writes; a want of "" is silence.
func (s *side) expect(t *testing.T, line, want string) {
	t.Helper()
	got := strings.Join(s.run(t, line), "\n")
	if want != "" {
		want += "\n"
	}
	if !strings.HasSuffix(want, "exit 22\n") {
		want += "exit 0"
	}
	if got != strings.TrimSuffix(want, "\n") {
		t.Errorf("%s\ngot:\n%s\nwant:\n%s", line, got, want)
	}
}

// The tutorial's lines, in its words (facts/interfaces.md §3.4), and then what
// they are for: a login with the account, and none without it.
func TestTutorial(t *testing.T) {
	s, c := ours(t)
	const iqn = "iqn.2013-05.com.magedu:tsan.disk1"
	short := func(n string) string {
		return "tgtadm: warning: the secret of " + n + " has 6 bytes: 12 to 16 are recommended, because a short one can be guessed from one captured login (RFC 7143 9.2.1)"
	}
	s.expect(t, "tgtadm --lld iscsi --op new --mode target --tid 1 -T "+iqn, "")
	s.expect(t, "tgtadm --lld iscsi --op new --mode target --tid 1 -T "+iqn, "tgtadm: this target already exists\nexit 22")
	s.expect(t, "tgtadm --lld iscsi --op show --mode target --tid 9", "tgtadm: can't find the target\nexit 22")
	s.expect(t, "tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 1 -b $DEV/sda5", "")
	s.expect(t, "tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 1 -b $DEV/sda6", "tgtadm: this logical unit number already exists\nexit 22")
	s.expect(t, "tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 2 -b $DEV/none", "tgtadm: invalid request\n  why: backing store: stat $DEV/none: no such file or directory\nexit 22")
	s.expect(t, "tgtadm --lld iscsi --op bind --mode target --tid 1 -I 172.16.0.0/16", "")
	s.expect(t, "tgtadm --lld iscsi --op unbind --mode target --tid 1 --initiator-address=172.16.0.0/16", "")
	s.expect(t, "tgtadm --lld iscsi --op bind --mode target --tid 1 --initiator-address=127.0.0.0/8", "")
	s.expect(t, "tgtadm --lld iscsi --op new --mode account --user christina --password 123456", short("christina"))
	s.expect(t, "tgtadm --lld iscsi --op new --mode account --user christina --password 123456", "tgtadm: this account already exists\nexit 22")
	s.expect(t, "tgtadm --lld iscsi --op new --mode account --user clyde --password 654321", short("clyde"))
	s.expect(t, "tgtadm --lld iscsi --op show --mode account", "Account list:\n    clyde\n    christina")
	s.expect(t, "tgtadm --lld iscsi --op bind --mode account --tid 1 --user christina", "")
	s.expect(t, "tgtadm --lld iscsi --op bind --mode account --tid 1 --user clyde --outgoing", "")
	show := strings.Join(s.run(t, "tgtadm --lld iscsi --op show --mode target"), "\n")
	for _, want := range []string{"Target 1: " + iqn, "        State: ready", "            Size: 67 MB, Block size: 512", "            Backing store path: $DEV/sda5",
		"    Account information:\n        christina\n        clyde (outgoing)\n    ACL information:\n        127.0.0.0/8\nexit 0"} {
		if !strings.Contains(show, want) {
			t.Errorf("show lacks %q:\n%s", want, show)
		}
	}
	s.expect(t, "tgt-admin --dump", "default-driver iscsi\n\n<target "+iqn+">\n\tbacking-store $DEV/sda5\n\tincominguser christina PLEASE_CORRECT_THE_PASSWORD\n"+
		"\toutgoinguser clyde PLEASE_CORRECT_THE_PASSWORD\n\tinitiator-address 127.0.0.0/8\n</target>\n")

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	portal := c.Nodes[0].IP + ":3260"
	login := func(cr *iscsi.CHAPCredentials) error {
		d, err := initiator.Login(ctx, portal, iqn, initiator.Config{InitiatorName: "iqn.2026-01.org.x:me", CHAP: cr})
		if err == nil {
			err = d.Close()
		}
		return err
	}
	if err := login(nil); err == nil {
		t.Error("a login without the account")
	}
	if err := login(&iscsi.CHAPCredentials{User: "christina", Secret: []byte("123457")}); err == nil {
		t.Error("a login with another secret")
	}
	if err := login(&iscsi.CHAPCredentials{User: "clyde", Secret: []byte("654321")}); err == nil {
		t.Error("a login with the outgoing account")
	}
	if err := login(&iscsi.CHAPCredentials{User: "christina", Secret: []byte("123456")}); err != nil {
		t.Error(err)
	}
	if err := login(&iscsi.CHAPCredentials{User: "christina", Secret: []byte("123456"), PeerUser: "clyde", PeerSecret: []byte("654321")}); err != nil {
		t.Error(err)
	}

	// A session is seen and ended.
	d, err := initiator.Login(ctx, portal, iqn, initiator.Config{InitiatorName: "iqn.2026-01.org.x:me", CHAP: &iscsi.CHAPCredentials{User: "christina", Secret: []byte("123456")}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	sid := ""
	c.Wait("the session is shown", 20*time.Second, func() (bool, string) {
		out := s.run(t, "tgtadm --lld iscsi --op show --mode conn --tid 1")
		for _, l := range out {
			if n, ok := strings.CutPrefix(l, "Session: "); ok {
				sid = n
			}
		}
		return sid != "" && strings.Contains(strings.Join(out, "\n"), "        Initiator: iqn.2026-01.org.x:me"), strings.Join(out, "\n")
	})
	s.expect(t, "tgtadm --lld iscsi --op delete --mode target --tid=1", "tgtadm: this target is still active\nexit 22")
	before, err := api.Get[api.List[api.Session]](ctx, c.Nodes[0].API(), api.PathSessions)
	if err != nil || len(before.Items) != 1 {
		t.Fatalf("%+v, %v", before, err)
	}
	s.expect(t, "tgtadm --lld iscsi --op delete --mode conn --tid 1 --sid "+sid+" --cid 0", "")
	s.expect(t, "tgtadm --lld iscsi --op delete --mode conn --tid 1 --sid 65000 --cid 0", "tgtadm: can't find the session\nexit 22")
	if err := d.Close(); err != nil {
		t.Log(err) // it was ended under us
	}
	c.Wait("no session", 20*time.Second, func() (bool, string) {
		l, err := api.Get[api.List[api.Session]](ctx, c.Nodes[0].API(), api.PathSessions)
		return err == nil && len(l.Items) == 0, "sessions"
	})

	s.expect(t, "tgtadm --lld iscsi --op delete --mode=logicalunit --tid=1 --lun=1", "")
	s.expect(t, "tgtadm -lld iscsi --op delete --mode target --tid=1", "")
	s.expect(t, "tgtadm --lld iscsi --op show --mode target", "")
	st, err := c.Nodes[0].Status()
	if err != nil || len(st.Volumes) != 0 {
		t.Errorf("volumes are left: %+v, %v", st.Volumes, err)
	}
	if fi, err := os.Stat(filepath.Join(s.dev, "sda5")); err != nil || fi.Size() != 64<<20 {
		t.Errorf("the user's file: %v", err)
	}
	// No secret is in a log or a dump.
	if l := c.Nodes[0].Logs(); strings.Contains(l, "123456") || strings.Contains(l, "654321") {
		t.Error("a secret is in the logs")
	}
}

// targets.conf: what it makes, makes anew, takes away, and dumps.
func TestTargetsConf(t *testing.T) {
	s, c := ours(t)
	file := filepath.Join(t.TempDir(), "targets.conf")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(text, "$DEV", s.dev)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`default-driver iscsi
<target iqn.2013-05.com.magedu:tsan.disk1>
	backing-store $DEV/sda5
	incominguser christina 123456789012
	outgoinguser clyde 210987654321
	initiator-address 172.16.0.0/16
</target>
<target iqn.2013-05.com.magedu:tsan.disk2>
	controller_tid 7
	<backing-store $DEV/sda6>
		lun 5
		readonly 1
	</backing-store>
	backing-store $DEV/sda7
	MaxBurstLength 524288
	initiator-name iqn.2000-01.x:a
</target>
`)
	conf := "tgt-admin -c " + file + " "
	plan := strings.Join(s.run(t, conf+"-e -p"), "\n")
	for _, want := range []string{"tgtadm -C 0 --lld iscsi --op new --mode target --tid 1 -T iqn.2013-05.com.magedu:tsan.disk1\n", `--lun 1 -b "$DEV/sda5"`, "--user=christina --password=(hidden)\n",
		"--op new --mode target --tid 7 -T", "--tid 7 --lun 5 -b", "-Q iqn.2000-01.x:a", "exit 0"} {
		if !strings.Contains(plan, want) {
			t.Errorf("the plan lacks %q:\n%s", want, plan)
		}
	}
	if strings.Contains(plan, "1234567") || strings.Contains(plan, "-I ALL") {
		t.Errorf("the plan shows a secret, or lets everybody in beside a name:\n%s", plan)
	}
	s.expect(t, "tgtadm --op show --mode target", "") // it was a pretence
	s.expect(t, conf+"-e", "")
	dump := "default-driver iscsi\n\n<target iqn.2013-05.com.magedu:tsan.disk1>\n\tbacking-store $DEV/sda5\n\tincominguser christina PLEASE_CORRECT_THE_PASSWORD\n" +
		"\toutgoinguser clyde PLEASE_CORRECT_THE_PASSWORD\n\tinitiator-address 172.16.0.0/16\n</target>\n\n<target iqn.2013-05.com.magedu:tsan.disk2>\n" +
		"\tbacking-store $DEV/sda7\n\t<backing-store $DEV/sda6>\n\t\tlun 5\n\t\treadonly 1\n\t</backing-store>\n\tMaxBurstLength 524288\n\tinitiator-name iqn.2000-01.x:a\n</target>\n"
	s.expect(t, "tgt-admin --dump", dump)
	s.expect(t, conf+"-e", "") // what is there stays
	s.expect(t, conf+"--update ALL", "")
	s.expect(t, "tgt-admin --dump", dump)
	s.expect(t, "tgt-admin --offline tid=7", "")
	if st, err := c.Nodes[0].Status(); err != nil || !st.Targets[1].Offline || st.Targets[0].Offline || st.Targets[1].TID != 7 {
		t.Errorf("%+v, %v", st.Targets, err)
	}
	s.expect(t, "tgt-admin --ready ALL -v", "tgtadm -C 0 --op update --mode target --tid=1 -n state -v ready\ntgtadm -C 0 --op update --mode target --tid=7 -n state -v ready")
	got := s.run(t, "tgt-admin --offline iqn.none")
	if strings.Join(got, "|") != `There is no target with name "iqn.none", can't offline it!|exit 1` {
		t.Errorf("%q", got)
	}
	write("<target iqn.2013-05.x:c>\n\tbogus 1\n</target>\n")
	got = s.run(t, conf+"-e")
	if want := "tgt-admin: " + file + `:2: unknown directive "bogus" in target iqn.2013-05.x:c|exit 1`; strings.Join(got, "|") != want {
		t.Errorf("%q, want %q", got, want)
	}
	write("<target iqn.2013-05.x:c>\n\tbacking-store $DEV/none\n\tMaxBurstLength 4\n</target>\n")
	got = s.run(t, conf+"-e")
	if text := strings.Join(got, "\n"); !strings.Contains(text, "Command:\n\ttgtadm -C 0 --lld iscsi --mode target --op update --tid 8 --name MaxBurstLength --value 4\nexited with code: 22.\n") || !strings.HasSuffix(text, "exit 22") {
		t.Errorf("%s", text)
	}
	s.expect(t, "tgt-admin --delete iqn.2013-05.x:c", "")
	s.expect(t, conf+"-e --ignore-errors", "tgtadm: invalid request\n  why: MaxBurstLength=4: 512 to 16777215 are possible\n# Skipping device: $DEV/none")
	s.expect(t, "tgt-admin --delete ALL", "")
	s.expect(t, "tgtadm --op show --mode target", "")
}
