package erofs

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	twice := dir()
	loop := dir()
	loop.Children = []Dirent{{"again", dir(named("and-again", loop))}}
	with := func(in *Inode, change func(in *Inode)) *Inode { change(in); return in }
	xattr := func(name string, n int) *Inode {
		return with(file(0), func(in *Inode) { in.Xattrs = map[string]string{name: strings.Repeat("v", n)} })
	}
	manyXattrs := func(in *Inode) {
		in.Xattrs = map[string]string{}
		for i := range 5 {
			in.Xattrs["user."+itoa(i)] = strings.Repeat("v", 60000)
		}
	}
	invalid, limit := errdefs.ErrInvalidArgument, errdefs.ErrOutOfRange
	for name, tc := range map[string]struct {
		root *Inode
		want error
		says string
	}{
		"no root":              {nil, invalid, "root"},
		"root is a file":       {file(0), invalid, "root"},
		"no inode":             {dir(named("n", nil)), invalid, `"n"`},
		"empty name":           {dir(named("", file(0))), invalid, "not a file name"},
		"dot":                  {dir(named(".", file(0))), invalid, "not a file name"},
		"dot dot":              {dir(named("a", dir(named("..", file(0))))), invalid, `"/a"`},
		"slash":                {dir(named("a/b", file(0))), invalid, "slash"},
		"zero byte":            {dir(named("a\x00b", file(0))), invalid, "zero byte"},
		"name of 256 bytes":    {dir(named(strings.Repeat("n", 256), file(0))), invalid, "256"},
		"huge name":            {dir(named(strings.Repeat("n", 1<<20), file(0))), invalid, "..."},
		"double name":          {dir(named("a", file(0)), named("b", file(0)), named("a", dir())), invalid, "twice"},
		"directory twice":      {dir(named("a", twice), named("b", twice)), invalid, "two names"},
		"loop":                 {loop, invalid, "two names"},
		"no type":              {dir(named("m", &Inode{Mode: 0o644})), invalid, `"/m"`},
		"mode of 32 bits":      {dir(named("m", &Inode{Mode: 1<<16 | unix.S_IFREG})), invalid, "mode"},
		"nanoseconds":          {dir(named("m", with(file(0), func(in *Inode) { in.MtimeNsec = 1e9 }))), invalid, "nanoseconds"},
		"negative size":        {dir(named("s", file(-1))), limit, "size"},
		"size over the limit":  {dir(named("s", file(maxFileSize+1))), limit, "size"},
		"empty target":         {dir(named("l", link(""))), invalid, "target"},
		"target of 4096 bytes": {dir(named("l", link(strings.Repeat("t", 4096)))), invalid, "target"},
		"zero byte in target":  {dir(named("l", link("a\x00b"))), invalid, "target"},
		"major number":         {dir(named("d", special(unix.S_IFCHR, 4096, 0))), limit, "4096:0"},
		"minor number":         {dir(named("d", special(unix.S_IFBLK, 0, 1<<20))), limit, "0:1048576"},
		"xattr value":          {dir(named("x", xattr("user.x", 1<<16))), limit, "65536"},
		"xattr name":           {dir(named("x", xattr("user."+strings.Repeat("n", 251), 1))), invalid, "cannot be stored"},
		"xattr prefix only":    {dir(named("x", xattr("user.", 1))), invalid, "cannot be stored"},
		"xattr namespace":      {dir(named("x", xattr("system.other", 1))), invalid, "cannot be stored"},
		"xattr zero byte":      {dir(named("x", xattr("user.a\x00", 1))), invalid, "cannot be stored"},
		"xattrs together":      {dir(named("x", with(file(0), manyXattrs))), limit, "in all"},
		"extents overlap":      {dir(named("e", file(9, Extent{0, 5, 0}, Extent{4, 5, 0}))), invalid, "extent"},
		"extents disordered":   {dir(named("e", file(9, Extent{5, 1, 0}, Extent{0, 1, 0}))), invalid, "extent"},
		"extent before file":   {dir(named("e", file(9, Extent{-1, 5, 0}))), invalid, "extent"},
		"extent behind file":   {dir(named("e", file(9, Extent{5, 5, 0}))), invalid, "extent"},
		"extent overflows":     {dir(named("e", file(9, Extent{5, 1<<63 - 1, 0}))), invalid, "extent"},
		"extent is negative":   {dir(named("e", file(9, Extent{5, -1, 0}))), invalid, "extent"},
		"extent behind layer":  {dir(named("e", file(9, Extent{0, 5, 1020}))), invalid, "layer"},
		"extent before layer":  {dir(named("e", file(9, Extent{0, 5, -1}))), invalid, "layer"},
		"extent far off":       {dir(named("e", file(9, Extent{0, 5, 1<<63 - 1}))), invalid, "layer"},
		"data in empty file":   {dir(named("e", file(0, Extent{0, 1, 0}))), invalid, "extent"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := Write(io.Discard, tc.root, device1(layerFile(1024)))
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) || len(err.Error()) > 2000 {
				t.Errorf("Write: %v, want %v that says %q", err, tc.want, tc.says)
			}
		})
	}
}

// Small pieces strewn over large files take a table, or copies, far larger than
// the layer that names them: one file does, and many that are less bad together.
func TestWriteRefusesAnIndexThatDwarfsItsLayer(t *testing.T) {
	t.Parallel()
	strewn := func(n, apart int64) *Inode {
		in := file(n * apart)
		for i := range n {
			in.Data = append(in.Data, Extent{Off: i * apart, Len: BlockSize, DevOff: i * BlockSize})
		}
		return in
	}
	many := dir()
	for i := range 64 {
		many.Children = append(many.Children, Dirent{itoa(i), strewn(1<<10, 4<<20)})
	}
	const size = 64 << 20
	for name, tc := range map[string]struct {
		root *Inode
		want error
	}{
		"16 TiB":      {dir(named("f", strewn(1<<16, 256<<20-BlockSize))), errdefs.ErrOutOfRange},
		"many":        {many, errdefs.ErrOutOfRange},
		"disk images": {dir(named("f", strewn(1<<12, 20<<20)), named("g", strewn(1<<10, 1<<20))), nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := Write(io.Discard, tc.root, Device{ReaderAt: zeros{}, Size: size})
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if tc.want != nil && err != nil && !strings.Contains(err.Error(), "sparse") {
				t.Errorf("the error does not say what is wrong: %v", err)
			}
		})
	}
}

func TestWriteKeepsWithinAddresses(t *testing.T) {
	t.Parallel()
	f := file(512, Extent{0, 512, 512})
	for name, tc := range map[string]struct {
		size int64
		want error
	}{
		"just fits": {(nullBlock - 5) * BlockSize, nil},
		"2 TiB":     {2 << 40, errdefs.ErrOutOfRange},
		"8 EiB":     {1<<63 - 1, errdefs.ErrOutOfRange},
		"negative":  {-1, errdefs.ErrInvalidArgument},
	} {
		if err := Write(io.Discard, dir(named("f", f)), Device{Size: tc.size}); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	unreadable := dir(named("f", file(100, Extent{0, 100, 1})))
	if err := Write(io.Discard, unreadable, Device{Size: 512}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("data to copy from a layer without a reader: %v", err)
	}
}

// A path of any depth must not cost stack, nor squared time.
func TestWriteDeepTree(t *testing.T) {
	t.Parallel()
	root := dir()
	for range 200_000 {
		root = dir(named("d", root))
	}
	if err := Write(io.Discard, root, Device{}); err != nil {
		t.Fatal(err)
	}
}

func TestWriteIsDeterministic(t *testing.T) {
	t.Parallel()
	root, layer := everything()
	want := image(t, root, layer)
	if !bytes.Equal(image(t, root, layer), want) {
		t.Error("the same tree gave another image")
	}
	slices.Reverse(root.Children)
	if !bytes.Equal(image(t, root, layer), want) {
		t.Error("another order of children gave another image")
	}
	root.Children[0].Inode.Mtime++
	uuid := func(b []byte) []byte { return b[superOffset+48 : superOffset+64] }
	if bytes.Equal(uuid(image(t, root, layer)), uuid(want)) {
		t.Error("another tree has the same UUID")
	}
}

// Files in place cost their inode, nothing else.
func TestWriteCopiesNothingThatCanBeMapped(t *testing.T) {
	t.Parallel()
	root := dir()
	layer := layerFile(1 << 20)
	for i := range 100 {
		f := file(5000, Extent{0, 5000, int64(i) * 5120})
		pad(f, layer)
		root.Children = append(root.Children, Dirent{itoa(i), f})
	}
	// A piece within a hole, and one that ends in the layer's partial block.
	layer = layer[:1<<20-500]
	root.Children = append(root.Children,
		Dirent{"sparse", file(1<<30, Extent{1 << 29, 1 << 19, 512})},
		Dirent{"last", file(1<<19+10, Extent{0, 1<<19 + 10, 1<<19 - 512})})
	if size := len(image(t, root, layer)); size > 40_000 {
		t.Errorf("image of %d bytes for 102 files in place", size)
	}
}

type failing struct {
	after int
	err   error
}

func (f *failing) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, f.err
	}
	return len(p), nil
}

func TestWritePassesErrorsOn(t *testing.T) {
	t.Parallel()
	root, layer := everything()
	for _, after := range []int{0, 300_000, 2_000_000} {
		full := &failing{after, unix.ENOSPC}
		if err := Write(full, root, device1(layer)); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("Write to a full disk: %v", err)
		}
	}
	unreadable := Device{ReaderAt: broken{}, Size: int64(len(layer))}
	if err := Write(io.Discard, dir(named("f", file(700, Extent{0, 700, 0}))), unreadable); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), `"/f"`) {
		t.Errorf("Write from a layer that cannot be read: %v", err)
	}
	short := Device{ReaderAt: bytes.NewReader(layer[:1000]), Size: int64(len(layer))}
	if err := Write(io.Discard, root, short); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Write from a layer cut short: %v", err)
	}
}

func TestVerify(t *testing.T) {
	t.Parallel()
	good := image(t, dir(named("f", file(3000, Extent{0, 3000, 1}))), layerFile(4096))
	verify := func(b []byte) error { return Verify(bytes.NewReader(b), int64(len(b))) }
	for at := range good {
		b := bytes.Clone(good)
		b[at] ^= 1 << (at % 8)
		if err := verify(b); !errors.Is(err, ErrChecksum) || !errors.Is(err, errdefs.ErrDataLoss) {
			t.Fatalf("bit flipped at %d: %v", at, err)
		}
	}
	for n := range good {
		if err := verify(good[:n]); !errors.Is(err, ErrChecksum) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	if err := verify(append(bytes.Clone(good), make([]byte, BlockSize)...)); !errors.Is(err, ErrChecksum) {
		t.Errorf("a block longer: %v", err)
	}
	if err := verify(append(bytes.Clone(good), good...)); !errors.Is(err, ErrChecksum) {
		t.Errorf("doubled: %v", err)
	}
	if err := Verify(bytes.NewReader(good[:len(good)-1]), int64(len(good))); !errors.Is(err, ErrChecksum) {
		t.Errorf("shorter than said: %v", err)
	}
	if err := Verify(broken{}, int64(len(good))); !errors.Is(err, unix.EIO) || errors.Is(err, ErrChecksum) {
		t.Errorf("disk error: %v", err)
	}
}

type broken struct{}

func (broken) ReadAt([]byte, int64) (int, error) { return 0, unix.EIO }

func TestXattrNamespaces(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"user.a": true, "trusted.overlay.opaque": true, "security.capability": true, "system.posix_acl_access": true,
		"system.posix_acl_default": true, "system.posix_acl_other": false, "user": false, "user.": false, "": false, "com.apple.x": false,
	} {
		if _, _, got := splitXattr(name); got != want {
			t.Errorf("splitXattr(%q): %t, want %t", name, got, want)
		}
	}
}
