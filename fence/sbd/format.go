// Package sbd is fencing by a message through a shared disk, in the on-disk format
// of ClusterLabs' sbd, so that a node can be stopped by either stack: sbd reads
// what we write and the other way round. It needs no network, only a LUN.
//
// The disk is a row of sectors of the device's own sector size S (512 or 4096):
//
//	sector 0          header
//	sector 1 + 2n     slot n: who it belongs to
//	sector 2 + 2n     mailbox of slot n: what its owner is told
//
// header, numbers big-endian (facts/cluster.md §2.4, measured):
//
//	 0  8  "SBD_SBD_"
//	 8  1  version, 2
//	 9  1  number of slots, 255
//	12  4  sector size
//	16  4  watchdog timeout, seconds
//	20  4  allocation timeout, seconds
//	24  4  loop timeout, seconds
//	28  4  msgwait timeout, seconds
//	32  1  minor version, 1
//	33 16  UUID
//
// slot:    0 1 in use; 1 64 name, zero-terminated
// mailbox: 0 1 message; 1 64 sender's name, zero-terminated
//
// The format is frozen: others read it.
//
// A message is proof only together with time. The victim reads its mailbox every
// loop timeout and ends, or it cannot read it and its watchdog ends it; both have
// happened after msgwait, which must be at least twice the watchdog timeout
// (sbd(8)). There is no acknowledgement.
//
// Cluster row: node and cli may import it; it imports internal leaves.
package sbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/google/uuid"
)

const (
	magic      = "SBD_SBD_"
	version    = 2
	minor      = 1
	maxSlots   = 255
	nameLen    = 64
	maxName    = nameLen - 1
	slotSize   = 1 + nameLen
	headerSize = 49
)

// Errors. ErrFormat is a disk that holds no header, or another version.
var (
	ErrFormat  = errors.New("no sbd header")
	ErrInUse   = errors.New("the device is not empty")
	ErrNoSlot  = errors.New("node has no slot")
	ErrFull    = errors.New("all slots are taken")
	ErrParam   = errors.New("bad parameter")
	ErrVerify  = errors.New("what was written does not read back")
	ErrQuorum  = errors.New("too few devices took the message")
	ErrMsgWait = errors.New("msgwait must be at least twice the watchdog timeout")
)

// Message is what a mailbox holds. The numbers are sbd's and frozen.
type Message int8

// The messages.
const (
	Clear     Message = 0
	Test      Message = 1
	Reset     Message = 2
	Off       Message = 3
	Exit      Message = 4
	CrashDump Message = 5
)

var messages = [...]string{"clear", "test", "reset", "off", "exit", "crashdump"}

// String is sbd's word for the message.
func (m Message) String() string {
	if m < 0 || int(m) >= len(messages) {
		return fmt.Sprintf("undefined (%d)", int8(m))
	}
	return messages[m]
}

// ParseMessage reads sbd's word for a message.
func ParseMessage(s string) (Message, error) {
	for i, w := range messages {
		if w == s {
			return Message(i), nil
		}
	}
	return 0, fmt.Errorf("%w: message %q: use test, reset, off, crashdump, clear or exit", ErrParam, s)
}

// Kills tells whether the message ends the node that reads it.
func (m Message) Kills() bool { return m == Reset || m == Off || m == CrashDump }

// Timeouts of a device, in whole seconds on disk.
type Timeouts struct {
	Watchdog time.Duration // a node whose watchdog is not petted so long is reset by it
	Allocate time.Duration // wait before a fresh slot counts as ours
	Loop     time.Duration // between two reads of the own mailbox
	MsgWait  time.Duration // after which a delivered message is proof
}

// DefaultTimeouts are sbd's.
var DefaultTimeouts = Timeouts{Watchdog: 5 * time.Second, Allocate: 2 * time.Second, Loop: time.Second, MsgWait: 10 * time.Second}

// Validate checks what the proof rests on.
func (t Timeouts) Validate() error {
	for _, x := range []struct {
		name string
		d    time.Duration
		min  time.Duration
	}{{"watchdog", t.Watchdog, time.Second}, {"allocate", t.Allocate, 0}, {"loop", t.Loop, 0}, {"msgwait", t.MsgWait, time.Second}} {
		if x.d < x.min || x.d%time.Second != 0 || x.d/time.Second > math.MaxInt32 {
			return fmt.Errorf("%w: %s timeout %v: whole seconds from %v are needed", ErrParam, x.name, x.d, x.min)
		}
	}
	if t.MsgWait < 2*t.Watchdog {
		return fmt.Errorf("%w: %v and %v", ErrMsgWait, t.MsgWait, t.Watchdog)
	}
	return nil
}

// Header is sector 0.
type Header struct {
	Version, Minor uint8
	Slots          uint8
	SectorSize     uint32
	Timeouts       Timeouts
	UUID           uuid.UUID
}

func (h Header) encode(b []byte) {
	copy(b, magic)
	b[8], b[9] = h.Version, h.Slots
	be := binary.BigEndian
	be.PutUint32(b[12:], h.SectorSize)
	for i, d := range []time.Duration{h.Timeouts.Watchdog, h.Timeouts.Allocate, h.Timeouts.Loop, h.Timeouts.MsgWait} {
		be.PutUint32(b[16+4*i:], uint32(d/time.Second))
	}
	b[32] = h.Minor
	copy(b[33:49], h.UUID[:])
}

// ParseHeader reads sector 0.
func ParseHeader(b []byte) (Header, error) {
	var h Header
	if len(b) < headerSize || string(b[:8]) != magic {
		return h, ErrFormat
	}
	be := binary.BigEndian
	h = Header{Version: b[8], Slots: b[9], SectorSize: be.Uint32(b[12:]), Minor: b[32]}
	for i, d := range []*time.Duration{&h.Timeouts.Watchdog, &h.Timeouts.Allocate, &h.Timeouts.Loop, &h.Timeouts.MsgWait} {
		*d = time.Duration(be.Uint32(b[16+4*i:])) * time.Second
	}
	copy(h.UUID[:], b[33:49])
	switch {
	case h.Version != version:
		return h, fmt.Errorf("%w of version %d (it has version %d)", ErrFormat, version, h.Version)
	case h.Slots == 0:
		return h, fmt.Errorf("%w with slots", ErrFormat)
	case h.SectorSize < 512 || h.SectorSize > 65536 || h.SectorSize&(h.SectorSize-1) != 0:
		return h, fmt.Errorf("%w: sector size %d", ErrFormat, h.SectorSize)
	}
	return h, nil
}

// Dump is the text of "sbd -d DEVICE dump".
func (h Header) Dump(device string) string {
	s := func(d time.Duration) int64 { return int64(d / time.Second) }
	return fmt.Sprintf("==Dumping header on disk %s\nHeader version     : %d.%d\nUUID               : %s\nNumber of slots    : %d\nSector size        : %d\n"+
		"Timeout (watchdog) : %d\nTimeout (allocate) : %d\nTimeout (loop)     : %d\nTimeout (msgwait)  : %d\n==Header on disk %s is dumped\n",
		device, h.Version, h.Minor, h.UUID, h.Slots, h.SectorSize, s(h.Timeouts.Watchdog), s(h.Timeouts.Allocate), s(h.Timeouts.Loop), s(h.Timeouts.MsgWait), device)
}

// Slot is a slot that belongs to a node, with its mailbox.
type Slot struct {
	Number  int
	Node    string
	Message Message
	From    string
}

// ListText is the text of "sbd -d DEVICE list".
func ListText(slots []Slot) string {
	var b strings.Builder
	for _, s := range slots {
		fmt.Fprintf(&b, "%d\t%s\t%s\t%s\n", s.Number, s.Node, s.Message, s.From)
	}
	return b.String()
}

// record is a slot or a mailbox: a byte and a name.
type record struct {
	tag  uint8
	name string
}

func (r record) encode(b []byte) {
	b[0] = r.tag
	copy(b[1:1+maxName], r.name)
}

func parseRecord(b []byte) record {
	name := b[1:slotSize]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	return record{b[0], string(name)}
}

// CheckName tells whether a node's name can be written into a slot. sbd would cut
// a longer one and two nodes could share a mailbox.
func CheckName(s string) error {
	if s == "" || len(s) > maxName || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return fmt.Errorf("%w: node name %q: 1 to %d bytes without white space are needed", ErrParam, s, maxName)
	}
	return nil
}
