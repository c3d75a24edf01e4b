package verbs

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// table aligns columns. text/tabwriter is not used because it counts the bytes
// of colour codes as width.
type table struct {
	colours colours
	heads   []string
	right   []bool
	state   []bool
	rows    [][]string
}

func (t *table) head(name string, right, state bool) {
	t.heads = append(t.heads, name)
	t.right = append(t.right, right)
	t.state = append(t.state, state)
}

func (t *table) row(cells ...string) {
	for i := range cells {
		cells[i] = clean(cells[i])
	}
	t.rows = append(t.rows, cells)
}

// write prints the table, two blanks between columns and none at a line's end.
func (t *table) write(w io.Writer, indent string) {
	width := make([]int, len(t.heads))
	for i, h := range t.heads {
		width[i] = utf8.RuneCountInString(h)
	}
	for _, r := range t.rows {
		for i, c := range r {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	line := func(cells []string, head bool) {
		var b strings.Builder
		b.WriteString(indent)
		for i, c := range cells {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			text := c
			switch {
			case head:
				text = t.colours.paint(bold, c)
			case t.state[i]:
				text = t.colours.paint(toneOf(c), c)
			}
			if t.right[i] {
				b.WriteString(pad + text)
			} else {
				b.WriteString(text)
				if i < len(cells)-1 {
					b.WriteString(pad)
				}
			}
			if i < len(cells)-1 {
				b.WriteString("  ")
			}
		}
		fmt.Fprintln(w, b.String())
	}
	line(t.heads, true)
	for _, r := range t.rows {
		line(r, false)
	}
}

// clean keeps control characters of foreign names (initiators choose theirs)
// from the user's terminal.
func clean(s string) string {
	if strings.IndexFunc(s, unicode.IsControl) < 0 && utf8.ValidString(s) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// fields prints "name: value" lines with the values aligned.
type fields struct {
	colours colours
	names   []string
	values  []string
	state   []bool
}

func (f *fields) add(name, value string, state bool) {
	f.names = append(f.names, name)
	f.values = append(f.values, clean(value))
	f.state = append(f.state, state)
}

func (f *fields) write(w io.Writer) {
	width := 0
	for _, n := range f.names {
		width = max(width, len(n))
	}
	for i, n := range f.names {
		v := f.values[i]
		if f.state[i] {
			v = f.colours.paint(toneOf(v), v)
		}
		fmt.Fprintf(w, "%s:%s %s\n", n, strings.Repeat(" ", width-len(n)), v)
	}
}

// tone is what a colour means. Colour never says what the word does not.
type tone string

const (
	none tone = ""
	good tone = "32"
	warn tone = "33"
	bad  tone = "31"
	bold tone = "1"
)

// toneOf gives the tone of a state's word.
func toneOf(s string) tone {
	switch s {
	case "ok", "online", "up", "ready", "serving", "yes", "leader":
		return good
	case "degraded", "suspect", "leaving", "joining", "creating", "removing", "orphaned", "unknown", "uninitialised":
		return warn
	case "faulted", "lost", "fenced", "down", "shut", "no-quorum", "no":
		return bad
	}
	return none
}

// colours says whether to paint.
type colours bool

func (c colours) paint(t tone, s string) string {
	if !c || t == none || s == "" {
		return s
	}
	return "\x1b[" + string(t) + "m" + s + "\x1b[0m"
}

// colours are on only on a terminal (https://no-color.org/).
func (a *app) colours(w io.Writer) colours {
	return colours(!a.noColor && a.Env("NO_COLOR") == "" && a.Env("TERM") != "dumb" && isTerminal(w))
}

// isTerminal tells whether v is an open terminal.
func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
