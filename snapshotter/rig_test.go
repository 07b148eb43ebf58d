package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/layer"
)

var mountModes = []Mode{ModeFile, ModeLoop, ModeDirectory}

// rig is a snapshotter on a root of its own that leaves nothing mounted.
type rig struct {
	*Snapshotter
	cache *layer.Cache
	root  string
	opts  Options
}

func newRig(t *testing.T, mode Mode) *rig {
	t.Helper()
	return newRigIn(t, t.TempDir(), Options{Mount: mode})
}

func newRigIn(t *testing.T, dir string, o Options) *rig {
	t.Helper()
	r := &rig{root: filepath.Join(dir, "root"), opts: o}
	var err error
	if r.cache, err = layer.Open(filepath.Join(dir, "layers"), layer.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		mountsUnder(dir)
	})
	return r
}

func (r *rig) open(t *testing.T) {
	t.Helper()
	s, err := New(context.WithoutCancel(t.Context()), r.root, r.cache, r.opts)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	r.Snapshotter = s
}

// restart is what a new gantryd does; between may change the disk.
func (r *rig) restart(t *testing.T, between func()) {
	t.Helper()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if between != nil {
		between()
	}
	r.open(t)
}

// unpack says how containerd drives an unpack.
type unpack struct {
	name   string
	rebase bool // parents arrive with Commit, layers are applied before that
}

var unpacks = []unpack{{name: "sequential"}, {name: "rebase", rebase: true}}

func (r *rig) store(t *testing.T, blob []byte) digest.Digest {
	t.Helper()
	l, err := r.cache.Write(t.Context(), bytes.NewReader(blob), nil)
	if err != nil {
		t.Fatalf("layer.Write: %v", err)
	}
	return l.DiffID
}

// pull unpacks layers onto parent and returns the name of the top one.
func (r *rig) pull(t *testing.T, how unpack, name, parent string, layers ...[]byte) string {
	t.Helper()
	type step struct{ key, name, parent string }
	var steps []step
	for i, blob := range layers {
		s := step{key: fmt.Sprintf("extract-%s-%d", name, i), name: fmt.Sprintf("%s-%d", name, i), parent: parent}
		at := s.parent
		if how.rebase {
			at = ""
		}
		mounts, err := r.Prepare(t.Context(), s.key, at)
		if err != nil {
			t.Fatalf("prepare layer %d: %v", i, err)
		}
		if mounts[len(mounts)-1].ReadOnly() {
			t.Fatalf("prepare layer %d: read-only mounts %v make containerd skip Apply", i, mounts)
		}
		if err := r.Adopt(t.Context(), mounts, r.store(t, blob)); err != nil {
			t.Fatalf("adopt layer %d: %v", i, err)
		}
		if !how.rebase {
			r.commit(t, s.name, s.key, "")
		}
		steps = append(steps, s)
		parent = s.name
	}
	if how.rebase {
		for _, s := range steps {
			r.commit(t, s.name, s.key, s.parent)
		}
	}
	return parent
}

func (r *rig) commit(t *testing.T, name, key, parent string) {
	t.Helper()
	var opts []snapshots.Opt
	if parent != "" {
		opts = append(opts, snapshots.WithParent(parent))
	}
	if err := r.Commit(t.Context(), name, key, opts...); err != nil {
		t.Fatalf("commit %s: %v", name, err)
	}
}

// id returns the folder name of a snapshot.
func (r *rig) id(t *testing.T, key string) string {
	t.Helper()
	var id string
	tree, err := r.loadKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range tree {
		if k == key {
			id = i
		}
	}
	if id == "" {
		t.Fatalf("snapshot %s does not exist", key)
	}
	return id
}

// look mounts and describes a tree.
func look(t *testing.T, mounts []mount.Mount) map[string]string {
	t.Helper()
	var got map[string]string
	err := mount.WithTempMount(t.Context(), mounts, func(root string) (err error) {
		got, err = describe(root)
		return err
	})
	if err != nil {
		t.Fatalf("mount %v: %v", mounts, err)
	}
	return got
}

var views int

// show describes what a container on top of a snapshot sees.
func (r *rig) show(t *testing.T, name string) map[string]string {
	t.Helper()
	views++
	key := fmt.Sprintf("show-%d", views)
	mounts, err := r.View(t.Context(), key, name)
	if err != nil {
		t.Fatalf("view %s: %v", name, err)
	}
	defer func() {
		if err := r.Remove(t.Context(), key); err != nil {
			t.Error(err)
		}
	}()
	return look(t, mounts)
}

// describe maps each path to everything about it that should be the same
// however it was unpacked. Times of directories are left out where the clock of
// unpacking decides them.
func describe(root string) (map[string]string, error) {
	tree := map[string]string{}
	links := map[[2]uint64]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		desc := fmt.Sprintf("mode=%o uid=%d gid=%d", st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			first := links[[2]uint64{st.Dev, st.Ino}]
			if first == "" {
				links[[2]uint64{st.Dev, st.Ino}] = rel
			}
			desc += fmt.Sprintf(" size=%d sum=%.8x mtime=%d nlink=%d link=%q", st.Size, sha256.Sum256(b), st.Mtim.Nano(), st.Nlink, first)
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			desc += fmt.Sprintf(" to=%q mtime=%d", to, st.Mtim.Nano())
		case unix.S_IFCHR, unix.S_IFBLK:
			desc += fmt.Sprintf(" rdev=%d", st.Rdev)
		}
		x, err := xattrs(path)
		tree[rel] = desc + x
		return err
	})
	return tree, err
}

func xattrs(path string) (string, error) {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	var out string
	for _, name := range names {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", err
		}
		out += fmt.Sprintf(" %s=%q", name, value[:n])
	}
	return out, nil
}

func sameTree(t *testing.T, got, want map[string]string) {
	t.Helper()
	for _, path := range slices.Sorted(maps.Keys(want)) {
		if got[path] != want[path] {
			t.Errorf("%s:\n got %q\nwant %q", path, got[path], want[path])
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%s: not expected: %s", path, got[path])
		}
	}
}

// reference unpacks the layers as containerd does for overlayfs, and describes
// the overlay of them. below are directories that are there already, nearest
// first.
func reference(t *testing.T, below []string, layers ...[]byte) map[string]string {
	t.Helper()
	lowers := below
	for _, blob := range layers {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		opts := []archive.ApplyOpt{archive.WithParents(lowers)}
		if len(lowers) > 0 {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
		}
		if _, err := archive.Apply(t.Context(), dir, bytes.NewReader(blob), opts...); err != nil {
			t.Fatalf("archive.Apply: %v", err)
		}
		lowers = append([]string{dir}, lowers...)
	}
	return look(t, view{kind: snapshots.KindView, lowers: lowers, options: []string{"index=off"}}.mounts())
}

// file is one member of a test layer.
type file struct {
	tar.Header
	data string
}

var stamp = time.Date(2021, 3, 4, 5, 6, 7, 0, time.UTC)

func reg(name, data string) file {
	return file{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o640, Uid: 3, Gid: 4}, data}
}

func dir(name string, mode int64, uid int) file {
	return file{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, Uid: uid, Gid: uid}, ""}
}

func makeTar(t testing.TB, files ...file) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		f.Size = int64(len(f.data))
		f.ModTime = stamp
		if err := w.WriteHeader(&f.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(f.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// image has all that layers do to each other.
func image(t testing.TB) [][]byte {
	t.Helper()
	big := strings.Repeat("0123456789abcdef", 5000)
	xattr := reg("etc/x", "x")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.user.note": "hello", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}
	suid := reg("bin/su", "su")
	suid.Mode = 0o4755
	noted := dir("noted", 0o750, 6)
	noted.PAXRecords = map[string]string{"SCHILY.xattr.user.dir": "d"}
	return [][]byte{
		makeTar(t,
			reg(".wh.nothing", ""), // hides nothing in a lowest layer
			dir("tmp", 0o1777, 0), dir("m", 0o700, 5), dir("m/sub", 0o2755, 7), noted,
			dir("etc", 0o755, 0), dir("bin", 0o755, 0), xattr, suid,
			reg("m/gone", "gone"), reg("big", big), reg("empty", ""),
			file{tar.Header{Typeflag: tar.TypeLink, Name: "etc/hard", Linkname: "big"}, ""},
			file{tar.Header{Typeflag: tar.TypeSymlink, Name: "etc/sym", Linkname: "../big", Mode: 0o777}, ""},
			file{tar.Header{Typeflag: tar.TypeChar, Name: "dev", Mode: 0o600, Devmajor: 1, Devminor: 3}, ""},
			file{tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o644}, ""},
			dir("opaque", 0o755, 0), reg("opaque/old", "old"), reg("becomes", "file"),
		),
		makeTar(t,
			reg("m/new", "new"), reg("m/.wh.gone", ""), reg("noted/a/b", "b"),
			dir("opaque", 0o711, 1), reg("opaque/.wh..wh..opq", ""), reg("opaque/young", "young"),
			dir("becomes", 0o755, 2), reg("becomes/dir", big[:4097]),
		),
		makeTar(t, reg("m/sub/deep", "deep"), reg("tmp/t", "t"), reg("opaque/third", "3"), reg("noted/a/c", "c")),
		makeTar(t, reg("plain", "no implied directory here")),
		makeTar(t, reg(".wh.plain", ""), reg("m/sub/last", "last")),
	}
}

func inNamespace(t *testing.T) context.Context {
	return namespaces.WithNamespace(t.Context(), "test")
}
