package integration

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

// A restored database is older than what containerd knows. What came after is told, nothing that was written is lost, and
// images that were pulled after can be pulled again.
func TestCheckDatabaseOlderThanContainerd(t *testing.T) {
	needGantry(t)
	f := newFaultRegistry(t, harness.FaultOptions{})
	n := newFaultyNode(t, harness.Options{}, f)
	var refs [2]string
	for i := range refs {
		im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(uint64(95+i), 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		refs[i] = f.AddImage(im, "faulty/older", []string{"before", "after"}[i])
	}
	mustPull(t, n, "default", refs[0])
	if err := errors.Join(n.Gantryd().Stop(), n.StartGantryd(t.Context())); err != nil { // which writes the copy
		t.Fatal(err)
	}
	untilServed(t, n, refs[0])
	mustPull(t, n, "default", refs[1])
	if err := n.RunDetached(t.Context(), "default", refs[1], "young", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	mustExec(t, n, "young", "/helper", "write", "/precious", "what the container wrote")
	n.KillGantryd()
	root := filepath.Join(n.Dir, "gantry")
	if err := os.Truncate(filepath.Join(root, "metadata.db"), 2*4096); err != nil {
		t.Fatal(err)
	}
	out, code := checked(t, n, "--repair")
	if code != 0 || !strings.Contains(out, "it is again as it was saved") || !strings.Contains(out, "pull those images again") {
		t.Errorf("repair: exit code %d:\n%s", code, out)
	}
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	untilServed(t, n, refs[0])
	mustRun(t, n, "default", refs[0], "95")
	// The running container goes on.
	if got := mustExec(t, n, "young", "/helper", "cat", "/precious"); got != "what the container wrote" {
		t.Errorf("the container reads %q", got)
	}
	if found, err := filepath.Glob(filepath.Join(root, "lost", "*", "*", "upper", "precious")); err != nil || len(found) != 1 {
		t.Errorf("what it wrote is at %v, %v", found, err)
	}
	out, code = checked(t, n, "--repair")
	if code != 1 || !strings.Contains(out, "gantryd does not know it") || !strings.Contains(out, refs[1]) || strings.Contains(out, refs[0]) ||
		!strings.Contains(out, "containers made from it come first") {
		t.Errorf("with its container: exit code %d:\n%s", code, out)
	}
	if out, err := n.Ctr(t.Context(), "default", "task", "delete", "--force", "young"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := n.Ctr(t.Context(), "default", "container", "delete", "young"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, code = checked(t, n, "--repair"); code != 0 || !strings.Contains(out, "pull the image again") {
		t.Errorf("without: exit code %d:\n%s", code, out)
	}
	mustPull(t, n, "default", refs[1])
	mustRun(t, n, "default", refs[1], "96")
	wantClean(t, n)
}

// On a full disk everything can be checked; a blob that cannot be fetched for want of room is kept until there is some.
func TestCheckOnFullDisk(t *testing.T) {
	needGantry(t)
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(97, 4<<20))
	if err != nil {
		t.Fatal(err)
	}
	f := newFaultRegistry(t, harness.FaultOptions{})
	n := newFaultyNode(t, harness.Options{DiskMiB: 96}, f)
	ref := f.AddImage(im, "faulty/full", "test")
	mustPull(t, n, "default", ref)
	root := filepath.Join(n.Dir, "gantry")
	layer := im.Layers[2].Digest
	blob := filepath.Join(root, "content", "blobs", "sha256", layer.Encoded())
	flipByte(t, blob, 1<<20)
	fill(t, filepath.Join(root, "filler"))
	out, code := checked(t, n)
	if code != 1 || !strings.Contains(out, ": 1 fault\n") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	out, code = checked(t, n, "--repair")
	if code != 1 || !strings.Contains(out, "not repaired: blob "+blob) || !strings.Contains(out, "is full") {
		t.Errorf("repair: exit code %d:\n%s", code, out)
	}
	if _, err := os.Stat(blob); err != nil {
		t.Errorf("the blob was dropped: %v", err)
	}
	if err := os.Remove(filepath.Join(root, "filler")); err != nil {
		t.Fatal(err)
	}
	if out, code := checked(t, n, "--repair"); code != 0 || !strings.Contains(out, "fetched again") {
		t.Errorf("with room: exit code %d:\n%s", code, out)
	}
	wantClean(t, n)
}

// fill leaves no free block on the file system of path.
func fill(t *testing.T, path string) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	block := make([]byte, 1<<20)
	for len(block) > 0 {
		if _, err := file.Write(block); errors.Is(err, unix.ENOSPC) {
			block = block[:len(block)/2]
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := file.Sync(); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}
