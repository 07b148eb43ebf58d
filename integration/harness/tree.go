package harness

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// TreeEntry is what a container can see of one file.
type TreeEntry struct {
	Mode     uint32 // st_mode: type and permissions
	UID, GID uint32
	Size     int64 // of regular files and links; a directory's depends on the file system
	Mtime    time.Time
	Rdev     uint64
	Xattrs   map[string]string
	Target   string // of a symbolic link
	Sum      string // SHA-256 of a regular file
	Group    string // first path of the hard-link group, "" when the link count is 1
	Ghost    bool   // listed, and not there: overlayfs lists the whiteouts of a directory that one layer alone has
}

// FileTree maps paths, relative to the root ("." is the root itself), to entries.
type FileTree map[string]TreeEntry

// WalkTree reads all of the tree at root.
func WalkTree(root string) (FileTree, error) {
	tree, groups, buf := FileTree{}, map[[2]uint64]string{}, &walkBuffers{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		e, err := buf.readEntry(path, rel, groups)
		if errors.Is(err, fs.ErrNotExist) {
			e, err = TreeEntry{Ghost: true}, nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		tree[rel] = e
		return nil
	})
	return tree, err
}

// walkBuffers are made once a walk: their size is that of all a file may have, and most files have none.
type walkBuffers struct {
	names, value, data [64 << 10]byte
}

func (b *walkBuffers) readEntry(path, rel string, groups map[[2]uint64]string) (TreeEntry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return TreeEntry{}, err
	}
	e := TreeEntry{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: time.Unix(st.Mtim.Unix()).UTC()}
	var err error
	if e.Xattrs, err = b.xattrs(path); err != nil {
		return e, err
	}
	kind := st.Mode & unix.S_IFMT
	switch kind {
	case unix.S_IFREG:
		e.Size = st.Size
		e.Sum, err = b.sumFile(path)
	case unix.S_IFLNK:
		e.Size = st.Size
		e.Target, err = os.Readlink(path)
	case unix.S_IFBLK, unix.S_IFCHR:
		e.Rdev = st.Rdev
	}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		// Walked in lexical order, so the first path met is the same in equal trees.
		inode := [2]uint64{st.Dev, st.Ino}
		if _, ok := groups[inode]; !ok {
			groups[inode] = rel
		}
		e.Group = groups[inode]
	}
	return e, err
}

func (b *walkBuffers) sumFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, b.data[:]); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// xattrs reads all extended attributes, of a link its own. The namespace of
// overlayfs is left out: it tells how layers are joined, and is the snapshotter's own.
func (b *walkBuffers) xattrs(path string) (map[string]string, error) {
	n, err := unix.Llistxattr(path, b.names[:])
	if err != nil || n == 0 {
		return nil, err
	}
	all := map[string]string{}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(b.names[:n], []byte{0}), []byte{0}) {
		if strings.HasPrefix(string(name), "trusted.overlay.") {
			continue
		}
		n, err := unix.Lgetxattr(path, string(name), b.value[:])
		if err != nil {
			return nil, fmt.Errorf("xattr %s: %w", name, err)
		}
		all[string(name)] = string(b.value[:n])
	}
	return all, nil
}

// CompareTrees says in what got differs from want, one line a difference, in
// the order of paths. Not compared are the sizes of directories, and the mtime
// of the paths for which anyTime is true.
func CompareTrees(want, got FileTree, anyTime func(path string) bool) []string {
	paths := map[string]bool{}
	for p := range want {
		paths[p] = true
	}
	for p := range got {
		paths[p] = true
	}
	var lines []string
	for _, p := range slices.Sorted(maps.Keys(paths)) {
		w, inWant := want[p]
		g, inGot := got[p]
		switch {
		case !inGot:
			lines = append(lines, p+": missing")
		case !inWant:
			lines = append(lines, p+": not wanted")
		default:
			if anyTime != nil && anyTime(p) {
				g.Mtime = w.Mtime
			}
			for _, d := range compareEntries(w, g) {
				lines = append(lines, p+": "+d)
			}
		}
	}
	return lines
}

func compareEntries(want, got TreeEntry) []string {
	var d []string
	diff := func(what string, want, got any) {
		if want != got {
			d = append(d, fmt.Sprintf("%s: want %v, got %v", what, want, got))
		}
	}
	diff("mode", fmt.Sprintf("%o", want.Mode), fmt.Sprintf("%o", got.Mode))
	diff("uid", want.UID, got.UID)
	diff("gid", want.GID, got.GID)
	diff("size", want.Size, got.Size)
	diff("mtime", want.Mtime.Format(time.RFC3339Nano), got.Mtime.Format(time.RFC3339Nano))
	diff("rdev", want.Rdev, got.Rdev)
	diff("target", want.Target, got.Target)
	diff("content", want.Sum, got.Sum)
	diff("hard-link group", want.Group, got.Group)
	diff("listed only", want.Ghost, got.Ghost)
	if !maps.Equal(want.Xattrs, got.Xattrs) {
		d = append(d, fmt.Sprintf("xattrs: want %q, got %q", want.Xattrs, got.Xattrs))
	}
	return d
}
