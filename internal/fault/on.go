//go:build mutations

package fault

import (
	"os"
	"slices"
	"strings"
)

// Off tells whether BLOCKHOUSE_MUTATION lists the rule.
func Off(r Rule) bool {
	return slices.Contains(strings.Split(os.Getenv("BLOCKHOUSE_MUTATION"), ","), string(r))
}
