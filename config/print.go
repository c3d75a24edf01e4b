package config

import (
	"bytes"
	"fmt"
	"io"
	"reflect"
	"strings"

	"github.com/BurntSushi/toml"
)

// Print writes c as a commented file that Parse reads back to c.
func Print(w io.Writer, c Config) error {
	var b bytes.Buffer
	b.WriteString("# clusterd's configuration (TOML). Every value shown is what an empty file means.\n")
	b.WriteString("# An unknown key is an error. What the cluster agrees on (targets, volumes, ACLs)\n")
	b.WriteString("# is not here: see clusteradm(8).\n\n")
	v := reflect.ValueOf(c)
	if err := fields(&b, v); err != nil {
		return err
	}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Type.Kind() != reflect.Struct {
			continue
		}
		b.WriteString("\n")
		comment(&b, f.Tag.Get("comment"))
		fmt.Fprintf(&b, "[%s]\n", f.Tag.Get("toml"))
		if err := fields(&b, v.Field(i)); err != nil {
			return err
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

func fields(b *bytes.Buffer, v reflect.Value) error {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Type.Kind() == reflect.Struct {
			continue
		}
		comment(b, f.Tag.Get("comment"))
		key := f.Tag.Get("toml")
		var one bytes.Buffer
		if err := toml.NewEncoder(&one).Encode(map[string]any{key: v.Field(i).Interface()}); err != nil {
			return fmt.Errorf("print %s: %w", key, err)
		}
		b.Write(one.Bytes())
	}
	return nil
}

func comment(b *bytes.Buffer, text string) {
	line := "#"
	for _, w := range strings.Fields(text) {
		if len(line)+1+len(w) > 90 {
			b.WriteString(line + "\n")
			line = "#"
		}
		line += " " + w
	}
	b.WriteString(line + "\n")
}

// known lists every key of the file.
func known() []string {
	var keys []string
	t := reflect.TypeFor[Config]()
	for i := range t.NumField() {
		f := t.Field(i)
		k := f.Tag.Get("toml")
		keys = append(keys, k)
		if f.Type.Kind() == reflect.Struct {
			for j := range f.Type.NumField() {
				keys = append(keys, k+"."+f.Type.Field(j).Tag.Get("toml"))
			}
		}
	}
	return keys
}

// nearest gives the known key that a typing error probably meant.
func nearest(key string) string {
	best, dist := "", 3
	for _, k := range known() {
		if d := distance(key, k); d < dist {
			best, dist = k, d
		}
	}
	if best != "" {
		return best
	}
	last := key[strings.LastIndex(key, ".")+1:]
	for _, k := range known() {
		if strings.HasSuffix(k, "."+last) || k == last {
			return k
		}
	}
	return ""
}

// distance is Levenshtein's.
func distance(a, b string) int {
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		diag := prev[0]
		prev[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diag, prev[j+1] = prev[j+1], min(prev[j+1]+1, prev[j]+1, diag+cost)
		}
	}
	return prev[len(b)]
}
