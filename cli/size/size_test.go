package size

import (
	"errors"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]int64{
		"0": 0, "1": 1, "1e": 1 << 60, "4096": 4096, "512B": 512,
		"64M": 64 << 20, "64m": 64 << 20, "64Mi": 64 << 20, "64MiB": 64 << 20, "64 MiB": 64 << 20,
		"1GiB": 1 << 30, "1.5G": 3 << 29, "0.5K": 512, "2T": 2 << 40, "1P": 1 << 50, "7E": 7 << 60,
		" 1k ": 1024, "9223372036854775807": math.MaxInt64,
	} {
		got, err := Parse(in)
		if err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for in, why := range map[string]string{
		"": "write a number", "M": "write a number", "-1": "unknown unit", "+1": "unknown unit", "1.": "write a number", ".5G": "write a number",
		"1.2.3M": "write a number", "1MB": "write M or MiB", "1Mb": "write M or MiB", "1X": "unknown unit", "1MiBs": "unknown unit", "1e3": "unknown unit", "0x10": "unknown unit",
		"0.3K": "whole number", "1.5": "whole number", "8E": "more than", "99999999999999999999": "more than", "1/2M": "unknown unit", "1é": "unknown unit",
	} {
		n, err := Parse(in)
		if !errors.Is(err, ErrSyntax) || !strings.Contains(err.Error(), why) {
			t.Errorf("Parse(%q) = %d, %v; want an error with %q", in, n, err, why)
		}
	}
}

func TestFormat(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 64 << 20: "64 MiB", 3 << 29: "1.5 GiB",
		1<<20 - 1: "1 MiB", 1 << 40: "1 TiB", math.MaxInt64: "8 EiB", -2048: "-2 KiB",
	} {
		if got := Format(n); got != want {
			t.Errorf("Format(%d) = %q, want %q", n, got, want)
		}
	}
}

// What Format writes of a whole number of units, Parse reads back.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(0, 1023).Draw(t, "n") << (10 * rapid.IntRange(0, 5).Draw(t, "unit"))
		got, err := Parse(Format(n))
		if err != nil || got != n {
			t.Fatalf("Parse(Format(%d) = %q) = %d, %v", n, Format(n), got, err)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"1", "1.5G", "64MiB", "-1", "9E", "1é"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := Parse(s); err == nil && n < 0 {
			t.Fatalf("Parse(%q) = %d", s, n)
		}
	})
}
