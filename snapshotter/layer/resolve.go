package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

const (
	pathMax = 4096 // includes the terminating NUL, as in limits.h
	nameMax = 255

	// maxLinks is how many symlinks continuity's fs.RootPath walks before it
	// gives up; kernelLinks is the kernel's own limit for one lookup.
	maxLinks    = 255
	kernelLinks = 40
)

var errTooManyLinks = errors.New("too many symlinks in the path")

// linkReader is what symlinks are resolved in: a tree in memory or a directory
// on disk. The path is absolute, clean and means the inside of the tree. An
// entry that is not there gives an error that is fs.ErrNotExist.
type linkReader interface {
	lstat(path string) (mode uint32, target string, err error)
}

// rootPath resolves the symlinks of path inside of the tree, to the result of
// continuity's fs.RootPath: what does not exist is taken for a plain name, ".."
// of a target is taken by its text, and passes are repeated until one of them
// meets no link. The result is absolute and clean.
func rootPath(tree linkReader, path string) (string, error) {
	if path == "" {
		return "/", nil
	}
	links := 0
	for {
		before := links
		next, err := linkPass(tree, path, &links)
		if err != nil {
			return "", err
		}
		path = next
		if links != before {
			continue
		}
		if path = filepath.Join("/", next); path == next {
			return path, nil
		}
	}
}

// linkPass walks path from the left and replaces each link it meets by its
// target once; a target's own links are left to the next pass.
func linkPass(tree linkReader, path string, links *int) (string, error) {
	cur := ""
	if strings.HasPrefix(path, "/") {
		cur = "/"
	}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		next, isLink, err := readLink(tree, filepath.Join(cur, name), links)
		switch {
		case err != nil:
			return "", err
		case isLink && cur != "" && !filepath.IsAbs(next):
			cur = filepath.Join(cur, next)
		default:
			cur = next
		}
	}
	return cur, nil
}

func readLink(tree linkReader, path string, links *int) (string, bool, error) {
	if *links > maxLinks {
		return "", false, errTooManyLinks
	}
	path = filepath.Join("/", path)
	if path == "/" {
		return path, false, nil
	}
	mode, target, err := tree.lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return path, false, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("%.300q: %w", path, err)
	}
	if mode&unix.S_IFMT != unix.S_IFLNK {
		return path, false, nil
	}
	*links++
	return target, true, nil
}

// tree is a directory tree in memory.
type tree struct {
	root *erofs.Inode
	// find returns the entry of a directory, or nil.
	find func(dir *erofs.Inode, name string) *erofs.Inode
	// prefix is the length of the path at which the tree would lie on a host:
	// containerd's paths include it when the kernel holds them against PATH_MAX.
	prefix int
}

func (t *tree) lstat(path string) (uint32, string, error) {
	n, err := t.lookup(path)
	if err != nil {
		return 0, "", err
	}
	return n.Mode, n.Target, nil
}

// checkPath refuses what the kernel refuses before it looks at anything.
func (t *tree) checkPath(path string) error { return t.checkLen(len(path)) }

func (t *tree) checkLen(n int) error {
	if t.prefix+n >= pathMax {
		return unix.ENAMETOOLONG
	}
	return nil
}

// lookup finds path as lstat(2) on a host would: links on the way are followed,
// the last one is not. A link that leaves the tree (absolute, or with too many
// "..") would continue on the host there; here nothing exists outside.
func (t *tree) lookup(path string) (*erofs.Inode, error) {
	if err := t.checkPath(path); err != nil {
		return nil, err
	}
	todo := splitPath(path)
	stack := []*erofs.Inode{t.root}
	follows := 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		dir := stack[len(stack)-1]
		if !isDir(dir) {
			return nil, unix.ENOTDIR
		}
		if name == ".." {
			if len(stack) == 1 {
				return nil, unix.ENOENT
			}
			stack = stack[:len(stack)-1]
			continue
		}
		if len(name) > nameMax {
			return nil, unix.ENAMETOOLONG
		}
		n := t.find(dir, name)
		if n == nil {
			return nil, unix.ENOENT
		}
		if len(todo) == 0 || n.Mode&unix.S_IFMT != unix.S_IFLNK {
			stack = append(stack, n)
			continue
		}
		if follows++; follows > kernelLinks {
			return nil, unix.ELOOP
		}
		if filepath.IsAbs(n.Target) {
			return nil, unix.ENOENT
		}
		todo = append(splitPath(n.Target), todo...)
	}
	return stack[len(stack)-1], nil
}

// splitPath returns the names in path, without empty ones and ".".
func splitPath(path string) []string {
	names := strings.Split(path, "/")
	keep := names[:0]
	for _, n := range names {
		if n != "" && n != "." {
			keep = append(keep, n)
		}
	}
	return keep
}

func isDir(n *erofs.Inode) bool { return n.Mode&unix.S_IFMT == unix.S_IFDIR }
