package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/env"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

// Config is what a Runner needs. The zero value of each field has a meaning.
type Config struct {
	// Node is the name of the node that the runner runs on. It never fences it,
	// and only it is unfenced here.
	Node string
	// Dirs are searched for agents, in order; nil means the system's folders.
	// $PATH is not used: who may change it could choose what fences.
	Dirs []string
	// Clock; nil is the machine's.
	Clock env.Clock
}

// DefaultDirs hold the agents of Debian and of administrators.
var DefaultDirs = []string{"/usr/local/sbin", "/usr/sbin", "/sbin"}

// DefaultTimeout is Pacemaker's stonith-timeout. Metadata takes an agent's start
// and no device, so it gets less.
const (
	DefaultTimeout  = 60 * time.Second
	metadataTimeout = 20 * time.Second
)

// Runner runs agents. It may be used by many goroutines.
type Runner struct {
	cfg Config

	mu    sync.Mutex
	cache map[string]cached // by path
}

type cached struct {
	mtime time.Time
	size  int64
	meta  *Metadata
}

// New makes a runner. It starts nothing and holds nothing open.
func New(cfg Config) *Runner {
	if cfg.Dirs == nil {
		cfg.Dirs = DefaultDirs
	}
	if cfg.Clock == nil {
		cfg.Clock = env.Real{}
	}
	return &Runner{cfg: cfg, cache: map[string]cached{}}
}

// Request is one run of one agent.
type Request struct {
	Agent  string // fence_ipmilan
	Action Action // required
	// Target is the node that is meant. Needed for off, on, reboot and status of
	// one node; sent as nodename=.
	Target string
	// Plug is how the device calls the node; empty means Target. Sent as plug= or
	// port=, whichever the agent advertises, unless Params already has it.
	Plug string
	// Params are the options of the device and of the node's use of it, in any
	// spelling. action and option are not options: Action is.
	Params map[string]string
	// Delay before the action, so that of two nodes that fence each other one is
	// later. Sent as delay= where the agent has it, else waited for here.
	Delay time.Duration
	// Timeout of the run without the delay; 0 is DefaultTimeout.
	Timeout time.Duration
}

// Power is what an agent says of a plug.
type Power string

// The states. A fabric agent's on and off mean access to storage.
const (
	PowerUnknown Power = "unknown"
	PowerOn      Power = "on"
	PowerOff     Power = "off"
)

// Result is what came of a run. Only Outcome says whether it succeeded.
type Result struct {
	Outcome  fencing.Outcome // OK, Failed or TimedOut
	ExitCode int             // -1 when it was killed or did not start
	// Power is set by status and monitor: exit status 2 says that the device
	// answers and that the plug is off.
	Power Power
	// Output is the end of both output streams, at most MaxOutput bytes, secrets
	// masked.
	Output string
	// Why is one line for people, empty when it succeeded.
	Why  string
	Took time.Duration
	// Notes of Metadata.Resolve.
	Notes []string
	// Cancelled: the context ended, and Outcome is Failed. Whoever cancelled
	// knows why; a node whose lease ends does.
	Cancelled bool
}

// OK tells whether the action is known to be done.
func (r Result) OK() bool { return r.Outcome == fencing.OK }

// End makes the record that closes an attempt in the replicated history.
func (r Result) End(attempt uint64, now time.Time) fencing.FenceEnd {
	out := r.Output
	if r.Why != "" {
		out = r.Why + "\n" + out
	}
	if len(out) > fencing.MaxOutput {
		out = strings.ToValidUTF8(out[:fencing.MaxOutput], "")
	}
	return fencing.FenceEnd{Now: now, Attempt: attempt, Outcome: r.Outcome, ExitCode: r.ExitCode, Output: out}
}

// Refusals, all before anything is started.
var (
	ErrNotFound      = errors.New("fence agent is not installed")
	ErrNoAction      = errors.New("no action is given: an agent would reboot the node")
	ErrNotAdvertised = errors.New("fence agent does not advertise the action")
	ErrSelf          = errors.New("a node does not fence itself")
	ErrOnTarget      = errors.New("must run on the node itself")
	ErrParam         = errors.New("bad option")
)

func refuse(kind fsm.ErrKind, q Request, err error, next string) error {
	return &refusal{&fsm.Error{Kind: kind, Op: strings.TrimSpace("run " + q.Agent + " " + string(q.Action)), Object: q.Target, Why: err.Error(), Next: next}, err}
}

// refusal has the exit code of its kind and is the sentinel that it wraps.
type refusal struct {
	kind  *fsm.Error
	cause error
}

func (r *refusal) Error() string   { return r.kind.Error() }
func (r *refusal) Unwrap() []error { return []error{r.kind, r.cause} }

var agentName = regexp.MustCompile(`^fence_[A-Za-z0-9_.-]+$`)

// Find gives the path of an agent.
func (r *Runner) Find(name string) (string, error) {
	if !agentName.MatchString(name) {
		return "", fmt.Errorf("%w: %q is no name of an agent (fence_…)", ErrNotFound, name)
	}
	for _, d := range r.cfg.Dirs {
		p := filepath.Join(d, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: %s is in none of %s", ErrNotFound, name, strings.Join(r.cfg.Dirs, ", "))
}

// Installed lists the agents that can be run, sorted.
func (r *Runner) Installed() ([]string, error) {
	seen := map[string]bool{}
	for _, d := range r.cfg.Dirs {
		l, err := os.ReadDir(d)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list fence agents: %w", err)
		}
		for _, e := range l {
			if _, err := r.Find(e.Name()); agentName.MatchString(e.Name()) && err == nil {
				seen[e.Name()] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

// Metadata runs the agent for its metadata, or gives what is known since the
// program last changed.
func (r *Runner) Metadata(ctx context.Context, name string) (*Metadata, error) {
	path, err := r.Find(name)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("metadata of %s: %w", name, err)
	}
	r.mu.Lock()
	c, ok := r.cache[path]
	r.mu.Unlock()
	if ok && c.mtime.Equal(st.ModTime()) && c.size == st.Size() {
		return c.meta, nil
	}
	in, err := input(GetMetadata, nil)
	if err != nil {
		return nil, err
	}
	out := &whole{max: maxMetadata}
	// A wrapper may add its own words on stderr; only stdout is the document.
	x, err := execute(ctx, r.cfg.Clock, path, in, metadataTimeout, out, newTail(nil))
	if err != nil {
		return nil, fmt.Errorf("metadata of %s: %w", name, err)
	}
	if x.outcome != fencing.OK || x.exit != 0 {
		return nil, fmt.Errorf("metadata of %s: %w: %s", name, ErrMetadata, x.why)
	}
	b, over := out.bytes()
	if over {
		return nil, fmt.Errorf("metadata of %s: %w: more than %d bytes", name, ErrMetadata, maxMetadata)
	}
	m, err := ParseMetadata(b)
	if err != nil {
		return nil, fmt.Errorf("metadata of %s: %w", name, err)
	}
	if m.Name == "" {
		m.Name = name
	}
	r.mu.Lock()
	r.cache[path] = cached{st.ModTime(), st.Size(), m}
	r.mu.Unlock()
	return m, nil
}

// Run runs one action. An error is a refusal, or a failure of this machine,
// before the agent was started; afterwards everything is in the result. When ctx
// ends, the agent and its children are killed and the result is Failed and
// Cancelled.
func (r *Runner) Run(ctx context.Context, q Request) (Result, error) {
	res, _, err := r.run(ctx, q, 0)
	return res, err
}

func (r *Runner) run(ctx context.Context, q Request, keep int) (Result, []byte, error) {
	path, in, p, err := r.prepare(ctx, q)
	if err != nil {
		return Result{}, nil, err
	}
	timeout := q.Timeout
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	start := r.cfg.Clock.Now()
	if p.waitHere > 0 {
		if err := r.cfg.Clock.Sleep(ctx, p.waitHere); err != nil {
			_ = in.Close() // a memfd that nobody has read
			return Result{Outcome: fencing.Failed, ExitCode: -1, Power: PowerUnknown, Cancelled: true,
				Why: q.Agent + " was not started: " + context.Cause(ctx).Error(), Took: r.cfg.Clock.Now().Sub(start), Notes: p.notes}, nil, nil
		}
	}
	secrets := p.secrets
	t := newTail(secrets)
	var out *whole
	if keep > 0 {
		out = &whole{max: keep}
	}
	x, err := execute(ctx, r.cfg.Clock, path, in, timeout+p.delay, out, t)
	if err != nil {
		return Result{}, nil, fmt.Errorf("run %s %s: %w", q.Agent, q.Action, err)
	}
	res := Result{Outcome: x.outcome, ExitCode: x.exit, Power: PowerUnknown, Output: t.String(), Why: hide(x.why, 0, secrets),
		Took: r.cfg.Clock.Now().Sub(start), Notes: p.notes, Cancelled: x.cancelled}
	if q.Action == Status || q.Action == Monitor {
		// FenceAgentAPI: 0 is on, 2 is "reachable and off", everything else says nothing.
		switch {
		case x.outcome == fencing.OK && q.Action == Status:
			res.Power = PowerOn
		case x.exit == 2 && x.outcome == fencing.Failed:
			res.Outcome, res.Power, res.Why = fencing.OK, PowerOff, ""
		}
	}
	var b []byte
	if out != nil {
		var over bool
		if b, over = out.bytes(); over {
			return res, nil, fmt.Errorf("run %s %s: more than %d bytes of output", q.Agent, q.Action, keep)
		}
	}
	return res, b, nil
}

type prepared struct {
	notes    []string
	secrets  []string
	delay    time.Duration // that the agent waits
	waitHere time.Duration
}

// prepare checks a request and builds the agent's input.
func (r *Runner) prepare(ctx context.Context, q Request) (path string, in *os.File, p prepared, err error) {
	if q.Action == "" {
		return "", nil, p, refuse(fsm.KindInvalid, q, ErrNoAction, "")
	}
	if path, err = r.Find(q.Agent); err != nil {
		return "", nil, p, refuse(fsm.KindNotFound, q, err, "install the package fence-agents")
	}
	m, err := r.Metadata(ctx, q.Agent)
	if err != nil {
		return "", nil, p, err
	}
	info, ok := m.Action(q.Action)
	if !ok {
		var has []string
		for _, a := range m.Actions {
			has = append(has, string(a.Name))
		}
		return "", nil, p, refuse(fsm.KindInvalid, q, fmt.Errorf("%w; it has %s", ErrNotAdvertised, strings.Join(has, ", ")), "")
	}
	switch q.Action {
	case Off, Reboot:
		if q.Target == "" {
			return "", nil, p, refuse(fsm.KindInvalid, q, fmt.Errorf("%w: no target", ErrParam), "")
		}
		if r.cfg.Node != "" && q.Target == r.cfg.Node {
			return "", nil, p, refuse(fsm.KindRefused, q, ErrSelf, "")
		}
	}
	if info.OnTarget && q.Target != r.cfg.Node {
		return "", nil, p, refuse(fsm.KindInvalid, q, fmt.Errorf("%s of %s %w, and this is %s", q.Action, q.Agent, ErrOnTarget, r.cfg.Node), "")
	}
	params, notes, err := m.Resolve(q.Params)
	if err != nil {
		return "", nil, p, refuse(fsm.KindInvalid, q, fmt.Errorf("%w: %w", ErrParam, err), "")
	}
	p.notes = notes
	if a, ok := params["action"]; ok {
		if Action(a) != q.Action {
			return "", nil, p, refuse(fsm.KindInvalid, q, fmt.Errorf("%w: action=%s among the options, and %s is asked for", ErrParam, a, q.Action), "")
		}
		delete(params, "action")
	}
	if q.Target != "" {
		params["nodename"] = q.Target
		plug := q.Plug
		if plug == "" {
			plug = q.Target
		}
		for _, n := range []string{"plug", "port"} {
			if n = m.Spelling(n); m.Knows(n) {
				if _, set := params[n]; !set || q.Plug != "" {
					params[n] = plug
				}
				break
			}
		}
	}
	if q.Delay > 0 {
		if m.Knows("delay") {
			params["delay"] = strconv.Itoa(int(math.Ceil(q.Delay.Seconds())))
		} else {
			p.waitHere = q.Delay
		}
	}
	if s, ok := params["delay"]; ok {
		// A configured delay must not eat the time limit.
		n, err := strconv.ParseFloat(s, 64)
		if err != nil || n < 0 || n > 3600 {
			return "", nil, p, refuse(fsm.KindInvalid, q, fmt.Errorf("%w: delay=%q: seconds from 0 to 3600 are needed", ErrParam, s), "")
		}
		p.delay = time.Duration(n * float64(time.Second))
	}
	for k, v := range params {
		if Secret(k) {
			p.secrets = append(p.secrets, v)
		}
	}
	if in, err = input(q.Action, params); err != nil {
		return "", nil, p, refuse(fsm.KindInvalid, q, err, "")
	}
	return path, in, p, nil
}

// Plug is a line of list or list-status.
type Plug struct {
	ID    string
	Alias string
	Power Power
}

// List asks the device for its plugs. With status it also asks for their power,
// where the agent advertises that.
func (r *Runner) List(ctx context.Context, q Request, status bool) ([]Plug, Result, error) {
	q.Action, q.Target, q.Plug = List, "", ""
	if status {
		q.Action = ListStatus
	}
	res, out, err := r.run(ctx, q, 1<<20)
	if err != nil || !res.OK() {
		return nil, res, err
	}
	sep := q.Params["separator"]
	if sep == "" {
		sep = ","
	}
	return parseList(string(out), sep, status), res, nil
}

func parseList(s, sep string, status bool) []Plug {
	var out []Plug
	for line := range strings.Lines(s) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		p := Plug{Power: PowerUnknown}
		rest := ""
		p.ID, rest, _ = strings.Cut(line, sep)
		p.Alias = rest
		if status {
			if i := strings.LastIndex(rest, sep); i >= 0 {
				p.Alias = rest[:i]
				switch strings.ToLower(strings.TrimSpace(rest[i+len(sep):])) {
				case "on":
					p.Power = PowerOn
				case "off":
					p.Power = PowerOff
				}
			}
		}
		out = append(out, p)
	}
	return out
}

// Unfence runs "on" for this node on the devices whose agents ask for it
// (automatic or on_target in their metadata), in order, and stops at the first
// that fails. Devices whose agents do not are skipped. Target and Action of each
// request are set here.
func (r *Runner) Unfence(ctx context.Context, devices []Request) ([]Result, error) {
	var out []Result
	for _, q := range devices {
		m, err := r.Metadata(ctx, q.Agent)
		if err != nil {
			return out, fmt.Errorf("unfence %s: %w", r.cfg.Node, err)
		}
		if must, _ := m.Unfences(); !must {
			continue
		}
		q.Action, q.Target = On, r.cfg.Node
		res, err := r.Run(ctx, q)
		if err != nil {
			return out, fmt.Errorf("unfence %s: %w", r.cfg.Node, err)
		}
		out = append(out, res)
		if !res.OK() {
			return out, fmt.Errorf("unfence %s: %s: %s", r.cfg.Node, q.Agent, res.Why)
		}
	}
	return out, nil
}
