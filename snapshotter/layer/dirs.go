package layer

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// namesShard is how many bytes of names are allocated at once.
const namesShard = 32 << 10

// indexFrom is the number of children from which a directory gets a map.
const indexFrom = 16

// resolve is rootPath, quick where no symlink is on the way.
func (b *builder) resolve(path string) (string, error) {
	if b.lastDir != nil && path == b.lastName {
		return b.lastPath, nil
	}
	plain := strings.TrimPrefix(path, "/")
	for strings.HasPrefix(plain, "../") {
		plain = plain[len("../"):]
	}
	clean := filepath.Join("/", plain)
	if strings.Contains(plain, "./") || b.checkPath(clean) != nil || !b.isPlain(clean) {
		return rootPath(b, path)
	}
	return clean, nil
}

// isPlain reports whether rootPath would leave the clean path as it is: it
// leads through directories to something that is no symlink, or ends before.
func (b *builder) isPlain(path string) bool {
	dir := b.root
	rest := path[1:]
	for rest != "" {
		name, after, more := strings.Cut(rest, "/")
		if len(name) > nameMax {
			return false
		}
		n := b.child(dir, name)
		if n == nil {
			return true
		}
		if n.Mode&unix.S_IFMT == unix.S_IFLNK || (more && !isDir(n)) {
			return false
		}
		dir, rest = n, after
	}
	return true
}

// mkparent returns the directory at a resolved path, and makes what is missing
// of it: those directories are only implied.
func (b *builder) mkparent(path string) (*erofs.Inode, error) {
	if b.lastDir != nil && path == b.lastPath {
		return b.lastDir, nil
	}
	if err := b.checkPath(path); err != nil {
		return nil, err
	}
	dir := b.root
	for _, name := range splitPath(path) {
		n := b.child(dir, name)
		switch {
		case n == nil:
			if len(name) > nameMax {
				return nil, unix.ENAMETOOLONG
			}
			if b.made >= b.most {
				return nil, fmt.Errorf("more than %d files and implied directories", b.most)
			}
			n = b.newInode(dir, unix.S_IFDIR|0o755)
			b.xattrs.chmod(n, 0o755) // a default ACL of dir has changed it
			b.inherit[n] = inheritAttrs | inheritMtime | inheritXattrs
			if err := b.add(dir, name, n); err != nil {
				return nil, err
			}
		case !isDir(n):
			return nil, unix.ENOTDIR
		}
		dir = n
	}
	return dir, nil
}

// remember keeps the parent of a member, as most tars hold a directory's files
// one after the other. Only a path that no symlink is part of stays valid until
// something is removed.
func (b *builder) remember(member, name, path string, dir *erofs.Inode) {
	if b.lastDir == nil || b.lastName != name {
		b.lastDir = nil
		if filepath.Join("/", name) != path {
			return
		}
		b.lastRaw, _ = filepath.Split(strings.TrimSuffix(member, "/"))
		if filepath.Clean(b.lastRaw) != filepath.Clean(name) { // "a/b/." is in "a/"
			b.lastRaw = name
		}
		b.lastName, b.lastPath, b.lastDir = name, path, dir
	}
}

// split is filepath.Split of the clean name, quick in the directory of the
// member before.
func (b *builder) split(member string) (dir, base string) {
	if b.lastDir != nil && len(member) > len(b.lastRaw) && member[:len(b.lastRaw)] == b.lastRaw {
		base = strings.TrimSuffix(member[len(b.lastRaw):], "/")
		if base != "" && base != "." && base != ".." && strings.IndexByte(base, '/') < 0 {
			return b.lastName, base
		}
	}
	return filepath.Split(filepath.Clean(member))
}

// keep copies a string that the tree refers to for long next to others.
func (b *builder) keep(s string) string {
	if b.names == nil || b.names.Cap()-b.names.Len() < len(s) {
		b.names = new(strings.Builder)
		b.names.Grow(max(len(s), min(namesShard, 32*b.entries)))
	}
	at := b.names.Len()
	b.names.WriteString(s)
	return b.names.String()[at:]
}

// room is how many inodes or extents are allocated at once.
func (b *builder) room() int { return min(16+b.entries/2, 273) }

// newInode returns an inode as a file created in dir gets it.
func (b *builder) newInode(dir *erofs.Inode, mode uint32) *erofs.Inode {
	if len(b.inodes) == 0 {
		b.inodes = make([]erofs.Inode, b.room())
	}
	b.made++
	n := &b.inodes[0]
	b.inodes = b.inodes[1:]
	n.Mode = mode
	if dir.Mode&unix.S_ISGID != 0 {
		n.GID = dir.GID
	}
	b.xattrs.inheritACL(dir, n)
	return n
}

// oneExtent is a list of one, out of a larger allocation.
func (b *builder) oneExtent(e erofs.Extent) []erofs.Extent {
	if len(b.extents) == 0 {
		b.extents = make([]erofs.Extent, b.room())
	}
	list := b.extents[:1:1]
	b.extents = b.extents[1:]
	list[0] = e
	return list
}

func (b *builder) child(dir *erofs.Inode, name string) *erofs.Inode {
	if i := b.place(dir, name); i >= 0 {
		return dir.Children[i].Inode
	}
	return nil
}

func (b *builder) place(dir *erofs.Inode, name string) int {
	if index := b.index[dir]; index != nil {
		if i, ok := index[name]; ok {
			return i
		}
		return -1
	}
	return slices.IndexFunc(dir.Children, func(d erofs.Dirent) bool { return d.Name == name })
}

func (b *builder) add(dir *erofs.Inode, name string, n *erofs.Inode) error {
	name = b.keep(name) // the header's name holds the whole path
	dir.Children = append(dir.Children, erofs.Dirent{Name: name, Inode: n})
	if index := b.index[dir]; index != nil {
		index[name] = len(dir.Children) - 1
	} else if len(dir.Children) == indexFrom {
		index = make(map[string]int, 2*indexFrom)
		for i, d := range dir.Children {
			index[d.Name] = i
		}
		b.index[dir] = index
	}
	return b.hold(len(name))
}

// remove takes the entry out with all below it.
func (b *builder) remove(dir *erofs.Inode, name string) {
	i := b.place(dir, name)
	gone := dir.Children[i].Inode
	last := len(dir.Children) - 1
	dir.Children[i] = dir.Children[last]
	dir.Children[last] = erofs.Dirent{}
	dir.Children = dir.Children[:last]
	if index := b.index[dir]; index != nil {
		delete(index, name)
		if i != last {
			index[dir.Children[i].Name] = i
		}
	}
	b.lastDir = nil
	b.forget(gone)
}

// forget drops what is known of a removed directory, and of those in it.
func (b *builder) forget(n *erofs.Inode) {
	if !isDir(n) {
		return
	}
	delete(b.inherit, n)
	delete(b.index, n)
	for _, d := range n.Children {
		b.forget(d.Inode)
	}
}

// sortTree orders all directories by name, bytewise, and returns unused room.
func sortTree(dir *erofs.Inode) {
	byName := func(x, y erofs.Dirent) int { return cmp.Compare(x.Name, y.Name) }
	if !slices.IsSortedFunc(dir.Children, byName) {
		slices.SortFunc(dir.Children, byName)
	}
	if n := len(dir.Children); cap(dir.Children) > n+n/4 {
		dir.Children = append(make([]erofs.Dirent, 0, n), dir.Children...)
	}
	for _, d := range dir.Children {
		if isDir(d.Inode) {
			sortTree(d.Inode)
		}
	}
}

// findSorted is tree.find for a tree after sortTree.
func findSorted(dir *erofs.Inode, name string) *erofs.Inode {
	i, ok := slices.BinarySearchFunc(dir.Children, name, func(d erofs.Dirent, name string) int {
		return cmp.Compare(d.Name, name)
	})
	if !ok {
		return nil
	}
	return dir.Children[i].Inode
}
