package plugin

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// durablyNamed makes the name of a folder durable, and those of the folders above it: somebody may have made them just now.
// It ends where another file system begins, or at a folder that this process may not open.
func durablyNamed(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	var here, above syscall.Stat_t
	if err := syscall.Stat(path, &here); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	for dir := filepath.Dir(path); dir != path; path, dir = dir, filepath.Dir(dir) {
		if err := syscall.Stat(dir, &above); err != nil {
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		if above.Dev != here.Dev {
			return nil
		}
		d, err := os.Open(dir)
		if errors.Is(err, os.ErrPermission) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := errors.Join(d.Sync(), d.Close()); err != nil {
			return err
		}
	}
	return nil
}
