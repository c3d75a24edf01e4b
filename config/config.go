// Package config is clusterd's configuration file: one commented struct, its
// defaults and its validation. Unknown keys are errors and every error names the
// line. After a node is a member, what the cluster must agree on (targets,
// volumes, ACLs, members) is in the FSM and not here; this file says only what a
// node is and where it listens.
//
// It imports nothing of ours.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Config is the whole file. The comment of a field becomes its comment in
// `clusterd --print-default-config`.
type Config struct {
	Name    string `toml:"name" comment:"The node's name: 1 to 63 of a-z 0-9 . _ -. Must be unique in the cluster and never change. Empty: the host's name."`
	DataDir string `toml:"data_dir" comment:"Raft log, keys and certificates, leases. Belongs to one node only; never copy it to another."`
	RunDir  string `toml:"run_dir" comment:"Sockets and pid files."`
	Profile string `toml:"profile" comment:"How fast a failure is noticed: fast (node lease 1 s), normal (2 s) or wan (10 s). The same on every node."`

	Listen   Listen   `toml:"listen" comment:"Addresses. HOST may be empty (all); then advertise says what others use."`
	Roles    Roles    `toml:"roles" comment:"What this node does."`
	Storage  Storage  `toml:"storage" comment:"Local copies of volumes."`
	ISCSI    ISCSI    `toml:"iscsi" comment:"The target's side of a connection."`
	Fence    Fence    `toml:"fence" comment:"Stopping nodes that are lost."`
	Lease    Lease    `toml:"lease" comment:"Times that the profile sets; change them only with a reason."`
	Log      Log      `toml:"log" comment:"Logging."`
	Priority Priority `toml:"priority" comment:"Scheduling of the control process: it must run when everything else is busy."`
}

// Listen holds the addresses of a node.
type Listen struct {
	Advertise string   `toml:"advertise" comment:"Address by which other nodes reach this one (IP or name, no port). Empty: the host part of api, or the first global address."`
	API       string   `toml:"api" comment:"Admin API (HTTP/JSON over mTLS) and joining."`
	Raft      string   `toml:"raft" comment:"Raft and lease streams (mTLS)."`
	Gossip    string   `toml:"gossip" comment:"memberlist, TCP and UDP; hints only."`
	ISCSI     []string `toml:"iscsi" comment:"Portals of the iSCSI target."`
}

// Roles says what a node does.
type Roles struct {
	Storage bool `toml:"storage" comment:"Keeps copies of volumes and serves them."`
	Host    bool `toml:"host" comment:"Uses LUNs: initiator, locks, filesystems, services."`
	Voter   bool `toml:"voter" comment:"May vote. 3 or 5 voters are chosen from the nodes that may."`
	Witness bool `toml:"witness" comment:"A vote and nothing else; excludes storage and host."`
}

// Storage is where copies lie.
type Storage struct {
	Dir   string `toml:"dir" comment:"Folder of the volumes' files. Empty: data_dir/volumes."`
	Cache string `toml:"cache" comment:"direct (O_DIRECT, default), sync (direct, and durable before status) or buffered (page cache)."`
}

// ISCSI holds the defaults of sessions.
type ISCSI struct {
	InitiatorName string   `toml:"initiator_name" comment:"This node's own initiator name. Empty: made from its name and the cluster's."`
	IQNPrefix     string   `toml:"iqn_prefix" comment:"Prefix of targets created by a short name."`
	NopInterval   Duration `toml:"nop_interval" comment:"NOP-In ping of idle and busy connections."`
	NopTimeout    Duration `toml:"nop_timeout" comment:"A connection that does not answer a ping for so long is reset and its unread bytes are discarded."`
}

// Fence says what the node may assume and run when it fences another.
type Fence struct {
	AgentDirs     []string `toml:"agent_dirs" comment:"Folders of fence agents (programs called fence_*), in order. $PATH is not used."`
	AssumeNoPause bool     `toml:"assume_no_pause" comment:"No node is a virtual machine, or can stop without noticing. Then a target whose lease is over by long counts as silent; otherwise only its own word, a fence agent or an operator counts."`
}

// Lease overrides the profile's times. Zero values mean the profile's.
type Lease struct {
	TTL     Duration `toml:"ttl" comment:"Node lease. 0: by profile."`
	TOrphan Duration `toml:"t_orphan" comment:"How long a target goes on without a node lease, where its other copies allow it. More than a control restart or an election takes."`
	Renew   Duration `toml:"renew" comment:"Interval of renewals. 0: by profile (a tenth of the lease)."`
}

// Log says what is logged.
type Log struct {
	Level  string `toml:"level" comment:"debug, info, warn or error."`
	Format string `toml:"format" comment:"console or json."`
}

// Priority raises the control process.
type Priority struct {
	Nice int  `toml:"nice" comment:"-20 to 0; tried, and a refusal is logged once."`
	RR   bool `toml:"rr" comment:"SCHED_RR priority 10 where the system allows it."`
}

// Duration is a time in Go's notation ("250ms", "2s").
type Duration time.Duration

// UnmarshalText parses a duration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is no duration: write it as 250ms, 2s or 1m30s", string(b))
	}
	*d = Duration(v)
	return nil
}

// MarshalText prints a duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// D is the duration as the standard library's type.
func (d Duration) D() time.Duration { return time.Duration(d) }

// Times are the intervals that follow from the profile and its overrides.
type Times struct {
	TTL       time.Duration // node lease
	Renew     time.Duration // interval of renewals
	TOrphan   time.Duration // storage without a node lease
	Heartbeat time.Duration // Raft heartbeat and election timeout
}

// Times gives the effective intervals.
func (c *Config) Times() Times {
	t := Times{TTL: 2 * time.Second, Heartbeat: 500 * time.Millisecond}
	switch c.Profile {
	case "fast":
		t = Times{TTL: time.Second, Heartbeat: 200 * time.Millisecond}
	case "wan":
		t = Times{TTL: 10 * time.Second, Heartbeat: 2 * time.Second}
	}
	if c.Lease.TTL != 0 {
		t.TTL = c.Lease.TTL.D()
	}
	t.Renew = t.TTL / 10
	if c.Lease.Renew != 0 {
		t.Renew = c.Lease.Renew.D()
	}
	t.TOrphan = c.Lease.TOrphan.D()
	return t
}

// Default is the configuration of an empty file.
func Default() Config {
	return Config{
		DataDir: "/var/lib/blockhouse",
		RunDir:  "/run/blockhouse",
		Profile: "normal",
		Listen: Listen{API: ":7420", Raft: ":7421", Gossip: ":7422",
			ISCSI: []string{":3260"}},
		Roles:   Roles{Storage: true, Host: true, Voter: true},
		Storage: Storage{Cache: "direct"},
		ISCSI: ISCSI{IQNPrefix: "iqn.2026-11.io.blockhouse",
			NopInterval: Duration(time.Second), NopTimeout: Duration(time.Second)},
		Fence:    Fence{AgentDirs: []string{"/usr/local/sbin", "/usr/sbin", "/sbin"}},
		Lease:    Lease{TOrphan: Duration(10 * time.Second)},
		Log:      Log{Level: "info", Format: "console"},
		Priority: Priority{Nice: -15},
	}
}

// Socket is the path of the local API.
func (c *Config) Socket() string { return filepath.Join(c.RunDir, "clusterd.sock") }

// VolumeDir is where the files of volumes lie.
func (c *Config) VolumeDir() string {
	if c.Storage.Dir != "" {
		return c.Storage.Dir
	}
	return filepath.Join(c.DataDir, "volumes")
}

// RoleNames lists the roles that are on, sorted as in status.
func (c *Config) RoleNames() []string {
	var r []string
	for _, e := range []struct {
		on   bool
		name string
	}{{c.Roles.Voter, "voter"}, {c.Roles.Storage, "storage"}, {c.Roles.Host, "host"}, {c.Roles.Witness, "witness"}} {
		if e.on {
			r = append(r, e.name)
		}
	}
	return r
}

// Error is one fault of a file.
type Error struct {
	File string
	Line int // 0: unknown
	Key  string
	Msg  string
}

func (e *Error) Error() string {
	s := e.File
	if e.Line > 0 {
		s += ":" + strconv.Itoa(e.Line)
	}
	if e.Key != "" {
		s += ": " + e.Key
	}
	return s + ": " + e.Msg
}

// Load reads, checks and completes a file. The error joins every fault that was
// found, each with its line.
func Load(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(path, b)
}

// Parse is Load for bytes; file names them in errors.
func Parse(file string, b []byte) (Config, error) {
	c := Default()
	md, err := toml.NewDecoder(bytes.NewReader(b)).Decode(&c)
	if err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return Config{}, &Error{File: file, Line: pe.Position.Line, Key: pe.LastKey, Msg: pe.Message}
		}
		if m := typeRE.FindStringSubmatch(err.Error()); m != nil {
			n, _ := strconv.Atoi(m[1])
			return Config{}, &Error{File: file, Line: n, Key: m[2], Msg: m[3]}
		}
		return Config{}, fmt.Errorf("%s: %w", file, err)
	}
	lines := keyLines(b)
	var errs []error
	for _, k := range md.Undecoded() {
		key := k.String()
		msg := "unknown key"
		if s := nearest(key); s != "" {
			msg += "; did you mean " + s + "?"
		}
		errs = append(errs, &Error{File: file, Line: lines[key], Key: key, Msg: msg})
	}
	if c.Name == "" {
		if h, err := os.Hostname(); err == nil {
			c.Name, _, _ = strings.Cut(strings.ToLower(h), ".")
		}
	}
	for _, e := range c.check() {
		e.File, e.Line = file, lines[e.Key]
		errs = append(errs, e)
	}
	if len(errs) > 0 {
		return Config{}, errors.Join(errs...)
	}
	return c, nil
}

// nameRE is members.ValidName: a name stands in certificates and lock tables.
var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// Validate says what is wrong with a configuration that was not read from a file.
func (c *Config) Validate() error {
	var errs []error
	for _, e := range c.check() {
		e.File = "configuration"
		errs = append(errs, e)
	}
	return errors.Join(errs...)
}

func (c *Config) check() (errs []*Error) {
	bad := func(key, format string, a ...any) {
		errs = append(errs, &Error{Key: key, Msg: fmt.Sprintf(format, a...)})
	}
	if !nameRE.MatchString(c.Name) {
		bad("name", "%q: 1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit", c.Name)
	}
	for _, p := range []struct{ key, v string }{{"data_dir", c.DataDir}, {"run_dir", c.RunDir}} {
		if !filepath.IsAbs(p.v) {
			bad(p.key, "%q is no absolute path", p.v)
		}
	}
	if c.Storage.Dir != "" && !filepath.IsAbs(c.Storage.Dir) {
		bad("storage.dir", "%q is no absolute path", c.Storage.Dir)
	}
	// sun_path holds 108 bytes with its NUL.
	if n := len(filepath.Join(c.RunDir, "clusterd-storage.sock")); n > 107 {
		bad("run_dir", "too long by %d bytes for the name of a socket (107)", n-107)
	}
	oneOf := func(key, v string, of ...string) {
		for _, o := range of {
			if v == o {
				return
			}
		}
		bad(key, "%q: must be one of %s", v, strings.Join(of, ", "))
	}
	oneOf("profile", c.Profile, "fast", "normal", "wan")
	oneOf("storage.cache", c.Storage.Cache, "direct", "sync", "buffered")
	oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	oneOf("log.format", c.Log.Format, "console", "json")
	addr := func(key, v string) {
		h, p, err := net.SplitHostPort(v)
		if err != nil {
			bad(key, "%q is no HOST:PORT", v)
			return
		}
		if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
			bad(key, "%q: the port must be 1 to 65535", v)
		}
		if h != "" && net.ParseIP(h) == nil && !nameRE.MatchString(h) {
			bad(key, "%q: %q is neither an address nor a name", v, h)
		}
	}
	addr("listen.api", c.Listen.API)
	addr("listen.raft", c.Listen.Raft)
	addr("listen.gossip", c.Listen.Gossip)
	for _, a := range c.Listen.ISCSI {
		addr("listen.iscsi", a)
	}
	seen := map[string]string{}
	for _, l := range []struct{ key, v string }{{"listen.api", c.Listen.API}, {"listen.raft", c.Listen.Raft}, {"listen.gossip", c.Listen.Gossip}} {
		if o := seen[l.v]; o != "" {
			bad(l.key, "%q is taken by %s", l.v, o)
		}
		seen[l.v] = l.key
	}
	if c.Roles.Witness && (c.Roles.Storage || c.Roles.Host) {
		bad("roles.witness", "a witness has a vote and nothing else: set storage and host to false")
	}
	if c.Roles.Witness && !c.Roles.Voter {
		bad("roles.voter", "a witness must be a voter")
	}
	if c.Roles.Storage && len(c.Listen.ISCSI) == 0 {
		bad("listen.iscsi", "a storage node needs a portal")
	}
	if !c.Roles.Storage && !c.Roles.Host && !c.Roles.Voter {
		bad("roles.voter", "a node without any role does nothing")
	}
	t := c.Times()
	if t.TTL < 500*time.Millisecond || t.TTL > time.Minute {
		bad("lease.ttl", "%v: must be 500ms to 1m", t.TTL)
	}
	if t.Renew < 20*time.Millisecond || t.Renew > t.TTL/4 {
		bad("lease.renew", "%v: must be 20ms to a quarter of the lease (%v), so that a lost renewal costs nothing", t.Renew, t.TTL)
	}
	if t.TOrphan < 0 || t.TOrphan > 10*time.Minute {
		bad("lease.t_orphan", "%v: must be 0 to 10m", t.TOrphan)
	}
	if n := c.ISCSI.NopInterval.D(); n < 100*time.Millisecond || n > time.Minute {
		bad("iscsi.nop_interval", "%v: must be 100ms to 1m", n)
	}
	if n := c.ISCSI.NopTimeout.D(); n < 100*time.Millisecond || n > time.Minute {
		bad("iscsi.nop_timeout", "%v: must be 100ms to 1m", n)
	}
	if !strings.HasPrefix(c.ISCSI.IQNPrefix, "iqn.") {
		bad("iscsi.iqn_prefix", "%q: must begin with iqn.YYYY-MM.", c.ISCSI.IQNPrefix)
	}
	if c.Priority.Nice < -20 || c.Priority.Nice > 0 {
		bad("priority.nice", "%d: must be -20 to 0", c.Priority.Nice)
	}
	return errs
}

// typeRE matches the parser's errors about types, which are text only.
var typeRE = regexp.MustCompile(`^toml: line (\d+) \(last key "([^"]*)"\): (.*)$`)

var (
	tableRE = regexp.MustCompile(`^\s*\[\s*([A-Za-z0-9_.-]+)\s*\]`)
	keyRE   = regexp.MustCompile(`^\s*([A-Za-z0-9_.-]+)\s*=`)
)

// keyLines finds on which line each key stands. The parser gives positions only
// for syntax errors; tables and bare keys are all that our file uses.
func keyLines(b []byte) map[string]int {
	m := map[string]int{}
	table := ""
	for i, l := range strings.Split(string(b), "\n") {
		if t := tableRE.FindStringSubmatch(l); t != nil {
			table = t[1] + "."
			m[t[1]] = i + 1
		} else if k := keyRE.FindStringSubmatch(l); k != nil {
			m[table+k[1]] = i + 1
		}
	}
	return m
}
