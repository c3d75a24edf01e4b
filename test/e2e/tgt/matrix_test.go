package tgt

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/cli/tgt"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

// options of tgtadm with a value that its client takes.
var matrixOptions = []string{"", "--tid 1", "--sid 1", "--cid 0", "--lun 1", "--name a", "--value b", "--backing-store /x", "--bstype rdwr", "--bsopts x", "--bsoflags sync",
	"--blocksize 512", "--targetname iqn.2001-01.a:b", "--initiator-address ALL", "--initiator-name iqn.2001-01.c:d", "--user u", "--password p", "--host 1", "--force", "--outgoing",
	"--params portal=1", "--bus 1", "--device-type disk"}

// What the client refuses by itself: every mode with every operation and option,
// and pairs of options, without a daemon on either side.
func TestEveryModeOperationAndOption(t *testing.T) {
	t.Parallel()
	testproc.Need(t, "tgtadm")
	prog, err := testproc.Find("tgtadm")
	if err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(t.TempDir(), "none")
	env := append(os.Environ(), "TGT_IPC_SOCKET="+none)
	lines := 0
	for _, mode := range []string{"sys", "system", "target", "tgt", "logicalunit", "lu", "portal", "pt", "session", "sess", "connection", "conn", "account", "lld"} {
		for _, op := range []string{"new", "delete", "bind", "unbind", "show", "update", "stat", "start", "stop"} {
			for _, o := range matrixOptions {
				for i, with := range []string{"", "--tid 1 --lun 1", "--tid 1", "--user u"} {
					if i > 1 && testproc.Count(t, 1) < 2 {
						continue
					}
					alias := len(mode) < 5 && mode != "lld"
					if alias && (with != "" || o != "" && o != "--tid 1") || with != "" && strings.Contains(o, "--tid") || strings.Contains(with, "--lun") && strings.Contains(o, "--lun") {
						continue // nothing is given twice
					}
					if mode == "account" && op == "delete" && o != "--user u" && with != "--user u" {
						continue // the real client lets it pass, and the daemon dies of it
					}
					lines++
					args := strings.Fields("--mode " + mode + " --op " + op + " " + o + " " + with)
					a, aCode := matrixReal(t, prog, env, args)
					var out, errs bytes.Buffer
					bCode := tgt.Tgtadm(t.Context(), args, tgt.IO{Out: &out, Err: &errs, Socket: none})
					b := out.String() + errs.String()
					if aCode == 107 && bCode == 107 { // both asked a daemon; ours says why, too
						b, _, _ = strings.Cut(b, "\n")
						b += "\n"
					}
					if a != b || aCode != bCode {
						t.Errorf("tgtadm %s\nreal %d: %sours %d: %s", strings.Join(args, " "), aCode, a, bCode, b)
					}
				}
			}
		}
	}
	t.Logf("%d command lines", lines)
}

func matrixReal(t *testing.T, prog string, env, args []string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, prog, args...)
	cmd.Args[0] = "tgtadm"
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatalf("%v: %v", args, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}
