package tgt

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

const ietd = `# an ietd.conf of old
IncomingUser joe secret
Target iqn.2001-04.com.example:storage.disk2
	IncomingUser jim other
	OutgoingUser jack secret-out
	Lun 0 Path=/dev/sdc,Type=fileio
	Lun 3 Path=/srv/b.img,Type=blockio,IOMode=ro
	Alias Test
	HeaderDigest None
	MaxBurstLength 262144
	QueuedCommands 32
	Wthreads 8
`

func TestReadIET(t *testing.T) {
	t.Parallel()
	read := func(text string) (*conf, error) { return readIET(mem(map[string]string{"/f": text}), "/f") }
	c, err := read(ietd)
	if err != nil {
		t.Fatal(err)
	}
	x := c.targets[0]
	if fmt.Sprint(c.incoming, x.incoming, *x.outgoing, x.params) != "[[joe secret]] [[jim other]] [jack secret-out] [[HeaderDigest None] [MaxBurstLength 262144] [MaxQueueCmd 32]]" {
		t.Fatalf("%v %+v", c.incoming, x)
	}
	if len(x.luns) != 2 || x.luns[0].number != 0 || x.luns[0].path != "/dev/sdc" || x.luns[1].number != 3 || fmt.Sprint(x.luns[1].params) != "[[readonly 1]]" {
		t.Fatalf("%+v %+v", x.luns[0], x.luns[1])
	}
	for text, want := range map[string]string{
		"Bogus 1": `/f:1: unknown directive "Bogus"`, "MaxBurstLength 1": "before the first Target", "Target disk": "iqn.YYYY-MM",
		"Target iqn.x:a\nTarget iqn.x:a": "/f:2: target iqn.x:a is defined twice", "Lun 0 Path=/a": "under a Target", "Target iqn.x:a\nLun 0 Type=fileio": "Path=FILE is missing",
		"Target iqn.x:a\nLun 0 Path=/a,Type=nullio": "fileio and blockio", "Target iqn.x:a\nLun 0 Path=/a,IOMode=wt": "ro and wb", "Target iqn.x:a\nLun 0 Path=/a,ScsiId=1": "frozen",
		"Target iqn.x:a\nLun 0 Path=/a\nLun 0 Path=/b": "given twice", "Target iqn.x:a\nLun 99999 Path=/a": "0 to 16383", "IncomingUser hunter2": "a name and a secret",
		"iSNSServer 1.1.1.1": "no iSNS client", "Target": "missing value",
	} {
		if _, err := read(text); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestIetadmCommandLine(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"--op bogus": `unknown operation "bogus"`, "--bogus": "unrecognized option '--bogus'", "x": "unexpected argument 'x'", "--op new --tid=x": "-t argument value 'x' invalid",
		"--op new --tid=1": "failed to send request", "--import /nonexistent.conf": "there is no file /nonexistent.conf",
	} {
		var out, errs bytes.Buffer
		if code := Ietadm(t.Context(), strings.Fields(args), IO{Out: &out, Err: &errs, Socket: filepath.Join(t.TempDir(), "none")}); code == 0 || !strings.Contains(errs.String(), want) {
			t.Errorf("%q: exit %d, %q", args, code, errs.String())
		}
	}
}

func FuzzIETConf(f *testing.F) {
	f.Add(ietd)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := readIET(mem(map[string]string{"/f": text}), "/f")
		if err != nil {
			if !strings.HasPrefix(err.Error(), "/f:") {
				t.Fatalf("an error without its line: %v", err)
			}
			return
		}
		p := &plan{}
		for _, x := range c.targets {
			p.add(x, 1)
		}
		for _, s := range p.steps {
			if s.args != nil {
				if _, err := parse(s.args); err != nil {
					t.Fatalf("%q is no command line: %v", s.args, err)
				}
			}
		}
	})
}
