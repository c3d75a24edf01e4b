package agent

import (
	"slices"
	"strings"
	"sync"
)

// MaxOutput bounds the output that is kept of a run: fencing.MaxOutput, which
// goes into the replicated history.
const MaxOutput = 4096

const mask = "***"

// tail keeps the last bytes of what is written to it. It keeps as many more as
// the longest secret has, so that a secret of which only the end is left is
// dropped and not shown.
type tail struct {
	mu      sync.Mutex
	secrets []string
	longest int
	buf     []byte
	lost    bool // something was dropped at the front
}

func newTail(secrets []string) *tail {
	t := &tail{}
	for _, s := range secrets {
		if s != "" {
			t.secrets = append(t.secrets, s)
			t.longest = max(t.longest, len(s))
		}
	}
	return t
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if keep := MaxOutput + t.longest; len(t.buf) > 2*keep {
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-keep:]...)
		t.lost = true
	}
	return len(p), nil
}

// String is at most MaxOutput bytes of valid UTF-8, with every secret masked.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	raw, lost := string(t.buf), t.lost
	if keep := MaxOutput + t.longest; len(raw) > keep {
		raw, lost = raw[len(raw)-keep:], true
	}
	start := 0
	if lost && t.longest > 0 {
		start = t.longest - 1
	}
	out := strings.ToValidUTF8(hide(raw, start, t.secrets), "?")
	if len(out) > MaxOutput {
		out = out[len(out)-MaxOutput:]
		for len(out) > 0 && out[0]&0xC0 == 0x80 { // not in the middle of a rune
			out = out[1:]
		}
	}
	return out
}

// hide masks all secrets in s and drops what lies before start.
func hide(s string, start int, secrets []string) string {
	type span struct{ a, b int }
	var spans []span
	for _, x := range secrets {
		if x == "" {
			continue
		}
		for i := 0; ; {
			k := strings.Index(s[i:], x)
			if k < 0 {
				break
			}
			spans = append(spans, span{i + k, i + k + len(x)})
			i += k + 1 // occurrences may overlap
		}
	}
	slices.SortFunc(spans, func(p, q span) int { return p.a - q.a })
	var b strings.Builder
	at := min(start, len(s))
	for i := 0; i < len(spans); {
		a, e := spans[i].a, spans[i].b
		for i++; i < len(spans) && spans[i].a < e; i++ {
			e = max(e, spans[i].b)
		}
		if e <= at {
			continue
		}
		b.WriteString(s[at:max(at, a)])
		b.WriteString(mask)
		at = e
	}
	b.WriteString(s[at:])
	return b.String()
}

// Secret tells whether the value of an option must never be shown or logged.
func Secret(name string) bool {
	n := strings.ToLower(name)
	if strings.HasSuffix(n, "_script") || strings.HasSuffix(n, "_file") {
		return false // a path
	}
	for _, part := range []string{"passw", "secret", "token", "community", "_kg", "apikey", "api_key", "private_key"} {
		if strings.Contains(n, part) {
			return true
		}
	}
	return false
}

// whole keeps everything up to a limit, for output that is parsed.
type whole struct {
	mu   sync.Mutex
	b    []byte
	max  int
	over bool
}

func (w *whole) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if room := w.max - len(w.b); len(p) > room {
		w.b, w.over = append(w.b, p[:room]...), true
		return len(p), nil
	}
	w.b = append(w.b, p...)
	return len(p), nil
}

func (w *whole) bytes() ([]byte, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.b), w.over
}
