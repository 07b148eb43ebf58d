package layer

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/short"
	"github.com/gantryd/gantry/snapshotter/erofs"
)

// How describe shows what the bottom layer leaves out.
var (
	regexpWhiteout = regexp.MustCompile(`mode=2[0-7]{4} .*rdev=0( |$)`)
	regexpOpaque   = regexp.MustCompile(` trusted\.overlay\.opaque="y"`)
)

// chain is a stack of layers, unpacked by containerd and scanned by gantry;
// both lists begin with the nearest parent.
type chain struct {
	dirs   []string
	tables []Parent
	onDisk []Parent
}

// push applies one more layer. It reports false where containerd fails though
// the tar is good: for a directory below a parent's whiteout.
func (c *chain) push(t testing.TB, tar []byte) bool {
	t.Helper()
	root := upperDir(t)
	table, err := scan(t.Context(), newFileSource(bytes.NewReader(tar)), len(root))
	want := applied(t, root, tar, c.dirs...)
	if err == nil {
		err = table.OnlyLowest()
	}
	if err != nil {
		if want == nil {
			t.Fatalf("containerd takes the layer, gantry: %v", err)
		}
		return false
	}
	for name, parents := range map[string][]Parent{"tables": c.tables, "directories": c.onDisk} {
		index, err := table.Index(parents)
		if err != nil {
			t.Fatalf("Index over %s: %v", name, err)
		}
		if want == nil {
			c.compare(t, root, index, table, tar, name)
		}
	}
	c.dirs = slices.Insert(c.dirs, 0, root)
	c.tables = slices.Insert(c.tables, 0, Parent(table))
	c.onDisk = slices.Insert(c.onDisk, 0, Parent(DirParent(root)))
	return want == nil
}

func (c *chain) compare(t testing.TB, root string, index *erofs.Inode, table *Table, tar []byte, name string) {
	t.Helper()
	noTime := map[string]bool{}
	walkTree(table.root, "/", func(path string, n *erofs.Inode) {
		noTime[path] = table.inherit[n]&inheritMtime != 0 || isWhiteout(n)
	})
	skip := func(path string) bool { return noTime[path] }
	disk, tree := describeDisk(t, root, skip), describeTree(t, index, tar, skip)
	if len(c.dirs) == 0 {
		bottom := slices.DeleteFunc(disk, func(line string) bool { return regexpWhiteout.MatchString(line) })
		for i := range bottom {
			bottom[i] = regexpOpaque.ReplaceAllString(bottom[i], "")
		}
		disk = bottom
	}
	if d := diff(disk, tree); d != "" {
		t.Fatalf("layer %d over %s differs:\n%s", len(c.dirs), name, d)
	}
}

func mode(m member, mode int64) member { m.mode = mode; return m }
func owner(m member, uid, gid int64) member {
	m.uid, m.gid = uid, gid
	return m
}

func TestIndexEqualsContainerd(t *testing.T) {
	t.Parallel()
	sticky := xattr(owner(mode(dir("m"), 0o1770), 3, 4), "user.k", "v", "security.x", "y")
	cases := map[string][][]byte{
		"implied":          {makeTar(sticky), makeTar(file("m/new", ""))},
		"two down":         {makeTar(sticky), makeTar(file("other", "")), makeTar(file("m/new", ""))},
		"implied twice":    {makeTar(sticky), makeTar(file("m/a", "")), makeTar(file("m/b", ""))},
		"nowhere":          {makeTar(file("x", "")), makeTar(file("m/n/o", ""))},
		"bottom":           {makeTar(file("m/n/o", ""), file(".wh.w", ""), file("m/.wh..wh..opq", ""), file("p/.wh.q", ""))},
		"below whiteout":   {makeTar(sticky), makeTar(file(".wh.m", "")), makeTar(file("m/a", ""))},
		"below opaque":     {makeTar(dir("d"), owner(mode(dir("d/m"), 0o700), 1, 1)), makeTar(dir("d"), file("d/.wh..wh..opq", "")), makeTar(file("d/m/a", ""))},
		"below file":       {makeTar(sticky), makeTar(file("m", "")), makeTar(file("m/a", ""))},
		"own opaque":       {makeTar(sticky), makeTar(file("m/.wh..wh..opq", ""), file("m/a", ""))},
		"through link":     {makeTar(dir("usr"), mode(dir("usr/lib"), 0o711), symlink("lib", "usr/lib")), makeTar(file("lib/a", ""))},
		"link and implied": {makeTar(dir("usr"), mode(dir("usr/lib"), 0o711)), makeTar(symlink("lib", "usr/lib"), file("usr/lib/x", "")), makeTar(file("lib/a", ""))},
		"absolute link":    {makeTar(mode(dir("gantry-x"), 0o711), symlink("lib", "/gantry-x")), makeTar(file("lib/a", ""))},
		"link outside":     {makeTar(symlink("lib", "../../../../gantry-x"), mode(dir("gantry-x"), 0o711)), makeTar(file("lib/a", ""))},
		"link of link":     {makeTar(mode(dir("c"), 0o711), symlink("b", "c"), symlink("a", "b")), makeTar(file("a/f", ""))},
		"link to link/in":  {makeTar(mode(dir("c"), 0o711), mode(dir("c/d"), 0o500), symlink("b", "c"), symlink("a", "b/d")), makeTar(file("a/f", ""))},
		"setgid":           {makeTar(owner(mode(dir("g"), 0o2775), 5, 50)), makeTar(file("g/n/o", ""))},
		"setgid in layer":  {makeTar(dir("g"), mode(dir("g/n"), 0o750)), makeTar(owner(mode(dir("g"), 0o2775), 5, 50), file("g/n/o", ""), file("g/q/o", ""))},
		"later header":     {makeTar(sticky), makeTar(file("m/a", ""), xattr(mode(dir("m"), 0o755), "user.k", "mine", "user.l", "2"))},
		"later than child": {makeTar(sticky), makeTar(file("m/a", ""), mode(dir("m"), 0o755)), makeTar(file("m/b", ""))},
		"time by link":     {makeTar(sticky), makeTar(file("m/a", ""), dir("z"), symlink("z", "m")), makeTar(file("m/b", ""))},
		"root":             {makeTar(mode(dir("./"), 0o700)), makeTar(file("a", ""))},
	}
	for name, tars := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var c chain
			for i, tar := range tars {
				if !c.push(t, tar) {
					t.Fatalf("containerd refuses layer %d", i)
				}
			}
		})
	}
}

// TestIndexWhereContainerdFails: containerd cannot unpack these (ENOTDIR or a
// loop in a parent's directory); the index takes its default mode instead.
func TestIndexWhereContainerdFails(t *testing.T) {
	t.Parallel()
	cases := map[string][][]byte{
		"below whiteout of parent": {makeTar(dir("a"), mode(dir("a/m"), 0o700)), makeTar(file(".wh.a", "")), makeTar(file("a/m/x", ""))},
		"loop in parent":           {makeTar(symlink("a", "a")), makeTar(file("a/m", ""))},
	}
	for name, tars := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var c chain
			for i, tar := range tars {
				if ok := c.push(t, tar); ok != (i < len(tars)-1) {
					t.Fatalf("layer %d: containerd takes it: %v", i, ok)
				}
			}
			last := c.tables[0].(*Table)
			index, err := last.Index(c.tables[1:])
			if err != nil {
				t.Fatal(err)
			}
			walkTree(index, "/", func(path string, n *erofs.Inode) {
				if isDir(n) && n.Mode != unix.S_IFDIR|0o755 {
					t.Errorf("%s has mode %o, want the default", path, n.Mode)
				}
			})
		})
	}
}

func TestRandomChainsEqualContainerd(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 6))
	pushed, chains := 0, short.Size(500, 100)
	for range chains { //nolint:paralleltest // they count together
		var layers [][]byte
		for range 3 {
			// Short ones: few of the long ones are accepted.
			layers = append(layers, (&choices{data: randomBytes(r, 15+r.IntN(60)), noDefaultACL: true}).makeTar())
		}
		t.Run("", func(t *testing.T) {
			var c chain
			for _, tar := range layers {
				if !c.push(t, tar) {
					return
				}
				pushed++
			}
		})
	}
	t.Logf("%d layers compared", pushed)
	if pushed < chains*3/5 {
		t.Errorf("only %d layers were compared: that says little", pushed)
	}
}

func TestIndexSharesTheTable(t *testing.T) {
	t.Parallel()
	table := scanBytes(t, makeTar(dir("d"), file("d/f", "x"), file("top", "")))
	if table.Implies() {
		t.Error("a tar with all its directories implies none")
	}
	index, err := table.Index(nil)
	if err != nil || index != table.root {
		t.Errorf("Index of a plain layer: %v, copied: %v", err, index != table.root)
	}
	if !scanBytes(t, makeTar(file("d/f", "x"))).Implies() {
		t.Error("d is implied")
	}
}

func TestImpliedTakeTheParentsTime(t *testing.T) {
	t.Parallel()
	bottom := scanBytes(t, makeTar(dir("m")))
	middle := scanBytes(t, makeTar(file("m/a", "")))
	top := scanBytes(t, makeTar(file("m/b", "")))
	index, err := top.Index([]Parent{middle, bottom})
	if err != nil {
		t.Fatal(err)
	}
	if m := findSorted(index, "m"); m.Mtime != 1000 {
		t.Errorf("mtime of m is %d, want its first layer's 1000", m.Mtime)
	}
}

// TestDirParentStaysInside: links out of a directory layer lead nowhere.
func TestDirParentStaysInside(t *testing.T) {
	t.Parallel()
	outside, root := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(outside, "secret"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"abs": outside, "rel": "../" + filepath.Base(outside), "self": "self", "file": "/f/x"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]Kind{"/abs/secret": Absent, "/rel/secret": Absent, "/self": Other, "/f": Other, "/f/x": Other, "/none": Absent, "/": Directory, "/file": Other} {
		if _, kind, err := DirParent(root).Lookup(path); err != nil || kind != want {
			t.Errorf("Lookup(%q) = kind %d, %v; want kind %d", path, kind, err, want)
		}
	}
	if _, _, err := DirParent(filepath.Join(root, "gone")).Lookup("/"); err == nil {
		t.Error("a missing directory layer is no error")
	}
}
