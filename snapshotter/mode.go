package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// Mode says how layers become visible.
type Mode string

const (
	// ModeAuto takes the first of the following that works.
	ModeAuto Mode = "auto"
	// ModeFile mounts index and tar as files (Linux 6.12 and later).
	ModeFile Mode = "file"
	// ModeLoop mounts them as two loop devices with 512-byte blocks.
	ModeLoop Mode = "loop"
	// ModeDirectory extracts layers into directories.
	ModeDirectory Mode = "directory"
)

// onOverlayfs says whether dir lies on overlayfs, which takes no upper directory
// on itself.
func onOverlayfs(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && uint32(st.Type) == unix.OVERLAYFS_SUPER_MAGIC
}

// chooseMode tries what is asked for by mounting a tiny layer in root: kernel
// and file system both have a say, so no version is compared.
func chooseMode(ctx context.Context, root string, want Mode) (Mode, string, error) {
	switch want {
	case ModeDirectory:
		return want, "configured", nil
	case ModeFile, ModeLoop:
		if err := probe(ctx, root, want); err != nil {
			return "", "", fmt.Errorf("mount mode %q does not work in %s: %w", want, root, err)
		}
		return want, "configured", nil
	case ModeAuto, "":
	default:
		return "", "", fmt.Errorf("mount mode %q is none of auto, file, loop, directory: %w", want, errdefs.ErrInvalidArgument)
	}
	file := probe(ctx, root, ModeFile)
	if file == nil {
		return ModeFile, "the kernel mounts EROFS from files here", nil
	}
	loop := probe(ctx, root, ModeLoop)
	if loop == nil {
		return ModeLoop, fmt.Sprintf("EROFS mounts from loop devices, but not from files (%v)", file), nil
	}
	if err := context.Cause(ctx); err != nil {
		return "", "", err
	}
	return ModeDirectory, fmt.Sprintf("EROFS mounts neither from files (%v) nor from loop devices (%v)", file, loop), nil
}

// probe mounts a layer of one file and reads it through both of its parts.
func probe(ctx context.Context, root string, mode Mode) (err error) {
	defer func() { err = errors.Join(err, removeProbe(root)) }()
	layer, err := makeProbe(ctx, root, mode)
	if err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(layer, "probe"))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, probeData()) {
		return fmt.Errorf("the mount shows wrong data: %w", errdefs.ErrDataLoss)
	}
	return nil
}

func probeData() []byte { return bytes.Repeat([]byte("gantry"), erofs.BlockSize/6+1)[:erofs.BlockSize] }

// makeProbe makes a layer of the file `probe` and returns where it is to be
// seen. The caller calls removeProbe, also after a failure.
func makeProbe(ctx context.Context, root string, mode Mode) (string, error) {
	dir := filepath.Join(root, "probe")
	if err := removeProbe(root); err != nil { // of a process that was killed
		return "", err
	}
	shown := filepath.Join(dir, "mnt", "0")
	if err := os.MkdirAll(shown, 0o700); err != nil {
		return "", err
	}
	if mode == ModeDirectory {
		return shown, os.WriteFile(filepath.Join(shown, "probe"), probeData(), 0o600)
	}
	data := append(make([]byte, erofs.BlockSize), probeData()...)
	layer, index := filepath.Join(dir, "layer"), filepath.Join(dir, "index")
	if err := os.WriteFile(layer, data, 0o600); err != nil {
		return "", err
	}
	if err := writeProbe(index, data); err != nil {
		return "", err
	}
	return shown, mountTar(ctx, mode, index, layer, shown)
}

func writeProbe(name string, layer []byte) error {
	file := &erofs.Inode{
		Mode: unix.S_IFREG | 0o644, Size: erofs.BlockSize,
		Data: []erofs.Extent{{Len: erofs.BlockSize, DevOff: erofs.BlockSize}},
	}
	root := &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Children: []erofs.Dirent{{Name: "probe", Inode: file}}}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	err = erofs.Write(f, root, erofs.Device{ReaderAt: bytes.NewReader(layer), Size: int64(len(layer))})
	return errors.Join(err, f.Close())
}

func removeProbe(root string) error {
	dir := filepath.Join(root, "probe")
	for _, target := range []string{"merged", "mapped/0", "mapped", "mnt/0", "mnt"} { // those on top first; the last is of an older gantryd
		if err := unmountAll(filepath.Join(dir, target)); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}
