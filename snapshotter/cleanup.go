package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"
)

// Cleanup deletes what removed snapshots leave behind: mounts with their loop
// devices, folders, and layer files that nothing links any more. containerd
// calls it after each garbage collection, without a lock. One that fails goes on
// with the rest.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	select {
	case s.cleanMu <- struct{}{}:
		defer func() { <-s.cleanMu }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	names, err := s.orphans(ctx)
	if err != nil {
		return fmt.Errorf("clean up snapshots: %w", err)
	}
	var errs []error
	for _, name := range names {
		if err := s.discard(ctx, name); err != nil {
			errs = append(errs, fmt.Errorf("clean up snapshot %s: %w", name, err))
		}
	}
	if err := s.layers.Sweep(ctx, s.keep); err != nil {
		errs = append(errs, fmt.Errorf("sweep layer files: %w", err))
	}
	return errors.Join(errs...)
}

// orphans lists folders and mount points without a snapshot. A writable
// transaction, rolled back, keeps Prepare out meanwhile.
func (s *Snapshotter) orphans(ctx context.Context) (names []string, err error) {
	ctx, tx, err := s.ms.TransactionContext(ctx, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, tx.Rollback()) }()
	ids, err := storage.IDMap(ctx)
	if err := ignoreNotFound(err); err != nil {
		return nil, err
	}
	return s.unknown(func(name string) bool { _, ok := ids[name]; return ok })
}

// unknown lists the entries of snapshots/ and mnt/ that are not known.
func (l layout) unknown(known func(string) bool) ([]string, error) {
	seen := map[string]bool{}
	var names []string
	for _, dir := range []string{l.snapshotsDir(), l.mountsDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			name := e.Name()
			if dir == l.mountsDir() {
				name = strings.TrimSuffix(name, upperMountSuffix)
			}
			if !known(name) && !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return names, nil
}

// discard deletes a snapshot that is not in the database. It waits for a job
// about it to end.
func (s *Snapshotter) discard(ctx context.Context, name string) error {
	unlock, err := s.locks.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	defer s.tars.forget(name)
	if err := s.unmount(name); err != nil {
		return err
	}
	if err := s.dropUpperFile(ctx, name); err != nil {
		return err
	}
	return os.RemoveAll(s.dir(name))
}

// node is what the database says of one snapshot.
type node struct {
	snapshots.Info
	parents []string // ids, nearest first
}

// loadTree reads the whole database once, by id.
func (s *Snapshotter) loadTree(ctx context.Context) (map[string]node, error) {
	tree := map[string]node{}
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		var infos []snapshots.Info
		err := storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
			infos = append(infos, i)
			return nil
		})
		if err := ignoreNotFound(err); err != nil {
			return err
		}
		for _, i := range infos {
			id, _, _, err := storage.GetInfo(ctx, i.Name)
			if err != nil {
				return err
			}
			parents, err := chain(ctx, i.Name)
			if err != nil {
				return err
			}
			tree[id] = node{Info: i, parents: parents}
		}
		return nil
	})
	return tree, err
}

// recover puts the disk in order after a crash, before anybody else looks at
// it: mounts without a snapshot go, half-made files go, an extraction that did
// not end starts over.
func (s *Snapshotter) recover(ctx context.Context, tree map[string]node) error {
	names, err := s.unknown(func(name string) bool { _, ok := tree[name]; return ok })
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := s.discard(ctx, name); err != nil { // the next Cleanup tries again
			log.G(ctx).WithError(err).WithField("snapshot", name).Error("snapshotter: cannot remove what is left of a snapshot")
		}
	}
	for id, n := range tree {
		if err := s.repair(ctx, id, n); err != nil {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
	}
	return nil
}

// repair looks at one snapshot of the database.
func (s *Snapshotter) repair(ctx context.Context, id string, n node) error {
	if n.Kind == snapshots.KindView && len(n.parents) > 0 {
		return nil
	}
	unfinished := n.Kind != snapshots.KindCommitted && s.unfinished(id)
	if !exists(s.dir(id)) {
		if !unfinished {
			return nil // first use says so
		}
		if err := s.makeFolder(storage.Snapshot{ID: id, Kind: n.Kind, ParentIDs: n.parents}); err != nil {
			return err
		}
	}
	if err := s.removeTemporary(id); err != nil {
		return err
	}
	if exists(s.extracting(id)) {
		if s.hasUpperFile(id) {
			if err := s.remountUpper(ctx, id); err != nil {
				log.G(ctx).WithError(err).WithField("snapshot", id).Error("snapshotter: upper file") // as Mounts says
				return nil
			}
		}
		if err := s.rollBack(id, n.Kind); err != nil {
			return err
		}
	}
	// A file that is gone may still be mounted, and somebody save what is in it.
	if !s.hasUpperFile(id) && s.lostUpper(id) == nil {
		if err := s.dropUpperFile(ctx, id); err != nil { // its mount point
			return err
		}
	}
	if !s.isTar(id) && s.mounted(id) {
		if err := s.unmount(id); err != nil {
			return err
		}
	}
	if unfinished {
		return s.finish(ctx, id, n)
	}
	return nil
}

// unfinished says whether nothing was ever written to a snapshot that is not committed, because a crash ended its
// Prepare, or its folders were lost with the power. An overlay that was mounted leaves something in work.
func (s *Snapshotter) unfinished(id string) bool {
	if s.hasUpperFile(id) || s.lostUpper(id) != nil || s.isTar(id) || exists(s.upper(id)) {
		return false
	}
	unused, err := isEmpty(s.workdir(id))
	return err == nil && unused
}

// finish makes what an unfinished snapshot's folder lacks.
func (s *Snapshotter) finish(ctx context.Context, id string, n node) error {
	if s.fileSize(ctx, n.Info) > 0 {
		return nil // made when its mounts are asked for
	}
	ids, err := s.mapping(ctx, n.Info, n.parents)
	if err != nil {
		log.L.WithError(err).WithField("snapshot", id).Warn("snapshotter: user namespace") // as Mounts says
	}
	return s.openUpper(ctx, storage.Snapshot{ID: id, Kind: n.Kind, ParentIDs: n.parents}, form{ids: ids})
}

// rollBack undoes an extraction that a crash interrupted, if it did: without
// its source it was complete.
func (s *Snapshotter) rollBack(id string, kind snapshots.Kind) error {
	if s.isTar(id) || exists(s.pending(id)) {
		if exists(s.upper(id)) {
			if err := clearDir(s.upper(id)); err != nil {
				return err
			}
		}
		if kind == snapshots.KindActive && !s.isTar(id) {
			// Its Apply never returned, so nobody counts on the layer.
			if err := errors.Join(removeFile(s.pending(id)), removeFile(s.record(id))); err != nil {
				return err
			}
		}
	}
	return removeFile(s.extracting(id))
}

// resume starts what the worker has to do for committed snapshots.
func (s *Snapshotter) resume(ctx context.Context, tree map[string]node) {
	started := 0
	for id, n := range tree {
		if s.hasUpperFile(id) && !exists(s.upperSynced(id)) { // killed before the worker came to it
			_ = s.work.submit(func(ctx context.Context) {
				dev, _ := openLoop(s.upperFile(id))
				s.settleUpper(ctx, id, dev)
			})
		}
		if n.Kind == snapshots.KindCommitted && !s.isReady(id) {
			s.schedule(id, n.parents)
			started++
		}
	}
	if started > 0 {
		log.G(ctx).WithField("layers", started).Info("snapshotter: mounting committed layers")
	}
}
