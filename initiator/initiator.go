// Package initiator is an iSCSI initiator in user space (RFC 7143): discovery,
// normal sessions with many commands in flight, and a block.Device for each logical
// unit.
//
// A session is one connection to one portal, or several (MC/S). It does not reconnect,
// does not choose among paths and never repeats a command whose connection was lost:
// every call in flight on it gets an error, and the layer above (multipath) decides.
// The session goes on over the connections that are left. Where error recovery level 1
// is negotiated, losses that a data digest shows are recovered. Storage row: it
// imports iscsi, scsi and block and nothing of the cluster.
//
//	initiator.go  Config, errors
//	wire.go       dialling, login with redirection, discovery
//	session.go    the session: tasks, window, task management
//	link.go       a connection: reader, writer, watchdog
//	recovery.go   error recovery level 1
//	device.go     block.Device over SCSI commands
//	url.go        iscsi:// URLs
//
// Goroutines of a session: for each connection a reader, a writer and one that waits for
// both and watches the peer with NOP-Outs; and a supervisor. Close returns when all are gone. A task's
// buffers belong to the session from Exec to its return; Exec returns only when
// neither goroutine can touch them any more.
package initiator

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
)

// Config says who we are and how we talk. The zero value of a field means its
// default; InitiatorName has none.
type Config struct {
	InitiatorName  string // iqn., eui. or naa.
	InitiatorAlias string

	// Host and Path make the ISID together with the target's name, so that it is the
	// same at every login: reservations are kept by initiator name and ISID. Two
	// sessions of one initiator name to one target need different paths, or the
	// second takes the place of the first (§6.3.5, session reinstatement). Host
	// defaults to InitiatorName. ISID, if not zero, is used as it is.
	Host string
	Path uint16
	ISID iscsi.ISID

	CHAP *iscsi.CHAPCredentials // nil: no authentication

	// Want is what we offer in login; nil means iscsi.DefaultWant. HeaderDigests and
	// DataDigests in it say which digests we take, best first.
	Want *iscsi.Want

	LoginTimeout  time.Duration // dial and login with all redirections; 15 s
	LogoutTimeout time.Duration // 15 s
	// A connection that was silent for NopInterval is pinged; silent for NopTimeout
	// more it is given up. Defaults 5 s and 5 s; a negative NopInterval switches
	// pings off.
	NopInterval time.Duration
	NopTimeout  time.Duration
	// AbortTimeout is the time in which a target has to confirm a task management
	// function; the session is given up after it. 15 s.
	AbortTimeout time.Duration

	// Connections is how many connections a session has, as far as the target allows;
	// 1. All go to one portal. Want.MaxConnections is raised to it.
	Connections int

	QueueDepth   int // commands in flight at most, 1-4096; 128
	MaxRedirects int // 4

	// Dial replaces net.Dialer.DialContext.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// OnAsync is told asynchronous messages, on the reader's goroutine: it must not
	// wait, nor call the session. sense is the sense data of a SCSI event, else nil,
	// and only valid during the call.
	OnAsync func(msg iscsi.Async, sense []byte)
	Logger  *zap.Logger
}

// withDefaults returns a copy with every field set, or why the configuration is of
// no use.
func (c Config) withDefaults() (Config, error) {
	if err := iscsi.CheckName(c.InitiatorName); err != nil {
		return c, fmt.Errorf("initiator name: %w", err)
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.LoginTimeout, 15*time.Second)
	def(&c.LogoutTimeout, 15*time.Second)
	def(&c.NopInterval, 5*time.Second)
	def(&c.NopTimeout, 5*time.Second)
	def(&c.AbortTimeout, 15*time.Second)
	if c.QueueDepth == 0 {
		c.QueueDepth = 128
	}
	if c.QueueDepth < 1 || c.QueueDepth > 4096 {
		return c, fmt.Errorf("queue depth %d is not in 1-4096", c.QueueDepth)
	}
	if c.MaxRedirects == 0 {
		c.MaxRedirects = 4
	}
	if c.Host == "" {
		c.Host = c.InitiatorName
	}
	if c.Want == nil {
		w := iscsi.DefaultWant()
		c.Want = &w
	}
	if err := c.Want.Validate(); err != nil {
		return c, err
	}
	if c.Connections == 0 {
		c.Connections = 1
	}
	if c.Connections < 1 || c.Connections > 65535 {
		return c, fmt.Errorf("%d connections: want 1-65535", c.Connections)
	}
	if c.Want.MaxConnections < c.Connections {
		w := *c.Want
		w.MaxConnections = c.Connections
		c.Want = &w
	}
	if c.Want.ErrorRecoveryLevel > 1 || !c.Want.DataPDUInOrder || !c.Want.DataSequenceInOrder {
		return c, errors.New("the initiator takes data in order and does error recovery level 0 and 1 only")
	}
	if c.CHAP != nil && (c.CHAP.User == "" || len(c.CHAP.Secret) == 0) {
		return c, errors.New("CHAP needs a user and a secret")
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	if c.Logger == nil {
		c.Logger = zap.NewNop()
	}
	return c, nil
}

// FixedISID is the ISID of (host, target, path): random format, the number from a
// hash of host and target, the qualifier is the path.
func FixedISID(host, target string, path uint16) iscsi.ISID {
	h := sha256.Sum256([]byte(host + "\x00" + iscsi.NormalizeName(target)))
	return iscsi.RandomISID(uint32(h[0])<<16|uint32(h[1])<<8|uint32(h[2]), path)
}

func (c *Config) isid(target string) iscsi.ISID {
	if c.ISID != (iscsi.ISID{}) {
		return c.ISID
	}
	return FixedISID(c.Host, target, c.Path)
}

// Errors of a session. Logins that a target refused are *iscsi.LoginError.
var (
	// ErrClosed: the session was logged out, by us or at the target's request.
	ErrClosed = errors.New("session is closed")
	// ErrProtocol: the target broke the standard; the session ended.
	ErrProtocol = errors.New("target broke the protocol")
	// ErrNoAnswer: the target did not answer a ping or a task management function;
	// the session ended.
	ErrNoAnswer = errors.New("target does not answer")
	// ErrDropped: the target said that it drops the connection or session.
	ErrDropped = errors.New("target dropped the connection")
	// ErrAborted: the command was aborted by a task management function.
	ErrAborted = errors.New("command was aborted")
	// ErrRejected: the target refused a PDU with a Reject.
	ErrRejected = errors.New("target rejected the request")
	// ErrTaskManagement: the target refused a task management function.
	ErrTaskManagement = errors.New("task management function failed")
	// ErrReservation: RESERVATION CONFLICT.
	ErrReservation = errors.New("reservation conflict")
)
