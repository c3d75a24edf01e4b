package tgt

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// FuzzCommandLine: whatever stands on a command line, the tools refuse it in one of
// their own ways or understand it within the limits that the API has.
func FuzzCommandLine(f *testing.F) {
	for _, s := range []string{
		"--lld iscsi --op new --mode target --tid 1 -T iqn.2013-05.com.magedu:tsan.disk1", "-L iscsi -onew -mlu -t1 -l0x2 -b/dev/sda5 -y 4096", "-lld iscsi --op=show --mode=tgt --tid=",
		"--op bind --mode account --tid 1 --user clyde --outgoing", "--op update --mode lu --tid 1 --lun 1 --params readonly=1,,x=\"y\"", "--t 1", "--", "-- x", "-", "--=", "-F3", "--op stop --mode lld",
		"-e -p -c /etc/tgt/targets.conf", "--update=ALL -force", "-d", "--delete",
	} {
		f.Add(strings.ReplaceAll(s, " ", "\x00"))
	}
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Split(line, "\x00")
		before := slices.Clone(args)
		r, err := parse(args)
		if !slices.Equal(before, args) {
			t.Fatalf("%q: the arguments were changed to %q", before, args)
		}
		switch {
		case err == nil:
			_, known := syntaxes[r.mode+" "+r.op]
			if !known && r.mode != "session" && r.mode != "connection" {
				t.Fatalf("%q: understood as %s %s", args, r.mode, r.op)
			}
			if r.tid < -1 || r.tid == 0 || r.lun < -1 || r.lun > 16383 || r.sid < -1 || r.cid < -1 || r.block < 0 {
				t.Fatalf("%q: %+v", args, r)
			}
			if r.has('P') {
				_, _ = params(r.s('P'))
			}
		case errors.As(err, new(done)):
		case errors.As(err, new(*usageError)), errors.As(err, new(*failure)):
			if err.Error() == "" {
				t.Fatalf("%q: an error without a text", args)
			}
		default:
			t.Fatalf("%q: %T %v", args, err, err)
		}
		if ps, err := perlopt(adminOptions, args); err == nil {
			for _, p := range ps {
				if p.opt.long != "" && !p.opt.arg && p.arg != "" {
					t.Fatalf("%q: --%s has the argument %q", args, p.opt.long, p.arg)
				}
			}
		}
		if _, err := getopt("ietadm", ietOptions, args); err != nil && !errors.As(err, new(*usageError)) {
			t.Fatalf("%q: %T %v", args, err, err)
		}
	})
}
