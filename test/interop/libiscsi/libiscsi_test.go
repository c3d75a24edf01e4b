package libiscsi

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/fault"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/target"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func need(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath(Program); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed (make deps)", Program)
		}
		t.Skipf("skip: %s is not installed (make deps)", Program)
	}
}

const iqn = "iqn.2026-01.net.blockhouse:conformance"

// variant is how the logical unit is set up.
type variant struct {
	blockSize int
	size      int64
	paths     int // portals, 0 = 1
	wrap      func(block.Device) block.Device
	lun       func(*target.LUN)
}

// serve starts a target on a file store and returns a runner for its LUN 1.
func serve(t *testing.T, v variant) *Runner {
	t.Helper()
	if v.blockSize == 0 {
		v.blockSize = 512
	}
	if v.size == 0 {
		v.size = 1 << 30
	}
	log := zap.NewNop()
	if os.Getenv("LIBISCSI_LOG") != "" {
		log = zaptest.NewLogger(t)
	}
	store, err := file.Create(filepath.Join(t.TempDir(), "lun"), v.size, file.Options{BlockSize: v.blockSize, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	var dev block.Device = store
	if v.wrap != nil {
		dev = v.wrap(dev)
	}
	// No pings: the program answers none while it sleeps, up to a minute.
	srv, err := target.New(target.Options{Logger: log, NopInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	portals := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	if v.paths == 2 {
		portals = append(portals, netip.MustParseAddrPort("127.0.0.2:0"))
	}
	l := target.LUN{Number: 1, Volume: "conformance", Generation: 1, Device: dev,
		Identity: target.Identity{Product: "c0nf0rm1 suite", Serial: "0123456789abcdef", UUID: [16]byte{1, 2, 3, 4}}}
	if v.lun != nil {
		v.lun(&l)
	}
	err = srv.Apply(target.Config{Targets: []target.Target{{
		IQN: iqn, TPGT: 1, RelPort: 1, Portals: portals, ACL: target.ACL{Open: true}, LUNs: []target.LUN{l},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(srv.Close(), dev.Close()); err != nil {
			t.Error(err)
		}
	})
	var urls []string
	for _, p := range portals {
		addr, ok := srv.Addr(p)
		if !ok {
			t.Fatalf("portal %s is not open", p)
		}
		urls = append(urls, fmt.Sprintf("iscsi://%s/%s/1", addr, iqn))
	}
	return &Runner{URL: urls[0], URL2: strings.Join(urls[1:], "")}
}

// TestSpine is issue 2's list: nothing failed, nothing skipped but what needs
// protection information.
func TestSpine(t *testing.T) {
	t.Parallel()
	need(t)
	all, err := List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tests := Family(all, "Mandatory", "Read6", "Read10", "Read12", "Read16", "Write10", "Write12", "Write16",
		"Inquiry", "ReadCapacity10", "ReadCapacity16", "TestUnitReady")
	if len(tests) < 40 {
		t.Fatalf("the families have %d tests only", len(tests))
	}
	rs := serve(t, variant{}).RunAll(t.Context(), tests, 1)
	t.Logf("\n%s", Table(rs))
	for _, r := range rs {
		if r.Verdict == Pass || r.Verdict == Skip && protection(r) {
			continue
		}
		t.Errorf("%s %s: %s", r.Verdict, r.Test, r.Why)
		if r.Verdict != Skip {
			t.Log(r.Log)
		}
	}
}

// protection tells whether a test was skipped for want of protection
// information, which no logical unit here has.
func protection(r Result) bool {
	return strings.Contains(strings.ToLower(r.Why), "protect")
}

// TestHarnessFails: against a target that lies, the harness must say FAIL. A
// suite that cannot fail proves nothing.
func TestHarnessFails(t *testing.T) {
	t.Parallel()
	need(t)
	r := serve(t, variant{wrap: func(d block.Device) block.Device {
		return fault.New(d, fault.Rule{Ops: fault.Read, Corrupt: true})
	}})
	// A test that reads back what it wrote.
	res := r.Run(t.Context(), "iSCSI.iSCSIResiduals.Write10Residuals")
	if res.Verdict != Fail {
		t.Errorf("wrong data were judged %s (%s)\n%s", res.Verdict, res.Why, res.Log)
	}
	// A store that refuses every read.
	r = serve(t, variant{wrap: func(d block.Device) block.Device {
		return fault.New(d, fault.Rule{Ops: fault.Read, Err: block.ErrMedium})
	}})
	if res := r.Run(t.Context(), "SCSI.Read10.Simple"); res.Verdict != Fail {
		t.Errorf("medium errors were judged %s (%s)\n%s", res.Verdict, res.Why, res.Log)
	}
	// No target at all.
	r = &Runner{URL: "iscsi://127.0.0.1:1/" + iqn + "/1"}
	if res := r.Run(t.Context(), "SCSI.Read10.Simple"); res.Verdict == Pass || res.Verdict == Skip {
		t.Errorf("no target was judged %s\n%s", res.Verdict, res.Log)
	}
}

func TestJudge(t *testing.T) {
	row := func(n string) string {
		return "Run Summary:    Type  Total    Ran Passed Failed Inactive\n              suites      1      1    n/a      0        0\n               tests " + n + "\n"
	}
	for _, x := range []struct {
		log  string
		err  error
		want Verdict
	}{
		{row("     1      1      1      0        0"), nil, Pass},
		{"    [SKIPPED] no\n" + row("     1      1      1      0        0"), nil, Skip},
		{"[FAILED] x\n" + row("     1      1      0      1        0"), nil, Fail},
		{"[SKIPPED] y\n[FAILED] x\n" + row("     1      1      0      1        0"), nil, Fail},
		{row("     1      0      0      0        0"), nil, NoRun},
		{"connect failed\n", nil, NoRun},
		{"", nil, NoRun},
		{row("     1      1      1      0        0"), errors.New("exec: not found"), NoRun},
	} {
		if v, why := Judge(x.log, x.err); v != x.want {
			t.Errorf("%q: %s (%s), want %s", x.log, v, why, x.want)
		}
	}
	if err := exec.Command("sh", "-c", "kill -SEGV $$").Run(); err != nil {
		if v, _ := Judge(row("     1      1      1      0        0"), err); v != Crash {
			t.Errorf("a crash was judged %s", v)
		}
	}
}

// TestVariants runs the families that need another logical unit, and the whole
// data path on 4096-byte blocks.
func TestVariants(t *testing.T) {
	t.Parallel()
	need(t)
	all, err := List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name     string
		v        variant
		families []string
	}{
		{"removable", variant{lun: func(l *target.LUN) { l.Removable = true }}, []string{"PreventAllow", "StartStopUnit", "NoMedia"}},
		{"read-only", variant{lun: func(l *target.LUN) { l.ReadOnly = true }}, []string{"ReadOnly"}},
		{"two paths", variant{paths: 2}, []string{"MultipathIO"}},
		{"4096", variant{blockSize: 4096}, []string{"GetLBAStatus", "Read16", "Write16", "Unmap", "WriteSame16"}},
		{"fixed, data", variant{}, []string{"CompareAndWrite", "OrWrite", "Unmap", "WriteSame10", "WriteSame16", "iSCSIResiduals", "iSCSIcmdsn", "iSCSIdatasn",
			"ExtendedCopy", "ReceiveCopyResults"}},
		{"sanitize", variant{size: 64 << 20}, []string{"Sanitize"}},
		{"fixed", variant{}, []string{"PrinReadKeys", "PrinReportCapabilities", "PrinServiceactionRange", "ProutClear",
			"ProutPreempt", "ProutRegister", "ProutReserve", "ReadDefectData10", "ReadDefectData12", "ReportSupportedOpcodes", "Reserve6",
			"Verify16", "WriteVerify10", "ModeSense6", "Prefetch10", "Prefetch16"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			tests := Family(all, x.families...)
			// TestSanitizeReset has that one.
			tests = slices.DeleteFunc(tests, func(n string) bool { return n == "SCSI.Sanitize.Reset" })
			rs := serve(t, x.v).RunAll(t.Context(), tests, 1)
			t.Logf("\n%s", Table(rs))
			for _, r := range rs {
				if r.Verdict != Pass && !(x.name == "4096" && onlyLarger(r)) && !(x.name == "sanitize" && cryptoErase(r)) {
					t.Errorf("%s %s: %s", r.Verdict, r.Test, r.Why)
				}
			}
		})
	}
}

// onlyLarger tells whether a test was skipped because logical and physical block
// are the same size; the other variants run it.
func onlyLarger(r Result) bool {
	return r.Verdict == Skip && strings.Contains(r.Why, "LBPPB")
}

// TestSanitizeReset needs an operation that lasts longer than the program's three
// seconds of sleep, and then sleeps for a minute: LIBISCSI_ALL=1 runs it.
func TestSanitizeReset(t *testing.T) {
	if os.Getenv("LIBISCSI_ALL") == "" {
		t.Skip("skip: takes more than a minute, runs with LIBISCSI_ALL=1")
	}
	need(t)
	t.Parallel()
	r := serve(t, variant{size: 64 << 20, wrap: func(d block.Device) block.Device {
		return fault.New(d, fault.Rule{Ops: fault.Write, Delay: 120 * time.Millisecond})
	}})
	r.Limit = 150 * time.Second
	if res := r.Run(t.Context(), "SCSI.Sanitize.Reset"); res.Verdict != Pass {
		t.Errorf("%s: %s\n%s", res.Verdict, res.Why, res.Log)
	}
}

// cryptoErase tells whether a test was skipped, in part at least, for want of
// SANITIZE CRYPTOGRAPHIC ERASE: no store encrypts, so there is no key to destroy.
func cryptoErase(r Result) bool {
	return r.Verdict == Skip && (strings.Contains(r.Why, "CRYPTO_ERASE") || strings.Contains(r.Test, "CryptoErase"))
}

// TestAll runs the whole list for information: LIBISCSI_ALL=1, or a variant's
// name (removable, readonly, paths, 4096).
func TestAll(t *testing.T) {
	which := os.Getenv("LIBISCSI_ALL")
	if which == "" {
		t.Skip("skip: the whole list runs with LIBISCSI_ALL=1")
	}
	need(t)
	all, err := List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if f := os.Getenv("LIBISCSI_FAMILY"); f != "" {
		all = Family(all, strings.Split(f, ",")...)
	}
	var v variant
	switch which {
	case "removable":
		v.lun = func(l *target.LUN) { l.Removable = true }
	case "readonly":
		v.lun = func(l *target.LUN) { l.ReadOnly = true }
	case "paths":
		v.paths = 2
	case "4096":
		v.blockSize = 4096
	}
	rs := serve(t, v).RunAll(t.Context(), all, 1)
	t.Logf("\n%s", Table(rs))
	if os.Getenv("LIBISCSI_VERBOSE") != "" {
		for _, r := range rs {
			if r.Verdict != Pass {
				t.Logf("%s\n%s", r.Test, r.Log)
			}
		}
	}
}
