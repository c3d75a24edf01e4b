package gfs

import (
	"bufio"
	"context"
	"os"
	"strings"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/initiator"
)

// defaultOpeners are the targets beside files and block devices.
func defaultOpeners() map[string]Opener {
	return map[string]Opener{"iscsi": openISCSI}
}

// isidPath keeps our sessions apart from a kernel initiator's of the same name:
// with the same ISID one would throw the other out (RFC 7143 §6.3.5).
const isidPath = 0x6673

func openISCSI(ctx context.Context, target string, _ bool) (disk.Device, error) {
	d, err := initiator.OpenURL(ctx, target, initiator.Config{InitiatorName: initiatorName(), Path: isidPath})
	if err != nil {
		return nil, err
	}
	return disk.FromBlock(ctx, d), nil
}

// initiatorName is this host's, so that access lists need no second entry:
// BLOCKHOUSE_INITIATOR_NAME, else open-iscsi's file, else one made of the host
// name.
func initiatorName() string {
	if n := os.Getenv("BLOCKHOUSE_INITIATOR_NAME"); n != "" {
		return n
	}
	if f, err := os.Open("/etc/iscsi/initiatorname.iscsi"); err == nil {
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if n, ok := strings.CutPrefix(strings.TrimSpace(s.Text()), "InitiatorName="); ok && n != "" {
				return n
			}
		}
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "localhost"
	}
	return "iqn.2026-11.io.blockhouse:" + strings.ToLower(host)
}
