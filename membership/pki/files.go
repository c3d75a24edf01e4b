package pki

import (
	"os"
	"path/filepath"

	"github.com/blockhouse-san/blockhouse/internal/durable"
)

// WriteFile is durable.WriteFile, and makes the folder with mode 0700 if it is
// missing.
func WriteFile(path string, data []byte, perm os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return durable.WriteFile(path, data, perm)
}
