package gfs

import (
	"fmt"
	"strings"
)

// opt is an option as it stood on the command line. Operands have the letter 0.
type opt struct {
	letter byte
	long   string
	arg    string
}

// usageError is a command line that cannot be read; its text is getopt(3)'s.
type usageError struct{ msg string }

func (e *usageError) Error() string { return e.msg }

// getopt reads args in order with the rules of getopt(3): "b:" takes an
// argument, letters combine, operands may stand between options, "--" ends the
// options. long maps long names to whether they take an argument.
func getopt(name, spec string, long map[string]bool, args []string) ([]opt, error) {
	var out []opt
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "--":
			for _, o := range args[i+1:] {
				out = append(out, opt{arg: o})
			}
			return out, nil
		case strings.HasPrefix(a, "--"):
			key, val, has := strings.Cut(a[2:], "=")
			takes, ok := long[key]
			switch {
			case !ok:
				return out, &usageError{fmt.Sprintf("%s: unrecognized option '--%s'", name, key)}
			case has && !takes:
				return out, &usageError{fmt.Sprintf("%s: option '--%s' doesn't allow an argument", name, key)}
			case takes && !has:
				if i++; i >= len(args) {
					return out, &usageError{fmt.Sprintf("%s: option '--%s' requires an argument", name, key)}
				}
				val = args[i]
			}
			out = append(out, opt{long: key, arg: val})
		case len(a) > 1 && a[0] == '-':
			for j := 1; j < len(a); j++ {
				c := a[j]
				k := strings.IndexByte(spec, c)
				if k < 0 || c == ':' {
					return out, &usageError{fmt.Sprintf("%s: invalid option -- '%c'", name, c)}
				}
				if k+1 >= len(spec) || spec[k+1] != ':' {
					out = append(out, opt{letter: c})
					continue
				}
				val := a[j+1:]
				if val == "" {
					if i++; i >= len(args) {
						return out, &usageError{fmt.Sprintf("%s: option requires an argument -- '%c'", name, c)}
					}
					val = args[i]
				}
				out = append(out, opt{letter: c, arg: val})
				break
			}
		default:
			out = append(out, opt{arg: a})
		}
	}
	return out, nil
}
