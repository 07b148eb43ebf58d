package erofs

import (
	"bytes"
	"encoding/binary"
	"io"
	"io/fs"
	"maps"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// flat is an image with its device behind it, at the address where the device
// table maps it: go-erofs 0.3.1 follows mapped addresses of chunks only, not
// those of flat files.
type flat struct {
	image, layer []byte
	mapped       int64
}

func newFlat(image, layer []byte) *flat {
	slot := image[deviceSlot*deviceSlotSize:]
	return &flat{image, layer, int64(binary.LittleEndian.Uint32(slot[68:])) * BlockSize}
}

func (f *flat) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.mapped {
		return bytes.NewReader(f.layer[:len(f.layer)&^511]).ReadAt(p, off-f.mapped)
	}
	return bytes.NewReader(f.image).ReadAt(p, off)
}

// goReader is what go-erofs shows of an image.
type goReader interface {
	fs.ReadDirFS
	ReadLink(name string) (string, error)
}

// compareReader checks that go-erofs reads back what was written.
func compareReader(tb testing.TB, image []byte, root *Inode, layer []byte) {
	tb.Helper()
	img, err := goerofs.Open(newFlat(image, layer), goerofs.WithExtraDevices(bytes.NewReader(layer)))
	if err != nil {
		tb.Fatalf("go-erofs: %v", err)
	}
	r := &readback{tb, img.(goReader), layer, wantNlink(root), map[int64]*Inode{}}
	info, err := img.(fs.StatFS).Stat(".")
	if err != nil {
		tb.Fatalf("go-erofs: stat of the root: %v", err)
	}
	r.compare("", info, root)
	if len(r.inos) != len(r.nlink) {
		tb.Errorf("go-erofs: %d inodes, want %d", len(r.inos), len(r.nlink))
	}
}

type readback struct {
	tb    testing.TB
	img   goReader
	layer []byte
	nlink map[*Inode]int
	inos  map[int64]*Inode
}

func (r *readback) compare(path string, info fs.FileInfo, in *Inode) {
	st := info.Sys().(*goerofs.Stat)
	r.compareStat(path, st, in)
	if other, ok := r.inos[st.Ino]; ok && other != in {
		r.tb.Errorf("%q shares inode %d with another file", path, st.Ino)
	} else if ok {
		return
	}
	r.inos[st.Ino] = in
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		f, err := r.img.Open(path)
		if err != nil {
			r.tb.Errorf("open %q: %v", path, err)
			return
		}
		if in.Size <= 4<<20 { // it cannot seek
			compareContent(r.tb, path, sequential{f}, in, r.layer)
		}
		_ = f.Close()
	case unix.S_IFLNK:
		if got, err := r.img.ReadLink(path); got != in.Target || err != nil {
			r.tb.Errorf("readlink %q: %q, %v, want %q", path, got, err, in.Target)
		}
	case unix.S_IFDIR:
		r.compareDir(path, in)
	}
}

// sequential reads a whole file for the one probe that a small file has.
type sequential struct{ io.Reader }

func (s sequential) ReadAt(p []byte, _ int64) (int, error) { return io.ReadFull(s.Reader, p) }

func (r *readback) compareStat(path string, st *goerofs.Stat, in *Inode) {
	type attrs struct {
		uid, gid uint32
		sec      int64
		nsec     uint32
		nlink    int
		rdev     uint32
		size     int64
		mode     fs.FileMode
	}
	got := attrs{st.UID, st.GID, int64(st.Mtime), st.MtimeNs, st.Nlink, st.Rdev, st.Size, st.Mode}
	want := attrs{in.UID, in.GID, in.Mtime, in.MtimeNsec, r.nlink[in], 0, 0, goMode(in.Mode)}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		want.size = in.Size
	case unix.S_IFLNK:
		want.size = int64(len(in.Target))
	case unix.S_IFDIR:
		want.size = st.Size
	case unix.S_IFCHR, unix.S_IFBLK:
		want.rdev = encodeDev(unix.Major(in.Rdev), unix.Minor(in.Rdev))
	}
	if got != want {
		r.tb.Errorf("%q: go-erofs stat %+v, want %+v", path, got, want)
	}
	xattrs := map[string]string{}
	for name, value := range st.Xattrs {
		if strings.HasPrefix(name, "system.") { // it ends the ACLs' names with a dot
			name = strings.TrimSuffix(name, ".")
		}
		xattrs[name] = value
	}
	if !maps.Equal(xattrs, in.Xattrs) {
		r.tb.Errorf("%q: go-erofs xattrs %.300q, want %.300q", path, xattrs, in.Xattrs)
	}
}

func goMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	m |= map[uint32]fs.FileMode{
		unix.S_IFDIR: fs.ModeDir, unix.S_IFLNK: fs.ModeSymlink, unix.S_IFIFO: fs.ModeNamedPipe, unix.S_IFSOCK: fs.ModeSocket,
		unix.S_IFCHR: fs.ModeDevice | fs.ModeCharDevice, unix.S_IFBLK: fs.ModeDevice,
	}[mode&unix.S_IFMT]
	for bit, f := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if mode&bit != 0 {
			m |= f
		}
	}
	return m
}

func (r *readback) compareDir(path string, in *Inode) {
	entries, err := r.img.ReadDir(path)
	if err != nil {
		r.tb.Errorf("list %q: %v", path, err)
		return
	}
	if len(entries) != len(in.Children) {
		r.tb.Errorf("list %q: %d entries, want %d", path, len(entries), len(in.Children))
	}
	children := map[string]*Inode{}
	for _, c := range in.Children {
		children[c.Name] = c.Inode
	}
	for _, e := range entries {
		child := strings.TrimPrefix(path+"/"+e.Name(), "/")
		info, err := e.Info()
		if err != nil {
			r.tb.Errorf("stat %q: %v", child, err)
			continue
		}
		if children[e.Name()] == nil {
			r.tb.Errorf("%q was never written", child)
			continue
		}
		r.compare(child, info, children[e.Name()])
	}
}

func TestReaderReadsEverything(t *testing.T) {
	t.Parallel()
	root, layer := everything()
	compareReader(t, image(t, root, layer), root, layer)
}
