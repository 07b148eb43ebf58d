package snapshotter

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/sys/mountinfo"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain gives the tests a temporary folder of their own, so that a mount, a
// loop device or a goroutine that one of them leaves is seen at the end.
func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "gantry-snapshotter-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv("TMPDIR", dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := mount.SetTempMountLocation(filepath.Join(dir, "mounts")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	before := loopDevices()
	code := m.Run()
	// What containerd's mount maps for an overlay can stay: with lowers that fill a page its own thread is in there when it
	// unmounts it, for good if that is the process's first thread. Gantry mounts nothing there.
	if warnings, err := mount.CleanupTempMounts(unix.MNT_DETACH); err != nil || len(warnings) > 0 {
		fmt.Fprintln(os.Stderr, warnings, err)
		code = 1
	}
	left := append(mountsUnder(dir), loopsUnder(dir)...)
	for _, l := range left {
		fmt.Fprintln(os.Stderr, "left behind:", l)
		code = 1
	}
	removeLoopDevices(before)
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

func mountsUnder(dir string) []string {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return []string{err.Error()}
	}
	var left []string
	for i := len(infos) - 1; i >= 0; i-- {
		left = append(left, infos[i].Mountpoint)
		if err := unmountAll(infos[i].Mountpoint); err != nil {
			left = append(left, err.Error())
		}
	}
	return left
}

func loopsUnder(dir string) []string {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return []string{err.Error()}
	}
	var left []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir) {
			left = append(left, f+": "+strings.TrimSpace(string(b)))
		}
	}
	return left
}

// loopDevices lists the machine's loop devices, used or not.
func loopDevices() map[string]bool {
	devices, err := filepath.Glob("/sys/block/loop*")
	if err != nil {
		panic(err) // the pattern is bad
	}
	found := map[string]bool{}
	for _, d := range devices {
		found[filepath.Base(d)] = true
	}
	return found
}

// removeLoopDevices removes the devices that are not among those of before and that nobody uses: thousands, after containerd's
// suite with 128 layers. The kernel keeps a device that it made until it is told not to.
func removeLoopDevices(before map[string]bool) {
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return // then none was made
	}
	defer control.Close()
	var removers sync.WaitGroup // the kernel waits with each, and can do so with many at once
	defer removers.Wait()
	for d := range loopDevices() {
		if n, err := strconv.Atoi(strings.TrimPrefix(d, "loop")); err == nil && !before[d] {
			removers.Go(func() { _ = unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_REMOVE, n) })
		}
	}
}
