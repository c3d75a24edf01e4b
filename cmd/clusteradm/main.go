// clusteradm administers a Blockhouse cluster. Under another name (a link made
// by "clusteradm compat install") it is that command.
package main

import (
	"os"

	"github.com/blockhouse-san/blockhouse/cli"
)

func main() {
	os.Exit(cli.Main(os.Args[0], os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
