package agent

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Action is what an agent does.
type Action string

// The actions of the contract (FenceAgentAPI).
const (
	Off         Action = "off"
	On          Action = "on"
	Reboot      Action = "reboot"
	Status      Action = "status"
	Monitor     Action = "monitor"
	List        Action = "list"
	ListStatus  Action = "list-status"
	GetMetadata Action = "metadata"
	Manpage     Action = "manpage"
	ValidateAll Action = "validate-all"
	Diag        Action = "diag"
)

// Param is an option that an agent knows.
type Param struct {
	Name       string
	Required   bool
	Deprecated bool   // an old spelling
	Obsoletes  string // the old spelling that this one replaces
	Type       string // string, boolean, integer, second, select
	Default    string
	HasDefault bool
	Short      string
}

// ActionInfo is an action that an agent advertises.
type ActionInfo struct {
	Name Action
	// OnTarget: it must run on the node that it is about, not on another.
	OnTarget bool
	// Automatic: with Name On, this is unfencing, which a node must do to itself
	// before it uses storage.
	Automatic bool
}

// Metadata is what an agent says of itself.
type Metadata struct {
	Name    string
	Short   string
	Params  []Param
	Actions []ActionInfo
	Aliases []string // other names of the same program

	byName map[string]int
	// newer leads from an old spelling to its successor, one step.
	newer map[string]string
}

// maxMetadata bounds what is read of an agent's metadata; the largest of Debian's
// agents writes 25 KiB.
const maxMetadata = 1 << 20

// ErrMetadata is metadata that cannot be used.
var ErrMetadata = errors.New("bad metadata of a fence agent")

// ParseMetadata reads the document that an agent prints for action=metadata.
// Unknown elements and attributes are skipped: agents of many years write them.
func ParseMetadata(b []byte) (*Metadata, error) {
	if len(b) > maxMetadata {
		return nil, fmt.Errorf("%w: %d bytes, limit %d", ErrMetadata, len(b), maxMetadata)
	}
	var doc struct {
		XMLName  xml.Name
		Name     string `xml:"name,attr"`
		Short    string `xml:"shortdesc,attr"`
		Symlinks []struct {
			Name string `xml:"name,attr"`
		} `xml:"symlink"`
		Params []struct {
			Name       string `xml:"name,attr"`
			Required   string `xml:"required,attr"`
			Deprecated string `xml:"deprecated,attr"`
			Obsoletes  string `xml:"obsoletes,attr"`
			Content    struct {
				Type    string  `xml:"type,attr"`
				Default *string `xml:"default,attr"`
			} `xml:"content"`
			Short string `xml:"shortdesc"`
		} `xml:"parameters>parameter"`
		Actions []struct {
			Name      string `xml:"name,attr"`
			OnTarget  string `xml:"on_target,attr"`
			Automatic string `xml:"automatic,attr"`
		} `xml:"actions>action"`
	}
	// Some agents print a line before the document.
	if i := bytes.IndexByte(b, '<'); i > 0 {
		b = b[i:]
	}
	d := xml.NewDecoder(bytes.NewReader(b))
	// Agents declare encodings that they do not use; their text is ASCII.
	d.CharsetReader = func(_ string, r io.Reader) (io.Reader, error) { return r, nil }
	if err := d.Decode(&doc); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMetadata, err)
	}
	if doc.XMLName.Local != "resource-agent" {
		return nil, fmt.Errorf("%w: the document is <%s>, not <resource-agent>", ErrMetadata, doc.XMLName.Local)
	}
	m := &Metadata{Name: doc.Name, Short: doc.Short, byName: map[string]int{}, newer: map[string]string{}}
	for _, s := range doc.Symlinks {
		m.Aliases = append(m.Aliases, s.Name)
	}
	for _, p := range doc.Params {
		if p.Name == "" {
			continue
		}
		q := Param{Name: p.Name, Required: truth(p.Required), Deprecated: truth(p.Deprecated), Obsoletes: p.Obsoletes, Type: p.Content.Type, Short: strings.TrimSpace(p.Short)}
		if p.Content.Default != nil {
			q.Default, q.HasDefault = *p.Content.Default, true
		}
		if _, twice := m.byName[q.Name]; twice {
			continue
		}
		m.byName[q.Name] = len(m.Params)
		m.Params = append(m.Params, q)
		for _, old := range strings.FieldsFunc(p.Obsoletes, func(r rune) bool { return r == ',' || r == ' ' }) {
			if old != q.Name {
				m.newer[old] = q.Name
			}
		}
	}
	for _, a := range doc.Actions {
		if a.Name != "" {
			m.Actions = append(m.Actions, ActionInfo{Action(a.Name), truth(a.OnTarget), truth(a.Automatic)})
		}
	}
	if len(m.Actions) == 0 {
		return nil, fmt.Errorf("%w: it advertises no action", ErrMetadata)
	}
	return m, nil
}

func truth(s string) bool {
	switch strings.ToLower(s) {
	case "1", "true", "yes", "on":
		return true
	}
	return false
}

// Action gives what the agent says of an action, and whether it advertises it.
func (m *Metadata) Action(a Action) (ActionInfo, bool) {
	for _, x := range m.Actions {
		if x.Name == a {
			return x, true
		}
	}
	return ActionInfo{Name: a}, false
}

// Advertises tells whether the agent has an action.
func (m *Metadata) Advertises(a Action) bool { _, ok := m.Action(a); return ok }

// Unfences tells whether nodes must run "on" for themselves before they use
// storage, and whether it must run on the node itself.
func (m *Metadata) Unfences() (must, onTarget bool) {
	a, ok := m.Action(On)
	return ok && (a.Automatic || a.OnTarget), a.OnTarget
}

// Power tells whether the agent switches power: it advertises off, on and reboot.
// Fabric agents, which cut a node off from storage, have no reboot.
func (m *Metadata) Power() bool {
	return m.Advertises(Off) && m.Advertises(On) && m.Advertises(Reboot)
}

// Knows tells whether the agent advertises an option, in an old spelling too.
func (m *Metadata) Knows(param string) bool { _, ok := m.byName[param]; return ok }

// wellKnown are successors that agents of all ages have in common, used where the
// metadata itself names none (FenceAgentAPI "aliases").
var wellKnown = map[string]string{
	"option": "action", "port": "plug", "ipaddr": "ip", "login": "username", "passwd": "password",
	"passwd_script": "password_script", "debug": "debug_file",
}

// Spelling is the name by which this agent takes an option: the successor that
// its metadata names, the well-known one if only that is advertised, or the old
// one if the agent is older than the new spelling.
func (m *Metadata) Spelling(name string) string {
	for range 8 { // a chain, and never a loop
		if n, ok := m.newer[name]; ok && m.Knows(n) {
			name = n
			continue
		}
		break
	}
	if name == "option" {
		return "action"
	}
	if m.Knows(name) {
		return name
	}
	if n, ok := wellKnown[name]; ok && m.Knows(n) {
		return n
	}
	for old, n := range wellKnown {
		if n == name && m.Knows(old) {
			return old
		}
	}
	// FenceAgentAPI: - and _ are the same in names.
	if n := strings.ReplaceAll(name, "-", "_"); m.Knows(n) {
		return n
	}
	return name
}

// Resolve turns options as they were configured into those that the agent takes.
// Two spellings of one option with different values are an error, because which
// one wins differs between agents. Notes say which names were replaced and which
// the agent does not know (it will ignore them).
func (m *Metadata) Resolve(params map[string]string) (out map[string]string, notes []string, err error) {
	out = map[string]string{}
	from := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(params)) {
		v := params[k]
		n := m.Spelling(k)
		if prev, twice := out[n]; twice && prev != v {
			return nil, nil, fmt.Errorf("options %s and %s of %s are one option and differ", from[n], k, m.Name)
		}
		out[n], from[n] = v, k
		if n != k {
			notes = append(notes, fmt.Sprintf("option %s of %s is now called %s", k, m.Name, n))
		}
		if n != "action" && !m.Knows(n) {
			notes = append(notes, fmt.Sprintf("option %s is unknown to %s and will be ignored", k, m.Name))
		}
	}
	return out, notes, nil
}

// Missing lists the required options that are neither set nor have a default,
// by their newest spelling. The plug is not among them: Run fills it in.
func (m *Metadata) Missing(params map[string]string) []string {
	var out []string
	for _, p := range m.Params {
		if !p.Required || p.Deprecated || p.HasDefault || p.Name == "action" || p.Name == "plug" || p.Name == "port" {
			continue
		}
		if _, ok := params[p.Name]; !ok {
			out = append(out, p.Name)
		}
	}
	return out
}
