package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Usage returns the blocks (in bytes) and inodes that a snapshot really takes,
// without its parents. A layer file that several snapshots link counts for
// each. Of an upper file the blocks count that it takes on the disk. An active directory, and a committed one that the worker has not
// measured yet, is walked.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	var (
		id     string
		info   snapshots.Info
		stored snapshots.Usage
	)
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, info, stored, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	var usage snapshots.Usage
	switch {
	case info.Kind == snapshots.KindView:
		return stored, nil
	case info.Kind == snapshots.KindActive:
		usage, err = s.activeUsage(ctx, id)
	case s.isTar(id):
		usage, err = s.tarUsage(id)
	default:
		usage, err = s.directoryUsage(ctx, id)
	}
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return usage, nil
}

// activeUsage adds what a layer adopted so far takes.
func (s *Snapshotter) activeUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	usage, err := s.writtenUsage(ctx, id)
	if err == nil && s.isTar(id) {
		var tar snapshots.Usage
		tar, err = s.tarUsage(id)
		usage.Add(tar)
	}
	return usage, err
}

// writtenUsage is that of the upper directory. Prepare may be about to make it.
func (s *Snapshotter) writtenUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	switch {
	case s.hasUpperFile(id):
		return s.upperFileUsage(ctx, id)
	case !exists(s.upper(id)):
		return snapshots.Usage{}, nil
	}
	return diskUsage(ctx, s.upper(id))
}

// commitUsage is the usage to store with a Commit: a tar layer's, which is two
// stats. A directory's is walked later and kept in a file, because storage
// offers no way to change it after Commit. It refuses an adopted layer under an
// upper directory that was written to: one of the two would be lost.
func (s *Snapshotter) commitUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	if !s.isTar(id) {
		return snapshots.Usage{}, nil
	}
	if s.hasUpperFile(id) {
		if err := s.remountUpper(ctx, id); err != nil {
			return snapshots.Usage{}, err
		}
	}
	empty, err := isEmpty(s.upper(id))
	if err != nil {
		return snapshots.Usage{}, err
	}
	if !empty {
		return snapshots.Usage{}, fmt.Errorf("a layer was applied, and then files were written through mounts taken before; ask for the mounts again after Apply: %w", errdefs.ErrFailedPrecondition)
	}
	return s.tarUsage(id)
}

func (l layout) tarUsage(id string) (snapshots.Usage, error) {
	var usage snapshots.Usage
	for _, name := range []string{l.layer(id), l.index(id)} {
		fi, err := os.Stat(name)
		if errors.Is(err, iofs.ErrNotExist) {
			continue
		} else if err != nil {
			return usage, err
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			usage.Add(snapshots.Usage{Inodes: 1, Size: st.Blocks * 512})
		}
	}
	return usage, nil
}

// directoryUsage of a committed directory, from its file or by a walk.
func (s *Snapshotter) directoryUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	var usage snapshots.Usage
	if s.hasUpperFile(id) {
		return s.upperFileUsage(ctx, id)
	}
	if b, err := os.ReadFile(s.usage(id)); err == nil {
		if _, err := fmt.Sscanf(string(b), "%d %d\n", &usage.Inodes, &usage.Size); err == nil {
			return usage, nil
		}
	}
	return diskUsage(ctx, s.upper(id))
}

// measure walks a committed directory once and stores the result.
func (s *Snapshotter) measure(ctx context.Context, id string) {
	unlock, err := s.locks.lock(ctx, id)
	if err != nil {
		return
	}
	defer unlock()
	if exists(s.usage(id)) || !exists(s.upper(id)) {
		return
	}
	usage, err := diskUsage(ctx, s.upper(id))
	if err == nil {
		err = writeFile(s.usage(id), false, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%d %d\n", usage.Inodes, usage.Size)
			return err
		})
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("snapshot", id).Debug("snapshotter: usage not stored")
	}
}

func diskUsage(ctx context.Context, dir string) (snapshots.Usage, error) {
	u, err := fs.DiskUsage(ctx, dir)
	return snapshots.Usage(u), err
}
