// One log entry of the cluster (docs/formats/fsm.md). All integers big-endian.
//
//	 0        1        2                 4                                8
//	+--------+--------+-----------------+--------------------------------+----
//	| machine| flags  | kind            | version                        | payload …
//	+--------+--------+-----------------+--------------------------------+----
//
//	flags   bit 0  ignorable: a node that does not know the kind skips it
//	payload        JSON of the command, strict (unknown fields are an error)

package fsm

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// ID numbers a sub-machine. The numbers are frozen; 5 to 7 are reserved for
// their issues.
type ID uint8

// The sub-machines (DESIGN "Words").
const (
	Members   ID = 1
	Fence     ID = 2
	Storage   ID = 3
	PR        ID = 4
	Lockspace ID = 5
	Service   ID = 6
	CLVM      ID = 7
	Config    ID = 8
)

var idNames = map[ID]string{
	Members: "members", Fence: "fence", Storage: "storage", PR: "pr",
	Lockspace: "lockspace", Service: "service", CLVM: "clvm", Config: "config",
}

// String is the machine's name, or its number.
func (id ID) String() string {
	if s, ok := idNames[id]; ok {
		return s
	}
	return fmt.Sprintf("machine-%d", uint8(id))
}

// FlagIgnorable marks a command that nodes which do not know it skip. Only
// commands without lasting state may carry it: a skipped one is missing from
// the node's copy for ever.
const FlagIgnorable uint8 = 1 << 0

const headerLen = 8

// Envelope is one decoded log entry.
type Envelope struct {
	Machine ID
	Flags   uint8
	Kind    uint16
	Version uint32
	Payload []byte
}

// Append appends the encoded envelope to b.
func (e Envelope) Append(b []byte) []byte {
	b = append(b, byte(e.Machine), e.Flags)
	b = binary.BigEndian.AppendUint16(b, e.Kind)
	b = binary.BigEndian.AppendUint32(b, e.Version)
	return append(b, e.Payload...)
}

// ParseEnvelope splits a log entry. Payload aliases b.
func ParseEnvelope(b []byte) (Envelope, error) {
	if len(b) < headerLen {
		return Envelope{}, fmt.Errorf("parse envelope: %d bytes, the header alone has %d", len(b), headerLen)
	}
	e := Envelope{
		Machine: ID(b[0]),
		Flags:   b[1],
		Kind:    binary.BigEndian.Uint16(b[2:]),
		Version: binary.BigEndian.Uint32(b[4:]),
		Payload: b[headerLen:],
	}
	if e.Machine == 0 {
		return Envelope{}, errors.New("parse envelope: machine 0")
	}
	if e.Flags&^FlagIgnorable != 0 {
		return Envelope{}, fmt.Errorf("parse envelope: unknown flags %#02x", e.Flags)
	}
	return e, nil
}

// Command is a typed command of one sub-machine. The value is what is encoded;
// it holds every time and every random value that applying it needs.
type Command interface {
	// FSMKind says where the command goes and which version of its payload
	// this struct is.
	FSMKind() (machine ID, kind uint16, version uint32)
}

// Validator is implemented by commands that can be malformed. Validate sees
// only the command. It runs when the command is proposed and again when it is
// applied, so the rules of one version are frozen: stricter ones need a new
// version.
type Validator interface{ Validate() error }

// Encode gives the log entry of a command.
func Encode(c Command) ([]byte, error) {
	m, k, v := c.FSMKind()
	p, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode command %v/%d: %w", m, k, err)
	}
	return Envelope{Machine: m, Kind: k, Version: v, Payload: p}.Append(nil), nil
}

// DecodeStrict decodes exactly one JSON value into v: unknown fields, trailing
// data and an empty input are errors.
func DecodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("trailing data after the JSON value")
	}
	return nil
}
