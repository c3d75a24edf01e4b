package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// export is what the server says of itself in the handshake. Two of one server
// are equal, or it is no longer the same export.
type export struct {
	size       int64
	flags      uint16
	minBlock   uint32 // 1 where the server says nothing
	prefBlock  uint32
	maxPayload uint32
	structured bool
	meta       bool // base:allocation is there
	context    uint32
}

type shaker struct {
	rw  io.ReadWriter
	x   export
	buf [20]byte
}

func (s *shaker) read(n int) ([]byte, error) {
	_, err := io.ReadFull(s.rw, s.buf[:n])
	return s.buf[:n], err
}

// handshake goes through the newstyle negotiation up to transmission.
func handshake(rw io.ReadWriter, name string) (export, error) {
	s := &shaker{rw: rw, x: export{minBlock: 1, prefBlock: 4096, maxPayload: maxPayload}}
	err := s.run(name)
	return s.x, err
}

func (s *shaker) run(name string) error {
	b, err := s.read(18)
	if err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if m := binary.BigEndian.Uint64(b); m != magicServer {
		return protocol("the greeting begins with %016x: no NBD server", m)
	}
	if m := binary.BigEndian.Uint64(b[8:]); m == magicOldstyle {
		return errors.New("the server speaks the oldstyle handshake, which names no export; start it with newstyle")
	} else if m != magicOption {
		return protocol("greeting %016x", m)
	}
	flags := uint32(binary.BigEndian.Uint16(b[16:]))
	if flags&flagFixedNewstyle == 0 {
		return errors.New("the server's handshake is not the fixed newstyle one: a refused option would end it")
	}
	flags &= flagFixedNewstyle | flagNoZeroes
	if _, err := s.rw.Write(binary.BigEndian.AppendUint32(nil, flags)); err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if s.x.structured, err = s.ask(optStructuredReply, nil, nil); err != nil {
		return err
	}
	if s.x.structured {
		if err := s.metaContext(name); err != nil {
			return err
		}
	}
	ok, err := s.goFor(name)
	if err != nil || ok {
		return err
	}
	return s.exportName(name, flags&flagNoZeroes != 0)
}

// option sends an option.
func (s *shaker) option(opt uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := s.rw.Write(append(b, data...))
	return err
}

// ask sends an option and reads its replies up to the last one. It is false
// where the server does not know or does not allow the option.
func (s *shaker) ask(opt uint32, data []byte, each func(typ uint32, data []byte) error) (bool, error) {
	if err := s.option(opt, data); err != nil {
		return false, fmt.Errorf("option %d: %w", opt, err)
	}
	for range 64 {
		b, err := s.read(20)
		if err != nil {
			return false, fmt.Errorf("option %d: %w", opt, err)
		}
		typ, n := binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(b[16:])
		if m, o := binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:]); m != magicOptReply || o != opt || n > maxText {
			return false, protocol("a reply of %d bytes to option %d, %d was asked", n, o, opt)
		}
		text := make([]byte, n)
		if _, err := io.ReadFull(s.rw, text); err != nil {
			return false, fmt.Errorf("option %d: %w", opt, err)
		}
		switch {
		case typ == repAck:
			return true, nil
		case typ == repErrUnsup, typ == repErrPolicy && opt != optGo:
			return false, nil
		case typ == repErrTLSReqd:
			return false, errors.New("the server requires TLS, which this client does not speak; put the link into a tunnel, or use a unix socket")
		case typ == repErrUnknown:
			return false, fmt.Errorf("the server has no such export: %.200q", text)
		case typ == repErrBlockSizeReqd:
			return false, fmt.Errorf("the server refuses the block size: %.200q", text)
		case typ&repError != 0:
			return false, fmt.Errorf("the server refuses option %d (error %d): %.200q", opt, typ&^repError, text)
		case each == nil:
			return false, protocol("reply %d to option %d", typ, opt)
		}
		if err := each(typ, text); err != nil {
			return false, err
		}
	}
	return false, protocol("option %d has more than 64 replies", opt)
}

func named(name string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(name))), name...)
}

func (s *shaker) metaContext(name string) error {
	const query = "base:allocation"
	b := binary.BigEndian.AppendUint32(named(name), 1)
	_, err := s.ask(optSetMetaContext, append(b, named(query)...), func(typ uint32, p []byte) error {
		if typ != repMetaContext || len(p) < 4 {
			return protocol("reply %d of %d bytes to set meta context", typ, len(p))
		}
		if string(p[4:]) == query {
			s.x.meta, s.x.context = true, binary.BigEndian.Uint32(p)
		}
		return nil
	})
	return err
}

func (s *shaker) goFor(name string) (bool, error) {
	b := binary.BigEndian.AppendUint16(named(name), 1)
	b = binary.BigEndian.AppendUint16(b, infoBlockSize)
	got := false
	ok, err := s.ask(optGo, b, func(typ uint32, p []byte) error {
		if typ != repInfo || len(p) < 2 {
			return protocol("reply %d of %d bytes to go", typ, len(p))
		}
		switch info := binary.BigEndian.Uint16(p); {
		case info == infoExport && len(p) == 12:
			got = true
			return s.export(p[2:])
		case info == infoBlockSize && len(p) == 14:
			s.x.minBlock, s.x.prefBlock, s.x.maxPayload = binary.BigEndian.Uint32(p[2:]), binary.BigEndian.Uint32(p[6:]), binary.BigEndian.Uint32(p[10:])
			if m := s.x.minBlock; m == 0 || m&(m-1) != 0 || m > 64<<10 || s.x.maxPayload < m {
				return protocol("block sizes %d, %d, %d", m, s.x.prefBlock, s.x.maxPayload)
			}
			s.x.maxPayload = min(s.x.maxPayload, maxPayload)
		case info == infoExport, info == infoBlockSize:
			return protocol("information %d of %d bytes", info, len(p))
		}
		return nil
	})
	if ok && !got {
		return false, protocol("no information of the export")
	}
	return ok, err
}

func (s *shaker) export(b []byte) error {
	n := binary.BigEndian.Uint64(b)
	if n > 1<<62 {
		return protocol("an export of %d bytes", n)
	}
	s.x.size, s.x.flags = int64(n), binary.BigEndian.Uint16(b[8:])
	if s.x.flags&xHasFlags == 0 {
		return protocol("export flags %#x", s.x.flags)
	}
	return nil
}

// exportName is how servers without GO are asked; they refuse by hanging up.
func (s *shaker) exportName(name string, noZeroes bool) error {
	if err := s.option(optExportName, []byte(name)); err != nil {
		return fmt.Errorf("export name: %w", err)
	}
	b, err := s.read(10)
	if err != nil {
		return fmt.Errorf("the server hung up at export name %q: it has none such, or does not allow it: %w", name, err)
	}
	if err := s.export(b); err != nil {
		return err
	}
	if !noZeroes {
		if _, err := io.ReadFull(s.rw, make([]byte, 124)); err != nil {
			return fmt.Errorf("export name: %w", err)
		}
	}
	return nil
}
