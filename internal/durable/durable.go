// Package durable makes the names of folders survive a power loss.
package durable

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// Folder makes the names in a folder durable.
func Folder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Above makes the name of a folder durable, and those of the folders above it: somebody may have made them just now.
// It ends where another file system begins, or at a folder that this process may not open.
func Above(path string) error {
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
		if err := Folder(dir); err != nil {
			if errors.Is(err, os.ErrPermission) {
				return nil
			}
			return err
		}
	}
	return nil
}
