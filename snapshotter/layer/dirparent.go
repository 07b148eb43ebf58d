package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// DirParent is a Parent on disk: the upper directory of a container's committed
// changes, by its path. Nothing outside of it is ever looked at, whatever
// symlinks lie in it.
type DirParent string

var _ Parent = DirParent("")

// Lookup implements Parent.
func (d DirParent) Lookup(path string) (Attr, Kind, error) {
	root, err := unix.Open(string(d), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Attr{}, Absent, fmt.Errorf("directory layer %s: %w", string(d), err)
	}
	defer unix.Close(root)
	path, err = rootPath(dirTree{root}, path)
	if err != nil {
		return Attr{}, Other, nil //nolint:nilerr // a loop or a file on the way: not a directory
	}
	fd, err := openBelow(root, path, unix.O_RDONLY|unix.O_DIRECTORY)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Attr{Path: path}, Absent, nil
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return Attr{Path: path}, Other, nil
	case err != nil:
		return Attr{}, Absent, fmt.Errorf("directory layer %s: %q: %w", string(d), path, err)
	}
	defer unix.Close(fd)
	a, err := statDir(fd)
	if err != nil {
		return Attr{}, Absent, fmt.Errorf("directory layer %s: %q: %w", string(d), path, err)
	}
	a.Path = path
	return a, Directory, nil
}

// statDir reads the attributes of an open directory.
func statDir(fd int) (Attr, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Attr{}, err
	}
	n := erofs.Inode{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim.Sec, MtimeNsec: uint32(st.Mtim.Nsec)}
	names, err := sized(func(p []byte) (int, error) { return unix.Flistxattr(fd, p) })
	if err != nil {
		return Attr{}, fmt.Errorf("list extended attributes: %w", err)
	}
	for name := range strings.SplitSeq(string(names), "\x00") {
		if name == "" {
			continue
		}
		value, err := sized(func(p []byte) (int, error) { return unix.Fgetxattr(fd, name, p) })
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return Attr{}, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		if n.Xattrs == nil {
			n.Xattrs = make(map[string]string)
		}
		n.Xattrs[name] = string(value)
	}
	return attrOf(&n), nil
}

// sized asks for the size first, and again if it has grown meanwhile. A file
// system without extended attributes has none.
func sized(read func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := read(nil)
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		if err != nil || n == 0 {
			return nil, err
		}
		p := make([]byte, n)
		n, err = read(p)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		return p[:max(n, 0)], err
	}
}

// dirTree resolves symlinks below an open directory.
type dirTree struct{ root int }

func (d dirTree) lstat(path string) (uint32, string, error) {
	fd, err := openBelow(d.root, path, unix.O_PATH)
	if errors.Is(err, unix.ELOOP) {
		return 0, "", unix.ENOENT // a link on the way: the next pass resolves it
	}
	if err != nil {
		return 0, "", err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return st.Mode, "", nil
	}
	target := make([]byte, pathMax)
	n, err := unix.Readlinkat(fd, "", target)
	if err != nil {
		return 0, "", err
	}
	return st.Mode, string(target[:n]), nil
}

// openBelow opens an absolute path inside of root; a symlink anywhere on it is
// ELOOP, except as the last name with O_PATH.
func openBelow(root int, path string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	if path = strings.TrimPrefix(path, "/"); path == "" {
		path = "."
	}
	for {
		fd, err := unix.Openat2(root, path, &how)
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}
