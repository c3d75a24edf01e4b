package iscsi

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var allOpcodes = func() (ops []Opcode) {
	for o := range opTable {
		if Opcode(o).Known() {
			ops = append(ops, Opcode(o))
		}
	}
	return ops
}()

func TestOpcodeTable(t *testing.T) {
	if len(allOpcodes) != 18 {
		t.Fatalf("%d opcodes in the table, RFC 7143 §11.2.1.2 defines 18", len(allOpcodes))
	}
	for _, o := range allOpcodes {
		p, err := New(o)
		if err != nil || p.Opcode() != o {
			t.Errorf("New(%v) = %T, %v", o, p, err)
		}
		if want := opTable[o].sender == Initiator; o.FromInitiator() != want {
			t.Errorf("%v: FromInitiator %v, table says %v", o, !want, want)
		}
	}
	if _, err := New(0x1e); err == nil {
		t.Error("New accepts a vendor opcode")
	}
}

// A header whose every bit is set or drawn at random survives decode, encode and
// decode: nothing that a struct holds is lost, and Encode is a function of the
// struct alone.
func TestRoundTrip(t *testing.T) {
	for _, o := range allOpcodes {
		t.Run(o.String(), func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(t *rapid.T) {
				var b BHS
				copy(b[:], rapid.SliceOfN(rapid.Byte(), BHSLen, BHSLen).Draw(t, "header"))
				b[0] = b[0]&0x40 | byte(o)
				roundTrip(t, &b)
			})
		})
	}
}

type failer interface{ Fatalf(string, ...any) }

func roundTrip(t failer, b *BHS) {
	p, err := DecodePDU(b)
	if err != nil {
		var pe *ProtocolError
		if !errors.As(err, &pe) {
			t.Fatalf("error of type %T: %v", err, err)
		}
		return
	}
	var c BHS
	for i := range c {
		c[i] = 0xff // Encode must write every byte
	}
	p.Encode(&c)
	if c.AHSLen() != 0 || c.DataLen() != 0 {
		t.Fatalf("%T: Encode left lengths %d, %d", p, c.AHSLen(), c.DataLen())
	}
	q, err := DecodePDU(&c)
	if err != nil {
		t.Fatalf("%T: decode of what was encoded: %v", p, err)
	}
	if d := cmp.Diff(p, q); d != "" {
		t.Fatalf("%T: lost in the round trip: %s", p, d)
	}
	var e BHS
	q.Encode(&e)
	if c != e {
		t.Fatalf("%T: encode differs:\n%x\n%x", p, c, e)
	}
}

// testdata/pdu holds headers laid out by hand from the figures of RFC 7143 §11.
func TestGoldenPDU(t *testing.T) {
	datadriven.Walk(t, "testdata/pdu", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "decode":
				raw, err := hex.DecodeString(strings.Join(strings.Fields(d.Input), ""))
				if err != nil || len(raw) < BHSLen {
					t.Fatalf("%s: bad hex: %v", d.Pos, err)
				}
				b := (*BHS)(raw)
				p, err := DecodePDU(b)
				if err != nil {
					return "error: " + err.Error() + "\n"
				}
				out := fmt.Sprintf("%s ahs=%d data=%d\n%+v\n", p.Opcode(), b.AHSLen(), b.DataLen(), p)
				if c, ok := p.(*ScsiCommand); ok && b.AHSLen() > 0 {
					if err := c.DecodeAHS(raw[BHSLen : BHSLen+b.AHSLen()]); err != nil {
						return out + "ahs error: " + err.Error() + "\n"
					}
					out += fmt.Sprintf("ext=%x bidi=%v,%d\n", c.ExtCDB, c.Bidi, c.BidiEDTL)
					if again := c.AppendAHS(nil); !bytes.Equal(again, raw[BHSLen:BHSLen+b.AHSLen()]) {
						out += fmt.Sprintf("ahs encodes as %x\n", again)
					}
				}
				var c BHS
				p.Encode(&c)
				c.SetAHSLen(b.AHSLen())
				c.SetDataLen(b.DataLen())
				if c != *b {
					out += fmt.Sprintf("encodes as %x\n", c)
				}
				return out
			}
			t.Fatalf("%s: unknown command %s", d.Pos, d.Cmd)
			return ""
		})
	})
}

// RFC 7143 Appendix B (RFC 3720 B.4): CRC examples.
func TestCRC32C(t *testing.T) {
	inc, dec := make([]byte, 32), make([]byte, 32)
	for i := range inc {
		inc[i], dec[i] = byte(i), byte(31-i)
	}
	cmd, _ := hex.DecodeString("01c00000000000000000000000000000" + "14000000000004000000001400000018" + "28000000000000000200000000000000")
	for _, c := range []struct {
		name string
		in   []byte
		wire string
	}{
		{"32 bytes of zeroes", make([]byte, 32), "aa36918a"},
		{"32 bytes of ones", bytes.Repeat([]byte{0xff}, 32), "43aba862"},
		{"32 bytes of incrementing 00..1f", inc, "4e79dd46"},
		{"32 bytes of decrementing 1f..00", dec, "5cdb3f11"},
		{"an iSCSI SCSI Read (10) command PDU", cmd, "563a96d9"},
	} {
		v := CRC32C(0, c.in)
		if got := hex.EncodeToString([]byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)}); got != c.wire {
			t.Errorf("%s: %s, want %s", c.name, got, c.wire)
		}
	}
}

func TestSense(t *testing.T) {
	d := AppendSense(nil, []byte{0x70, 0, 6}, []byte{1, 2})
	s, r, err := ParseSense(d)
	if err != nil || !bytes.Equal(s, []byte{0x70, 0, 6}) || !bytes.Equal(r, []byte{1, 2}) {
		t.Fatalf("sense %x response %x: %v", s, r, err)
	}
	for _, bad := range [][]byte{{0}, {0, 3, 1, 2}} {
		if _, _, err := ParseSense(bad); err == nil {
			t.Errorf("ParseSense(%x) accepts a length that lies", bad)
		}
	}
}

func TestLUN(t *testing.T) {
	for _, c := range []struct {
		n   uint16
		raw LUN
	}{{0, 0}, {1, 1 << 48}, {255, 255 << 48}, {256, 0x4100 << 48}, {16383, 0x7fff << 48}} {
		if got := LUNOf(c.n); got != c.raw {
			t.Errorf("LUNOf(%d) = %016x, want %016x", c.n, uint64(got), uint64(c.raw))
		}
		if n, ok := c.raw.Number(); !ok || n != c.n {
			t.Errorf("%016x.Number() = %d, %v", uint64(c.raw), n, ok)
		}
	}
	for _, l := range []LUN{0x0100 << 48, 1<<48 | 1, 0xc101 << 48} {
		if _, ok := l.Number(); ok {
			t.Errorf("%016x has a number", uint64(l))
		}
	}
}

func TestAHS(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"extended CDB of 20 bytes", "00050100aabbccdd", "aabbccdd"},
		{"padded", "00040100aabbcc00", "aabbcc"},
		{"unknown type is skipped", "0002050000000000 00050100aabbccdd", ""}, // length 2: 1 specific byte, 1 more, padded to 8
		{"length beyond", "00ff0100aabbccdd", "err"},
		{"length 0", "0000010000000000", "err"},
		{"two CDBs", "00050100aabbccdd00050100aabbccdd", "err"},
		{"bidi too short", "0004020000000000", "err"},
		{"no bytes in the CDB", "00010100", "err"},
	} {
		raw, err := hex.DecodeString(strings.ReplaceAll(c.in, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		var p ScsiCommand
		err = p.DecodeAHS(raw)
		got := hex.EncodeToString(p.ExtCDB)
		if err != nil {
			got = "err"
		}
		if c.name == "unknown type is skipped" {
			c.want = "aabbccdd"
		}
		if got != c.want {
			t.Errorf("%s: %s (%v), want %s", c.name, got, err, c.want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		in := ScsiCommand{ExtCDB: rapid.SliceOfN(rapid.Byte(), 0, MaxCDB-16).Draw(t, "cdb"), Bidi: rapid.Bool().Draw(t, "bidi")}
		if in.Bidi {
			in.BidiEDTL = rapid.Uint32().Draw(t, "len")
		}
		var out ScsiCommand
		if err := out.DecodeAHS(in.AppendAHS(nil)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(in.ExtCDB, out.ExtCDB) || in.Bidi != out.Bidi || in.BidiEDTL != out.BidiEDTL {
			t.Fatalf("%+v became %+v", in, out)
		}
	})
}

func TestSerial(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := Serial(rapid.Uint32().Draw(t, "a"))
		n := rapid.Uint32Range(1, 1<<31-1).Draw(t, "n")
		b := a.Add(n)
		if !a.Less(b) || b.Less(a) || !a.LessEq(b) || a.Less(a) || b.Diff(a) != int32(n) {
			t.Fatalf("%d, %d", a, b)
		}
		if !a.InWindow(a, b) || !b.InWindow(a, b) || a.InWindow(a, a-1) || b.Add(1).InWindow(a, b) && n < 1<<31-1 {
			t.Fatalf("window [%d,%d]", a, b)
		}
	})
	if a := Serial(5); a.Less(a+1<<31) || (a + 1<<31).Less(a) {
		t.Error("numbers 2^31 apart are ordered (RFC 1982 §3.2 leaves them undefined)")
	}
}

// What a Writer writes a Reader reads, for any digests, sizes and cuts of the
// stream, whatever part of a data segment the consumer skips.
func TestStream(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var wire bytes.Buffer
		w := NewWriter(&wire, 1<<16)
		w.HeaderDigest, w.DataDigest = rapid.Bool().Draw(t, "hd"), rapid.Bool().Draw(t, "dd")
		type pdu struct {
			dsn  uint32
			ahs  []byte
			data []byte
		}
		var sent []pdu
		for i := range rapid.IntRange(1, 12).Draw(t, "pdus") {
			p := pdu{dsn: uint32(i), ahs: make([]byte, 4*rapid.IntRange(0, 255).Draw(t, "ahs")),
				data: rapid.SliceOfN(rapid.Byte(), 0, 2000).Draw(t, "data")}
			for j := range p.ahs {
				p.ahs[j] = byte(i + j)
			}
			do := DataOut{ITT: 7, DataSN: p.dsn}
			do.Encode(w.Begin())
			cut := rapid.IntRange(0, len(p.data)).Draw(t, "cut")
			if err := w.End(p.ahs, p.data[:cut], p.data[cut:]); err != nil {
				t.Fatal(err)
			}
			sent = append(sent, p)
			if rapid.Bool().Draw(t, "flush") {
				if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
			}
		}
		want := wire.Len() + w.Pending()
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if wire.Len() != want || w.Pending() != 0 {
			t.Fatalf("%d bytes written, Pending said %d", wire.Len(), want)
		}
		r := NewReader(bufio.NewReaderSize(&wire, 64), 1<<16)
		r.HeaderDigest, r.DataDigest = w.HeaderDigest, w.DataDigest
		for _, p := range sent {
			b, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			var do DataOut
			if err := do.Decode(b); err != nil || do.DataSN != p.dsn {
				t.Fatalf("PDU %d: %+v, %v", p.dsn, do, err)
			}
			if !bytes.Equal(r.AHS(), p.ahs) || r.DataLen() != len(p.data) {
				t.Fatalf("PDU %d: ahs %d bytes, data %d", p.dsn, len(r.AHS()), r.DataLen())
			}
			n := rapid.IntRange(0, len(p.data)).Draw(t, "read")
			got := make([]byte, n)
			if err := r.ReadData(got); err != nil || !bytes.Equal(got, p.data[:n]) {
				t.Fatalf("PDU %d: data %x, %v", p.dsn, got, err)
			}
			if rapid.Bool().Draw(t, "rest") {
				if got, err = r.AppendData(got); err != nil || !bytes.Equal(got, p.data) {
					t.Fatalf("PDU %d: data %x, %v", p.dsn, got, err)
				}
			}
		}
		if _, err := r.Next(); !errors.Is(err, io.EOF) {
			t.Fatalf("at the end: %v", err)
		}
	})
}

func TestDigestErrors(t *testing.T) {
	var wire bytes.Buffer
	w := NewWriter(&wire, 1<<16)
	w.HeaderDigest, w.DataDigest = true, true
	for i := range 3 {
		no := NopOut{Immediate: true, ITT: uint32(i), TTT: ReservedTag}
		no.Encode(w.Begin())
		if err := w.End(nil, []byte("ping data")); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	one := wire.Len() / 3
	raw := wire.Bytes()
	raw[BHSLen+DigestLen+1] ^= 1 // data of the first
	raw[2*one+20] ^= 1           // header of the third
	r := NewReader(bufio.NewReader(bytes.NewReader(raw)), 1<<16)
	r.HeaderDigest, r.DataDigest = true, true
	b, err := r.Next()
	if err != nil || b.ITT() != 0 {
		t.Fatal(err)
	}
	if _, err := r.AppendData(nil); !errors.Is(err, ErrDataDigest) {
		t.Fatalf("corrupt data: %v", err)
	}
	if b, err = r.Next(); err != nil || b.ITT() != 1 {
		t.Fatalf("PDU after a data digest error: %v", err)
	}
	if err := r.DiscardData(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Next(); !errors.Is(err, ErrHeaderDigest) {
		t.Fatalf("corrupt header: %v", err)
	}
}

// The length is judged before a byte of it is read or room made for it (§7.7).
func TestReaderBounds(t *testing.T) {
	var b BHS
	(&NopOut{ITT: 1}).Encode(&b)
	b.SetDataLen(8193)
	r := NewReader(bufio.NewReader(bytes.NewReader(b[:])), 8192)
	_, err := r.Next()
	var pe *ProtocolError
	if !errors.As(err, &pe) || !pe.Fatal {
		t.Fatalf("segment over the limit: %v", err)
	}
	r = NewReader(bufio.NewReader(bytes.NewReader(b[:20])), 8192)
	if _, err := r.Next(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("half a header: %v", err)
	}
	w := NewWriter(io.Discard, 512)
	(&NopOut{ITT: 1}).Encode(w.Begin())
	if err := w.End(nil, make([]byte, 513)); err == nil || w.Pending() != 0 {
		t.Fatalf("Writer takes more than the peer does: %v", err)
	}
}

func TestNoAllocs(t *testing.T) {
	data := make([]byte, 4096)
	w := NewWriter(io.Discard, 1<<20)
	w.HeaderDigest, w.DataDigest = true, true
	write := func() {
		for i := range 40 {
			di := DataIn{Final: true, HasStatus: true, ITT: uint32(i), TTT: ReservedTag}
			di.Encode(w.Begin())
			if err := w.End(nil, data[:100*i]); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	write()
	if n := testing.AllocsPerRun(50, write); n != 0 {
		t.Errorf("writing 40 Data-In allocates %v times", n)
	}

	var wire bytes.Buffer
	w = NewWriter(&wire, 1<<20)
	w.HeaderDigest, w.DataDigest = true, true
	do := DataOut{ITT: 1, TTT: 2}
	do.Encode(w.Begin())
	if err := w.End(nil, data); err != nil {
		t.Fatal(err)
	}
	c := ScsiCommand{Final: true, ITT: 1, ExtCDB: make([]byte, 16)}
	var ahs [64]byte
	c.Encode(w.Begin())
	if err := w.End(c.AppendAHS(ahs[:0])); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	// A source that wraps around at the record boundary.
	src := bytes.NewReader(wire.Bytes())
	br := bufio.NewReaderSize(src, 1<<16)
	r := NewReader(br, 1<<20)
	r.HeaderDigest, r.DataDigest = true, true
	buf := make([]byte, 4096)
	read := func() {
		src.Reset(wire.Bytes())
		br.Reset(src)
		for range 2 {
			b, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			switch b.Opcode() {
			case OpDataOut:
				var do DataOut
				if err := do.Decode(b); err != nil {
					t.Fatal(err)
				}
				if err := r.ReadData(buf); err != nil {
					t.Fatal(err)
				}
			case OpScsiCommand:
				var c ScsiCommand
				if err := c.Decode(b); err != nil {
					t.Fatal(err)
				}
				if err := c.DecodeAHS(r.AHS()); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if n := testing.AllocsPerRun(50, read); n != 0 {
		t.Errorf("reading a Data-Out and a SCSI Command allocates %v times", n)
	}
}

func FuzzDecodePDU(f *testing.F) {
	for _, o := range allOpcodes {
		var b BHS
		b[0] = byte(o)
		b[1] = 0x80
		f.Add(b[:], []byte{0, 5, 1, 0, 1, 2, 3, 4})
	}
	f.Fuzz(func(t *testing.T, hdr, ahs []byte) {
		if len(hdr) < BHSLen {
			return
		}
		b := (*BHS)(bytes.Clone(hdr))
		roundTrip(t, b)
		var c ScsiCommand
		if err := c.DecodeAHS(ahs); err == nil && len(c.ExtCDB) > MaxCDB-16 {
			t.Fatalf("extended CDB of %d bytes", len(c.ExtCDB))
		}
	})
}

func FuzzReader(f *testing.F) {
	var wire bytes.Buffer
	w := NewWriter(&wire, 1<<16)
	(&NopOut{ITT: 1}).Encode(w.Begin())
	_ = w.End(nil, []byte("ping"))
	_ = w.Flush()
	f.Add(wire.Bytes(), false, false)
	f.Add(wire.Bytes(), true, true)
	f.Fuzz(func(t *testing.T, in []byte, hd, dd bool) {
		r := NewReader(bufio.NewReaderSize(bytes.NewReader(in), 64), 4096)
		r.HeaderDigest, r.DataDigest = hd, dd
		for {
			b, err := r.Next()
			if err != nil {
				return
			}
			if _, err := DecodePDU(b); err != nil {
				continue // Next skips the data segment
			}
			d, err := r.AppendData(nil)
			if len(d) > 4096 {
				t.Fatalf("%d bytes over the limit", len(d))
			}
			if err != nil && !errors.Is(err, ErrDataDigest) {
				return
			}
		}
	})
}
