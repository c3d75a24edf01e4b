// mkfs-gfs makes a GFS2 filesystem on a file, a block device or a LUN. Links
// named mkfs.gfs2, gfs2_mkfs and gfs_mkfs make it speak like those.
package main

import (
	"os"

	"github.com/blockhouse-san/blockhouse/cli/gfs"
)

func main() {
	os.Exit(gfs.Main(os.Args[0], os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
