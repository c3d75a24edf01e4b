// Package docrun reads the commands of a markdown page and compares what they
// write with what the page says, so that a page stays true.
//
// A block of commands is a fenced code block with the info string console, and
// perhaps a second word that says where it runs:
//
//	console          where the page's test runs: a cluster of real processes
//	console lab      in a guest of test/lab: a kernel's initiator is needed
//	console host     nowhere: a program of the host's, which is not ours
//	console missing  nowhere: not built yet, and the test sees that it is not
//
// In a block a line "$ COMMAND" is a command for bash, "> MORE" goes on with it
// (a here-document), and the lines up to the next command are what it writes,
// standard output and standard error as they come. "(exit status N)" as the last
// of them is its exit status, without it 0. In the output "…" stands for any text
// within its line, and a line that is only "…" for any lines.
//
// Only tests import it.
package docrun

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Kind says where the commands of a block run.
type Kind string

// The kinds, by the second word of the info string.
const (
	Run     Kind = ""
	Lab     Kind = "lab"
	Host    Kind = "host"
	Missing Kind = "missing"
)

// Block is a fenced block of commands.
type Block struct {
	Line     int // of its first fence, from 1
	Kind     Kind
	Commands []Command
}

// Command is one command line and what it must give.
type Command struct {
	Line int    // in the page, from 1
	Text string // for bash; several lines if a here-document follows
	Want []string
	Exit int
}

// Read parses a page of the file system.
func Read(file string) ([]Block, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read page: %w", err)
	}
	return Parse(file, string(b))
}

var (
	fence = regexp.MustCompile("^(`{3,})[ \t]*(.*?)[ \t]*$")
	exits = regexp.MustCompile(`^\(exit status (\d+)\)$`)
)

// Parse reads the blocks of commands of a page; name stands before errors. What
// looks like a block of commands and is none is an error, so that none is left out
// by a slip.
func Parse(name, page string) ([]Block, error) {
	var out []Block
	var in string // the open fence
	var cur *Block
	for i, l := range strings.Split(page, "\n") {
		n := i + 1
		m := fence.FindStringSubmatch(l)
		if in == "" {
			if m == nil {
				continue
			}
			in = m[1]
			if words := strings.Fields(m[2]); len(words) > 0 && words[0] == "console" {
				kind := Run
				if len(words) > 1 {
					kind = Kind(words[1])
				}
				if len(words) > 2 || !slices.Contains([]Kind{Run, Lab, Host, Missing}, kind) {
					return nil, fmt.Errorf("%s:%d: unknown kind of console block %q", name, n, m[2])
				}
				cur = &Block{Line: n, Kind: kind}
			}
			continue
		}
		if m != nil && m[1] == in && m[2] == "" {
			if cur != nil {
				if len(cur.Commands) == 0 {
					return nil, fmt.Errorf("%s:%d: a console block without a command", name, cur.Line)
				}
				out = append(out, *cur)
			}
			in, cur = "", nil
			continue
		}
		if cur == nil {
			continue
		}
		if err := cur.line(n, l); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, n, err)
		}
	}
	if in != "" {
		return nil, fmt.Errorf("%s: the last code block is not closed", name)
	}
	return out, nil
}

func (b *Block) line(n int, l string) error {
	if text, ok := strings.CutPrefix(l, "$ "); ok {
		b.Commands = append(b.Commands, Command{Line: n, Text: text})
		return nil
	}
	if len(b.Commands) == 0 {
		return fmt.Errorf("%q stands before the first command", l)
	}
	c := &b.Commands[len(b.Commands)-1]
	if c.Exit != 0 {
		return fmt.Errorf("%q stands behind the exit status", l)
	}
	more, ok := strings.CutPrefix(l, "> ")
	if l == ">" {
		more, ok = "", true
	}
	if ok {
		if len(c.Want) > 0 {
			return fmt.Errorf("%q goes on with a command that has written already", l)
		}
		c.Text += "\n" + more
		return nil
	}
	if m := exits.FindStringSubmatch(l); m != nil {
		var err error
		if c.Exit, err = strconv.Atoi(m[1]); err != nil || c.Exit == 0 || c.Exit > 255 {
			return fmt.Errorf("exit status %s: 1 to 255 is possible", m[1])
		}
		return nil
	}
	c.Want = append(c.Want, l)
	return nil
}

// Program is the first word of the command that is no assignment.
func (c Command) Program() string {
	for _, w := range strings.Fields(c.Text) {
		if !strings.Contains(w, "=") {
			return w
		}
	}
	return ""
}

// Check compares what the command wrote and its exit status with the page.
func (c Command) Check(output string, exit int) error {
	var got []string
	if output != "" {
		got = strings.Split(strings.TrimSuffix(output, "\n"), "\n")
	}
	if err := Match(c.Want, got); err != nil {
		return fmt.Errorf("line %d: $ %s\n%w\nit wrote:\n%s", c.Line, c.Text, err, output)
	}
	if exit != c.Exit {
		return fmt.Errorf("line %d: $ %s\nexit status %d, the page says %d; it wrote:\n%s", c.Line, c.Text, exit, c.Exit, output)
	}
	return nil
}

// Match compares lines with those of a page, in which "…" is a wildcard.
func Match(want, got []string) error {
	// far is how far one can get: for the message.
	far := 0
	var match func(i, j int) bool
	seen := map[[2]int]bool{} // pairs that failed, so that it ends soon
	match = func(i, j int) bool {
		far = max(far, i)
		switch {
		case i == len(want):
			return j == len(got)
		case seen[[2]int{i, j}]:
			return false
		}
		ok := false
		if want[i] == "…" {
			ok = match(i+1, j) || j < len(got) && match(i, j+1)
		} else {
			ok = j < len(got) && line(want[i], got[j]) && match(i+1, j+1)
		}
		if !ok {
			seen[[2]int{i, j}] = true
		}
		return ok
	}
	if match(0, 0) {
		return nil
	}
	if far == len(want) {
		return fmt.Errorf("it writes more than the page says")
	}
	return fmt.Errorf("it does not write %q", want[far])
}

func line(want, got string) bool {
	parts := strings.Split(want, "…")
	if len(parts) == 1 {
		return want == got
	}
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	return regexp.MustCompile("^" + strings.Join(parts, ".*") + "$").MatchString(got)
}
