package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

// The real agents of Debian's package fence-agents, unmodified (facts §2.2).

func debian(t *testing.T, agents ...string) *Runner {
	t.Helper()
	testproc.Need(t, agents...)
	return New(Config{Node: "n1"})
}

func TestFenceDummyFile(t *testing.T) {
	t.Parallel()
	r := debian(t, "fence_dummy")
	file := filepath.Join(t.TempDir(), "status")
	do := func(a Action) Result {
		t.Helper()
		return run(t, r, Request{Agent: "fence_dummy", Action: a, Target: "n2", Params: map[string]string{"status_file": file}})
	}
	for _, c := range []struct {
		a     Action
		power Power
		file  string
	}{
		{On, PowerUnknown, "on"}, {Status, PowerOn, "on"}, {Off, PowerUnknown, "off"}, {Status, PowerOff, "off"},
		{Reboot, PowerUnknown, "on"}, {Monitor, PowerUnknown, "on"}, {ValidateAll, PowerUnknown, "on"},
	} {
		res := do(c.a)
		b, err := os.ReadFile(file)
		if !res.OK() || res.Power != c.power || err != nil || string(b) != c.file {
			t.Errorf("%s: %+v, file %q, %v", c.a, res, b, err)
		}
	}
	// It does not advertise list, so it is not asked.
	if _, _, err := r.List(t.Context(), Request{Agent: "fence_dummy"}, false); err == nil || !strings.Contains(err.Error(), "does not advertise") {
		t.Errorf("list: %v", err)
	}
}

// facts §2.2: option=status makes the agent reboot. Here it is the action, or is
// refused.
func TestFenceDummyDeprecatedSpelling(t *testing.T) {
	t.Parallel()
	r := debian(t, "fence_dummy")
	file := filepath.Join(t.TempDir(), "status")
	if err := os.WriteFile(file, []byte("off"), 0o644); err != nil {
		t.Fatal(err)
	}
	res := run(t, r, Request{Agent: "fence_dummy", Action: Status, Target: "n2", Params: map[string]string{"status_file": file, "option": "status"}})
	if res.Power != PowerOff || strings.Contains(res.Output, "Rebooted") {
		t.Errorf("%+v", res)
	}
	if _, err := r.Run(t.Context(), Request{Agent: "fence_dummy", Action: Off, Target: "n2", Params: map[string]string{"status_file": file, "option": "status"}}); err == nil {
		t.Error("two actions are accepted")
	}
	if b, _ := os.ReadFile(file); string(b) != "off" {
		t.Errorf("the node is %s", b)
	}
}

func TestFenceDummyFail(t *testing.T) {
	t.Parallel()
	r := debian(t, "fence_dummy")
	res := run(t, r, Request{Agent: "fence_dummy", Action: Off, Target: "n2", Params: map[string]string{"type": "fail", "plug": "n2", "power_timeout": "1"}})
	if res.Outcome != fencing.Failed || res.ExitCode != 1 || res.Output == "" {
		t.Errorf("%+v", res)
	}
}

func TestFenceDummyDelayAndTimeout(t *testing.T) {
	t.Parallel()
	r := debian(t, "fence_dummy")
	if _, err := r.Metadata(t.Context(), "fence_dummy"); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "status")
	q := Request{Agent: "fence_dummy", Action: Off, Target: "n2", Params: map[string]string{"status_file": file}, Delay: 1500 * time.Millisecond}
	start := time.Now()
	if res := run(t, r, q); !res.OK() || time.Since(start) < 2*time.Second { // rounded up to whole seconds
		t.Errorf("%+v after %v", res, time.Since(start))
	}
	// Longer than the limit: a failure, and the node was not touched.
	if err := os.WriteFile(file, []byte("on"), 0o644); err != nil {
		t.Fatal(err)
	}
	q.Delay, q.Timeout = 0, 1500*time.Millisecond
	q.Action = Reboot
	q.Params = map[string]string{"status_file": file, "power_wait": "60"}
	if res := run(t, r, q); res.Outcome != fencing.TimedOut || res.OK() {
		t.Errorf("%+v", res)
	}
	if b, _ := os.ReadFile(file); string(b) == "" {
		t.Error("the status file is gone")
	}
}

// What the agents advertise (facts §2.2).
func TestRealMetadata(t *testing.T) {
	t.Parallel()
	r := debian(t, "fence_scsi", "fence_sbd", "fence_ipmilan", "fence_kdump", "fence_mpath")
	for _, c := range []struct {
		agent           string
		power, unfences bool
		list            bool
	}{
		{"fence_scsi", false, true, false}, {"fence_mpath", false, true, false}, {"fence_sbd", true, false, true},
		{"fence_ipmilan", true, false, false}, {"fence_kdump", false, false, false},
	} {
		m, err := r.Metadata(t.Context(), c.agent)
		if err != nil {
			t.Error(err)
			continue
		}
		must, onTarget := m.Unfences()
		if m.Name != c.agent || !m.Advertises(Off) || m.Power() != c.power || must != c.unfences || onTarget != c.unfences || m.Advertises(ListStatus) != c.list {
			t.Errorf("%s: power %v, unfences %v %v, actions %v", c.agent, m.Power(), must, onTarget, m.Actions)
		}
	}
	m, err := r.Metadata(t.Context(), "fence_ipmilan")
	if err != nil {
		t.Fatal(err)
	}
	for old, want := range map[string]string{"port": "plug", "ipaddr": "ip", "login": "username", "passwd": "password", "passwd_script": "password_script",
		"debug": "debug_file", "option": "action", "sudo": "use_sudo", "ip": "ip", "plug": "plug"} {
		if got := m.Spelling(old); got != want {
			t.Errorf("%s is spelled %s, not %s", old, got, want)
		}
	}
	if s, err := r.Metadata(t.Context(), "fence_scsi"); err != nil || s.Spelling("suppress-errors") != "suppress_errors" {
		t.Errorf("%v", err)
	}
	if s, err := r.Metadata(t.Context(), "fence_sbd"); err != nil || strings.Join(s.Missing(map[string]string{}), ",") != "devices" {
		t.Errorf("%v, %v", s.Missing(nil), err)
	}
}

// Real failures are failures: no key of this node, nothing at the address.
func TestRealFailures(t *testing.T) {
	t.Parallel()
	r := debian(t, "fence_scsi", "fence_ipmilan")
	for _, q := range []Request{
		{Agent: "fence_scsi", Action: Off, Target: "n2", Params: map[string]string{"devices": "/dev/null", "logfile": filepath.Join(t.TempDir(), "log")}},
		{Agent: "fence_ipmilan", Action: Off, Target: "n2", Params: map[string]string{"ipaddr": "127.0.0.1", "ipport": "1", "login": "u", "passwd": "verysecret"}},
	} {
		if res := run(t, r, q); res.Outcome != fencing.Failed || res.ExitCode != 1 || strings.Contains(res.Output, "verysecret") {
			t.Errorf("%s: %+v", q.Agent, res)
		}
	}
}
