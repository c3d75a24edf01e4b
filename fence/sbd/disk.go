package sbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/internal/env"
)

// File is what a disk is read from and written to. Reads and writes are of whole
// sectors in memory aligned to 4096; a write is durable when it returns.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
}

// Disk is an open device. Its methods may be called from several goroutines.
type Disk struct {
	f      File
	path   string
	sector int
}

// Open opens a block device past the page cache, so that two nodes see each
// other's writes, or, for tests and tools, a regular file.
func Open(path string, write bool) (*Disk, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open sbd device: %w", err)
	}
	flags := unix.O_CLOEXEC | unix.O_DSYNC
	if write {
		flags |= os.O_RDWR
	}
	block := st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0
	switch {
	case block:
		flags |= unix.O_DIRECT
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("open sbd device %s: %w: it is neither a block device nor a file", path, ErrParam)
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, fmt.Errorf("open sbd device: %w", err)
	}
	sector := 512
	if block {
		if sector, err = unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err != nil {
			_ = f.Close() // nothing was written
			return nil, fmt.Errorf("sector size of %s: %w", path, err)
		}
	} else {
		// An image of a device has the sectors of that device.
		b := make([]byte, headerSize)
		if _, err := f.ReadAt(b, 0); err == nil {
			if h, err := ParseHeader(b); err == nil {
				sector = int(h.SectorSize)
			}
		}
	}
	return NewDisk(f, path, sector), nil
}

// NewDisk takes an open file with the given sector size. path is for messages.
func NewDisk(f File, path string, sector int) *Disk { return &Disk{f, path, sector} }

// Path is the name that the disk was opened with.
func (d *Disk) Path() string { return d.path }

// Close closes the file.
func (d *Disk) Close() error { return d.f.Close() }

// aligned gives memory as O_DIRECT wants it.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	off := int(4096-uintptr(unsafe.Pointer(&b[0]))%4096) % 4096
	return b[off : off+n : off+n]
}

func (d *Disk) read(sector int) ([]byte, error) {
	b := aligned(d.sector)
	if _, err := d.f.ReadAt(b, int64(sector)*int64(d.sector)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read sector %d of %s: %w", sector, d.path, err)
	}
	return b, nil
}

func (d *Disk) write(sector int, b []byte) error {
	if _, err := d.f.WriteAt(b, int64(sector)*int64(d.sector)); err != nil {
		return fmt.Errorf("write sector %d of %s: %w", sector, d.path, err)
	}
	return nil
}

// put writes a sector and reads it back, as sbd does: a message that is not there
// would be taken for a death.
func (d *Disk) put(sector int, b []byte) error {
	if err := d.write(sector, b); err != nil {
		return err
	}
	got, err := d.read(sector)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return fmt.Errorf("write sector %d of %s: %w", sector, d.path, ErrVerify)
	}
	return nil
}

// Header reads sector 0.
func (d *Disk) Header() (Header, error) {
	b, err := d.read(0)
	if err != nil {
		return Header{}, err
	}
	h, err := ParseHeader(b)
	if err != nil {
		return h, fmt.Errorf("%s: %w", d.path, err)
	}
	if int(h.SectorSize) != d.sector {
		return h, fmt.Errorf("%s: %w: made for sectors of %d bytes, the device has %d", d.path, ErrFormat, h.SectorSize, d.sector)
	}
	return h, nil
}

// Create makes the header and empty slots. Whatever was on the device is lost, so
// a device whose first sectors are not zero needs overwrite. The header is written
// last: before it there is no sbd device.
func (d *Disk) Create(t Timeouts, id uuid.UUID, overwrite bool) (Header, error) {
	if err := t.Validate(); err != nil {
		return Header{}, fmt.Errorf("create sbd device %s: %w", d.path, err)
	}
	if !overwrite {
		for s := range 1 + 2*maxSlots {
			b, err := d.read(s)
			if err != nil {
				return Header{}, err
			}
			if bytes.ContainsFunc(b, func(r rune) bool { return r != 0 }) {
				return Header{}, fmt.Errorf("create sbd device %s: %w: sector %d holds data", d.path, ErrInUse, s)
			}
		}
	}
	zero := aligned(d.sector)
	for s := range 1 + 2*maxSlots {
		if err := d.write(s, zero); err != nil {
			return Header{}, err
		}
	}
	h := Header{Version: version, Minor: minor, Slots: maxSlots, SectorSize: uint32(d.sector), Timeouts: t, UUID: id}
	b := aligned(d.sector)
	h.encode(b)
	return h, d.put(0, b)
}

func slotSector(n int) int { return 1 + 2*n }
func boxSector(n int) int  { return 2 + 2*n }

// List reads all slots that belong to nodes.
func (d *Disk) List() ([]Slot, error) {
	h, err := d.Header()
	if err != nil {
		return nil, err
	}
	var out []Slot
	for n := range int(h.Slots) {
		r, err := d.read(slotSector(n))
		if err != nil {
			return nil, err
		}
		s := parseRecord(r)
		if s.tag == 0 {
			continue
		}
		m, from, err := d.Mailbox(n)
		if err != nil {
			return nil, err
		}
		out = append(out, Slot{n, s.name, m, from})
	}
	return out, nil
}

// Mailbox reads the mailbox of a slot.
func (d *Disk) Mailbox(slot int) (Message, string, error) {
	b, err := d.read(boxSector(slot))
	if err != nil {
		return 0, "", err
	}
	r := parseRecord(b)
	return Message(int8(r.tag)), r.name, nil
}

// Lookup gives the slot of a node. Names are compared as sbd does, without case.
func (d *Disk) Lookup(node string) (int, error) {
	l, err := d.List()
	if err != nil {
		return 0, err
	}
	for _, s := range l {
		if strings.EqualFold(s.Node, node) {
			return s.Number, nil
		}
	}
	return 0, fmt.Errorf("%s on %s: %w", node, d.path, ErrNoSlot)
}

// Allocate gives the node a slot, or finds the one it has. A fresh slot counts
// after the allocation timeout, when it is still ours: another node may have
// written the same slot at the same time.
func (d *Disk) Allocate(ctx context.Context, clock env.Clock, node string) (int, error) {
	if err := CheckName(node); err != nil {
		return 0, fmt.Errorf("allocate slot on %s: %w", d.path, err)
	}
	for {
		h, err := d.Header()
		if err != nil {
			return 0, err
		}
		if n, err := d.Lookup(node); !errors.Is(err, ErrNoSlot) {
			return n, err
		}
		free := -1
		for n := range int(h.Slots) {
			b, err := d.read(slotSector(n))
			if err != nil {
				return 0, err
			}
			if parseRecord(b).tag == 0 {
				free = n
				break
			}
		}
		if free < 0 {
			return 0, fmt.Errorf("allocate slot for %s on %s: %w", node, d.path, ErrFull)
		}
		// An old message in a new slot would end its new owner.
		if err := d.put(boxSector(free), aligned(d.sector)); err != nil {
			return 0, err
		}
		b := aligned(d.sector)
		record{1, node}.encode(b)
		if err := d.write(slotSector(free), b); err != nil {
			return 0, err
		}
		if err := clock.Sleep(ctx, h.Timeouts.Allocate); err != nil {
			return 0, fmt.Errorf("allocate slot for %s on %s: %w", node, d.path, err)
		}
		// Lost to another node: the search begins anew and finds another slot.
	}
}

// Join gets the node a slot on each disk before it becomes a member. With fresh,
// that is after a boot, what lies in its mailboxes is older than this kernel and is
// cleared; a process that was only restarted must leave it, for it may be its end.
// It returns the slot numbers and the messages that were found, by disk.
func Join(ctx context.Context, clock env.Clock, disks []*Disk, node string, fresh bool) (slots []int, found []Message, err error) {
	for _, d := range disks {
		n, err := d.Allocate(ctx, clock, node)
		if err != nil {
			return nil, nil, err
		}
		m, _, err := d.Mailbox(n)
		if err != nil {
			return nil, nil, err
		}
		if fresh && m != Clear {
			if err := d.setMailbox(n, node, Clear); err != nil {
				return nil, nil, err
			}
		}
		slots, found = append(slots, n), append(found, m)
	}
	return slots, found, nil
}

// Send writes a message into a node's mailbox and returns when it is durable.
// That is no proof of anything: see Fence.
func (d *Disk) Send(node, from string, m Message) error {
	if m < Clear || m > CrashDump {
		return fmt.Errorf("send to %s on %s: %w: message %d", node, d.path, ErrParam, m)
	}
	if err := CheckName(from); err != nil {
		return fmt.Errorf("send to %s on %s: sender: %w", node, d.path, err)
	}
	n, err := d.Lookup(node)
	if err != nil {
		return fmt.Errorf("send %s: %w", m, err)
	}
	return d.setMailbox(n, from, m)
}

func (d *Disk) setMailbox(slot int, from string, m Message) error {
	b := aligned(d.sector)
	record{uint8(m), from}.encode(b)
	return d.put(boxSector(slot), b)
}

// Fence sends a deadly message through one to three devices and waits until it is
// proof: the longest msgwait of the devices. More than half of them must take it;
// the victim needs as many to stay alive. The end of ctx before the proof is an
// error, and so is a device whose msgwait proves nothing.
func Fence(ctx context.Context, clock env.Clock, disks []*Disk, victim, from string, m Message) error {
	if !m.Kills() {
		return fmt.Errorf("fence %s: %w: message %s does not end a node", victim, ErrParam, m)
	}
	if strings.EqualFold(victim, from) {
		return fmt.Errorf("fence %s: %w: a node does not fence itself", victim, ErrParam)
	}
	if len(disks) < 1 || len(disks) > 3 {
		return fmt.Errorf("fence %s: %w: %d devices: 1 to 3 are needed", victim, ErrParam, len(disks))
	}
	type outcome struct {
		wait time.Duration
		err  error
	}
	// Side by side: a device that hangs must not keep the message from the others.
	ch := make(chan outcome, len(disks))
	for _, d := range disks {
		go func() {
			h, err := d.Header()
			if err == nil {
				err = h.Timeouts.Validate()
			}
			if err == nil {
				err = d.Send(victim, from, m)
			}
			ch <- outcome{h.Timeouts.MsgWait, err}
		}()
	}
	var wait time.Duration
	var errs []error
	taken := 0
	for range disks {
		// Every writer is waited for: a message written after we gave up would end a
		// healthy node.
		o := <-ch
		if o.err != nil {
			errs = append(errs, o.err)
			continue
		}
		taken++
		wait = max(wait, o.wait)
	}
	if 2*taken <= len(disks) {
		return fmt.Errorf("fence %s: %w: %d of %d: %w", victim, ErrQuorum, taken, len(disks), errors.Join(errs...))
	}
	// The wait begins after the last write.
	if err := clock.Sleep(ctx, wait); err != nil {
		return fmt.Errorf("fence %s: the message is written, and msgwait (%v) is not over: %w", victim, wait, err)
	}
	return nil
}
