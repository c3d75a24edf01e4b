package gfs

import (
	"os"
	"os/exec"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	cmds := map[string]func(){}
	for _, f := range Faces() {
		name := f.Name
		if _, err := exec.LookPath(name); err == nil {
			continue // scripts mean the real one
		}
		cmds[name] = func() { os.Exit(Main(name, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }
	}
	testscript.Main(m, cmds)
}

func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{Dir: "testdata", RequireExplicitExec: true, Setup: func(e *testscript.Env) error {
		need(t, "fsck.gfs2", "mkfs.gfs2")
		return nil
	}})
}
