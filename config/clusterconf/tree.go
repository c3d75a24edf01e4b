package clusterconf

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// MaxFile and the other limits are a hundred times what anybody wrote.
const (
	MaxFile  = 4 << 20 // bytes
	maxDepth = 64
	maxErrs  = 50
)

// Error is something wrong with a file, at a line.
type Error struct {
	File string
	Line int
	Why  string
}

// Error is "FILE:LINE: why".
func (e *Error) Error() string { return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Why) }

// Attr is an attribute as it stands in the file.
type Attr struct{ Name, Value string }

// Attrs are attributes in the order of the file.
type Attrs []Attr

// Get gives an attribute's value.
func (a Attrs) Get(name string) (string, bool) {
	for _, x := range a {
		if x.Name == name {
			return x.Value, true
		}
	}
	return "", false
}

// Map gives all attributes but the named ones.
func (a Attrs) Map(but ...string) map[string]string {
	m := map[string]string{}
	for _, x := range a {
		if !slices.Contains(but, x.Name) {
			m[x.Name] = x.Value
		}
	}
	return m
}

// Element is an element with its line.
type Element struct {
	Name     string
	Line     int
	Attrs    Attrs
	Children []*Element
	Text     string // only of events (rgmanager's scripts)
}

func (e *Element) attr(name string) string { v, _ := e.Attrs.Get(name); return v }

func (e *Element) all(name string) []*Element {
	var out []*Element
	for _, c := range e.Children {
		if c.Name == name {
			out = append(out, c)
		}
	}
	return out
}

// parseTree reads the elements of a document.
func parseTree(file string, b []byte) (*Element, error) {
	if len(b) > MaxFile {
		return nil, &Error{file, 1, fmt.Sprintf("the file has %d bytes, the limit is %d", len(b), MaxFile)}
	}
	d := xml.NewDecoder(bytes.NewReader(b))
	// Files declare UTF-8 or ISO-8859-1; every name in them is ASCII.
	d.CharsetReader = func(charset string, r io.Reader) (io.Reader, error) {
		switch strings.ToLower(charset) {
		case "utf-8", "us-ascii", "iso-8859-1", "latin1":
			return r, nil
		}
		return nil, fmt.Errorf("encoding %q: save the file as UTF-8", charset)
	}
	var root *Element
	var stack []*Element
	for {
		// The position before the token is its first line, also of a tag that goes
		// over several.
		line, _ := d.InputPos()
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			var se *xml.SyntaxError
			if errors.As(err, &se) {
				return nil, &Error{file, se.Line, se.Msg}
			}
			return nil, &Error{file, line, err.Error()}
		}
		switch t := t.(type) {
		case xml.StartElement:
			if len(stack) == maxDepth {
				return nil, &Error{file, line, fmt.Sprintf("more than %d elements inside each other", maxDepth)}
			}
			e := &Element{Name: local(t.Name), Line: line}
			for _, a := range t.Attr {
				n := local(a.Name)
				if _, twice := e.Attrs.Get(n); twice {
					return nil, &Error{file, line, fmt.Sprintf("<%s> has the attribute %s twice", e.Name, n)}
				}
				e.Attrs = append(e.Attrs, Attr{n, a.Value})
			}
			switch {
			case len(stack) > 0:
				p := stack[len(stack)-1]
				p.Children = append(p.Children, e)
			case root == nil:
				root = e
			default:
				return nil, &Error{file, line, "a second element at the top"}
			}
			stack = append(stack, e)
		case xml.EndElement:
			stack = stack[:len(stack)-1]
		case xml.CharData:
			s := strings.TrimSpace(string(t))
			if s == "" {
				continue
			}
			if len(stack) == 0 {
				return nil, &Error{file, line, fmt.Sprintf("text outside of an element: %.20q", s)}
			}
			e := stack[len(stack)-1]
			if e.Name != "event" {
				return nil, &Error{file, line, fmt.Sprintf("text in <%s>: %.20q", e.Name, s)}
			}
			e.Text += s
		}
	}
	if root == nil {
		return nil, &Error{file, 1, "there is no element"}
	}
	return root, nil
}

func local(n xml.Name) string {
	if n.Space != "" {
		return n.Space + ":" + n.Local
	}
	return n.Local
}

// encode writes an element and all below it. Attribute values are escaped so that
// reading gives them back, white space too.
func (e *Element) encode(b *strings.Builder, depth int) {
	ind := strings.Repeat("  ", depth)
	b.WriteString(ind + "<" + e.Name)
	for _, a := range e.Attrs {
		b.WriteString(" " + a.Name + `="`)
		_ = xml.EscapeText(b, []byte(a.Value)) // a Builder does not fail
		b.WriteString(`"`)
	}
	switch {
	case e.Text != "":
		b.WriteString(">")
		_ = xml.EscapeText(b, []byte(e.Text))
		b.WriteString("</" + e.Name + ">\n")
	case len(e.Children) == 0:
		b.WriteString("/>\n")
	default:
		b.WriteString(">\n")
		for _, c := range e.Children {
			c.encode(b, depth+1)
		}
		b.WriteString(ind + "</" + e.Name + ">\n")
	}
}

// NotXML tells whether a file is not even well-formed, as opposed to one that is
// XML and no cluster.conf.
func NotXML(b []byte) bool {
	d := xml.NewDecoder(bytes.NewReader(b))
	d.CharsetReader = func(_ string, r io.Reader) (io.Reader, error) { return r, nil }
	for elements := 0; ; {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return elements == 0
		}
		if err != nil {
			return true
		}
		if _, ok := t.(xml.StartElement); ok {
			elements++
		}
	}
}
