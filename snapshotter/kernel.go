package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// mountLayer mounts a tar layer whose index is in order. The caller holds the
// lock of id.
func (s *Snapshotter) mountLayer(ctx context.Context, id string) error {
	if _, err := s.checkLayer(id); err != nil {
		return err
	}
	if err := os.Mkdir(s.mountpoint(id), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return mountTar(ctx, s.mode, s.index(id), s.layer(id), s.mountpoint(id))
}

// checkLayer compares the layer file with its record: a tar that was cut short
// mounts, and fails when it is read.
func (l layout) checkLayer(id string) (adopted, error) {
	a, err := l.readRecord(id)
	if err != nil {
		return a, err
	}
	fi, err := os.Stat(l.layer(id))
	if err != nil {
		return a, err
	}
	if fi.Size() != a.size {
		return a, fmt.Errorf("layer file %s has %d bytes instead of %d; remove the image and pull it again: %w", a.diffID, fi.Size(), a.size, errdefs.ErrDataLoss)
	}
	return a, nil
}

// mountTar mounts index with layer as its device.
func mountTar(ctx context.Context, mode Mode, index, layer, target string) error {
	if mode == ModeLoop {
		i, err := attachLoop(ctx, index, layerLoop)
		if err != nil {
			return err
		}
		// The mount keeps the devices; without it they go with these handles.
		defer i.Close()
		l, err := attachLoop(ctx, layer, layerLoop)
		if err != nil {
			return err
		}
		defer l.Close()
		index, layer = i.Name(), l.Name()
	}
	return mountReadingAhead(func() error {
		if err := unix.Mount(index, target, "erofs", unix.MS_RDONLY, "device="+layer); err != nil {
			return fmt.Errorf("mount %s with device %s on %s: %w", index, layer, target, err)
		}
		return nil
	})
}

// unmount takes away all that is mounted at the mount point of a snapshot, and
// the mount point. Containers go on: an overlay holds its lowers itself.
func (s *Snapshotter) unmount(id string) error {
	if err := unmountAll(s.mountpoint(id)); err != nil {
		return err
	}
	return removeFile(s.mountpoint(id))
}

func unmountAll(target string) error {
	for {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			// Somebody has a file open; the kernel finishes when they close it.
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // no (more) mount there
		case err != nil:
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
}

// loopControl hands out loop devices.
var loopControl = "/dev/loop-control"

const (
	loopAttempts = 64
	loopPause    = 5 * time.Millisecond
)

// loopKind is what a loop device is for.
type loopKind struct {
	access    int // os.O_RDONLY or os.O_RDWR
	blockSize uint32
}

var (
	layerLoop = loopKind{access: os.O_RDONLY, blockSize: erofs.BlockSize}
	upperLoop = loopKind{access: os.O_RDWR, blockSize: ext4Block}
)

// attachLoop makes a loop device of a file. The kernel detaches it when the
// last user, handle or mount, is gone: nothing can leak, not even when the
// process is killed in between.
func attachLoop(ctx context.Context, file string, kind loopKind) (*os.File, error) {
	backing, err := os.OpenFile(file, kind.access, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile(loopControl, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range loopAttempts {
		var dev *os.File
		if dev, err = tryLoop(control, backing, kind); err == nil {
			return dev, nil
		}
		// Another process may take the free device first, or remove it.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENOENT) {
			break
		}
		select {
		case <-time.After(loopPause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return nil, fmt.Errorf("loop device for %s: %w", file, err)
}

func tryLoop(control, backing *os.File, kind loopKind) (*os.File, error) {
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, err
	}
	dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), kind.access, 0)
	if err != nil {
		return nil, err
	}
	config := unix.LoopConfig{Fd: uint32(backing.Fd()), Size: kind.blockSize}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if kind.access == os.O_RDONLY {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], backing.Name())
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &config); err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return dev, nil
}

// openLoop opens the loop device that has the file, which is named by the path
// that the kernel knows it by; nil if there is none.
func openLoop(file string) (*os.File, error) {
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if dev := openLoopOf("/dev/"+filepath.Base(filepath.Dir(filepath.Dir(name))), file); dev != nil {
			return dev, nil
		}
	}
	return nil, nil
}

// openLoopOf opens a loop device if it has the file, else it returns nil. While
// it is open the kernel does not detach it, so it cannot become that of
// another file before it is used.
func openLoopOf(device, file string) *os.File {
	has := func() bool { // one that is detached meanwhile has no such file any more
		b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
		return err == nil && strings.TrimSuffix(string(b), "\n") == file
	}
	if !has() {
		return nil
	}
	dev, err := os.Open(device)
	if err != nil {
		return nil
	}
	if !has() {
		_ = dev.Close()
		return nil
	}
	return dev
}

// deviceOf returns the path of the block device that is mounted at a path.
func deviceOf(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	to, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return "", err
	}
	return "/dev/" + filepath.Base(to), nil
}
