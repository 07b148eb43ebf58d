package erofs

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/short"
)

// erofsTool returns the path of a program of erofs-utils 1.7 or later. That it is
// missing is a failure: `make erofs-utils` puts it there.
func erofsTool(tb testing.TB, name string) string {
	tb.Helper()
	dir := os.Getenv("GANTRY_PEERS")
	if dir == "" {
		dir = filepath.Join("..", "..", ".cache", "bin")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		tb.Fatalf("%s is missing, get it with `make erofs-utils`: %v", name, err)
	}
	return path
}

// fsck has fsck.erofs check an index, every file's data with it, and unpacks it to out if that is given.
func fsck(tb testing.TB, index, layer, out string) error {
	tb.Helper()
	args := []string{"-d1", "--device=" + layer}
	if out != "" {
		args = append(args, "--extract="+out, "--xattrs", "--preserve")
	} else {
		args = append(args, "--extract")
	}
	text, err := exec.CommandContext(tb.Context(), erofsTool(tb, "fsck.erofs"), append(args, index)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("fsck.erofs: %w\n%.4000s", err, text)
	}
	return nil
}

// compareFsck wants fsck.erofs to find no fault, and what it unpacks to be what was written.
func compareFsck(tb testing.TB, root *Inode, layer []byte) {
	tb.Helper()
	index, tar := writeFiles(tb, root, layer)
	if err := fsck(tb, index, tar, ""); err != nil {
		tb.Error(err)
	}
	appendDevice(tb, index, layer)
	out := filepath.Join(tb.TempDir(), "out")
	if err := fsck(tb, index, tar, out); err != nil {
		tb.Error(err)
		return
	}
	endHoles(tb, out, root, map[*Inode]bool{})
	compareMount(tb, out, root, layer)
}

// appendDevice puts the layer where the device table maps it, and takes the address from the table: fsck.erofs 1.8.6 finds
// the device of a chunk, but of a flat file only its address, which it then reads from the image. The kernel's tests hold
// the table itself.
func appendDevice(tb testing.TB, index string, layer []byte) {
	tb.Helper()
	image, err := os.ReadFile(index)
	if err != nil {
		tb.Fatal(err)
	}
	if mapped := newFlat(image, layer).mapped; int64(len(image)) != mapped {
		tb.Fatalf("index of %d bytes, its device is mapped at %d", len(image), mapped)
	}
	clear(image[deviceSlot*deviceSlotSize+68:][:4])
	if err := os.WriteFile(index, append(image, layer...), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// unpackable changes a tree until fsck.erofs can unpack it on the file system of the tests: without files of terabytes (it
// writes their holes), names beyond ext4's 65,000 for an inode, attributes that are empty (it stops at them), beyond 4 KiB or
// not for that type of file, ACLs that are none or handed down, modes of symlinks and years after 2446.
func unpackable(root *Inode) {
	links := wantNlink(root)
	keep := func(c Dirent) bool {
		return links[c.Inode] < 65_000 && (c.Inode.Mode&unix.S_IFMT != unix.S_IFREG || c.Inode.Size <= 1<<30)
	}
	stack := []*Inode{root}
	for len(stack) > 0 {
		in := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		in.Children = slices.DeleteFunc(in.Children, func(c Dirent) bool { return !keep(c) })
		for _, c := range in.Children {
			stack = append(stack, c.Inode)
		}
		format := in.Mode & unix.S_IFMT
		if format == unix.S_IFLNK {
			in.Mode |= 0o777
			in.Mode &^= 0o7000
		}
		in.Mtime = min(in.Mtime, 1<<33)
		in.Xattrs = maps.Clone(in.Xattrs)
		total := 0
		for _, name := range slices.Sorted(maps.Keys(in.Xattrs)) {
			value := in.Xattrs[name]
			plain := format == unix.S_IFREG || format == unix.S_IFDIR
			acl := name == "system.posix_acl_default" || strings.HasPrefix(name, "system.") && !strings.HasPrefix(value, "\x02\x00\x00\x00\x01")
			if total += len(name) + len(value) + 32; total > 3000 || value == "" || acl || (!plain && !strings.HasPrefix(name, "trusted.")) {
				delete(in.Xattrs, name)
			}
		}
	}
}

// endHoles makes files as long as they are: fsck.erofs 1.8.6 unpacks none of a hole at a file's end.
func endHoles(tb testing.TB, path string, in *Inode, seen map[*Inode]bool) {
	tb.Helper()
	if in.Mode&unix.S_IFMT == unix.S_IFREG && !seen[in] {
		data := int64(0)
		for _, e := range in.Data {
			data = e.Off + e.Len
		}
		fi, err := os.Lstat(path)
		if err != nil {
			tb.Error(err)
			return
		}
		if fi.Size() >= data && fi.Size() < in.Size {
			err := errors.Join(os.Truncate(path, in.Size), unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{}, {Sec: in.Mtime, Nsec: int64(in.MtimeNsec)}}, 0))
			if err != nil {
				tb.Error(err)
			}
		}
	}
	seen[in] = true
	for _, c := range in.Children {
		endHoles(tb, path+"/"+c.Name, c.Inode, seen)
	}
}

func TestFsckUnpacksEverything(t *testing.T) {
	t.Parallel()
	root, layer := everything()
	unpackable(root)
	compareFsck(t, root, layer)
}

func TestFsckFindsDamage(t *testing.T) {
	t.Parallel()
	root := dir(named("f", file(1000, Extent{0, 1000, 512})))
	index, tar := writeFiles(t, root, layerFile(4096))
	if err := fsck(t, index, tar, ""); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(index, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0xff, 0xff, 0xff}, metaStart+compactSize); err != nil {
		t.Fatal(err)
	}
	if err := fsck(t, index, tar, ""); err == nil {
		t.Error("fsck.erofs finds no fault in an overwritten directory")
	}
}

// TestOraclesAgreeOnRandomTrees shows the same trees to fsck.erofs, the kernel and go-erofs.
func TestOraclesAgreeOnRandomTrees(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(11, 12))
	written, trees := 0, short.Size(150, 50)
	for range trees { //nolint:paralleltest // they count together
		layer := layerFile(r.IntN(1 << 16))
		data := make([]byte, r.IntN(1500))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		root := (&script{data: data, layer: layer}).tree()
		unpackable(root)
		if Write(discard{}, root, device1(layer)) != nil {
			continue // as FuzzWrite has it
		}
		written++
		t.Run("", func(t *testing.T) {
			compareReader(t, image(t, root, layer), root, layer)
			index, tar := writeFiles(t, root, layer)
			compareMount(t, mountIndex(t, index, tar), root, layer)
			compareFsck(t, root, layer)
		})
	}
	if written < trees/8 {
		t.Errorf("only %d of %d trees could be written: that says little", written, trees)
	}
	t.Logf("%d trees", written)
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
