package testproc

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// ArtefactEnv names the folder under which artefacts are kept; unset means a folder below os.TempDir.
const ArtefactEnv = "BLOCKHOUSE_ARTEFACTS"

var artefacts sync.Map // testing.TB → string

// ArtefactDir returns a folder of this test for logs and captures. It is removed when the test passes; when it fails the
// folder stays and its path is logged. Every call with the same t returns the same folder.
func ArtefactDir(t testing.TB) string {
	t.Helper()
	if d, ok := artefacts.Load(t); ok {
		return d.(string)
	}
	root := os.Getenv(ArtefactEnv)
	if root == "" {
		root = filepath.Join(os.TempDir(), fmt.Sprintf("blockhouse-artefacts-%d", os.Getuid()))
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatalf("create artefact folder: %v; set %s to a writable folder", err, ArtefactEnv)
	}
	dir, err := os.MkdirTemp(root, strings.Map(fileRune, t.Name())+"-")
	if err != nil {
		t.Fatalf("create artefact folder: %v; set %s to a writable folder", err, ArtefactEnv)
	}
	// hostfs of a guest and child processes under another uid read it.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if prev, loaded := artefacts.LoadOrStore(t, dir); loaded {
		_ = os.Remove(dir)
		return prev.(string)
	}
	t.Cleanup(func() {
		artefacts.Delete(t)
		if t.Failed() {
			t.Logf("artefacts kept in %s", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove artefacts: %v", err)
		}
		_ = os.Remove(root) // goes only when it is empty
	})
	return dir
}

// Find searches a program in $PATH and then in the folders of system programs, which are not in the path of an ordinary
// user. A name with a slash is returned as it is.
func Find(name string) (string, error) {
	if strings.ContainsRune(name, '/') {
		return name, nil
	}
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, d := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		p := filepath.Join(d, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("program %s is not installed; run make deps", name)
}

// Need skips the test with one line when one of the programs is missing, and fails it where CI=true.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := Find(p); err != nil {
			SkipOrFail(t, fmt.Sprintf("%s is not installed (make deps)", p))
		}
	}
}

// SkipOrFail skips the test with "skip: why", and fails it where CI=true: a proof must not vanish there unseen.
func SkipOrFail(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s, and CI=true forbids to skip", why)
	}
	t.Skipf("skip: %s", why)
}

// FreePort returns a TCP port of 127.0.0.1 that was free a moment ago. Prefer to let the program bind port 0 and say which
// it got; somebody else may take this one first.
func FreePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("find a free port: %v", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
