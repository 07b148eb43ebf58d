package corpus

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// Cases are the subjects that can share an image: none says anything of the root, or of how a tar ends.
func Cases() []Case {
	var all []Case
	for _, group := range []func() []Case{whiteouts, links, names, attributes, order} {
		all = append(all, group()...)
	}
	return append(all, sparse()...)
}

// Named are the cases of these names; one that does not exist panics.
func Named(names ...string) []Case {
	var some []Case
	for _, c := range Cases() {
		if slices.Contains(names, c.Name) {
			some = append(some, c)
		}
	}
	if len(some) != len(names) {
		panic(fmt.Sprintf("corpus: %d of the cases %q exist", len(some), names))
	}
	return some
}

func layers(l ...[]Member) [][]Member { return l }

func whiteouts() []Case {
	tree := func() []Member {
		return []Member{
			dir("d", 0o711), file("d/a", "a"), file("d/b", "b"), owned(dir("d/sub", 0o2750), 5, 6), file("d/sub/f", "f"), dir("d/sub/deep", 0o700),
			file("file", "file"), symlink("link", "d"), symlink("dangling", "nowhere"), device('3', "char", 1, 3), hardlink("hard", "file"),
		}
	}
	return []Case{
		{"whiteouts", layers(tree(), []Member{
			file(".wh.file", ""), file(".wh.d", ""), file(".wh.link", ""), file(".wh.dangling", ""), file(".wh.char", ""), file(".wh.missing", ""), file("no/.wh.where", ""),
		})},
		{"whiteouts-below", layers(tree(), []Member{file("d/.wh.a", ""), file("d/sub/.wh.deep", ""), file(".wh.hard", "")})},
		{"whiteouts-typed", layers(tree(), []Member{dir(".wh.d", 0o755), symlink(".wh.file", "x"), device('4', ".wh.link", 7, 7), with(file(".wh.hard", "has data"), func(m *Member) { m.UID = 9 })})},
		{"whiteout-and-back", layers(tree(), []Member{file(".wh.d", "")}, []Member{dir("d", 0o700), file("d/new", "n")}, []Member{file("d/.wh.new", "")}, []Member{file("d/again", "g")})},
		{"whiteout-then-entry", layers(tree(), []Member{file(".wh.file", ""), file("file", "new"), file(".wh.d", ""), mode(dir("d", 0), 0o500), file("d/only", "only")})},
		{"whiteout-through-link", layers([]Member{dir("real", 0o755), file("real/x", "x")}, []Member{dir("real", 0o755), symlink("l", "real"), file("l/.wh.x", "")})},
		{"whiteout-odd", layers(append(tree(), file("kept", "")), []Member{file(".wh..wh.foo", ""), file(".wh....", ""), file("d/.wh. ", ""), file(".wh.a\nb", ""), file("wh.file", "no whiteout"), file(".whfile", "nor this")})},
		{"opaque-before", layers(tree(), []Member{dir("d", 0o755), file("d/.wh..wh..opq", ""), file("d/new", "n"), dir("d/sub", 0o711)})},
		{"opaque-after", layers(tree(), []Member{dir("d", 0o755), file("d/new", "n"), file("d/a", "a2"), dir("d/sub", 0o711), file("d/.wh..wh..opq", "")})},
		{"opaque-implied", layers(tree(), []Member{file("d/.wh..wh..opq", ""), file("d/sub/new", "n")})},
		{"opaque-twice", layers(tree(), []Member{file("d/.wh..wh..opq", "")}, []Member{file("d/x", "x"), dir("d/sub", 0o755)}, []Member{file("d/.wh..wh..opq", ""), file("d/.wh..wh..opq", ""), file("d/y", "y")})},
		{"opaque-new", layers(tree(), []Member{dir("fresh", 0o755), file("fresh/.wh..wh..opq", ""), file("fresh/f", "f")})},
		{"opaque-over-file", layers(tree(), []Member{dir("file", 0o755), file("file/.wh..wh..opq", ""), file("file/f", "f")})},
		{"opaque-replaced", layers(tree(), []Member{dir("d", 0o755), file("d/.wh..wh..opq", ""), file("d", "a file"), dir("d", 0o755), file("d/z", "z")})},
		{"lowest", layers([]Member{file(".wh.gone", ""), file("m/.wh.gone", ""), dir("time", 0o755), file("time/.wh.gone", ""), dir("o", 0o755), file("o/.wh..wh..opq", ""), file("o/f", "f"), file(".wh.back", ""), file("back", "b")}, []Member{file("m/f", "f")})},
		{"five-layers", layers(
			[]Member{dir("x", 0o755), file("x/1", "1"), dir("x/s", 0o700), file("x/s/1", "1")},
			[]Member{file("x", "a file")},
			[]Member{mode(dir("x", 0), 0o711), file("x/3", "3")},
			[]Member{symlink("x", "elsewhere")},
			[]Member{dir("x", 0o750), file("x/5", "5"), dir("x/s", 0o755)},
		)},
		{"device-zero", layers(tree(), []Member{device('3', "file", 0, 0), device('3', "d/a", 0, 0), device('3', "other", 0, 0)})},
		{"empty-layers", layers(tree(), nil, []Member{file("top", "t")}, nil)},
	}
}

func links() []Case {
	return []Case{
		{"hard-links", layers([]Member{
			file("a", "xyz"), hardlink("b", "a"), hardlink("d/c", "/b"), file("other", "o"), hardlink("d/other", "./other"),
			mode(owned(hardlink("last", "d/c"), 7, 8), 0o4711), device('6', "pipe", 0, 0), hardlink("pipe2", "pipe"), device('3', "null", 1, 3), hardlink("null2", "null"),
		})},
		{"hard-link-to-symlink", layers([]Member{symlink("l", "nowhere"), hardlink("h", "l"), dir("d", 0o755), symlink("toroot", "d"), hardlink("d/h", "toroot")})},
		{"hard-link-through-symlink", layers([]Member{dir("d", 0o755), file("d/f", "f"), symlink("l", "d"), hardlink("h", "l/f"), symlink("abs", "/d"), hardlink("h2", "abs/f")})},
		{"hard-link-replaced", layers([]Member{file("a", "old"), hardlink("b", "a"), file("a", "new"), hardlink("c", "b"), hardlink("a", "c")}, []Member{file("b", "upper")}, []Member{file(".wh.c", "")})},
		{"hard-link-over-directory", layers([]Member{file("a", "x"), dir("d", 0o755), file("d/f", "gone"), hardlink("d", "a")})},
		{"hard-links-in-two-layers", layers([]Member{file("a", "1"), hardlink("b", "a")}, []Member{file("a", "2"), hardlink("c", "a")})},
		{"symlink-loops", layers([]Member{symlink("a", "b"), symlink("b", "a"), symlink("self", "self"), symlink("deep/x", "../deep/x/y")})},
		{"symlink-parents", layers(
			[]Member{dir("real", 0o700), symlink("l", "real"), file("l/f", "x"), dir("l/d", 0o711), symlink("abs", "/real"), file("abs/g", "y"), symlink("chain", "l"), file("chain/h", "z"), symlink("up", "../symlink-parents/real"), file("up/i", "w")},
			[]Member{file("l/over", "a directory of this name hides the link")},
		)},
		{"symlink-to-nothing", layers([]Member{symlink("l", "no/where"), file("l/f", "x"), symlink("abs", "/gantry-no/where"), file("abs/f", "y")})},
		{"symlink-targets", layers([]Member{symlink("long", strings.Repeat("t", 4095)), symlink("odd", "\xff\xfe\n "), symlink("abs", "/etc/passwd"), symlink("up", strings.Repeat("../", 40)+"etc")})},
		{"symlink-over-directory", layers([]Member{dir("d", 0o755), file("d/f", "f"), symlink("s", "d")}, []Member{symlink("d", "s"), dir("s", 0o711), file("s/g", "g")})},
	}
}

func names() []Case {
	long := strings.Repeat("n", 255)
	deep := ""
	for len(deep) < 3700 {
		deep += strings.Repeat("p", 60) + "/"
	}
	odd := []string{"\xff\xfe", "a\nb", "a\tb", `back\slash`, `"quoted"`, "co:lon,comma", " space ", "-dash", "gr\u00fc\u00dfe", "gru\u0308\u00dfe", "...", ".hidden", "a..b", "\x01", "%s%n", "PAX=1"}
	var oddly []Member
	for i, n := range odd {
		oddly = append(oddly, file(n, fmt.Sprint(i)), file("in/"+n+"/f", fmt.Sprint(i)))
	}
	inPAX := func(m Member) Member { m.PAXNames = true; return m }
	return []Case{
		{"names-255", layers([]Member{file(long, "1"), dir("d", 0o755), dir("d/"+long, 0o700), file("d/"+long+"/"+long, "2"), symlink("d/s"+long[1:], long)}, []Member{file("d/"+long+"/.wh."+long[4:], "no such name"), file(".wh."+long[:251], "")})},
		{"names-odd", layers(oddly, []Member{file(".wh.\xff\xfe", ""), file("in/a\nb/.wh.f", "")})},
		{"names-deep", layers([]Member{file(deep+"f", "gnu"), hardlink("short", deep+"f"), inPAX(file(deep+"g", "pax"))}, []Member{file(deep+".wh.f", ""), inPAX(file(deep+"h", "implied"))})},
		{"names-pax", layers([]Member{inPAX(file(strings.Repeat("p", 101), "1")), inPAX(symlink("l", strings.Repeat("t", 200))), pax(file("short", "2"), "path", "from-pax"), pax(hardlink("h", "x"), "linkpath", "from-pax"), pax(dir("ignored", 0o755), "path", "pax-dir/")})},
		{"names-gnu", layers([]Member{file(strings.Repeat("g", 101), "1"), symlink("l", strings.Repeat("t", 200)), file(strings.Repeat("g/", 60)+"f", "2")})},
		{"names-slashes", layers([]Member{file("./a", "1"), dir("./d/", 0o711), file("./d//b", "2"), file("/names-slashes-root/c", "3"), dir("e///", 0o700), file("e/./f", "4"), with(file("type-nul-dir/", ""), func(m *Member) { m.Type = 0 }), with(file("type-nul", "5"), func(m *Member) { m.Type = 0 })}, []Member{file("./d/./.wh.b", "")})},
		{"names-dotdot", layers([]Member{dir("a", 0o755), file("a/../b", "1"), file("a/c/../../d", "2"), file("../../../dotdot-escaped", "3"), file("../names-dotdot/e", "4"), symlink("l", "../../../../dotdot-outside"), file("l/f", "5"), dir("a/../g/", 0o711)})},
		{"names-implied", layers([]Member{file("a/b/c/d", "1")}, []Member{owned(dir("a/b", 0o1777), 3, 4)}, []Member{file("a/b/c/e", "2"), symlink("a/b/x/l", "y")})},
	}
}

// order is about the order of members, and about members of one name.
func order() []Case {
	return []Case{
		{"twice", layers([]Member{
			file("file-file", "1"), file("file-file", "22"), file("file-dir", "1"), dir("file-dir", 0o755), file("file-dir/x", "x"),
			dir("dir-file", 0o755), file("dir-file/x", "gone"), file("dir-file", "now a file"), symlink("link-file", "x"), file("link-file", "f"),
			file("file-link", "f"), symlink("file-link", "x"), dir("real", 0o755), symlink("link-dir", "real"), dir("link-dir", 0o700),
			device('6', "pipe-file", 0, 0), file("pipe-file", "f"), file("many", "1"), dir("many", 0o755), symlink("many", "x"), device('3', "many", 5, 6), file("many", "last"),
		})},
		{"directory-twice", layers([]Member{
			xattr(owned(dir("d", 0o700), 1, 2), "user.a", "1", "user.b", "1"), file("d/f", "f"), xattr(with(dir("d", 0o2755), func(m *Member) { m.MTime = 77 }), "user.b", "2"),
		})},
		{"directory-after-content", layers([]Member{file("d/e/f", "f"), owned(mode(dir("d/e", 0), 0o1770), 3, 4), owned(mode(dir("d", 0), 0o2711), 5, 6), dir("sg", 0o2755), file("sg/x", "inherits nothing")})},
		{"setgid-parent", layers([]Member{owned(mode(dir("g", 0), 0o2775), 5, 50), file("g/implied/f", "f"), pax(file("g/nogid", ""), "gid", "-1")}, []Member{file("g/implied2/f", "f")})},
		{"global-headers", layers([]Member{
			{Type: 'g', Name: "pax_global_header", Mode: 0o666, Data: Record("comment", "0123456789abcdef")}, file("a", "1"),
			{Type: 'g', Name: "a", Data: Record("mtime", "12345") + Record("uid", "99")}, file("b", "2"),
		})},
		{"sizes-of-others", layers([]Member{with(dir("d", 0o755), func(m *Member) { m.Size = 4096 }), with(symlink("l", "d"), func(m *Member) { m.Size = 99 }), with(device('6', "p", 0, 0), func(m *Member) { m.Size = 1 }), file("f", "f")})},
	}
}

func attributes() []Case {
	capable := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	capable3 := "\x01\x00\x00\x03\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xe8\x03\x00\x00"
	named := acl(1, 7, 0, 2, 5, 1000, 4, 5, 0, 8, 6, 2000, 0x10, 7, 0, 0x20, 1, 0)
	minimal := acl(1, 6, 0, 4, 5, 0, 0x20, 0, 0)
	overlay := func(m Member) Member {
		return xattr(m, "trusted.overlay.opaque", "y", "trusted.overlay.whiteout", "y", "trusted.overlay.redirect", "/a", "trusted.overlay.metacopy", "", "trusted.overlay.origin", "x", "trusted.other", "1")
	}
	return []Case{
		{"ids", layers([]Member{
			owned(file("large", ""), 70000, 80000), owned(file("base256", ""), 4294967294, 3000000000), pax(file("pax", ""), "uid", "4294967294", "gid", "2147483648"),
			owned(symlink("link", "x"), 12, 13), owned(dir("d", 0o755), 14, 15), owned(device('6', "p", 0, 0), 16, 17), pax(file("minus", ""), "uid", "-1", "gid", "4294967295"),
		})},
		{"times", layers([]Member{
			pax(file("before", ""), "mtime", "-1"), pax(file("long-before", ""), "mtime", "-99999999999.5"), pax(file("fraction", ""), "mtime", "1700000000.123456789"),
			pax(file("digits", ""), "mtime", "1700000000.1234567899"), pax(file("after-2038", ""), "mtime", "2147483648.000000001"), pax(file("after-2106", ""), "mtime", "4294967296.999999999"),
			pax(file("year-2200", ""), "mtime", "7258118400.25"), pax(file("year-3000", ""), "mtime", "32503680000"), pax(symlink("link", "x"), "mtime", "1700000000.5"),
			pax(dir("d", 0o755), "mtime", "4294967297.5"), pax(file("d/f", ""), "mtime", "0"), pax(device('3', "null", 1, 3), "mtime", "1.000000009"),
			with(file("base256", ""), func(m *Member) { m.MTime = -5 }), with(file("base256-large", ""), func(m *Member) { m.MTime = 1 << 34 }), pax(file("atime", ""), "atime", "1800000000"),
		})},
		{"modes", layers([]Member{
			mode(file("setuid", ""), 0o4755), mode(file("setgid", ""), 0o2755), mode(file("sticky", ""), 0o1644), mode(file("none", ""), 0), mode(file("all", ""), 0o7777),
			dir("sticky-dir", 0o1777), dir("setgid-dir", 0o2775), dir("none-dir", 0), mode(file("type-bits", ""), 0o100644), mode(symlink("link", "x"), 0o600),
		}, []Member{file("sticky-dir/x", "x"), file("setgid-dir/x", "x")})},
		{"devices", layers([]Member{
			device('3', "null", 1, 3), device('4', "disk", 8, 300), device('6', "fifo", 5, 5), device('3', "large", 4095, 1<<20-1), device('4', "major", 259, 70000),
			owned(mode(device('3', "tty", 5, 0), 0o4666), 3, 5),
		})},
		{"xattrs", layers([]Member{
			xattr(file("user", "x"), "user.colour", "blue", "user.empty", "", "user.bytes", "\x00\xff\n", "user.long", strings.Repeat("v", 3000)),
			xattr(file("capable", "x"), "security.capability", capable), xattr(file("capable3", "x"), "security.capability", capable3), xattr(dir("d", 0o755), "user.dir", "d", "security.dir", "s"),
			xattr(symlink("link", "x"), "user.no", "1", "security.yes", "1"), xattr(device('6', "pipe", 0, 0), "user.no", "1"), xattr(file("other", ""), "foo", "1", "com.apple.x", "2", "system.nope", "3"),
			xattr(file("name", ""), "user."+strings.Repeat("n", 250), "1"), xattr(file("equals", ""), "user.a", "b=c\nd"),
			xattr(file("first", ""), "security.capability", capable), hardlink("chown-takes-it", "first"),
		}, []Member{file("d/implied", "")})},
		{"xattrs-of-overlay", layers(
			[]Member{dir("d", 0o755), file("d/a", "a"), file("f", "f"), dir("a", 0o755), file("a/in", "in")},
			[]Member{overlay(dir("d", 0o755)), file("d/b", "b"), overlay(file("f", "f2")), overlay(file("empty", "")), xattr(dir("user", 0o755), "user.overlay.opaque", "y"), overlay(symlink("l", "x"))},
		)},
		{"acls", layers([]Member{
			xattr(file("named", ""), "system.posix_acl_access", named), xattr(file("minimal", ""), "system.posix_acl_access", minimal),
			xattr(dir("d", 0o755), "system.posix_acl_default", named), file("d/file", ""), dir("d/dir", 0o700), file("d/implied/f", ""), symlink("d/link", "x"), hardlink("d/hard", "named"),
		})},
	}
}

// acl writes entries (tag, permissions, id) as the kernel's extended attribute has them.
func acl(entries ...int) string {
	raw := binary.LittleEndian.AppendUint32(nil, 2)
	for i := 0; i < len(entries); i += 3 {
		id := uint32(entries[i+2])
		if entries[i] != 2 && entries[i] != 8 {
			id = 1<<32 - 1
		}
		raw = binary.LittleEndian.AppendUint16(raw, uint16(entries[i]))
		raw = binary.LittleEndian.AppendUint16(raw, uint16(entries[i+1]))
		raw = binary.LittleEndian.AppendUint32(raw, id)
	}
	return string(raw)
}
