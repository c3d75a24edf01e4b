package ondisk

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

type codec interface {
	Decode([]byte) error
	Encode([]byte) error
}

// structures lists every structure: its size, a maker and its table.
var structures = []struct {
	name   string
	size   int
	make   func() codec
	fields []FieldInfo
}{
	{"meta_header", 24, func() codec { return new(MetaHeader) }, metaLayout.infos()},
	{"inum", 16, func() codec { return new(Inum) }, inumLayout.infos()},
	{"sb", 272, func() codec { return new(Superblock) }, Fields(TypeSB)},
	{"rindex", 96, func() codec { return new(Rindex) }, RindexFields()},
	{"rgrp", 128, func() codec { return new(Rgrp) }, Fields(TypeRG)},
	{"dinode", 232, func() codec { return new(Dinode) }, Fields(TypeDI)},
	{"dirent", 40, func() codec { return new(Dirent) }, DirentFields()},
	{"leaf", 104, func() codec { return new(Leaf) }, Fields(TypeLF)},
	{"ea_header", 16, func() codec { return new(EAHeader) }, EAFields()},
	{"log_header", 120, func() codec { return new(LogHeader) }, Fields(TypeLH)},
	{"log_descriptor", 72, func() codec { return new(LogDescriptor) }, Fields(TypeLD)},
	{"quota", 88, func() codec { return new(Quota) }, QuotaFields()},
	{"quota_change", 16, func() codec { return new(QuotaChange) }, qcLayout.infos()},
	{"statfs_change", 24, func() codec { return new(StatfsChange) }, StatfsFields()},
	{"inum_range", 16, func() codec { return new(InumRange) }, InumRangeFields()},
	{"rgrp_lvb", 32, func() codec { return new(RgrpLVB) }, rgrpLVBLayout.infos()},
	{"inode_lvb", 32, func() codec { return new(InodeLVB) }, inodeLVBLayout.infos()},
	{"quota_lvb", 32, func() codec { return new(QuotaLVB) }, quotaLVBLayout.infos()},
}

// TestTables: fields lie inside their structure and do not overlap, and the
// sizes are those of the kernel's header (facts §1.1).
func TestTables(t *testing.T) {
	for _, s := range structures {
		used := make([]string, s.size)
		for _, f := range s.fields {
			for i := f.Off; i < f.Off+f.Size; i++ {
				if i >= s.size {
					t.Fatalf("%s.%s ends at %d of %d", s.name, f.Name, f.Off+f.Size, s.size)
				}
				if used[i] != "" {
					t.Fatalf("%s.%s overlaps %s at byte %d", s.name, f.Name, used[i], i)
				}
				used[i] = f.Name
			}
		}
		if err := s.make().Decode(make([]byte, s.size-1)); err == nil {
			t.Errorf("%s decodes from %d bytes", s.name, s.size-1)
		}
		if err := s.make().Decode(make([]byte, s.size)); err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
	}
}

// TestRoundTrip: decode then encode gives the bytes back, over any background;
// reserved bytes of the target survive.
func TestRoundTrip(t *testing.T) {
	for _, s := range structures {
		t.Run(s.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				in := rapid.SliceOfN(rapid.Byte(), s.size, s.size).Draw(t, "in")
				bg := rapid.Byte().Draw(t, "background")
				out := bytes.Repeat([]byte{bg}, s.size)
				want := bytes.Clone(out)
				v := s.make()
				if err := v.Decode(in); err != nil {
					t.Fatal(err)
				}
				if err := v.Encode(out); err != nil {
					t.Fatal(err)
				}
				for _, f := range s.fields {
					copy(want[f.Off:f.Off+f.Size], in[f.Off:])
				}
				if !bytes.Equal(out, want) {
					t.Fatal(cmp.Diff(want, out))
				}
				w := s.make()
				if err := w.Decode(out); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(v, w); d != "" {
					t.Fatal(d)
				}
			})
		})
	}
}

func TestFieldUint(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.SampledFrom(structures).Draw(t, "structure")
		f := rapid.SampledFrom(s.fields).Draw(t, "field")
		b := make([]byte, s.size)
		v := rapid.Uint64().Draw(t, "value")
		err := f.PutUint(b, v)
		fits := f.Kind < KindString && (f.Size == 8 || v>>(8*f.Size) == 0)
		if (err == nil) != fits {
			t.Fatalf("%s.%s = %d: %v", s.name, f.Name, v, err)
		}
		if fits && f.Uint(b) != v {
			t.Fatalf("%s.%s: wrote %d, read %d", s.name, f.Name, v, f.Uint(b))
		}
	})
}

// TestNameHash and TestBitmap pin facts §1.2 and §1.3.
func TestNameHash(t *testing.T) {
	for name, want := range map[string]uint32{".": 0x0ED4E242, "..": 0x9608161C, "journal0": 0xFC7745EB} {
		if got := NameHash([]byte(name)); got != want {
			t.Errorf("%s: %08X, want %08X", name, got, want)
		}
	}
}

func TestGeometryNumbers(t *testing.T) {
	g, err := NewGeometry(4096)
	if err != nil {
		t.Fatal(err)
	}
	if g.DinodePtrs != 483 || g.InPtrs != 509 || g.StuffedMax() != 3864 || g.HashPtrs != 256 || g.Shift != 12 || g.SBBlock() != 16 {
		t.Errorf("%+v", g)
	}
	for size, h := range map[uint64]int{1: 1, 483 * 4096: 1, 483*4096 + 1: 2, 483 * 509 * 4096: 2, 483*509*4096 + 1: 3, 1 << 62: 6, 1<<64 - 1: 6} {
		if got := g.Height(size, 4096); got != h {
			t.Errorf("height of %d bytes: %d, want %d", size, got, h)
		}
	}
	if l, d := g.SplitRG(2057); l != 1 || d != 2056 {
		t.Errorf("SplitRG(2057) = %d, %d", l, d)
	}
	if n := g.LDPerBlock(LDMetadata); n != 503 {
		t.Errorf("%d", n)
	}
	if n := g.LDPerBlock(LDJdata); n != 251 {
		t.Errorf("%d", n)
	}
	for _, bad := range []int{0, 256, 1000, 8192, 65536, -4096} {
		if _, err := NewGeometry(bad); err == nil {
			t.Errorf("block size %d accepted", bad)
		}
	}
}

// TestBitmap: Set and Get agree with a plain slice over all header blocks of a
// resource group, and the counts add up.
func TestBitmap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g, _ := NewGeometry(512 << rapid.IntRange(0, 3).Draw(t, "shift"))
		n := rapid.Uint64Range(20, 60000).Draw(t, "blocks")
		length, data := g.SplitRG(n)
		if data == 0 || data%4 != 0 || length+data > n || n-length-data > 3 || g.BitBlocks(data) > length {
			t.Fatalf("SplitRG(%d) = %d, %d", n, length, data)
		}
		bits := make([]byte, int(length)*g.BlockSize)
		model := map[uint64]BlockState{}
		for range 50 {
			k := rapid.Uint64Range(0, data-1).Draw(t, "n")
			s := BlockState(rapid.IntRange(0, 3).Draw(t, "state"))
			g.SetState(bits, k, s)
			model[k] = s
		}
		var want, got [4]uint64
		want[Free] = data
		for k, s := range model {
			if g.GetState(bits, k) != s {
				t.Fatalf("block %d: %v, want %v", k, g.GetState(bits, k), s)
			}
			want[Free]--
			want[s]++
		}
		next := uint64(0)
		for i := range int(length) {
			off, nb, first := g.BitmapSpan(i, uint32(data/4))
			if first != next && nb > 0 {
				t.Fatalf("header block %d starts at %d, want %d", i, first, next)
			}
			next = first + uint64(nb)*4
			c := CountStates(bits[i*g.BlockSize+off : i*g.BlockSize+off+nb])
			for j := range c {
				got[j] += c[j]
			}
		}
		if got != want {
			t.Fatalf("counts %v, want %v", got, want)
		}
	})
}

// TestDirBlock: a directory block against a map.
func TestDirBlock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := make([]byte, 512<<rapid.IntRange(0, 3).Draw(t, "shift"))
		d := Dinode{MetaHeader: Meta(TypeDI)}
		if err := d.Encode(b); err != nil {
			t.Fatal(err)
		}
		if err := InitDir(b, Inum{1, 10}, Inum{2, 20}); err != nil {
			t.Fatal(err)
		}
		model := map[string]Inum{".": {1, 10}, "..": {2, 20}}
		for range 60 {
			name := rapid.StringMatching(`[a-d]{1,12}`).Draw(t, "name")
			if _, ok := model[name]; ok {
				e, found, err := FindEntry(b, []byte(name))
				if err != nil || !found {
					t.Fatalf("%s: %v %v", name, found, err)
				}
				if err := RemoveEntry(b, e.Off); err != nil {
					t.Fatal(err)
				}
				delete(model, name)
				continue
			}
			ino := Inum{rapid.Uint64Min(1).Draw(t, "formal"), rapid.Uint64Min(1).Draw(t, "addr")}
			ok, err := AddEntry(b, false, []byte(name), ino, DTRegular)
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				model[name] = ino
			}
		}
		got := map[string]Inum{}
		if err := EachEntry(b, func(e *Entry) bool {
			if !e.Sentinel() {
				got[string(e.Name)] = e.Inum
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(model, got); d != "" {
			t.Fatal(d)
		}
	})
}

// FuzzBlock: nothing in a block of any content makes a decoder panic or loop.
func FuzzBlock(f *testing.F) {
	for t := TypeNone; t <= TypeQC; t++ {
		b := make([]byte, 512)
		PutMeta(b, t)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range structures {
			v := s.make()
			if err := v.Decode(b); (err == nil) != (len(b) >= s.size) {
				t.Fatalf("%s from %d bytes: %v", s.name, len(b), err)
			}
		}
		_, _, _ = ReadSuperblock(b)
		if len(b) < 512 || len(b) > 4096 || len(b)&(len(b)-1) != 0 {
			return
		}
		g, err := NewGeometry(len(b))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		_ = EachEntry(b, func(e *Entry) bool {
			if n++; n > len(b) {
				t.Fatal("endless directory block")
			}
			return true
		})
		n = 0
		_ = EachEA(b, func(e *EA) bool {
			if n++; n > len(b) {
				t.Fatal("endless EA block")
			}
			return true
		})
		if list, err := g.LogEntries(b); err == nil && len(list) > len(b)/8 {
			t.Fatalf("%d log entries", len(list))
		}
		if list := g.Revokes(nil, b, 0, 1<<30); len(list) > len(b)/8 {
			t.Fatalf("%d revokes", len(list))
		}
		_ = LogHeaderOK(b, 0)
		_ = RgrpCRCOK(b)
		_, _, _ = FindEntry(b, []byte("x"))
		_ = RemoveEntry(bytes.Clone(b), DirStart(b))
		_, _ = AddEntry(bytes.Clone(b), false, []byte("name"), Inum{1, 2}, DTRegular)
	})
}
