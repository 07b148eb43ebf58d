package transfer

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// startWriteback asks the kernel to begin writing a range, so that a later fsync finds little left. A hint: it
// promises nothing and its failure means nothing.
func startWriteback(f *os.File, off, n int64) {
	_ = unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
}

// linkFile makes a hard link of the open file itself, whatever has become of its name.
func linkFile(f *os.File, path string) error {
	proc := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	err := unix.Linkat(unix.AT_FDCWD, proc, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if err == unix.ENOENT { // no /proc, or no folder for path: let the plain call say which
		return os.Link(f.Name(), path)
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: f.Name(), New: path, Err: err}
	}
	return nil
}
