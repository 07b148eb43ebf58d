package integration

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/corpus"
	"github.com/gantryd/gantry/integration/harness"
)

// TestTree compares, entry by entry, what gantry mounts with what containerd's
// overlayfs snapshotter makes of the same image.
func TestTree(t *testing.T) {
	r := newRegistry(t)
	ours := newNode(t, harness.Options{})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	if err := ours.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	for i, c := range treeCases() {
		t.Run(c.name, func(t *testing.T) {
			im, ref := push(t, r, r.Host(), fmt.Sprint("tree", i), c.spec)
			compareTrees(t, ours, theirs, im, ref)
		})
	}
}

// bothWays are the namespaces of the two ways of pulling with ctr, and their arguments.
var bothWays = map[string][]string{"transfer": nil, "local": {"--local"}}

// oneWay is one of them, for images that differ from others in their size alone.
var oneWay = map[string][]string{"transfer": nil}

// compareTrees pulls the image on both nodes, in a namespace of its own for each way of pulling.
func compareTrees(t *testing.T, ours, theirs *harness.Node, im *harness.Image, ref string, except ...corpus.Exception) {
	t.Helper()
	compareWays(t, bothWays, ours, theirs, im, ref, except...)
}

func compareWays(t *testing.T, ways map[string][]string, ours, theirs *harness.Node, im *harness.Image, ref string, except ...corpus.Exception) {
	t.Helper()
	mustPull(t, theirs, "default", ref)
	want, err := theirs.Tree(t.Context(), "default", im)
	if err != nil {
		t.Fatal(err)
	}
	for namespace, args := range ways {
		mustPull(t, ours, namespace, ref, args...)
		got, err := ours.Tree(t.Context(), namespace, im)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range corpus.Compare(want, got, started, except...) {
			t.Error(namespace, ": ", line)
		}
	}
	t.Logf("%d entries compared", len(want))
}

type treeCase struct {
	name string
	spec harness.ImageSpec
}

// treeCases are what tars of images hold, and what hostile ones try.
func treeCases() []treeCase {
	layers := func(tars ...harness.TarFunc) harness.ImageSpec {
		var s harness.ImageSpec
		for _, tar := range tars {
			s.Layers = append(s.Layers, harness.LayerSpec{Tar: tar})
		}
		return s
	}
	docker := layers(everyType(), everyType())
	docker.Docker = true
	packed := harness.ImageSpec{Layers: []harness.LayerSpec{
		{Tar: everyType(), Compression: harness.Zstd},
		{Tar: harness.Entries(harness.File("plain", "text")), Compression: harness.Uncompressed},
		{Tar: harness.Noise("n", 3, 3<<20, 5), Compression: harness.Gzip},
	}}
	return []treeCase{
		{name: "every type", spec: layers(everyType())},
		{name: "docker media types", spec: docker},
		{name: "zstd, plain and gzip", spec: packed},
		{name: "whiteouts", spec: layers(base(), whiteouts())},
		{name: "whiteouts in the lowest layer", spec: layers(whiteouts())},
		{name: "types replaced", spec: layers(base(), replaced())},
		{name: "implied directories", spec: layers(base(), implied(), implied())},
		{name: "hostile names", spec: layers(base(), hostile())},
		{name: "sparse and large", spec: layers(zeros())},
	}
}

func entry(kind byte, name string, mode int64, change func(h *tar.Header)) harness.Entry {
	e := harness.Entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: mode}}
	if change != nil {
		change(&e.Header)
	}
	return e
}

func everyType() harness.TarFunc {
	long := strings.Repeat("long-name-", 20)
	pax := func(k, v string) func(*tar.Header) {
		return func(h *tar.Header) { h.PAXRecords = map[string]string{k: v} }
	}
	xattr := entry(tar.TypeReg, "xattr", 0o644, pax("SCHILY.xattr.user.colour", "blue"))
	capable := entry(tar.TypeReg, "capable", 0o755, pax("SCHILY.xattr.security.capability",
		"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	return harness.Entries(
		harness.Folder("dir", 0o751),
		harness.File("dir/file", "content"),
		harness.File("empty", ""),
		harness.File("dir/block", strings.Repeat("x", 4096)),
		harness.File("dir/odd", strings.Repeat("y", 4097)),
		entry(tar.TypeReg, "setuid", 0o4755, nil),
		entry(tar.TypeReg, "owned", 0o640, func(h *tar.Header) { h.Uid, h.Gid = 70000, 80000 }),
		entry(tar.TypeReg, "old", 0o600, func(h *tar.Header) { h.ModTime = time.Unix(-1000, 0) }),
		entry(tar.TypeReg, "fraction", 0o600, func(h *tar.Header) { h.ModTime = time.Unix(1700000000, 123456789); h.Format = tar.FormatPAX }),
		harness.Symlink("link", "dir/file"), harness.Symlink("dangling", "/nowhere/"+long),
		entry(tar.TypeLink, "hard", 0o644, func(h *tar.Header) { h.Linkname = "dir/file" }),
		entry(tar.TypeLink, "dir/hard2", 0o644, func(h *tar.Header) { h.Linkname = "/hard" }),
		entry(tar.TypeChar, "null", 0o666, func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 }),
		entry(tar.TypeBlock, "disk", 0o660, func(h *tar.Header) { h.Devmajor, h.Devminor = 259, 70000 }),
		entry(tar.TypeFifo, "fifo", 0o644, nil),
		xattr, capable,
		harness.File(long+"/"+long, "long"), harness.File("grüße/日本", "unicode"),
		harness.Folder("dir", 0o700), // once more: the last one counts
		harness.File("twice", "first"), harness.File("twice", "the second"),
	)
}

func base() harness.TarFunc {
	return harness.Entries(
		harness.Folder("d", 0o711), harness.Folder("d/deep", 0o2755), harness.File("d/deep/a", "a"), harness.File("d/deep/b", "b"),
		harness.Folder("opaque", 0o755), harness.File("opaque/hidden", "x"), harness.Folder("opaque/sub", 0o755), harness.File("opaque/sub/f", "x"),
		harness.Folder("w", 0o755), harness.File("w/gone", "x"), harness.File("w/stays", "y"),
		harness.Folder("sticky", 0o1777), harness.File("sticky/old", "x"),
		harness.File("file", "f"), harness.Symlink("link", "d"), harness.Folder("target", 0o755),
	)
}

func whiteouts() harness.TarFunc {
	return harness.Entries(
		harness.File("w/.wh.gone", ""), harness.File("d/deep/.wh.a", ""), harness.File(".wh.file", ""), harness.File(".wh.never", ""),
		harness.File("opaque/.wh..wh..opq", ""), harness.File("opaque/new", "n"), harness.File(".wh.target", ""), harness.Folder("target", 0o700),
	)
}

func replaced() harness.TarFunc {
	return harness.Entries(
		harness.Folder("file", 0o755), harness.File("file/inside", "now a directory"),
		harness.File("w", "now a file"), harness.File("link/inside", "the link is a directory now"),
		harness.Symlink("d/deep", "../opaque"),
	)
}

func implied() harness.TarFunc {
	return harness.Entries(harness.File("d/deep/c", "c"), harness.File("sticky/new", "n"), harness.File("new/a/b/c", "c"))
}

// hostile names must end where containerd's archive package puts them, and never outside.
func hostile() harness.TarFunc {
	return harness.Entries(
		harness.File("up/../../../escaped", "1"), harness.File("/abs/file", "2"), harness.File("./dot/./file", "3"),
		harness.Symlink("through", "target"), harness.File("through/file", "4"),
		harness.Symlink("out", "/etc"), harness.File("out/passwd-gantry", "5"),
		harness.Symlink("rel", "../../../../tmp"), harness.File("rel/gantry-escaped", "6"),
	)
}

func zeros() harness.TarFunc {
	return harness.Entries(
		harness.File("holes", "head"+strings.Repeat("\x00", 5<<20)+"tail"),
		harness.File("all-zero", strings.Repeat("\x00", 1<<20)),
		harness.File("after", "after"),
	)
}

// TestCompareTreesSeesDifferences holds the comparer itself against a tree that differs in everything.
func TestCompareTreesSeesDifferences(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for i, dir := range []string{a, b} {
		file := filepath.Join(dir, "file")
		for _, err := range []error{
			os.WriteFile(file, []byte{byte(i)}, 0o600),
			os.Chmod(file, os.FileMode(0o600+i)),
			os.Chown(file, i, i),
			unix.Setxattr(file, "user.x", []byte{byte(i)}, 0),
			os.Chtimes(file, time.Unix(int64(i), 0), time.Unix(int64(i), 0)),
			os.Symlink(fmt.Sprint(i), filepath.Join(dir, "link")),
			unix.Mknod(filepath.Join(dir, "dev"), unix.S_IFCHR|0o600, i),
			os.WriteFile(filepath.Join(dir, fmt.Sprintf("only%d", i)), nil, 0o600),
			os.Link(filepath.Join(dir, fmt.Sprintf("only%d", i)), filepath.Join(dir, "same")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	want, err := harness.WalkTree(a)
	if err != nil {
		t.Fatal(err)
	}
	got, err := harness.WalkTree(b)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Join(harness.CompareTrees(want, got, nil), "\n")
	for _, what := range []string{"file: mode", "file: uid", "file: gid", "file: xattrs", "file: mtime", "file: content", "link: target",
		"dev: rdev", "only0: missing", "only1: not wanted", "same: hard-link group"} {
		if !strings.Contains(lines, what) {
			t.Errorf("no line %q in\n%s", what, lines)
		}
	}
}
