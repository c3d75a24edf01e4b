package gfs

// defaultOpeners are the targets beside files and block devices.
func defaultOpeners() map[string]Opener { return map[string]Opener{} }
