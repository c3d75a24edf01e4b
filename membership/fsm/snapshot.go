// A snapshot (docs/formats/fsm.md). All integers big-endian, crc is CRC-32C.
//
//	header   "BHFSMSNP" | u32 format=1 | u32 sections | u64 applied | u32 crc of the 24 bytes before
//	section  u8 machine | u8 0 | u16 0 | u32 version | u64 length | u32 crc of payload | u32 crc of the 20 bytes before | payload
//	…        machines in ascending order
//	trailer  "BHFSMEND" | u64 bytes before the trailer | u32 crc of the 16 bytes before
//
// The trailer tells a complete file from one whose writer died; the lengths are
// checked against maxSection before memory is taken for them.

package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
)

const (
	snapMagic   = "BHFSMSNP"
	snapEnd     = "BHFSMEND"
	snapFormat  = 1
	snapHdrLen  = 28
	sectHdrLen  = 24
	snapTailLen = 20
	// maxSection bounds one machine's state: 16 hosts with thousands of LUNs
	// are a few MiB.
	maxSection = 1 << 30
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func section(m Machine) ([]byte, error) {
	var b bytes.Buffer
	if err := m.Snapshot(&b); err != nil {
		return nil, fmt.Errorf("snapshot machine %v: %w", m.ID(), err)
	}
	return b.Bytes(), nil
}

func appendCRC(b []byte, from int) []byte {
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[from:], castagnoli))
}

// Snapshot implements raft.FSM. The state is small, so it is encoded here,
// under the lock, and written later. A stopped FSM refuses: a snapshot would
// let raft drop the entry that a newer binary can still apply.
func (f *FSM) Snapshot() (raft.FSMSnapshot, error) {
	b, err := f.encodeSnapshot()
	if err != nil {
		return nil, err
	}
	return snapshot(b), nil
}

func (f *FSM) encodeSnapshot() ([]byte, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.mu.stop != nil {
		return nil, fmt.Errorf("snapshot refused: %w", f.mu.stop)
	}
	b := []byte(snapMagic)
	b = binary.BigEndian.AppendUint32(b, snapFormat)
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.machines)))
	b = binary.BigEndian.AppendUint64(b, f.mu.applied)
	b = appendCRC(b, 0)
	for _, m := range f.machines {
		s, err := section(m)
		if err != nil {
			return nil, err
		}
		at := len(b)
		b = append(b, byte(m.ID()), 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, m.Version())
		b = binary.BigEndian.AppendUint64(b, uint64(len(s)))
		b = binary.BigEndian.AppendUint32(b, crc32.Checksum(s, castagnoli))
		b = appendCRC(b, at)
		b = append(b, s...)
	}
	at := len(b)
	b = append(b, snapEnd...)
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	return appendCRC(b, at), nil
}

type snapshot []byte

// Persist implements raft.FSMSnapshot.
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := sink.Write(s); err != nil {
		return errors.Join(fmt.Errorf("write snapshot %s: %w", sink.ID(), err), sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (snapshot) Release() {}

// Restore implements raft.FSM. It decodes everything before it changes
// anything: on error the old state stays. A snapshot that this binary does not
// understand is such an error, and raft then asks for another.
func (f *FSM) Restore(rc io.ReadCloser) error {
	err := f.restore(rc)
	return errors.Join(err, rc.Close())
}

func (f *FSM) restore(r io.Reader) error {
	var hdr [snapHdrLen]byte
	if _, err := io.ReadFull(r, hdr[:]); err != nil {
		return fmt.Errorf("restore snapshot: header: %w", err)
	}
	if err := checkFrame(hdr[:], snapMagic); err != nil {
		return fmt.Errorf("restore snapshot: header: %w", err)
	}
	if v := binary.BigEndian.Uint32(hdr[8:]); v != snapFormat {
		return fmt.Errorf("restore snapshot: format %d, this binary knows %d", v, snapFormat)
	}
	n := binary.BigEndian.Uint32(hdr[12:])
	applied := binary.BigEndian.Uint64(hdr[16:])
	if n > 255 {
		return fmt.Errorf("restore snapshot: %d sections", n)
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	var installs []func()
	seen := make(map[ID]bool)
	total := uint64(snapHdrLen)
	var last ID
	for i := range n {
		id, version, payload, err := readSection(r)
		if err != nil {
			return fmt.Errorf("restore snapshot: section %d: %w", i+1, err)
		}
		if id <= last {
			return fmt.Errorf("restore snapshot: section %d: machine %v out of order", i+1, id)
		}
		last = id
		m := f.machine(id)
		if m == nil {
			return fmt.Errorf("restore snapshot: machine %v is unknown to this binary; upgrade clusterd", id)
		}
		if version == 0 || version > m.Version() {
			return fmt.Errorf("restore snapshot: machine %v: section version %d, this binary knows %d; upgrade clusterd", id, version, m.Version())
		}
		install, err := m.Restore(version, bytes.NewReader(payload))
		if err != nil {
			return fmt.Errorf("restore snapshot: machine %v: %w", id, err)
		}
		seen[id] = true
		installs = append(installs, install)
		total += sectHdrLen + uint64(len(payload))
	}
	var tail [snapTailLen]byte
	if _, err := io.ReadFull(r, tail[:]); err != nil {
		return fmt.Errorf("restore snapshot: trailer: %w", err)
	}
	if err := checkFrame(tail[:], snapEnd); err != nil {
		return fmt.Errorf("restore snapshot: trailer: %w", err)
	}
	if got := binary.BigEndian.Uint64(tail[8:]); got != total {
		return fmt.Errorf("restore snapshot: trailer counts %d bytes, read %d", got, total)
	}
	for _, m := range f.machines {
		if seen[m.ID()] {
			continue
		}
		install, err := m.Restore(0, nil)
		if err != nil {
			return fmt.Errorf("restore snapshot: machine %v: %w", m.ID(), err)
		}
		installs = append(installs, install)
	}
	for _, install := range installs {
		install()
	}
	for _, m := range f.machines {
		f.mu.modified[m.ID()] = applied
	}
	f.mu.restores++
	if f.mu.stop != nil { // the snapshot lies past the entry that stopped us
		f.mu.stop = nil
		f.mu.stopped = make(chan struct{})
	}
	f.advance(applied)
	f.log.Info("state restored from snapshot", zap.Uint64("index", applied), zap.Uint32("sections", n))
	return nil
}

func (f *FSM) machine(id ID) Machine {
	for _, m := range f.machines {
		if m.ID() == id {
			return m
		}
	}
	return nil
}

func checkFrame(b []byte, magic string) error {
	if string(b[:8]) != magic {
		return fmt.Errorf("magic %q, want %q", b[:8], magic)
	}
	body := b[:len(b)-4]
	if got, want := binary.BigEndian.Uint32(b[len(body):]), crc32.Checksum(body, castagnoli); got != want {
		return fmt.Errorf("crc %08x, computed %08x", got, want)
	}
	return nil
}

func readSection(r io.Reader) (ID, uint32, []byte, error) {
	var h [sectHdrLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, 0, nil, fmt.Errorf("header: %w", err)
	}
	if got, want := binary.BigEndian.Uint32(h[20:]), crc32.Checksum(h[:20], castagnoli); got != want {
		return 0, 0, nil, fmt.Errorf("header crc %08x, computed %08x", got, want)
	}
	id, version, n := ID(h[0]), binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint64(h[8:])
	if h[1] != 0 || h[2] != 0 || h[3] != 0 {
		return 0, 0, nil, errors.New("reserved bytes are not zero")
	}
	if n > maxSection {
		return 0, 0, nil, fmt.Errorf("machine %v: %d bytes, limit %d", id, n, maxSection)
	}
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		return 0, 0, nil, fmt.Errorf("machine %v: %w", id, err)
	}
	if got, want := binary.BigEndian.Uint32(h[16:]), crc32.Checksum(b.Bytes(), castagnoli); got != want {
		return 0, 0, nil, fmt.Errorf("machine %v: crc %08x, computed %08x", id, got, want)
	}
	return id, version, b.Bytes(), nil
}
