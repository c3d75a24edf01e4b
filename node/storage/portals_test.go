package storage

import (
	"net/netip"
	"testing"
)

// A portal of the record that the file's wildcard serves already is not opened
// beside it: the two would exclude each other.
func TestCoveredPortal(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		file, added string
		want        bool
	}{
		{"0.0.0.0:3260", "10.0.0.1:3260", true},
		{"0.0.0.0:3260", "10.0.0.1:3261", false},
		{"0.0.0.0:3260", "[fd00::1]:3260", false},
		{"[::]:3260", "[fd00::1]:3260", true},
		{"[::]:3260", "10.0.0.1:3260", true},
		{"10.0.0.1:3260", "10.0.0.1:3260", true},
		{"10.0.0.1:3260", "10.0.0.2:3260", false},
		{"10.0.0.1:3260", "0.0.0.0:3260", false}, // it is tried, and fails with a reason
	} {
		got := added{netip.MustParseAddrPort(tc.added)}.covered([]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort(tc.file)})
		if got != tc.want {
			t.Errorf("%s of the file and %s: %v", tc.file, tc.added, got)
		}
	}
}
