package libiscsi

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
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
	// The program answers no NOP-In while it sleeps.
	srv, err := target.New(target.Options{Logger: log, NopInterval: 10 * time.Second, NopTimeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	portal := netip.MustParseAddrPort("127.0.0.1:0")
	l := target.LUN{Number: 1, Volume: "conformance", Generation: 1, Device: dev,
		Identity: target.Identity{Product: "c0nf0rm1 suite", Serial: "0123456789abcdef", UUID: [16]byte{1, 2, 3, 4}}}
	if v.lun != nil {
		v.lun(&l)
	}
	err = srv.Apply(target.Config{Targets: []target.Target{{
		IQN: iqn, TPGT: 1, RelPort: 1, Portals: []netip.AddrPort{portal}, ACL: target.ACL{Open: true}, LUNs: []target.LUN{l},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(srv.Close(), dev.Close()); err != nil {
			t.Error(err)
		}
	})
	addr, ok := srv.Addr(portal)
	if !ok {
		t.Fatal("the portal is not open")
	}
	return &Runner{URL: fmt.Sprintf("iscsi://%s/%s/1", addr, iqn)}
}

// TestSpine is issue 2's list: nothing failed, nothing skipped but what needs
// protection information.
func TestSpine(t *testing.T) {
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

// TestAll runs the whole list for information: LIBISCSI_ALL=1.
func TestAll(t *testing.T) {
	if os.Getenv("LIBISCSI_ALL") == "" {
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
	rs := serve(t, variant{}).RunAll(t.Context(), all, 1)
	t.Logf("\n%s", Table(rs))
	if os.Getenv("LIBISCSI_VERBOSE") != "" {
		for _, r := range rs {
			if r.Verdict != Pass {
				t.Logf("%s\n%s", r.Test, r.Log)
			}
		}
	}
}
