package nbd

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/blocktest"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
)

func TestMain(m *testing.M) {
	if err := flag.Set("rapid.checks", "15"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// start runs a real server and waits for its socket.
func start(t *testing.T, sock string, program string, args ...string) {
	t.Helper()
	testproc.Need(t, program)
	testproc.Start(t, testproc.Spec{Name: program, Args: append([]string{program}, args...)})
	for range 500 {
		if c, err := net.Dial("unix", sock); err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not listen on %s", program, sock)
}

func open(tb rapid.TB, o Options) *Client {
	tb.Helper()
	o.Network = "unix"
	c, err := Open(context.Background(), o)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// TestConformance: the suite of all stores against other people's servers.
func TestConformance(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct {
		program string
		args    func(dir, sock string) []string
		bs      int
		export  string
	}{
		"nbdkit":                {"nbdkit", func(_, sock string) []string { return []string{"-f", "-U", sock, "memory", "1M"} }, 512, ""},
		"nbdkit simple replies": {"nbdkit", func(_, sock string) []string { return []string{"-f", "--no-sr", "-U", sock, "memory", "1M"} }, 512, ""},
		"nbdkit blocks of 4096": {"nbdkit", func(_, sock string) []string {
			return []string{"-f", "-U", sock, "--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"}
		}, 4096, ""},
		"nbdkit no zeroes, no FUA": {"nbdkit", func(_, sock string) []string {
			return []string{"-f", "-U", sock, "--filter=nozero", "--filter=fua", "memory", "1M"}
		}, 512, ""},
		"qemu-nbd": {"qemu-nbd", func(dir, sock string) []string {
			p := filepath.Join(dir, "disk")
			if err := errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, 1<<20)); err != nil {
				t.Fatal(err)
			}
			return []string{"-t", "-k", sock, "-f", "raw", "-x", "disk", "--discard=unmap", "--cache=writeback", p}
		}, 512, "disk"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("", "nbd") // the path of a socket is short
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			sock := filepath.Join(dir, "s")
			start(t, sock, x.program, x.args(dir, sock)...)
			o := Options{Addr: sock, BlockSize: x.bs, Export: x.export}
			blocktest.Run(t, blocktest.Store{
				New: func(tb rapid.TB) block.Device {
					c := open(tb, o)
					if err := c.WriteZeroes(context.Background(), 0, c.Info().Size, block.MayUnmap); err != nil {
						tb.Fatal(err)
					}
					return c
				},
				Reopen: func(tb rapid.TB, _ block.Device) block.Device { return open(tb, o) },
			})
		})
	}
}

// TestFeatures: what a full server offers is used, and an unaligned one refused.
func TestFeatures(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	sock := filepath.Join(dir, "s")
	start(t, sock, "nbdkit", "-f", "-U", sock, "--filter=blocksize-policy", "memory", "64M", "blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")
	if _, err := Open(t.Context(), Options{Network: "unix", Addr: sock}); err == nil || !strings.Contains(err.Error(), "needs blocks of 4096") {
		t.Fatalf("blocks of 512 on an export with blocks of 4096: %v", err)
	}
	c := open(t, Options{Addr: sock, BlockSize: 4096})
	defer c.Close()
	if !c.x.structured || !c.x.meta || c.x.flags&xFUA == 0 {
		t.Errorf("%+v", c.x)
	}
	if i := c.Info(); !i.Caps.Thin || !i.Caps.UnmapZeroes || i.Caps.Fences || i.Size != 64<<20 {
		t.Errorf("%+v", i)
	}
	// Larger than the server takes at once.
	p := bytes.Repeat([]byte{3}, 1<<20)
	got := make([]byte, len(p))
	if err := errors.Join(c.WriteAt(t.Context(), p, 4096, block.FUA), c.ReadAt(t.Context(), got, 4096)); err != nil || !bytes.Equal(got, p) {
		t.Fatal("a large write", err)
	}
	// nbdkit's memory is allocated in pages of 32 KiB.
	es, err := c.Extents(t.Context(), 0, c.Info().Size)
	if err != nil || len(es) != 2 || !es[0].Mapped || es[1].Mapped || es[0].Len >= 2<<20 {
		t.Errorf("extents %v, %v", es, err)
	}
	// Many in flight at once.
	var wg sync.WaitGroup
	for k := range 64 {
		wg.Go(func() {
			q := bytes.Repeat([]byte{byte(k)}, 8192)
			r := make([]byte, len(q))
			off := int64(8<<20 + k*8192)
			if err := errors.Join(c.WriteAt(t.Context(), q, off, 0), c.ReadAt(t.Context(), r, off)); err != nil || !bytes.Equal(q, r) {
				t.Errorf("request %d: %v", k, err)
			}
		})
	}
	wg.Wait()
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1<<20)
	try := func(o Options) error {
		o.Network, o.Addr = "unix", s.sock
		c, err := Open(t.Context(), o)
		if err == nil {
			_ = c.Close()
		}
		return err
	}
	if err := try(Options{}); err != nil {
		t.Fatal(err)
	}
	s.noGo = true
	if err := try(Options{}); err != nil {
		t.Errorf("a server without GO: %v", err)
	}
	for what, x := range map[string]struct {
		flags uint16
		size  int
		o     Options
		want  string
	}{
		"no flush":   {xHasFlags, 1 << 20, Options{}, "no FLUSH"},
		"read-only":  {xHasFlags | xFlush | xReadOnly, 1 << 20, Options{}, "read-only"},
		"odd size":   {xHasFlags | xFlush, 1000, Options{}, "multiple of the block size"},
		"block size": {xHasFlags | xFlush, 1 << 20, Options{BlockSize: 1000}, "512 or 4096"},
	} {
		s.mu.Lock()
		s.flags, s.data = x.flags, make([]byte, x.size)
		s.mu.Unlock()
		if err := try(x.o); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	s.down()
	if err := try(Options{}); !errors.Is(err, block.ErrUnreachable) {
		t.Errorf("nobody listens: %v", err)
	}
}

// TestReconnect: a lost connection is made anew where that hides nothing.
func TestReconnect(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s := newServer(t, 1<<20)
	c := open(t, Options{Addr: s.sock, Reconnect: 20 * time.Second})
	defer c.Close()
	p := bytes.Repeat([]byte{7}, 512)
	if err := errors.Join(c.WriteAt(ctx, p, 0, 0), c.Flush(ctx), c.WriteAt(ctx, p, 512, block.FUA)); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	s.set(func(cmd uint16, _ uint64) (uint32, bool) {
		hang := false
		if cmd == cmdRead {
			once.Do(func() { hang = true })
		}
		return 0, hang
	})
	got := make([]byte, 1024)
	if err := c.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, bytes.Repeat(p, 2)) {
		t.Fatalf("a read whose connection broke: %v", err)
	}
	s.down()
	for connected := true; connected; { // a write on the old connection would be one in flight
		c.mu.Lock()
		connected = c.mu.conn != nil
		c.mu.Unlock()
	}
	done := make(chan error, 1)
	go func() { done <- c.WriteAt(ctx, p, 1024, 0) }()
	time.Sleep(30 * time.Millisecond)
	s.up()
	if err := <-done; err != nil {
		t.Fatalf("a write begun without a connection: %v", err)
	}
	if err := errors.Join(c.Flush(ctx), c.Failed()); err != nil {
		t.Fatal(err)
	}
}

// TestLossIsNotHidden: with an acknowledged write not flushed, or a write in
// flight, a lost connection fails the store for good.
func TestLossIsNotHidden(t *testing.T) {
	t.Parallel()
	p := make([]byte, 512)
	hang := func(at uint16) func(uint16, uint64) (uint32, bool) {
		return func(cmd uint16, _ uint64) (uint32, bool) { return 0, cmd == at }
	}
	for name, lose := range map[string]func(ctx context.Context, s *server, c *Client) error{
		"acknowledged, not flushed": func(ctx context.Context, s *server, c *Client) error {
			if err := c.WriteAt(ctx, p, 0, 0); err != nil {
				return err
			}
			s.set(hang(cmdRead))
			return c.ReadAt(ctx, p, 0)
		},
		"write in flight": func(ctx context.Context, s *server, c *Client) error {
			s.set(hang(cmdWrite))
			return c.WriteAt(ctx, p, 0, 0)
		},
		"FUA in flight": func(ctx context.Context, s *server, c *Client) error {
			s.set(hang(cmdWrite))
			return c.WriteAt(ctx, p, 0, block.FUA)
		},
		"zeroes in flight": func(ctx context.Context, s *server, c *Client) error {
			s.set(hang(cmdWriteZeroes))
			return c.WriteZeroes(ctx, 0, 512, 0)
		},
		"flush in flight, something to flush": func(ctx context.Context, s *server, c *Client) error {
			if err := c.WriteAt(ctx, p, 0, 0); err != nil {
				return err
			}
			s.set(hang(cmdFlush))
			return c.Flush(ctx)
		},
		"flush failed": func(ctx context.Context, s *server, c *Client) error {
			s.set(func(cmd uint16, _ uint64) (uint32, bool) { return map[uint16]uint32{cmdFlush: 5}[cmd], false })
			return c.Flush(ctx)
		},
		"FUA failed": func(ctx context.Context, s *server, c *Client) error {
			s.set(func(cmd uint16, _ uint64) (uint32, bool) { return map[uint16]uint32{cmdWrite: 5}[cmd], false })
			return c.WriteAt(ctx, p, 0, block.FUA)
		},
		"another export": func(ctx context.Context, s *server, c *Client) error {
			s.mu.Lock()
			s.data = make([]byte, 2<<20)
			s.mu.Unlock()
			s.set(hang(cmdRead))
			return c.ReadAt(ctx, p, 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			s := newServer(t, 1<<20)
			c := open(t, Options{Addr: s.sock, Reconnect: 5 * time.Second})
			if err := lose(ctx, s, c); !errors.Is(err, block.ErrFlushFailed) {
				t.Fatalf("%v", err)
			}
			s.set(nil)
			_, xe := c.Extents(ctx, 0, 512)
			for op, err := range map[string]error{"read": c.ReadAt(ctx, p, 0), "write": c.WriteAt(ctx, p, 0, 0), "flush": c.Flush(ctx),
				"unmap": c.Unmap(ctx, 0, 512), "zeroes": c.WriteZeroes(ctx, 0, 512, 0), "extents": xe, "state": c.Failed()} {
				if !errors.Is(err, block.ErrFlushFailed) {
					t.Errorf("%s after the loss: %v", op, err)
				}
			}
			if err := c.Close(); !errors.Is(err, block.ErrFlushFailed) {
				t.Errorf("close: %v", err)
			}
		})
	}
}

// TestUnreachable: a call waits for Reconnect and no longer; the store is not
// failed by that.
func TestUnreachable(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1<<20)
	c := open(t, Options{Addr: s.sock, Reconnect: 50 * time.Millisecond})
	defer c.Close()
	s.down()
	p := make([]byte, 512)
	if err := c.ReadAt(t.Context(), p, 0); !errors.Is(err, block.ErrUnreachable) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.ReadAt(ctx, p, 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	s.up()
	for deadline := time.Now().Add(20 * time.Second); ; {
		err := c.WriteAt(t.Context(), p, 0, block.FUA)
		if err == nil {
			break
		}
		if !errors.Is(err, block.ErrUnreachable) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	// Without reconnection the first loss is the last.
	d := open(t, Options{Addr: s.sock})
	s.down()
	if err := d.ReadAt(t.Context(), p, 0); !errors.Is(err, block.ErrFlushFailed) {
		t.Error(err)
	}
	if err := d.Close(); !errors.Is(err, block.ErrFlushFailed) {
		t.Error(err)
	}
}

// TestPoison: a request at which the server always hangs up ends.
func TestPoison(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1<<20)
	c := open(t, Options{Addr: s.sock, Reconnect: 100 * time.Millisecond})
	defer c.Close()
	s.set(func(cmd uint16, off uint64) (uint32, bool) { return 0, cmd == cmdRead && off == 512 })
	p := make([]byte, 512)
	if err := c.ReadAt(t.Context(), p, 512); !errors.Is(err, block.ErrUnreachable) {
		t.Errorf("%v", err)
	}
	for began := time.Now(); ; {
		if err := c.ReadAt(t.Context(), p, 0); err == nil {
			break
		} else if time.Since(began) > 20*time.Second {
			t.Fatalf("its neighbour: %v", err)
		}
	}
}

// TestErrors: the protocol's errors are ours.
func TestErrors(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1<<20)
	c := open(t, Options{Addr: s.sock})
	defer c.Close()
	for errno, want := range map[uint32]error{28: block.ErrNoSpace, 5: block.ErrMedium, 1: block.ErrReadOnly, 108: block.ErrUnreachable, 77: block.ErrMedium} {
		s.set(func(cmd uint16, _ uint64) (uint32, bool) {
			if cmd == cmdWrite {
				return errno, false
			}
			return 0, false
		})
		if err := c.WriteAt(t.Context(), make([]byte, 512), 0, 0); !errors.Is(err, want) {
			t.Errorf("errno %d: %v", errno, err)
		}
	}
	if err := c.Failed(); err != nil {
		t.Errorf("refused writes were never acknowledged, nothing is lost: %v", err)
	}
	if c.Failed() == nil && s.count(cmdWrite) != 5 {
		t.Error(fmt.Sprint(s.count(cmdWrite)), "writes were sent")
	}
}
