// Labagent runs in a lab guest as the only child of init and executes the commands of the test. See test/lab.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/test/lab/internal/agent"
)

func main() {
	if err := serve(agent.Port); err != nil {
		fmt.Fprintln(os.Stderr, "labagent:", err)
		os.Exit(1)
	}
}

type server struct {
	port *os.File

	mu struct {
		sync.Mutex             // also keeps the lines of the port whole
		groups     map[int]int // command id → process group
	}
}

func serve(name string) error {
	port, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	if err := raw(int(port.Fd())); err != nil {
		return fmt.Errorf("set %s raw: %w", name, err)
	}
	s := &server{port: port}
	s.mu.groups = make(map[int]int)
	if err := s.send(agent.Event{Kind: agent.Hello}); err != nil {
		return err
	}
	in := bufio.NewScanner(port)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var rq agent.Request
		if err := json.Unmarshal(in.Bytes(), &rq); err != nil {
			return fmt.Errorf("request %q: %w", in.Bytes(), err)
		}
		switch rq.Op {
		case agent.Run:
			go s.answer(rq, s.command)
		case agent.Tasks:
			go s.answer(rq, s.tasks)
		case agent.Signal:
			s.mu.Lock()
			if g := s.mu.groups[rq.ID]; g != 0 {
				_ = unix.Kill(-g, syscall.Signal(rq.Value))
			}
			s.mu.Unlock()
		case agent.Poweroff:
			unix.Sync()
			return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		default:
			return fmt.Errorf("unknown request %q", in.Bytes())
		}
	}
	return fmt.Errorf("the line of %s ended: %w", name, in.Err())
}

// raw switches off everything that a terminal does to bytes (termios(3), cfmakeraw).
func raw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}

func (s *server) send(e agent.Event) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err = s.port.Write(append(line, '\n'))
	return err
}

func (s *server) answer(rq agent.Request, do func(agent.Request) (int, error)) {
	code, err := do(rq)
	e := agent.Event{ID: rq.ID, Kind: agent.Exit, Value: code}
	if err != nil {
		e = agent.Event{ID: rq.ID, Kind: agent.Fail, Data: []byte(err.Error())}
	}
	if err := s.send(e); err != nil {
		fmt.Fprintln(os.Stderr, "labagent:", err) // the console keeps it
	}
}

func (s *server) tasks(rq agent.Request) (int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, d := range dirs {
		stat, err := os.ReadFile(filepath.Join(d, "stat"))
		if err != nil {
			continue // ended meanwhile
		}
		// "17 (name with spaces) S 1 ..."
		name, rest, _ := bytes.Cut(stat, []byte(") "))
		stack, err := os.ReadFile(filepath.Join(d, "stack"))
		if err != nil {
			stack = []byte(err.Error())
		}
		text := fmt.Appendf(nil, "task %s) state %.1s\n%s\n", name, rest, bytes.TrimSpace(stack))
		if err := s.send(agent.Event{ID: rq.ID, Kind: agent.Out, Data: text}); err != nil {
			return 0, err
		}
	}
	return 0, nil
}

func (s *server) command(rq agent.Request) (int, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	// The first failing command ends a script: a scenario must not go on over a failure.
	cmd := exec.Command("/bin/bash", "-eu", "-o", "pipefail", rq.Script)
	cmd.Dir = "/root"
	cmd.Stdout, cmd.Stderr = w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return 0, err
	}
	s.mu.Lock()
	s.mu.groups[rq.ID] = cmd.Process.Pid
	s.mu.Unlock()
	drained := make(chan struct{})
	quiet := make(chan struct{}, 1) // a read found nothing for a while
	go s.forward(rq.ID, r, drained, quiet)
	err = cmd.Wait()
	s.mu.Lock()
	delete(s.mu.groups, rq.ID)
	s.mu.Unlock()
	// What the command itself wrote is in the pipe by now. A process that it left behind may keep the pipe open for ever,
	// so wait for the end or for an empty pipe: the third report is of a read that began after the command's end.
	for range 3 {
		select {
		case <-drained:
		case <-quiet:
		}
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

func (s *server) forward(id int, r *os.File, drained, quiet chan struct{}) {
	defer close(drained)
	defer r.Close()
	buf := make([]byte, 2048)
	for {
		_ = r.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		k, err := r.Read(buf)
		if k > 0 {
			if serr := s.send(agent.Event{ID: id, Kind: agent.Out, Data: buf[:k]}); serr != nil {
				fmt.Fprintln(os.Stderr, "labagent:", serr)
				return
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			select {
			case quiet <- struct{}{}:
			default:
			}
			continue
		}
		if err != nil {
			return
		}
	}
}
