package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// folderPrefix begins the names of all private folders. Short: a unix socket's
// path has room for 107 bytes, an overlay's options for a page.
const folderPrefix = "gantry-"

// PrivateFolder is a folder that is recognized as abandoned when the process
// that made it is gone, however it went.
type PrivateFolder struct {
	Path  string
	owner *os.File // locked as long as the process lives
}

// NewPrivateFolder makes a private folder in the one for temporary files. What killed
// processes left there is taken away first.
func NewPrivateFolder() (*PrivateFolder, error) {
	if err := sweepAbandoned(); err != nil {
		return nil, fmt.Errorf("take away what an earlier run left: %w", err)
	}
	dir, err := os.MkdirTemp("", folderPrefix)
	if err != nil {
		return nil, err
	}
	// Renamed when locked, so that nobody ever sees the file without the lock.
	f, err := os.Create(filepath.Join(dir, "owner.new"))
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, "owner"))
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &PrivateFolder{Path: dir, owner: f}, nil
}

// MountTmpfs makes a folder inside a private one and gives it a tmpfs, which goes with the private folder.
func MountTmpfs(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2g"); err != nil {
		return fmt.Errorf("mount a tmpfs at %s: %w", dir, err)
	}
	return nil
}

// Close sweeps the folder.
func (f *PrivateFolder) Close() error { return errors.Join(Sweep(f.Path), f.owner.Close()) }

// sweepAbandoned sweeps folders whose owner holds its lock no more. That they
// hold mounts is no error: their owner could not help it.
func sweepAbandoned() error {
	owners, err := filepath.Glob(filepath.Join(os.TempDir(), folderPrefix+"*", "owner"))
	if err != nil {
		return err
	}
	for _, path := range owners {
		f, err := os.Open(path)
		if err != nil {
			continue // gone meanwhile
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			fmt.Fprintln(os.Stderr, "abandoned by an earlier run:", filepath.Dir(path))
			if err := Sweep(filepath.Dir(path)); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}
