package control

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/pki"
)

// caller is who made a request.
type caller struct {
	local bool         // over the unix socket: root, or the user that runs clusterd
	id    pki.Identity // over mTLS; zero without a certificate
}

func (c caller) String() string {
	if c.local {
		return "local"
	}
	if c.id.Name == "" {
		return "without certificate"
	}
	return string(c.id.Role) + " " + c.id.Name
}

type ctxKey int

const (
	keyCaller ctxKey = iota
	keyCred
	keyBody
)

// Headers between nodes.
const (
	hdrIncarnation = "X-Blockhouse-Incarnation" // of the calling node
	hdrForwarded   = "X-Blockhouse-Forwarded"   // by whom; a forwarded request is not forwarded again
)

// maxBody bounds a request.
const maxBody = 4 << 20

// localConn notes the peer's uid of a unix connection.
func localConn(ctx context.Context, c net.Conn) context.Context {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, keyCred, cred)
}

// asLocal admits root and our own user.
func (d *Daemon) asLocal(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cred, ok := r.Context().Value(keyCred).(*unix.Ucred)
		if !ok || cred.Uid != 0 && int(cred.Uid) != unix.Geteuid() {
			d.log.Warn("refused a local request", zap.Any("cred", cred))
			writeError(w, api.Errorf(api.CodeDenied, "run it as root", "the local socket is for root and the user that runs clusterd"))
			return
		}
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), keyCaller, caller{local: true})))
	})
}

// asRemote admits nodes of this cluster in their present incarnation, and
// administrators; without a certificate only what open says. Refusals are logged
// with their reason.
func (d *Daemon) asRemote(m *member, open http.Handler, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var chain []*x509.Certificate
		if r.TLS != nil {
			chain = r.TLS.PeerCertificates
		}
		if len(chain) == 0 && open != nil {
			if _, pat := open.(*http.ServeMux).Handler(r); pat != "" {
				open.ServeHTTP(w, r)
				return
			}
		}
		refuse := func(reason, text string) {
			m.refused.WithLabelValues("api", reason).Inc()
			d.log.Warn("refused an API request", zap.String("reason", reason), zap.String("detail", text),
				zap.String("peer", r.RemoteAddr), zap.String("path", r.URL.Path))
			writeError(w, api.Errorf(api.CodeDenied, "", "refused: %s", text))
		}
		id, err := m.files.Verify(chain, d.clock.Wall(), pki.Want{})
		if err != nil {
			var re *pki.RefusedError
			if errors.As(err, &re) {
				refuse(string(re.Reason), re.Text)
			} else {
				refuse("untrusted", err.Error())
			}
			return
		}
		if id.Role == pki.Node && r.URL.Path != pathAdmit {
			have, _ := strconv.ParseUint(r.Header.Get(hdrIncarnation), 10, 64)
			if want, known := m.incarnationOf(id.Name); !known || have < want {
				refuse("old-incarnation", fmt.Sprintf("node %s says incarnation %d, the member is incarnation %d", id.Name, have, want))
				return
			}
		}
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), keyCaller, caller{id: id})))
	})
}

func callerOf(r *http.Request) caller {
	c, _ := r.Context().Value(keyCaller).(caller)
	return c
}

// handler is a request whose answer or error becomes a document.
type handler func(r *http.Request) (any, error)

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	v, err := h(r)
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, v)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // the peer is gone; nobody to tell
}

func writeError(w http.ResponseWriter, err error) {
	e := apiError(err)
	writeJSON(w, e.Code.HTTP(), api.ErrorBody{APIVersion: api.Version, Error: e})
}

// apiError turns what rose from below into what a user is told.
func apiError(err error) *api.Error {
	var ae *api.Error
	if errors.As(err, &ae) {
		return ae
	}
	var fe *fsm.Error
	if errors.As(err, &fe) {
		next := strings.TrimPrefix(fe.Next, "run ")
		short := *fe
		short.Next = ""
		return &api.Error{Code: codeOf(fe.Kind), Message: short.Error(), Next: next}
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return &api.Error{Code: api.CodeTimeout, Message: err.Error()}
	}
	return api.AsError(err)
}

func codeOf(k fsm.ErrKind) api.Code {
	switch k {
	case fsm.KindInvalid:
		return api.CodeUsage
	case fsm.KindNotFound:
		return api.CodeNotFound
	case fsm.KindExists:
		return api.CodeExists
	case fsm.KindConflict:
		return api.CodeConflict
	case fsm.KindNoQuorum:
		return api.CodeNoQuorum
	case fsm.KindTimeout:
		return api.CodeTimeout
	case fsm.KindDenied:
		return api.CodeDenied
	case fsm.KindUnreachable:
		return api.CodeUnreachable
	case fsm.KindRefused, fsm.KindNoOpenFence:
		return api.CodeRefused
	}
	return api.CodeInternal
}

// decode reads a request's document; unknown fields are errors.
func decode[T any](r *http.Request) (T, error) {
	var v T
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil && !errors.Is(err, io.EOF) {
		return v, api.Errorf(api.CodeUsage, "", "read the request: %v", err)
	}
	return v, nil
}

// requestTimeout bounds a request that has no deadline of its own: every command
// has an end (pacemaker#839: a status that hangs for ever helps nobody).
const requestTimeout = 60 * time.Second

// timeoutOf is how long a request may take: a little less than its client waits,
// so that it is the server who says what is missing.
func timeoutOf(r *http.Request) time.Duration {
	ms, err := strconv.Atoi(r.Header.Get(api.HeaderTimeout))
	if err != nil || ms <= 0 {
		return requestTimeout
	}
	d := time.Duration(ms) * time.Millisecond
	return min(requestTimeout, d-min(d/10, 500*time.Millisecond))
}
