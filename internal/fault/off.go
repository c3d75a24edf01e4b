//go:build !mutations

package fault

// Off tells whether a rule is switched off: never in this build.
func Off(Rule) bool { return false }

// Crash ends the process at a point: never in this build.
func Crash(Point) {}
