package storage

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block/replica"
	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/internal/seal"
	fsmstorage "github.com/blockhouse-san/blockhouse/membership/fsm/storage"
	"github.com/blockhouse-san/blockhouse/target"
)

func newWorker(t *testing.T) (*worker, *observer.ObservedLogs) {
	core, logs := observer.New(zap.DebugLevel)
	cfg := config.Default()
	cfg.DataDir = t.TempDir()
	cfg.Listen.ISCSI = []string{"127.0.0.1:3260"}
	return &worker{cfg: cfg, log: zap.New(core), vols: map[string]*volume{}, erased: map[string]bool{}}, logs
}

func sealed(t *testing.T, k seal.Key, name, secret string) *fsmstorage.Account {
	b, err := k.Seal(name, []byte(secret), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &fsmstorage.Account{Name: name, Sealed: b, Key: k.ID()}
}

// A target that asks for secrets and has none to compare with takes nobody; what
// cannot be done of the rest is left out; no secret is logged or printed.
func TestAuth(t *testing.T) {
	t.Parallel()
	k, err := seal.New(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	accounts := map[string]*fsmstorage.Account{"in": sealed(t, k, "in", "secret-of-the-in"), "out": sealed(t, k, "out", "secret-of-the-out"),
		"same": sealed(t, k, "same", "secret-of-the-in")}
	for _, tc := range []struct {
		name    string
		key     seal.Key
		auth    fsmstorage.Auth
		in, out string
		offline bool
		log     string
	}{
		{"none", k, fsmstorage.Auth{}, "", "", false, ""},
		{"one way", k, fsmstorage.Auth{Incoming: []string{"in"}}, "in", "", false, ""},
		{"mutual", k, fsmstorage.Auth{Incoming: []string{"in"}, Outgoing: "out"}, "in", "out", false, ""},
		{"one secret", k, fsmstorage.Auth{Incoming: []string{"in"}, Outgoing: "same"}, "in", "", false, "have one secret"},
		{"outgoing alone", k, fsmstorage.Auth{Outgoing: "out"}, "", "", false, "there is no incoming one"},
		{"unknown", k, fsmstorage.Auth{Incoming: []string{"gone"}}, "", "", true, "no such account"},
		{"no key", nil, fsmstorage.Auth{Incoming: []string{"in"}}, "", "", true, "sealing key"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w, logs := newWorker(t)
			want := &desired{node: "n1", index: 1, inc: 1, key: tc.key}
			want.storage.Accounts = accounts
			want.storage.Discovery = tc.auth
			want.storage.Targets = map[string]*fsmstorage.Target{"iqn.2026-01.org.x:a": {IQN: "iqn.2026-01.org.x:a", TID: 1, Auth: tc.auth}}
			for range 2 {
				c, err := w.config(want, "serving")
				if err != nil {
					t.Fatal(err)
				}
				if err := c.Validate(); err != nil {
					t.Fatal(err)
				}
				got := c.Targets[0]
				names := ""
				for _, a := range got.Auth.Accounts {
					names += a.Name
				}
				if names != tc.in || got.Auth.Out.Name != tc.out || got.Offline != tc.offline {
					t.Fatalf("accounts %q, out %q, offline %v", names, got.Auth.Out.Name, got.Offline)
				}
				if tc.offline && (len(c.Discovery.Accounts) != 1 || len(c.Discovery.Accounts[0].Secret) < 16) {
					t.Fatalf("discovery without its secrets: %+v", c.Discovery)
				}
				if s := fmt.Sprintf("%v %+v %#v", c, c, c); strings.Contains(s, "secret-of") || strings.Contains(s, fmt.Sprint([]byte("secret-of"))[1:20]) {
					t.Fatalf("a configuration prints its secrets: %s", s)
				}
			}
			n, text := 0, ""
			for _, e := range logs.All() {
				n++
				text += fmt.Sprint(e.Message, e.ContextMap())
			}
			if !strings.Contains(text, tc.log) || (n == 0) != (tc.log == "") || n > 2 || strings.Contains(text, "secret-of") {
				t.Fatalf("%d lines logged: %s", n, text)
			}
		})
	}
}

// Two configurations that differ in a secret alone differ.
func TestSecretsOf(t *testing.T) {
	t.Parallel()
	mk := func(s string) *target.Config {
		return &target.Config{Targets: []target.Target{{Auth: target.Auth{Accounts: []target.Account{{Name: "a", Secret: target.Secret(s)}}}}}}
	}
	one, same := secretsOf(mk("1")), secretsOf(mk("1"))
	if one == secretsOf(mk("2")) || one != same || strings.Contains(secretsOf(mk("hunter2hunter2")), "hunter2") {
		t.Fatal("secrets are not compared")
	}
}

func TestOpenGiven(t *testing.T) {
	t.Parallel()
	w, _ := newWorker(t)
	dir := t.TempDir()
	img := filepath.Join(dir, "a.img")
	if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(w.cfg.VolumeDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	ours := filepath.Join(w.cfg.VolumeDir(), "x.img")
	if err := os.WriteFile(ours, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	vol := func(store string, size int64) *fsmstorage.Volume {
		return &fsmstorage.Volume{Name: "v", State: fsmstorage.Creating, Store: store, Config: replica.Config{UUID: theID, Size: size, BlockSize: 512}}
	}
	f, err := w.openStore(t.Context(), vol("file:"+img, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	for store, want := range map[string]string{
		"file:" + img:               "in use",
		"file:" + dir + "/none.img": "no such file",
		"block:" + img:              "it is no block device",
		"file:" + ours:              "folder of our own volumes",
		"file:" + dir:               "no regular file",
	} {
		if _, err := w.openStore(t.Context(), vol(store, 1<<20)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", store, err, want)
		}
	}
	if _, err := os.Stat(dir + "/none.img"); err == nil {
		t.Error("a store that was missing was made")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.openStore(t.Context(), vol("file:"+img, 2<<20)); err == nil || !strings.Contains(err.Error(), "has 1048576 bytes") {
		t.Error(err)
	}
}

// What api says a target does without a parameter is what it does.
func TestParamDefaults(t *testing.T) {
	t.Parallel()
	d := target.DefaultWant()
	yn := map[bool]string{true: "Yes", false: "No"}
	want := map[string]string{
		"MaxRecvDataSegmentLength": fmt.Sprint(d.MaxRecv), "MaxBurstLength": fmt.Sprint(d.MaxBurstLength), "FirstBurstLength": fmt.Sprint(d.FirstBurstLength),
		"MaxOutstandingR2T": fmt.Sprint(d.MaxOutstandingR2T), "InitialR2T": yn[d.InitialR2T], "ImmediateData": yn[d.ImmediateData],
		"HeaderDigest": strings.Join(d.HeaderDigests, ","), "DataDigest": strings.Join(d.DataDigests, ","),
		"MaxConnections": fmt.Sprint(d.MaxConnections), "ErrorRecoveryLevel": fmt.Sprint(d.ErrorRecoveryLevel),
		"DefaultTime2Wait": fmt.Sprint(d.DefaultTime2Wait), "DefaultTime2Retain": fmt.Sprint(d.DefaultTime2Retain),
	}
	for _, p := range api.TargetParams {
		if w, ok := want[p.Name]; ok && w != p.Default {
			t.Errorf("%s: the target does %s, api says %s", p.Name, w, p.Default)
		}
	}
}
