package clone

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mountXFS mounts a new file system that can share blocks.
func mountXFS(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	image, target := filepath.Join(dir, "image"), filepath.Join(dir, "xfs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 512<<20); err != nil { // sparse; mkfs.xfs refuses less than 300 MiB
		t.Fatal(err)
	}
	if err := os.Mkdir(target, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.xfs", "-q", "-m", "reflink=1", image}, {"mount", "-o", "loop", image, target}} {
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s (this test needs root, xfsprogs and a kernel with XFS)", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.CommandContext(context.Background(), "umount", target).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return target
}

// free counts the free bytes once all is written.
func free(t *testing.T, dir string) int64 {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}

func TestBlocksAreShared(t *testing.T) { //nolint:paralleltest // it counts what is free
	dir := mountXFS(t)
	ranges(t, dir, dir)
	const size = 40<<20 + 1000
	_, src := random(t, dir, size)
	dst := file(t, dir)
	before := free(t, dir)
	if n, err := Range(t.Context(), dst, src, 100, size); n != size-100 || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	// The ragged ends are copied.
	if used := before - free(t, dir); used > 2<<20 {
		t.Errorf("a clone of %d bytes took %d of the disk", size, used)
	}
}
