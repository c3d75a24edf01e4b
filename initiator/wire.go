package initiator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/iscsi"
)

// wire is a connection with its codec, as login and discovery use it: one request,
// one response.
type wire struct {
	conn  net.Conn
	r     *iscsi.Reader
	w     *iscsi.Writer
	login *iscsi.InitiatorLogin
	cmdSN iscsi.Serial
	p     iscsi.Params
}

// await makes the connection's calls end when ctx ends. stop undoes it, and reports
// whether ctx had not ended.
func await(ctx context.Context, conn net.Conn) (stop func() bool) {
	undo := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return func() bool {
		if !undo() {
			return false
		}
		return conn.SetDeadline(time.Time{}) == nil
	}
}

// dial connects to portal and logs in to target, or opens a discovery session when
// target is empty. Redirections are followed.
func dial(ctx context.Context, portal iscsi.Portal, target string, cfg *Config) (*wire, iscsi.Portal, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.LoginTimeout)
	defer cancel()
	for hops := 0; ; hops++ {
		w, err := dialOne(ctx, portal, target, cfg, &join{cmdSN: 1})
		if err == nil {
			return w, portal, nil
		}
		le := (*iscsi.LoginError)(nil)
		if !errors.As(err, &le) || le.Status.Class() != 1 {
			return nil, portal, fmt.Errorf("log in to %s at %s: %w", what(target), portal, err)
		}
		if hops == cfg.MaxRedirects {
			return nil, portal, fmt.Errorf("log in to %s at %s: redirected %d times: %w", what(target), portal, hops+1, err)
		}
		next, perr := iscsi.ParsePortal(le.Address)
		if perr != nil {
			return nil, portal, fmt.Errorf("log in to %s at %s: redirected: %w", what(target), portal, perr)
		}
		cfg.Logger.Info("login was redirected", zap.String("iqn", target), zap.Stringer("from", portal), zap.Stringer("to", next),
			zap.Stringer("status", le.Status))
		portal = next
	}
}

func what(target string) string {
	if target == "" {
		return "discovery"
	}
	return target
}

// join is what a login to an existing session says of it.
type join struct {
	tsih, cid uint16
	cmdSN     iscsi.Serial
	base      iscsi.Params
}

// dialJoin logs another connection of s in.
func dialJoin(ctx context.Context, s *Session, cid uint16, cmdSN iscsi.Serial) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.LoginTimeout)
	defer cancel()
	return dialOne(ctx, s.portal, s.target, &s.cfg, &join{tsih: s.tsih, cid: cid, cmdSN: cmdSN, base: s.p})
}

func dialOne(ctx context.Context, portal iscsi.Portal, target string, cfg *Config, j *join) (*wire, error) {
	conn, err := cfg.Dial(ctx, "tcp", portal.HostPort())
	if err != nil {
		return nil, err
	}
	stop := await(ctx, conn)
	w, err := login(conn, target, cfg, j)
	if ok := stop(); err == nil && !ok {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		return nil, err
	}
	return w, nil
}

func login(conn net.Conn, target string, cfg *Config, j *join) (*wire, error) {
	w := &wire{conn: conn, r: iscsi.NewReader(iscsi.NewBuffer(conn), iscsi.DefaultMaxRecv),
		w: iscsi.NewWriter(conn, iscsi.DefaultMaxRecv), cmdSN: j.cmdSN}
	w.login = iscsi.NewInitiatorLogin(iscsi.InitiatorLoginConfig{InitiatorName: cfg.InitiatorName, InitiatorAlias: cfg.InitiatorAlias,
		TargetName: target, Discovery: target == "", ISID: cfg.isid(target), CmdSN: w.cmdSN, TSIH: j.tsih, CID: j.cid, Base: j.base,
		CHAP: cfg.CHAP, Want: *cfg.Want, Rand: rand.Reader})
	req, data := w.login.Start()
	for {
		if err := w.w.Append(&req, data); err != nil {
			return nil, err
		}
		if err := w.w.Flush(); err != nil {
			return nil, err
		}
		h, in, err := w.next()
		if err != nil {
			return nil, err
		}
		var resp iscsi.LoginResponse
		if err := resp.Decode(h); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		var done bool
		if req, data, done, err = w.login.Step(&resp, in); err != nil {
			return nil, err
		}
		if done {
			break
		}
	}
	w.p = w.login.Params()
	w.r.MaxData, w.w.MaxData = w.p.MaxRecv, w.p.MaxSend
	w.r.HeaderDigest, w.w.HeaderDigest = w.p.HeaderDigest, w.p.HeaderDigest
	w.r.DataDigest, w.w.DataDigest = w.p.DataDigest, w.p.DataDigest
	return w, nil
}

// next reads a whole PDU.
func (w *wire) next() (*iscsi.BHS, []byte, error) {
	h, err := w.r.Next()
	if err != nil {
		return nil, nil, fmt.Errorf("read response: %w", err)
	}
	data, err := w.r.AppendData(nil)
	if err != nil {
		return nil, nil, fmt.Errorf("read response: %w", err)
	}
	return h, data, nil
}

// TargetInfo is a target that a discovery found, with its portals in the target's
// order.
type TargetInfo struct {
	Name    string
	Portals []iscsi.Portal
}

// maxDiscovery bounds what we take of a SendTargets answer, in PDUs of at most our
// MaxRecvDataSegmentLength; iscsi.MaxText bounds each logical text.
const maxDiscovery = 1 << 16

// Discover asks the portal for all targets that it shows to us (SendTargets=All,
// §13.3). A target without TargetAddress is reachable at the portal itself.
func Discover(ctx context.Context, portal string, cfg Config) ([]TargetInfo, error) {
	p, err := iscsi.ParsePortal(portal)
	if err != nil {
		return nil, err
	}
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	w, p, err := dial(ctx, p, "", &cfg)
	if err != nil {
		return nil, err
	}
	defer w.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, cfg.LoginTimeout)
	defer cancel()
	stop := await(ctx, w.conn)
	defer stop()
	out, err := w.discover(p)
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		return nil, fmt.Errorf("discover targets at %s: %w", p, err)
	}
	return out, nil
}

func (w *wire) discover(at iscsi.Portal) ([]TargetInfo, error) {
	list := targetList{at: at}
	stat := w.login.ExpStatSN()
	req := iscsi.TextRequest{Final: true, ITT: 1, TTT: iscsi.ReservedTag, CmdSN: w.cmdSN}
	data := iscsi.AppendPair(nil, iscsi.KeySendTargets, "All")
	for n := 0; ; n++ {
		if n == maxDiscovery {
			return nil, fmt.Errorf("%w: endless answer to SendTargets", ErrProtocol)
		}
		req.ExpStatSN = stat
		if err := w.w.Append(&req, data); err != nil {
			return nil, err
		}
		if err := w.w.Flush(); err != nil {
			return nil, err
		}
		w.cmdSN++
		resp, in, err := w.text(&stat)
		if err != nil {
			return nil, err
		}
		if err := list.add(in); err != nil {
			return nil, err
		}
		if resp.Final {
			break
		}
		if resp.TTT == iscsi.ReservedTag {
			return nil, fmt.Errorf("%w: text response without F bit and without transfer tag", ErrProtocol)
		}
		req.TTT, req.LUN, req.CmdSN, data = resp.TTT, resp.LUN, w.cmdSN, nil
	}
	out, err := list.done()
	if err != nil {
		return nil, err
	}
	w.logout(stat)
	return out, nil
}

// text waits for a text response; NOP-Ins in front of it are answered.
func (w *wire) text(stat *iscsi.Serial) (*iscsi.TextResponse, []byte, error) {
	for {
		h, in, err := w.next()
		if err != nil {
			return nil, nil, err
		}
		switch h.Opcode() {
		case iscsi.OpTextResp:
			var resp iscsi.TextResponse
			if err := resp.Decode(h); err != nil {
				return nil, nil, fmt.Errorf("%w: %w", ErrProtocol, err)
			}
			*stat = resp.StatSN.Add(1)
			return &resp, in, nil
		case iscsi.OpNopIn:
			var ni iscsi.NopIn
			if err := ni.Decode(h); err != nil {
				return nil, nil, fmt.Errorf("%w: %w", ErrProtocol, err)
			}
			if ni.TTT == iscsi.ReservedTag {
				continue
			}
			no := iscsi.NopOut{Immediate: true, LUN: ni.LUN, ITT: iscsi.ReservedTag, TTT: ni.TTT, CmdSN: w.cmdSN, ExpStatSN: *stat}
			if err := w.w.Append(&no); err != nil {
				return nil, nil, err
			}
			if err := w.w.Flush(); err != nil {
				return nil, nil, err
			}
		case iscsi.OpAsync:
			*stat++
		case iscsi.OpReject:
			var rj iscsi.Reject
			_ = rj.Decode(h)
			return nil, nil, fmt.Errorf("%w: %s", ErrRejected, rj.Reason)
		default:
			return nil, nil, fmt.Errorf("%w: %s in answer to a text request", ErrProtocol, h.Opcode())
		}
	}
}

// logout ends a discovery session; whether the target answers is not important.
func (w *wire) logout(stat iscsi.Serial) {
	req := iscsi.LogoutRequest{Immediate: true, Reason: iscsi.LogoutSession, ITT: 2, CmdSN: w.cmdSN, ExpStatSN: stat}
	if w.w.Append(&req) == nil && w.w.Flush() == nil {
		_, _, _ = w.next()
	}
}

// targetList reads the answer to SendTargets. The pairs of one target may be spread
// over several texts, and one pair over two PDUs.
type targetList struct {
	at   iscsi.Portal
	out  []TargetInfo
	text []byte
}

func (l *targetList) add(seg []byte) error {
	// Pairs of more than iscsi.MaxPairs targets are legal here, so whole pairs are
	// taken off as they come.
	if len(l.text)+len(seg) > iscsi.MaxText {
		return fmt.Errorf("%w: pair without an end", ErrProtocol)
	}
	l.text = append(l.text, seg...)
	for {
		i := 0
		for i < len(l.text) && l.text[i] != 0 {
			i++
		}
		if i == len(l.text) {
			return nil
		}
		pairs, err := iscsi.ParseText(l.text[:i+1])
		if err != nil {
			return err
		}
		l.text = l.text[i+1:]
		for _, p := range pairs {
			if err := l.pair(p); err != nil {
				return err
			}
		}
	}
}

func (l *targetList) pair(p iscsi.Pair) error {
	switch p.Key {
	case iscsi.KeyTargetName:
		if err := iscsi.CheckName(p.Value); err != nil {
			return err
		}
		l.out = append(l.out, TargetInfo{Name: p.Value})
	case iscsi.KeyTargetAddress:
		if len(l.out) == 0 {
			return fmt.Errorf("%w: TargetAddress before TargetName", ErrProtocol)
		}
		a, err := iscsi.ParsePortal(p.Value)
		if err != nil {
			return err
		}
		t := &l.out[len(l.out)-1]
		t.Portals = append(t.Portals, a)
	case iscsi.KeySendTargets:
		return fmt.Errorf("%w: SendTargets=%s", ErrRejected, p.Value)
	}
	return nil
}

func (l *targetList) done() ([]TargetInfo, error) {
	if len(l.text) > 0 {
		return nil, fmt.Errorf("%w: last pair has no NUL", ErrProtocol)
	}
	for i := range l.out {
		if len(l.out[i].Portals) == 0 {
			l.out[i].Portals = []iscsi.Portal{l.at}
		}
	}
	return l.out, nil
}
