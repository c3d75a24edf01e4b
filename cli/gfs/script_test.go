package gfs

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	cmds := map[string]func(){}
	for _, f := range Faces() {
		name := f.Name
		if name == "mkfs.gfs2" || name == "fsck.gfs2" || name == "tunegfs2" {
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
