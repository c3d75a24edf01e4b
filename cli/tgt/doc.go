// Package tgt is the faces of other targets' tools: tgtadm, tgt-admin and
// tgt-setup-lun of tgt, ietadm of iscsitarget. They take the command lines of
// tutorials and speak to clusterd through package api, so that what they make is
// the cluster's: a tid counts on every node, and nothing is lost at a restart.
//
// Outputs, texts and exit codes are the real tools'. Where they only say "invalid
// request", lines with "why:" follow on standard error. Differences that are
// meant stand in test/e2e/tgt/testdata/differences, each with its reason.
//
// cli imports it; it imports api.
package tgt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/verbs"
)

// IO is where a tool reads and writes, and whom it asks.
type IO struct {
	In       io.Reader // of tgt-setup-lun's question; nil: nobody answers
	Out, Err io.Writer
	Socket   string // of clusterd; empty: $BLOCKHOUSE_SOCKET or the package's
	zero     bool   // LUN 0 may be a disk: ietadm's; tgtadm has its controller there
}

// Exit codes of tgtadm.
const (
	exitInvalid  = 22  // EINVAL
	exitNoDaemon = 107 // ENOTCONN
)

const noDaemon = "failed to send request hdr to tgt daemon, Transport endpoint is not connected"

// session is one run of a tool.
type session struct {
	IO
	ctx  context.Context
	name string
	cl   *api.Client
	st   *api.Status
}

func newSession(ctx context.Context, name string, o IO) *session {
	if o.Socket == "" {
		o.Socket = os.Getenv(verbs.EnvSocket)
	}
	if o.Socket == "" {
		o.Socket = verbs.DefaultSocket
	}
	return &session{IO: o, ctx: ctx, name: name, cl: api.Dial(o.Socket)}
}

// timeout of a command; making a store takes the longest.
const timeout = 60 * time.Second

// failure is a refusal in the tool's own words, with the reason beneath.
type failure struct {
	text string // "can't find the target"
	code int
	why  error // nil: the text says all
}

func (f *failure) Error() string { return f.text }

func (f *failure) Unwrap() error { return f.why }

func fail(text string) error { return &failure{text: text, code: exitInvalid} }

func invalid(format string, a ...any) error {
	return &failure{"invalid request", exitInvalid, fmt.Errorf(format, a...)}
}

// texts gives the tool's words for codes of the API.
type texts map[api.Code]string

// refusal turns an error of the API into the tool's words.
func refusal(err error, t texts) error {
	if err == nil {
		return nil
	}
	e := api.AsError(err)
	if s, ok := t[e.Code]; ok {
		return fail(s)
	}
	return &failure{"invalid request", exitInvalid, err}
}

// report writes an error and gives the exit code.
func (s *session) report(err error) int {
	if err == nil {
		return 0
	}
	var u *usageError
	if errors.As(err, &u) {
		fmt.Fprintf(s.Err, "%s\nTry `%s --help' for more information.\n", u.text, s.name)
		return exitInvalid
	}
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{"invalid request", exitInvalid, err}
	}
	fmt.Fprintf(s.Err, "%s: %s\n", s.name, f.text)
	if f.why != nil {
		fmt.Fprintf(s.Err, "  why: %v\n", f.why)
		if e := api.AsError(f.why); e.Next != "" {
			fmt.Fprintf(s.Err, "  next: %s\n", e.Next)
		}
	}
	return f.code
}

// status is the cluster at the beginning of the run.
func (s *session) status() (*api.Status, error) {
	if s.st != nil {
		return s.st, nil
	}
	st, err := api.Get[api.Status](s.ctx, s.cl, api.PathStatus)
	if err != nil {
		if c := api.AsError(err).Code; c == api.CodeUnreachable || c == api.CodeDenied {
			return nil, &failure{noDaemon, exitNoDaemon, err}
		}
		return nil, refusal(err, nil)
	}
	if st.Health == api.HealthUninit {
		return nil, &failure{noDaemon, exitNoDaemon,
			api.Errorf(api.CodeNoQuorum, "clusteradm init NAME", "this node belongs to no cluster")}
	}
	s.st = &st
	return s.st, nil
}

func (s *session) target(tid int) (*api.Target, error) {
	st, err := s.status()
	if err != nil {
		return nil, err
	}
	for i := range st.Targets {
		if st.Targets[i].TID == tid {
			return &st.Targets[i], nil
		}
	}
	return nil, fail("can't find the target")
}

func findLUN(t *api.Target, n int) *api.LUN {
	for i := range t.LUNs {
		if t.LUNs[i].LUN == n {
			return &t.LUNs[i]
		}
	}
	return nil
}

func (s *session) volume(name string) *api.Volume {
	for i := range s.st.Volumes {
		if s.st.Volumes[i].Name == name {
			return &s.st.Volumes[i]
		}
	}
	return nil
}

func (s *session) printf(format string, a ...any) { fmt.Fprintf(s.Out, format, a...) }

func (s *session) warn(format string, a ...any) {
	fmt.Fprintf(s.Err, "%s: warning: %s\n", s.name, fmt.Sprintf(format, a...))
}

// Face is a name under which clusteradm serves one of the tools.
type Face struct {
	Name, Short string
	Main        func(ctx context.Context, args []string, o IO) int
}

// Faces are the names.
func Faces() []Face {
	return []Face{
		{"tgtadm", "tgt's: targets, LUNs, accounts by number", Tgtadm},
		{"tgt-admin", "tgt's: make what targets.conf says, and print it", Admin},
		{"tgt-setup-lun", "tgt's: a target with one disk in one command", SetupLUN},
		{"ietadm", "iscsitarget's: the same by its words, and ietd.conf", Ietadm},
	}
}
