package tgt

import (
	"fmt"
	"strings"
)

// option is a row of a program's table. A short of 0 is none.
type option struct {
	long  string
	short byte
	arg   bool
}

// parsed is an option as it was given; operands have the name "".
type parsed struct {
	opt option
	arg string
}

// usageError is a command line that cannot be read, in the words of
// getopt_long(3).
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usage(format string, a ...any) error { return &usageError{fmt.Sprintf(format, a...)} }

// getopt reads args with the rules of getopt_long(3): letters combine, a long
// name may be cut as long as it is one, --name=value and --name value, operands
// anywhere, "--" ends the options.
func getopt(prog string, table []option, args []string) ([]parsed, error) {
	var out []parsed
	for i := 0; i < len(args); i++ {
		a := args[i]
		next := func() (string, bool) {
			if i+1 >= len(args) {
				return "", false
			}
			i++
			return args[i], true
		}
		switch {
		case a == "--":
			for _, o := range args[i+1:] {
				out = append(out, parsed{arg: o})
			}
			return out, nil
		case strings.HasPrefix(a, "--"):
			name, val, has := strings.Cut(a[2:], "=")
			o, err := long(prog, table, name)
			if err != nil {
				return out, err
			}
			switch {
			case has && !o.arg:
				return out, usage("%s: option '--%s' doesn't allow an argument", prog, o.long)
			case o.arg && !has:
				if val, has = next(); !has {
					return out, usage("%s: option '--%s' requires an argument", prog, o.long)
				}
			}
			out = append(out, parsed{o, val})
		case len(a) > 1 && a[0] == '-':
			for j := 1; j < len(a); j++ {
				var o option
				for _, t := range table {
					if t.short == a[j] {
						o = t
					}
				}
				if o.long == "" {
					return out, usage("%s: invalid option -- '%c'", prog, a[j])
				}
				if !o.arg {
					out = append(out, parsed{opt: o})
					continue
				}
				val := a[j+1:]
				if val == "" {
					var ok bool
					if val, ok = next(); !ok {
						return out, usage("%s: option requires an argument -- '%c'", prog, a[j])
					}
				}
				out = append(out, parsed{o, val})
				break
			}
		default:
			out = append(out, parsed{arg: a})
		}
	}
	return out, nil
}

// long finds a long name, whole or cut.
func long(prog string, table []option, name string) (option, error) {
	var hits []option
	for _, t := range table {
		if t.long == name {
			return t, nil
		}
		if strings.HasPrefix(t.long, name) {
			hits = append(hits, t)
		}
	}
	switch len(hits) {
	case 0:
		return option{}, usage("%s: unrecognized option '--%s'", prog, name)
	case 1:
		return hits[0], nil
	}
	s := fmt.Sprintf("%s: option '--%s' is ambiguous; possibilities:", prog, name)
	for _, h := range hits {
		s += " '--" + h.long + "'"
	}
	return option{}, usage("%s", s)
}

// perlopt reads args with the rules of Perl's Getopt::Long, which tgt-admin uses:
// one dash is as good as two, letters do not combine.
func perlopt(table []option, args []string) ([]parsed, error) {
	var out []parsed
	for i := 0; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			for _, o := range args[i+1:] {
				out = append(out, parsed{arg: o})
			}
			return out, nil
		}
		if len(a) < 2 || a[0] != '-' {
			out = append(out, parsed{arg: a})
			continue
		}
		name, val, has := strings.Cut(strings.TrimPrefix(a[1:], "-"), "=")
		var hits []option
		for _, t := range table {
			if t.long == name || len(name) == 1 && t.short == name[0] {
				hits = []option{t}
				break
			}
			if name != "" && strings.HasPrefix(t.long, name) {
				hits = append(hits, t)
			}
		}
		switch {
		case len(hits) == 0:
			return nil, fmt.Errorf("Unknown option: %s", name)
		case len(hits) > 1:
			var names []string
			for _, h := range hits {
				names = append(names, h.long)
			}
			return nil, fmt.Errorf("Option %s is ambiguous (%s)", name, strings.Join(names, ", "))
		}
		o := hits[0]
		switch {
		case has && !o.arg:
			return nil, fmt.Errorf("Option %s does not take an argument", name)
		case o.arg && !has:
			if i++; i >= len(args) {
				return nil, fmt.Errorf("Option %s requires an argument", name)
			}
			val = args[i]
		}
		out = append(out, parsed{o, val})
	}
	return out, nil
}
