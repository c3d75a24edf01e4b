package env

import (
	"fmt"
	"os"
	"strings"
)

func bootID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	id := strings.TrimSpace(string(b))
	if len(id) != 36 {
		return "", fmt.Errorf("read boot id: %s holds %q, not a uuid", path, id)
	}
	return id, nil
}
