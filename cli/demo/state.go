package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/api"
)

// Names of the demo.
const (
	cluster    = "demo"
	configFile = "clusterd.toml"
	stateFile  = "demo.json"
	lockFile   = "lock"
)

var nodeNames = []string{"n1", "n2", "n3"}

// state is demo.json: what was chosen, and how far up came.
type state struct {
	Version int       `json:"version"` // 1
	Phase   string    `json:"phase"`   // "starting", "up"
	Place   place     `json:"place"`
	Created time.Time `json:"created"`
	URL     string    `json:"url,omitempty"` // of the LUN
}

const (
	starting = "starting"
	up       = "up"
)

// load reads demo.json; without one it returns nil.
func (d *Demo) load() (*state, error) {
	b, err := os.ReadFile(filepath.Join(d.Dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the demo's state: %w", err)
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil || s.Version != 1 {
		// Half a file is what an interrupted write leaves; down must work
		// all the same, and needs nothing of it.
		return &state{Phase: starting}, nil
	}
	return &s, nil
}

func (d *Demo) save(s *state) error {
	s.Version = 1
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("write the demo's state: %w", err)
	}
	path := filepath.Join(d.Dir, stateFile)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the demo's state: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write the demo's state: %w", err)
	}
	return nil
}

// lock keeps two commands from changing one demo at once. The file goes with the
// folder, so whoever gets the lock looks whether it still is that file.
func (d *Demo) lock(ctx context.Context) (release func(), err error) {
	path := filepath.Join(d.Dir, lockFile)
	told := false
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock the demo: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			a, err1 := f.Stat()
			b, err2 := os.Stat(path)
			if err1 == nil && err2 == nil && os.SameFile(a, b) {
				return func() { _ = f.Close() }, nil
			}
			_ = f.Close()
			if errors.Is(err2, fs.ErrNotExist) {
				if _, err := os.Stat(d.Dir); err != nil {
					return nil, errGone
				}
			}
			continue
		}
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock the demo: %w", err)
		}
		if !told {
			fmt.Fprintln(d.Err, "another clusteradm demo is at work; waiting for it")
			told = true
		}
		select {
		case <-ctx.Done():
			return nil, api.Errorf(api.CodeTimeout, "the same command again", "lock the demo in %s: another command holds it", d.Dir)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

var errGone = errors.New("the demo's folder is gone")

// remove deletes what the demo made and nothing else.
func (d *Demo) remove() error {
	for _, n := range nodeNames {
		if err := os.RemoveAll(d.node(n)); err != nil {
			return fmt.Errorf("remove the demo: %w", err)
		}
	}
	// demo.json second to last: while it stands, the folder is known as ours.
	for _, f := range []string{stateFile + ".new", stateFile, lockFile} {
		if err := os.Remove(filepath.Join(d.Dir, f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the demo: %w", err)
		}
	}
	if err := os.Remove(d.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return api.Errorf(api.CodeConflict, "ls -A "+d.Dir, "remove the demo: %s holds files that are not the demo's; they stay", d.Dir)
	}
	return nil
}

func (d *Demo) node(name string) string    { return filepath.Join(d.Dir, name) }
func (d *Demo) socket(name string) string  { return filepath.Join(d.Dir, name, "run", "clusterd.sock") }
func (d *Demo) logFile(name string) string { return filepath.Join(d.Dir, name, "clusterd.log") }
