package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// loseUpperFile are ways in which what a container wrote gets lost for good.
var loseUpperFile = map[string]func(name string) error{
	"deleted":            os.Remove,
	"without blocks":     punch,
	"cut to nothing":     func(name string) error { return os.Truncate(name, 0) },
	"damaged superblock": func(name string) error { return overwrite(name, ext4Super+ext4HashSeed) },
}

func overwrite(name string, at int64) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("damaged"), at)
	return errors.Join(err, f.Close())
}

// TestLostUpperFile: what a container wrote and that is gone is told, by check and when the container starts, and
// nothing empty takes its place: not by gantryd's start, not by a repair.
func TestLostUpperFile(t *testing.T) {
	for name, lose := range loseUpperFile {
		for _, after := range []string{"reboot", "restart"} {
			if after == "restart" && name != "deleted" {
				continue // the mount is what is left of one that is gone
			}
			t.Run(name+" "+after, func(t *testing.T) {
				r := newFileRig(t)
				top := r.pull(t, unpacks[0], "x", "", image(t)[0])
				id := r.container(t, "c", top)
				r.inside(t, "c", write("precious", []byte("data")))
				r.restart(t, func() {
					if after == "reboot" {
						r.unmountLayers(t)
					}
					if err := lose(r.upperFile(id)); err != nil {
						t.Fatal(err)
					}
				})
				found := r.mustCheck(t)
				if len(found) != 1 || found[0].Part != PartUpper || found[0].Path != r.upperFile(id) || found[0].Kind != snapshots.KindActive {
					t.Fatalf("found %+v, want %s at %s", found, PartUpper, r.upperFile(id))
				}
				if did, err := r.Mend(t.Context(), found[0]); !errdefs.IsNotImplemented(err) {
					t.Errorf("mended: %s, %v", did, err)
				}
				if after == "restart" { // a container that runs reads on, and somebody may save it
					if !strings.Contains(found[0].Problem, r.upperMount(id)) {
						t.Errorf("%q does not say where it is still to be had", found[0].Problem)
					}
					if b, err := os.ReadFile(filepath.Join(r.upperMount(id), "upper", "precious")); string(b) != "data" {
						t.Errorf("what is still mounted reads %q, %v", b, err)
					}
				} else if _, err := r.Mounts(t.Context(), "c"); err == nil || !strings.Contains(err.Error(), r.upperFile(id)) {
					t.Errorf("got %v, want an error that names the file", err)
				}
				if again := r.mustCheck(t); len(again) != 1 {
					t.Errorf("found %+v after that", again)
				}
				r.unmountLayers(t)
				r.remove(t, "c")
			})
		}
	}
}

// TestLostCommittedUpperFile: the same of a commit.
func TestLostCommittedUpperFile(t *testing.T) {
	r := newFileRig(t)
	id := r.container(t, "c", "")
	r.inside(t, "c", write("precious", []byte("data")))
	r.commit(t, "done", "c", "")
	r.restart(t, func() {
		r.unmountLayers(t)
		if err := os.Remove(r.upperFile(id)); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := r.Prepare(t.Context(), "child", "done"); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), r.upperFile(id)) {
		t.Errorf("a child: %v, want ErrDataLoss of the file", err)
	}
	found := r.mustCheck(t)
	if len(found) != 1 || found[0].Part != PartUpper || found[0].Path != r.upperFile(id) {
		t.Fatalf("found %+v, want %s at %s", found, PartUpper, r.upperFile(id))
	}
}

// TestBadUpperFileAtStart: one container's file must not keep gantryd from starting, whatever state it is in.
func TestBadUpperFileAtStart(t *testing.T) {
	r := newFileRig(t)
	mounts, err := r.Prepare(t.Context(), "c", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Adopt(t.Context(), mounts, r.store(t, image(t)[0])); err != nil {
		t.Fatal(err)
	}
	id := r.id(t, "c")
	r.container(t, "other", "")
	r.restart(t, func() {
		r.unmountLayers(t)
		writeTestFile(t, r.extracting(id))
		if err := overwrite(r.upperFile(id), ext4Super+ext4HashSeed); err != nil {
			t.Fatal(err)
		}
	})
	r.inside(t, "other", write("f", nil))
	if _, err := r.Mounts(t.Context(), "c"); err == nil || !strings.Contains(err.Error(), r.upperFile(id)) {
		t.Errorf("got %v, want an error that names the file", err)
	}
	r.remove(t, "c")
}

// TestUpperFileIsSynced: what an Apply has unpacked is on the disk when it returns, for the tar that it came from goes.
func TestUpperFileIsSynced(t *testing.T) {
	r := newRigIn(t, t.TempDir(), Options{Mount: ModeDirectory, Upper: UpperFile, UpperSize: testUpperSize})
	base := r.pull(t, unpacks[0], "x", "", image(t)[0])
	mounts, err := r.Prepare(t.Context(), "c", base)
	if err != nil {
		t.Fatal(err)
	}
	id := r.id(t, "c")
	if err := r.Adopt(t.Context(), mounts, r.store(t, makeTar(t, reg("a", "data")))); err != nil {
		t.Fatal(err)
	}
	// What the file holds now is what a power failure leaves of it.
	dir := t.TempDir()
	copied, mnt := filepath.Join(dir, "copy"), filepath.Join(dir, "mnt")
	if err := errors.Join(copyFile(copied, r.upperFile(id)), os.Mkdir(mnt, 0o700)); err != nil {
		t.Fatal(err)
	}
	dev, err := mountUpperFile(t.Context(), copied, mnt)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(unmountAll(mnt), dev.Close()); err != nil {
			t.Error(err)
		}
	}()
	if b, err := os.ReadFile(filepath.Join(mnt, "upper", "a")); string(b) != "data" {
		t.Errorf("the disk has %q, %v", b, err)
	}
}

// TestUpperFileSettlesAfterReboot: a layer that was extracted into a file before its parent was known, and whose
// Commit came right before a reboot.
func TestUpperFileSettlesAfterReboot(t *testing.T) {
	layers := image(t)[:2]
	want := reference(t, nil, layers...)
	r := newRigIn(t, t.TempDir(), Options{Mount: ModeDirectory, Upper: UpperFile, UpperSize: testUpperSize})
	for i, blob := range layers {
		key := "step-" + string(rune('0'+i))
		mounts, err := r.Prepare(t.Context(), key, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Adopt(t.Context(), mounts, r.store(t, blob)); err != nil {
			t.Fatal(err)
		}
	}
	r.restart(t, func() { r.unmountLayers(t) })
	r.commit(t, "lowest", "step-0", "")
	r.commit(t, "top", "step-1", "lowest")
	sameTree(t, r.show(t, "top"), want)
}

// TestRestoredDatabaseReusesIDs: an older copy of the database gives the id of a container that it does not know to
// another, whose file is its own although the first one's was still mounted.
func TestRestoredDatabaseReusesIDs(t *testing.T) {
	r := newFileRig(t)
	r.container(t, "old", "")
	if err := r.Close(); err != nil { // saves
		t.Fatal(err)
	}
	saved, err := os.ReadFile(r.saved())
	if err != nil {
		t.Fatal(err)
	}
	r.open(t)
	id := r.container(t, "young", "")
	r.inside(t, "young", write("secret", []byte("data")))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(r.saved(), saved, 0o600), os.Truncate(r.database(), 0)); err != nil {
		t.Fatal(err)
	}
	if _, n, err := RestoreDatabase(t.Context(), r.Snapshotter.root); err != nil || n != 1 {
		t.Fatalf("%d lost, %v", n, err)
	}
	r.open(t)
	if exists(r.upperMount(id)) {
		t.Error("it is still mounted")
	}
	if again := r.container(t, "again", ""); again != id {
		t.Errorf("the next container is %s, want the id %s again", again, id)
	}
	r.inside(t, "again", func(root string) error {
		if left := entries(t, root); len(left) > 0 {
			t.Errorf("another container sees %v", left)
		}
		return nil
	})
}

// TestUpperFileSettlesAfterKill: a gantryd that is killed before its worker comes to a new file leaves the rest to the
// next one.
func TestUpperFileSettlesAfterKill(t *testing.T) {
	r := newFileRig(t)
	id := r.container(t, "c", "")
	directIO := func(t *testing.T, on int) string {
		t.Helper()
		dev, err := openLoop(r.upperFile(id))
		if err != nil || dev == nil {
			t.Fatalf("loop device %v, %v", dev, err)
		}
		defer dev.Close()
		if on >= 0 {
			if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_DIRECT_IO, on); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev.Name()), "loop/dio"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	r.restart(t, func() {
		if err := os.Remove(r.upperSynced(id)); err != nil {
			t.Fatal(err)
		}
		if got := directIO(t, 0); got != "0" {
			t.Fatalf("direct I/O is %s", got)
		}
	})
	if err := r.Close(); err != nil { // waits for the worker
		t.Fatal(err)
	}
	if got := directIO(t, -1); got != "1" || !exists(r.upperSynced(id)) {
		t.Errorf("direct I/O %s, noted as synced: %v", got, exists(r.upperSynced(id)))
	}
}

// TestLeftoverThatStays: what a removed container made immutable does not keep gantryd from starting, and goes when it can.
func TestLeftoverThatStays(t *testing.T) {
	r := newRig(t, ModeDirectory)
	stuck := filepath.Join(r.dir("4711"), "upper", "file")
	if err := os.MkdirAll(filepath.Dir(stuck), 0o700); err != nil {
		t.Fatal(err)
	}
	writeTestFile(t, stuck)
	flag := func(flags int) {
		t.Helper()
		f, err := os.Open(stuck)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	const immutable = 0x10 // FS_IMMUTABLE_FL
	flag(immutable)
	t.Cleanup(func() {
		if exists(stuck) {
			flag(0)
		}
	})
	r.restart(t, nil)
	if err := r.Cleanup(t.Context()); err == nil || !strings.Contains(err.Error(), stuck) {
		t.Errorf("Cleanup: %v, want an error that names the file", err)
	}
	flag(0)
	if err := r.Cleanup(t.Context()); err != nil || exists(r.dir("4711")) {
		t.Errorf("Cleanup: %v, it is there: %v", err, exists(r.dir("4711")))
	}
}

// TestCheckNamesStrayMountPoints: by the path that is there.
func TestCheckNamesStrayMountPoints(t *testing.T) {
	r := newRig(t, ModeDirectory)
	for _, path := range []string{r.mountpoint("998"), r.upperMount("999")} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		found := r.mustCheck(t)
		if len(found) != 1 || found[0].Path != path || found[0].Part != PartMount {
			t.Fatalf("found %+v, want %s at %s", found, PartMount, path)
		}
		if _, err := r.Mend(t.Context(), found[0]); err != nil || exists(path) {
			t.Errorf("mended: %v, it is there: %v", err, exists(path))
		}
	}
}
