package iscsi

import "io"

// Buffer is the Source of a connection. It reads ahead far while PDUs are short, so
// that many come with one read, and hardly where long data segments stand between the
// headers: those go past the buffer into the caller's slice, and what was read ahead of
// one is copied twice. Not safe for concurrent use.
type Buffer struct {
	src  io.Reader
	buf  []byte
	r, w int // buf[r:w] is unread
	fill int // how much the next read ahead takes at most
	err  error
}

const (
	bufferSize = 64 << 10
	// longRead and more is read past an empty buffer; shortFill is what is read ahead
	// after that: a header and some short PDUs.
	longRead  = 16 << 10
	shortFill = 1 << 10
)

// NewBuffer returns a buffer over src.
func NewBuffer(src io.Reader) *Buffer {
	return &Buffer{src: src, buf: make([]byte, bufferSize), fill: bufferSize}
}

// Buffered is the number of bytes that can be read without waiting.
func (b *Buffer) Buffered() int { return b.w - b.r }

// Read implements io.Reader: what is buffered, or else one read of the source.
func (b *Buffer) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if b.r == b.w {
		if err := b.err; err != nil {
			b.err = nil
			return 0, err
		}
		if len(p) >= longRead {
			b.fill = shortFill
			return b.src.Read(p)
		}
		if err := b.more(); err != nil {
			return 0, err
		}
	}
	n := copy(p, b.buf[b.r:b.w])
	b.r += n
	return n, nil
}

// more reads ahead into the empty buffer. An error that came with bytes is kept for
// the next call.
func (b *Buffer) more() error {
	n, err := b.src.Read(b.buf[:b.fill])
	b.r, b.w, b.fill = 0, max(n, 0), bufferSize
	if n > 0 {
		b.err = err
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress // a Reader should not; waiting for it in a loop would be worse
	}
	return err
}

// Discard drops the next n bytes; with an error it dropped fewer.
func (b *Buffer) Discard(n int) (int, error) {
	done := 0
	for done < n {
		if b.r == b.w {
			if err := b.err; err != nil {
				b.err = nil
				return done, err
			}
			if err := b.more(); err != nil {
				return done, err
			}
		}
		k := min(n-done, b.w-b.r)
		b.r += k
		done += k
	}
	return done, nil
}
