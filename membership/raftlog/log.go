package raftlog

import (
	"fmt"
	"io"
	"log"
	"strings"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// hlog is hclog.Logger on zap.
type hlog struct {
	z    *zap.Logger
	name string
	args []any
}

// HCLog gives a logger for libraries that speak hclog; name is their zap name.
func HCLog(z *zap.Logger, name string) hclog.Logger {
	return &hlog{z: z.Named(name).WithOptions(zap.AddCallerSkip(2)), name: name}
}

var zapLevels = map[hclog.Level]zapcore.Level{
	hclog.Trace: zapcore.DebugLevel - 1,
	hclog.Debug: zapcore.DebugLevel,
	hclog.Info:  zapcore.InfoLevel,
	hclog.Warn:  zapcore.WarnLevel,
	hclog.Error: zapcore.ErrorLevel,
}

func fields(args []any) []zap.Field {
	out := make([]zap.Field, 0, len(args)/2+1)
	for i := 0; i+1 < len(args); i += 2 {
		out = append(out, field(fmt.Sprint(args[i]), args[i+1]))
	}
	if len(args)%2 == 1 {
		out = append(out, field("extra", args[len(args)-1]))
	}
	return out
}

func field(key string, v any) zap.Field {
	switch v := v.(type) {
	case hclog.Format:
		if len(v) > 0 {
			return zap.String(key, fmt.Sprintf(fmt.Sprint(v[0]), v[1:]...))
		}
	case error:
		return zap.NamedError(key, v)
	case fmt.Stringer:
		return zap.Stringer(key, v)
	}
	return zap.Any(key, v)
}

func (l *hlog) Log(level hclog.Level, msg string, args ...any) { l.write(level, msg, args) }

func (l *hlog) write(level hclog.Level, msg string, args []any) {
	zl, ok := zapLevels[level]
	if !ok {
		return
	}
	if ce := l.z.Check(zl, msg); ce != nil {
		ce.Write(fields(args)...)
	}
}

func (l *hlog) Trace(msg string, args ...any) { l.write(hclog.Trace, msg, args) }
func (l *hlog) Debug(msg string, args ...any) { l.write(hclog.Debug, msg, args) }
func (l *hlog) Info(msg string, args ...any)  { l.write(hclog.Info, msg, args) }
func (l *hlog) Warn(msg string, args ...any)  { l.write(hclog.Warn, msg, args) }
func (l *hlog) Error(msg string, args ...any) { l.write(hclog.Error, msg, args) }

func (l *hlog) enabled(level hclog.Level) bool { return l.z.Core().Enabled(zapLevels[level]) }
func (l *hlog) IsTrace() bool                  { return l.enabled(hclog.Trace) }
func (l *hlog) IsDebug() bool                  { return l.enabled(hclog.Debug) }
func (l *hlog) IsInfo() bool                   { return l.enabled(hclog.Info) }
func (l *hlog) IsWarn() bool                   { return l.enabled(hclog.Warn) }
func (l *hlog) IsError() bool                  { return l.enabled(hclog.Error) }

func (l *hlog) ImpliedArgs() []any { return l.args }
func (l *hlog) Name() string       { return l.name }

func (l *hlog) With(args ...any) hclog.Logger {
	return &hlog{z: l.z.With(fields(args)...), name: l.name, args: append(append([]any{}, l.args...), args...)}
}

func (l *hlog) Named(name string) hclog.Logger {
	return &hlog{z: l.z.Named(name), name: strings.TrimPrefix(l.name+"."+name, "."), args: l.args}
}

// ResetNamed cannot drop zap's name; it adds to it.
func (l *hlog) ResetNamed(name string) hclog.Logger { return l.Named(name) }

// SetLevel does nothing: zap's level rules.
func (l *hlog) SetLevel(hclog.Level) {}

func (l *hlog) GetLevel() hclog.Level {
	for _, lv := range []hclog.Level{hclog.Trace, hclog.Debug, hclog.Info, hclog.Warn, hclog.Error} {
		if l.enabled(lv) {
			return lv
		}
	}
	return hclog.Off
}

func (l *hlog) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(nil), "", 0)
}

func (l *hlog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return lineWriter{l.z}
}

type lineWriter struct{ z *zap.Logger }

func (w lineWriter) Write(p []byte) (int, error) {
	w.z.Info(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}
