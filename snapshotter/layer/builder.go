package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	opaqueXattr    = "trusted.overlay.opaque"
)

// inodeBytes is the memory of an inode with its entry and its extent, without
// names and attributes: 120, 24 and 24 bytes, and what slices have in reserve.
const inodeBytes = 175

// inherit says what a directory has from the parents of the layer.
type inherit uint8

const (
	inheritAttrs  inherit = 1 << iota // mode and owner
	inheritMtime                      // modification time
	inheritXattrs                     // attributes that the layer does not set itself
)

// builder does to a tree in memory what containerd's archive.Apply does to the
// empty upper directory of an overlay.
type builder struct {
	tree
	entries int
	made    int // inodes
	most    int // of members, and again of directories that they imply
	held    int64
	inherit map[*erofs.Inode]inherit
	index   map[*erofs.Inode]map[string]int // of large directories: name to place in Children
	xattrs  xattrPool

	// times of directories are set at the end, by name: whatever the name
	// leads to then gets them.
	times []dirTime

	// above is why the layer can only be the lowest one, nil as long as it can be any. See apply.
	above  error
	lowest bool // the same
	whited bool // there is or was a whiteout
	linked bool // there is a hard link to a whiteout, which a lowest layer cannot have

	fresh *erofs.Inode // the regular file that the last member made, if it did

	// The parent of the member before, see remember: as the tar wrote it, clean,
	// and resolved.
	lastRaw, lastName, lastPath string
	lastDir                     *erofs.Inode

	inodes  []erofs.Inode    // room for the next ones
	extents []erofs.Extent   // likewise
	names   *strings.Builder // likewise
}

type dirTime struct {
	name string
	sec  int64
	nsec uint32
}

func newBuilder(prefix int) *builder {
	b := &builder{
		most:    MaxEntries,
		inherit: make(map[*erofs.Inode]inherit),
		index:   make(map[*erofs.Inode]map[string]int),
	}
	b.tree = tree{root: &erofs.Inode{Mode: unix.S_IFDIR | 0o755}, find: b.child, prefix: prefix}
	b.inherit[b.root] = inheritMtime
	return b
}

// apply enters one member. Its errors are those for which Apply fails.
//
// In the lowest layer containerd makes no marks of whiteouts: it deletes what they name. So a tar with a file and its
// whiteout, or with something below a whiteout, is good there and fails anywhere else. From the first such member on
// the tree is that of a lowest layer.
func (b *builder) apply(hdr *tar.Header, extents []erofs.Extent) error {
	if b.entries++; b.entries > b.most {
		return fmt.Errorf("more than %d members", b.most)
	}
	err := b.enter(hdr, extents)
	if err == nil || b.lowest || b.linked || !b.whited {
		return err
	}
	b.lowest, b.above = true, fmt.Errorf("tar member %.300q: %w: %w", strings.Clone(hdr.Name), err, errdefs.ErrInvalidArgument)
	b.dropWhiteouts(b.root)
	if b.enter(hdr, extents) != nil {
		return err
	}
	return nil
}

// isMark knows a whiteout that was made of a name from a device that the tar names, which has a mode.
func isMark(n *erofs.Inode) bool { return isWhiteout(n) && n.Mode == unix.S_IFCHR }

// dropWhiteouts takes the marks out of the tree.
func (b *builder) dropWhiteouts(dir *erofs.Inode) {
	for i := len(dir.Children) - 1; i >= 0; i-- {
		switch d := dir.Children[i]; {
		case isDir(d.Inode):
			b.dropWhiteouts(d.Inode)
		case isMark(d.Inode):
			b.remove(dir, d.Name)
		}
	}
}

func (b *builder) enter(hdr *tar.Header, extents []erofs.Extent) error {
	given, base := b.split(hdr.Name)
	parent, err := b.resolve(given)
	if err != nil {
		return err
	}
	if base == "" || base == "." || base == ".." {
		return nil // the root, which is not the tar's to change
	}
	dir, err := b.mkparent(parent)
	if err != nil {
		return err
	}
	b.remember(hdr.Name, given, parent, dir)
	if strings.HasPrefix(base, whiteoutPrefix) {
		return b.whiteout(dir, parent, base, hdr)
	}
	return b.replace(dir, parent, base, hdr, extents)
}

func (b *builder) replace(dir *erofs.Inode, parent, base string, hdr *tar.Header, extents []erofs.Extent) error {
	old := b.child(dir, base)
	if old != nil && (!isDir(old) || hdr.Typeflag != tar.TypeDir) {
		b.remove(dir, base)
		old = nil
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil // it has no file of its own, but it has just removed one
	}
	if err := b.checkNew(parent, base); err != nil {
		return err
	}
	n, err := b.create(dir, old, hdr, extents)
	if err != nil {
		return err
	}
	if old == nil {
		if err := b.add(dir, base, n); err != nil {
			return err
		}
	}
	if err := b.attributes(n, hdr); err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeDir {
		sec, nsec := boundTime(hdr.ModTime)
		name := strings.Clone(filepath.Clean(hdr.Name))
		b.times = append(b.times, dirTime{name, sec, nsec})
		return b.hold(len(name) + 32)
	}
	return nil
}

// checkNew refuses a name that the kernel would refuse to create in the
// directory at the clean path parent.
func (b *builder) checkNew(parent, base string) error {
	if len(base) > nameMax {
		return unix.ENAMETOOLONG
	}
	return b.checkLen(len(strings.TrimSuffix(parent, "/")) + 1 + len(base))
}

// create returns the inode for the member: a new one, the directory that is
// there already, or the target of a hard link.
func (b *builder) create(dir, old *erofs.Inode, hdr *tar.Header, extents []erofs.Extent) (*erofs.Inode, error) {
	var format uint32
	switch hdr.Typeflag {
	case tar.TypeDir:
		if old != nil {
			return old, nil
		}
		format = unix.S_IFDIR
	case tar.TypeReg:
		n := b.newInode(dir, unix.S_IFREG)
		n.Size, n.Data = hdr.Size, extents
		b.fresh = n
		return n, b.hold(24 * len(extents))
	case tar.TypeLink:
		return b.linkTarget(hdr.Linkname)
	case tar.TypeSymlink:
		return b.symlink(dir, hdr.Linkname)
	case tar.TypeBlock:
		format = unix.S_IFBLK
	case tar.TypeChar:
		format = unix.S_IFCHR
	case tar.TypeFifo:
		format = unix.S_IFIFO
	case tar.TypeGNUSparse:
		return nil, errors.New("sparse files in the old GNU format are not supported, as in containerd; write the tar in the PAX format")
	default:
		return nil, fmt.Errorf("unknown type %q", hdr.Typeflag)
	}
	n := b.newInode(dir, format)
	return n, setDevice(n, hdr)
}

// setDevice takes over the device number. mknod(2) is given 32 bits of it.
func setDevice(n *erofs.Inode, hdr *tar.Header) error {
	format := n.Mode & unix.S_IFMT
	if format == unix.S_IFDIR {
		return nil
	}
	if hdr.Devmajor < 0 || hdr.Devmajor > math.MaxUint32 || hdr.Devminor < 0 || hdr.Devminor > math.MaxUint32 {
		return fmt.Errorf("device number %d:%d out of range", hdr.Devmajor, hdr.Devminor)
	}
	if format != unix.S_IFIFO {
		n.Rdev = uint64(uint32(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))))
	}
	return nil
}

func (b *builder) symlink(dir *erofs.Inode, target string) (*erofs.Inode, error) {
	switch {
	case target == "":
		return nil, fmt.Errorf("symlink without a target: %w", unix.ENOENT)
	case len(target) >= pathMax:
		return nil, fmt.Errorf("target of %d bytes: %w", len(target), unix.ENAMETOOLONG)
	}
	n := b.newInode(dir, unix.S_IFLNK)
	n.Mode |= 0o777
	n.Target = b.keep(target)
	return n, b.hold(len(target))
}

// linkTarget finds what a hard link names. Symlinks on the way to it are
// followed, but it may be one itself.
func (b *builder) linkTarget(name string) (*erofs.Inode, error) {
	parent, base := filepath.Split(name)
	parent, err := b.resolve(parent)
	if err != nil {
		return nil, fmt.Errorf("hard link to %.300q: %w", name, err)
	}
	n, err := b.lookup(filepath.Join(parent, base))
	if err == nil && isDir(n) {
		err = unix.EPERM
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("hard link to %.300q, which is no earlier member of this layer: %w", name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("hard link to %.300q: %w", name, err)
	}
	n.Shared = true
	b.linked = b.linked || isMark(n)
	return n, nil
}

// attributes sets what the header says: on a hard link, on the inode it shares.
func (b *builder) attributes(n *erofs.Inode, hdr *tar.Header) error {
	chown(n, hdr.Uid, hdr.Gid)
	if !isDir(n) {
		b.xattrs.drop(n, capabilityXattr) // chown(2) takes them from a file
	}
	grown, err := b.xattrs.apply(n, hdr.PAXRecords)
	if err != nil {
		return err
	}
	if err := b.hold(grown); err != nil {
		return err
	}
	if n.Mode&unix.S_IFMT != unix.S_IFLNK {
		b.xattrs.chmod(n, uint32(hdr.Mode&0o7777))
	}
	if isDir(n) {
		if was := b.inherit[n]; was != 0 {
			b.inherit[n] = was &^ inheritAttrs
		}
	}
	n.Mtime, n.MtimeNsec = boundTime(hdr.ModTime)
	return nil
}

// whiteout enters a ".wh." name as overlay's own mark.
func (b *builder) whiteout(dir *erofs.Inode, parent, base string, hdr *tar.Header) error {
	if base == whiteoutOpaque {
		return b.hold(b.xattrs.set(dir, opaqueXattr, "y"))
	}
	base = base[len(whiteoutPrefix):]
	if base == "" || base == "." || base == ".." {
		return errors.New("whiteout of no name")
	}
	if err := b.checkNew(parent, base); err != nil {
		return err
	}
	b.whited = true
	present := b.child(dir, base) != nil
	if b.lowest {
		if present {
			b.remove(dir, base)
		}
		return nil
	}
	if present {
		return fmt.Errorf("whiteout of %.300q, which this layer has: %w", base, unix.EEXIST)
	}
	n := b.newInode(dir, unix.S_IFCHR)
	chown(n, hdr.Uid, hdr.Gid)
	return b.add(dir, base, n)
}

// finish sets the directories' times and hands the tree over.
func (b *builder) finish() (*Table, error) {
	for _, d := range b.times {
		n, err := b.timesTarget(d.name)
		if err != nil {
			return nil, fmt.Errorf("tar member %.300q, a directory that a later member replaced: %w", d.name, err)
		}
		n.Mtime, n.MtimeNsec = d.sec, d.nsec
		if was := b.inherit[n]; was != 0 {
			b.inherit[n] = was &^ inheritMtime
		}
	}
	for n, flags := range b.inherit {
		if flags == 0 {
			delete(b.inherit, n)
		}
	}
	sortTree(b.root)
	t := &Table{above: b.above, inherit: b.inherit, entries: b.entries, bytes: inodeBytes*int64(b.made) + b.held}
	t.tree = tree{root: b.root, find: findSorted, prefix: b.prefix}
	return t, nil
}

func (b *builder) timesTarget(name string) (*erofs.Inode, error) {
	path, err := b.resolve(name)
	if err != nil {
		return nil, err
	}
	return b.lookup(path)
}

// hold counts n bytes that stay in memory.
func (b *builder) hold(n int) error {
	if b.held += int64(n); b.held > MaxHeld {
		return fmt.Errorf("names, attributes and sparse maps of more than %d bytes", MaxHeld)
	}
	return nil
}

// chown sets the owner as chown(2) does: 32 bits of it, and -1 changes nothing.
func chown(n *erofs.Inode, uid, gid int) {
	if uint32(uid) != math.MaxUint32 {
		n.UID = uint32(uid)
	}
	if uint32(gid) != math.MaxUint32 {
		n.GID = uint32(gid)
	}
}

// boundTime is containerd's bound: what 64 bits of nanoseconds since 1970
// cannot say is 1970.
func boundTime(t time.Time) (sec int64, nsec uint32) {
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, math.MaxInt64)) {
		return 0, 0
	}
	return t.Unix(), uint32(t.Nanosecond())
}
