package target

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/blockhouse-san/blockhouse/internal/latency"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// Counting costs a command one reading of the clock and four atomic additions on
// memory that belongs to its I_T nexus and its LUN alone: what a LUN did is added
// up over its sessions when somebody asks.

// IOClass groups commands by what they move.
type IOClass uint8

// The classes. A write is a command that carries blocks out: WRITE, WRITE AND
// VERIFY, WRITE SAME, COMPARE AND WRITE, …; UNMAP and parameter lists are other.
const (
	IORead IOClass = iota
	IOWrite
	IOOther
	ioClasses
)

func (c IOClass) String() string { return [...]string{"read", "write", "other"}[c] }

func classOf(c *scsi.Command) IOClass {
	switch {
	case c == nil:
	case c.Effect == scsi.EffectRead && c.Dir == scsi.DirIn:
		return IORead
	case c.Effect == scsi.EffectWrite && c.Dir == scsi.DirOut && c.Xfer != scsi.XferParam && c.Xfer != scsi.XferFormat:
		return IOWrite
	}
	return IOOther
}

// errKind is how a command failed, for counting.
type errKind uint8

const (
	errNotReady errKind = iota
	errMedium
	errHardware
	errIllegalRequest
	errUnitAttention
	errDataProtect
	errAbortedCommand
	errMiscompare
	errReservationConflict
	errTaskSetFull
	errOther
	errKinds
)

// ErrorKinds names what IOStats.Errors is indexed by: sense keys and statuses.
var ErrorKinds = [errKinds]string{"not_ready", "medium_error", "hardware_error", "illegal_request", "unit_attention", "data_protect",
	"aborted_command", "miscompare", "reservation_conflict", "task_set_full", "other"}

func kindOf(o *outcome) (errKind, bool) {
	if o.sense != nil {
		switch o.sense.Key {
		case scsi.NotReady:
			return errNotReady, true
		case scsi.MediumError:
			return errMedium, true
		case scsi.HardwareError:
			return errHardware, true
		case scsi.IllegalRequest:
			return errIllegalRequest, true
		case scsi.UnitAttention:
			return errUnitAttention, true
		case scsi.DataProtect:
			return errDataProtect, true
		case scsi.AbortedCommand:
			return errAbortedCommand, true
		case scsi.Miscompare:
			return errMiscompare, true
		}
		return errOther, true
	}
	switch o.status {
	case scsi.StatusGood, scsi.StatusConditionMet:
		return 0, false
	case scsi.StatusReservationConflict:
		return errReservationConflict, true
	case scsi.StatusTaskSetFull:
		return errTaskSetFull, true
	}
	return errOther, true
}

// IOStats is what was done so far. All numbers but InProgress only rise, as long
// as the process lives and the LUN or session exists.
type IOStats struct {
	Commands   uint64 // received
	InProgress uint64 // received and not ended: the queue depth
	ReadBytes  uint64 // sent to initiators by reads
	WriteBytes uint64 // taken from initiators for writes
	Unmaps     uint64 // UNMAP commands
	Aborted    uint64 // ended without a status: task management, a lost session
	Errors     [errKinds]uint64
	// Latency is per class, from the moment the command was read off its connection
	// until its status was queued: it includes waiting for Data-Out, for its turn
	// and for overlapping commands. Its count is the number of commands that ended
	// with a status.
	Latency [ioClasses]latency.Histogram
}

// Reads is the number of reads that ended with a status; likewise Writes, Others.
func (i *IOStats) Reads() uint64 { return i.Latency[IORead].Count() }

// Writes is the number of writes that ended with a status.
func (i *IOStats) Writes() uint64 { return i.Latency[IOWrite].Count() }

// Failed is the number of commands that ended with another status than GOOD.
func (i *IOStats) Failed() (n uint64) {
	for _, e := range i.Errors {
		n += e
	}
	return n
}

// add adds o but InProgress, which follows from the rest.
func (i *IOStats) add(o *IOStats) {
	i.Commands += o.Commands
	i.ReadBytes += o.ReadBytes
	i.WriteBytes += o.WriteBytes
	i.Unmaps += o.Unmaps
	i.Aborted += o.Aborted
	for k := range o.Errors {
		i.Errors[k] += o.Errors[k]
	}
	for k := range o.Latency {
		i.Latency[k].Add(o.Latency[k])
	}
}

func (i *IOStats) settle() {
	done := i.Aborted
	for k := range i.Latency {
		done += i.Latency[k].Count()
	}
	// The parts are not read at one moment.
	i.InProgress = i.Commands - min(done, i.Commands)
}

// ioStats counts what one session does to one LUN.
type ioStats struct {
	commands, readBytes, writeBytes, unmaps, aborted atomic.Uint64
	errors                                           [errKinds]atomic.Uint64
	latency                                          [ioClasses]latency.Recorder
}

// snapshot reads. Commands come last: none is seen to end that did not begin.
func (c *ioStats) snapshot() (out IOStats) {
	for i := range c.latency {
		c.latency[i].AddTo(&out.Latency[i])
	}
	for i := range c.errors {
		out.Errors[i] = c.errors[i].Load()
	}
	out.ReadBytes, out.WriteBytes, out.Unmaps, out.Aborted = c.readBytes.Load(), c.writeBytes.Load(), c.unmaps.Load(), c.aborted.Load()
	out.Commands = c.commands.Load()
	return out
}

// lunKey names a LUN for as long as it means the same bytes.
type lunKey struct {
	target string
	number scsi.LUN
	volume string
}

// lunStats adds up a LUN.
type lunStats struct {
	lunKey
	mu    sync.Mutex
	live  map[*ioStats]bool // of sessions that exist
	ended IOStats           // of those that do not
}

func (l *lunStats) snapshot() IOStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out IOStats
	out.add(&l.ended) // not a copy: its histograms would be shared
	for c := range l.live {
		s := c.snapshot()
		out.add(&s)
	}
	out.settle()
	return out
}

// open gives the counters of a new pair of session and LUN.
func (l *lunStats) open() *ioStats {
	c := &ioStats{}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.live[c] = true
	return c
}

// retire keeps the sum of a pair whose session has ended.
func (l *lunStats) retire(c *ioStats) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.live[c] {
		delete(l.live, c)
		s := c.snapshot()
		l.ended.add(&s)
	}
}

// statsOf gives the counters of a LUN, the same ones over any change of its
// entry. The caller holds Server.mu.
func (s *Server) statsOf(target string, number scsi.LUN, volume string) *lunStats {
	k := lunKey{target, number, volume}
	l := s.stats[k]
	if l == nil {
		l = &lunStats{lunKey: k, live: map[*ioStats]bool{}}
		s.stats[k] = l
	}
	return l
}

// dropStats forgets the LUNs that are gone. The caller holds Server.mu.
func (s *Server) dropStats() {
	for k := range s.stats {
		n := s.nodes[k.target]
		if n == nil {
			delete(s.stats, k)
			continue
		}
		if e := n.entry(k.number); e == nil || e.lu.volume != k.volume {
			delete(s.stats, k)
		}
	}
}

// sessionStats is what a session counts: per LUN, and of its connections.
type sessionStats struct {
	none        ioStats // commands to a LUN that does not exist
	io          map[*lunStats]*ioStats
	digests     atomic.Uint64 // PDUs with a wrong header or data digest
	retransmits atomic.Uint64 // PDUs sent again because the initiator asked (SNACK)
	rejects     atomic.Uint64 // PDUs that were rejected
}

// of gives the counters of the pair with e. The caller holds session.mu.
func (s *sessionStats) of(e *entry) *ioStats {
	if e == nil {
		return &s.none
	}
	c := s.io[e.stats]
	if c == nil {
		c = e.stats.open()
		if s.io == nil {
			s.io = map[*lunStats]*ioStats{}
		}
		s.io[e.stats] = c
	}
	return c
}

// sum adds up all LUNs. The caller holds session.mu.
func (s *sessionStats) sum() IOStats {
	out := s.none.snapshot()
	for _, c := range s.io {
		x := c.snapshot()
		out.add(&x)
	}
	out.settle()
	return out
}

func (s *session) retireStats() {
	s.mu.Lock()
	io := s.stats.io
	s.mu.Unlock()
	for l, c := range io {
		l.retire(c)
	}
	t := &s.srv.totals
	t.digests.Add(s.stats.digests.Load())
	t.retransmits.Add(s.stats.retransmits.Load())
	t.rejects.Add(s.stats.rejects.Load())
}

// begin counts a command that was received. The caller holds session.mu.
func (t *task) begin() {
	t.st = t.s.stats.of(t.ent)
	t.st.commands.Add(1)
}

// account counts a command that ends with a status.
func (t *task) account(o *outcome, now int64) {
	c := t.st
	if c == nil {
		return
	}
	class := classOf(t.cdb.Cmd)
	if k, bad := kindOf(o); bad {
		c.errors[k].Add(1)
	}
	switch {
	case class == IORead && t.read:
		if n := min(uint64(len(o.data)), uint64(t.edtl)); n > 0 {
			c.readBytes.Add(n)
		}
	case class == IOWrite && t.want > 0:
		c.writeBytes.Add(uint64(min(t.want, t.arrived)))
	case t.cdb.Cmd != nil && t.cdb.Cmd.Op == scsi.OpUnmap:
		c.unmaps.Add(1)
	}
	c.latency[class].Record(now - t.since)
}

// totals are of the whole server, over sessions that ended.
type totals struct {
	digests, retransmits, rejects                        atomic.Uint64
	logins, discoveries, logouts, drops, refused, authKO atomic.Uint64
}

// countProtocol counts an error of a connection's stream.
func (s *session) countProtocol(err error) {
	if errors.Is(err, iscsi.ErrHeaderDigest) || errors.Is(err, iscsi.ErrDataDigest) {
		s.stats.digests.Add(1)
	}
}

// LUNStats are the numbers of a LUN.
type LUNStats struct {
	Target   string
	Number   scsi.LUN
	Volume   string // identity of the bytes
	Sessions int    // that have sent it a command and exist
	IOStats
}

// ServerStats are the numbers of a server since it started.
type ServerStats struct {
	LUNs     []LUNStats    // by target and number
	Sessions []SessionInfo // in order of login
	// Logins that succeeded, of normal and of discovery sessions; Logouts; Drops:
	// sessions that ended otherwise; Refused: logins that failed for any reason,
	// AuthFailures among them.
	Logins, Discoveries, Logouts, Drops, Refused, AuthFailures uint64
	// Over all connections, also those that ended.
	DigestErrors, Retransmits, Rejects uint64
	PendingBytes                       int64 // memory held by data phases
}

// Stats is a snapshot. It takes no lock that a command waits for longer than a
// map is copied.
func (s *Server) Stats() ServerStats {
	t := &s.totals
	out := ServerStats{Sessions: s.Sessions(), Logins: t.logins.Load(), Discoveries: t.discoveries.Load(), Logouts: t.logouts.Load(), Drops: t.drops.Load(),
		Refused: t.refused.Load(), AuthFailures: t.authKO.Load(), DigestErrors: t.digests.Load(), Retransmits: t.retransmits.Load(),
		Rejects: t.rejects.Load(), PendingBytes: s.buffered.Load()}
	for i := range out.Sessions {
		x := &out.Sessions[i]
		out.DigestErrors += x.DigestErrors
		out.Retransmits += x.Retransmits
		out.Rejects += x.Rejects
	}
	s.mu.Lock()
	ls := slices.Collect(maps.Values(s.stats))
	s.mu.Unlock()
	slices.SortFunc(ls, func(a, b *lunStats) int {
		if a.target != b.target {
			return strings.Compare(a.target, b.target)
		}
		return int(a.number) - int(b.number)
	})
	for _, l := range ls {
		l.mu.Lock()
		n := len(l.live)
		l.mu.Unlock()
		out.LUNs = append(out.LUNs, LUNStats{Target: l.target, Number: l.number, Volume: l.volume, Sessions: n, IOStats: l.snapshot()})
	}
	return out
}
