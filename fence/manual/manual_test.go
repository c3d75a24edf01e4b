package manual

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/fence"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

// The texts of fence_ack_manual, to the letter (facts/cluster.md §1.1).
func TestTexts(t *testing.T) {
	t.Parallel()
	if got := Warning("n3"); got != "About to override fencing for n3.\nImproper use of this command can cause severe file system damage.\n\n" {
		t.Errorf("%q", got)
	}
	if Prompt != "Continue [NO/absolutely]? " {
		t.Errorf("%q", Prompt)
	}
}

func TestAccepted(t *testing.T) {
	t.Parallel()
	for answer, want := range map[string]bool{
		"absolutely": true, "absolutely\n": true, " absolutely\r\n": true,
		"": false, "\n": false, "yes": false, "y": false, "YES": false, "Absolutely": false, "ABSOLUTELY": false,
		"absolutely!": false, "absolutely not": false, "not absolutely": false, "absolutel": false, "\"absolutely\"": false,
	} {
		if Accepted(answer) != want {
			t.Errorf("%q: %v", answer, !want)
		}
	}
}

func TestConfirmed(t *testing.T) {
	t.Parallel()
	if err := Confirmed("n3", "n3"); err != nil {
		t.Error(err)
	}
	for _, flag := range []string{"", "n1", "N3", "true", "n3 "} {
		if err := Confirmed("n3", flag); fsm.ExitCode(err) != 2 {
			t.Errorf("%q: %v", flag, err)
		}
	}
	if Confirmed("", "") == nil {
		t.Error("two empty names agree")
	}
}

// Facts §8 I9: an acknowledgement without an open fence is refused, exit 9.
func TestFind(t *testing.T) {
	t.Parallel()
	open := []fencing.Open{{Node: "n2", Epoch: 7}, {Node: "n3", Epoch: 8}}
	if o, err := Find(open, "n3"); err != nil || o.Epoch != 8 {
		t.Fatalf("%+v, %v", o, err)
	}
	for _, tc := range []struct {
		open []fencing.Open
		text string
	}{{nil, "clusteradm status"}, {open, "open fences: n2, n3"}} {
		_, err := Find(tc.open, "n1")
		if !errors.Is(err, fence.ErrNoOpenFence) || fsm.ExitCode(err) != 9 || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%v", err)
		}
	}
}

func TestRecord(t *testing.T) {
	t.Parallel()
	o := fencing.Open{Node: "n3", Epoch: 8}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("x", 3600))
	c, err := Record(o, " root@n1 ", "pulled the plug\n", now)
	if err != nil || c.Node != "n3" || c.Epoch != 8 || c.Evidence.Method != fencing.Manual || c.Evidence.Operator != "root@n1" || c.Evidence.Reason != "pulled the plug" || c.Now.Location() != time.UTC {
		t.Fatalf("%+v, %v", c, err)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, p := range [][2]string{{"", "r"}, {"o", " "}} {
		if _, err := Record(o, p[0], p[1], now); fsm.ExitCode(err) != 2 {
			t.Errorf("%q: %v", p, err)
		}
	}
}
