package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// Adopt makes the layer file of diffID the content of the active snapshot that
// the mounts belong to: a hard link, durable when Adopt returns, or, where
// layers cannot be mounted, an extraction.
//
// ErrNotFound: the mounts are not exactly those of an active snapshot of this
// snapshotter. ErrFailedPrecondition: they are, but its upper directory is not
// empty, or a layer was adopted before (which is then extracted, so that the
// next one can be unpacked over it). ErrUnavailable: the layer file is gone.
//
// The index is written here where it does not depend on a parent that only
// Commit will name; Adopt never waits for another layer to be unpacked.
func (s *Snapshotter) Adopt(ctx context.Context, mounts []mount.Mount, diffID digest.Digest) error {
	start := time.Now()
	id, ok := s.ownID(mounts)
	if !ok {
		return fmt.Errorf("mounts of another snapshotter: %w", errdefs.ErrNotFound)
	}
	unpin := s.layers.Pin(diffID)
	defer unpin()
	snap, err := s.adopting(ctx, id)
	if err != nil {
		return err
	}
	// What is extracted needs the attributes of the parents' directories.
	if err := s.settled(ctx, snap.ParentIDs); err != nil {
		return fmt.Errorf("snapshot %s: parents: %w", id, final(err))
	}
	unlock, err := s.locks.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	// Commit holds this lock: it may have come before. A committed snapshot is final.
	if snap, err = s.adopting(ctx, id); err != nil {
		return err
	}
	if err := s.mayAdopt(ctx, snap); err != nil {
		return fmt.Errorf("snapshot %s: %w", id, err)
	}
	l, err := s.layers.Get(ctx, diffID)
	switch {
	case err != nil:
	case s.mode == ModeDirectory:
		err = s.adoptDirectory(ctx, snap, l)
	default:
		err = s.adoptTar(ctx, snap, l)
	}
	if err != nil {
		return fmt.Errorf("snapshot %s: adopt layer %s: %w", id, diffID, final(err))
	}
	s.adopted(id, diffID, start)
	return nil
}

func (s *Snapshotter) adopted(id string, diffID digest.Digest, start time.Time) {
	if s.observer != nil {
		s.observer.Adopted(id, diffID, time.Since(start))
	}
}

// final keeps a failure from reading as "not adopted, unpack it yourself": the
// snapshot's own kinds of errors have a meaning for the caller of Adopt.
func final(err error) error {
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("%s: %w", err.Error(), errdefs.ErrUnavailable)
	}
	return err
}

// ownID finds the snapshot whose upper directory the mounts write to. The path
// is compared as a string with the one that Mounts gives out: nothing is
// resolved, so a path that only leads there is foreign.
func (s *Snapshotter) ownID(mounts []mount.Mount) (string, bool) {
	if len(mounts) != 1 || mounts[0].ReadOnly() || mounts[0].Target != "" {
		return "", false
	}
	m := mounts[0]
	var upper string
	switch m.Type {
	case "bind":
		upper = m.Source
	case "overlay":
		uppers := slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return !strings.HasPrefix(o, "upperdir=") })
		if len(uppers) != 1 {
			return "", false
		}
		upper = strings.TrimPrefix(uppers[0], "upperdir=")
	}
	id := strings.TrimSuffix(filepath.Base(filepath.Dir(upper)), upperMountSuffix)
	return id, isID(id) && upper == s.upper(id)
}

// adopting returns the active snapshot with this id.
func (s *Snapshotter) adopting(ctx context.Context, id string) (snap storage.Snapshot, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		key, ok := ids[id]
		if !ok {
			return fmt.Errorf("snapshot %s: %w", id, errdefs.ErrNotFound)
		}
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if info.Kind != snapshots.KindActive {
			// Nothing that would have the caller write to the mounts instead.
			return fmt.Errorf("snapshot %s is %s and takes no layer: %w", key, info.Kind, errdefs.ErrInvalidArgument)
		}
		snap, err = storage.GetSnapshot(ctx, key)
		return err
	})
	return snap, err
}

// mayAdopt is called with the snapshot's lock held.
func (s *Snapshotter) mayAdopt(ctx context.Context, snap storage.Snapshot) error {
	if !exists(s.dir(snap.ID)) {
		return errdefs.ErrNotFound // removed meanwhile
	}
	if s.hasUpperFile(snap.ID) {
		if err := s.remountUpper(ctx, snap.ID); err != nil {
			return err
		}
	}
	if s.isTar(snap.ID) {
		if err := s.extractAdopted(ctx, snap); err != nil {
			return err
		}
		return fmt.Errorf("a layer was applied already: %w", errdefs.ErrFailedPrecondition)
	}
	empty, err := isEmpty(s.upper(snap.ID))
	if err != nil {
		return err
	}
	if !empty {
		return fmt.Errorf("the upper directory is not empty: %w", errdefs.ErrFailedPrecondition)
	}
	// What an image's annotations say of user namespaces is nothing to its layers.
	return s.chownUpper(ctx, snap.ID, snap.ParentIDs, nil)
}

// adoptTar links the layer and, as far as it can be known now, writes its index
// and mounts it, so that Commit and the Prepare that follows find it done.
func (s *Snapshotter) adoptTar(ctx context.Context, snap storage.Snapshot, l *layer.Layer) (err error) {
	id := snap.ID
	defer func() {
		if err != nil {
			err = errors.Join(err, s.dropLayer(id))
		}
	}()
	if err := s.writeRecord(id, adopted{l.DiffID, l.Size}); err != nil {
		return err
	}
	if err := s.layers.Link(l.DiffID, s.layer(id)); err != nil {
		return err
	}
	if err := syncDir(s.dir(id), s.snapshotsDir()); err != nil {
		return err
	}
	if err := s.markOnlyLowest(id, l); err != nil {
		return err
	}
	root, err := s.earlyIndex(ctx, snap, l.Table)
	if err != nil {
		return err
	}
	if root == nil {
		return s.guessLowest(id, l)
	}
	if err := s.writeIndex(s.index(id), id, root, l.Size); err != nil {
		return err
	}
	return s.mountLayer(ctx, id)
}

// guessLowest writes the index that the layer has if Commit names no parent,
// under a name of its own: the Prepare that follows then waits for a mount only.
func (s *Snapshotter) guessLowest(id string, l *layer.Layer) error {
	root, err := l.Table.Index(nil)
	if err != nil {
		return err
	}
	return s.writeIndex(s.lowestIndex(id), id, root, l.Size)
}

// markOnlyLowest tells Commit, which has no time to look into a layer, that this one takes no parent.
func (s *Snapshotter) markOnlyLowest(id string, l *layer.Layer) error {
	reason := l.Table.OnlyLowest()
	if reason == nil {
		return nil
	}
	return writeFile(s.onlyLowest(id), true, func(w io.Writer) error {
		_, err := io.WriteString(w, reason.Error())
		return err
	})
}

// adoptDirectory extracts the layer. Without a known parent the tar stays
// linked as `pending` until Commit has named it.
func (s *Snapshotter) adoptDirectory(ctx context.Context, snap storage.Snapshot, l *layer.Layer) (err error) {
	id := snap.ID
	defer func() {
		if err != nil {
			err = errors.Join(err, clearDir(s.upper(id)), removeFile(s.pending(id)), removeFile(s.record(id)), removeFile(s.onlyLowest(id)), removeFile(s.extracting(id)))
		}
	}()
	only := l.Table.OnlyLowest()
	if only != nil && len(snap.ParentIDs) > 0 {
		return only
	}
	if err := s.writeRecord(id, adopted{l.DiffID, l.Size}); err != nil {
		return err
	}
	if err := errors.Join(s.layers.Link(l.DiffID, s.pending(id)), s.markOnlyLowest(id, l)); err != nil {
		return err
	}
	if err := s.extract(ctx, id, s.pending(id), s.lowers(snap.ParentIDs), only == nil); err != nil {
		return err
	}
	if len(snap.ParentIDs) > 0 {
		if err := errors.Join(removeFile(s.pending(id)), removeFile(s.record(id))); err != nil {
			return err
		}
	}
	if err := removeFile(s.extracting(id)); err != nil {
		return err
	}
	return syncDir(s.dir(id), s.snapshotsDir())
}
