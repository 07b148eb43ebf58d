package erofs

import (
	"bytes"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// layerFile makes a layer of size bytes in which no two blocks are equal and
// none is zero, so that every wrong address shows.
func layerFile(size int) []byte {
	b := make([]byte, size)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x) | 1
	}
	return b
}

func device1(layer []byte) Device {
	return Device{ReaderAt: bytes.NewReader(layer), Size: int64(len(layer))}
}

func image(tb testing.TB, root *Inode, layer []byte) []byte {
	tb.Helper()
	var b bytes.Buffer
	if err := Write(&b, root, device1(layer)); err != nil {
		tb.Fatalf("Write: %v", err)
	}
	if err := Verify(bytes.NewReader(b.Bytes()), int64(b.Len())); err != nil {
		tb.Fatalf("Verify of what Write wrote: %v", err)
	}
	return b.Bytes()
}

func dir(children ...Dirent) *Inode {
	return &Inode{Mode: unix.S_IFDIR | 0o755, Mtime: 1_700_000_000, MtimeNsec: 123456789, Children: children}
}

func file(size int64, data ...Extent) *Inode {
	return &Inode{Mode: unix.S_IFREG | 0o644, Mtime: 1_700_000_001, MtimeNsec: 999999999, Size: size, Data: data}
}

func link(target string) *Inode {
	return &Inode{Mode: unix.S_IFLNK | 0o777, Mtime: 5, Target: target}
}

func special(mode uint32, major, minor uint32) *Inode {
	return &Inode{Mode: mode, Rdev: unix.Mkdev(major, minor), Mtime: 7}
}

func named(name string, in *Inode) Dirent { return Dirent{name, in} }

// content renders the bytes off to off+len(p) of a file as its extents say.
func content(in *Inode, layer []byte, off int64, p []byte) {
	clear(p)
	for _, e := range in.Data {
		from, to := max(off, e.Off), min(off+int64(len(p)), e.Off+e.Len)
		if from < to {
			copy(p[from-off:to-off], layer[e.DevOff+from-e.Off:])
		}
	}
}

// probes are the parts of a file to compare: all of a small one, and of a large
// one its ends and what is around its extents.
func probes(in *Inode) [][2]int64 {
	const most = 4 << 20
	if in.Size <= most {
		return [][2]int64{{0, in.Size}}
	}
	around := []int64{0, in.Size / 2, in.Size}
	for _, e := range in.Data {
		around = append(around, e.Off, e.Off+e.Len/2, e.Off+e.Len)
	}
	var out [][2]int64
	for _, at := range around {
		out = append(out, [2]int64{max(0, at-5000), min(in.Size, at+5000)})
	}
	return out
}

func compareContent(tb testing.TB, name string, r io.ReaderAt, in *Inode, layer []byte) {
	tb.Helper()
	for _, p := range probes(in) {
		want, got := make([]byte, p[1]-p[0]), make([]byte, p[1]-p[0])
		content(in, layer, p[0], want)
		if n, err := r.ReadAt(got, p[0]); n != len(got) {
			tb.Errorf("%q: read %d bytes at %d: got %d, %v", name, len(got), p[0], n, err)
			return
		}
		if !bytes.Equal(got, want) {
			at := 0
			for got[at] == want[at] {
				at++
			}
			tb.Errorf("%q: byte %d is %#x, want %#x", name, p[0]+int64(at), got[at], want[at])
			return
		}
	}
}

// wantNlink counts the names of every inode.
func wantNlink(root *Inode) map[*Inode]int {
	links := map[*Inode]int{root: 2}
	stack := []*Inode{root}
	for len(stack) > 0 {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, c := range d.Children {
			links[c.Inode]++
			if c.Inode.Mode&unix.S_IFMT == unix.S_IFDIR {
				links[c.Inode] = 2
				links[d]++
				stack = append(stack, c.Inode)
			}
		}
	}
	return links
}

// everything is a tree with every feature of the format that Write uses, over
// a layer whose length is no multiple of the block size.
func everything() (*Inode, []byte) {
	const size = 3<<20 + 100
	layer := layerFile(size)
	last := int64(size &^ 511)
	root := dir()
	add := func(name string, in *Inode) *Inode {
		root.Children = append(root.Children, Dirent{name, in})
		return in
	}
	addFiles(add, size, last)
	hard := add("hard-a", file(700, Extent{0, 700, 4096}))
	hard.Xattrs = map[string]string{"user.shared": "by all names"}
	add("hard-b", hard)
	add("sub", dir(named("hard-c", hard), named("deep", dir(named("deeper", dir())))))
	fifo := special(unix.S_IFIFO|0o600, 0, 0)
	add("fifo", fifo)
	add("fifo-link", fifo)
	add("sock", special(unix.S_IFSOCK|0o640, 0, 0))
	add("char", special(unix.S_IFCHR|0o666, 4095, 1<<20-1))
	add("null", special(unix.S_IFCHR|0o666, 1, 3))
	add("block", special(unix.S_IFBLK|0o660, 259, 0x12345))
	add("whiteout", special(unix.S_IFCHR, 0, 0))
	addLinks(add)
	addNames(add)
	addXattrs(add)
	addAttributes(add)
	for _, c := range root.Children {
		if !strings.HasPrefix(c.Name, "junk-") {
			pad(c.Inode, layer)
		}
	}
	return share(root), layer
}

// share marks what has several names, as whoever makes them must.
func share(root *Inode) *Inode {
	for in, n := range wantNlink(root) {
		if n > 1 && in.Mode&unix.S_IFMT != unix.S_IFDIR {
			in.Shared = true
		}
	}
	return root
}

// pad puts zeros behind the end of a file, as tar does.
func pad(in *Inode, layer []byte) {
	if n := len(in.Data); n > 0 && in.Data[n-1].Off+in.Data[n-1].Len == in.Size {
		end := in.Data[n-1].DevOff + in.Data[n-1].Len
		clear(layer[end:min(align(end, BlockSize), int64(len(layer)))])
	}
}

type adder func(name string, in *Inode) *Inode

func addFiles(add adder, size, last int64) {
	add("empty", file(0))
	add("flat", file(1000, Extent{0, 1000, 512}))
	add("junk-after-end", file(1000, Extent{0, 1000, 2048}))
	add("junk-after-end-of-chunks", file(2000, Extent{0, 512, 1024}, Extent{1024, 976, 3072}))
	add("flat-blocks", file(4096, Extent{0, 4096, 512 * 9}))
	add("flat-big", file(2<<20+7, Extent{0, 2<<20 + 7, 1024}))
	add("flat-joined", file(1600, Extent{0, 700, 512}, Extent{700, 0, 3}, Extent{700, 900, 1212}))
	add("flat-to-last-whole-block", file(512*3, Extent{0, 512 * 3, last - 512*3}))
	add("ends-in-partial-block", file(512*3+100, Extent{0, 512*3 + 100, last - 512*3}))
	add("big-ends-in-partial-block", file(2<<20+50, Extent{0, 2<<20 + 50, last - 2<<20}))
	add("only-partial-block", file(50, Extent{0, 50, last}))
	add("unaligned-device", file(3000, Extent{0, 3000, 513}))
	add("unaligned-file", file(3000, Extent{10, 2990, 512}))
	add("hole", file(100000))
	add("hole-at-end", file(100000, Extent{0, 512, 512}))
	add("hole-after-partial-block", file(100000, Extent{0, 700, 512}))
	add("hole-within-last-block", file(500, Extent{0, 100, 512}))
	add("hole-at-start", file(100000, Extent{99840, 160, 1024}))
	add("hole-in-first-chunk", file(1<<20, Extent{512, 1<<20 - 512, 1024}))
	add("pieces", file(9000, Extent{0, 512, 4096}, Extent{600, 5, 99}, Extent{610, 1000, 8000}, Extent{4096, 4096, 8192}, Extent{8192, 808, 0}))
	add("checkered", checkered())
	add("6GiB", file(6<<30+5, Extent{5 << 30, 1 << 20, 512}, Extent{6 << 30, 5, 1024}))
	add("6GiB-unaligned", file(6<<30, Extent{5<<30 + 3, 5000, 777}))
	add("1TiB-hole", file(1<<40))
	add("16TiB", file(maxFileSize, Extent{maxFileSize - 600, 600, 100}))
	add("overlapping-device", file(2048, Extent{0, 1024, 512}, Extent{1024, 1024, 512}))
	add("all", file(size, Extent{0, size, 0}))
}

// checkered has data in every other 4 KiB.
func checkered() *Inode {
	f := file(1 << 20)
	for off := int64(0); off < f.Size; off += 8192 {
		f.Data = append(f.Data, Extent{off, 4096, off})
	}
	return f
}

func addLinks(add adder) {
	for _, n := range []int{1, 100, 447, 448, 449, 480, 481, 511, 512, 513, 1024, 1500, 4095} {
		in := link(strings.Repeat("t", n))
		in.Mtime = int64(n)
		add("link-"+itoa(n), in)
	}
	l := add("link-xattr", link("../somewhere"))
	l.Xattrs = map[string]string{"trusted.t": strings.Repeat("x", 600)}
}

func addNames(add adder) {
	for _, name := range []string{"-", ".-", "...", "..a", "!", "\xff\xfe", "caf\xc3\xa9", "a b\nc\t", "\x01", strings.Repeat("n", 255), strings.Repeat("n", 254) + "o"} {
		add(name, file(0))
	}
	long := dir()
	for i := range 300 {
		long.Children = append(long.Children, Dirent{strings.Repeat(string(rune('a'+i%26)), 255-i/26), file(0)})
	}
	add("long-names", long)
	// One more entry at a time crosses from the inline tail to whole blocks.
	for n := range 60 {
		d := dir()
		for i := range n {
			d.Children = append(d.Children, Dirent{strings.Repeat("f", i+1), file(0)})
		}
		add("dir-"+strings.Repeat("x", n), d)
	}
}

func addXattrs(add adder) {
	acl := "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x05\x00\xff\xff\xff\xff" + "\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x05\x00\xff\xff\xff\xff"
	x := add("xattr-dir", dir(named("kid", file(0))))
	x.Xattrs = map[string]string{
		"system.posix_acl_access": acl, "system.posix_acl_default": acl,
		"trusted.overlay.opaque": "y", "user.empty": "", "user." + strings.Repeat("n", 250): "longest name",
		"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}
	f := add("xattr-file", file(1000, Extent{0, 1000, 512}))
	f.Xattrs = map[string]string{"user.big": strings.Repeat("v", maxXattrValue), "security.selinux": "system_u:object_r:bin_t:s0\x00"}
	c := add("xattr-chunks", file(3000, Extent{0, 3000, 513}))
	c.Xattrs = map[string]string{"user.odd": "12345"}
	for _, n := range []int{1, 380, 400, 430, 440, 444, 448, 500, 1000} {
		d := add("xattr-dir-"+strings.Repeat("v", n%211), dir(named("kid", file(0))))
		d.Xattrs = map[string]string{"user.v": strings.Repeat("v", n)}
	}
}

func addAttributes(add adder) {
	a := add("ids", file(0))
	a.UID, a.GID, a.Mode = 1<<32-2, 70000, unix.S_IFREG|0o7777
	a = add("epoch", file(0))
	a.Mtime, a.MtimeNsec = 0, 0
	a = add("before-1970", file(0))
	a.Mtime, a.MtimeNsec = -1234567, 5
	a = add("second-before-most", file(0))
	a.Mtime--
	a = add("nanosecond-before-most", file(0))
	a.MtimeNsec--
	a = add("year-2500", file(0))
	a.Mtime = 16725225600
	a = add("sticky", dir())
	a.Mode = unix.S_IFDIR | 0o1777
	many := add("many-links", file(3, Extent{0, 3, 0}))
	d := dir()
	for i := range 70000 {
		d.Children = append(d.Children, Dirent{"l" + strings.Repeat("0", i%7) + string(rune('a'+i%26)) + itoa(i), many})
	}
	add("links", d)
}

func itoa(i int) string {
	if i < 10 {
		return string(rune('0' + i))
	}
	return itoa(i/10) + string(rune('0'+i%10))
}

// writeFiles puts index and layer where the kernel can mount them.
func writeFiles(tb testing.TB, root *Inode, layer []byte) (index, tar string) {
	tb.Helper()
	d := tb.TempDir()
	index, tar = filepath.Join(d, "index"), filepath.Join(d, "layer")
	for name, b := range map[string][]byte{index: image(tb, root, layer), tar: layer} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	return index, tar
}

func sortedNames(in *Inode) []string {
	names := map[string]bool{}
	for _, c := range in.Children {
		names[c.Name] = true
	}
	return slices.Sorted(maps.Keys(names))
}
