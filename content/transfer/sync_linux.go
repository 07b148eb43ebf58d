package transfer

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// startWriteback asks the kernel to begin writing a range, so that a later fsync finds little left. A hint: it
// promises nothing and its failure means nothing.
func startWriteback(f *os.File, off, n int64) {
	_ = unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
}

// dropPages asks the kernel to forget what it holds of a range in memory, but for what is not on disk yet; of all if n is
// 0. A hint. The file may be closed meanwhile.
func dropPages(f *os.File, off, n int64) {
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.Fadvise(int(fd), off, n, unix.FADV_DONTNEED) })
	}
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

// lockOwner finds the process that has an flock on a file; 0 if that is nobody's business.
func lockOwner(path string) int {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	table, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0
	}
	// 1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 5 && f[1] == "FLOCK" && f[5] == id {
			pid, _ := strconv.Atoi(f[4])
			return pid
		}
	}
	return 0
}

// punchHole frees a range of a file: it reads as zeros, and what was not written back yet never is, if the file system
// can do that. The file may be closed meanwhile: then nothing happens.
func punchHole(f *os.File, off, n int64) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var perr error
	if err := c.Control(func(fd uintptr) {
		perr = unix.Fallocate(int(fd), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}); err != nil { // the only reason, which it does not wrap
		return fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	if perr != nil {
		return &os.PathError{Op: "punch", Path: f.Name(), Err: perr}
	}
	return nil
}
