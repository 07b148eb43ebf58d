package layer

import (
	"bytes"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// TestOnlyLowestEqualsContainerd: tars that containerd takes as the lowest layer only, where it deletes what a whiteout
// names, and refuses over others.
func TestOnlyLowestEqualsContainerd(t *testing.T) {
	t.Parallel()
	big := []member{dir("d")}
	for i := range 3 * indexFrom {
		big = append(big, file("d/"+longName(i+1), ""), file("d/.wh.w"+longName(i+1), ""))
	}
	for name, tar := range map[string][]byte{
		"file then whiteout":      makeTar(file("a", "x"), file("b", ""), file(".wh.a", "")),
		"whiteout twice":          makeTar(file(".wh.a", ""), file(".wh.a", ""), file("b", "")),
		"below a whiteout":        makeTar(file(".wh.a", ""), file("a/x", "x")),
		"far below a whiteout":    makeTar(file(".wh.a", ""), file("a/x/y", "x")),
		"whiteout of a tree":      makeTar(file("a/b/c", "x"), file("b", ""), file(".wh.a", ""), file("a/d", "")),
		"and back":                makeTar(file("a", "x"), file(".wh.a", ""), file("a", "new"), file(".wh.a", ""), file("a", "newer")),
		"one name of a hard link": makeTar(file("a", "x"), hardlink("b", "a"), file(".wh.a", "")),
		"earlier ones go too":     makeTar(file(".wh.w", ""), file("d/.wh.w", ""), file("a", ""), file(".wh.a", "")),
		"large directory":         makeTar(append(big, file("d/.wh."+longName(7), ""), file("d/w/x", ""))...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := applied(t, upperDir(t), tar); err == nil {
				t.Fatal("containerd takes it over other layers")
			}
			root := upperDir(t)
			if _, err := archive.Apply(t.Context(), root, bytes.NewReader(tar)); err != nil {
				t.Fatalf("containerd refuses it as the lowest: %v", err)
			}
			table := scanBytes(t, tar)
			if table.OnlyLowest() == nil {
				t.Error("nothing says that it can only be the lowest")
			}
			if _, err := table.Index([]Parent{table}); err == nil {
				t.Error("there is an index over another layer")
			}
			index, err := table.Index(nil)
			if err != nil {
				t.Fatal(err)
			}
			implied := map[string]bool{}
			walkTree(table.root, "/", func(path string, n *erofs.Inode) { implied[path] = table.inherit[n]&inheritMtime != 0 })
			noTime := func(path string) bool { return implied[path] }
			if d := diff(describeDisk(t, root, noTime), describeTree(t, index, tar, noTime)); d != "" {
				t.Errorf("trees differ:\n%s", d)
			}
		})
	}
}

// TestOnlyLowestRefuses what containerd refuses even there.
func TestOnlyLowestRefuses(t *testing.T) {
	t.Parallel()
	for name, tar := range map[string][]byte{
		"a directory's time is set at the end": makeTar(dir("a"), file(".wh.a", "")),
		"there is no whiteout to link to":      makeTar(file(".wh.a", ""), hardlink("b", "a"), file("a/x", "")),
		"a device is no whiteout":              makeTar(file("z", ""), file(".wh.z", ""), member{typ: '3', name: "c", mode: 0o600}, file("c/x", "")),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := archive.Apply(t.Context(), upperDir(t), bytes.NewReader(tar)); err == nil {
				t.Error("containerd takes it")
			}
			if _, err := Scan(t.Context(), bytes.NewReader(tar)); err == nil {
				t.Error("gantry takes it")
			}
		})
	}
}
