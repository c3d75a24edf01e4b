package api

import "testing"

func TestTargetParams(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, p := range TargetParams {
		if seen[p.Name] {
			t.Errorf("%s twice", p.Name)
		}
		seen[p.Name] = true
		if err := CheckTargetParam(p.Name, p.Default); err != nil {
			t.Errorf("the default: %v", err)
		}
		if err := CheckTargetParam(p.Name, ""); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range [][2]string{{"bogus", "1"}, {"bogus", ""}, {"MaxBurstLength", "4"}, {"MaxBurstLength", "16777216"}, {"MaxBurstLength", "-1"}, {"MaxBurstLength", "1k"},
		{"HeaderDigest", "MD5"}, {"HeaderDigest", "None,None"}, {"InitialR2T", "Yes,No"}, {"InitialR2T", "yes"}, {"MaxConnections", "0"}, {"IFMarker", "Yes"}} {
		if CheckTargetParam(bad[0], bad[1]) == nil {
			t.Errorf("%s=%s: accepted", bad[0], bad[1])
		}
	}
	for _, ok := range [][2]string{{"HeaderDigest", "CRC32C"}, {"HeaderDigest", "CRC32C,None"}, {"nop_interval", "0"}, {"MaxBurstLength", "512"}} {
		if err := CheckTargetParam(ok[0], ok[1]); err != nil {
			t.Error(err)
		}
	}
}
