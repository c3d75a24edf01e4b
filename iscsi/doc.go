// Package iscsi is the codec of iSCSI (RFC 7143): PDUs, digests, text keys,
// their negotiation, the login phase and CHAP, for both ends.
//
// It is pure: it opens no socket, starts no goroutine, reads no clock and takes
// randomness from its caller. It knows nothing of SCSI beyond the sizes of a CDB
// and of the sense data that travels in a response, and nothing of the cluster.
// target, initiator and tools import it; it imports the standard library only.
//
//	pdu.go, opcode.go   the basic header segment and one struct for every PDU
//	ahs.go              additional header segments
//	stream.go           Reader and Writer: framing, digests, bounds, no allocation
//	text.go             key=value pairs, C-bit continuation, numbers, binary values
//	negotiate.go        the table of keys and the engine that offers and answers
//	login.go            the login phase as two state machines
//	chap.go             challenge handshake authentication
//	names.go            iSCSI names, portal addresses, ISID
//	serial.go           serial number arithmetic (RFC 1982)
//
// A PDU on the wire:
//
//	+-----+-----------------+---------------+--------------+-----+-------------+
//	| BHS | AHS 0..1020     | header digest | data segment | pad | data digest |
//	| 48  | TotalAHSLength*4| 0 or 4        | 0..2^24-1    | 0-3 | 0 or 4      |
//	+-----+-----------------+---------------+--------------+-----+-------------+
package iscsi
