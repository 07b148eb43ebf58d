package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// Table is the tree that a layer's tar describes, as containerd's archive.Apply
// would make it in an empty upper directory: whiteouts are character devices
// 0/0, opaque directories have overlay's mark. It is immutable and safe for
// concurrent use.
type Table struct {
	tree
	above   error // why it can only be the lowest layer
	inherit map[*erofs.Inode]inherit
	entries int
	bytes   int64 // of memory, about
}

// Len is the number of members of the tar.
func (t *Table) Len() int { return t.entries }

// OnlyLowest is nil for a layer that may lie over others, and else says why it can only be the lowest one of an image: it
// has a file and its whiteout, or something below a whiteout. As in containerd, which refuses it over others, what
// whiteouts name is then not there.
func (t *Table) OnlyLowest() error { return t.above }

// Implies reports whether the index depends on parents: some directory other
// than the root has no entry of its own, or had none when members in it were
// unpacked (it then takes extended attributes from the parents).
func (t *Table) Implies() bool {
	_, root := t.inherit[t.root]
	return len(t.inherit) > 1 || (len(t.inherit) == 1 && !root)
}

// Kind says what a layer has at a path.
type Kind int

const (
	// Absent is nothing: a layer further down decides.
	Absent Kind = iota
	// Implied is a directory that takes some or all attributes from layers further down.
	Implied
	// Directory is a directory with attributes of its own.
	Directory
	// Other is anything else, a whiteout included: it hides what is below.
	Other
)

// Attr are the attributes of a directory.
type Attr struct {
	// Path is where the directory really is, symlinks of the layer resolved.
	Path string
	// Mode holds type and permissions as in st_mode.
	Mode     uint32
	UID, GID uint32
	// Mtime is in seconds since 1970.
	Mtime     int64
	MtimeNsec uint32
	// Xattrs are the extended attributes, those of overlay (trusted.*) left out.
	Xattrs map[string]string
	// Opaque says that the directory hides what layers further down have in it.
	Opaque bool

	inherit inherit
}

// Parent is a layer below the one that is indexed. Lookup is called with an
// absolute, clean path, resolves the layer's own symlinks as containerd does,
// the last one included, and never those of other layers.
type Parent interface {
	Lookup(path string) (Attr, Kind, error)
}

var _ Parent = (*Table)(nil)

// Lookup implements Parent.
func (t *Table) Lookup(path string) (Attr, Kind, error) {
	n, plain := t.plain(path)
	if !plain {
		var err error
		if path, err = rootPath(t, path); err != nil {
			return Attr{}, Other, nil //nolint:nilerr // a loop or a file on the way: not a directory
		}
		if n, err = t.lookup(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Attr{Path: path}, Other, nil //nolint:nilerr // as above
		}
	}
	switch {
	case n == nil:
		return Attr{Path: path}, Absent, nil
	case !isDir(n):
		return Attr{Path: path}, Other, nil
	}
	a := attrOf(n)
	a.Path, a.inherit = path, t.inherit[n]
	if a.inherit != 0 {
		return a, Implied, nil
	}
	return a, Directory, nil
}

// plain finds a path that leads through directories alone, nil if it ends before. It takes each name once, where rootPath
// begins at the root again for each of them: a layer may
// imply directories 2000 deep, each of which is looked up. For any other path the answer is false.
func (t *Table) plain(path string) (*erofs.Inode, bool) {
	if path != filepath.Clean(path) || !filepath.IsAbs(path) || t.checkPath(path) != nil {
		return nil, false
	}
	n := t.root
	for rest := path[1:]; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if !isDir(n) || len(name) > nameMax {
			return nil, false
		}
		if n = t.find(n, name); n == nil {
			return nil, true
		}
		if n.Mode&unix.S_IFMT == unix.S_IFLNK {
			return nil, false
		}
	}
	return n, true
}

func attrOf(n *erofs.Inode) Attr {
	a := Attr{Mode: n.Mode, UID: n.UID, GID: n.GID, Mtime: n.Mtime, MtimeNsec: n.MtimeNsec}
	a.Xattrs, a.Opaque = withoutTrusted(n.Xattrs)
	return a
}

func withoutTrusted(xattrs map[string]string) (rest map[string]string, opaque bool) {
	rest = xattrs
	for name := range xattrs {
		if strings.HasPrefix(name, "trusted.") {
			rest = maps.Clone(xattrs)
			maps.DeleteFunc(rest, func(name, _ string) bool { return strings.HasPrefix(name, "trusted.") })
			break
		}
	}
	return rest, xattrs[opaqueXattr] == "y"
}

// Index returns the tree for erofs.Write. Directories that the layer only
// implies take mode, owner, time and extended attributes from the parents,
// nearest first, as containerd's archive.WithParents has it; one that no parent
// has is 0755. Without parents, whiteouts and opaque marks are left out: a
// single layer is mounted without overlay. With parents, a layer that can only be the
// lowest gives the error of OnlyLowest. The tree shares nodes with the
// Table, so it must not be changed.
func (t *Table) Index(parents []Parent) (*erofs.Inode, error) {
	if len(parents) > 0 && t.above != nil {
		return nil, t.above
	}
	x := indexer{table: t, parents: parents}
	return x.dir(t.root, nil, "/")
}

type indexer struct {
	table   *Table
	parents []Parent
}

// dir returns dir as the index shows it: dir itself where nothing changes. up
// is the directory it is in, if that one took its mode from the parents.
func (x *indexer) dir(dir, up *erofs.Inode, path string) (*erofs.Inode, error) {
	out, err := x.attributes(dir, up, path)
	if err != nil {
		return nil, err
	}
	up = nil
	if x.table.inherit[dir]&inheritAttrs != 0 {
		up = out
	}
	bottom := len(x.parents) == 0
	var children []erofs.Dirent // nil as long as they are those of dir
	for i, d := range dir.Children {
		child := d.Inode
		if isDir(child) {
			if child, err = x.dir(child, up, filepath.Join(path, d.Name)); err != nil {
				return nil, err
			}
		}
		drop := bottom && isWhiteout(child)
		if children == nil && (drop || child != d.Inode) {
			children = append(make([]erofs.Dirent, 0, len(dir.Children)), dir.Children[:i]...)
		}
		if children != nil && !drop {
			children = append(children, erofs.Dirent{Name: d.Name, Inode: child})
		}
	}
	if children == nil {
		return out, nil
	}
	if out == dir {
		out = cloneInode(dir)
	}
	out.Children = children
	return out, nil
}

// attributes returns dir, or a copy of it with what it takes from the parents.
func (x *indexer) attributes(dir, up *erofs.Inode, path string) (*erofs.Inode, error) {
	out := dir
	if flags := x.table.inherit[dir]; flags != 0 && len(x.parents) > 0 {
		a := attrOf(dir)
		a.Path, a.inherit = path, flags
		found, err := fromParents(a, x.parents)
		if err != nil {
			return nil, fmt.Errorf("attributes of %.300q: %w", path, err)
		}
		out = cloneInode(dir)
		merge(out, flags, found)
		if found == nil && flags&inheritAttrs != 0 && up != nil && up.Mode&unix.S_ISGID != 0 {
			out.GID = up.GID // what mkdir does in a setgid directory
		}
	}
	if _, opaque := withoutTrusted(out.Xattrs); opaque && len(x.parents) == 0 {
		if out == dir {
			out = cloneInode(dir)
		}
		out.Xattrs, _ = withoutTrusted(out.Xattrs)
	}
	return out, nil
}

// fromParents finds the directory that a takes its missing attributes from,
// itself completed from the layers below; nil where there is none. Only what
// is no directory hides what is below: that an opaque directory does is not
// looked at, because containerd does not.
func fromParents(a Attr, parents []Parent) (*Attr, error) {
	for i, p := range parents {
		found, kind, err := p.Lookup(a.Path)
		if err != nil {
			return nil, err
		}
		switch kind {
		case Absent:
			continue
		case Other:
			return nil, nil
		case Implied:
			below, err := fromParents(found, parents[i+1:])
			if err != nil {
				return nil, err
			}
			found.complete(below)
		}
		return &found, nil
	}
	return nil, nil
}

// complete fills in what a takes from the directory below it.
func (a *Attr) complete(below *Attr) {
	n := erofs.Inode{Mode: a.Mode, UID: a.UID, GID: a.GID, Mtime: a.Mtime, MtimeNsec: a.MtimeNsec, Xattrs: a.Xattrs}
	merge(&n, a.inherit, below)
	a.Mode, a.UID, a.GID, a.Mtime, a.MtimeNsec, a.Xattrs = n.Mode, n.UID, n.GID, n.Mtime, n.MtimeNsec, n.Xattrs
}

func merge(n *erofs.Inode, flags inherit, from *Attr) {
	if from == nil {
		return
	}
	if flags&inheritAttrs != 0 {
		n.Mode, n.UID, n.GID = from.Mode, from.UID, from.GID
	}
	if flags&inheritMtime != 0 {
		n.Mtime, n.MtimeNsec = from.Mtime, from.MtimeNsec
	}
	if flags&inheritXattrs != 0 && len(from.Xattrs) > 0 {
		all := maps.Clone(from.Xattrs)
		maps.Copy(all, n.Xattrs)
		n.Xattrs = all
	}
}

// isWhiteout knows overlay's mark for a removed entry, a device that the tar
// names itself included.
func isWhiteout(n *erofs.Inode) bool {
	return n.Mode&unix.S_IFMT == unix.S_IFCHR && n.Rdev == 0
}

func cloneInode(n *erofs.Inode) *erofs.Inode {
	c := *n
	return &c
}
