package crashfs

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Memory mounts an empty tmpfs on dir, where an fsync costs nothing. The caller ends it with the function returned.
func Memory(dir string) (func() error, error) {
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a tmpfs on %s, as root: %w", dir, err)
	}
	return func() error { return syscall.Unmount(dir, 0) }, nil
}

// Save writes what the state holds into dir, which it makes.
func (s *State) Save(dir string) error { return s.save(dir, rootNode, map[uint64]string{}) }

func (s *State) save(dir string, folder uint64, saved map[uint64]string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for name, node := range s.folders[folder] {
		path := filepath.Join(dir, name)
		var err error
		if _, isFolder := s.folders[node]; isFolder {
			err = s.save(path, node, saved)
		} else if target, ok := s.symlinks[node]; ok {
			err = os.Symlink(target, path)
		} else if first, ok := saved[node]; ok {
			err = os.Link(first, path)
		} else {
			saved[node] = path
			err = os.WriteFile(path, s.files[node], 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
