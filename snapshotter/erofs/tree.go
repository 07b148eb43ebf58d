package erofs

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	maxName   = 255
	maxTarget = 4095
	// maxFileSize is what ext4 allows. Without a limit a tar header of a few
	// bytes could ask for a chunk table of gigabytes.
	maxFileSize = 16 << 40
)

// node is one inode of the image in the making.
type node struct {
	in *Inode
	// parent is the index of the directory that holds its first link.
	parent int32
	// dir is a directory's index in tree.dirs; tail is the first entry of its
	// last block.
	dir, tail int32

	nlink  uint32
	slot   uint32 // nid
	block  uint32 // in the data area, or in the device (placeDevice)
	xattrs uint32 // bytes
	size   uint64 // i_size

	place     place
	extended  bool
	chunkBits uint8
}

// place says where the data of an inode lies.
type place uint8

const (
	placeNone   place = iota // no data
	placeInline              // the last block behind the inode, others in the data area
	placeData                // data area
	placeDevice              // one run of the device
	placeChunks              // a table of chunks
)

// directory is what a directory has in it: sorted entries with their nodes, and
// where among them "." and ".." go.
type directory struct {
	entries     []Dirent
	nodes       []int32
	dot, dotdot int32 // how many entries are before each
	self, up    int32
}

// count is the number of entries on disk.
func (d *directory) count() int { return len(d.entries) + 2 }

// at returns entry i of those on disk.
func (d *directory) at(i int) (name string, node int32) {
	switch dot, dotdot := int(d.dot), int(d.dotdot)+1; {
	case i == dot:
		return ".", d.self
	case i == dotdot:
		return "..", d.up
	case i > dotdot:
		i -= 2
	case i > dot:
		i--
	}
	return d.entries[i].Name, d.nodes[i]
}

// nodeShard is how many nodes are allocated at once: a slice that grows would
// be copied, and its pointers would not last.
const nodeShard = 1 << 12

// tree is the input, checked and flattened: nodes in the order in which they
// are stored, directory by directory, each directory's inodes side by side.
type tree struct {
	shards [][]node
	count  int32
	dirs   []directory
	seen   map[*Inode]int32 // of directories and what has more than one name
	naming string           // the entry that is being added, for error messages
	epoch  majority
}

func (t *tree) node(i int32) *node { return &t.shards[i/nodeShard][i%nodeShard] }

// flatten checks everything but data extents. It keeps no path on the
// goroutine's stack, so depth costs nothing.
func flatten(root *Inode) (*tree, error) {
	if root == nil || root.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, fmt.Errorf("erofs: the root is no directory: %w", errdefs.ErrInvalidArgument)
	}
	t := &tree{seen: make(map[*Inode]int32)}
	if _, err := t.add(root, 0, "/"); err != nil {
		return nil, err
	}
	stack := []int32{0}
	for len(stack) > 0 {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		from := len(stack)
		var err error
		if stack, err = t.list(dir, stack); err != nil {
			return nil, err
		}
		slices.Reverse(stack[from:])
	}
	t.seen, t.naming = nil, ""
	return t, nil
}

// list adds the entries of a directory in their order on disk and pushes its
// subdirectories.
func (t *tree) list(dir int32, stack []int32) ([]int32, error) {
	n := t.node(dir)
	entries, err := t.sorted(dir, n.in.Children)
	if err != nil {
		return nil, err
	}
	d := directory{entries: entries, nodes: make([]int32, len(entries)), self: dir, up: n.parent}
	n.dir = int32(len(t.dirs))
	t.dirs = append(t.dirs, d)
	for i, c := range entries {
		if d.nodes[i], stack, err = t.link(dir, c, stack); err != nil {
			return nil, err
		}
		if c.Name < "." {
			d.dot = int32(i) + 1
		}
		if c.Name < ".." {
			d.dotdot = int32(i) + 1
		}
	}
	t.dirs[n.dir] = d
	return stack, nil
}

// sorted checks the names of a directory and returns its entries in order:
// itself where they are.
func (t *tree) sorted(dir int32, entries []Dirent) ([]Dirent, error) {
	if len(entries) > math.MaxInt32-2 {
		return nil, t.errorf(dir, "more than %d entries: %w", math.MaxInt32, errdefs.ErrOutOfRange)
	}
	inOrder := true
	for i, c := range entries {
		if err := checkName(c.Name); err != nil {
			return nil, t.errorf(dir, "entry %s: %w", quote(c.Name), err)
		}
		inOrder = inOrder && (i == 0 || entries[i-1].Name < c.Name)
	}
	if inOrder {
		return entries, nil
	}
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b Dirent) int { return strings.Compare(a.Name, b.Name) })
	for i, c := range entries[1:] {
		if entries[i].Name == c.Name {
			return nil, t.errorf(dir, "entry %s appears twice: %w", quote(c.Name), errdefs.ErrInvalidArgument)
		}
	}
	return entries, nil
}

// link makes c an entry of dir, adding its inode at its first name.
func (t *tree) link(dir int32, c Dirent, stack []int32) (int32, []int32, error) {
	if idx, ok := t.known(c.Inode); ok {
		n := t.node(idx)
		if n.isDir() {
			return 0, nil, t.errorf(dir, "entry %s: a directory cannot have two names: %w", quote(c.Name), errdefs.ErrInvalidArgument)
		}
		n.nlink++
		return idx, stack, nil
	}
	idx, err := t.add(c.Inode, dir, c.Name)
	if err != nil {
		return 0, nil, err
	}
	if t.node(idx).isDir() {
		t.node(dir).nlink++
		stack = append(stack, idx)
	}
	return idx, stack, nil
}

// known returns the node of an inode that may have several names and had one.
func (t *tree) known(in *Inode) (int32, bool) {
	if in == nil || !in.Shared && in.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, false
	}
	idx, ok := t.seen[in]
	return idx, ok
}

// add appends an inode and checks what can be checked on it alone.
func (t *tree) add(in *Inode, parent int32, name string) (int32, error) {
	if in == nil {
		return 0, t.errorf(parent, "entry %s has no inode: %w", quote(name), errdefs.ErrInvalidArgument)
	}
	if t.count == math.MaxInt32 {
		return 0, t.errorf(parent, "entry %s is over the %d files of an image: %w", quote(name), math.MaxInt32, errdefs.ErrOutOfRange)
	}
	idx := t.count
	if t.count++; idx%nodeShard == 0 {
		t.shards = append(t.shards, make([]node, nodeShard))
	}
	n := t.node(idx)
	*n = node{in: in, parent: parent, nlink: 1}
	t.naming = name
	if err := n.check(); err != nil {
		return 0, t.errorf(idx, "%w", err)
	}
	if n.isDir() {
		n.nlink = 2
	}
	t.epoch.vote(in.Mtime, in.MtimeNsec)
	if in.Shared || n.isDir() {
		t.seen[in] = idx
	}
	return idx, nil
}

func (n *node) check() (err error) {
	in := n.in
	if in.Mode&^0o177777 != 0 || fileType(in.Mode) == 0 {
		return fmt.Errorf("mode %#o is not of a known file type: %w", in.Mode, errdefs.ErrInvalidArgument)
	}
	if in.MtimeNsec >= 1e9 {
		return fmt.Errorf("mtime has %d nanoseconds: %w", in.MtimeNsec, errdefs.ErrInvalidArgument)
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if in.Size < 0 || in.Size > maxFileSize {
			return fmt.Errorf("size %d is not within 0 to %d: %w", in.Size, int64(maxFileSize), errdefs.ErrOutOfRange)
		}
		n.size = uint64(in.Size)
	case unix.S_IFLNK:
		// The kernel takes a target with a zero byte for a corrupt image.
		if len(in.Target) == 0 || len(in.Target) > maxTarget || strings.IndexByte(in.Target, 0) >= 0 {
			return fmt.Errorf("symlink target %s is not 1 to %d bytes without zero bytes: %w", quote(in.Target), maxTarget, errdefs.ErrInvalidArgument)
		}
		n.size = uint64(len(in.Target))
	case unix.S_IFCHR, unix.S_IFBLK:
		if major, minor := unix.Major(in.Rdev), unix.Minor(in.Rdev); major >= 1<<12 || minor >= 1<<20 {
			return fmt.Errorf("device number %d:%d is over 4095:1048575: %w", major, minor, errdefs.ErrOutOfRange)
		}
	}
	n.xattrs, err = xattrSize(in.Xattrs)
	return err
}

func (n *node) isDir() bool { return n.in.Mode&unix.S_IFMT == unix.S_IFDIR }

func checkName(name string) error {
	switch {
	case name == "", name == ".", name == "..":
		return fmt.Errorf("not a file name: %w", errdefs.ErrInvalidArgument)
	case len(name) > maxName:
		return fmt.Errorf("name of %d bytes, %d are possible: %w", len(name), maxName, errdefs.ErrInvalidArgument)
	case strings.IndexByte(name, '/') >= 0, strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("name holds a slash or a zero byte: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// fileType is the directory entry type of a mode, 0 for none.
func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return fileTypeRegular
	case unix.S_IFDIR:
		return fileTypeDirectory
	case unix.S_IFCHR:
		return fileTypeCharDev
	case unix.S_IFBLK:
		return fileTypeBlockDev
	case unix.S_IFIFO:
		return fileTypeFifo
	case unix.S_IFSOCK:
		return fileTypeSocket
	case unix.S_IFLNK:
		return fileTypeSymlink
	}
	return 0
}

// errorf names the file that the error is about.
func (t *tree) errorf(idx int32, format string, args ...any) error {
	return fmt.Errorf("erofs: %s: %w", quote(t.path(idx)), fmt.Errorf(format, args...))
}

func (t *tree) path(idx int32) string {
	var names []string
	for idx != 0 {
		parent := t.node(idx).parent
		names = append(names, t.name(idx, parent))
		idx = parent
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

// name is the first name of a node.
func (t *tree) name(idx, parent int32) string {
	if idx == t.count-1 && t.naming != "" {
		return t.naming
	}
	d := &t.dirs[t.node(parent).dir]
	if i := slices.Index(d.nodes, idx); i >= 0 {
		return d.entries[i].Name
	}
	return "?"
}

// quote keeps a hostile name from flooding a log.
func quote(s string) string {
	const most = 300
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}

// majority finds the mtime that more than half of the inodes have, if there is
// one (the vote of Boyer and Moore). Layers of reproducible builds have one,
// and there inodes without a time of their own take half the space.
type majority struct {
	sec   int64
	nsec  uint32
	count int
}

func (m *majority) vote(sec int64, nsec uint32) {
	switch {
	case m.count == 0:
		m.sec, m.nsec, m.count = sec, nsec, 1
	case m.sec == sec && m.nsec == nsec:
		m.count++
	default:
		m.count--
	}
}
