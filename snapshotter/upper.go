package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Upper says where a container's changes are kept.
type Upper string

const (
	// UpperDirectory keeps them in a directory, which may fill the disk.
	UpperDirectory Upper = "directory"
	// UpperFile keeps them in a sparse file with an ext4 file system of
	// Options.UpperSize, so that a container fills that at most.
	UpperFile Upper = "file"
)

// Bounds of the size of an upper file, in bytes. Less has no room for a journal;
// the metadata of more takes long to write and to mount.
const (
	MinUpperSize = 16 << 20
	MaxUpperSize = 1 << 40
)

// DefaultUpperSize is the size of an upper file, in bytes, where Options do not say.
const DefaultUpperSize = 10 << 30

// uppers is what makes upper files; nil where uppers are directories.
type uppers struct {
	templates *templates
	size      int64
}

// chooseUpper tries an upper file in root if files are asked for.
func chooseUpper(ctx context.Context, root string, want Upper, size int64) (*uppers, error) {
	switch want {
	case UpperDirectory, "":
		return nil, nil
	case UpperFile:
	default:
		return nil, fmt.Errorf("snapshotter.upper = %q is neither directory nor file: %w", want, errdefs.ErrInvalidArgument)
	}
	if size == 0 {
		size = DefaultUpperSize
	}
	if size < MinUpperSize || size > MaxUpperSize {
		return nil, fmt.Errorf("snapshotter.upper_size = %d is not from %d to %d: %w", size, int64(MinUpperSize), int64(MaxUpperSize), errdefs.ErrInvalidArgument)
	}
	t, err := newTemplates(mkfsPlaces)
	if err == nil {
		u := &uppers{templates: t, size: wholeBlocks(size)}
		if err = u.probe(ctx, root); err == nil {
			return u, nil
		}
	}
	return nil, fmt.Errorf("snapshotter.upper = \"file\" does not work in %s: %w (set it to \"directory\", or change what is in the way)", root, err)
}

func wholeBlocks(size int64) int64 { return size / ext4Block * ext4Block }

// probe makes, mounts and uses an upper file, because kernel, file system and
// mkfs.ext4 all have a say.
func (u *uppers) probe(ctx context.Context, root string) (err error) {
	dir := filepath.Join(root, "probe")
	if err := removeProbe(root); err != nil { // of a process that was killed
		return err
	}
	defer func() { err = errors.Join(err, removeProbe(root)) }()
	mnt := filepath.Join(dir, "mnt")
	if err := os.MkdirAll(mnt, 0o700); err != nil {
		return err
	}
	file := filepath.Join(dir, "upper.ext4")
	if err := u.make(ctx, file, u.size); err != nil {
		return err
	}
	// Freed blocks go back to the disk as holes.
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, u.size-ext4Block, ext4Block)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("punch a hole into a file: %w", err)
	}
	dev, err := mountUpperFile(ctx, file, mnt)
	if err != nil {
		return err
	}
	defer dev.Close()
	upper := filepath.Join(mnt, "upper")
	if err := os.Mkdir(upper, 0o755); err != nil {
		return err
	}
	return unix.Lsetxattr(upper, "trusted.overlay.opaque", []byte("y"), 0)
}

// make puts an empty file system in place by rename. The worker makes it durable
// later; a file without a superblock is made again.
func (u *uppers) make(ctx context.Context, file string, size int64) error {
	t, err := u.templates.get(ctx, size)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file+".tmp", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err = errors.Join(t.write(f), f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, removeFile(f.Name()))
	}
	return nil
}

// fileSize is the size of the upper file that an active snapshot gets; 0: it
// gets a directory. Layers are unpacked into directories: an image is no
// container's doing, and of most of them nothing stays but the tar. They are
// told by the key that containerd gives them, not by labels, which whoever
// writes a pod may set. Where a directory cannot hold whiteouts, a layer that is
// kept in one gets a file, too.
func (s *Snapshotter) fileSize(ctx context.Context, info snapshots.Info) int64 {
	switch {
	case s.uppers == nil || info.Kind != snapshots.KindActive:
		return 0
	case !isUnpackKey(info.Name):
	case s.mode == ModeDirectory && onOverlayfs(s.root):
		return s.uppers.size
	default:
		return 0
	}
	label, ok := info.Labels[snapshots.LabelSnapshotMaxSize]
	if !ok {
		return s.uppers.size
	}
	// Like containerd's erofs snapshotter: bytes, and what is no size counts as none.
	size, err := strconv.ParseInt(label, 10, 64)
	l := log.G(ctx).WithField("snapshot", info.Name).WithField("label", snapshots.LabelSnapshotMaxSize)
	if err != nil || size <= 0 {
		l.Warnf("snapshotter: %q is not a number of bytes, taking upper_size", label)
		return s.uppers.size
	}
	if size < MinUpperSize || size > MaxUpperSize {
		size = min(max(size, MinUpperSize), MaxUpperSize)
		l.Warnf("snapshotter: %s bytes cannot be had, taking %d", label, size)
	}
	return wholeBlocks(size)
}

// isUnpackKey says whether containerd, or a client of its, unpacks a layer under
// this key: snapshots.UnpackKeyFormat, behind what containerd's metadata store
// puts before it (namespace/number/).
func isUnpackKey(key string) bool {
	rest, ok := strings.CutPrefix(key[strings.LastIndexByte(key, '/')+1:], snapshots.UnpackKeyPrefix+"-")
	if !ok {
		return false
	}
	_, chainID, ok := strings.Cut(rest, " ")
	return ok && digest.Digest(chainID).Validate() == nil
}
