// Package size reads and writes the sizes that a user types. Units are binary:
// 64M, 64Mi and 64MiB are all 64 x 2^20 bytes. Decimal units (MB) are refused
// and not guessed, because the field uses both meanings.
//
// Only cli imports it.
package size

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"
)

// Help is the sentence for flag help.
const Help = "64M, 1GiB, 1.5G or bytes; units are binary (K=1024)"

// Errors.
var (
	ErrSyntax = errors.New("not a size")          // wrapped by every error of Parse
	ErrZero   = errors.New("must be more than 0") // for callers that need some bytes
)

const prefixes = "KMGTPE"

// Parse gives the bytes of a size like "4096", "64M", "1GiB" or "1.5 G". The
// number may have a fraction if the product is a whole number of bytes. It is
// never negative and never rounded.
func Parse(s string) (int64, error) {
	t := strings.TrimSpace(s)
	i := strings.IndexFunc(t, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	num, unit := t, ""
	if i >= 0 {
		num, unit = t[:i], strings.TrimSpace(t[i:])
	}
	shift, err := exponent(unit)
	if err != nil {
		return 0, fmt.Errorf("%w: %q: %w", ErrSyntax, s, err)
	}
	// SetString also takes fractions, exponents and signs; the scan above let
	// only digits and dots through.
	r, ok := new(big.Rat).SetString(num)
	if num == "" || strings.HasSuffix(num, ".") || strings.HasPrefix(num, ".") || !ok {
		return 0, fmt.Errorf("%w: %q: write a number and a unit, such as 64M or 1.5GiB", ErrSyntax, s)
	}
	r.Mul(r, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), shift)))
	if !r.IsInt() {
		return 0, fmt.Errorf("%w: %q: not a whole number of bytes", ErrSyntax, s)
	}
	if !r.Num().IsInt64() {
		return 0, fmt.Errorf("%w: %q: more than %s", ErrSyntax, s, Format(math.MaxInt64))
	}
	return r.Num().Int64(), nil
}

// exponent gives the power of two of a unit; "" and "B" are bytes.
func exponent(unit string) (uint, error) {
	if unit == "" || unit == "B" {
		return 0, nil
	}
	i := strings.IndexByte(prefixes, strings.ToUpper(unit)[0])
	if i < 0 {
		return 0, fmt.Errorf("unknown unit %q: use K, M, G, T, P or E (binary)", unit)
	}
	switch unit[1:] {
	case "", "i", "iB":
		return uint(10 * (i + 1)), nil
	case "B", "b":
		return 0, fmt.Errorf("decimal unit %q is not accepted: write %c or %ciB, which are binary", unit, prefixes[i], prefixes[i])
	}
	return 0, fmt.Errorf("unknown unit %q: use K, M, G, T, P or E (binary)", unit)
}

// Format writes n with the largest unit that leaves at least 1, and one
// decimal where n is not a multiple of it: "64 MiB", "1.5 GiB", "512 B".
func Format(n int64) string {
	if n < 1024 && n > -1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	// 1023.95 would be written as 1024.0.
	for math.Abs(v) >= 1023.95 && i < len(prefixes)-1 {
		v /= 1024
		i++
	}
	num := strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0")
	return fmt.Sprintf("%s %ciB", num, prefixes[i])
}
