package storage

import (
	"net/netip"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/target"
)

// What an administrator sets of a target is what its sessions negotiate with, and
// every parameter is taken with every value that api lets through.
func TestApplyParams(t *testing.T) {
	t.Parallel()
	var ct target.Target
	if err := applyParams(&ct, nil); err != nil || ct.Want.MaxRecv != 0 {
		t.Errorf("no parameter: %+v, %v", ct, err)
	}
	err := applyParams(&ct, map[string]string{"MaxBurstLength": "65536", "HeaderDigest": "CRC32C", "InitialR2T": "Yes", "MaxXmitDataSegmentLength": "4096",
		"MaxQueueCmd": "16", "nop_interval": "5", "nop_count": "3", "ErrorRecoveryLevel": "2", "MaxRecvDataSegmentLength": "8192"})
	if err != nil {
		t.Fatal(err)
	}
	w := ct.Want
	if w.MaxBurstLength != 65536 || w.FirstBurstLength != 65536 || len(w.HeaderDigests) != 1 || !w.InitialR2T || w.MaxRecv != 8192 || ct.MaxSend != 4096 ||
		ct.QueueDepth != 16 || ct.NopInterval != 5*time.Second || ct.NopTimeout != 15*time.Second || w.ErrorRecoveryLevel != target.DefaultWant().ErrorRecoveryLevel {
		t.Errorf("%+v", ct)
	}
	for _, c := range []struct{ addr, port, reason, want string }{
		{"192.0.2.1", "", "", "192.0.2.1:3260"}, {"2001:db8::1", "3261", "Permanent", "[2001:db8::1]:3261"}, {"san.example", "", "Temporary", "san.example:3260"}, {"", "3261", "Permanent", ""},
	} {
		params := map[string]string{api.RedirectAddress: c.addr, api.RedirectPort: c.port, api.RedirectReason: c.reason}
		for k, v := range params {
			if err := api.CheckTargetParam(k, v); err != nil {
				t.Error(err)
			}
		}
		conf := target.Config{Targets: []target.Target{{IQN: "iqn.2026-01.x:a", TPGT: 1, RelPort: 1, Portals: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}}}}
		r := &conf.Targets[0]
		if err := applyParams(r, params); err != nil || r.Redirect != c.want || r.RedirectForever != (c.want != "" && c.reason == "Permanent") {
			t.Errorf("%+v: %q %v, %v", c, r.Redirect, r.RedirectForever, err)
		}
		if err := conf.Validate(); err != nil {
			t.Error(err)
		}
	}
	for _, p := range api.TargetParams {
		values := p.Values
		if len(values) == 0 {
			values = []string{p.Default}
			for _, n := range []string{"0", "1", "512", "3600", "65535", "16777215"} {
				if api.CheckTargetParam(p.Name, n) == nil {
					values = append(values, n)
				}
			}
		}
		for _, v := range values {
			c := target.Config{Targets: []target.Target{{IQN: "iqn.2026-01.x:a", TPGT: 1, RelPort: 1}}}
			ports, err := portals([]string{"127.0.0.1:0"})
			if err != nil {
				t.Fatal(err)
			}
			c.Targets[0].Portals = ports
			if err := applyParams(&c.Targets[0], map[string]string{p.Name: v}); err != nil {
				t.Error(err)
			}
			if err := c.Validate(); err != nil {
				t.Errorf("%s=%s: %v", p.Name, v, err)
			}
		}
	}
	if err := applyParams(&ct, map[string]string{"MaxBurstLength": "many"}); err == nil {
		t.Error("a limit that is no number was taken")
	}
}
