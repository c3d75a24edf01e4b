package tgt

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
)

func path(parts ...string) string {
	out := parts[0]
	for _, p := range parts[1:] {
		out += "/" + url.PathEscape(p)
	}
	return out
}

func isName(s string) bool {
	l := strings.ToLower(s)
	return strings.HasPrefix(l, "iqn.") || strings.HasPrefix(l, "eui.") || strings.HasPrefix(l, "naa.")
}

func (s *session) targetNew(r *request) error {
	if !isName(r.s('T')) {
		return invalid("target name %q: iqn.YYYY-MM.reversed.domain[:string], eui.… or naa.… is needed (RFC 7143 4.2.7)", r.s('T'))
	}
	_, err := api.Post[api.Target](s.ctx, s.cl, api.PathTargets, api.TargetCreate{Name: r.s('T'), TID: r.tid})
	return refusal(err, texts{api.CodeExists: "this target already exists"})
}

func (s *session) targetDelete(r *request) error {
	t, err := s.target(r.tid)
	if err != nil {
		return err
	}
	if t.Sessions > 0 && !r.has('F') {
		return fail("this target is still active")
	}
	if _, err := api.Delete(s.ctx, s.cl, path(api.PathTargets, t.IQN)+"?force=1"); err != nil {
		return refusal(err, texts{api.CodeNotFound: "can't find the target"})
	}
	for _, l := range t.LUNs {
		if err := s.forget(&l); err != nil {
			return err
		}
	}
	return nil
}

// forget removes the volume of a LUN that is gone if it was made for it: its
// bytes lie in a file or device of the user's, which stays.
func (s *session) forget(l *api.LUN) error {
	v := s.volume(l.Volume)
	if v == nil || v.Store == "" || len(v.LUNs) > 1 {
		return nil
	}
	_, err := api.Delete(s.ctx, s.cl, path(api.PathVolumes, v.Name))
	return refusal(err, nil)
}

// everywhere stands for ALL: any address, so that names still count beside it.
var everywhere = []string{"0.0.0.0/0", "::/0"}

func (s *session) targetBind(r *request) error {
	t, err := s.target(r.tid)
	if err != nil {
		return err
	}
	if r.has('B') || r.has('H') {
		return invalid("--bus and --host are for SAS and FC targets; this is iSCSI")
	}
	var l api.ACL
	if n := r.s('Q'); n != "" {
		if !isName(n) {
			return invalid("initiator name %q: iqn.…, eui.… or naa.… is needed", n)
		}
		l.Initiators = []string{strings.ToLower(n)}
	}
	open := false
	if a := r.s('I'); a == "ALL" {
		l.Addresses = everywhere
		open = t.ACL.Open
	} else if a != "" {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			ip, ierr := netip.ParseAddr(a)
			if ierr != nil || ip.Zone() != "" {
				return invalid("initiator address %q: an address, address/length or ALL is needed", a)
			}
			p = netip.PrefixFrom(ip, ip.BitLen())
		}
		l.Addresses = []string{p.Masked().String()}
	}
	contains := func(have, want []string) bool {
		return !slices.ContainsFunc(want, func(w string) bool { return !slices.Contains(have, w) })
	}
	there := contains(t.ACL.Initiators, l.Initiators) && contains(t.ACL.Addresses, l.Addresses) || open
	q := api.ACLChange{Target: t.IQN, Add: l}
	switch {
	case r.op == "bind" && there:
		return fail("this access control rule already exists")
	case r.op == "unbind" && !there:
		return fail("this access control rule does not exist")
	case r.op == "unbind" && open:
		no := false
		q = api.ACLChange{Target: t.IQN, Open: &no}
	case r.op == "unbind":
		q = api.ACLChange{Target: t.IQN, Remove: l}
	}
	_, err = api.Post[api.Target](s.ctx, s.cl, api.PathACLs, q)
	return refusal(err, texts{api.CodeNotFound: "this access control rule does not exist"})
}

func (s *session) targetUpdate(r *request) error {
	t, err := s.target(r.tid)
	if err != nil {
		return err
	}
	name, value := r.s('n'), r.s('v')
	var q api.TargetSet
	switch name {
	case "state":
		if value != "offline" && value != "ready" {
			return invalid("state %q: offline or ready is possible", value)
		}
		off := value == "offline"
		q.Offline = &off
	case "RedirectCallback":
		return invalid("%s: no program is run for a login; use RedirectAddress, RedirectPort and RedirectReason", name)
	case api.RedirectAddress, api.RedirectPort, api.RedirectReason: // empty takes it back
		if err := api.CheckTargetParam(name, value); err != nil {
			return invalid("%w", err)
		}
		q.Params = map[string]string{name: value}
	default:
		if value == "" {
			return invalid("--value is missing")
		}
		if err := api.CheckTargetParam(name, value); err != nil {
			return invalid("%w", err)
		}
		q.Params = map[string]string{name: value}
	}
	_, err = api.Post[api.Target](s.ctx, s.cl, path(api.PathTargets, t.IQN), q)
	return refusal(err, texts{api.CodeNotFound: "can't find the target"})
}

// lunNew maps a file, a device or a volume.
func (s *session) lunNew(r *request) error {
	if r.lun == 0 && !s.zero {
		if _, err := s.target(r.tid); err != nil {
			return err
		}
		return fail("this logical unit number already exists") // tgtd's controller
	}
	return s.mapLUN(r)
}

func (s *session) mapLUN(r *request) error {
	t, err := s.target(r.tid)
	switch {
	case err != nil:
		return err
	case findLUN(t, r.lun) != nil:
		return fail("this logical unit number already exists")
	}
	switch y := r.s('Y'); y {
	case "", "disk":
	case "cd", "dvd", "osd", "controller", "changer", "tape", "pt", "passthrough", "ssc", "smc", "mmc", "sbc":
		return invalid("device type %s: only disks are served", y)
	default:
		return fail("unknown target type: " + y)
	}
	switch e := r.s('E'); e {
	case "", "rdwr", "aio":
	default:
		return invalid("backing store type %s: only rdwr (files and devices) is served", e)
	}
	if f := r.s('f'); f != "" && f != "direct" {
		return invalid("backing store flags %q: how stores are written is the node's storage.cache; direct is its default", f)
	}
	if r.has('S') && r.s('S') != "" {
		return invalid("backing store options %q: there are none", r.s('S'))
	}
	if r.block != 0 && r.block != 512 && r.block != 4096 {
		return invalid("block size %d: 512 or 4096 is possible", r.block)
	}
	b := r.s('b')
	q := api.LUNCreate{Target: t.IQN, LUN: r.lun, BlockSize: r.block, Replicas: 1, RequestID: uuid.NewString()}
	if name, ok := strings.CutPrefix(b, "volume:"); ok {
		if q.Volume = name; s.volume(name) == nil {
			return invalid("no volume is called %s", name)
		}
	} else {
		if q.Store, err = storeOf(b); err != nil {
			return err
		}
		q.Volume = s.freeName(b)
	}
	_, err = api.Post[api.LUN](s.ctx, s.cl, api.PathLUNs, q)
	if err != nil && q.Store != "" {
		s.undo(t.IQN, &q)
	}
	return refusal(err, texts{api.CodeExists: "this logical unit number already exists"})
}

// storeOf is the store that a path names.
func storeOf(b string) (string, error) {
	if b == "" || b == "None" {
		return "", invalid("--backing-store is missing: a file, a device or volume:NAME is needed")
	}
	abs, err := filepath.Abs(b)
	if err != nil {
		return "", invalid("backing store %s: %w", b, err)
	}
	st, err := os.Stat(abs)
	if err != nil {
		return "", invalid("backing store: %w", err)
	}
	switch m := st.Mode(); {
	case m.IsRegular():
		return storeurl.ForPath(storeurl.File, abs), nil
	case m&os.ModeDevice != 0 && m&os.ModeCharDevice == 0:
		return storeurl.ForPath(storeurl.Block, abs), nil
	}
	return "", invalid("backing store %s: it is neither a file nor a block device", b)
}

// freeName makes a name for the volume on a path: its last part, and a number
// where that is taken.
func (s *session) freeName(b string) string {
	name := strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-_.", c) {
			return c
		}
		return '_'
	}, filepath.Base(b))
	name = strings.TrimLeft(name, "-_.")
	if name == "" {
		name = "lun"
	}
	if len(name) > 100 {
		name = name[:100]
	}
	try := name
	for i := 2; s.volume(try) != nil; i++ {
		try = name + "-" + strconv.Itoa(i)
	}
	return try
}

// undo takes back what was recorded of a LUN that cannot be served. Only what
// this request made is touched: the names are checked again.
func (s *session) undo(iqn string, q *api.LUNCreate) {
	v, err := api.Get[api.Volume](s.ctx, s.cl, path(api.PathVolumes, q.Volume))
	if err != nil || v.Store != q.Store || !slices.Equal(v.LUNs, []string{fmt.Sprintf("%s/%d", iqn, q.LUN)}) {
		return
	}
	if _, err := api.Delete(s.ctx, s.cl, path(api.PathLUNs, iqn, strconv.Itoa(q.LUN))); err == nil {
		_, err = api.Delete(s.ctx, s.cl, path(api.PathVolumes, q.Volume))
		if err != nil {
			s.warn("volume %s is left: %v", q.Volume, err)
		}
	}
}

func (s *session) lunDelete(r *request) error {
	t, err := s.target(r.tid)
	if err != nil {
		return err
	}
	l := findLUN(t, r.lun)
	if l == nil {
		if r.lun == 0 {
			return invalid("LUN 0 is the controller")
		}
		return fail("can't find the logical unit")
	}
	if _, err := api.Delete(s.ctx, s.cl, path(api.PathLUNs, t.IQN, strconv.Itoa(r.lun))); err != nil {
		return refusal(err, texts{api.CodeNotFound: "can't find the logical unit"})
	}
	return s.forget(l)
}

// boolean reads the values that tgtadm takes for yes and no.
func boolean(k, v string) (bool, error) {
	switch strings.ToLower(v) {
	case "1", "yes", "on":
		return true, nil
	case "0", "no", "off":
		return false, nil
	}
	return false, invalid("%s=%s: 1 or 0 is possible", k, v)
}

// params takes "k=v,k=v" apart.
func params(s string) ([][2]string, error) {
	var out [][2]string
	for p := range strings.SplitSeq(s, ",") {
		if p = strings.TrimSpace(p); p == "" {
			continue
		}
		k, v, ok := strings.Cut(p, "=")
		if !ok {
			return nil, invalid("parameter %q: write NAME=VALUE", p)
		}
		out = append(out, [2]string{strings.TrimSpace(k), strings.Trim(strings.TrimSpace(v), `"`)})
	}
	if len(out) == 0 {
		return nil, invalid("--params is empty")
	}
	return out, nil
}

// cachePage reads PAGE:SUBPAGE:LENGTH:BYTE… of the one page that can be set by hand:
// caching, and in it the write cache (SBC-3 6.5.5). targets.conf's write-cache off
// becomes this.
func cachePage(v string) (off bool, err error) {
	var n []uint64
	for f := range strings.SplitSeq(v, ":") {
		x, err := strconv.ParseUint(f, 0, 8)
		if err != nil {
			return false, invalid("mode_page=%s: PAGE:SUBPAGE:LENGTH:BYTE:… is needed", v)
		}
		n = append(n, x)
	}
	const caching, wce = 8, 4
	switch {
	case len(n) < 4 || uint64(len(n)-3) != n[2]:
		return false, invalid("mode_page=%s: the length is not that of the bytes behind it", v)
	case n[0] != caching || n[1] != 0:
		return false, invalid("mode_page=%s: page 8 (caching) can be set, and in it the write cache; the other pages follow from the store", v)
	}
	return n[3]&wce == 0, nil
}

func (s *session) lunUpdate(r *request) error {
	t, err := s.target(r.tid)
	if err != nil {
		return err
	}
	l := findLUN(t, r.lun)
	if l == nil {
		return fail("can't find the logical unit")
	}
	ps, err := params(r.s('P'))
	if err != nil {
		return err
	}
	var q api.LUNSet
	for _, p := range ps {
		k, v := p[0], p[1]
		same := func(have string) error {
			if v == have {
				return nil
			}
			return invalid("%s=%s: what initiators know a LUN by is frozen when its volume is made, so that it is the same on every node; it is %q", k, v, have)
		}
		var b bool
		switch k {
		case "readonly":
			b, err = boolean(k, v)
			q.ReadOnly = &b
		case "removable":
			b, err = boolean(k, v)
			q.Removable = &b
		case "online":
			if b, err = boolean(k, v); err == nil && !b {
				err = invalid("online=%s: a LUN is taken away with --op delete, a target with --name state --value offline", v)
			}
		case "thin_provisioning":
			if b, err = boolean(k, v); err == nil && b != thin(s.volume(l.Volume)) {
				err = invalid("thin_provisioning=%s: it follows from the store", v)
			}
		case "scsi_id":
			err = same(scsiID(l))
		case "scsi_sn":
			err = same(scsiSN(s.volume(l.Volume)))
		case "vendor_id":
			err = same("BLKHOUSE")
		case "product_rev":
			err = same("0001")
		case "product_id":
			err = same(l.Volume)
		case "mode_page":
			b, err = cachePage(v)
			q.NoCache = &b
		case "sense_format", "lbppbe", "la_lba", "optimal_xfer_gran", "optimal_xfer_len", "path", "bsopts", "bsoflags", "rotation_rate":
			err = invalid("%s=%s: it follows from the store and is not set by hand", k, v)
		default:
			err = invalid("unknown parameter %q", k)
		}
		if err != nil {
			return err
		}
	}
	if q == (api.LUNSet{}) {
		return nil
	}
	_, err = api.Post[api.LUN](s.ctx, s.cl, path(api.PathLUNs, t.IQN, strconv.Itoa(r.lun)), q)
	return refusal(err, texts{api.CodeNotFound: "can't find the logical unit"})
}

func (s *session) accountNew(r *request) error {
	a, err := api.Post[api.Account](s.ctx, s.cl, api.PathAccounts, api.AccountCreate{Name: r.s('u'), Secret: r.s('p'), RequestID: uuid.NewString()})
	if a.Warning != "" {
		s.warn("%s", a.Warning)
	}
	return refusal(err, texts{api.CodeExists: "this account already exists"})
}

func (s *session) accountDelete(r *request) error {
	_, err := api.Delete(s.ctx, s.cl, path(api.PathAccounts, r.s('u'))+"?force=1")
	return refusal(err, texts{api.CodeNotFound: "can't find the account"})
}

func (s *session) accountBind(r *request) error {
	where := "discovery"
	if r.tid >= 0 {
		t, err := s.target(r.tid)
		if err != nil {
			return err
		}
		where = t.IQN
		if r.op == "bind" && r.has('O') && t.Outgoing != "" {
			return fail("this target already has an outgoing account")
		}
	}
	a, err := api.Post[api.Account](s.ctx, s.cl, api.PathBindings, api.AccountBind{Account: r.s('u'), Target: where, Outgoing: r.has('O'), Remove: r.op == "unbind"})
	if a.Warning != "" {
		s.warn("%s", a.Warning)
	}
	return refusal(err, texts{api.CodeExists: "this account already exists", api.CodeConflict: "this target already has an outgoing account", api.CodeNotFound: "can't find the account"})
}

func (s *session) systemUpdate(r *request) error {
	switch r.s('n') {
	case "debug":
		return invalid("debug: the log's level is log.level of clusterd's file")
	case "iSNS", "iSNSServerIP", "iSNSServerPort", "iSNSAccessControl":
		return invalid("%s: there is no iSNS client yet", r.s('n'))
	}
	return invalid("unknown parameter %q", r.s('n'))
}

func (s *session) systemDelete(*request) error {
	return invalid("the daemon is not ended from here: systemctl stop clusterd")
}

// portalChange opens or closes a portal of the node that is asked. Like the real
// tool it has one text for every refusal.
func (s *session) portalChange(r *request) error {
	k, v, _ := strings.Cut(r.s('P'), "=")
	if k != "portal" || v == "" {
		return invalid("parameter %q: portal=ADDRESS[:PORT] is needed", r.s('P'))
	}
	v = api.PortalAddress(v)
	if r.op == "delete" {
		_, err := api.Delete(s.ctx, s.cl, path(api.PathPortals, "-", v))
		return refusal(err, nil)
	}
	p, err := api.Post[api.Portal](s.ctx, s.cl, api.PathPortals, api.PortalAdd{Address: v})
	if err != nil {
		return refusal(err, nil)
	}
	if p.State == "failed" {
		// tgtd keeps no portal that it could not open.
		if _, err := api.Delete(s.ctx, s.cl, path(api.PathPortals, p.Node, p.Address)); err != nil {
			s.warn("portal %s is left: %v", p.Address, err)
		}
		return invalid("%s", p.Error)
	}
	return nil
}

func (s *session) lldChange(r *request) error {
	if r.op == "start" {
		return nil // it runs
	}
	why := errors.New("the iSCSI driver is not stopped from here: systemctl stop clusterd, or --name state --value offline for a target")
	if len(s.st.Targets) > 0 {
		return &failure{"this driver is busy", exitInvalid, why}
	}
	return invalid("%w", why)
}

// sid numbers the sessions of all nodes: those of the first are their TSIH.
func (s *session) sid(x *api.Session) int64 {
	for _, n := range s.st.Nodes {
		if n.Name == x.Node {
			return int64(n.Index-1)<<16 | int64(x.TSIH)
		}
	}
	return int64(x.TSIH)
}

func (s *session) sessions(iqn string) ([]api.Session, error) {
	l, err := api.Get[api.List[api.Session]](s.ctx, s.cl, api.PathSessions)
	if err != nil {
		return nil, refusal(err, nil)
	}
	var out []api.Session
	for _, x := range l.Items {
		if iqn == "" || x.Target == iqn {
			out = append(out, x)
		}
	}
	slices.SortFunc(out, func(a, b api.Session) int { return int(s.sid(&a) - s.sid(&b)) })
	return out, nil
}

// bySID finds a session by its number.
func (s *session) bySID(iqn string, sid int64) (*api.Session, error) {
	l, err := s.sessions(iqn)
	if err != nil {
		return nil, err
	}
	for i := range l {
		if s.sid(&l[i]) == sid {
			return &l[i], nil
		}
	}
	return nil, fail("can't find the session")
}

func (s *session) connDelete(r *request) error {
	t, err := s.target(r.tid)
	if err != nil {
		return err
	}
	x, err := s.bySID(t.IQN, r.sid)
	if err != nil {
		return err
	}
	if r.cid < 0 {
		return fail("can't find the connection")
	}
	_, err = api.Delete(s.ctx, s.cl, path(api.PathSessions, x.Node, strconv.Itoa(int(x.TSIH))))
	return refusal(err, texts{api.CodeNotFound: "can't find the session"})
}
