package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"
)

// FuzzReply: whatever a server sends, the decoder ends, keeps to the buffers of
// the calls, and a read that it calls done has had each of its bytes from the
// server.
func FuzzReply(f *testing.F) {
	chunk := func(fl, typ uint16, cookie uint64, p ...byte) []byte {
		b := binary.BigEndian.AppendUint32(nil, magicChunk)
		b = binary.BigEndian.AppendUint16(b, fl)
		b = binary.BigEndian.AppendUint16(b, typ)
		b = binary.BigEndian.AppendUint64(b, cookie)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(p))), p...)
	}
	u64 := func(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
	simple := func(e uint32, cookie uint64, p ...byte) []byte {
		b := binary.BigEndian.AppendUint32(nil, magicSimple)
		b = binary.BigEndian.AppendUint32(b, e)
		return append(binary.BigEndian.AppendUint64(b, cookie), p...)
	}
	f.Add(true, append(chunk(0, chunkOffsetData, 0, append(u64(512), make([]byte, 512)...)...), chunk(chunkDone, chunkOffsetHole, 0, append(u64(1024), 0, 0, 2, 0)...)...))
	f.Add(true, chunk(chunkDone, chunkBlockStatus, 3, 0, 0, 0, 7, 0, 0, 2, 0, 0, 0, 0, 3))
	f.Add(true, chunk(chunkDone, chunkErrorOffset, 0, append([]byte{0, 0, 0, 5, 0, 2, 'n', 'o'}, u64(512)...)...))
	f.Add(true, chunk(chunkDone, chunkNone, 1))
	f.Add(false, append(simple(0, 0, make([]byte, 1024)...), simple(28, 1)...))
	f.Fuzz(func(t *testing.T, structured bool, data []byte) {
		calls := map[uint64]*call{
			0: {cmd: cmdRead, off: 512, n: 1024}, 1: {cmd: cmdWrite, off: 0, n: 512},
			2: {cmd: cmdFlush}, 3: {cmd: cmdBlockStatus, off: 0, n: 4096},
		}
		// Bytes around the buffer of the read, and what it held before.
		room := bytes.Repeat([]byte{0xEE}, 1024+64)
		calls[0].p = room[32 : 32+1024]
		d := &decoder{r: bytes.NewReader(data), structured: structured, context: 7, find: func(id uint64) *call { return calls[id] }}
		for range len(data) + 1 {
			id, c, err := d.next()
			if err != nil {
				break
			}
			if c == nil {
				continue
			}
			if calls[id] != c {
				t.Fatalf("cookie %d is another call", id)
			}
			if c.cmd == cmdRead && c.err == nil && structured {
				n := uint64(0)
				for _, x := range c.covered {
					n += x[1] - x[0]
				}
				if n != uint64(c.n) {
					t.Fatalf("a read of %d bytes is done with %d", c.n, n)
				}
			}
			delete(calls, id)
		}
		for _, b := range append(room[:32:32], room[32+1024:]...) {
			if b != 0xEE {
				t.Fatal("written beside the buffer")
			}
		}
	})
}

// FuzzHandshake: whatever a server sends, the handshake ends and allocates little.
func FuzzHandshake(f *testing.F) {
	f.Add([]byte("NBDMAGICIHAVEOPT\x00\x03"))
	f.Add([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		x, err := handshake(struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(data), io.Discard}, "x")
		if err == nil && (x.flags&xHasFlags == 0 || x.minBlock == 0 || x.size < 0) {
			t.Fatalf("%+v", x)
		}
	})
}
