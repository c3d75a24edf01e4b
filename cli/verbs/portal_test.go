package verbs

import (
	"strings"
	"testing"
)

func TestPortal(t *testing.T) {
	t.Parallel()
	f := newFake(t, sample())
	for _, tc := range []struct {
		args []string
		code int
		out  string
		err  string
	}{
		{[]string{"portal", "add", "n2", "[fd00::12]:3261", "-o", "name"}, 0, "n2 [fd00::12]:3261", "in use by pid 7 (tgtd)"},
		{[]string{"portal", "rm", "n2", "[fd00::12]:3261"}, 0, "", "removed"},
		{[]string{"portal", "ls", "n1", "-o", "name"}, 0, "n1 127.0.0.11:3260\n", ""},
		{[]string{"portal", "list", "n9"}, 3, "", "no storage node n9"},
		{[]string{"portal", "add", "n2"}, 2, "", "portal add"},
	} {
		got := f.run(t, "", tc.args...)
		if got.code != tc.code || !strings.Contains(got.out, tc.out) || !strings.Contains(got.err+got.out, tc.err) {
			t.Errorf("%v: %+v, want %d, %q and %q", tc.args, got, tc.code, tc.out, tc.err)
		}
	}
}
