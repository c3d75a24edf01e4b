package api

import (
	"bufio"
	"io"
	"strings"
)

// newLineReader returns a function that gives one line a call, without its end.
func newLineReader(r io.Reader) func() (string, error) {
	br := bufio.NewReader(r)
	return func() (string, error) {
		s, err := br.ReadString('\n')
		return strings.TrimRight(s, "\r\n"), err
	}
}
