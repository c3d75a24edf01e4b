// Package version says what binary this is. The Makefile sets Version.
package version

import "runtime/debug"

// Version is the release, or "devel".
var Version = "devel"

// String is the version with the commit it was built from, where known.
func String() string {
	s := Version
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, kv := range bi.Settings {
			if kv.Key == "vcs.revision" && len(kv.Value) >= 12 {
				s += " (" + kv.Value[:12] + ")"
			}
		}
	}
	return s
}
