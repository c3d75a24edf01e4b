package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/internal/testproc"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// stores is a cluster of one node with a target that lets everybody in.
type stores struct {
	t   *testing.T
	c   *cluster.Cluster
	a   *api.Client
	iqn string
}

func newStores(t *testing.T) *stores {
	c := cluster.New(t, 1).Up()
	s := &stores{t: t, c: c, a: c.Nodes[0].API()}
	tg, err := api.Post[api.Target](t.Context(), s.a, api.PathTargets, api.TargetCreate{Name: "disks"})
	if err != nil {
		t.Fatal(err)
	}
	open := true
	if _, err := api.Post[api.Target](t.Context(), s.a, api.PathACLs, api.ACLChange{Target: tg.IQN, Open: &open}); err != nil {
		t.Fatal(err)
	}
	s.iqn = tg.IQN
	return s
}

func (s *stores) lun(q api.LUNCreate) (api.LUN, error) {
	q.Target, q.LUN, q.Replicas = s.iqn, -1, 1
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	return api.Post[api.LUN](ctx, s.a, api.PathLUNs, q)
}

func (s *stores) open(l api.LUN) block.Device {
	s.t.Helper()
	var dev block.Device
	s.c.Wait("a login", 30*time.Second, func() (bool, string) {
		ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
		defer cancel()
		d, err := initiator.OpenURL(ctx, l.URLs[0], initiator.Config{InitiatorName: "iqn.2026-11.test:stores"})
		dev = d
		return err == nil, fmt.Sprint(err)
	})
	return dev
}

func (s *stores) volume(name string) api.Volume {
	s.t.Helper()
	v, err := api.Get[api.Volume](s.t.Context(), s.a, api.PathVolumes+"/"+name)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// atomicWrites: a volume offers WRITE ATOMIC (16); what was acknowledged survives
// kill -9 of the worker, and what was half done is undone by the next worker.
func (s *stores) atomicWrites(t *testing.T) {
	ctx := t.Context()
	img := filepath.Join(t.TempDir(), "torn.img")
	if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 16<<20)); err != nil {
		t.Fatal(err)
	}
	own, err := s.lun(api.LUNCreate{Volume: "whole", Size: 16 << 20, BlockSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	// Its second write, and the undoing of it, fail: the journal keeps its record.
	given, err := s.lun(api.LUNCreate{Volume: "torn", Store: "fault:on=write&err=io&skip=1@file:" + img + "?integrity=on", BlockSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	var sess *initiator.Session
	var d, torn block.Device
	login := func() {
		t.Helper()
		s.c.Wait("a login", 30*time.Second, func() (bool, string) {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			var err error
			if sess, err = initiator.Login(ctx, s.c.Nodes[0].IP+":3260", s.iqn, initiator.Config{InitiatorName: "iqn.2026-11.test:atomic"}); err != nil {
				return false, err.Error()
			}
			if d, err = sess.OpenLUN(ctx, scsi.LUN(own.LUN)); err == nil {
				torn, err = sess.OpenLUN(ctx, scsi.LUN(given.LUN))
			}
			if err != nil {
				_ = sess.Close()
			}
			return err == nil, fmt.Sprint(err)
		})
	}
	login()
	const off, lba, n = 64 << 10, 128, 64 << 10
	old, neu := bytes.Repeat([]byte{1}, n), bytes.Repeat([]byte{2}, n)
	if err := errors.Join(d.WriteAt(ctx, old, off, 0), torn.WriteAt(ctx, old, off, 0), torn.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	exec := func(l api.LUN, c scsi.CDB, dir scsi.Direction, out, in []byte) error {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		for {
			r, err := sess.Exec(ctx, scsi.LUN(l.LUN), c.Bytes(), dir, out, in)
			if err != nil {
				t.Fatal(err)
			}
			var se *scsi.Sense
			if err = r.Err(); !errors.As(err, &se) || se.Key != scsi.UnitAttention {
				return err
			}
		}
	}
	page := make([]byte, 64)
	if err := exec(own, scsi.InquiryVPD(scsi.VPDBlockLimits, uint16(len(page))), scsi.DirIn, nil, page); err != nil {
		t.Fatal(err)
	}
	if b, err := scsi.ParseBlockLimits(page); err != nil || b.MaxAtomic != 2048 || b.AtomicAlignment != 8 || b.AtomicGranularity != 8 || b.MaxAtomicBoundary != 0 {
		t.Errorf("VPD B0: %+v %v", b, err)
	}
	write := func(l api.LUN, lba uint64) error {
		t.Helper()
		c, err := scsi.Build(scsi.OpWriteAtomic16, scsi.NoSA, scsi.Arg{ID: scsi.FLBA, Value: lba}, scsi.Arg{ID: scsi.FCount, Value: n / 512})
		if err != nil {
			t.Fatal(err)
		}
		return exec(l, c, scsi.DirOut, neu, nil)
	}
	if err := write(own, lba); err != nil {
		t.Errorf("WRITE ATOMIC: %v", err)
	}
	sense(t, "WRITE ATOMIC beside its alignment", write(own, lba+1), scsi.IllegalRequest, scsi.ASCInvalidFieldCDB)
	sense(t, "WRITE ATOMIC on a store that fails", write(given, lba), scsi.MediumError, scsi.ASCWriteError)
	s.c.Wait("the store to be failed", 20*time.Second, func() (bool, string) {
		v := s.volume("torn")
		return v.Health == api.HealthFaulted && strings.Contains(v.Cause, "could not be undone"), cluster.JSON(v)
	})
	// Half of it lies on the disk.
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(neu[:n/2], off)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.c.Nodes[0].Worker(link.Storage)
	if err == nil {
		err = unix.Kill(w.PID, unix.SIGKILL)
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = sess.Close()
	login()
	defer sess.Close()
	got := make([]byte, n)
	if err := d.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, neu) {
		t.Errorf("an acknowledged atomic write after the worker died: %v", err)
	}
	if err := torn.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, old) {
		t.Errorf("half an atomic write was not undone: %v", err)
	}
	if v := s.volume("torn"); v.Checksums == nil || v.Checksums.Damaged != 0 {
		t.Errorf("%s", cluster.JSON(v))
	}
}

// sense asserts the sense of an error.
func sense(t *testing.T, what string, err error, key scsi.Key, code scsi.ASC) {
	t.Helper()
	var se *scsi.Sense
	if !errors.As(err, &se) || se.Key != key || se.Code != code {
		t.Errorf("%s: %v; want %v %v", what, err, key, code)
	}
}

// TestStores goes through the kinds of stores end to end.
func TestStores(t *testing.T) {
	s := newStores(t)
	ctx := t.Context()
	dir := t.TempDir()
	img := filepath.Join(dir, "a.img")
	if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 16<<20)); err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{7}, 64<<10)

	t.Run("checksums", func(t *testing.T) {
		l, err := s.lun(api.LUNCreate{Volume: "sums", Store: "file:" + img + "?integrity=on", BlockSize: 512})
		if err != nil {
			t.Fatal(err)
		}
		if v := s.volume("sums"); !v.Integrity || v.Store != "file:"+img {
			t.Fatalf("%+v", v)
		}
		d := s.open(l)
		if err := errors.Join(d.WriteAt(ctx, p, 0, 0), d.Flush(ctx)); err != nil {
			t.Fatal(err)
		}
		scrub := func(q api.VolumeScrub) error {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			_, err := api.Post[api.Done](ctx, s.a, api.PathVolumes+"/sums/scrub", q)
			return err
		}
		ended := func(state string) (v api.Volume) {
			t.Helper()
			s.c.Wait("the scrub to be "+state, 30*time.Second, func() (bool, string) {
				v = s.volume("sums")
				return v.Checksums != nil && v.Checksums.Scrub != nil && v.Checksums.Scrub.State == state, cluster.JSON(v)
			})
			return v
		}
		// A new volume on a store that exists is in doubt until it was read once.
		s.c.Wait("nothing in doubt", 30*time.Second, func() (bool, string) {
			v := s.volume("sums")
			return v.Checksums != nil && v.Checksums.Doubt == 0, cluster.JSON(v)
		})
		f, err := os.OpenFile(img, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt([]byte{8}, 5000)
			err = errors.Join(err, f.Sync(), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := scrub(api.VolumeScrub{}); err != nil {
			t.Fatal(err)
		}
		if v := ended("done"); v.Checksums.Scrub.Damaged != 1 || v.Checksums.Damaged != 1 || v.Checksums.Offsets[0] != 4096 || !strings.Contains(v.Cause, "1 blocks of 4 KiB do not match") {
			t.Errorf("%s", cluster.JSON(v))
		}
		sense(t, "a damaged block", d.ReadAt(ctx, make([]byte, 512), 4608), scsi.MediumError, scsi.ASCReadError)
		if err := errors.Join(d.WriteAt(ctx, p[:4096], 4096, 0), d.ReadAt(ctx, make([]byte, 512), 4608)); err != nil {
			t.Errorf("a block that was written whole: %v", err)
		}
		if err := scrub(api.VolumeScrub{Rate: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if err := scrub(api.VolumeScrub{}); api.AsError(err).Code != api.CodeConflict {
			t.Errorf("two at once: %v", err)
		}
		if err := scrub(api.VolumeScrub{Stop: true}); err != nil {
			t.Error(err)
		}
		ended("stopped")
		// The worker dies; what was acknowledged is there, and nothing is damaged.
		_ = d.WriteAt(ctx, p, 1<<20, 0)
		w, err := s.c.Nodes[0].Worker(link.Storage)
		if err == nil {
			err = unix.Kill(w.PID, unix.SIGKILL)
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = d.Close()
		d = s.open(l)
		defer d.Close()
		got := make([]byte, len(p))
		if err := d.ReadAt(ctx, got, 1<<20); err != nil || !bytes.Equal(got, p) {
			t.Errorf("after the worker died: %v", err)
		}
		if c := s.volume("sums").Checksums; c == nil || c.Damaged != 0 || c.Mismatches != 0 {
			t.Errorf("%+v", c)
		}
	})

	t.Run("atomic writes", func(t *testing.T) { s.atomicWrites(t) })

	t.Run("one store, one volume", func(t *testing.T) {
		link, other := filepath.Join(dir, "link"), filepath.Join(dir, "other")
		if err := errors.Join(os.Symlink(img, link), os.WriteFile(other, make([]byte, 4096), 0o600)); err != nil {
			t.Fatal(err)
		}
		for _, u := range []string{"file:" + img, "file:" + img + "?cache=sync", "powercut:file:" + dir + "/./a.img", "file:" + link} {
			_, err := s.lun(api.LUNCreate{Volume: "again", Store: u, BlockSize: 512})
			if e := api.AsError(err); e.Code != api.CodeConflict || !strings.Contains(e.Message, "volume sums") {
				t.Errorf("%s: %v", u, err)
			}
		}
		for u, want := range map[string]string{"rbd:x": "no kind of store", "file:" + img + "?x=y": "has no option", "file:" + dir: "no regular file", "block:" + other: "no block device"} {
			_, err := s.lun(api.LUNCreate{Volume: "again", Store: u, BlockSize: 512})
			if e := api.AsError(err); e.Code != api.CodeUsage || !strings.Contains(e.Message, want) {
				t.Errorf("%s: %v", u, err)
			}
		}
	})

	t.Run("nbd", func(t *testing.T) {
		testproc.Need(t, "nbdkit")
		run, err := os.MkdirTemp("", "nbd")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(run)
		sock := filepath.Join(run, "s")
		server := func() *testproc.Proc {
			_ = os.Remove(sock)
			return testproc.Start(t, testproc.Spec{Name: "nbdkit", Args: []string{"nbdkit", "-f", "-U", sock, "memory", "16M"}})
		}
		k := server()
		store := "nbd+unix:///?socket=" + sock
		var l api.LUN
		s.c.Wait("the server", 20*time.Second, func() (bool, string) {
			l, err = s.lun(api.LUNCreate{Volume: "nbd", Store: store, BlockSize: 512})
			return err == nil, fmt.Sprint(err)
		})
		if _, err := s.lun(api.LUNCreate{Volume: "again", Store: store + "&reconnect=0s", BlockSize: 512}); api.AsError(err).Code != api.CodeConflict {
			t.Errorf("one export, two volumes: %v", err)
		}
		d := s.open(l)
		defer d.Close()
		got := make([]byte, len(p))
		if err := errors.Join(d.WriteAt(ctx, p, 0, 0), d.Flush(ctx), d.ReadAt(ctx, got, 0)); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%v", err)
		}
		// The server goes with an acknowledged write unflushed: the store is failed,
		// also when the server is back.
		if err := d.WriteAt(ctx, p, 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
		server()
		s.c.Wait("the store to be failed", 20*time.Second, func() (bool, string) {
			v := s.volume("nbd")
			return v.Health == api.HealthFaulted && strings.Contains(v.Cause, "acknowledged ones not flushed"), cluster.JSON(v)
		})
		sense(t, "flush", d.Flush(ctx), scsi.MediumError, scsi.ASCWriteError)
		sense(t, "write", d.WriteAt(ctx, p, 0, 0), scsi.MediumError, scsi.ASCWriteError)
		sense(t, "read", d.ReadAt(ctx, got, 0), scsi.MediumError, scsi.ASCReadError)
	})

	t.Run("a flush that fails", func(t *testing.T) {
		l, err := s.lun(api.LUNCreate{Volume: "noflush", Store: "fault:on=flush&err=io@powercut:mem:", Size: 1 << 20, BlockSize: 512})
		if err != nil {
			t.Fatal(err)
		}
		d := s.open(l)
		defer d.Close()
		if err := d.WriteAt(ctx, p, 0, 0); err != nil {
			t.Fatal(err)
		}
		sense(t, "flush", d.Flush(ctx), scsi.MediumError, scsi.ASCWriteError)
	})

	t.Run("disk full", func(t *testing.T) {
		mnt := t.TempDir()
		if os.Getuid() != 0 {
			t.Skip("skip: a file system of 2 MiB needs root")
		}
		if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=2m"); err != nil {
			t.Skipf("skip: no tmpfs can be mounted here: %v", err)
		}
		defer func() {
			if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil { // the worker has the store open
				t.Error(err)
			}
		}()
		small, filler := filepath.Join(mnt, "small"), filepath.Join(mnt, "filler")
		if err := errors.Join(os.WriteFile(small, nil, 0o600), os.Truncate(small, 8<<20), os.WriteFile(filler, make([]byte, 1<<20), 0o600)); err != nil {
			t.Fatal(err)
		}
		l, err := s.lun(api.LUNCreate{Volume: "small", Store: "file:" + small, BlockSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		d := s.open(l)
		defer d.Close()
		var full error
		for off := int64(0); off < 8<<20 && full == nil; off += int64(len(p)) {
			full = d.WriteAt(ctx, p, off, 0)
		}
		sense(t, "a write to a full disk", full, scsi.DataProtect, scsi.ASCSpaceAllocationFailed)
		if err := d.Flush(ctx); err != nil {
			t.Errorf("flush: nothing that was acknowledged is lost: %v", err)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.WriteAt(ctx, p, 4<<20, 0), d.Flush(ctx)); err != nil {
			t.Errorf("with space again: %v", err)
		}
	})
}
