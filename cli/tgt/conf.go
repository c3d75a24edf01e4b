package tgt

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// entry is a directive of targets.conf: "key value", or a block of them.
type entry struct {
	key, value string
	file       string
	line       int
	block      bool
	sub        []*entry
}

func (e *entry) errorf(format string, a ...any) error {
	return fmt.Errorf("%s:%d: %s", e.file, e.line, fmt.Sprintf(format, a...))
}

// files is what the parser reads of a file system.
type files struct {
	read func(path string) ([]byte, error)
	glob func(pattern string) ([]string, error)
}

var disk = files{os.ReadFile, filepath.Glob}

// Limits of a configuration: a mistake in an include must not fill the memory.
const (
	maxInclude = 16
	maxEntries = 100000
)

// parser of targets.conf: lines "key value" or "key = value", blocks
// "<key value>" to "</key>", # comments, a backslash before the end of a line
// joins it to the next, "include PATTERN" stands for files.
type parser struct {
	fs    files
	count int
}

func readConf(fs files, path string) ([]*entry, error) {
	p := &parser{fs: fs}
	root := &entry{block: true, file: path}
	if err := p.file(path, root, 0); err != nil {
		return nil, err
	}
	return root.sub, nil
}

func (p *parser) file(path string, into *entry, depth int) error {
	b, err := p.fs.read(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	open := []*entry{into}
	joined := ""
	start := 0
	text := strings.TrimSuffix(string(b), "\n")
	for n, raw := range strings.Split(text, "\n") {
		raw = strings.TrimSuffix(raw, "\r")
		if joined == "" {
			start = n + 1
		}
		if cut, ok := strings.CutSuffix(raw, "\\"); ok && n < strings.Count(text, "\n") {
			joined += cut
			continue
		}
		line := strings.TrimSpace(uncomment(joined + raw))
		joined = ""
		if line == "" {
			continue
		}
		if p.count++; p.count > maxEntries {
			return fmt.Errorf("%s:%d: more than %d directives", path, start, maxEntries)
		}
		e := &entry{file: path, line: start}
		top := open[len(open)-1]
		switch {
		case strings.HasPrefix(line, "</"):
			name, ok := strings.CutSuffix(line[2:], ">")
			name = strings.TrimSpace(name)
			if !ok || len(open) == 1 || open[len(open)-1].key != name {
				if len(open) > 1 {
					return e.errorf("%q closes nothing; <%s> of line %d is open", line, top.key, top.line)
				}
				return e.errorf("%q closes nothing", line)
			}
			open = open[:len(open)-1]
			continue
		case strings.HasPrefix(line, "<"):
			inner, ok := strings.CutSuffix(line[1:], ">")
			if !ok {
				return e.errorf("%q: the block's > is missing", line)
			}
			e.key, e.value = keyValue(inner)
			if e.block = true; e.key == "" {
				return e.errorf("a block without a name")
			}
			if len(open) > 3 {
				return e.errorf("blocks lie too deep")
			}
			top.sub = append(top.sub, e)
			open = append(open, e)
			continue
		}
		e.key, e.value = keyValue(line)
		if e.key != "include" {
			top.sub = append(top.sub, e)
			continue
		}
		if err := p.include(e, top, depth); err != nil {
			return err
		}
	}
	if len(open) > 1 {
		e := open[len(open)-1]
		return e.errorf("<%s %s> is not closed", e.key, e.value)
	}
	return nil
}

func (p *parser) include(e, into *entry, depth int) error {
	if e.value == "" {
		return e.errorf("include has a missing value")
	}
	if depth+1 > maxInclude {
		return e.errorf("include %s: files include each other more than %d deep", e.value, maxInclude)
	}
	pattern := e.value
	if !filepath.IsAbs(pattern) {
		pattern = filepath.Join(filepath.Dir(e.file), pattern)
	}
	hits, err := p.fs.glob(pattern)
	if err != nil {
		return e.errorf("include %s: %v", e.value, err)
	}
	if len(hits) == 0 && !strings.ContainsAny(pattern, "*?[") {
		return e.errorf("include %s: there is no such file", e.value)
	}
	slices.Sort(hits)
	for _, h := range hits {
		if err := p.file(h, into, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// uncomment cuts a line at its # unless that is escaped or in quotes.
func uncomment(s string) string {
	var b strings.Builder
	quoted := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\' && i+1 < len(s) && s[i+1] == '#':
			b.WriteByte('#')
			i++
		case c == '#' && !quoted:
			return b.String()
		default:
			if c == '"' {
				quoted = !quoted
			}
			b.WriteByte(c)
		}
	}
	return b.String()
}

func keyValue(s string) (key, value string) {
	s = strings.TrimSpace(s)
	i := strings.IndexAny(s, " \t=")
	if i < 0 {
		return s, ""
	}
	key, value = s[:i], strings.TrimSpace(s[i:])
	value = strings.TrimSpace(strings.TrimPrefix(value, "="))
	if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
		value = value[1 : len(value)-1]
	}
	return key, value
}

// conf is a targets.conf that was understood.
type conf struct {
	ignoreErrors bool
	driver       bool // default-driver stands there
	controlPort  string
	incoming     [][2]string // of discovery: name and secret
	outgoing     *[2]string
	targets      []*confTarget
}

type confTarget struct {
	at         *entry
	iqn        string
	tid        int // 0: the next free
	luns       []*confLUN
	incoming   [][2]string
	outgoing   *[2]string
	addresses  []string
	names      []string
	params     [][2]string // of the target
	allowInUse bool
}

type confLUN struct {
	at     *entry
	path   string
	number int // -1: the next free
	block  string
	bstype string
	bsopts string
	flags  string
	device string
	params [][2]string // in order
	more   []string    // of "params": handed over as they stand
	cache  *bool
}

// Directives of a LUN that are handed to --op update --params, and those of a
// target that are negotiation limits.
var (
	lunParams = []string{"scsi_id", "scsi_sn", "vendor_id", "product_id", "product_rev", "sense_format", "removable", "online", "mode_page", "readonly",
		"lbppbe", "la_lba", "optimal_xfer_gran", "optimal_xfer_len", "thin_provisioning", "rotation_rate", "path"}
	targetParams = []string{"MaxRecvDataSegmentLength", "MaxXmitDataSegmentLength", "HeaderDigest", "DataDigest", "InitialR2T", "MaxOutstandingR2T", "ImmediateData",
		"FirstBurstLength", "MaxBurstLength", "DataPDUInOrder", "DataSequenceInOrder", "ErrorRecoveryLevel", "IFMarker", "OFMarker", "DefaultTime2Wait",
		"DefaultTime2Retain", "OFMarkInt", "IFMarkInt", "MaxConnections", "nop_interval", "nop_count", "MaxQueueCmd", "state"}
)

func userSecret(e *entry) ([2]string, error) {
	f := strings.Fields(e.value)
	if len(f) != 2 {
		// Never the value: it may hold a secret.
		return [2]string{}, e.errorf("%s: a name and a secret are needed", e.key)
	}
	return [2]string{f[0], f[1]}, nil
}

func yesValue(e *entry) (bool, error) {
	switch strings.ToLower(e.value) {
	case "yes", "on", "1":
		return true, nil
	case "no", "off", "0":
		return false, nil
	}
	return false, e.errorf("%s %s: yes or no is possible", e.key, e.value)
}

// once refuses a second one, in the real tool's words.
type once map[string]bool

func (o once) see(e *entry) error {
	if o[e.key] {
		return e.errorf("Multiple '%s' definitions not allowed!", e.key)
	}
	o[e.key] = true
	return nil
}

func understand(entries []*entry) (*conf, error) {
	c := &conf{}
	seen := once{}
	names := map[string]bool{}
	for _, e := range entries {
		var err error
		if !e.block && e.value == "" {
			return nil, e.errorf("Option %s has a missing value!", e.key)
		}
		if e.block != (e.key == "target") {
			return nil, e.errorf("unknown directive %q; what belongs to a target stands between <target IQN> and </target>", e.key)
		}
		switch e.key {
		case "target":
			t, terr := understandTarget(e)
			if terr != nil {
				return nil, terr
			}
			if names[t.iqn] {
				return nil, e.errorf("target %s is defined twice", t.iqn)
			}
			names[t.iqn] = true
			c.targets = append(c.targets, t)
		case "default-driver":
			c.driver = true
			if err = seen.see(e); err == nil && e.value != "iscsi" {
				err = e.errorf("default-driver %s: only iscsi is served", e.value)
			}
		case "ignore-errors":
			c.ignoreErrors, err = yesValue(e)
		case "control-port":
			if err = seen.see(e); err == nil {
				if _, nerr := strconv.ParseUint(e.value, 10, 15); nerr != nil {
					err = e.errorf("control-port %s: a number is needed", e.value)
				}
			}
			c.controlPort = e.value
		case "incomingdiscoveryuser":
			var u [2]string
			u, err = userSecret(e)
			c.incoming = append(c.incoming, u)
		case "outgoingdiscoveryuser":
			if err = seen.see(e); err == nil {
				var u [2]string
				u, err = userSecret(e)
				c.outgoing = &u
			}
		case "iSNSServerIP", "iSNSServerPort", "iSNSAccessControl":
			err = seen.see(e) // of no use while iSNS is off
		case "iSNS":
			if on, yerr := yesValue(e); yerr != nil || on {
				err = e.errorf("iSNS %s: there is no iSNS client yet", e.value)
			}
		default:
			err = e.errorf("unknown directive %q", e.key)
		}
		if err != nil {
			return nil, err
		}
	}
	// tgt-admin takes them by name, and that decides about their numbers.
	slices.SortStableFunc(c.targets, func(a, b *confTarget) int { return strings.Compare(a.iqn, b.iqn) })
	return c, nil
}

func understandTarget(at *entry) (*confTarget, error) {
	t := &confTarget{at: at, iqn: at.value}
	if !isName(t.iqn) {
		return nil, at.errorf("target %q: iqn.YYYY-MM.reversed.domain[:string] is needed", t.iqn)
	}
	seen := once{}
	var defaults []*entry // LUN directives outside of a LUN's block count for all
	for _, e := range at.sub {
		var err error
		if !e.block && e.value == "" {
			return nil, e.errorf("Option %s has a missing value! Check your config file for errors (target: %s)", e.key, t.iqn)
		}
		if e.block && e.key != "backing-store" && e.key != "direct-store" {
			return nil, e.errorf("unknown block <%s>", e.key)
		}
		switch e.key {
		case "backing-store", "direct-store":
			l := &confLUN{at: e, path: e.value, number: -1}
			if l.path == "" {
				return nil, e.errorf("Option %s has a missing value! Check your config file for errors (target: %s)", e.key, t.iqn)
			}
			lseen := once{}
			for _, x := range e.sub {
				if err := l.set(x, lseen); err != nil {
					return nil, err
				}
			}
			t.luns = append(t.luns, l)
		case "driver":
			if err = seen.see(e); err == nil && e.value != "iscsi" {
				err = e.errorf("driver %s: only iscsi is served", e.value)
			}
		case "incominguser":
			var u [2]string
			u, err = userSecret(e)
			t.incoming = append(t.incoming, u)
		case "outgoinguser":
			if err = seen.see(e); err == nil {
				var u [2]string
				u, err = userSecret(e)
				t.outgoing = &u
			}
		case "initiator-address":
			t.addresses = append(t.addresses, strings.Fields(e.value)...)
		case "initiator-name":
			t.names = append(t.names, strings.Fields(e.value)...)
		case "controller_tid":
			if err = seen.see(e); err == nil {
				n, nerr := strconv.ParseUint(e.value, 10, 31)
				if nerr != nil || n == 0 {
					err = e.errorf("controller_tid %s: a number from 1 on is needed", e.value)
				}
				t.tid = int(n)
			}
		case "allow-in-use":
			if err = seen.see(e); err == nil {
				t.allowInUse, err = yesValue(e)
			}
		default:
			switch {
			case slices.Contains(targetParams, e.key):
				err = seen.see(e)
				t.params = append(t.params, [2]string{e.key, e.value})
			case isLUNDirective(e.key):
				defaults = append(defaults, e)
			default:
				err = e.errorf("unknown directive %q in target %s", e.key, t.iqn)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	// tgt-admin numbers stores by path, backing-store before direct-store: initiators
	// must find the same disk under a number.
	slices.SortStableFunc(t.luns, func(a, b *confLUN) int {
		return cmp.Or(strings.Compare(a.at.key, b.at.key), strings.Compare(a.path, b.path))
	})
	numbers := map[int]bool{}
	for _, l := range t.luns {
		lseen := once{}
		for _, e := range defaults {
			if l.has(e.key) || e.key == "lun" {
				continue
			}
			if err := l.set(e, lseen); err != nil {
				return nil, err
			}
		}
		if l.number >= 0 {
			if numbers[l.number] {
				return nil, l.at.errorf("LUN %d is given twice", l.number)
			}
			numbers[l.number] = true
		}
	}
	next := 1
	for _, l := range t.luns {
		if l.number >= 0 {
			continue
		}
		for numbers[next] {
			next++
		}
		l.number, numbers[next] = next, true
	}
	return t, nil
}

func isLUNDirective(k string) bool {
	return slices.Contains(lunParams, k) || slices.Contains([]string{"write-cache", "params", "device-type", "bs-type", "bsopts", "bsoflags", "block-size", "lun"}, k)
}

// has tells whether the LUN's own block says k.
func (l *confLUN) has(k string) bool {
	return slices.ContainsFunc(l.at.sub, func(e *entry) bool { return e.key == k })
}

func (l *confLUN) set(e *entry, seen once) error {
	if e.block || e.value == "" {
		return e.errorf("Option %s has a missing value!", e.key)
	}
	if e.key != "mode_page" && e.key != "params" {
		if err := seen.see(e); err != nil {
			return err
		}
	}
	switch e.key {
	case "write-cache":
		on, err := yesValue(e)
		l.cache = &on
		return err
	case "lun":
		n, err := strconv.ParseUint(e.value, 10, 15)
		if err != nil || n > 16383 || n == 0 {
			return e.errorf("lun %s: 1 to 16383 is possible", e.value)
		}
		l.number = int(n)
	case "block-size":
		if e.value != "512" && e.value != "4096" {
			return e.errorf("block-size %s: 512 or 4096 is possible", e.value)
		}
		l.block = e.value
	case "bs-type":
		l.bstype = e.value
	case "bsopts":
		l.bsopts = e.value
	case "bsoflags":
		l.flags = e.value
	case "device-type":
		l.device = e.value
	case "params":
		if _, err := params(e.value); err != nil {
			return e.errorf("params %s: NAME=VALUE is needed", e.value)
		}
		l.more = append(l.more, e.value)
	default:
		if !slices.Contains(lunParams, e.key) {
			return e.errorf("unknown directive %q", e.key)
		}
		if strings.ContainsAny(e.value, ",") && e.key != "mode_page" {
			return e.errorf("%s %s: a comma is not possible", e.key, e.value)
		}
		l.params = append(l.params, [2]string{e.key, e.value})
	}
	return nil
}
