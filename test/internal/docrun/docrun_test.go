package docrun

import (
	"reflect"
	"strings"
	"testing"
)

const page = "text\n```console\n$ a --b c\n$ A=1 cat <<E\n> one\n>\n> E\nout …\n…\n(exit status 3)\n```\n```toml\n$ not a command\n```\n````console lab\n$ x\n```\n````\n"

func TestParse(t *testing.T) {
	t.Parallel()
	got, err := Parse("p.md", page)
	if err != nil {
		t.Fatal(err)
	}
	want := []Block{
		{Line: 2, Commands: []Command{{Line: 3, Text: "a --b c"}, {Line: 4, Text: "A=1 cat <<E\none\n\nE", Want: []string{"out …", "…"}, Exit: 3}}},
		{Line: 15, Kind: Lab, Commands: []Command{{Line: 16, Text: "x", Want: []string{"```"}}}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if p := got[0].Commands[1].Program(); p != "cat" {
		t.Errorf("program %q", p)
	}
	for text, why := range map[string]string{
		"```console lob\n$ a\n```":                     "p.md:1: unknown kind",
		"```console lab now\n$ a\n```":                 "unknown kind",
		"```console\n```":                              "without a command",
		"```console\nout\n$ a\n```":                    "p.md:2: \"out\" stands before",
		"```console\n$ a\nout\n> b\n```":               "has written already",
		"```console\n$ a\n(exit status 0)\n```":        "1 to 255",
		"```console\n$ a\n(exit status 2)\nmore\n```":  "behind the exit status",
		"```console\n$ a\n":                            "not closed",
		"```console\n$ a\n```\n```\n":                  "not closed",
		"```console\n$ a\n(exit status 99999999999)\n": "1 to 255",
	} {
		if _, err := Parse("p.md", text); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v, want %q", text, err, why)
		}
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		want, got string
		ok        bool
	}{
		{"", "", true}, {"a", "a\n", true}, {"a", "", false}, {"", "a\n", false}, {"a\nb", "a\n", false}, {"a", "a\nb\n", false},
		{"a … c", "a b c\n", true}, {"a…", "a\n", true}, {"a … c", "a b d\n", false}, {"a…b", "xab\n", false}, {"a.b", "axb\n", false}, {"a.…", "axb\n", false},
		{"…", "", true}, {"…", "a\nb\n", true}, {"a\n…\nd", "a\nb\nc\nd\n", true}, {"a\n…\nd", "a\nd\n", true}, {"a\n…\nd", "a\nd\ne\n", false},
		{"…\nb\n…\nb", "a\nb\nb\n", true}, {"a\n\nb", "a\n\nb\n", true}, {"a\n\nb", "a\nb\n", false},
	} {
		var want []string
		if c.want != "" {
			want = strings.Split(c.want, "\n")
		}
		if err := (Command{Want: want}).Check(c.got, 0); (err == nil) != c.ok {
			t.Errorf("%q with %q: %v", c.want, c.got, err)
		}
	}
	if err := (Command{Text: "x", Line: 7, Exit: 22}).Check("", 1); err == nil || !strings.Contains(err.Error(), "line 7: $ x\nexit status 1, the page says 22") {
		t.Errorf("%v", err)
	}
	if err := (Command{Exit: 22}).Check("", 22); err != nil {
		t.Error(err)
	}
}
