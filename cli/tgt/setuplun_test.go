package tgt

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSetupLUNCommandLine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	disk := filepath.Join(dir, "sda5")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"": "usage:", "-h": "usage:", "-n a": "Error: a device is mandatory\n", "-d " + dir: "Error: " + dir + " is not a device\n", "-d " + disk: "Error: target name is mandatory\n",
		"-d": "option requires an argument -- d\n", "-x": "illegal option -- x\n", "-d " + disk + " -na": "tgtd is not running\nExiting...\n",
	} {
		var out bytes.Buffer
		if code := SetupLUN(t.Context(), strings.Fields(args), IO{Out: &out, Err: &out, Socket: filepath.Join(dir, "none")}); code != 1 || !strings.Contains(out.String(), want) {
			t.Errorf("%q: exit %d, %q; want %q", args, code, out.String(), want)
		}
	}
}

// Perl's rules, which are not getopt's.
func TestPerlOptions(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"-e": "execute", "-execute": "execute", "--exec": "execute", "-c f": "conf=f", "--conf=f -p": "conf=f pretend", "-dump x": "dump =x", "-- -e": "=-e", "-C 7": "control-port=7",
	} {
		ps, err := perlopt(adminOptions, strings.Fields(args))
		var got []string
		for _, p := range ps {
			s := p.opt.long
			if p.arg != "" {
				s += "=" + p.arg
			}
			got = append(got, s)
		}
		if strings.Join(got, " ") != want || err != nil {
			t.Errorf("%q: %q, %v; want %q", args, got, err, want)
		}
	}
	for args, want := range map[string]string{
		"-ep": "Unknown option: ep", "-d ALL": "Option d is ambiguous (delete, dump)", "--delete": "Option delete requires an argument", "--force=1": "Option force does not take an argument",
	} {
		if _, err := perlopt(adminOptions, strings.Fields(args)); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
}
