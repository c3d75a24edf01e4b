package storage

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/api"
	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target"
)

// reconcile makes copies, roles and the target what want says.
func (w *worker) reconcile(ctx context.Context, want *desired, gate string) {
	w.forgetAsked()
	reset := w.syncVolumes(ctx, want)
	w.cut(ctx, want)
	w.mu.Lock()
	reset = append(reset, w.mu.forget...)
	w.mu.forget = nil
	w.mu.Unlock()
	if len(reset) > 0 {
		hit := map[string]bool{}
		for _, t := range want.storage.Targets {
			for _, l := range t.LUNs {
				if slices.Contains(reset, l.Volume) {
					hit[t.IQN] = true
				}
			}
		}
		w.srv.ResetSessions(func(s target.SessionInfo) bool { return hit[s.Target] })
	}
	w.mu.Lock()
	if w.mu.reapply {
		w.mu.reapply, w.applied = false, ""
	}
	w.mu.Unlock()
	cfg, err := w.config(want, gate)
	if err == nil {
		if fp := fmt.Sprintf("%+v %s", cfg, secretsOf(&cfg)); fp != w.applied || w.retryAt <= w.clock.Now() && w.failed {
			err = w.srv.Apply(cfg)
			busy := unopened(w.srv)
			w.applied, w.failed = fp, err != nil || busy != nil
			w.retryAt = w.clock.Now().Add(retryPortal)
			w.tellTarget(want, errors.Join(err, busy))
		} else if w.failed {
			err = w.lastErr
		}
	}
	w.lastErr = err
	if err == nil {
		w.dropVolumes(want) // Apply has returned: nothing of them is in flight
	}
	w.tidyReservations(ctx, want)
	reps := w.reports(want)
	w.tellStores(want, reps)
	ports := w.portalReports(want, err)
	w.mu.Lock()
	text := ""
	if err != nil {
		text = err.Error()
	}
	changed := !slices.EqualFunc(reps, w.mu.vols, sameReport) || !slices.Equal(ports, w.mu.portals) || w.mu.err != text || w.mu.applied != want.stamp.Index && err == nil
	if err == nil {
		w.mu.applied = want.stamp.Index
	}
	w.mu.vols, w.mu.portals, w.mu.err = reps, ports, text
	w.mu.Unlock()
	if changed {
		w.link.Changed()
	}
}

// config is the target's desired state. Only volumes that this node serves are
// shown; a node without a copy shows the target without them.
func (w *worker) config(want *desired, gate string) (target.Config, error) {
	var c target.Config
	ports, err := portals(w.cfg.Listen.ISCSI)
	if err != nil {
		return c, err
	}
	for _, p := range w.added(want) {
		if !p.covered(ports) {
			c.Optional = append(c.Optional, p.AddrPort)
		}
	}
	ports = slices.Concat(ports, c.Optional)
	if c.Discovery, err = w.auth(want, "discovery", want.storage.Discovery); err != nil {
		c.Discovery = nobody
	}
	c.Cut = cutNames(&want.members)
	for _, t := range want.storage.ListTargets() {
		ct := target.Target{IQN: t.IQN, Alias: t.Alias, TPGT: uint16(want.index), RelPort: uint16(want.index), Portals: ports,
			// Logins are for the node lease only; what goes on in the orphan time are
			// the sessions that exist.
			Offline: gate != "serving" || t.Offline,
			ACL:     target.ACL{Open: t.ACL.Open, Names: t.ACL.Initiators}}
		for _, n := range t.ACL.CIDRs {
			p, err := netip.ParsePrefix(n)
			if err != nil {
				return c, fmt.Errorf("access list of %s: %w", t.IQN, err)
			}
			ct.ACL.Nets = append(ct.ACL.Nets, p)
		}
		if err := applyParams(&ct, t.Params); err != nil {
			return c, fmt.Errorf("target %s: %w", t.IQN, err)
		}
		if t.ACL.Open {
			ct.ACL.Names, ct.ACL.Nets = nil, nil
		}
		for _, n := range t.Numbers() {
			l := t.LUNs[n]
			v := w.vols[l.Volume]
			rec := want.storage.Volumes[l.Volume]
			if v == nil || rec == nil || !v.serving {
				continue
			}
			id, err := identity(rec)
			if err != nil {
				return c, err
			}
			ct.LUNs = append(ct.LUNs, target.LUN{Number: scsi.LUN(n), Volume: l.Volume, Generation: l.Generation, Device: v.dev,
				Gate: v.gate, Reservations: w.reservationsOf(l.Volume, v.gate), Identity: id, ReadOnly: l.ReadOnly, Removable: l.Removable, NoCache: l.NoCache})
		}
		if ct.Auth, err = w.auth(want, t.IQN, t.Auth); err != nil {
			// Without its secrets a target that asks for them takes nobody: never the
			// same target without them.
			ct.Offline = true
		}
		c.Targets = append(c.Targets, ct)
	}
	return c, nil
}

// identity is what initiators know the volume by: frozen at its creation and the
// same on every node.
func identity(v *fsmstorage.Volume) (target.Identity, error) {
	id, err := uuid.Parse(v.Config.UUID)
	if err != nil {
		return target.Identity{}, fmt.Errorf("identity of volume %s: %w", v.Name, err)
	}
	if naa := scsi.NAA6(id); v.Identity.NAA != hex.EncodeToString(naa[:]) {
		return target.Identity{}, fmt.Errorf("identity of volume %s: the record has NAA %s, its uuid gives %x", v.Name, v.Identity.NAA, naa)
	}
	product := v.Identity.Product + v.Name
	if len(product) > 16 {
		product = product[:16]
	}
	return target.Identity{Product: product, Revision: "0001", Serial: v.Identity.Serial, UUID: id}, nil
}

func portals(listen []string) ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	for _, l := range listen {
		if strings.HasPrefix(l, ":") {
			l = "0.0.0.0" + l
		}
		p, err := netip.ParseAddrPort(l)
		if err != nil {
			// A name: its addresses now.
			host, port, serr := net.SplitHostPort(l)
			if serr != nil {
				return nil, fmt.Errorf("portal %q: %w", l, serr)
			}
			ips, lerr := net.LookupHost(host)
			if lerr != nil || len(ips) == 0 {
				return nil, errors.Join(fmt.Errorf("portal %q: no address", l), lerr)
			}
			if p, err = netip.ParseAddrPort(net.JoinHostPort(ips[0], port)); err != nil {
				return nil, fmt.Errorf("portal %q: %w", l, err)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

func sessionOf(node string, s target.SessionInfo) api.Session {
	return api.Session{Node: node, Target: s.Target, Initiator: s.Initiator, Address: s.Remote.String(), ISID: s.ISID.String(),
		TSIH: s.TSIH, Since: s.Since, Commands: s.Commands, ReadBytes: s.ReadBytes, WriteBytes: s.WriteBytes}
}
