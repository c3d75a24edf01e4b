package initiator

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// URL names a logical unit in the syntax of libiscsi and QEMU:
//
//	iscsi://[user[%password]@]host[:port]/target-iqn/lun[?option=value&...]
//
// Options: target_user, target_password (mutual CHAP), header_digest and data_digest
// (crc32c, none, crc32c-none or none-crc32c, in order of preference).
type URL struct {
	Portal iscsi.Portal
	Target string
	LUN    scsi.LUN
	CHAP   *iscsi.CHAPCredentials
	// HeaderDigests and DataDigests are nil when the URL does not say.
	HeaderDigests, DataDigests []string
}

// ParseURL parses an iscsi:// URL. Errors do not repeat the password.
func ParseURL(s string) (*URL, error) {
	rest, ok := strings.CutPrefix(s, "iscsi://")
	if !ok {
		return nil, fmt.Errorf("iSCSI URL does not begin with iscsi://, want iscsi://[user%%pass@]host[:port]/iqn/lun")
	}
	bad := func(format string, a ...any) (*URL, error) {
		return nil, fmt.Errorf("iSCSI URL: %s, want iscsi://[user%%pass@]host[:port]/iqn/lun", fmt.Sprintf(format, a...))
	}
	rest, query, _ := strings.Cut(rest, "?")
	u := &URL{}
	host, path, ok := strings.Cut(rest, "/")
	if !ok {
		return bad("no target")
	}
	// A password may hold '@', so the last one counts; '/' ends the host, as in libiscsi.
	if i := strings.LastIndexByte(host, '@'); i >= 0 {
		user, pass, has := strings.Cut(host[:i], "%")
		if user == "" {
			return bad("empty user name")
		}
		if !has || pass == "" {
			return bad("user without a password")
		}
		u.CHAP = &iscsi.CHAPCredentials{User: user, Secret: []byte(pass)}
		host = host[i+1:]
	}
	var err error
	if u.Portal, err = iscsi.ParsePortal(host); err != nil {
		return nil, fmt.Errorf("iSCSI URL: %w", err)
	}
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return bad("no LUN")
	}
	u.Target = path[:i]
	if err := iscsi.CheckName(u.Target); err != nil {
		return nil, fmt.Errorf("iSCSI URL: %w", err)
	}
	n, err := strconv.ParseUint(path[i+1:], 10, 16)
	if err != nil || scsi.LUN(n) > scsi.MaxLUN {
		return bad("LUN %q is not 0-%d", path[i+1:], scsi.MaxLUN)
	}
	u.LUN = scsi.LUN(n)
	q, err := url.ParseQuery(query)
	if err != nil {
		return bad("options cannot be read")
	}
	for k, v := range q {
		if len(v) != 1 {
			return bad("option %s came twice", k)
		}
		switch k {
		case "target_user", "target_password":
			if u.CHAP == nil {
				return bad("option %s without a user", k)
			}
			if k == "target_user" {
				u.CHAP.PeerUser = v[0]
			} else {
				u.CHAP.PeerSecret = []byte(v[0])
			}
		case "header_digest", "data_digest":
			var ds []string
			for d := range strings.SplitSeq(strings.ToLower(v[0]), "-") {
				switch d {
				case "crc32c":
					ds = append(ds, "CRC32C")
				case "none":
					ds = append(ds, "None")
				default:
					return bad("digest %q is not crc32c or none", d)
				}
			}
			if k == "header_digest" {
				u.HeaderDigests = ds
			} else {
				u.DataDigests = ds
			}
		default:
			return bad("option %q is not known", k)
		}
	}
	if u.CHAP != nil && u.CHAP.PeerUser != "" && len(u.CHAP.PeerSecret) == 0 {
		return bad("target_user without target_password")
	}
	return u, nil
}

// OpenURL logs in and opens the logical unit of an iscsi:// URL. What the URL says of
// CHAP and digests goes before cfg. Close of the device logs out.
func OpenURL(ctx context.Context, s string, cfg Config) (block.Device, error) {
	u, err := ParseURL(s)
	if err != nil {
		return nil, err
	}
	if u.CHAP != nil {
		u.CHAP.Algorithms = nil
		if cfg.CHAP != nil {
			u.CHAP.Algorithms = cfg.CHAP.Algorithms
		}
		cfg.CHAP = u.CHAP
	}
	w := iscsi.DefaultWant()
	if cfg.Want != nil {
		w = *cfg.Want
	}
	if u.HeaderDigests != nil {
		w.HeaderDigests = u.HeaderDigests
	}
	if u.DataDigests != nil {
		w.DataDigests = u.DataDigests
	}
	cfg.Want = &w
	sess, err := Login(ctx, u.Portal.String(), u.Target, cfg)
	if err != nil {
		return nil, err
	}
	d, err := sess.openLUN(ctx, u.LUN)
	if err != nil {
		_ = sess.Close()
		return nil, err
	}
	d.closeSession = true
	return d, nil
}
