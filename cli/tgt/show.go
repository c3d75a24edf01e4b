package tgt

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
)

func yes(b bool) string {
	if b {
		return "Yes"
	}
	return "No"
}

func scsiID(l *api.LUN) string { return strings.TrimPrefix(l.WWID, "3") }

func scsiSN(v *api.Volume) string {
	if v == nil {
		return ""
	}
	return strings.ReplaceAll(v.UUID, "-", "")
}

func thin(v *api.Volume) bool { return v != nil && !strings.HasPrefix(v.Store, "block:") }

// backing is what -b must be to get the same LUN again.
func backing(v *api.Volume, name string) string {
	if v != nil && v.Store != "" {
		if u, err := storeurl.Parse(v.Store); err == nil && (u.Scheme == storeurl.File || u.Scheme == storeurl.Block) {
			return u.Path
		}
	}
	return "volume:" + name
}

func (s *session) targetShow(r *request) error {
	if r.tid >= 0 {
		t, err := s.target(r.tid)
		if err != nil {
			return err
		}
		// The real one shows nothing else of a target that sends its initiators away.
		if portal, forever := api.RedirectOf(t.Params); portal != "" {
			reason := "Temporary"
			if forever {
				reason = "Permanent"
			}
			host, port, err := net.SplitHostPort(portal)
			if err != nil {
				return err
			}
			s.printf("RedirectAddress=%s\nRedirectPort=%s\nRedirectReason=%s\n", host, port, reason)
			return nil
		}
		for _, p := range api.TargetParams {
			v, ok := t.Params[p.Name]
			if !ok {
				v = p.Default
			}
			s.printf("%s=%s\n", p.Name, v)
		}
		return nil
	}
	all, err := s.sessions("")
	if err != nil {
		return err
	}
	for i := range s.st.Targets {
		t := &s.st.Targets[i]
		var mine []api.Session
		for _, x := range all {
			if x.Target == t.IQN {
				mine = append(mine, x)
			}
		}
		s.showTarget(t, mine)
	}
	return nil
}

func (s *session) showTarget(t *api.Target, sess []api.Session) {
	state := "ready"
	if t.Offline {
		state = "offline"
	}
	s.printf("Target %d: %s\n    System information:\n        Driver: iscsi\n        State: %s\n", t.TID, t.IQN, state)
	if n := t.Params["nop_interval"]; n != "" && n != "0" {
		c := t.Params["nop_count"]
		if c == "" {
			c = "0"
		}
		s.printf("        Nop interval: %s\n        Nop count: %s\n", n, c)
	}
	s.printf("    I_T nexus information:\n")
	for _, x := range sess {
		alias := x.Alias
		if alias == "" {
			alias = "none"
		}
		s.printf("        I_T nexus: %d\n            Initiator: %s alias: %s\n", s.sid(&x), x.Initiator, alias)
		for c := range max(x.Connections, 1) { // of one address: the API names it once
			s.printf("            Connection: %d\n                IP Address: %s\n", c, host(x.Address))
		}
	}
	s.printf("    LUN information:\n")
	if findLUN(t, 0) == nil {
		s.printf("        LUN: 0\n            Type: controller\n            SCSI ID: IET     %04x0000\n            SCSI SN: beaf%d0\n", t.TID, t.TID)
		s.printf("            Size: 0 MB, Block size: 1\n            Online: Yes\n            Removable media: No\n            Prevent removal: No\n            Readonly: No\n            SWP: No\n            Thin-provisioning: No\n")
		s.printf("            Backing store type: null\n            Backing store path: None\n            Backing store flags: \n")
	}
	luns := slices.Clone(t.LUNs)
	slices.SortFunc(luns, func(a, b api.LUN) int { return a.LUN - b.LUN })
	for _, l := range luns {
		v := s.volume(l.Volume)
		size, block := int64(0), 512
		if v != nil {
			size, block = v.Size, v.BlockSize
		}
		s.printf("        LUN: %d\n            Type: disk\n            SCSI ID: %s\n            SCSI SN: %s\n", l.LUN, scsiID(&l), scsiSN(v))
		s.printf("            Size: %d MB, Block size: %d\n            Online: %s\n", size/1000/1000, block, yes(l.State == api.HealthOK || l.State == api.HealthDegraded))
		s.printf("            Removable media: %s\n            Prevent removal: No\n            Readonly: %s\n            SWP: No\n            Thin-provisioning: %s\n", yes(l.Removable), yes(l.ReadOnly), yes(thin(v)))
		s.printf("            Backing store type: rdwr\n            Backing store path: %s\n            Backing store flags: \n", backing(v, l.Volume))
	}
	s.printf("    Account information:\n")
	for _, n := range t.Incoming {
		s.printf("        %s\n", n)
	}
	if t.Outgoing != "" {
		s.printf("        %s (outgoing)\n", t.Outgoing)
	}
	s.printf("    ACL information:\n")
	for _, a := range rules(&t.ACL) {
		s.printf("        %s\n", a)
	}
}

// rules are the entries of an access list in tgtadm's words: addresses, then
// names.
func rules(l *api.ACL) []string {
	addrs, names := split(l)
	return append(addrs, names...)
}

func split(l *api.ACL) (addrs, names []string) {
	all := l.Open || slices.Contains(l.Addresses, everywhere[0]) && slices.Contains(l.Addresses, everywhere[1])
	for _, a := range l.Addresses {
		if all && slices.Contains(everywhere, a) {
			continue
		}
		// A single address was given without a length.
		a = strings.TrimSuffix(a, "/32")
		if strings.Contains(a, ":") {
			a = strings.TrimSuffix(a, "/128")
		}
		addrs = append(addrs, a)
	}
	if all {
		addrs = append(addrs, "ALL")
	}
	return addrs, slices.Clone(l.Initiators)
}

func host(addr string) string {
	if h, _, err := net.SplitHostPort(addr); err == nil {
		return h
	}
	return addr
}

func (s *session) accounts() ([]api.Account, error) {
	l, err := api.Get[api.List[api.Account]](s.ctx, s.cl, api.PathAccounts)
	return l.Items, refusal(err, nil)
}

func (s *session) accountShow(*request) error {
	as, err := s.accounts()
	if err != nil {
		return err
	}
	s.printf("Account list:\n")
	for _, a := range as {
		s.printf("    %s\n", a.Name)
	}
	return nil
}

func (s *session) systemShow(*request) error {
	as, err := s.accounts()
	if err != nil {
		return err
	}
	s.printf("System:\n    State: ready\n    debug: off\nLLDs:\n    iscsi: ready\nBacking stores:\n    rdwr (bsoflags direct)\nDevice types:\n    disk\n")
	// Incoming accounts first, as they stand in the daemon's list.
	var in, out []string
	for _, a := range as {
		for _, b := range a.Bindings {
			switch {
			case b.Target != "discovery":
			case b.Direction == "outgoing":
				out = append(out, a.Name+" (outgoing)")
			default:
				in = append(in, a.Name)
			}
		}
	}
	if len(in)+len(out) > 0 {
		s.printf("    Account information:\n\n")
	}
	for _, n := range append(in, out...) {
		s.printf("    %s\n", n)
	}
	s.printf("iSNS:\n    iSNS=Off\n    iSNSServerIP=\n    iSNSServerPort=3205\n    iSNSAccessControl=Off\n")
	return nil
}

func (s *session) portalShow(*request) error {
	nodes := slices.Clone(s.st.Nodes)
	slices.SortFunc(nodes, func(a, b api.Node) int { return b.Index - a.Index })
	for _, n := range nodes {
		if n.State != api.NodeOnline || !slices.Contains(n.Roles, "storage") {
			continue
		}
		for _, p := range slices.Backward(n.Portals) { // newest first: those that were added stand behind the file's
			s.printf("Portal: %s,%d\n", p, n.Index)
		}
	}
	return nil
}

func (s *session) lldShow(*request) error {
	s.printf("LLDs:\n    iscsi: ready\n")
	for _, t := range s.st.Targets {
		s.printf("        Target %d: %s\n", t.TID, t.IQN)
	}
	return nil
}

func (s *session) connShow(r *request) error {
	t, err := s.target(r.tid)
	if err != nil {
		return err
	}
	l, err := s.sessions(t.IQN)
	if err != nil {
		return err
	}
	for _, x := range l {
		s.printf("Session: %d\n    Connection: 0\n        Initiator: %s\n        IP Address: %s\n", s.sid(&x), x.Initiator, host(x.Address))
	}
	return nil
}

func (s *session) sessionShow(*request) error {
	return invalid("tgtadm never showed sessions: use --mode conn --op show --tid N, or clusteradm session list")
}

const (
	statHead = "tgt lun sid rd_subm(bytes,cmds) rd_done(bytes,cmds) wr_subm(bytes,cmds) wr_done(bytes,cmds) errs\n"
	connHead = "sid cid rxdata_octets txdata_octets dataout_pdus datain_pdus cmd_pdus rsp_pdus\n"
)

// stat prints what each LUN did, over all nodes. tgtd has a row for each session and
// LUN; here the sessions' numbers are apart (session stat), and sid is a dash.
func (s *session) stat(r *request) error {
	iqn := ""
	if r.tid >= 0 {
		t, err := s.target(r.tid)
		if err != nil {
			return err
		}
		if r.mode == "logicalunit" && r.lun != 0 && findLUN(t, r.lun) == nil {
			return fail("can't find the logical unit")
		}
		iqn = t.IQN
	}
	st, err := api.Get[api.Stats](s.ctx, s.cl, api.PathStats)
	if err != nil {
		return refusal(err, nil)
	}
	s.printf(statHead)
	for i := range s.st.Targets {
		t := &s.st.Targets[i]
		for _, l := range t.LUNs {
			if iqn != "" && t.IQN != iqn || r.mode == "logicalunit" && l.LUN != r.lun {
				continue
			}
			var sum api.IOStats
			var errs uint64
			used := false
			for _, n := range st.Nodes {
				for k := range n.LUNs {
					if x := &n.LUNs[k]; x.Target == t.IQN && x.LUN == l.LUN && x.Sessions > 0 {
						used = true
						sum.Reads, sum.ReadBytes = sum.Reads+x.Reads, sum.ReadBytes+x.ReadBytes
						sum.Writes, sum.WriteBytes = sum.Writes+x.Writes, sum.WriteBytes+x.WriteBytes
						errs += x.Failed()
					}
				}
			}
			if used { // as tgtd: without a session there is no row
				s.statRow(t.TID, fmt.Sprint(l.LUN), "-", &sum, errs)
			}
		}
	}
	return nil
}

// statRow: what was submitted and is not done is not told apart.
func (s *session) statRow(tid int, lun, sid string, x *api.IOStats, errs uint64) {
	s.printf("%3d %3s %3s %12d %6d %12d %6d %12d %6d %12d %6d %4d\n", tid, lun, sid, x.ReadBytes, x.Reads, x.ReadBytes, x.Reads, x.WriteBytes, x.Writes, x.WriteBytes, x.Writes, errs)
}

// connRow counts no PDUs but commands; tgtd prints 0 there.
func (s *session) connRow(x *api.Session) {
	s.printf(connHead)
	s.printf("%3d %3d %13d %13d %12d %11d %8d %8d\n", s.sid(x), 0, x.WriteBytes, x.ReadBytes, 0, 0, x.Commands, 0)
}

func (s *session) sessionStat(r *request) error {
	x, err := s.bySID("", r.sid)
	if err != nil {
		return err
	}
	s.printf(statHead)
	for _, t := range s.st.Targets {
		if t.IQN == x.Target {
			io := x.IO
			if io == nil { // its node could not be asked
				io = &api.IOStats{ReadBytes: x.ReadBytes, WriteBytes: x.WriteBytes}
			}
			s.statRow(t.TID, "-", fmt.Sprint(s.sid(x)), io, io.Failed())
		}
	}
	s.printf("\n")
	s.connRow(x)
	return nil
}

func (s *session) connStat(r *request) error {
	x, err := s.bySID("", r.sid)
	if err != nil {
		return err
	}
	s.connRow(x)
	return nil
}
