package corpus

import (
	"fmt"
	"slices"
	"strings"
)

// Images are all images whose layers overlayfs and gantry take.
func Images() []Image {
	return append([]Image{Together("cases", Cases())}, alone()...)
}

// Together makes one image of cases, each below a folder of its name.
func Together(name string, cases []Case) Image {
	var stacks [][]Member
	for _, c := range cases {
		for i, members := range c.Layers {
			if i == len(stacks) {
				stacks = append(stacks, nil)
			}
			if i == 0 {
				stacks[0] = append(stacks[0], owned(dir(c.Name, 0o751), 11, 12))
			}
			for _, m := range members {
				stacks[i] = append(stacks[i], m.below(c.Name))
			}
		}
	}
	im := Image{Name: name}
	for _, members := range stacks {
		im.Tars = append(im.Tars, Tar(members...))
	}
	return im
}

// below moves a member into a folder. A target that begins with "/" means the folder then.
func (m Member) below(folder string) Member {
	in := func(name string) string {
		rest, dot := strings.CutPrefix(name, "./")
		switch {
		case strings.HasPrefix(name, "/"):
			return "/" + folder + name
		case dot:
			return "./" + folder + "/" + rest
		}
		return folder + "/" + name
	}
	m.Name = in(m.Name)
	if m.Type == '1' || (m.Type == '2' && strings.HasPrefix(m.Link, "/")) {
		m.Link = in(m.Link)
	}
	for _, key := range []string{"path", "linkpath", "GNU.sparse.name"} {
		if v, ok := m.PAX[key]; ok {
			m = pax(m, key, in(v))
		}
	}
	return m
}

// alone are images about the root, about the end of a tar, and about how layers follow each other.
func alone() []Image {
	base := Tar(dir("./", 0o700), dir("d", 0o711), file("d/f", "f"), file("top", "t"), dir("sticky", 0o1777), dir("new", 0o755))
	over := Tar(file("d/g", "g"), file("sticky/x", "x"), file(".wh.top", ""))
	whole := []Member{file("a", strings.Repeat("a", 700)), file("b", strings.Repeat("b", 900))}
	tail := file("late", "late")
	images := []Image{
		{Name: "one layer", Tars: [][]byte{base}},
		{Name: "root", Tars: [][]byte{
			Tar(xattr(owned(mode(dir("./", 0), 0o700), 5, 6), "user.root", "1"), file("a", "a")), Tar(with(dir("/", 0o711), func(m *Member) { m.MTime = 99 }), file("/b", "b"), file(".", "no file")),
		}},
		{Name: "opaque root", Tars: [][]byte{base, Tar(file(".wh..wh..opq", ""), file("only", "this")), over}},
		{Name: "empty layers", Tars: [][]byte{nil, base, make([]byte, blockSize), Tar(), over, nil}},
		{Name: "nothing but empty layers", Tars: [][]byte{nil, Tar()}},
		{Name: "a layer twice", Tars: [][]byte{base, over, base, over}},
		{Name: "a layer twice in a row", Tars: [][]byte{base, base}},
		{Name: "no end", Tars: [][]byte{Open(whole...), Open(file("c", "c")), Open(whole...)[:blockSize+1024+blockSize+900]}},
		{Name: "one block at the end", Tars: [][]byte{append(Open(whole...), make([]byte, blockSize)...)}},
		{Name: "tars one after the other", Tars: [][]byte{append(Tar(whole...), Tar(tail)...), append(Open(whole...), Tar(tail)...)}},
		{Name: "after the end", Tars: [][]byte{append(Tar(whole...), "trailing junk, no tar"...), append(Tar(tail), make([]byte, 10240)...)}},
		{Name: "device 0/0 in a single layer", Tars: [][]byte{Tar(device('3', "zero", 0, 0), file("f", "f"))}, Except: []Exception{
			{"zero: missing", "overlay takes it for a whiteout: a container never sees it, on overlayfs neither; only a view of the bare layer does there"},
		}},
	}
	images = append(images, Image{Name: "file and whiteout in the lowest layer", Tars: [][]byte{
		Tar(file(".wh.early", ""), file("early/below", "b"), file("a", "a"), file(".wh.a", ""), file(".wh.a", ""), dir("t", 0o755), file("t/f", "f"), file("t/g", "g"), file("t/.wh.f", ""),
			file("again", "1"), file(".wh.again", ""), file("again", "2"), file("kept", "k")),
		over,
	}}, Image{Name: "opaque in the lowest layer", Tars: [][]byte{Tar(dir("d", 0o755), file("d/f", "f"), file("d/sub/x", "x"), file("d/.wh..wh..opq", "")), over}, Except: []Exception{
		{"d/sub: not wanted", "the mark hides what is below the layer, says the image specification; containerd deletes what the lowest layer itself only implies"},
		{"d/sub/x: not wanted", "as above"},
	}})
	many := Image{Name: "200 layers"}
	for i := range 200 {
		many.Tars = append(many.Tars, Tar(file(fmt.Sprintf("l/%03d", i), strings.Repeat("x", i)), file("last", fmt.Sprint(i)), file(fmt.Sprintf("l/.wh.%03d", i-3), "")))
	}
	return append(images, many)
}

// Refused are layers that are not taken, by gantry and, unless it is said, by containerd either.
func Refused() []Refusal {
	lower := Tar(dir("d", 0o755), file("d/f", "f"), file("a", "a"))
	long := strings.Repeat("p", 99) + "/"
	sparse := file("s", "data")
	sparse.Type = 'S'
	cut := Tar(file("whole", "w"), file("cut", strings.Repeat("c", 700)))
	return []Refusal{
		{Name: "hard link into a lower layer", Tars: [][]byte{lower, Tar(hardlink("h", "d/f"))}, Says: `hard link to "d/f", which is no earlier member of this layer`},
		{Name: "hard link to a later member", Tars: [][]byte{Tar(hardlink("h", "later"), file("later", "l"))}, Says: `hard link to "later", which is no earlier member`},
		{Name: "hard link to itself", Tars: [][]byte{Tar(file("a", "a"), hardlink("a", "a"))}, Says: `hard link to "a", which is no earlier member`},
		{Name: "hard link to a directory", Tars: [][]byte{Tar(dir("d", 0o755), hardlink("h", "d"))}, Says: `hard link to "d": operation not permitted`},
		{Name: "path over PATH_MAX", Tars: [][]byte{Tar(file(strings.Repeat(long, 42)+"f", "f"))}, Says: "file name too long"},
		{Name: "name of 256 bytes", Tars: [][]byte{Tar(file(strings.Repeat("n", 256), "f"))}, Says: "file name too long"},
		{Name: "symlink target over PATH_MAX", Tars: [][]byte{Tar(symlink("l", strings.Repeat("t", 4096)))}, Says: "target of 4096 bytes"},
		{Name: "symlink without a target", Tars: [][]byte{Tar(symlink("l", ""))}, Says: "symlink without a target"},
		{Name: "sparse file in GNU tar's old format", Tars: [][]byte{Tar(sparse)}, Says: "sparse files in the old GNU format are not supported"},
		{Name: "whiteout of no name", Tars: [][]byte{lower, Tar(file("d/.wh.", ""))}, Says: "whiteout of no name"},
		{Name: "whiteout of the directory itself", Tars: [][]byte{lower, Tar(file("d/.wh..", ""))}, Says: "whiteout of no name"},
		{Name: "whiteout of the parent", Tars: [][]byte{lower, Tar(file("d/.wh...", ""))}, Says: "whiteout of no name"},
		{Name: "file and then its whiteout", Tars: [][]byte{lower, Tar(file("a", "a"), file(".wh.a", ""))}, Says: `whiteout of "a", which this layer has`},
		{Name: "whiteout twice", Tars: [][]byte{lower, Tar(file(".wh.a", ""), file(".wh.a", ""))}, Says: `whiteout of "a", which this layer has`},
		{Name: "below a whiteout", Tars: [][]byte{lower, Tar(file(".wh.d", ""), file("d/x", "x"))}, Says: "not a directory"},
		{Name: "below a file", Tars: [][]byte{Tar(file("f", "f"), file("f/x", "x"))}, Says: "not a directory"},
		{Name: "symlink loop as a parent", Tars: [][]byte{Tar(symlink("a", "b"), symlink("b", "a"), file("a/f", "f"))}, Says: "too many"},
		{Name: "unknown type", Tars: [][]byte{Tar(Member{Type: 'V', Name: "label"})}, Says: "unknown type"},
		{Name: "device number out of range", Tars: [][]byte{Tar(device('3', "c", 1<<33, 0))}, Says: "out of range"},
		{Name: "extended attribute over 64 KiB", Tars: [][]byte{Tar(xattr(file("f", ""), "user.big", strings.Repeat("v", 1<<16+1)))}, Says: "argument list too long"},
		{Name: "end within a file", Tars: [][]byte{cut[:len(cut)-1024-400]}, Says: "the tar ends before its data"},
		{Name: "block of zeros between members", Tars: [][]byte{slices.Concat(Open(file("a", "a")), make([]byte, blockSize), Tar(file("b", "b")))}, Says: "header after member"},
		{Name: "damaged header", Tars: [][]byte{slices.Concat(Open(file("a", "a")), []byte("X"), Tar(file("b", "b"))[1:])}, Says: "header after member"},
		{Name: "no tar", Tars: [][]byte{[]byte(strings.Repeat("no tar ", 300))}, Says: "first tar header"},
	}
}

// Extra is a stack of tars that containerd refuses and gantry takes, where layers are mounted: nothing in them is unsafe.
type Extra struct {
	Name string
	Tars [][]byte
	// Path is in the last layer.
	Path string
	// Xattr is an attribute of it, and Value what it is; "" for none.
	Xattr, Value string
	// Everywhere says that gantry takes it also where layers are directories.
	Everywhere bool
}

// Taken are what gantry takes and containerd does not.
func Taken() []Extra {
	big := strings.Repeat("v", 60<<10)
	return []Extra{
		{Name: "extended attribute of 60 KiB", Tars: [][]byte{Tar(xattr(file("f", "f"), "user.big", big))}, Path: "f", Xattr: "user.big", Value: big}, // ext4 has room for 4 KiB, XFS for 64
		{Name: "implied directory below a file of a lower layer", Tars: [][]byte{Tar(file("a", "a")), Tar(file("a/b/c", "c"))}, Path: "a/b/c"},
		{Name: "implied directory below a whiteout of a lower layer", Tars: [][]byte{Tar(dir("a", 0o755)), Tar(file(".wh.a", "")), Tar(file("a/b/c", "c"))}, Path: "a/b/c"},
		{Name: "implied directory below a symlink loop of a lower layer", Tars: [][]byte{Tar(symlink("a", "a")), Tar(file("a/b", "b"))}, Path: "a/b"},
		{Name: "hard link to a whiteout in the lowest layer", Tars: [][]byte{Tar(file(".wh.a", ""), hardlink("b", "a"), file("c", "c"))}, Path: "c", Everywhere: true},
	}
}

// DefaultACL is an image whose upper layer has a new file and directory in a directory of the lower one that has a default
// ACL, and that it only implies.
func DefaultACL() Image {
	named := acl(1, 7, 0, 2, 5, 1000, 4, 5, 0, 0x10, 7, 0, 0x20, 1, 0)
	return Image{Name: "default ACL of a lower layer", Tars: [][]byte{Tar(xattr(dir("d", 0o755), "system.posix_acl_default", named)), Tar(file("d/f", "f"), dir("d/sub", 0o700))}}
}
