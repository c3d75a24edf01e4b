package tgt

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

// What the real tgtadm 1.0.85 says of command lines that it does not send
// (facts/iscsi.md §3.2; captured beside it).
func TestCommandLine(t *testing.T) {
	t.Parallel()
	const try = "\nTry `tgtadm --help' for more information.\n"
	for _, c := range []struct {
		args string
		code int
		text string
	}{
		{"", 22, "tgtadm: specify the operation type\n"},
		{"--lld iscsi --op show", 22, "tgtadm: specify the mode\n"},
		{"--lld iscsi --mode target", 22, "tgtadm: specify the operation type\n"},
		{"--lld iscsi --op bogus --mode target", 1, "tgtadm: unknown operation: bogus\n"},
		{"--lld iscsi --op show --mode bogus", 1, "tgtadm: unknown mode: bogus\n"},
		{"--lld iscsi --op new --mode target --tid 0 -T a", 22, "tgtadm: 'tid' cannot be 0\n"},
		{"--lld iscsi --op new --mode target -T a", 22, "tgtadm: 'tid' option is necessary\n"},
		{"--lld iscsi --op new --mode target --tid 3", 22, "tgtadm: creating new target requires a name, use --targetname\n"},
		{"--op bind --mode target --tid 3", 22, "tgtadm: bind operation requires initiator-address, initiator-nameor bus\n"},
		{"--op new --mode account --user x", 22, "tgtadm: 'user' and 'password' options are required\n"},
		{"--op show --mode target -t 3 --lun 5", 22, "tgtadm: target mode: option '-l' is not allowed/supported\n"},
		{"--op new --mode lu --tid 3", 22, "tgtadm: 'lun' option is necessary\n"},
		{"--op new --mode lu --lun 3", 22, "tgtadm: 'tid' option is necessary\n"},
		{"--op start --mode target", 22, "tgtadm: 'tid' option is necessary\n"},
		{"--op new --mode target --tid x -T a", 22, "-t argument value 'x' invalid" + try},
		{"--op new --mode target --tid 99999999999 -T a", 22, "-t argument value '99999999999' out of range" + try},
		{"-l ld --op show", 22, "-l argument value 'ld' invalid" + try},
		{"--bogus", 22, "tgtadm: unrecognized option '--bogus'" + try},
		{"extra", 22, "tgtadm: unrecognized option 'extra'" + try},
		{"--lld", 22, "tgtadm: option '--lld' requires an argument" + try},
		{"-L", 22, "tgtadm: option requires an argument -- 'L'" + try},
		{"-x", 22, "tgtadm: invalid option -- 'x'" + try},
		{"--t 1", 22, "tgtadm: option '--t' is ambiguous; possibilities: '--tid' '--targetname'" + try},
		{"--force=1", 22, "tgtadm: option '--force' doesn't allow an argument" + try},
	} {
		var out, errs bytes.Buffer
		code := Tgtadm(t.Context(), strings.Fields(c.args), IO{Out: &out, Err: &errs, Socket: filepath.Join(t.TempDir(), "none")})
		if code != c.code || errs.String() != c.text || out.Len() != 0 {
			t.Errorf("%q: exit %d, stdout %q, stderr %q; want %d, %q", c.args, code, out.String(), errs.String(), c.code, c.text)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	for _, args := range []string{
		"--lld iscsi --op new --mode logicalunit --tid 1 --lun 2 -b /dev/sda5",
		"-L iscsi -o new -m lu -t1 -l2 -b/dev/sda5",
		"--lld=iscsi --op=new --mode=logicalunit --tid=1 --lun=0x2 --backing-store=/dev/sda5",
		"--ll iscsi --op new --mo lu --tid 1 --lu 2 --back /dev/sda5",
		"-lld iscsi --op new --mode lu --tid 1 --lun 2 -b /dev/sda5 -C 77",
	} {
		r, err := parse(strings.Fields(args))
		if err != nil {
			t.Errorf("%s: %v", args, err)
			continue
		}
		if r.op != "new" || r.mode != "logicalunit" || r.tid != 1 || r.lun != 2 || r.s('b') != "/dev/sda5" || r.lld != "iscsi" {
			t.Errorf("%s: %+v", args, r)
		}
	}
	for _, a := range []string{"-V", "--version", "-h", "--help"} {
		if _, err := parse([]string{a}); !errors.As(err, new(done)) {
			t.Errorf("%s: %v", a, err)
		}
	}
}

func TestParams(t *testing.T) {
	t.Parallel()
	ps, err := params(`readonly=1, product_id="A B",x=`)
	if err != nil || len(ps) != 3 || ps[1] != [2]string{"product_id", "A B"} || ps[2] != [2]string{"x", ""} {
		t.Fatalf("%v, %v", ps, err)
	}
	for _, bad := range []string{"", ",", "readonly"} {
		if _, err := params(bad); err == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
}

func TestCachePage(t *testing.T) {
	t.Parallel()
	for v, want := range map[string]bool{cacheOff[len("mode_page="):]: true, "8:0:1:0x10": true, "8:0:1:0x14": false, "0x8:0:2:4:0": false} {
		if off, err := cachePage(v); off != want || err != nil {
			t.Errorf("%s: %v, %v", v, off, err)
		}
	}
	for _, bad := range []string{"", "8", "8:0:18:0x10:0:0xff", "8:0:1:256", "8:0:1:x", "10:0:1:2", "8:1:1:0"} {
		if _, err := cachePage(bad); err == nil {
			t.Errorf("%s: taken", bad)
		}
	}
}
