// Package storeurl reads and writes the names of stores: where the bytes of a
// volume lie and how they are treated. It is pure, because the cluster's log
// judges these names on every node alike; package block/store opens them.
//
//	file:/PATH[?cache=direct|sync|buffered][&integrity=on|off]
//	block:/dev/NAME[?…as file]
//	mem:                              in memory, for tests; gone with the process
//	nbd://HOST[:PORT]/EXPORT[?integrity=on|off][&reconnect=30s]
//	nbd+unix:///EXPORT?socket=/PATH[&…as nbd]
//	fault:[OPTIONS@]URL               errors, delays, wrong data, for tests
//	powercut:URL                      a write cache that is lost with the process, for tests
//
// '%', '?', '#' and control characters in a path are written %XX.
//
// Storage row: it imports nothing of the project.
package storeurl

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Scheme is the kind of a store.
type Scheme string

// The schemes.
const (
	File     Scheme = "file"
	Block    Scheme = "block"
	Mem      Scheme = "mem"
	NBD      Scheme = "nbd"
	NBDUnix  Scheme = "nbd+unix"
	Fault    Scheme = "fault"
	PowerCut Scheme = "powercut"
)

// DefaultNBDPort is IANA's.
const DefaultNBDPort = "10809"

// maxLen bounds a URL: a path may have 4095 bytes, and wrappers stand before it.
const maxLen = 8 << 10

// URL is a parsed store URL. Parse makes it, and it is not changed afterwards.
type URL struct {
	Scheme Scheme
	Path   string // file, block: absolute; nbd+unix: of the socket
	Addr   string // nbd: HOST:PORT
	Export string // nbd, nbd+unix; may be empty, the server's default
	// Opts are the options that were given, without integrity and socket.
	Opts map[string]string
	// Integrity is the option of that name: "", "on" or "off".
	Integrity string
	Inner     *URL // fault, powercut
}

// option checks a value.
type option func(v string) error

func oneOf(words ...string) option {
	return func(v string) error {
		if !slices.Contains(words, v) {
			return fmt.Errorf("%q: one of %s", v, strings.Join(words, ", "))
		}
		return nil
	}
}

func number(v string) error {
	if n, err := strconv.ParseInt(v, 10, 64); err != nil || n < 0 {
		return fmt.Errorf("%q: a number from 0 up", v)
	}
	return nil
}

func duration(limit time.Duration) option {
	return func(v string) error {
		if d, err := time.ParseDuration(v); err != nil || d < 0 || d > limit {
			return fmt.Errorf("%q: a time from 0s to %v", v, limit)
		}
		return nil
	}
}

// Ops are the calls that fault:on= knows; several are joined by '+'.
var Ops = []string{"read", "write", "flush", "unmap", "zeroes", "extents", "any"}

func ops(v string) error {
	for w := range strings.SplitSeq(v, "+") {
		if err := oneOf(Ops...)(w); err != nil {
			return err
		}
	}
	return nil
}

// options of each scheme.
var options = map[Scheme]map[string]option{
	File:    {"cache": oneOf("direct", "sync", "buffered"), "integrity": oneOf("on", "off")},
	Block:   {"cache": oneOf("direct", "sync", "buffered"), "integrity": oneOf("on", "off")},
	Mem:     {},
	NBD:     {"integrity": oneOf("on", "off"), "reconnect": duration(10 * time.Minute)},
	NBDUnix: {"integrity": oneOf("on", "off"), "reconnect": duration(10 * time.Minute), "socket": nil},
	Fault: {"on": ops, "err": oneOf("io", "nospace", "checksum"), "off": number, "len": number, "skip": number, "times": number,
		"delay": duration(time.Minute), "corrupt": oneOf("yes")},
	PowerCut: {},
}

// Schemes are all schemes, sorted.
func Schemes() []string {
	var out []string
	for s := range options {
		out = append(out, string(s))
	}
	slices.Sort(out)
	return out
}

// Parse reads a store URL. What it does not know is an error that names it.
func Parse(s string) (*URL, error) {
	if len(s) > maxLen {
		return nil, fmt.Errorf("store of %d bytes: at most %d", len(s), maxLen)
	}
	u, err := parse(s, 0)
	if err != nil {
		return nil, fmt.Errorf("store %q: %w", s, err)
	}
	return u, nil
}

func parse(s string, depth int) (*URL, error) {
	word, rest, ok := strings.Cut(s, ":")
	sch := Scheme(word)
	known := options[sch]
	if !ok || known == nil {
		return nil, fmt.Errorf("%q is no kind of store; write %s", word, "file:/path, block:/dev/name, nbd://host/export, nbd+unix:///export?socket=/path or mem:")
	}
	u := &URL{Scheme: sch}
	if sch == Fault || sch == PowerCut {
		if depth == 4 {
			return nil, errors.New("more than four wrappers")
		}
		w, _, _ := strings.Cut(rest, ":")
		if options[Scheme(w)] == nil {
			opts, inner, ok := strings.Cut(rest, "@")
			if !ok {
				return nil, fmt.Errorf("%s: wants a store behind it, as %s:file:/path", sch, sch)
			}
			if err := u.options(opts); err != nil {
				return nil, err
			}
			rest = inner
		}
		var err error
		u.Inner, err = parse(rest, depth+1)
		return u, err
	}
	rest, query, _ := strings.Cut(rest, "?")
	if err := u.options(query); err != nil {
		return nil, err
	}
	var err error
	switch sch {
	case File, Block:
		u.Path, err = absolute(rest)
	case Mem:
		if rest != "" {
			err = errors.New("mem: takes no name; its size is the volume's")
		}
	case NBD:
		err = u.nbd(rest)
	case NBDUnix:
		err = u.nbdUnix(rest)
	}
	return u, err
}

func (u *URL) options(query string) error {
	if query == "" {
		return nil
	}
	for kv := range strings.SplitSeq(query, "&") {
		k, v, _ := strings.Cut(kv, "=")
		v, err := url.PathUnescape(v)
		if err != nil {
			return fmt.Errorf("option %s: %w", k, err)
		}
		check, ok := options[u.Scheme][k]
		if !ok {
			return fmt.Errorf("%s: has no option %q; it has %s", u.Scheme, k, cmpOr(strings.Join(slices.Sorted(maps.Keys(options[u.Scheme])), ", "), "none"))
		}
		if check != nil {
			if err := check(v); err != nil {
				return fmt.Errorf("option %s: %w", k, err)
			}
		}
		if _, twice := u.Opts[k]; twice || k == "integrity" && u.Integrity != "" {
			return fmt.Errorf("option %s is given twice", k)
		}
		if k == "integrity" {
			u.Integrity = v
			continue
		}
		if u.Opts == nil {
			u.Opts = map[string]string{}
		}
		u.Opts[k] = v
	}
	return nil
}

func cmpOr(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

func absolute(s string) (string, error) {
	p, err := url.PathUnescape(s)
	switch {
	case err != nil:
		return "", fmt.Errorf("path: %w (write %% as %%25)", err)
	case !strings.HasPrefix(p, "/") || len(p) < 2:
		return "", errors.New("an absolute path is needed")
	case len(p) > 4095 || strings.ContainsRune(p, 0):
		return "", errors.New("a path has at most 4095 bytes and no zero byte")
	}
	return p, nil
}

func (u *URL) nbd(rest string) error {
	x, ok := strings.CutPrefix(rest, "//")
	host, export, _ := strings.Cut(x, "/")
	if !ok || host == "" {
		return errors.New("write nbd://host:port/export")
	}
	h, p, err := net.SplitHostPort(host)
	if err != nil {
		h, p = strings.Trim(host, "[]"), DefaultNBDPort
	}
	if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("port %q: 1 to 65535", p)
	}
	if h == "" || strings.ContainsAny(h, "@ /[]") || strings.ContainsFunc(h, func(r rune) bool { return r <= ' ' }) {
		return fmt.Errorf("host %q: a name or an address; an IPv6 address stands in brackets", h)
	}
	u.Addr = net.JoinHostPort(strings.ToLower(h), p)
	return u.export(export)
}

func (u *URL) nbdUnix(rest string) error {
	x, ok := strings.CutPrefix(rest, "///")
	if !ok {
		return errors.New("write nbd+unix:///export?socket=/path")
	}
	var err error
	if u.Path, err = absolute(url.PathEscape(u.Opts["socket"])); err != nil {
		return fmt.Errorf("option socket: %w", err)
	}
	if delete(u.Opts, "socket"); len(u.Opts) == 0 {
		u.Opts = nil
	}
	return u.export(x)
}

// export names have at most 4096 bytes (NBD protocol, "Terminology").
func (u *URL) export(s string) error {
	e, err := url.PathUnescape(s)
	if err != nil || len(e) > 4096 || strings.ContainsRune(e, 0) {
		return fmt.Errorf("export name %q: at most 4096 bytes and no zero byte, with %% as %%25", s)
	}
	u.Export = e
	return nil
}

// escape writes a path or an export name so that Parse reads it back.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c == '%' || c == '?' || c == '#' || c < 0x20 || c == 0x7f {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// ForPath is the URL of a file or device, escaped where it must be.
func ForPath(s Scheme, p string) string { return string(s) + ":" + escape(p) }

// String is the URL in its one form, without integrity: that belongs to the
// volume.
func (u *URL) String() string {
	var b strings.Builder
	b.WriteString(string(u.Scheme) + ":")
	var q []string
	for _, k := range slices.Sorted(maps.Keys(u.Opts)) {
		q = append(q, k+"="+strings.NewReplacer("&", "%26", "@", "%40", "=", "%3D").Replace(escape(u.Opts[k])))
	}
	query := strings.Join(q, "&")
	if u.Inner != nil {
		if query != "" {
			b.WriteString(query + "@")
		}
		return b.String() + u.Inner.String()
	}
	switch u.Scheme {
	case File, Block:
		b.WriteString(escape(u.Path))
	case NBD:
		b.WriteString("//" + u.Addr + "/" + escape(u.Export))
	case NBDUnix:
		b.WriteString("///" + escape(u.Export))
		query = strings.Trim("socket="+strings.ReplaceAll(escape(u.Path), "&", "%26")+"&"+query, "&")
	}
	if query != "" {
		b.WriteString("?" + query)
	}
	return b.String()
}

// Base is the store under the wrappers.
func (u *URL) Base() *URL {
	for u.Inner != nil {
		u = u.Inner
	}
	return u
}

// WantsIntegrity is what the base says: "", "on" or "off".
func (u *URL) WantsIntegrity() string { return u.Base().Integrity }

// Key names the bytes: two stores of one key are one store. It is empty for
// mem:, whose bytes nobody shares. Shared tells that the name means the same on
// every node; else it means what it does on one node only.
func (u *URL) Key() (key string, shared bool) {
	b := u.Base()
	switch b.Scheme {
	case File, Block:
		return path.Clean(b.Path), false
	case NBD:
		return "nbd " + b.Addr + " " + b.Export, true
	case NBDUnix:
		return "nbd " + path.Clean(b.Path) + " " + b.Export, false
	}
	return "", false
}

// OwnSize tells that the store has a size of its own, which the volume takes;
// else it is made with the volume's.
func (u *URL) OwnSize() bool { return u.Base().Scheme != Mem }
