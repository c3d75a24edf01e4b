package storeurl

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		in, canon, key string
		want           URL
	}{
		{"file:/srv/a.img", "", "/srv/a.img", URL{Scheme: File, Path: "/srv/a.img"}},
		{"file:/srv//b/../a.img?integrity=on&cache=sync", "file:/srv//b/../a.img?cache=sync", "/srv/a.img",
			URL{Scheme: File, Path: "/srv//b/../a.img", Opts: map[string]string{"cache": "sync"}, Integrity: "on"}},
		{"file:/a%3Fb%25c%23@&=", "", "/a?b%c#@&=", URL{Scheme: File, Path: "/a?b%c#@&="}},
		{"block:/dev/sda?cache=buffered", "", "/dev/sda", URL{Scheme: Block, Path: "/dev/sda", Opts: map[string]string{"cache": "buffered"}}},
		{"mem:", "", "", URL{Scheme: Mem}},
		{"nbd://Host/", "nbd://host:10809/", "nbd host:10809 ", URL{Scheme: NBD, Addr: "host:10809"}},
		{"nbd://[::1]:99/a/b%3F?reconnect=5s", "", "nbd [::1]:99 a/b?", URL{Scheme: NBD, Addr: "[::1]:99", Export: "a/b?", Opts: map[string]string{"reconnect": "5s"}}},
		{"nbd://[::1]/x", "nbd://[::1]:10809/x", "nbd [::1]:10809 x", URL{Scheme: NBD, Addr: "[::1]:10809", Export: "x"}},
		{"nbd+unix:///x?socket=/run/n%26b.sock&reconnect=0s", "", "nbd /run/n&b.sock x",
			URL{Scheme: NBDUnix, Path: "/run/n&b.sock", Export: "x", Opts: map[string]string{"reconnect": "0s"}}},
		{"fault:err=io&on=write+flush&skip=3@powercut:file:/a@b", "", "/a@b",
			URL{Scheme: Fault, Opts: map[string]string{"on": "write+flush", "err": "io", "skip": "3"},
				Inner: &URL{Scheme: PowerCut, Inner: &URL{Scheme: File, Path: "/a@b"}}}},
		{"fault:mem:", "", "", URL{Scheme: Fault, Inner: &URL{Scheme: Mem}}},
	} {
		u, err := Parse(x.in)
		if err != nil {
			t.Errorf("%s: %v", x.in, err)
			continue
		}
		if diff := cmp.Diff(&x.want, u); diff != "" {
			t.Errorf("%s: %s", x.in, diff)
		}
		want := x.canon
		if want == "" {
			want = x.in
		}
		if s := u.String(); s != want {
			t.Errorf("%s: written as %s, want %s", x.in, s, want)
		}
		if k, _ := u.Key(); k != x.key {
			t.Errorf("%s: key %q, want %q", x.in, k, x.key)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"/srv/a":                             "is no kind of store",
		"":                                   "is no kind of store",
		"rbd://x":                            `"rbd" is no kind of store`,
		"file:":                              "absolute path",
		"file:a":                             "absolute path",
		"file:/a\x00b":                       "zero byte",
		"file:/" + strings.Repeat("x", 4096): "4095",
		"file:/a?cache=none":                 "one of direct, sync, buffered",
		"file:/a?sync":                       `has no option "sync"; it has cache, integrity`,
		"file:/a?cache=sync&cache=sync":      "given twice",
		"file:/a?integrity=on&integrity=off": "given twice",
		"file:/100%":                         "write % as %25",
		"mem:x":                              "takes no name",
		"mem:?size=1":                        "it has none",
		"nbd:/x":                             "write nbd://host:port/export",
		"nbd://:1/x":                         "host",
		"nbd://h:0/x":                        "port",
		"nbd://h:x/x":                        "port",
		"nbd://a@b/x":                        "host",
		"nbd+unix://x":                       "socket=",
		"nbd+unix:///x":                      "option socket",
		"fault:":                             "wants a store behind it",
		"fault:on=sometimes@mem:":            "one of",
		"fault:delay=2h@mem:":                "a time from 0s",
		"powercut:x=1@mem:":                  "it has none",
		"fault:fault:fault:fault:fault:mem:": "wrappers",
		strings.Repeat("x", maxLen+1):        "at most",
	} {
		if _, err := Parse(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", in, err, want)
		}
	}
}

// FuzzParse: what is accepted is written in one form, which means the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"file:/a?cache=sync", "nbd://h/x", "nbd+unix:///x?socket=/a", "fault:on=read@mem:", "powercut:block:/dev/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := Parse(s)
		if err != nil {
			return
		}
		c := u.String()
		v, err := Parse(c)
		if err != nil {
			t.Fatalf("%q is written as %q, which is refused: %v", s, c, err)
		}
		if v.String() != c {
			t.Fatalf("%q: %q, then %q", s, c, v.String())
		}
		a, as := u.Key()
		if b, bs := v.Key(); a != b || as != bs {
			t.Fatalf("%q: key %q, written as %q it is %q", s, a, c, b)
		}
	})
}
