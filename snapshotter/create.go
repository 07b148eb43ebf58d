package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Prepare creates an active snapshot. Its mounts are writable. It waits only
// for layers of the chain that are not mounted yet.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, labels, err := s.create(ctx, snapshots.KindActive, key, parent, opts)
	if err != nil {
		return nil, err
	}
	if s.observer != nil {
		ns, _ := namespaces.Namespace(ctx)
		s.observer.Prepared(ns, key, labels)
	}
	return mounts, nil
}

// View creates a read-only snapshot.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, _, err := s.create(ctx, snapshots.KindView, key, parent, opts)
	return mounts, err
}

// form is what an active snapshot's upper is to be, if it has to be made.
type form struct {
	ids      *idMap
	fileSize int64 // bytes of an upper file; 0: a directory on the disk
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, map[string]string, error) {
	var base snapshots.Info
	for _, o := range opts {
		if err := o(&base); err != nil {
			return nil, nil, err
		}
	}
	base.Name, base.Kind = key, kind
	f := form{fileSize: s.fileSize(ctx, base)}
	var snap storage.Snapshot
	err := s.update(ctx, func(ctx context.Context) (err error) {
		snap, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...)
		if err != nil {
			return fmt.Errorf("create snapshot %s: %w", key, err)
		}
		if f.ids, err = s.mapping(ctx, base, snap.ParentIDs); err != nil {
			return fmt.Errorf("snapshot %s: %w", key, err)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	var mounts []mount.Mount
	if err = s.makeFolder(snap); err == nil {
		mounts, err = s.present(ctx, snap, f)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("snapshot %s: %w", key, err), s.abandon(context.WithoutCancel(ctx), key, snap.ID))
	}
	return mounts, base.Labels, nil
}

// makeFolder makes the folder of a snapshot that the database has, so no Cleanup
// takes it for a leftover. It is not made in the transaction, where all calls
// that change something would wait for the file system's journal, too. What is in
// it is made by openUpper.
func (s *Snapshotter) makeFolder(snap storage.Snapshot) error {
	if snap.Kind == snapshots.KindView && len(snap.ParentIDs) > 0 {
		return nil
	}
	dir := s.dir(snap.ID)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		// Left by a snapshot that the database has forgotten since; Cleanup deletes it.
		if err = os.Rename(dir, fmt.Sprintf("%s.stale%d", dir, time.Now().UnixNano())); err == nil {
			err = os.Mkdir(dir, 0o700)
		}
	}
	return err
}

// makeUpper makes the directory whose attributes the root of the overlay shows.
func (s *Snapshotter) makeUpper(id string) error {
	upper := s.upper(id)
	if err := os.Mkdir(upper, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	fi, err := os.Lstat(upper)
	if err != nil || fi.Mode() == fs.ModeDir|0o755 {
		return err // the same mode again would be one more change for Prepare to wait for
	}
	return os.Chmod(upper, 0o755) // whatever the umask is
}

// own makes a directory belong to uid and gid. If it does, nothing is changed: containerd waits for Prepare, and each
// change for the file system's journal.
func own(dir string, uid, gid int) error {
	fi, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) == uid && int(st.Gid) == gid {
		return nil
	}
	return os.Lchown(dir, uid, gid)
}

// chownUpper decides whose an upper is, as containerd's overlay snapshotter does:
// a tar layer's root belongs to 0:0, a directory layer's owner is inherited, and
// in a user namespace its root is the owner. It is noted if the owners of
// what is written are not those of the layers below.
func (s *Snapshotter) chownUpper(ctx context.Context, id string, parents []string, ids *idMap) (err error) {
	var uid, gid int
	switch {
	case ids != nil:
		uid, gid = ids.rootUID, ids.rootGID
	case len(parents) > 0 && !s.isTar(parents[0]):
		if uid, gid, err = s.layerOwner(ctx, parents[0]); err != nil {
			return fmt.Errorf("parent: %w", err)
		}
	}
	if err := own(s.upper(id), uid, gid); err != nil {
		return err
	}
	if ids == nil || !ids.lowers {
		return removeFile(s.shifted(id))
	}
	return writeFile(s.shifted(id), false, func(io.Writer) error { return nil })
}

// abandon takes back a snapshot whose mounts could not be had.
func (s *Snapshotter) abandon(ctx context.Context, key, id string) error {
	if err := s.Remove(ctx, key); err != nil {
		return err
	}
	return s.discard(ctx, id)
}

// Mounts returns the mounts of an active snapshot or a view. It may wait for
// layers that are not mounted yet. An active snapshot that adopted a layer is
// turned into a plain directory first: whoever asks for its mounts wants to see
// and change what is in it.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var snap storage.Snapshot
	var info snapshots.Info
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("mounts of snapshot %s: %w", key, err)
	}
	f := form{fileSize: s.fileSize(ctx, info)}
	if f.ids, err = s.mapping(ctx, info, snap.ParentIDs); err != nil {
		return nil, fmt.Errorf("mounts of snapshot %s: %w", key, err)
	}
	if snap.Kind == snapshots.KindActive && s.isTar(snap.ID) {
		if err := s.openUpper(ctx, snap, f); err != nil {
			return nil, fmt.Errorf("mounts of snapshot %s: %w", key, err)
		}
		if err := s.materialise(ctx, snap); err != nil {
			return nil, fmt.Errorf("extract the layer of snapshot %s: %w", key, err)
		}
	}
	mounts, err := s.present(ctx, snap, f)
	if err != nil {
		return nil, fmt.Errorf("mounts of snapshot %s: %w", key, err)
	}
	return mounts, nil
}

// present makes sure that all lowers and the upper are visible and returns the
// mounts. A missing upper is made, as f says.
func (s *Snapshotter) present(ctx context.Context, snap storage.Snapshot, f form) ([]mount.Mount, error) {
	if err := s.openUpper(ctx, snap, f); err != nil {
		return nil, err
	}
	began := time.Now()
	err := s.ready(ctx, snap.ParentIDs)
	s.spent(ctx, Mounting, time.Since(began))
	if err != nil {
		return nil, err
	}
	return view{
		kind: snap.Kind, upper: s.upper(snap.ID), work: s.workdir(snap.ID),
		lowers: s.lowers(snap.ParentIDs), options: s.overlay, ids: f.ids, empty: s.empty(),
	}.mounts(), nil
}

// lower is the directory that shows the layer of a committed snapshot, which is ready.
func (s *Snapshotter) lower(id string) string {
	if s.tars.has(id) || s.isTar(id) {
		return s.mountpoint(id)
	}
	return s.upper(id)
}

func (s *Snapshotter) lowers(ids []string) []string {
	paths := make([]string, len(ids))
	for i, id := range ids {
		paths[i] = s.lower(id)
	}
	return paths
}

// Commit turns an active snapshot into a committed one called name. containerd
// holds its own database meanwhile, so Commit does one transaction and a few
// stats; a parent given with snapshots.WithParent is taken for an active
// snapshot that has none. The worker does the rest: the index of a layer whose
// implied directories needed the parent, its mount, a directory's usage.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var id string
	var parents []string
	err := s.update(ctx, func(ctx context.Context) (err error) {
		if id, _, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		unlock, ok := s.locks.tryLock(id)
		if !ok {
			return fmt.Errorf("a layer is still being applied to it: %w", errdefs.ErrUnavailable)
		}
		defer unlock()
		usage, err := s.commitUsage(ctx, id)
		if err != nil {
			return err
		}
		if _, err = storage.CommitActive(ctx, key, name, usage, opts...); err != nil {
			return err
		}
		if parents, err = chain(ctx, name); err != nil || len(parents) == 0 {
			return err
		}
		return s.mayHaveParent(id)
	})
	if err != nil {
		return fmt.Errorf("commit snapshot %s: %w", key, err)
	}
	if s.observer != nil {
		ns, _ := namespaces.Namespace(ctx)
		s.observer.SnapshotCommitted(ns, name)
	}
	tar := s.isTar(id)
	if tar || exists(s.pending(id)) {
		s.schedule(id, parents)
	}
	if tar {
		return nil
	}
	finish := s.measure
	if s.hasUpperFile(id) {
		finish = s.syncUpper
	}
	if err := s.work.submit(func(ctx context.Context) { finish(ctx, id) }); err != nil {
		log.G(ctx).WithError(err).WithField("snapshot", id).Debug("snapshotter: a committed directory is not measured, or not synced, now")
	}
	return nil
}

// mayHaveParent refuses a parent for a layer that was adopted without one and can only be the lowest.
func (s *Snapshotter) mayHaveParent(id string) error {
	reason, err := os.ReadFile(s.onlyLowest(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", reason, errdefs.ErrInvalidArgument)
}

// chain returns the ids of a snapshot's ancestors, nearest first. The context
// holds a transaction.
func chain(ctx context.Context, name string) ([]string, error) {
	_, info, _, err := storage.GetInfo(ctx, name)
	if err != nil {
		return nil, err
	}
	var ids []string
	for info.Parent != "" {
		var id string
		if id, info, _, err = storage.GetInfo(ctx, info.Parent); err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}
