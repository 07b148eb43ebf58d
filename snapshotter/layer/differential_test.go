package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/short"
	"github.com/gantryd/gantry/snapshotter/erofs"
)

// applied is what containerd makes of a tar in an upper directory.
func applied(t testing.TB, root string, tar []byte, parents ...string) error {
	t.Helper()
	opts := []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)}
	if len(parents) > 0 {
		opts = append(opts, archive.WithParents(parents))
	}
	_, err := archive.Apply(t.Context(), root, bytes.NewReader(tar), opts...)
	return err
}

// describeDisk lists a directory, one line per entry; noTime drops a time.
func describeDisk(t testing.TB, root string, noTime func(path string) bool) []string {
	t.Helper()
	var out []string
	groups := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		n := &erofs.Inode{
			Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Size: st.Size,
			Mtime: st.Mtim.Sec, MtimeNsec: uint32(st.Mtim.Nsec), Xattrs: diskXattrs(t, path),
		}
		content := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if n.Target, err = os.Readlink(path); err != nil {
				return err
			}
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = string(data)
		}
		first, ok := groups[st.Ino]
		if !ok {
			first = rel
			groups[st.Ino] = rel
		}
		out = append(out, describe(rel, n, first, content, noTime(rel)))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

func diskXattrs(t testing.TB, path string) map[string]string {
	t.Helper()
	names, err := sized(func(p []byte) (int, error) { return unix.Llistxattr(path, p) })
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for name := range strings.SplitSeq(string(names), "\x00") {
		if name == "" {
			continue
		}
		value, err := sized(func(p []byte) (int, error) { return unix.Lgetxattr(path, name, p) })
		if err != nil && !errors.Is(err, unix.EINVAL) { // as empty capabilities read
			t.Fatalf("%s: %s: %v", path, name, err)
		}
		all[name] = string(value)
	}
	return all
}

func describe(path string, n *erofs.Inode, first, content string, noTime bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q mode=%o owner=%d:%d first=%q", path, n.Mode, n.UID, n.GID, first)
	if !noTime {
		fmt.Fprintf(&b, " mtime=%d.%09d", n.Mtime, n.MtimeNsec)
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		fmt.Fprintf(&b, " target=%q", n.Target)
	case unix.S_IFREG:
		fmt.Fprintf(&b, " size=%d content=%q", n.Size, content)
	case unix.S_IFCHR, unix.S_IFBLK:
		fmt.Fprintf(&b, " rdev=%x", n.Rdev)
	}
	for _, k := range slices.Sorted(maps.Keys(n.Xattrs)) {
		fmt.Fprintf(&b, " %s=%q", k, n.Xattrs[k])
	}
	return b.String()
}

// walkTree visits a tree in the order of filepath.WalkDir.
func walkTree(n *erofs.Inode, path string, visit func(path string, n *erofs.Inode)) {
	visit(path, n)
	for _, d := range n.Children {
		walkTree(d.Inode, filepath.Join(path, d.Name), visit)
	}
}

func describeTree(t testing.TB, root *erofs.Inode, tar []byte, noTime func(path string) bool) []string {
	t.Helper()
	var out []string
	groups := map[*erofs.Inode]string{}
	walkTree(root, "/", func(path string, n *erofs.Inode) {
		first, ok := groups[n]
		if !ok {
			first = path
			groups[n] = path
		}
		content := ""
		if n.Mode&unix.S_IFMT == unix.S_IFREG {
			content = contentOf(t, n, tar)
		}
		out = append(out, describe(path, n, first, content, noTime(path)))
	})
	slices.Sort(out)
	return out
}

func contentOf(t testing.TB, n *erofs.Inode, tar []byte) string {
	t.Helper()
	data := make([]byte, n.Size)
	end := int64(0)
	for _, e := range n.Data {
		if e.Len <= 0 || e.Off < end || e.Off+e.Len > n.Size || e.DevOff < 0 || e.DevOff+e.Len > int64(len(tar)) {
			t.Fatalf("extent %+v of a file of %d bytes in a tar of %d", e, n.Size, len(tar))
		}
		copy(data[e.Off:], tar[e.DevOff:e.DevOff+e.Len])
		end = e.Off + e.Len
	}
	return string(data)
}

func diff(want, got []string) string {
	var b strings.Builder
	for _, w := range want {
		if !slices.Contains(got, w) {
			fmt.Fprintf(&b, "containerd: %s\n", w)
		}
	}
	for _, g := range got {
		if !slices.Contains(want, g) {
			fmt.Fprintf(&b, "gantry:     %s\n", g)
		}
	}
	return b.String()
}

// upperDir is an empty upper directory as containerd's snapshotter makes it.
func upperDir(t testing.TB) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "fs")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	return root
}

// compare holds the table against containerd's own unpacking. It returns the
// table, or nil if both refuse the tar.
func compare(t testing.TB, tar []byte) *Table {
	t.Helper()
	root := upperDir(t)
	want := applied(t, root, tar)
	table, got := scan(t.Context(), newFileSource(bytes.NewReader(tar)), len(root))
	streamed, serr := scan(t.Context(), readerSource{bytes.NewBuffer(tar)}, len(root))
	if (got == nil) != (serr == nil) {
		t.Fatalf("from a file: %v; from a stream: %v", got, serr)
	}
	if want != nil && got == nil && table.OnlyLowest() != nil {
		return nil // see TestOnlyLowestEqualsContainerd
	}
	if (want == nil) != (got == nil) {
		t.Fatalf("containerd: %v\ngantry:     %v", want, got)
	}
	if want != nil {
		return nil
	}
	if err := table.OnlyLowest(); err != nil {
		t.Fatalf("containerd takes it in any layer, gantry: %v", err)
	}
	implied := map[string]bool{}
	walkTree(table.root, "/", func(path string, n *erofs.Inode) {
		implied[path] = table.inherit[n]&inheritMtime != 0 || isWhiteout(n)
	})
	noTime := func(path string) bool { return implied[path] }
	onDisk := describeDisk(t, root, noTime)
	if d := diff(onDisk, describeTree(t, table.root, tar, noTime)); d != "" {
		t.Fatalf("trees differ:\n%s", d)
	}
	if d := diff(onDisk, describeTree(t, streamed.root, tar, noTime)); d != "" {
		t.Fatalf("trees differ (stream):\n%s", d)
	}
	return table
}

func capability(version byte, size int) string {
	v := make([]byte, size)
	v[3] = version
	v[0], v[5] = 1, 0x20
	return string(v)
}

func acl(entries ...aclEntry) string { return formatACL(entries) }

func longName(n int) string { return strings.Repeat("n", n) }

func deepPath(n int) string {
	var b strings.Builder
	for b.Len() < n {
		b.WriteString(strings.Repeat("p", 99) + "/")
	}
	return b.String()[:n]
}

// bothCases are tars on which containerd and gantry must agree.
func bothCases() map[string][]byte {
	minimal := acl(aclEntry{1, 6, 0}, aclEntry{4, 5, 0}, aclEntry{0x20, 0, 0})
	named := acl(aclEntry{1, 7, 0}, aclEntry{2, 7, 1000}, aclEntry{4, 5, 0}, aclEntry{0x10, 7, 0}, aclEntry{0x20, 1, 0})
	with := func(m member, f func(*member)) member { f(&m); return m }
	c := map[string][]byte{
		"empty stream":     nil,
		"only end":         makeTar(),
		"one zero block":   make([]byte, 512),
		"plain":            makeTar(dir("./"), dir("etc/"), file("etc/passwd", "root"), file("top", ""), symlink("etc/l", "../top")),
		"root entry":       makeTar(with(dir("./"), func(m *member) { m.mode, m.uid = 0o700, 7 }), file("a", "x")),
		"root by slash":    makeTar(dir("/"), file("/a", "x")),
		"root as file":     makeTar(file(".", "ignored"), file("a", "x")),
		"dots":             makeTar(file("../../a", "x"), file("/../b", "y"), file("c/../../d", "z"), file("..", "gone")),
		"dot at the end":   makeTar(dir("d/"), file("d/a/b/.", "x"), file("d/a/b/c", "y"), dir("d/e/../f/"), file("d/e/g", "z"), dir("./h//i/"), file("./h//j", ""), dir("./h//k//"), file("./h//k/.", ""), file("./h//..", "")),
		"double slash":     makeTar(file("a//b///c", "x")),
		"implied":          makeTar(file("m/n/o", "x")),
		"implied later":    makeTar(file("m/o", "x"), with(dir("m"), func(m *member) { m.mode = 0o1777 })),
		"through link":     makeTar(dir("real"), symlink("l", "real"), file("l/f", "x"), dir("l/d/")),
		"through abs link": makeTar(dir("real/deep"), symlink("l", "/real/deep"), file("l/f", "x")),
		"through outside":  makeTar(symlink("l", "../../../zz"), file("l/f", "x")),
		"link to root":     makeTar(symlink("l", "/"), file("l/f", "x"), dir("l/"), file("l/l2/x", "")),
		"link to nothing":  makeTar(symlink("l", "no/where"), file("l/f", "x")),
		"link chain":       makeTar(dir("d"), symlink("a", "b"), symlink("b", "c"), symlink("c", "d"), file("a/f", "x")),
		"link dotdot":      makeTar(dir("x/y"), symlink("x/y/up", ".."), file("x/y/up/f", "z")),
		"link of link dir": makeTar(dir("c/d"), symlink("b", "c/d"), symlink("c/d/x", "../y"), symlink("a", "b"), file("a/x/f", "1")),
		"loop":             makeTar(symlink("a", "b"), symlink("b", "a"), file("a/f", "x")),
		"self loop":        makeTar(symlink("a", "a"), file("a/f", "x")),
		"loop unused":      makeTar(symlink("a", "a"), file("b", "x")),
		"link to file":     makeTar(file("f", "x"), symlink("l", "f"), file("l/x", "y")),
		"below a file":     makeTar(file("f", "x"), file("f/x", "y")),
		"whiteout":         makeTar(file("d/.wh.gone", ""), with(file(".wh.top", ""), func(m *member) { m.uid, m.gid = 3, 4 })),
		"whiteout typed":   makeTar(dir(".wh.d/"), symlink(".wh.l", "x"), with(file(".wh.h", ""), func(m *member) { m.typ = 'S' })),
		"whiteout present": makeTar(file("a", "x"), file(".wh.a", "")),
		"whiteout twice":   makeTar(file(".wh.a", ""), file(".wh.a", "")),
		"whiteout first":   makeTar(file(".wh.a", ""), file("a", "x")),
		"below whiteout":   makeTar(file(".wh.a", ""), file("a/x", "x")),
		"whiteout empty":   makeTar(file(".wh.", "")),
		"whiteout dot":     makeTar(file("d/.wh..", "")),
		"whiteout dotdot":  makeTar(file("d/.wh...", "")),
		"whiteout dots":    makeTar(file("d/.wh....", "")),
		"opaque":           makeTar(file("d/.wh..wh..opq", ""), dir("e"), file("e/.wh..wh..opq", ""), file("e/f", "x")),
		"opaque root":      makeTar(file(".wh..wh..opq", "")),
		"opaque then file": makeTar(file("d/.wh..wh..opq", ""), file("d", "x")),
		"opaque replaced":  makeTar(file("d/.wh..wh..opq", ""), file("d", "x"), file("z", "")),
		"aufs":             makeTar(file(".wh..wh.aufs", ""), dir(".wh..wh.plnk/"), file(".wh..wh.plnk/12.34", "x"), hardlink("f", ".wh..wh.plnk/12.34")),
		"duplicate":        makeTar(file("a", "1"), file("a", "22")),
		"dir over file":    makeTar(file("a", "1"), dir("a"), file("a/b", "x")),
		"file over dir":    makeTar(dir("a"), file("a", "1")),
		"file over tree":   makeTar(dir("a"), dir("a/b"), file("a", "1")),
		"dir to link":      makeTar(dir("a"), dir("b"), symlink("a", "b")),
		"dir to dangling":  makeTar(dir("a"), symlink("a", "b")),
		"dir to link impl": makeTar(file("c/x", ""), dir("a"), symlink("a", "c")),
		"dir to root link": makeTar(dir("a"), symlink("a", "/")),
		"dir back":         makeTar(dir("a"), file("a", "1"), dir("a"), file("a/x", "")),
		"dir merged":       makeTar(xattr(with(dir("a"), func(m *member) { m.mode = 0o700 }), "user.x", "1"), file("a/f", ""), xattr(with(dir("a"), func(m *member) { m.uid = 5 }), "user.y", "2")),
		"hard link":        makeTar(file("a", "xyz"), hardlink("d/b", "a"), hardlink("c", "/d/b")),
		"hard link attrs":  makeTar(xattr(file("a", "xyz"), "security.capability", capability(2, 20), "user.k", "v"), with(hardlink("b", "a"), func(m *member) { m.uid, m.mode = 9, 0o4755 })),
		"hard link link":   makeTar(symlink("l", "nowhere"), hardlink("h", "l")),
		"hard via link":    makeTar(dir("d"), file("d/f", "x"), symlink("l", "d"), hardlink("h", "l/f")),
		"hard to nothing":  makeTar(hardlink("h", "a")),
		"hard to self":     makeTar(file("a", "x"), hardlink("a", "a")),
		"hard to dir":      makeTar(dir("a"), hardlink("h", "a")),
		"hard empty":       makeTar(hardlink("h", "")),
		"hard dotdot":      makeTar(file("a", "x"), hardlink("h", "../../a")),
		"hard dot":         makeTar(file("a", "x"), hardlink("h", "a/.")),
		"hard slash":       makeTar(file("a", "x"), hardlink("h", "a/")),
		"hard up":          makeTar(file("a", "x"), dir("d"), hardlink("h", "d/../a")),
		"hard missing up":  makeTar(file("a", "x"), hardlink("h", "no/../a")),
		"hard replaced":    makeTar(file("a", "x"), hardlink("b", "a"), file("a", "new")),
		"hard of whiteout": makeTar(file(".wh.a", ""), hardlink("b", "a")),
		"empty symlink":    makeTar(symlink("l", "")),
		"long symlink":     makeTar(symlink("l", longName(4095))),
		"longer symlink":   makeTar(symlink("l", longName(4096))),
		"devices":          makeTar(member{typ: '3', name: "c", mode: 0o600, major: 1, minor: 3}, member{typ: '4', name: "b", mode: 0o4660, major: 8, minor: 300}, member{typ: '6', name: "p", mode: 0o640, major: 5, minor: 5}),
		"large devices":    makeTar(member{typ: '3', name: "c", major: 5000, minor: 1 << 21}),
		"device range":     makeTar(member{typ: '3', name: "c", major: 1 << 33}),
		"device negative":  makeTar(member{typ: '6', name: "c", minor: -1}),
		"device zero":      makeTar(member{typ: '3', name: "c", mode: 0o644}),
		"type 7":           makeTar(member{typ: '7', name: "c"}),
		"type S":           makeTar(member{typ: 'S', name: "c"}),
		"type S root":      makeTar(member{typ: 'S', name: ".", data: strings.Repeat("x", 700)}, file("a", "1")),
		"type V":           makeTar(member{typ: 'V', name: "label"}),
		"type nul":         makeTar(member{typ: 0, name: "f", data: "x"}, member{typ: 0, name: "d/"}),
		"global":           makeTar(file("g", "x"), member{typ: 'g', name: "g", data: paxRecord("comment", "hi")}),
		"global implied":   makeTar(member{typ: 'g', name: "tmp/GlobalHead.1", data: paxRecord("comment", "hi")}, file("x", "y")),
		"global long":      makeTar(member{typ: 'g', name: longName(300), data: paxRecord("comment", "hi")}, file("x", "y")),
		"sized header":     makeTar(with(dir("d"), func(m *member) { m.size = 4096 }), with(symlink("l", "d"), func(m *member) { m.size = 99 }), file("x", "y")),
		"modes":            makeTar(with(file("s", "x"), func(m *member) { m.mode = 0o107755 }), with(dir("t"), func(m *member) { m.mode = 0o1777 }), with(dir("g"), func(m *member) { m.mode = 0o2775; m.gid = 50 }), file("g/x/y", "")),
		"ids":              makeTar(with(file("a", ""), func(m *member) { m.uid, m.gid = 4294967294, 3000000000 }), pax(file("b", ""), "uid", "4294967295", "gid", "-1"), pax(file("c", ""), "uid", "4294967301", "gid", "-2")),
		"gid kept":         makeTar(with(dir("g"), func(m *member) { m.mode = 0o2775; m.gid = 50 }), pax(file("g/f", ""), "gid", "-1"), pax(file("g/.wh.w", ""), "gid", "-1")),
		"times":            makeTar(pax(file("a", ""), "mtime", "1.123456789"), pax(file("b", ""), "mtime", "-1.5"), pax(dir("c"), "mtime", "9223372036.854775807"), pax(file("d", ""), "mtime", "9223372037"), pax(symlink("e", "x"), "mtime", "5.5", "atime", "-3")),
		"negative time":    makeTar(with(file("a", ""), func(m *member) { m.mtime = -5 })),
		"name 255":         makeTar(file(longName(255), "")),
		"name 256":         makeTar(file(longName(256), "")),
		"dir name 256":     makeTar(file("d/"+longName(256)+"/x", "")),
		"link name 256":    makeTar(symlink("l", longName(256)), file("l/x", "")),
		"whiteout 255":     makeTar(file(".wh."+longName(255), "")),
		"whiteout 256":     makeTar(file(".wh."+longName(256), "")),
		"path long":        makeTar(file(deepPath(3500), "x")),
		"path 4096":        makeTar(file(deepPath(4096), "x")),
		"xattr user":       makeTar(xattr(file("f", ""), "user.a", "1", "user.empty", ""), xattr(dir("d"), "user.b", "2"), xattr(symlink("l", "x"), "user.c", "3"), xattr(member{typ: '6', name: "p"}, "user.d", "4")),
		"xattr other":      makeTar(xattr(file("f", ""), "trusted.overlay.opaque", "y", "foo", "1", "com.apple.x", "2", "btrfs.x", "1", "system.nope", "1", "security.foo", "z", "userx.y", "1", "user", "2")),
		"xattr on link":    makeTar(xattr(symlink("l", "x"), "security.foo", "1")),
		"xattr no name":    makeTar(xattr(file("f", ""), "", "1")),
		"xattr user only":  makeTar(xattr(file("f", ""), "user.", "1")),
		"xattr sec only":   makeTar(xattr(file("f", ""), "security.", "1")),
		"xattr name 255":   makeTar(xattr(file("f", ""), "user."+longName(250), "1")),
		"xattr name 256":   makeTar(xattr(file("f", ""), "user."+longName(251), "1")),
		"xattr unknown256": makeTar(xattr(file("f", ""), longName(256), "1")),
		"xattr trusted256": makeTar(xattr(file("f", ""), "trusted."+longName(256), "1")),
		"xattr huge":       makeTar(xattr(file("f", ""), "user.big", longName(70000))),
		"xattr huge trust": makeTar(xattr(file("f", ""), "trusted.big", longName(70000))),
		"caps 1":           makeTar(xattr(file("f", ""), "security.capability", capability(1, 12))),
		"caps 2":           makeTar(xattr(file("f", ""), "security.capability", capability(2, 20))),
		"caps 3":           makeTar(xattr(file("f", ""), "security.capability", capability(2, 24))),
		"caps short":       makeTar(xattr(file("f", ""), "security.capability", "ab")),
		"caps empty":       makeTar(xattr(file("f", ""), "security.capability", "")),
		"caps dir":         makeTar(xattr(dir("d"), "security.capability", capability(2, 20)), dir("d")),
		"acl minimal":      makeTar(xattr(file("f", ""), aclAccess, minimal)),
		"acl named":        makeTar(xattr(file("f", ""), aclAccess, named), xattr(dir("d"), aclDefault, named), file("d/f", "x"), dir("d/e"), file("d/i/x", ""), symlink("d/l", "x"), file("d/.wh.w", ""), hardlink("d/h", "f")),
		"acl on link":      makeTar(xattr(symlink("l", "x"), aclAccess, named)),
		"acl default file": makeTar(xattr(file("f", ""), aclDefault, named)),
		"acl bad":          makeTar(xattr(file("f", ""), aclAccess, "\x02\x00\x00\x00abc")),
		"acl order":        makeTar(xattr(file("f", ""), aclAccess, acl(aclEntry{4, 5, 0}, aclEntry{1, 6, 0}, aclEntry{0x20, 0, 0}))),
		"acl version":      makeTar(xattr(file("f", ""), aclAccess, "\x01\x00\x00\x00")),
		"acl none":         makeTar(xattr(file("f", ""), aclAccess, "\x02\x00\x00\x00"), xattr(file("g", ""), aclAccess, "")),
		"acl no mask":      makeTar(xattr(file("f", ""), aclAccess, acl(aclEntry{1, 7, 0}, aclEntry{2, 7, 1000}, aclEntry{4, 5, 0}, aclEntry{0x20, 1, 0}))),
	}
	maps.Copy(c, truncatedCases())
	maps.Copy(c, sparseCases())
	return c
}

func truncatedCases() map[string][]byte {
	whole := makeTar(file("a", longName(700)), file("b", longName(100)))
	return map[string][]byte{
		"cut in data":      whole[:512+300],
		"cut before data":  whole[:512],
		"cut last byte":    whole[:512+1024+512+99],
		"cut padding":      whole[:512+1024+512+100],
		"cut some padding": whole[:512+1024+512+101],
		"no end blocks":    whole[:512+1024+1024],
		"cut header":       whole[:512+1024+200],
		"one end block":    whole[:512+1024+1024+512],
		"cut end block":    whole[:512+1024+1024+600],
		"after the end":    append(slices.Clone(whole), "trailing junk, not a tar"...),
		"zero then header": append(append(slices.Clone(whole[:512+1024]), make([]byte, 512)...), whole[512+1024:]...),
		"bad checksum":     append(append(slices.Clone(whole[:512+1024]), 'X'), whole[512+1024+1:]...),
		"not a tar":        []byte(longName(2000)),
		"cut whiteout":     makeTar(file(".wh.x", longName(700)))[:600],
		"cut ignored":      makeTar(file(".", longName(700)))[:600],
	}
}

func sparseCases() map[string][]byte {
	v1 := func(m, data string) string { return m + strings.Repeat("\x00", -len(m)&511) + data }
	s01 := func(data, m, blocks, size string) member {
		return pax(file("s", data), "GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.map", m, "GNU.sparse.numblocks", blocks, "GNU.sparse.size", size, "GNU.sparse.name", "named")
	}
	s10 := func(data, size string) member {
		return pax(file("s", data), "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.realsize", size, "GNU.sparse.name", "dir/named")
	}
	var s00 rawTar
	records := paxRecord("GNU.sparse.size", "3000") + paxRecord("GNU.sparse.numblocks", "2") +
		paxRecord("GNU.sparse.offset", "5") + paxRecord("GNU.sparse.numbytes", "10") +
		paxRecord("GNU.sparse.offset", "1000") + paxRecord("GNU.sparse.numbytes", "600")
	s00.block(member{typ: 'x', name: "x"}, int64(len(records)))
	s00.padded(records)
	s00.add(file("s", longName(610)))
	s00.add(file("next", "1"))
	big := v1("3\n0\n512\n1024\n600\n5000\n1\n", longName(512+600+1))
	return map[string][]byte{
		"sparse 0.0":         s00.end(),
		"sparse 0.1":         makeTar(s01(longName(610), "5,10,1000,600", "2", "3000"), file("next", "1")),
		"sparse 0.1 empty":   makeTar(s01("", "", "0", "100"), file("next", "1")),
		"sparse 0.1 less":    makeTar(s01(longName(609), "5,10,1000,600", "2", "3000")),
		"sparse 0.1 more":    makeTar(s01(longName(611), "5,10,1000,600", "2", "3000")),
		"sparse 0.1 overlap": makeTar(s01(longName(20), "5,10,8,10", "2", "3000")),
		"sparse 0.1 beyond":  makeTar(s01(longName(20), "5,10,2995,10", "2", "3000")),
		"sparse 0.1 zero":    makeTar(s01(longName(10), "5,10,3000,0", "2", "3000"), file("next", "1")),
		"sparse 0.1 joined":  makeTar(s01(longName(20), "5,10,15,10", "2", "3000"), file("next", "1")),
		"sparse 1.0":         makeTar(s10(big, "8000"), file("next", "1")),
		"sparse 1.0 size":    makeTar(pax(s10(big, "8000"), "size", fmt.Sprint(len(big))), file("next", "1")),
		"sparse 1.0 hole":    makeTar(s10(v1("0\n", ""), "8000"), file("next", "1")),
		"sparse 1.0 less":    makeTar(s10(big[:len(big)-1], "8000"), file("next", "1")),
		"sparse 1.0 more":    makeTar(s10(big+"x", "8000"), file("next", "1")),
		"sparse 1.0 cut":     makeTar(s10(big, "8000"))[:512*6],
		"sparse 1.0 no map":  makeTar(s10("", "8000")),
		"sparse long map":    makeTar(s10(v1("200\n"+longMap(200), longName(200)), "400000"), file("next", "1")),
		"sparse 2.0":         makeTar(pax(file("s", "abc"), "GNU.sparse.major", "2", "GNU.sparse.minor", "0", "GNU.sparse.realsize", "8000")),
		"sparse on dir":      makeTar(pax(dir("s"), "GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.map", "", "GNU.sparse.numblocks", "0")),
		"sparse whiteout":    makeTar(pax(s10(big, "8000"), "GNU.sparse.name", ".wh.x"), file("next", "1")),
		"sparse 0 with size": makeTar(pax(s01(longName(610), "5,10,1000,600", "2", "3000"), "size", "610"), file("next", "1")),
	}
}

func longMap(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d\n1\n", 1000+i*1000)
	}
	return b.String()
}

func TestTableEqualsContainerd(t *testing.T) {
	t.Parallel()
	for name, tar := range bothCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			compare(t, tar)
		})
	}
}

// TestGNUTar takes tars that GNU tar writes, holes included.
func TestGNUTar(t *testing.T) {
	t.Parallel()
	src := t.TempDir()
	f, err := os.Create(filepath.Join(src, "holes"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	step := int64(short.Size(70_000, 10_000))
	for i := range int64(40) {
		if _, err := f.WriteAt([]byte(longName(int(100*i+1))), i*step); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(75*step), os.WriteFile(filepath.Join(src, longName(200)), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, flags := range []string{
		"--format=gnu", "--format=ustar --exclude=nn*", "--format=posix",
		"--format=posix --sparse --sparse-version=0.0", "--format=posix --sparse --sparse-version=0.1", "--format=posix --sparse --sparse-version=1.0",
		"--format=gnu --sparse", // refused by both
	} {
		cmd := exec.CommandContext(t.Context(), "tar", append(strings.Fields(flags), "--numeric-owner", "-cf", "-", "-C", src, ".")...)
		tar, err := cmd.Output()
		if err != nil {
			t.Fatalf("tar %s: %v", flags, err)
		}
		table := compare(t, tar)
		if refused := flags == "--format=gnu --sparse"; refused != (table == nil) {
			t.Errorf("tar %s: refused: %v", flags, table == nil)
		}
	}
}
