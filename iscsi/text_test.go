package iscsi

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestParseText(t *testing.T) {
	long := strings.Repeat("v", 255)
	for _, c := range []struct {
		name, in string
		want     []Pair // nil: error
	}{
		{"pairs", "A=1\x00B=\x00C=x=y\x00", []Pair{{"A", "1"}, {"B", ""}, {"C", "x=y"}}},
		{"extra NULs", "A=1\x00\x00\x00", []Pair{{"A", "1"}}},
		{"repetition is kept", "A=1\x00A=2\x00", []Pair{{"A", "1"}, {"A", "2"}}},
		{"longest key", strings.Repeat("K", 63) + "=v\x00", []Pair{{strings.Repeat("K", 63), "v"}}},
		{"longest value", "X-a.b.C=" + long + "\x00", []Pair{{"X-a.b.C", long}}},
		{"long binary", "CHAP_C=0x" + strings.Repeat("a", 2048) + "\x00", []Pair{{"CHAP_C", "0x" + strings.Repeat("a", 2048)}}},
		{"UTF-8", "TargetAlias=Prüfstand\x00", []Pair{{"TargetAlias", "Prüfstand"}}},
		{"no NUL", "A=1", nil},
		{"no =", "A1\x00", nil},
		{"no key", "=1\x00", nil},
		{"key too long", strings.Repeat("K", 64) + "=v\x00", nil},
		{"7000-byte key", strings.Repeat("K", 7000) + "=v\x00", nil},
		{"value too long", "A=" + long + "v\x00", nil},
		{"space in key", "A B=1\x00", nil},
		{"digit first", "1A=1\x00", nil},
		{"control character", "A=1\n\x00", nil},
		{"binary too long", "CHAP_R=0x" + strings.Repeat("a", 2050) + "\x00", nil},
		{"129 pairs", strings.Repeat("A=1\x00", 129), nil},
		{"over 64 KiB", strings.Repeat("A=1\x00", 16385), nil},
	} {
		got, err := ParseText([]byte(c.in))
		var te *TextError
		if (c.want == nil) != errors.As(err, &te) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		} else if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
}

// A text cut at any place and length comes out whole, through TextQueue and
// TextBuffer (§6.2, the C bit).
func TestContinuation(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var in []Pair
		for i := range rapid.IntRange(0, 40).Draw(t, "n") {
			in = append(in, Pair{"K" + strings.Repeat("k", i), rapid.StringMatching(`[a-zA-Z0-9.,:=]{0,200}`).Draw(t, "v")})
		}
		var q TextQueue
		q.Put(in...)
		var b TextBuffer
		for {
			seg, more := q.Next(rapid.IntRange(20, 300).Draw(t, "limit"))
			got, err := b.Add(seg, more)
			if err != nil {
				t.Fatal(err)
			}
			if !more {
				if d := cmp.Diff(in, got); d != "" || !b.Empty() || !q.Empty() {
					t.Fatal(d)
				}
				return
			}
			if got != nil || b.Empty() {
				t.Fatal("pairs before the end")
			}
		}
	})
	var b TextBuffer
	var err error
	for i := 0; err == nil; i++ {
		if i > MaxText {
			t.Fatal("C bit for ever is taken")
		}
		_, err = b.Add([]byte("x"), true)
	}
	var e TextBuffer
	for i := 0; i <= MaxText; i++ {
		if _, err = e.Add(nil, true); err != nil {
			return
		}
	}
	t.Fatal("empty segments with the C bit for ever are taken")
}

func TestParseNumber(t *testing.T) {
	for _, c := range []struct {
		in   string
		want uint64
		ok   bool
	}{
		{"0", 0, true}, {"8192", 8192, true}, {"0x2000", 8192, true}, {"0X2a", 42, true}, {"16777215", 16777215, true},
		{"", 0, false}, {"-1", 0, false}, {"+1", 0, false}, {"08", 0, false}, {"0x", 0, false}, {"0xg", 0, false}, {"1 ", 0, false},
		{"16777216", 0, false}, {"18446744073709551616", 0, false}, {"0xffffffffffffffffff", 0, false}, {"1_000", 0, false}, {"0x1_0", 0, false},
	} {
		n, err := ParseNumber(c.in, 0, 16777215)
		if (err == nil) != c.ok || n != c.want {
			t.Errorf("ParseNumber(%q) = %d, %v", c.in, n, err)
		}
	}
}

func TestParseBinary(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"0x00ff", "00ff"}, {"0XABcd", "abcd"}, {"0xabc", "0abc"}, {"0bAQID", "010203"}, {"0BAQ==", "01"},
		{"", ""}, {"0x", ""}, {"0xzz", ""}, {"abcd", ""}, {"0b", ""}, {"0b!", ""}, {"0bAQ", ""}, {"0bAR==", ""}, {"0bAQ\n==", ""},
		{"0x" + strings.Repeat("00", 1024), strings.Repeat("00", 1024)}, {"0x" + strings.Repeat("00", 1025), ""},
	} {
		b, err := ParseBinary(c.in)
		if (err == nil) != (c.want != "") || hex.EncodeToString(b) != c.want {
			t.Errorf("ParseBinary(%.20q) = %x, %v", c.in, b, err)
		}
	}
}

func TestNames(t *testing.T) {
	for _, s := range []string{"iqn.2013-05.com.magedu:tsan.disk1", "iqn.1991-05.com.microsoft:win_host", "iqn.2001-04.com.example",
		"IQN.2001-04.COM.EXAMPLE:x", "eui.02004567A425678D", "naa.52004567BA64678D", "naa.62004567BA64678D0123456789ABCDEF",
		"iqn.2001-04.org.exämple:x", "iqn.2010-8.com.example.ts:disk1"} {
		if err := CheckName(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range []string{"", "iqn", "iqn.", "iqn.2013-05", "iqn.2013-05.", "iqn.2013-13.com.x", "iqn.2013-00.com.x", "iqn.2013-0.com.x", "iqn.2013-8.", "iqn.2013-.com.x", "iqn.2013-8com.x", "iqn.201305.com.x", "iqn.2013-05.com x",
		"iqn.2013-05.com.x\x00", "iqn.2013-05.:x", "iqn.2013-05.com.x/y", "eui.02004567A425678", "eui.02004567A425678G", "naa.52004567BA64678", "xyz.2013",
		"iqn.2013-05.com.x:" + strings.Repeat("y", 223), "iqn.2013-05.com.\xff"} {
		if err := CheckName(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
	for in, want := range map[string]string{"IQN.2001-04.COM.Example:X": "iqn.2001-04.com.example:x", "EUI.02004567a425678d": "eui.02004567A425678D",
		"naa.52004567ba64678d": "naa.52004567BA64678D"} {
		if got := NormalizeName(in); got != want || NormalizeName(got) != got {
			t.Errorf("NormalizeName(%s) = %s, want %s", in, got, want)
		}
	}
}

func TestPortal(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Portal
		out  string
	}{
		{"10.0.0.1", Portal{Host: "10.0.0.1", Port: 3260}, "10.0.0.1:3260"},
		{"10.0.0.1:860,1", Portal{"10.0.0.1", 860, 1, true}, "10.0.0.1:860,1"},
		{"[fe80::1]:3261,65535", Portal{"fe80::1", 3261, 65535, true}, "[fe80::1]:3261,65535"},
		{"[::1]", Portal{Host: "::1", Port: 3260}, "[::1]:3260"},
		{"san.example.org,0", Portal{"san.example.org", 3260, 0, true}, "san.example.org:3260,0"},
	} {
		p, err := ParsePortal(c.in)
		if err != nil || p != c.want || p.String() != c.out {
			t.Errorf("ParsePortal(%s) = %+v %s, %v", c.in, p, p, err)
		}
		if again, err := ParsePortal(p.String()); err != nil || again != p {
			t.Errorf("%s does not parse again: %+v, %v", p, again, err)
		}
	}
	for _, s := range []string{"", ":3260", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:3260,", "10.0.0.1,65536", "10.0.0.1,-1", "::1", "[::1", "[::1]x", "[10.0.0.1]:1", "a b", "a:b:c"} {
		if p, err := ParsePortal(s); err == nil {
			t.Errorf("ParsePortal(%q) = %+v", s, p)
		}
	}
}

// Vectors computed with another implementation (Python's hashlib).
func TestCHAPVectors(t *testing.T) {
	seq := make([]byte, 16)
	for i := range seq {
		seq[i] = byte(i)
	}
	for _, c := range []struct {
		alg  CHAPAlgorithm
		num  int
		a, b string
	}{
		{CHAPMD5, 5, "ea86c8d458d6f7313e99133b373c3b48", "e10d8d89c74ede58a4e25091ec7b9bf8"},
		{CHAPSHA1, 6, "575a7ec31742a92a22600aa8b6e5315fced0e79a", "28c57e31ded9e923c1791c1001af41b0ec3c950e"},
		{CHAPSHA256, 7, "3d7c4f4bd195a99ea7c3566862f900d3dc0e8dfdca40c46e57e4e0923c335d0a", "40015d1070a659778538265e4f152e03e70595ff3f9b093d4a022c61a7dbddab"},
		{CHAPSHA3256, 8, "25e30651288be613169a1278d97650634189fa62fbf80f4b4add533c6e8d0b7c", "5316725f0d81265660b31c9d15421e2ce1b0c494b5f5aa6c5e728ee908a8cd9f"},
	} {
		if int(c.alg) != c.num {
			t.Errorf("%v is number %d, IANA says %d", c.alg, c.alg, c.num)
		}
		for _, v := range []struct {
			id          byte
			secret, chl []byte
			want        string
		}{{0x2a, []byte("secret12byte"), seq, c.a}, {0, []byte("x"), bytes.Repeat([]byte{0xff}, 1024), c.b}} {
			got := CHAPResponse(c.alg, v.id, v.secret, v.chl)
			if hex.EncodeToString(got) != v.want || len(got) != c.alg.Size() {
				t.Errorf("%v: %x, want %s", c.alg, got, v.want)
			}
			if !CHAPVerify(c.alg, v.id, v.secret, v.chl, got) || CHAPVerify(c.alg, v.id+1, v.secret, v.chl, got) || CHAPVerify(c.alg, v.id, v.secret, v.chl, got[1:]) {
				t.Errorf("%v: CHAPVerify", c.alg)
			}
		}
	}
	if CHAPResponse(4, 0, nil, nil) != nil || CHAPVerify(4, 0, nil, nil, nil) {
		t.Error("an unknown algorithm verifies")
	}
	for _, c := range []struct {
		offer string
		want  CHAPAlgorithm
		bad   bool
	}{{"8,7,6,5", 8, false}, {"9,300,5", 5, false}, {"4", 0, false}, {"5,x", 0, true}, {"", 0, true}} {
		a, ok, err := PickCHAPAlgorithm(c.offer, CHAPAlgorithms)
		if a != c.want && !c.bad || ok != (c.want != 0) && !c.bad || (err != nil) != c.bad {
			t.Errorf("PickCHAPAlgorithm(%q) = %d, %v, %v", c.offer, a, ok, err)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add([]byte("InitiatorName=iqn.2001-04.com.example\x00MaxBurstLength=0x4000\x00CHAP_C=0b" + "AQID\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseText(b)
		if err != nil {
			return
		}
		again, err := ParseText(AppendText(nil, p))
		if err != nil || cmp.Diff(p, again) != "" {
			t.Fatalf("%v became %v, %v", p, again, err)
		}
		for _, r := range []Role{Initiator, Target} {
			n := NewNegotiator(r, true, DefaultParams(), DefaultWant())
			if r == Initiator {
				n.Offers()
			}
			if _, err := n.Receive(p); err != nil {
				continue
			}
			if q, err := n.Finish(); err == nil {
				checkParams(t, q)
			}
		}
		for _, q := range p {
			_, _ = ParseBinary(q.Value)
			_, _ = ParsePortal(q.Value)
			_ = CheckName(NormalizeName(q.Value))
		}
	})
}

// checkParams: whatever the peer says, the result is within the legal ranges.
func checkParams(t failer, p Params) {
	for i := range keys {
		if k := &keys[i]; k.num != nil {
			if v := *k.num(&p); v < 0 || uint64(v) < k.Min || uint64(v) > k.Max {
				t.Fatalf("%s is %d", k.Name, v)
			}
		}
	}
	if p.FirstBurstLength > p.MaxBurstLength || p.MaxSend < 512 || p.MaxRecv < 512 || p.MaxSend > MaxDataSegment {
		t.Fatalf("%+v", p)
	}
}
