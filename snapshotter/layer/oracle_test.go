package layer

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/short"
	"github.com/gantryd/gantry/snapshotter/erofs"
)

// mountTar makes the index of a tar and mounts both, as gantryd does. fsck.erofs,
// which `make erofs-utils` puts there, has to find no fault in it.
func mountTar(t *testing.T, table *Table, tar []byte) string {
	t.Helper()
	root, err := table.Index([]Parent{DirParent(t.TempDir())}) // an empty parent: whiteouts stay
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	index, layer := filepath.Join(dir, "index"), filepath.Join(dir, "layer")
	var image bytes.Buffer
	if err := erofs.Write(&image, root, erofs.Device{ReaderAt: bytes.NewReader(tar), Size: int64(len(tar))}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(index, image.Bytes(), 0o600), os.WriteFile(layer, tar, 0o600)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), fsckProgram(t), "-d1", "--extract", "--device="+layer, index).CombinedOutput()
	if err != nil {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
	at := t.TempDir()
	if err := unix.Mount(index, at, "erofs", unix.MS_RDONLY, "device="+layer); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	})
	return at
}

func fsckProgram(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("GANTRY_PEERS")
	if dir == "" {
		dir = filepath.Join("..", "..", ".cache", "bin")
	}
	path := filepath.Join(dir, "fsck.erofs")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("fsck.erofs is missing, get it with `make erofs-utils`: %v", err)
	}
	return path
}

// compareMounted holds what the kernel shows of a tar with its index against
// what containerd unpacks. It reports false for a tar that both refuse, or that
// the format or the disk of the tests has no room for.
func compareMounted(t *testing.T, tar []byte) bool {
	t.Helper()
	upper := upperDir(t)
	want := applied(t, upper, tar)
	table, err := scan(t.Context(), readerSource{bytes.NewBuffer(tar)}, len(upper))
	if want != nil && err == nil && table.OnlyLowest() != nil {
		return false
	}
	if (want == nil) != (err == nil) {
		t.Fatalf("containerd: %v\ngantry:     %v", want, err)
	}
	if err != nil {
		return false
	}
	noTime := map[string]bool{}
	walkTree(table.root, "/", func(path string, n *erofs.Inode) {
		noTime[path] = table.inherit[n]&inheritMtime != 0 || isWhiteout(n)
	})
	skip := func(path string) bool { return noTime[path] }
	if d := diff(describeDisk(t, upper, skip), describeDisk(t, mountTar(t, table, tar), skip)); d != "" {
		t.Fatalf("the mount differs:\n%s", d)
	}
	return true
}

// TestMountEqualsContainerd goes all the way: tar, scan, index, kernel.
func TestMountEqualsContainerd(t *testing.T) {
	t.Parallel()
	shown := 0
	cases := bothCases()
	for _, name := range slices.Sorted(maps.Keys(cases)) { //nolint:paralleltest // they count together
		t.Run(name, func(t *testing.T) {
			if compareMounted(t, cases[name]) {
				shown++
			}
		})
	}
	if shown < len(cases)/3 {
		t.Errorf("only %d of %d tars were mounted", shown, len(cases))
	}
}

func TestRandomMountsEqualContainerd(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(21, 22))
	shown, tars := 0, short.Size(300, 60)
	for range tars { //nolint:paralleltest // as above
		data := randomBytes(r, 20+r.IntN(80))
		t.Run("", func(t *testing.T) {
			if compareMounted(t, (&choices{data: data}).makeTar()) {
				shown++
			}
		})
	}
	if shown < tars/5 {
		t.Errorf("only %d of %d tars were mounted: that says little", shown, tars)
	}
	t.Logf("%d mounted", shown)
}

// TestSmallFilesMounted looks at every one of 8,400 entries (2,000 with -short) through the kernel.
func TestSmallFilesMounted(t *testing.T) {
	t.Parallel()
	tar, err := io.ReadAll(&sourceTree{limit: short.Size(8400, 2000)})
	if err != nil {
		t.Fatal(err)
	}
	if !compareMounted(t, tar) {
		t.Error("refused")
	}
}
