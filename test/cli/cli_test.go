package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// bin is where the programs of this run lie.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "blockhouse-cli")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = filepath.Join(dir, "bin")
	// Without -race: these are the programs that users run, and three of them
	// start nine processes at once.
	out, err := exec.Command("go", "build", "-o", bin+"/", "../../cmd/clusteradm", "../../cmd/clusterd", "../../cmd/mkfs-gfs").CombinedOutput()
	if err != nil {
		fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
		return 1
	}
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// place gives each daemon a loopback address of its own, so that scripts run
// beside each other.
var place atomic.Int32

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			// A socket's name may have 107 bytes; testscript's own folder is longer.
			short, err := os.MkdirTemp("", "bh")
			if err != nil {
				return err
			}
			d := &daemons{dir: short}
			e.Values[daemonsKey{}] = d
			e.Defer(func() {
				d.stopAll()
				_ = os.RemoveAll(short)
			})
			e.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
			e.Setenv("SHORT", short)
			e.Setenv("BIN", bin)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"clusterd": clusterd,
			"stop":     stop,
			"capture":  capture,
			"jsonhas":  jsonhas,
			"exits":    exits,
			"pty":      pty,
			"until":    until,
		},
	})
}

type daemonsKey struct{}

// daemons are the nodes that one script started.
type daemons struct {
	dir string
	all map[string]*exec.Cmd
}

func of(ts *testscript.TestScript) *daemons { return ts.Value(daemonsKey{}).(*daemons) }

// clusterd NAME starts a node that is a member of nothing. It sets $NAME_SOCKET
// and $NAME_ADDR (host:port of the API), and $BLOCKHOUSE_SOCKET for the first.
func clusterd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: clusterd NAME")
	}
	d, name := of(ts), args[0]
	dir := filepath.Join(d.dir, name)
	config := filepath.Join(dir, "clusterd.toml")
	if _, err := os.Stat(config); errors.Is(err, fs.ErrNotExist) {
		ip, ports := freePlace(ts)
		at := func(i int) string { return net.JoinHostPort(ip, strconv.Itoa(ports[i])) }
		ts.Check(os.MkdirAll(dir, 0o700))
		ts.Check(os.WriteFile(config, []byte(fmt.Sprintf("name = %q\ndata_dir = %q\nrun_dir = %q\nprofile = \"fast\"\n[listen]\napi = %q\nraft = %q\ngossip = %q\niscsi = [%q]\n[priority]\nnice = 0\n",
			name, filepath.Join(dir, "data"), filepath.Join(dir, "run"), at(0), at(1), at(2), at(3))), 0o600))
		ts.Check(os.WriteFile(filepath.Join(dir, "addr"), []byte(at(0)), 0o600))
		ts.Check(os.WriteFile(filepath.Join(dir, "portal"), []byte(at(3)), 0o600))
	}
	log, err := os.OpenFile(filepath.Join(dir, "clusterd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	ts.Check(err)
	defer log.Close()
	cmd := exec.Command(filepath.Join(bin, "clusterd"), "--config", config)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), marker+"="+d.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	ts.Check(cmd.Start())
	if d.all == nil {
		d.all = map[string]*exec.Cmd{}
	}
	d.all[name] = cmd
	read := func(f string) string {
		b, err := os.ReadFile(filepath.Join(dir, f))
		ts.Check(err)
		return string(b)
	}
	sock := filepath.Join(dir, "run", "clusterd.sock")
	up := strings.ToUpper(name)
	ts.Setenv(up+"_SOCKET", sock)
	ts.Setenv(up+"_ADDR", read("addr"))
	ts.Setenv(up+"_PORTAL", read("portal"))
	if ts.Getenv("BLOCKHOUSE_SOCKET") == "" {
		ts.Setenv("BLOCKHOUSE_SOCKET", sock)
	}
	for range 600 {
		if c, err := net.Dial("unix", sock); err == nil {
			_ = c.Close()
			return
		}
		var ws unix.WaitStatus
		if pid, _ := unix.Wait4(cmd.Process.Pid, &ws, unix.WNOHANG|unix.WNOWAIT, nil); pid == cmd.Process.Pid {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	b, _ := os.ReadFile(filepath.Join(dir, "clusterd.log"))
	ts.Fatalf("clusterd %s does not listen on %s; its log:\n%s", name, sock, b)
}

// stop NAME kills every process of a node, as a power cut would.
func stop(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: stop NAME")
	}
	d := of(ts)
	cmd := d.all[args[0]]
	if cmd == nil {
		ts.Fatalf("stop: clusterd %s was not started", args[0])
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	delete(d.all, args[0])
	killMarked(marker+"="+d.dir, filepath.Join(d.dir, args[0])+"/")
}

func (d *daemons) stopAll() {
	for _, c := range d.all {
		_ = c.Process.Kill()
		_ = c.Wait()
	}
	killMarked(marker+"="+d.dir, "")
}

// marker is an environment variable by which a script's processes, and those
// that they start, are known.
const marker = "BLOCKHOUSE_TEST_SCRIPT"

// killMarked kills the processes that carry the mark and, unless within is
// empty, work below that folder (their arguments or open socket say so).
func killMarked(mark, within string) {
	for range 200 {
		found := false
		ents, _ := os.ReadDir("/proc")
		for _, e := range ents {
			pid, err := strconv.Atoi(e.Name())
			if err != nil || pid == os.Getpid() {
				continue
			}
			env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
			if err != nil || !strings.Contains("\x00"+string(env), "\x00"+mark+"\x00") {
				continue
			}
			args, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
			if within != "" && !strings.Contains(string(args), within) {
				continue
			}
			found = true
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if !found {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// freePlace finds an address and four ports.
func freePlace(ts *testscript.TestScript) (ip string, ports [4]int) {
	// 127.64/10 is used by nobody else; the pid keeps two runs apart.
	n := place.Add(1)
	ip = fmt.Sprintf("127.%d.%d.%d", 64+os.Getpid()%64, (os.Getpid()/64)%256, n)
	for i := range ports {
		l, err := net.Listen("tcp4", ip+":0")
		ts.Check(err)
		ports[i] = l.Addr().(*net.TCPAddr).Port
		defer l.Close()
	}
	return ip, ports
}

// capture NAME sets $NAME to the standard output of the last command, without
// its last newline.
func capture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: capture NAME")
	}
	ts.Setenv(args[0], strings.TrimRight(ts.ReadFile("stdout"), "\n"))
}

// jsonhas FILE PATH [VALUE] looks into a JSON document: PATH is a.b.0.c. With
// VALUE the value, printed, must be it.
func jsonhas(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: jsonhas stdout|stderr|FILE PATH [VALUE]")
	}
	var v any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &v))
	ok := true
	for _, k := range strings.Split(args[1], ".") {
		switch x := v.(type) {
		case map[string]any:
			v, ok = x[k]
		case []any:
			i, err := strconv.Atoi(k)
			ok = err == nil && i < len(x)
			if ok {
				v = x[i]
			}
		default:
			ok = false
		}
		if !ok {
			break
		}
	}
	if ok && len(args) == 3 {
		ok = fmt.Sprint(v) == args[2]
	}
	if ok == neg {
		ts.Fatalf("%s: %s is %v (found %v)\n%s", args[0], args[1], v, ok, ts.ReadFile(args[0]))
	}
}

// exits CODE PROGRAM ARG... runs a program and wants exactly this exit status.
// What it wrote is in the files stdout.txt and stderr.txt.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		got = ee.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%s: exit status %d, want %d", strings.Join(args[1:], " "), got, want)
	}
	ts.Check(os.WriteFile(ts.MkAbs("stdout.txt"), []byte(ts.ReadFile("stdout")), 0o600))
	ts.Check(os.WriteFile(ts.MkAbs("stderr.txt"), []byte(ts.ReadFile("stderr")), 0o600))
}

// until REGEXP PROGRAM ARG... repeats a command of ours until it succeeds and
// its output matches, for 30 s.
func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until REGEXP PROGRAM [ARG...]")
	}
	re, err := regexp.Compile(args[0])
	ts.Check(err)
	var out []byte
	for begin := time.Now(); time.Since(begin) < 30*time.Second; time.Sleep(100 * time.Millisecond) {
		// Not ts.Exec, which would log every attempt.
		c := exec.Command(filepath.Join(bin, args[1]), args[2:]...)
		c.Env = append(os.Environ(), "BLOCKHOUSE_SOCKET="+ts.Getenv("BLOCKHOUSE_SOCKET"))
		c.Dir = ts.MkAbs(".")
		if out, err = c.CombinedOutput(); err == nil && re.Match(out) {
			return
		}
	}
	ts.Fatalf("%s: never matched %s (%v); last:\n%s", strings.Join(args[1:], " "), args[0], err, out)
}

// pty TYPED PROGRAM ARG... runs a program on a terminal on which TYPED and a
// newline are typed. What was seen there becomes the file screen.
func pty(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: pty TYPED PROGRAM [ARG...]")
	}
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	ts.Check(err)
	defer m.Close()
	ts.Check(unix.IoctlSetPointerInt(int(m.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(m.Fd()), unix.TIOCGPTN)
	ts.Check(err)
	s, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	ts.Check(err)
	_, err = m.WriteString(args[0] + "\n")
	ts.Check(err)
	cmd := exec.Command(filepath.Join(bin, args[1]), args[2:]...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "BLOCKHOUSE_SOCKET="+ts.Getenv("BLOCKHOUSE_SOCKET"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s, s, s
	ts.Check(cmd.Start())
	_ = s.Close()
	var seen strings.Builder
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, err := m.Read(b)
			seen.Write(b[:n])
			if err != nil {
				return // EIO: the program has closed its terminal
			}
		}
	}()
	err = cmd.Wait()
	<-done
	ts.Check(os.WriteFile(ts.MkAbs("screen"), []byte(strings.ReplaceAll(seen.String(), "\r\n", "\n")), 0o600))
	ts.Logf("[screen]\n%s", seen.String())
	if (err != nil) != neg {
		ts.Fatalf("pty %q: %v", args[1:], err)
	}
}
