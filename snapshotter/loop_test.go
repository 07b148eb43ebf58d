package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestLoopStaysWithItsFile: a device that is found by its file is that file's until it is used, though the last other
// user leaves meanwhile and somebody else wants a device.
func TestLoopStaysWithItsFile(t *testing.T) {
	dir := t.TempDir()
	attach := func(name string) *os.File {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, 1<<16), 0o600); err != nil {
			t.Fatal(err)
		}
		dev, err := attachLoop(t.Context(), path, upperLoop)
		if err != nil {
			t.Fatal(err)
		}
		return dev
	}
	first := attach("a")
	found, err := openLoop(filepath.Join(dir, "a"))
	if err != nil || found == nil || found.Name() != first.Name() {
		t.Fatalf("found %v, %v; want %s", found, err, first.Name())
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	other := attach("b")
	if other.Name() == found.Name() {
		t.Error("the device went to another file while it was held")
	}
	if dev := openLoopOf(other.Name(), filepath.Join(dir, "a")); dev != nil {
		t.Error("the device of another file was taken")
		_ = dev.Close()
	}
	for _, f := range []*os.File{found, other} {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestMendLeavesLoopsOfOthers: what was idle when it was found may be somebody's when it is repaired.
func TestMendLeavesLoopsOfOthers(t *testing.T) {
	r := newRig(t, ModeDirectory)
	path := filepath.Join(t.TempDir(), "theirs")
	if err := os.WriteFile(path, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := attachLoop(t.Context(), path, upperLoop)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if did, err := r.Mend(t.Context(), Flaw{Part: PartLoop, Path: dev.Name()}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %q, %v, want ErrFailedPrecondition", did, err)
	}
}

// TestLoopRemovedMeanwhile attaches files while somebody removes every device that nothing uses, as `losetup --remove` does.
func TestLoopRemovedMeanwhile(t *testing.T) {
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var removers sync.WaitGroup
	for range 8 {
		removers.Go(func() {
			for ctx.Err() == nil {
				if n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE); err == nil {
					_ = unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_REMOVE, n)
				}
			}
		})
	}
	defer func() {
		cancel()
		removers.Wait()
		_ = control.Close()
	}()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		dev, err := attachLoop(t.Context(), path, upperLoop)
		if err != nil {
			t.Fatal(err)
		}
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	}
}
