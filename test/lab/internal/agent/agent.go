// Package agent is the line between a lab guest and its test: JSON lines over a serial port of the guest, whose other end is
// a socket of the test. It needs no network in the guest, so a scenario may cut every link.
//
// The script of a command travels as a file that guest and host share; only its path goes over the line, because a guest
// reads its serial port byte by byte.
package agent

// Port is the guest's end.
const Port = "/dev/ttyS0"

// Operations of a Request.
const (
	Run      = "run"      // start Script with bash; answered by Out events and one Exit
	Signal   = "signal"   // send Value to the process group of command ID; not answered
	Tasks    = "tasks"    // state and kernel stack of every thread; answered as Run is
	Poweroff = "poweroff" // sync and power off at once; not answered
)

// Request goes from the test to the guest.
type Request struct {
	ID     int    `json:"id"` // of the command, unique in one guest
	Op     string `json:"op"`
	Script string `json:"script,omitempty"` // path in the guest
	Value  int    `json:"value,omitempty"`
}

// Kinds of an Event.
const (
	Hello = "hello" // the guest is up; sent once
	Out   = "out"   // Data is output of command ID; may also follow its Exit, from processes that it left behind
	Exit  = "exit"  // command ID ended with exit code Value, or 128 + signal
	Fail  = "fail"  // command ID could not be started; Data says why
)

// Event goes from the guest to the test.
type Event struct {
	ID    int    `json:"id"`
	Kind  string `json:"kind"`
	Data  []byte `json:"data,omitempty"`
	Value int    `json:"value,omitempty"`
}
