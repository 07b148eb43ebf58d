package layer

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// What is looked up in a parent takes one step for each name of the path: with more, an image of one file in 2000 implied
// directories kept a core busy for a minute.
func TestLookupDeep(t *testing.T) {
	t.Parallel()
	deep := strings.Repeat("d/", 1000)
	table := scanBytes(t, makeTar(file(deep+"f", "")))
	steps, find := 0, table.find
	table.find = func(dir *erofs.Inode, name string) *erofs.Inode {
		steps++
		return find(dir, name)
	}
	for path, want := range map[string]Kind{
		"/" + deep[:len(deep)-1]:                     Implied,
		"/" + deep + "f":                             Other,
		"/" + deep + "nothing":                       Absent,
		"/x" + strings.Repeat("/d", 1000):            Absent,
		"/" + deep + "x" + strings.Repeat("/d", 900): Absent,
	} {
		steps = 0
		a, kind, err := table.Lookup(path)
		if err != nil || kind != want || a.Path != path {
			t.Errorf("%.20s of %d bytes: kind %d, path of %d bytes, %v; want kind %d", path, len(path), kind, len(a.Path), err, want)
		}
		if names := strings.Count(path, "/"); steps > names {
			t.Errorf("%.20s: %d steps for %d names", path, steps, names)
		}
	}
}

// A tar's names may be a MiB long, but an error goes into a pod's events: it shows the beginning of them.
func TestErrorsAreShort(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("name/", 200_000)
	short := makeTar(pax(file("f", strings.Repeat("x", 10_000)), "path", "n"+long[:5000]))
	for name, tar := range map[string][]byte{
		"name":      makeTar(pax(file("f", "x"), "path", long+"f")),
		"hard link": makeTar(pax(hardlink("f", "x"), "linkpath", long+"f")),
		"short":     short[:len(short)-4096],
	} {
		_, err := Scan(t.Context(), bytes.NewReader(tar))
		if err == nil || len(err.Error()) > 1000 || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: error %.200v of %d bytes", name, err, len(fmt.Sprint(err)))
		}
	}
}
