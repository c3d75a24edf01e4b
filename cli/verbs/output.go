package verbs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/blockhouse-san/blockhouse/api"
)

// view tells how one kind of object is printed.
type view[T any] struct {
	kind string         // of the document: "Volume"
	name func(T) string // for -o name
	cols []col[T]
	more func(w io.Writer, a *app, v T) // what show prints after the fields
}

// col is a column of the table, and a field of show.
type col[T any] struct {
	head  string
	wide  bool // only with -o wide and in show
	right bool // numbers
	state bool // coloured by its word
	cell  func(T) string
}

// printList prints a list in the format that was asked for.
func printList[T any](a *app, l api.List[T], v view[T]) error {
	switch a.format {
	case "json", "yaml":
		l.APIVersion = api.Version
		if l.Kind == "" {
			l.Kind = v.kind + "List"
		}
		if l.Items == nil {
			l.Items = []T{}
		}
		return a.writeDoc(a.Out, l)
	case "name":
		for _, it := range l.Items {
			fmt.Fprintln(a.Out, clean(v.name(it)))
		}
		return nil
	}
	if l.Stale {
		fmt.Fprintf(a.Err, "note: no quorum; read from this node's own copy, as of index %d\n", l.Index)
	}
	if len(l.Items) == 0 {
		fmt.Fprintf(a.Err, "no %ss\n", strings.ToLower(v.kind))
		return nil
	}
	tableOf(a, l.Items, v).write(a.Out, "")
	return nil
}

func tableOf[T any](a *app, items []T, v view[T]) *table {
	t := &table{colours: a.colours(a.Out)}
	for _, c := range v.cols {
		if !c.wide || a.format == "wide" {
			t.head(c.head, c.right, c.state)
		}
	}
	for _, it := range items {
		var row []string
		for _, c := range v.cols {
			if !c.wide || a.format == "wide" {
				row = append(row, c.cell(it))
			}
		}
		t.row(row...)
	}
	return t
}

// printOne prints one object: its fields below each other.
func printOne[T any](a *app, it T, v view[T]) error {
	switch a.format {
	case "json", "yaml":
		return a.writeObject(a.Out, v.kind, it)
	case "name":
		fmt.Fprintln(a.Out, clean(v.name(it)))
		return nil
	}
	var f fields
	f.colours = a.colours(a.Out)
	for _, c := range v.cols {
		f.add(strings.ToLower(c.head), c.cell(it), c.state)
	}
	f.write(a.Out)
	if v.more != nil {
		v.more(a.Out, a, it)
	}
	return nil
}

// printDone prints the answer to a change. Without -o json there is no data in
// it, so it is progress and goes to stderr.
func (a *app) printDone(d api.Done, text string) error {
	if a.format == "json" || a.format == "yaml" {
		d.APIVersion = api.Version
		return a.writeDoc(a.Out, d)
	}
	if d.Message != "" {
		text = d.Message
	}
	fmt.Fprintln(a.Err, text)
	return nil
}

// writeDoc writes v as the document that -o asks for.
func (a *app) writeDoc(w io.Writer, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %T: %w", v, err)
	}
	return a.writeJSON(w, b)
}

// writeObject is writeDoc for an object that does not itself carry apiVersion.
func (a *app) writeObject(w io.Writer, kind string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", kind, err)
	}
	head := fmt.Sprintf("{%q:%q,%q:%q", "apiVersion", api.Version, "kind", kind)
	if rest := bytes.TrimPrefix(b, []byte("{")); len(rest) > 1 {
		head += ","
	}
	b = append([]byte(head), bytes.TrimPrefix(b, []byte("{"))...)
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		return fmt.Errorf("encode %s: %w", kind, err)
	}
	return a.writeJSON(w, out.Bytes())
}

func (a *app) writeJSON(w io.Writer, b []byte) error {
	if a.format == "yaml" {
		y, err := jsonToYAML(b)
		if err != nil {
			return err
		}
		_, err = w.Write(y)
		return err
	}
	_, err := w.Write(append(b, '\n'))
	return err
}

// jsonToYAML keeps names, order and values of the JSON document, so that the
// two formats never differ (yaml's own encoder would write durations as text).
func jsonToYAML(b []byte) ([]byte, error) {
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return nil, fmt.Errorf("convert to yaml: %w", err)
	}
	plain(&n)
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(&n); err != nil {
		return nil, fmt.Errorf("convert to yaml: %w", err)
	}
	return out.Bytes(), e.Close()
}

func plain(n *yaml.Node) {
	// An empty list or map has no block form.
	if len(n.Content) > 0 || n.Kind == yaml.ScalarNode {
		n.Style = 0
	}
	for _, c := range n.Content {
		plain(c)
	}
}

// when writes a time for people; tables are read on several hosts, so UTC.
func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

// ago writes how long t lies back.
func (a *app) ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(a.Now().Sub(t))
}

// span writes a duration with its two largest units.
func span(d time.Duration) string {
	sign := ""
	if d < 0 {
		sign, d = "-", -d
	}
	day := 24 * time.Hour
	switch {
	case d < time.Second:
		return fmt.Sprintf("%s%dms", sign, d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%s%.1fs", sign, d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%s%ds", sign, d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%s%dm%02ds", sign, d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%s%dh%02dm", sign, d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%s%dd%02dh", sign, d/day, d%day/time.Hour)
}

// join writes a list in a cell.
func join(s []string) string { return dash(strings.Join(s, ",")) }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
