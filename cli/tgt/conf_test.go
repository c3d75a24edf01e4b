package tgt

import (
	"fmt"
	"io/fs"
	gopath "path"
	"strings"
	"testing"
)

// mem is a file system in memory.
func mem(m map[string]string) files {
	return files{
		read: func(p string) ([]byte, error) {
			s, ok := m[p]
			if !ok {
				return nil, fs.ErrNotExist
			}
			return []byte(s), nil
		},
		glob: func(pattern string) ([]string, error) {
			var out []string
			for p := range m {
				if ok, err := gopath.Match(pattern, p); err != nil {
					return nil, err
				} else if ok {
					out = append(out, p)
				}
			}
			return out, nil
		},
	}
}

func load(m map[string]string) (*conf, error) {
	es, err := readConf(mem(m), "/etc/tgt/targets.conf")
	if err != nil {
		return nil, err
	}
	return understand(es)
}

const everyDirective = `# every directive
default-driver iscsi
include conf.d/*.conf
ignore-errors yes
control-port 3
incomingdiscoveryuser a b
outgoingdiscoveryuser c d
iSNSServerIP 127.0.0.1
iSNSServerPort 3205
iSNSAccessControl Off
iSNS Off
<target iqn.2013-05.com.magedu:tsan.disk1>
	driver iscsi
	backing-store /srv/a.img
	<backing-store "/srv/b c.img">   # with a block
		lun 5
		write-cache off
		scsi_id x
		scsi_sn y
		vendor_id v
		product_id = p
		product_rev r
		sense_format 0
		removable 1
		online 1
		path None
		mode_page 8:0:18:0x10:0:0xff
		readonly 1
		lbppbe 0
		la_lba 0
		optimal_xfer_gran 0
		optimal_xfer_len 0
		params thin_provisioning=1
		device-type disk
		bs-type rdwr
		bsopts x
		bsoflags direct
		block-size 4096
	</backing-store>
	direct-store /dev/sdb
	incominguser christina 123\#456
	incominguser other secret
	outgoinguser clyde 654321
	initiator-address 172.16.0.0/16
	initiator-address 10.0.0.1
	initiator-name iqn.2000-01.x:a
	controller_tid 7
	allow-in-use yes
	MaxRecvDataSegmentLength 8192
	HeaderDigest CRC32C
	state ready
	FirstBurst\
Length 65536
</target>
`

func TestConf(t *testing.T) {
	t.Parallel()
	c, err := load(map[string]string{"/etc/tgt/targets.conf": everyDirective,
		"/etc/tgt/conf.d/b.conf": "<target iqn.2013-05.x:b>\nbacking-store /b\nreadonly 1\n</target>\n", "/etc/tgt/conf.d/a.conf": "<target iqn.2013-05.x:a>\n</target>"})
	if err != nil {
		t.Fatal(err)
	}
	if !c.ignoreErrors || c.controlPort != "3" || fmt.Sprint(c.incoming, *c.outgoing) != "[[a b]] [c d]" || len(c.targets) != 3 {
		t.Fatalf("%+v", c)
	}
	// By name, as tgt-admin takes them.
	if c.targets[1].iqn != "iqn.2013-05.x:a" || c.targets[2].luns[0].params[0] != [2]string{"readonly", "1"} {
		t.Fatalf("included: %+v %+v", c.targets[1], c.targets[2].luns[0])
	}
	x := c.targets[0]
	if x.tid != 7 || !x.allowInUse || fmt.Sprint(x.incoming, *x.outgoing, x.addresses, x.names) != "[[christina 123#456] [other secret]] [clyde 654321] [172.16.0.0/16 10.0.0.1] [iqn.2000-01.x:a]" {
		t.Fatalf("%+v", x)
	}
	if fmt.Sprint(x.params) != "[[MaxRecvDataSegmentLength 8192] [HeaderDigest CRC32C] [state ready] [FirstBurstLength 65536]]" {
		t.Fatalf("%v", x.params)
	}
	var luns []string
	for _, l := range x.luns {
		luns = append(luns, fmt.Sprintf("%d=%s", l.number, l.path))
	}
	if fmt.Sprint(luns) != "[1=/srv/a.img 5=/srv/b c.img 2=/dev/sdb]" {
		t.Fatalf("%v", luns)
	}
	b := x.luns[1]
	if b.block != "4096" || *b.cache || b.bstype != "rdwr" || b.bsopts != "x" || b.flags != "direct" || b.device != "disk" || len(b.params) != 15 || fmt.Sprint(b.more) != "[thin_provisioning=1]" {
		t.Fatalf("%+v", b)
	}
}

func TestConfErrors(t *testing.T) {
	t.Parallel()
	in := func(s string) string { return "<target iqn.2013-05.x:a>\n" + s + "\n</target>\n" }
	for text, want := range map[string]string{
		"bogus 1":     `targets.conf:1: unknown directive "bogus"`,
		in("bogus 1"): `targets.conf:2: unknown directive "bogus"`,
		in("<backing-store /a>\nbogus 1\n</backing-store>"): `targets.conf:3: unknown directive "bogus"`,
		in("<bogus x>\n</bogus>"):                           "targets.conf:2: unknown block",
		in("backing-store"):                                 "targets.conf:2: Option backing-store has a missing value!",
		in("outgoinguser a b\noutgoinguser c d"):            "targets.conf:3: Multiple 'outgoinguser' definitions not allowed!",
		"default-driver iscsi\ndefault-driver x":            "targets.conf:2: Multiple 'default-driver' definitions not allowed!",
		"default-driver iser":                               "only iscsi",
		"iSNS On":                                           "no iSNS client",
		in("incominguser hunter2"):                          "targets.conf:2: incominguser: a name and a secret are needed",
		in("controller_tid 0"):                              "from 1 on",
		in("allow-in-use maybe"):                            "yes or no",
		in("<backing-store /a>\nlun 0\n</backing-store>"):   "1 to 16383",
		in("<backing-store /a>\nlun 3\n</backing-store>\n<backing-store /b>\nlun 3\n</backing-store>"): "LUN 3 is given twice",
		in("") + in(""):                      "is defined twice",
		"<target disk1>\n</target>":          "iqn.YYYY-MM",
		"<target iqn.x:a>":                   "targets.conf:1: <target iqn.x:a> is not closed",
		"</target>":                          "closes nothing",
		"<target iqn.x:a>\n</backing-store>": "closes nothing; <target> of line 1 is open",
		"<target iqn.x:a":                    "> is missing",
		"include":                            "include has a missing value",
		"include /none.conf":                 "there is no such file",
		"include /etc/tgt/targets.conf":      "more than 16 deep",
	} {
		_, err := load(map[string]string{"/etc/tgt/targets.conf": text})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("an error shows a secret: %v", err)
		}
	}
	if _, err := load(map[string]string{"/etc/tgt/targets.conf": "include conf.d/*.conf"}); err != nil {
		t.Errorf("a pattern without files: %v", err)
	}
}

// FuzzTargetsConf: no text makes the parser fail in another way than by an error
// that names a line, and what it takes gives a plan.
func FuzzTargetsConf(f *testing.F) {
	f.Add(everyDirective, "<target iqn.2013-05.x:b>\nbacking-store /b\n</target>\n")
	f.Add("include /etc/tgt/x/*.conf\n<target iqn.a:b>\\\n</target>", "include /etc/tgt/targets.conf")
	f.Add("<target iqn.a:b>\n<backing-store \"#\">\nlun 16383\n</backing-store>\n</target>", "\\\n\\")
	f.Fuzz(func(t *testing.T, text, other string) {
		c, err := load(map[string]string{"/etc/tgt/targets.conf": text, "/etc/tgt/x/a.conf": other, "/etc/tgt/conf.d/a.conf": other})
		if err != nil {
			if !strings.Contains(err.Error(), ".conf:") {
				t.Fatalf("an error without its line: %v", err)
			}
			return
		}
		p := &plan{}
		for _, x := range c.targets {
			seen := map[int]bool{}
			for _, l := range x.luns {
				if l.number < 1 || seen[l.number] || l.path == "" {
					t.Fatalf("LUN %+v", l)
				}
				seen[l.number] = true
			}
			p.add(x, 1)
		}
		for _, s := range p.steps {
			if s.args == nil {
				continue
			}
			if _, err := parse(s.args); err != nil {
				t.Fatalf("%q is no command line: %v", s.args, err)
			}
		}
	})
}
