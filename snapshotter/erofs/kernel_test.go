package erofs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mountIndex mounts as gantryd does: the files themselves, no loop device.
func mountIndex(tb testing.TB, index, layer string) string {
	tb.Helper()
	at := tb.TempDir()
	mount(tb, index, at, "erofs", unix.MS_RDONLY, "device="+layer)
	return at
}

func mount(tb testing.TB, source, at, fstype string, flags uintptr, data string) {
	tb.Helper()
	if err := unix.Mount(source, at, fstype, flags, data); err != nil {
		tb.Fatalf("mount %s of %s with %q: %v (see dmesg)", fstype, source, data, err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			tb.Errorf("unmount %s: %v", at, err)
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	})
}

// walker compares a mounted tree with what was written.
type walker struct {
	tb    testing.TB
	layer []byte
	nlink map[*Inode]int
	inos  map[uint64]*Inode
}

func compareMount(tb testing.TB, at string, root *Inode, layer []byte) {
	tb.Helper()
	w := &walker{tb, layer, wantNlink(root), map[uint64]*Inode{}}
	// A stack of open directories would be needed for paths over PATH_MAX; no
	// test has such.
	w.compare(at, root)
	if len(w.inos) != len(w.nlink) {
		tb.Errorf("mount has %d inodes, want %d", len(w.inos), len(w.nlink))
	}
}

func (w *walker) compare(path string, in *Inode) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		w.tb.Errorf("lstat %q: %v", path, err)
		return
	}
	w.compareStat(path, &st, in)
	if other, ok := w.inos[st.Ino]; ok && other != in {
		w.tb.Errorf("%q shares inode %d with another file", path, st.Ino)
	} else if ok {
		return
	}
	w.inos[st.Ino] = in
	w.compareXattrs(path, in)
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		w.compareFile(path, in)
	case unix.S_IFLNK:
		if got, err := os.Readlink(path); got != in.Target || err != nil {
			w.tb.Errorf("readlink %q: %q, %v, want %q", path, got, err, in.Target)
		}
	case unix.S_IFDIR:
		w.compareDir(path, in)
	}
}

func (w *walker) compareStat(path string, st *unix.Stat_t, in *Inode) {
	type attrs struct {
		mode, uid, gid uint32
		sec, nsec      int64
		nlink          int
		rdev           uint64
		size           int64
	}
	got := attrs{st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, int(st.Nlink), st.Rdev, st.Size}
	want := attrs{in.Mode, in.UID, in.GID, in.Mtime, int64(in.MtimeNsec), w.nlink[in], 0, 0}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		want.size = in.Size
	case unix.S_IFLNK:
		want.size = int64(len(in.Target))
	case unix.S_IFDIR:
		want.size = st.Size
	case unix.S_IFCHR, unix.S_IFBLK:
		want.rdev = in.Rdev
	}
	if got != want {
		w.tb.Errorf("%q: stat %+v, want %+v", path, got, want)
	}
}

func (w *walker) compareFile(path string, in *Inode) {
	f, err := os.Open(path)
	if err != nil {
		w.tb.Error(err)
		return
	}
	compareContent(w.tb, path, f, in, w.layer)
	w.compareLastPage(path, int(f.Fd()), in.Size)
	if err := f.Close(); err != nil {
		w.tb.Error(err)
	}
}

// compareLastPage checks that a mapping of the file has zeros behind its end.
func (w *walker) compareLastPage(path string, fd int, size int64) {
	page := int64(os.Getpagesize())
	if size%page == 0 || size > 1<<40 {
		return
	}
	m, err := unix.Mmap(fd, size&^(page-1), int(page), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		w.tb.Errorf("mmap %q: %v", path, err)
		return
	}
	for i, b := range m[size%page:] {
		if b != 0 {
			w.tb.Errorf("%q: mapped byte %d behind its end is %#x", path, i, b)
			break
		}
	}
	if err := unix.Munmap(m); err != nil {
		w.tb.Error(err)
	}
}

func (w *walker) compareDir(path string, in *Inode) {
	names := sortedNames(in)
	f, err := os.Open(path)
	if err != nil {
		w.tb.Error(err)
		return
	}
	got, err := f.Readdirnames(-1)
	if err = errors.Join(err, f.Close()); err != nil {
		w.tb.Errorf("list %q: %v", path, err)
	}
	slices.Sort(got)
	if !slices.Equal(got, names) {
		w.tb.Errorf("list %q: %d names, want %d: %.200q", path, len(got), len(names), got)
	}
	for _, c := range in.Children {
		w.compare(path+"/"+c.Name, c.Inode)
	}
	if err := unix.Lstat(path+"/nobody-has-this-name", &unix.Stat_t{}); err != unix.ENOENT {
		w.tb.Errorf("lookup of a missing name in %q: %v", path, err)
	}
}

func (w *walker) compareXattrs(path string, in *Inode) {
	buf := make([]byte, 1<<17)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		w.tb.Errorf("listxattr %q: %v", path, err)
		return
	}
	var names []string
	if n > 0 {
		names = strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	}
	if len(names) != len(in.Xattrs) {
		w.tb.Errorf("%q: xattrs %q, want %d", path, names, len(in.Xattrs))
	}
	for name, want := range in.Xattrs {
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil || string(buf[:n]) != want {
			w.tb.Errorf("%q: xattr %s: %.80q, %v, want %.80q", path, name, buf[:max(n, 0)], err, want)
		}
	}
}

func TestKernelReadsEverything(t *testing.T) {
	t.Parallel()
	root, layer := everything()
	index, tar := writeFiles(t, root, layer)
	compareMount(t, mountIndex(t, index, tar), root, layer)
}

func TestKernelReadsSmallTrees(t *testing.T) {
	t.Parallel()
	same := dir(named("a", file(10, Extent{0, 10, 0})), named("b", link("a")), named("c", dir()))
	same.Children[0].Inode.Mtime, same.Children[0].Inode.MtimeNsec = same.Mtime, same.MtimeNsec
	same.Children[1].Inode.Mtime, same.Children[1].Inode.MtimeNsec = same.Mtime, same.MtimeNsec
	fat := dir(named("a", file(0)))
	fat.Xattrs = map[string]string{"user.fat": strings.Repeat("f", 3000)}
	for name, tc := range map[string]struct {
		root  *Inode
		layer []byte
	}{
		"empty root and layer":         {dir(), nil},
		"layer of less than a block":   {dir(named("f", file(7, Extent{0, 7, 3}))), layerFile(100)},
		"one time for all":             {same, layerFile(512)},
		"root with large xattrs":       {fat, nil},
		"layer of whole blocks to end": {dir(named("f", file(512, Extent{0, 512, 512}))), layerFile(1024)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			index, tar := writeFiles(t, tc.root, tc.layer)
			compareMount(t, mountIndex(t, index, tar), tc.root, tc.layer)
		})
	}
}

func TestKernelReadsLargeDirectory(t *testing.T) {
	t.Parallel()
	d := dir()
	for i := range 100_000 {
		d.Children = append(d.Children, Dirent{fmt.Sprintf("%x-%s", i*7919%100_003, strings.Repeat("y", i%40)), file(0)})
	}
	root := dir(named("large", d))
	index, tar := writeFiles(t, root, nil)
	compareMount(t, mountIndex(t, index, tar), root, nil)
}

// Paths over PATH_MAX are the caller's to refuse; here is the deepest that a
// caller lets through.
func TestKernelReadsDeepTree(t *testing.T) {
	t.Parallel()
	in := dir(named("f", file(3, Extent{0, 3, 0})))
	root := in
	for range 1900 {
		root = dir(named("d", root))
	}
	layer := layerFile(512)
	index, tar := writeFiles(t, root, layer)
	compareMount(t, mountIndex(t, index, tar), root, layer)
}

func TestKernelOverlaysTwoLayers(t *testing.T) {
	t.Parallel()
	lower := dir(
		named("gone", file(512, Extent{0, 512, 0})),
		named("opaque", dir(named("hidden", file(0)))),
		named("merged", dir(named("below", file(100, Extent{0, 100, 512})))),
		named("replaced", file(5, Extent{0, 5, 0})),
	)
	opaque := dir(named("shown", file(0)))
	opaque.Xattrs = map[string]string{"trusted.overlay.opaque": "y"}
	upper := dir(
		named("gone", special(unix.S_IFCHR, 0, 0)),
		named("opaque", opaque),
		named("merged", dir(named("above", file(600, Extent{0, 600, 1024})))),
		named("replaced", dir()),
	)
	layer := layerFile(4096)
	var lowers []string
	for _, root := range []*Inode{upper, lower} {
		index, tar := writeFiles(t, root, layer)
		lowers = append(lowers, mountIndex(t, index, tar))
	}
	at, rw := t.TempDir(), t.TempDir()
	for _, sub := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(rw, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount(t, "overlay", at, "overlay", 0, "lowerdir="+strings.Join(lowers, ":")+",upperdir="+rw+"/upper,workdir="+rw+"/work")
	var got []string
	err := filepath.WalkDir(at, func(path string, _ os.DirEntry, err error) error {
		got = append(got, strings.TrimPrefix(path, at))
		return err
	})
	want := []string{"", "/merged", "/merged/above", "/merged/below", "/opaque", "/opaque/shown", "/replaced"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("overlay shows %q, %v, want %q", got, err, want)
	}
	copyUpKeepsInode(t, at+"/merged/below")
}

// copyUpKeepsInode checks that overlayfs trusts the layers' file handles, for
// which their UUIDs must differ.
func copyUpKeepsInode(t *testing.T, path string) {
	t.Helper()
	var before, after unix.Stat_t
	if err := unix.Stat(path, &before); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(path, &after); err != nil {
		t.Fatal(err)
	}
	if before.Ino != after.Ino || after.Mode&0o777 != 0o600 {
		t.Errorf("copy-up: inode %d became %d, mode %#o", before.Ino, after.Ino, after.Mode)
	}
}
