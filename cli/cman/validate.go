package cman

import (
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/blockhouse-san/blockhouse/config/clusterconf"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// DefaultClusterConf is where cman read its configuration.
const DefaultClusterConf = "/etc/cluster/cluster.conf"

const validateUsage = `Usage:

ccs_config_validate [options]

Options:
  -h               Print this help, then exit
  -V               Print program version information, then exit
  -v               Also say what becomes of each option here
  -q               Be very quiet
  -f configfile    Validate this file (default ` + DefaultClusterConf + `)
  -l configfile    The same
  -R version       Ensure that config_version is newer than this
  -u -n -o -t tempfile -C loader
                   Accepted and ignored: there is no schema to load
`

// The exit statuses of ccs_config_validate: xmllint's 1 and 3, its own from 253 on.
const (
	exitNotXML   = 1
	exitInvalid  = 3
	exitOlder    = 254
	exitValidate = 255
)

// ccsConfigValidate is ccs_config_validate(8).
func (a *App) ccsConfigValidate(args []string) int {
	opts, err := getopt(a.name, "t:hVnC:f:l:rR:ovqu", args)
	if err != nil {
		fmt.Fprintln(a.Err, err)
		fmt.Fprint(a.Err, validateUsage)
		return exitValidate
	}
	path, old := DefaultClusterConf, 0
	verbose, quiet := false, false
	for _, o := range opts {
		switch o.letter {
		case 'h':
			fmt.Fprint(a.Out, validateUsage)
			return 0
		case 'V':
			fmt.Fprintf(a.Out, "ccs_config_validate version %s (Blockhouse)\n", version.String())
			return 0
		case 'f', 'l':
			path = o.arg
		case 'v':
			verbose = true
		case 'q':
			quiet = true
		case 'R':
			if old, err = strconv.Atoi(o.arg); err != nil {
				fmt.Fprintf(a.Err, "Error: invalid options. -R %s is no number\n", clean(o.arg))
				return exitValidate
			}
		case 'r':
			fmt.Fprintln(a.Err, "Error: there is no running cluster.conf; validate a file with -f")
			return exitValidate
		}
	}
	if verbose && quiet {
		fmt.Fprintln(a.Err, "Error: invalid options. -v can not be set together with -q")
		return exitValidate
	}
	b, err := readFile(path)
	if err != nil {
		fmt.Fprintf(a.Err, "\nUnable to get the configuration: %v\n", err)
		return exitValidate
	}
	c, _, err := clusterconf.Parse(path, b, clusterconf.Options{})
	status := exitInvalid
	if c == nil && clusterconf.NotXML(b) {
		status = exitNotXML
	}
	if err == nil {
		err = c.Validate()
	}
	if err != nil {
		// As the original, which is quiet only about success.
		fmt.Fprintf(a.Out, "%v\nConfiguration fails to validate\n", err)
		return status
	}
	if old != 0 && c.Version <= old {
		if !quiet {
			fmt.Fprintln(a.Err, "Error: Configuration version is older than running config!")
		}
		return exitOlder
	}
	if !quiet {
		fmt.Fprintln(a.Out, "Configuration validates")
	}
	if verbose {
		for _, n := range c.Notes(nil) {
			fmt.Fprintln(a.Out, n)
		}
	}
	return 0
}

// readFile reads no more of a file than one may have.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, clusterconf.MaxFile+1))
}
