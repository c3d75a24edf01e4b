package storage

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/scsi"
)

func TestCanonicalName(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"iqn.2013-05.com.magedu:tsan.disk1": "iqn.2013-05.com.magedu:tsan.disk1",
		"IQN.2010-8.com.Example.ts:Disk1":   "iqn.2010-8.com.example.ts:disk1", // month as in a tutorial
		"eui.02004567A425678D":              "eui.02004567a425678d",
		"naa.6024248000000000":              "naa.6024248000000000",
		"iqn.2001-04.com.x:a_b":             "iqn.2001-04.com.x:a_b",
	} {
		if got, err := CanonicalName(in); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "iqn.", "disk1", "iqn.2013-05.com.x:a b", "iqn.2013-05.com.x:ä", "iqn.x\n", "iqn." + strings.Repeat("a", 220)} {
		if got, err := CanonicalName(in); err == nil {
			t.Errorf("%q became %q", in, got)
		}
	}
}

func TestACL(t *testing.T) {
	t.Parallel()
	a, err := CanonicalACL(ACL{Initiators: []string{"iqn.2001-04.com.x:B", "iqn.2001-04.com.x:a", "iqn.2001-04.com.x:b"}, CIDRs: []string{"172.16.5.5/16", "10.0.0.1", "fd00::1/64", "10.0.0.1/32"}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(a.Initiators, []string{"iqn.2001-04.com.x:a", "iqn.2001-04.com.x:b"}) || !slices.Equal(a.CIDRs, []string{"10.0.0.1/32", "172.16.0.0/16", "fd00::/64"}) {
		t.Fatalf("%+v", a)
	}
	if err := a.Validate(); err != nil {
		t.Fatal(err)
	}
	if (ACL{CIDRs: []string{"172.16.5.5/16"}}).Validate() == nil {
		t.Fatal("an unmasked prefix is not canonical")
	}
	if _, err := CanonicalACL(ACL{CIDRs: []string{"ALL"}}); err == nil {
		t.Fatal("ALL is no address")
	}
	const me, other = "iqn.2001-04.com.x:A", "iqn.2001-04.com.x:z"
	names, nets := ACL{Initiators: a.Initiators}, ACL{CIDRs: a.CIDRs}
	for _, tc := range []struct {
		acl  ACL
		who  string
		addr string
		want bool
	}{
		{ACL{}, me, "10.0.0.1", false},
		{ACL{Open: true}, "junk", "10.0.0.1", true},
		{names, me, "8.8.8.8", true},
		{names, other, "10.0.0.1", false},
		{nets, other, "172.16.99.1", true},
		{nets, other, "::ffff:172.16.99.1", true}, // a dual-stack listener's peer
		{nets, other, "fd00::77", true},
		{nets, other, "172.17.0.1", false},
		{a, me, "10.0.0.1", true},
		{a, me, "10.0.0.2", false},
		{a, other, "10.0.0.1", false},
	} {
		if got := tc.acl.Allows(tc.who, netip.MustParseAddr(tc.addr)); got != tc.want {
			t.Errorf("%+v, %s at %s: %v", tc.acl, tc.who, tc.addr, got)
		}
	}
}

// SPC-5 7.7.6.6.5: NAA 6h, then the OUI, whose local bit is set and whose
// multicast bit is not. It is the one that the target shows for the uuid.
func TestIdentity(t *testing.T) {
	t.Parallel()
	id := uuid.MustParse("3f0e9c3a-7a51-4c1e-9a53-0c5d9b8e2f10")
	got, err := NewIdentity(id, bytes.NewReader(bytes.Repeat([]byte{0xab}, 17)))
	if err != nil {
		t.Fatal(err)
	}
	naa := scsi.NAA6(id)
	if got.Product != "abababab" || got.Serial != "3f0e9c3a7a514c1e9a530c5d9b8e2f10" || got.NAA != hex.EncodeToString(naa[:]) || got.NAA[:3] != "602" {
		t.Fatalf("%+v", got)
	}
	if _, err := NewIdentity(id, bytes.NewReader(nil)); err == nil {
		t.Fatal("made of no randomness")
	}
}
