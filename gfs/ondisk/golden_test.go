package ondisk

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

// TestRealImage reads an image of the real mkfs.gfs2 block by block: every
// checksum of facts §1.2 is right, every bitmap agrees with its header, and
// every structure survives decode and encode unchanged.
func TestRealImage(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("mkfs.gfs2"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("mkfs.gfs2 is not installed (make deps)")
		}
		t.Skip("skip: mkfs.gfs2 is not installed (make deps)")
	}
	for _, bs := range []int{512, 1024, 4096} {
		t.Run(strconv.Itoa(bs), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "img")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 64<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("mkfs.gfs2", "-O", "-q", "-b", strconv.Itoa(bs), "-j", "2", "-p", "lock_dlm", "-t", "cl:fs", path).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			img, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			checkImage(t, img)
		})
	}
}

func checkImage(t *testing.T, img []byte) {
	sb, g, err := ReadSuperblock(img[SBOffset:])
	if err != nil {
		t.Fatal(err)
	}
	if CString(sb.LockTable[:]) != "cl:fs" || sb.FSFormat != Format1802 || sb.Master.Addr == 0 {
		t.Errorf("superblock: %+v", sb)
	}
	seen := map[MetaType]int{}
	jblk := uint32(0)
	for off := 0; off+g.BlockSize <= len(img); off += g.BlockSize {
		b := img[off : off+g.BlockSize]
		typ := TypeOf(b)
		seen[typ]++
		var v codec
		switch typ {
		case TypeNone:
			continue
		case TypeSB:
			v = new(Superblock)
		case TypeRG:
			v = new(Rgrp)
			if be.Uint32(b[64:]) == 0 || !RgrpCRCOK(b) {
				t.Fatalf("block %d: rg_crc", off/g.BlockSize)
			}
			var rg Rgrp
			if err := rg.Decode(b); err != nil {
				t.Fatal(err)
			}
			length := int(rg.Data0) - off/g.BlockSize
			var c [4]uint64
			for i := range length {
				o, n, _ := g.BitmapSpan(i, rg.Bitbytes)
				p := CountStates(img[off+i*g.BlockSize+o:][:n])
				for k := range c {
					c[k] += p[k]
				}
			}
			if c[Free] != uint64(rg.Free) || c[DinodeSt] != uint64(rg.Dinodes) || c[Unlinked] != 0 {
				t.Fatalf("block %d: bitmap counts %v, header %+v", off/g.BlockSize, c, rg)
			}
		case TypeDI:
			v = new(Dinode)
			var d Dinode
			if err := d.Decode(b); err != nil || d.Num.Addr != uint64(off/g.BlockSize) {
				t.Fatalf("dinode %d: %+v %v", off/g.BlockSize, d, err)
			}
			if d.Mode&ModeMask == ModeDir && d.Flags&DIExhash == 0 {
				n := uint32(0)
				if err := EachEntry(b, func(e *Entry) bool {
					if !e.Sentinel() {
						n++
						if e.Hash != NameHash(e.Name) {
							t.Fatalf("hash of %s", e.Name)
						}
					}
					return true
				}); err != nil || n != d.Entries {
					t.Fatalf("directory %d: %d entries, %v", d.Num.Addr, n, err)
				}
			}
		case TypeLF:
			v = new(Leaf)
		case TypeLH:
			v = new(LogHeader)
			n := be.Uint32(b[40:])
			if n != 0 && n != jblk+1 {
				t.Fatalf("journal block %d follows %d", n, jblk)
			}
			if jblk = n; be.Uint32(b[48:]) == 0 || !LogHeaderOK(b, n) {
				t.Fatalf("block %d: log header checksums", off/g.BlockSize)
			}
		default:
			if !typ.Known() {
				t.Fatalf("block %d: type %d", off/g.BlockSize, typ)
			}
			v = new(MetaHeader)
		}
		// mkfs leaves reserved bytes zero, so the encoding over zeroes is the
		// original, at least as far as the structure reaches.
		if err := v.Decode(b); err != nil {
			t.Fatal(err)
		}
		out := make([]byte, g.BlockSize)
		if err := v.Encode(out); err != nil {
			t.Fatal(err)
		}
		if n := sizeOf(typ); !bytes.Equal(out[:n], b[:n]) {
			t.Fatalf("block %d (%s) changed:\n%x\n%x", off/g.BlockSize, typ, b[:n], out[:n])
		}
	}
	for _, typ := range []MetaType{TypeSB, TypeRG, TypeDI, TypeIN, TypeLH, TypeQC} {
		if seen[typ] == 0 {
			t.Errorf("no %s in the image", typ)
		}
	}
}

func sizeOf(t MetaType) int {
	switch t {
	case TypeSB:
		return SBSize
	case TypeRG:
		return RgrpSize
	case TypeDI:
		return DinodeSize
	case TypeLF:
		return LeafSize
	case TypeLH:
		return LogHeaderSize
	}
	return MetaHeaderSize
}
