package seal

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestSealAndOpen(t *testing.T) {
	t.Parallel()
	k, err := New(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	secret := []byte("123456")
	a, err := k.Seal("christina", secret, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := k.Seal("christina", secret, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(a, b) || bytes.Contains(a, secret) {
		t.Fatal("the seal repeats itself or shows the secret")
	}
	if got, err := k.Open("christina", a); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%q, %v", got, err)
	}
	for i := range a {
		bad := bytes.Clone(a)
		bad[i] ^= 1
		if _, err := k.Open("christina", bad); !errors.Is(err, ErrOpen) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
	}
	for _, bad := range [][]byte{nil, a[:10], a[:27], a[:len(a)-1]} {
		if _, err := k.Open("christina", bad); !errors.Is(err, ErrOpen) {
			t.Fatalf("%d bytes: %v", len(bad), err)
		}
	}
	if _, err := k.Open("clyde", a); !errors.Is(err, ErrOpen) {
		t.Fatalf("another owner: %v", err)
	}
	other, err := New(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open("christina", a); !errors.Is(err, ErrOpen) {
		t.Fatalf("another key: %v", err)
	}
	if other.ID() == k.ID() || len(k.ID()) != 16 || Key(nil).ID() != "" {
		t.Fatalf("ids %q %q", k.ID(), other.ID())
	}
	if _, err := Key("short").Seal("x", nil, rand.Reader); err == nil {
		t.Fatal("a short key seals")
	}
	if _, err := New(bytes.NewReader(nil)); err == nil {
		t.Fatal("a key of no randomness")
	}
}

func TestKeyDoesNotPrint(t *testing.T) {
	t.Parallel()
	k := Key(strings.Repeat("K", KeySize))
	if s := fmt.Sprintf("%v %+v %#v %s", k, k, k, k); strings.Contains(s, "KK") || strings.Contains(s, "75") {
		t.Fatal(s)
	}
	// JSON must carry it: node.json and the answer to a join do.
	b, err := json.Marshal(struct{ K Key }{k})
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ K Key }
	if err := json.Unmarshal(b, &got); err != nil || !bytes.Equal(got.K, k) {
		t.Fatalf("%v, %v", got, err)
	}
}
