// Package link is the one protocol between control and its workers: one unix
// socket a worker, JSON frames, and the rules of SAFETY §2 on both ends.
//
// The worker listens, so that it lives on when control does not; control dials,
// and dials again. A frame is
//
//	+----------------+----------------------------------+
//	| u32 big-endian | JSON {"t": type, "b": body}      |
//	| length of JSON | at most MaxFrame bytes           |
//	+----------------+----------------------------------+
//
// Control → worker: hello, state, lease, reply, shutdown. Worker → control: hello,
// refused, report, request. What control says is stamped {FSM index, view, epoch};
// a worker keeps the highest stamp it has seen and refuses lower ones, and of two
// controls it obeys the one with the higher control incarnation. State is a whole
// picture, never a step: a worker compares it with what is and acts on the
// difference, so a lost or repeated frame changes nothing.
//
// What nothing is decided by (numbers, events, status) is asked for with Ask and
// Status over connections of their own, without a hello.
//
// Only node/{control,storage,locks} import it.
package link
