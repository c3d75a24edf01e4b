package tgt

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// A node whose state is older than accounts gets the sealing key from the others
// and then asks for secrets; before that it lets nobody in. A store that is named
// lies on the node that was asked, also when another leads.
func TestKeyAndStoreOnOtherNodes(t *testing.T) {
	c := cluster.New(t, 3).Up()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	lead := c.Leader()
	var old *cluster.Node
	for _, n := range c.Nodes {
		if n != lead {
			old = n
		}
	}

	img := filepath.Join(stores(t), "sda5")
	v, err := api.Post[api.Volume](ctx, old.API(), api.PathVolumes, api.VolumeCreate{Name: "given", Store: "file:" + img, BlockSize: 512, Replicas: 1})
	if err != nil || v.Primary != old.Name || v.Size != 64<<20 || v.Store != "file:"+img {
		t.Fatalf("%+v, %v", v, err)
	}
	if _, err := api.Post[api.Volume](ctx, old.API(), api.PathVolumes, api.VolumeCreate{Name: "again", Store: "file:" + img, BlockSize: 512, Replicas: 1}); api.AsError(err).Code != api.CodeConflict {
		t.Errorf("one file twice: %v", err)
	}

	old.Stop()
	file := filepath.Join(old.Dir, "data", "node.json")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var id map[string]any
	if err := json.Unmarshal(b, &id); err != nil {
		t.Fatal(err)
	}
	if k, _ := id["cluster_key"].(string); len(k) < 40 {
		t.Fatalf("a node that joined has the key %q", k)
	}
	delete(id, "cluster_key")
	if b, err = json.Marshal(id); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}

	tg, err := api.Post[api.Target](ctx, lead.API(), api.PathTargets, api.TargetCreate{Name: "iqn.2026-01.org.x:a"})
	if err != nil {
		t.Fatal(err)
	}
	open := true
	if _, err := api.Post[api.Target](ctx, lead.API(), api.PathACLs, api.ACLChange{Target: tg.IQN, Open: &open}); err != nil {
		t.Fatal(err)
	}
	a, err := api.Post[api.Account](ctx, lead.API(), api.PathAccounts, api.AccountCreate{Name: "u", Secret: "a-secret-of-16-b"})
	if err != nil || a.Warning != "" {
		t.Fatalf("%+v, %v", a, err)
	}
	if _, err := api.Post[api.Account](ctx, lead.API(), api.PathBindings, api.AccountBind{Account: "u", Target: tg.IQN}); err != nil {
		t.Fatal(err)
	}
	old.Start()
	login := func(cr *iscsi.CHAPCredentials) error {
		s, err := initiator.Login(ctx, old.IP+":3260", tg.IQN, initiator.Config{InitiatorName: "iqn.2026-01.org.x:me", CHAP: cr})
		if err == nil {
			err = s.Close()
		}
		return err
	}
	c.Wait("the node takes the secret", 40*time.Second, func() (bool, string) {
		if login(nil) == nil {
			t.Fatal("it let somebody in without a secret")
		}
		err := login(&iscsi.CHAPCredentials{User: "u", Secret: []byte("a-secret-of-16-b")})
		if err != nil {
			return false, err.Error()
		}
		return true, ""
	})
	// Nobody but a node gets the key.
	var rep map[string]any
	if err := lead.API().Do(ctx, "POST", "/v1/cluster/sealing-key", map[string]string{"id": "x"}, &rep); api.AsError(err).Code != api.CodeDenied {
		t.Errorf("the key over the local socket: %v, %v", rep, err)
	}
}
