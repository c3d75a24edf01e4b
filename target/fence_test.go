package target

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/atomic"
	"github.com/blockhouse-san/blockhouse/block/crypt"
	"github.com/blockhouse-san/blockhouse/block/mem"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target/pr"
)

// oneKey keeps a key in memory.
type oneKey struct{ key []byte }

func (k *oneKey) Load() ([]byte, error)    { return k.key, nil }
func (k *oneKey) Replace(key []byte) error { k.key = bytes.Clone(key); return nil }

// able is a store in memory that has everything a store may have.
func able(t testing.TB, size int64) block.Device {
	t.Helper()
	data, err := mem.New(size, 512)
	if err != nil {
		t.Fatal(err)
	}
	journal, err := mem.New(atomic.JournalSize, 512)
	if err != nil {
		t.Fatal(err)
	}
	a, err := atomic.Open(t.Context(), data, journal, [16]byte{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := crypt.Open(a, &oneKey{bytes.Repeat([]byte{1, 2}, crypt.KeySize/2)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// fenceTable says what a command meets when another I_T nexus holds the
// reservation. It is written from the standards (SPC-4 5.13.1, tables "commands
// that are allowed in the presence of various reservations" and "PERSISTENT
// RESERVE OUT service actions that are allowed"; SBC-3 4.17; SPC-2 5.5 for the
// last column; RESERVE and RELEASE from SPC-2 6.21), not from the table of package
// scsi, which it judges. A is allowed, C is RESERVATION CONFLICT. Columns:
//
//	1 Write Exclusive, from any other nexus, registered or not
//	2 Exclusive Access, likewise
//	3 registrants only and all registrants types, from a registered nexus
//	4 Write Exclusive of those types, from a nexus that is not registered
//	5 Exclusive Access of those types, likewise
//	6 RESERVE (6), from another nexus
var fenceTable = map[string]string{
	// SPC-4
	"EXTENDED COPY (LID1)":                       "CCACCC",
	"INQUIRY":                                    "AAAAAA",
	"LOG SENSE":                                  "AAAAAC",
	"MODE SELECT (6)":                            "CCACCC",
	"MODE SELECT (10)":                           "CCACCC",
	"MODE SENSE (6)":                             "ACAACC",
	"MODE SENSE (10)":                            "ACAACC",
	"PERSISTENT RESERVE IN, READ KEYS":           "AAAAAC",
	"PERSISTENT RESERVE IN, READ RESERVATION":    "AAAAAC",
	"PERSISTENT RESERVE IN, REPORT CAPABILITIES": "AAAAAC",
	"PERSISTENT RESERVE IN, READ FULL STATUS":    "AAAAAC",
	"PREVENT ALLOW MEDIUM REMOVAL":               "AAAAAA",
	"PREVENT ALLOW MEDIUM REMOVAL, prevent":      "CCACCC",
	"RECEIVE COPY STATUS (LID1)":                 "CCACCC",
	"RECEIVE COPY OPERATING PARAMETERS":          "CCACCC",
	"RECEIVE DIAGNOSTIC RESULTS":                 "ACAACC",
	"REPORT LUNS":                                "AAAAAA",
	"REPORT SUPPORTED OPERATION CODES":           "ACAACC",
	"REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS": "ACAACC",
	"REPORT TARGET PORT GROUPS":                  "AAAAAA", // SPC-2 does not know it; without it no path is found
	"REQUEST SENSE":                              "AAAAAA",
	"SEND DIAGNOSTIC":                            "CCACCC",
	"SET TARGET PORT GROUPS":                     "CCACCC",
	"TEST UNIT READY":                            "AAAAAC",
	// SBC-3, and SBC-4 for WRITE ATOMIC
	"COMPARE AND WRITE":            "CCACCC",
	"FORMAT UNIT":                  "CCACCC",
	"GET LBA STATUS":               "ACAACC",
	"ORWRITE (16)":                 "CCACCC",
	"PRE-FETCH (10)":               "ACAACC",
	"PRE-FETCH (16)":               "ACAACC",
	"READ (6)":                     "ACAACC",
	"READ (10)":                    "ACAACC",
	"READ (12)":                    "ACAACC",
	"READ (16)":                    "ACAACC",
	"READ CAPACITY (10)":           "AAAAAC",
	"READ CAPACITY (16)":           "AAAAAC",
	"READ DEFECT DATA (10)":        "ACAACC",
	"READ DEFECT DATA (12)":        "ACAACC",
	"SANITIZE OVERWRITE":           "CCACCC",
	"SANITIZE BLOCK ERASE":         "CCACCC",
	"SANITIZE CRYPTOGRAPHIC ERASE": "CCACCC",
	"SANITIZE EXIT FAILURE MODE":   "CCACCC",
	"START STOP UNIT":              "CCACCC", // START is 0
	"START STOP UNIT, start":       "AAAAAC",
	"SYNCHRONIZE CACHE (10)":       "CCACCC",
	"SYNCHRONIZE CACHE (16)":       "CCACCC",
	"UNMAP":                        "CCACCC",
	"VERIFY (10)":                  "ACAACC",
	"VERIFY (12)":                  "ACAACC",
	"VERIFY (16)":                  "ACAACC",
	"WRITE (6)":                    "CCACCC",
	"WRITE (10)":                   "CCACCC",
	"WRITE (12)":                   "CCACCC",
	"WRITE (16)":                   "CCACCC",
	"WRITE ATOMIC (16)":            "CCACCC",
	"WRITE AND VERIFY (10)":        "CCACCC",
	"WRITE AND VERIFY (12)":        "CCACCC",
	"WRITE AND VERIFY (16)":        "CCACCC",
	"WRITE SAME (10)":              "CCACCC",
	"WRITE SAME (16)":              "CCACCC",
	// SBC-1, obsolete: nothing is read, they are as harmless as PRE-FETCH.
	"REZERO UNIT": "ACAACC",
	"SEEK (6)":    "ACAACC",
	"SEEK (10)":   "ACAACC",
	// SPC-2: any registration conflicts with them, whoever asks; RELEASE of a
	// reservation of others is GOOD and does nothing.
	"RESERVE (6)":  "CCCCCC",
	"RESERVE (10)": "CCCCCC",
	"RELEASE (6)":  "CCCCCA",
	"RELEASE (10)": "CCCCCA",
	// PERSISTENT RESERVE OUT: columns 1 and 2 are a nexus that is not registered;
	// the one that is, and does not hold, has a row of its own.
	"PERSISTENT RESERVE OUT, REGISTER":                         "AAAAAC",
	"PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY": "AAAAAC",
	"PERSISTENT RESERVE OUT, RESERVE":                          "CCCCCC",
	"PERSISTENT RESERVE OUT, RELEASE":                          "CCACCC",
	"PERSISTENT RESERVE OUT, CLEAR":                            "CCACCC",
	"PERSISTENT RESERVE OUT, PREEMPT":                          "CCACCC",
	"PERSISTENT RESERVE OUT, PREEMPT AND ABORT":                "CCACCC",
	"PERSISTENT RESERVE OUT, REGISTER AND MOVE":                "CCCCCC",
}

// registeredOut are the service actions that a registered nexus may use under
// Write Exclusive and Exclusive Access though it does not hold them.
var registeredOut = map[int]bool{scsi.SARegister: true, scsi.SARegisterAndIgnoreKey: true, scsi.SARelease: true, scsi.SAClear: true,
	scsi.SAPreempt: true, scsi.SAPreemptAndAbort: true}

// fenceCase is a command as the test sends it.
type fenceCase struct {
	name string
	cmd  *scsi.Command
	cdb  scsi.CDB
	out  []byte
	in   uint32
}

// fenceCases makes one of each command that the target runs; the fields that
// decide make two.
func fenceCases(t *testing.T, typ scsi.PRType, key uint64) (out []fenceCase) {
	for _, cmd := range scsi.Commands {
		if handlers[cmd] == nil {
			continue
		}
		var args []scsi.Arg
		arg := func(id scsi.FieldID, v uint64) {
			if cmd.Has(id) {
				args = append(args, scsi.Arg{ID: id, Value: v})
			}
		}
		n := uint64(8)
		if cmd.Op == scsi.OpWriteAtomic16 {
			arg(scsi.FCount, n)
		} else if cmd.Has(scsi.FCount) {
			arg(scsi.FCount, 1)
		}
		arg(scsi.FAlloc, 64)
		arg(scsi.FPF, 1)
		arg(scsi.FType, uint64(typ))
		var list []byte
		switch cmd.Op {
		case scsi.OpReserve10, scsi.OpRelease10, scsi.OpSendDiagnostic, scsi.OpFormatUnit:
		case scsi.OpPersistentReserve:
			p := &scsi.PROut{Key: key, NewKey: 1}
			if cmd.SA == scsi.SARegisterAndMove {
				p.IDs, p.Port = []scsi.TransportID{{Name: "iqn.2026-01.net.host:a"}}, 1
			}
			list = p.Bytes(cmd.SA)
			arg(scsi.FParamLen, uint64(len(list)))
		case scsi.OpSanitize:
			if cmd.SA == scsi.SASanitizeOverwrite {
				list = []byte{1, 0, 0, 4, 0xEE, 0xEE, 0xEE, 0xEE}
				arg(scsi.FParamLen, uint64(len(list)))
			}
		default:
			arg(scsi.FParamLen, 24)
		}
		add := func(name string, more ...scsi.Arg) {
			x, err := scsi.Build(cmd.Op, cmd.SA, append(args, more...)...)
			if err != nil {
				t.Fatal(err)
			}
			f := fenceCase{name: name, cmd: cmd, cdb: x, out: list}
			switch n := x.TransferLength(512); x.Direction() {
			case scsi.DirOut:
				if f.out == nil {
					f.out = bytes.Repeat([]byte{0xEE}, int(n))
				}
			case scsi.DirIn:
				f.out, f.in = nil, uint32(n)
			default:
				f.out = nil
			}
			out = append(out, f)
		}
		add(cmd.Name)
		switch cmd.Op {
		case scsi.OpPreventAllow:
			add(cmd.Name+", prevent", scsi.Arg{ID: scsi.FPrevent, Value: 1})
		case scsi.OpStartStopUnit:
			add(cmd.Name+", start", scsi.Arg{ID: scsi.FStart, Value: 1})
		}
	}
	return out
}

// fenced is a bench with a holder and the nexus that is judged.
type fenced struct {
	*bench
	dev     block.Device
	res     *Local
	a, c    *client
	an, cn  pr.Nexus
	content []byte
}

func newFenced(t *testing.T) *fenced {
	l := lunOn(0, able(t, 16<<10))
	f := &fenced{dev: l.Device, res: NewLocal(), content: bytes.Repeat([]byte{0x11}, 16<<10)}
	l.Reservations = f.res
	f.bench = newBench(t, Options{}, l)
	f.a = f.ready(loginOpt{name: "iqn.2026-01.net.host:a"})
	f.c = f.ready(loginOpt{name: "iqn.2026-01.net.host:c"})
	ss := f.srv.list()
	f.an, f.cn = ss[0].nexus, ss[1].nexus
	return f
}

// set makes the state anew: a holds typ (0: RESERVE (6)), c is registered or not.
func (f *fenced) set(t *testing.T, typ scsi.PRType, registered bool, holder bool) {
	t.Helper()
	f.res.mu.Lock()
	f.res.state = pr.State{}
	f.res.mu.Unlock()
	ask := func(n pr.Nexus, k pr.Kind, sa int, p *scsi.PROut) {
		if r, err := f.res.Apply(t.Context(), pr.Request{Kind: k, Nexus: n, SA: sa, Type: typ, Param: p}); err != nil || r.Status != scsi.StatusGood {
			t.Fatal(r, err)
		}
	}
	first, other := f.an, f.cn
	if holder {
		first, other = other, first
	}
	if typ == 0 {
		ask(first, pr.KindReserve, 0, nil)
		return
	}
	key := func(n pr.Nexus) uint64 {
		if n == f.an {
			return 1
		}
		return 2
	}
	ask(first, pr.KindOut, scsi.SARegister, &scsi.PROut{NewKey: key(first)})
	ask(first, pr.KindOut, scsi.SAReserve, &scsi.PROut{Key: key(first)})
	if registered || holder {
		ask(other, pr.KindOut, scsi.SARegister, &scsi.PROut{NewKey: key(other)})
	}
}

// try sends a case from c until no unit attention stands before it, and tells
// whether it met a conflict. One that did has not touched the medium.
func (f *fenced) try(t *testing.T, x *fenceCase, where string) bool {
	t.Helper()
	if err := f.dev.WriteAt(t.Context(), f.content, 0, 0); err != nil {
		t.Fatal(err)
	}
	r := f.c.do(0, x.cdb, x.out, x.in)
	for r.status == scsi.StatusCheckCondition && r.sense != nil && r.sense.Key == scsi.UnitAttention {
		r = f.c.do(0, x.cdb, x.out, x.in)
	}
	if r.status != scsi.StatusReservationConflict {
		return false
	}
	got := make([]byte, len(f.content))
	if err := f.dev.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, f.content) {
		t.Errorf("%s, %s: RESERVATION CONFLICT, and the medium changed (%v)", x.name, where, err)
	}
	if len(r.data) > 0 {
		t.Errorf("%s, %s: RESERVATION CONFLICT with %d bytes of data", x.name, where, len(r.data))
	}
	return true
}

// TestFenceEveryWrite: every command of the target under each type of reservation
// and RESERVE (6), from each kind of nexus (facts/iscsi.md finding 0.5: where a
// target lets WRITE SAME and UNMAP through, a fenced node writes on).
func TestFenceEveryWrite(t *testing.T) {
	t.Parallel()
	known := map[string]bool{}
	for _, x := range fenceCases(t, scsi.PRTypes[0], 0) {
		known[x.name] = true
		if len(fenceTable[x.name]) != 6 {
			t.Errorf("%s has no row: look it up in SPC-4 5.13.1 or SBC-3 4.17", x.name)
		}
	}
	for _, cmd := range scsi.Commands { // also rows of what is not run yet
		known[cmd.Name] = true
	}
	for name := range fenceTable {
		if !known[name] {
			t.Errorf("the row of %s is used by no command", name)
		}
	}
	if t.Failed() {
		return
	}
	for _, typ := range scsi.PRTypes {
		t.Run(typ.String(), func(t *testing.T) {
			t.Parallel()
			f := newFenced(t)
			for _, role := range []struct {
				name               string
				registered, holder bool
			}{{"not registered", false, false}, {"registered", true, false}, {"holder", true, true}} {
				key := uint64(0)
				if role.registered {
					key = 2
				}
				for _, x := range fenceCases(t, typ, key) {
					row := fenceTable[x.name]
					var want byte
					switch {
					case role.holder || role.registered && typ.AllRegistrants():
						want = 'A'
						if x.cmd.Conflict == scsi.ConflictReserve || x.cmd.Conflict == scsi.ConflictRelease {
							want = row[2]
						}
						if x.cmd.SA == scsi.SARegisterAndMove && x.cmd.Op == scsi.OpPersistentReserve && typ.AllRegistrants() {
							want = 'C' // SPC-4 5.13.8: there is nothing to move
						}
					case role.registered && typ.Registrants():
						want = row[2]
					case role.registered && x.cmd.Op == scsi.OpPersistentReserve:
						want = 'C'
						if registeredOut[x.cmd.SA] {
							want = 'A'
						}
					case typ.Registrants() && typ.WriteExclusive():
						want = row[3]
					case typ.Registrants():
						want = row[4]
					case typ.WriteExclusive():
						want = row[0]
					default:
						want = row[1]
					}
					f.set(t, typ, role.registered, role.holder)
					where := fmt.Sprintf("%s, %s", typ, role.name)
					if got := f.try(t, &x, where); got != (want == 'C') {
						t.Errorf("%s, %s: conflict %v, the standard says %c", x.name, where, got, want)
					}
				}
			}
		})
	}
	t.Run("RESERVE (6)", func(t *testing.T) {
		t.Parallel()
		f := newFenced(t)
		for _, holder := range []bool{false, true} {
			for _, x := range fenceCases(t, scsi.PRTypes[0], 0) {
				want := fenceTable[x.name][5]
				if holder {
					want = 'A'
					if x.cmd.Op == scsi.OpPersistentReserve && x.cmd.SA != scsi.SARegister && x.cmd.SA != scsi.SARegisterAndIgnoreKey {
						want = 'C' // not registered
					}
				}
				f.set(t, 0, false, holder)
				where := fmt.Sprintf("RESERVE (6), holder %v", holder)
				if got := f.try(t, &x, where); got != (want == 'C') {
					t.Errorf("%s, %s: conflict %v, the standard says %c", x.name, where, got, want)
				}
			}
		}
	})
}
