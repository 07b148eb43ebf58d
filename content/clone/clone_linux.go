package clone

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// share makes dst[off:end] the same blocks on disk as src[off:end].
func share(dst, src *os.File, off, end int64) error {
	return both(dst, src, func(to, from int) error {
		return unix.IoctlFileCloneRange(to, &unix.FileCloneRange{
			Src_fd: int64(from), Src_offset: uint64(off), Src_length: uint64(end - off), Dest_offset: uint64(off),
		})
	})
}

// copyRange copies up to n bytes without their passing through this process, and at least one unless it fails.
func copyRange(dst, src *os.File, off, n int64) (int64, error) {
	var m int
	err := both(dst, src, func(to, from int) (err error) {
		r, w := off, off
		m, err = unix.CopyFileRange(from, &r, to, &w, int(n), 0)
		return err
	})
	if err == nil && m == 0 { // the source's end, or a file system that says so of whatever it cannot copy
		err = errCannot
	}
	return int64(max(m, 0)), err
}

// cannot are the errors that say nothing about the bytes.
var cannot = []error{
	unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.ENOSYS, unix.EPERM, unix.EBADF, unix.ETXTBSY,
}

// both calls f with the descriptors of two files that nobody closes meanwhile, and says of its error if it is about
// these files only.
func both(dst, src *os.File, f func(to, from int) error) error {
	to, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	from, err := src.SyscallConn()
	if err != nil {
		return err
	}
	var inner, outer error
	err = to.Control(func(d uintptr) {
		outer = from.Control(func(s uintptr) {
			for {
				if inner = f(int(d), int(s)); !errors.Is(inner, unix.EINTR) {
					return
				}
			}
		})
	})
	if err := errors.Join(err, outer); err != nil { // the only reason there is, and not said as os says it
		return fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	if slices.ContainsFunc(cannot, func(e error) bool { return errors.Is(inner, e) }) {
		return errCannot
	}
	return inner
}
