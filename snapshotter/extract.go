package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
	"github.com/gantryd/gantry/snapshotter/layer"
)

// extract unpacks a tar into the upper directory of id as containerd's own
// differ does, and syncs it. It leaves the mark `extracting`, which the caller
// removes when the folder says for itself what it is; a crash before that
// starts over with an empty directory. The caller holds the lock of id.
func (s *Snapshotter) extract(ctx context.Context, id, tar string, parents []string, keepWhiteouts bool) error {
	if err := writeFile(s.extracting(id), true, func(io.Writer) error { return nil }); err != nil {
		return err
	}
	if err := s.makeUpper(id); err != nil {
		return err
	}
	if err := clearDir(s.upper(id)); err != nil {
		return err
	}
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer f.Close()
	opts := []archive.ApplyOpt{archive.WithParents(parents)}
	if keepWhiteouts {
		opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	}
	if _, err := archive.Apply(ctx, s.upper(id), f, opts...); err != nil {
		if errors.Is(err, unix.EPERM) && onOverlayfs(s.upper(id)) {
			err = fmt.Errorf("%w (overlayfs holds no whiteouts: set snapshotter.mount = \"loop\", snapshotter.upper = \"file\", or root to another file system)", err)
		}
		return err
	}
	return syncFileSystem(s.upper(id)) // which an upper file has of its own
}

// materialise turns an adopted layer into plain files.
func (s *Snapshotter) materialise(ctx context.Context, snap storage.Snapshot) error {
	if err := s.ready(ctx, snap.ParentIDs); err != nil {
		return err
	}
	unlock, err := s.locks.lock(ctx, snap.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if !s.isTar(snap.ID) {
		return nil // somebody else did
	}
	return s.extractAdopted(ctx, snap)
}

// extractAdopted is called with the lock held. Without parents the mounts are a
// bind of the directory, where a whiteout deletes and is not kept.
func (s *Snapshotter) extractAdopted(ctx context.Context, snap storage.Snapshot) error {
	err := s.extract(ctx, snap.ID, s.layer(snap.ID), s.lowers(snap.ParentIDs), len(snap.ParentIDs) > 0)
	if err != nil {
		return errors.Join(err, clearDir(s.upper(snap.ID)), removeFile(s.extracting(snap.ID)))
	}
	if err := s.dropLayer(snap.ID); err != nil {
		return err
	}
	return removeFile(s.extracting(snap.ID))
}

// extractCommitted makes a directory layer of a committed tar layer, on a host
// that cannot mount it (any more).
func (s *Snapshotter) extractCommitted(ctx context.Context, id string, parents []string) error {
	if err := s.dropUpperFile(ctx, id); err != nil { // empty, or Commit had refused
		return err
	}
	if err := s.extract(ctx, id, s.layer(id), s.lowers(parents), len(parents) > 0); err != nil {
		return err
	}
	if err := s.dropLayer(id); err != nil {
		return err
	}
	return removeFile(s.extracting(id))
}

// dropLayer takes an adopted layer away from a snapshot. The link goes before
// what describes it: a link without description would be no layer.
func (s *Snapshotter) dropLayer(id string) error {
	defer s.tars.forget(id)
	return errors.Join(s.unmount(id), removeFile(s.layer(id)), removeFile(s.index(id)), removeFile(s.lowestIndex(id)), removeFile(s.onlyLowest(id)), removeFile(s.record(id)))
}

// settle finishes a directory that was extracted before its parent was known:
// implied directories take the parents' attributes; a lowest layer has nothing
// to hide, so its whiteouts go.
func (s *Snapshotter) settle(ctx context.Context, id string, parents []string) error {
	var err error
	if len(parents) == 0 {
		err = dropWhiteouts(s.upper(id))
	} else {
		err = s.inherit(ctx, id, parents)
	}
	if err == nil && s.hasUpperFile(id) {
		err = syncFileSystem(s.upper(id)) // another file system than the mark's
	}
	if err != nil {
		return err
	}
	return errors.Join(removeFile(s.pending(id)), removeFile(s.record(id)))
}

func dropWhiteouts(dir string) error {
	return filepath.WalkDir(dir, func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if err := unix.Lremovexattr(path, "trusted.overlay.opaque"); err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
				return fmt.Errorf("%s: %w", path, err)
			}
			return nil
		}
		var st unix.Stat_t
		if d.Type()&iofs.ModeCharDevice == 0 {
			return nil
		}
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if st.Rdev != 0 {
			return nil
		}
		return removeQuietly(path)
	})
}

// removeQuietly leaves the time of the directory as it is.
func removeQuietly(path string) error {
	dir := filepath.Dir(path)
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return nil
}

// inherit copies to implied directories what an index would have said of them.
func (s *Snapshotter) inherit(ctx context.Context, id string, parents []string) error {
	table, err := s.table(ctx, id, s.pending(id))
	if err != nil {
		return err
	}
	if !table.Implies() {
		return nil
	}
	root, err := table.Index(s.parents(ctx, parents))
	if err != nil {
		return err
	}
	return eachDirectory("/", root, func(path string, dir *erofs.Inode) error {
		_, kind, err := table.Lookup(path)
		if err != nil || kind != layer.Implied || path == "/" {
			return err
		}
		return copyAttributes(filepath.Join(s.upper(id), path), dir)
	})
}

// eachDirectory visits a directory after the directories in it.
func eachDirectory(path string, dir *erofs.Inode, visit func(string, *erofs.Inode) error) error {
	for _, c := range dir.Children {
		if c.Inode.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		if err := eachDirectory(filepath.Join(path, c.Name), c.Inode, visit); err != nil {
			return err
		}
	}
	return visit(path, dir)
}

func copyAttributes(path string, from *erofs.Inode) error {
	if err := os.Lchown(path, int(from.UID), int(from.GID)); err != nil {
		return err
	}
	for name, value := range from.Xattrs {
		if err := unix.Lsetxattr(path, name, []byte(value), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("%s: set %s: %w", path, name, err)
		}
	}
	if err := unix.Chmod(path, from.Mode&0o7777); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	t := unix.Timespec{Sec: from.Mtime, Nsec: int64(from.MtimeNsec)}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
